"""Logical axes to mesh axes: one field per logical axis, one instance per strategy.

A parameter carries the names of its logical axes (`axes=("embed", "heads", "head_dim")`); a `Rules` says on which mesh
axes each of them lies. The mesh axes are those of `mesh.py`: `data`, `fsdp`, `tensor` and `sequence`. Activations are
pinned in three places only: heads, residual stream, logits. A dimension that its mesh axes do not divide is replicated,
and the log says so.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Axis = str | tuple[str, ...] | None

log = logging.getLogger(__name__)


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
        """The partition of an array whose dimensions carry these logical names.

        Raises ValueError when two of them lie on one mesh axis: an array has only one dimension to give it.
        """
        parts = [None if a is None else getattr(self, a) for a in axes]
        used = [name for part in parts for name in _names(part)]
        if twice := sorted({name for name in used if used.count(name) > 1}):
            raise ValueError(
                f"Rules.spec: axes {axes} put mesh axis {', '.join(twice)} on two dimensions; expected each mesh axis "
                "at most once an array. Change one of the rules."
            )
        return PartitionSpec(*parts)

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Pin the layout of an activation; the identity when no mesh is set."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return x
        return jax.lax.with_sharding_constraint(x, self.places(x.shape, *axes))

    def places(self, shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
        """The partition of an array of this shape on the mesh that is set; nothing is shared out where none is."""
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return PartitionSpec(*(None,) * len(axes))
        return divisible(self.spec(*axes), shape, mesh.shape, f"activation {axes}")

    def ways(self, axis: Axis) -> int:
        """How many devices of the mesh that is set lie along these mesh axes."""
        return ways(axis, jax.sharding.get_abstract_mesh().shape)

    @property
    def seq_and_batch(self) -> tuple[str, ...]:
        """The mesh axes along which tokens lie."""
        return *_names(self.seq), *_names(self.batch)

    def shardings(self, mesh: Mesh, axes: Any, shapes: Any = None) -> Any:
        """A `NamedSharding` for every leaf of a tree of axis-name tuples.

        Args:
          mesh: where the arrays will lie.
          axes: a tree whose leaves are tuples of names and None; other tuples are part of the tree.
          shapes: the same tree of arrays or `ShapeDtypeStruct`s. With it, dimensions that the mesh does not divide are
            replicated, one INFO line each; without it, placing such an array is JAX's error.
        """
        if shapes is None:
            return jax.tree.map(lambda a: NamedSharding(mesh, self.spec(*a)), axes, is_leaf=_is_axes)

        def one(path: Any, names: tuple[str | None, ...], array: Any) -> NamedSharding:
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            if len(names) != len(array.shape):
                raise ValueError(
                    f"Rules.shardings: {where} has axes {names} and shape {tuple(array.shape)}; expected a name for "
                    "each dimension. Are the layers stacked in one tree and not in the other?"
                )
            return NamedSharding(mesh, divisible(self.spec(*names), array.shape, mesh.shape, where))

        return jax.tree_util.tree_map_with_path(one, axes, shapes, is_leaf=_is_axes)


REPLICATED = Rules()
FSDP_TP = Rules(batch=("data", "fsdp"), embed="fsdp", heads="tensor", kv_heads="tensor", ffn="tensor", vocab="tensor")
SERVING = dataclasses.replace(FSDP_TP, embed=None)  # no weight lies along fsdp: every step would gather all of them
FSDP_TP_SEQ = dataclasses.replace(FSDP_TP, seq="sequence")  # long contexts: the tokens of a row are shared out too


def ways(axis: Axis, sizes: Mapping[str, int]) -> int:
    """How many devices lie along these mesh axes, by the sizes of a mesh; an axis that it lacks has one."""
    return math.prod(sizes.get(name, 1) for name in _names(axis))


def divisible(
    spec: PartitionSpec, shape: tuple[int, ...], sizes: Mapping[str, int], where: str, level: int = logging.INFO
) -> PartitionSpec:
    """Replicate each dimension whose size is no multiple of its mesh axes' product, and say so in the log.

    Raises ValueError for a mesh axis that is not among `sizes` (mesh axis -> devices along it).
    """
    parts: list[Axis] = list(spec)
    for i, part in enumerate(parts):
        if missing := [name for name in _names(part) if name not in sizes]:
            raise ValueError(
                f"Rules: {where} lies on mesh axis {missing[0]}; the mesh has {', '.join(sizes)}. Build it with "
                "make_mesh, or choose rules without that axis."
            )
        ways = math.prod(sizes[name] for name in _names(part))
        if i < len(shape) and shape[i] % ways:
            parts[i] = None
            along = ", ".join(_names(part))
            log.log(level, "%s: dimension %d of size %d is replicated; %s = %d", where, i, shape[i], along, ways)
    return PartitionSpec(*parts)


def shardings_like(state: Any, params: Any, shardings: Any) -> Any:
    """Shard an optimiser's state like the parameters that it follows.

    A leaf belongs to the parameter with which its path has the longest end in common: an optimiser of one part of the
    tree has paths that begin there. If it has that parameter's shape, it takes its sharding. So does one with one
    dimension more, which is not shared out: moments of several widths, stacked. Anything else is replicated: counts,
    factored moments, schedules, and what several parameters of unlike shardings could claim.

    Args:
      state: `jax.eval_shape(tx.init, params)`, or any tree that holds trees like `params`, or like parts of it.
      params: the parameters or their shapes.
      shardings: their shardings, at least one and all on one mesh.
    """
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    places = jax.tree.leaves(shardings)
    of: dict[Any, list[tuple[tuple[int, ...], NamedSharding]]] = {}
    for (path, leaf), place in zip(flat, places, strict=True):
        for i in range(len(path)):
            of.setdefault(path[i:], []).append((leaf.shape, place))
    replicated = NamedSharding(places[0].mesh, PartitionSpec())

    def one(path: Any, leaf: Any) -> NamedSharding:
        ends = (path[i:] for i in range(len(path)))  # the longest first
        owners = next((of[end] for end in ends if end in of), [])
        found = {place for shape, owner in owners if (place := _like(leaf.shape, shape, owner)) is not None}
        return found.pop() if len(found) == 1 else replicated

    return jax.tree_util.tree_map_with_path(one, state)


# ----------------------------------------------------------------------------------------------------------- private
def _like(shape: tuple[int, ...], owner: tuple[int, ...], place: NamedSharding) -> NamedSharding | None:
    """How an array lies beside its owner: likewise, with one more dimension whole, or not at all like it."""
    if shape == owner:
        return place
    for i in range(len(shape) if len(shape) == len(owner) + 1 else 0):
        if shape[:i] + shape[i + 1 :] == owner:
            spec = [*place.spec, *[None] * (len(owner) - len(place.spec))]
            return NamedSharding(place.mesh, PartitionSpec(*spec[:i], None, *spec[i:]))
    return None


def _names(part: Axis) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)
