"""Checkpoints of a run: state, position in the data, and proof that what is read is what was written.

A step's folder appears under its number only once it is complete (Orbax writes elsewhere and renames), and the writing
goes on behind the next steps. Beside the arrays stands a fingerprint of their bits, taken on the devices before the
save began, and one of the position; a checkpoint that does not have them, or that cannot be read, is set aside and the
one before it used.
"""

import contextlib
import dataclasses
import json
import logging
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from .state import TrainState

log = logging.getLogger(__name__)


class DamagedCheckpointError(ValueError):
    """Every checkpoint of a run is unreadable."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every: int = 100  # steps between saves; the last step is saved too
    keep: int = 3  # the newest ones
    keep_every: int | None = None  # and for good each multiple of this

    def __post_init__(self):
        for name in ("every", "keep", "keep_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"CheckpointConfig.{name}: found {value}; expected at least 1.")


class Restored(NamedTuple):
    """What a run goes on from."""

    state: TrainState
    data: Mapping[str, Any]  # position, as it was given to `save`
    step: int


def open_checkpoints(folder: Path, cfg: CheckpointConfig) -> ocp.CheckpointManager:
    """The checkpoints under `folder`, which is made if need be; close it, or leave a `with`, to finish writing."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=cfg.keep,
        keep_period=cfg.keep_every,
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
        create=True,
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(manager: ocp.CheckpointManager, state: TrainState, data: Mapping[str, Any]) -> None:
    """Copy the state from the devices and begin to write it; does nothing if this step is already saved.

    Args:
      manager: of `open_checkpoints`.
      state: as the step left it. Frozen parameters come from elsewhere: their fingerprint alone is saved.
      data: where the data stands, as JSON.
    """
    step = int(state.step)
    if step in manager.all_steps():
        return
    prints = _fingerprint(state) | {"data": _print_of_json(dict(data))}
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state._replace(frozen={})),
        meta=ocp.args.JsonSave({"data": dict(data), "fingerprint": prints}),
    )
    manager.save(step, args=items, force=True)


def restore(manager: ocp.CheckpointManager, like: TrainState) -> Restored | None:
    """The newest checkpoint that is whole, laid out as `like`; None if there is none at all.

    Args:
      manager: of `open_checkpoints`.
      like: shapes, types and shardings to restore to, which may be of another mesh than the one that saved; arrays or
        `ShapeDtypeStruct`s. The frozen parameters are arrays: they are not read but taken over, and have to be those of
        the save.

    Raises:
      DamagedCheckpointError: if there are checkpoints and none can be used; says what is wrong with each.
    """
    why: dict[int, str] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        found, problem = None, None
        try:
            found = _read(manager, step, like)
        except Exception as e:  # whatever a reader makes of broken files
            if isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in str(e):
                raise
            problem = f"{type(e).__name__}: {e}".splitlines()[0][:300]
        if _anywhere(problem is not None) or found is None:  # processes try the same step, or their collectives cross
            why[step] = problem or "another process cannot read it"
            continue
        if problem := _difference(found):
            why[step] = problem
            continue
        for bad, reason in why.items():
            log.warning("checkpoint %d is damaged (%s); going on from %d", bad, reason, step)
            _set_aside(manager, bad)
        if why:
            multihost_utils.sync_global_devices("set aside")
            manager.reload()
        return Restored(found.state, found.meta["data"], step)
    if why:
        found = "; ".join(f"{step}: {reason}" for step, reason in why.items())
        raise DamagedCheckpointError(
            f"restore: no checkpoint under {manager.directory} can be read ({found}); expected at least one that is "
            "whole and of this model. Begin a new run with another --out."
        )
    return None


# ----------------------------------------------------------------------------------------------------------- private
class _Found(NamedTuple):
    """What a step's folder holds."""

    step: int
    state: TrainState
    meta: Mapping[str, Any]


def _read(manager: ocp.CheckpointManager, step: int, like: TrainState) -> _Found:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
    folder = manager.directory / str(step)
    meta = json.loads((folder / "meta" / "metadata").read_text(encoding="utf-8"))
    if not isinstance(meta, dict) or not all(isinstance(meta.get(name), dict) for name in ("data", "fingerprint")):
        raise ValueError(f"meta/metadata is {str(meta)[:80]}; expected `data` and `fingerprint`")
    # Not by the manager: it lets processes wait for each other, and one that cannot read its part never comes.
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        state = handler.restore(folder / "state", args=ocp.args.StandardRestore(shapes._replace(frozen={})))
    return _Found(step, state._replace(frozen=like.frozen), meta)


def _difference(found: _Found) -> str | None:
    """In what it is not what was saved."""
    wanted = found.meta["fingerprint"]
    got = _fingerprint(found.state) | {"data": _print_of_json(found.meta["data"])}
    if wrong := sorted(name for name in wanted | got if wanted.get(name) != got.get(name)):
        return f"bits of {', '.join(wrong[:3])} are not those that were saved"
    inside = int(found.state.step)
    return None if inside == found.step else f"holds step {inside}"


def _anywhere(here: bool) -> bool:
    """Whether it is so on any process."""
    return here if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.int32(here)).any())


def _fingerprint(tree: Any) -> dict[str, int]:
    """For every leaf the sum, modulo 2^32, of its elements' bits, each mixed with its place by a bijection.

    Integers in any order add up to the same, so the layout on devices does not matter. A change of one element always
    changes the sum, and other changes all but once in 2^32 times: the mixing is the finaliser of MurmurHash3.

    A program for each shape, not one for the tree: weights and their moments share it, and so do runs of one model.
    One is waited for, on all devices, before the next begins. XLA for CPUs writes mixed bits down before it sums them,
    as many bytes as a leaf has; and jax 0.10 aborts where several programs at once sum over CPU devices.
    """
    leaves = jax.tree_util.tree_leaves_with_path(jax.block_until_ready(tree))
    return {jax.tree_util.keystr(path): int(jax.block_until_ready(_print_of(leaf))) for path, leaf in leaves}


def _print_of_json(value: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


@jax.jit
def _print_of(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, np.dtype(f"uint{8 * x.dtype.itemsize}")) if x.dtype != bool else x
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = bits.astype(jnp.uint32) ^ (index * jnp.uint32(0x9E3779B1))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed, dtype=jnp.uint32)


def _set_aside(manager: ocp.CheckpointManager, step: int) -> None:
    """Out of the way of the save that will come at this step again, but not deleted."""
    if jax.process_index() == 0:
        folder = Path(manager.directory)
        number = 0
        while (to := folder.parent / "damaged" / f"{step}.{number}").exists():
            number += 1
        to.parent.mkdir(exist_ok=True)
        (folder / str(step)).rename(to)
