"""Kahneman-Tversky optimisation (2402.01306): answers that are good or bad by themselves, not in pairs.

    desirable      lam_D (1 - S(beta (r - z0)))          z0 = max(0, mean_i [P(y'_i | x_i) - F(y'_i | x_i)])
    undesirable    lam_U (1 - S(beta (z0 - r)))          y'_i  an answer to another prompt

z0 estimates how far the policy is from the reference, and gets no gradient. `apo_zero_unpaired` (2408.06266) is the
same with z0 = 0. The paper wants lam_D n_D / (lam_U n_U) between 1 and 4/3, n how many rows of either kind there are.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .preference import Sums, check_beta, check_name, check_number, log_ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class KtoConfig:
    """How far from the reference, and what either kind of row counts."""

    beta: float = 0.1
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    desirable_weight: float = 1.0  # lam_D
    undesirable_weight: float = 1.0  # lam_U
    kl_decay: float = 0.0  # of the running mean behind z0; 0 is this batch alone
    allow_large_beta: bool = False  # accept beta > 1

    def __post_init__(self):
        check_beta("KtoConfig", self.beta, large=self.allow_large_beta)
        check_name("KtoConfig.loss", self.loss, ("kto", "apo_zero_unpaired"))
        for name in ("desirable_weight", "undesirable_weight"):
            weight = getattr(self, name)
            check_number(f"KtoConfig.{name}", weight, 0 <= weight < math.inf, "at least 0")
        check_number("KtoConfig.kl_decay", self.kl_decay, 0 <= self.kl_decay < 1, "0 <= kl_decay < 1")


def kto(
    rows: Sums, desirable: Bool[Array, " n"], kl: Float[Array, ""], cfg: KtoConfig = KtoConfig()
) -> Float[Array, " n"]:
    """The loss of every row.

    Args:
      rows: sums of answers to their own prompts.
      desirable: which are good.
      kl: of `mismatched_kl`; z0 is what of it is positive. `apo_zero_unpaired` does not look at it.
      cfg: beta and weights.
    """
    z0 = jnp.maximum(jax.lax.stop_gradient(kl).astype(jnp.float32), 0.0) if cfg.loss == "kto" else jnp.float32(0)
    x = cfg.beta * (log_ratio(rows) - z0)
    up, down = cfg.desirable_weight * jax.nn.sigmoid(-x), cfg.undesirable_weight * jax.nn.sigmoid(x)
    return jnp.where(desirable, up, down)


def mismatched_kl(
    rows: Sums,
    counted: Bool[Array, " n"],
    before: Float[Array, ""] | None = None,
    cfg: KtoConfig = KtoConfig(),
) -> Float[Array, ""]:
    """Mean log-ratio of answers put behind prompts of other rows, without gradient; it may be negative.

    The clamp of z0 biases the mean of a small batch upward; a running mean of what is not yet clamped does so less.

    Args:
      rows: sums of mismatched answers.
      counted: False for rows that pad the batch; if all do, the mean stays what it was.
      before: the running mean so far, None at the first batch.
      cfg: its decay.
    """
    number = jnp.sum(counted.astype(jnp.float32))
    now = jnp.sum(jnp.where(counted, jax.lax.stop_gradient(log_ratio(rows)), 0.0)) / jnp.maximum(number, 1.0)
    if before is None:
        return now
    before = jax.lax.stop_gradient(before).astype(jnp.float32)
    return jnp.where(number > 0, cfg.kl_decay * before + (1.0 - cfg.kl_decay) * now, before)
