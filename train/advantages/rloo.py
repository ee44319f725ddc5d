"""Leave-one-out advantages (RLOO, Back to Basics, https://arxiv.org/abs/2402.14740).

    A_i = R_i - mean_{j != i} R_j = (R_i - mean R) n / (n - 1)

over the n answers to one question that have a reward; nothing is divided by the spread. G is the number of groups, K
that of members. A member without a reward, or the only one with a reward, gets 0.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .grpo import group_metrics, group_statistics


def rloo(
    rewards: Float[Array, "G K"], present: Bool[Array, "G K"] | None = None
) -> tuple[Float[Array, "G K"], dict[str, Float[Array, ""]]]:
    """Advantages of whole answers, and the metrics of `grpo`; a reward that is NaN or not `present` is none."""
    groups = group_statistics(rewards, present)
    number = jnp.sum(groups.present, axis=1, dtype=jnp.float32)
    return groups.centred * (number / jnp.maximum(number - 1.0, 1.0))[:, None], group_metrics(groups)
