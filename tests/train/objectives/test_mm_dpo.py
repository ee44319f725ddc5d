"""Oracles: rows worked out by hand, float64 NumPy, and DPO, which it is where beta does not grow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.objectives.dpo import DpoConfig, sigmoid
from jaxaroo.train.objectives.mm_dpo import MmDpoConfig, beta_of, mm_dpo
from jaxaroo.train.objectives.preference import Sums


def sums(r):
    r = jnp.asarray(r, jnp.float32)
    return Sums(r - 20.0, jnp.full_like(r, -20.0), jnp.full_like(r, 7.0))


def test_worked_rows():
    cfg = MmDpoConfig(growth=0.5, rate=0.5)
    gap = jnp.asarray([0.0, 1.0, 2.0])
    np.testing.assert_allclose(beta_of(gap, cfg), [0.1, 0.119673, 0.131606], atol=5.1e-7)
    loss = mm_dpo(sums(np.full(3, 1.0)), sums(np.full(3, -0.5)), gap, cfg)
    np.testing.assert_allclose(loss, [0.620957, 0.607415, 0.599306], atol=5.1e-7)


def test_values_and_gradients_are_those_of_the_closed_form():
    rng = np.random.default_rng(0)
    r_w, r_l, gap = rng.normal(size=32) * 9, rng.normal(size=32) * 9, rng.uniform(-3, 9, 32)
    cfg = MmDpoConfig(beta=0.2, growth=0.8, rate=0.7, floor=0.05)
    beta = np.maximum(0.2 * (1 + 0.8 * (1 - np.exp(-0.7 * gap))), 0.05)
    assert beta.min() == 0.05
    assert beta.max() > 0.3
    x = beta * (r_w - r_l)
    total = lambda p, q, d: jnp.sum(mm_dpo(sums(r_w)._replace(policy=p), sums(r_l)._replace(policy=q), d, cfg))
    d = jnp.asarray(gap, jnp.float32)
    g_w, g_l, g_gap = jax.grad(total, argnums=(0, 1, 2))(sums(r_w).policy, sums(r_l).policy, d)
    np.testing.assert_allclose(mm_dpo(sums(r_w), sums(r_l), d, cfg), np.logaddexp(0, -x), rtol=3e-5)
    np.testing.assert_allclose(g_w, -beta / (1 + np.exp(x)), rtol=3e-5)
    np.testing.assert_allclose(g_l, beta / (1 + np.exp(x)), rtol=3e-5)
    assert not np.asarray(g_gap).any()


def test_without_growth_it_is_dpo():
    w, l = sums([3.0, -2.0]), sums([1.0, 4.0])
    got = mm_dpo(w, l, jnp.asarray([0.0, 5.0]), MmDpoConfig(growth=0.0))
    np.testing.assert_allclose(got, sigmoid(w, l, DpoConfig()), rtol=1e-6)


def test_far_gaps_and_pairs_stay_finite():
    far = np.array([-1e5, -1e4, 0.0, 1e4, 1e5])
    w, l, gap = sums(np.repeat(far, 5)), sums(np.tile(far, 5)), jnp.asarray(np.tile(far, 5), jnp.float32)
    with jax.debug_nans(True), jax.debug_infs(True):
        value, grad = jax.value_and_grad(lambda p: jnp.sum(mm_dpo(w._replace(policy=p), l, gap)))(w.policy)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    np.testing.assert_allclose(beta_of(gap), np.tile([1e-3, 1e-3, 0.1, 0.11, 0.11], 5), rtol=1e-6)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"growth": -0.1}, "growth: found -0.1"),
        ({"beta": 0.8, "growth": 0.5}, "allow_large_beta"),
        ({"rate": 0.0}, "rate: found 0.0"),
        ({"floor": 0.2}, "0 < floor <= beta"),
        ({"sft": -1.0}, "sft: found -1.0"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MmDpoConfig(**settings)
