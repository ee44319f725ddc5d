"""ADED: a table of tri-grams drafts, and a search like MCTS chooses which of its guesses become the tree (2407.12021).

No network. A table says how often a token came behind a pair of tokens; there are two of them. The corpus table is
built once, shared by all rows and read only: it is the drafter's parameters. Each row has a small one of its own text
besides, in its state, for what a row drafts must not depend on its neighbours. It learns every tri-gram that is
committed: +1 each, in the order of the text.

The tree is grown by simulations. Each walks down from the root, at every node to the child with the highest

    Q(u) + c P(u) sqrt(sum of N over u and its siblings) / (1 + N(u))                            (PUCT)

and adds the first one that is not there yet. P(u) is the share of token u among the counts behind its pair, corpus and
own text together; N(u) counts the simulations that came through u; Q(u), 0 before the first of them, is what these
have added to the expected number of accepted drafts, on average. A node at depth d adds the chance that the walk of
the target gets there and takes it,

    worth(u) = rate_1 P(u_1) .. rate_d P(u_d)                                   along its path u_1 .. u_d = u

where rate_d is how often some draft at depth d was right when its parent was: a running average of this row's last
steps. A simulation that ends where nothing is known to follow, or at the depth limit, adds nothing and counts. Of the
nodes seen, the most visited become the tree. No simulation comes to a node but through its parent, which was there
first: parents are kept before children.

Known of ADED, whose code is not published: a tri-gram table of a corpus, cut to the 12 most frequent successors of a
pair, adapted online; a tree found by an MCTS-like search with PUCT; tree attention. Unverified and ours: all constants
and sizes, hashing, what evicts what, that adaptation goes to a table of each row, and what Q is. Left out: learning
from the target's likeliest tokens at judged nodes. A drafter gets hidden states, not logits; the head would have to be
read a second time in each step, and a row that was decoded plainly would have to be read again by the whole target to
catch up, where this table only sorts its tokens.

Everything is a function of the text, its drafts included, so the drafts are chosen and no rule is biased by them.
History changes the speed and never the output under `coupled`.

Letters: B rows, U buckets, A successors of a pair, n tri-grams, P nodes of the search, C of the tree, D levels.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..loop import Context, Drafter, Verdict
from ..tree import DraftTree

TOKEN_BITS = 21  # three tokens in one signed 64-bit integer
COUNT_AT_ONCE = 2**22  # tri-grams: a corpus need not fit into memory, only its different ones
NOBODY = -1  # the key of an empty bucket; no token is negative
Tokens = Int[Array | np.ndarray, "..."]


class Table(NamedTuple):
    """Successors of pairs of tokens; one pair a bucket. Those with a count of 0 are not there."""

    key: Int[Array, "*B U 2"]
    tokens: Int[Array, "*B U A"]
    counts: Int[Array, "*B U A"]


class State(NamedTuple):
    """What a row has learnt, and of the last tree what is needed to learn from its verdict."""

    table: Table  # [B, ...]
    read: Int[Array, " B"]  # tokens of the text that are in it
    rate: Float[Array, "B D"]  # how often drafts at depths 1 .. D were right, where their parents were
    inner: Bool[Array, "B C"]  # nodes of the last tree that had children


class Pool(NamedTuple):
    """The nodes of one row's search in the order they were added, the root first; visits of 0: not there."""

    token: Int[Array, " P"]
    parent: Int[Array, " P"]
    depth: Int[Array, " P"]
    order: Int[Array, " P"]  # among the successors of its parent's pair
    visits: Int[Array, " P"]  # N
    worth: Float[Array, " P"]
    total: Float[Array, " P"]  # of the worth that the visits added: Q N
    next_token: Int[Array, "P A"]  # what may follow, the likeliest first
    prior: Float[Array, "P A"]  # P, 0 where nothing may
    child: Int[Array, "P A"]  # the node, 0 if not there yet


# ------------------------------------------------------------------------------------------------------------ drafter
@functools.lru_cache
def make_drafter(
    *,
    nodes: int = 64,
    depth: int = 6,
    most: int = 12,
    simulations: int = 64,
    explore: float = 1.25,
    buckets: int = 2**12,
    successors: int = 4,
    pace: float = 0.1,
) -> Drafter:
    """Draft from a corpus table and the row's own text; the drafter's parameters are a `Table` by `build_table`.

    Args:
      nodes: of the tree, the root included.
      depth: levels below the root.
      most: children a node has at most.
      simulations: each adds at most one node.
      explore: the constant c of PUCT.
      buckets: of the table of a row's own text, a power of 2.
      successors: of a pair in that table.
      pace: of the running averages: what one step weighs in them.
    """
    if nodes < 2 or depth < 1 or most < 1 or successors < 1:
        raise ValueError(
            f"aded: nodes={nodes}, depth={depth}, most={most}, successors={successors}; expected 2 nodes or more and "
            "at least 1 of the others."
        )
    if simulations < nodes - 1:
        raise ValueError(
            f"aded: {simulations} simulations for {nodes} nodes; expected at least {nodes - 1}. Each adds one node."
        )
    if not 0 <= pace <= 1:
        raise ValueError(f"aded: pace={pace}; expected 0 to 1, what one step weighs in a running average.")
    _check_buckets("aded", buckets)

    def init(target, params, context: Context, features, chunk: int) -> State:
        B, S = context.tokens.shape
        start = jnp.zeros(B, jnp.int32)
        table = _learn_text(new_table(B, buckets, successors), context, start, S)
        return State(table, context.filled, jnp.full((B, depth), 0.5, jnp.float32), jnp.zeros((B, nodes), bool))

    def propose(target, params: Table, state: State, context: Context):
        grow = functools.partial(search, depth=depth, most=most, simulations=simulations, explore=explore)
        before = jnp.take_along_axis(context.tokens, context.filled[:, None] - 2, axis=1, mode="clip")[:, 0]
        before = jnp.where(context.filled > 1, before, NOBODY)
        found = jax.vmap(grow, in_axes=(None, 0, 0, 0, 0))(params, state.table, before, context.root, state.rate)
        tree = most_visited(found, nodes)
        kids = (tree.parent[:, None] == jnp.arange(nodes)[None, :, None]) & tree.valid[:, None]
        inner = state.inner.at[:, :nodes].set(jnp.any(kids, axis=2))  # a larger drafter may have made the state
        return tree, state._replace(inner=inner), context.cache

    def commit(target, params, state: State, context: Context, verdict: Verdict) -> State:
        table = _learn_text(state.table, context, state.read, depth + 1)
        rate = _learn_rate(state, verdict, pace)
        rate = jnp.where((context.filled > state.read)[:, None], rate, state.rate)
        return State(table, context.filled, rate, state.inner)

    return Drafter(
        name=f"aded, {nodes} x {depth}, {simulations} simulations",
        nodes=nodes,
        depth=depth,
        most=most,
        proposal="chosen",
        chain=False,
        chains=False,
        pruned=True,
        start_layer=0,
        collect=(),
        init=init,
        propose=propose,
        commit=commit,
    )


# ------------------------------------------------------------------------------------------------------------- tables
def build_table(texts: Iterable[Sequence[int]], buckets: int = 2**18, successors: int = 12) -> Table:
    """Count the tri-grams of a corpus, on the host.

    A pair keeps its most frequent successors, of equals the lower token. A bucket keeps the pair that was seen most
    often, of equals the lower one. Without any tri-gram there is one bucket, and it is empty.

    Args:
      texts: token ids of the target's tokenizer.
      buckets: a power of 2.
      successors: of a pair.

    Raises:
      ValueError: for sizes out of range, and for what is no token.
    """
    _check_buckets("build_table", buckets)
    if successors < 1:
        raise ValueError(f"build_table: successors={successors}; expected at least 1.")
    grams, times = _count(texts)
    if not len(grams):
        buckets = 1
    pairs, start, inverse = np.unique(grams >> TOKEN_BITS, return_index=True, return_inverse=True)
    seen = np.add.reduceat(times, start) if len(grams) else times
    first, second = _token(pairs, 1), _token(pairs, 0)
    bucket = bucket_of(first, second, buckets)
    best = np.lexsort((pairs, -seen, bucket))
    wins = np.zeros(len(pairs), bool)
    wins[best[np.unique(bucket[best], return_index=True)[1]]] = True

    ranked = np.lexsort((grams, -times, inverse))  # pair after pair, as in `start`
    rank = np.arange(len(grams)) - start[inverse]
    kept = wins[inverse] & (rank < successors)  # `inverse` is ascending, so it is its own order by pair
    key = np.full((buckets, 2), NOBODY, np.int32)
    key[bucket[wins]] = np.stack([first, second], axis=1)[wins]
    tokens, counts = np.zeros((2, buckets, successors), np.int32)
    at = bucket[inverse[kept]], rank[kept]
    tokens[at] = _token(grams[ranked[kept]], 0)
    counts[at] = np.minimum(times[ranked[kept]], np.iinfo(np.int32).max)
    return Table(jnp.asarray(key), jnp.asarray(tokens), jnp.asarray(counts))


def new_table(rows: int, buckets: int, successors: int) -> Table:
    """One empty table a row."""
    empty = jnp.zeros((rows, buckets, successors), jnp.int32)
    return Table(jnp.full((rows, buckets, 2), NOBODY, jnp.int32), empty, empty)


def learn(
    table: Table,
    first: Int[Array, "B n"],
    second: Int[Array, "B n"],
    third: Int[Array, "B n"],
    valid: Bool[Array, "B n"],
) -> Table:
    """Add tri-grams, +1 each, as if one after another.

    A pair that comes to another's bucket takes it over: what was written last is likelier to come again. A successor
    that finds no room takes the place of the one with the smallest count, of equals the first.

    Buckets know nothing of each other, so all of them take their next tri-gram at once; and one that comes several
    times in a row, with nothing else for its bucket between, is added at once too. That leaves as many turns as the
    busiest bucket has changes, not as many as there are tokens.
    """
    B, n = first.shape
    U = table.key.shape[1]
    batch = jnp.arange(B)[:, None]
    bucket = jnp.where(valid, bucket_of(first, second, U), U)
    by_bucket = jnp.argsort(bucket, axis=1, stable=True)
    sort = lambda x: jnp.take_along_axis(x, by_bucket, axis=1)
    bucket, first, second, third = map(sort, (bucket, first, second, third))
    head = lambda *columns: jnp.concatenate(
        [jnp.ones((B, 1), bool), functools.reduce(jnp.logical_or, (x[:, 1:] != x[:, :-1] for x in columns))], axis=1
    )
    begins = head(bucket, first, second, third)  # of a run
    run = jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1
    times = jnp.take_along_axis(jnp.zeros((B, n), jnp.int32).at[batch, run].add(1), run, axis=1)
    turn = run - jax.lax.cummax(jnp.where(head(bucket), run, 0), axis=1)
    turn = jnp.where(begins & (bucket < U), turn, -1)

    def one(carry: tuple[Array, Table]) -> tuple[Array, Table]:
        i, table = carry
        at = jnp.where(turn == i, bucket, U)  # the others fall out
        key, tokens, counts = (x.at[batch, at].get(mode="clip") for x in table)
        mine = (key[..., 0] == first) & (key[..., 1] == second)
        counts = jnp.where(mine[..., None], counts, 0)
        same = (tokens == third[..., None]) & (counts > 0)
        known = jnp.any(same, axis=2)
        place = jnp.where(known, jnp.argmax(same, axis=2), jnp.argmin(counts, axis=2))
        here = place[..., None] == jnp.arange(counts.shape[2])[None, None]
        more = jnp.where(known[..., None], counts, 0) + times[..., None]
        new = Table(
            jnp.stack([first, second], axis=2),
            jnp.where(here, third[..., None], tokens),
            jnp.where(here, more, counts),
        )
        return i + 1, Table(*(x.at[batch, at].set(y, mode="drop") for x, y in zip(table, new, strict=True)))

    turns = jnp.max(turn, initial=-1) + 1
    return jax.lax.while_loop(lambda carry: carry[0] < turns, one, (jnp.int32(0), table))[1]


def look_up(table: Table, first: Int[Array, ""], second: Int[Array, ""]) -> tuple[Int[Array, " A"], Int[Array, " A"]]:
    """What followed a pair in one table, and how often; all 0 if the bucket is not the pair's."""
    at = bucket_of(first, second, table.key.shape[0])
    mine = (table.key[at, 0] == first) & (table.key[at, 1] == second)
    return table.tokens[at], jnp.where(mine, table.counts[at], 0)


def bucket_of(first: Tokens, second: Tokens, buckets: int) -> Int[Array | np.ndarray, "..."]:
    """A hash of pairs; the same for arrays of NumPy and of JAX."""
    x = first.astype(np.uint32) * np.uint32(0x9E3779B1) + second.astype(np.uint32) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    x = (x ^ (x >> np.uint32(12))) * np.uint32(0x297A2D39)
    return ((x ^ (x >> np.uint32(15))) & np.uint32(buckets - 1)).astype(np.int32)


# ------------------------------------------------------------------------------------------------------------- search
def search(
    corpus: Table,
    own: Table,
    before: Int[Array, ""],
    root: Int[Array, ""],
    rate: Float[Array, " D"],
    *,
    depth: int,
    most: int,
    simulations: int,
    explore: float,
) -> Pool:
    """Grow one row's nodes, by PUCT as it stands above.

    Of equal scores the likelier token wins, so the first visit of a node's children, when all scores are 0, goes to
    the likeliest.
    """
    P = simulations + 1
    follow = functools.partial(_candidates, corpus, own, most=most)
    tokens, prior = follow(before, root)
    zero, zeros = jnp.zeros(P, jnp.int32), jnp.zeros(P)
    each = jnp.zeros((P, tokens.shape[0]), jnp.int32)
    pool = Pool(
        token=zero.at[0].set(root),
        parent=zero.at[0].set(-1),
        depth=(zero + 1).at[0].set(0),
        order=zero,
        visits=zero,
        worth=zeros.at[0].set(1.0),
        total=zeros,
        next_token=each.at[0].set(tokens),
        prior=jnp.zeros(each.shape).at[0].set(prior),
        child=each,
    )

    def simulate(i: Array, carry: tuple[Array, Pool]) -> tuple[Array, Pool]:
        size, pool = carry
        at, edge, grow, through = _select(pool, depth, explore)
        new = jnp.where(grow, size, P)  # where nothing grows, what is written falls out
        token = pool.next_token[at, edge]
        tokens, prior = follow(pool.token[at], token)
        worth = pool.worth[at] * rate[jnp.minimum(pool.depth[at], rate.shape[0] - 1)] * pool.prior[at, edge]
        through = through | (jnp.arange(P) == new)
        put = lambda x, value: x.at[new].set(value, mode="drop")
        pool = Pool(
            token=put(pool.token, token),
            parent=put(pool.parent, at),
            depth=put(pool.depth, pool.depth[at] + 1),
            order=put(pool.order, edge),
            visits=pool.visits + through.astype(jnp.int32),
            worth=put(pool.worth, worth),
            total=pool.total + jnp.where(through & grow, worth, 0.0),
            next_token=put(pool.next_token, tokens),
            prior=put(pool.prior, prior),
            child=pool.child.at[jnp.where(grow, at, P), edge].set(size, mode="drop"),
        )
        return size + grow.astype(jnp.int32), pool

    return jax.lax.fori_loop(0, simulations, simulate, (jnp.int32(1), pool))[1]


def most_visited(pool: Pool, nodes: int) -> DraftTree:
    """The nodes of most visits, in the order they were added. `pool` is of all rows, [B, P, ...].

    `top_k` gives ties to the lower index, and a parent has at least the visits of its child and stands before it.
    """
    B, P = pool.visits.shape
    _, kept = jax.lax.top_k(pool.visits[:, 1:], nodes - 1)
    kept = jnp.concatenate([jnp.zeros((B, 1), jnp.int32), 1 + jnp.sort(kept, axis=1)], axis=1)
    batch = jnp.arange(B)[:, None]
    node_of = jnp.zeros((B, P), jnp.int32).at[batch, kept].set(jnp.arange(nodes, dtype=jnp.int32)[None])
    parent = pool.parent[batch, kept]
    return DraftTree(
        tokens=pool.token[batch, kept],
        parent=jnp.where(parent < 0, -1, node_of[batch, jnp.maximum(parent, 0)]),
        depth=pool.depth[batch, kept],
        order=pool.order[batch, kept],
        valid=(kept == 0) | (pool.visits[batch, kept] > 0),
    )


# ----------------------------------------------------------------------------------------------------------- private
def _select(pool: Pool, depth: int, explore: float) -> tuple[Array, Array, Array, Bool[Array, " P"]]:
    """Walk down: the node where it ends, the successor to add there, whether there is one, and the nodes come by."""
    here = jnp.arange(pool.visits.shape[0])
    at, edge, going, grow = jnp.int32(0), jnp.int32(0), jnp.bool_(True), jnp.bool_(False)
    through = here == 0
    for _ in range(depth):
        child, prior = pool.child[at], pool.prior[at]
        visits = jnp.where(child > 0, pool.visits[child], 0).astype(jnp.float32)
        q = jnp.where(child > 0, pool.total[child], 0.0) / jnp.maximum(visits, 1)
        score = q + explore * prior * jnp.sqrt(jnp.sum(visits)) / (1 + visits)
        best = jnp.argmax(jnp.where(prior > 0, score, -jnp.inf)).astype(jnp.int32)
        going = going & (prior[0] > 0)
        edge = jnp.where(going, best, edge)
        add = going & (child[best] == 0)
        grow, going = grow | add, going & ~add
        at = jnp.where(going, child[best], at)
        through = through | (here == at)
    return at, edge, grow, through


def _candidates(
    corpus: Table, own: Table, first: Array, second: Array, *, most: int
) -> tuple[Int[Array, " A"], Float[Array, " A"]]:
    """The likeliest successors of a pair by both tables, and their shares among themselves."""
    (tokens, counts), (mine, times) = look_up(corpus, first, second), look_up(own, first, second)
    counts, times = counts.astype(jnp.float32), times.astype(jnp.float32)
    same = (tokens[:, None] == mine[None]) & (counts > 0)[:, None] & (times > 0)[None]
    counts = counts + jnp.sum(jnp.where(same, times[None], 0.0), axis=1)
    times = jnp.where(jnp.any(same, axis=0), 0.0, times)
    both = jnp.concatenate([counts, times])
    counts, kept = jax.lax.top_k(both, min(most, both.shape[0]))
    return jnp.concatenate([tokens, mine])[kept], counts / jnp.maximum(jnp.sum(counts), 1)


def _learn_text(table: Table, context: Context, start: Int[Array, " B"], n: int) -> Table:
    """The tri-grams that end at the n tokens from `start` on, as far as there is text."""
    end = start[:, None] + jnp.arange(n)[None]
    token = lambda at: jnp.take_along_axis(context.tokens, at, axis=1, mode="clip")
    return learn(table, token(end - 2), token(end - 1), token(end), (end >= 2) & (end < context.filled[:, None]))


def _learn_rate(state: State, verdict: Verdict, pace: float) -> Float[Array, "B D"]:
    """Drafts were right at the depths that were accepted, and wrong at the next if there were any."""
    level = 1 + jnp.arange(state.rate.shape[1])[None]
    accepted = verdict.accepted[:, None]
    drafted = jnp.take_along_axis(state.inner, verdict.path[:, -1:], axis=1)
    judged = (level <= accepted) | ((level == accepted + 1) & drafted)
    right = (level <= accepted).astype(jnp.float32)
    return jnp.where(judged, (1 - pace) * state.rate + pace * right, state.rate)


def _count(texts: Iterable[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """All tri-grams, ascending, each packed into an integer; and how often they came."""
    grams, times = np.zeros(0, np.int64), np.zeros(0, np.int64)
    new, size = [], 0
    for text in texts:
        ids = np.asarray(text, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >> TOKEN_BITS):
            raise ValueError(
                f"build_table: found tokens {ids.min()} to {ids.max()}; expected 0 to {2**TOKEN_BITS - 1}. "
                "Pass token ids."
            )
        new.append(ids[:-2] << 2 * TOKEN_BITS | ids[1:-1] << TOKEN_BITS | ids[2:])
        size += len(new[-1])
        if size > COUNT_AT_ONCE:
            grams, times = _merge(grams, times, new)
            new, size = [], 0
    return _merge(grams, times, new)


def _merge(grams: np.ndarray, times: np.ndarray, new: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    added = np.concatenate([grams[:0], *new])
    merged, inverse = np.unique(np.concatenate([grams, added]), return_inverse=True)
    weights = np.concatenate([times, np.ones_like(added)])
    return merged, np.bincount(inverse, weights, minlength=len(merged)).astype(np.int64)


def _token(grams: np.ndarray, place: int) -> np.ndarray:
    """One token of packed ones, counted from the last."""
    return (grams >> place * TOKEN_BITS & (2**TOKEN_BITS - 1)).astype(np.int32)


def _check_buckets(where: str, buckets: int) -> None:
    if buckets < 1 or buckets & (buckets - 1):
        raise ValueError(f"{where}: buckets={buckets}; expected a power of 2.")
