"""What an engine asks of the devices that its weights lie on: which mesh they are, and what they have left.

Weights that lie on a mesh of several devices (`multi_precision.place`, or `hf.load(mesh=..., rules=SERVING)`) are
served there, by all of them together: `sharding.rules.SERVING` says along which axes heads, widths of MLPs and the
vocabulary lie, and sequences of a batch along data and fsdp, where they divide.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..models.cache import KVCache
from ..models.decoder import Params
from ..sharding.plan import bytes_of
from ..sharding.rules import SERVING, divisible


def mesh_of(params: Params) -> Mesh | None:
    """The mesh of several devices that the first weight lies on; None for one device."""
    place = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return place.mesh if isinstance(place, NamedSharding) and place.mesh.size > 1 else None  # type: ignore[return-value]


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Within it, what is called is for this mesh; for one device nothing changes."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def beside(tree: Any, mesh: Mesh | None) -> Any:
    """A tree with its arrays, used with weights on a mesh, whole on each of its devices if they lie elsewhere."""
    if mesh is None:
        return tree
    whole = NamedSharding(mesh, PartitionSpec())
    away = lambda x: isinstance(x, jax.Array) and x.sharding.device_set != whole.device_set
    return jax.tree.map(lambda x: jax.device_put(x, whole) if away(x) else x, tree)


def row_specs(tree: Any, sizes: Mapping[str, int]) -> Any:
    """The partition of every array of a state: sequences along data and fsdp, heads of caches along tensor.

    Args:
      tree: a state of decoding; every leaf has a leading axis of sequences.
      sizes: of the mesh, axis by axis.
    """

    def each(node: Any) -> Any:
        names = ("batch", None, "kv_heads" if isinstance(node, KVCache) else None, None)
        spec = lambda x: SERVING.spec(*names[: x.ndim])
        return jax.tree.map(lambda x: divisible(spec(x), x.shape, sizes, "state", logging.DEBUG), node)

    return jax.tree.map(each, tree, is_leaf=lambda node: isinstance(node, KVCache))


def pinned(tree: Any) -> Any:
    """A state as it lies between calls, on the mesh that is set: else calls would leave it where the compiler likes,
    and the next would be compiled once more for that."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.lax.with_sharding_constraint(tree, row_specs(tree, mesh.shape))


def check_memory(params: Params, batch: int, capacity: int, prefill: Callable[[], Any]) -> None:
    """Refuse a state that cannot fit, caches of a drafter included, before the device says so in its own words.

    Args:
      params: the model's weights, on the devices in question.
      batch: sequences at once.
      capacity: tokens of each.
      prefill: makes the state; it is not run.

    Raises:
      MemoryError: with both sizes, of one device.
    """
    if (free := _free_bytes(params)) is None:
        return
    mesh = mesh_of(params)
    with on_mesh(mesh):
        state = jax.eval_shape(prefill)
    if mesh is not None:
        place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        state = jax.tree.map(place, state, row_specs(state, mesh.shape))
    if (need := bytes_of(state)) > free:
        raise MemoryError(
            f"generate: the cache of {batch} sequences of {capacity} tokens needs {need / 2**30:.2f} GiB"
            f"{' of each device' * (mesh is not None)}; {free / 2**30:.2f} GiB are free. Lower max_seqs or max_tokens, "
            "or set kv_dtype."
        )


# ----------------------------------------------------------------------------------------------------------- private
def _free_bytes(params: Params) -> int | None:
    """What a device that holds weights has left; None where it does not say (CPU)."""
    stats = next(iter(jax.tree.leaves(params)[0].devices())).memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
