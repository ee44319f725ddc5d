"""Logical axes to mesh axes: one field per logical axis, one instance per strategy.

A parameter carries the names of its logical axes (`axes=("embed", "heads", "head_dim")`); a `Rules` says on which mesh
axes each of them lies. The mesh axes are always `data`, `fsdp` and `tensor`. Activations are pinned in three places
only: heads, residual stream, logits.
"""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Axis = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """One field per logical axis, so a misspelt axis is an AttributeError and not a silent replica."""

    batch: Axis = None
    seq: Axis = None
    layers: Axis = None  # the leading axis of stacked layers
    embed: Axis = None  # the width of a weight; the width of an activation is None
    heads: Axis = None
    kv_heads: Axis = None
    head_dim: Axis = None
    ffn: Axis = None
    vocab: Axis = None

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The partition of an array whose dimensions carry these logical names."""
        return PartitionSpec(*(None if a is None else getattr(self, a) for a in axes))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Pin the layout of an activation; the identity when no mesh is set."""
        mesh = jax.sharding.get_abstract_mesh()
        return x if mesh.empty else jax.lax.with_sharding_constraint(x, self.spec(*axes))

    def shardings(self, mesh: Mesh, axes: Any) -> Any:
        """A `NamedSharding` for every leaf of a tree of axis-name tuples."""
        return jax.tree.map(lambda a: NamedSharding(mesh, self.spec(*a)), axes, is_leaf=lambda a: isinstance(a, tuple))


REPLICATED = Rules()
FSDP_TP = Rules(batch=("data", "fsdp"), embed="fsdp", heads="tensor", kv_heads="tensor", ffn="tensor", vocab="tensor")
