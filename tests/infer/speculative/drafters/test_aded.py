"""Oracles: dictionaries and lists for the tables, the same search as a float64 loop; identity with plain decoding."""

import functools
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxaroo.infer.speculative import loop, verify
from jaxaroo.infer.speculative.drafters import aded
from jaxaroo.infer.speculative.drafters.aded import build_table, learn, make_drafter, new_table

B, S, V, DEPTH, NODES, MOST, SIMULATIONS, EXPLORE = 3, 40, 6, 3, 8, 4, 20, 1.25
TIE = 1e-5  # of scores of order 1
BUCKETS, SUCCESSORS = 8, 2  # fewer than pairs: many collide
DRAFTER = make_drafter(
    nodes=NODES, depth=DEPTH, most=MOST, simulations=SIMULATIONS, buckets=BUCKETS, successors=SUCCESSORS
)
seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)

learn_now = jax.jit(learn)
propose_now = jax.jit(DRAFTER.propose)
commit_now = jax.jit(DRAFTER.commit)
init_now = jax.jit(DRAFTER.init, static_argnums=4)
search_now = jax.jit(
    jax.vmap(
        functools.partial(aded.search, depth=DEPTH, most=MOST, simulations=SIMULATIONS, explore=EXPLORE),
        in_axes=(None, 0, 0, 0, 0),
    )
)
keep_now = jax.jit(aded.most_visited, static_argnames="nodes")
look_up_now = jax.jit(jax.vmap(aded.look_up, in_axes=(None, 0, 0)))


# ------------------------------------------------------------------------------------------------------------- oracles
def hashed(first, second, buckets):
    x = (first * 0x9E3779B1 + second * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) % 2**32
    x = ((x ^ (x >> 12)) * 0x297A2D39) % 2**32
    return (x ^ (x >> 15)) % buckets


def corpus_oracle(texts, buckets, successors):
    """{pair: [(token, count), ..]} of the pairs that have a bucket."""
    counts = Counter(tuple(text[i : i + 3]) for text in texts for i in range(len(text) - 2))
    followed: dict[Any, list] = {}
    for (first, second, third), count in counts.items():
        followed.setdefault((first, second), []).append((third, count))
    holder = {}
    for pair in sorted(followed):
        at, seen = hashed(*pair, buckets), sum(c for _, c in followed[pair])
        if at not in holder or seen > holder[at][0]:
            holder[at] = seen, pair
    best_first = lambda found: sorted(found, key=lambda tc: (-tc[1], tc[0]))[:successors]
    return {pair: best_first(followed[pair]) for _, pair in holder.values()}


class Bucket:
    def __init__(self, successors):
        self.key, self.slots = (-1, -1), [[None, 0] for _ in range(successors)]

    def add(self, first, second, third):
        if self.key != (first, second):
            self.key, self.slots = (first, second), [[None, 0] for _ in self.slots]
        for slot in self.slots:
            if slot[0] == third:
                slot[1] += 1
                return
        fewest = min(range(len(self.slots)), key=lambda i: self.slots[i][1])
        self.slots[fewest] = [third, 1]


def learnt(grams, buckets=None, size=BUCKETS):
    buckets = buckets or [Bucket(SUCCESSORS) for _ in range(size)]
    for gram in grams:
        buckets[hashed(*gram[:2], size)].add(*gram)
    return buckets


def grams_of(text):
    return [tuple(text[i : i + 3]) for i in range(len(text) - 2)]


def assert_table_is(table, row, buckets):
    """Key by key and place by place; tokens that count 0 say nothing."""
    for at, bucket in enumerate(buckets):
        assert tuple(np.asarray(table.key[row, at]).tolist()) == bucket.key
        assert table.counts[row, at].tolist() == [count for _, count in bucket.slots]
        for token, (want, count) in zip(table.tokens[row, at].tolist(), bucket.slots, strict=True):
            assert token == want or count == 0


def served(table, pair):
    """By scanning all keys, with no hash; a table of one row."""
    for key, tokens, counts in zip(*(np.asarray(x).tolist() for x in table), strict=True):
        if tuple(key) == pair:
            return {t: c for t, c in zip(tokens, counts, strict=True) if c}
    return {}


class Grown(NamedTuple):
    """A node of the oracle's search."""

    token: int
    parent: int
    depth: int
    order: int
    worth: float
    follow: list  # of (token, P)
    kids: dict  # place -> node


def candidates(corpus, own, pair):
    counts, mine = served(corpus, pair), served(own, pair)
    every = [*counts, *(t for t in mine if t not in counts)]
    total = {t: np.float64(counts.get(t, 0) + mine.get(t, 0)) for t in every}
    best = sorted(every, key=lambda t: -total[t])[:MOST]
    return [(t, total[t] / sum(total[b] for b in best)) for t in best]


def search_oracle(corpus, own, before, root, rate):
    """Nodes, visits, totals; and how close a race came to a tie, which float32 may decide otherwise.

    Between two that are not there yet no arithmetic is at stake.
    """
    nodes = [Grown(root, -1, 0, 0, 1.0, candidates(corpus, own, (before, root)), {})]
    visits, total, closest = [0], [0.0], np.inf
    for _ in range(SIMULATIONS):
        at, path, worth = 0, [0], 0.0
        while nodes[at].follow and nodes[at].depth < DEPTH:
            node, tried = nodes[at], sum(visits[k] for k in nodes[at].kids.values())
            scores = []
            for place, (_, share) in enumerate(node.follow):
                kid = node.kids.get(place)
                n, q = (visits[kid], total[kid] / visits[kid]) if kid else (0, 0.0)
                scores.append(q + EXPLORE * share * np.sqrt(tried) / (1 + n))
            place = int(np.argmax(scores))
            rivals = [i for i in range(len(scores)) if i != place and {i, place} & node.kids.keys()]
            closest = min([closest, *(scores[place] - scores[i] for i in rivals)])
            if place in node.kids:
                at = node.kids[place]
                path.append(at)
                continue
            token, share = node.follow[place]
            worth = node.worth * rate[node.depth] * share
            node.kids[place] = len(nodes)
            path.append(len(nodes))
            nodes.append(
                Grown(token, at, node.depth + 1, place, worth, candidates(corpus, own, (node.token, token)), {})
            )
            visits.append(0)
            total.append(0.0)
            break
        for i in path:
            visits[i] += 1
            total[i] += worth
    return nodes, visits, total, closest


def path_in(nodes, i):
    return (*path_in(nodes, nodes[i].parent), nodes[i].token) if i else ()


# --------------------------------------------------------------------------------------------------- random situations
def random_text(rng, length):
    """Some tokens far likelier than others, and some of it said twice."""
    text = rng.choice(V, length, p=rng.dirichlet(np.full(V, 0.7))).tolist()
    half = length // 2
    return text[:half] + text[: length - half] if rng.random() < 0.5 else text


def context_of(texts):
    tokens = np.ones((len(texts), S), np.int32)  # what stands behind a text must not matter
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    empty: Any = ()
    filled = jnp.array([len(t) for t in texts], jnp.int32)
    return loop.Context(jnp.asarray(tokens), filled, jnp.ones(len(texts), bool), empty, empty, empty)


def situation(rng):
    """A corpus, texts that a state has read, and random rates; counts of many sizes, so that few scores are equal."""
    weigh = lambda table: table._replace(counts=table.counts * jnp.asarray(rng.integers(1, 99, table.counts.shape)))
    corpus = weigh(build_table([random_text(rng, 400)], 64, 3))
    context = context_of([random_text(rng, n) for n in rng.integers(3, S + 1, B)])
    state = init_now((), corpus, context, (), 16)
    rate = jnp.asarray(rng.uniform(0.05, 1, (B, DEPTH)), jnp.float32)
    return corpus, context, state._replace(rate=rate, table=weigh(state.table))


def row_of(tree, row):
    return jax.tree.map(lambda x: x[row], tree)


def paths_of(tree, row):
    """Tokens on the way to every valid node, the root's not among them."""
    parent, tokens = np.asarray(tree.parent[row]), np.asarray(tree.tokens[row])
    paths = {0: ()}
    for i in range(1, len(parent)):
        if tree.valid[row, i]:
            paths[i] = (*paths[int(parent[i])], int(tokens[i]))
    return paths


# -------------------------------------------------------------------------------------------------------------- tables
@given(seeds)
def test_the_corpus_table_is_that_of_a_dictionary(rng):
    """All pairs are asked for: those that lost their bucket, or were never seen, must be served nothing."""
    texts = [rng.integers(0, V, n).tolist() for n in (0, 1, 2, 3, 30, 50)]
    buckets = int(rng.choice([16, 64]))
    table, want = build_table(texts, buckets, 3), corpus_oracle(texts, buckets, 3)
    pairs = [(a, b) for a in range(V) for b in range(V)]
    first, second = (jnp.array(column, jnp.int32) for column in zip(*pairs, strict=True))
    tokens, counts = look_up_now(table, first, second)
    for pair, row, times in zip(pairs, np.asarray(tokens).tolist(), np.asarray(counts).tolist(), strict=True):
        assert [(t, c) for t, c in zip(row, times, strict=True) if c] == want.get(pair, [])


def test_a_corpus_larger_than_a_batch_of_counting_is_counted_once(monkeypatch):
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, V, 50).tolist() for _ in range(9)]
    whole = build_table(texts, 64, 3)
    merge, sizes = aded._merge, []
    monkeypatch.setattr(aded, "_merge", lambda *a: sizes.append(len(a[2])) or merge(*a))
    monkeypatch.setattr(aded, "COUNT_AT_ONCE", 100)
    in_parts = build_table(texts, 64, 3)
    assert sizes == [3, 3, 3, 0]
    for a, b in zip(whole, in_parts, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("texts", [[], [[]], [[1, 2]]])
def test_an_empty_corpus_gives_a_table_that_serves_nothing(texts):
    table = build_table(texts)
    assert table.key.shape == (1, 2)
    assert not table.counts.any()
    assert (np.asarray(table.key) == -1).all()


@given(seeds)
@pytest.mark.slow
def test_learning_at_once_is_learning_one_after_another(rng):
    """Counts, keys, what is evicted and the place where it stands, over two calls; rows and gaps of their own."""
    table, buckets = new_table(B, BUCKETS, SUCCESSORS), [None] * B
    for _ in range(2):
        few = int(rng.integers(1, V))
        grams, valid = rng.integers(0, few + 1, (3, B, 30)).astype(np.int32), rng.random((B, 30)) < 0.8
        table = learn_now(table, *jnp.asarray(grams), jnp.asarray(valid))
        for row in range(B):
            buckets[row] = learnt(grams[:, row, valid[row]].T.tolist(), buckets[row])
    for row in range(B):
        assert_table_is(table, row, buckets[row])


@given(seeds)
@pytest.mark.slow
def test_the_prompt_is_read_to_its_end_and_no_further(rng):
    texts = [random_text(rng, n) for n in rng.integers(1, S + 1, B)]
    state = init_now((), build_table([]), context_of(texts), (), 16)
    for row, text in enumerate(texts):
        assert_table_is(state.table, row, learnt(grams_of(text)))
    np.testing.assert_array_equal(state.read, [len(t) for t in texts])


@given(seeds)
@pytest.mark.slow
def test_commits_learn_what_a_fresh_reading_learns(rng):
    """Steps of 0 to depth + 1 tokens, down from a prompt of one."""
    texts = [random_text(rng, S) for _ in range(B)]
    filled = np.array([1, *rng.integers(2, 20, B - 1)])
    state = init_now((), build_table([]), context_of([t[:n] for t, n in zip(texts, filled, strict=True)]), (), 16)
    for _ in range(5):
        filled = np.minimum(filled + rng.integers(0, DEPTH + 2, B), S)
        context = context_of([t[:n] for t, n in zip(texts, filled, strict=True)])
        zero = jnp.zeros((B, DEPTH + 1), jnp.int32)
        state = commit_now((), (), state, context, loop.Verdict(zero, zero[:, 0], ()))
    for row, text in enumerate(texts):
        assert_table_is(state.table, row, learnt(grams_of(text[: filled[row]])))


@given(seeds)
def test_rates_are_running_averages_of_the_depths_that_were_judged(rng):
    _, context, state = situation(rng)
    inner = rng.random((B, NODES)) < 0.5
    accepted = rng.integers(0, DEPTH + 1, B)
    path = np.sort(rng.integers(1, NODES, (B, DEPTH + 1)), axis=1)
    for row in range(B):
        path[row, accepted[row] :] = path[row, accepted[row]] if accepted[row] else 0
    new = rng.integers(0, 2, B)
    read = np.asarray(context.filled) - new
    state = state._replace(inner=jnp.asarray(inner), read=jnp.asarray(read, jnp.int32))
    verdict = loop.Verdict(jnp.asarray(path, jnp.int32), jnp.asarray(accepted, jnp.int32), ())
    got = commit_now((), (), state, context, verdict).rate
    want = np.asarray(state.rate, np.float64).copy()
    for row in np.flatnonzero(new):  # a row without new tokens has ended
        for d in range(accepted[row]):
            want[row, d] = 0.9 * want[row, d] + 0.1
        if accepted[row] < DEPTH and inner[row, path[row, -1]]:
            want[row, accepted[row]] *= 0.9
    np.testing.assert_allclose(got, want, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------------- search
@given(seeds)
@pytest.mark.slow
def test_the_search_visits_what_a_float64_loop_visits(rng):
    corpus, context, state = situation(rng)
    text, filled = np.asarray(context.tokens), np.asarray(context.filled)
    before, root = (jnp.asarray(text[np.arange(B), filled - back]) for back in (2, 1))
    pools = search_now(corpus, state.table, before, root, state.rate)
    for row in range(B):
        pool, rate = row_of(pools, row), np.asarray(state.rate[row], np.float64)
        own = row_of(state.table, row)
        nodes, visits, total, closest = search_oracle(corpus, own, int(before[row]), int(root[row]), rate)
        if closest < TIE:
            continue
        size = len(nodes)
        assert pool.visits.tolist() == visits + [0] * (SIMULATIONS + 1 - size)
        for field in ("token", "parent", "depth", "order"):
            assert getattr(pool, field)[:size].tolist() == [getattr(n, field) for n in nodes]
        np.testing.assert_allclose(pool.total[:size], total, rtol=1e-5, atol=1e-7)


@given(seeds)
@pytest.mark.slow
def test_the_tree_is_the_most_visited_nodes(rng):
    corpus, context, state = situation(rng)
    text, filled = np.asarray(context.tokens), np.asarray(context.filled)
    tree, after, _ = propose_now((), corpus, state, context)
    for row in range(B):
        before, root = (int(text[row, filled[row] - back]) for back in (2, 1))
        rate = np.asarray(state.rate[row], np.float64)
        nodes, visits, _, closest = search_oracle(corpus, row_of(state.table, row), before, root, rate)
        if closest < TIE:
            continue
        path = functools.partial(path_in, nodes)
        best = sorted(range(1, len(nodes)), key=lambda i, visits=visits: (-visits[i], i))[: NODES - 1]
        kept = paths_of(tree, row)
        assert [kept[i] for i in sorted(kept)] == [path(i) for i in [0, *sorted(best)]]
        inner = {path(nodes[i].parent) for i in best}
        assert {kept[i] for i in kept if after.inner[row, i]} == inner
        assert sorted(kept) == list(range(len(kept)))


@given(seeds)
def test_the_most_visited_are_kept_and_numbered_anew(rng):
    """Of any tree, also where the many visits are far behind, and where there are fewer nodes than room."""
    P, size = SIMULATIONS + 1, rng.integers(1, SIMULATIONS + 2, B)
    parent, depth = np.zeros((B, P), np.int32), np.ones((B, P), np.int32)
    visits = np.zeros((B, P), np.int32)
    for row, n in enumerate(size):
        parent[row, 1:n] = [rng.integers(max(0, i - 4), i) for i in range(1, n)]
        for i in range(1, n):
            depth[row, i] = depth[row, parent[row, i]] + 1 if parent[row, i] else 1
        visits[row, :n] = rng.integers(1, 4, n)
        for i in range(n - 1, 0, -1):
            visits[row, parent[row, i]] += visits[row, i]
    parent[:, 0], depth[:, 0] = -1, 0
    token, order = rng.integers(0, 9, (2, B, P)).astype(np.int32)
    pool = aded.Pool(*map(jnp.asarray, (token, parent, depth, order, visits)), *[()] * 5)
    tree = keep_now(pool, nodes=NODES)
    for row, n in enumerate(size):
        best = [0, *sorted(sorted(range(1, n), key=lambda i, row=row: (-visits[row, i], i))[: NODES - 1])]
        k = len(best)
        assert tree.valid[row].tolist() == [True] * k + [False] * (NODES - k)
        for got, had in ((tree.tokens, token), (tree.depth, depth), (tree.order, order)):
            assert got[row, :k].tolist() == had[row, best].tolist()
        assert tree.parent[row, :k].tolist() == [-1, *(best.index(parent[row, i]) for i in best[1:])]


@given(seeds)
def test_a_tree_is_one(rng):
    """Parents first, a level below them, siblings all different and numbered apart; nothing below the limit."""
    corpus, context, state = situation(rng)
    tree, _, _ = propose_now((), corpus, state, context)
    tokens, parent, depth, order, valid = (np.asarray(x) for x in tree[:5])
    np.testing.assert_array_equal(tokens[:, 0], context.root)
    assert (parent[:, 0] == -1).all()
    assert (depth[:, 0] == 0).all()
    assert valid[:, 0].all()
    assert depth.max() <= DEPTH
    assert ((order >= 0) & (order < MOST)).all()
    for row in range(B):
        for i in range(1, NODES):
            assert 0 <= parent[row, i] < i
            assert depth[row, i] == depth[row, parent[row, i]] + 1
            assert valid[row, parent[row, i]] or not valid[row, i]
        at = np.flatnonzero(valid[row, 1:]) + 1
        for facts in (tokens, order):
            assert len({(parent[row, i], facts[row, i]) for i in at}) == len(at)


@given(seeds)
@pytest.mark.slow
def test_what_a_row_drafts_does_not_depend_on_its_neighbours(rng):
    corpus, context, state = situation(rng)
    other, context_2, state_2 = situation(rng)
    del other
    mix = lambda a, b: jax.tree.map(lambda x, y: jnp.concatenate([x[:1], y[1:]]), a, b)
    mixed_context = context._replace(
        **{f: mix(getattr(context, f), getattr(context_2, f)) for f in ("tokens", "filled")}
    )
    alone, _, _ = propose_now((), corpus, state, context)
    among, _, _ = propose_now((), corpus, mix(state, state_2), mixed_context)
    for a, b in zip(alone[:5], among[:5], strict=True):
        np.testing.assert_array_equal(a[0], b[0])


@pytest.mark.slow
def test_a_text_that_repeats_itself_is_continued():
    """By its own table, by a corpus that knows it, and by neither; a text of one token has no pair."""
    period = [0, 1, 2, 5]  # whose pairs have buckets of their own
    context = context_of([(period * 5)[:18], [2, 3, 4, 0, 1], [4]])
    traps = [[4, 4, 4], [1, 4, 4]]  # for that one, with itself or with what stands behind the text before it
    drafts = {}
    for name, corpus in {"own": build_table([]), "corpus": build_table([period * 3, *traps], 64)}.items():
        tree, _, _ = propose_now((), corpus, init_now((), corpus, context, (), 16), context)
        drafts[name] = [sorted(paths_of(tree, row).values())[1:] for row in range(B)]
    chain = lambda *tokens: [tokens[: i + 1] for i in range(len(tokens))]
    assert drafts["own"] == [chain(2, 5, 0), [], []]
    assert drafts["corpus"] == [chain(2, 5, 0), chain(2, 5, 0), []]


# ------------------------------------------------------------------------------------------------------------ decoding
@functools.cache
def corpus_for(name):
    """Noise, and a few phrases."""
    rng = np.random.default_rng(len(name))
    return build_table(rng.integers(0, 32, (40, 50)).tolist(), 2**10)


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.proof) for n in ("qwen3", "window"))])
@pytest.mark.slow
def test_output_is_that_of_plain_decoding(bench, name):
    """Greedy and sampled rows; and the state that remains is that of reading the whole text."""
    ran = bench.check_identity(DRAFTER, verify.coupled(), corpus_for(name), name=name)
    assert ran.tally.emitted[:3, 2:].sum() > 0  # some draft was right
    for row, line in enumerate(ran.lines):
        assert_table_is(ran.state.drafter.table, row, learnt(grams_of(line)))


@pytest.mark.proof
def test_one_row_alone(bench):
    bench.check_identity(DRAFTER, verify.coupled(), corpus_for("llama"), only=2)


@pytest.mark.slow
def test_a_corpus_that_holds_the_answers_takes_fewer_steps(bench):
    plain = bench.plain()
    table = build_table(plain.lines, 2**10)  # of the size of the other: nothing new is compiled
    ran = bench.drafted(DRAFTER, verify.coupled(), table)
    assert ran.lines == plain.lines
    written = sum(len(line) - len(p) - 1 for line, p in zip(plain.lines, bench.prompts, strict=True))
    assert written > 2 * ran.tally.emitted.sum()


@pytest.mark.slow
def test_a_smaller_drafter_goes_on_from_the_state_of_a_larger_one(bench):
    smaller = make_drafter(nodes=4, depth=2, most=MOST, simulations=SIMULATIONS, buckets=BUCKETS, successors=SUCCESSORS)
    tokens, asked = bench.pack()
    cfg, given = bench.targets["llama"], loop.Weights(bench.weights("llama"), corpus_for("llama"), ())
    state = loop.prefill(cfg, given, DRAFTER, tokens, asked, chunk=16)
    halt = np.zeros(len(tokens), bool)
    for drafter, steps in ((DRAFTER, 3), (smaller, 3), (DRAFTER, 1000)):
        state = loop.decode(cfg, given, drafter, verify.coupled(), state, asked, halt, np.int32(steps))
    lines = [np.asarray(row)[:n].tolist() for row, n in zip(state.rows.tokens, state.rows.filled, strict=True)]
    assert lines == bench.plain().lines
    for row, line in enumerate(lines):
        assert_table_is(state.drafter.table, row, learnt(grams_of(line)))


@pytest.mark.errors
def test_refusals():
    with pytest.raises(ValueError, match="Each adds one node"):
        make_drafter(nodes=9, simulations=7)
    with pytest.raises(ValueError, match="at least 1"):
        make_drafter(depth=0)
    with pytest.raises(ValueError, match="pace=2"):
        make_drafter(pace=2)
    with pytest.raises(ValueError, match="aded: buckets=3; expected a power of 2"):
        make_drafter(buckets=3)
    with pytest.raises(ValueError, match="build_table: buckets=0"):
        build_table([], 0)
    with pytest.raises(ValueError, match="successors=0"):
        build_table([], 4, 0)
    with pytest.raises(ValueError, match="found tokens -1 to 2; expected 0 to 2097151"):
        build_table([[1, 2, -1]])
    with pytest.raises(ValueError, match="found tokens 0 to 2097152"):
        build_table([[1, 2], [0, 2**21]])
    with pytest.raises(ValueError, match="nobody drew from"):
        loop.check(DRAFTER, verify.rejection(4, "without_replacement"))
    loop.check(DRAFTER, verify.rejection(MOST, "chosen"))
