"""Oracles: a row worked out by hand, and a float64 loop that keeps every reward it has seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.objectives.bco import BcoConfig, bco, init_delta, update_delta
from jaxaroo.train.objectives.preference import Sums

CFG = BcoConfig(beta=0.1)


def rows_of(r):
    r = jnp.asarray(r, jnp.float32)
    return Sums(r - 30.0, jnp.full_like(r, -30.0), jnp.ones_like(r))


def test_worked_rows_with_the_shift_they_make_themselves():
    rows = rows_of([1.0, -0.5])
    delta = update_delta(init_delta(), rows, jnp.ones(2, bool), CFG)
    assert float(delta.mean) == pytest.approx(0.025, rel=1e-6)
    np.testing.assert_allclose(bco(rows, jnp.asarray([True, False]), delta, CFG), [0.656350, 0.656350], atol=5.1e-7)


def test_the_shift_is_the_mean_of_all_rewards_so_far_and_losses_follow_it():
    rng = np.random.default_rng(0)
    delta, seen = init_delta(), []
    for _ in range(6):
        r, good, counted = rng.normal(size=8) * 20 + 5, rng.random(8) < 0.5, rng.random(8) < 0.7
        rows = rows_of(np.where(counted, r, np.nan))
        delta = update_delta(delta, rows, jnp.asarray(counted), CFG)
        seen += [0.1 * x for x, c in zip(r, counted, strict=True) if c]
        assert float(delta.mean) == pytest.approx(np.mean(seen), rel=1e-5)
        assert float(delta.rows) == len(seen)
        x = 0.1 * r - np.mean(seen)
        expected = np.where(good, np.logaddexp(0, -x), np.logaddexp(0, x))
        losses = np.asarray(bco(rows, jnp.asarray(good), delta, CFG))
        np.testing.assert_allclose(losses[counted], expected[counted], rtol=1e-4)
    still = update_delta(delta, rows, jnp.zeros(8, bool), CFG)
    assert (float(still.mean), float(still.rows)) == (float(delta.mean), float(delta.rows))


def test_gradients_do_not_pass_through_the_shift():
    rows, good = rows_of([3.0, -2.0, 40.0, -40.0]), jnp.asarray([True, False, False, True])

    def total(policy):
        now = rows._replace(policy=policy)
        return jnp.sum(bco(now, good, update_delta(init_delta(), now, jnp.ones(4, bool), CFG), CFG))

    x = 0.1 * np.array([3.0, -2.0, 40.0, -40.0]) - 0.025
    s = np.exp(-np.logaddexp(0, -np.where(np.asarray(good), -x, x)))
    np.testing.assert_allclose(jax.grad(total)(rows.policy), 0.1 * s * [-1, 1, 1, -1], rtol=1e-5)
    far = rows_of([1e4, -1e4, 1e5, -1e5])
    for values in (bco(far, good, init_delta(), CFG), jax.grad(total)(far.policy)):
        assert np.isfinite(values).all()
    delta = init_delta()
    slope = jax.grad(lambda mean: jnp.sum(bco(rows, good, delta._replace(mean=mean), CFG)))(delta.mean)
    assert float(slope) == 0.0


@pytest.mark.errors
def test_a_beta_for_averages_is_refused():
    with pytest.raises(ValueError, match=r"BcoConfig\.beta: found 2\.0"):
        BcoConfig(beta=2.0)
