"""Oracles: the two roundings element by element in float64, and finite differences with rounding held fixed."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxaroo.jaxlib_ext.qmm import scale_at, switch_codes
from jaxaroo.models.quantise import (
    QuantConfig,
    code_range,
    decode,
    encode,
    fake_quantise,
    fake_quantise_activations,
    init_gain,
    init_scale,
    scale_of,
    snap,
)

WIDTHS = (8, 6, 4, 3, 2)
INITS = ("sigma3", "search", "absmax", "lsq")
RANGES = {8: (-128, 127), 6: (-32, 31), 4: (-8, 7), 3: (-4, 3), 2: (-2, 1)}
quantise = jax.jit(fake_quantise, static_argnames=("master", "grad_scale"))
start = jax.jit(init_scale, static_argnums=(1, 2))


def bf16(x):
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def groups(shape, scale):
    """(index of an element, index of its scale) for every element."""
    out = scale.ndim - 1
    size = int(np.prod(shape[out:])) // scale.shape[-1]
    for index in np.ndindex(*shape):
        k = np.ravel_multi_index(index[out:], shape[out:])
        yield index, (*index[:out], k // size)


def exact_case(shape, scale_shape, seed=0):
    """W and bfloat16 s whose quotient has 8 binary places and is exact in float32, with ties and ends of ranges."""
    rng = np.random.default_rng(seed)
    scale = bf16(np.exp2(rng.uniform(-9, -5, scale_shape)))
    v = rng.integers(-160 * 256, 160 * 256, shape) / 256
    v.reshape(-1)[::7] = np.round(v.reshape(-1)[::7]) + 0.5
    v.reshape(-1)[3::11] = np.resize([127, 124, 112, 96, 64, -128], v.reshape(-1)[3::11].shape)
    w = np.zeros(shape)
    for i, j in groups(shape, scale):
        w[i] = v[i] * float(scale[j])
    assert (w == w.astype(np.float32)).all()
    return jnp.asarray(w, jnp.float32), jnp.asarray(scale)


CASES = [((3, 24), (3, 1)), ((2, 3, 4, 16), (2, 3, 1)), ((2, 3, 4, 16), (2, 3, 2)), ((4, 96), (4, 3))]  # W, scale


def two_roundings(w, scale, bits, master):
    w, scale = np.asarray(w, np.float64), np.asarray(scale, np.float64)
    (n_h, p_h), (n, p) = ((-(2 ** (b - 1)), 2 ** (b - 1) - 1) for b in (master, bits))
    k = 2 ** (master - bits)
    codes, low, value = np.zeros(w.shape), np.zeros(w.shape), np.zeros(w.shape)
    for i, j in groups(w.shape, scale):
        codes[i] = min(max(round(w[i] / scale[j]), n_h), p_h)  # Python rounds half to even
        low[i] = min(max(round(codes[i] / k), n), p)
        value[i] = low[i] * scale[j] * k
    return codes, low, value


# ----------------------------------------------------------------------------------------------------------- forward
def test_ranges_are_those_of_signed_integers():
    traced = jax.jit(code_range)
    for bits, want in RANGES.items():
        assert code_range(bits) == want
        assert tuple(map(int, traced(jnp.int32(bits)))) == want
        assert traced(jnp.int32(bits))[0].dtype == jnp.int32


@pytest.mark.parametrize(("shape", "scale_shape"), CASES)
@pytest.mark.parametrize("master", [8, 4])
def test_weights_are_those_of_the_two_roundings(shape, scale_shape, master):
    w, scale = exact_case(shape, scale_shape)
    for bits in [b for b in WIDTHS if b <= master]:
        codes, low, value = two_roundings(w, scale, bits, master)
        assert (low.min(), low.max()) == RANGES[bits]
        np.testing.assert_array_equal(quantise(w, scale, jnp.int32(bits), master=master), value)
        made = encode(w, scale, master)
        assert made.dtype == jnp.int8
        np.testing.assert_array_equal(made, codes)
        np.testing.assert_array_equal(decode(made, scale), two_roundings(w, scale, master, master)[2])
        switched = decode(switch_codes(made, master, bits), scale_at(scale, master, bits))
        np.testing.assert_array_equal(switched, value)


def test_codes_are_exact_whatever_becomes_of_the_division():
    """XLA makes of W / s a product with 1 / s if s is broadcast, and so would send some ties the wrong way."""
    scale = bf16(np.exp2(np.random.default_rng(13).uniform(-9, -5, (500, 1))))
    v = np.arange(-132, 132) + 0.5
    w = jnp.asarray(v * np.float64(scale), jnp.float32)
    want = np.broadcast_to(np.clip(np.rint(v), -128, 127), w.shape)
    for s in (scale, np.repeat(scale, 2, 1), np.repeat(scale, v.size, 1)):
        np.testing.assert_array_equal(jax.jit(encode)(w, jnp.asarray(s)), want)
        np.testing.assert_array_equal(encode(w, jnp.asarray(s)), want)
    by_reciprocal = np.clip(np.rint(np.asarray(w) * (np.float32(1) / scale)), -128, 127)
    assert (by_reciprocal != want).mean() > 0.01


def test_one_program_serves_every_width_and_every_layer():
    w, scale = exact_case((5, 3, 24), (5, 3, 1))
    count = []

    def loss(w, scale, bits):
        count.append(bits)
        return jnp.sum(fake_quantise(w, scale, bits) ** 2)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    singles = [step(w, scale, jnp.int32(bits)) for bits in WIDTHS]
    assert len(count) == 1
    for widths in (WIDTHS, WIDTHS[::-1]):
        value, grads = step(w, scale, jnp.array(widths, jnp.int32))
        want = [singles[WIDTHS.index(bits)] for bits in widths]
        for got, whole in zip(grads, zip(*(g for _, g in want), strict=True), strict=True):
            np.testing.assert_array_equal(got, np.stack([g[i] for i, g in enumerate(whole)]))
        parts = [np.sum(np.asarray(quantise(w, scale, jnp.int32(b)))[i] ** 2) for i, b in enumerate(widths)]
        np.testing.assert_allclose(value, np.sum(parts), rtol=1e-6)
    assert len(count) == 2


def test_a_bfloat16_weight_is_quantised_in_float32():
    w = jnp.asarray(np.random.default_rng(1).standard_normal((4, 96)), jnp.bfloat16)
    scale = snap(start(w, QuantConfig(), 1))
    for bits in WIDTHS:
        got = quantise(w, scale, jnp.int32(bits))
        assert got.dtype == jnp.bfloat16
        want = two_roundings(np.asarray(w, np.float32), scale, bits, 8)[2]
        np.testing.assert_array_equal(got, want.astype(ml_dtypes.bfloat16))
    g = jax.grad(lambda w, s: fake_quantise(w, s, 4).astype(jnp.float32).sum(), argnums=(0, 1))(w, scale)
    assert [x.dtype for x in g] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("bits", WIDTHS)
def test_quantising_twice_is_quantising_once(bits):
    w, scale = exact_case((4, 96), (4, 3), seed=2)
    once = quantise(w, scale, jnp.int32(bits))
    step = scale_at(scale, 8, bits)
    np.testing.assert_array_equal(quantise(once, step, jnp.int32(bits), master=bits), once)
    low = switch_codes(encode(w, scale), 8, bits)
    np.testing.assert_array_equal(encode(once, step, bits), low)
    np.testing.assert_array_equal(switch_codes(encode(once, scale), 8, bits), low)


# ----------------------------------------------------------------------------------------------------------- backward
def surrogate(w, scale, at, bits, master):
    """W_l with residual and mask as they are at the point `at`; w, scale and all else float64, one scale an element."""
    (w0, s0), k = at, 2.0 ** (master - bits)
    n, p = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    v0 = w0 / s0
    codes = np.clip(np.rint(v0), -(2 ** (master - 1)), 2 ** (master - 1) - 1)
    q0 = np.clip(np.rint(codes / k), n, p)
    m = (k * n < v0) & (v0 < k * p)
    return np.where(m, (w / scale / k + (q0 - v0 / k)) * scale * k, q0 * scale * k)


@pytest.mark.parametrize(("shape", "scale_shape"), CASES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_gradients_are_finite_differences_of_the_frozen_rounding(shape, scale_shape, bits):
    w, scale = exact_case(shape, scale_shape, seed=3)
    g = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    _, pull = jax.vjp(lambda w, s: quantise(w, s, jnp.int32(bits)), w, scale)
    dw, ds = pull(jnp.asarray(g))
    w0, want_s = np.asarray(w, np.float64), np.zeros(scale_shape)
    s0 = np.zeros(shape)
    for i, j in groups(shape, scale):
        s0[i] = scale[j]
    f, eps = lambda w, s: g * surrogate(w, s, (w0, s0), bits, 8), 1e-7
    want_w = (f(w0 + eps, s0) - f(w0 - eps, s0)) / (2 * eps)
    per_element = (f(w0, s0 + eps * s0) - f(w0, s0 - eps * s0)) / (2 * eps * s0)
    for i, j in groups(shape, scale):
        want_s[j] += per_element[i]
    relative = lambda got, want: np.linalg.norm(got - want) / np.linalg.norm(want)
    assert relative(dw, want_w) < 1e-6
    assert relative(ds, want_s) < 1e-6
    assert 0 < (np.asarray(dw) == 0).mean() < 1  # some elements are clipped, and some are not


def test_the_gradient_of_a_scale_may_be_divided_as_in_lsq():
    w, scale = exact_case((2, 3, 4, 16), (2, 3, 2))  # 32 elements a scale
    grad = lambda bits, on: jax.grad(lambda s: quantise(w, s, bits, grad_scale=on).sum())(scale)
    for bits, most in ((8, 127), (4, 7), (2, 1)):
        np.testing.assert_allclose(
            grad(jnp.int32(bits), True), grad(jnp.int32(bits), False) / np.sqrt(32 * most), rtol=1e-6
        )


@functools.cache
def normal():
    """400,000 numbers from N(0, 1), one output channel."""
    return jnp.asarray(np.random.default_rng(0).standard_normal((1, 400_000)), jnp.float32)


@pytest.mark.parametrize(("bits", "rms"), [(8, 0.29), (6, 1.26), (4, 4.7), (2, 19.1)])
def test_the_gradient_of_a_scale_grows_as_widths_shrink(bits, rms):
    """What the widths compete with: rms 2^d / sqrt(12) for elements in range, and a little for the first rounding."""
    w, step = normal().T, 2.0 ** (8 - bits)
    per_element = np.asarray(
        jax.vjp(lambda s: quantise(w, s, jnp.int32(bits)), jnp.full(w.shape, 3 / 128))[1](jnp.ones(w.shape))[0]
    )
    v = np.asarray(w) * 128 / 3
    inside = (RANGES[bits][0] * step < v) & (v < RANGES[bits][1] * step)
    found = np.sqrt(np.mean(per_element[inside] ** 2))
    first = 3 if bits < 8 else 0  # a step of the second rounding has its two ends in both neighbours
    np.testing.assert_allclose(found, np.sqrt((step**2 + first) / 12), rtol=0.01)
    np.testing.assert_allclose(found, rms, rtol=0.03)


@pytest.mark.parametrize(("bits", "share"), [(8, 0.0002), (4, 0.006), (3, 0.028), (2, 0.22)])
def test_composing_straight_through_with_clip_would_be_wrong(bits, share):
    """jnp.clip shares the gradient of a tie: 1/2 at codes equal to a bound, 1/4 at both."""
    step, (n, p) = 2.0 ** (8 - bits), RANGES[bits]
    through = lambda x: x + jax.lax.stop_gradient(jnp.round(x) - x)

    def composed(w):
        codes = jnp.clip(through(w / (3 / 128)), -128.0, 127.0)
        return jnp.clip(through(codes / step), n, p) * (step * 3 / 128)

    naive = jax.jit(jax.grad(lambda w: composed(w).sum()))(normal())
    ours = jax.grad(lambda w: quantise(w, jnp.full((1, 1), 3 / 128), jnp.int32(bits)).sum())(normal())
    assert set(np.unique(ours)) == {0.0, 1.0}
    np.testing.assert_allclose((np.abs(naive - ours) > 1e-3).mean(), share, rtol=0.2)


# ------------------------------------------------------------------------------------------------------------- scales
def test_scales_are_snapped_to_bfloat16_even_when_compiled():
    x = np.exp2(np.random.default_rng(5).uniform(-20, 3, 1000)).astype(np.float32)
    for f in (snap, jax.jit(snap)):
        got = f(jnp.asarray(x))
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, bf16(x))
    # A conversion to bfloat16 and back passes here too, but XLA may leave such a pair out (xla_allow_excess_precision).
    assert "reduce_precision" in jax.jit(snap).lower(jnp.asarray(x)).as_text()
    np.testing.assert_array_equal(snap(jnp.array([0.0, -1.0, 1e-30])), bf16([1e-8] * 3))
    np.testing.assert_array_equal(jax.grad(lambda x: (3 * snap(x)).sum())(jnp.array([0.3, -1.0])), [3, 3])


def test_the_learned_parameter_is_the_scale_or_its_logarithm():
    s = bf16(np.exp2(np.random.default_rng(6).uniform(-20, 3, 1000)))
    log2, linear = QuantConfig(), QuantConfig(scale_param="linear")
    np.testing.assert_array_equal(scale_of(jnp.log2(s), log2), s)
    np.testing.assert_array_equal(scale_of(jnp.asarray(s), linear), s)
    rho = jnp.array([-7.3, -3.1])
    slope = jax.grad(lambda r: scale_of(r, log2).sum())(rho)
    np.testing.assert_allclose(slope, np.log(2) * np.exp2(rho), rtol=1e-6)  # ds / d rho = ln 2 s
    np.testing.assert_array_equal(jax.grad(lambda r: scale_of(r, linear).sum())(rho), [1, 1])  # it can come back


def by_hand(rows, init, top):
    if init == "absmax":
        return np.abs(rows).max(-1) / top
    if init == "lsq":
        return 2 * np.abs(rows).mean(-1) / np.sqrt(top)
    mean, sigma = rows.mean(-1), rows.std(-1)
    return np.maximum(np.abs(mean - 3 * sigma), np.abs(mean + 3 * sigma)) / (top + 1)


@pytest.mark.parametrize("init", ["sigma3", "absmax", "lsq"])
@pytest.mark.parametrize(("bits", "top"), [((8, 4), 127), ((4, 2), 7)])
def test_scales_start_as_the_formulas_say(init, bits, top):
    w = np.random.default_rng(7).standard_normal((2, 3, 4, 16)) * np.exp2(np.arange(3))[:, None, None] + 0.3
    for group, over, rows in (
        (None, 2, w.reshape(2, 3, 1, 64)),
        (32, 2, w.reshape(2, 3, 2, 32)),
        (None, 1, w[..., None, :]),
    ):
        got = start(jnp.asarray(w, jnp.float32), QuantConfig(init=init, bits=bits, group=group), over)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, by_hand(rows, init, top), rtol=1e-5)


def errors(w, scale, bits):
    """Normalised squared error of each scale's elements, from the roundings in float64."""
    w, s = np.asarray(w, np.float64), np.asarray(scale, np.float64)
    k = 2.0 ** (8 - bits)
    low = np.clip(np.rint(np.clip(np.rint(w / s), -128, 127) / k), *RANGES[bits]) * s * k
    return ((w - low) ** 2).sum(-1, keepdims=True) / (w**2).sum(-1, keepdims=True)


@pytest.mark.parametrize("emphasis", [(), (30.0, 1.0, 1.0, 0.5)])
def test_the_search_finds_the_least_sum_of_errors(emphasis):
    w = np.float32(np.random.default_rng(8).laplace(size=(3, 200)) + np.array([[0.0], [0.5], [5.0]]))
    got = start(jnp.asarray(w), QuantConfig(init="search", emphasis=emphasis), 1)
    unit = np.sqrt((np.float64(w) ** 2).mean(-1, keepdims=True))
    candidates = [f * unit for f in np.geomspace(0.004, 0.06, 90)]
    sums = [
        sum(a * errors(w, s, b) for a, b in zip(emphasis or (1,) * 4, (8, 6, 4, 2), strict=True)) for s in candidates
    ]
    best = np.argmin(sums, 0)
    np.testing.assert_allclose(got, np.take_along_axis(np.stack(candidates), best[None], 0)[0], rtol=1e-5)
    assert len(set(best[:, 0])) > 1  # channels differ
    half = start(jnp.asarray(w), QuantConfig(init="search", bits=(4, 2)), 1)  # a 4-bit master reaches as far
    assert (8 * half > 0.5 * unit).all()
    assert (8 * half < 8 * unit).all()


@pytest.mark.parametrize(
    ("config", "printed"),
    [
        (QuantConfig(init="absmax"), "1.2e-04 2.2e-03 3.0e-02 1.2e-01 4.6e-01"),
        (QuantConfig(init="lsq"), "1.7e-03 3.2e-02 4.2e-01 9.3e-01 1.0e+00"),
        (QuantConfig(), "4.7e-04 1.4e-03 1.3e-02 4.9e-02 2.0e-01"),
        (QuantConfig(init="search"), "4.2e-03 5.1e-03 1.4e-02 4.1e-02 1.5e-01"),
        (QuantConfig(init="search", bits=(8, 6, 4)), "6.4e-04 1.5e-03 1.2e-02 4.7e-02 1.9e-01"),
    ],
    ids=lambda x: f"{x.init}{x.bits}" if isinstance(x, QuantConfig) else "",
)
def test_the_error_of_each_start_on_normal_weights(config, printed):
    """The table by which a start was chosen: absmax and LSQ's lose 2 bits, 3 sigma is a compromise."""
    scale = snap(start(normal(), config, 1))
    low = [np.asarray(quantise(normal(), scale, jnp.int32(bits)), np.float64) for bits in WIDTHS]
    w = np.asarray(normal(), np.float64)
    assert " ".join(f"{((w - x) ** 2).sum() / (w**2).sum():.1e}" for x in low) == printed


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("law", ["standard_normal", "laplace"])
def test_more_bits_never_have_the_larger_error(init, law):
    w = jnp.asarray(getattr(np.random.default_rng(9), law)(size=(2, 4096)), jnp.float32)
    for group in (None, 128):
        scale = snap(start(w, QuantConfig(init=init, group=group), 1))
        error = [float(jnp.sum((quantise(w, scale, jnp.int32(b)) - w) ** 2)) for b in range(2, 9)]
        assert all(a >= b for a, b in itertools.pairwise(error))


@pytest.mark.parametrize("init", INITS)
def test_a_channel_without_variance_has_a_positive_scale(init):
    w = jnp.asarray(np.stack([np.zeros(64), np.full(64, 0.25), np.full(64, -1e-3), np.full(64, 1e-12)]), jnp.float32)
    scale = snap(start(w, QuantConfig(init=init), 1))
    assert np.isfinite(scale).all()
    assert (np.asarray(scale) > 0).all()
    np.testing.assert_array_equal(scale[[0, 3], 0], bf16([3 / 8 / 128] * 2))  # as a fresh weight of variance 1 / 64
    got = quantise(w, scale, jnp.int32(8))
    np.testing.assert_array_equal(got[0], np.zeros(64))
    reach = {"lsq": 0.1, "search": 0.1}.get(init, 0.01)
    np.testing.assert_allclose(got[1:3], w[1:3], rtol=reach)


@pytest.mark.parametrize("init", INITS)
def test_a_weight_that_is_no_number_is_not_hidden_by_a_fresh_scale(init):
    w = jnp.asarray([[0.1, jnp.nan, 0.2, -0.3], [0.1, jnp.inf, 0.2, -0.3], [0.1, 0.0, 0.2, -0.3]], jnp.float32)
    scale = snap(start(w, QuantConfig(bits=(8, 4), init=init)))
    low = decode(encode(w, scale), scale)
    assert np.isnan(low[:2]).all(axis=1).tolist() == [True, True]
    assert np.isfinite(low[2]).all()


def test_a_gain_is_the_least_squares_factor():
    rng = np.random.default_rng(10)
    w = jnp.asarray(rng.standard_normal((2, 3, 4, 16)), jnp.float32).at[1, 2].set(0)
    cfg = QuantConfig(init="absmax", group=32, bits=(8, 3, 2), gain=(3, 2))
    scale = snap(start(w, cfg, 2))
    got = jax.jit(init_gain, static_argnums=2)(w, scale, cfg)
    assert got.shape == (2, 3, 2)
    for i, bits in enumerate(cfg.gain):
        low = np.asarray(quantise(w, scale, jnp.int32(bits)), np.float64).reshape(2, 3, -1)
        rows = np.asarray(w, np.float64).reshape(2, 3, -1)
        for channel in np.ndindex(2, 3):
            a, b = low[channel], rows[channel]
            want = 1.0 if channel == (1, 2) else np.linalg.lstsq(a[:, None], b, rcond=None)[0][0]
            np.testing.assert_allclose(got[(*channel, i)], want, rtol=1e-5)


@pytest.mark.parametrize(("init", "without", "with_gain"), [("absmax", "0.46", "0.35"), ("search", "0.15", "0.15")])
def test_a_gain_mends_two_bits_under_absmax_alone(init, without, with_gain):
    cfg = QuantConfig(init=init, gain=(2,))
    scale = snap(start(normal(), cfg, 1))
    low, w = np.asarray(quantise(normal(), scale, jnp.int32(2)), np.float64), np.asarray(normal(), np.float64)
    gain = float(init_gain(normal(), scale, cfg)[0, 0])
    for x, want in ((low, without), (gain * low, with_gain)):
        assert f"{((w - x) ** 2).sum() / (w**2).sum():.2f}" == want


# -------------------------------------------------------------------------------------------------------- activations
@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize("shape", [(), (1, 1, 6)])
def test_learned_activations(bits, shape):
    """Values by the formula; gradients of scale and zero by finite differences with the rounding held fixed."""
    rng = np.random.default_rng(11)
    scale = np.float64(bf16(np.exp2(rng.uniform(-4, -2, shape))))
    zero = np.round(rng.uniform(-2, 0, shape) * 64) / 64
    v = rng.integers(-64 * 2**bits, 3 * 64 * 2**bits, (2, 5, 6)) / 128
    x = (v * scale + zero).astype(np.float32).astype(np.float64)
    top = 2**bits - 1
    v0 = (x - zero) / scale
    q0, m = np.clip(np.rint(v0), 0, top), (v0 > 0) & (v0 < top)
    g = rng.standard_normal(x.shape).astype(np.float32)
    f32 = lambda a: jnp.asarray(a, jnp.float32)
    run = jax.jit(
        lambda x, s, z, bits: jax.vjp(lambda x, s, z: fake_quantise_activations(x, s, z, bits), x, s, z)[1](f32(g))
    )
    y = fake_quantise_activations(f32(x), f32(scale), f32(zero), bits)
    near_tie = np.abs(v0 - np.floor(v0) - 0.5) < 1e-4
    np.testing.assert_allclose(np.where(near_tie, 0, y), np.where(near_tie, 0, q0 * scale + zero), rtol=1e-6, atol=1e-6)
    dx, ds, dz = run(f32(x), f32(scale), f32(zero), jnp.int32(bits))

    def frozen(s, z):
        return g * np.where(m, ((x - z) / s + (q0 - v0)) * s + z, q0 * s + z)

    axes = None if shape == () else (0, 1)
    fold = lambda d: d.sum(axes, keepdims=bool(shape))
    eps = 1e-6
    np.testing.assert_array_equal(dx, np.where(m, g, 0))
    kwargs = dict(rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(ds, fold(frozen(scale + eps, zero) - frozen(scale - eps, zero)) / (2 * eps), **kwargs)
    np.testing.assert_allclose(dz, fold(frozen(scale, zero + eps) - frozen(scale, zero - eps)) / (2 * eps), **kwargs)
    assert 0.1 < m.mean() < 0.9


# ------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.errors
@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({"bits": bad}, r"bits: found .*; expected falling")
            for bad in ((), (4, 8), (8, 8), (9, 4), (8, 1), [8, 4], 8, (8.0,))
        ),
        *(({"group": bad}, f"group: found {bad}; expected None, 32, 64 or") for bad in (0, 16, 96, 192, 32.0)),
        ({"scale_param": "log"}, r"scale_param: found 'log'; expected one of \('log2', 'linear'\)"),
        ({"init": "minmax"}, "init: found 'minmax'; expected one of"),
        ({"gain": (3,)}, r"gain: found \(3,\); expected a tuple of widths among \(8, 6, 4, 2\)"),
        ({"gain": (2, 2)}, "gain: found"),
        ({"gain": True}, "gain: found True"),
        ({"emphasis": (1.0,) * 4}, "emphasis: found .* with init 'sigma3'"),
        *(
            ({"emphasis": bad, "init": "search"}, "emphasis: found")
            for bad in ((1.0,), (0.0,) * 4, (1.0, 1.0, 1.0, -1.0), (1.0, 1.0, 1.0, float("nan")))
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=f"QuantConfig.{message}"):
        QuantConfig(**change)


@pytest.mark.errors
def test_shapes_that_do_not_fit_are_refused():
    w, scale = exact_case((4, 96), (4, 3))
    for bad in ((3, 3), (4, 5), (4,), (3,), (4, 96, 1), (4, 0)):
        with pytest.raises(
            ValueError, match=r"weight \(4, 96\), scale .*; expected \[out..., in...\] and \[out..., M\]"
        ):
            fake_quantise(w, jnp.ones(bad), 4)
    with pytest.raises(ValueError, match="encode: weight"):
        encode(w, jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="decode: weight"):
        decode(jnp.zeros((4, 96), jnp.int8), jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="fake_quantise: bits=6; expected 2 to 4, the master's"):
        fake_quantise(w, scale, 6, master=4)
    for bad in ((3,), (4, 96)):
        with pytest.raises(ValueError, match=r"bits of shape .*, weight \(4, 96\); expected its leading axes"):
            fake_quantise(w, scale, jnp.full(bad, 4, jnp.int32))
    with pytest.raises(ValueError, match="groups of 64 for 96 inputs; expected a divisor of them, or group=None"):
        init_scale(w, QuantConfig(group=64))
    with pytest.raises(ValueError, match=r"fake_quantise_activations: zero \(2, 96\), x \(4, 96\); expected"):
        fake_quantise_activations(w, jnp.ones((4, 1)), jnp.zeros((2, 96)), 8)
