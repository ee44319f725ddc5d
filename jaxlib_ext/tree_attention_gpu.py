"""The GPU twin of `tree_attention`: the same sums, a program for each share of the rows of a key-value head.

A GPU has many processors and no grid that runs in order, so each program takes a share of the rows, and a second kernel
merges shares by their log-sum-exp. Shares are cut from the rows that somebody sees, not from the cache, so a short text
or a window in a long cache keeps all processors busy too.

Codes become bfloat16 where they stand (`spread.py`), as pieces: every second number of 8 bits, every fourth of 4 bits.

Letters as in `tree_attention`; the R queries of a head stand in tiles of r, an output has pieces of h numbers.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int32

from .dispatch import precision
from .spread import bytes_of, field_of, halves_of

_HIDDEN = -1e30
_LOG2_E = math.log2(math.e)
_Leaves = tuple[Array, ...]


class Tiles(NamedTuple):
    """Sizes of a launch."""

    queries: int  # of a program
    rows: int  # that it reads at once
    parts: int  # shares of all rows
    warps: int
    stages: int  # of loads under way


# 1. Kernel: r queries of one head, one share of the rows.
#   bounds [2] | q [T, G, H] | k, v: [S, H], or halves [S, bytes / 2], scale [S] and zero [S] | seen [S], one or two
#   -> y [r, H], piece by piece, lse [r]
def _kernel(bounds_ref, q_ref, *refs, cap: float | None, bits: int | None, tiles: int, t: Tiles, native: bool):
    n = 1 if bits is None else 3
    k_refs, v_refs, seen_refs, (y_ref, lse_ref) = refs[:n], refs[n : 2 * n], refs[2 * n : -2], refs[-2:]
    (T, G, H), S, r = q_ref.shape, k_refs[0].shape[0], t.queries
    query = (pl.program_id(1) % tiles) * r + jnp.arange(r, dtype=jnp.int32)
    node = jax.lax.div(query, jnp.int32(G))
    wanted = _columns(bits, H)
    h = H // len(wanted)

    def queries(first: int, step: int):
        column = jnp.broadcast_to(first + step * jnp.arange(h, dtype=jnp.int32), (r, h))
        node_at, head_at = (jnp.broadcast_to(x[:, None], (r, h)) for x in (jnp.minimum(node, T - 1), query - node * G))
        return triton.load(q_ref.at[node_at, head_at, column], mask=node_at == node[:, None], other=0)

    qs = [queries(*columns) for columns in wanted]
    q_sum = _sum([jnp.sum(q.astype(jnp.float32), axis=1) for q in qs])[:, None]
    read = functools.partial(_read, bs=t.rows, S=S)
    pieces = functools.partial(_pieces, bits=bits, dtype=q_ref.dtype, native=native)
    first, last = bounds_ref[0] // t.rows, pl.cdiv(bounds_ref[1], t.rows)
    share = pl.cdiv(jnp.maximum(last - first, 0), t.parts)
    begin = first + pl.program_id(0) * share

    def body(i, carry):
        sums, total, top = carry
        word = read(seen_refs[0], i)[None]
        if len(seen_refs) > 1:
            word = jnp.where((node < 32)[:, None], word, read(seen_refs[1], i)[None])
        seen = ((word >> (node & 31)[:, None]) & 1) == 1
        z = _sum([_dot(q, piece.T) for q, piece in zip(qs, pieces(read(k_refs[0], i)), strict=True)])
        if bits is not None:
            scale, zero = (read(ref, i).astype(jnp.float32)[None] for ref in k_refs[1:])
            z = z * scale + q_sum * zero
        if cap is None:
            z *= H**-0.5 * _LOG2_E
        else:
            z = cap * _LOG2_E * jnp.tanh(z * (H**-0.5 / cap))
        z = jnp.where(seen, z, _HIDDEN)
        higher = jnp.maximum(top, jnp.max(z, axis=1))
        p, shrink = jnp.where(seen, jnp.exp2(z - higher[:, None]), 0.0), jnp.exp2(top - higher)
        total = total * shrink + jnp.sum(p, axis=1)
        extra = 0.0
        if bits is not None:
            scale, zero = (read(ref, i).astype(jnp.float32)[None] for ref in v_refs[1:])
            p, extra = p * scale, jnp.sum(p * zero, axis=1)[:, None]
        more = [_dot(p.astype(q_ref.dtype), piece) + extra for piece in pieces(read(v_refs[0], i))]
        return tuple(s * shrink[:, None] + m for s, m in zip(sums, more, strict=True)), total, higher

    empty = tuple(jnp.zeros((r, h), jnp.float32) for _ in wanted)
    carry = empty, jnp.zeros(r, jnp.float32), jnp.full(r, _HIDDEN, jnp.float32)
    sums, total, top = jax.lax.fori_loop(begin, jnp.minimum(begin + share, last), body, carry)
    some = jnp.where(total > 0, total, 1.0)
    for j, part in enumerate(sums):
        y_ref[:, j * h : (j + 1) * h] = part / some[:, None]
    lse_ref[...] = jnp.where(total > 0, (top + jnp.log2(some)) / _LOG2_E, _HIDDEN)


#   y [parts, H], piece by piece, lse [parts] -> [H]; parts are padded to a power of two
def _merge(y_ref, lse_ref, out_ref, *, bits: int | None, parts: int):
    size, H = y_ref.shape
    there = jnp.arange(size, dtype=jnp.int32) < parts
    lse = triton.load(lse_ref, mask=there, other=2 * _HIDDEN)
    weight = jnp.exp(lse - jnp.max(lse))
    weight = (weight / jnp.sum(weight))[:, None]
    h = H // len(_columns(bits, H))
    for j, (first, step) in enumerate(_columns(bits, H)):
        y = triton.load(y_ref.at[:, pl.ds(j * h, h)], mask=there[:, None], other=0)
        out_ref[pl.ds(first, h, step)] = jnp.sum(y * weight, axis=0).astype(out_ref.dtype)


def _columns(bits: int | None, H: int) -> list[tuple[int, int]]:
    """Which numbers of a row each piece is: the first, and the step from one to the next."""
    if bits is None:
        return [(0, 1)]
    return [(0, 2), (1, 2)] if bits == 8 else [(0, 2), (H // 2, 2), (1, 2), (H // 2 + 1, 2)]


def _pieces(rows, bits: int | None, dtype, native: bool) -> list[Array]:
    if bits is None:
        return [rows.astype(dtype)]
    if bits == 8:
        return [bytes_of(rows, i, signed=False, native=native).astype(dtype) for i in range(2)]
    return [field_of(rows, 4, i, signed=False, native=native).astype(dtype) for i in range(4)]


def _read(ref, i, bs: int, S: int):
    """Block i of rows; zeros behind the last."""
    at = ref.at[(pl.ds(i * bs, bs), *(slice(None) for _ in ref.shape[1:]))]
    if S % bs == 0:
        return triton.load(at)
    there = i * bs + jnp.arange(bs, dtype=jnp.int32) < S
    return triton.load(at, mask=there.reshape(bs, *(1 for _ in ref.shape[1:])), other=0)


def _sum(terms: list[Array]) -> Array:
    return sum(terms[1:], terms[0])


def _dot(a, b):
    return jnp.dot(a, b, precision=precision(a), preferred_element_type=jnp.float32)


# 2. Launch
def launch(
    q: Float[Array, "B T N H"],
    k: _Leaves,
    v: _Leaves,
    words: Int32[Array, "B words S"],
    bounds: Int32[Array, "B 2"],
    cap: float | None,
    bits: int | None,
    t: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention of T nodes.

    Args:
      q: queries.
      k: rows `[B, S, K, H]`; or codes, scales and zeros.
      v: likewise.
      words: which nodes see a row, a bit each.
      bounds: the first row that somebody sees, and the one behind the last.
      cap: of scores.
      bits: of codes; None for floats.
      t: sizes, if they are not those that were measured to be good.
      interpret: run it on any device, without Triton.
    """
    (B, T, N, H), (S, K) = q.shape, k[0].shape[1:3]
    G = N // K
    t = t or tiles_of(q, S, K, bits)
    tiles, padded = pl.cdiv(T * G, t.queries), pl.next_power_of_2(t.parts)
    if bits is not None:
        k, v = ((halves_of(rows[0]), *rows[1:]) for rows in (k, v))
    rows = lambda x: pl.BlockSpec(
        (None, S, None, *x.shape[3:]), lambda p, h, b: (b, 0, h // tiles, *(0 for _ in x.shape[3:]))
    )
    y, lse = pl.pallas_call(
        functools.partial(_kernel, cap=cap, bits=bits, tiles=tiles, t=t, native=not interpret),
        grid=(t.parts, K * tiles, B),
        in_specs=[
            pl.BlockSpec((None, 2), lambda p, h, b: (b, 0)),
            pl.BlockSpec((None, T, None, G, H), lambda p, h, b: (b, 0, h // tiles, 0, 0)),
            *map(rows, (*k, *v)),
            *(pl.BlockSpec((None, None, S), lambda p, h, b, i=i: (b, i, 0)) for i in range(words.shape[1])),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, t.queries, H), lambda p, h, b: (b, p, h // tiles, h % tiles, 0)),
            pl.BlockSpec((None, None, None, t.queries), lambda p, h, b: (b, p, h // tiles, h % tiles)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, padded, K, tiles * t.queries, H), jnp.float32),
            jax.ShapeDtypeStruct((B, padded, K, tiles * t.queries), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=t.warps, num_stages=t.stages),
        interpret=interpret,
        name="tree_attention",
    )(bounds, q.reshape(B, T, K, G, H), *k, *v, *[words] * words.shape[1])
    return pl.pallas_call(
        functools.partial(_merge, bits=bits, parts=t.parts),
        grid=(T * G, K, B),
        in_specs=[
            pl.BlockSpec((None, padded, None, None, H), lambda r, h, b: (b, 0, h, r, 0)),
            pl.BlockSpec((None, padded, None, None), lambda r, h, b: (b, 0, h, r)),
        ],
        out_specs=pl.BlockSpec((None, None, None, H), lambda r, h, b: (b, r // G, h * G + r % G, 0)),
        out_shape=jax.ShapeDtypeStruct((B, T, N, H), q.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="tree_attention_merge",
    )(y, lse)


def tiles_of(q: Float[Array, "B T N H"], S: int, K: int, bits: int | None) -> Tiles:
    """Those that were found good on an H200: 128 rows at a time for codes of 8 bits, 32 for many queries."""
    B, T, N, _ = q.shape
    R = T * N // K
    queries = min(64, max(16, pl.next_power_of_2(R)))
    if bits is None:
        rows, warps, stages = (32 if queries == 64 or q.shape[3] > 128 else 64), 4, 3
    elif bits == 4 and queries > 16:
        rows, warps, stages = 64, 4, 3
    else:
        rows, warps, stages = 128, 8, 2
    busy = pl.cdiv(264, B * K * pl.cdiv(R, queries))  # two programs for each processor
    return Tiles(queries, rows, min(max(busy, pl.cdiv(S, 1024)), pl.cdiv(S, rows)), warps, stages)


def slower(q: Float[Array, "B T N H"], S: int) -> bool:
    """Whether XLA's form was faster on an H200, or nothing was measured: float32, and few rows for few queries."""
    return q.dtype != jnp.bfloat16 or q.shape[0] * q.shape[1] * S < 8192


def why_not(q: Float[Array, "B T N H"], bits: int | None) -> str:
    """Why it does not serve; empty if it does."""
    most = 256 if bits is None else 128
    return "" if q.shape[3] in (64, 128, most) else f"heads of {q.shape[3]}; that of GPUs is made for 64, 128 and 256."
