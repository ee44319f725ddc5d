"""Several rewards, each held at a threshold (Confronting Reward Model Overoptimization with Constrained RLHF,
https://arxiv.org/abs/2310.04373).

    s_i = tanh(l_i)     J_i is to equal th_i           (equality; xi-PPO)
    s_i = sigmoid(l_i)  J_i is to be at least th_i     (inequality; mu-PPO)

    A   = (N - sum_i s_i) A_KL + sum_i s_i A_i
    l  <- l - rate m,    m <- momentum m + clip(g),    g_i = s'(l_i) (J_i - th_i)

A_KL is the advantage of staying near the reference, A_i that of reward i, each whitened, each with its own value head.
J_i is the mean of reward i over the answers of a step. g is the gradient of sum_i s_i (J_i - th_i), clipped to a norm:
a reward above its threshold lowers its multiplier l_i. N is the number of rewards.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstrainedConfig:
    """Thresholds, and how multipliers are learnt."""

    thresholds: tuple[float, ...] = (0.44, 0.238)  # the paper's, of intent accuracy and METEOR
    kind: Literal["equality", "inequality"] = "equality"
    learning_rate: float = 0.1
    momentum: float = 0.1
    clip: float = 0.5  # largest norm of the multipliers' gradient

    def __post_init__(self):
        if not self.thresholds:
            raise ValueError("ConstrainedConfig.thresholds: found none; expected one for every reward.")
        if self.kind not in ("equality", "inequality"):
            raise ValueError(f"ConstrainedConfig.kind: found {self.kind!r}; expected equality or inequality.")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"ConstrainedConfig.{name}: found {getattr(self, name)}; expected a positive number.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"ConstrainedConfig.momentum: found {self.momentum}; expected a number from 0, below 1.")


class Multipliers(NamedTuple):
    """What is carried from step to step."""

    raw: Float[Array, " N"]  # l, before squashing
    velocity: Float[Array, " N"]  # m


def init_multipliers(cfg: ConstrainedConfig) -> Multipliers:
    """Zeros: under tanh the step begins with the KL term alone, under sigmoid with one half of each."""
    zeros = jnp.zeros((len(cfg.thresholds),), jnp.float32)
    return Multipliers(zeros, zeros)


def squash(raw: Float[Array, " N"], cfg: ConstrainedConfig) -> Float[Array, " N"]:
    """s: what each reward's advantage counts."""
    return jnp.tanh(raw) if cfg.kind == "equality" else jax.nn.sigmoid(raw)


def constrained(
    kl_advantages: Float[Array, "B T"],
    advantages: Float[Array, "N B T"],
    state: Multipliers,
    cfg: ConstrainedConfig,
) -> Float[Array, "B T"]:
    """The advantages of all rewards and of the KL term as one.

    Args:
      kl_advantages: of staying near the reference, whitened.
      advantages: of every reward, each whitened.
      state: the multipliers.
      cfg: how they are squashed.

    Raises:
      ValueError: if there are not as many rewards as thresholds.
    """
    N = len(cfg.thresholds)
    if advantages.shape != (N, *kl_advantages.shape):
        raise ValueError(
            f"constrained: found advantages of shape {advantages.shape}; expected {(N, *kl_advantages.shape)}, one for "
            "each threshold. Stack them along the first axis."
        )
    s = squash(state.raw, cfg)
    mixed = (N - jnp.sum(s)) * kl_advantages.astype(jnp.float32)
    return jax.lax.stop_gradient(mixed + jnp.tensordot(s, advantages.astype(jnp.float32), axes=1))


def step_multipliers(
    measured: Float[Array, " N"], state: Multipliers, cfg: ConstrainedConfig
) -> tuple[Multipliers, dict[str, Float[Array, ""]]]:
    """One step of SGD with momentum on the multipliers, and metrics of reward i before it.

    Args:
      measured: J, the mean of every reward over the answers of this step.
      state: the multipliers.
      cfg: thresholds and rates.

    Returns:
      The new multipliers; `lambda_i`, s before the step, `constraint_i_value`, J, and `constraint_i_gap`, J - th.
    """
    measured = jax.lax.stop_gradient(measured.astype(jnp.float32))
    gap = measured - jnp.asarray(cfg.thresholds, jnp.float32)
    s = squash(state.raw, cfg)
    slope = 1 - s**2 if cfg.kind == "equality" else s * (1 - s)
    gradient = slope * gap
    norm = jnp.sqrt(jnp.sum(gradient**2))
    gradient = gradient * (cfg.clip / jnp.maximum(norm, cfg.clip))
    velocity = cfg.momentum * state.velocity + gradient
    metrics = {}
    for i in range(len(cfg.thresholds)):
        metrics |= {f"lambda_{i}": s[i], f"constraint_{i}_value": measured[i], f"constraint_{i}_gap": gap[i]}
    return Multipliers(state.raw - cfg.learning_rate * velocity, velocity), metrics
