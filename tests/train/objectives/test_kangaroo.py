"""Oracles: float64 loops over tokens of the vocabulary, and finite differences. Equivalence: packed = row by row."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaroo.models import kangaroo
from jaxaroo.models.decoder import DecoderConfig, forward, init_params, lm_head
from jaxaroo.models.kangaroo import KangarooConfig
from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.sharding.rules import FSDP_TP
from jaxaroo.train.data.pipeline import Batch
from jaxaroo.train.objectives.agreement import Agreement
from jaxaroo.train.objectives.kangaroo import kangaroo_loss, make_loss, run

TARGET = DecoderConfig(
    vocab_size=13,
    embed_dim=8,
    ffn_dim=12,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    window=3,
    window_layers=(True, False, False),
)
CFG = KangarooConfig(target=TARGET, exit_layer=2)
B, T, V = 2, 7, 13
RNG = np.random.default_rng(0)
MASK = np.array([[0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1, 1]], bool)
WEIGHTS = (MASK * np.array([[1.0], [0.25]])).astype(np.float32)


@functools.cache
def params():
    target = init_params(TARGET, jax.random.key(0))
    target["norm"] += 0.3 * jax.random.normal(jax.random.key(3), (8,))
    return {"target": target, "drafter": kangaroo.init_params(CFG, jax.random.key(1))}


def batch(segments=None):
    """One example a row, or those of `segments`, with positions from 0 in each."""
    tokens = np.random.default_rng(1).integers(0, V, (B, T)).astype(np.int32)
    segments = np.ones((B, T), np.int32) if segments is None else np.asarray(segments, np.int32)
    positions = np.stack([[np.sum(row[:t] == row[t]) for t in range(T)] for row in segments]).astype(np.int32)
    return Batch(*map(jnp.asarray, (tokens, np.roll(tokens, -1, axis=1), positions, segments, MASK, WEIGHTS)))


@jax.jit
def terms_of(params, batch):
    terms, metrics = make_loss(CFG)(params, batch, None)
    return {name: (term.value, term.weight) for name, term in (terms | metrics).items()}


@jax.jit
def loss_of(drafter, batch):
    value, weight = terms_of(params() | {"drafter": drafter}, batch)["soft_nll"]
    return (value * weight).sum() / float(MASK.sum())


def by_hand(z, w):
    """Cross-entropy, overlap and whether the modes agree, of one position's logits in float64."""
    p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (z.astype(np.float64), w.astype(np.float64)))
    cross = -sum(p[x] * np.log(q[x]) for x in range(len(p)))
    return cross, sum(min(p[x], q[x]) for x in range(len(p))), float(np.argmax(p) == np.argmax(q))


def test_terms_are_weighted_per_token_and_metrics_counted_per_token():
    values = Agreement(*(jnp.asarray(RNG.random((B, T)), jnp.float32) for _ in range(3)))
    terms, metrics = kangaroo_loss(values, batch())
    assert {name: term.unit for name, term in (terms | metrics).items()} == {
        "soft_nll": "token",
        "acceptance": "token",
        "agreement": "token",
    }
    np.testing.assert_array_equal(terms["soft_nll"].value, values.cross_entropy)
    np.testing.assert_array_equal(terms["soft_nll"].weight, WEIGHTS)
    np.testing.assert_array_equal(metrics["acceptance"].value, values.acceptance)
    np.testing.assert_array_equal(metrics["agreement"].value, values.same_mode)
    np.testing.assert_array_equal(metrics["acceptance"].weight, MASK)
    np.testing.assert_array_equal(metrics["agreement"].weight, MASK)


@pytest.mark.slow
def test_the_whole_loss_is_exit_state_adapter_head_against_the_target_at_the_same_position():
    data = batch()
    got = terms_of(params(), data)
    target, drafter = params()["target"], params()["drafter"]
    final = forward(TARGET, target, data.tokens, data.positions).hidden
    early = forward(TARGET, target, data.tokens, data.positions, stop_layer=2).hidden
    y = kangaroo.forward(CFG, drafter, early, data.positions).hidden
    z, w = (np.asarray(lm_head(TARGET, target, x)) for x in (final, y))
    want = np.array([[by_hand(z[b, t], w[b, t]) for t in range(T)] for b in range(B)])
    for i, name in enumerate(("soft_nll", "acceptance", "agreement")):
        np.testing.assert_allclose(got[name][0], want[..., i], rtol=0, atol=2e-5)


@pytest.mark.slow
def test_packed_segments_are_as_good_as_rows_of_their_own():
    segments = [[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]]
    data = batch(segments)
    got = terms_of(params(), data)["soft_nll"][0]
    for row, start, stop in ((0, 0, 3), (0, 3, 7), (1, 0, 5)):
        moved = np.zeros((B, T), np.int32)
        moved[:, : stop - start] = data.tokens[row, start:stop]
        alone = batch()._replace(tokens=jnp.asarray(moved))
        want = terms_of(params(), alone)["soft_nll"][0]
        np.testing.assert_allclose(got[row, start:stop], want[0, : stop - start], rtol=0, atol=2e-5)


def at(tree, path):
    return functools.reduce(lambda node, name: node[name], filter(None, path.split("/")), tree)


@pytest.mark.slow
def test_the_gradient_is_that_of_finite_differences():
    data, drafter = batch(), params()["drafter"]
    grad = jax.jit(jax.grad(loss_of))(drafter, data)
    for path in ("norm_in", "norm_out", "attn/q", "attn/k", "attn/v", "attn/o"):
        way = np.sign(at(grad, path)).astype(np.float32)  # the steepest in the largest step: the least noise
        moved = []
        for step in (2e-3, -2e-3):
            *parents, last = path.split("/")
            shifted = jax.tree.map(lambda x: x, drafter)  # new dicts
            at(shifted, "/".join(parents))[last] = at(drafter, path) + step * way
            moved.append(float(loss_of(shifted, data)))
        slope = (moved[0] - moved[1]) / 4e-3
        assert slope == pytest.approx(float(np.abs(at(grad, path)).sum()), rel=2e-2), path


@pytest.mark.slow
def test_no_gradient_reaches_the_target():
    def total(params):
        value, weight = terms_of(params, batch())["soft_nll"]
        return (value * weight).sum()

    grads = jax.jit(jax.grad(total))(params())
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(grads["target"]))
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads["drafter"]))


def test_an_adapter_that_gives_the_targets_states_pays_the_entropy_alone():
    """Deep layers that do nothing, and the target's own norm: p = q."""
    target = jax.tree.map(lambda x: x, params()["target"])
    target["layers"]["attn"]["o"] *= np.float32([1, 1, 0])[:, None, None, None]
    target["layers"]["mlp"]["down"] *= np.float32([1, 1, 0])[:, None, None]
    drafter = params()["drafter"] | {"norm_out": target["norm"]}
    drafter["attn"] = drafter["attn"] | {"o": jnp.zeros_like(drafter["attn"]["o"])}
    got = terms_of({"target": target, "drafter": drafter}, batch())
    z = np.asarray(lm_head(TARGET, target, run(CFG, drafter, target, batch())[0]), np.float64)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    np.testing.assert_allclose(got["soft_nll"][0], -(p * np.log(p)).sum(-1), rtol=0, atol=2e-5)
    np.testing.assert_allclose(got["acceptance"][0], 1.0, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(got["agreement"][0], 1.0)


@pytest.mark.optimizer
@pytest.mark.slow
def test_it_learns():
    """Loss falls and drafts are accepted more often; with data that says nothing, only the target teaches."""
    tx = optax.adam(1e-2)

    @jax.jit
    def train(drafter):
        def step(carry, _):
            drafter, state = carry
            loss, grad = jax.value_and_grad(loss_of)(drafter, batch())
            updates, state = tx.update(grad, state)
            return (optax.apply_updates(drafter, updates), state), loss

        return jax.lax.scan(step, (drafter, tx.init(drafter)), None, length=150)

    (learned, _), losses = train(params()["drafter"])
    before, after = (terms_of(params() | {"drafter": d}, batch()) for d in (params()["drafter"], learned))
    mean = lambda terms, name: float(np.asarray(terms[name][0])[MASK].mean())
    assert losses[-1] < losses[0]
    assert mean(after, "acceptance") > mean(before, "acceptance") + 0.1
    assert mean(after, "agreement") > mean(before, "agreement")


def test_layout_and_saving_of_memory_reach_the_networks():
    """They change no number, so the program is looked at."""
    shapes = jax.eval_shape(params)

    def program(remat="none", **settings):
        loss = make_loss(CFG, remat=remat, **settings)
        with jax.set_mesh(make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])):
            return str(jax.make_jaxpr(lambda p: loss(p, batch(), None)[0]["soft_nll"].value)(shapes))

    assert program().count("remat") < program(remat="full").count("remat")
    policies = lambda remat: re.findall(r"policy=(None|\S+)", program(remat))
    assert policies("full").count("None") == policies("dots").count("None") + 1  # the comparison's has none either
    rows = "spec=P(('data', 'fsdp')"
    assert rows not in program()
    assert program(rules=FSDP_TP).count(rows) > 6  # target, adapter, and both heads
