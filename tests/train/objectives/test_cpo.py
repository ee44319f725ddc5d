"""Oracles: rows worked out by hand, float64 NumPy with gradients in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.objectives.cpo import CpoConfig, cpo
from jaxaroo.train.objectives.preference import Sums, chosen_nll

PAIR = (
    Sums(jnp.asarray([-12.0]), None, jnp.asarray([8.0])),
    Sums(jnp.asarray([-15.0]), None, jnp.asarray([10.0])),
)


@functools.partial(jax.jit, static_argnums=2)
def gradients(w, l, cfg):
    total = lambda p_w, p_l: jnp.sum(cpo(w._replace(policy=p_w), l._replace(policy=p_l), cfg))
    return cpo(w, l, cfg), *jax.grad(total, argnums=(0, 1))(w.policy, l.policy)


def test_worked_rows():
    contrast = float(cpo(*PAIR)[0])
    assert contrast == pytest.approx(0.554355, abs=5.1e-7)
    assert contrast + 1.0 * float(chosen_nll(PAIR[0])[0] / 8) == pytest.approx(2.054355, abs=5.1e-7)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_values_and_gradients_are_those_of_the_closed_form(loss):
    rng = np.random.default_rng(0)
    p_w, p_l, (n_w, n_l) = -rng.uniform(5, 60, 64), -rng.uniform(5, 60, 64), rng.integers(1, 30, (2, 64))
    to = lambda x: jnp.asarray(x, jnp.float32)
    w, l = Sums(to(p_w), None, to(n_w)), Sums(to(p_l), None, to(n_l))
    x, d = 0.2 * (p_w - p_l), p_w / n_w - p_l / n_l
    eps = 0.1 if loss == "sigmoid" else 0.0
    value, g_w, g_l = {
        "sigmoid": lambda: (
            0.9 * np.logaddexp(0, -x) + 0.1 * np.logaddexp(0, x),
            0.2 * (0.1 - 1 / (1 + np.exp(x))),
            -0.2 * (0.1 - 1 / (1 + np.exp(x))),
        ),
        "hinge": lambda: (np.maximum(0, 1 - x), np.where(x < 1, -0.2, 0), np.where(x < 1, 0.2, 0)),
        "ipo": lambda: ((d - 2.5) ** 2, 2 * (d - 2.5) / n_w, -2 * (d - 2.5) / n_l),
    }[loss]()
    found = gradients(w, l, CpoConfig(beta=0.2, loss=loss, eps=eps))
    for got, wanted in zip(found, (value, g_w, g_l), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_far_pairs_stay_finite_and_a_reference_changes_nothing(loss):
    far = jnp.asarray([-1e5, -1e4, -1.0, 0.0])
    w = Sums(jnp.repeat(far, 4), None, jnp.ones(16))
    l = w._replace(policy=jnp.tile(far, 4))
    for values in gradients(w, l, CpoConfig(loss=loss)):
        assert np.isfinite(values).all()
    more = [s._replace(reference=s.policy - 5.0) for s in (w, l)]
    np.testing.assert_array_equal(cpo(w, l, CpoConfig(loss=loss)), cpo(*more, CpoConfig(loss=loss)))


@pytest.mark.errors
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 2.0}, "allow_large_beta"),
        ({"alpha": -1.0}, "alpha: found -1.0"),
        ({"loss": "hing"}, "Is 'hinge' meant"),
        ({"eps": 0.5}, "0 <= eps < 0.5"),
        ({"eps": 0.1, "loss": "ipo"}, "only sigmoid heeds"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    CpoConfig(beta=2.0, loss="ipo")
    with pytest.raises(ValueError, match=message):
        CpoConfig(**settings)
