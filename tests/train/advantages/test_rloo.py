"""Oracle: the mean of the others, by loops."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxaroo.train.advantages.rloo import rloo

NAN = np.nan
REWARDS = np.array([[1.0, 0.0, 0.5, 2.0], [NAN, 3.0, -1.0, 0.0], [0.1, 0.1, 0.1, 0.1], [7.0, 1.0, 2.0, 4.0]])
PRESENT = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0]], bool)


def test_matches_the_mean_of_the_others():
    got, metrics = jax.jit(rloo)(jnp.asarray(REWARDS, jnp.float32), jnp.asarray(PRESENT))
    there = PRESENT & ~np.isnan(REWARDS)
    want = np.zeros(REWARDS.shape)
    for g, i in zip(*np.nonzero(there), strict=True):
        others = [REWARDS[g, j] for j in range(4) if j != i and there[g, j]]
        want[g, i] = REWARDS[g, i] - np.mean(others) if others else 0.0
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    assert not np.asarray(got)[2:].any()  # equal rewards, a single member: exactly nothing
    assert float(metrics["frac_zero_std"]) == 0.5
    np.testing.assert_allclose(metrics["reward"], REWARDS[there].mean(), rtol=1e-6)


def test_without_a_mask_nan_alone_is_no_reward():
    got = np.asarray(rloo(jnp.asarray(REWARDS[:2], jnp.float32))[0])
    np.testing.assert_allclose(got[0], [1 - 2.5 / 3, 0 - 3.5 / 3, 0.5 - 1, 2 - 0.5], rtol=1e-6)
    np.testing.assert_allclose(got[1], [0, 3.5, -2.5, -1], rtol=1e-6)


def test_no_gradient_passes():
    gradient = jax.grad(lambda r: jnp.sum(rloo(r)[0] ** 2))(jnp.asarray(REWARDS[:1], jnp.float32))
    assert not np.asarray(gradient).any()
