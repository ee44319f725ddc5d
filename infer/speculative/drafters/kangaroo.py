"""Kangaroo: the target's own first layers draft, through a small adapter (2404.18911; network in `models/kangaroo.py`).

    root --layers 0..l-1--> exit state --adapter, head--> draft 1 --layers 0..l-1--> exit state --> draft 2 ...

A chain exits early twice: every draft leaves the target at layer l, and drafting itself ends when the stop rule says
so. The first layers write their rows straight into the target's cache, at the positions where the tokens stand, and
hand their states over: the target verifies from layer l on, so nothing of it is computed twice. Rows of refused drafts
lie behind the text's end and are overwritten.

The adapter's own cache lags behind by a row when all drafts were accepted, for nothing was drafted from the last one.
So it is always fed the two newest exit states: the one before the newest is either missing or there already, and then
written again as it was. Hence the state: the adapter's cache, and the exit state of the last token before the root.

A tree grows by joint probability as EAGLE-2's does, with first layers and adapter as its drafter; the stop rule is
asked once a level, about its best node. Nodes that were not read, such as its leaves, have no exit state, so the target
verifies a tree from layer 0. (The paper's own rule for trees was not published with its code.)

Drafts are drawn as `../draw.py` says. The stop rule sees the probability of the likeliest token under what the draft
is drawn from: under `mode` the softmax of the logits, as in the paper, else after temperature, cuts and penalties.

Parameters are `{"adapter": ..., "stop": ...}`. Letters: B rows, n drafts at most, C = n + 1 nodes of a chain, K beam, D
width, S cache slots, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ....models import kangaroo
from ....models.cache import KVCache
from ....models.decoder import forward, lm_head
from ....models.kangaroo import KangarooConfig
from ....sharding.rules import SERVING
from ..draw import Draw, draft_logits, draft_noise
from ..grow import Read, grow_dynamic
from ..loop import Context, Drafter, Verdict
from ..stop import StopRule, fixed
from ..tree import make_chain, take_row


class State(NamedTuple):
    """How many of the adapter's rows are right follows from the text: all before the last token but one."""

    cache: KVCache  # the adapter's
    exit: Float[Array, "B D"]  # of the last token before the root


@functools.lru_cache
def make_drafter(cfg: KangarooConfig, drafts: int = 6, draw: Draw = "mode", stop: StopRule = fixed()) -> Drafter:
    """Draft a chain of up to `drafts` tokens, as many as the stop rule lets each row have."""
    if drafts < 1:
        raise ValueError(f"kangaroo: drafts={drafts}; expected at least 1.")
    if draw not in ("mode", "shared", "independent"):
        raise ValueError(f"kangaroo: draw={draw!r}; expected 'mode', 'shared' or 'independent'.")

    def propose(target, params, state: State, context: Context):
        return _draft(cfg, target, params, state, context, drafts, draw, stop)

    def commit(target, params, state: State, context: Context, verdict: Verdict) -> State:
        return state._replace(exit=take_row(verdict.features[0], verdict.accepted))

    return Drafter(
        name=f"kangaroo, {drafts}, {draw}, {stop.name}",
        nodes=drafts + 1,
        depth=drafts,
        most=1,
        proposal="independent" if draw == "independent" else "chosen",
        chain=True,
        chains=True,
        pruned=False,
        start_layer=cfg.exit_layer,
        collect=(cfg.exit_layer,),
        init=functools.partial(_read_prompt, cfg),
        propose=propose,
        commit=commit,
    )


@functools.lru_cache
def make_tree_drafter(
    cfg: KangarooConfig,
    *,
    nodes: int = 60,
    beam: int = 10,
    levels: int = 6,
    draw: Draw = "mode",
    stop: StopRule = fixed(),
) -> Drafter:
    """Draft the `nodes - 1` guesses of the highest joint probability; the stop rule says how deep to look.

    A level whose best node has no more than `eta` of joint probability is the last under `confidence`. While it grows,
    a tree has `1 + beam * (levels - 1)` rows in the target's cache; where that is more than `nodes`, the last slots
    of a full cache do not hold them all, and drafts there are worse.

    Args:
      cfg: of the adapter.
      nodes: of the tree, the root included.
      beam: nodes read at each level.
      levels: below the root, at most.
      draw: `mode` or `shared`.
      stop: asked once a level: its number, the joint probability of its best node, and the state it was drawn from.
    """
    beam = min(beam, cfg.target.vocab_size)
    most = beam + (levels - 1) * beam * beam
    if draw not in ("mode", "shared"):
        raise ValueError(
            f"kangaroo: draw={draw!r} in a dynamic tree; expected 'mode' or 'shared'. Drawn tokens that are dropped by "
            "their scores would bias the output; draw a chain."
        )
    if beam < 1 or levels < 1 or not 2 <= nodes <= most + 1:
        raise ValueError(
            f"kangaroo: nodes={nodes}, beam={beam}, levels={levels}; expected 1 node a level or more, 1 level or more, "
            f"and 2 to {most + 1} nodes."
        )

    def propose(target, params, state: KVCache, context: Context):
        first, expand = _tree_reader(cfg, target, params, state, context, beam, draw, stop)
        logp = lambda log_probabilities, depth: log_probabilities  # as they were read
        tree, grown = grow_dynamic(context.root, first, expand, logp, beam=beam, levels=levels, nodes=nodes)
        return tree, grown.adapter, grown.cache

    def commit(target, params, state: KVCache, context: Context, verdict: Verdict) -> KVCache:
        """Read the path again, where it belongs: the tree's rows stood elsewhere."""
        exits = jnp.take_along_axis(verdict.features[0], verdict.path[..., None], axis=1)
        positions = state.length[:, None] + jnp.arange(levels + 1)[None]
        cache = kangaroo.forward(cfg, params["adapter"], exits, positions, cache=state, rules=SERVING).cache
        assert cache is not None
        return cache._replace(length=context.cache.length)

    return Drafter(
        name=f"kangaroo, dynamic tree {nodes} x {beam} x {levels}, {draw}, {stop.name}",
        nodes=nodes,
        depth=levels,
        most=beam,
        proposal="chosen",
        chain=False,
        chains=False,
        pruned=True,
        start_layer=0,
        collect=(cfg.exit_layer,),
        init=lambda *args: _read_prompt(cfg, *args).cache,
        propose=propose,
        commit=commit,
    )


# ----------------------------------------------------------------------------------------------------------- private
class _Draft(NamedTuple):
    """The carry of drafting, behind i drafts."""

    i: Int[Array, ""]
    cache: KVCache  # the target's; its first layers have rows for the root and i drafts
    adapter: KVCache
    exits: Float[Array, "B C D"]
    tokens: Int[Array, "B n"]
    q: Float[Array, "B n V"] | None
    kept: Int[Array, " B"]  # drafts that each row will have verified
    going: Bool[Array, " B"]  # rows that draft on
    stop: Any  # the rule's carry


def _read_prompt(cfg: KangarooConfig, target, params, context: Context, features, chunk: int) -> State:
    """Fill the adapter's cache with the prompt, `chunk` positions at a time."""
    del target
    (exits,), length = features, context.cache.length
    B, S, _ = exits.shape

    def read(carry: tuple[jax.Array, KVCache]):
        i, cache = carry
        start = i * chunk
        part = jax.lax.dynamic_slice_in_dim(exits, start, chunk, axis=1)
        positions = jnp.broadcast_to(start + jnp.arange(chunk)[None], (B, chunk))
        committed = cache._replace(length=jnp.full(B, start, jnp.int32))
        cache = kangaroo.forward(cfg, params["adapter"], part, positions, cache=committed, rules=SERVING).cache
        assert cache is not None
        return i + 1, cache

    chunks = (jnp.max(length) + chunk - 1) // chunk
    start = (jnp.int32(0), kangaroo.new_cache(cfg, B, S))
    _, cache = jax.lax.while_loop(lambda c: c[0] < chunks, read, start)
    return State(cache._replace(length=length), take_row(exits, jnp.maximum(length - 1, 0)))


def _draft(cfg: KangarooConfig, target, params, state: State, context: Context, drafts: int, draw: Draw, rule):
    """Token after token, until every running row has stopped.

    A row that has stopped goes on drafting while others do, to no effect: what follows its last draft is not valid,
    and nothing before it can see it.
    """
    vocab, length = cfg.target.vocab_size, context.cache.length
    B = length.shape[0]

    def early_layers(token: Int[Array, " B"], i, cache: KVCache):
        at = length + i
        here = cache._replace(length=at)
        run = functools.partial(forward, stop_layer=cfg.exit_layer, rules=SERVING)
        out = run(cfg.target, target, token[:, None], at[:, None], cache=here)
        assert out.cache is not None
        return out.hidden, out.cache._replace(length=length)

    def one(c: _Draft) -> _Draft:
        exit_of = lambda i: jax.lax.dynamic_index_in_dim(c.exits, i, axis=1, keepdims=False)
        before = jnp.where(c.i > 0, exit_of(jnp.maximum(c.i - 1, 0)), state.exit)
        pair = jnp.stack([before, exit_of(c.i)], axis=1)
        start = length + c.i - 1
        positions = start[:, None] + jnp.arange(2)[None]
        behind = c.adapter._replace(length=start)
        y, adapter = kangaroo.forward(cfg, params["adapter"], pair, positions, cache=behind, rules=SERVING)
        assert adapter is not None
        y = y[:, 1:]
        z = draft_logits(lm_head(cfg.target, target, y, rules=SERVING), context.sampling, context.counts, draw)
        noise = draft_noise(context.sampling, context.filled + c.i, 1, vocab, draw)
        token = jnp.argmax((z + noise)[:, 0], axis=-1).astype(jnp.int32)
        q = jax.nn.softmax(z[:, 0], axis=-1)
        ruled, stops = rule.update(params["stop"], c.stop, c.i + 1, jnp.max(q, axis=-1), y[:, 0])
        hidden, cache = early_layers(token, c.i + 1, c.cache)
        return _Draft(
            i=c.i + 1,
            cache=cache,
            adapter=adapter._replace(length=length),
            exits=c.exits.at[:, c.i + 1].set(hidden[:, 0]),
            tokens=c.tokens.at[:, c.i].set(token),
            q=None if c.q is None else c.q.at[:, c.i].set(q),
            kept=c.kept + c.going.astype(jnp.int32),
            going=c.going & ~stops,
            stop=ruled,
        )

    hidden, cache = early_layers(context.root, 0, context.cache)
    first = _Draft(
        i=jnp.int32(0),
        cache=cache,
        adapter=state.cache._replace(length=length),
        exits=jnp.zeros((B, drafts + 1, hidden.shape[-1]), hidden.dtype).at[:, 0].set(hidden[:, 0]),
        tokens=jnp.zeros((B, drafts), jnp.int32),
        q=jnp.zeros((B, drafts, vocab)) if draw == "independent" else None,
        kept=jnp.zeros(B, jnp.int32),
        going=context.running,
        stop=rule.init(B),
    )
    last = jax.lax.while_loop(lambda c: (c.i < drafts) & jnp.any(c.going), one, first)
    valid = jnp.arange(drafts)[None] < last.kept[:, None]
    tree = make_chain(context.root, last.tokens, valid, q=last.q, hidden=last.exits)
    return tree, State(last.adapter, state.exit), last.cache


class _Growth(NamedTuple):
    """The carry of a growing tree."""

    cache: KVCache  # the target's; its first layers have rows for the root and all nodes read
    adapter: KVCache
    going: Bool[Array, " B"]  # rows whose trees still deepen
    stop: Any  # the rule's carry


def _tree_reader(cfg: KangarooConfig, target, params, adapter: KVCache, context: Context, beam: int, draw: Draw, rule):
    """What the drafter says behind the root, and how it reads more; nodes stand behind the root as they are read."""
    length, vocab = context.cache.length, cfg.target.vocab_size
    slot = jnp.arange(context.cache.capacity)[None] - length[:, None] - 1  # [B, S], which node a slot holds, from 0
    where = jnp.where(slot < 0, slot, slot // beam) + length[:, None] + 1  # [B, S], the position of its key

    def run(cache: KVCache, adapter: KVCache, tokens: Int[Array, "B K"], depth: int, rows: int, mask):
        """States and log-probabilities behind nodes of one depth, whose rows stand behind `rows` others."""
        at = length + rows
        positions = jnp.broadcast_to((length + depth)[:, None], tokens.shape)
        out = forward(
            cfg.target,
            target,
            tokens,
            positions,
            mask,
            cache._replace(length=at),
            stop_layer=cfg.exit_layer,
            key_positions=where,
            rules=SERVING,
        )
        kept = adapter._replace(length=at)
        read = kangaroo.forward(cfg, params["adapter"], out.hidden, positions, mask, kept, rules=SERVING)
        assert out.cache is not None
        assert read.cache is not None
        z = lm_head(cfg.target, target, read.hidden, rules=SERVING)
        z = draft_logits(z, context.sampling, context.counts, draw)
        z = z + draft_noise(context.sampling, context.filled + depth, 1, vocab, draw)
        logp = jax.nn.log_softmax(z, axis=-1)
        return out.cache._replace(length=length), read.cache._replace(length=length), read.hidden, logp

    def said(
        growth: _Growth, joint: Float[Array, "B K"], y: Float[Array, "B K D"], logp: Float[Array, "B K V"]
    ) -> Read:
        """Children carry what the stop rule asks for: their joint probability, and the state they were drawn from."""

        def feature_of(row: Int[Array, "B m"], token: Int[Array, "B m"]) -> Float[Array, "B m D1"]:
            batch = jnp.arange(row.shape[0])[:, None]
            child = joint[batch, row] + logp[batch, row, token]
            return jnp.concatenate([child[..., None], y[batch, row].astype(jnp.float32)], axis=-1)

        return Read(logp, feature_of, growth)

    def expand(growth: _Growth, tokens: Int[Array, "B K"], features, depth: int, seen: Bool[Array, "B K n"]) -> Read:
        B, K, n = seen.shape
        joint, came_from = features[..., 0], features[..., 1:]
        best = jnp.argmax(joint, axis=1)
        ruled, stops = rule.update(
            params["stop"], growth.stop, jnp.int32(depth), jnp.exp(take_row(joint, best)), take_row(came_from, best)
        )
        going = growth.going & ~stops
        at = jnp.broadcast_to(jnp.clip(slot, 0, n - 1)[:, None], (B, K, slot.shape[1]))
        own = jnp.take_along_axis(seen, at, axis=2) & ((slot >= 0) & (slot < n))[:, None]
        mask = (slot < 0)[:, None] | own

        def stay():
            y = jnp.zeros((B, K, came_from.shape[-1]), cfg.target.dtype)
            return growth.cache, growth.adapter, y, jnp.zeros((B, K, vocab))

        cache, adapter, y, logp = jax.lax.cond(
            jnp.any(going),
            lambda: run(growth.cache, growth.adapter, tokens, depth, 1 + n - K, mask),
            stay,
        )
        logp = jnp.where(going[:, None, None], logp, -jnp.inf)  # no child of a row that has stopped is valid
        return said(_Growth(cache, adapter, going, ruled), joint, y, logp)

    B = length.shape[0]
    cache, adapter, y, logp = run(context.cache, adapter._replace(length=length), context.root[:, None], 0, 0, None)
    growth = _Growth(cache, adapter, context.running, rule.init(B))
    return said(growth, jnp.zeros((B, 1)), y, logp), expand
