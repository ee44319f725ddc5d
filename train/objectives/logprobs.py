"""The shared forward pass: what a model says of the targets of a batch, without `[B, T, V]` logits."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float

from ...jaxlib_ext.token_stats import token_stats
from ...models.decoder import DecoderConfig, Params, Remat, forward
from ...sharding.rules import REPLICATED, Rules
from ..data.pipeline import Batch


class Scores(NamedTuple):
    """Of every target, prompts and padding included: objectives mask."""

    logp: Float[Array, "B T"]  # natural logarithm of its probability
    entropy: Float[Array, "B T"]  # in nats, of the distribution it was scored under
    hidden: Float[Array, "B T D"]  # behind the final norm
    log_sum_sq: Float[Array, "B T"] | None = None  # log sum_v p_v^2, without gradient; None if nobody asked
    lse: Float[Array, "B T"] | None = None  # log sum_v e^{z_v} of the logits
    states: tuple[Float[Array, "B T D"], ...] = ()  # those asked for by `collect`


def segment_mask(batch: Batch) -> Bool[Array, "B T T"]:
    """A token sees those before it in its own segment; padding sees nothing."""
    positions, segments = batch.positions, batch.segments
    before = positions[:, :, None] >= positions[:, None, :]
    return (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None] & before


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
    collect: tuple[int, ...] = (),
) -> Scores:
    """What the decoder says of every target.

    Args:
      cfg: of the decoder.
      params: its weights.
      batch: packed or padded rows.
      rules: where activations lie.
      remat: what the backward pass computes again.
      squares: also how much of the distribution is in few tokens.
      collect: states to give back, as `forward` counts them.
    """
    B, T = batch.tokens.shape
    positions, mask = batch.positions, segment_mask(batch)
    seen = dict(key_positions=positions, remat=remat, rules=rules, collect=collect)
    out = forward(cfg, params, batch.tokens, positions, mask, **seen)  # type: ignore[arg-type]
    hidden = out.hidden
    table = output_table(cfg, params).astype(hidden.dtype)
    targets = batch.targets.reshape(-1)
    stats = token_stats(hidden.reshape(B * T, -1), table, targets, want_sum_sq=squares)
    square = stats.log_sum_sq.reshape(B, T) if squares and stats.log_sum_sq is not None else None
    cut = lambda x: x.reshape(B, T)
    return Scores(cut(stats.logp), cut(stats.entropy), hidden, square, cut(stats.lse), out.collected)
