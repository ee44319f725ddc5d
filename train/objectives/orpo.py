"""Odds ratio preference optimisation (2403.07691): fine-tuning that also moves odds, with no reference.

    NLL(chosen) + lam softplus(-LO)          LO = log odds(a_w) - log odds(a_l)          odds(a) = e^a / (1 - e^a)

a is the average log-probability of a token. The NLL is a term of its own, counted in tokens: of the prompt and the
chosen answer in TRL, of the answer alone if `nll_prompt` is off.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .preference import Sums, average, check_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrpoConfig:
    """What the odds count beside the likelihood."""

    lam: float = 0.1
    nll_prompt: bool = True  # the likelihood is that of the prompt too

    def __post_init__(self):
        check_number("OrpoConfig.lam", self.lam, 0 < self.lam < math.inf, "a positive number")


def orpo(chosen: Sums, rejected: Sums, cfg: OrpoConfig = OrpoConfig()) -> Float[Array, " n"]:
    """The odds' part of the loss of every pair; no reference is read."""
    return cfg.lam * jax.nn.softplus(-log_odds_ratio(chosen, rejected))


def log_odds_ratio(chosen: Sums, rejected: Sums) -> Float[Array, " n"]:
    """LO. TRL logs its mean as `log_odds_chosen`, and that of -softplus(-LO) as `log_odds_ratio`."""
    a_w, a_l = average(chosen), average(rejected)
    return (a_w - a_l) - (log1mexp(a_w) - log1mexp(a_l))


def log1mexp(a: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """log(1 - e^a) of a < 0; from -1e-7 up it is that of -1e-7, where an answer is certain.

    Either form is exact on its own side of -ln 2. Close to 0 the second sees a harmless value instead: where e^a rounds
    to 1 its gradient would be NaN, and stay so when it is selected away.
    """
    a = jnp.minimum(a, -1e-7)
    near = a > -math.log(2.0)
    by_expm1 = jnp.log(-jnp.expm1(a))
    by_log1p = jnp.log1p(-jnp.exp(jnp.where(near, -1.0, a)))
    return jnp.where(near, by_expm1, by_log1p)
