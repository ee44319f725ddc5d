"""Work on `[B, T, V]` logits a tile of tokens at a time, each device on tokens of its own.

What a tile's logits were made from is all that is kept for the backward pass, which makes them again. A tile is a few
tokens of each row of a device; where a row is shared out, each part of it is a row. So no token leaves its device, and
a table that is fetched before the loop is fetched once.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..sharding.rules import Rules


def over_tiles(function: Callable[[Any, Rules], Any], tokens: Any, tile: int, rules: Rules) -> Any:
    """Apply a function to all tokens, tile by tile, forward and backward.

    Args:
      function: (a tile of `tokens`, `[R, each, ...]`, and the rules that hold within it) -> a tree of `[R, each, ...]`.
      tokens: a tree of arrays `[B, T, ...]`.
      tile: how many tokens of a device are worked on at a time.
      rules: where tokens lie on the mesh that is set.

    Returns:
      The tree of results, `[B, T, ...]`.
    """
    B, T = jax.tree.leaves(tokens)[0].shape[:2]
    parts = rules.ways(rules.seq) if T % rules.ways(rules.seq) == 0 else 1
    R, L = B * parts, T // parts
    if parts > 1:
        rules = dataclasses.replace(rules, batch=rules.seq_and_batch, seq=None)
    ways = rules.ways(rules.batch)
    each = min(max(1, tile * (ways if R % ways == 0 else 1) // R), L)

    def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [tiles, R, each, ...], padded with zeros
        x = jnp.swapaxes(x.reshape(B, parts, L, *x.shape[2:]), 0, 1).reshape(R, L, *x.shape[2:])
        x = rules.constrain(x, "batch", *(None for _ in x.shape[1:]))
        x = jnp.pad(x, [(0, 0), (0, -L % each)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(R, -1, each, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1).reshape(R, -1, *x.shape[3:])[:, :L]
        return jnp.swapaxes(x.reshape(parts, B, L, *x.shape[2:]), 0, 1).reshape(B, T, *x.shape[2:])

    one = jax.checkpoint(lambda part: function(part, rules))
    return jax.tree.map(join, jax.lax.map(one, jax.tree.map(cut, tokens)))


def fetched(table: Float[Array, "V D"], rules: Rules) -> Float[Array, "V D"]:
    """An output embedding as a loop over tiles wants it: with all columns on every device."""
    return rules.constrain(table, "vocab", None)
