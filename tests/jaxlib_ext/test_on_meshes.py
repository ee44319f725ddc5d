"""Operations on several devices: each works on its part, and together they say what one device says."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.jaxlib_ext.qmm import Layout, QuantisedMatrix, multiply, repack, shardings, switch_codes
from jaxaroo.jaxlib_ext.tree_attention import tree_attention
from jaxaroo.models.cache import dequantise_rows, quantise_rows
from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.sharding.topology import devices_of

BATCH = ("data", "fsdp")


def mesh(data=2, tensor=4):
    return make_mesh(MeshConfig(data=data, fsdp=1, tensor=tensor), jax.devices()[: data * tensor])


def matrix(bits, shape, over, groups=1, act=None):
    """A matrix `[out..., in...]`, and the floats that it stands for."""
    rng = np.random.default_rng(0)
    K = math.prod(shape[-over:])
    codes = jnp.asarray(rng.integers(-128, 128, (*shape[:-over], K)), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.5, 2, (*shape[:-over], groups)), jnp.bfloat16)
    planes = (codes,) if bits == 8 else repack(codes.reshape(-1, K), 8, bits)
    low = np.asarray(switch_codes(codes, 8, bits), np.float64).reshape(-1, groups, K // groups)
    floats = low * np.asarray(scale, np.float64).reshape(-1, groups, 1) * 2 ** (8 - bits)
    w = QuantisedMatrix(planes=planes, scale=scale, bits=bits, master=8, shape=shape, act=act)
    return w, floats.reshape(-1, K)


def talk(text):
    """Operations between devices in a compiled program."""
    names = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    return {name: n for name in names if (n := text.count(f" {name}(") + text.count(f" {name}-start("))}


PRODUCTS = {
    "outputs, 4 bits": (4, (8, 16, 256), 1, 1, "tensor", None, {}),
    "outputs, 8 bits": (8, (8, 16, 200), 1, 1, "tensor", None, {}),
    "outputs in groups": (3, (8, 256), 1, 2, "tensor", None, {}),
    "inputs, 4 bits": (4, (6, 8, 64), 2, 1, None, "tensor", {"all-reduce": 1}),
    "inputs, 6 bits": (6, (6, 512), 1, 1, None, "tensor", {"all-reduce": 1}),
    "inputs in groups": (2, (6, 1024), 1, 4, None, "tensor", {"all-reduce": 1}),
    "inputs, 8 bits, in parts of 50": (8, (6, 200), 1, 1, None, "tensor", {"all-reduce": 1}),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_each_device_multiplies_its_part_and_sums_over_inputs_are_added_up(name):
    bits, shape, over, groups, outputs, inputs, expected = PRODUCTS[name]
    w, floats = matrix(bits, shape, over, groups)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3, floats.shape[1])), jnp.float32)
    here = mesh()
    places = shardings(w, over, outputs, inputs, here)
    w = jax.device_put(w, places)
    held = sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(w))
    scales = 0 if outputs or groups > 1 else w.scale.nbytes * 3 / 4  # those of whole rows are on every device
    assert held == w.nbytes / 4 + scales
    f = jax.jit(lambda x, w: multiply(x, w, Layout((BATCH, None), outputs, inputs)))
    with jax.set_mesh(here):
        got, program = f(x, w), f.lower(x, w).compile().as_text()
    want = np.asarray(x, np.float64) @ floats.T
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    assert talk(program) == expected
    assert got.sharding.shard_shape(got.shape) == (2, 3, want.shape[-1] // (4 if outputs else 1))


@pytest.mark.parametrize(
    ("bits", "shape", "over", "groups", "act"),
    [
        (4, (6, 384), 1, 1, None),  # 384 / 4 is no block of packed inputs
        (8, (6, 512), 1, 2, None),  # a group would be cut
        (8, (6, 6, 64), 2, 1, None),  # 6 heads on 4 devices
        (8, (6, 512), 1, 1, "int8"),  # the scale of an input is that of all of it
    ],
)
def test_inputs_that_cannot_be_cut_lie_whole(bits, shape, over, groups, act):
    w, floats = matrix(bits, shape, over, groups, act)
    here = mesh()
    places = shardings(w, over, None, "tensor", here)
    assert all(place.is_fully_replicated for place in jax.tree.leaves(places))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, floats.shape[1])), jnp.float32)
    f = jax.jit(lambda x, w: multiply(x, w, Layout((BATCH, None), None, "tensor")))
    with jax.set_mesh(here):
        got, program = f(x, jax.device_put(w, places)), f.lower(x, jax.device_put(w, places)).compile().as_text()
    want = np.asarray(jax.jit(multiply)(x, w))
    np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())
    assert not talk(program)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_each_device_attends_with_its_own_heads_and_sequences(bits):
    rng = np.random.default_rng(0)
    B, T, S, N, K, H = 4, 3, 40, 8, 4, 16
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    q, k, v, mask = draw(B, T, N, H), draw(B, S, K, H), draw(B, S, K, H), rng.random((B, T, S)) < 0.5
    mask[..., 0] = True
    if bits is not None:
        k, v = quantise_rows(k, bits), quantise_rows(v, bits)
    f = jax.jit(functools.partial(tree_attention, layout=(BATCH, "tensor")))
    with jax.set_mesh(mesh()):
        got, program = f(q, k, v, jnp.asarray(mask)), f.lower(q, k, v, jnp.asarray(mask)).compile().as_text()
    keys, values = (np.asarray(dequantise_rows(x, jnp.float32), np.float64) for x in (k, v))
    want = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        z = np.where(mask[b, t], keys[b, :, n // 2] @ np.asarray(q, np.float64)[b, t, n] / np.sqrt(H), -np.inf)
        p = np.exp(z - z.max())
        want[b, t, n] = (p / p.sum()) @ values[b, :, n // 2]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert not talk(program)
    assert got.sharding.shard_shape(got.shape) == (2, T, 2, H)


@pytest.mark.aot
@pytest.mark.slow
def test_on_a_mesh_of_tpus_each_runs_the_kernels(libtpu):
    """And without a layout none does: the compiler does not cut one up."""
    like, here = jax.ShapeDtypeStruct, make_mesh(MeshConfig(fsdp=1, tensor=4), devices_of("v5e:2x2"))
    w = QuantisedMatrix(
        planes=(like((4096, 256), jnp.int32),),
        scale=like((4096, 1), jnp.bfloat16),
        bits=4,
        master=8,
        shape=(4096, 2048),
    )
    rows = like((1, 1024, 8, 128), jnp.bfloat16)
    given = like((1, 8, 2048), jnp.bfloat16), w, like((1, 8, 16, 128), jnp.bfloat16), rows, like((1, 8, 1024), jnp.bool)

    def both(layout, heads):
        def f(x, w, q, rows, mask):
            return multiply(x, w, layout), tree_attention(q, rows, rows, mask, layout=heads)

        with jax.sharding.use_abstract_mesh(here.abstract_mesh):
            places = jax.tree.map(lambda _: jax.sharding.NamedSharding(here, jax.sharding.PartitionSpec()), given)
            run = jax.jit(f, in_shardings=places)
            return run.trace(*given).lower(lowering_platforms=("tpu",)).compile().as_text()

    assert both(Layout((None, None), "tensor", None), (None, "tensor")).count("tpu_custom_call") == 2
    assert both(None, None).count("tpu_custom_call") == 0
