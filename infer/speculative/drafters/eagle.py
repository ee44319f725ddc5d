"""EAGLE: one layer on the target's last hidden states drafts (2401.15077), in a fixed or a growing tree (2406.16858).

The drafter reads pairs (f_t, x_{t+1}): the target's state behind token t, and the token that came next. Pair t stands
at position t of the drafter's cache and says what x_{t+2} will be. In a tree, what it says of a node takes the place
of the state that the target has not computed yet. Only committed pairs stay in its cache; a tree's rows are written
behind them and forgotten, and after each step the pairs of the path are read again with the target's true states.

`make_feature_drafter` serves every drafter of this kind; `jakiro.py` is the other.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ....models import eagle
from ....models.cache import KVCache
from ....models.decoder import lm_head
from ....models.eagle import EagleConfig
from ....sharding.rules import SERVING
from ..draw import Draw, draft_logits, draft_noise
from ..grow import EAGLE_1, Read, StaticShape, grow_dynamic, grow_static
from ..loop import Context, Drafter, Verdict


class Network(NamedTuple):
    """What differs between drafters that read (feature, token) pairs."""

    name: str
    layers: int  # of the target, whose last hidden state is the feature
    vocab: int
    new_cache: Callable[[int, int], KVCache]  # (rows, capacity)
    forward: Callable[..., tuple[Any, KVCache]]
    # (params, target, features [B T D], tokens, positions, mask, cache) -> what it says at each pair, cache
    read: Callable[[Any, Any, Any, KVCache], Read]  # (params, target, what it says at some pairs, cache) -> Read


class State(NamedTuple):
    """The drafter's cache of committed pairs, and what it says at the last of them, [B, 1, ...]."""

    cache: KVCache
    last: Any


@functools.lru_cache
def make_drafter(
    cfg: EagleConfig,
    *,
    tree: Literal["dynamic", "static"] = "dynamic",
    draw: Draw = "mode",
    nodes: int = 60,
    beam: int = 10,
    levels: int = 6,
    shape: StaticShape = EAGLE_1,
) -> Drafter:
    """EAGLE-2's tree of the most probable `nodes - 1` guesses, or EAGLE-1's fixed one.

    Args:
      cfg: of the drafter.
      tree: `dynamic` takes `nodes`, `beam` and `levels`; `static` takes `shape`.
      draw: `mode` or `shared`; a static tree may also draw `without_replacement`, for the rule `rejection`.
      nodes: of a dynamic tree, the root included.
      beam: nodes read at each level.
      levels: below the root.
      shape: of a static tree.
    """
    L = cfg.target.num_layers

    def forward(params, target, features, tokens, positions, mask, cache):
        out = eagle.forward(cfg, params, target, features, tokens, positions, mask, cache, rules=SERVING)
        assert out.cache is not None
        return out.hidden, out.cache

    def read(params, target, hidden, cache) -> Read:
        by_row = lambda row, token: jnp.take_along_axis(hidden, row[..., None], axis=1)
        return Read(lm_head(cfg.target, target, hidden, rules=SERVING), by_row, cache)

    net = Network("eagle", L, cfg.target.vocab_size, functools.partial(eagle.new_cache, cfg), forward, read)
    if tree == "static":
        return static_drafter(net, draw, shape)
    return dynamic_drafter(net, draw, nodes, beam, levels)


def dynamic_drafter(net: Network, draw: Draw, nodes: int, beam: int, levels: int, ahead: bool = False) -> Drafter:
    """A drafter that grows the most probable tree; `ahead` if its network gives the last level unread."""
    beam = min(beam, net.vocab)
    most = beam + (levels - 1) * beam * beam
    if draw not in ("mode", "shared"):
        raise ValueError(
            f"{net.name}: draw={draw!r} in a dynamic tree; expected 'mode' or 'shared'. Drawn tokens that are dropped "
            "by their scores would bias the output; draw in a static tree."
        )
    if levels < 1 or not 2 <= nodes <= most + 1:
        raise ValueError(
            f"{net.name}: nodes={nodes}, beam={beam}, levels={levels}; expected 2 to {most + 1} nodes, 1 level or more."
        )
    rows = beam * max(levels - 1 - ahead, 0)

    def grow(params, target, state: State, context: Context):
        def score(logits, depth: int):
            z = draft_logits(logits, context.sampling, context.counts, draw)
            noise = draft_noise(context.sampling, context.filled + depth - 1, 1, net.vocab, draw)
            return jax.nn.log_softmax(z + noise, axis=-1)

        first = net.read(params, target, state.last, state.cache)
        tree, cache = grow_dynamic(
            context.root, first, _expander(net, params, target), score, beam=beam, levels=levels, nodes=nodes
        )
        return tree, cache

    name = f"{net.name}, dynamic tree {nodes} x {beam} x {levels}, {draw}"
    return _feature_drafter(net, name, grow, draw, nodes=nodes, depth=levels, most=beam, pruned=True, rows=rows)


def static_drafter(net: Network, draw: Draw, shape: StaticShape) -> Drafter:
    """A drafter that fills a fixed shape."""
    if draw == "independent":
        raise ValueError(f"{net.name}: draw='independent'; expected 'mode', 'shared' or 'without_replacement'.")
    with_q = draw == "without_replacement"

    def grow(params, target, state: State, context: Context):
        def by(logits, depth: int, first: int):
            z = draft_logits(logits, context.sampling, context.counts, draw)
            n = z.shape[1]
            return z + draft_noise(context.sampling, context.filled + depth - 1, n, net.vocab, draw, first), z

        first = net.read(params, target, state.last, state.cache)
        return grow_static(context.root, first, _expander(net, params, target), by, shape, with_q=with_q)

    nodes, depth = len(shape.paths) + 1, max(map(len, shape.paths))
    return _feature_drafter(
        net,
        f"{net.name}, static tree {nodes} x {depth}, {draw}",
        grow,
        draw,
        nodes=nodes,
        depth=depth,
        most=shape.most,
        pruned=False,
        rows=len(shape.inner) - 1,
    )


# ----------------------------------------------------------------------------------------------------------- private
def _feature_drafter(net: Network, name: str, grow, draw: Draw, *, nodes, depth, most, pruned, rows) -> Drafter:
    if most > net.vocab:
        raise ValueError(f"{net.name}: a node has {most} children, the vocabulary {net.vocab} tokens; expected fewer.")

    def init(target, params, context: Context, features, chunk: int) -> State:
        return _read_prompt(net, params, target, context, features[0], chunk, rows)

    def propose(target, params, state: State, context: Context):
        tree, cache = grow(params, target, state, context)
        return tree, state._replace(cache=cache._replace(length=state.cache.length)), context.cache

    def commit(target, params, state: State, context: Context, verdict: Verdict) -> State:
        """Read the pairs of the path: the target's states at its nodes, and the tokens that followed them."""
        begin = state.cache.length
        at = begin[:, None] + jnp.arange(depth + 1)[None]
        tokens = jnp.take_along_axis(context.tokens, at + 1, axis=1, mode="clip")
        features = jnp.take_along_axis(verdict.features[0], verdict.path[..., None], axis=1)
        out, cache = net.forward(params, target, features, tokens, at, None, state.cache)
        end = context.filled - 1
        last = jnp.clip(end - begin - 1, 0, depth)
        return State(cache._replace(length=end), _row(out, last))

    return Drafter(
        name=name,
        nodes=nodes,
        depth=depth,
        most=most,
        proposal="without_replacement" if draw == "without_replacement" else "chosen",
        chain=False,
        chains=False,
        pruned=pruned,
        start_layer=0,
        collect=(net.layers,),
        init=init,
        propose=propose,
        commit=commit,
    )


def _expander(net: Network, params, target):
    """Read a level of a tree: its rows stand behind the committed pairs, in the order they are read."""

    def expand(cache: KVCache, tokens, features, depth: int, seen) -> Read:
        B, k, n = seen.shape
        committed = cache.length - (n - k)  # the rows of the levels before were counted in
        slot = jnp.arange(cache.capacity)[None] - committed[:, None]  # [B, S]
        at = jnp.broadcast_to(jnp.clip(slot, 0, n - 1)[:, None], (B, k, cache.capacity))
        own = jnp.take_along_axis(seen, at, axis=2) & ((slot >= 0) & (slot < n))[:, None]
        mask = (slot < 0)[:, None] | own
        positions = jnp.broadcast_to((committed + depth - 1)[:, None], (B, k))
        out, cache = net.forward(params, target, features, tokens, positions, mask, cache)
        return net.read(params, target, out, cache._replace(length=cache.length + k))

    return expand


def _read_prompt(net: Network, params, target, context: Context, features: Array, chunk: int, rows: int) -> State:
    """All pairs of the prompt, the last with the first sampled token."""
    B, S, _ = features.shape
    pairs = context.filled - 1
    following = jnp.concatenate([context.tokens[:, 1:], context.tokens[:, :1]], axis=1)
    cut = lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1)
    last = jnp.maximum(pairs - 1, 0)

    def read(carry):
        i, cache, kept = carry
        start = i * chunk
        at = jnp.broadcast_to(start + jnp.arange(chunk)[None], (B, chunk))
        cache = cache._replace(length=jnp.full(B, start, jnp.int32))
        out, cache = net.forward(params, target, cut(features, start), cut(following, start), at, None, cache)
        here = last // chunk == i
        new = _row(out, jnp.clip(last - start, 0, chunk - 1))
        pick = lambda a, b: jnp.where(here.reshape(B, *(1,) * (a.ndim - 1)), a, b)
        return i + 1, cache, jax.tree.map(pick, new, kept)

    cache = net.new_cache(B, S + rows)
    shapes = jax.eval_shape(
        lambda: net.forward(params, target, cut(features, 0), cut(following, 0), cut(following, 0), None, cache)[0]
    )
    empty = jax.tree.map(lambda s: jnp.zeros((B, 1, *s.shape[2:]), s.dtype), shapes)
    chunks = (jnp.max(pairs) + chunk - 1) // chunk
    _, cache, kept = jax.lax.while_loop(lambda c: c[0] < chunks, read, (jnp.int32(0), cache, empty))
    return State(cache._replace(length=pairs), kept)


def _row(out: Any, index: Array) -> Any:
    """One row of every leaf, [B, 1, ...]."""
    return jax.tree.map(lambda x: jnp.take_along_axis(x, index.reshape(-1, *(1,) * (x.ndim - 1)), axis=1), out)
