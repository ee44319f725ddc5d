"""Values from the tree of a group's prefixes (TEMPO, https://arxiv.org/abs/2509.18314).

    A_{i,t} = (R_i - mean R + V(C_t(i)) - V(C_{t-1}(i))) / (std R + eps)

C_t(i) are the members of the group that agree with i on tokens 0..t, C_{-1}(i) is the whole group, V(C) the mean reward
of the members in C. Where no member parts from i, both sets are the same and the advantage is exactly that of GRPO;
where some do, what parting was worth is added. After the first tokens most answers are alone.

G is the number of groups, K that of members, T that of tokens. The published script has eps = 1e-6.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .grpo import group_metrics, group_statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class TEMPOConfig:
    """What advantages are divided by."""

    eps: float = 1e-6  # added to the standard deviation
    ddof: int = 1  # of the variance

    def __post_init__(self):
        if not 0 < self.eps < float("inf"):
            raise ValueError(f"TEMPOConfig.eps: found {self.eps}; expected a positive number.")
        if self.ddof not in (0, 1):
            raise ValueError(f"TEMPOConfig.ddof: found {self.ddof}; expected 0 or 1.")


def tempo(
    tokens: Int[Array, "G K T"],
    mask: Bool[Array, "G K T"],
    rewards: Float[Array, "G K"],
    present: Bool[Array, "G K"] | None = None,
    cfg: TEMPOConfig = TEMPOConfig(),
) -> tuple[Float[Array, "G K T"], dict[str, Float[Array, ""]]]:
    """Advantages of tokens, and metrics.

    Work is G K^2 T, memory G K T where the compiler fuses the sum over members.

    Args:
      tokens: of answers, each from index 0 on.
      mask: which tokens are part of the answer: the first n of it, without gaps. The others get 0.
      rewards: of every member.
      present: which members have one; the others get 0 and are in no set. All, when not given; NaN is none.
      cfg: what to divide by.

    Returns:
      Advantages; the metrics of `grpo`, and `branch_frac`, the share of tokens at which some member parts,
      `mean_depth`, how many tokens a member shares with the one most like it, and `td_abs_mean`, the mean of
      |V(C_t) - V(C_{t-1})|.
    """
    groups = group_statistics(rewards, present, ddof=cfg.ddof)
    here = groups.present
    T = tokens.shape[2]
    time = jnp.arange(T, dtype=jnp.int32)
    differ = tokens[:, :, None] != tokens[:, None]
    differ |= ~mask[:, :, None] | ~mask[:, None]  # [G, K, K, T]
    agree = jnp.min(jnp.where(differ, time[None, None, None], T), axis=3)  # [G, K, K], tokens in common
    agree = jnp.where(here[:, :, None] & here[:, None], agree, -1)

    # C_t(i) are the k with t < agree[i, k]; t = -1 is computed like any other, so that equal sets have equal values.
    t = jnp.concatenate([jnp.full((1,), -1, jnp.int32), time])
    within = t[None, None, None] < agree[..., None]  # [G, K, K, 1 + T]
    number = jnp.sum(within, axis=2, dtype=jnp.int32)
    total = jnp.sum(jnp.where(within, groups.centred[:, None, :, None], 0.0), axis=2)
    value = total / jnp.maximum(number, 1).astype(jnp.float32)
    step = value[..., 1:] - value[..., :-1]  # [G, K, T]

    live = mask & here[..., None]
    advantages = (groups.centred[..., None] + step) / (groups.std[:, None, None] + cfg.eps)
    advantages = jax.lax.stop_gradient(jnp.where(live, advantages, 0.0))

    mean = lambda x, where: jnp.sum(jnp.where(where, x, 0.0)) / jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1.0)
    others = jnp.where(jnp.eye(tokens.shape[1], dtype=bool)[None], 0, jnp.maximum(agree, 0))
    return advantages, group_metrics(groups) | {
        "branch_frac": mean((number[..., 1:] != number[..., :-1]).astype(jnp.float32), live),
        "mean_depth": mean(jnp.max(others, axis=2).astype(jnp.float32), here),
        "td_abs_mean": mean(jnp.abs(step), live),
    }
