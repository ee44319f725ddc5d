"""Distributional dispreference optimisation (2403.03419 Eq. 3): learn from bad answers alone.

    softplus(-u)        u = (beta / K) sum_i r(y_i) - alpha r(y_l)

y_l is the dispreferred answer, y_i are K answers that the initial model wrote itself: they hold the policy where it
was. The reference is that initial model, and the samples must be its own. With K = 1 and alpha = beta this is DPO.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .preference import Sums, check_beta, check_number, log_ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class D2oConfig:
    """The settings of the paper."""

    beta: float = 0.1  # of its own samples
    alpha: float = 0.1  # of the dispreferred answer
    samples: int = 11  # K, answers a prompt
    allow_large_beta: bool = False  # accept beta or alpha > 1

    def __post_init__(self):
        check_beta("D2oConfig", self.beta, large=self.allow_large_beta)
        top = math.inf if self.allow_large_beta else 1.0
        check_number("D2oConfig.alpha", self.alpha, 0 < self.alpha <= top, f"0 < alpha <= {top}")
        check_number("D2oConfig.samples", self.samples, self.samples >= 1, "at least 1")


def d2o(samples: Sums, rejected: Sums, cfg: D2oConfig = D2oConfig()) -> Float[Array, " n"]:
    """The loss of every prompt.

    Args:
      samples: sums of the model's own answers, [n, K].
      rejected: of the dispreferred ones, [n].
      cfg: both strengths.

    Raises:
      ValueError: if K is another.
    """
    if samples.policy.shape != (*rejected.policy.shape, cfg.samples):
        raise ValueError(
            f"d2o: found samples {samples.policy.shape} beside answers {rejected.policy.shape}; "
            f"expected {cfg.samples} an answer, as D2oConfig.samples says."
        )
    u = cfg.beta * jnp.mean(log_ratio(samples), axis=-1) - cfg.alpha * log_ratio(rejected)
    return jax.nn.softplus(-u)
