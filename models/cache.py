"""The key-value cache: data that goes into a forward pass and comes out of it.

`length[b]` rows of sequence b are committed. A forward pass writes its T new rows at `length .. length + T - 1` and
leaves `length` alone: whoever called decides how many of them to keep (a padded prompt keeps its true length, a
speculative step keeps what was accepted). Rows at or past `length` are garbage and never visible.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class LayerCache(NamedTuple):
    """Keys (after rotation) and values of one layer."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]


class KVCache(NamedTuple):
    """All layers, and how many rows of each sequence are committed."""

    layers: tuple[LayerCache, ...]
    length: Int[Array, " B"]

    @property
    def capacity(self) -> int:
        """Rows per sequence, S."""
        return self.layers[0].k.shape[1]


def init_cache(layers: int, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: jax.typing.DTypeLike):
    """Allocate an empty cache: zeros, because a NaN in an unseen value row would still poison the sum over rows."""
    shape = (batch, capacity, kv_heads, head_dim)
    empty = tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers))
    return KVCache(empty, jnp.zeros(batch, jnp.int32))


def cache_axes(layers: int) -> Any:
    """Logical axis names of every leaf, as a cache; rows stay together, since a query reads all of them."""
    names = ("batch", None, "kv_heads", "head_dim")
    return KVCache((LayerCache(names, names),) * layers, ("batch",))  # type: ignore[arg-type]


def write_rows(
    cache: LayerCache, length: Int[Array, " B"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> LayerCache:
    """Put T new rows behind the committed ones; rows past the capacity are dropped, never wrapped or shifted."""
    B, T = k.shape[:2]
    row = jnp.arange(B)[:, None]
    slot = length[:, None] + jnp.arange(T)[None]
    put = lambda old, new: old.at[row, slot].set(new.astype(old.dtype), mode="drop", unique_indices=True)
    return LayerCache(put(cache.k, k), put(cache.v, v))


def keep_path(cache: KVCache, path: Int[Array, "B C"]) -> KVCache:
    """Move the rows `length + path` to `length ..`, for every layer; `length` stays.

    What a tree of guesses wrote behind the committed rows becomes the rows of the one path that was right. All rows
    are read before one is written, so paths may overlap the places they move to. Keys keep their rotation: a node's
    position is its depth, which is where it goes.
    """
    B, C = path.shape
    row = jnp.arange(B)[:, None]
    source, target = cache.length[:, None] + path, cache.length[:, None] + jnp.arange(C)[None]
    move = lambda all_: all_.at[row, target].set(
        all_.at[row, source].get(mode="clip"), mode="drop", unique_indices=True
    )
    return cache._replace(layers=jax.tree.map(move, cache.layers))
