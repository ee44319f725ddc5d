"""Oracles: the network by loops over kernels in float64, quantised by its integers; then that all widths are one
program, and that what is stored computes what was trained."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.models import resnet
from jaxaroo.models.resnet import ResNetConfig
from jaxaroo.models.safetensors import CheckpointError, read_index

FLOAT = ResNetConfig(blocks=(1, 2), channels=4, classes=3)
CFG = dataclasses.replace(FLOAT, bits=(8, 6, 4, 2))


@functools.cache
def images():
    return jax.random.normal(jax.random.key(1), (5, 8, 6, 3))


def shaken(tree, seed, by=0.2):
    """No norm is what it began as, so that each matters."""
    keys = iter(jax.random.split(jax.random.key(seed), 200))
    factor = lambda x: jax.random.uniform(next(keys), x.shape, minval=1 - by, maxval=1 + by)
    return jax.tree.map(lambda x: x * factor(x) + by * (factor(x) - 1), tree)


@functools.cache
def networks():
    """A float network whose running statistics are near those of its images, and one of several widths made of it."""
    params, stats = resnet.init(FLOAT, jax.random.key(0))
    params = shaken(params, 2)
    moved = resnet.forward(FLOAT, params, stats, images(), train=True).stats
    stats = jax.tree.map(lambda new, old: old + 10 * (new - old), moved, stats)
    stats = shaken(stats, 3, 0.05)
    wide, wide_stats = resnet.widen(CFG, params, stats)
    scales = resnet.init_scales(CFG, wide, wide_stats, images())
    norms = lambda path, x: shaken(x, 4, 0.1) if path[-1].key in ("norm", "norm_bias", "mean", "var") else x
    wide, wide_stats = (jax.tree_util.tree_map_with_path(norms, tree) for tree in (wide, wide_stats))
    return params, stats, wide, wide_stats, scales


@functools.cache
def trained_form():
    """Logits and new statistics, in training or not, at a traced width."""

    @functools.partial(jax.jit, static_argnames="train")
    def run(params, stats, scales, bits, train=False):
        low = resnet.at_width(CFG, params, scales, bits)
        return resnet.forward(CFG, low, stats, images(), bits, scales, train=train)

    return run


# ------------------------------------------------------------------------------------------------------------- oracle
def conv_oracle(x, kernel, stride):
    B, Y, X, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((B, -(-Y // stride), -(-X // stride), kernel.shape[0]))
    for ky, kx in itertools.product(range(3), range(3)):
        part = padded[:, ky : ky + Y : stride, kx : kx + X : stride]
        out += np.einsum("byxi,oi->byxo", part, kernel[:, ky, kx])
    return out


def oracle(params, stats, bits=None, scales=None, train=False):
    """Logits and running statistics, straight from the definition, in float64."""
    f64 = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    params, stats, i = f64(params), f64(stats), 0 if bits is None else CFG.bits.index(bits)
    found = jax.tree.map(np.copy, stats)

    def unit(x, path, stride=1):
        at = lambda tree: functools.reduce(lambda node, name: node[name], path, tree)
        own, running, kernel = at(params), at(stats), at(params)["kernel"]
        if bits is not None and path[0] != "stem":
            learned = at(scales)
            bf16 = lambda rho: np.asarray(jnp.exp2(rho).astype(jnp.bfloat16), np.float64)
            s, a = bf16(learned["rho"])[:, :, None, None], bf16(learned["act"][i])
            down = 2 ** (8 - bits)
            C = np.clip(np.rint(kernel / s), -128, 127)
            kernel = np.clip(np.rint(C / down), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * s * down
            x = np.clip(np.rint(x / a), 0, 2**bits - 1) * a
        y = conv_oracle(x, kernel, stride)
        mean, var = running["mean"][i], running["var"][i]
        if train:
            flat = y.reshape(-1, y.shape[-1])
            mean, var = flat.mean(0), flat.var(0)
            new = at(found)
            new["mean"][i] = 0.9 * new["mean"][i] + 0.1 * mean
            new["var"][i] = 0.9 * new["var"][i] + 0.1 * var * len(flat) / (len(flat) - 1)
        return own["norm"][i] * (y - mean) / np.sqrt(var + 1e-5) + own["norm_bias"][i]

    relu = lambda x: np.maximum(x, 0)
    x = relu(unit(np.asarray(images(), np.float64), ("stem",)))
    for name, stride in (("block0", 1), ("block1", 2), ("block2", 1)):
        y = unit(relu(unit(x, (name, "conv1"), stride)), (name, "conv2"))
        short = np.zeros_like(y)
        short[..., : x.shape[-1]] = x[:, ::stride, ::stride]
        x = relu(y + short)
    return x.mean((1, 2)) @ params["head"].T + params["head_bias"], found


def assert_close(found, wanted, tolerance=2e-4):
    np.testing.assert_allclose(found.logits, wanted[0], rtol=tolerance, atol=tolerance)
    flat = jax.tree.leaves(jax.tree.map(lambda a, b: (np.asarray(a), b), found.stats, wanted[1]), is_leaf=tuple_like)
    for a, b in flat:
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def tuple_like(x):
    return isinstance(x, tuple)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.slow
def test_the_float_network_is_that_of_loops(train):
    params, stats, *_ = networks()
    assert_close(resnet.forward(FLOAT, params, stats, images(), train=train), oracle(params, stats, train=train))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("bits", CFG.bits)
@pytest.mark.slow
def test_at_each_width_it_is_that_of_integers(bits, train):
    """Statistics of the other widths stay as they are."""
    _, _, params, stats, scales = networks()
    found = trained_form()(params, stats, scales, jnp.int32(bits), train=train)
    assert_close(found, oracle(params, stats, bits, scales, train), 2e-3)


def test_all_widths_are_one_program():
    _, _, params, stats, scales = networks()
    traces = []

    @jax.jit
    def run(bits):
        traces.append(bits)
        low = resnet.at_width(CFG, params, scales, bits)
        return resnet.forward(CFG, low, stats, images(), bits, scales).logits

    found = [run(jnp.int32(b)) for b in CFG.bits]
    assert len(traces) == 1
    assert all((np.asarray(a) != np.asarray(b)).any() for a, b in itertools.combinations(found, 2))


def test_the_published_network_has_the_published_parameters():
    """0.27 million in He et al., table 6; each convolution, norm and the last layer counted by hand."""
    params, stats = jax.eval_shape(lambda: resnet.init(ResNetConfig(), jax.random.key(0)))
    convolutions = 27 * 16 + 6 * 9 * 16 * 16 + 9 * 16 * 32 + 5 * 9 * 32 * 32 + 9 * 32 * 64 + 5 * 9 * 64 * 64
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert size(params) == convolutions + norms + 64 * 10 + 10 == 269_722
    assert size(stats) == norms
    wide = jax.eval_shape(lambda: resnet.init(ResNetConfig(bits=(8, 4)), jax.random.key(0)))[0]
    assert size(wide) == 269_722 + norms


def test_a_widened_network_computes_what_it_did():
    params, stats, *_ = networks()
    wide = resnet.widen(CFG, params, stats)
    for bits in (None, 0):
        found = resnet.forward(CFG, *wide, images(), bits)
        np.testing.assert_array_equal(found.logits, resnet.forward(FLOAT, params, stats, images()).logits)
    assert wide[0]["block0"]["conv1"]["norm"].shape == (4, 4)
    for row in wide[1]["stem"]["var"]:
        np.testing.assert_array_equal(row, stats["stem"]["var"][0])


def test_calibration_takes_the_candidate_of_the_least_error():
    """Of the second block's first convolution, by trying all in float64 on its input."""
    params, stats, _, _, scales = networks()
    wide = resnet.widen(CFG, params, stats)
    f64 = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, stats))

    def unit(x, name, own, running, stride=1):
        y = conv_oracle(x, own["kernel"], stride)
        return own["norm"][0] * (y - running["mean"][0]) / np.sqrt(running["var"][0] + 1e-5) + own["norm_bias"][0]

    x = np.maximum(unit(np.asarray(images(), np.float64), "stem", f64[0]["stem"], f64[1]["stem"]), 0)
    for bits, rho in zip(CFG.bits, scales["block0"]["conv1"]["act"], strict=True):
        top, error = 2**bits - 1, {}
        for share in np.geomspace(0.05, 1, 60):
            s = share * x.max() / top
            error[s] = ((np.clip(np.rint(x / s), 0, top) * s - x) ** 2).sum()
        assert 2.0 ** float(rho) == pytest.approx(min(error, key=lambda s: error[s]), rel=1e-4)
    again = resnet.init_scales(CFG, *wide, images())
    jax.tree.map(np.testing.assert_array_equal, again, scales)


def test_a_silent_layer_has_a_scale_to_learn_from():
    params, stats, *_ = networks()
    dead = params | {"stem": params["stem"] | {"norm_bias": jnp.full((1, 4), -1e3)}}
    scales = resnet.init_scales(CFG, *resnet.widen(CFG, dead, stats), images())
    np.testing.assert_allclose(
        jnp.exp2(scales["block0"]["conv1"]["act"]), 1 / (2.0 ** np.asarray(CFG.bits) - 1), rtol=1e-5
    )


def test_gradients_reach_what_a_width_has_and_nothing_of_the_others():
    _, _, params, stats, scales = networks()

    @jax.jit
    def gradient(bits):
        def loss(params, scales):
            low = resnet.at_width(CFG, params, scales, bits)
            out = resnet.forward(CFG, low, stats, images(), bits, scales, train=True)
            return jnp.sum(jax.nn.logsumexp(out.logits, -1) - out.logits[:, 0])

        return jax.grad(loss, (0, 1))(params, scales)

    for bits in CFG.bits:
        model, learned = gradient(jnp.int32(bits))
        here = [b == bits for b in CFG.bits]
        for name in ("norm", "norm_bias"):
            moved = np.abs(np.asarray(model["block1"]["conv1"][name])).sum(1) > 0
            assert moved.tolist() == here
        assert (np.asarray(learned["block2"]["conv2"]["act"]) != 0).tolist() == here
        assert (np.asarray(learned["block2"]["conv1"]["rho"]) != 0).all()
        assert (np.asarray(model["block0"]["conv2"]["kernel"]) != 0).any()


# ------------------------------------------------------------------------------------------------------------ storage
@pytest.mark.slow
def test_what_is_stored_computes_what_was_trained_to_the_bit(tmp_path):
    """Both factors of a weight have 8 significant bits, so the weights are the same numbers; and on one machine the
    rest is the same program."""
    _, _, params, stats, scales = networks()
    resnet.save(tmp_path / "m", CFG, resnet.to_stored(CFG, params, stats, scales))
    cfg, stored = resnet.load(tmp_path / "m")
    assert cfg == CFG
    assert stored["params"]["block1"]["conv2"]["codes"].dtype == jnp.int8
    assert stored["params"]["block1"]["conv2"]["scale"].dtype == jnp.bfloat16
    assert not any("kernel" in name for name in read_index(tmp_path / "m") if "block" in name)
    traces = []

    @jax.jit
    def serve(stored, bits):
        traces.append(bits)
        return resnet.logits(cfg, stored, images(), bits)

    for bits in CFG.bits:
        wanted = trained_form()(params, stats, scales, jnp.int32(bits)).logits
        np.testing.assert_array_equal(serve(stored, jnp.int32(bits)), wanted)
        low, _, acts = resnet.from_stored(cfg, stored, bits)
        trained = resnet.at_width(CFG, params, scales, bits)
        jax.tree.map(np.testing.assert_array_equal, low, trained)
        snap = lambda rho: np.asarray(jnp.exp2(rho).astype(jnp.bfloat16), np.float32)
        for name in ("conv1", "conv2"):
            np.testing.assert_array_equal(snap(acts["block2"][name]["act"]), snap(scales["block2"][name]["act"]))
    assert len(traces) == 1


def test_without_a_width_it_is_the_master_and_a_float_network_comes_back(tmp_path):
    params, stats, wide, wide_stats, scales = networks()
    stored = resnet.to_stored(CFG, wide, wide_stats, scales)
    np.testing.assert_array_equal(resnet.logits(CFG, stored, images()), resnet.logits(CFG, stored, images(), 8))
    resnet.save(tmp_path / "m", FLOAT, resnet.to_stored(FLOAT, params, stats))
    cfg, stored = resnet.load(tmp_path / "m")
    assert cfg == FLOAT
    wanted = resnet.forward(FLOAT, params, stats, images()).logits
    np.testing.assert_array_equal(resnet.logits(cfg, stored, images()), wanted)


def test_linear_scales_are_stored_as_well():
    cfg = dataclasses.replace(CFG, scale_param="linear", init="absmax")
    params, stats, wide, wide_stats, _ = networks()
    scales = resnet.init_scales(cfg, *resnet.widen(cfg, params, stats), images())
    assert float(scales["block0"]["conv1"]["rho"].min()) > 0
    stored = resnet.to_stored(cfg, wide, wide_stats, scales)
    low = resnet.at_width(cfg, wide, scales, 4)
    wanted = resnet.forward(cfg, low, wide_stats, images(), 4, scales).logits
    np.testing.assert_array_equal(resnet.logits(cfg, stored, images(), 4), wanted)


@pytest.mark.errors
def test_what_cannot_be_is_refused(tmp_path):
    params, stats, wide, wide_stats, scales = networks()
    with pytest.raises(ValueError, match=r"bits=3; expected one of \(8, 6, 4, 2\)"):
        resnet.forward(CFG, wide, wide_stats, images(), 3, scales)
    with pytest.raises(ValueError, match="with scales"):
        resnet.forward(CFG, wide, wide_stats, images(), 8)
    with pytest.raises(ValueError, match="bits=8"):
        resnet.logits(FLOAT, {"params": params, "stats": stats}, images(), 8)
    with pytest.raises(ValueError, match="expected widths"):
        resnet.widen(FLOAT, params, stats)
    for wrong in (dict(blocks=()), dict(blocks=(0,)), dict(channels=0), dict(classes=1.5), dict(bits=(2, 4))):
        with pytest.raises(ValueError, match="found"):
            ResNetConfig(**wrong)
    resnet.save(tmp_path / "m", FLOAT, resnet.to_stored(FLOAT, params, stats))
    config = tmp_path / "m" / "config.json"
    config.write_text(config.read_text().replace('"bits": []', '"bits": [8, 4]'))
    with pytest.raises(CheckpointError, match=r"missing params.block0.conv1.codes"):
        resnet.load(tmp_path / "m")
