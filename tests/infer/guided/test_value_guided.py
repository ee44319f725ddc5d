"""Guided decoding against a loop that reads every prefix anew, and against no guide where the guide has no say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.infer.decode import Rows, decode, prefill
from jaxaroo.infer.engine import Engine
from jaxaroo.infer.guided import value_guided
from jaxaroo.infer.guided.value_guided import ivo, tvd
from jaxaroo.infer.sampling import Sampling, gumbel, pack_sampling
from jaxaroo.infer.step_scores import score
from jaxaroo.models.decoder import DecoderConfig, Model, forward, init_params, lm_head, unstack_layers
from jaxaroo.models.reward import RewardConfig, RewardModel, init_head

V, K = 32, 4
CFG = DecoderConfig(
    vocab_size=V, embed_dim=32, ffn_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=128
)
SMALL = DecoderConfig(
    vocab_size=V, embed_dim=16, ffn_dim=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, max_positions=128
)
PROMPTS = [[5, 9, 1], [1], [2, 4, 6, 8, 10, 2]]
SAMPLINGS = [
    Sampling(temperature=0.0, max_tokens=12, ignore_eos=True),
    Sampling(temperature=1.0, max_tokens=24, top_p=0.2),  # often fewer tokens than candidates
    Sampling(temperature=0.7, max_tokens=5, repetition_penalty=1.3),
]


@functools.cache
def policy():
    return Model(CFG, unstack_layers(init_params(CFG, jax.random.key(0))))


@functools.cache
def reward():
    cfg = RewardConfig(target=SMALL, separator=3, inner=8)
    head = jax.tree.map(lambda w: 12 * w, init_head(cfg, jax.random.key(2)))
    return RewardModel(cfg, {"model": unstack_layers(init_params(SMALL, jax.random.key(1))), "head": head})


def packed(samplings=SAMPLINGS):
    tokens = np.zeros((3, 48), np.int32)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, : len(prompt)] = prompt
    length = np.array([len(p) for p in PROMPTS], np.int32)
    arrays = pack_sampling([(s, 40 + i, 0) for i, s in enumerate(samplings)], 0, V)
    limit = length + np.array([s.max_tokens for s in samplings], np.int32)
    return tokens, Rows(arrays, length, limit, np.full((3, 1), -1, np.int32))


def lines(state):
    return [np.asarray(t)[:n].tolist() for t, n in zip(state.tokens, np.asarray(state.filled), strict=True)]


def guided(guidance, samplings=SAMPLINGS, steps=(100,)):
    tokens, rows = packed(samplings)
    state = value_guided.prefill(CFG, policy().params, *guidance, tokens, rows, chunk=16)
    for n in steps:
        state = value_guided.decode(CFG, policy().params, *guidance, state, rows, np.zeros(3, bool), np.int32(n))
    return lines(state.rows)


def plain(samplings=SAMPLINGS):
    tokens, rows = packed(samplings)
    state = prefill(CFG, policy().params, tokens, rows, chunk=16)
    return lines(decode(CFG, policy().params, state, rows, np.zeros(3, bool), np.int32(100)))


@functools.cache
def _logits():
    at = jnp.arange(48, dtype=jnp.int32)[None]
    run = jax.jit(lambda t: lm_head(CFG, policy().params, forward(CFG, policy().params, t, at).hidden)[0])
    return lambda ids: np.asarray(run(padded(ids)))[len(ids) - 1].astype(np.float64)


def padded(ids):
    return jnp.asarray([ids + [0] * (48 - len(ids))], jnp.int32)


def value(ids):
    """The reward model's score of a prefix that it reads whole."""
    return float(score(reward().config, reward().params, padded(ids), np.array([[len(ids) - 1]], np.int32))[0, 0])


def by_hand(name, setting, separated, row):
    """One row, by loops over candidates and prefixes; greedy or temperature and top-p alone."""
    ids, sampling = list(PROMPTS[row]), SAMPLINGS[row]
    for _ in range(sampling.max_tokens):
        z = _logits()(ids)
        warped = z / (sampling.temperature or 1.0)
        if sampling.top_p < 1:
            order, mass = np.argsort(-warped), np.exp(warped - warped.max())
            mass, kept = mass / mass.sum(), 0.0
            for token in order:
                if kept >= sampling.top_p:
                    warped[token] = -np.inf
                kept += mass[token]
        noise = np.asarray(gumbel(jnp.uint32(40 + row), jnp.int32(0), jnp.int32(len(ids)), V), np.float64)
        noise = noise if sampling.temperature else 0 * noise
        best = np.argsort(-warped, kind="stable")[:K]
        scores = {int(t): value([*ids, int(t), *([3] if separated else [])]) for t in best if warped[t] > -np.inf}
        if name == "ivo":
            weighed = {t: warped[t] + setting * s + noise[t] for t, s in scores.items()}
            ids.append(max(weighed, key=lambda t: weighed[t]))
        elif np.exp(z - z.max()).max() / np.exp(z - z.max()).sum() < setting:
            ids.append(max(scores, key=lambda t: scores[t]))
        else:
            ids.append(int(np.argmax(warped + noise)))
    return ids


@pytest.mark.parametrize(
    ("guide", "setting", "separated"),
    [
        (tvd, 1.0, True),
        pytest.param(tvd, 0.15, False, marks=pytest.mark.proof),
        (ivo, 6.0, False),
        pytest.param(ivo, 3.0, True, marks=pytest.mark.proof),
    ],
)
@pytest.mark.slow
def test_tokens_are_those_of_a_loop_over_whole_prefixes(guide, setting, separated):
    options = {"threshold" if guide is tvd else "beta": setting}
    got = guided(guide(reward(), width=K, separated=separated, **options), steps=(3, 1, 100))
    for row in (0, 1):
        assert got[row] == by_hand(guide.__name__, setting, separated, row)
    assert got != plain()  # the guide had a say


@pytest.mark.slow
def test_without_a_say_the_policy_decodes_as_it_would():
    assert guided(tvd(reward(), threshold=0.0, width=K)) == plain()
    cut = [Sampling(**{**vars(s), "top_k": K}) for s in SAMPLINGS]
    assert guided(ivo(reward(), beta=0.0, width=K), cut) == plain(cut)
    assert guided(ivo(reward(), beta=0.0, width=K)) != plain()  # tokens beyond the likeliest are gone


def test_settings_are_traced():
    guided(ivo(reward(), beta=1.0, width=K))
    before = value_guided.decode._cache_size()
    guided(ivo(reward(), beta=2.5, width=K))
    assert value_guided.decode._cache_size() == before


@pytest.mark.proof
def test_an_engine_is_guided_in_slots_that_refill():
    sampling = [Sampling(**{**vars(s), "seed": 40 + i}) for i, s in enumerate(SAMPLINGS)]
    guidance = ivo(reward(), beta=6.0, width=K)
    with Engine(policy(), max_seqs=2, guidance=guidance) as engine:
        answers = [r.outputs[0].token_ids for r in engine.generate(PROMPTS, sampling)]
    assert answers == [line[len(p) :] for line, p in zip(guided(guidance), PROMPTS, strict=True)]


def test_texts_are_as_long_as_the_guide_can_read():
    short = RewardModel(RewardConfig(target=DecoderConfig(**{**vars(SMALL), "max_positions": 24}), separator=3), {})
    guidance = ivo(short, beta=1.0)
    assert Engine(policy(), guidance=guidance).max_len == 24
    assert Engine(policy(), guidance=guidance, max_len=30).max_len == 30  # who asks for more may have it
    assert Engine(policy(), guidance=ivo(reward(), beta=1.0)).max_len == 128


@pytest.mark.errors
def test_guides_that_do_not_fit_are_refused():
    other = DecoderConfig(**{**vars(SMALL), "vocab_size": 40})
    cfg = RewardConfig(target=other, separator=3)
    foreign = RewardModel(cfg, {"model": {}, "head": {}})
    with pytest.raises(ValueError, match="the reward model has 40 tokens; expected 32"):
        Engine(policy(), guidance=tvd(foreign, threshold=0.5))
    with pytest.raises(ValueError, match="width=33; expected 1 to 32"):
        Engine(policy(), guidance=tvd(reward(), threshold=0.5, width=33))
    surprised = RewardModel(RewardConfig(target=SMALL, separator=3, surprisal=True), {})
    for make in (
        lambda: ivo(surprised, beta=1.0),
        lambda: tvd(reward(), threshold=1.5),
        lambda: ivo(reward(), beta=-1),
        lambda: ivo(reward(), beta=1, width=0),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()
