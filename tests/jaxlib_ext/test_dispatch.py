"""Which form of an operation is in a program, read off what it is lowered to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxaroo.jaxlib_ext import dispatch
from jaxaroo.jaxlib_ext.causal_attention import causal_attention
from jaxaroo.jaxlib_ext.dispatch import IMPLS, Kernel, run
from jaxaroo.jaxlib_ext.expert_pair import Expert, expert_pair
from jaxaroo.jaxlib_ext.qmm import qmm
from jaxaroo.jaxlib_ext.token_kl import token_kl
from jaxaroo.jaxlib_ext.token_stats import token_stats
from jaxaroo.jaxlib_ext.tree_attention import tree_attention

TPU, GPU, PLAIN = Kernel(lambda x, interpret: jnp.sin(x)), Kernel(lambda x, interpret: jnp.tan(x)), jnp.cos
FORMS = {"stablehlo.sine": "tpu", "stablehlo.tan ": "gpu", "stablehlo.cosine": "plain"}


def form(f, platform):
    text = str(jax.export.export(jax.jit(f), platforms=[platform])(jnp.zeros(8)).mlir_module())
    [found] = [name for op, name in FORMS.items() if op in text]
    return found


def lowered(platform, impl="auto", **forms):
    return form(lambda x: run("test", impl, PLAIN, x, **{"tpu": TPU, "gpu": GPU} | forms), platform)


def test_auto_is_the_kernel_on_one_device_of_a_kind_that_has_one_if_it_serves(monkeypatch):
    assert [lowered(p) for p in ("tpu", "cuda", "cpu")] == ["tpu", "plain", "plain"]  # no Hopper here
    monkeypatch.setattr(dispatch, "_on_hopper", lambda: True)
    assert [lowered(p) for p in ("tpu", "cuda", "cpu")] == ["tpu", "gpu", "plain"]
    too_large, slower = TPU._replace(why_not="too large"), GPU._replace(slower=True)
    assert [lowered(p, tpu=too_large, gpu=slower) for p in ("tpu", "cuda", "cpu")] == ["plain"] * 3
    assert [lowered(p, tpu=too_large) for p in ("tpu", "cuda", "cpu")] == ["plain", "gpu", "plain"]
    for devices, want in ((1, ["tpu", "gpu"]), (8, ["plain", "plain"])):
        auto = (jax.sharding.AxisType.Auto,)
        with jax.set_mesh(jax.make_mesh((devices,), ("data",), axis_types=auto, devices=jax.devices()[:devices])):
            f = jax.jit(lambda x: run("test", "auto", PLAIN, x, tpu=TPU, gpu=GPU))
            assert [form(f, p) for p in ("tpu", "cuda")] == want
            part = jax.shard_map(f, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"), check_vma=False)
            assert [form(part, p) for p in ("tpu", "cuda")] == ["tpu", "gpu"]  # arrays are those of one device


def test_only_a_gpu_that_was_measured_has_its_form(monkeypatch):
    class Device:
        def __init__(self, capability):
            self.compute_capability = capability

    for backend, capability, want in (
        ("gpu", "9.0", True),
        ("gpu", "8.0", False),
        ("gpu", "12.0", False),
        ("cpu", "9.0", False),
    ):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        monkeypatch.setattr(jax, "local_devices", lambda capability=capability: [Device(capability)])
        assert dispatch._on_hopper() == want


def test_names_are_obeyed_or_refused_with_the_reason():
    want = {"auto": "plain", "xla": "plain", "tpu": "tpu", "gpu": "gpu", "interpret-tpu": "tpu", "interpret-gpu": "gpu"}
    assert {impl: lowered("cpu", impl) for impl in IMPLS} == want
    seen = []
    kernel = Kernel(lambda x, interpret: seen.append(interpret) or x)
    for impl in ("interpret-tpu", "tpu", "interpret-gpu", "gpu"):
        run("test", impl, PLAIN, jnp.zeros(1), tpu=kernel, gpu=kernel)
    assert seen[0].detect_races
    assert seen[1:] == [False, True, False]
    for impl in ("tpu", "interpret-tpu"):
        with pytest.raises(ValueError, match=f"test: impl='{impl}'; expected one of auto, .*. too large"):
            run("test", impl, PLAIN, jnp.zeros(1), tpu=TPU._replace(why_not="too large"), gpu=GPU)
    for impl in ("gpu", "interpret-gpu"):
        with pytest.raises(ValueError, match=f"test: impl='{impl}'; .* It has no form for GPUs"):
            run("test", impl, PLAIN, jnp.zeros(1), tpu=TPU)
    with pytest.raises(ValueError, match="test: impl='fast'; expected one of"):
        run("test", "fast", PLAIN, jnp.zeros(1), tpu=TPU)
    np.testing.assert_allclose(run("test", "xla", PLAIN, jnp.zeros(1), tpu=TPU._replace(why_not="too large")), [1.0])


@pytest.mark.parametrize("impl", IMPLS)
def test_derivatives_are_those_of_the_plain_form(impl):
    """Forward, and of a gradient: a kernel has none, and must not be asked for one where it is not lowered."""

    @jax.custom_jvp
    def kernel(x):
        return jnp.sin(x)

    @kernel.defjvp
    def _(given, dots):
        raise NotImplementedError("a kernel was differentiated")

    kernels = dict.fromkeys(("tpu", "gpu"), Kernel(lambda x, interpret: kernel(x)))
    f = lambda x: run("test", impl, PLAIN, x, **kernels)
    x, dot = jnp.float32(0.3), jnp.float32(2.0)
    np.testing.assert_allclose(jax.jvp(f, (x,), (dot,))[1], -2 * np.sin(0.3), rtol=1e-6)
    np.testing.assert_allclose(jax.jacfwd(jax.grad(f))(x), -np.cos(0.3), rtol=1e-6)


def _forms(dtype):
    """XLA's form of every operation whose kernel multiplies, with its derivatives."""
    draw = lambda *shape: jnp.ones(shape, dtype)
    seen, expert = jnp.ones((1, 5, 5), bool), Expert(draw(6, 8), draw(6, 8), draw(8, 6))
    codes, scale, targets = jnp.ones((6, 8), jnp.int8), jnp.ones((6, 1)), jnp.zeros(3, jnp.int32)
    rows, heads = (draw(3, 8), draw(7, 8)), (draw(1, 5, 4, 8), draw(1, 5, 2, 8), draw(1, 5, 2, 8))
    return {
        "tree": (lambda *qkv: tree_attention(*qkv, seen, impl="xla"), heads),
        "causal": (lambda *qkv: causal_attention(*qkv, seen), heads),
        "qmm": (lambda x: qmm(x, codes, scale, bits=4, impl="xla"), rows[:1]),
        "pair": (lambda u: expert_pair(u, u, draw(4, 8), (expert, expert), impl="xla"), rows[:1]),
        "stats": (lambda h, w: token_stats(h, w, targets, impl="xla").logp, rows),
        "kl": (lambda h, w: token_kl(h, w, h * 2, w, impl="xla"), rows),
    }


@pytest.mark.parametrize("name", ["tree", "causal", "qmm", "pair", "stats", "kl"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_float32_is_multiplied_as_float32_in_the_plain_forms_too(name, dtype):
    """The default of TPUs is one pass of bfloat16, of GPUs TF32: 64 rows and 65 would differ in the third digit."""
    f, given = _forms(dtype)[name]
    total = lambda *args: sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(f(*args)))
    text = jax.jit(jax.value_and_grad(total, argnums=tuple(range(len(given))))).lower(*given).as_text()
    exact = ["[HIGHEST, HIGHEST]" in line for line in text.splitlines() if "dot_general" in line]
    assert len(exact) > 1
    assert all(exact) if dtype == jnp.float32 else not any(exact)
