"""Dynamic fine-tuning (2508.05629): supervised fine-tuning in which a token counts as much as it is likely.

- sg[p_t] log p_t        its gradient on logits is p_t (p - onehot), p_t times that of fine-tuning
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DftConfig:
    """Dynamic fine-tuning has no numbers of its own."""


def dft(logp: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The loss of every target token, from its log-probability; the mean over tokens is the objective."""
    logp = logp.astype(jnp.float32)
    return -jnp.exp(jax.lax.stop_gradient(logp)) * logp
