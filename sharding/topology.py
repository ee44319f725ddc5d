"""Compile for a chip that is not here: the TPU compiler itself runs on any machine, Pallas kernels included.

It comes with libtpu, the extra `aot`. What a chip holds and moves is read from what was compiled; how fast it is nobody
knows before a chip runs it. Published rates stand here to say what cannot be beaten.
"""

import functools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding


class Chip(NamedTuple):
    """Rates of what JAX calls a device, from those of a chip as its vendor publishes them."""

    topology: str  # the smallest that the compiler knows
    read: float  # bytes a second from its large memory
    bfloat16: float  # FLOPs a second
    memory: int  # bytes that the compiler lets a program have of it, in its own words: a little less than there is
    links: float  # bytes a second to and from all its neighbours together


CHIPS = {
    "v5e": Chip("v5e:1x1", 0.82e12, 197e12, int(15.75 * 2**30), 200e9),
    "v5p": Chip("v5p:2x2x1", 2.765e12, 459e12, int(95.73 * 2**30), 600e9),
    "v6e": Chip("v6e:1x1", 1.64e12, 918e12, int(31.24 * 2**30), 448e9),
    "tpu7x": Chip("tpu7x:2x2x1", 7.37e12 / 2, 2307e12 / 2, int(94.74 * 2**30), 1200e9 / 2),  # a chip is two devices
}


def devices_of(topology: str) -> Any:
    """Devices of a topology such as `v5e:4x4`, for meshes and shardings; nothing can be put on them.

    Raises:
      ModuleNotFoundError: without libtpu.
      ValueError: for a topology that the compiler does not know.
    """
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(
            'devices_of: no libtpu; expected the TPU compiler. pip install "jaxaroo[aot]", or "jax[tpu]".'
        ) from e
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu asks a server of the cloud otherwise, and waits
    for name, value in (
        ("WORKER_HOSTNAMES", "localhost"),
        ("ACCELERATOR_TYPE", "v5litepod-4"),
        ("STDERR_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(f"TPU_{name}", value)  # and tells at length that it did not get an answer
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes compile; none of them owns a chip
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as e:
        raise ValueError(
            f"devices_of: {topology!r} is not known to the compiler ({str(e)[:120]}); expected one such as v5e:4x4, "
            "v5p:2x2x1, v6e:8x8."
        ) from e


def compile_for(chip: str, f: Callable[..., Any], *shapes: Any) -> Any:
    """What `jax.jit(f)` becomes on one chip, for arguments of these shapes.

    Args:
      chip: a key of `CHIPS`.
      f: a function of arrays.
      shapes: trees of arrays or `jax.ShapeDtypeStruct`, which are not looked into.

    Returns:
      A `jax.stages.Compiled`, to be asked for `memory_analysis()` and `as_text()`.
    """
    if chip not in CHIPS:
        raise ValueError(f"compile_for: chip {chip!r}; expected one of {', '.join(CHIPS)}.")
    place = SingleDeviceSharding(devices_of(CHIPS[chip].topology)[0])
    there = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    with (
        warnings.catch_warnings()
    ):  # a persistent cache can hold no program of a chip that is not here, and JAX says so
        warnings.filterwarnings("ignore", message=".*persistent compilation cache")
        return jax.jit(f).lower(*jax.tree.map(there, shapes)).compile()


# ------------------------------------------------------------------------------------------------------------- kernels
class Traffic(NamedTuple):
    """Of one Pallas kernel, by the blocks of its grid."""

    name: str
    moved: int  # bytes between large and fast memory
    held: int  # bytes of fast memory: blocks, twice where the next is fetched meanwhile, and scratch


def kernel_traffic(f: Callable[..., Any], *shapes: Any, scalars: Sequence[Any] = ()) -> list[Traffic]:
    """What the kernels of a program move: a block counts when its index is not that of the step before.

    That is what the pipeline of a TPU does for blocks. What a kernel copies by itself is not seen.

    Args:
      f: a function of arrays that calls kernels.
      shapes: trees of arrays or `jax.ShapeDtypeStruct`.
      scalars: what the prefetched operands of its kernels hold, in their order, where places of blocks read them.

    Raises:
      ValueError: if places read such an operand and it is not given.
    """
    found: list[Traffic] = []
    program = jax.make_jaxpr(f)(*jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes))
    _kernels(program.jaxpr, tuple(map(jnp.asarray, scalars)), found)
    return found


# ----------------------------------------------------------------------------------------------------------- private
def _kernels(program: Any, scalars: tuple[Any, ...], found: list[Traffic]) -> None:
    for equation in program.eqns:
        if equation.primitive.name == "pallas_call":
            found.append(_traffic(equation, scalars))
            continue
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(value):
                _kernels(getattr(value, "jaxpr", value), scalars, found)


def is_program(x: Any) -> bool:
    """Whether a parameter of an equation is a program within it."""
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def _traffic(equation: Any, scalars: tuple[Any, ...]) -> Traffic:
    mapping = equation.params["grid_mapping"]
    steps = [()]
    for size in mapping.grid:
        steps = [(*step, i) for step in steps for i in range(size)]
    moved, held = 0, 0
    for block in mapping.block_mappings:
        sizes = [getattr(size, "block_size", size) for size in block.block_shape]
        sizes = [size if isinstance(size, int) else 1 for size in sizes]  # an axis that is gone
        width = block.array_aval.dtype.itemsize
        whole = block.array_aval.shape
        place = jax.jit(jax.vmap(functools.partial(_place, block, scalars)))
        places = jax.device_get(place(jnp.asarray(steps, jnp.int32).reshape(len(steps), -1)))
        at = [*zip(*(x.tolist() for x in places), strict=True)]
        fetched = [here for i, here in enumerate(at) if i == 0 or here != at[i - 1]]
        inside = lambda here, sizes=sizes, whole=whole: math.prod(
            min(size, n - i * size) for i, size, n in zip(here, sizes, whole, strict=True)
        )
        moved += width * sum(map(inside, fetched))
        held += width * math.prod(sizes) * (2 if len(fetched) > 1 else 1)
    scratch = equation.params["jaxpr"].invars[-mapping.num_scratch_operands :] if mapping.num_scratch_operands else []
    held += sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in scratch)
    return Traffic(equation.params["name"] or "kernel", int(moved), held)


def _place(block: Any, scalars: tuple[Any, ...], step: Any) -> Any:
    """Where a block stands at a step of the grid."""
    program = block.index_map_jaxpr
    names = program.jaxpr.invars
    known: dict[Any, Any] = dict(zip(names, [*step, *scalars], strict=False))
    known |= dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    value = lambda v: v.val if hasattr(v, "val") else known.get(v)
    for equation in program.jaxpr.eqns:
        given = [value(v) for v in equation.invars]
        if equation.primitive.name == "get":  # of a prefetched operand, at one place
            if given[0] is None:
                raise ValueError("kernel_traffic: places of blocks depend on data; expected it as `scalars`.")
            out = given[0][tuple(given[1:])]
        else:
            out = equation.primitive.bind(*given, **equation.params)
        known |= dict(zip(equation.outvars, out if equation.primitive.multiple_results else [out], strict=True))
    return [value(v) for v in program.jaxpr.outvars]
