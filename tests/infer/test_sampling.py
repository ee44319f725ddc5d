"""Oracles: transformers' own processors (goldens), float64 NumPy loops, and counting draws."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxaroo.infer.sampling import Counts, Sampling, choose, gumbel, pack_sampling, score_tokens, warp

GOLDEN = np.load(Path(__file__).parents[1] / "goldens" / "sampling.npz")
SETTINGS = json.loads(str(GOLDEN["settings"]))
V = 13
run_warp, run_choose = jax.jit(warp), jax.jit(choose)


def counts_of(prompts, answers=None, vocab=V):
    answers = answers or [[] for _ in prompts]
    seen, said = np.zeros((len(prompts), vocab), bool), np.zeros((len(prompts), vocab), np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        seen[row, list(prompt)] = True
        np.add.at(said[row], list(answer), 1)
    return Counts(jnp.asarray(seen), jnp.asarray(said))


def pack(samplings, vocab=V, biased=2):
    return pack_sampling([(s, 0, 0) for s in samplings], biased, vocab)


@pytest.mark.parametrize("name", [name for name in SETTINGS if not name.startswith("ties_")])
def test_matches_transformers_processors(name):
    """Its order (penalty, temperature, top-k, top-p, min-p) is ours; every golden is processed in one batch."""
    logits, ids = jnp.asarray(GOLDEN["logits"]), GOLDEN["input_ids"]
    sampling = Sampling(**dict(SETTINGS[name]))
    B, vocab = logits.shape
    got = run_warp(logits, pack([sampling] * B, vocab), counts_of(ids, vocab=vocab))
    want = GOLDEN[name]
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    np.testing.assert_allclose(np.asarray(got)[np.isfinite(want)], want[np.isfinite(want)], rtol=1e-6)


def test_all_ties_at_a_cut_are_kept():
    logits = jnp.asarray(GOLDEN["ties_at_cutoff_logits"])
    vocab = logits.shape[1]
    for setting in (Sampling(top_k=4), Sampling(top_p=0.6)):
        kept = np.isfinite(run_warp(logits, pack([setting], vocab), counts_of([[]], vocab=vocab)))[0]
        cut = logits[0][kept].min()
        np.testing.assert_array_equal(kept, logits[0] >= cut)
    top_k = np.isfinite(run_warp(logits, pack([Sampling(top_k=4)], vocab), counts_of([[]], vocab=vocab)))
    np.testing.assert_array_equal(top_k, np.isfinite(GOLDEN["ties_at_cutoff_top_k"]))


def oracle(z, s: Sampling, prompt, answer):
    """One row in float64, one token at a time."""
    z = np.float64(z)
    for token, bias in s.logit_bias.items():
        z[token] += bias
    for token in range(len(z)):
        said = answer.count(token)
        if token in prompt or said:
            z[token] = z[token] / s.repetition_penalty if z[token] > 0 else z[token] * s.repetition_penalty
        z[token] -= s.presence_penalty * (said > 0) + s.frequency_penalty * said
    if s.temperature == 0:
        return z
    z = z / s.temperature
    order = sorted(range(len(z)), key=lambda t: -z[t])
    cut = z[order[min(s.top_k, len(z)) - 1]] if s.top_k else -np.inf
    prob = np.exp(z - z.max()) * (z >= cut)
    prob, mass = prob / prob.sum(), 0.0
    for token in order:
        if mass < s.top_p and z[token] >= cut:
            last = z[token]
        mass += prob[token]
    return np.where((z >= last) & (z >= z.max() + np.log(max(s.min_p, 1e-300))), z, -np.inf)


settings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 20]),
    top_p=st.sampled_from([0.05, 0.3, 0.77, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.25]),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.4]),
    presence_penalty=st.sampled_from([-0.5, 0.0, 1.1]),
    frequency_penalty=st.sampled_from([-0.3, 0.0, 0.6]),
    logit_bias=st.sampled_from([{}, {3: -100.0}, {0: 2.5, 7: -1.25}]),
)
tokens = st.lists(st.integers(0, V - 1), max_size=6)


@given(st.integers(0, 2**31), st.lists(settings, min_size=4, max_size=4), st.lists(tokens, min_size=8, max_size=8))
def test_matches_float64_oracle_row_by_row(seed, rows, texts):
    """Rows with different settings share a batch, and none feels the others."""
    logits = np.random.default_rng(seed).normal(size=(4, V)).astype(np.float32) * 3
    prompts, answers = texts[:4], texts[4:]
    got = np.asarray(run_warp(jnp.asarray(logits), pack(rows), counts_of(prompts, answers)))
    for row in range(4):
        want = oracle(logits[row], rows[row], prompts[row], answers[row])
        np.testing.assert_array_equal(np.isneginf(got[row]), np.isneginf(want))
        np.testing.assert_allclose(got[row], want, rtol=1e-5, atol=1e-5)


@given(st.permutations(range(V)), settings)
def test_renaming_the_vocabulary_changes_nothing(order, s):
    order = np.array(order)
    logits = jnp.asarray(np.random.default_rng(1).integers(-3, 4, (1, V)).astype(np.float32))  # full of ties
    renamed = {int(np.flatnonzero(order == t)[0]): b for t, b in s.logit_bias.items()}
    plain = run_warp(logits, pack([s]), counts_of([[]]))
    shuffled = run_warp(logits[:, order], pack([Sampling(**{**vars(s), "logit_bias": renamed})]), counts_of([[]]))
    np.testing.assert_allclose(shuffled, plain[:, order], rtol=1e-5, atol=1e-6)


def test_draws_follow_the_softmax():
    """Chi-square over 20,000 positions; the 0.1 % point of 12 degrees of freedom is 32.9."""
    n = 20_000
    logits = jnp.asarray(np.random.default_rng(2).normal(size=V), jnp.float32)
    noise = jax.jit(jax.vmap(lambda p: gumbel(jnp.uint32(5), jnp.int32(0), p, V)))(jnp.arange(n))
    drawn = np.bincount(np.argmax(logits[None] + noise, axis=-1), minlength=V)
    expected = n * np.asarray(jax.nn.softmax(logits), np.float64)
    assert ((drawn - expected) ** 2 / expected).sum() < 32.9


def test_noise_depends_on_seed_sample_and_position_and_not_on_the_row():
    logits = jnp.zeros((4, V))
    rows = [(Sampling(), 1, 0), (Sampling(), 1, 0), (Sampling(), 2, 0), (Sampling(), 1, 1)]
    s = pack_sampling(rows, 0, V)
    lines = np.stack([run_choose(logits, s, jnp.full(4, p)) for p in range(40)])
    np.testing.assert_array_equal(lines[:, 0], lines[:, 1])  # another slot
    for other in (2, 3):  # another seed, another sample
        assert (lines[:, 0] != lines[:, other]).mean() > 0.5
    assert (lines[1:, 0] != lines[:-1, 0]).mean() > 0.5  # another position
    swapped = pack_sampling(rows[::-1], 0, V)
    again = np.stack([run_choose(logits, swapped, jnp.full(4, p)) for p in range(40)])
    np.testing.assert_array_equal(lines, again[:, ::-1])


def test_greedy_rows_take_the_mode_beside_sampled_ones():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(2, V)), jnp.float32)
    s = pack([Sampling(temperature=0.0, top_k=1, top_p=0.1), Sampling(temperature=1.0)])
    warped = run_warp(logits, s, counts_of([[], []]))
    np.testing.assert_array_equal(warped[0], logits[0])
    for p in range(20):
        assert run_choose(warped, s, jnp.full(2, p))[0] == np.argmax(logits[0])


@pytest.mark.parametrize("n", [0, 3, 20])
def test_scores_are_the_log_softmax(n):
    logits = np.random.default_rng(4).normal(size=(5, V)).astype(np.float32) * 10
    want = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    picked = np.arange(5)
    got = score_tokens(jnp.asarray(logits), jnp.asarray(picked), n)
    np.testing.assert_allclose(got.chosen, want[np.arange(5), picked], atol=1e-5)
    kept = min(n, V)
    assert got.top.shape == (5, kept)
    np.testing.assert_array_equal(got.top_ids, np.argsort(-want, axis=-1)[:, :kept])
    np.testing.assert_allclose(got.top, -np.sort(-want, axis=-1)[:, :kept], atol=1e-5)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", True),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", float("inf")),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", [1]),
        ("n", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("stop", "word"),
        ("stop", [""]),
        ("stop_token_ids", [-1]),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
    ],
)
def test_a_setting_out_of_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"Sampling.{field}: found .*; expected"):
        Sampling(**{field: value})
