"""Draft trees: guesses at the next tokens, several continuations at once, all judged by one forward pass.

Node 0 is the root, the last token that was emitted; it is certain, and not yet in the cache. Every other node guesses
the token behind its parent, and parents stand before children. A chain is a tree in which node i hangs on node i - 1.

Letters: B rows, C nodes (the root included), A = most children of a node, D levels below the root, R proposal
distributions, V vocabulary, S cache slots. Specification of trees: EAGLE-1 (2401.15077) and EAGLE-2 (2406.16858).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

# How the children of a node were drawn from its proposal q, which is what a rule must know to keep the law of the
# target: not drawn at all but chosen (so that each is proposed with probability 1), drawn one after another without
# replacement, or drawn independently.
Proposal = Literal["chosen", "without_replacement", "independent"]


class DraftTree(NamedTuple):
    """Guesses for every row; shapes are static, topology is data."""

    tokens: Int[Array, "B C"]
    parent: Int[Array, "B C"]  # -1 for the root, else below the node's own index
    depth: Int[Array, "B C"]  # 0 for the root
    order: Int[Array, "B C"]  # among the children of one parent: in which order they were drawn, from 0
    valid: Bool[Array, "B C"]  # the root always; children of invalid nodes are invalid
    q: Float[Array, "B R V"] | None = None  # probabilities that children were drawn from; None if all were chosen
    q_row: Int[Array, "B C"] | None = None  # which of them a node's children were drawn from
    hidden: Float[Array, "B C D"] | None = None  # of nodes whose first layers the drafter has run already


def make_chain(
    root: Int[Array, " B"],
    drafts: Int[Array, "B n"],
    valid: Bool[Array, "B n"],
    *,
    q: Float[Array, "B n V"] | None = None,
    hidden: Float[Array, "B C D"] | None = None,
) -> DraftTree:
    """A chain of n guesses behind the root; `q[:, i]` is what draft i was drawn from. What follows an invalid
    guess is invalid."""
    B, n = drafts.shape
    every = lambda values: jnp.broadcast_to(values.astype(jnp.int32)[None], (B, n + 1))
    node = jnp.arange(n + 1)
    return DraftTree(
        tokens=jnp.concatenate([root[:, None], drafts], axis=1),
        parent=every(node - 1),
        depth=every(node),
        order=every(jnp.zeros(n + 1)),
        valid=jnp.concatenate([jnp.ones((B, 1), bool), jnp.cumprod(valid, axis=1).astype(bool)], axis=1),
        q=q,
        q_row=None if q is None else every(jnp.minimum(node, n - 1)),
        hidden=hidden,
    )


def ancestors(parent: Int[Array, "B C"], levels: int) -> Bool[Array, "B C C"]:
    """Entry [b, i, j]: node j is node i or one of those above it. `levels` is the most a node can be below the root.

    Squaring the step to the parent doubles how far up it looks.
    """
    C = parent.shape[1]
    reach = jnp.eye(C, dtype=bool)[None] | (parent[..., None] == jnp.arange(C)[None, None])
    for _ in range(max(levels - 1, 0).bit_length()):
        reach = jnp.einsum("bij,bjk->bik", reach.astype(jnp.float32), reach.astype(jnp.float32)) > 0
    return reach


def tree_mask(tree: DraftTree, length: Int[Array, " B"], capacity: int, levels: int) -> Bool[Array, "B C S"]:
    """What each node may see when the tree's rows are written at `length ..`: what is committed, and its own path."""
    B, C = tree.tokens.shape
    slot = jnp.arange(capacity)[None] - length[:, None]  # [B, S], the node that a slot holds
    path = ancestors(tree.parent, levels) & tree.valid[:, None, :]
    at = jnp.broadcast_to(jnp.clip(slot, 0, C - 1)[:, None, :], (B, C, capacity))
    on_path = jnp.take_along_axis(path, at, axis=2) & ((slot >= 0) & (slot < C))[:, None, :]
    return (slot < 0)[:, None, :] | on_path


def slot_positions(tree: DraftTree, length: Int[Array, " B"], capacity: int) -> Int[Array, "B S"]:
    """The absolute position of every slot's key, once the tree's rows are written at `length ..`."""
    C = tree.tokens.shape[1]
    slot = jnp.arange(capacity)[None]
    node = jnp.clip(slot - length[:, None], 0, C - 1)
    return jnp.where(slot < length[:, None], slot, length[:, None] + jnp.take_along_axis(tree.depth, node, axis=1))


def children(tree: DraftTree, alike: Bool[Array, "B C"]) -> Bool[Array, "B C"]:
    """Which nodes hang on a node of a set."""
    under = jnp.take_along_axis(alike, jnp.maximum(tree.parent, 0), axis=1)
    return under & (tree.parent >= 0) & tree.valid


def child_index(tree: DraftTree, alike: Bool[Array, "B C"], most: int) -> Int[Array, "B A"]:
    """The children of a set of nodes at the place where they were drawn, -1 elsewhere; `most` is A."""
    B, C = tree.tokens.shape
    place = jnp.where(children(tree, alike), tree.order, most)
    node = jnp.broadcast_to(jnp.arange(C, dtype=jnp.int32)[None], (B, C))
    return jnp.full((B, most), -1, jnp.int32).at[jnp.arange(B)[:, None], place].set(node, mode="drop")


def take_row(x: Shaped[Array, "B n ..."], index: Int[Array, " B"]) -> Shaped[Array, "B ..."]:
    """`x[b, index[b]]` for every row."""
    return jax.vmap(lambda row, i: jax.lax.dynamic_index_in_dim(row, i, 0, keepdims=False))(x, index)
