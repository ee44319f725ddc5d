"""Learn from sampled answers and their advantages: what PPO, GRPO, DAPO, GSPO and CISPO have in common.

    rho_t = exp(log pi_t - log pi_old,t)                ratio="token"
    rho_t = exp(mean over the answer of log rho)        ratio="sequence": GSPO, https://arxiv.org/abs/2507.18071

    l_t = - min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t)    surrogate="clip": PPO, https://arxiv.org/abs/1707.06347
    l_t = - stopped(min(rho_t, cap)) A_t log pi_t                 surrogate="cispo": https://arxiv.org/abs/2506.13585

`dual_clip` cuts rho at delta before that (https://arxiv.org/abs/1912.09729): a token that was bad and has become much
more likely pulls no harder than delta. A penalty `kl_weight` KL is added to l_t. Then, as `aggregation` says,

    grpo      mean over the tokens of an answer, then over the answers of the window
    dr_grpo   sum over tokens / (answers of the window x max_length)    https://arxiv.org/abs/2503.20783
    dapo      sum over tokens / tokens of the window                    https://arxiv.org/abs/2503.14476
    bnpo      sum over tokens / tokens of the micro-batch, then mean over micro-batches

Of these bnpo alone depends on how a window is cut into micro-batches; with a single one it is dapo. Answers that lost
all their tokens to the mask count as answers.

Published settings: PPO and GRPO clip 0.2 and 0.2, DAPO 0.2 and 0.28, GSPO 3e-4 and 4e-4 with aggregation grpo;
DeepSeek-R1 kl_weight 0.001; TRL cap 5. With ratio="sequence" advantages are meant to be those of answers.
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..data import pipeline
from ..data.pipeline import Batch
from ..step import Term, Terms
from .kl_estimators import RATIO_LIMIT, Estimator, kl_estimate
from .logprobs import Scores

Aggregation = Literal["grpo", "bnpo", "dr_grpo", "dapo"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig:
    """Which ratio, what stops it, how tokens are added up, and what keeps the policy near the reference."""

    surrogate: Literal["clip", "cispo"] = "clip"
    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # delta, more than 1 + clip_high
    cap: float = 5.0  # of rho under cispo
    aggregation: Aggregation = "dapo"
    max_length: int | None = None  # of an answer, for dr_grpo
    kl_weight: float = 0.0  # 0 measures it only
    kl: Estimator = "k3_corrected"

    def __post_init__(self):
        choices = {"surrogate": ("clip", "cispo"), "ratio": ("token", "sequence")}
        for name, known in (choices | {"aggregation": get_args(Aggregation), "kl": get_args(Estimator)}).items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"PolicyGradientConfig.{name}: found {getattr(self, name)!r}; expected one of {', '.join(known)}."
                )
        if not 0 < self.clip_low <= 1 or not 0 < self.clip_high < float("inf"):
            raise ValueError(
                f"PolicyGradientConfig: found clip_low={self.clip_low}, clip_high={self.clip_high}; expected a low one "
                "from 0 to 1, above 0, and a positive high one."
            )
        if self.dual_clip is not None and not 1 + self.clip_high < self.dual_clip < float("inf"):
            raise ValueError(
                f"PolicyGradientConfig.dual_clip: found {self.dual_clip}; expected more than 1 + clip_high = "
                f"{1 + self.clip_high}, or None."
            )
        if not 0 < self.cap < float("inf"):
            raise ValueError(f"PolicyGradientConfig.cap: found {self.cap}; expected a positive number.")
        if (self.max_length or 0) < 1 and (self.aggregation == "dr_grpo" or self.max_length is not None):
            raise ValueError(
                f"PolicyGradientConfig.max_length: found {self.max_length} with aggregation {self.aggregation}; "
                "expected at least 1. Give the longest answer that is sampled."
            )
        if not 0 <= self.kl_weight < float("inf"):
            raise ValueError(f"PolicyGradientConfig.kl_weight: found {self.kl_weight}; expected at least 0.")
        if self.kl_weight and self.kl == "k1":
            raise ValueError(
                "PolicyGradientConfig.kl: found k1 with a weight; as a loss it has no gradient on average. Expected "
                "k2, k3 or k3_corrected. Put k1 into the reward (`token_rewards` of advantages/gae.py)."
            )


class Rollout(NamedTuple):
    """A batch of sampled answers. What stands beside it is of the targets, and may be anything outside its mask."""

    batch: Batch
    advantages: Float[Array, "*M B T"]
    logp_old: Float[Array, "*M B T"] | None = None  # of the policy that sampled; None if it is the one that is trained
    logp_ref: Float[Array, "*M B T"] | None = None  # of the reference


def policy_gradient(
    policy: Scores, rollout: Rollout, cfg: PolicyGradientConfig = PolicyGradientConfig()
) -> tuple[Terms, Terms]:
    """Terms and metrics from what the policy says of sampled tokens.

    Returns:
      `policy`, and with a weight `kl_penalty`. As metrics, means over tokens: `entropy`, `adv_abs_mean`, `ratio`,
      `clip_low` and `clip_high`, the shares at which clipping stops the gradient, and with a reference `kl_` and the
      name of the estimator; and `ratio_max`, the mean over micro-batches of the largest.

    Raises:
      ValueError: if the penalty has a weight and the rollout no reference.
    """
    batch, mask = rollout.batch, rollout.batch.mask
    kept = lambda x: jnp.where(mask, x.astype(jnp.float32), 0.0)
    logp, advantages = kept(policy.logp), jax.lax.stop_gradient(kept(rollout.advantages))
    log_ratio = logp - jax.lax.stop_gradient(logp if rollout.logp_old is None else kept(rollout.logp_old))
    whole = sequence_mean(log_ratio, batch) if cfg.ratio == "sequence" else log_ratio
    terms = {"policy": aggregate(surrogate_loss(logp, whole, advantages, cfg), batch, cfg)}

    ones = mask.astype(jnp.float32)
    ratio = jnp.where(mask, _exp(whole), 0.0)
    low, high = _clipped(ratio, advantages, cfg)
    metrics = {
        "entropy": Term(policy.entropy, ones, "token"),
        "adv_abs_mean": Term(jnp.abs(advantages), ones, "token"),
        "ratio": Term(ratio, ones, "token"),
        "clip_low": Term(low.astype(jnp.float32), ones, "token"),
        "clip_high": Term(high.astype(jnp.float32), ones, "token"),
        "ratio_max": Term(jnp.max(ratio), jnp.float32(1), "part"),
    }
    if rollout.logp_ref is not None:
        # Its rho is the token's under every surrogate: that is what makes its gradient right.
        kl = kl_estimate(logp, kept(rollout.logp_ref), cfg.kl, log_ratio=log_ratio)
        metrics[f"kl_{cfg.kl}"] = Term(kl, ones, "token")
        if cfg.kl_weight:
            terms["kl_penalty"] = aggregate(cfg.kl_weight * kl, batch, cfg)
    elif cfg.kl_weight:
        raise ValueError(
            f"policy_gradient: found kl_weight {cfg.kl_weight} and a rollout without logp_ref; expected what the "
            "reference says of it. Score the answers with it, or set kl_weight to 0."
        )
    return terms, metrics


def surrogate_loss(
    logp: Float[Array, "B T"],
    log_ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    cfg: PolicyGradientConfig = PolicyGradientConfig(),
) -> Float[Array, "B T"]:
    """l of every token: gradients pass through `log_ratio` under clip, and through `logp` under cispo."""
    ratio = _exp(log_ratio)
    if cfg.surrogate == "cispo":
        return -jax.lax.stop_gradient(jnp.minimum(ratio, cfg.cap)) * advantages * logp
    free = ratio if cfg.dual_clip is None else jnp.minimum(ratio, cfg.dual_clip)
    return -jnp.minimum(free * advantages, jnp.clip(ratio, 1 - cfg.clip_low, 1 + cfg.clip_high) * advantages)


def aggregate(value: Float[Array, "B T"], batch: Batch, cfg: PolicyGradientConfig = PolicyGradientConfig()) -> Term:
    """Values of tokens as a term of the loss, whose weights and unit are those of `cfg.aggregation`."""
    weights = batch.weights.astype(jnp.float32)
    if cfg.aggregation == "grpo":
        return Term(value, weights / jnp.maximum(_sequence_sum(batch.mask.astype(jnp.float32), batch), 1.0), "sequence")
    if cfg.aggregation == "dr_grpo":
        return Term(value, weights / float(cfg.max_length or 1), "sequence")
    if cfg.aggregation == "bnpo":
        tokens = jnp.sum(batch.mask, dtype=jnp.float32)
        return Term(value, weights / jnp.maximum(tokens, 1.0), "part")
    return Term(value, weights, "token")


def sequence_mean(x: Float[Array, "B T"], batch: Batch) -> Float[Array, "B T"]:
    """At every token, the mean of x over those tokens of its sequence that count; packed sequences stay apart."""
    number = _sequence_sum(batch.mask.astype(jnp.float32), batch)
    return _sequence_sum(jnp.where(batch.mask, x, 0.0), batch) / jnp.maximum(number, 1.0)


def count_units(window: Rollout) -> dict[str, Int[Array, ""]]:
    """The units of `pipeline.count_units`, and part: how many micro-batches a window holds."""
    return pipeline.count_units(window.batch) | {"part": jnp.int32(window.batch.mask.shape[0])}


# ----------------------------------------------------------------------------------------------------------- private
def _exp(log_ratio: Array) -> Array:
    return jnp.exp(jnp.clip(log_ratio, -RATIO_LIMIT, RATIO_LIMIT))


def _clipped(ratio: Array, advantages: Array, cfg: PolicyGradientConfig) -> tuple[Array, Array]:
    """Where the loss does not follow the ratio any more: because it is too low, too high."""
    if cfg.surrogate == "cispo":
        return jnp.zeros(ratio.shape, bool), ratio > cfg.cap
    high = (ratio > 1 + cfg.clip_high) & (advantages > 0)
    if cfg.dual_clip is not None:
        high |= (ratio > cfg.dual_clip) & (advantages < 0)
    return (ratio < 1 - cfg.clip_low) & (advantages < 0), high


def _sequence_sum(x: Array, batch: Batch) -> Array:
    """At every token, the sum of x over its segment; a row of T tokens has T segments at most, and padding."""
    T = x.shape[1]
    sums = jax.vmap(lambda row, segment: jax.ops.segment_sum(row, segment, num_segments=T + 1))(x, batch.segments)
    return jnp.take_along_axis(sums, batch.segments, axis=1)
