"""Group-relative advantages (GRPO, DeepSeekMath, https://arxiv.org/abs/2402.03300).

    A_i = (R_i - mean R) / (std R + eps)

over the K answers to one question. What `scale` divides by: the spread of the group ("group", GRPO), that of all
rewards of the batch ("batch"), nothing ("none", Dr. GRPO, https://arxiv.org/abs/2503.20783). Programs differ in eps:
1e-4 in TRL, 1e-6 in tunix and verl; all of them estimate the variance with ddof = 1.

G is the number of groups, K that of members. A member without a reward (its mask is False, or its reward NaN) leaves
the statistics, and its advantage is 0.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """What advantages are divided by."""

    scale: Literal["group", "batch", "none"] = "group"
    eps: float = 1e-6  # added to the standard deviation
    ddof: int = 1  # of the variance: 1 as TRL, tunix and verl; 0 for that of the members themselves

    def __post_init__(self):
        if self.scale not in ("group", "batch", "none"):
            raise ValueError(f"GRPOConfig.scale: found {self.scale!r}; expected group, batch or none.")
        if not 0 < self.eps < float("inf"):
            raise ValueError(f"GRPOConfig.eps: found {self.eps}; expected a positive number.")
        if self.ddof not in (0, 1):
            raise ValueError(f"GRPOConfig.ddof: found {self.ddof}; expected 0 or 1.")


class Groups(NamedTuple):
    """The rewards of groups and their statistics, over members that have one."""

    present: Bool[Array, "G K"]
    centred: Float[Array, "G K"]  # reward minus the mean of its group; 0 where there is none
    mean: Float[Array, " G"]  # 0 in a group without rewards
    std: Float[Array, " G"]  # 0 if fewer than two have a reward


def grpo(
    rewards: Float[Array, "G K"], present: Bool[Array, "G K"] | None = None, cfg: GRPOConfig = GRPOConfig()
) -> tuple[Float[Array, "G K"], dict[str, Float[Array, ""]]]:
    """Advantages of whole answers, and metrics.

    Equal rewards give exactly 0, however they are rounded.

    Args:
      rewards: of every member.
      present: which members have one; all, when not given.
      cfg: what to divide by.
    """
    groups = group_statistics(rewards, present, ddof=cfg.ddof)
    advantages = groups.centred
    if cfg.scale == "group":
        advantages = advantages / (groups.std[:, None] + cfg.eps)
    elif cfg.scale == "batch":
        whole = group_statistics(rewards.reshape(1, -1), groups.present.reshape(1, -1), ddof=cfg.ddof)
        advantages = advantages / (whole.std[:, None] + cfg.eps)
    return advantages, group_metrics(groups)


def group_statistics(
    rewards: Float[Array, "G K"], present: Bool[Array, "G K"] | None = None, *, ddof: int = 1
) -> Groups:
    """What every method that compares the members of a group begins with."""
    rewards = jax.lax.stop_gradient(rewards.astype(jnp.float32))
    present = ~jnp.isnan(rewards) if present is None else present & ~jnp.isnan(rewards)
    number = jnp.sum(present, axis=1, dtype=jnp.float32)
    # Counted from the least reward: the mean of equal numbers may be rounded, that of zeros is not, and a difference
    # of 1e-8 would be large beside eps.
    least = jnp.min(jnp.where(present, rewards, jnp.inf), axis=1)
    least = jnp.where(number > 0, least, 0.0)
    above = jnp.where(present, rewards - least[:, None], 0.0)
    mean = jnp.sum(above, axis=1) / jnp.maximum(number, 1.0)
    centred = jnp.where(present, above - mean[:, None], 0.0)
    variance = jnp.sum(centred**2, axis=1) / jnp.maximum(number - ddof, 1.0)
    return Groups(present, centred, least + mean, jnp.sqrt(variance))


def group_metrics(groups: Groups) -> dict[str, Float[Array, ""]]:
    """Metrics of rewards.

    Returns:
      `reward`, the mean over members that have one; `reward_std` and `frac_zero_std`, over groups: the mean spread, and
      the share of groups that teach nothing, because all rewards are equal or fewer than two are there;
      `frac_rewarded`, the share of members that have a reward.
    """
    number = jnp.sum(groups.present, axis=1, dtype=jnp.float32)
    return {
        "reward": jnp.sum(groups.mean * number) / jnp.maximum(jnp.sum(number), 1.0),
        "reward_std": jnp.mean(groups.std),
        "frac_zero_std": jnp.mean((groups.std == 0).astype(jnp.float32)),
        "frac_rewarded": jnp.mean(groups.present.astype(jnp.float32)),
    }
