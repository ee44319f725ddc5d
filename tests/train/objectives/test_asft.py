"""Oracles: a token worked out by hand, and DFT, which it is without its anchor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.objectives.asft import AsftConfig, asft
from jaxaroo.train.objectives.dft import dft


def of_logits(z, base, target, cfg):
    log_p, log_q = jax.nn.log_softmax(z), jax.nn.log_softmax(base)
    return asft(log_p[target], jnp.sum(jnp.exp(log_q) * (log_q - log_p)), cfg)


def test_worked_token():
    z, base = jnp.asarray([2.0, 1.0, 0.0]), jnp.asarray([1.0, 1.0, 0.0])
    value, grad = jax.value_and_grad(of_logits)(z, base, 0, AsftConfig(lam=0.05))
    assert float(value) == pytest.approx(0.277321, abs=5.1e-7)
    np.testing.assert_allclose(grad, [-0.210549, 0.153924, 0.056625], atol=5.1e-7)


def test_without_its_anchor_and_where_the_anchor_holds_it_is_dft():
    logp, kl = jnp.asarray([-0.5, -3.0, -1e4]), jnp.asarray([0.2, 5.0, 1e4])
    np.testing.assert_array_equal(asft(logp, kl, AsftConfig(lam=0.0)), dft(logp))
    np.testing.assert_allclose(asft(logp, kl), dft(logp) + np.float32(0.05) * kl, rtol=1e-6)
    z = jnp.asarray([0.3, -1.0, 2.0])
    held, free = (jax.value_and_grad(of_logits)(z, z, 1, AsftConfig(lam=lam)) for lam in (3.0, 0.0))
    assert float(held[0]) == pytest.approx(float(free[0]), abs=1e-7)
    np.testing.assert_allclose(held[1], free[1], atol=1e-6)


@pytest.mark.errors
def test_a_weight_without_meaning_is_refused():
    with pytest.raises(ValueError, match=r"AsftConfig\.lam: found -0\.1; expected at least 0"):
        AsftConfig(lam=-0.1)
