"""Attention of a few queries to a long cache: decoding, and the nodes of a tree of guesses that are judged together.

    y_t = sum_s softmax_s(cap(q_t . k_s / sqrt(H))) v_s        over the rows s that node t sees

A tree's own keys stand in the cache behind the committed rows, so ancestors, committed rows and windows are all one
mask. The kernel packs it along nodes: bit t % 32 of word t // 32 at row s says whether node t sees row s, 4 bytes a row
for up to 32 nodes. It does not fetch blocks behind the last row that anybody sees; what nobody sees has to be finite
all the same, for 0 times a value that is not would be no number. Softmax runs over blocks of rows with a maximum that
rises; the cache may be cut into parts that are worked through side by side, and merged by their log-sum-exp.

Rows are floats, or codes of 8 or 4 bits with a scale and a zero for each row of each head (`models/cache.py`): then
q . k = scale (q . codes) + zero sum(q), and likewise for values, so no row is ever written out as floats.

Letters: B batch, T nodes, S rows, N heads, K key-value heads, G = N / K, H head size, R = T G queries of a head.
"""

import functools
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, BFloat16, Bool, Float, Int32, UInt8

from ..sharding.rules import Axis
from . import tree_attention_gpu
from .dispatch import Impl, Kernel, precision, run

MOST_NODES = 64  # of a tree; prompts are left to XLA
_HIDDEN = -1e30


class CodedRows(Protocol):
    """Keys or values as codes; with H bytes a row of 8 bits, with H / 2 of 4: number i low, number i + H / 2 high."""

    @property
    def codes(self) -> UInt8[Array, "B S K bytes"]: ...

    @property
    def scale(self) -> BFloat16[Array, "B S K"]: ...

    @property
    def zero(self) -> BFloat16[Array, "B S K"]: ...


Rows = Float[Array, "B S K H"] | CodedRows


class _Static(NamedTuple):
    cap: float | None
    block: int  # rows of a step
    parts: int  # of the cache
    bits: int | None  # of codes; None for floats


def dequantise(rows: CodedRows, head_dim: int, dtype: jax.typing.DTypeLike) -> Float[Array, "B S K H"]:
    """What coded rows stand for, computed in float32 and rounded once."""
    codes = rows.codes
    if codes.shape[-1] != head_dim:
        codes = jnp.concatenate([codes & 15, codes >> 4], axis=-1)
    scale, zero = (a.astype(jnp.float32)[..., None] for a in (rows.scale, rows.zero))
    return (codes.astype(jnp.float32) * scale + zero).astype(dtype)


# 1. Reference: scores of all rows at once.
def reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention; scores, softmax and the weighted sum accumulate in float32.

    Heads are moved in front of rows by hand: einsum would transpose the `[T, S]` scores instead, which are larger.
    """
    (B, T, N, H), K = q.shape, k.shape[2]
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    k, v = (rows.astype(q.dtype).swapaxes(1, 2) for rows in (k, v))  # [B, K, S, H]
    product = functools.partial(jnp.einsum, precision=precision(q), preferred_element_type=jnp.float32)
    score = product("bkgth,bksh->bkgts", q, k) * H**-0.5
    score = score if softcap is None else softcap * jnp.tanh(score / softcap)
    prob = jax.nn.softmax(jnp.where(mask[:, None, None], score, _HIDDEN), axis=-1).astype(q.dtype)
    out = product("bkgts,bksh->bkgth", prob, v)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q.dtype)


# 2. Kernel: a block of rows for all heads of one sequence.
#   used [B] | q [K, R, H] | k, v: [bs, K, H], or codes, scale and zero | seen [words, bs]
#   -> y [K, R, H], lse [K, R]; kept from block to block: sum [K, R, H], total and maximum [K, R, 1]
def _kernel(used_ref, q_ref, *refs, o: _Static, S: int, G: int):
    n = 1 if o.bits is None else 3
    k_refs, v_refs, (seen_ref, y_ref, lse_ref, sum_ref, total_ref, top_ref) = refs[:n], refs[n : 2 * n], refs[2 * n :]
    (K, R, H), bs, steps = q_ref.shape[1:], seen_ref.shape[2], pl.num_programs(2)
    step = pl.program_id(1) * steps + pl.program_id(2)

    @pl.when(pl.program_id(2) == 0)
    def _():
        sum_ref[...], total_ref[...] = jnp.zeros_like(sum_ref), jnp.zeros_like(total_ref)
        top_ref[...] = jnp.full_like(top_ref, _HIDDEN)

    @pl.when(step * bs < used_ref[pl.program_id(0)])
    def _():
        node = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (R, bs), 0), jnp.int32(G))
        words = seen_ref[0]
        word = jnp.broadcast_to(words[:1], (R, bs))
        if words.shape[0] > 1:
            word = jnp.where(node < 32, word, jnp.broadcast_to(words[1:2], (R, bs)))
        row = step * bs + jax.lax.broadcasted_iota(jnp.int32, (R, bs), 1)
        seen = (((word >> (node & 31)) & 1) == 1) & (row < S)
        keys, values = (_read(refs, o.bits, q_ref.dtype) for refs in (k_refs, v_refs))
        there = tuple(
            step * bs + jax.lax.broadcasted_iota(jnp.int32, at, i) < S for i, at in enumerate([(bs, 1), (1, bs)])
        )
        for h in range(K):
            q, y = q_ref[0, h], sum_ref[h]
            z = keys.times(q, h) * H**-0.5
            z = z if o.cap is None else o.cap * jnp.tanh(z / o.cap)
            z = jnp.where(seen, z, _HIDDEN)
            top = jnp.maximum(top_ref[h], jnp.max(z, axis=-1, keepdims=True))
            p, shrink = jnp.where(seen, jnp.exp(z - top), 0.0), jnp.exp(top_ref[h] - top)
            total_ref[h] = total_ref[h] * shrink + jnp.sum(p, axis=-1, keepdims=True)
            sum_ref[h] = y * shrink + values.weighted(p, h, there)
            top_ref[h] = top

    @pl.when(pl.program_id(2) == steps - 1)
    def _():
        total = total_ref[...]
        y_ref[...] = (sum_ref[...] / jnp.where(total > 0, total, 1.0)).astype(y_ref.dtype)[None, None]
        lse = jnp.where(total > 0, top_ref[...] + jnp.log(jnp.where(total > 0, total, 1.0)), _HIDDEN)
        lse_ref[...] = lse[None, None]


class _Block(NamedTuple):
    """Rows of one block, heads in front. What stands behind the last row, `there` says of rows, may be anything."""

    halves: tuple[Any, ...]  # [K, bs, H]; of 4 bits two of [K, bs, H / 2]
    scale: Any = None  # [K, bs]
    zero: Any = None

    def times(self, q, h: int):
        """[R, H] -> scores [R, bs]."""
        width = self.halves[0].shape[-1]
        each = [_dot(q[:, i * width : (i + 1) * width], half[h], 1) for i, half in enumerate(self.halves)]
        z = sum(each[1:], each[0])
        if self.scale is None:
            return z
        return z * self.scale[h : h + 1] + jnp.sum(q.astype(jnp.float32), axis=-1, keepdims=True) * self.zero[h : h + 1]

    def weighted(self, p, h: int, there):
        """[R, bs] -> sums of values [R, H]."""
        column, row = there
        if self.scale is None:
            values = self.halves[0][h]
            return _dot(p.astype(values.dtype), jnp.where(column, values, jnp.zeros_like(values)), 0)
        scale, zero = (jnp.where(row, x[h : h + 1], 0.0) for x in (self.scale, self.zero))
        each = [_dot((p * scale).astype(half.dtype), half[h], 0) for half in self.halves]
        return jnp.concatenate(each, axis=-1) + jnp.sum(p * zero, axis=-1, keepdims=True)


def _read(refs, bits: int | None, dtype) -> _Block:
    heads_first = lambda x: jnp.swapaxes(x, 0, 1)
    if bits is None:
        return _Block((heads_first(refs[0][0].astype(dtype)),))
    codes = refs[0][0].astype(jnp.int32)
    halves = (codes,) if bits == 8 else (codes & 15, codes >> 4)
    scale, zero = (heads_first(ref[0].astype(jnp.float32)) for ref in refs[1:])
    return _Block(tuple(heads_first(half.astype(jnp.float32).astype(dtype)) for half in halves), scale, zero)


def _dot(a, b, over: int):
    how = (((1,), (over,)), ((), ()))
    return jax.lax.dot_general(a, b, how, precision=precision(a), preferred_element_type=jnp.float32)


# 3. Launch: heads in front of nodes, the mask packed, and blocks up to the last row in use.
def _launch(q, k, v, mask, o: _Static, interpret: Any = False):
    (B, T, N, H), S = q.shape, mask.shape[2]
    leaves = lambda rows: (rows,) if o.bits is None else (rows.codes, rows.scale, rows.zero)
    K = leaves(k)[0].shape[2]
    G = N // K
    grouped = q.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)
    used = jnp.max(jnp.where(jnp.any(mask, axis=1), jnp.arange(1, S + 1, dtype=jnp.int32)[None], 0), axis=1)
    steps = pl.cdiv(pl.cdiv(S, o.block), o.parts)

    def row_block(b, part, i, used):  # what nobody sees is not fetched: the block before stays
        last = jax.lax.div(jnp.maximum(used[b] - 1, 0), jnp.int32(o.block))
        return jnp.minimum(part * steps + i, last)

    whole = lambda *shape: pl.BlockSpec((1, *shape), lambda b, part, i, used: (b, *(0 for _ in shape)))
    rows = lambda x: pl.BlockSpec(
        (1, o.block, *x.shape[2:]), lambda *at: (at[0], row_block(*at), *(0 for _ in x.shape[2:]))
    )
    words = _pack(mask)
    each = (*leaves(k), *leaves(v))
    y, lse = pl.pallas_call(
        functools.partial(_kernel, o=o, S=S, G=G),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, o.parts, steps),
            in_specs=[
                whole(K, T * G, H),
                *map(rows, each),
                pl.BlockSpec((1, words.shape[1], o.block), lambda *at: (at[0], 0, row_block(*at))),
            ],
            out_specs=[
                pl.BlockSpec((1, 1, K, T * G, H), lambda b, part, i, used: (b, part, 0, 0, 0)),
                pl.BlockSpec((1, 1, K, T * G, 1), lambda b, part, i, used: (b, part, 0, 0, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((K, T * G, H), jnp.float32),
                pltpu.VMEM((K, T * G, 1), jnp.float32),
                pltpu.VMEM((K, T * G, 1), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, o.parts, K, T * G, H), q.dtype if o.parts == 1 else jnp.float32),
            jax.ShapeDtypeStruct((B, o.parts, K, T * G, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="tree_attention",
    )(used, grouped, *each, words)
    y = y[:, 0] if o.parts == 1 else jnp.sum(y * jax.nn.softmax(lse, axis=1), axis=1)
    return y.reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H).astype(q.dtype)


def _pack(mask: Bool[Array, "B T S"]) -> Int32[Array, "B words S"]:
    """Bit t % 32 of word t // 32: node t."""
    T = mask.shape[1]
    padded = jnp.pad(mask, ((0, 0), (0, -T % 32), (0, 0))).reshape(mask.shape[0], -1, 32, mask.shape[2])
    bits = padded.astype(jnp.int32) << jnp.arange(32, dtype=jnp.int32).reshape(1, 1, 32, 1)
    return jnp.sum(bits, axis=2, dtype=jnp.int32)


def _launch_gpu(q, k, v, mask, o: _Static, interpret: bool = False):
    S, seen = mask.shape[2], jnp.any(mask, axis=1)
    row = jnp.arange(S, dtype=jnp.int32)[None]
    bounds = jnp.min(jnp.where(seen, row, S), axis=1), jnp.max(jnp.where(seen, row + 1, 0), axis=1)
    leaves = lambda rows: (rows,) if o.bits is None else (rows.codes, rows.scale, rows.zero)
    given = q, leaves(k), leaves(v), _pack(mask), jnp.stack(bounds, axis=1)
    return tree_attention_gpu.launch(*given, o.cap, o.bits, interpret=interpret)


# 4. Operation: a kernel where there is one, the reference elsewhere.
@functools.partial(jax.jit, static_argnums=(0, 1, 6))  # traced once for all layers, also where it is not lowered
def _by_kernel(o: _Static, launch: Any, q, k, v, mask, interpret: Any):
    return launch(q, k, v, mask, o, interpret)


def _plain(q, k, v, mask, o: _Static):
    if o.bits is not None:
        k, v = (dequantise(rows, q.shape[-1], q.dtype) for rows in (k, v))
    return reference(q, k, v, mask, o.cap)


def tree_attention(
    q: Float[Array, "B T N H"],
    k: Rows,
    v: Rows,
    mask: Bool[Array, "B T S"],
    *,
    softcap: float | None = None,
    parts: int = 1,
    layout: tuple[Axis, Axis] | None = None,
    impl: Impl = "auto",
) -> Float[Array, "B T N H"]:
    """Attend to the rows of a cache.

    Args:
      q: queries, rotated.
      k: all rows of the cache, those of the queries themselves included.
      v: likewise, kept in the same way.
      mask: which rows each query sees. What a query that sees none gets is finite, and nothing else is promised.
      softcap: scores become `softcap * tanh(score / softcap)`.
      parts: into how many parts the kernel of TPUs cuts the cache: as many as the chip has cores, at batch 1.
      layout: along which axes of the mesh that is set sequences and key-value heads lie; sizes have to divide. Then
        each device attends to its own, with the kernel of its kind. Without it a mesh of several is left to XLA.
      impl: as `dispatch.run` takes it. Kernels serve up to 64 nodes.
    """
    codes = getattr(k, "codes", None)
    (B, T, N, H), rows = q.shape, (k if codes is None else codes).shape  # type: ignore[union-attr]
    bits = None if codes is None else 8 if rows[-1] == H else 4
    if (rows[0], mask.shape) != (B, (B, T, rows[1])) or N % rows[2] or rows[-1] not in (H, H // 2 if bits == 4 else H):
        raise ValueError(
            f"tree_attention: q {q.shape}, rows {rows}, mask {mask.shape}; expected [B, T, N, H], [B, S, K, H] with "
            "K dividing N, [B, T, S]."
        )
    if (of_k := jax.tree.map(jnp.shape, k)) != (of_v := jax.tree.map(jnp.shape, v)):
        raise ValueError(f"tree_attention: k {of_k}, v {of_v}; expected rows that are kept in the same way.")
    if parts < 1 or (softcap is not None and softcap <= 0):
        raise ValueError(f"tree_attention: parts={parts}, softcap={softcap}; expected 1 or more, and above 0 or None.")
    mesh = jax.sharding.get_abstract_mesh()
    if layout is not None and mesh.size > 1 and not mesh.are_all_axes_manual:
        own = functools.partial(tree_attention, softcap=softcap, parts=parts, impl=impl)
        heads = PartitionSpec(layout[0], None, layout[1])  # of queries, of rows, of their scales and zeros
        ins = heads, heads, heads, PartitionSpec(layout[0])
        return jax.shard_map(own, in_specs=ins, out_specs=heads, check_vma=False)(q, k, v, mask)
    width = 4 if bits else jnp.dtype(getattr(k, "dtype", q.dtype)).itemsize  # codes are spread into 4 bytes
    block = max(128, (1 << 20) // (math.prod(rows[2:]) * width) // 128 * 128)
    o = _Static(softcap, min(block, 512, rows[1] + -rows[1] % 128), parts, bits)
    why_not = f"{T} nodes; it is made for up to {MOST_NODES}." if T > MOST_NODES else ""
    tpu = Kernel(functools.partial(_by_kernel, o, _launch), why_not)
    why_not = why_not or tree_attention_gpu.why_not(q, bits)
    gpu = Kernel(functools.partial(_by_kernel, o, _launch_gpu), why_not, tree_attention_gpu.slower(q, rows[1]))
    return run("tree_attention", impl, functools.partial(_plain, o=o), q, k, v, mask, tpu=tpu, gpu=gpu)
