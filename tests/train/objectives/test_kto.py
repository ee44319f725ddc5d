"""Oracles: rows worked out by hand, float64 NumPy with gradients in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.objectives.kto import KtoConfig, kto, mismatched_kl
from jaxaroo.train.objectives.preference import Sums

S = lambda u: np.exp(-np.logaddexp(0, -np.asarray(u, np.float64)))


def rows_of(r, reference=0.0):
    r = np.asarray(r, np.float64)
    return Sums(*(jnp.asarray(x, jnp.float32) for x in (r + reference, np.full_like(r, reference), np.ones_like(r))))


@functools.partial(jax.jit, static_argnums=3)
def run(rows, desirable, kl, cfg):
    def total(policy, kl):
        each = kto(rows._replace(policy=policy), desirable, kl, cfg)
        return jnp.sum(each), each

    grads, each = jax.grad(total, argnums=(0, 1), has_aux=True)(rows.policy, kl)
    return each, *grads


def test_worked_rows():
    loss, g, _ = run(rows_of([1.0, -0.5]), jnp.asarray([True, False]), jnp.float32(0.2), KtoConfig())
    np.testing.assert_allclose(loss, [0.480011, 0.482507], atol=5.1e-7)
    np.testing.assert_allclose(g, [-0.024960, 0.024969], atol=5.1e-7)


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("kl", [2.0, -2.0])
def test_values_and_gradients_are_those_of_the_closed_form(loss, kl):
    rng = np.random.default_rng(0)
    r, good = rng.normal(size=32) * 10, rng.random(32) < 0.5
    cfg = KtoConfig(beta=0.3, loss=loss, desirable_weight=1.5, undesirable_weight=0.5)
    x = 0.3 * (r - (max(kl, 0) if loss == "kto" else 0))
    weight = np.where(good, 1.5, 0.5)
    value, g, g_kl = run(rows_of(r, -40.0), jnp.asarray(good), jnp.float32(kl), cfg)
    np.testing.assert_allclose(value, weight * np.where(good, 1 - S(x), S(x)), rtol=1e-5)
    np.testing.assert_allclose(g, weight * 0.3 * S(x) * S(-x) * np.where(good, -1, 1), rtol=1e-5, atol=1e-7)
    assert float(g_kl) == 0.0


def test_the_mismatched_mean_is_a_loop_and_gives_no_gradient():
    rng = np.random.default_rng(1)
    r, counted = rng.normal(size=16) * 3 - 1, rng.random(16) < 0.7
    spoilt = rows_of(np.where(counted, r, np.nan))
    expected = sum(float(x) for x, c in zip(r, counted, strict=True) if c) / counted.sum()
    assert float(mismatched_kl(spoilt, jnp.asarray(counted))) == pytest.approx(expected, rel=1e-5)
    assert expected < 0  # it is kto that clamps
    carried = mismatched_kl(spoilt, jnp.asarray(counted), jnp.float32(2.0), KtoConfig(kl_decay=0.75))
    assert float(carried) == pytest.approx(0.75 * 2.0 + 0.25 * expected, rel=1e-5)
    nobody = jnp.zeros(16, bool)
    assert float(mismatched_kl(spoilt, nobody, jnp.float32(2.0), KtoConfig(kl_decay=0.75))) == 2.0
    assert float(mismatched_kl(spoilt, nobody)) == 0.0

    own = rows_of(r)
    good = jnp.asarray(counted)
    whole = lambda policy: jnp.sum(kto(own, good, mismatched_kl(own._replace(policy=policy), good), KtoConfig()))
    assert not np.asarray(jax.grad(whole)(own.policy + 9.0)).any()


@pytest.mark.parametrize("good", [True, False])
def test_one_kind_alone_and_extremes_stay_finite(good):
    r = np.array([-1e5, -1e4, -1.0, 0.0, 1.0, 1e4, 1e5])
    for kl in (0.0, 1e4):
        value, g, _ = run(rows_of(r), jnp.full(7, good), jnp.float32(kl), KtoConfig())
        x = 0.1 * (r - kl)
        np.testing.assert_allclose(value, S(-x) if good else S(x), rtol=1e-5, atol=1e-30)
        np.testing.assert_allclose(g, 0.1 * S(x) * S(-x) * (-1 if good else 1), rtol=1e-5, atol=1e-30)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 3.0}, "allow_large_beta"),
        ({"loss": "ktoo"}, "Is 'kto' meant"),
        ({"desirable_weight": -1.0}, "desirable_weight: found -1.0"),
        ({"undesirable_weight": float("nan")}, "undesirable_weight: found nan"),
        ({"kl_decay": 1.0}, "0 <= kl_decay < 1"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KtoConfig(**settings)
