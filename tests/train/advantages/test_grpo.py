"""Oracles: the definition by loops in float64, and printed values; then what must hold whatever the rewards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxaroo.train.advantages.grpo import GRPOConfig, group_statistics, grpo

NAN = np.nan
REWARDS = np.array([[1.0, 0.0, 0.5, 2.0], [NAN, 3.0, -1.0, 0.0], [0.5, 0.5, 0.5, 0.5], [7.0, 1.0, 2.0, 4.0]])
PRESENT = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 0, 0]], bool)  # the last has a single member
advantages = jax.jit(grpo, static_argnames="cfg")
some = st.lists(st.floats(-4, 4, width=32), min_size=12, max_size=12).map(
    lambda v: jnp.asarray(v, jnp.float32).reshape(3, 4)
)


def oracle(rewards, present, scale="group", eps=1e-6, ddof=1):
    """One group at a time, over the rewards that are there."""
    there = present & ~np.isnan(rewards)
    spread = lambda x: np.std(x, ddof=ddof) if len(x) > ddof else 0.0
    out = np.zeros(rewards.shape)
    for g, group in enumerate(rewards):
        if there[g].any():
            own = group[there[g]]
            divisor = {"group": spread(own) + eps, "batch": spread(rewards[there]) + eps, "none": 1.0}[scale]
            out[g, there[g]] = (own - own.mean()) / divisor
    return out


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_matches_loops_over_the_members_that_have_a_reward(scale, ddof, eps):
    cfg = GRPOConfig(scale=scale, ddof=ddof, eps=eps)
    got, _ = advantages(jnp.asarray(REWARDS, jnp.float32), jnp.asarray(PRESENT), cfg)
    np.testing.assert_allclose(got, oracle(REWARDS, PRESENT, scale, eps, ddof), rtol=1e-5, atol=1e-6)
    assert got.dtype == jnp.float32


def test_printed_values():
    four, _ = advantages(jnp.asarray([[1.0, 0, 0, 1]]))
    np.testing.assert_allclose(four[0], [0.866024, -0.866024, -0.866024, 0.866024], rtol=0, atol=5e-7)
    five, _ = advantages(jnp.asarray([[1.0, 1, 0, 0, 1]]))
    np.testing.assert_allclose(five[0], [0.730295, 0.730295, -1.095443, -1.095443, 0.730295], rtol=0, atol=6e-7)
    truthrl, _ = advantages(jnp.asarray([[1.0, 0, -1, -1]]))
    np.testing.assert_allclose(truthrl[0], [1.305581, 0.261116, -0.783349, -0.783349], rtol=0, atol=6e-7)
    trl, _ = advantages(jnp.asarray([[1.0, 0, 0, 1]]), cfg=GRPOConfig(eps=1e-4))
    np.testing.assert_allclose(trl[0, 0], 0.5 / (np.sqrt(1 / 3) + 1e-4), rtol=1e-6)


def test_metrics_are_those_of_a_loop():
    _, got = advantages(jnp.asarray(REWARDS, jnp.float32), jnp.asarray(PRESENT))
    there = PRESENT & ~np.isnan(REWARDS)
    std = [np.std(r[t], ddof=1) if t.sum() > 1 else 0.0 for r, t in zip(REWARDS, there, strict=True)]
    want = {
        "reward": REWARDS[there].mean(),
        "reward_std": np.mean(std),
        "frac_zero_std": 0.5,  # one of equal rewards, one of a single member
        "frac_rewarded": there.mean(),
    }
    assert {name: float(x) for name, x in got.items()} == pytest.approx(want, rel=1e-6)


@given(some)
def test_every_group_sums_to_zero(rewards):
    got = np.asarray(advantages(rewards)[0], np.float64)
    np.testing.assert_allclose(got.sum(1), 0, atol=1e-5)
    np.testing.assert_allclose(np.asarray(advantages(rewards, cfg=GRPOConfig(scale="none"))[0]).sum(1), 0, atol=1e-5)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 1e4 + 0.1, -2.3])
@pytest.mark.parametrize("number", [3, 5, 7])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_nothing(value, number, scale):
    """Their mean, rounded, need not be one of them; beside eps = 1e-6 that would be seen."""
    got, metrics = advantages(jnp.full((1, number), value, jnp.float32), cfg=GRPOConfig(scale=scale))
    assert not np.asarray(got).any()
    assert float(metrics["frac_zero_std"]) == 1


@given(st.lists(st.integers(-8, 8), min_size=12, max_size=12), st.integers(-512, 512))
def test_shifting_rewards_changes_nothing(eighths, shift):
    """Of numbers that float32 holds exactly: then not a bit."""
    rewards = jnp.asarray(eighths, jnp.float32).reshape(3, 4) / 8
    np.testing.assert_array_equal(advantages(rewards + shift)[0], advantages(rewards)[0])


def test_a_group_without_rewards_and_no_gradient():
    nothing, metrics = advantages(jnp.full((2, 3), NAN))
    assert not np.asarray(nothing).any()
    assert {name: float(x) for name, x in metrics.items()} == dict(
        reward=0, reward_std=0, frac_zero_std=1, frac_rewarded=0
    )
    gradient = jax.grad(lambda r: jnp.sum(grpo(r)[0] * jnp.arange(12.0).reshape(3, 4)))(jnp.arange(12.0).reshape(3, 4))
    assert not np.asarray(gradient).any()


def test_statistics_of_a_group():
    got = group_statistics(jnp.asarray(REWARDS, jnp.float32), jnp.asarray(PRESENT))
    there = PRESENT & ~np.isnan(REWARDS)
    np.testing.assert_array_equal(got.present, there)
    np.testing.assert_allclose(got.mean, [r[t].mean() for r, t in zip(REWARDS, there, strict=True)], rtol=1e-6)
    np.testing.assert_allclose(got.std[:2], [np.std([1, 0, 0.5], ddof=1), np.std([3, -1, 0], ddof=1)], rtol=1e-6)


@pytest.mark.errors
def test_settings_that_mean_nothing_are_refused():
    for bad in (dict(scale="token"), dict(eps=0.0), dict(eps=NAN), dict(ddof=2)):
        with pytest.raises(ValueError, match=f"GRPOConfig.{next(iter(bad))}"):
            GRPOConfig(**bad)
