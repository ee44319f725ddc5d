"""Generalised advantage estimation (https://arxiv.org/abs/1506.02438), and what PPO on text puts around it.

    R_t     = -beta (log pi_old - log pi_ref)_t + [t = last] score
    delta_t = R_t + gamma V_{t+1} - V_t              V behind the last token is 0
    A_t     = delta_t + gamma lambda A_{t+1}         return_t = A_t + V_t

A row is one answer. Tokens outside the mask are stepped over: what follows a token is the next one in the mask. The
penalty in R is the estimator k1 of the divergence from the reference, and as a reward it is right (as a loss it is not:
`objectives/kl_estimators.py`).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class GAEConfig:
    """Discounts; the defaults are what PPO on text uses."""

    gamma: float = 1.0
    lam: float = 0.95

    def __post_init__(self):
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"GAEConfig.{name}: found {getattr(self, name)}; expected a number from 0 to 1.")


def gae(
    rewards: Float[Array, "B T"], values: Float[Array, "B T"], mask: Bool[Array, "B T"], cfg: GAEConfig = GAEConfig()
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Advantages, not whitened, and the returns that a value model learns; both are 0 outside the mask."""
    stopped = lambda x: jax.lax.stop_gradient(jnp.where(mask, x.astype(jnp.float32), 0.0))
    rewards, values = stopped(rewards), stopped(values)

    def back(behind, now):
        advantage, value = behind  # of the next token in the mask, [B]
        reward, v, on = now
        delta = reward + cfg.gamma * value - v
        new = delta + cfg.gamma * cfg.lam * advantage
        return (jnp.where(on, new, advantage), jnp.where(on, v, value)), jnp.where(on, new, 0.0)

    zeros = jnp.zeros(mask.shape[:1], jnp.float32)
    advantages = jax.lax.scan(back, (zeros, zeros), (rewards.T, values.T, mask.T), reverse=True)[1].T
    return advantages, advantages + values


def token_rewards(
    score: Float[Array, " B"],
    logp: Float[Array, "B T"],
    logp_ref: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    beta: float,
) -> Float[Array, "B T"]:
    """R_t: the score at the last token of the mask, and a penalty on every token of it.

    Args:
      score: of the whole answer.
      logp: of its tokens under the policy that sampled them.
      logp_ref: likewise under the reference.
      mask: which tokens are the answer's; a row without any gets no score.
      beta: what the penalty counts.
    """
    penalty = jnp.where(mask, logp.astype(jnp.float32) - logp_ref.astype(jnp.float32), 0.0)
    left = jnp.cumsum(mask[:, ::-1].astype(jnp.int32), axis=1)[:, ::-1]  # tokens of the mask from here on
    last = mask & (left == 1)
    return jax.lax.stop_gradient(jnp.where(last, score.astype(jnp.float32)[:, None], 0.0) - beta * penalty)


def whiten(
    x: Float[Array, "B T"], mask: Bool[Array, "B T"], *, eps: float = 1e-8, ddof: int = 1
) -> Float[Array, "B T"]:
    """Mean 0 and variance 1 over the mask, 0 outside: (x - mean) / sqrt(variance + eps).

    Give it all answers of a step at once; parts of them would each be shifted by another mean. eps and ddof are those
    of TRL.
    """
    x = jnp.where(mask, x.astype(jnp.float32), 0.0)
    number = jnp.sum(mask, dtype=jnp.float32)
    mean = jnp.sum(x) / jnp.maximum(number, 1.0)
    centred = jnp.where(mask, x - mean, 0.0)
    return centred * jax.lax.rsqrt(jnp.sum(centred**2) / jnp.maximum(number - ddof, 1.0) + eps)
