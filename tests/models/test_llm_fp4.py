"""Oracles: every number of a format, by its bits, and the nearest of them by looking at all."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.models.llm_fp4 import (
    FORMATS,
    FloatFormat,
    bias_of,
    plain,
    quantise_float,
    quantise_inputs,
    quantise_weight,
    search,
)

E3M0, E2M1, E1M2 = FORMATS[4]
E4M3 = FloatFormat(exponent=4, mantissa=3)
quantise = jax.jit(quantise_float)
searched = functools.cache(lambda seed, bits: search(*map(jnp.asarray, case(seed)), bits))


def grid(fmt, bias):
    """Every number that is not negative, and the bits of its significand, in order of size: as the bits say."""
    numbers = []
    for e in range(2**fmt.exponent):
        for m in range(2**fmt.mantissa):
            significand = m if e == 0 else 2**fmt.mantissa + m
            numbers.append((significand * 2.0 ** (max(e, 1) - fmt.mantissa - bias), significand))
    return numbers


def nearest(x, fmt, bias):
    """Of two that are equally near the one with an even significand; the last power of two of a binade counts as its
    end, 2^(M + 1) steps, which matters with no mantissa alone: half way between 2^e and 2^(e + 1) lies 2^(e + 1)."""
    numbers = grid(fmt, bias)
    distance = [abs(abs(x) - v) for v, _ in numbers]
    best = [i for i, d in enumerate(distance) if d == min(distance)]
    if len(best) == 2:
        below, above = best
        best = [below] if numbers[below][1] % 2 == 0 else [above]
    return np.copysign(numbers[best[0]][0], x)


def case(seed, tokens=48, K=24, N=12):
    """Inputs a few of whose channels are much larger."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, K)) * np.exp2(rng.normal(size=K))
    x[:, 3] *= 8
    return x.astype(np.float32), (rng.normal(size=(N, K)) * np.exp2(rng.normal(size=(N, 1)))).astype(np.float32)


def error(x, w, found):
    low = np.float64(quantise_inputs(jnp.asarray(x), found)) @ np.float64(quantise_weight(jnp.asarray(w), found)).T
    return np.sum((low - np.float64(x) @ np.float64(w).T) ** 2)


# ------------------------------------------------------------------------------------------------------------- grids
@pytest.mark.parametrize(
    ("fmt", "bias", "want"),
    [
        (E2M1, 1, [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        (E3M0, 3, [0, 0.25, 0.5, 1, 2, 4, 8, 16]),
        (E1M2, 0, [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]),
    ],
)
def test_the_grids_of_four_bits(fmt, bias, want):
    assert [v for v, _ in grid(fmt, bias)] == want
    x = np.linspace(-20, 20, 80001).astype(np.float32)
    got = np.unique(np.abs(quantise(jnp.asarray(x), fmt, jnp.float32(bias))))
    np.testing.assert_array_equal(got, want)
    assert fmt.largest * 2.0**-bias == want[-1]


def test_no_code_is_lost_to_nan():
    got = quantise(jnp.asarray([1e9, -1e9, 460.0, jnp.inf], jnp.float32), E4M3, jnp.float32(7))
    np.testing.assert_array_equal(got, [480, -480, 448, 480])  # OCP's e4m3fn ends at 448


@pytest.mark.parametrize("fmt", [*FORMATS[4], *FORMATS[8]], ids=lambda f: f"E{f.exponent}M{f.mantissa}")
def test_each_number_becomes_the_nearest_and_half_goes_to_even(fmt):
    numbers = np.array([v for v, _ in grid(fmt, 2)])
    middles = (numbers[1:] + numbers[:-1]) / 2
    rng = np.random.default_rng(0)
    x = np.concatenate([numbers, middles, np.nextafter(np.float32(middles), np.float32(0)), 1.5 * numbers[-1:]])
    x = np.concatenate([x, np.exp2(rng.uniform(np.log2(numbers[1]) - 2, np.log2(numbers[-1]), 300))]).astype(np.float32)
    x = np.concatenate([x, -x])
    got = quantise(jnp.asarray(x), fmt, jnp.float32(2))
    np.testing.assert_array_equal(got, [nearest(min(max(v, -numbers[-1]), numbers[-1]), fmt, 2) for v in x.tolist()])
    np.testing.assert_array_equal(quantise(got, fmt, jnp.float32(2)), got)


@pytest.mark.parametrize("bias", [-3.4, 0.3, 5.71])
def test_a_bias_between_whole_numbers_is_a_scale(bias):
    x = np.random.default_rng(1).normal(size=400).astype(np.float32) * 2.0**-bias * 4
    got = np.asarray(quantise(jnp.asarray(x), E2M1, jnp.float32(bias)))
    want = np.array(
        [nearest(v, E2M1, bias) for v in np.clip(np.float64(x), *(E2M1.largest * 2.0**-bias * np.array([-1, 1])))]
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("fmt", [E3M0, E2M1, E1M2, E4M3])
def test_the_bias_of_a_maximum_ends_there(fmt):
    most = np.random.default_rng(2).uniform(1e-3, 1e3, (20, 1)).astype(np.float32)
    bias = bias_of(fmt, jnp.asarray(most))
    top = (2 - 2.0**-fmt.mantissa) * 2.0 ** (2**fmt.exponent - 1 - np.float64(bias))
    np.testing.assert_allclose(top, most, rtol=1e-5)
    np.testing.assert_allclose(quantise(jnp.asarray(3 * most), fmt, bias), most, rtol=1e-5)
    assert np.isfinite(bias_of(fmt, jnp.zeros(())))


@pytest.mark.parametrize("fmt", [*FORMATS[4], *FORMATS[8]], ids=lambda f: f"E{f.exponent}M{f.mantissa}")
def test_rows_of_any_size_have_a_scale(fmt):
    """Unused rows decay for ever: where the largest of the format, over theirs, is more than a float32 is."""
    x = jnp.asarray([[1e-25, 5e-26], [1e-30, 5e-31], [1e-36, 5e-37], [1e37, 5e36]], jnp.float32)
    got = quantise(x, fmt, bias_of(fmt, jnp.max(x, 1, keepdims=True)))
    np.testing.assert_allclose(got / x, np.ones((4, 2)), rtol=2e-5 if fmt.exponent > 1 else 0.3)
    tiny = jnp.full((1, 2), 1e-40, jnp.float32)  # no normal number: may be taken for 0
    assert np.isfinite(quantise(tiny, fmt, bias_of(fmt, tiny))).all()


# --------------------------------------------------------------------------------------------------------- one matrix
def test_plain_biases_are_those_of_maxima():
    x, w = case(0)
    x[:, 5] = 0
    found = plain(jnp.asarray(x), jnp.asarray(w))
    beta = lambda most: 2**2 - np.log2(most) + np.log2(2 - 2.0**-1) - 1  # as the paper writes it
    np.testing.assert_allclose(found.weight_bias[:, 0], beta(np.abs(w).max(1)), rtol=1e-5)
    live = np.delete(np.arange(24), 5)
    channels = beta(np.abs(x).max(0)[live])
    np.testing.assert_allclose(found.input_bias, channels.min(), rtol=1e-5)
    shared = np.rint(channels.min())
    np.testing.assert_array_equal(found.offsets[live], np.clip(np.rint(channels), shared, shared + 3) - shared)
    assert set(np.asarray(found.offsets).tolist()) == {0, 1, 2, 3}
    assert found.offsets[5] == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_and_weights_in_bfloat16_have_the_biases_of_their_float32_copies(bits):
    x, w = (jnp.asarray(part, jnp.bfloat16) for part in case(3))
    for find in (plain, search):
        got, want = find(x, w, bits), find(x.astype(jnp.float32), w.astype(jnp.float32), bits)
        jax.tree.map(np.testing.assert_array_equal, got, want)
        assert (got.weight_bias.dtype, got.input_bias.dtype) == (jnp.float32, jnp.float32)


def test_offsets_move_between_inputs_and_weights_and_change_nothing():
    """Whole biases: then every number here is a few bits times a power of two, and float64 products are exact."""
    x, w = case(1)
    found = plain(jnp.asarray(x), jnp.asarray(w))
    found = found._replace(input_bias=jnp.round(found.input_bias), weight_bias=jnp.round(found.weight_bias))
    assert found.offsets.max() == 3
    shifted, folded = quantise_inputs(jnp.asarray(x), found), quantise_weight(jnp.asarray(w), found)
    own = np.stack(
        [quantise(jnp.asarray(x[:, k]), E2M1, found.input_bias + int(found.offsets[k])) for k in range(24)], 1
    )
    low = quantise(jnp.asarray(w), E2M1, found.weight_bias)
    np.testing.assert_array_equal(np.float64(shifted) @ np.float64(folded).T, np.float64(own) @ np.float64(low).T)
    numbers = {v for v, _ in grid(E2M1, float(found.input_bias))}  # one grid for all channels
    assert set(np.abs(np.unique(shifted)).tolist()) <= numbers
    assert len(set(np.abs(np.unique(own)).tolist()) - numbers) > 0
    lead = quantise_inputs(jnp.asarray(x).reshape(4, 12, 24), found)
    np.testing.assert_array_equal(lead.reshape(48, 24), shifted)


def test_channels_of_their_own_lose_less():
    x, w = case(2)
    found = plain(jnp.asarray(x), jnp.asarray(w))
    assert error(x, w, found) < 0.8 * error(x, w, found._replace(offsets=jnp.zeros_like(found.offsets)))


@pytest.mark.parametrize(("seed", "bits"), [(0, 4), (1, 4), (2, 4), (3, 4), (0, 8)])
@pytest.mark.slow
def test_search_is_never_worse_than_plain_maxima(seed, bits):
    x, w = case(seed)
    start, found = plain(jnp.asarray(x), jnp.asarray(w), bits), searched(seed, bits)
    assert {found.weight_format, found.input_format} <= set(FORMATS[bits])
    assert start.weight_format == start.input_format == FORMATS[bits][1]
    assert error(x, w, found) < (0.8 if bits == 4 else 1.0) * error(x, w, start)


def brute_force_rows(x_low, x, w):
    """The least error of each row of the weight over formats and candidates, one at a time; the format by their sum."""
    want, best = np.float64(x) @ np.float64(w).T, {}
    for f in FORMATS[4]:
        base, least = np.float32(bias_of(f, jnp.abs(jnp.asarray(w)).max(1, keepdims=True))), np.inf
        for factor in (1.0, *(0.01 + i * 1.19 / 100 for i in range(100))):
            low = quantise(jnp.asarray(w), f, jnp.asarray(np.float32(factor) * base))
            least = np.minimum(least, np.sum((np.float64(x_low) @ np.float64(low).T - want) ** 2, 0))
        best[f] = least
    return min(best.items(), key=lambda item: item[1].sum())


def test_the_first_half_round_is_the_best_of_all_candidates():
    x, w = case(4)
    start = plain(jnp.asarray(x), jnp.asarray(w))
    found = search(jnp.asarray(x), jnp.asarray(w), rounds=1)
    low = np.float64(quantise_inputs(jnp.asarray(x), start)) * 2.0 ** -np.float64(start.offsets)
    fmt, least = brute_force_rows(low, x, w)
    assert found.weight_format == fmt
    got = found._replace(input_format=start.input_format, input_bias=start.input_bias, offsets=start.offsets)
    rows = np.float64(low) @ (np.float64(quantise_weight(jnp.asarray(w), got)) * 2.0 ** np.float64(start.offsets)).T
    np.testing.assert_allclose(np.sum((rows - np.float64(x) @ np.float64(w).T) ** 2, 0), least, rtol=1e-4)


def test_the_other_half_is_the_best_of_all_candidates_beside_the_new_weights():
    x, w = case(4)
    found = search(jnp.asarray(x), jnp.asarray(w), rounds=1)
    low = np.float64(quantise(jnp.asarray(w), found.weight_format, found.weight_bias))
    want, best = np.float64(x) @ np.float64(w).T, {}
    for f in FORMATS[4]:
        channels, best[f] = np.asarray(bias_of(f, jnp.abs(jnp.asarray(x)).max(0))), np.inf
        for factor in (1.0, *(0.01 + i * 1.19 / 100 for i in range(100))):
            bias = np.float32(factor) * channels.min()
            offsets = np.clip(np.rint(channels) - np.rint(bias), 0, 2**f.exponent - 1)
            own = np.float64(quantise(jnp.asarray(x), f, jnp.asarray(np.float32(bias + offsets)[None])))
            best[f] = min(best[f], np.sum((own @ low.T - want) ** 2))
    assert found.input_format == min(best, key=lambda f: best[f])
    np.testing.assert_allclose(error(x, w, found), best[found.input_format], rtol=1e-4)


def test_further_rounds_do_not_raise_the_error():
    x, w = case(5)
    errors = [error(x, w, search(jnp.asarray(x), jnp.asarray(w), rounds=r)) for r in range(4)]
    assert errors[0] == error(x, w, plain(jnp.asarray(x), jnp.asarray(w)))
    assert errors[1] < errors[0]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(errors))


def test_the_formats_are_found():
    """Weights that are all powers of two want no mantissa, and those evenly spaced two bits of it."""
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.normal(size=(48, 24)), jnp.float32)
    signs = rng.choice([-1.0, 1.0], (12, 24))
    powers = jnp.asarray(signs * np.exp2(rng.integers(-6, 1, (12, 24))), jnp.float32)
    even = jnp.asarray(signs * rng.integers(0, 8, (12, 24)) / 2, jnp.float32)
    assert search(x, powers, rounds=1).weight_format == E3M0
    assert search(x, even, rounds=1).weight_format == E1M2


# ------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.errors
def test_what_cannot_be_meant_is_refused():
    for e, m in ((0, 3), (7, 0), (2, -1), (2, 11)):
        with pytest.raises(ValueError, match=f"FloatFormat: found E{e}M{m}; expected 1 to 6 bits of exponent"):
            FloatFormat(exponent=e, mantissa=m)
    with pytest.raises(ValueError, match=r"quantise_float: bias \(3,\), x \(2, 3\); expected \(\), or x's rank"):
        quantise_float(jnp.ones((2, 3)), E2M1, jnp.ones(3))
    for make in (plain, search):
        with pytest.raises(ValueError, match=r"llm_fp4: bits=6; expected one of \[4, 8\]"):
            make(jnp.ones((2, 3)), jnp.ones((4, 3)), 6)
