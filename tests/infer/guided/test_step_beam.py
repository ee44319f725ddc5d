"""A search finds what its judge counts; a score is of the text beside it; the same seed finds the same."""

import functools
import itertools

import jax
import numpy as np
import pytest

from jaxaroo.infer.engine import Engine
from jaxaroo.infer.guided.step_beam import search, step_beam
from jaxaroo.infer.sampling import Sampling
from jaxaroo.infer.step_scores import Solution, score_solutions
from jaxaroo.models.decoder import DecoderConfig, Model, init_params, unstack_layers
from jaxaroo.models.reward import RewardConfig, RewardModel, init_head, one_token
from jaxaroo.models.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
CFG = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size,
    embed_dim=16,
    ffn_dim=24,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=96,
)
LETTERS = dict.fromkeys(b"abc\n", 100.0)  # any text is of these
PIECE = Sampling(temperature=1.0, max_tokens=6, stop=("\n",), logit_bias=LETTERS, seed=3)


@functools.cache
def engine():
    params = jax.tree.map(lambda w: 0.1 * w, init_params(CFG, jax.random.key(0)))  # nearly uniform
    return Engine(Model(CFG, unstack_layers(params)), TOKENIZER, max_seqs=2)  # few sizes, few programs


@functools.cache
def reward():
    cfg = RewardConfig(target=CFG, separator=one_token(TOKENIZER, "<|sep|>"))
    head = jax.tree.map(lambda w: 5 * w, init_head(cfg, jax.random.key(2)))
    return RewardModel(cfg, {"model": unstack_layers(init_params(CFG, jax.random.key(1))), "head": head})


@pytest.mark.slow
def test_a_judge_that_counts_gets_what_it_counts():
    """The more a's the better: each round keeps the best of all that were grown, and nothing is lost on the way."""
    seen = []

    def judge(grown):
        seen.append([(q, p.text) for q, p in grown])
        return [p.text.count("a") - 0.01 * len(p.text) for _, p in grown]

    found = search(engine(), ["one: ", "two: "], PIECE, judge, beams=2, expand=6, rounds=4)
    alone = [engine().generate(f"{q}: ", Sampling(**{**vars(PIECE), "n": 24}))[0] for q in ("one", "two")]
    for q, beam in enumerate(found):
        assert len(beam) == 2
        assert beam[0].score >= beam[1].score
        for partial in beam:
            assert partial.score == partial.text.count("a") - 0.01 * len(partial.text)
            assert partial.text == TOKENIZER.decode(partial.token_ids)
            assert all(piece.endswith("\n") or len(piece) == 6 for piece in partial.pieces)
            assert len(partial.pieces) == 4
        assert beam[0].text.count("a") > np.mean([o.text.count("a") for o in alone[q].outputs]) * 4
    for before, after in itertools.pairwise(seen):  # what grew in a round grew from the best of the one before
        for q in (0, 1):
            best = sorted([t for at, t in before if at == q], key=lambda t: 0.01 * len(t) - t.count("a"))[:2]
            assert {t for at, t in after if at == q and not any(t.startswith(b) for b in best)} == set()


@pytest.mark.proof
def test_the_same_seed_finds_the_same_and_questions_do_not_meddle():
    judge = lambda grown: [p.text.count("b") + 0.001 * p.logprob for _, p in grown]
    run = lambda prompts, **changes: search(
        engine(), prompts, Sampling(**{**vars(PIECE), **changes}), judge, beams=2, expand=3, rounds=2
    )
    texts = lambda found: [[p.text for p in beam] for beam in found]
    both = texts(run(["one: ", "two: "]))
    assert both == texts(run(["one: ", "two: "]))
    assert both[:1] == texts(run(["one: "])) == texts(run([TOKENIZER.encode("one: ")]))
    assert both != texts(run(["one: ", "two: "], seed=4))
    twice = texts(run(["one: ", "one: "]))
    assert twice[0] == both[0] != twice[1]  # asked twice, it is drawn twice


@pytest.mark.slow
def test_an_answer_that_ends_stays_as_it_was_judged():
    """The end token closes an answer; it is no text, and no later judgement changes its score."""
    judged = []

    def judge(grown):
        judged.extend(p for _, p in grown)
        return [float(-len(p.pieces)) + (10.0 if p.ended else 0.0) for _, p in grown]

    ends = Sampling(**{**vars(PIECE), "logit_bias": LETTERS | {TOKENIZER.eos_ids[0]: 98.0}})
    [beam] = search(engine(), ["x"], ends, judge, beams=3, expand=8, rounds=3)
    finished = [p for p in beam if p.ended]
    assert finished
    for partial in finished:
        assert partial.token_ids[-1] in TOKENIZER.eos_ids
        assert "<|eos|>" not in partial.text
        assert partial.score == 10 - len(partial.pieces)
    assert len(beam[0].pieces) == min(len(p.pieces) for p in judged if p.ended) < 3  # kept from the round it ended in
    assert not any(a.ended and b.token_ids[: len(a.token_ids)] == a.token_ids for a in judged for b in judged if a != b)


@pytest.mark.slow
def test_what_has_no_room_to_grow_ends():
    long = Sampling(temperature=1.0, max_tokens=30, logit_bias={ord("a"): 100.0}, seed=0)
    [beam] = search(engine(), ["x" * 20], long, lambda grown: [0.0] * len(grown), beams=1, expand=2, rounds=9)
    assert beam[0].ended
    assert len(beam[0].token_ids) == 60  # of 96 positions 21 are the prompt's; a third piece does not fit


@pytest.mark.slow
def test_steps_are_scored_as_a_solution_is():
    [beam] = step_beam(engine(), reward(), ["q\n"], PIECE, beams=3, expand=4, rounds=3)
    solutions = [Solution("q\n", p.pieces) for p in beam]
    want = [scores[-1] for scores in score_solutions(reward(), TOKENIZER, solutions)]
    np.testing.assert_allclose([p.score for p in beam], want, atol=1e-6)
    assert np.std(want) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("separator", "between"), [("<|sep|>", "\n"), ("\n", "")])
def test_what_a_model_has_between_steps_is_read_once(separator, between):
    """Steps are those that it was trained on, lines without their ends, and not lines with one more."""
    cfg = RewardConfig(target=CFG, separator=one_token(TOKENIZER, separator), between=between)
    model = RewardModel(cfg, reward().params)
    [beam] = step_beam(engine(), model, ["q\n"], PIECE, beams=3, expand=4, rounds=2)
    lines = [[piece.removesuffix("\n") for piece in p.pieces] for p in beam]
    assert any(p.pieces[-1].endswith("\n") for p in beam)
    want = [s[-1] for s in score_solutions(model, TOKENIZER, [Solution("q\n", steps) for steps in lines])]
    np.testing.assert_allclose([p.score for p in beam], want, atol=1e-6)


@pytest.mark.errors
def test_searches_that_cannot_be_are_refused(monkeypatch):
    flat = lambda grown: [0.0] * len(grown)
    for options in (dict(beams=0), dict(expand=0), dict(rounds=0)):
        with pytest.raises(ValueError, match="expected 1 or more"):
            search(engine(), ["x"], PIECE, flat, **options)
    with pytest.raises(ValueError, match="a temperature above 0"):
        search(engine(), ["x"], Sampling(temperature=0.0, max_tokens=2), flat)
    with pytest.raises(ValueError, match="finite numbers"):
        search(engine(), ["x"], PIECE, lambda grown: [float("nan")] * len(grown))
    with pytest.raises(ValueError, match="no stop string"):
        step_beam(engine(), reward(), ["x"], Sampling(max_tokens=4))
    with pytest.raises(ValueError, match="expected at most 95"):
        search(engine(), ["x" * 200], PIECE, flat)
    monkeypatch.setattr(engine(), "tokenizer", None)
    with pytest.raises(ValueError, match="without a tokenizer"):
        search(engine(), ["x"], PIECE, flat)
