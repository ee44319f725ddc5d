"""The score is the sum it says, the look-ahead is greedy and forgotten, and the reward steers."""

import functools

import jax
import pytest

from jaxaroo.infer.engine import Engine
from jaxaroo.infer.guided.deal import deal
from jaxaroo.infer.sampling import Sampling
from jaxaroo.models.decoder import DecoderConfig, Model, init_params, unstack_layers
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
PIECE = Sampling(temperature=1.0, max_tokens=3, seed=5, ignore_eos=True)


@functools.cache
def engine():
    model = Model(CFG, unstack_layers(init_params(CFG, jax.random.key(0))))
    return Engine(model, TOKENIZER, max_seqs=2)  # few sizes, few programs


def greedy(ids, n):
    settings = Sampling(temperature=0.0, max_tokens=n, ignore_eos=True)
    return engine().generate([ids], settings)[0].outputs[0].token_ids


@pytest.mark.slow
def test_the_score_is_log_probability_plus_reward_of_what_lies_ahead():
    asked = []

    def reward(prompt, text):
        asked.append((prompt, text))
        return float(len(text) % 7)

    [beam] = deal(engine(), ["Q"], reward, PIECE, weight=0.5, look_ahead=4, beams=2, expand=3, rounds=2)
    prompt = TOKENIZER.encode("Q")
    for partial in beam:
        assert len(partial.token_ids) == 6
        whole = [*prompt, *partial.token_ids]
        scores = engine().score([whole])[0].prompt_logprobs
        logprob = sum(s.logprob for s in scores[len(prompt) :])
        assert partial.logprob == pytest.approx(logprob, abs=1e-4)
        ahead = TOKENIZER.decode([*partial.token_ids, *greedy(whole, 4)])
        assert ("Q", ahead) in asked
        assert partial.score == pytest.approx(logprob + 0.5 * (len(ahead) % 7), abs=1e-4)


@pytest.mark.slow
def test_without_weight_the_likeliest_are_kept_and_with_it_what_is_rewarded():
    vowels = lambda prompt, text: float(sum(c in "aeiou" for c in text))
    run = lambda weight: deal(engine(), ["Q"], vowels, PIECE, weight=weight, beams=2, expand=8, rounds=3)[0]
    cold, hot = run(0.0), run(50.0)
    assert cold[0].score == cold[0].logprob >= max(p.logprob for p in hot)
    assert vowels("", TOKENIZER.decode(hot[0].token_ids)) >= vowels("", TOKENIZER.decode(cold[0].token_ids))
    assert hot != cold


@pytest.mark.errors
def test_what_cannot_be_searched_is_refused():
    for options, piece in ((dict(look_ahead=-1), PIECE), ({}, Sampling(temperature=1.0))):
        with pytest.raises(ValueError, match="deal: look_ahead="):
            deal(engine(), ["Q"], lambda p, t: 0.0, piece, **options)
