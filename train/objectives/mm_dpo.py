"""MM-DPO of MM-RLHF (2502.10391): DPO whose beta grows with how much better the chosen answer was rated.

    softplus(-beta(d) (r_w - r_l))        beta(d) = beta0 (1 + w (1 - e^(-k d)))        d = score_w - score_l >= 0

Ratings are data: beta(d) gets no gradient. A weighted NLL of chosen answers, `chosen_nll`, is added in the authors'
script, which also has w = 0.1; k is that of the paper's account.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .preference import Sums, check_beta, check_number, log_ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmDpoConfig:
    """Beta at no gap, and how it grows."""

    beta: float = 0.1  # beta0
    growth: float = 0.1  # w: beta is at most 1 + w times beta0
    rate: float = 0.5  # k, per unit of the rating
    floor: float = 1e-3  # of beta, for ratings that contradict the labels
    sft: float = 0.25  # what the NLL of chosen answers counts
    allow_large_beta: bool = False  # accept beta > 1

    def __post_init__(self):
        check_number("MmDpoConfig.growth", self.growth, 0 <= self.growth < math.inf, "at least 0")
        check_beta("MmDpoConfig", self.beta * (1 + self.growth), large=self.allow_large_beta)
        check_number("MmDpoConfig.rate", self.rate, 0 < self.rate < math.inf, "a positive number")
        check_number("MmDpoConfig.floor", self.floor, 0 < self.floor <= self.beta, "0 < floor <= beta")
        check_number("MmDpoConfig.sft", self.sft, 0 <= self.sft < math.inf, "at least 0")


def mm_dpo(
    chosen: Sums, rejected: Sums, gap: Float[Array, " n"], cfg: MmDpoConfig = MmDpoConfig()
) -> Float[Array, " n"]:
    """The loss of every pair.

    Args:
      chosen: sums of the preferred answers.
      rejected: of the others.
      gap: d, the rating of the chosen answer less that of the other.
      cfg: beta.
    """
    return jax.nn.softplus(-beta_of(gap, cfg) * (log_ratio(chosen) - log_ratio(rejected)))


def beta_of(gap: Float[Array, " n"], cfg: MmDpoConfig = MmDpoConfig()) -> Float[Array, " n"]:
    """beta(d), without gradient; its mean and largest value are worth a look."""
    d = jax.lax.stop_gradient(gap).astype(jnp.float32)
    grown = -jnp.expm1(jnp.minimum(-cfg.rate * d, 80.0))  # a gap far below 0 would overflow before the floor
    return jnp.maximum(cfg.beta * (1.0 + cfg.growth * grown), cfg.floor)
