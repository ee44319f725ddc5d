"""Draft, verify, commit: the one loop that every drafter and every rule plugs into.

    drafter proposes a tree -> the target judges all of its nodes in one forward pass -> a rule walks down from the root
    -> the path it took is kept, the rest forgotten -> the drafter hears what became of it

A step emits between one token and one more than the tree is deep; rows of a batch go at their own pace. Emission is
that of plain decoding (`../decode.py`): penalties see the tokens of the path, stop tokens and limits end a row in the
middle of a path, log-probabilities are the same. The state is donated from call to call, and only shapes, the drafter
and the rule are compiled in: weights, thresholds and settings are traced.

A cache needs `limit + nodes` slots: a tree is written behind the committed rows before it is judged.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ...models.cache import KVCache, keep_path
from ...models.decoder import DecoderConfig, Params, forward, lm_head
from ...sharding.rules import SERVING
from ..decode import (
    RUNNING,
    STOPPED,
    DecodeState,
    LogprobsMode,
    Rows,
    begin,
    emit,
    finite_or_zero,
    read_prompt,
    record,
)
from ..devices import pinned
from ..sampling import Counts, SamplingArrays, warp
from .tree import DraftTree, Proposal, children, slot_positions, take_row, tree_mask
from .verify import Node, Verifier


class Context(NamedTuple):
    """What a drafter may look at. The last token of a row, at `filled - 1`, is the root; it is not in the cache."""

    tokens: Int[Array, "B S"]
    filled: Int[Array, " B"]
    running: Bool[Array, " B"]
    cache: KVCache  # the target's, `filled - 1` rows committed
    sampling: SamplingArrays
    counts: Counts

    @property
    def root(self) -> Int[Array, " B"]:
        """The last token of every row."""
        return jnp.take_along_axis(self.tokens, self.filled[:, None] - 1, axis=1, mode="clip")[:, 0]


class Verdict(NamedTuple):
    """What became of a tree."""

    path: Int[Array, "B D1"]  # the nodes that were kept, root first; the last one repeated behind `accepted`
    accepted: Int[Array, " B"]  # how many of them are drafts
    features: tuple[Float[Array, "B C D"], ...]  # the target's hidden states at all nodes, one for each of `collect`


class Drafter(NamedTuple):
    """Static facts and three pure functions; `params` is whatever tree of arrays the drafter was trained to.

    Every leaf of its state has a leading axis of rows. Functions see all rows, ended ones included.
    """

    name: str
    nodes: int  # C: of a tree, the root included
    depth: int  # D: levels below the root
    most: int  # children a node has at most
    proposal: Proposal
    chain: bool  # one chain: node i hangs on node i - 1
    chains: bool  # independent chains that share only the root
    pruned: bool  # which nodes stay depends on what was drawn (reranked trees)
    start_layer: int  # layers of the target that the drafter runs itself: it hands over hidden states
    collect: tuple[int, ...]  # hidden states of the target it wants, numbered as in `decoder.forward`
    init: Callable[[Params, Any, Context, tuple[Array, ...], int], Any]
    # (target, params, context, features of the prompt, prefill chunk) -> state
    propose: Callable[[Params, Any, Any, Context], tuple[DraftTree, Any, KVCache]]
    # (target, params, state, context) -> tree, state, the target's cache (rows of its first layers written)
    commit: Callable[[Params, Any, Any, Context, Verdict], Any]
    # (target, params, state, context after the step, verdict) -> state


class Weights(NamedTuple):
    """Everything traced that does not change while rows run."""

    target: Params
    drafter: Any
    verifier: Any


class Speculation(NamedTuple):
    """A drafter, the rule that judges it, and the parameters of both."""

    drafter: Drafter
    verifier: Verifier
    drafter_params: Any = ()
    verifier_params: Any = ()
    shorter: tuple[Drafter, ...] = ()  # the same drafter with less to draft, the shortest first; its state serves all

    @property
    def arms(self) -> tuple[Drafter, ...]:
        """All that may draft, by depth."""
        return (*self.shorter, self.drafter)


class Tally(NamedTuple):
    """What each row's steps came to."""

    emitted: Int[Array, "B D2"]  # steps that emitted 0, 1, .. D + 1 tokens; those of 0 met logits that were not finite
    drafted: Int[Array, " B"]  # nodes judged, roots aside


class SpeculativeState(NamedTuple):
    """Where each row stands; donated to every call that advances it."""

    rows: DecodeState
    drafter: Any
    tally: Tally


def check(drafter: Drafter, verifier: Verifier) -> None:
    """Refuse a pair that would bias the output.

    Raises:
      ValueError: with the reason.
    """
    pair = f"{verifier.name} with drafter {drafter.name}"
    if drafter.proposal not in verifier.proposals:
        raise ValueError(
            f"{pair}: its drafts are {drafter.proposal.replace('_', ' ')}; expected {sorted(verifier.proposals)}. "
            "The rule would divide by probabilities that nobody drew from."
        )
    if verifier.needs_q and drafter.pruned:
        raise ValueError(
            f"{pair}: found a sampled tree that is pruned by its own scores; expected one of fixed shape. "
            "Dropping drawn tokens changes what the others were drawn from."
        )
    if verifier.chains_only and not drafter.chains:
        raise ValueError(f"{pair}: found a tree; expected independent chains.")
    if drafter.most > verifier.most:
        raise ValueError(f"{pair}: a node may have {drafter.most} children; the rule looks at {verifier.most}.")


@functools.partial(jax.jit, static_argnames=("cfg", "drafter", "chunk", "top_n", "mode", "cache_dtype"))
def prefill(
    cfg: DecoderConfig,
    weights: Weights,
    drafter: Drafter,
    tokens: Int[Array, "B S"],
    rows: Rows,
    *,
    chunk: int,
    top_n: int = 0,
    mode: LogprobsMode = "raw",
    cache_dtype: str | None = None,
) -> SpeculativeState:
    """Read the prompts, sample the first token of every row (it belongs to no step), and let the drafter begin.

    Arguments as in `decode.prefill`.
    """
    cache, hidden, features = read_prompt(
        cfg, weights.target, tokens, rows.prompt_length, chunk=chunk, cache_dtype=cache_dtype, collect=drafter.collect
    )
    state = emit(cfg, weights.target, begin(cfg, tokens, rows, cache, top_n), rows, hidden, mode)
    drafting = drafter.init(weights.target, weights.drafter, _context(state, rows), features, chunk)
    B = tokens.shape[0]
    tally = Tally(jnp.zeros((B, drafter.depth + 2), jnp.int32), jnp.zeros(B, jnp.int32))
    return pinned(SpeculativeState(state, drafting, tally))


@functools.partial(jax.jit, static_argnames=("cfg", "drafter", "verifier", "mode"), donate_argnames=("state",))
def decode(
    cfg: DecoderConfig,
    weights: Weights,
    drafter: Drafter,
    verifier: Verifier,
    state: SpeculativeState,
    rows: Rows,
    halt: Bool[Array, " B"],
    steps: Int[Array, ""],
    *,
    mode: LogprobsMode = "raw",
) -> SpeculativeState:
    """Advance every running row by up to `steps` steps, each of one token or more; ends early when no row runs.

    `halt` ends rows from outside, as in `decode.decode`.
    """
    base = state.rows
    base = base._replace(status=jnp.where(halt & (base.status == RUNNING), STOPPED, base.status))

    def running(carry: tuple[jax.Array, SpeculativeState]) -> jax.Array:
        return (carry[0] < steps) & jnp.any(carry[1].rows.status == RUNNING)

    def step(carry: tuple[jax.Array, SpeculativeState]) -> tuple[jax.Array, SpeculativeState]:
        i, state = carry
        return i + 1, one_step(cfg, weights, drafter, verifier, state, rows, mode)

    return pinned(jax.lax.while_loop(running, step, (jnp.int32(0), state._replace(rows=base)))[1])


@functools.partial(jax.jit, static_argnames=("cfg", "drafter", "chunk"), donate_argnames=("state",))
def catch_up(
    cfg: DecoderConfig, weights: Weights, drafter: Drafter, state: SpeculativeState, rows: Rows, *, chunk: int
) -> SpeculativeState:
    """Let the drafter read texts that have grown without it, by plain decoding on `state.rows`.

    Where it wants hidden states, the target reads the texts once more; its own cache stays as it is.
    """
    base = state.rows
    features: tuple[Array, ...] = ()
    if drafter.collect:
        _, _, features = read_prompt(
            cfg,
            weights.target,
            base.tokens,
            base.filled - 1,
            chunk=chunk,
            cache_dtype=base.cache.dtype,
            collect=drafter.collect,
        )
    begun = drafter.init(weights.target, weights.drafter, _context(base, rows), features, chunk)
    return pinned(state._replace(drafter=begun))


# ------------------------------------------------------------------------------------------------------ parts of a step
class Judged(NamedTuple):
    """Between the rule and the commit of a step: what `commit` needs."""

    rows: DecodeState  # with the tokens emitted; the cache still holds the whole tree
    verdict: Verdict
    filled_before: Int[Array, " B"]
    running_before: Bool[Array, " B"]
    drafted: Int[Array, " B"]


def draft(weights: Weights, drafter: Drafter, state: SpeculativeState, rows: Rows) -> tuple[DraftTree, Any, KVCache]:
    """Let the drafter propose: a tree, its state, and the target's cache, whose first layers it may have run."""
    return drafter.propose(weights.target, weights.drafter, state.drafter, _context(state.rows, rows))


def judge(
    cfg: DecoderConfig,
    weights: Weights,
    drafter: Drafter,
    verifier: Verifier,
    state: DecodeState,
    rows: Rows,
    tree: DraftTree,
    mode: LogprobsMode,
) -> Judged:
    """One forward pass of the target over the tree, and the rule's walk through it, which emits tokens."""
    running = state.status == RUNNING
    hidden, features, cache = judge_nodes(cfg, weights.target, drafter, tree, state.cache)
    new, path, accepted = _walk(cfg, weights, drafter, verifier, state._replace(cache=cache), rows, tree, hidden, mode)
    drafted = (jnp.sum(tree.valid, axis=1, dtype=jnp.int32) - 1) * running.astype(jnp.int32)
    return Judged(new, Verdict(path, accepted, features), state.filled, running, drafted)


def commit(weights: Weights, drafter: Drafter, drafting: Any, tally: Tally, judged: Judged, rows: Rows):
    """Keep the path's rows, forget the rest, and tell the drafter."""
    base, cache = judged.rows, judged.rows.cache
    length = cache.length
    cache = cache if drafter.chain else keep_path(cache, judged.verdict.path)
    emitted = base.filled - judged.filled_before
    base = base._replace(cache=cache._replace(length=length + emitted))
    drafting = drafter.commit(weights.target, weights.drafter, drafting, _context(base, rows), judged.verdict)
    one = judged.running_before.astype(jnp.int32)
    count = tally.emitted.at[jnp.arange(one.shape[0]), emitted].add(one)
    return SpeculativeState(base, drafting, Tally(count, tally.drafted + judged.drafted))


def judge_nodes(cfg: DecoderConfig, target: Params, drafter: Drafter, tree: DraftTree, cache: KVCache):
    """The target's last hidden states at every node, the states that the drafter collects, and the cache written."""
    length, capacity = cache.length, cache.capacity
    x = tree.tokens if tree.hidden is None else tree.hidden
    single = drafter.chain  # its rows are causal as they stand
    out = forward(
        cfg,
        target,
        x,
        length[:, None] + tree.depth,
        None if single else tree_mask(tree, length, capacity, drafter.depth),
        cache,
        start_layer=drafter.start_layer,
        collect=drafter.collect,
        key_positions=None if single else slot_positions(tree, length, capacity),
        rules=SERVING,
    )
    assert out.cache is not None
    return out.hidden, out.collected, out.cache


def one_step(
    cfg: DecoderConfig,
    weights: Weights,
    drafter: Drafter,
    verifier: Verifier,
    state: SpeculativeState,
    rows: Rows,
    mode: LogprobsMode,
) -> SpeculativeState:
    """Draft, judge, commit."""
    tree, drafting, cache = draft(weights, drafter, state, rows)
    judged = judge(cfg, weights, drafter, verifier, state.rows._replace(cache=cache), rows, tree, mode)
    return commit(weights, drafter, drafting, state.tally, judged, rows)


# ----------------------------------------------------------------------------------------------------------- private
def _walk(cfg, weights: Weights, drafter, verifier, state: DecodeState, rows: Rows, tree, hidden, mode):
    """Follow the rule from the root down, emitting as plain decoding does."""
    z = lm_head(cfg, weights.target, hidden, rules=SERVING)  # [B, C, V]
    B, C = tree.tokens.shape
    places = jnp.arange(drafter.depth + 1)[None]

    def go(carry):
        depth, state, node, alike, going, path, accepted = carry
        here, finite = finite_or_zero(take_row(z, node))
        warped = warp(here, rows.sampling, state.counts)
        at = Node(tree, node, alike, warped, hidden, rows.sampling, state.filled)
        choice = verifier.choose_next(weights.verifier, at)
        state = record(state, rows, choice.token, here, warped, finite, going, mode)
        going = going & finite & (choice.child >= 0) & (state.status == RUNNING)
        same = children(tree, alike) & (tree.tokens == choice.token[:, None])
        node = jnp.where(going, choice.child, node)
        alike = jnp.where(going[:, None], same, alike)
        path = jnp.where(places > depth, node[:, None], path)
        return depth + 1, state, node, alike, going, path, accepted + going.astype(jnp.int32)

    zero = jnp.zeros(B, jnp.int32)
    root = jnp.broadcast_to(jnp.arange(C)[None] == 0, (B, C))
    start = (
        jnp.int32(0),
        state,
        zero,
        root,
        state.status == RUNNING,
        jnp.zeros((B, drafter.depth + 1), jnp.int32),
        zero,
    )
    _, state, _, _, _, path, accepted = jax.lax.while_loop(lambda c: jnp.any(c[4]), go, start)
    return state, path, accepted


def _context(state: DecodeState, rows: Rows) -> Context:
    return Context(state.tokens, state.filled, state.status == RUNNING, state.cache, rows.sampling, state.counts)
