"""How trees grow, level by level, from a drafter that reads several nodes at once.

`grow_dynamic`  EAGLE-2 (2406.16858): every level keeps the `beam` nodes of the highest joint probability and reads
                them; of all nodes seen, those of the highest joint probability become the tree.
`grow_static`   EAGLE-1 (2401.15077): the tree's shape is given; a node's children are its likeliest tokens, or draws.

A drafter reads nodes by `expand`, whose rows stand behind its committed ones in the order they are read; `seen` says
which of these draft rows each node may see: its ancestors and itself.

Letters: B rows, K beam, D levels, C nodes, V vocabulary, n draft rows read so far.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .tree import DraftTree


class Read(NamedTuple):
    """What a drafter says behind nodes it has read."""

    logits: Float[Array, "B K V"]  # of the token behind each node
    feature_of: Callable[[Int[Array, "B m"], Int[Array, "B m"]], Float[Array, "B m D"]]
    # (number of the node, token) -> what that child of it is read with
    carry: Any  # the drafter's caches
    ahead: Float[Array, "B K V"] | None = None  # of the token after that one, by drafters that look two ahead


Expand = Callable[[Any, Int[Array, "B K"], Float[Array, "B K D"], int, Bool[Array, "B K n"]], Read]
# (carry, tokens, features of their parents, depth from 1, seen) -> Read
Score = Callable[[Float[Array, "B K V"], int], Float[Array, "B K V"]]
# logits of tokens at a depth -> log-probabilities to choose by


def grow_dynamic(
    root: Int[Array, " B"],
    read: Read,
    expand: Expand,
    score: Score,
    *,
    beam: int,
    levels: int,
    nodes: int,
) -> tuple[DraftTree, Any]:
    """Build a tree of the `nodes - 1` guesses of the highest joint probability.

    A drafter that looks ahead gives the last level without reading the one before: its guesses hang under every child
    of the node that made them (Jakiro, spec 3.2).

    Args:
      root: the last token of every row.
      read: what the drafter says behind it, one node a row.
      expand: reads more.
      score: from logits to log-probabilities; at most 0.
      beam: nodes read at a level.
      levels: of the tree below the root.
      nodes: of the tree, the root included.

    Returns:
      The tree, and the drafter's carry.
    """
    B, K = root.shape[0], beam
    batch = jnp.arange(B)[:, None]
    best, tokens = _top(score(read.logits, 1), K)  # [B, 1, K]
    best, tokens = best[:, 0], tokens[:, 0]
    pool = [(best, tokens, jnp.full((B, K), -1), jnp.ones((B, K), jnp.int32))]  # score, token, parent's id, depth
    feature = read.feature_of(jnp.zeros((B, K), jnp.int32), tokens)
    pool_id = jnp.broadcast_to(jnp.arange(K)[None], (B, K))
    above = jnp.zeros((B, K, 0), bool)  # ancestors among the draft rows
    parent_row = jnp.zeros((B, K), jnp.int32)  # of each beam node, in the nodes read before
    self_row = jnp.broadcast_to(jnp.eye(K, dtype=bool)[None], (B, K, K))
    first = K  # the pool id of the level's first node
    for depth in range(2, levels + 1):
        if read.ahead is not None and depth == levels:
            logits = jnp.take_along_axis(read.ahead, parent_row[..., None], axis=1)
            seen = above
        else:
            seen = jnp.concatenate([above, self_row], axis=2)
            read = expand(read.carry, tokens, feature, depth - 1, seen)
            logits = read.logits
        c, children = _top(score(logits, depth), K)  # [B, K, K]
        joint = (c + best[..., None]).reshape(B, K * K)
        parents = jnp.broadcast_to(pool_id[..., None], (B, K, K)).reshape(B, K * K)
        flat = children.reshape(B, K * K)
        pool.append((joint, flat, parents, jnp.full((B, K * K), depth)))
        best, chosen = jax.lax.top_k(joint, K)
        parent_row = chosen // K
        tokens = flat[batch, chosen]
        feature = read.feature_of(parent_row, tokens)
        above = seen[batch, parent_row]
        pool_id = first + chosen
        first += K * K
    scores, tokens, parents, depths = (jnp.concatenate(column, axis=1) for column in zip(*pool, strict=True))
    return _keep_best(root, scores, tokens, parents, depths, nodes, K), read.carry


class StaticShape(NamedTuple):
    """A tree's shape: every node by the ranks on its path, sorted by length and then by rank; the root is not named."""

    paths: tuple[tuple[int, ...], ...]

    @property
    def inner(self) -> tuple[tuple[int, ...], ...]:
        """The nodes that have children, the root first."""
        return ((), *(p for p in self.paths if any(q[:-1] == p for q in self.paths)))

    @property
    def most(self) -> int:
        """Children a node has at most: ranks begin at 0 and leave none out."""
        return 1 + max(p[-1] for p in self.paths)


def static_shape(text: str) -> StaticShape:
    """Read a shape such as `"0 1 00 01 10"`: one digit a level.

    Raises:
      ValueError: if a path's parent or elder sibling is missing, or a path is named twice.
    """
    paths = sorted((tuple(map(int, word)) for word in text.split()), key=lambda p: (len(p), p))
    have = set(paths) | {()}
    if not paths or len(set(paths)) != len(paths):
        raise ValueError(f"static_shape: found {text!r}; expected at least one path, each once.")
    for p in paths:
        elder = (*p[:-1], p[-1] - 1)
        if p[:-1] not in have or (p[-1] > 0 and elder not in have):
            raise ValueError(f"static_shape: found {''.join(map(str, p))}; expected its parent and elder siblings too.")
    return StaticShape(tuple(paths))


# 25 nodes in 5 levels (EAGLE-1; its code calls the tree by another number)
EAGLE_1 = static_shape("0 1 2 3 00 01 02 10 11 20 21 30 000 001 002 010 011 020 021 100 0000 0001 0002 00000 00001")


def grow_static(
    root: Int[Array, " B"],
    read: Read,
    expand: Expand,
    draw: Callable[[Float[Array, "B n V"], int, int], tuple[Float[Array, "B n V"], Float[Array, "B n V"]]],
    shape: StaticShape,
    *,
    with_q: bool,
) -> tuple[DraftTree, Any]:
    """Fill a given shape: the child of rank r is the r-th best of its parent.

    Args:
      root: the last token of every row.
      read: what the drafter says behind it, one node a row.
      expand: reads more.
      draw: logits, depth of the children, number of the first node -> what ranks are by, and the proposal's logits.
      shape: of the tree.
      with_q: record what children were drawn from, and mark those of no probability as invalid.
    """
    B = root.shape[0]
    paths, inner = shape.paths, shape.inner
    row_of = {p: i for i, p in enumerate(inner)}  # of q, and among the draft rows but for the root
    tokens: dict[tuple[int, ...], jax.Array] = {(): root}
    alive: dict[tuple[int, ...], jax.Array] = {(): jnp.ones(B, bool)}
    feature: Any = None
    q = []
    level: list[tuple[int, ...]] = [()]
    while level:
        depth = len(level[0])
        if depth:
            seen = np.array([[p[: len(o)] == o for o in inner[1:] if len(o) <= depth] for p in level])
            read = expand(
                read.carry,
                jnp.stack([tokens[p] for p in level], axis=1),
                feature,
                depth,
                jnp.broadcast_to(jnp.asarray(seen)[None], (B, *seen.shape)),
            )
        rank_by, proposal = draw(read.logits, depth + 1, row_of[level[0]])
        _, ranked = jax.lax.top_k(rank_by, shape.most)  # [B, n, most]
        prob = jax.nn.softmax(proposal, axis=-1)
        q.append(prob)
        for i, p in enumerate(level):
            for child in (c for c in paths if c[:-1] == p):
                tokens[child] = ranked[:, i, child[-1]].astype(jnp.int32)
                possible = jnp.take_along_axis(prob[:, i], tokens[child][:, None], axis=1)[:, 0] > 0
                alive[child] = alive[p] & (possible if with_q else jnp.ones(B, bool))
        below = [p for p in inner if len(p) == depth + 1]
        if below:
            rows = jnp.asarray([level.index(p[:-1]) for p in below], jnp.int32)
            feature = read.feature_of(
                jnp.broadcast_to(rows[None], (B, len(below))), jnp.stack([tokens[p] for p in below], axis=1)
            )
        level = below
    every = lambda values: jnp.broadcast_to(jnp.asarray(values, jnp.int32)[None], (B, len(paths) + 1))
    node_of = {p: i for i, p in enumerate(((), *paths))}
    tree = DraftTree(
        tokens=jnp.stack([tokens[p] for p in node_of], axis=1),
        parent=every([-1, *(node_of[p[:-1]] for p in paths)]),
        depth=every([0, *map(len, paths)]),
        order=every([0, *(p[-1] for p in paths)]),
        valid=jnp.stack([alive[p] for p in node_of], axis=1),
        q=jnp.concatenate(q, axis=1) if with_q else None,
        q_row=every([row_of.get(p, 0) for p in node_of]) if with_q else None,
    )
    return tree, read.carry


# ----------------------------------------------------------------------------------------------------------- private
def _top(logp: Float[Array, "B n V"], k: int) -> tuple[Float[Array, "B n K"], Int[Array, "B n K"]]:
    best, tokens = jax.lax.top_k(logp, k)
    return jnp.minimum(best, 0.0), tokens.astype(jnp.int32)  # above 0 by rounding, a child would outrank its parent


def _keep_best(root, scores, tokens, parents, depths, nodes: int, beam: int) -> DraftTree:
    """The best of the pool, parents before children.

    A parent scores at least as its children do and stands before them in the pool, and `top_k` gives ties to the lower
    index, so whoever is kept has its parent kept.
    """
    B, P = scores.shape
    _, kept = jax.lax.top_k(scores, nodes - 1)
    kept = jnp.sort(kept, axis=1)
    batch = jnp.arange(B)[:, None]
    node_of = jnp.zeros((B, P), jnp.int32).at[batch, kept].set(jnp.arange(1, nodes, dtype=jnp.int32)[None])
    parent = parents[batch, kept]
    head = lambda value, rest: jnp.concatenate([value, rest.astype(jnp.int32)], axis=1)
    full = lambda value: jnp.full((B, 1), value, jnp.int32)
    return DraftTree(
        tokens=head(root[:, None], tokens[batch, kept]),
        parent=head(full(-1), jnp.where(parent < 0, 0, node_of[batch, parent])),
        depth=head(full(0), depths[batch, kept]),
        order=head(full(0), kept % beam),  # its rank among the children of its parent
        valid=jnp.concatenate([jnp.ones((B, 1), bool), jnp.isfinite(scores[batch, kept])], axis=1),
    )
