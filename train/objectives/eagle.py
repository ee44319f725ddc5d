"""EAGLE's objective: guess the target's next feature, and through it the target's distribution (2401.15077, section 4).

    L = sum_t m_t [ a V_t + b P_t ] / #tokens
    V_t = mean_D SmoothL1(f^_{t+1}, f_{t+1})        SmoothL1(d) = d^2 / 2 if |d| < 1 else |d| - 1/2
    P_t = - sum_x p_{t+1}(x) log q_t(x)             p = softmax(head f), q = softmax(head f^), a = 1, b = 0.1

Pair t = (f_t, x_{t+1}) stands at the position of f_t, sees the pairs of its segment up to itself, and its output is
held against f_{t+1}: m_t is the weight of the target of t + 1, 0 where t + 1 is in another segment or past the row.
The features come from the target in the same step, frozen: `params` is `{"drafter": ..., "target": ...}`. Noise is
added to the drafter's input features alone, (U[0,1) - 1/2) 0.2 512 / n for a segment of n tokens.

The unit is "token", so the window's completion tokens divide. One of them has no pair: a target at the very first place
of a segment, behind a prompt of one token.

Distributions are compared tile by tile (`agreement.py`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ...models.decoder import DecoderConfig, Params, Remat
from ...models.decoder import forward as target_forward
from ...models.eagle import EagleConfig, forward
from ...sharding.rules import REPLICATED, Rules
from ..data.pipeline import Batch
from ..step import LossFn, Term, Terms
from .agreement import LogQ, compare, log_probs


@dataclasses.dataclass(frozen=True, kw_only=True)
class EagleLossConfig:
    """Weights of the terms; 0 leaves a term out."""

    vector_weight: float = 1.0  # a
    token_weight: float = 0.1  # b
    noise: float = 0.2  # on input features; 0 adds none
    tile: int = 256  # tokens of a device whose logits are held at a time: a few [tile, V] of float32

    def __post_init__(self):
        for name in ("vector_weight", "token_weight", "noise"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{type(self).__name__}.{name}: found {getattr(self, name)}; expected at least 0.")
        if self.tile < 1:
            raise ValueError(f"{type(self).__name__}.tile: found {self.tile}; expected at least 1 token.")


def eagle(
    guessed: Float[Array, "B T D"],
    features: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    batch: Batch,
    cfg: EagleLossConfig = EagleLossConfig(),
    *,
    rules: Rules = REPLICATED,
) -> tuple[Terms, Terms]:
    """Terms and metrics from features guessed and true.

    Args:
      guessed: f^_{t+1}, the drafter's output at t.
      features: f_t; no gradient is taken through them, nor through the head.
      head: the target's output embedding.
      batch: which targets count.
      cfg: weights of the terms.
      rules: where logits lie on a mesh.

    Returns:
      `regression` and `cross_entropy`; and as metrics `acceptance`, sum_x min(p, q), and `agreement` of the likeliest
      tokens.
    """
    return guess_terms(guessed, guessed, features, head, batch, cfg, ahead=1, rules=rules)


def make_loss(
    cfg: EagleConfig, loss_cfg: EagleLossConfig = EagleLossConfig(), *, rules: Rules = REPLICATED, remat: Remat = "none"
) -> LossFn:
    """The objective with its two forward passes, for `make_train_step`; `params` holds `drafter` and `target`."""
    run = rematerialised(lambda *args: forward(cfg, *args, rules=rules).hidden, remat)

    def loss(params: Params, batch: Batch, key: jax.Array) -> tuple[Terms, Terms]:
        seen = see_target(cfg.target, params["target"], batch, loss_cfg.noise, key, rules=rules)
        guessed = run(params["drafter"], seen.params, seen.noisy, batch.targets, batch.positions, seen.mask)
        return eagle(guessed, seen.features, seen.head, batch, loss_cfg, rules=rules)

    return loss


# ------------------------------------------------------------------------------------ what objectives of drafters share
class Seen(NamedTuple):
    """What the frozen target says of a batch."""

    params: Params  # no gradient passes them
    head: Float[Array, "V D"]
    features: Float[Array, "B T D"]
    noisy: Float[Array, "B T D"]  # what the drafter reads
    mask: Bool[Array, "B T T"]  # a token sees those before it in its own segment


def see_target(
    cfg: DecoderConfig, params: Params, batch: Batch, noise: float, key: jax.Array, *, rules: Rules = REPLICATED
) -> Seen:
    """Run the target on packed or padded rows, and add noise to a copy of its features."""
    params = jax.lax.stop_gradient(params)
    positions, segments = batch.positions, batch.segments
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None]
    mask = same & (positions[:, :, None] >= positions[:, None, :])
    features = target_forward(cfg, params, batch.tokens, positions, mask, key_positions=positions, rules=rules).hidden
    noisy = features
    if noise:
        length = jnp.maximum(jnp.sum(same, axis=2, dtype=jnp.float32), 1.0)[..., None]
        drawn = jax.random.uniform(key, features.shape, jnp.float32) - 0.5
        noisy = (features.astype(jnp.float32) + drawn * (noise * 512.0) / length).astype(features.dtype)
    head = params["embed"] if cfg.tie_embeddings else params["head"]
    return Seen(params, head.astype(features.dtype), features, noisy, mask)


def guess_terms(
    regressed: Float[Array, "B T *E D"],
    drafted: Any,
    features: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    batch: Batch,
    cfg: EagleLossConfig,
    *,
    ahead: int,
    log_q: LogQ = log_probs,
    share: Float[Array, "B T E"] | None = None,
    rules: Rules = REPLICATED,
) -> tuple[Terms, Terms]:
    """Terms and metrics of one guess at the feature and the distribution `ahead` places on.

    Args:
      regressed: guesses at the feature; with `share`, several a position.
      drafted: a tree of arrays [B, T, ...] from which `log_q` makes log-probabilities.
      features: the target's.
      head: the target's.
      batch: which targets count.
      cfg: weights of the terms.
      ahead: 1 for the next feature.
      log_q: as `compare` takes it.
      share: how much each of several guesses at the feature counts.
      rules: where logits lie on a mesh.
    """
    T = features.shape[1]
    features = jax.lax.stop_gradient(features)
    later = lambda x: jnp.roll(x, -ahead, axis=1)
    inside = (jnp.arange(T) < T - ahead)[None] & (batch.segments == later(batch.segments))
    weight = jnp.where(inside, later(batch.weights), 0.0).astype(jnp.float32)
    counted = (inside & later(batch.mask)).astype(jnp.float32)
    wanted = later(features)
    terms = {}
    if cfg.vector_weight:
        distance = smooth_l1(regressed, wanted if share is None else wanted[:, :, None])
        if share is not None:
            distance = jnp.sum(share * distance, axis=-1)
        terms["regression"] = Term(distance, cfg.vector_weight * weight, "token")
    said = compare(wanted, head, drafted, log_q, tile=cfg.tile, rules=rules)
    if cfg.token_weight:
        terms["cross_entropy"] = Term(said.cross_entropy, cfg.token_weight * weight, "token")
    measured = {"acceptance": said.acceptance, "agreement": said.same_mode}
    return terms, {name: Term(value, counted, "token") for name, value in measured.items()}


def smooth_l1(guessed: Float[Array, "... D"], wanted: Float[Array, "... D"]) -> Float[Array, "..."]:
    """Mean over the width of d^2 / 2 within 1 and |d| - 1/2 beyond; axes of size 1 are repeated."""
    d = jnp.abs(guessed.astype(jnp.float32) - wanted.astype(jnp.float32))
    return jnp.mean(jnp.where(d < 1, 0.5 * d * d, d - 0.5), axis=-1)


def rematerialised(function: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """A drafter's forward pass, of which the backward pass recomputes what `remat` says."""
    policy = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}
    return function if remat == "none" else jax.checkpoint(function, policy=policy[remat])
