"""Decoding steps for chips that are not here; sizes by hand."""

import math

import jax
import pytest

from jaxaroo.infer.plan import DRAFTERS, plan_decoding, plan_speculation
from jaxaroo.models.decoder import param_shapes
from jaxaroo.models.presets import preset
from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.sharding.topology import devices_of

SMALL = preset("100m")


@pytest.mark.aot
@pytest.mark.slow
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
@pytest.mark.proof
def test_fewer_bits_are_fewer_bytes(libtpu):
    mesh = make_mesh(MeshConfig(fsdp=1), devices_of("v5e:1x1"))
    found = {bits: plan_decoding(SMALL, mesh, "v5e", rows=1, capacity=256, bits=bits) for bits in (16, 4)}
    matrices = SMALL.num_layers * SMALL.embed_dim * (2 * (12 + 4) * 64 + 3 * SMALL.ffn_dim)
    saved = found[16].arguments["parameters"] - found[4].arguments["parameters"]
    assert saved == pytest.approx(1.5 * matrices, rel=0.01)  # 16 - 4 bits, less a scale a row
    assert not found[4].collectives
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=4), devices_of("v5e:2x2"))
    parts = plan_decoding(SMALL, mesh, "v5e", rows=1, capacity=256, bits=4)
    D, L = SMALL.embed_dim, SMALL.num_layers
    o = L * (D * D // 2 + 2 * D)  # whole on every device: a fourth of its 768 inputs is no block
    everywhere = o + L * 2 * D + 2 * (2 * L + 1) * D  # and the scales of down, whose inputs are cut, and norms
    assert parts.arguments["parameters"] == (found[4].arguments["parameters"] - everywhere) // 4 + everywhere
    assert parts.collectives["tensor"]


@pytest.mark.aot
@pytest.mark.proof
def test_a_step_of_speculation_is_the_drafters_products_and_the_targets(libtpu):
    """By hand: every node is read once by the target's layers and head, a few by the drafter."""
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=2), devices_of("v5e:2x1"))
    cfg, S, B = SMALL, 256, 2
    D, N, K, H, F, V = cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.ffn_dim, cfg.vocab_size
    attend, layer = 2 * S * N * H, D * H * (2 * N + 2 * K) + 3 * D * F
    block = lambda tokens: 2 * B * tokens * (layer + attend)
    head = lambda tokens: 2 * B * tokens * D * V
    asked = dict(rows=B, capacity=S, drafts=6, nodes=16, beam=4, levels=3)
    found = {name: plan_speculation(cfg, mesh, "v5e", drafter=name, **asked) for name in DRAFTERS}
    L = cfg.num_layers
    assert found["lookup"].flops == pytest.approx(L * block(7) + head(7))
    assert found["lookup"].arguments["drafter"] == 0
    tree = L * block(16) + head(16)  # what the target does; the drafter reads 2 levels of 4, then the path of 4
    eagle = block(12) + 2 * B * 12 * 2 * D * D + head(1 + 8)
    assert found["eagle"].flops == pytest.approx(tree + eagle, rel=0.01)
    for one in found.values():
        assert one.fits
        assert one.open_loops >= 1  # the walk
        assert one.collectives["tensor"]
        assert one.arguments["cache"] == found["lookup"].arguments["cache"]
        assert one.arguments["parameters"] == found["lookup"].arguments["parameters"]
    assert 0 < found["jakiro"].arguments["drafter"] < found["eagle"].arguments["drafter"]  # small experts


@pytest.mark.errors
def test_widths_and_rows_that_are_not_served_are_refused():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with pytest.raises(ValueError, match="bits=5; expected 16, or one of"):
        plan_decoding(SMALL, mesh, "v5e", rows=4, capacity=64, bits=5)
    with pytest.raises(ValueError, match="3 rows on the parts data=1 x fsdp=4 = 4"):
        plan_decoding(SMALL, mesh, "v5e", rows=3, capacity=64)
    with pytest.raises(ValueError, match="drafter='medusa'; expected one of lookup, eagle"):
        plan_speculation(SMALL, mesh, "v5e", rows=4, capacity=64, drafter="medusa")
    with pytest.raises(ValueError, match="3 rows on the parts data=1 x fsdp=4 = 4"):
        plan_speculation(SMALL, mesh, "v5e", rows=3, capacity=64, drafter="lookup")
