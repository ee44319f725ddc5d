"""Oracles: the mix by loops in float64; multipliers by finite differences of what they descend."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.advantages.constrained import (
    ConstrainedConfig,
    Multipliers,
    constrained,
    init_multipliers,
    squash,
    step_multipliers,
)

RNG = np.random.default_rng(0)
KL, OWN = RNG.normal(size=(3, 4)).astype(np.float32), RNG.normal(size=(2, 3, 4)).astype(np.float32)
FUNCTION = {"equality": math.tanh, "inequality": lambda x: 1 / (1 + math.exp(-x))}
KINDS = pytest.mark.parametrize("kind", [*FUNCTION])


def state(raw, velocity=(0.0, 0.0)):
    return Multipliers(jnp.asarray(raw, jnp.float32), jnp.asarray(velocity, jnp.float32))


@KINDS
def test_the_mix_is_that_of_a_loop(kind):
    raw = (0.2, -0.1)
    got = constrained(jnp.asarray(KL), jnp.asarray(OWN), state(raw), ConstrainedConfig(kind=kind))
    s = [FUNCTION[kind](l) for l in raw]
    for b, t in np.ndindex(3, 4):
        want = (2 - s[0] - s[1]) * float(KL[b, t]) + s[0] * float(OWN[0, b, t]) + s[1] * float(OWN[1, b, t])
        assert float(got[b, t]) == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_printed_values():
    cfg, at = ConstrainedConfig(kind="equality"), state((0.2, -0.1))
    np.testing.assert_allclose(squash(at.raw, cfg), [0.197375, -0.099668], rtol=0, atol=6e-7)
    unit = lambda i: constrained(jnp.full((1, 1), 1.0 * (i == 0)), jnp.eye(3)[i, 1:].reshape(2, 1, 1), at, cfg)
    assert float(unit(0)[0, 0]) == pytest.approx(1.9022927, abs=3e-7)
    assert float(unit(2)[0, 0]) == pytest.approx(-0.099668, abs=6e-7)


def test_multipliers_begin_at_zero_and_there_equality_keeps_kl_alone():
    cfg = ConstrainedConfig(kind="equality")
    np.testing.assert_array_equal(constrained(jnp.asarray(KL), jnp.asarray(OWN), init_multipliers(cfg), cfg), 2 * KL)
    assert init_multipliers(ConstrainedConfig(thresholds=(1.0, 2.0, 3.0))).raw.shape == (3,)


@KINDS
def test_a_step_descends_the_multipliers_loss(kind):
    """Its gradient by finite differences in float64, with momentum as in PyTorch's SGD."""
    cfg = ConstrainedConfig(thresholds=(0.44, 0.238), kind=kind, learning_rate=0.3, momentum=0.25, clip=1e3)
    raw, velocity, J = [0.5, -0.3], [0.2, 0.7], [0.9, 0.1]
    loss = lambda l: sum(FUNCTION[kind](x) * (j - th) for x, j, th in zip(l, J, cfg.thresholds, strict=True))
    at, metrics = state(raw, velocity), {}
    for _ in range(3):
        at, metrics = step_multipliers(jnp.asarray(J, jnp.float32), at, cfg)
        before = [FUNCTION[kind](x) for x in raw]
        g = [(loss(np.add(raw, d)) - loss(np.subtract(raw, d))) / 2e-6 for d in np.eye(2) * 1e-6]
        velocity = [0.25 * m + x for m, x in zip(velocity, g, strict=True)]
        raw = [l - 0.3 * m for l, m in zip(raw, velocity, strict=True)]
        np.testing.assert_allclose(at.raw, raw, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(at.velocity, velocity, rtol=1e-5, atol=1e-6)
    want = {f"lambda_{i}": before[i] for i in range(2)} | {f"constraint_{i}_value": J[i] for i in range(2)}
    want |= {f"constraint_{i}_gap": J[i] - cfg.thresholds[i] for i in range(2)}
    assert {name: float(x) for name, x in metrics.items()} == pytest.approx(want, rel=1e-5)


def test_the_gradient_is_clipped_to_a_norm():
    cfg = ConstrainedConfig(thresholds=(0.0, 0.0), clip=0.5)
    large, _ = step_multipliers(jnp.asarray([30.0, -40.0]), state((0.0, 0.0)), cfg)  # at 0 the slope of tanh is 1
    np.testing.assert_allclose(large.velocity, [0.3, -0.4], rtol=1e-6)
    small, _ = step_multipliers(jnp.asarray([0.3, -0.3]), state((0.0, 0.0)), cfg)
    np.testing.assert_allclose(small.velocity, [0.3, -0.3], rtol=1e-6)


@KINDS
def test_a_reward_above_its_threshold_lowers_its_multiplier(kind):
    cfg = ConstrainedConfig(kind=kind)
    new, _ = jax.jit(step_multipliers, static_argnames="cfg")(jnp.asarray([0.5, 0.1]), state((0.3, 0.3)), cfg)
    assert float(new.raw[0]) < 0.3 < float(new.raw[1])  # 0.5 > 0.44; 0.1 < 0.238


def test_no_gradient_passes_through_the_mix():
    cfg = ConstrainedConfig()
    loss = lambda kl, own, raw: jnp.sum(constrained(kl, own, state((0, 0))._replace(raw=raw), cfg) ** 2)
    for gradient in jax.grad(loss, argnums=(0, 1, 2))(jnp.asarray(KL), jnp.asarray(OWN), jnp.asarray([0.2, -0.1])):
        assert not np.asarray(gradient).any()


@pytest.mark.errors
def test_settings_that_mean_nothing_and_missing_rewards_are_refused():
    bad = [dict(thresholds=()), dict(kind="tanh"), dict(learning_rate=0.0), dict(clip=0.0), dict(momentum=1.0)]
    for settings in bad:
        with pytest.raises(ValueError, match=f"ConstrainedConfig.{next(iter(settings))}"):
            ConstrainedConfig(**settings)
    with pytest.raises(ValueError, match=r"shape \(1, 3, 4\); expected \(2, 3, 4\)"):
        constrained(jnp.asarray(KL), jnp.asarray(OWN[:1]), state((0, 0)), ConstrainedConfig())
