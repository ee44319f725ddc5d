"""Oracle: sets of members by loops over prefixes, as the paper defines them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.advantages.grpo import GRPOConfig, grpo
from jaxaroo.train.advantages.tempo import TEMPOConfig, tempo

G, K, T = 6, 5, 7
advantages = jax.jit(tempo, static_argnames="cfg")


def groups():
    """Two symbols, so that answers share prefixes; ragged; some members without a reward; padding holds junk."""
    rng = np.random.default_rng(3)
    tokens = (rng.random((G, K, T)) < 0.25).astype(np.int32)
    mask = np.arange(T) < rng.integers(1, T + 1, (G, K, 1))
    rewards = rng.integers(0, 3, (G, K)).astype(np.float32)
    rewards[1, 2], present = np.nan, rng.random((G, K)) < 0.85
    present[4] = [0, 0, 1, 0, 0]
    return tokens, mask, rewards, present


def oracle(tokens, mask, rewards, present, eps=1e-6, ddof=1):
    """Advantages, and what is measured of the tree."""
    out, branches, jumps, depths = np.zeros(tokens.shape), [], [], []
    for g in range(len(tokens)):
        members = [k for k in range(tokens.shape[1]) if present[g, k] and not np.isnan(rewards[g, k])]
        answer = {k: [*tokens[g, k, : mask[g, k].sum()]] for k in members}
        R = {k: float(rewards[g, k]) for k in members}
        mean = np.mean([*R.values()]) if R else 0.0
        std = np.std([*R.values()], ddof=ddof) if len(R) > ddof else 0.0
        for i in members:
            before = members
            shared = [0]
            for t in range(len(answer[i])):
                now = [k for k in before if len(answer[k]) > t and answer[k][t] == answer[i][t]]
                td = np.mean([R[k] for k in now]) - np.mean([R[k] for k in before])
                out[g, i, t] = (R[i] - mean + td) / (std + eps)
                branches.append(len(now) < len(before))
                jumps.append(abs(td))
                if len(now) > 1:
                    shared.append(t + 1)
                before = now
            depths.append(max(shared))
    return out, {"branch_frac": np.mean(branches), "td_abs_mean": np.mean(jumps), "mean_depth": np.mean(depths)}


@pytest.mark.parametrize("cfg", [TEMPOConfig(), TEMPOConfig(eps=0.3, ddof=0)])
def test_matches_loops_over_prefixes(cfg):
    data = groups()
    got, metrics = advantages(*map(jnp.asarray, data), cfg=cfg)
    want, measured = oracle(*data, eps=cfg.eps, ddof=cfg.ddof)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert 0.1 < measured["branch_frac"] < 0.9  # the data has branches, and tokens that are none
    assert {name: float(metrics[name]) for name in measured} == pytest.approx(measured, rel=1e-5)
    of_groups = grpo(jnp.asarray(data[2]), jnp.asarray(data[3]), GRPOConfig(ddof=cfg.ddof))[1]
    want = {name: float(x) for name, x in of_groups.items()}
    assert {name: float(metrics[name]) for name in want} == pytest.approx(want, rel=1e-6)


def test_printed_values():
    tokens = jnp.asarray([[[5, 7, 1], [5, 8, 2], [5, 8, 3], [6, 9, 4]]])
    got, _ = advantages(tokens, jnp.ones((1, 4, 3), bool), jnp.asarray([[1.0, 1, 0, 0]]))
    want = [
        [1.154699, 1.443373, 0.866024],
        [1.154699, 0.577349, 1.732048],
        [-0.577349, -1.154699, -1.732048],
        [-1.732048, -0.866024, -0.866024],
    ]
    np.testing.assert_allclose(got[0], want, rtol=0, atol=6e-7)


def test_identical_answers_give_grpo_to_the_bit():
    rewards = jnp.asarray([[0.1, 0.7, 0.3, 0.3], [1.0, 0, 0, 1]])
    same = jnp.broadcast_to(jnp.asarray([4, 2, 2, 9], jnp.int32), (2, 4, 4))
    got, metrics = advantages(same, jnp.ones((2, 4, 4), bool), rewards)
    np.testing.assert_array_equal(got, np.broadcast_to(np.asarray(grpo(rewards)[0])[..., None], (2, 4, 4)))
    assert float(metrics["branch_frac"]) == 0
    assert float(metrics["mean_depth"]) == 4


def test_answers_that_part_at_once_get_twice_grpo_there_and_grpo_after():
    rewards = jnp.asarray([[1.0, 0, 0, 1], [0.2, 0.9, 0.4, 0.1]])
    tokens = jnp.tile(jnp.arange(4, dtype=jnp.int32)[None, :, None], (2, 1, 3)).at[:, :, 1:].set(7)
    got, _ = advantages(tokens, jnp.ones((2, 4, 3), bool), rewards)
    group = np.asarray(grpo(rewards)[0])
    np.testing.assert_allclose(got[..., 0], 2 * group, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got[..., 1:], np.stack([group, group], -1), rtol=1e-6, atol=1e-6)


def test_every_column_sums_to_zero_while_all_are_active():
    tokens, _, rewards, _ = groups()
    got, _ = advantages(jnp.asarray(tokens), jnp.ones((G, K, T), bool), jnp.asarray(np.nan_to_num(rewards)))
    np.testing.assert_allclose(np.asarray(got, np.float64).sum(1), 0, atol=1e-5)


@pytest.mark.slow
def test_equal_rewards_give_exactly_nothing_and_no_gradient_passes():
    tokens, mask, _, _ = groups()
    got, _ = advantages(jnp.asarray(tokens), jnp.asarray(mask), jnp.full((G, K), 0.1))
    assert not np.asarray(got).any()
    weights = jnp.arange(G * K * T, dtype=jnp.float32).reshape(G, K, T)
    rewards = jnp.arange(G * K, dtype=jnp.float32).reshape(G, K)
    loss = lambda r: jnp.sum(tempo(jnp.asarray(tokens), jnp.asarray(mask), r)[0] * weights)
    assert not np.asarray(jax.grad(loss)(rewards)).any()


def test_its_eps_is_that_of_grpo():
    assert TEMPOConfig().eps == GRPOConfig().eps


@pytest.mark.errors
def test_settings_that_mean_nothing_are_refused():
    for bad in (dict(eps=0.0), dict(ddof=2)):
        with pytest.raises(ValueError, match=f"TEMPOConfig.{next(iter(bad))}"):
            TEMPOConfig(**bad)
