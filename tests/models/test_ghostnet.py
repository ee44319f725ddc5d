"""Oracles: branches, ghost module and bottleneck by sums in float64; folded is unfolded, branch by branch and whole."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxaroo.models import ghostnet
from jaxaroo.models.ghostnet import Bottleneck, Convs, GhostNetConfig, divisible, enlarge, fold_branches, halve
from jaxaroo.models.safetensors import CheckpointError

CFG = GhostNetConfig(table="small", width=0.25, classes=3, head=12)
FOLDED = dataclasses.replace(CFG, folded=True)


def shaken(tree, seed):
    """Statistics and gains that no network begins with; gains such that the sum of branches is about as large as its
    input, or rounding errors would grow with the layers."""
    keys = iter(jax.random.split(jax.random.key(seed), 1000))
    ranges = {"var": (0.5, 1.5), "mean": (-0.4, 0.4), "norm": (0.3, 0.6), "norm_bias": (-0.3, 0.3)}

    def one(path, x):
        low, high = ranges.get(path[-1].key, (-0.1, 0.1))
        u = jax.random.uniform(next(keys), x.shape, minval=low, maxval=high)
        return u if path[-1].key in ranges else x + u

    return jax.tree_util.tree_map_with_path(one, tree)


@functools.cache
def network():
    return tuple(shaken(tree, n) for n, tree in enumerate(ghostnet.init(CFG, jax.random.key(0))))


@functools.cache
def images():
    return jax.random.normal(jax.random.key(1), (2, 8, 10, 3))


def module(make):
    graph, params, stats = nnx.split(make(nnx.Rngs(params=jax.random.key(3))), nnx.Param, nnx.BatchStat)
    params, stats = shaken(nnx.to_pure_dict(params), 4), shaken(nnx.to_pure_dict(stats), 5)
    return graph, params, stats


# ------------------------------------------------------------------------------------------------------------- oracle
def conv_oracle(x, kernel, stride=1, groups=1):
    (B, Y, X), (O, Ky, Kx, I) = x.shape[:3], kernel.shape
    padded = np.pad(x, ((0, 0), (Ky // 2, Ky // 2), (Kx // 2, Kx // 2), (0, 0)))
    out = np.zeros((B, -(-Y // stride), -(-X // stride), O))
    for ky, kx, o in itertools.product(range(Ky), range(Kx), range(O)):
        first = o * groups // O * I
        part = padded[:, ky : ky + Y : stride, kx : kx + X : stride, first : first + I]
        out[..., o] += part @ kernel[o, ky, kx]
    return out


def convs_oracle(x, p, s, stride=1, groups=1):
    """The sum of all branches, from the definition."""
    parts = [conv_oracle(x, kernel, stride, groups) for kernel in p["kernel"]]
    if "point" in p:
        parts.append(conv_oracle(x, p["point"], stride, groups))
    if len(parts) < len(p["norm"]):
        parts.append(x)
    assert len(parts) == len(p["norm"])
    total = 0.0
    for n, y in enumerate(parts):
        total = total + p["norm"][n] * (y - s["mean"][n]) / np.sqrt(s["var"][n] + 1e-5) + p["norm_bias"][n]
    return total


def ghost_oracle(x, p, s, outputs, relu):
    act = (lambda y: np.maximum(y, 0)) if relu else (lambda y: y)
    a = act(convs_oracle(x, p["primary"], s["primary"]))
    b = act(convs_oracle(a, p["cheap"], s["cheap"], groups=a.shape[-1]))
    y = np.concatenate([a, b], -1)[..., :outputs]
    if "gate" in p:
        Y, X = x.shape[1] // 2, x.shape[2] // 2
        z = sum(x[:, i : 2 * Y : 2, j : 2 * X : 2] for i, j in itertools.product((0, 1), (0, 1))) / 4
        z = convs_oracle(z, p["gate"], s["gate"])
        z = convs_oracle(z, p["row"], s["row"], groups=outputs)
        z = convs_oracle(z, p["column"], s["column"], groups=outputs)
        for i, j in np.ndindex(y.shape[1:3]):
            y[:, i, j] /= 1 + np.exp(-z[:, i * Y // y.shape[1], j * X // y.shape[2]])
    return y


def bottleneck_oracle(x, p, s, row, inside, outputs):
    y = ghost_oracle(x, p["ghost1"], s["ghost1"], inside, True)
    if "depthwise" in p:
        y = convs_oracle(y, p["depthwise"], s["depthwise"], row[4], inside)
    if "reduce" in p:
        z = np.maximum(y.mean((1, 2)) @ p["reduce"].T + p["reduce_bias"], 0)
        y = y * np.clip((z @ p["expand"].T + p["expand_bias"] + 3) / 6, 0, 1)[:, None, None]
    y = ghost_oracle(y, p["ghost2"], s["ghost2"], outputs, False)
    if "short1" in p:
        x = convs_oracle(x, p["short1"], s["short1"], row[4], x.shape[-1])
        x = convs_oracle(x, p["short2"], s["short2"])
    return x + y


f64 = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))


# -------------------------------------------------------------------------------------------------------------- blocks
BRANCHES = {  # what the sum consists of, by its sizes
    "3 kernels of 1 x 1": (dict(inputs=3, outputs=4), 3),
    "and the identity": (dict(inputs=4, outputs=4), 4),
    "3 kernels of 3 x 3 and 1 x 1": (dict(inputs=3, outputs=4, size=3), 4),
    "all": (dict(inputs=4, outputs=4, size=3), 5),
    "depthwise": (dict(inputs=4, outputs=4, size=5, depthwise=True), 5),
    "depthwise with a stride": (dict(inputs=4, outputs=4, size=3, stride=2, depthwise=True), 4),
}


@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.slow
def test_branches_are_their_sum_and_fold_to_one_kernel(name):
    sizes, number = BRANCHES[name]
    stride, groups = sizes.get("stride", 1), sizes["inputs"] if "depthwise" in sizes else 1
    graph, params, stats = module(lambda rngs: Convs(CFG, **sizes, branched=True, rngs=rngs))
    assert len(params["norm"]) == number
    x = jax.random.normal(jax.random.key(6), (2, 5, 6, sizes["inputs"]))
    found, same = nnx.merge(graph, params, stats)(x, False)
    wanted = convs_oracle(np.asarray(x, np.float64), f64(params), f64(stats), stride, groups)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, same, stats)
    one = fold_branches(params, stats)
    assert one["kernel"].shape == params["kernel"].shape[1:]
    folded = conv_oracle(np.asarray(x, np.float64), f64(one)["kernel"], stride, groups) + f64(one)["bias"]
    np.testing.assert_allclose(folded, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("branch", range(5))
def test_each_branch_folds_by_itself(branch):
    """The others are silenced by gains and biases of 0: kernels, then 1 x 1, then the identity."""
    sizes = dict(inputs=4, outputs=4, size=3)
    graph, params, stats = module(lambda rngs: Convs(CFG, **sizes, branched=True, rngs=rngs))
    here = (jnp.arange(5) == branch).astype(jnp.float32)[:, None]
    params |= {name: params[name] * here for name in ("norm", "norm_bias")}
    x = jax.random.normal(jax.random.key(6), (2, 5, 6, 4))
    unfolded, _ = nnx.merge(graph, params, stats)(x, False)
    one = fold_branches(params, stats)
    outside = np.asarray(one["kernel"]).copy()
    outside[:, 1, 1] = 0
    assert outside.any() == (branch < 3)
    folded = conv_oracle(np.asarray(x, np.float64), f64(one)["kernel"]) + f64(one)["bias"]
    assert np.abs(folded).max() > 0.1
    np.testing.assert_allclose(unfolded, folded, rtol=1e-5, atol=1e-5)


ROWS = {
    "plain": (False, (3, 10, 6, 0, 1)),
    "shape changes": (True, (3, 10, 12, 0, 1)),
    "odd channels": (True, (5, 22, 20, 1, 2)),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.slow
def test_a_bottleneck_is_that_of_sums(name):
    attention, row = ROWS[name]
    whole = dataclasses.replace(CFG, width=1.0)
    inside, outputs = whole.channels(row[1]), whole.channels(row[2])
    make = lambda rngs: Bottleneck(whole, 8, row, attention=attention, rngs=rngs)
    graph, params, stats = module(make)
    assert ("short1" in params, "reduce" in params) == (outputs != 8 or row[4] > 1, bool(row[3]))
    x = jax.random.normal(jax.random.key(6), (2, 7, 6, 8))
    found, _ = jax.jit(lambda x: nnx.merge(graph, params, stats)(x, False))(x)
    wanted = bottleneck_oracle(np.asarray(x, np.float64), f64(params), f64(stats), row, inside, outputs)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


def test_halving_and_enlarging_odd_images():
    x = jnp.arange(35.0).reshape(1, 5, 7, 1)
    small = np.asarray(halve(x))[0, :, :, 0]
    assert small.tolist() == [[4.0, 6.0, 8.0], [18.0, 20.0, 22.0]]
    large = np.asarray(enlarge(halve(x), (5, 7)))[0, :, :, 0]
    rows, columns = [0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(large, small[np.ix_(rows, columns)])


def test_channels_are_multiples_of_4():
    found = {number: divisible(number) for number in (1, 5.9, 6, 18, 15.6, 120, 4.4, 8.5, 41.9, 42)}
    assert found == {1: 4, 5.9: 8, 6: 8, 18: 20, 15.6: 16, 120: 120, 4.4: 4, 8.5: 8, 41.9: 40, 42: 44}


# --------------------------------------------------------------------------------------------------------------- whole
def logits(cfg, params, stats):
    return jax.jit(lambda p, s, x: ghostnet.forward(cfg, p, s, x).logits)(params, stats, images())


@functools.cache
def unfolded():
    return np.asarray(logits(CFG, *network()))


@pytest.mark.proof
def test_the_whole_network_folded_is_the_network(tmp_path):
    params, stats = network()
    cfg, kernels = ghostnet.fold(CFG, params, stats)
    assert cfg == FOLDED
    size = np.abs(unfolded()).max()
    assert np.ptp(unfolded(), axis=0).max() > 0.01 * size  # images differ
    np.testing.assert_allclose(logits(cfg, kernels, {}), unfolded(), rtol=1e-5, atol=1e-5 * size)
    ghostnet.save(tmp_path / "folded", cfg, kernels, {})
    ghostnet.save(tmp_path / "branches", CFG, params, stats)
    for folder, wanted in (("folded", (cfg, kernels, {})), ("branches", (CFG, params, stats))):
        found = ghostnet.load(tmp_path / folder)
        assert found[0] == wanted[0]
        jax.tree.map(np.testing.assert_array_equal, found[1:], wanted[1:])


@pytest.mark.proof
def test_training_moves_every_statistic_and_reaches_every_weight():
    params, stats = network()

    @jax.jit
    def both(params):
        def loss(params):
            out = ghostnet.forward(CFG, params, stats, images(), train=True)
            return jnp.sum(out.logits * jnp.asarray([1.0, -2.0, 0.5])[None]), out.stats

        return jax.grad(loss, has_aux=True)(params)

    gradient, new = both(params)
    moved = jax.tree.map(lambda a, b: bool((a != b).all()), new, stats)
    assert all(jax.tree.leaves(moved))
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.asarray(g).any(), jax.tree_util.keystr(path)


def test_the_published_network_has_the_published_parameters():
    """6.1 million in use at width 1.0, and 8.9 at 1.3, as of V2."""
    size = lambda cfg: sum(leaf.size for leaf in jax.tree.leaves(ghostnet.shapes(cfg)["params"]))
    cfg = GhostNetConfig(classes=1000, stem_stride=2, folded=True)
    assert size(cfg) == 6_125_716
    assert size(dataclasses.replace(cfg, width=1.3)) == 8_919_880


@pytest.mark.errors
def test_what_cannot_be_is_refused(tmp_path):
    params, stats = network()
    with pytest.raises(ValueError, match="1 x 5 pixels where attention halves it"):
        halve(jnp.zeros((1, 1, 5, 2)))
    with pytest.raises(ValueError, match="no branches to train"):
        ghostnet.forward(FOLDED, {}, {}, images(), train=True)
    wrong = (dict(table="large"), dict(width=0.0), dict(classes=0), dict(head=1.5), dict(stem_stride=3), dict(folded=1))
    for each in wrong:
        with pytest.raises(ValueError, match="found"):
            GhostNetConfig(**each)
    ghostnet.save(tmp_path / "m", CFG, params, stats)
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"folded": True}))
    with pytest.raises(CheckpointError, match=r"missing params\.last\.bias"):
        ghostnet.load(tmp_path / "m")
