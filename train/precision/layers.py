"""Numbers of each layer, from a tree of parameters whose layers are stacked or a tuple: one answer for both forms."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ...models.multi_precision import path_name

Axes = tuple[int, ...]


def layer_of(path: tuple[Any, ...]) -> int | None:
    """Which layer a leaf belongs to where layers are a tuple; None where they are stacked, and outside layers."""
    second: Any = path[1] if len(path) > 1 else None
    unrolled = path_name(path[:1]) == "layers" and isinstance(second, jax.tree_util.SequenceKey)
    return second.idx if unrolled else None


def by_layer(tree: Any, reduce: Callable[[Array, Axes], Array] = jnp.sum) -> dict[str, Array]:
    """Name -> what `reduce` makes of a leaf in each layer, `[L]`; outside layers of the whole leaf, a scalar.

    Args:
      tree: parameters, or anything of their form.
      reduce: of an array and the axes that shall vanish, as `jnp.sum` and `jnp.max`.

    Raises:
      ValueError: if layers as a tuple do not all have the same leaves.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found: dict[str, Any] = {}
    for path, leaf in leaves:
        name = path_name(path)
        stacked = name.startswith("layers/") and layer_of(path) is None
        value = reduce(leaf, tuple(range(int(stacked), leaf.ndim)))
        if layer_of(path) is None:
            found[name] = value
        else:
            found.setdefault(name, []).append(value)
    lists = {name: value for name, value in found.items() if isinstance(value, list)}
    for name, value in lists.items():
        if len(value) != len(tree["layers"]):
            raise ValueError(
                f"by_layer: {name} is in {len(value)} of {len(tree['layers'])} layers; expected it in every layer."
            )
    return found | {name: jnp.stack(value) for name, value in lists.items()}
