"""An engine that drafts answers as one that does not: refilled slots, streams, and drafting on and off in between."""

import functools
import itertools
import random

import jax
import numpy as np
import pytest

from jaxaroo.infer import devices
from jaxaroo.infer import engine as engine_module
from jaxaroo.infer.decode import Rows, decode
from jaxaroo.infer.engine import Engine
from jaxaroo.infer.sampling import Sampling, pack_sampling
from jaxaroo.infer.speculative import controller, loop, verify
from jaxaroo.infer.speculative.drafters import eagle, lookup, small_model
from jaxaroo.infer.speculative.loop import Speculation
from jaxaroo.models.decoder import DecoderConfig, Model, init_params, unstack_layers
from jaxaroo.models.eagle import EagleConfig
from jaxaroo.models.eagle import init_params as init_eagle

CFG = DecoderConfig(
    vocab_size=32, embed_dim=16, ffn_dim=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, max_positions=128
)
RANDOM = random.Random(0)
PROMPTS = [[RANDOM.randrange(32) for _ in range(RANDOM.randrange(1, 20))] for _ in range(9)]
SAMPLINGS = [
    Sampling(
        temperature=RANDOM.choice([0.0, 0.7, 1.0]),
        max_tokens=RANDOM.randrange(1, 40),
        top_p=RANDOM.choice([1.0, 0.9]),
        repetition_penalty=RANDOM.choice([1.0, 1.2]),
        seed=i,
        n=1 + (i % 4 == 0),
    )
    for i in range(9)
]


@functools.cache
def model():
    return Model(CFG, unstack_layers(init_params(CFG, jax.random.key(0))))


@functools.cache
def drafting():
    cfg = EagleConfig(target=CFG)
    drafter = eagle.make_drafter(cfg, nodes=8, beam=3, levels=3, draw="shared")
    return Speculation(drafter, verify.coupled(), init_eagle(cfg, jax.random.key(3)))


def answers(results):
    return [[o.token_ids for o in r.outputs] for r in results]


@functools.cache
def plainly():
    with Engine(model(), max_seqs=4) as engine:
        return answers(engine.generate(PROMPTS, SAMPLINGS))


@pytest.mark.slow
def test_answers_are_those_of_plain_decoding_in_slots_that_refill():
    with Engine(model(), max_seqs=4, speculation=drafting(), speculate="on") as engine:
        assert answers(engine.generate(PROMPTS, SAMPLINGS)) == plainly()
        stats, emitted = engine.stats(), engine.emitted_per_step()
    assert stats["steps"] == sum(emitted)
    assert stats["accepted_tokens"] == sum(n * count for n, count in enumerate(emitted)) - sum(emitted)
    answered = sum(len(a) for r in plainly() for a in r)
    samples = sum(s.n for s in SAMPLINGS)
    assert stats["steps"] + stats["accepted_tokens"] == answered - samples  # first tokens belong to no step
    assert 0 < stats["accepted_tokens"] < stats["drafted_tokens"]


@pytest.mark.slow
def test_a_stream_says_the_same():
    said = {}
    with Engine(model(), max_seqs=4, speculation=drafting(), speculate="on") as engine:
        for delta in engine.generate(PROMPTS, SAMPLINGS, stream=True):
            said.setdefault((int(delta.id), delta.index), []).extend(delta.token_ids)
    wanted = {(i, n): ids for i, answer in enumerate(plainly()) for n, ids in enumerate(answer)}
    assert said == wanted


def test_drafting_that_comes_and_goes_changes_nothing(monkeypatch):
    """Each call the other arm: the drafter catches up on what was written without it, and its drafts stay as good."""
    turns = iter(i % 2 for i in range(10_000))
    monkeypatch.setattr(controller, "choose", lambda *args: next(turns))
    caught_up = []
    real = loop.catch_up
    monkeypatch.setattr(loop, "catch_up", lambda *a, **k: caught_up.append(1) or real(*a, **k))
    with Engine(model(), max_seqs=4, speculation=drafting()) as engine:
        assert answers(engine.generate(PROMPTS, SAMPLINGS)) == plainly()
        stats = engine.stats()
    assert len(caught_up) > 1
    assert stats["accepted_tokens"] > 0
    assert stats["steps"] + stats["accepted_tokens"] < sum(len(a) for r in plainly() for a in r)  # some were plain


def test_catching_up_costs_what_it_takes_once_compiled_and_nothing_where_all_rows_are_new(monkeypatch):
    """Plainly to the end; then the call begins anew, and a drafter that has read the new prompts is not behind."""
    turns, prices, calls, clock = iter([0, 1, 0, 1]), [], [], itertools.count()
    choose = lambda cfg, state, rows, catch_up: prices.append(catch_up[1]) or next(turns, 0)
    monkeypatch.setattr(controller, "choose", choose)
    monkeypatch.setattr(engine_module.time, "perf_counter", lambda: float(next(clock)))
    real = loop.catch_up
    monkeypatch.setattr(loop, "catch_up", lambda *a, **k: calls.append(1) or real(*a, **k))
    settings = Sampling(temperature=0.0, max_tokens=90)
    with Engine(model(), max_seqs=1, speculation=drafting()) as engine:
        engine.generate([[5, 9, 1]], settings)
        assert (prices[:4], len(calls)) == ([0.0] * 4, 2)  # the first catch-up compiled it, and says nothing
        assert engine._catch_up > 0.0
    turns, prices[:], calls[:] = iter([0, 1, 0, 1, 0, 1, 0, 1]), [], []
    with Engine(model(), max_seqs=1, speculation=drafting()) as engine:
        engine.generate([[5, 9, 1]] * 4, Sampling(temperature=0.0, max_tokens=8))
        assert (engine._catch_up, len(calls)) == (0.0, 0)


@pytest.mark.slow
def test_shorter_drafts_share_the_state_of_longer_ones(monkeypatch):
    """Plainly, a level of drafts, three levels, and again: the same answers, and each arm drafts what it is made to."""
    long = drafting()
    short = eagle.make_drafter(EagleConfig(target=CFG), nodes=4, beam=3, levels=1, draw="shared")
    turns = itertools.cycle((0, 1, 2, 1))
    monkeypatch.setattr(controller, "choose", lambda *args: next(turns))
    with Engine(model(), max_seqs=4, speculation=long._replace(shorter=(short,))) as engine:
        assert engine._pace.depths == (0, 1, 3)
        assert answers(engine.generate(PROMPTS, SAMPLINGS)) == plainly()
        stats, emitted = engine.stats(), engine.emitted_per_step()
    assert 3 * stats["steps"] < stats["drafted_tokens"] < 7 * stats["steps"]  # trees of 4 nodes, and trees of 8
    assert stats["accepted_tokens"] > 0
    assert len(emitted) == 5


@pytest.mark.errors
def test_a_shorter_drafter_that_is_not_shorter_is_refused():
    with pytest.raises(ValueError, match="then growing ones"):
        Engine(model(), speculation=drafting()._replace(shorter=(drafting().drafter,)))


@pytest.mark.errors
def test_the_drafters_cache_counts_when_memory_is_short(monkeypatch):
    asked = []
    real = devices.bytes_of
    monkeypatch.setattr(devices, "_free_bytes", lambda params: 0)
    monkeypatch.setattr(devices, "bytes_of", lambda state: asked.append(real(state)) or asked[-1])
    for spec in (None, drafting()):  # both in 64 slots
        with (
            pytest.raises(MemoryError, match="of 1 sequences of 64 tokens"),
            Engine(model(), speculation=spec) as engine,
        ):
            engine.generate([[5, 9, 1]], Sampling(max_tokens=20))
    keys_and_values = 2 * (64 + 3 * 2) * CFG.num_kv_heads * CFG.head_dim  # a tree of three levels reads two, of three
    last, length, tally = CFG.embed_dim, 1, 3 + 2 + 1
    assert asked[1] - asked[0] == 4 * (keys_and_values + last + length + tally)


@pytest.mark.slow
def test_catching_up_is_beginning_anew():
    """After plain decoding, the drafter's state is what a prefill of the same text would give, to rounding."""
    spec = drafting()
    weights = loop.Weights(model().params, spec.drafter_params, ())
    settings = Sampling(temperature=0.0, max_tokens=30)
    tokens = np.zeros((2, 64), np.int32)
    tokens[0, :3], tokens[1, :5] = [5, 9, 1], [2, 4, 6, 8, 10]
    length = np.array([3, 5], np.int32)
    rows = Rows(pack_sampling([(settings, 0, 0)] * 2, 0, 32), length, length + 30, np.full((2, 1), -1, np.int32))
    state = loop.prefill(CFG, weights, spec.drafter, tokens, rows, chunk=16)
    state = state._replace(rows=decode(CFG, weights.target, state.rows, rows, np.zeros(2, bool), np.int32(9)))
    text, filled = np.array(state.rows.tokens), np.array(state.rows.filled)
    caught = loop.catch_up(CFG, weights, spec.drafter, state, rows, chunk=16)
    fresh = loop.prefill(CFG, weights, spec.drafter, text, rows._replace(prompt_length=filled - 1), chunk=16)
    np.testing.assert_array_equal(np.array(fresh.rows.tokens)[0, : filled[0]], text[0, : filled[0]])
    np.testing.assert_allclose(caught.drafter.last, fresh.drafter.last, atol=2e-5)
    for mine, theirs in zip(caught.drafter.cache.layers[0], fresh.drafter.cache.layers[0], strict=True):
        np.testing.assert_allclose(mine[0, : filled[0] - 1], theirs[0, : filled[0] - 1], atol=2e-5)


def test_auto_weighs_only_where_answers_cannot_depend_on_it():
    chain = small_model.make_drafter(CFG, 2, "independent")
    sampled = Speculation(chain, verify.rejection(1, "independent"), {"model": model().params, "stop": ()})
    assert Engine(model(), speculation=drafting())._weighs
    assert not Engine(model(), speculation=sampled)._weighs
    assert not Engine(model(), speculation=drafting(), speculate="on")._weighs
    assert Engine(model(), speculation=drafting(), speculate="off").speculation is None


@pytest.mark.errors
def test_refusals():
    with pytest.raises(ValueError, match="expected 'auto', 'on' or 'off'"):
        Engine(model(), speculation=drafting(), speculate="maybe")
    with pytest.raises(ValueError, match="divide by probabilities that nobody drew"):
        Engine(model(), speculation=Speculation(lookup.make_drafter(3), verify.rejection(1, "independent")))
