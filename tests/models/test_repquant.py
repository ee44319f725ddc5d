"""Oracles: the layer before it was rewritten, codes channel by channel, and the grid of the softmax in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.models.decoder import DecoderConfig, forward, init_params, stack_layers, unstack_layers
from jaxaroo.models.ptq import layer_inputs
from jaxaroo.models.repquant import (
    PERCENTILES,
    Uniform,
    calibrate,
    calibrate_softmax,
    dequantise,
    dequantise_softmax,
    norm_scales,
    quantise,
    quantise_softmax,
    ratios,
    reparameterise_layer_norm,
    reparameterise_norms,
    shared,
)

CFG = DecoderConfig(
    vocab_size=20, embed_dim=32, ffn_dim=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True,
    qkv_bias=True, o_bias=True, mlp_bias=True,
)  # fmt: skip
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 12)))
run = jax.jit(lambda params: forward(CFG, params, TOKENS, jnp.broadcast_to(jnp.arange(12)[None], TOKENS.shape)).hidden)


def skewed(seed, tokens=500, K=16):
    """Channels of different size and place, with outliers."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, K)) * np.exp2(rng.normal(size=K)) + 2 * rng.normal(size=K)
    return np.where(rng.random(x.shape) < 0.002, 8 * x, x).astype(np.float32)


@functools.cache
def base():
    """Gains like those of a trained network: unlike."""
    params = init_params(CFG, jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), 100))
    moved = jax.tree.map(lambda w: w + 0.05 * jax.random.normal(next(keys), w.shape), params)
    gain = lambda w: w * jnp.exp2(jax.random.normal(next(keys), w.shape))
    return moved | {"layers": {n: gain(w) if n.endswith("norm") else w for n, w in moved["layers"].items()}}


@functools.cache
def calibrated():
    return jax.jit(norm_scales, static_argnums=(0, 3))(CFG, base(), TOKENS, 4)


# -------------------------------------------------------------------------------------------------- uniform quantiser
def by_hand(x, bits, symmetric):
    """Scale and zero of one channel: the percentile with the least error, in float64."""
    found = []
    for p in PERCENTILES:
        if symmetric:
            least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            scale, zero = np.quantile(np.abs(x), p) / most, 0.0
        else:
            least, most = 0, 2**bits - 1
            low, high = np.quantile(x, 1 - p), np.quantile(x, p)
            scale = (high - low) / most
            zero = np.rint(-low / scale)
        codes = np.clip(np.rint(x / scale) + zero, least, most)
        found.append((np.mean((x - (codes - zero) * scale) ** 2), scale, zero, codes))
    return min(found, key=lambda f: f[0]), [f[0] for f in found]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_each_channel_is_clipped_where_it_loses_least(bits, symmetric):
    x, chosen = skewed(1, 3000), []
    q = calibrate(jnp.asarray(x), bits, symmetric=symmetric)
    codes = quantise(jnp.asarray(x), q, bits, symmetric=symmetric)
    for k in range(16):
        (_, scale, zero, want), losses = by_hand(np.float64(x[:, k]), bits, symmetric)
        chosen.append(int(np.argmin(losses)))
        np.testing.assert_allclose(q.scale[k], scale, rtol=1e-5)
        assert q.zero[k] == zero
        assert (np.asarray(codes[:, k]) != want).sum() <= 2  # float32 may see a tie where there is none
        np.testing.assert_allclose(
            dequantise(codes, q)[:, k], (np.float64(codes[:, k]) - zero) * scale, rtol=1e-5, atol=1e-6
        )
    assert bits == 4 or len({*chosen}) > 1
    assert codes.min() == (-(2 ** (bits - 1)) if symmetric else 0)
    assert codes.max() == (2 ** (bits - 1) - 1 if symmetric else 2**bits - 1)


def test_a_channel_that_is_always_zero_stays_zero():
    x = jnp.asarray(skewed(2)).at[:, 3].set(0.0)
    for symmetric in (False, True):
        q = calibrate(x, 4, symmetric=symmetric)
        low = dequantise(quantise(x, q, 4, symmetric=symmetric), q)
        assert (q.scale > 0).all()  # norms are divided by it
        assert np.isfinite(low).all()
        assert (low[:, 3] == 0).all()


def test_a_channel_that_never_changes_is_what_it_was():
    x = jnp.asarray(skewed(2)).at[:, 3].set(0.3).at[:, 5].set(-7.6)
    for symmetric in (False, True):
        q = calibrate(x, 4, symmetric=symmetric)
        low = dequantise(quantise(x, q, 4, symmetric=symmetric), q)
        np.testing.assert_allclose(low[:, jnp.asarray([3, 5])], [[0.3, -7.6]] * 500, rtol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_weights_behind_a_silent_channel_do_not_outgrow_the_others(symmetric):
    """They are multiplied by r and then by 0; but their row is quantised together."""
    x = jnp.asarray(skewed(2)).at[:, 3].set(0.0) * 0.01
    r = ratios({"attn_norm": calibrate(x, 8, symmetric=symmetric).scale[None]})["attn_norm"][0]
    np.testing.assert_allclose(r[3], 1, rtol=1e-5)
    assert (calibrate(0 * x, 8, symmetric=symmetric).scale == 1).all()


# ------------------------------------------------------------------------------------------------- reparameterisation
def layer_norm(x, gain, bias):
    x = np.float64(x)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * np.float64(gain) + np.float64(bias)


@functools.cache
def rewritten():
    rng = np.random.default_rng(3)
    x, (gain, bias) = skewed(3), rng.normal(size=(2, 16)).astype(np.float32)
    following = tuple(
        (rng.normal(size=shape).astype(np.float32), rng.normal(size=shape[:-1]).astype(np.float32))
        for shape in ((12, 16), (2, 3, 16))
    )
    channels = calibrate(jnp.asarray(layer_norm(x, gain, bias), jnp.float32), 4)
    new = reparameterise_layer_norm(
        jnp.asarray(gain), jnp.asarray(bias), jax.tree.map(jnp.asarray, following), channels
    )
    return x, (gain, bias, following), channels, new


def test_a_rewritten_layer_norm_leaves_every_output_as_it_was():
    x, (gain, bias, following), _, (new_gain, new_bias, new) = rewritten()
    before, after = layer_norm(x, gain, bias), layer_norm(x, new_gain, new_bias)
    assert np.abs(after - before).max() > 1
    for (w, c), (new_w, new_c) in zip(following, new, strict=True):
        product = lambda x, w, c: np.einsum("tk,...k->t...", x, np.float64(w)) + np.float64(c)
        want = product(before, w, c)
        np.testing.assert_allclose(product(after, new_w, new_c), want, atol=1e-5 * np.abs(want).max())


def test_one_quantiser_then_gives_the_codes_that_each_channel_had():
    """To the code, where the quotient is not within float32's rounding of a tie."""
    x, (gain, bias, _), channels, (new_gain, new_bias, _) = rewritten()
    before, after = layer_norm(x, gain, bias), layer_norm(x, new_gain, new_bias)
    quotient = before / np.float64(channels.scale)
    tie = np.abs(np.abs(quotient - np.rint(quotient)) - 0.5) < 1e-4
    assert tie.mean() < 1e-3
    one = shared(channels)
    assert one.scale.shape == one.zero.shape == ()
    assert one.zero == np.rint(np.mean(np.float64(channels.zero)))
    np.testing.assert_allclose(one.scale, np.mean(np.float64(channels.scale)), rtol=1e-6)
    want = np.clip(np.rint(quotient) + np.float64(channels.zero), 0, 15)
    got = np.clip(np.rint(after / np.float64(one.scale)) + np.float64(one.zero), 0, 15)
    np.testing.assert_array_equal(got[~tie], want[~tie])
    ours = quantise(jnp.asarray(after, jnp.float32), one, 4)
    np.testing.assert_array_equal(np.asarray(ours)[~tie], want[~tie])
    plain = quantise(jnp.asarray(before, jnp.float32), one, 4)
    assert (np.asarray(plain) != want).mean() > 0.3


@pytest.mark.parametrize("form", [lambda tree: tree, unstack_layers], ids=["stacked", "tuple"])
@pytest.mark.slow
def test_a_decoder_with_rewritten_norms_computes_the_same(form):
    params = form(base())
    scales = calibrated()
    new = reparameterise_norms(params, ratios(scales))
    assert isinstance(new["layers"], tuple) == isinstance(params["layers"], tuple)
    np.testing.assert_allclose(run(new), run(params), atol=1e-5)
    new, old = stack_layers(new)["layers"], base()["layers"]
    for norm, block, names in (("attn_norm", "attn", "qkv"), ("mlp_norm", "mlp", ("gate", "up"))):
        r = np.float64(scales[norm]) / np.mean(np.float64(scales[norm]), -1, keepdims=True)
        assert r.max() > 2 * r.min()
        np.testing.assert_allclose(new[norm], np.float64(old[norm]) / r, rtol=1e-5)
        for name in names:
            np.testing.assert_allclose(
                new[block][name], np.einsum("l...d,ld->l...d", np.float64(old[block][name]), r), rtol=1e-5
            )
        unchanged = old[block].keys() - {*names}
        assert all((new[block][name] == old[block][name]).all() for name in unchanged)


@pytest.mark.slow
def test_one_norm_alone_may_be_rewritten():
    some = {"mlp_norm": ratios(calibrated())["mlp_norm"]}
    new = reparameterise_norms(base(), some)
    np.testing.assert_allclose(run(new), run(base()), atol=1e-5)
    assert new["layers"]["attn_norm"] is base()["layers"]["attn_norm"]
    assert (new["layers"]["mlp_norm"] != base()["layers"]["mlp_norm"]).any()


@pytest.mark.slow
def test_what_leaves_the_rewritten_norms_has_one_scale():
    scales = calibrated()
    _, before = layer_inputs(CFG, base(), TOKENS)
    _, after = layer_inputs(CFG, reparameterise_norms(base(), ratios(scales)), TOKENS)
    for norm, field in (("attn_norm", "qkv"), ("mlp_norm", "gate_up")):
        for i in range(3):
            x, y = getattr(before[i], field), getattr(after[i], field)
            # Two programs, whose sums are in orders of their own: some units in the last place of float32.
            np.testing.assert_allclose(scales[norm][i], calibrate(x, 4, symmetric=True).scale, rtol=1e-5)
            channels = Uniform(scales[norm][i], jnp.zeros(32))
            want, got = quantise(x, channels, 4, symmetric=True), quantise(y, shared(channels), 4, symmetric=True)
            quotient = np.float64(x) / np.float64(scales[norm][i])
            tie = np.abs(np.abs(quotient - np.rint(quotient)) - 0.5) < 1e-4
            assert tie.mean() < 0.01
            np.testing.assert_array_equal(np.asarray(got)[~tie], np.asarray(want)[~tie])


# ------------------------------------------------------------------------------------------------------------ softmax
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_probabilities_become_the_nearest_power_of_the_root_of_two(bits):
    """Nearest in the logarithm, among all steps and one more; what is nearer to none of them is zero."""
    most, rng = 0.83, np.random.default_rng(4)
    a = np.exp2(rng.uniform(-(2.0 ** (bits - 1)) - 1, 0, 2000)).astype(np.float32)
    a = a[a > np.finfo(np.float32).tiny]
    grid = most * 2.0 ** (-np.arange(2**bits + 1) / 2)
    distance = np.abs(np.log2(np.float64(a))[:, None] - np.log2(grid)[None])
    near = np.argmin(distance, 1)
    clear = np.diff(np.sort(distance, 1)[:, :2], axis=1)[:, 0] > 1e-4
    want = np.where(near < 2**bits, grid[near], 0.0)
    codes = quantise_softmax(jnp.asarray(a), jnp.float32(most), bits)
    got = dequantise_softmax(codes, jnp.float32(most), bits)
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(np.asarray(codes)[clear], near[clear])
    np.testing.assert_allclose(np.asarray(got)[clear], want[clear], rtol=1e-6)
    if bits < 8:  # the last steps of 8 bits are below float32
        assert {*range(2**bits + 1)} == set(near.tolist())


def test_zero_stays_zero_and_what_is_larger_becomes_the_largest():
    codes = quantise_softmax(jnp.asarray([0.0, 1.0, 0.5, 0.25 * 2**0.5]), jnp.float32(0.5), 4)
    np.testing.assert_array_equal(codes, [16, 0, 0, 1])
    got = dequantise_softmax(codes, jnp.float32(0.5), 4)
    np.testing.assert_allclose(got, [0, 0.5, 0.5, 0.5 / 2**0.5], rtol=1e-6)


def test_the_largest_probability_is_the_percentile_that_loses_least():
    for seed, spread in ((0, 1.0), (1, 6.0)):
        logits = np.random.default_rng(seed).normal(size=(60, 50)) * spread
        a = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        losses = []
        for p in PERCENTILES:
            most = np.quantile(a, p)
            steps = np.clip(np.rint(-2 * np.log2(a / most)), 0, 16)
            losses.append(np.mean((a - np.where(steps < 16, most * 2.0 ** (-steps / 2), 0)) ** 2))
        want = np.quantile(a, PERCENTILES[int(np.argmin(losses))])
        np.testing.assert_allclose(calibrate_softmax(jnp.asarray(a, jnp.float32), 4), want, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.errors
def test_ratios_that_fit_no_norm_are_refused():
    with pytest.raises(ValueError, match=r"reparameterise_norms: ratios of \['norm'\]; expected some of \['attn_norm'"):
        reparameterise_norms(base(), {"norm": jnp.ones((3, 32))})
    with pytest.raises(
        ValueError, match=r"reparameterise_norms: ratios \(32,\) for mlp_norm of \(3, 32\); expected its"
    ):
        reparameterise_norms(base(), {"mlp_norm": jnp.ones(32)})
