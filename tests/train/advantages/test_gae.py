"""Oracles: a backward loop in float64 over the tokens that count, and the sum of discounted errors it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.advantages.gae import GAEConfig, gae, token_rewards, whiten

RNG = np.random.default_rng(0)
B, T = 5, 9
MASK = np.arange(T) < np.array([9, 4, 1, 0, 7])[:, None]
MASK[4, [0, 3, 5]] = False  # a prompt, and what tools said within the answer, before its last token too
REWARDS, VALUES = RNG.normal(size=(2, B, T)).astype(np.float32)
JUNK = np.where(MASK, 0, np.nan).astype(np.float32)  # outside the mask
f32 = lambda x: jnp.asarray(x, jnp.float32)
estimate = jax.jit(gae, static_argnames="cfg")


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.7, 1.0), (1.0, 0.0), (0.0, 1.0)])
def test_matches_a_backward_loop_on_ragged_rows(gamma, lam):
    got, returns = estimate(f32(REWARDS + JUNK), f32(VALUES + JUNK), jnp.asarray(MASK), GAEConfig(gamma=gamma, lam=lam))
    want, value = np.zeros((B, T)), np.zeros((B, T))
    for b in range(B):
        advantage = behind = 0.0
        for t in np.nonzero(MASK[b])[0][::-1]:
            delta = float(REWARDS[b, t]) + gamma * behind - float(VALUES[b, t])
            advantage = delta + gamma * lam * advantage
            want[b, t], value[b, t], behind = advantage, VALUES[b, t], float(VALUES[b, t])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(returns, want + value, rtol=1e-5, atol=1e-5)
    assert not np.asarray(got)[~MASK].any()
    assert not np.asarray(returns)[~MASK].any()


def test_with_lambda_1_a_return_is_the_discounted_sum_of_rewards():
    _, returns = estimate(f32(REWARDS), f32(VALUES), jnp.asarray(MASK), GAEConfig(gamma=0.8, lam=1.0))
    for b in range(B):
        kept = np.nonzero(MASK[b])[0]
        for n, t in enumerate(kept):
            want = sum(0.8**j * float(REWARDS[b, s]) for j, s in enumerate(kept[n:]))
            assert float(returns[b, t]) == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_no_gradient_passes():
    loss = lambda r, v: sum(jnp.sum(x**2) for x in gae(r, v, jnp.asarray(MASK)))
    for gradient in jax.grad(loss, argnums=(0, 1))(f32(REWARDS), f32(VALUES)):
        assert not np.asarray(gradient).any()


def test_rewards_of_tokens_are_a_penalty_and_at_the_last_the_score():
    logp, ref = RNG.normal(size=(2, B, T)).astype(np.float32)
    score = np.array([1.0, -2.0, 0.5, 9.0, 3.0], np.float32)
    got = token_rewards(f32(score), f32(logp + JUNK), f32(ref + JUNK), jnp.asarray(MASK), 0.3)
    want = np.zeros((B, T))
    for b, t in zip(*np.nonzero(MASK), strict=True):
        last = not MASK[b, t + 1 :].any()
        want[b, t] = -0.3 * (float(logp[b, t]) - float(ref[b, t])) + last * score[b]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(token_rewards(f32(score), x, f32(ref), jnp.asarray(MASK), 0.3)))(f32(logp))
    assert not np.asarray(gradient).any()


@pytest.mark.parametrize("ddof", [0, 1])
def test_whitened_numbers_are_those_of_a_list(ddof):
    got = np.asarray(whiten(f32(100 + 3 * VALUES + JUNK), jnp.asarray(MASK), eps=0.5, ddof=ddof))
    kept = (100 + 3 * VALUES.astype(np.float64))[MASK]
    np.testing.assert_allclose(got[MASK], (kept - kept.mean()) / np.sqrt(kept.var(ddof=ddof) + 0.5), rtol=0, atol=2e-5)
    assert not got[~MASK].any()


def test_whitening_one_number_or_equal_ones_is_finite():
    for x, mask in (
        (np.full((1, 3), 2.0), [[0, 1, 0]]),
        (np.full((1, 4), 0.5), [[1, 1, 1, 1]]),
        (np.ones((1, 2)), [[0, 0]]),
    ):
        assert not np.asarray(whiten(f32(x), jnp.asarray(mask, bool))).any()
    plain = np.asarray(whiten(f32([[0.0, 2.0]]), jnp.ones((1, 2), bool)))
    np.testing.assert_allclose(plain, [[-1 / np.sqrt(2), 1 / np.sqrt(2)]], rtol=1e-6)


@pytest.mark.errors
def test_discounts_outside_0_to_1_are_refused():
    for bad in (dict(gamma=1.1), dict(lam=-0.1), dict(gamma=float("nan"))):
        with pytest.raises(ValueError, match=f"GAEConfig.{next(iter(bad))}"):
            GAEConfig(**bad)
