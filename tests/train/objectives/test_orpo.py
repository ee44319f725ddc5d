"""Oracles: a row worked out by hand, float64 NumPy with gradients in closed form, and the definition of odds."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.objectives.orpo import OrpoConfig, log1mexp, log_odds_ratio, orpo
from jaxaroo.train.objectives.preference import Sums, chosen_nll


def side(a, tokens):
    a, tokens = np.asarray(a, np.float64), np.asarray(tokens, np.float64)
    return Sums(jnp.asarray(a * tokens, jnp.float32), None, jnp.asarray(tokens, jnp.float32))


@functools.partial(jax.jit, static_argnums=2)
def gradients(w, l, cfg):
    """Loss a pair, and its slopes in the averages."""
    total = lambda p_w, p_l: jnp.sum(orpo(w._replace(policy=p_w), l._replace(policy=p_l), cfg))
    g_w, g_l = jax.grad(total, argnums=(0, 1))(w.policy, l.policy)
    return orpo(w, l, cfg), g_w * w.tokens, g_l * l.tokens


def test_worked_row():
    w, l = side([-1.5], [8]), side([-1.75], [10])
    assert float(log_odds_ratio(w, l)[0]) == pytest.approx(0.311596, abs=5.1e-7)
    loss, g_w, g_l = gradients(w, l, OrpoConfig())
    assert 10 * float(loss[0]) == pytest.approx(0.549437, abs=5.1e-7)
    assert float(jnp.sum(chosen_nll(w)) / 8 + loss[0]) == pytest.approx(1.554944, abs=5.1e-7)
    assert (float(g_w[0]), float(g_l[0])) == pytest.approx((-0.054414, 0.051163), abs=5.1e-7)


def test_values_and_gradients_are_those_of_the_closed_form():
    rng = np.random.default_rng(0)
    a_w, a_l = -rng.uniform(0.05, 6, 64), -rng.uniform(0.05, 6, 64)
    tokens = rng.integers(1, 30, (2, 64))
    odds = lambda a: np.exp(a) / (1 - np.exp(a))
    lo = np.log(odds(a_w) / odds(a_l))
    s = 1 / (1 + np.exp(lo))
    loss, g_w, g_l = gradients(side(a_w, tokens[0]), side(a_l, tokens[1]), OrpoConfig(lam=0.3))
    np.testing.assert_allclose(loss, 0.3 * np.log1p(np.exp(-lo)), rtol=2e-5)
    np.testing.assert_allclose(g_w, -0.3 * s / (1 - np.exp(a_w)), rtol=2e-5)
    np.testing.assert_allclose(g_l, 0.3 * s / (1 - np.exp(a_l)), rtol=2e-5)


@pytest.mark.slow
def test_log1mexp_is_exact_on_both_sides_and_its_gradient_finite_everywhere():
    a = -np.concatenate([np.logspace(-6, 1.9, 80), [math.log(2), 0.6931, 0.6932]])
    got = log1mexp(jnp.asarray(a, jnp.float32))
    exact = np.asarray(jnp.asarray(a, jnp.float32), np.float64)
    # The tail has its own scale: log1p(-e^a) is -e^a there, down to what float32 can hold.
    np.testing.assert_allclose(
        got, np.log(-np.expm1(exact)) * (exact > -30) - np.exp(exact) * (exact <= -30), rtol=5e-6
    )
    slope = jax.grad(lambda a: jnp.sum(log1mexp(a)))(jnp.asarray(a, jnp.float32))
    np.testing.assert_allclose(slope, np.exp(exact) / np.expm1(exact), rtol=2e-5)
    certain = jnp.asarray([0.0, 1e-3, -1e-9, -1e-7, -1e4, -1e30])
    value, slope = log1mexp(certain), jax.grad(lambda a: jnp.sum(log1mexp(a)))(certain)
    np.testing.assert_allclose(value, [*[math.log(1e-7)] * 4, 0.0, 0.0], rtol=1e-5)
    assert np.isfinite(slope).all()
    np.testing.assert_array_equal(slope[:3], np.zeros(3))


def test_certain_and_impossible_answers_stay_finite():
    far = np.array([0.0, -1e-8, -1e-4, -1.0, -100.0, -1e4])
    w, l = (side(g.ravel(), np.ones(36)) for g in np.meshgrid(far, far))
    for values in gradients(w, l, OrpoConfig()):
        assert np.isfinite(values).all()


def test_a_reference_changes_nothing():
    w, l = side([-1.0, -3.0], [4, 7]), side([-2.0, -0.5], [3, 9])
    more = [s._replace(reference=s.policy - 5.0) for s in (w, l)]
    np.testing.assert_array_equal(orpo(w, l), orpo(*more))


@pytest.mark.errors
def test_a_weight_without_meaning_is_refused():
    with pytest.raises(ValueError, match=r"OrpoConfig\.lam: found 0\.0; expected a positive number"):
        OrpoConfig(lam=0.0)
