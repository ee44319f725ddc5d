"""A head learns how likely a draft is accepted, so that drafting ends where it no longer pays (SpecDec++, 2405.19715).

    Y_t ~ q(. | x_<t)       a_t = min(1, p(Y_t | x_<t) / q(Y_t | x_<t))       z_t = Y_t, or x_t with probability `keep`
    L = sum_t m_t d_t [ r (1 - a_t) CE_0(h_t) + a_t CE_1(h_t) ] / #tokens       CE_c(h) = - log softmax(head h)_c

x is the text, p what the target says of its next token and q what the drafter says, both at temperature 1. h_t is the
drafter's last state at position t of the mixed text z, which has read the token there; d_t is 1 where that token was
drawn. m is the weight of the row, r = 6. Target and drafter are frozen: no gradient reaches either.

The paper drafts on prefixes that the target wrote: p and q above stand behind x_<t, so x has to be the target's own
text (`--regenerate`; any other text teaches acceptance where the target would not have gone). Every draw and label is
of one token behind the text itself, but the state that is assessed has read the mixed text, as a drafter has read its
own drafts when it is served; kept tokens stand for drafts that were accepted. Prompts are never mixed. All of this is
made anew in every step, from the step's key.

The paper divides by sum_t d_t [ r (1 - a_t) + a_t ], which is known only when the window is through. Here the window's
completion tokens divide, like everywhere (`../step.py`), which scales the loss of a step by the metric `weight`:
their ratio is the paper's value. A step of Adam does not see such a factor, clipping by the norm does. Since a refusal
counts r times, the head's probability tends to a / (a + r (1 - a)), on which scale the threshold h is.

A target at the last place of a segment has no position of its own in the row, so nothing is drawn in its place.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ...models import kangaroo
from ...models.decoder import DecoderConfig, Params, Remat, forward, lm_head
from ...models.heads import acceptance_logits
from ...models.kangaroo import KangarooConfig
from ...sharding.rules import REPLICATED, Rules
from ..data.pipeline import Batch
from ..step import LossFn, Term, Terms
from .logprobs import segment_mask

DrafterConfig = DecoderConfig | KangarooConfig  # a small decoder with the target's tokenizer, or an adapter on it


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecDecPPConfig:
    """What a refusal counts, and how the text is mixed."""

    refusal_weight: float = 6.0  # r
    keep: float = 0.15  # how often the text's own token stays
    tile: int = 256  # tokens, over all rows, whose logits are held at a time: a few [tile, V] of float32

    def __post_init__(self):
        if not 0 < self.refusal_weight < float("inf"):
            raise ValueError(
                f"SpecDecPPConfig.refusal_weight: found {self.refusal_weight}; expected a positive number."
            )
        if not 0 <= self.keep < 1:
            raise ValueError(f"SpecDecPPConfig.keep: found {self.keep}; expected 0 or more, below 1.")
        if self.tile < 1:
            raise ValueError(f"SpecDecPPConfig.tile: found {self.tile}; expected at least 1 token.")


class Drafts(NamedTuple):
    """What was drawn for each position of the text; nothing where `drawn` is false."""

    mixed: Int[Array, "B T"]  # z
    drawn: Bool[Array, "B T"]  # d: z is a draft here, of a token that counts
    label: Float[Array, "B T"]  # a
    weight: Float[Array, "B T"]  # m, of the token at this position; 0 where nothing is drawn


def specdec_pp(
    logits: Float[Array, "B T 2"], drafts: Drafts, cfg: SpecDecPPConfig = SpecDecPPConfig()
) -> tuple[Terms, Terms]:
    """Terms and metrics from what the head says of the token at every position.

    Returns:
      `cross_entropy`; and as metrics, all sums over drawn tokens divided by the number of completion tokens, `drawn`,
      their share, `acceptance`, of a, `weight`, of r (1 - a) + a, and `predicted`, of the head's probability.
    """
    a, drawn = drafts.label, drafts.drawn.astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    refused = cfg.refusal_weight * (1 - a)
    measured = {"drawn": drawn, "acceptance": a, "weight": refused + a, "predicted": jnp.exp(log_p[..., 1])}
    value = -(refused * log_p[..., 0] + a * log_p[..., 1])
    return {"cross_entropy": Term(value, drafts.weight, "token")}, {
        name: Term(value, drawn, "token") for name, value in measured.items()
    }


def draw(
    p: Float[Array, "... V"], q: Float[Array, "... V"], u: Float[Array, "..."]
) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
    """Y ~ q and a = min(1, p(Y) / q(Y)).

    Y is the first token up to which q holds more than the share u of its mass, for u uniform in [0, 1).
    """
    mass = jnp.cumsum(q, axis=-1)
    before = mass <= u[..., None] * mass[..., -1:]
    Y = jnp.minimum(jnp.sum(before, axis=-1, dtype=jnp.int32), q.shape[-1] - 1)
    p_Y, q_Y = (jnp.take_along_axis(d, Y[..., None], axis=-1)[..., 0] for d in (p, q))
    return Y, jnp.where(p_Y >= q_Y, 1.0, p_Y / jnp.maximum(q_Y, jnp.finfo(jnp.float32).tiny))


def mix(
    Y: Int[Array, "B T"], a: Float[Array, "B T"], batch: Batch, coin: Float[Array, "B T"], cfg: SpecDecPPConfig
) -> Drafts:
    """Put drafts into the text.

    Args:
      Y: drawn in place of the target of each position, which stands at the next one.
      a: how likely it is accepted.
      batch: text, and which targets count.
      coin: uniform in [0, 1), one a position of the mixed text; below `keep` the text's own token stays.
      cfg: of the mixture.
    """
    behind = lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0)))  # what belongs to the target, where that stands
    same = (batch.segments > 0) & (behind(batch.segments) == batch.segments)
    drawn = same & behind(batch.mask) & (coin >= cfg.keep)
    mixed = jnp.where(drawn, behind(Y), batch.tokens)
    return Drafts(mixed, drawn, jnp.where(drawn, behind(a), 0.0), jnp.where(drawn, behind(batch.weights), 0.0))


def make_loss(
    target_cfg: DecoderConfig,
    drafter_cfg: DrafterConfig,
    cfg: SpecDecPPConfig = SpecDecPPConfig(),
    *,
    rules: Rules = REPLICATED,
    remat: Remat = "none",
) -> LossFn:
    """The objective with its forward passes, for `make_train_step`: the target once, the drafter twice.

    Its parameters are `{"head": ..., "drafter": ..., "target": ...}`, layers stacked. There is nothing for `remat` to
    save: the backward pass is that of the head alone.
    """
    del remat

    def loss(params: Params, batch: Batch, key: jax.Array) -> tuple[Terms, Terms]:
        frozen = jax.lax.stop_gradient({"target": params["target"], "drafter": params["drafter"]})
        draw_key, coin_key = jax.random.split(key)
        u, coin = (jax.random.uniform(k, batch.tokens.shape) for k in (draw_key, coin_key))
        drafts = make_drafts(target_cfg, drafter_cfg, frozen, batch, u, coin, cfg, rules=rules)
        hidden = drafter_states(target_cfg, drafter_cfg, frozen, drafts.mixed, batch, rules=rules)
        return specdec_pp(acceptance_logits(params["head"], hidden), drafts, cfg)

    return loss


def make_drafts(
    target_cfg: DecoderConfig,
    drafter_cfg: DrafterConfig,
    frozen: Params,
    batch: Batch,
    u: Float[Array, "B T"],
    coin: Float[Array, "B T"],
    cfg: SpecDecPPConfig = SpecDecPPConfig(),
    *,
    rules: Rules = REPLICATED,
) -> Drafts:
    """Read the text with target and drafter, draw behind every position, and mix; no `[B, T, V]` is held."""
    positions, mask = batch.positions, segment_mask(batch)
    final = forward(
        target_cfg, frozen["target"], batch.tokens, positions, mask, key_positions=positions, rules=rules
    ).hidden
    draft = drafter_states(target_cfg, drafter_cfg, frozen, batch.tokens, batch, rules=rules)
    B, T, _ = final.shape
    each = max(1, min(cfg.tile // B, T))  # positions of every row, so that rows stay on their devices

    def one(part: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        z = lm_head(target_cfg, frozen["target"], part[0], rules=rules)
        w = drafter_logits(target_cfg, drafter_cfg, frozen, part[1], rules=rules)
        return draw(jax.nn.softmax(z, axis=-1), jax.nn.softmax(w, axis=-1), part[2])

    def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [tiles, B, each, ...], padded with zeros
        x = jnp.pad(x, [(0, 0), (0, -T % each)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, each, *x.shape[2:]), 1, 0)

    tiles = jax.lax.map(one, (cut(final), cut(draft), cut(u)))
    Y, a = (jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, :T] for x in tiles)
    return mix(Y, a, batch, coin, cfg)


def drafter_states(
    target_cfg: DecoderConfig,
    drafter_cfg: DrafterConfig,
    frozen: Params,
    tokens: Int[Array, "B T"],
    batch: Batch,
    *,
    rules: Rules = REPLICATED,
) -> Float[Array, "B T D"]:
    """What the drafter draws from, behind each of `tokens`; segments are those of the batch."""
    positions, mask = batch.positions, segment_mask(batch)
    see = {"key_positions": positions, "rules": rules}
    if isinstance(drafter_cfg, KangarooConfig):
        early = forward(
            target_cfg, frozen["target"], tokens, positions, mask, stop_layer=drafter_cfg.exit_layer, **see
        ).hidden
        return kangaroo.forward(drafter_cfg, frozen["drafter"], early, positions, mask, rules=rules).hidden
    return forward(drafter_cfg, frozen["drafter"], tokens, positions, mask, **see).hidden


def drafter_logits(
    target_cfg: DecoderConfig,
    drafter_cfg: DrafterConfig,
    frozen: Params,
    hidden: Float[Array, "B T D"],
    *,
    rules: Rules = REPLICATED,
) -> Float[Array, "B T V"]:
    """The drafter's logits: by its own head, or for an adapter by the target's."""
    if isinstance(drafter_cfg, KangarooConfig):
        return lm_head(target_cfg, frozen["target"], hidden, rules=rules)
    return lm_head(drafter_cfg, frozen["drafter"], hidden, rules=rules)
