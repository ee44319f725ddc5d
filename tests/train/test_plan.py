"""Steps of runs for chips that are not here; sizes by hand."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxaroo.cli.plan import Request, answer
from jaxaroo.models.decoder import param_shapes
from jaxaroo.models.presets import preset
from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.sharding.topology import devices_of
from jaxaroo.train.algorithms import RlOptions
from jaxaroo.train.plan import KINDS, plan_updates, run_config, window_shapes
from jaxaroo.train.recipe import RECIPES

TINY = preset("tiny")
SIZE = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(param_shapes(TINY)))


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """`jaxaroo plan KIND`, which ends before machine code is written; a plan made here would wait for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = dict(model="preset:tiny", topology="v5e:2x2", mesh="fsdp=2,tensor=2", batch=8, seq=128)

    def plan(kind, **more):
        found = SimpleNamespace(**answer(Request(what=kind, **asked | more)))
        assert found.fits
        return found

    return plan


@pytest.mark.aot
@pytest.mark.optimizer
@pytest.mark.slow
def test_the_state_of_fine_tuning_is_three_copies_shared_out_and_recomputing_costs_products(libtpu, planned):
    plain, again = planned("sft"), planned("sft", remat="full", micro_batches=2)
    norms = (2 * TINY.num_layers + 1) * TINY.embed_dim  # lie along fsdp alone
    assert plain.arguments["parameters"] == 4 * ((SIZE - norms) // 4 + norms // 2)
    assert plain.arguments["optimiser"] == pytest.approx(2 * plain.arguments["parameters"], rel=0.01)
    assert plain.arguments["frozen"] == 0
    tokens, width = 8 * 128, 4 * 4 + 1 + 4 * 2
    assert plain.arguments["batch"] == tokens // 2 * width
    matrices = SIZE - norms - TINY.vocab_size * TINY.embed_dim
    assert plain.flops >= 3 * 2 * tokens * matrices  # and attention, and the head
    assert again.flops > plain.flops * 1.1
    assert again.bounds["most_utilisation"] < 0.95 * again.flops / plain.flops


@pytest.mark.aot
@pytest.mark.optimizer
@pytest.mark.proof
def test_a_reference_lies_beside_the_policy_and_a_master_is_updated_at_every_width(libtpu, planned):
    dpo = planned("preference", objective="dpo")
    assert dpo.arguments["frozen"] == dpo.arguments["parameters"]
    orpo = planned("preference", objective="orpo")
    assert orpo.arguments["frozen"] == 0
    assert dpo.flops > 1.2 * orpo.flops  # the reference runs forward
    qat = planned("qat")
    assert qat.flops > 4 * 0.95 * orpo.flops  # 8, 6, 4 and 2 bits one after the other, and the highest teaches


@pytest.mark.aot
@pytest.mark.optimizer
@pytest.mark.proof
def test_an_update_from_sampled_answers_is_fine_tuning_and_value_heads_cost_little(libtpu, planned):
    """Of the same rows: the products are those of fine-tuning, the batch holds advantages and what was sampled."""
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), devices_of("v5e:2x2"))
    update = lambda **options: plan_updates(run_config(8, 128), RlOptions(**options), TINY, mesh, "v5e")
    sft, grpo, ppo = planned("sft"), update(), update(algorithm="ppo", kl_weight=0.1)
    assert grpo.fits
    assert ppo.fits
    assert grpo.arguments["parameters"] == sft.arguments["parameters"]
    assert grpo.arguments["batch"] == sft.arguments["batch"] + 8 * 128 // 2 * 4 * 2
    assert grpo.flops == pytest.approx(sft.flops, rel=0.01)
    assert ppo.arguments["frozen"] >= grpo.arguments["frozen"]
    assert ppo.arguments["batch"] > grpo.arguments["batch"]


def test_every_kind_of_training_that_needs_no_folder_is_there():
    assert {*KINDS} == {*RECIPES} - {"acceptance"}


@pytest.mark.errors
def test_rows_that_the_mesh_does_not_divide_are_refused():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with pytest.raises(
        ValueError,
        match=r"plan: 6 rows of a micro-batch on the parts data=1 x fsdp=4 = 4; .*Make the batch a multiple of 8",
    ):
        window_shapes(run_config(12, 128, micro_batches=2), mesh)
