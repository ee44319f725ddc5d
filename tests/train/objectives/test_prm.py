"""Oracles: float64 loops over labelled tokens, and finite differences. What is trained is what scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.infer.step_scores import score
from jaxaroo.models.decoder import DecoderConfig, forward, init_params
from jaxaroo.models.reward import RewardConfig, init_head, step_logits, surprisals
from jaxaroo.train.data.pipeline import Batch
from jaxaroo.train.objectives.labelled import LabelledLossConfig
from jaxaroo.train.objectives.prm import make_loss, token_logits

TARGET = DecoderConfig(
    vocab_size=13, embed_dim=8, ffn_dim=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, max_positions=32
)
CONFIGS = {
    "value": RewardConfig(target=TARGET, separator=3, inner=6, outputs=2),
    "pair": RewardConfig(target=TARGET, separator=3, kind="token_pair", good=4, bad=5),
    "surprisal": RewardConfig(target=TARGET, separator=3, surprisal=True),
}
TOKENS = np.array([[1, 6, 3, 7, 8, 3, 9, 3], [2, 6, 6, 3, 1, 7, 3, 0]], np.int32)
MASK = TOKENS == 3
LABELS = (MASK * np.array([[0, 0, 1, 0, 0, 0.25, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0]])).astype(np.float32)
WEIGHTS = (MASK * np.array([[1.0], [0.5]])).astype(np.float32)
SEGMENTS = np.array([[1] * 8, [1, 1, 1, 1, 2, 2, 2, 0]], np.int32)
NEGATIVE = 3.0


@functools.cache
def params(name):
    head = jax.tree.map(lambda w: 2 * w + 0.1, init_head(CONFIGS[name], jax.random.key(1)))
    return {"model": init_params(TARGET, jax.random.key(0)), "head": head}


def batch():
    positions = np.stack([[np.sum(row[:t] == row[t]) for t in range(8)] for row in SEGMENTS]).astype(np.int32)
    fields = (TOKENS, np.roll(TOKENS, -1, axis=1), positions, SEGMENTS, MASK, WEIGHTS, LABELS)
    return Batch(*map(jnp.asarray, fields))


@functools.cache
def loss_of(name):
    make = make_loss(CONFIGS[name], LabelledLossConfig(negative_weight=NEGATIVE))

    def loss(tree, data):
        terms, _ = make(tree, data, None)
        return jnp.sum(terms["cross_entropy"].value * terms["cross_entropy"].weight) / MASK.sum().astype(np.float32)

    return jax.jit(loss)


def by_loops(name):
    """Each segment read alone, then one labelled token after another, in float64."""
    total = 0.0
    for row in range(2):
        for segment in {*SEGMENTS[row].tolist()} - {0}:
            at = np.flatnonzero(SEGMENTS[row] == segment)
            ids = jnp.asarray(TOKENS[row, at][None])
            where = jnp.arange(len(at), dtype=jnp.int32)[None]
            hidden = forward(TARGET, params(name)["model"], ids, where).hidden
            surprise = surprisals(CONFIGS[name], params(name), hidden, ids, where) if name == "surprisal" else None
            z = np.asarray(step_logits(CONFIGS[name], params(name), hidden, surprise), np.float64)[0]
            for t, place in enumerate(at):
                if MASK[row, place]:
                    p, y = 1 / (1 + np.exp(-z[t])), float(LABELS[row, place])
                    total -= WEIGHTS[row, place] * (y * np.log(p) + NEGATIVE * (1 - y) * np.log(1 - p))
    return total / MASK.sum()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.slow
def test_the_loss_is_that_of_the_float64_loop_over_separators(name):
    np.testing.assert_allclose(float(loss_of(name)(params(name), batch())), by_loops(name), rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.slow
def test_gradients_reach_head_and_decoder(name):
    """Central differences along a random direction of every parameter, one tree at a time."""
    grads = jax.grad(loss_of(name))(params(name), batch())
    for part in [("model", "norm"), ("model", "embed"), ("head", "last", "weight"), ("model", "head")]:
        if name == "pair" and part[0] == "head":
            assert grads["head"] == {}
            continue
        at = lambda tree, part=part: functools.reduce(lambda t, k: t[k], part, tree)
        direction = jax.random.normal(jax.random.key(7), at(params(name)).shape)

        def moved(by, part=part, direction=direction):
            tree = jax.tree.map(lambda w: w, params(name))
            inner = functools.reduce(lambda t, k: t[k], part[:-1], tree)
            inner[part[-1]] = inner[part[-1]] + by * direction
            return float(loss_of(name)(tree, batch()))

        numeric = (moved(1e-3) - moved(-1e-3)) / 2e-3
        exact = float(jnp.sum(at(grads) * direction))
        assert numeric == pytest.approx(exact, rel=2e-2, abs=2e-4)
        if part != ("model", "head") or name != "value":  # a value head leaves the LM head alone, but for surprisal
            assert abs(exact) > 1e-4


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.slow
def test_what_is_trained_is_what_scores(name):
    """The log-odds at separators of packed rows are those that `infer` makes of each solution alone."""
    z = np.asarray(token_logits(CONFIGS[name], params(name), batch()))
    ends = np.flatnonzero(MASK[0])
    got = score(CONFIGS[name], params(name), TOKENS[:1], ends[None].astype(np.int32))
    np.testing.assert_allclose(1 / (1 + np.exp(-z[0, ends])), got[0], atol=1e-5)
    got = score(CONFIGS[name], params(name), TOKENS[1:, 4:7], np.array([[2]], np.int32))  # the second in its row
    np.testing.assert_allclose(1 / (1 + np.exp(-z[1, 6])), got[0, 0], atol=1e-5)
