"""Oracles: both terms by loops in float64, their gradient by finite differences of the loops; rows one by one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaroo.models import decoder
from jaxaroo.models import eagle as network
from jaxaroo.models.decoder import DecoderConfig
from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.sharding.rules import FSDP_TP
from jaxaroo.train.data.pipeline import Batch, count_units
from jaxaroo.train.objectives.eagle import EagleLossConfig, eagle, make_loss, see_target, smooth_l1
from jaxaroo.train.state import init_state
from jaxaroo.train.step import make_train_step

V, D, B, T = 11, 8, 2, 9
TARGET = DecoderConfig(
    vocab_size=V, embed_dim=D, ffn_dim=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, rope_theta=100.0
)
CFG = network.EagleConfig(target=TARGET)
QUIET = EagleLossConfig(noise=0.0)
RNG = np.random.default_rng(0)
# Row 0: examples of 4 and 3 tokens, then padding. Row 1: one of 9. First targets count too: they have no pair.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 9], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0], [*range(9)]], np.int32)
MASK = np.array([[1, 1, 0, 1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0, 1, 1, 1]], bool)
WEIGHT = MASK * np.array([[1, 1, 1, 1, 0.5, 0.5, 0.5, 0, 0], [2.0] * 9])
BATCH = Batch(
    jnp.asarray(RNG.integers(0, V, (B, T)), jnp.int32),
    jnp.asarray(RNG.integers(0, V, (B, T)), jnp.int32),
    jnp.asarray(POSITIONS),
    jnp.asarray(SEGMENTS),
    jnp.asarray(MASK),
    jnp.asarray(WEIGHT, jnp.float32),
)
FEATURES, NOISE = 1.5 * RNG.normal(size=(2, B, T, D))
GUESSED = np.roll(FEATURES, -1, axis=1) + 0.6 * NOISE  # right about half of the time
HEAD = RNG.normal(size=(V, D))
PAIRS = [(0, 0), (0, 1), (0, 2), (0, 4), (0, 5), *((1, t) for t in range(8))]  # those with a next place, by hand


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


NAMES = ["regression", "cross_entropy", "acceptance", "agreement"]


def oracle(guessed):
    """Sums over pairs: regression, cross-entropy, acceptance, agreement."""
    sums = np.zeros(4)
    for b, t in PAIRS:
        m, counts = WEIGHT[b, t + 1], MASK[b, t + 1]
        for d in np.abs(guessed[b, t] - FEATURES[b, t + 1]):
            sums[0] += m * (d * d / 2 if d < 1 else d - 0.5) / D
        p, q = softmax(HEAD @ FEATURES[b, t + 1]), softmax(HEAD @ guessed[b, t])
        sums[1] += 0.1 * m * -sum(p * np.log(q))
        sums[2] += counts * np.minimum(p, q).sum()
        sums[3] += counts * (p.argmax() == q.argmax())
    return sums


def summed(terms, metrics):
    return {name: jnp.sum(t.value * t.weight) for name, t in (terms | metrics).items()}


@functools.cache
def on_arrays(cfg=QUIET):
    return jax.jit(lambda g, f, h: summed(*eagle(g, f, h, BATCH, cfg)))


def as_f32(*arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


# ---------------------------------------------------------------------------------------------------------- on arrays
@pytest.mark.parametrize("tile", [1, 5, 8, 256])  # of every row 1, 2 (not a divisor of 9), 4 (nor this), all
def test_terms_and_metrics_match_float64_loops(tile):
    got, want = on_arrays(dataclasses.replace(QUIET, tile=tile))(*as_f32(GUESSED, FEATURES, HEAD)), oracle(GUESSED)
    np.testing.assert_allclose([got[name] for name in NAMES], want, rtol=1e-5)
    assert 2 < want[3] < sum(MASK[b, t + 1] for b, t in PAIRS) - 2


def test_gradients_are_those_of_the_loops_and_the_targets_side_gets_none():
    def loss(*arrays):
        parts = on_arrays(dataclasses.replace(QUIET, tile=5))(*arrays)
        return parts["regression"] + parts["cross_entropy"]

    by_guess, *others = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*as_f32(GUESSED, FEATURES, HEAD))
    for grad in others:
        assert not np.asarray(grad).any()
    counted = {(b, t) for b, t in PAIRS if WEIGHT[b, t + 1]}
    for b, t in np.ndindex(B, T):
        if (b, t) not in counted:
            assert not np.asarray(by_guess[b, t]).any()
    for b, t in [(0, 0), (0, 5), (1, 3), (1, 7)]:
        for d in range(D):
            step = np.zeros((B, T, D))
            step[b, t, d] = 1e-5
            want = (oracle(GUESSED + step) - oracle(GUESSED - step))[:2].sum() / 2e-5
            assert float(by_guess[b, t, d]) == pytest.approx(want, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_only_the_next_feature_is_a_perfect_guess(shift):
    got = on_arrays()(*as_f32(np.roll(FEATURES, -shift, axis=1), FEATURES, HEAD))
    right = [float(got["acceptance"]), float(got["agreement"])]
    count = sum(MASK[b, t + 1] for b, t in PAIRS)
    if shift == 1:
        assert float(got["regression"]) == 0
        np.testing.assert_allclose(right, count, rtol=1e-5)
    else:
        assert float(got["regression"]) > 1
        assert max(right) < 0.9 * count


def test_a_weight_of_zero_leaves_its_term_out():
    of = lambda **settings: eagle(*as_f32(GUESSED, FEATURES, HEAD), BATCH, EagleLossConfig(**settings))
    terms, metrics = of()
    assert [*(terms | metrics)] == NAMES
    assert {t.unit for t in (terms | metrics).values()} == {"token"}
    assert [*of(vector_weight=0.0)[0]] == ["cross_entropy"]
    assert [*of(token_weight=0.0)[0]] == ["regression"]


def test_smooth_l1_where_the_pieces_meet():
    d = jnp.asarray([[-3.0], [-1.0], [-0.5], [0.0], [1.0], [2.0]])
    np.testing.assert_allclose(smooth_l1(d, jnp.zeros((6, 1))), [2.5, 0.5, 0.125, 0, 0.5, 1.5])


# ------------------------------------------------------------------------------------------------ with forward passes
@functools.cache
def weights():
    """The target's, made louder so that its distributions differ from place to place, and a drafter's."""
    target = jax.tree.map(lambda w: 2.0 * w, decoder.init_params(TARGET, jax.random.key(1)))
    return {"drafter": network.init_params(CFG, jax.random.key(2)), "target": target}


def parts_of(loss_fn):
    return lambda params, batch, key: summed(*loss_fn(params, batch, key))


@functools.cache
def run_loss(noise):
    return jax.jit(parts_of(make_loss(CFG, dataclasses.replace(QUIET, noise=noise))))


@pytest.mark.slow
def test_packed_rows_equal_examples_alone_through_the_networks():
    """Each example alone, padded to the same length, by the networks and numpy sums: features, pairs, masks, all."""
    got = run_loss(0.0)(weights(), BATCH, jax.random.key(0))
    see = jax.jit(functools.partial(decoder.forward, TARGET))
    draft = jax.jit(functools.partial(network.forward, CFG))
    place = jnp.arange(T, dtype=jnp.int32)[None]
    head = np.asarray(weights()["target"]["head"], np.float64)
    sums = np.zeros(4)
    for b, first, n in [(0, 0, 4), (0, 4, 3), (1, 0, 9)]:
        cut = lambda x, b=b, first=first, n=n: jnp.pad(x[b : b + 1, first : first + n], [(0, 0), (0, T - n)])
        f = see(weights()["target"], cut(BATCH.tokens), place).hidden
        g = draft(weights()["drafter"], weights()["target"], f, cut(BATCH.targets), place).hidden
        f, g = np.asarray(f[0], np.float64), np.asarray(g[0], np.float64)
        for t in range(n - 1):
            m, counts = WEIGHT[b, first + t + 1], MASK[b, first + t + 1]
            d = np.abs(g[t] - f[t + 1])
            sums[0] += m * np.where(d < 1, d * d / 2, d - 0.5).mean()
            p, q = softmax(head @ f[t + 1]), softmax(head @ g[t])
            sums[1] += 0.1 * m * -(p * np.log(q)).sum()
            sums[2] += counts * np.minimum(p, q).sum()
            sums[3] += counts * (p.argmax() == q.argmax())
    np.testing.assert_allclose([got[name] for name in NAMES], sums, rtol=2e-5)


@pytest.mark.slow
def test_no_gradient_reaches_the_target_and_all_of_the_drafter_has_one():
    run = parts_of(make_loss(CFG))
    loss = lambda params: (lambda parts: parts["regression"] + parts["cross_entropy"])(
        run(params, BATCH, jax.random.key(0))
    )
    grads = jax.jit(jax.grad(loss))(weights())
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads["target"]))
    assert all(np.asarray(g).any() for g in jax.tree.leaves(grads["drafter"]))


@pytest.mark.slow
def test_noise_is_on_the_drafters_input_alone_and_by_the_length_of_the_example():
    see = jax.jit(lambda key, noise: see_target(TARGET, weights()["target"], BATCH, noise, key), static_argnums=1)
    still, one, again, other = (see(jax.random.key(k), n) for k, n in ((0, 0.0), (0, 0.2), (0, 0.2), (1, 0.2)))
    np.testing.assert_array_equal(still.noisy, still.features)
    np.testing.assert_array_equal(one.features, still.features)
    np.testing.assert_array_equal(one.noisy, again.noisy)
    assert (np.asarray(one.noisy) != np.asarray(other.noisy)).mean() > 0.99
    added = np.stack([np.asarray(seen.noisy - seen.features) for seen in (one, other)])
    for rows, n in ((added[:, 0, :4], 4), (added[:, 0, 4:7], 3), (added[:, 1], 9)):
        most = 0.5 * 0.2 * 512 / n
        assert 0.9 * most < np.abs(rows).max() <= most
        assert rows.min() < 0 < rows.max()
    quiet, loud = (run_loss(noise)(weights(), BATCH, jax.random.key(0)) for noise in (0.0, 0.2))
    assert abs(float(quiet["regression"]) - float(loud["regression"])) > 0.1  # the drafter heard it


@pytest.mark.slow
def test_no_logits_of_all_tokens_are_held_and_settings_reach_the_program():
    """What changes no number is looked for in the program."""
    tiled = dataclasses.replace(QUIET, tile=4)

    def program(loss_cfg=tiled, **settings):
        run = parts_of(make_loss(CFG, loss_cfg, **settings))
        loss = lambda params: run(params, BATCH, jax.random.key(0))["cross_entropy"]
        with jax.set_mesh(make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])):
            return str(jax.make_jaxpr(jax.grad(loss))(weights()))

    plain = program()
    assert f"f32[{B},2,{V}]" in plain
    assert f"f32[{B},{T},{V}]" not in plain
    assert f"f32[5,{B},2,{V}]" not in plain
    assert f"f32[{B},{T},{V}]" in program(dataclasses.replace(tiled, tile=256))
    for remat in ("dots", "full"):
        assert program(remat=remat).count("checkpoint") + program(remat=remat).count("remat") > plain.count(
            "checkpoint"
        ) + plain.count("remat")
    rows = "spec=P(('data', 'fsdp')"
    assert rows not in plain
    shared_out = program(rules=FSDP_TP)
    assert rows in shared_out
    assert f"{rows}, None, 'tensor')" in shared_out  # of logits


def test_rows_on_two_devices_give_the_same():
    want = run_loss(0.0)(weights(), BATCH, jax.random.key(0))
    with jax.set_mesh(mesh := make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])):
        rows = jax.sharding.NamedSharding(mesh, FSDP_TP.spec("batch", None))
        batch = jax.tree.map(lambda x: jax.device_put(x, rows), BATCH)
        params = jax.device_put(weights(), jax.sharding.NamedSharding(mesh, FSDP_TP.spec()))
        tiled = dataclasses.replace(QUIET, tile=4)
        got = jax.jit(parts_of(make_loss(CFG, tiled, rules=FSDP_TP)))(params, batch, jax.random.key(0))
    for name in NAMES:
        assert float(got[name]) == pytest.approx(float(want[name]), rel=1e-5, abs=1e-6)


@pytest.mark.optimizer
@pytest.mark.slow
def test_it_learns():
    """The loss falls below half, and most guesses agree in the end; the target stays as it was."""
    tx = optax.adam(3e-3)
    state = init_state(weights()["drafter"], tx, frozen={"target": weights()["target"]})
    state = jax.tree.map(jnp.copy, state)  # the step eats it
    combine = lambda params, frozen: {"drafter": params, **frozen}
    step = make_train_step(make_loss(CFG, QUIET), tx, count_units, combine=combine)
    window = jax.tree.map(lambda x: x[None], BATCH._replace(weights=jnp.asarray(MASK, jnp.float32)))
    seen = []
    for _ in range(150):
        state, metrics = step(state, window)
        seen.append({name: float(metrics[name]) for name in ("loss", "agreement", "acceptance", "regression")})
    assert seen[-1]["loss"] < 0.5 * seen[0]["loss"]
    assert seen[-1]["regression"] < 0.2 * seen[0]["regression"]
    reachable = sum(MASK[b, t + 1] for b, t in PAIRS) / MASK.sum()  # first targets divide, and have no pair
    assert seen[-1]["agreement"] > max(0.8 * reachable, seen[0]["agreement"] + 0.3)
    assert seen[-1]["acceptance"] > seen[0]["acceptance"] + 0.2


@pytest.mark.errors
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"noise": -0.1}, "EagleLossConfig.noise: found -0.1; expected at least 0"),
        ({"vector_weight": float("nan")}, "vector_weight: found nan"),
        ({"token_weight": float("inf")}, "token_weight: found inf"),
        ({"tile": 0}, "tile: found 0; expected at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        EagleLossConfig(**settings)
