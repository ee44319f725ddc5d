"""Scores of packed rows are those of each example alone; oracle: dense log-softmax in float64."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.jaxlib_ext.token_stats import token_stats
from jaxaroo.models.decoder import DecoderConfig, Model, init_params, logits, param_axes
from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.sharding.rules import FSDP_TP, FSDP_TP_SEQ, REPLICATED
from jaxaroo.train.data.pipeline import Batch, BatchConfig, Batches
from jaxaroo.train.data.tokenise import Encoded
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
            out["mask"][r, at + n // 3 : at + n] = 1  # in front of it is the prompt
            at += n
    batch = Batch(**{name: jnp.asarray(x) for name, x in out.items()})
    return batch._replace(mask=batch.mask == 1)


def places():
    """(row, where in it, example) of every example."""
    for r, row in enumerate(ROWS):
        at = 0
        for i in row:
            yield r, slice(at, at + len(EXAMPLES[i]) - 1), i
            at += len(EXAMPLES[i]) - 1


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"window": 4, "window_layers": (True, False)}])
@pytest.mark.slow
def test_scores_are_those_of_each_example_alone(changes):
    cfg = dataclasses.replace(CFG, **changes)
    params = init_params(cfg, jax.random.key(0))
    scores = score_targets(cfg, params, packed(), mean_logits=True)
    mask = np.asarray(packed().mask)
    assert 0 < mask.sum() < mask.size
    longest = max(map(len, EXAMPLES))  # what follows an example is not seen from it
    rows = np.stack([np.pad(ids, (0, longest - len(ids))) for ids in EXAMPLES])
    alone = np.asarray(logits(Model(cfg, params), jnp.asarray(rows[:, :-1])), np.float64)
    for row, place, i in places():
        z = alone[i, : len(EXAMPLES[i]) - 1]
        p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        want, own = np.log(p[np.arange(len(p)), EXAMPLES[i][1:]]), mask[row, place]
        np.testing.assert_allclose(scores.logp[row, place], want * own, rtol=0, atol=2e-6)
        np.testing.assert_allclose(scores.entropy[row, place], -(p * np.log(p)).sum(-1) * own, rtol=0, atol=2e-6)
        np.testing.assert_array_equal(scores.greedy[row, place], (z.argmax(-1) == EXAMPLES[i][1:]) * own)
        np.testing.assert_allclose(scores.mean_logit[row, place], z.mean(-1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("changes", [{}, {"window": 4, "window_layers": (True, False)}])
@pytest.mark.slow
def test_a_prompt_that_stands_once_is_seen_by_all_its_answers_and_by_nothing_else(changes):
    """Values and gradients are those of every sequence written out in a row of its own."""
    cfg = dataclasses.replace(CFG, **changes)
    params = init_params(cfg, jax.random.key(0))
    rng = np.random.default_rng(0)

    def sequences(i):
        rng = np.random.default_rng(i)
        prompt = rng.integers(0, 19, 3 + i)
        answers = [rng.integers(0, 19, n) for n in (4, 2, 5)]
        answers[2][:2] = answers[0][:2]  # scored, and so not shared
        ids = [np.concatenate([prompt, answer]).astype(np.int32) for answer in answers]
        if i == 3:  # the second has a prompt of its own, which the third does not see, though it begins like the first
            ids[1][0] = (ids[1][0] + 1) % 19
        return tuple(Encoded(x, np.arange(len(x)) >= len(prompt)) for x in ids)

    encode = lambda row: sequences(row["i"]) if row["i"] < 4 else (Encoded(*[np.ones(18, np.int32)] * 2),) * 3
    settings = BatchConfig(size=2, max_length=45, shuffle=False)
    batch = next(Batches([{"i": i} for i in range(6)], encode, settings, seed=0, parts=3))  # the last two fit nowhere
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    apart = [e for i in range(4) for e in sequences(i)]
    assert int((batch.segments > 0).sum()) == sum(len(e.ids) - 1 for e in apart) - 2 * sum(2 + i for i in range(3))
    weights = rng.normal(size=(2, 45)).astype(np.float32)
    longest = max(len(e.ids) for e in apart)
    ids, shares = np.zeros((len(apart), longest), np.int32), np.zeros((len(apart), longest - 1), np.float32)
    where = [(row, s) for row in range(2) for s in range(1, int(batch.segments[row].max()) + 1)]
    for i, (e, (row, segment)) in enumerate(zip(apart, where, strict=True)):
        ids[i, : len(e.ids)] = e.ids  # what follows an example is not seen from it
        own = (batch.segments[row] == segment) & batch.mask[row]
        shares[i, : len(e.ids) - 1][e.scored[1:]] = weights[row][own]

    def together(params):
        return jnp.sum(weights * score_targets(cfg, params, batch).logp)

    def one_by_one(params):
        z = jax.nn.log_softmax(logits(Model(cfg, params), jnp.asarray(ids[:, :-1])))
        return jnp.sum(shares * jnp.take_along_axis(z, jnp.asarray(ids[:, 1:, None]), axis=-1)[..., 0])

    (got, grad), (want, wanted) = (jax.jit(jax.value_and_grad(f))(params) for f in (together, one_by_one))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)  # of some thirty terms of about 3 that cancel
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), grad, wanted)


@pytest.mark.slow
def test_scores_that_stay_still_have_their_values_and_no_gradient():
    params, batch = init_params(CFG, jax.random.key(0)), packed()
    still = batch.segments == 2
    assert 0 < int((batch.mask & still).sum()) < int(batch.mask.sum())
    wanted = score_targets(CFG, params, batch, squares=True)
    got = score_targets(CFG, params, batch, squares=True, still=still)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, wanted)
    moved = jax.jit(jax.grad(lambda p: score_targets(CFG, p, batch, still=still).logp.sum()))(params)
    only = jax.jit(jax.grad(lambda p: jnp.where(still, 0.0, score_targets(CFG, p, batch).logp).sum()))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), moved, only)


@pytest.mark.slow
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
    scored = jax.jit(jax.value_and_grad(score))
    for row, place, _ in places():
        at = place.stop - 2
        value, gradient = scored(vectors, row, at)
        seen = np.abs(gradient).sum(-1) > 0
        want = np.zeros_like(seen)
        want[row, place.start : at + 1] = True
        np.testing.assert_array_equal(seen, want)
        assert float(value) == pytest.approx(float(direct[row, at].sum()), abs=1e-5)


@pytest.mark.slow
def test_half_precision_computes_in_half_and_scores_in_single():
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    params = init_params(cfg, jax.random.key(0))
    batch = packed()
    scores = score_targets(cfg, params, batch)
    assert (scores.hidden.dtype, scores.logp.dtype) == (jnp.bfloat16, jnp.float32)
    half = token_stats(scores.hidden, params["head"].astype(jnp.bfloat16), batch.targets, batch.mask)
    np.testing.assert_array_equal(scores.logp, half.logp)  # the table too is in half
    assert half.logp.any()
    exact = score_targets(CFG, params, packed())
    row, place, _ = next(places())
    np.testing.assert_allclose(scores.logp[row, place], exact.logp[row, place], rtol=0, atol=0.05)


MESHES = [dict(data=2, fsdp=4), dict(fsdp=2, tensor=4), dict(data=2, tensor=2, sequence=2)]


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.slow
def test_devices_score_their_own_tokens_and_nobody_elses(shape):
    """Losses and gradients of one device; and no device is sent the states or the table of others."""
    cfg = dataclasses.replace(CFG, vocab_size=20 * 1024, num_heads=4, num_kv_heads=4)
    params = init_params(cfg, jax.random.key(0))
    batch = jax.tree.map(lambda x: jnp.concatenate([x] * 4), packed())

    def loss(params, batch, rules):
        scores = score_targets(cfg, params, batch, rules=rules, mean_logits=True)
        value = jnp.sum(jnp.sin(scores.logp) * jnp.cos(scores.entropy) * jnp.exp(-scores.lse / 9))
        return value, scores.mean_logit

    step = jax.value_and_grad(loss, has_aux=True)
    want = jax.jit(step, static_argnums=2)(params, batch, REPLICATED)
    rules = FSDP_TP_SEQ if "sequence" in shape else FSDP_TP
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **shape}))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, rules.shardings(mesh, param_axes(cfg), params))
        rows = jax.sharding.NamedSharding(mesh, rules.spec("batch", "seq"))
        program = jax.jit(step, static_argnums=2).lower(placed, jax.device_put(batch, rows), rules).compile()
        got = program(placed, jax.device_put(batch, rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), got, want)
    text, ways = program.as_text(), mesh.size // mesh.shape["tensor"]
    vocab = cfg.vocab_size // mesh.shape["tensor"]
    tokens = batch.tokens.size // ways
    made = set(re.findall(rf"f32\[(\d+),{min(4096, vocab)}\]\S* dot\(", text))
    # Tiles of logits: tokens of one device, rows of one part of the vocabulary; and the gradient of such rows.
    assert made == {str(tokens), str(cfg.embed_dim)}
    assert tokens != cfg.embed_dim
