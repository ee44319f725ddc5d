"""Contrastive preference optimisation (2401.08417): DPO under a uniform reference, and the likelihood of the chosen.

    softplus(-beta (P_w - P_l)) + alpha NLL(chosen)

The NLL is a term of its own, `chosen_nll`, counted in tokens of chosen answers. `hinge` and `ipo` replace softplus; ipo
is on averages, as in TRL.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .preference import Sums, average, check_beta, check_name, check_number, smoothed


@dataclasses.dataclass(frozen=True, kw_only=True)
class CpoConfig:
    """Beta, the form of the loss, and what the likelihood counts."""

    beta: float = 0.1
    alpha: float = 1.0  # weight of the NLL
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    eps: float = 0.0  # share of wrong labels, for sigmoid
    allow_large_beta: bool = False  # accept beta > 1 on sums

    def __post_init__(self):
        check_beta("CpoConfig", self.beta, sums=self.loss != "ipo", large=self.allow_large_beta)
        check_number("CpoConfig.alpha", self.alpha, 0 <= self.alpha < math.inf, "at least 0")
        check_name("CpoConfig.loss", self.loss, ("sigmoid", "hinge", "ipo"))
        check_number("CpoConfig.eps", self.eps, 0 <= self.eps < 0.5, "0 <= eps < 0.5")
        if self.eps and self.loss != "sigmoid":
            raise ValueError(f"CpoConfig.eps: found {self.eps} with {self.loss}; expected 0, which only sigmoid heeds.")


def cpo(chosen: Sums, rejected: Sums, cfg: CpoConfig = CpoConfig()) -> Float[Array, " n"]:
    """The contrast of every pair; no reference is read."""
    if cfg.loss == "ipo":
        return (average(chosen) - average(rejected) - 0.5 / cfg.beta) ** 2
    x = cfg.beta * (chosen.policy.astype(jnp.float32) - rejected.policy.astype(jnp.float32))
    return jax.nn.relu(1.0 - x) if cfg.loss == "hinge" else smoothed(x, cfg.eps)
