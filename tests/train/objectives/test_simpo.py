"""Oracles: a row worked out by hand, float64 NumPy with gradients in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.objectives.preference import Sums
from jaxaroo.train.objectives.simpo import PUBLISHED, SimpoConfig, reward, simpo


def side(a, tokens):
    a, tokens = np.asarray(a, np.float64), np.asarray(tokens, np.float64)
    return Sums(jnp.asarray(a * tokens, jnp.float32), None, jnp.asarray(tokens, jnp.float32))


@functools.partial(jax.jit, static_argnums=2)
def gradients(w, l, cfg):
    total = lambda p_w, p_l: jnp.sum(simpo(w._replace(policy=p_w), l._replace(policy=p_l), cfg))
    g_w, g_l = jax.grad(total, argnums=(0, 1))(w.policy, l.policy)
    return simpo(w, l, cfg), g_w * w.tokens, g_l * l.tokens


def test_worked_row():
    loss, g_w, g_l = gradients(side([-1.5], [8]), side([-1.75], [10]), SimpoConfig(beta=2.0, ratio=0.5))
    assert float(loss[0]) == pytest.approx(0.974077, abs=5.1e-7)
    assert (float(g_w[0]), float(g_l[0])) == pytest.approx((-1.244919, 1.244919), abs=6e-7)


@pytest.mark.parametrize("shape", [0.0, 0.25, -0.5, 1e-9])
def test_values_and_gradients_are_those_of_the_closed_form(shape):
    rng = np.random.default_rng(0)
    a_w, a_l = -rng.uniform(0.05, 4, 64), -rng.uniform(0.05, 4, 64)
    tokens = rng.integers(1, 30, (2, 64))
    rho = (lambda a: (1 - np.exp(a) ** -shape) / shape) if abs(shape) > 1e-6 else (lambda a: a)
    slope = lambda a: np.exp(a) ** -shape
    m = 2.5 * (rho(a_w) - rho(a_l) - 0.3)
    pull = 0.9 / (1 + np.exp(m)) - 0.1 / (1 + np.exp(-m))
    loss, g_w, g_l = gradients(
        side(a_w, tokens[0]), side(a_l, tokens[1]), SimpoConfig(beta=2.5, ratio=0.3, eps=0.1, shape=shape)
    )
    np.testing.assert_allclose(loss, 0.9 * np.log1p(np.exp(-m)) + 0.1 * np.log1p(np.exp(m)), rtol=2e-5)
    np.testing.assert_allclose(g_w, -2.5 * pull * slope(a_w), rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(g_l, 2.5 * pull * slope(a_l), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [0.0, 0.25, 2.0, -2.0])
def test_far_averages_stay_finite(shape):
    far = np.array([0.0, -1.0, -100.0, -5e3, -1e4])
    w, l = (side(g.ravel(), np.ones(25)) for g in np.meshgrid(far, far))
    for values in gradients(w, l, SimpoConfig(beta=1.0, shape=shape)):
        assert np.isfinite(values).all()


def test_a_reference_changes_nothing_and_rewards_are_averages():
    w, l = side([-1.0, -3.0], [4, 7]), side([-2.0, -0.5], [3, 9])
    more = [s._replace(reference=s.policy - 5.0) for s in (w, l)]
    np.testing.assert_array_equal(simpo(w, l), simpo(*more))
    np.testing.assert_allclose(reward(w), [-1.0, -3.0], rtol=1e-6)


def test_published_settings_give_the_margins_of_the_paper():
    gammas = {name: round(cfg.beta * cfg.ratio, 3) for name, (cfg, _) in PUBLISHED.items()}
    assert gammas["Mistral-Base"] == 1.6
    assert gammas["Gemma-2-9B-it"] == 5.0


@pytest.mark.errors
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "expected a positive number"),
        ({"ratio": -0.1}, "ratio: found -0.1"),
        ({"eps": 0.5}, "0 <= eps < 0.5"),
        ({"shape": float("inf")}, "shape: found inf"),
        ({"nll": -1.0}, "nll: found -1.0"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SimpoConfig(**settings)
