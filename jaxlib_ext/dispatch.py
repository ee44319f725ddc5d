"""Which form of an operation runs: its kernel where a program is lowered for a TPU, XLA's version everywhere else."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.experimental.pallas import tpu as pltpu

Impl = Literal["auto", "xla", "pallas", "interpret"]
IMPLS = ("auto", "xla", "pallas", "interpret")


def run(
    where: str, impl: Impl, why_not: str, kernel: Callable[..., Any], plain: Callable[..., Any], *given: Any
) -> Any:
    """Apply an operation to arrays.

    A kernel is not cut up by the compiler, so `auto` leaves a mesh of several devices to XLA; within `shard_map`, where
    arrays are those of one device, it does not. Both forms are traced, and one is lowered: hand in a kernel that is
    jitted once, or every layer pays for tracing it. Forward derivatives are those of XLA's form.

    Args:
      where: the operation, for errors.
      impl: auto chooses; xla and pallas are obeyed; interpret is the kernel run step by step on any device, with races
        looked for and NaN in memory that nobody has written.
      why_not: the kernel does not serve these shapes; empty if it does.
      kernel: takes the arrays, and what `pallas_call` takes as `interpret`.
      plain: takes the arrays.
      given: the arrays.

    Raises:
      ValueError: for another name, or a kernel that is asked for by name and does not serve.
    """
    if impl not in IMPLS or (impl in ("pallas", "interpret") and why_not):
        raise ValueError(f"{where}: impl={impl!r}; expected one of {', '.join(IMPLS)}. {why_not}".rstrip())
    if impl in ("pallas", "interpret"):
        races: Any = dict(detect_races=True, uninitialized_memory="nan")
        return kernel(*given, pltpu.InterpretParams(**races) if impl == "interpret" else False)
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual
    if impl == "xla" or why_not or not alone:
        return plain(*given)

    @jax.custom_jvp  # kernels have no derivative of their own, and must not be asked for one where they are not lowered
    def chosen(*given):
        return jax.lax.platform_dependent(*given, tpu=lambda *arrays: kernel(*arrays, False), default=plain)

    chosen.defjvp(lambda given, dots: jax.jvp(plain, given, dots))
    return chosen(*given)
