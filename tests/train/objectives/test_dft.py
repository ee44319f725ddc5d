"""Oracles: a token worked out by hand, and the gradient on logits in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.objectives.dft import dft


def test_worked_token():
    logp = jax.nn.log_softmax(jnp.asarray([2.0, 1.0, 0.0]))[0]
    assert float(-logp) == pytest.approx(0.407606, abs=5.1e-7)
    assert float(dft(logp)) == pytest.approx(0.271156, abs=5.1e-7)


def test_its_gradient_is_that_of_fine_tuning_times_the_probability():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)) * 2, jnp.float32)
    targets = jnp.asarray([0, 6, 3, 2, 2])
    pick = lambda z: jnp.take_along_axis(jax.nn.log_softmax(z), targets[:, None], axis=1)[:, 0]
    got = jax.grad(lambda z: jnp.sum(dft(pick(z))))(logits)
    for i, y in enumerate(np.asarray(targets)):
        p = np.exp(np.asarray(logits[i], np.float64))
        p /= p.sum()
        np.testing.assert_allclose(got[i], p[y] * (p - np.eye(7)[y]), rtol=2e-5, atol=1e-7)


def test_impossible_tokens_cost_and_teach_nothing_and_numbers_are_float32():
    value, grad = jax.value_and_grad(lambda x: jnp.sum(dft(x)))(jnp.asarray([-1e4, -200.0]))
    assert float(value) == 0.0
    np.testing.assert_array_equal(grad, [0.0, 0.0])
    assert dft(jnp.asarray([-1.0], jnp.bfloat16)).dtype == jnp.float32
