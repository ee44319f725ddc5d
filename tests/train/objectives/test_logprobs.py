"""Scores of packed rows are those of each example alone; oracle: dense log-softmax in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.jaxlib_ext.token_stats import token_stats
from jaxaroo.models.decoder import DecoderConfig, Model, init_params, logits
from jaxaroo.train.data.pipeline import Batch
from jaxaroo.train.objectives.logprobs import score_targets

CFG = DecoderConfig(vocab_size=19, embed_dim=16, ffn_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4)
EXAMPLES = [np.random.default_rng(i).integers(0, 19, n) for i, n in enumerate([7, 12, 5, 9])]
ROWS = [[0, 1], [2, 3]]


def packed(examples=EXAMPLES, length=24):
    out = {name: np.zeros((len(ROWS), length), np.int32) for name in Batch._fields}
    for r, row in enumerate(ROWS):
        at = 0
        for number, i in enumerate(row, 1):
            n = len(examples[i]) - 1
            out["tokens"][r, at : at + n], out["targets"][r, at : at + n] = examples[i][:-1], examples[i][1:]
            out["positions"][r, at : at + n], out["segments"][r, at : at + n] = np.arange(n), number
            at += n
    return Batch(**{name: jnp.asarray(x) for name, x in out.items()})


def places():
    """(row, where in it, example) of every example."""
    for r, row in enumerate(ROWS):
        at = 0
        for i in row:
            yield r, slice(at, at + len(EXAMPLES[i]) - 1), i
            at += len(EXAMPLES[i]) - 1


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"window": 4, "window_layers": (True, False)}])
def test_scores_are_those_of_each_example_alone(changes):
    cfg = dataclasses.replace(CFG, **changes)
    params = init_params(cfg, jax.random.key(0))
    scores = score_targets(cfg, params, packed())
    for row, place, i in places():
        z = np.asarray(logits(Model(cfg, params), jnp.asarray(EXAMPLES[i][None, :-1])), np.float64)[0]
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        want = np.log(p[np.arange(len(p)), EXAMPLES[i][1:]])
        np.testing.assert_allclose(scores.logp[row, place], want, rtol=0, atol=2e-6)
        np.testing.assert_allclose(scores.entropy[row, place], -(p * np.log(p)).sum(-1), rtol=0, atol=2e-6)


def test_nothing_flows_between_examples_of_a_row_nor_from_later_tokens_nor_padding():
    """By the gradient of a score with respect to every embedded token."""
    params, batch = init_params(CFG, jax.random.key(0)), packed()
    vectors = params["embed"][batch.tokens]

    def score(vectors, row, at):
        from jaxaroo.models.decoder import forward

        seg, pos = batch.segments, batch.positions
        mask = (seg[:, :, None] == seg[:, None, :]) & (seg > 0)[:, :, None] & (pos[:, :, None] >= pos[:, None, :])
        return forward(CFG, params, vectors, pos, mask, key_positions=pos).hidden[row, at].sum()

    direct = score_targets(CFG, params, batch).hidden
    for row, place, _ in places():
        at = place.stop - 2
        seen = np.abs(jax.grad(score)(vectors, row, at)).sum(-1) > 0
        want = np.zeros_like(seen)
        want[row, place.start : at + 1] = True
        np.testing.assert_array_equal(seen, want)
        assert float(score(vectors, row, at)) == pytest.approx(float(direct[row, at].sum()), abs=1e-5)


def test_half_precision_computes_in_half_and_scores_in_single():
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    params = init_params(cfg, jax.random.key(0))
    scores = score_targets(cfg, params, packed())
    assert (scores.hidden.dtype, scores.logp.dtype) == (jnp.bfloat16, jnp.float32)
    half = token_stats(scores.hidden.reshape(-1, 16), params["head"].astype(jnp.bfloat16), packed().targets.ravel())
    np.testing.assert_array_equal(scores.logp.ravel(), half.logp)  # the table too is in half
    exact = score_targets(CFG, params, packed())
    row, place, _ = next(places())
    np.testing.assert_allclose(scores.logp[row, place], exact.logp[row, place], rtol=0, atol=0.05)
