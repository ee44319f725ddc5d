"""Anchored supervised fine-tuning (2509.23753): DFT that is held near the base model.

    - sg[p_t] log p_t + lam KL(base(. | t) || policy(. | t))        on logits: p_t (p - onehot) + lam (p - p_base)

The KL is over the whole vocabulary, base first; the paper reports the other direction to be worse.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from .dft import dft
from .preference import check_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class AsftConfig:
    """How tight the anchor is."""

    lam: float = 0.05  # the paper's; 0.1 in its code; 0 is DFT

    def __post_init__(self):
        check_number("AsftConfig.lam", self.lam, 0 <= self.lam < math.inf, "at least 0")


def asft(logp: Float[Array, "*n"], kl: Float[Array, "*n"], cfg: AsftConfig = AsftConfig()) -> Float[Array, "*n"]:
    """The loss of every target token.

    Args:
      logp: of the target, under the policy.
      kl: KL(base || policy) where the target is predicted, differentiable in the policy.
      cfg: the anchor.
    """
    return dft(logp) + cfg.lam * kl.astype(jnp.float32)
