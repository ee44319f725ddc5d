"""Oracles: Python loops that write one row, move one row, or quantise one number at a time, in float64."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxaroo.models.cache import (
    LARGEST,
    Int4Rows,
    Int8Rows,
    KVCache,
    LayerCache,
    cache_axes,
    dequantise_rows,
    init_cache,
    keep_path,
    quantise_rows,
    write_rows,
)
from jaxaroo.sharding.rules import FSDP_TP

DTYPES = ("float32", "bfloat16", "int8", "int4")
quantise = jax.jit(quantise_rows, static_argnums=1)
dequantise = jax.jit(dequantise_rows, static_argnums=1)


def loop(old, length, new):
    out = np.array(old)
    for b in range(new.shape[0]):
        for t in range(new.shape[1]):
            if length[b] + t < out.shape[1]:
                out[b, length[b] + t] = new[b, t]
    return out


def test_rows_land_behind_the_committed_ones_and_never_past_the_end():
    rng = np.random.default_rng(0)
    k, v = (rng.normal(size=(3, 8, 2, 4)).astype(np.float32) for _ in range(2))
    new_k, new_v = (rng.normal(size=(3, 3, 2, 4)).astype(np.float32) for _ in range(2))
    length = np.array([0, 4, 6])  # the last row has room for two of three
    got = write_rows(LayerCache(jnp.asarray(k), jnp.asarray(v)), jnp.asarray(length), new_k, new_v)
    np.testing.assert_array_equal(got.k, loop(k, length, new_k))
    np.testing.assert_array_equal(got.v, loop(v, length, new_v))


def test_rows_take_the_dtype_of_the_cache():
    cache = init_cache(2, 1, 4, 1, 2, jnp.bfloat16)
    assert (len(cache.layers), cache.capacity, cache.layers[0].k.dtype) == (2, 4, jnp.bfloat16)
    new = jnp.full((1, 1, 1, 2), 1.001, jnp.float32)
    got = write_rows(cache.layers[0], cache.length, new, new)
    assert got.k.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got.v[0, :, 0, 0], np.float32), [1.0, 0, 0, 0])


# ---------------------------------------------------------------------------------------------------------- quantiser
def bfloat16(x: float, up: bool) -> float:
    """The next bfloat16 that is not below x, or not above it."""
    near = np.asarray(x).astype(ml_dtypes.bfloat16)
    wrong = float(near) < x if up else float(near) > x
    side = np.asarray(np.inf if up else -np.inf, ml_dtypes.bfloat16)
    return float(np.nextafter(near, side)) if wrong else float(near)


def by_hand(x, bits):
    """Codes, s and z of rows [R, H], in float64, number by number; and whether a number is so close to the middle
    between two codes that float32 may say either."""
    codes, scales, zeros, either = np.zeros(x.shape, int), [], [], np.zeros(x.shape, bool)
    for r, row in enumerate(np.asarray(x, np.float64)):
        zero = bfloat16(min(row), up=False)
        scale = max(bfloat16((max(row) - zero) / (2**bits - 1), up=True), 2.0**-100)
        for i, value in enumerate(row):
            place = (value - zero) / scale
            below = int(np.floor(place))
            rest = place - below
            codes[r, i] = below + (rest > 0.5 or (rest == 0.5 and below % 2 == 1))
            either[r, i] = abs(rest - 0.5) < 2.0**-14 and np.frexp(scale)[0] != 0.5  # by powers of two, it is exact
        scales.append(scale)
        zeros.append(zero)
    return codes, np.array(scales), np.array(zeros), either


def codes_of(rows):
    """One code a number, [R, H]."""
    packed = np.asarray(rows.codes)[0, :, 0]
    if isinstance(rows, Int8Rows):
        return packed
    return np.array([[b % 16 for b in row] + [b // 16 for b in row] for row in packed.tolist()])


def rows_of_all_kinds():
    """On a grid of 2^-10, so that differences are exact in float32: ordinary rows, equal numbers, ties."""
    rng = np.random.default_rng(1)
    x = [rng.normal(size=16) * size + shift for size in (1, 30, 0.02) for shift in (0, 5, -5) for _ in range(20)]
    x += [np.zeros(16), np.full(16, -3.0), np.full(16, 0.1), np.r_[np.zeros(15), 1e-3]]
    x += [np.r_[0, top, np.arange(14) + 0.5] for top in (255, 15)]  # s is 1 at one of the widths
    return (np.round(np.array(x) * 1024) / 1024).astype(np.float32)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_scales_and_zeros_are_those_of_a_loop(bits):
    x = rows_of_all_kinds()
    codes, scales, zeros, either = by_hand(x, bits)
    got = quantise(jnp.asarray(x[None, :, None]), bits)
    assert type(got) is {8: Int8Rows, 4: Int4Rows}[bits]
    np.testing.assert_array_equal(np.asarray(got.zero, np.float64)[0, :, 0], zeros)
    np.testing.assert_array_equal(np.asarray(got.scale, np.float64)[0, :, 0], scales)
    mine = codes_of(got).astype(int)
    np.testing.assert_array_equal(mine[~either], codes[~either])
    assert either.mean() < 0.01
    assert np.abs(mine - codes).max() <= 1
    assert (codes.min(), codes.max()) == (0, 2**bits - 1)
    assert list(codes[-2 if bits == 8 else -1, 2:6]) == [0, 2, 2, 4]  # 0.5, 1.5, 2.5, 3.5
    read = np.asarray(dequantise(got, "float32"))[0, :, 0]
    np.testing.assert_array_equal(read, (zeros[:, None] + scales[:, None] * mine).astype(np.float32))
    half = np.asarray(dequantise(got, "bfloat16"))[0, :, 0]
    np.testing.assert_array_equal(half, read.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [1e-20, 1e-4, 1.0, 300.0, 1e30])
@pytest.mark.parametrize("shift", [0.0, 1.0, -20.0])
def test_no_number_is_read_further_off_than_half_a_step(bits, size, shift):
    """What float32 adds: three roundings of 2^-24 to a number of at most `levels` steps, s a hair low, and a sum."""
    rng, levels = np.random.default_rng(2), 2**bits - 1
    x = (size * (rng.normal(size=(400, 16)) + shift)).astype(np.float32)
    x[1::4, 3] *= 40  # one number that is far from the rest
    rows = quantise(jnp.asarray(x[None, :, None]), bits)
    read = np.asarray(dequantise(rows, "float32"), np.float64)[0, :, 0]
    scale = np.asarray(rows.scale, np.float64)[0, :, 0]
    off = np.abs(read - x).max(1)
    assert (off <= scale * (0.5 + levels * 7 * 2.0**-24) + 2.0**-24 * np.abs(read).max(1)).all()
    assert (off > 0.3 * scale)[::2].mean() > 0.9  # of 16 numbers, one is about that far off
    # z is below the least number by less than a step of bfloat16, and so is s above what it has to be.
    low, high = (np.asarray(x, np.float64).min(1), np.asarray(x, np.float64).max(1))
    assert (scale <= (high - low + 2.0**-7 * np.abs(low)) / levels * (1 + 2.0**-7) * (1 + 2.0**-22)).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_huge_numbers_stay_finite_and_what_is_not_finite_stays_so(bits):
    x = np.linspace(-1, 1, 16, dtype=np.float32) * np.ones((6, 1), np.float32)
    x[0] *= 3.4e38  # their differences overflow float32
    x[1, 5], x[2, 5], x[3, 5], x[4] = np.inf, -np.inf, np.nan, 3.4e38
    rows = quantise(jnp.asarray(x[None, :, None]), bits)
    read = np.asarray(dequantise(rows, "float32"))[0, :, 0]
    scale = np.asarray(rows.scale, np.float32)[0, :, 0]
    assert np.isfinite(read).all(axis=1).tolist() == [True, False, False, False, True, True]
    for r in (0, 4, 5):
        assert (np.abs(read[r] - np.clip(x[r], -LARGEST, LARGEST)) <= 0.501 * scale[r]).all()


@pytest.mark.parametrize(
    ("dtype", "per_number"), [("int8", 1.03125), ("int4", 0.53125), ("bfloat16", 2), ("float32", 4)]
)
def test_bytes_of_a_number_at_128_to_a_head(dtype, per_number):
    cache = init_cache(2, 3, 8, 2, 128, dtype)
    bytes_ = sum(a.nbytes for layer in cache.layers for a in jax.tree.leaves(layer))
    assert bytes_ / (2 * 2 * 3 * 8 * 2 * 128) == per_number
    assert (cache.capacity, len(cache.layers), cache.length.shape) == (8, 2, (3,))


# ----------------------------------------------------------------------------------------------------- codes in a cache
B, CAPACITY, K, H = 3, 12, 2, 6


@functools.cache
def filled(dtype):
    """A cache of two layers with rows everywhere, what was written, and lengths; the last row is almost full."""
    rng = np.random.default_rng(3)
    cache = init_cache(2, B, CAPACITY, K, H, dtype)
    written = [[rng.normal(size=(B, CAPACITY, K, H)).astype(np.float32) for _ in "kv"] for _ in cache.layers]
    layers = tuple(write_rows(c, cache.length, *w) for c, w in zip(cache.layers, written, strict=True))
    return KVCache(layers, jnp.array([0, 4, 9], jnp.int32)), written


def alone(row, dtype):
    """What a cache of this type makes of one row of one head."""
    if dtype in ("int8", "int4"):
        codes, scale, zero, _ = by_hand(row[None], int(dtype[-1]))
        return (zero[0] + scale[0] * codes[0]).astype(np.float32)
    return np.asarray(jnp.asarray(row).astype(dtype).astype(jnp.float32))


def read(layer, dtype="float32"):
    return [np.asarray(dequantise(rows, dtype)) for rows in layer]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_read_is_each_row_rounded_alone(dtype):
    cache, written = filled(dtype)
    for layer, w in zip(cache.layers, written, strict=True):
        for got, x in zip(read(layer), w, strict=True):
            want = np.array([[[alone(head, dtype) for head in row] for row in rows] for rows in x])
            np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reading_what_is_written_is_writing_into_what_is_read(dtype):
    """New rows land where a loop puts them, all others stay, bit for bit, and those past the end are dropped."""
    cache, _ = filled(dtype)
    new = np.random.default_rng(4).normal(size=(2, B, 5, K, H)).astype(np.float32)
    fresh = init_cache(1, B, 5, K, H, dtype)
    rounded = read(write_rows(fresh.layers[0], fresh.length, *new))
    got = read(write_rows(cache.layers[0], cache.length, *new))
    for mine, old, rows in zip(got, read(cache.layers[0]), rounded, strict=True):
        np.testing.assert_array_equal(mine, loop(old, np.array([0, 4, 9]), rows))
        assert (mine != old).sum() == (5 + 5 + 3) * K * H


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_written_together_are_those_written_one_by_one(dtype):
    cache, _ = filled(dtype)
    new = np.random.default_rng(5).normal(size=(2, B, 5, K, H)).astype(np.float32)
    together = write_rows(cache.layers[0], cache.length, *new)
    single = cache.layers[0]
    for t in range(5):
        single = write_rows(single, cache.length + t, *new[:, :, t : t + 1])
    jax.tree.map(np.testing.assert_array_equal, together, single)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reading_a_kept_path_is_keeping_the_path_of_what_is_read(dtype):
    cache, _ = filled(dtype)
    path = np.array([[0, 2, 3, 3], [1, 0, 5, 7], [0, 2, 2, 2]])
    got = keep_path(cache, jnp.asarray(path))
    for mine, theirs in zip(got.layers, cache.layers, strict=True):
        for after, before in zip(read(mine), read(theirs), strict=True):
            want = before.copy()
            for b in range(B):
                for i, node in enumerate(path[b]):
                    at = int(cache.length[b])
                    if at + i < CAPACITY:
                        want[b, at + i] = before[b, at + node]
            np.testing.assert_array_equal(after, want)
            assert (after != before).any()
    np.testing.assert_array_equal(got.length, cache.length)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_lies_over_a_mesh_and_stays_there(dtype):
    mesh = Mesh(np.array(jax.devices()).reshape(1, 2, 2, 2), ("data", "fsdp", "tensor", "sequence"))
    empty = init_cache(1, 4, 8, 2, 6, dtype)
    placed = jax.device_put(empty, FSDP_TP.shardings(mesh, cache_axes(1, dtype), empty))
    new = np.random.default_rng(6).normal(size=(2, 4, 3, 2, 6)).astype(np.float32)
    length = jnp.array([0, 2, 7, 5], jnp.int32)
    write = jax.jit(lambda layer: write_rows(layer, length, *new))
    got, want = write(placed.layers[0]), write(empty.layers[0])
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert mine.addressable_shards[0].data.shape == (2, 8, 1, *theirs.shape[3:])
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_cache_reads_as_zeros(dtype):
    assert init_cache(1, 2, 4, 1, 2, dtype).dtype == dtype
    assert not np.any(read(init_cache(1, 2, 4, 1, 2, dtype).layers[0]))


@pytest.mark.errors
@pytest.mark.parametrize("dtype", ["int5", "int32", "bool", "uint8"])
def test_other_types_are_refused(dtype):
    with pytest.raises(ValueError, match=f"dtype='{dtype}'; expected a type of floats, 'int8' or 'int4'"):
        init_cache(1, 1, 4, 1, 2, dtype)


@pytest.mark.errors
def test_heads_of_an_odd_size_are_refused_at_4_bits():
    assert init_cache(1, 1, 4, 1, 3, "int8").layers[0].k.codes.shape == (1, 4, 1, 3)
    with pytest.raises(ValueError, match="head_dim=3 at 4 bits; expected an even number"):
        init_cache(1, 1, 4, 1, 3, "int4")
