"""Attention in which no query sees a row behind its own, and whose backward pass keeps nothing as large as its scores.

    z = q . k / sqrt(H)     e = exp(z - m)     t = sum_s e     out = (e . v) / t     m: the maximum of what is seen

Queries are taken in blocks, each against the keys up to its own end: a little over half of all products. Beside its
inputs and its output the backward pass is left m and t of every query; e is computed again, block by block, as in
FlashAttention (2205.14135, algorithm 4). With c the cotangent of out and u = c / t,

    dv = e^T u     dz = e (u . v - u . out)     dq = dz k / sqrt(H)     dk = dz^T q / sqrt(H)

and dz = 0 where nothing is seen. XLA runs it. Statistics and sums are float32, products are of the type of queries, in
an order that leaves scores as they lie: left to itself, the gradient of keys transposes them.

Letters: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H head size.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .dispatch import precision

_HIDDEN = -1e30  # a score; finite, so that a query that sees nothing has an output and no NaN


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Bool[Array, "B T T"],
    whole: bool = False,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention of rows to themselves.

    Of T rows in blocks of c it multiplies (1 + c / T) / 2 of what attention to all rows does. There are 8 blocks at
    most, of 128 rows or more: each is a part of the program.

    Args:
      q: queries.
      k: keys, of any type of floats.
      v: values, likewise.
      mask: which row sees which; where a block has ended nobody asks it.
      whole: one block of all rows, for rows that are shared out: slices of them would move.
    """
    return _forward(q, k, v, mask, whole)[0]


# ----------------------------------------------------------------------------------------------------------- private
def _forward(q, k, v, mask, whole):
    K, parts = k.shape[2], []
    if not q.shape[1]:
        raise ValueError(f"causal_attention: q {q.shape}; expected at least one row.")
    for a, b in _blocks(q.shape[1], whole):
        keys, values = (_by_head(rows[:, :b].astype(q.dtype)) for rows in (k, v))
        z = _scores(_by_group(q[:, a:b], K), keys, mask[:, a:b, :b])
        top = jnp.max(z, axis=-1, keepdims=True)
        e = jnp.exp(z - top)
        total = jnp.sum(e, axis=-1, keepdims=True)
        out = _product("bkgts,bksh->bkgth", e.astype(q.dtype), values) / total
        parts.append((_by_row(out).astype(q.dtype), top, total))
    outs, tops, totals = zip(*parts, strict=True)
    out = _joined(outs, 1)
    return out, (q, k, v, mask, out, _joined(tops, 3), _joined(totals, 3))


def _backward(whole, saved, cotangent):
    q, k, v, mask, out, tops, totals = saved
    (B, T, K, H), dqs = k.shape, []
    dk, dv = jnp.zeros((2, B, K, H, T), jnp.float32)
    for a, b in _blocks(T, whole):
        queries, keys, values = _by_group(q[:, a:b], K), *(_by_head(rows[:, :b].astype(q.dtype)) for rows in (k, v))
        seen, top, total = mask[:, a:b, :b], tops[..., a:b, :], totals[..., a:b, :]
        u = _by_group(cotangent[:, a:b].astype(jnp.float32), K) / total
        mean = jnp.sum(u * _by_group(out[:, a:b].astype(jnp.float32), K), axis=-1, keepdims=True)
        u = u.astype(q.dtype)
        e = jnp.exp(_scores(queries, keys, seen) - top)
        dz = jnp.where(seen[:, None, None], e * (_product("bkgth,bksh->bkgts", u, values) - mean), 0.0).astype(q.dtype)
        dqs.append(_by_row(_product("bkgts,bksh->bkgth", dz, keys)))
        dk = dk.at[..., :b].add(_product("bkgth,bkgts->bkhs", queries, dz))
        dv = dv.at[..., :b].add(_product("bkgth,bkgts->bkhs", u, e.astype(q.dtype)))
    back = lambda d, rows: d.transpose(0, 3, 1, 2).astype(rows.dtype)
    return (_joined(dqs, 1) * H**-0.5).astype(q.dtype), back(dk * H**-0.5, k), back(dv, v), None


causal_attention.defvjp(_forward, _backward)


def _blocks(T: int, whole: bool) -> list[tuple[int, int]]:
    size = T if whole else max(128, -(-T // 8))
    return [(first, min(first + size, T)) for first in range(0, T, size)]


def _scores(
    q: Float[Array, "B K G T H"], k: Float[Array, "B K S H"], mask: Bool[Array, "B T S"]
) -> Float[Array, "B K G T S"]:
    z = _product("bkgth,bksh->bkgts", q, k) * q.shape[-1] ** -0.5
    return jnp.where(mask[:, None, None], z, _HIDDEN)


def _product(form: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(form, x, y, precision=precision(x), preferred_element_type=jnp.float32)


# Heads in front of rows, by hand: einsum would transpose scores instead, which are larger.
def _by_head(x: Float[Array, "B S K H"]) -> Float[Array, "B K S H"]:
    return x.swapaxes(1, 2)


def _by_group(x: Float[Array, "B T N H"], K: int) -> Float[Array, "B K G T H"]:
    B, T, N, H = x.shape
    return x.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _by_row(x: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    B, K, G, T, H = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _joined(parts, axis: int) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)
