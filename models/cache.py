"""The key-value cache: data that goes into a forward pass and comes out of it.

`length[b]` rows of sequence b are committed. A forward pass writes its T new rows at `length .. length + T - 1` and
leaves `length` alone: whoever called decides how many of them to keep (a padded prompt keeps its true length, a
speculative step keeps what was accepted). Rows at or past `length` are garbage and never visible.

Rows are floats, or codes of 8 or 4 bits, as TurboMind keeps them (2508.15601): each row of each head has its own

    z = min x,   s = (max x - z) / (2^bits - 1),   q = round((x - z) / s), ties to even,   and is read as z + s q.

Both s and z are kept in bfloat16, whose range is that of float32, z rounded down and s rounded up: so no number is
clipped, and but for the rounding of float32 none is read further than s / 2 from what it was. Products s q are exact in
float32, so every program reads the same rows alike. A query reads all keys and values through the cache, those of its
own pass included: what a prompt in pieces, a step, or a tree of guesses sees is the same.

Letters: B batch, T new rows, S rows, K key-value heads, H head size.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int, UInt8

from ..jaxlib_ext.tree_attention import dequantise

# Finite numbers beyond this are read as this: no difference of two of them overflows. What is infinite or not a number
# stays so, with its whole row: whoever looks for it behind the model finds it as with a cache of floats.
LARGEST = 2.0**126
_SMALLEST = 2.0**-100  # of s, so that a row of equal numbers divides by something


class Int8Rows(NamedTuple):
    """Keys or values at 8 bits."""

    codes: UInt8[Array, "B S K H"]
    scale: BFloat16[Array, "B S K"]
    zero: BFloat16[Array, "B S K"]


class Int4Rows(NamedTuple):
    """Keys or values at 4 bits: byte i holds number i in its low half, and number i + H / 2 in its high one."""

    codes: UInt8[Array, "B S K half"]
    scale: BFloat16[Array, "B S K"]
    zero: BFloat16[Array, "B S K"]


Rows = Float[Array, "B S K H"] | Int8Rows | Int4Rows


class LayerCache(NamedTuple):
    """Keys (after rotation) and values of one layer; their type says how they are kept."""

    k: Rows
    v: Rows


class KVCache(NamedTuple):
    """All layers, and how many rows of each sequence are committed."""

    layers: tuple[LayerCache, ...]
    length: Int[Array, " B"]

    @property
    def capacity(self) -> int:
        """Rows per sequence, S."""
        return jax.tree.leaves(self.layers[0])[0].shape[1]

    @property
    def dtype(self) -> str:
        """How rows are kept, as `init_cache` takes it."""
        k = self.layers[0].k
        return "int8" if isinstance(k, Int8Rows) else "int4" if isinstance(k, Int4Rows) else str(k.dtype)


def init_cache(layers: int, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: jax.typing.DTypeLike):
    """Allocate an empty cache: zeros, because a NaN in an unseen value row would still poison the sum over rows.

    Args:
      layers: how many.
      batch: B.
      capacity: S.
      kv_heads: K.
      head_dim: H; even at 4 bits.
      dtype: a type of floats, `int8` or `int4`.
    """
    kind, shape = _kind(dtype), (batch, capacity, kv_heads, head_dim)
    if kind is Int4Rows and head_dim % 2:
        raise ValueError(f"init_cache: head_dim={head_dim} at 4 bits; expected an even number. Use int8.")

    def empty() -> Rows:
        if kind is None:
            return jnp.zeros(shape, dtype)
        last = head_dim // 2 if kind is Int4Rows else head_dim
        return kind(
            jnp.zeros((*shape[:3], last), jnp.uint8),
            jnp.zeros(shape[:3], jnp.bfloat16),
            jnp.zeros(shape[:3], jnp.bfloat16),
        )

    return KVCache(tuple(LayerCache(empty(), empty()) for _ in range(layers)), jnp.zeros(batch, jnp.int32))


def cache_axes(layers: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Any:
    """Logical axis names of every leaf, as a cache; rows stay together, since a query reads all of them."""
    kind, names = _kind(dtype), ("batch", None, "kv_heads", "head_dim")
    rows: Any = names if kind is None else kind(names, names[:3], names[:3])  # type: ignore[arg-type]
    return KVCache((LayerCache(rows, rows),) * layers, ("batch",))  # type: ignore[arg-type]


def write_rows(
    cache: LayerCache, length: Int[Array, " B"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> LayerCache:
    """Put T new rows behind the committed ones; rows past the capacity are dropped, never wrapped or shifted."""
    B, T = k.shape[:2]
    row = jnp.arange(B)[:, None]
    slot = length[:, None] + jnp.arange(T)[None]
    put = lambda old, new: old.at[row, slot].set(new, mode="drop", unique_indices=True)
    return jax.tree.map(put, cache, LayerCache(_kept_as(cache.k, k), _kept_as(cache.v, v)))


def keep_path(cache: KVCache, path: Int[Array, "B C"]) -> KVCache:
    """Move the rows `length + path` to `length ..`, for every layer; `length` stays.

    What a tree of guesses wrote behind the committed rows becomes the rows of the one path that was right. All rows
    are read before one is written, so paths may overlap the places they move to. Keys keep their rotation: a node's
    position is its depth, which is where it goes. Codes move with their scales, and nothing is rounded again.
    """
    B, C = path.shape
    row = jnp.arange(B)[:, None]
    source, target = cache.length[:, None] + path, cache.length[:, None] + jnp.arange(C)[None]
    move = lambda all_: all_.at[row, target].set(
        all_.at[row, source].get(mode="clip"), mode="drop", unique_indices=True
    )
    return cache._replace(layers=jax.tree.map(move, cache.layers))


def quantise_rows(x: Float[Array, "B T K H"], bits: Literal[8, 4]) -> Int8Rows | Int4Rows:
    """Codes of each row of each head, by the s and z that are kept beside them."""
    levels, x = 2**bits - 1, x.astype(jnp.float32)
    x = jnp.where(jnp.isfinite(x), jnp.clip(x, -LARGEST, LARGEST), x)
    zero = _to_bfloat16(jnp.min(x, axis=-1), up=False)
    hair = 1 - 2.0**-22  # of which s may be too small, so that what bfloat16 holds is never rounded to the number after
    scale = _to_bfloat16((jnp.max(x, axis=-1) - zero) * (hair / levels), up=True)
    scale = jnp.maximum(scale, _SMALLEST)
    # By the reciprocal, into which compilers turn some quotients: rows round alike in every program.
    codes = jnp.clip(jnp.round((x - zero[..., None]) * (1 / scale)[..., None]), 0, levels).astype(jnp.uint8)
    scale, zero = scale.astype(jnp.bfloat16), zero.astype(jnp.bfloat16)
    if bits == 8:
        return Int8Rows(codes, scale, zero)
    low, high = jnp.split(codes, 2, axis=-1)
    return Int4Rows(low | (high << 4), scale, zero)


def dequantise_rows(rows: Rows, dtype: jax.typing.DTypeLike) -> Float[Array, "B S K H"]:
    """What rows stand for, computed in float32 and rounded once."""
    if not isinstance(rows, Int8Rows | Int4Rows):
        return rows.astype(dtype)
    return dequantise(rows, rows.codes.shape[-1] * (2 if isinstance(rows, Int4Rows) else 1), dtype)


# ----------------------------------------------------------------------------------------------------------- private
def _kind(dtype: jax.typing.DTypeLike) -> type[Int8Rows] | type[Int4Rows] | None:
    """What rows of this type are kept in; None is an array of floats."""
    kinds = {"int8": Int8Rows, "int4": Int4Rows}
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not (found.name in kinds or jnp.issubdtype(found, jnp.floating)):
        raise ValueError(f"init_cache: dtype={dtype!r}; expected a type of floats, 'int8' or 'int4'.")
    return kinds.get(found.name)


def _kept_as(rows: Rows, new: Float[Array, "B T K H"]) -> Rows:
    """New rows in the form of the old ones."""
    if isinstance(rows, Int8Rows | Int4Rows):
        return quantise_rows(new, 8 if isinstance(rows, Int8Rows) else 4)
    return new.astype(rows.dtype)


def _to_bfloat16(x: Float[Array, "*n"], *, up: bool) -> Float[Array, "*n"]:
    """The next number, up or down, that bfloat16 holds; still as float32.

    On bits, for compilers may drop a conversion to a smaller type and back, and codes would be made for another scale
    than the one that is kept.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    away_from_zero = x > 0 if up else x < 0
    bits = bits + jnp.where(away_from_zero, jnp.uint32(0xFFFF), jnp.uint32(0))
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
