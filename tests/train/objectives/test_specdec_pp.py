"""Oracles: float64 loops with the same uniforms, finite differences. What is trained is what stops drafts, served."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaroo.infer.decode import Rows
from jaxaroo.infer.sampling import Sampling, pack_sampling
from jaxaroo.infer.speculative import loop, verify
from jaxaroo.infer.speculative.drafters import kangaroo as kangaroo_drafter
from jaxaroo.infer.speculative.drafters import small_model
from jaxaroo.infer.speculative.stop import acceptance_head
from jaxaroo.models import heads, kangaroo
from jaxaroo.models.decoder import DecoderConfig, forward, init_params, lm_head, unstack_layers
from jaxaroo.models.kangaroo import KangarooConfig
from jaxaroo.train.data.pipeline import Batch
from jaxaroo.train.objectives.specdec_pp import (
    SpecDecPPConfig,
    drafter_states,
    draw,
    make_drafts,
    make_loss,
    specdec_pp,
)

D, V, B, T = 8, 13, 2, 9
TARGET = DecoderConfig(
    vocab_size=V,
    embed_dim=D,
    ffn_dim=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    window=3,
    window_layers=(True, False),
    max_positions=64,
)
SMALL = DecoderConfig(
    vocab_size=V, embed_dim=6, ffn_dim=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=4, max_positions=64
)
DRAFTERS = {"small": SMALL, "kangaroo": KangarooConfig(target=TARGET, exit_layer=1)}
LOSS = SpecDecPPConfig(refusal_weight=4.0, keep=0.3, tile=3 * B)  # three tiles of three positions
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1, 0, 0]], np.int32)
MASK = np.array([[0, 1, 1, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 0, 0]], bool)
WEIGHTS = (MASK * np.array([[1.0], [0.25]])).astype(np.float32)
U, COIN = np.random.default_rng(2).random((2, B, T)).astype(np.float32)


@functools.cache
def params(name):
    target = init_params(TARGET, jax.random.key(0))
    target["norm"] += 0.3 * jax.random.normal(jax.random.key(3), (D,))
    target["head"] *= 2.0
    if name == "small":
        drafter, width = init_params(SMALL, jax.random.key(1)), SMALL
    else:
        drafter, width = kangaroo.init_params(DRAFTERS[name], jax.random.key(1)), TARGET
    head = heads.init_params(heads.AcceptanceConfig(target=width, blocks=2), jax.random.key(2))
    head = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(4), x.shape), head)
    head["head"] = {"weight": 0.2 * head["head"]["weight"], "bias": jnp.array([-0.7, 0.6])}  # sure of nothing
    return {"target": target, "drafter": drafter, "head": head}


def batch(segments=SEGMENTS):
    tokens = np.random.default_rng(1).integers(0, V, (B, T)).astype(np.int32)
    positions = np.stack([[np.sum(row[:t] == row[t]) for t in range(T)] for row in segments]).astype(np.int32)
    fields = (tokens, np.roll(tokens, -1, axis=1), positions, segments, MASK, WEIGHTS)
    return Batch(*map(jnp.asarray, fields))


@functools.partial(jax.jit, static_argnames="name")
def drafts_of(name, params, batch, u, coin):
    return make_drafts(TARGET, DRAFTERS[name], params, batch, u, coin, LOSS)


@functools.partial(jax.jit, static_argnames="name")
def states_of(name, params, tokens, batch):
    return drafter_states(TARGET, DRAFTERS[name], params, tokens, batch)


@functools.partial(jax.jit, static_argnames="name")
def terms_of(name, params, batch, key):
    terms, metrics = make_loss(TARGET, DRAFTERS[name], LOSS)(params, batch, key)
    return {k: (term.value, term.weight) for k, term in (terms | metrics).items()}


@functools.partial(jax.jit, static_argnames="name")
def loss_of(name, params, batch, key):
    value, weight = terms_of(name, params, batch, key)["cross_entropy"]
    return (value * weight).sum() / float(MASK.sum())


def softmax(z):
    e = np.exp(np.asarray(z, np.float64) - np.max(z))
    return e / e.sum()


def alone(name, params, tokens):
    """Logits of target and drafter and the drafter's last states, of one sequence by itself and without masks."""
    padded = np.zeros((1, T), np.int32)
    padded[0, : len(tokens)] = tokens
    return [np.asarray(x)[0, : len(tokens)] for x in read_alone(name, params, padded)]


@functools.partial(jax.jit, static_argnames="name")
def read_alone(name, params, row):
    at = jnp.arange(T, dtype=jnp.int32)[None]
    target, drafter = params["target"], params["drafter"]
    final = forward(TARGET, target, row, at).hidden
    if name == "small":
        state = forward(SMALL, drafter, row, at).hidden
        logits = lm_head(SMALL, drafter, state)
    else:
        early = forward(TARGET, target, row, at, stop_layer=1).hidden
        state = kangaroo.forward(DRAFTERS[name], drafter, early, at).hidden
        logits = lm_head(TARGET, target, state)
    return lm_head(TARGET, target, final), logits, state


def head_by_hand(head, x):
    """log-probabilities of refusal and acceptance, in float64."""
    head, x = jax.tree.map(lambda w: np.asarray(w, np.float64), head), x.astype(np.float64)
    for w, b in zip(head["blocks"]["weight"], head["blocks"]["bias"], strict=True):
        y = w @ x + b
        x = x + y / (1 + np.exp(-y))
    return np.log(softmax(head["head"]["weight"] @ x + head["head"]["bias"]))


def by_hand(name, u, coin):
    """Everything, token by token: mixed text, what is drawn, a, and the weighted loss of every position."""
    data, given = jax.device_get(batch()), params(name)
    mixed, drawn = data.tokens.copy(), np.zeros((B, T), bool)
    label, value = np.zeros((B, T)), np.zeros((B, T))
    for row in range(B):
        for segment in range(1, SEGMENTS[row].max() + 1):
            places = np.flatnonzero(SEGMENTS[row] == segment)
            z, w, _ = alone(name, given, data.tokens[row, places])
            for k, t in enumerate(places[:-1]):  # the next token, at t + 1, is drawn from what is said at t
                p, q = softmax(z[k]), softmax(w[k])
                Y, mass = 0, q[0]
                while mass <= u[row, t]:
                    Y, mass = Y + 1, mass + q[Y + 1]
                if MASK[row, t] and coin[row, t + 1] >= LOSS.keep:
                    mixed[row, t + 1], drawn[row, t + 1], label[row, t + 1] = Y, True, min(1.0, p[Y] / q[Y])
            states = alone(name, given, mixed[row, places])[2]
            for k, t in enumerate(places):
                a, (refused, accepted) = label[row, t], head_by_hand(given["head"], states[k])
                value[row, t] = drawn[row, t] * -(LOSS.refusal_weight * (1 - a) * refused + a * accepted)
    return mixed, drawn, label, value


# -------------------------------------------------------------------------------------------------- draws and mixture
def test_a_draw_is_the_first_token_beyond_the_share_and_its_label_the_ratio():
    draws = np.random.default_rng(0)
    p, q = (draws.dirichlet(np.full(V, 0.3), 200).astype(np.float32) for _ in range(2))
    u = draws.random(200).astype(np.float32)
    u[:3], q[1, :4], q[1] = 0, 0, q[1] / q[1, 4:].sum()  # what has no mass is never drawn, nor divided by
    q[1, :4] = 0
    Y, a = jax.jit(draw)(p, q, u)
    for i in range(200):
        mass = np.cumsum(q[i].astype(np.float64))
        want = next(x for x in range(V) if mass[x] > u[i] * mass[-1])
        assert Y[i] == want
        np.testing.assert_allclose(a[i], min(1.0, float(p[i, want]) / float(q[i, want])), rtol=1e-5)
    assert Y[1] >= 4
    assert 0.1 < np.mean(np.asarray(a) < 1) < 0.9


def test_draws_have_the_law_of_q_and_their_labels_the_mean_of_the_overlap():
    draws, n = np.random.default_rng(3), 4000
    p, q = (draws.dirichlet(np.ones(V)).astype(np.float32) for _ in range(2))
    u = (np.arange(n, dtype=np.float32) + 0.5) / n  # every share once: the law but for 1 / n
    Y, a = jax.jit(draw)(*(np.broadcast_to(d, (n, V)) for d in (p, q)), u)
    np.testing.assert_allclose(np.bincount(Y, minlength=V) / n, q, rtol=0, atol=1.5 / n)
    np.testing.assert_allclose(np.mean(a), np.minimum(p, q).sum(), rtol=0, atol=2 * V / n)


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.slow
def test_drafts_are_those_of_the_float64_loop_with_the_same_uniforms(name):
    got = drafts_of(name, params(name), batch(), U, COIN)
    mixed, drawn, label, _ = by_hand(name, U, COIN)
    np.testing.assert_array_equal(got.drawn, drawn)
    np.testing.assert_array_equal(got.mixed, mixed)
    np.testing.assert_allclose(got.label, label, rtol=0, atol=2e-5)
    before = np.pad(WEIGHTS[:, :-1], ((0, 0), (1, 0)))
    np.testing.assert_array_equal(got.weight, np.where(drawn, before, 0))
    assert 3 < drawn.sum() < MASK.sum()
    assert (np.asarray(got.mixed) != np.asarray(batch().tokens)).sum() > 3
    assert not drawn[SEGMENTS == 0].any()
    assert not drawn[0, 4]  # the first of a segment, though the target before it counts


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.slow
def test_the_whole_loss_is_that_of_the_float64_loop(name):
    key = jax.random.key(11)
    u, coin = (np.asarray(jax.random.uniform(k, (B, T))) for k in jax.random.split(key))
    got = terms_of(name, params(name), batch(), key)
    _, drawn, label, want = by_hand(name, u, coin)
    value, weight = got["cross_entropy"]
    np.testing.assert_allclose(np.where(drawn, value, 0), want, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(weight, drawn * np.array([[1.0], [0.25]], np.float32))
    for name, each in {"drawn": drawn, "acceptance": label, "weight": 4 * (1 - label) + label}.items():
        np.testing.assert_allclose(np.where(drawn, got[name][0], 0), drawn * each, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(got[name][1], drawn)


@pytest.mark.slow
def test_terms_are_counted_per_token_and_the_head_is_asked_of_both_classes():
    drafts = drafts_of("small", params("small"), batch(), U, COIN)
    logits = jnp.asarray(np.random.default_rng(5).normal(size=(B, T, 2)), jnp.float32)
    terms, metrics = specdec_pp(logits, drafts)
    assert {term.unit for term in (*terms.values(), *metrics.values())} == {"token"}
    for i in np.ndindex(B, T):
        refused, accepted = np.log(softmax(logits[i]))
        a = float(drafts.label[i])
        np.testing.assert_allclose(terms["cross_entropy"].value[i], -6 * (1 - a) * refused - a * accepted, atol=1e-4)
        np.testing.assert_allclose(metrics["predicted"].value[i], np.exp(accepted), atol=1e-5)


def test_every_step_draws_anew_and_keeps_its_share():
    found = [
        drafts_of("small", params("small"), batch(), *np.random.default_rng(i).random((2, B, T), np.float32))
        for i in range(60)
    ]
    may = np.pad(MASK[:, :-1], ((0, 0), (1, 0))) & (SEGMENTS > 0)
    may &= np.pad(SEGMENTS[:, :-1], ((0, 0), (1, 0))) == SEGMENTS
    share = np.mean([f.drawn for f in found], axis=0)
    assert not share[~may].any()
    assert abs(share[may].mean() - (1 - LOSS.keep)) < 0.05
    losses = [float(loss_of("small", params("small"), batch(), jax.random.key(i))) for i in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


# ---------------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("name", DRAFTERS)
def test_the_gradient_is_that_of_finite_differences_and_none_reaches_the_frozen(name):
    key, given = jax.random.key(11), params(name)
    grad = jax.jit(jax.grad(lambda p: loss_of(name, p, batch(), key)))(given)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves((grad["target"], grad["drafter"])))
    for part, leaf in (("blocks", "weight"), ("blocks", "bias"), ("head", "weight"), ("head", "bias")):
        slope = np.asarray(grad["head"][part][leaf])
        ends = []
        for step in (1e-2, -1e-2):  # along the sign, where the slope is largest and the noise least
            moved = given["head"][part] | {leaf: given["head"][part][leaf] + step * np.sign(slope)}
            ends.append(float(loss_of(name, given | {"head": given["head"] | {part: moved}}, batch(), key)))
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(np.abs(slope).sum(), rel=1e-2), (part, leaf)


# ------------------------------------------------------------------------------------------------- trained and served
S, N, ROWS = 48, 5, 4
PROMPTS = np.random.default_rng(6).integers(0, V, (ROWS, 3)).astype(np.int32)
SERVED = {
    "small": small_model.make_drafter(SMALL, N, "independent", 1, acceptance_head()),
    "kangaroo": kangaroo_drafter.make_drafter(DRAFTERS["kangaroo"], N, "independent", acceptance_head()),
}


def serving(name, given, threshold):
    """Weights as the loop takes them, a text of prompts, and what is asked."""
    drafter = unstack_layers(given["drafter"]) if name == "small" else given["drafter"]
    rule = given["head"] | {"threshold": jnp.float32(threshold)}
    key = "model" if name == "small" else "adapter"
    weights = loop.Weights(unstack_layers(given["target"]), {key: drafter, "stop": rule}, None)
    tokens = np.zeros((ROWS, S), np.int32)
    tokens[:, :3] = PROMPTS
    length, settings = np.full(ROWS, 3, np.int32), Sampling(temperature=1.0, max_tokens=24)
    arrays = pack_sampling([(settings, seed, 0) for seed in range(ROWS)], 0, V)
    return weights, tokens, Rows(arrays, length, length + 24, np.full((ROWS, 1), -1, np.int32))


@functools.partial(jax.jit, static_argnames="drafter")
def propose(drafter, weights, state, rows):
    return loop.draft(weights, drafter, state, rows)[0]


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.slow
def test_drafts_end_when_served_where_the_probabilities_of_training_say(name):
    """The product of what the objective's own forward pass and head find decides how many drafts each row has."""
    drafter, found = SERVED[name], set()
    weights, tokens, rows = serving(name, params(name), 1.0)
    state = loop.prefill(TARGET, weights, drafter, tokens, rows, chunk=16)
    whole = jax.device_get(propose(drafter, weights, state, rows))
    assert whole.valid.all()
    text = np.concatenate([np.asarray(state.rows.tokens)[:, :4], whole.tokens[:, 1:]], axis=1)[:, :T]  # N + 4 = T
    for half in (slice(0, 2), slice(2, 4)):
        data = batch(np.ones((B, T), np.int32))
        states = states_of(name, params(name), text[half], data)
        p = np.exp([[head_by_hand(params(name)["head"], np.asarray(x))[1] for x in row] for row in states])
        product = np.cumprod(p[:, 4:], axis=1)  # of drafts 1 to k
        for threshold in np.quantile(1 - product, [0.1, 0.3, 0.5, 0.7, 0.9]):
            weights, *_ = serving(name, params(name), threshold)
            tree = jax.device_get(propose(drafter, weights, state, rows))
            for row, line in enumerate(1 - product):
                # Draft k is drawn from a state that has read k - 1; it ends the draft, and is kept.
                want = next((k + 2 for k in range(N - 1) if line[k] > threshold), N)
                assert tree.valid[half][row].sum() - 1 == want, (threshold, line)
                np.testing.assert_array_equal(tree.tokens[half][row][: want + 1], whole.tokens[half][row][: want + 1])
                found.add(want)
    assert len(found) >= 3


# --------------------------------------------------------------------------------------------------------------- learn
OVERRATED, LONG = 6, 8  # tokens, and drafts of a chain


@functools.cache
def predictable():
    """The drafter is the target, but fond of tokens that the target avoids: what is drafted says how it will end."""
    target = jax.tree.map(jnp.copy, params("kangaroo")["target"])
    target["embed"] = target["embed"].at[:, 0].set(3.0)  # a number that is the same everywhere, as good as a bias
    target["layers"]["attn"]["o"] *= 0.3
    target["layers"]["mlp"]["down"] *= 0.3
    head = target["head"].at[:, 0].set(0.0)
    fond = lambda by: head.at[:OVERRATED, 0].set(by)
    return {"target": target | {"head": fond(-2.0)}, "drafter": target | {"head": fond(-0.3)}}


@functools.cache
def learned():
    """Of the untrained head and the trained one: parameters, and what it says of fresh drafts, with their labels."""
    cfg = heads.AcceptanceConfig(target=TARGET, blocks=2)
    loss, tx, frozen = make_loss(TARGET, TARGET), optax.adam(1e-2), predictable()
    T, rows = 16, 16

    def text(key):
        tokens = jax.random.randint(key, (rows, T), 0, V)
        ones = jnp.ones((rows, T), jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (rows, T))
        return Batch(tokens, jnp.roll(tokens, -1, axis=1), positions, ones, ones > 0, ones.astype(jnp.float32))

    def step(carry, key):
        head, state = carry

        def total(head):
            term = loss(frozen | {"head": head}, text(key), key)[0]["cross_entropy"]
            return jnp.sum(term.value * term.weight) / (rows * T)

        value, grad = jax.value_and_grad(total)(head)
        updates, state = tx.update(grad, state)
        return (optax.apply_updates(head, updates), state), value

    @jax.jit
    def train(head):
        return jax.lax.scan(step, (head, tx.init(head)), jax.random.split(jax.random.key(0), 200))

    @jax.jit
    def look(head):
        data = text(jax.random.key(99))
        u, coin = (jax.random.uniform(jax.random.key(i), (rows, T)) for i in (1, 2))
        drafts = make_drafts(TARGET, TARGET, frozen, data, u, coin)
        states = drafter_states(TARGET, TARGET, frozen, drafts.mixed, data)
        return drafts, jax.nn.softmax(heads.acceptance_logits(head, states))[..., 1]

    start = heads.init_params(cfg, jax.random.key(5))
    (end, _), losses = train(start)
    return start, end, losses, jax.device_get(look(end))


def run_served(drafter, head, threshold):
    """Steps by how many tokens they emitted, and drafts verified, over some seeds under the rejection rule."""
    emitted, drafted = np.zeros(LONG + 2), 0
    for seed in range(12):
        rule = head | {"threshold": jnp.float32(threshold)} if head else ()
        given = loop.Weights(*(unstack_layers(predictable()[name]) for name in ("target", "drafter")), None)
        given = given._replace(drafter={"model": given.drafter, "stop": rule})
        tokens = np.zeros((ROWS, S), np.int32)
        tokens[:, :3] = np.random.default_rng(seed).integers(0, V, (ROWS, 3))
        length, settings = np.full(ROWS, 3, np.int32), Sampling(temperature=1.0, max_tokens=40)
        arrays = pack_sampling([(settings, ROWS * seed + i, 0) for i in range(ROWS)], 0, V)
        rows = Rows(arrays, length, length + 40, np.full((ROWS, 1), -1, np.int32))
        state = loop.prefill(TARGET, given, drafter, tokens, rows, chunk=16)
        halt, exact = np.zeros(ROWS, bool), verify.rejection(1, "independent")
        tally = loop.decode(TARGET, given, drafter, exact, state, rows, halt, np.int32(99)).tally
        emitted, drafted = emitted + np.sum(tally.emitted, axis=0), drafted + int(np.sum(tally.drafted))
    return emitted, drafted


@pytest.mark.optimizer
@pytest.mark.slow
def test_it_learns_which_drafts_will_be_refused():
    _, _, losses, (drafts, p) = learned()
    assert losses[-20:].mean() < 0.7 * losses[:5].mean()
    a, said = drafts.label[drafts.drawn], p[drafts.drawn]
    overrated = drafts.mixed[drafts.drawn] < OVERRATED
    assert a[overrated].mean() < 0.2 < 0.9 < a[~overrated].mean()  # the task is what it is meant to be
    # How often a draft that is likelier to be accepted is said to be so: one half by chance.
    i, j = np.triu_indices(len(a), 1)
    apart = np.abs(a[i] - a[j]) > 0.3
    assert np.mean(((a[i] - a[j]) * (said[i] - said[j]) > 0)[apart]) > 0.9
    wanted = a / (a + 6 * (1 - a))  # refusals count six times
    assert abs(said.mean() - wanted.mean()) < 0.1


@pytest.mark.optimizer
@pytest.mark.proof
def test_served_it_ends_drafts_better_than_by_their_length():
    """Of as many drafts a step, more are accepted than in chains of a fixed length."""
    _, head, *_ = learned()
    emitted, drafted = run_served(small_model.make_drafter(TARGET, LONG, "independent"), None, 1.0)
    steps, accepted = emitted.sum(), np.arange(LONG + 2) - 1
    at_least = [0.0] + [emitted[accepted >= n].sum() / steps for n in range(1, LONG + 1)]
    by_length = lambda m: np.interp(m, range(LONG + 1), np.cumsum(at_least))  # accepted a step, of m drafts
    assert drafted == LONG * steps
    stopping = small_model.make_drafter(TARGET, LONG, "independent", 1, acceptance_head())
    for threshold in (0.3, 0.8):
        emitted, drafted = run_served(stopping, head, threshold)
        m, got = drafted / emitted.sum(), emitted @ accepted / emitted.sum()
        assert 2 < m < 0.6 * LONG
        assert got > 1.1 * by_length(m)
