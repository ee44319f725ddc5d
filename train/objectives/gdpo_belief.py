"""GDPO by beliefs (2412.20299): which belief an answer stands for is predicted as people hold it, then answered by DPO.

    response = "{id}<{belief}>{answer}"        p*_k  the share of people who hold belief k, ids 0 .. K-1

    KL(p* || p_theta) + DPO(answers | x, belief) - mean log p(belief tokens | x, id)

p_theta is the full-vocabulary softmax where the id is predicted, read at the K id tokens: what it gives to other tokens
costs as well, KL = KL renormalised - log(mass on ids). The rejected answer stands behind the accepted belief, and DPO
counts the tokens of answers alone. (Another method of the same name normalises rewards; it is not this one.)
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .dpo import DpoConfig, sigmoid
from .preference import Sums, check_beta, check_number

MOST = 10  # beliefs: each id is one digit, one token


@dataclasses.dataclass(frozen=True, kw_only=True)
class GdpoBeliefConfig:
    """The paper weighs all three parts alike."""

    beta: float = 0.1
    calibration: float = 1.0
    belief: float = 1.0  # what the belief's own tokens count
    allow_large_beta: bool = False  # accept beta > 1

    def __post_init__(self):
        check_beta("GdpoBeliefConfig", self.beta, large=self.allow_large_beta)
        for name in ("calibration", "belief"):
            weight = getattr(self, name)
            check_number(f"GdpoBeliefConfig.{name}", weight, 0 <= weight < math.inf, "at least 0")


def calibration(held: Float[Array, "n K"], logp: Float[Array, "n K"]) -> Float[Array, " n"]:
    """KL(p* || p_theta).

    Args:
      held: p*, zeros behind the last belief.
      logp: log p_theta at the id tokens, over the whole vocabulary.
    """
    held = jax.lax.stop_gradient(held).astype(jnp.float32)
    there = held > 0
    own = jnp.log(jnp.where(there, held, 1.0))
    return jnp.sum(jnp.where(there, held * (own - jnp.where(there, logp.astype(jnp.float32), 0.0)), 0.0), axis=-1)


def conditional(chosen: Sums, rejected: Sums, cfg: GdpoBeliefConfig) -> Float[Array, " n"]:
    """DPO of two answers behind one belief; sums are over the tokens of answers."""
    return sigmoid(chosen, rejected, DpoConfig(beta=cfg.beta, allow_large_beta=cfg.allow_large_beta))


def belief_metrics(
    held: Float[Array, "n K"], number: Float[Array, " n"], logp: Float[Array, "n K"], accepted: Float[Array, " n"]
) -> dict[str, Float[Array, " n"]]:
    """Without gradient: mass on ids, Jensen-Shannon divergence of what is renormalised, and the gap at the accepted id.

    Args:
      held: p*; a belief may have none of it, which costs what the model gives it.
      number: how many beliefs there are, of K.
      logp: log p_theta.
      accepted: the id of the belief that the pair stands for.
    """
    there = jnp.arange(held.shape[-1], dtype=jnp.float32)[None, :] < number[:, None]
    p = jnp.where(there, jnp.exp(logp), 0.0)
    mass = jnp.sum(p, axis=-1)
    q = p / jnp.maximum(mass, 1e-30)[:, None]
    middle = 0.5 * (held + q)
    part = lambda a: jnp.where(a > 0, a * jnp.log(jnp.where(a > 0, a, 1.0) / jnp.where(a > 0, middle, 1.0)), 0.0)
    at = accepted.astype(jnp.int32)[:, None]
    gap = jnp.abs(jnp.take_along_axis(p, at, axis=1) - jnp.take_along_axis(held, at, axis=1))[:, 0]
    js = 0.5 * jnp.sum(part(held) + part(q), axis=-1)
    return jax.lax.stop_gradient({"belief/mass": mass, "belief/js": js, "belief_gap": gap})
