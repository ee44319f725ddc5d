"""A small decoder with the same tokenizer drafts for a large one (Leviathan 2211.17192; Chen 2302.01318).

Several chains, drawn independently, are for the rule `k_seq`. How tokens are drawn: `../draw.py`.

A single chain may end early, row by row, when a stop rule (`../stop.py`) says so; the token after which it did is kept.
The rule sees the probability of the likeliest token under what the draft is drawn from, and the small model's last
state behind its final norm.

Parameters are `{"model": ..., "stop": ...}`: those of a decoder, and those of the rule, `()` for `fixed`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ....models.cache import KVCache
from ....models.decoder import DecoderConfig, forward, lm_head
from ....sharding.rules import SERVING
from ...decode import read_prompt
from ..draw import Draw, draft_logits, draft_noise
from ..loop import Context, Drafter, Verdict
from ..stop import StopRule, fixed
from ..tree import DraftTree, make_chain


class State(NamedTuple):
    """The small model's own cache; how many of its rows are right follows from the text."""

    cache: KVCache


@functools.lru_cache
def make_drafter(
    cfg: DecoderConfig, drafts: int = 4, draw: Draw = "shared", chains: int = 1, stop: StopRule = fixed()
) -> Drafter:
    """Draft `chains` chains of `drafts` tokens each with a decoder `cfg`; one chain ends where the stop rule says."""
    if draw == "without_replacement":
        raise ValueError("small_model: a chain has one child a node; expected draw 'mode', 'shared' or 'independent'.")
    if drafts < 1 or chains < 1:
        raise ValueError(f"small_model: drafts={drafts}, chains={chains}; expected at least 1 of each.")
    if chains > 1 and draw != "independent":
        raise ValueError(f"small_model: {chains} chains drawn as {draw!r} would be one chain; expected 'independent'.")
    if chains > 1 and stop != fixed():
        raise ValueError(
            f"small_model: stop rule {stop.name!r} with {chains} chains; expected a single one. Which chains a step "
            "verifies would depend on what they drew."
        )
    nodes = 1 + chains * drafts

    def init(target, params, context: Context, features, chunk: int) -> State:
        del target, features
        cache, _, _ = read_prompt(cfg, params["model"], context.tokens, context.filled - 1, chunk=chunk)
        return State(cache)

    def propose(target, params, state: State, context: Context):
        del target
        tree, cache = _draft(cfg, params, state.cache, context, drafts, draw, chains, stop)
        return tree, State(cache), context.cache

    def commit(target, params, state: State, context: Context, verdict: Verdict) -> State:
        return state  # rows that turned out wrong lie behind the text's end, or are fed again

    return Drafter(
        name=f"small model, {chains} x {drafts}, {draw}" + ("" if stop == fixed() else f", {stop.name}"),
        nodes=nodes,
        depth=drafts,
        most=chains,
        proposal="independent" if draw == "independent" else "chosen",
        chain=chains == 1,
        chains=True,
        pruned=False,
        start_layer=0,
        collect=(),
        init=init,
        propose=propose,
        commit=commit,
    )


# ----------------------------------------------------------------------------------------------------------- private
class _Chains(NamedTuple):
    """The carry of drafting, behind i tokens of every chain."""

    i: Int[Array, ""]
    cache: KVCache
    hidden: Float[Array, "B c D"]  # what the next token is drawn from
    drawn: Int[Array, "B n c"]
    q: Float[Array, "B n c V"] | None
    kept: Int[Array, " B"]  # drafts of a chain that each row will have verified
    going: Bool[Array, " B"]  # rows that draft on
    stop: Any  # the rule's carry


def _draft(cfg, params, cache: KVCache, context: Context, drafts: int, draw: Draw, chains: int, rule: StopRule):
    """Feed what the small model has not read, then let every chain draw token after token, until all rows have stopped.

    A row that has stopped goes on drafting while others do, to no effect: what follows its last draft is not valid.
    A chain's rows stand in the cache at `filled + i * chains + c`. Of one chain the accepted rows are where they
    belong; of several, they are fed again with the next step: its last `drafts + 1` tokens, which costs one forward.
    """
    B, model = context.filled.shape[0], params["model"]
    fed = 2 if chains == 1 else drafts + 1  # the last draft was never fed, nor was the root
    start = jnp.maximum(context.filled - fed, 0)
    positions = start[:, None] + jnp.arange(fed)[None]
    tokens = jnp.take_along_axis(context.tokens, positions, axis=1, mode="clip")
    out = forward(cfg, model, tokens, positions, cache=cache._replace(length=start), rules=SERVING)
    assert out.cache is not None
    last = (context.filled - 1 - start)[:, None, None]
    hidden = jnp.broadcast_to(jnp.take_along_axis(out.hidden, last, axis=1), (B, chains, cfg.embed_dim))
    cache = out.cache._replace(length=context.filled)
    vocab = cfg.vocab_size

    def one(c: _Chains) -> _Chains:
        z = draft_logits(
            lm_head(cfg, model, c.hidden, rules=SERVING), context.sampling, context.counts, draw
        )  # [B, c, V]
        noise = draft_noise(context.sampling, context.filled + c.i, chains, vocab, draw)
        token = jnp.argmax(z + noise, axis=-1).astype(jnp.int32)  # [B, c]
        q = jax.nn.softmax(z, axis=-1)
        ruled, stops = rule.update(params["stop"], c.stop, c.i + 1, jnp.max(q[:, 0], axis=-1), c.hidden[:, 0])
        going = c.going & ~stops
        cache, hidden = jax.lax.cond(
            (c.i + 1 < drafts) & jnp.any(going),
            lambda: _feed(cfg, model, c.cache, token, context, c.i, chains),
            lambda: (c.cache, c.hidden),
        )
        return _Chains(
            i=c.i + 1,
            cache=cache,
            hidden=hidden,
            drawn=c.drawn.at[:, c.i].set(token),
            q=None if c.q is None else c.q.at[:, c.i].set(q),
            kept=c.kept + c.going.astype(jnp.int32),
            going=going,
            stop=ruled,
        )

    first = _Chains(
        i=jnp.int32(0),
        cache=cache,
        hidden=hidden,
        drawn=jnp.zeros((B, drafts, chains), jnp.int32),
        q=jnp.zeros((B, drafts, chains, vocab)) if draw == "independent" else None,
        kept=jnp.zeros(B, jnp.int32),
        going=context.running,
        stop=rule.init(B),
    )
    last = jax.lax.while_loop(lambda c: (c.i < drafts) & jnp.any(c.going), one, first)
    if chains == 1:
        valid = jnp.arange(drafts)[None] < last.kept[:, None]
        flat = None if last.q is None else last.q[:, :, 0]
        return make_chain(context.root, last.drawn[:, :, 0], valid, q=flat), last.cache
    return _side_by_side(context.root, last.drawn, last.q), last.cache


def _feed(cfg, params, cache: KVCache, token: Int[Array, "B c"], context: Context, i, chains: int):
    """One token of every chain; each sees the committed text and its own chain."""
    B, c = token.shape
    length, S = context.filled, cache.capacity
    slot = jnp.arange(S)[None, None] - length[:, None, None]  # [B, 1, S]
    own = (slot >= 0) & (slot <= i * chains + chains - 1) & (slot % chains == jnp.arange(c)[None, :, None])
    mask = jnp.broadcast_to((slot < 0) | own, (B, c, S))
    positions = jnp.broadcast_to(length[:, None] + i, (B, c))
    slots = jnp.arange(S)[None]
    behind = length[:, None] + (slots - length[:, None]) // chains
    where = jnp.where(slots < length[:, None], slots, behind)
    at = cache._replace(length=length + i * chains)
    out = forward(cfg, params, token, positions, mask, at, key_positions=where, rules=SERVING)
    assert out.cache is not None
    return out.cache._replace(length=length), out.hidden


def _side_by_side(root: Int[Array, " B"], drawn: Int[Array, "B n c"], q: Float[Array, "B n c V"] | None) -> DraftTree:
    """Chain after chain behind the root; duplicates stay apart."""
    B, n, c = drawn.shape
    index = jnp.arange(1, 1 + n * c).reshape(c, n)
    parent = jnp.where(jnp.arange(n)[None] == 0, 0, index - 1)
    every = lambda head, rest: jnp.broadcast_to(
        jnp.concatenate([jnp.array([head]), rest.reshape(-1)]).astype(jnp.int32)[None], (B, 1 + n * c)
    )
    depth = jnp.broadcast_to(jnp.arange(1, n + 1)[None], (c, n))
    chain = jnp.broadcast_to(jnp.arange(c)[:, None], (c, n))
    below = jnp.minimum(depth, n - 1) * c + chain  # the row of q that follows a node; none is read below the last
    assert q is not None
    return DraftTree(
        tokens=jnp.concatenate([root[:, None], drawn.swapaxes(1, 2).reshape(B, n * c)], axis=1),
        parent=every(-1, parent),
        depth=every(0, depth),
        order=every(0, chain),
        valid=jnp.ones((B, 1 + n * c), bool),
        q=q.reshape(B, n * c, -1),
        q_row=every(0, below),
    )
