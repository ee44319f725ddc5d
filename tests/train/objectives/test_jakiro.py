"""Oracles: all terms by loops in float64, their gradients by finite differences of the loops; examples one by one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaroo.models import decoder
from jaxaroo.models import jakiro as network
from jaxaroo.models.decoder import DecoderConfig
from jaxaroo.train.data.pipeline import Batch, count_units
from jaxaroo.train.objectives.eagle import EagleLossConfig, eagle
from jaxaroo.train.objectives.jakiro import JakiroLossConfig, jakiro, jakiro_mixture, make_loss
from jaxaroo.train.state import init_state
from jaxaroo.train.step import make_train_step

V, D, B, T = 11, 8, 2, 9
TARGET = DecoderConfig(
    vocab_size=V, embed_dim=D, ffn_dim=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, rope_theta=100.0
)
CFGS = {kind: network.JakiroConfig(target=TARGET, kind=kind) for kind in ("contrastive", "mixture")}
QUIET = JakiroLossConfig(guess=EagleLossConfig(noise=0.0, tile=8))  # 4 of every row's 9 tokens at a time
RNG = np.random.default_rng(0)
# Row 0: examples of 5 and 2 tokens, then padding. Row 1: one of 9.
SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 0, 0], [1] * 9], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1, 0, 0], [*range(9)]], np.int32)
MASK = np.array([[1, 1, 0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 1, 1, 1, 1]], bool)
WEIGHT = MASK * np.array([[1, 1, 1, 1, 1, 0.5, 0.5, 0, 0], [2.0] * 9])
BATCH = Batch(
    jnp.asarray(RNG.integers(0, V, (B, T)), jnp.int32),
    jnp.asarray(RNG.integers(0, V, (B, T)), jnp.int32),
    jnp.asarray(POSITIONS),
    jnp.asarray(SEGMENTS),
    jnp.asarray(MASK),
    jnp.asarray(WEIGHT, jnp.float32),
)
FEATURES, MAIN, CONTRAST = 1.5 * RNG.normal(size=(3, B, T, D))
MAIN = np.roll(FEATURES, -1, axis=1) + 0.6 * MAIN  # right about half of the time
CONTRAST = np.roll(FEATURES, -2, axis=1) + 0.6 * CONTRAST
LOG_W = np.log([0.7, 0.3]) * RNG.random((B, T, 1)) * 2
LOG_W = LOG_W - np.log(np.exp(LOG_W).sum(-1, keepdims=True))
HEAD = RNG.normal(size=(V, D))
ONE_ON = [(0, 0), (0, 1), (0, 2), (0, 3), (0, 5), *((1, t) for t in range(8))]  # pairs with a next place, by hand
TWO_ON = [(0, 0), (0, 1), (0, 2), *((1, t) for t in range(7))]
NAMES = ["regression", "cross_entropy", "acceptance", "agreement"]
BOTH = [*NAMES, *(f"{name}_contrast" for name in NAMES)]


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def distance(guess, wanted):
    d = np.abs(guess - wanted)
    return sum(x * x / 2 if x < 1 else x - 0.5 for x in d) / D


def count(sums, b, t, distance, q):
    """Add what one guess says of place t of row b."""
    m, p = WEIGHT[b, t], softmax(HEAD @ FEATURES[b, t])
    sums += [
        m * distance,
        0.1 * m * -sum(p * np.log(q)),
        MASK[b, t] * np.minimum(p, q).sum(),
        MASK[b, t] * (p.argmax() == q.argmax()),
    ]


def oracle(main, contrast):
    sums = np.zeros((2, 4))
    for b, t in ONE_ON:
        count(sums[0], b, t + 1, distance(main[b, t], FEATURES[b, t + 1]), softmax(HEAD @ main[b, t]))
    for b, t in TWO_ON:
        count(sums[1], b, t + 2, distance(contrast[b, t], FEATURES[b, t + 2]), softmax(HEAD @ contrast[b, t]))
    sums[1, :2] *= 0.5
    return sums.reshape(-1)


def oracle_mixture(branches, log_w):
    sums = np.zeros(4)
    for b, t in ONE_ON:
        w = np.exp(log_w[b, t])
        away = sum(w[i] * distance(branches[b, t, i], FEATURES[b, t + 1]) for i in range(2))
        count(sums, b, t + 1, away, sum(w[i] * softmax(HEAD @ branches[b, t, i]) for i in range(2)))
    return sums


def summed(terms, metrics):
    return {name: jnp.sum(t.value * t.weight) for name, t in (terms | metrics).items()}


def loss_of(parts):
    return sum(value for name, value in parts.items() if name.startswith(("regression", "cross_entropy")))


def as_f32(*arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


on_arrays = jax.jit(lambda m, c, f, h: summed(*jakiro(m, c, f, h, BATCH, QUIET)))
mixture_on_arrays = jax.jit(lambda b, w, f, h: summed(*jakiro_mixture(b, w, f, h, BATCH, QUIET.guess)))


# ---------------------------------------------------------------------------------------------------------- on arrays
def test_terms_and_metrics_match_float64_loops():
    got, want = on_arrays(*as_f32(MAIN, CONTRAST, FEATURES, HEAD)), oracle(MAIN, CONTRAST)
    assert sorted(got) == sorted(BOTH)
    np.testing.assert_allclose([got[name] for name in BOTH], want, rtol=1e-5)
    assert 2 < want[3] < 9  # of 11 that count
    assert 2 < want[7] < 8  # of 9


def test_a_mixtures_terms_and_metrics_match_float64_loops():
    branches = np.stack([MAIN, CONTRAST], axis=2)
    got = mixture_on_arrays(*as_f32(branches, LOG_W, FEATURES, HEAD))
    assert sorted(got) == sorted(NAMES)
    np.testing.assert_allclose([got[name] for name in NAMES], oracle_mixture(branches, LOG_W), rtol=1e-5)


@pytest.mark.parametrize("kind", CFGS)
def test_gradients_are_those_of_the_loops_and_the_targets_side_gets_none(kind):
    if kind == "contrastive":
        on, starts, of = on_arrays, (MAIN, CONTRAST), lambda *a: oracle(*a)[[0, 1, 4, 5]].sum()
    else:
        on, starts = mixture_on_arrays, (np.stack([MAIN, CONTRAST], axis=2), LOG_W)
        of = lambda *a: oracle_mixture(*a)[:2].sum()
    got = jax.jit(jax.grad(lambda *a: loss_of(on(*a)), argnums=(0, 1, 2, 3)))(*as_f32(*starts, FEATURES, HEAD))
    assert not any(np.asarray(g).any() for g in got[2:])
    assert not any(np.asarray(g)[0, 6:].any() for g in got[:2])  # the last place of an example, and padding
    for i, b, t in [(i, *place) for i in range(2) for place in ((0, 0), (0, 2), (1, 3), (1, 6))]:
        for inner in np.ndindex(starts[i].shape[2:]):
            up, down = ([x.copy() for x in starts] for _ in range(2))
            up[i][(b, t, *inner)] += 1e-5
            down[i][(b, t, *inner)] -= 1e-5
            assert float(got[i][(b, t, *inner)]) == pytest.approx((of(*up) - of(*down)) / 2e-5, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_the_contrast_is_held_against_what_is_exactly_two_ahead(shift):
    """A sequence of features of which only the right shift is a perfect guess."""
    right = np.roll(FEATURES, -1, axis=1)
    got = on_arrays(*as_f32(right, np.roll(FEATURES, -shift, axis=1), FEATURES, HEAD))
    assert float(got["regression"]) == 0
    number = sum(MASK[b, t + 2] for b, t in TWO_ON)
    if shift == 2:
        assert float(got["regression_contrast"]) == 0
        np.testing.assert_allclose([got["acceptance_contrast"], got["agreement_contrast"]], number, rtol=1e-5)
    else:
        assert float(got["regression_contrast"]) > 1
        assert float(got["acceptance_contrast"]) < 0.9 * number


def test_a_mixture_of_one_branch_is_eagle():
    branches = np.stack([CONTRAST, MAIN], axis=2)
    alone = np.broadcast_to([-200.0, 0.0], (B, T, 2))
    got = mixture_on_arrays(*as_f32(branches, alone, FEATURES, HEAD))
    want = jax.jit(lambda *a: summed(*eagle(*a, BATCH, QUIET.guess)))(*as_f32(MAIN, FEATURES, HEAD))
    for name in NAMES:
        assert float(got[name]) == pytest.approx(float(want[name]), rel=1e-6)


# ------------------------------------------------------------------------------------------------ with forward passes
@functools.cache
def weights(kind):
    """The target's, made louder so that its distributions differ from place to place, and a drafter's."""
    target = jax.tree.map(lambda w: 2.0 * w, decoder.init_params(TARGET, jax.random.key(1)))
    return {"drafter": network.init_params(CFGS[kind], jax.random.key(2)), "target": target}


@functools.cache
def value_and_grad(kind):
    loss = make_loss(CFGS[kind], QUIET)

    def run(params, batch):
        parts = summed(*loss(params, batch, jax.random.key(0)))
        return loss_of(parts), parts

    return jax.jit(jax.value_and_grad(run, has_aux=True))


@pytest.mark.parametrize("kind", CFGS)
@pytest.mark.slow
def test_packed_rows_equal_examples_alone(kind):
    """Of each row the examples, each at the head of a row of its own: same terms, and same gradients."""
    both = [slice(0, 5), slice(5, 7)]
    cut = lambda x, s: jnp.pad(x[0, s], (0, T - (s.stop - s.start)))
    alone = jax.tree.map(lambda x: jnp.stack([cut(x, s) for s in both]), BATCH)
    first = jax.tree.map(lambda x: x.at[1].set(jnp.zeros_like(x[1])), BATCH)  # row 0 and an empty one
    (_, parts), grads = value_and_grad(kind)(weights(kind), first)
    (_, apart), grads_apart = value_and_grad(kind)(weights(kind), alone)
    for name, value in parts.items():
        assert float(value) == pytest.approx(float(apart[name]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(grads["drafter"]), jax.tree.leaves(grads_apart["drafter"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CFGS)
@pytest.mark.slow
def test_no_gradient_reaches_the_target_and_all_of_the_drafter_has_one(kind):
    _, grads = value_and_grad(kind)(weights(kind), BATCH)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads["target"]))
    assert all(np.asarray(g).any() for g in jax.tree.leaves(grads["drafter"]))
    assert all(np.asarray(g).any() for g in grads["drafter"]["router"])  # each of its rows


def test_the_loss_is_that_of_the_networks_guesses():
    """The pieces put together by hand: which guess goes where, and what it is held against."""
    place = (BATCH.targets, BATCH.positions)
    same = SEGMENTS[:, :, None] == SEGMENTS[:, None, :]
    mask = jnp.asarray(same & np.tril(np.ones((T, T), bool)) & (SEGMENTS > 0)[:, :, None])
    for kind, go, on in (
        ("contrastive", network.forward, on_arrays),
        ("mixture", network.forward_mixture, mixture_on_arrays),
    ):
        drafter, target = weights(kind)["drafter"], weights(kind)["target"]
        features = jax.jit(functools.partial(decoder.forward, TARGET))(
            target, BATCH.tokens, BATCH.positions, mask
        ).hidden
        out = jax.jit(functools.partial(go, CFGS[kind]))(drafter, target, features, *place, mask)
        want = on(*out[:2], features, target["head"])
        (_, got), _ = value_and_grad(kind)(weights(kind), BATCH)
        for name, value in want.items():
            assert float(got[name]) == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.slow
def test_the_second_guess_can_be_left_out_and_the_drafter_hears_noise():
    def terms(loss_cfg):
        return jakiro(*as_f32(MAIN, CONTRAST, FEATURES, HEAD), BATCH, loss_cfg)

    (alone, measured), (both, _) = terms(dataclasses.replace(QUIET, contrast_weight=0.0)), terms(QUIET)
    assert [*alone, *measured] == NAMES
    assert [*both] == ["regression", "cross_entropy", "regression_contrast", "cross_entropy_contrast"]
    (_, quiet), _ = value_and_grad("contrastive")(weights("contrastive"), BATCH)
    loud = make_loss(CFGS["contrastive"], JakiroLossConfig(guess=dataclasses.replace(QUIET.guess, noise=0.2)))
    noisy = jax.jit(lambda *args: summed(*loud(*args)))(weights("contrastive"), BATCH, jax.random.key(0))
    assert abs(float(quiet["regression"]) - float(noisy["regression"])) > 0.1


@pytest.mark.optimizer
@pytest.mark.parametrize("kind", CFGS)
@pytest.mark.slow
def test_it_learns(kind):
    tx = optax.adam(3e-3)
    state = init_state(weights(kind)["drafter"], tx, frozen={"target": weights(kind)["target"]})
    state = jax.tree.map(jnp.copy, state)  # the step eats it
    combine = lambda params, frozen: {"drafter": params, **frozen}
    step = make_train_step(make_loss(CFGS[kind], QUIET), tx, count_units, combine=combine)
    window = jax.tree.map(lambda x: x[None], BATCH._replace(weights=jnp.asarray(MASK, jnp.float32)))
    seen = []
    for _ in range(150):
        state, metrics = step(state, window)
        seen.append({name: float(value) for name, value in metrics.items()})
    first, last = seen[0], seen[-1]
    assert last["loss"] < 0.5 * first["loss"]
    assert last["agreement"] > first["agreement"] + 0.3
    if kind == "contrastive":
        assert last["agreement_contrast"] > first["agreement_contrast"] + 0.3
        assert last["regression_contrast"] < 0.3 * first["regression_contrast"]


@pytest.mark.errors
def test_a_weight_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match=r"contrast_weight: found -1.0; expected at least 0"):
        JakiroLossConfig(contrast_weight=-1.0)
