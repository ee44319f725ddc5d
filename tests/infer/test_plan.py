"""Decoding steps for chips that are not here; sizes by hand."""

import math

import jax
import pytest

from jaxaroo.infer.plan import plan_decoding
from jaxaroo.models.decoder import param_shapes
from jaxaroo.models.presets import preset
from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.sharding.topology import devices_of

SMALL = preset("100m")


@pytest.mark.aot
def test_weights_and_cache_lie_along_tensor_and_a_tree_costs_as_many_products_as_it_has_nodes(libtpu):
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=4), devices_of("v5e:2x2"))
    one = plan_decoding(SMALL, mesh, "v5e", rows=2, capacity=256)
    tree = plan_decoding(SMALL, mesh, "v5e", rows=2, capacity=256, nodes=8)
    assert one.fits
    assert tree.fits
    whole = {x.shape: math.prod(x.shape) for x in jax.tree.leaves(param_shapes(SMALL))}
    assert whole[(SMALL.vocab_size, SMALL.embed_dim)] % 4 == 0
    norms = (2 * SMALL.num_layers + 1) * SMALL.embed_dim  # each device has all of them
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(param_shapes(SMALL)))
    assert one.arguments["parameters"] == 2 * ((size - norms) // 4 + norms)
    kv = 2 * SMALL.num_layers * 2 * 256 * SMALL.num_kv_heads * SMALL.head_dim
    assert one.arguments["cache"] == 2 * kv // 4 + 4 * 2  # and two lengths
    assert tree.flops == pytest.approx(8 * one.flops)
    assert one.bounds is not None
    assert one.bounds.bound_by in ("memory", "links")
    assert one.collectives["tensor"]


@pytest.mark.aot
def test_fewer_bits_are_fewer_bytes(libtpu):
    mesh = make_mesh(MeshConfig(fsdp=1), devices_of("v5e:1x1"))
    found = {bits: plan_decoding(SMALL, mesh, "v5e", rows=1, capacity=256, bits=bits) for bits in (16, 4)}
    matrices = SMALL.num_layers * SMALL.embed_dim * (2 * (12 + 4) * 64 + 3 * SMALL.ffn_dim)
    saved = found[16].arguments["parameters"] - found[4].arguments["parameters"]
    assert saved == pytest.approx(1.5 * matrices, rel=0.01)  # 16 - 4 bits, less a scale a row
    assert not found[4].collectives


@pytest.mark.errors
def test_widths_and_rows_that_are_not_served_are_refused():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with pytest.raises(ValueError, match="bits=4 on 8 devices; expected 16, or one of"):
        plan_decoding(SMALL, mesh, "v5e", rows=4, capacity=64, bits=4)
    with pytest.raises(ValueError, match="3 rows on the parts data=1 x fsdp=4 = 4"):
        plan_decoding(SMALL, mesh, "v5e", rows=3, capacity=64)
