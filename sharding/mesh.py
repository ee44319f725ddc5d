"""Devices as a mesh, processes as one program, and batches from hosts onto devices.

Every process runs the same program. `start_processes` joins them, `make_mesh` lays out all their devices, `local_rows`
says which rows of a global batch a process has to read, `put_batch` makes them one global array, and `gather` brings
results back to every host. With one process all of this is the same code. M counts micro-batches here.
"""

import dataclasses
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from .rules import Rules, divisible

_UNHEARD = 25  # seconds without a word from a process, after which JAX's service ends all others
AXES = ("data", "fsdp", "tensor", "sequence")  # the last ones talk the most, and get the nearest neighbours


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis of the mesh; one of them may be -1, which stands for what is left."""

    data: int = 1  # copies of the model, each with its part of the batch
    fsdp: int = -1  # parts of every weight, gathered when needed; also parts of the batch
    tensor: int = 1  # parts of heads, MLP width and vocabulary
    sequence: int = 1  # parts of the tokens of a row; needs rules with `seq`

    def __post_init__(self):
        for name in AXES:
            size = getattr(self, name)
            if size < 1 and size != -1:
                raise ValueError(f"MeshConfig.{name}: found {size}; expected a positive integer, or -1: what is left.")
        if len(rest := [name for name in AXES if getattr(self, name) == -1]) > 1:
            raise ValueError(f"MeshConfig: {' and '.join(rest)} are -1; expected at most one. Give the others a size.")


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Lay out devices (default: all, of every process) as `data` x `fsdp` x `tensor` x `sequence`.

    On TPUs neighbours in the mesh are neighbours on the torus, and `data` alone crosses from slice to slice; on GPUs
    the order is that of ids, elsewhere that of `devices`. Raises ValueError when the sizes do not fit.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _sizes(cfg, len(devices))
    slices = len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
    if sizes[0] % slices:
        why = "only copies of the model may talk over the network between slices"
        raise ValueError(f"make_mesh: data={sizes[0]} over {slices} TPU slices; expected a multiple: {why}.")
    if slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        inner, between = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(inner, between, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def start_processes(
    *, coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the processes of a run. Call it first: no device may have been touched, not even by `jax.devices()`.

    The three settings come from the arguments; if none is given, from JAXAROO_COORDINATOR, JAXAROO_NUM_PROCESSES and
    JAXAROO_PROCESS_ID; if none is set, from SLURM (a step of several tasks) or a TPU pod's variables. Nothing happens
    for a single process, nor on a second call. A process that is not heard of for 25 s ends all of them.

    Raises:
      ValueError: for settings that are missing or cannot be.
      RuntimeError: when a device was touched before.

    Args:
      coordinator: "host:port" of process 0; or "auto", alone, to let JAX ask the machine (Cloud TPU VMs outside GKE,
        Open MPI, Kubernetes jobs with the `kubernetes` package).
      num_processes: how many there are.
      process_id: which of them this is, from 0.
    """
    given = dict(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    settings = _process_settings(given, os.environ)
    if settings is None or jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(**settings, heartbeat_timeout_seconds=_UNHEARD)
    except RuntimeError as error:
        if "must be called before" not in str(error):
            raise
        raise RuntimeError(
            "start_processes: JAX has already started its devices; expected no array, jax.devices() or jitted call "
            "before it. Call start_processes first, before a model or a key is made."
        ) from error


def local_rows(mesh: Mesh, rules: Rules, global_batch: int) -> slice:
    """Which rows of a batch this process must read: those that its devices hold, of the batch's `global_batch` rows.

    Processes whose devices hold the same rows (tensor or sequence parts of one replica) all read them. Raises
    ValueError when the batch does not divide, NotImplementedError when the rows are not contiguous.
    """
    ways, words = batch_ways(mesh, rules)
    if global_batch % ways:
        raise ValueError(f"local_rows: a batch of {global_batch} rows over {words}; expected a multiple of {ways}.")
    sharding = NamedSharding(mesh, rules.spec("batch"))
    held = sharding.addressable_devices_indices_map((global_batch,)).values()
    parts = {index[0].indices(global_batch)[:2] for index in held if index is not None}
    rows = sorted(parts)
    if not rows or rows[-1][1] - rows[0][0] != sum(stop - start for start, stop in rows):
        raise NotImplementedError(
            f"local_rows: process {jax.process_index()} holds the rows {rows}; expected one contiguous range. Give "
            "make_mesh the devices in the order of the processes, some of each."
        )
    return slice(rows[0][0], rows[-1][1])


def put_batch(mesh: Mesh, rules: Rules, batch: Any) -> Any:
    """Make global arrays of every process's rows.

    `batch` is a tree of host arrays [M, B, ...] whose B rows are `local_rows` of the global batch. `rules.batch` shards
    axis 1, `rules.seq` axis 2, all others are replicated; so is an axis 2 that does not divide, with a DEBUG line, for
    not every leaf has tokens there. Raises ValueError when a leaf has no axis 1, or when its rows do not divide.
    """
    ways, words = batch_ways(mesh, rules)
    mine = local_rows(mesh, rules, ways)  # counted in parts of the batch
    held = mine.stop - mine.start

    def put(path: Any, leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        where = f"put_batch: {jax.tree_util.keystr(path, simple=True, separator='.') or 'the batch'}"
        if leaf.ndim < 2:
            raise ValueError(f"{where} has shape {leaf.shape}; expected [micro-batches, rows, ...].")
        if leaf.shape[1] % held:
            raise ValueError(
                f"{where} has {leaf.shape[1]} rows in this process, for {held} of the parts {words}; expected a "
                f"multiple of {held}, over all processes of {ways}. Change the batch size or the mesh."
            )
        rows = leaf.shape[1] // held  # of one part
        shape = (leaf.shape[0], rows * ways, *leaf.shape[2:])
        spec = rules.spec(*(None, "batch", "seq")[: leaf.ndim])
        spec = divisible(spec, shape, mesh.shape, where, logging.DEBUG)
        first = mine.start * rows

        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[1].indices(shape[1])
            return leaf[(index[0], slice(start - first, stop - first), *index[2:])]

        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), piece)

    return jax.tree_util.tree_map_with_path(put, batch)


def gather(tree: Any) -> Any:
    """Whole NumPy arrays on every process, whatever their sharding; what only this process holds stays as it is.

    All processes must call it, with the same tree. Leaves go one by one, and each is whole on every device meanwhile.
    """
    across = lambda leaf: isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
    whole = lambda leaf: multihost_utils.process_allgather(leaf, tiled=True) if across(leaf) else leaf
    return jax.tree.map(lambda leaf: np.asarray(whole(leaf)), tree)


def exchange(value: Any) -> list[Any]:
    """What every process has, by their order, on all of them; all must call it. With one process, that itself.

    Args:
      value: what JSON can hold, NaN included. It travels as text.
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    rows = multihost_utils.process_allgather(np.pad(text, (0, size - len(text)), constant_values=ord(" ")))
    return [json.loads(bytes(row)) for row in rows]


def batch_ways(mesh: Mesh, rules: Rules) -> tuple[int, str]:
    """Into how many parts the batch is split; the same in words: "data=2 x fsdp=4 = 8"."""
    names = (rules.batch,) if isinstance(rules.batch, str) else rules.batch or ()
    ways = math.prod(mesh.shape[name] for name in names)
    return ways, f"{' x '.join(f'{name}={mesh.shape[name]}' for name in names) or 'no mesh axis'} = {ways}"


# ----------------------------------------------------------------------------------------------------------- private
def _sizes(cfg: MeshConfig, count: int) -> tuple[int, ...]:
    """The four sizes, with -1 filled in."""
    asked = {name: getattr(cfg, name) for name in AXES}
    fixed = math.prod(size for size in asked.values() if size != -1)
    sizes = tuple(count // fixed if size == -1 else size for size in asked.values())
    if math.prod(sizes) == count:
        return sizes
    if -1 in asked.values():
        expected = f"a divisor of {count}: {', '.join(str(d) for d in range(1, count + 1) if count % d == 0)}"
    else:
        fits = [f"{name}={count * size // fixed}" for name, size in asked.items() if count * size % fixed == 0]
        expected = f"{count}. {' or '.join(fits) or 'No single change'} would fit; -1 stands for what is left"
    found = " x ".join(f"{name}={size}" for name, size in asked.items())
    raise ValueError(f"make_mesh: {found} on {count} devices; the sizes multiply to {fixed}, expected {expected}.")


def _process_settings(found: dict[str, Any], env: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None when there is one process."""
    if all(value is None for value in found.values()):
        names = (f"JAXAROO_{name.upper()}" for name in found)
        found = {name: _number(env, name) if i else env.get(name) or None for i, name in enumerate(names)}
    address, count, index = found.values()
    missing = [name for name, value in found.items() if value is None]
    if len(missing) == 3:
        return _cluster_settings(env)
    if address == "auto" and len(missing) == 2:
        return {}
    if count == 1 and index in (None, 0):
        return None
    said = "start_processes: " + ", ".join(f"{name}={value}" for name, value in found.items() if value is not None)
    if missing:
        raise ValueError(
            f"{said} without {', '.join(missing)}; expected all three, or the coordinator 'auto' alone. Set all as "
            "arguments, or all in the environment."
        )
    if not 0 <= index < count or not re.fullmatch(r".+:\d+", address):
        raise ValueError(f"{said}; expected a coordinator host:port, and 0 <= process id < number of processes.")
    found = dict(coordinator_address=address, num_processes=count, process_id=index)
    return found | dict(cluster_detection_method="deactivate")  # under SLURM it would leave a process one GPU


def _cluster_settings(env: Mapping[str, str]) -> dict[str, Any] | None:
    """What JAX must be told to find the other processes by itself; None where nothing speaks of several."""
    if (_number(env, "SLURM_STEP_NUM_TASKS") or 1) > 1:  # the step's: a shell within an allocation is one process
        gpus, tasks = _number(env, "SLURM_GPUS_ON_NODE"), env.get("SLURM_STEP_TASKS_PER_NODE", "")
        whole_node = bool(gpus) and re.fullmatch(r"1(\(x\d+\))?", tasks)  # JAX's default is one GPU a task even then
        mine = dict(local_device_ids=list(range(gpus or 0))) if whole_node else {}
        return dict(cluster_detection_method="slurm", **mine)
    workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ""
    return {} if "," in workers or (_number(env, "MEGASCALE_NUM_SLICES") or 1) > 1 else None


def _number(env: Mapping[str, str], name: str) -> int | None:
    value = env.get(name)
    if value and not value.isdecimal():
        raise ValueError(f"start_processes: {name} is {value!r}; expected a whole number.")
    return int(value) if value else None
