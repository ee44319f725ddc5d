"""Oracles: rows worked out by hand, float64 NumPy, and gradient ascent, which it becomes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.objectives.npo import NpoConfig, gradient_ascent, npo
from jaxaroo.train.objectives.preference import Sums


def rows_of(r):
    r = jnp.asarray(r, jnp.float32)
    return Sums(r - 8.0, jnp.full_like(r, -8.0), jnp.full_like(r, 4.0))


@functools.partial(jax.jit, static_argnums=1)
def gradients(rows, beta):
    total = lambda p: jnp.sum(npo(rows._replace(policy=p), NpoConfig(beta=beta)))
    return npo(rows, NpoConfig(beta=beta)), jax.grad(total)(rows.policy)


def test_worked_rows():
    loss, g = gradients(rows_of([-0.5, 0.0]), 0.1)
    np.testing.assert_allclose(
        loss, [13.369193, 13.862944], rtol=1e-7, atol=1.5e-6
    )  # float32 near 13 has steps of 1e-6
    np.testing.assert_allclose(g, [0.975005, 1.0], atol=5.1e-7)


def test_values_and_gradients_are_those_of_the_closed_form():
    r = np.linspace(-90, 90, 61)
    for beta in (0.05, 0.5):
        loss, g = gradients(rows_of(r), beta)
        np.testing.assert_allclose(loss, 2 / beta * np.logaddexp(0, beta * r), rtol=2e-5)
        np.testing.assert_allclose(g, 2 / (1 + np.exp(-beta * r)), rtol=2e-5)


def test_at_the_start_it_is_ascent_on_the_sum_for_every_beta_and_for_small_ones_also_later():
    for beta in (1.0, 0.1, 1e-3):
        np.testing.assert_array_equal(gradients(rows_of([0.0]), beta)[1], [1.0])
    for beta, expected, steps in ((0.1, -0.493751, 2e-6), (1e-3, -0.499938, 2.5e-4)):  # two steps of float32
        loss = float(gradients(rows_of([-0.5]), beta)[0][0])
        assert loss - 2 / beta * math.log(2) == pytest.approx(expected, abs=steps)


def test_ascent_lowers_the_average_and_never_stops():
    rows = rows_of([-1e4, 0.0])
    np.testing.assert_allclose(gradient_ascent(rows), [-10008 / 4, -2.0])
    slope = jax.grad(lambda p: jnp.sum(gradient_ascent(rows._replace(policy=p))))(rows.policy)
    np.testing.assert_array_equal(slope, [0.25, 0.25])
    np.testing.assert_array_equal(gradient_ascent(rows._replace(reference=None)), gradient_ascent(rows))


def test_far_answers_stay_finite_and_references_do_not_learn():
    rows = rows_of([-1e5, -1e4, 1e4, 1e5])
    for values in gradients(rows, 0.1):
        assert np.isfinite(values).all()
    assert not np.asarray(jax.grad(lambda s: jnp.sum(npo(s)))(rows).reference).any()


@pytest.mark.errors
def test_a_beta_for_averages_is_refused():
    with pytest.raises(ValueError, match=r"NpoConfig\.beta: found 2\.0"):
        NpoConfig(beta=2.0)
