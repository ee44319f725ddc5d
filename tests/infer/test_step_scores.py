"""All steps in one pass are what each prefix alone would get; neighbours, padding and devices change nothing."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxaroo.infer import step_scores
from jaxaroo.infer.step_scores import Solution, score, score_solutions
from jaxaroo.models.decoder import DecoderConfig, forward, init_params, param_axes, unstack_layers
from jaxaroo.models.reward import RewardConfig, RewardModel, init_head, one_token, render_steps, step_logits, surprisals
from jaxaroo.models.tokenizer import byte_tokenizer
from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.sharding.rules import FSDP_TP_SEQ

TOKENIZER = byte_tokenizer()
CFG = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size,
    embed_dim=32,
    ffn_dim=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=128,
)
REWARD = RewardConfig(target=CFG, separator=one_token(TOKENIZER, "<|sep|>"), inner=16, outputs=2, between="> ")
SOLUTIONS = [
    Solution("3 + 4 ?\n", ["3 + 4 = 7\n", "ans 7"]),
    Solution("a\n", ["x"]),
    Solution("none\n", []),
    Solution("long one\n", [f"step {i}\n" for i in range(9)]),
    Solution("2\n", ["2 * 2 = 4\n", "4 * 2 = 8\n", "ans 8"]),
]


SURPRISED = dataclasses.replace(REWARD, surprisal=True)


@functools.cache
def model(cfg=REWARD):
    scale = 0.3 if cfg.surprisal else 3.0  # surprisal is large in a model that knows nothing
    head = jax.tree.map(lambda w: scale * w + 0.1, init_head(cfg, jax.random.key(1)))
    return RewardModel(cfg, {"model": init_params(CFG, jax.random.key(0)), "head": head})


@functools.partial(jax.jit, static_argnames="cfg")
def read(cfg, tokens):
    at, params = np.arange(128, dtype=np.int32)[None], model(cfg).params
    hidden = forward(CFG, params["model"], tokens, at).hidden
    surprise = surprisals(cfg, params, hidden, tokens, at) if cfg.surprisal else None
    return step_logits(cfg, params, hidden, surprise)[0]


def alone(cfg, solution):
    """Score i from the prefix that ends at step i, at its last token, and nothing behind it."""
    scores = []
    for n in range(1, len(solution.steps) + 1):
        ids, _ = render_steps(TOKENIZER, solution.prompt, solution.steps[:n], cfg.text)
        tokens = np.zeros((1, 128), np.int32)  # one shape for all; nothing behind the end is seen
        tokens[0, : len(ids)] = ids
        scores.append(1 / (1 + np.exp(-float(read(cfg, tokens)[len(ids) - 1]))))
    return scores


@functools.cache
def together(cfg=REWARD):
    return score_solutions(model(cfg), TOKENIZER, SOLUTIONS, batch=3)


@pytest.mark.parametrize("cfg", [REWARD, SURPRISED], ids=["state", "surprisal"])
@pytest.mark.slow
def test_one_pass_is_the_scoring_of_every_prefix(cfg):
    got = together(cfg)
    assert [len(s) for s in got] == [2, 1, 0, 9, 3]
    for solution, scores in zip(SOLUTIONS, got, strict=True):
        np.testing.assert_allclose(scores, alone(cfg, solution), atol=1e-5)
    assert np.std([s for scores in got for s in scores]) > 0.01  # and they say something


@pytest.mark.slow
def test_neighbours_and_layers_as_a_tuple_change_nothing():
    unrolled = model()._replace(params=model().params | {"model": unstack_layers(model().params["model"])})
    for i, solution in enumerate(SOLUTIONS):
        [got] = score_solutions(unrolled, TOKENIZER, [solution], batch=1)
        np.testing.assert_allclose(got, together()[i], atol=1e-5)


def test_a_batch_over_eight_devices_scores_the_same():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    axes = {"model": param_axes(CFG), "head": jax.tree.map(lambda w: (None,) * w.ndim, model().params["head"])}
    placed = FSDP_TP_SEQ.shardings(mesh, axes, model().params)
    spread = model()._replace(params=jax.device_put(model().params, placed))
    with jax.set_mesh(mesh):
        got = score_solutions(spread, TOKENIZER, SOLUTIONS, batch=4, mesh=mesh, rules=FSDP_TP_SEQ)
    for mine, theirs in zip(got, together(), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_scoring_costs_one_forward_pass_whatever_the_number_of_steps():
    tokens = np.zeros((1, 128), np.int32)
    positions = np.arange(128, dtype=np.int32)[None]
    flops = lambda f, *args: f.lower(*args).compile().cost_analysis()["flops"]
    plain = flops(jax.jit(lambda p, t: forward(CFG, p, t, positions).hidden), model().params["model"], tokens)
    for steps in (1, 8):
        at = np.zeros((1, steps), np.int32)
        whole = flops(jax.jit(lambda p, t, e: score(REWARD, p, t, e)), model().params, tokens, at)
        head = steps * 2 * (32 * 16 + 16 * 2)
        assert plain <= whole <= plain + 2 * head + 1000


@pytest.mark.errors
def test_what_cannot_be_scored_is_named():
    with pytest.raises(ValueError, match=r"solution 1 has 1\d\d tokens; expected at most the model's 128 positions"):
        score_solutions(model(), TOKENIZER, [SOLUTIONS[0], Solution("q", ["x" * 150])])
    with pytest.raises(ValueError, match="batch=0"):
        score_solutions(model(), TOKENIZER, SOLUTIONS, batch=0)


def test_lengths_and_numbers_of_steps_come_in_few_sizes(monkeypatch):
    seen = set()
    monkeypatch.setattr(step_scores, "score", lambda cfg, p, t, e, r: seen.add((t.shape, e.shape)) or np.zeros(e.shape))
    for n in range(1, 10):
        score_solutions(model(), TOKENIZER, [Solution("q", ["abcdefg"] * n)], batch=1)
    assert seen == {((1, t), (1, s)) for t, s in ((32, 1), (32, 2), (32, 4), (64, 4), (64, 8), (128, 8), (128, 16))}
