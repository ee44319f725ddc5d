"""Oracle: a float64 loop; and its minimum is the mean return of the answers that share a prefix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.data.pipeline import Batch
from jaxaroo.train.objectives.ivo import ivo


def batch(labels, mask, weights):
    empty = jnp.zeros(labels.shape, jnp.int32)
    return Batch(empty, empty, empty, empty, jnp.asarray(mask), jnp.asarray(weights), jnp.asarray(labels))


def test_the_loss_is_that_of_the_float64_loop():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 5)).astype(np.float32)
    mask = rng.random((2, 5)) < 0.6
    labels = (mask * rng.random((2, 5))).astype(np.float32)
    weights = (mask * np.array([[1.0], [0.25]])).astype(np.float32)
    terms, metrics = ivo(jnp.asarray(z), batch(labels, mask, weights))
    total = value = 0.0
    for i, j in zip(*np.nonzero(mask), strict=True):
        v = 1 / (1 + np.exp(-float(z[i, j])))
        total += weights[i, j] * (v - float(labels[i, j])) ** 2
        value += v
    sum_of = lambda term: float(jnp.sum(term.value * term.weight))
    assert sum_of(terms["squared_error"]) == pytest.approx(total, rel=1e-5)
    assert sum_of(metrics["value"]) == pytest.approx(value, rel=1e-5)
    assert sum_of(metrics["return"]) == pytest.approx(float(labels.sum()), rel=1e-5)
    assert {t.unit for t in (*terms.values(), *metrics.values())} == {"token"}


def test_the_best_value_of_a_shared_prefix_is_the_mean_return():
    returns = jnp.asarray([[1.0], [0.0], [0.0], [1.0], [1.0]])
    data = batch(np.asarray(returns), np.ones((5, 1), bool), np.ones((5, 1), np.float32))
    loss = lambda z: jnp.sum(ivo(jnp.full((5, 1), z), data)[0]["squared_error"].value)
    z = 0.0
    for _ in range(200):
        z = z - 0.5 * float(jax.grad(loss)(z))
    assert 1 / (1 + np.exp(-z)) == pytest.approx(0.6, abs=1e-3)
