"""Steps of runs for chips that are not here; sizes by hand."""

import jax
import numpy as np
import pytest

from jaxaroo.models.decoder import param_shapes
from jaxaroo.models.presets import preset
from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.sharding.topology import devices_of
from jaxaroo.train.algorithms import RlOptions
from jaxaroo.train.plan import KINDS, plan_training, plan_updates, run_config, window_shapes
from jaxaroo.train.preference import PreferenceOptions
from jaxaroo.train.recipe import RECIPES

TINY = preset("tiny")
SIZE = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(param_shapes(TINY)))


def planned(kind, options=None, devices="v5e:2x2", **settings):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), devices_of(devices))
    cfg = run_config(8, 128, **settings)
    return plan_training(kind, cfg, options or RECIPES[kind].options(), TINY, mesh, "v5e")


@pytest.mark.aot
@pytest.mark.optimizer
@pytest.mark.slow
def test_the_state_of_fine_tuning_is_three_copies_shared_out_and_recomputing_costs_products(libtpu):
    plain, again = planned("sft"), planned("sft", remat="full", micro_batches=2)
    assert plain.fits
    assert again.fits
    norms = (2 * TINY.num_layers + 1) * TINY.embed_dim  # lie along fsdp alone
    assert plain.arguments["parameters"] == 4 * ((SIZE - norms) // 4 + norms // 2)
    assert plain.arguments["optimiser"] == pytest.approx(2 * plain.arguments["parameters"], rel=0.01)
    assert plain.arguments["frozen"] == 0
    tokens, width = 8 * 128, 4 * 4 + 1 + 4 * 2
    assert plain.arguments["batch"] == tokens // 2 * width
    matrices = SIZE - norms - TINY.vocab_size * TINY.embed_dim
    assert plain.flops >= 3 * 2 * tokens * matrices  # and attention, and the head
    assert plain.bounds is not None
    assert again.bounds is not None
    assert again.flops > plain.flops * 1.1
    assert again.bounds.most_utilisation < 0.95 * again.flops / plain.flops


@pytest.mark.aot
@pytest.mark.optimizer
@pytest.mark.proof
def test_a_reference_lies_beside_the_policy_and_a_master_is_updated_at_every_width(libtpu):
    dpo = planned("preference", PreferenceOptions(objective="dpo"))
    assert dpo.fits
    assert dpo.arguments["frozen"] == dpo.arguments["parameters"]
    orpo = planned("preference", PreferenceOptions(objective="orpo"))
    assert orpo.arguments["frozen"] == 0
    assert dpo.flops > 1.2 * orpo.flops  # the reference runs forward
    qat = planned("qat")
    assert qat.fits
    assert qat.flops > 4 * 0.95 * orpo.flops  # 8, 6, 4 and 2 bits one after the other, and the highest teaches


@pytest.mark.aot
@pytest.mark.optimizer
@pytest.mark.proof
def test_an_update_from_sampled_answers_is_fine_tuning_and_value_heads_cost_little(libtpu):
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
