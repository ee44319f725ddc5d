"""Fine-tuning as the reward that it implies, under f-divergences (2507.00018).

    - phi(u)        u = beta (log p - log p_ref), of a token or of a whole answer

    total_variation    u                      fine-tuning, beta times
    pearson            u - u^2 / 4            up to u = 2, then 1
    hellinger          u / (1 + u)            u > -1
    kl                 - e^(-(u + 1))

Each phi is -f*(-u), f* the convex conjugate of its f: concave, and never falling. Where it is steeper than float32 or
training can bear, below u = -0.9 and -10 for the last two, its tangent goes on in its place.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .preference import check_beta, check_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class FsftConfig:
    """Which divergence, and how strong."""

    f: Literal["total_variation", "pearson", "hellinger", "kl"] = "total_variation"
    beta: float = 0.1
    level: Literal["token", "answer"] = "token"  # what u is of
    allow_large_beta: bool = False  # accept beta > 1, which tokens bear better than sums

    def __post_init__(self):
        check_name("FsftConfig.f", self.f, PHI)
        check_name("FsftConfig.level", self.level, ("token", "answer"))
        check_beta("FsftConfig", self.beta, large=self.allow_large_beta)


def fsft(logp: Float[Array, "*n"], reference: Float[Array, "*n"], cfg: FsftConfig) -> Float[Array, "*n"]:
    """The loss of every token, or of every answer if these are sums.

    Args:
      logp: log-probabilities under the policy.
      reference: under the frozen one; no gradient is taken through them.
      cfg: the divergence.
    """
    return -PHI[cfg.f](cfg.beta * (logp.astype(jnp.float32) - jax.lax.stop_gradient(reference).astype(jnp.float32)))


def _pearson(u: Any) -> Any:
    """Its conjugate is flat where the divergence's argument would turn negative."""
    u = jnp.minimum(u, 2.0)
    return u - u**2 / 4.0


def _with_tangent(phi: Callable[[Any], Any], slope: Callable[[Any], Any], start: float) -> Callable[[Any], Any]:
    """phi above `start`, its tangent there below."""

    def extended(u: Any) -> Any:
        below = u < start
        tangent = phi(start) + slope(start) * (u - start)
        return jnp.where(below, tangent, phi(jnp.where(below, start, u)))  # phi sees no u that it cannot bear

    return extended


PHI: dict[str, Callable[[Any], Any]] = {
    "total_variation": lambda u: u,
    "pearson": _pearson,
    "hellinger": _with_tangent(lambda u: 1.0 - 1.0 / (1.0 + u), lambda u: 1.0 / (1.0 + u) ** 2, -0.9),
    "kl": _with_tangent(lambda u: -jnp.exp(-(u + 1.0)), lambda u: math.exp(-(u + 1.0)), -10.0),
}
