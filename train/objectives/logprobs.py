"""The shared forward pass: what a model says of the targets of a batch, without `[B, T, V]` logits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ...jaxlib_ext.logit_tiles import layout_of
from ...jaxlib_ext.token_kl import token_kl
from ...jaxlib_ext.token_stats import TokenStats, token_stats
from ...models.decoder import DecoderConfig, Params, Remat, forward
from ...sharding.rules import REPLICATED, Rules
from ..data.pipeline import Batch


class Scores(NamedTuple):
    """Of every target that was asked for; 0 at the others, whose logits nobody computes."""

    logp: Float[Array, "B T"]  # natural logarithm of its probability
    entropy: Float[Array, "B T"]  # in nats, of the distribution it was scored under
    hidden: Float[Array, "B T D"]  # behind the final norm, of every token
    log_sum_sq: Float[Array, "B T"] | None = None  # log sum_v p_v^2, without gradient; None if nobody asked
    lse: Float[Array, "B T"] | None = None  # log sum_v e^{z_v} of the logits
    states: tuple[Float[Array, "B T D"], ...] = ()  # those asked for by `collect`
    greedy: Float[Array, "B T"] | None = None  # 1 where no token is more likely than the target, without gradient
    mean_logit: Float[Array, "B T"] | None = None  # over the vocabulary, without gradient; None if nobody asked


def segment_mask(batch: Batch) -> Bool[Array, "B T T"]:
    """A token sees those before it in its own segment, and in the one it goes on behind; padding sees nothing."""
    positions, segments = batch.positions, batch.segments
    before = positions[:, :, None] >= positions[:, None, :]
    own = segments[:, :, None] == segments[:, None, :]
    starts = segments != jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    first = jax.lax.cummax(jnp.where(starts, jnp.arange(segments.shape[1])[None], 0), axis=1)
    begin = jnp.take_along_axis(positions, first, axis=1)  # of the token's segment
    trunk = jax.lax.cummax(jnp.where(positions == 0, segments, 0), axis=1)
    shared = (segments[:, None, :] == trunk[:, :, None]) & (positions[:, None, :] < begin[:, :, None])
    return (own | shared) & (segments > 0)[:, :, None] & before


def hidden_states(
    cfg: DecoderConfig, params: Params, batch: Batch, *, rules: Rules = REPLICATED, remat: Remat = "none"
) -> Float[Array, "B T D"]:
    """Run the decoder on packed or padded rows, up to behind the final norm."""
    positions, mask = batch.positions, segment_mask(batch)
    return forward(cfg, params, batch.tokens, positions, mask, key_positions=positions, remat=remat, rules=rules).hidden


def output_table(cfg: DecoderConfig, params: Params) -> Float[Array, "V D"]:
    """What hidden states are multiplied with to become logits."""
    return params["embed"] if cfg.tie_embeddings else params["head"]


def score_targets(
    cfg: DecoderConfig,
    params: Params,
    batch: Batch,
    *,
    rules: Rules = REPLICATED,
    remat: Remat = "none",
    squares: bool = False,
    mean_logits: bool = False,
    collect: tuple[int, ...] = (),
    wanted: Bool[Array, "B T"] | None = None,
    still: Bool[Array, "B T"] | None = None,
) -> Scores:
    """What the decoder says of every target that is asked for.

    Args:
      cfg: of the decoder.
      params: its weights.
      batch: packed or padded rows.
      wanted: the targets, if not those of the batch's mask.
      still: those of them whose scores get no gradient; their backward pass through the head is saved.
      rules: where activations lie.
      remat: what the backward pass computes again.
      squares: also how much of the distribution is in few tokens.
      mean_logits: also the mean over the vocabulary, of every token: one product with the mean of the table's rows.
      collect: states to give back, as `forward` counts them.
    """
    positions, mask = batch.positions, segment_mask(batch)
    seen = dict(key_positions=positions, remat=remat, rules=rules, collect=collect)
    out = forward(cfg, params, batch.tokens, positions, mask, **seen)  # type: ignore[arg-type]
    wanted = batch.mask if wanted is None else wanted
    of = lambda mask, x, table: target_stats(x, table, batch._replace(mask=mask), rules=rules, want_sum_sq=squares)
    table = output_table(cfg, params)
    if still is None:
        stats = of(wanted, out.hidden, table)
    else:  # each is 0 where the other has something
        fixed = of(wanted & still, *jax.lax.stop_gradient((out.hidden, table)))
        stats = jax.tree.map(jnp.add, of(wanted & ~still, out.hidden, table), fixed)
    found = Scores(stats.logp, stats.entropy, out.hidden, stats.log_sum_sq, stats.lse, out.collected, stats.greedy)
    if not mean_logits:
        return found
    hidden, row = jax.lax.stop_gradient((out.hidden, jnp.mean(table, axis=0, dtype=jnp.float32)))
    return found._replace(mean_logit=jnp.einsum("btd,d->bt", hidden, row, preferred_element_type=jnp.float32))


def target_stats(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], batch: Batch, *, rules: Rules, **more: Any
) -> TokenStats:
    """`token_stats` at the targets of a batch's mask, each device for its own tokens and part of the vocabulary.

    Args:
      hidden: states behind the final norm.
      table: the output embedding, of whatever type.
      batch: its targets and mask.
      rules: where tokens and vocabulary lie on the mesh that is set.
      more: options of `token_stats`.
    """
    layout = layout_of(rules, hidden, table)
    return token_stats(hidden, table.astype(hidden.dtype), batch.targets, batch.mask, layout=layout, **more)


def target_kl(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    ref_hidden: Float[Array, "B T E"],
    ref_table: Float[Array, "V E"],
    batch: Batch,
    *,
    rules: Rules,
) -> Float[Array, "B T"]:
    """KL(reference || policy) over the whole vocabulary, at the targets of a batch's mask and 0 elsewhere."""
    tables = table.astype(hidden.dtype), ref_table.astype(ref_hidden.dtype)
    return token_kl(hidden, tables[0], ref_hidden, tables[1], batch.mask, layout=layout_of(rules, hidden, table))
