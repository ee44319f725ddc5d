"""Which form of an operation runs: chosen where a program is lowered, by what it is lowered for."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

Impl = Literal["auto", "xla", "tpu", "gpu", "interpret-tpu", "interpret-gpu"]
IMPLS = ("auto", "xla", "tpu", "gpu", "interpret-tpu", "interpret-gpu")


class Kernel(NamedTuple):
    """The form that a kind of device has of its own."""

    call: Callable[..., Any]  # takes the arrays, and what `pallas_call` takes as `interpret`
    why_not: str = ""  # it does not serve these shapes; empty if it does
    slower: bool = False  # than XLA's form at these shapes, or not measured


NONE = Kernel(lambda *_: None, "It has no form for GPUs.")


def run(where: str, impl: Impl, plain: Callable[..., Any], *given: Any, tpu: Kernel, gpu: Kernel = NONE) -> Any:
    """Apply an operation to arrays.

    A kernel is not cut up by the compiler, so `auto` leaves a mesh of several devices to XLA if it is set
    (`jax.set_mesh`; where arrays lie is not seen here); within `shard_map`, where arrays are those of one device, it
    does not. GPUs of other generations than Hopper, on which all of it was measured, have XLA's form: tiles that fit
    one may not fit another. Forms are traced, and one is lowered: hand in kernels that are jitted once, or every layer
    pays for tracing them. Derivatives are those of XLA's form.

    Args:
      where: the operation, for errors.
      impl: auto chooses; xla, tpu and gpu are obeyed; interpret-tpu is the kernel run step by step on any device, with
        races looked for and NaN in memory that nobody has written; interpret-gpu that of GPUs, without Triton.
      plain: takes the arrays.
      given: the arrays.
      tpu: the kernel of TPUs.
      gpu: that of GPUs.

    Raises:
      ValueError: for another name, or a kernel that is asked for by name and does not serve.
    """
    named = gpu if impl.endswith("gpu") else tpu
    if impl not in IMPLS or (impl not in ("auto", "xla") and named.why_not):
        raise ValueError(f"{where}: impl={impl!r}; expected one of {', '.join(IMPLS)}. {named.why_not}".rstrip())
    if impl == "interpret-tpu":
        races: Any = dict(detect_races=True, uninitialized_memory="nan")
        return _with_derivatives(lambda *arrays: tpu.call(*arrays, pltpu.InterpretParams(**races)), plain)(*given)
    if impl not in ("auto", "xla"):
        return _with_derivatives(lambda *arrays: named.call(*arrays, impl == "interpret-gpu"), plain)(*given)
    mesh = jax.sharding.get_abstract_mesh()
    alone = mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual
    own = {} if tpu.why_not else {"tpu": tpu}
    if not gpu.why_not and not gpu.slower and _on_hopper():
        own["cuda"] = gpu
    if impl == "xla" or not own or not alone:
        return plain(*given)
    forms = {name: lambda *arrays, call=kernel.call: call(*arrays, False) for name, kernel in own.items()}
    chosen = lambda *arrays: jax.lax.platform_dependent(*arrays, **forms, default=plain)
    return _with_derivatives(chosen, plain)(*given)


def precision(x: jax.Array) -> jax.lax.Precision | None:
    """Of products with x: float32 is multiplied as such, where a chip's default is a pass of bfloat16 or TF32."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _with_derivatives(form: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """A form with the derivatives of XLA's: a kernel has none, and must not be asked for one where it is not lowered.

    Where derivatives are taken, values are XLA's too: its form has to run for them anyway.
    """
    differentiable = jax.custom_jvp(form)
    differentiable.defjvp(lambda given, dots: jax.jvp(plain, given, dots))
    return differentiable


def _on_hopper() -> bool:
    """Whether this process has a GPU of compute capability 9."""
    if jax.default_backend() != "gpu":
        return False
    return str(getattr(jax.local_devices()[0], "compute_capability", "")).startswith("9.")
