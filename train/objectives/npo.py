"""Negative preference optimisation (2404.05868): unlearn answers, softly; and gradient ascent, which does it hard.

    NPO    (2 / beta) softplus(beta r)        its slope in P is 2 S(beta r): 1 at the start, 0 where r is far below 0
    GA     P / n                              its slope never ends: cap the steps

Both are minimised, so both make the answer less likely. For beta -> 0, NPO is r up to a constant. What keeps the rest
of the model (the NLL of answers to retain, or the KL from the original model) is a term of its own.
"""

import dataclasses

import jax
from jaxtyping import Array, Float

from .preference import Sums, average, check_beta, log_ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpoConfig:
    """How soon an answer is forgotten enough."""

    beta: float = 0.1  # on sums
    allow_large_beta: bool = False  # accept beta > 1

    def __post_init__(self):
        check_beta("NpoConfig", self.beta, large=self.allow_large_beta)


def npo(rows: Sums, cfg: NpoConfig = NpoConfig()) -> Float[Array, " n"]:
    """The loss of every answer to forget."""
    return (2.0 / cfg.beta) * jax.nn.softplus(cfg.beta * log_ratio(rows))


def gradient_ascent(rows: Sums) -> Float[Array, " n"]:
    """The average log-probability of every answer to forget, to be minimised; no reference is read."""
    return average(rows)
