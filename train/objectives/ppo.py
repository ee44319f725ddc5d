"""The value model of PPO (https://arxiv.org/abs/1707.06347): its loss, and how much it explains.

    L = c / 2 mean_t max((V_t - G_t)^2, (clip(V_t, V_old,t - e, V_old,t + e) - G_t)^2)

G is the return (`advantages/gae.py`), V_old the value when the answer was sampled. The mean is over the tokens of the
window. The policy's loss is `policy_gradient`, with its defaults.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..data.pipeline import Batch
from ..step import Term, Terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueLossConfig:
    """How far a value may move for its gradient, and what it counts beside the policy's loss."""

    clip: float | None = 0.2  # e; None does not clip
    coefficient: float = 0.1  # c

    def __post_init__(self):
        if self.clip is not None and not 0 < self.clip < float("inf"):
            raise ValueError(f"ValueLossConfig.clip: found {self.clip}; expected a positive number or None.")
        if not 0 < self.coefficient < float("inf"):
            raise ValueError(f"ValueLossConfig.coefficient: found {self.coefficient}; expected a positive number.")


def ppo_value(
    values: Float[Array, "B T"],
    values_old: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    batch: Batch,
    cfg: ValueLossConfig = ValueLossConfig(),
) -> tuple[Terms, Terms]:
    """Terms and metrics of a value model's guesses at every target.

    Returns:
      `value`; and as metrics `value_loss`, the same without c, and `value_clipped`, the share of tokens at which the
      clipped square is the larger one.
    """
    stopped = lambda x: jax.lax.stop_gradient(jnp.where(batch.mask, x.astype(jnp.float32), 0.0))
    values = jnp.where(batch.mask, values.astype(jnp.float32), 0.0)
    old, returns, ones = stopped(values_old), stopped(returns), batch.mask.astype(jnp.float32)
    square = (values - returns) ** 2
    clipped = square if cfg.clip is None else (jnp.clip(values, old - cfg.clip, old + cfg.clip) - returns) ** 2
    loss = 0.5 * jnp.maximum(square, clipped)
    return {"value": Term(cfg.coefficient * loss, batch.weights, "token")}, {
        "value_loss": Term(loss, ones, "token"),
        "value_clipped": Term((clipped > square).astype(jnp.float32), ones, "token"),
    }


def explained_variance(
    values: Float[Array, "B T"], returns: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """1 - Var(G - V) / Var(G) over the mask, of all answers of a step at once; 0 if the returns are all the same."""
    number = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)

    def variance(x):
        x = x.astype(jnp.float32)
        x = jnp.where(mask, x - jnp.min(jnp.where(mask, x, jnp.inf)), 0.0)  # equal numbers become zeros, and their mean
        return jnp.sum(jnp.where(mask, x - jnp.sum(x) / number, 0.0) ** 2) / number

    whole = variance(returns)
    return jnp.where(whole > 0, 1 - variance(returns - values) / jnp.where(whole > 0, whole, 1.0), 0.0)
