"""A model on several devices answers as on one; oracles: the same engine on one device, and counts by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.infer.devices import beside, check_memory, mesh_of, pinned, row_specs
from jaxaroo.infer.engine import Engine
from jaxaroo.infer.evaluate import evaluate_lm
from jaxaroo.infer.guided.value_guided import ivo
from jaxaroo.infer.sampling import Sampling
from jaxaroo.infer.speculative.drafters import lookup, small_model
from jaxaroo.infer.speculative.loop import Speculation
from jaxaroo.infer.speculative.verify import coupled
from jaxaroo.models import reward
from jaxaroo.models.decoder import DecoderConfig, Model, init_params, new_cache, unstack_layers
from jaxaroo.models.multi_precision import QuantRules, init_scales, place, switch_bits, to_master
from jaxaroo.models.quantise import QuantConfig
from jaxaroo.sharding.mesh import MeshConfig, make_mesh

CFG = DecoderConfig(
    vocab_size=96, embed_dim=128, ffn_dim=512, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=64, eos_ids=(95,),
    max_positions=256,
)  # fmt: skip
PROMPTS = [[1, 2, 3, 4], [5, 6], [7] * 20, [9, 8]]
ASK = Sampling(max_tokens=12, seed=3, logprobs=2, prompt_logprobs=0)
RULES: QuantRules = ((r"layers/(attn/[qkvo]|mlp/(gate|up|down))", QuantConfig(bits=(8, 4, 2))),)


def mesh(data=1, tensor=4):
    return make_mesh(MeshConfig(data=data, fsdp=1, tensor=tensor), jax.devices()[: data * tensor])


@pytest.fixture(scope="module")
def model():
    return Model(CFG, unstack_layers(jax.jit(init_params, static_argnums=0)(CFG, jax.random.key(0))))


def at(model, bits):
    master = to_master(model.params, init_scales(model.params, RULES), RULES)
    return model._replace(params=switch_bits(master, bits, RULES))


def answers(model, **settings):
    with Engine(model, max_seqs=2, **settings) as engine:
        return engine.generate(PROMPTS, ASK)


def same(found, wanted, atol=2e-5):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.error is None
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
        said = lambda result: [t.logprob for t in (*result.outputs[0].logprobs, *result.prompt_logprobs[1:])]
        np.testing.assert_allclose(said(a), said(b), atol=atol)


@pytest.mark.parametrize("bits", [16, 4])
def test_devices_score_text_as_one_does(model, bits):
    whole = model if bits == 16 else at(model, bits)
    rows = [np.random.default_rng(i).integers(0, 95, n).tolist() for i, n in enumerate([30, 7, 12, 25, 3])]
    settings = dict(window=16, stride=8, batch=4)
    wanted = evaluate_lm(whole, rows, **settings)
    for data in (1, 2):
        found = evaluate_lm(place(whole, mesh(data)), rows, **settings)
        assert found.tokens == wanted.tokens
        np.testing.assert_allclose(found.nll, wanted.nll, rtol=1e-6)


@pytest.mark.parametrize(("bits", "data"), [(4, 2), (16, 1), pytest.param(8, 1, marks=pytest.mark.slow)])
def test_a_model_on_a_mesh_answers_as_on_one_device(model, bits, data):
    served = model if bits == 16 else at(model, bits)
    same(answers(place(served, mesh(data))), answers(served))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_so_it_does_with_a_cache_of_codes(model, dtype):
    """To a step of a code: sums that are added up between devices may round to the next."""
    same(answers(place(model, mesh()), kv_dtype=dtype), answers(model, kv_dtype=dtype), atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["lookup", "small model"])
def test_drafts_are_judged_on_a_mesh_and_the_drafter_lies_whole_beside_it(model, drafter):
    small = dataclasses.replace(CFG, num_layers=1)
    params = {"model": unstack_layers(init_params(small, jax.random.key(1))), "stop": ()}
    made = lookup.make_drafter(4) if drafter == "lookup" else small_model.make_drafter(small, 3)
    spec = Speculation(made, coupled(), () if drafter == "lookup" else params)
    same(answers(place(model, mesh()), speculation=spec, speculate="on"), answers(model))


@pytest.mark.slow
def test_a_guide_steers_on_a_mesh(model):
    judge = reward.RewardConfig(target=CFG, separator=94)
    weights = {"model": init_params(CFG, jax.random.key(1)), "head": reward.init_head(judge, jax.random.key(2))}
    guide = ivo(reward.RewardModel(judge, {**weights, "model": unstack_layers(weights["model"])}), beta=2.0)
    same(answers(place(model, mesh()), guidance=guide), answers(model, guidance=guide))


def test_a_second_call_compiles_nothing_and_new_weights_come_to_lie_where_the_old_did(model, monkeypatch):
    other = jax.tree.map(lambda w: w * 0.9, model.params)
    wanted = answers(model._replace(params=other))
    with Engine(place(model, mesh()), max_seqs=2) as engine:
        engine.generate(PROMPTS, ASK)
        engine.generate(PROMPTS, ASK)  # the first one's programs for one free slot
        with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
            compiled = []
            patch.setattr("logging.Logger.warning", lambda self, message, *args: compiled.append(message % args))
            engine.update_weights(other)
            found = engine.generate(PROMPTS, ASK)
    assert not [line for line in compiled if "decode" in line or "prefill" in line or "score" in line]
    same(found, wanted)


def test_weights_say_where_they_are_served(model):
    here = mesh(2)
    on = place(model, here)
    assert mesh_of(model.params) is None
    assert mesh_of(on.params) == here
    layer = on.params["layers"][0]
    assert layer["attn"]["q"].sharding.shard_shape((8, 64, 128)) == (2, 64, 128)
    assert layer["mlp"]["down"].sharding.shard_shape((128, 512)) == (128, 128)
    whole = beside((jnp.ones(3), "name", on.params["norm"]), here)
    assert whole[0].sharding.is_fully_replicated
    assert whole[0].sharding.device_set == set(here.devices.flat)
    assert whole[1:] == ("name", on.params["norm"])
    assert beside(whole, None) is whole


def test_a_state_lies_by_sequences_and_heads(model):
    state = {"cache": new_cache(CFG, 4, 32, "int8"), "tokens": jnp.zeros((4, 32), jnp.int32), "odd": jnp.zeros(3)}
    here = mesh(2)
    specs = row_specs(state, here.shape)
    batch, heads = ("data", "fsdp"), "tensor"
    assert specs["cache"].layers[0].k.codes == jax.P(batch, None, heads, None)
    assert specs["cache"].layers[0].k.scale == jax.P(batch, None, heads)
    assert specs["cache"].length == jax.P(batch)
    assert specs["tokens"] == jax.P(batch, None)
    assert specs["odd"] == jax.P(None)
    with jax.set_mesh(here):
        assert jax.jit(pinned)(state)["tokens"].sharding.shard_shape((4, 32)) == (2, 32)
    assert pinned(state) is state


def test_each_device_has_room_for_its_part_of_a_cache(model, monkeypatch):
    on, size = place(model, mesh()), 2 * 2 * 4 * 2 * 64 * 4 * 64  # keys and values of 2 layers, 4 heads of 64, 64 rows
    begun = lambda: new_cache(CFG, 2, 64)
    monkeypatch.setattr("jaxaroo.infer.devices._free_bytes", lambda params: size // 4 + 8)
    check_memory(on.params, 2, 64, begun)
    with pytest.raises(MemoryError, match="2 sequences of 64 tokens needs"):
        check_memory(model.params, 2, 64, begun)
    monkeypatch.setattr("jaxaroo.infer.devices._free_bytes", lambda params: size // 4 - 8)
    with pytest.raises(MemoryError, match="GiB of each device"):
        check_memory(on.params, 2, 64, begun)
