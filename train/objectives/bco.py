"""Binary classifier optimisation (2404.04656): is this answer good? The implied reward, shifted, is the logit.

    desirable      softplus(-(beta r - delta))           delta  the running mean of beta r over all rows so far,
    undesirable    softplus(beta r - delta)                     these included, without gradient

delta is carried from batch to batch. What a row weighs beyond that, such as a ratio of densities where good and bad
rows come from different prompts, is the weight of its term.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .preference import Sums, check_beta, log_ratio


@dataclasses.dataclass(frozen=True, kw_only=True)
class BcoConfig:
    """How far from the reference."""

    beta: float = 0.01
    allow_large_beta: bool = False  # accept beta > 1

    def __post_init__(self):
        check_beta("BcoConfig", self.beta, large=self.allow_large_beta)


class Delta(NamedTuple):
    """The shift, and how many rows it has seen; zeros before the first."""

    mean: Float[Array, ""]
    rows: Float[Array, ""]


def init_delta() -> Delta:
    """Nothing seen."""
    return Delta(jnp.float32(0), jnp.float32(0))


def bco(rows: Sums, desirable: Bool[Array, " n"], delta: Delta, cfg: BcoConfig = BcoConfig()) -> Float[Array, " n"]:
    """The loss of every row.

    Args:
      rows: sums of answers to their own prompts.
      desirable: which are good.
      delta: of `update_delta` on these very rows.
      cfg: beta.
    """
    x = cfg.beta * log_ratio(rows) - jax.lax.stop_gradient(delta.mean)
    return jax.nn.softplus(jnp.where(desirable, -x, x))


def update_delta(delta: Delta, rows: Sums, counted: Bool[Array, " n"], cfg: BcoConfig = BcoConfig()) -> Delta:
    """The mean with these rows in it, without gradient; rows that pad the batch are not counted."""
    reward = jnp.where(counted, cfg.beta * jax.lax.stop_gradient(log_ratio(rows)), 0.0)
    number = jnp.sum(counted.astype(jnp.float32))
    total = delta.rows + number
    # Moves by differences: a sum over a whole run would lose the newest rows to rounding.
    step = (jnp.sum(reward) - number * delta.mean) / jnp.maximum(total, 1.0)
    return Delta(delta.mean + step, total)
