"""Oracle: cross-entropy by loops in float64. The whole step, with its window, is tested in test_step.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.models.decoder import DecoderConfig, param_shapes
from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.sharding.rules import FSDP_TP
from jaxaroo.train.data.pipeline import Batch
from jaxaroo.train.objectives.logprobs import Scores
from jaxaroo.train.objectives.sft import make_loss, sft

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 5, 7))
TARGETS = RNG.integers(0, 7, (2, 5))
MASK = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]], bool)
WEIGHT = np.array([[1.0], [0.25]])


def batch():
    weights = jnp.asarray(MASK * WEIGHT, jnp.float32)
    zeros = jnp.zeros((2, 5), jnp.int32)
    return Batch(zeros, jnp.asarray(TARGETS), zeros, zeros + 1, jnp.asarray(MASK), weights)


def scores(z):
    logp = jax.nn.log_softmax(z)
    chosen = jnp.take_along_axis(logp, jnp.asarray(TARGETS)[..., None], -1)[..., 0]
    return Scores(chosen, -(jnp.exp(logp) * logp).sum(-1), jnp.zeros((2, 5, 3)))


def loss(z):
    term = sft(scores(z), batch())[0]["nll"]
    return (term.value * term.weight).sum() / float(MASK.sum())


def test_value_and_unit():
    want = 0.0
    for b, t in zip(*np.nonzero(MASK), strict=True):
        z = LOGITS[b, t]
        want -= WEIGHT[b, 0] * (z[TARGETS[b, t]] - np.log(np.exp(z).sum()))
    assert float(loss(jnp.asarray(LOGITS, jnp.float32))) == pytest.approx(want / MASK.sum(), rel=1e-5)
    terms, metrics = sft(scores(jnp.asarray(LOGITS, jnp.float32)), batch())
    assert {name: term.unit for name, term in (terms | metrics).items()} == {"nll": "token", "entropy": "token"}
    np.testing.assert_array_equal(metrics["entropy"].weight, MASK)


def test_the_gradient_on_logits_is_p_minus_onehot_and_prompts_get_none():
    got = jax.grad(loss)(jnp.asarray(LOGITS, jnp.float32))
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    want = (p - np.eye(7)[TARGETS]) * (MASK * WEIGHT)[..., None] / MASK.sum()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    assert not np.asarray(got)[~MASK].any()


def test_layout_and_saving_of_memory_reach_the_decoder():
    """They change no number, so the program is looked at."""
    cfg = DecoderConfig(vocab_size=7, embed_dim=8, ffn_dim=8, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4)

    def program(**settings):
        loss = make_loss(cfg, **settings)
        with jax.set_mesh(make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])):
            return str(jax.make_jaxpr(lambda params: loss(params, batch(), None)[0]["nll"].value)(param_shapes(cfg)))

    assert program().count("remat") < program(remat="full").count("remat")
    rows = "spec=P(('data', 'fsdp')"
    assert rows not in program()
    assert rows in program(rules=FSDP_TP)
