"""Simple preference optimisation (2405.14734): averages for rewards, a margin to clear, no reference.

    softplus(-m)        m = beta ((rho(a_w) - rho(a_l)) - ratio)        ratio = gamma / beta        rho(a) = a

AlphaPO (2501.03884) gives the reward another shape: rho(a) = (1 - e^(-shape a)) / shape, with `a` the limit at 0.
CPO-SimPO adds the NLL of chosen answers, a term of its own, counted in tokens.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from .preference import Sums, average, check_beta, check_number, smoothed


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimpoConfig:
    """The settings of Llama-3-Base are the defaults."""

    beta: float = 2.0
    ratio: float = 0.5  # gamma / beta, the margin in units of the average log-probability
    eps: float = 0.0  # share of wrong labels
    shape: float = 0.0  # alpha of AlphaPO; 0 is SimPO
    nll: float = 0.0  # what the likelihood of chosen answers counts; 1 is CPO-SimPO

    def __post_init__(self):
        check_beta("SimpoConfig", self.beta, sums=False)
        check_number("SimpoConfig.ratio", self.ratio, 0 <= self.ratio < math.inf, "at least 0")
        check_number("SimpoConfig.eps", self.eps, 0 <= self.eps < 0.5, "0 <= eps < 0.5")
        check_number("SimpoConfig.shape", self.shape, math.isfinite(self.shape), "a finite number")
        check_number("SimpoConfig.nll", self.nll, 0 <= self.nll < math.inf, "at least 0")


PUBLISHED = {  # (config, learning rate), all with 128 pairs an update, one epoch
    "Mistral-Base": (SimpoConfig(beta=2.0, ratio=0.8), 3e-7),
    "Mistral-Instruct": (SimpoConfig(beta=2.5, ratio=0.1), 5e-7),
    "Llama-3-Base": (SimpoConfig(beta=2.0, ratio=0.5), 6e-7),
    "Llama-3-Instruct": (SimpoConfig(beta=2.5, ratio=0.55), 1e-6),
    "Llama-3-Instruct v0.2": (SimpoConfig(beta=10.0, ratio=0.3), 1e-6),
    "Gemma-2-9B-it": (SimpoConfig(beta=10.0, ratio=0.5), 8e-7),
}


def simpo(chosen: Sums, rejected: Sums, cfg: SimpoConfig = SimpoConfig()) -> Float[Array, " n"]:
    """The loss of every pair; no reference is read."""
    return smoothed(cfg.beta * (reward(chosen, cfg) - reward(rejected, cfg) - cfg.ratio), cfg.eps)


def reward(sums: Sums, cfg: SimpoConfig = SimpoConfig()) -> Float[Array, "*n"]:
    """rho(a); beta times it is what SimPO logs as the reward of a side."""
    a = average(sums)
    if abs(cfg.shape) < 1e-6:
        return a
    return -jnp.expm1(jnp.minimum(-cfg.shape * a, 80.0)) / cfg.shape  # e^80 is the last to leave float32 some room
