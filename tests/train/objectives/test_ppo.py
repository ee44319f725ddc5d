"""Oracles: float64 loops over the tokens that count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.data.pipeline import Batch
from jaxaroo.train.objectives.ppo import ValueLossConfig, explained_variance, ppo_value

RNG = np.random.default_rng(0)
MASK = np.array([[0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]], bool)
WEIGHTS = (MASK * np.array([[1.0], [0.5], [2.0]])).astype(np.float32)
OLD, RETURNS = RNG.normal(size=(2, 3, 6)).astype(np.float32)
VALUES = (OLD + RNG.normal(size=(3, 6)) * 0.5).astype(np.float32)
JUNK = np.where(MASK, 0, np.nan).astype(np.float32)  # outside the mask
f32 = lambda x: jnp.asarray(x, jnp.float32)
BATCH = Batch(*[jnp.ones(MASK.shape, jnp.int32)] * 4, jnp.asarray(MASK), f32(WEIGHTS))


def each(at, clip, values=VALUES):
    v, old, g = float(values[at]), float(OLD[at]), float(RETURNS[at])
    cut = v if clip is None else min(max(v, old - clip), old + clip)
    return 0.5 * max((v - g) ** 2, (cut - g) ** 2), (cut - g) ** 2 > (v - g) ** 2


@pytest.mark.parametrize("clip", [None, 0.2, 0.6])
def test_value_gradient_and_metrics_are_those_of_loops(clip):
    cfg = ValueLossConfig(clip=clip, coefficient=0.3)

    def loss(values):
        terms, metrics = ppo_value(values, f32(OLD + JUNK), f32(RETURNS + JUNK), BATCH, cfg)
        total = {
            name: jnp.sum(jnp.where(t.weight != 0, t.value, 0) * t.weight) for name, t in (terms | metrics).items()
        }
        assert {t.unit for t in (terms | metrics).values()} == {"token"}
        return total["value"], total

    (_, got), gradient = jax.value_and_grad(loss, has_aux=True)(f32(VALUES + JUNK))
    want, slope = dict(value=0.0, value_loss=0.0, value_clipped=0.0), np.zeros(MASK.shape)
    for at in zip(*np.nonzero(MASK), strict=True):
        x, is_clipped = each(at, clip)
        want["value"] += 0.3 * WEIGHTS[at] * x
        want["value_loss"] += x
        want["value_clipped"] += is_clipped
        up, down = VALUES.astype(np.float64), VALUES.astype(np.float64)
        up[at], down[at] = up[at] + 1e-6, down[at] - 1e-6
        slope[at] = 0.3 * WEIGHTS[at] * (each(at, clip, up)[0] - each(at, clip, down)[0]) / 2e-6
    assert {name: float(x) for name, x in got.items()} == pytest.approx(want, rel=1e-5)
    assert clip is None or 0 < want["value_clipped"] < MASK.sum()
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-5)


def test_no_gradient_passes_through_what_was_and_what_came():
    loss = lambda old, returns: jnp.sum(ppo_value(f32(VALUES), old, returns, BATCH)[0]["value"].value)
    for gradient in jax.grad(loss, argnums=(0, 1))(f32(OLD), f32(RETURNS)):
        assert not np.asarray(gradient).any()


def test_explained_variance_is_that_of_a_list():
    got = explained_variance(f32(VALUES + JUNK), f32(RETURNS + JUNK), jnp.asarray(MASK))
    want = 1 - np.var((RETURNS - VALUES)[MASK]) / np.var(RETURNS[MASK])
    assert float(got) == pytest.approx(want, rel=1e-5)
    assert float(explained_variance(f32(RETURNS + 3), f32(RETURNS), jnp.asarray(MASK))) == pytest.approx(1, abs=1e-5)
    for mask in (MASK, MASK & False):
        assert float(explained_variance(f32(VALUES), jnp.full((3, 6), 0.1), jnp.asarray(mask))) == 0


@pytest.mark.errors
def test_settings_that_mean_nothing_are_refused():
    for bad in (dict(clip=0.0), dict(clip=float("nan")), dict(coefficient=0.0)):
        with pytest.raises(ValueError, match=f"ValueLossConfig.{next(iter(bad))}"):
            ValueLossConfig(**bad)
