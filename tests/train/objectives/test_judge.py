"""Oracles: float64 loops over tokens, and finite differences. What is trained is what is served, to the threshold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.infer.decode import Rows
from jaxaroo.infer.sampling import Sampling, pack_sampling
from jaxaroo.infer.speculative import loop, verify
from jaxaroo.infer.speculative.drafters import small_model
from jaxaroo.models.decoder import DecoderConfig, forward, init_params, unstack_layers
from jaxaroo.models.heads import JudgeConfig
from jaxaroo.train.data.pipeline import Batch
from jaxaroo.train.objectives.judge import make_loss
from jaxaroo.train.objectives.labelled import LabelledLossConfig, count_units
from jaxaroo.train.optimizer import OptimizerConfig, make_optimizer
from jaxaroo.train.state import init_state
from jaxaroo.train.step import make_train_step

TARGET = DecoderConfig(
    vocab_size=13,
    embed_dim=8,
    ffn_dim=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    window=3,
    window_layers=(True, False),
    max_positions=32,
)
CFG, NEGATIVE = JudgeConfig(target=TARGET), 2.5
B, T, V = 2, 7, 13
MASK = np.array([[0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1, 1]], bool)
LABELS = (MASK * np.array([[1, 0, 1, 0, 0.7, 1, 0], [1, 0, 0.2, 1, 0.5, 1, 0]])).astype(np.float32)
WEIGHTS = (MASK * np.array([[1.0], [0.25]])).astype(np.float32)


@functools.cache
def params():
    target = init_params(TARGET, jax.random.key(0))
    target["norm"] += 0.3 * jax.random.normal(jax.random.key(3), (8,))
    head = {"weight": 0.5 * jax.random.normal(jax.random.key(1), (8,)), "bias": jnp.float32(-0.2)}
    return {"target": target, "head": head}


def batch(segments=None, seed=1):
    """One example a row, or those of `segments`, with positions from 0 in each."""
    tokens = np.random.default_rng(seed).integers(0, V, (B, T)).astype(np.int32)
    segments = np.ones((B, T), np.int32) if segments is None else np.asarray(segments, np.int32)
    positions = np.stack([[np.sum(row[:t] == row[t]) for t in range(T)] for row in segments]).astype(np.int32)
    fields = (tokens, np.roll(tokens, -1, axis=1), positions, segments, MASK, WEIGHTS, LABELS)
    return Batch(*map(jnp.asarray, fields))


@jax.jit
def terms_of(params, batch):
    terms, metrics = make_loss(CFG, LabelledLossConfig(negative_weight=NEGATIVE))(params, batch, None)
    return {name: (term.value, term.weight) for name, term in (terms | metrics).items()}


@jax.jit
def loss_of(params, batch):
    value, weight = terms_of(params, batch)["cross_entropy"]
    return (value * weight).sum() / float(MASK.sum())


def probability_of(head, state):
    z = sum(float(w) * float(x) for w, x in zip(head["weight"], state, strict=True)) + float(head["bias"])
    return 1 / (1 + np.exp(-z))


@pytest.mark.slow
def test_the_whole_loss_is_that_of_the_float64_loop_on_the_state_that_has_read_the_token():
    data = batch()
    got = terms_of(params(), data)
    hidden = np.asarray(forward(TARGET, params()["target"], data.tokens, data.positions).hidden)
    for b, t in np.ndindex(B, T):
        p, y = probability_of(params()["head"], hidden[b, t]), float(LABELS[b, t])
        want = -(y * np.log(p) + NEGATIVE * (1 - y) * np.log(1 - p))
        np.testing.assert_allclose(got["cross_entropy"][0][b, t], want, rtol=0, atol=1e-5)
        np.testing.assert_allclose(got["probability"][0][b, t], p, rtol=0, atol=1e-5)
        assert got["accuracy"][0][b, t] == got["recall_of_bad"][0][b, t] == float((p > 0.5) == (y > 0.5))
    np.testing.assert_array_equal(got["cross_entropy"][1], WEIGHTS)
    for name in ("accuracy", "probability"):
        np.testing.assert_array_equal(got[name][1], MASK)
    np.testing.assert_array_equal(got["recall_of_bad"][1], MASK & (LABELS <= 0.5))
    np.testing.assert_array_equal(np.asarray(got["good"][0])[MASK], LABELS[MASK])
    said = np.asarray(got["probability"][0], np.float64)
    np.testing.assert_allclose(np.asarray(got["brier"][0])[MASK], (said - LABELS)[MASK] ** 2, rtol=1e-5)
    assert 0 < np.asarray(got["accuracy"][0])[MASK].mean() < 1


def test_packed_segments_are_as_good_as_rows_of_their_own():
    segments = [[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]]
    data = batch(segments)
    got = terms_of(params(), data)["probability"][0]
    for row, start, stop in ((0, 0, 3), (0, 3, 7), (1, 0, 5)):
        moved = np.zeros((B, T), np.int32)
        moved[:, : stop - start] = data.tokens[row, start:stop]
        alone = terms_of(params(), batch()._replace(tokens=jnp.asarray(moved)))["probability"][0]
        np.testing.assert_allclose(got[row, start:stop], alone[0, : stop - start], rtol=0, atol=1e-5)


def test_the_gradient_is_that_of_finite_differences_and_none_reaches_the_target():
    grad = jax.jit(jax.grad(loss_of))(params(), batch())
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(grad["target"]))
    head = params()["head"]
    for name in ("weight", "bias"):
        for i in np.ndindex(head[name].shape):
            step = np.zeros(head[name].shape, np.float32)
            step[i] = 1e-2
            ends = [loss_of(params() | {"head": head | {name: head[name] + s * step}}, batch()) for s in (1, -1)]
            slope = (float(ends[0]) - float(ends[1])) / 2e-2
            assert float(grad["head"][name][i]) == pytest.approx(slope, rel=1e-2, abs=2e-4), (name, i)


@functools.cache
def quiet():
    """A target whose layers say little, so that its last state is still mostly the token's embedding."""
    target = jax.tree.map(jnp.copy, params()["target"])
    target["layers"]["attn"]["o"] *= 0.1
    target["layers"]["mlp"]["down"] *= 0.1
    return target


def rows_of(seed, n=16):
    """A token is good if the first number of its embedding is above the median: a state that has read it can tell."""
    tokens = np.random.default_rng(seed).integers(0, V, (1, n, T)).astype(np.int32)
    ones = np.ones(tokens.shape, np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), tokens.shape)
    first = np.asarray(params()["target"]["embed"])[:, 0]
    good = first > np.median(first)
    mask, labels = np.broadcast_to(np.arange(T) > 1, tokens.shape), good[tokens].astype(np.float32)
    fields = (tokens, tokens, positions, ones, mask, mask.astype(np.float32), labels * mask)
    return Batch(*map(jnp.asarray, fields))


@functools.cache
def learned(negative=1.0):
    """Trained with the step that runs use, on fresh rows each time; and the metrics of the last step."""
    tx = make_optimizer(OptimizerConfig(learning_rate=0.1, warmup_steps=0), 120)
    head = {"weight": jnp.zeros(8), "bias": jnp.zeros(())}
    combine = lambda head, target: {"head": head, "target": target}
    loss = make_loss(CFG, LabelledLossConfig(negative_weight=negative))
    step = make_train_step(loss, tx, count_units, combine=combine)
    state, metrics = init_state(head, tx, frozen=jax.tree.map(jnp.copy, quiet())), []
    for i in range(120):
        state, found = step(state, rows_of(i))
        metrics.append(jax.device_get(found))
    return state.params, metrics


@pytest.mark.optimizer
def test_it_learns_to_tell_good_tokens_from_bad_ones():
    head, metrics = learned()
    assert metrics[-1]["loss"] < 0.6 * metrics[0]["loss"]
    fresh = jax.tree.map(lambda x: x[0, :B], rows_of(999))
    got = terms_of({"target": quiet(), "head": head}, fresh)
    assert np.asarray(got["accuracy"][0])[np.asarray(fresh.mask)].mean() > 0.85
    last = {name: np.mean([m[name] for m in metrics[-20:]]) for name in ("accuracy", "recall_of_bad", "bad_tokens")}
    assert last["accuracy"] > 0.85
    assert 0.75 < last["recall_of_bad"] <= 1  # a share of the bad ones, not of all
    assert 20 < last["bad_tokens"] < 60  # of 80


@pytest.mark.optimizer
@pytest.mark.slow
def test_bad_tokens_that_count_more_are_refused_more_often():
    recall = [np.mean([m["recall_of_bad"] for m in learned(c)[1][-40:]]) for c in (0.1, 1.0, 10.0)]
    assert recall[0] < recall[1] < recall[2]


@pytest.mark.proof
def test_a_draft_passes_when_served_exactly_above_what_training_found():
    """One draft that the target refuses: a threshold below the trained probability lets it pass, one above does not."""
    target, small = params()["target"], init_params(TARGET, jax.random.key(8))
    drafter, S = small_model.make_drafter(TARGET, 1, "mode"), 16
    rule = verify.judge(verify.coupled(), 1)
    prompts = np.random.default_rng(4).integers(0, V, (8, 4)).astype(np.int32)
    tokens = np.zeros((8, S), np.int32)
    tokens[:, :4] = prompts
    length, settings = np.full(8, 4, np.int32), Sampling(temperature=0.0, max_tokens=6)
    rows = Rows(pack_sampling([(settings, 0, 0)] * 8, 0, V), length, length + 6, np.full((8, 1), -1, np.int32))

    def one_step(threshold):
        served = params()["head"] | {"threshold": np.asarray(threshold, np.float32)}
        given = loop.Weights(unstack_layers(target), {"model": unstack_layers(small), "stop": ()}, served)
        state = loop.prefill(TARGET, given, drafter, tokens, rows, chunk=S)
        tree = jax.device_get(loop.draft(given, drafter, state, rows)[0])
        state = loop.decode(TARGET, given, drafter, rule, state, rows, np.zeros(8, bool), np.int32(1))
        return jax.device_get(state.rows), tree

    never, tree = one_step(1.0)
    text = np.asarray(never.tokens)[:, :6].copy()
    refused = text[:, 5] != tree.tokens[:, 1]  # prompt, the first token, and what the target says instead of the draft
    assert refused.sum() > 4
    text[:, 5] = tree.tokens[:, 1]
    seen = jax.tree.map(lambda x: jnp.zeros((8, 6), x.dtype), batch())
    positions = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32)[None], (8, 6))
    seen = seen._replace(tokens=jnp.asarray(text), positions=positions, segments=seen.segments + 1)
    trained = np.asarray(terms_of(params(), seen)["probability"][0])[:, 5]
    for row in np.flatnonzero(refused)[:4]:
        for shift, taken in ((-1e-4, True), (1e-4, False)):
            state, _ = one_step(trained[row] + shift)
            assert (state.tokens[row, 5] == tree.tokens[row, 1]) == taken
            assert state.filled[row] == 6 + taken


@pytest.mark.errors
def test_refusals():
    with pytest.raises(ValueError, match="a batch without labels"):
        make_loss(CFG)(params(), batch()._replace(labels=None), None)
    with pytest.raises(ValueError, match="negative_weight: found 0"):
        LabelledLossConfig(negative_weight=0.0)
