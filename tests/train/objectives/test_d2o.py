"""Oracles: a row worked out by hand, a float64 loop, and DPO, which it is with one sample."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.objectives.d2o import D2oConfig, d2o
from jaxaroo.train.objectives.dpo import DpoConfig, sigmoid
from jaxaroo.train.objectives.preference import Sums


def sums(r, reference=-20.0):
    r = jnp.asarray(r, jnp.float32)
    return Sums(r + reference, jnp.full_like(r, reference), jnp.full_like(r, 7.0))


@functools.partial(jax.jit, static_argnums=2)
def gradients(samples, rejected, cfg):
    total = lambda p, q: jnp.sum(d2o(samples._replace(policy=p), rejected._replace(policy=q), cfg))
    return d2o(samples, rejected, cfg), *jax.grad(total, argnums=(0, 1))(samples.policy, rejected.policy)


def test_worked_row():
    loss, g, g_l = gradients(sums([[0.4, -0.2, 0.1]], 0.0), sums([1.0], 0.0), D2oConfig(samples=3))
    assert float(loss[0]) == pytest.approx(0.739159, abs=5.1e-7)
    np.testing.assert_allclose(g, [[-0.017416] * 3], atol=5.1e-7)
    np.testing.assert_allclose(g_l, [0.052248], atol=5.1e-7)


def test_it_is_a_loop_over_prompts_and_samples():
    rng = np.random.default_rng(0)
    r, bad = rng.normal(size=(6, 4)) * 5, rng.normal(size=6) * 5
    loss, g, g_l = gradients(sums(r), sums(bad), D2oConfig(samples=4, beta=0.2, alpha=0.5))
    for i in range(6):
        u = sum(0.2 / 4 * x for x in r[i]) - 0.5 * bad[i]
        s = 1 / (1 + np.exp(u))
        np.testing.assert_allclose(loss[i], np.log1p(np.exp(-u)), rtol=1e-5)
        np.testing.assert_allclose(g[i], np.full(4, -0.2 * s / 4), rtol=1e-5)
        np.testing.assert_allclose(g_l[i], 0.5 * s, rtol=1e-5)


def test_one_sample_is_dpo_and_copies_of_samples_change_nothing():
    r, bad = np.array([[1.0], [-3.0]]), sums([0.5, 2.0])
    one = gradients(sums(r), bad, D2oConfig(samples=1))
    np.testing.assert_allclose(one[0], sigmoid(sums(r[:, 0]), bad, DpoConfig()), rtol=1e-6)
    three = gradients(sums(np.repeat(r, 3, 1)), bad, D2oConfig(samples=3))
    for got, wanted in zip((three[0], three[1].sum(1), three[2]), (one[0], one[1][:, 0], one[2]), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_far_answers_stay_finite_and_references_do_not_learn():
    far = np.array([-1e5, -1e4, 0.0, 1e4, 1e5])
    samples, bad = sums(np.repeat(far, 5)[:, None]), sums(np.tile(far, 5))
    for values in gradients(samples, bad, D2oConfig(samples=1)):
        assert np.isfinite(values).all()
    grads = jax.grad(lambda s, b: jnp.sum(d2o(s, b, D2oConfig(samples=1))), argnums=(0, 1))(samples, bad)
    assert not any(np.asarray(side.reference).any() for side in grads)


@pytest.mark.errors
def test_settings_and_shapes_without_meaning_are_refused():
    with pytest.raises(ValueError, match=r"found samples \(2, 3\) beside answers \(2,\); expected 11 an answer"):
        d2o(sums(np.zeros((2, 3))), sums(np.zeros(2)))
    for settings, message in (({"beta": 2.0}, "beta"), ({"alpha": 2.0}, "alpha"), ({"samples": 0}, "samples")):
        with pytest.raises(ValueError, match=rf"D2oConfig\.{message}: found"):
            D2oConfig(**settings)
    D2oConfig(beta=2.0, alpha=2.0, allow_large_beta=True)
