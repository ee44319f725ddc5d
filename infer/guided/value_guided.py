"""A reward model steers decoding, token by token, inside the compiled loop.

At every token the `width` likeliest candidates are each put behind the text, and the reward model scores the prefixes,
all of them in one forward pass on a cache of its own.

tvd  where the policy's likeliest token has less than `threshold` of its probability, the candidate of the highest score
     is taken; elsewhere the policy's own token, as it would be drawn (AdaptiveStep, 2502.13943, decodes greedily). With
     threshold 0 the policy decodes as without a guide.
ivo  the token is drawn from p(y|x) proportional to pi(y|x) exp(beta V(x, y)) over the candidates, V the score of the
     prefix that y ends (IVO, 2503.02368). With beta 0 this is the policy cut to its `width` likeliest tokens.

pi is the policy's distribution after the request's settings, and candidates are those of the highest pi. The confidence
that tvd compares is that of the model's own distribution. A score is read at the candidate, or, for reward models that
read it at a separator, at one put behind the candidate and forgotten again. Thresholds and beta are traced.

The reward model's cache holds the text but for its last token: that one, the candidates and their separators are a
small tree behind it. Only the last token's row is kept, which is the first.

Letters: B rows, S cache slots, V vocabulary, k candidates, C = 1 + k nodes of the tree, or 1 + 2k with separators.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ...models.cache import KVCache
from ...models.decoder import DecoderConfig, Params, forward, lm_head
from ...models.reward import RewardConfig, RewardModel, step_logits
from ...sharding.rules import SERVING
from ..decode import (
    RUNNING,
    STOPPED,
    DecodeState,
    LogprobsMode,
    Rows,
    begin,
    finite_or_zero,
    read_last,
    read_prompt,
    record,
)
from ..devices import pinned
from ..sampling import SamplingArrays, choose, warp
from ..speculative.tree import DraftTree, slot_positions, tree_mask


class Candidates(NamedTuple):
    """What a guide chooses from."""

    logits: Float[Array, "B V"]  # the model's own
    warped: Float[Array, "B V"]  # after the request's settings
    tokens: Int[Array, "B k"]  # of the highest `warped`
    scores: Float[Array, "B k"]  # of the reward model
    sampling: SamplingArrays
    position: Int[Array, " B"]  # of the token to be chosen


class Guide(NamedTuple):
    """Static facts and a choice; its parameters are `{"reward": ..., "setting": {...}}`."""

    name: str
    reward: RewardConfig
    width: int
    separated: bool  # scores are read at a separator behind the candidate
    choose: Callable[[Any, Candidates], tuple[Int[Array, " B"], Float[Array, "B V"]]]
    # (setting, candidates) -> the token, and the logits that it was drawn from

    @property
    def nodes(self) -> int:
        """C, slots that the reward model's cache needs behind the text."""
        return 1 + self.width * (1 + self.separated)


class Guidance(NamedTuple):
    """A guide with its parameters."""

    guide: Guide
    params: Any


class GuidedState(NamedTuple):
    """Where each row stands; donated to every call that advances it."""

    rows: DecodeState
    cache: KVCache  # the reward model's


# -------------------------------------------------------------------------------------------------------------- guides
def tvd(model: RewardModel, *, threshold: float, width: int = 4, separated: bool = True) -> Guidance:
    """Ask the reward model where the policy is unsure.

    Args:
      model: with the policy's tokenizer.
      threshold: the policy's confidence below which it is asked.
      width: candidates.
      separated: read scores at the separator; else at the candidate itself.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"tvd: threshold={threshold}; expected a probability.")
    return _guidance("tvd", model, width, separated, _ask_where_unsure, {"threshold": jnp.float32(threshold)})


def ivo(model: RewardModel, *, beta: float, width: int = 4, separated: bool = False) -> Guidance:
    """Weigh the policy's likeliest tokens by what they are worth.

    Args:
      model: a value model with the policy's tokenizer.
      beta: how much a score weighs.
      width: candidates.
      separated: read scores at the separator; else at the candidate itself, as value models do.
    """
    if not 0 <= beta < float("inf"):
        raise ValueError(f"ivo: beta={beta}; expected 0 or more.")
    return _guidance("ivo", model, width, separated, _weigh, {"beta": jnp.float32(beta)})


def check(guide: Guide, policy: DecoderConfig) -> None:
    """Refuse a reward model that reads other tokens than the policy writes.

    Raises:
      ValueError: saying which.
    """
    theirs = guide.reward.target.vocab_size
    if theirs != policy.vocab_size:
        raise ValueError(
            f"{guide.name}: the reward model has {theirs} tokens; expected {policy.vocab_size}, as the policy has. Use "
            "one with the same tokenizer."
        )
    if not 1 <= guide.width <= policy.vocab_size:
        raise ValueError(f"{guide.name}: width={guide.width}; expected 1 to {policy.vocab_size} candidates.")


# ------------------------------------------------------------------------------------------------------------ the loop
@functools.partial(jax.jit, static_argnames=("cfg", "guide", "chunk", "top_n", "mode", "cache_dtype"))
def prefill(
    cfg: DecoderConfig,
    params: Params,
    guide: Guide,
    guiding: Any,
    tokens: Int[Array, "B S"],
    rows: Rows,
    *,
    chunk: int,
    top_n: int = 0,
    mode: LogprobsMode = "raw",
    cache_dtype: str | None = None,
) -> GuidedState:
    """Let policy and reward model read the prompts, and choose the first token of every row.

    `guiding` holds the guide's parameters; the other arguments are as in `decode.prefill`.
    """
    cache, hidden, _ = read_prompt(cfg, params, tokens, rows.prompt_length, chunk=chunk, cache_dtype=cache_dtype)
    reward = guide.reward.target
    read, _, _ = read_prompt(reward, guiding["reward"]["model"], tokens, rows.prompt_length - 1, chunk=chunk)
    state = GuidedState(begin(cfg, tokens, rows, cache, top_n), read)
    return pinned(_emit(cfg, params, guide, guiding, state, rows, hidden, mode))


@functools.partial(jax.jit, static_argnames=("cfg", "guide", "mode"), donate_argnames=("state",))
def decode(
    cfg: DecoderConfig,
    params: Params,
    guide: Guide,
    guiding: Any,
    state: GuidedState,
    rows: Rows,
    halt: Bool[Array, " B"],
    steps: Int[Array, ""],
    *,
    mode: LogprobsMode = "raw",
) -> GuidedState:
    """Advance every running row by up to `steps` tokens, as `decode.decode` does."""
    base = state.rows
    base = base._replace(status=jnp.where(halt & (base.status == RUNNING), STOPPED, base.status))

    def running(carry: tuple[jax.Array, GuidedState]) -> jax.Array:
        return (carry[0] < steps) & jnp.any(carry[1].rows.status == RUNNING)

    def step(carry: tuple[jax.Array, GuidedState]) -> tuple[jax.Array, GuidedState]:
        i, (at, read) = carry
        at, hidden = read_last(cfg, params, at)
        return i + 1, _emit(cfg, params, guide, guiding, GuidedState(at, read), rows, hidden, mode)

    return pinned(jax.lax.while_loop(running, step, (jnp.int32(0), state._replace(rows=base)))[1])


# ------------------------------------------------------------------------------------------------------------- private
def _emit(cfg, params, guide: Guide, guiding, state: GuidedState, rows: Rows, hidden, mode) -> GuidedState:
    """Choose the token at position `filled` of every running row, and let the reward model keep the one before it."""
    at, read = state
    z, finite = finite_or_zero(lm_head(cfg, params, hidden, rules=SERVING)[:, 0])
    warped = warp(z, rows.sampling, at.counts)
    tokens = jax.lax.top_k(warped, guide.width)[1].astype(jnp.int32)
    scores, read = _score(guide, guiding["reward"], at, read, tokens)
    found = Candidates(z, warped, tokens, scores, rows.sampling, at.filled)
    token, drawn_from = guide.choose(guiding["setting"], found)
    new = record(at, rows, token, z, drawn_from, finite, at.status == RUNNING, mode)
    return GuidedState(new, read._replace(length=read.length + new.filled - at.filled))


def _score(guide: Guide, reward: Params, at: DecodeState, read: KVCache, candidates: Int[Array, "B k"]):
    """Scores of the text with each candidate behind it; the text's last token is read on the way."""
    B, k = candidates.shape
    root = jnp.take_along_axis(at.tokens, at.filled[:, None] - 1, axis=1, mode="clip")
    behind = [jnp.full((B, k), guide.reward.separator, jnp.int32)] if guide.separated else []
    C, number = guide.nodes, np.arange(k)
    levels = [([-1], [0], [0]), (0 * number, 0 * number + 1, number), (1 + number, 0 * number + 2, 0 * number)]
    columns = (np.concatenate(parts) for parts in zip(*levels[: 2 + guide.separated], strict=True))
    parent, depth, order = (jnp.broadcast_to(jnp.asarray(column[None], jnp.int32), (B, C)) for column in columns)
    tree = DraftTree(
        jnp.concatenate([root, candidates, *behind], axis=1), parent, depth, order, valid=jnp.ones((B, C), bool)
    )
    cfg, length, capacity = guide.reward.target, read.length, read.capacity
    out = forward(
        cfg,
        reward["model"],
        tree.tokens,
        length[:, None] + tree.depth,
        tree_mask(tree, length, capacity, 2),
        read,
        key_positions=slot_positions(tree, length, capacity),
        rules=SERVING,
    )
    assert out.cache is not None
    return jax.nn.sigmoid(step_logits(guide.reward, reward, out.hidden[:, C - k :])), out.cache


def _ask_where_unsure(setting: Any, found: Candidates) -> tuple[Array, Array]:
    own = choose(found.warped, found.sampling, found.position)
    possible = jnp.take_along_axis(found.warped, found.tokens, axis=1) > -jnp.inf
    first = jnp.argmax(jnp.where(possible, found.scores, -1.0), axis=1)
    best = jnp.take_along_axis(found.tokens, first[:, None], axis=1)[:, 0]
    unsure = jnp.max(jax.nn.softmax(found.logits, axis=-1), axis=-1) < setting["threshold"]
    return jnp.where(unsure, best, own), found.warped


def _weigh(setting: Any, found: Candidates) -> tuple[Array, Array]:
    row = jnp.arange(found.tokens.shape[0])[:, None]
    kept = jnp.take_along_axis(found.warped, found.tokens, axis=1) + setting["beta"] * found.scores
    weighed = jnp.full_like(found.warped, -jnp.inf).at[row, found.tokens].set(kept)
    return choose(weighed, found.sampling, found.position), weighed


def _guidance(name: str, model: RewardModel, width: int, separated: bool, how, setting: Any) -> Guidance:
    if model.config.surprisal:
        raise ValueError(
            f"{name}: the reward model reads the surprisal of steps; expected one that does not, to judge tokens. "
            "Search by steps with it (`step_beam`), or train one without --surprisal."
        )
    if width < 1:
        raise ValueError(f"{name}: width={width}; expected 1 candidate or more.")
    return Guidance(Guide(name, model.config, width, separated, how), {"reward": model.params, "setting": setting})
