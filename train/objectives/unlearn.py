"""Unlearning: make some answers unlikely, and keep the rest of the model (2404.05868, 2407.10058).

    forget    ga      + P / n                       gradient ascent
              npo     (2 / beta) softplus(beta r)   on sums; its pull ends where the answer is forgotten
              rgd     - Q / m                       Q, m of a refusal: "I do not know", or one that names whom (NAUF)
              rdpo    DPO of the refusal over the answer
    retain    none
              gd      - sum_t log p / tokens        of an answer to keep
              kld     KL(original || policy)        at the tokens of that answer, over the whole vocabulary

An example is a row to forget and, beside it, one to retain. P, r and n are of the answer (`preference.py`).
"""

import dataclasses
import math
from typing import Literal

import jax
from jaxtyping import Array, Float

from .dpo import DpoConfig, sigmoid
from .npo import NpoConfig, gradient_ascent, npo
from .preference import Sums, average, check_beta, check_name, check_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnlearnConfig:
    """How to forget, and how to retain; NPO with the likelihood of what is retained."""

    forget: Literal["ga", "npo", "rgd", "rdpo"] = "npo"
    retain: Literal["none", "gd", "kld"] = "gd"
    beta: float = 0.1  # of npo and rdpo, on sums
    retain_weight: float = 1.0
    allow_large_beta: bool = False  # accept beta > 1

    def __post_init__(self):
        check_name("UnlearnConfig.forget", self.forget, ("ga", "npo", "rgd", "rdpo"))
        check_name("UnlearnConfig.retain", self.retain, ("none", "gd", "kld"))
        check_beta("UnlearnConfig", self.beta, large=self.allow_large_beta)
        weight = self.retain_weight
        check_number("UnlearnConfig.retain_weight", weight, 0 < weight < math.inf, "a positive number")


def answers_of(cfg: UnlearnConfig) -> tuple[str, ...]:
    """Which columns of the row to forget are sequences of an example, in their order; behind them what is retained."""
    return {"rgd": ("refusal",), "rdpo": ("refusal", "answer")}.get(cfg.forget, ("answer",))


def forget_loss(sums: tuple[Sums, ...], cfg: UnlearnConfig) -> Float[Array, " n"]:
    """What each row to forget costs.

    Args:
      sums: of its sequences, as `answers_of` names them.
      cfg: how to forget.
    """
    if cfg.forget == "ga":
        return gradient_ascent(sums[0])
    if cfg.forget == "npo":
        return npo(sums[0], NpoConfig(beta=cfg.beta, allow_large_beta=cfg.allow_large_beta))
    if cfg.forget == "rgd":
        return -average(sums[0])
    return sigmoid(sums[0], sums[1], DpoConfig(beta=cfg.beta, allow_large_beta=cfg.allow_large_beta))


def unlearn_metrics(sums: tuple[Sums, ...], kept: Sums, cfg: UnlearnConfig) -> dict[str, Float[Array, " n"]]:
    """Without gradient, log-probabilities of a token: of what is to be forgotten, refusals, and what is retained."""
    found = {f"logps_avg/{name}": average(s) for name, s in zip(answers_of(cfg), sums, strict=True)}
    return jax.lax.stop_gradient(found | {"logps_avg/retain": average(kept)})
