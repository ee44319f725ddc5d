"""Programs for a GPU that is not there."""

import contextlib
import inspect

import jax
from jax.sharding import AbstractDevice, AbstractMesh


def lowered_for_cuda(f, *args):
    """The text of `f` for a Hopper; newer versions of JAX want to know which GPU before they lower for Triton."""
    with _hopper():
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def _hopper():
    if jax.default_backend() == "gpu" or "platform" not in inspect.signature(AbstractDevice).parameters:
        return contextlib.nullcontext()
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))
