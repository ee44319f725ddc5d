"""Which form of an operation is in a program, read off what it is lowered to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxaroo.jaxlib_ext.dispatch import IMPLS, run

KERNEL, PLAIN = (lambda x, interpret: jnp.sin(x)), jnp.cos


def lowered(platform, impl="auto", why_not=""):
    f = lambda x: run("test", impl, why_not, KERNEL, PLAIN, x)
    text = str(jax.export.export(jax.jit(f), platforms=[platform])(jnp.zeros(8)).mlir_module())
    assert ("stablehlo.sine" in text) != ("stablehlo.cosine" in text)
    return "kernel" if "stablehlo.sine" in text else "plain"


def test_auto_is_the_kernel_on_one_tpu_if_it_serves():
    assert [lowered(p) for p in ("tpu", "cuda", "cpu")] == ["kernel", "plain", "plain"]
    assert lowered("tpu", why_not="too large") == "plain"
    for devices, want in ((1, "kernel"), (8, "plain")):
        auto = (jax.sharding.AxisType.Auto,)
        with jax.set_mesh(jax.make_mesh((devices,), ("data",), axis_types=auto, devices=jax.devices()[:devices])):
            f = jax.jit(lambda x: run("test", "auto", "", KERNEL, PLAIN, x))
            text = str(jax.export.export(f, platforms=["tpu"])(jnp.zeros(8)).mlir_module())
            assert ("stablehlo.sine" in text) == (want == "kernel")
            part = jax.shard_map(f, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"), check_vma=False)
            text = str(jax.export.export(jax.jit(part), platforms=["tpu"])(jnp.zeros(8)).mlir_module())
            assert "stablehlo.sine" in text  # arrays are those of one device


def test_names_are_obeyed_or_refused_with_the_reason():
    assert [lowered("cpu", impl) for impl in IMPLS] == ["plain", "plain", "kernel", "kernel"]
    seen = []
    kernel = lambda x, interpret: seen.append(interpret) or x
    run("test", "interpret", "", kernel, PLAIN, jnp.zeros(1))
    run("test", "pallas", "", kernel, PLAIN, jnp.zeros(1))
    assert seen[0].detect_races
    assert seen[1] is False
    for impl in ("pallas", "interpret"):
        with pytest.raises(ValueError, match=f"test: impl='{impl}'; expected one of auto, .*. too large"):
            run("test", impl, "too large", KERNEL, PLAIN, jnp.zeros(1))
    with pytest.raises(ValueError, match="test: impl='fast'; expected one of"):
        run("test", "fast", "", KERNEL, PLAIN, jnp.zeros(1))
    np.testing.assert_allclose(run("test", "xla", "too large", KERNEL, PLAIN, jnp.zeros(1)), [1.0])
