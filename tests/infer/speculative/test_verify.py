"""Oracles: every proposal enumerated in float64, one node and whole trees; the draws against the enumerated laws."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxaroo.infer.sampling import Sampling, choose, pack_sampling
from jaxaroo.infer.speculative import verify
from jaxaroo.infer.speculative.tree import DraftTree, child_index, children
from jaxaroo.infer.speculative.verify import Law, Node, coupled, judge, k_seq, k_seq_law, rejection, rejection_law

RULES = ["chosen", "without_replacement", "independent", "k_seq"]
TINY = 1e-12


def x64():
    """A context with float64, under either of its names."""
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()


@functools.partial(jax.jit, static_argnames="rule")
def law_of(rule, p, q, tokens, valid):
    return k_seq_law(p, q, tokens, valid) if rule == "k_seq" else rejection_law(p, q, tokens, valid, rule)


def law64(rule, p, q, tokens, valid):
    with x64():
        law = jax.device_get(law_of(rule, p, q, tokens, valid))
    assert law.accept.dtype == law.rest.dtype == np.float64
    return law


def draws(rule, q, k):
    """Every way to draw up to k children from q as (tokens, probability); fewer than k where q runs out of tokens."""
    if rule == "without_replacement":
        k = min(k, int(np.sum(q > 0)))
        for tokens in itertools.permutations(np.flatnonzero(q > 0), k):
            left, prob = q.copy(), 1.0
            for x in tokens:
                prob *= left[x] / left.sum()
                left[x] = 0
            yield tokens, prob
    elif rule == "chosen":
        yield from ((tokens, 1.0) for tokens in itertools.permutations(range(len(q)), k))
    else:
        for tokens in itertools.product(range(len(q)), repeat=k):
            yield tokens, np.prod(q[list(tokens)])


def emitted(law, tokens):
    """The law of the emitted token, for given children."""
    out, reach = np.zeros_like(law.rest), np.ones(len(tokens))
    for i in range(tokens.shape[1]):
        out[np.arange(len(tokens)), tokens[:, i]] += reach * law.accept[:, i]
        reach = reach * (1 - law.accept[:, i])
    return out + reach[:, None] * law.rest


def pairs():
    """(p, q): flat and sharp ones at random, and the corners."""
    rng = np.random.default_rng(0)
    hot, thin = np.eye(5), np.array([0.5, 0.5, 0, 0, 0])
    free = [(rng.dirichlet(np.full(5, a)), rng.dirichlet(np.full(5, b))) for a in (0.3, 3) for b in (0.3, 3)]
    same = free[0][0]
    sharp = np.array([1 - 6e-17, 4e-17, 2e-17, 3e-30, 1e-30])  # what a low temperature makes
    return [
        *free,
        (same, same),
        *((same, (1 - close) * same + close * free[1][0]) for close in (1e-3, 1e-9)),
        (thin, thin[::-1]),
        (hot[1], free[1][1]),
        (free[1][0], hot[2]),
        (hot[1], hot[1]),
        (hot[1], hot[2]),
        (free[2][0], thin),
        (thin, free[3][1]),
        (np.full(5, 0.2), sharp),
        (sharp, np.full(5, 0.2)),
    ]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("rule", RULES)
def test_one_node_keeps_the_law_of_the_target(rule, k):
    """Also where q runs out of tokens: the places left are invalid, or hold tokens that q could not have drawn."""
    rows = [(i, *draw) for i, (_, q) in enumerate(pairs()) for draw in draws(rule, q, k)]
    which, prob = np.array([i for i, _, _ in rows]), np.array([w for _, _, w in rows])
    p, q = (np.stack(d)[which] for d in zip(*pairs(), strict=True))
    valid = np.array([[j < len(tokens) for j in range(k)] for _, tokens, _ in rows])
    tokens = np.array([[*t, *[x for x in range(5) if pairs()[i][1][x] == 0]][:k] for i, t, _ in rows])
    for mask in [valid] if valid.all() else [valid, np.ones_like(valid)]:
        law = law64(rule, p, q, tokens, mask)
        assert ((law.accept >= 0) & (law.accept <= 1)).all()
        assert (law.rest >= 0).all()
        np.testing.assert_allclose(law.rest.sum(1), 1, atol=1e-12)
        got = emitted(law, tokens)
        if rule == "chosen":  # for every choice by itself: nothing was drawn
            assert 0.5 * np.abs(got - p).sum(1).max() < TINY
        for i, (target, _) in enumerate(pairs()):
            mine = which == i
            total = prob[mine].sum()
            mean = prob[mine] @ got[mine] / total
            assert rule == "chosen" or abs(total - 1) < TINY
            assert 0.5 * np.abs(mean - target).sum() < TINY, pairs()[i]


@pytest.mark.parametrize("rule", RULES)
def test_invalid_children_are_passed_over(rule):
    p, q = (np.stack(d)[:4] for d in zip(*pairs(), strict=True))
    tokens = np.array([[0, 3, 1], [4, 2, 0], [1, 1, 2], [2, 0, 4]])
    full = law64(rule, p, q, tokens[:, [0, 2]], np.ones((4, 2), bool))
    gaps = law64(rule, p, q, tokens, np.array([[True, False, True]] * 4))
    np.testing.assert_allclose(gaps.accept, np.insert(full.accept, 1, 0, axis=1), atol=TINY)
    np.testing.assert_allclose(gaps.rest, full.rest, atol=TINY)
    none = law64(rule, p, q, tokens, np.zeros((4, 3), bool))
    np.testing.assert_array_equal(none.accept, 0)
    np.testing.assert_allclose(none.rest, p, atol=TINY)


def by_hand(rule, p, q, tokens, valid):
    """The rules as their papers write them, one child at a time, in float64."""
    r, left, accept = p.copy(), q.copy(), []
    if rule == "k_seq":
        k = sum(valid)
        beta_of = lambda rho: np.minimum(q, p / rho).sum()
        low, high = 1.0, float(max(k, 1))
        for _ in range(200):
            rho = (low + high) / 2
            good = 1 - (1 - beta_of(rho)) ** k <= rho * beta_of(rho)
            low, high = (low, rho) if good else (rho, high)
        beta = beta_of(high)
        share = sum((1 - beta) ** j for j in range(k))
        rest = p - np.minimum(q, p / high) * share
        rest = rest / rest.sum() if rest.sum() > 1e-9 else p
        return [min(1, p[x] / (high * q[x])) if ok else 0.0 for x, ok in zip(tokens, valid, strict=True)], rest
    for x, ok in zip(tokens, valid, strict=True):
        q_i = np.eye(len(p))[x] if rule == "chosen" else left / left.sum()
        accept.append(min(1, r[x] / q_i[x]) if ok else 0.0)
        if ok:
            r = np.maximum(r - q_i, 0)
            r = r / r.sum() if r.sum() > 1e-9 else p
            left[x] *= rule != "without_replacement"
    return accept, r


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), sharpness=st.floats(0.2, 4), invalid=st.sets(st.integers(0, 7)))
def test_laws_in_float32_match_the_papers_in_float64(rule, seed, sharpness, invalid):
    rng = np.random.default_rng(seed)
    softmax = lambda z: np.exp(z) / np.exp(z).sum(1, keepdims=True)
    p, q = (softmax(rng.normal(size=(8, 6)) * sharpness).astype(np.float32) for _ in range(2))
    tokens = np.stack([rng.permutation(6)[:3] for _ in range(8)])
    if rule in ("independent", "k_seq"):
        tokens[::2, 2] = tokens[::2, 0]
    valid = np.ones((8, 3), bool)
    valid[list(invalid), 1] = False
    with jax.numpy_dtype_promotion("strict"):
        law = jax.device_get(law_of(rule, p, q, tokens, valid))
    for b in range(8):
        one = p[b].astype(np.float64) / p[b].sum(dtype=np.float64), q[b].astype(np.float64) / q[b].sum(dtype=np.float64)
        accept, rest = by_hand(rule, *one, tokens[b], valid[b])
        np.testing.assert_allclose(law.accept[b], accept, atol=2e-4)
        reached = np.prod(1 - np.array(accept))  # in float32, a rest that is hardly ever reached is noise
        np.testing.assert_allclose(reached * law.rest[b], reached * rest, atol=2e-5)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_rho_is_valid_and_the_smallest(k):
    """Valid: no token's share of the rest is negative."""
    rng = np.random.default_rng(k)
    p, q = (np.concatenate([rng.dirichlet(np.full(6, a), size=30) for a in (0.3, 1, 5)]) for _ in range(2))
    with x64():
        rho = np.asarray(jax.jit(verify.smallest_rho)(p, q, np.full(90, k)))

    def least(rho):
        taken = np.minimum(q, p / rho[:, None])
        beta = taken.sum(1)
        return (p - taken * sum((1 - beta) ** j for j in range(k))[:, None]).min(1)

    beta = np.minimum(q, p / rho[:, None]).sum(1)
    assert ((rho >= 1) & (rho <= k)).all()
    assert (least(rho) > -1e-9).all()
    assert (1 - (1 - beta) ** k <= rho * beta + 1e-14).all()  # bisection ends on the valid side
    if k > 1:
        assert (rho > 1.001).any()
        assert (least(rho * (1 - 1e-3))[rho > 1.001] < 0).all()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_k_seq_takes_as_much_as_is_promised(k):
    """1 - (1 - 1/k)^k of what any rule could take from k draws, and never less than one draw gives."""
    for p, q in pairs():
        tokens, prob = (np.array(d) for d in zip(*draws("k_seq", q, k), strict=True))
        same = lambda d, n=len(tokens): np.broadcast_to(d, (n, 5))
        law = law64("k_seq", same(p), same(q), tokens, np.ones(tokens.shape, bool))
        taken = prob @ (1 - np.prod(1 - law.accept, axis=1))
        assert taken >= (1 - (1 - 1 / k) ** k) * np.minimum(k * q, p).sum() - 1e-9
        assert taken >= np.minimum(q, p).sum() - 1e-9
        assert taken <= np.minimum(1 - (1 - q) ** k, p).sum() + 1e-9
        if k == 1:  # one draft: Leviathan's rule
            plain = law64("independent", same(p), same(q), tokens, np.ones(tokens.shape, bool))
            drawn = prob > 0
            np.testing.assert_allclose(law.accept[drawn], plain.accept[drawn], atol=TINY)
            reached = (drawn & (law.accept[:, 0] < 1))[:, None]
            np.testing.assert_allclose(law.rest * reached, plain.rest * reached, atol=1e-9)


# -------------------------------------------------------------------------------------------------------- whole trees
V = 3
SPINE = [-1, 0, 0, 1, 1, 3, 3]  # two children at three nodes, three deep
FULL = [-1, 0, 0, 1, 1, 2, 2]
CHAIN = [-1, 0, 1, 2]
TWO_CHAINS = [-1, 0, 1, 2, 0, 4, 5]
THREE_CHAINS = [-1, 0, 1, 0, 3, 0, 5]


@functools.partial(jax.jit, static_argnames=("rule", "most"))
def look(rule, most, tree, alike, p, q):
    """The children of the nodes `alike`, and the law there."""
    kids = child_index(tree, alike, most)
    tokens = jnp.take_along_axis(tree.tokens, jnp.maximum(kids, 0), axis=1)
    law = (
        k_seq_law(p, q, tokens, kids >= 0) if rule == "k_seq" else rejection_law(p, q, tokens, kids >= 0, proposal=rule)
    )
    under = jnp.stack([children(tree, alike) & (tree.tokens == tokens[:, i : i + 1]) for i in range(most)])
    return kids, tokens, under, law


def tables(seed, depth):
    """For every prefix of each length, a distribution of what follows: [V^length, V]."""
    rng = np.random.default_rng(seed)
    return [rng.dirichlet(np.full(V, 0.7), size=V**n) for n in range(depth + 1)]


def every_tree(rule, parent, chains, q_tables):
    """All trees of a shape as a batch, and how likely each is drawn; of chosen ones, many, as if equally likely."""
    C = len(parent)
    depth, order = [0] * C, [0] * C
    for i in range(1, C):
        depth[i] = depth[parent[i]] + 1
        before = [j for j in range(1, i) if parent[j] == parent[i]]
        order[i] = order[parent[i]] if chains and parent[i] else len(before)
    families = [[i for i in range(C) if parent[i] == u] for u in range(C)]
    rows = [([0] + [-1] * (C - 1), [0] * C, 1.0)]  # tokens, each node's prefix as a number, probability
    for u, kids in enumerate(families):
        grown = []
        for tokens, code, prob in rows if kids else []:
            for drawn, w in draws(rule, q_tables[depth[u]][code[u]], len(kids)):
                new, codes = list(tokens), list(code)
                for i, x in zip(kids, drawn, strict=True):
                    new[i], codes[i] = x, code[u] * V + x
                grown.append((new, codes, prob * w))
        rows = grown or rows
    B = len(rows)
    every = lambda row: np.broadcast_to(np.array(row, np.int32), (B, C))
    tokens, prob = np.array([t for t, _, _ in rows], np.int32), np.array([w for _, _, w in rows])
    tree = DraftTree(tokens, every(parent), every(depth), every(order), np.ones((B, C), bool))
    return tree, prob / B if rule == "chosen" else prob


CASES = [
    *((rule, shape, False) for rule in RULES[1:3] for shape in (SPINE, FULL)),
    ("chosen", SPINE, False),
    *((rule, CHAIN, False) for rule in ("chosen", "independent", "k_seq")),
    *((rule, shape, True) for rule in ("independent", "k_seq") for shape in (TWO_CHAINS, THREE_CHAINS)),
]


@pytest.mark.parametrize(("rule", "parent", "chains"), CASES)
def test_whole_trees_keep_the_joint_law_of_the_target(rule, parent, chains):
    most = max(parent.count(u) for u in range(len(parent)))
    target, q_tables = tables(1, 4), tables(2, 4)
    tree, prob = every_tree(rule, parent, chains, q_tables)
    B, C = tree.tokens.shape
    levels = int(tree.depth.max())
    ended = [np.zeros(V**n) for n in range(levels + 2)]  # mass of walks that end with these tokens

    def walk(alike, code, weight, depth):
        at_node = look(rule, most, tree, alike, target[depth][code], q_tables[depth][code])
        kids, tokens, under, law = jax.device_get(at_node)
        for i in range(most):
            if (kids[:, i] >= 0).any() and depth < levels:
                walk(under[i], code * V + tokens[:, i], weight * law.accept[:, i], depth + 1)
            weight = weight * (1 - law.accept[:, i])
        np.add.at(ended[depth + 1], code[:, None] * V + np.arange(V)[None], weight[:, None] * law.rest)

    with x64():
        walk(np.arange(C)[None] == np.zeros((B, 1)), np.zeros(B, np.int64), prob, 0)
    got = want = np.ones(1)
    for n in range(levels + 1):
        got = (got[:, None] * target[n]).reshape(-1) * (n > 0) + ended[n + 1]
        want = (want[:, None] * target[n]).reshape(-1)
    assert abs(prob.sum() - 1) < TINY
    assert 0.5 * np.abs(got - want).sum() < 1e-9
    assert ended[levels + 1].sum() > 0.02  # walks do reach the leaves


# --------------------------------------------------------------------------------------------------------- the draws
GROUPS, EACH = 6, 4096
WORDS = 6


def p_value(count, expected):
    """Of Pearson's chi-square; cells expected to hold fewer than 10 are merged, and impossible ones must be empty."""
    assert count[expected < 1e-6].sum() == 0
    small = expected < 10
    assert (~small).sum() >= 2
    count, expected = (np.append(d[~small], d[small].sum()) for d in (count, expected))
    count, expected = count[expected > 1e-6], expected[expected > 1e-6]
    statistic = ((count - expected) ** 2 / expected).sum()
    return float(jax.scipy.special.gammaincc((len(count) - 1) / 2, statistic / 2))


@functools.cache
def make_nodes(rule):
    """In each group the walk stands at the same place of another tree; seed and sample tell its rows apart.

    The tree: 0 over 1, 2, 3, which for chains are 1 and 3 alike. 4 hangs on 1, 5 on 2, 6 on 3, and for trees all three
    on 1, in another order than they stand. Group 5 lacks a child.
    """
    rng = np.random.default_rng(3)
    B, chains = GROUPS * EACH, rule == "k_seq"
    group = np.repeat(np.arange(GROUPS), EACH)
    every = lambda row: np.broadcast_to(np.array(row), (B, len(row)))[group]
    order = [0, 0, 1, 2, 0, 1, 2] if chains else [0, 0, 1, 2, 2, 0, 1]
    p, q = (rng.dirichlet(np.full(WORDS, 1.5), size=s).astype(np.float32) for s in (GROUPS, (GROUPS, 4)))
    p[1, 3] = 0  # cut by top-k or the like
    drafts = np.argsort(p / q[:, 2], axis=1)[:, :3]  # what the target likes least, so that every child has its turn
    if rule in ("independent", "k_seq"):
        drafts[:3, 1] = drafts[:3, 0]
    kids = np.array([4, 6] if chains else [5, 6, 4])
    tokens = np.zeros((GROUPS, 7), np.int32)
    tokens[:, 1:4] = [5, 2, 5 if chains else 4]
    tokens[:, kids] = drafts[:, : len(kids)]
    valid = np.ones((GROUPS, 7), bool)
    valid[5, 6] = False
    tree = DraftTree(
        tokens=tokens[group],
        parent=every([-1, 0, 0, 0, 1, 2 if chains else 1, 3 if chains else 1]).astype(np.int32),
        depth=every([0, 1, 1, 1, 2, 2, 2]).astype(np.int32),
        order=every(order).astype(np.int32),
        valid=valid[group],
        q=None if rule == "chosen" else q[group],
        q_row=None if rule == "chosen" else every([0, 2, 1, 2, 3, 3, 3]).astype(np.int32),
    )
    rows = [(Sampling(temperature=1.0 if b % 16 else 0.0), b // 3, b % 3) for b in range(B)]
    with np.errstate(divide="ignore"):
        node = Node(
            tree=tree,
            at=np.ones(B, np.int32),
            alike=every([False, True, False, chains, False, False, False]),
            warped=np.log(p)[group],
            hidden=rng.normal(size=(B, 7, 4)).astype(np.float32),
            sampling=pack_sampling(rows, 0, WORDS),
            position=np.full(B, 11, np.int32),
        )
    laws = [
        by_hand(rule, p[g] / p[g].sum(dtype=np.float64), q[g, 2].astype(np.float64), tokens[g, kids], valid[g, kids])
        for g in range(GROUPS)
    ]
    return jax.tree.map(jnp.asarray, node), group, tokens[:, kids], kids, laws


def child_with(node, kids, token):
    """The first node among `kids` that guessed the token, -1 if none did."""
    tree, found = jax.device_get(node.tree), np.full(len(token), -1)
    for i in sorted(kids, reverse=True):
        found = np.where((tree.tokens[:, i] == token) & tree.valid[:, i], i, found)
    return found


RULE = {
    "chosen": rejection(3, "chosen"),
    "without_replacement": rejection(3, "without_replacement"),
    "independent": rejection(3, "independent"),
    "k_seq": k_seq(3),
    "coupled": coupled(),
}


@functools.partial(jax.jit, static_argnames="verifier")
def choose_next(verifier, node, params=None):
    return verifier.choose_next(params, node)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.slow
def test_draws_follow_the_law(rule):
    node, group, tokens, kids, laws = make_nodes(rule)
    choice = jax.device_get(choose_next(RULE[rule], node))
    sampled = np.asarray(node.sampling.temperature) > 0
    assert (choice.token.dtype, choice.child.dtype) == (np.int32, np.int32)
    for g, (accept, rest) in enumerate(laws):
        here = (group == g) & sampled
        reach, expected, count = here.sum(), [], []
        for i, child in enumerate(kids):
            took = here & (choice.child == child)
            assert (choice.token[took] == tokens[g, i]).all()
            expected.append(reach * accept[i])
            count.append(took.sum())
            reach = reach * (1 - accept[i])
        none = here & (choice.child == -1)
        expected, count = [*expected, *(reach * rest)], [*count, *np.bincount(choice.token[none], minlength=WORDS)]
        assert sum(count) == here.sum()
        assert p_value(np.array(count), np.array(expected)) > 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_greedy_rows_of_a_sampled_batch_take_the_mode(rule):
    """Whatever q says: their drafts were not drawn from it."""
    node, _, _, kids, _ = make_nodes(rule)
    q = None if node.tree.q is None else jnp.zeros_like(node.tree.q)
    node = node._replace(tree=node.tree._replace(q=q), warped=jax.random.normal(jax.random.key(0), node.warped.shape))
    choice, greedy = jax.device_get((choose_next(RULE[rule], node), node.sampling.temperature == 0))
    mode = np.argmax(node.warped, axis=1)
    np.testing.assert_array_equal(choice.token[greedy], mode[greedy])
    np.testing.assert_array_equal(choice.child[greedy], child_with(node, kids, mode)[greedy])
    assert set(choice.child[greedy].tolist()) == {-1, *kids.tolist()}


@pytest.mark.parametrize("rule", RULE)
def test_a_draw_depends_on_seed_sample_and_position_alone(rule):
    """And once one of them is another, the draw is a new one: two draws differ as often as independent ones do."""
    node, group, tokens, _, laws = make_nodes("chosen" if rule == "coupled" else rule)
    choice = jax.device_get(choose_next(RULE[rule], node))
    shuffled = np.random.default_rng(0).permutation(GROUPS * EACH)
    again = jax.device_get(choose_next(RULE[rule], jax.tree.map(lambda d: d[shuffled], node)))
    np.testing.assert_array_equal(again.token, choice.token[shuffled])
    np.testing.assert_array_equal(again.child, choice.child[shuffled])
    others = [
        node._replace(position=node.position + 1),
        node._replace(sampling=node.sampling._replace(seed=node.sampling.seed + 7)),
        node._replace(sampling=node.sampling._replace(sample_index=node.sampling.sample_index + 1)),
    ]
    if rule == "coupled":
        each = np.asarray(jax.nn.softmax(node.warped[::EACH]))
    else:
        each = [emitted(Law(*(np.array([d]) for d in law)), tokens[g : g + 1])[0] for g, law in enumerate(laws)]
    differ = np.array([1 - (law**2).sum() for law in each])[group]
    free = np.asarray(node.sampling.temperature) > 0
    for other in others:
        changed = np.asarray(choose_next(RULE[rule], other).token) != choice.token
        assert abs((changed - differ)[free].mean()) < 5 * 0.5 * free.sum() ** -0.5


def test_draws_do_not_use_the_noise_of_plain_decoding():
    """A drafter may share that noise, and must not know what it is judged by: the two agree as often as by chance."""
    node, group, *_ = make_nodes("chosen")
    bare = node._replace(tree=node.tree._replace(valid=node.tree.valid & (jnp.arange(7)[None] < 4)))
    token = np.asarray(choose_next(RULE["chosen"], bare).token)
    plain = np.asarray(choose(node.warped, node.sampling, node.position))
    sampled = (np.asarray(node.sampling.temperature) > 0) & (group == 0)
    p = np.exp(np.asarray(node.warped[0], np.float64))
    agree = (token == plain)[sampled].mean()
    assert abs(agree - (p**2).sum()) < 4 * (0.25 / sampled.sum()) ** 0.5


@pytest.mark.slow
def test_a_coin_of_zero_takes_no_child_that_the_target_refuses(monkeypatch):
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.zeros(shape))
    node, group, tokens, kids, laws = make_nodes("without_replacement")
    few = jax.tree.map(lambda d: d[group == 1][1:3], node)
    choice = jax.jit(lambda node: RULE["without_replacement"].choose_next(None, node))(few)  # traced anew
    accept, rest = laws[1]
    assert accept[0] == 0
    first = next((i for i, a in enumerate(accept) if a > 0), None)
    np.testing.assert_array_equal(choice.child, -1 if first is None else kids[first])
    assert (rest[choice.token] > 0).all() if first is None else (choice.token == tokens[1, first]).all()


def test_coupled_takes_the_token_of_plain_decoding():
    for rule in ("chosen", "k_seq"):
        node, _, _, kids, _ = make_nodes(rule)
        choice = jax.device_get(choose_next(coupled(), node))
        token = np.asarray(choose(node.warped, node.sampling, node.position))
        np.testing.assert_array_equal(choice.token, token)
        np.testing.assert_array_equal(choice.child, child_with(node, kids, token))
        assert set(choice.child.tolist()) == {-1, *kids.tolist()}


@pytest.mark.parametrize("rule", ["coupled", "chosen"])
def test_judge_overrules_refusals_of_children_it_finds_good(rule):
    node, _, _, _, _ = make_nodes("chosen")
    base, kids = RULE[rule], [5, 6, 4]  # as drawn
    verifier = judge(base, 3)
    assert not verifier.lossless
    assert base.lossless
    plain = jax.device_get(choose_next(base, node))
    weight = np.random.default_rng(1).normal(size=4).astype(np.float32)
    bias, tree = np.float32(-0.3), jax.device_get(node.tree)
    good = 1 / (1 + np.exp(-(np.asarray(node.hidden, np.float64) @ weight + bias)))
    for threshold in (0.0, 0.5, 1.0):
        params = {"weight": weight, "bias": bias, "threshold": np.float32(threshold)}
        choice = jax.device_get(choose_next(verifier, node, params))
        child = plain.child.copy()
        for i in kids:
            child = np.where((child < 0) & tree.valid[:, i] & (good[:, i] > threshold), i, child)
        token = np.where(plain.child < 0, np.take_along_axis(tree.tokens, np.maximum(child, 0)[:, None], 1)[:, 0], 0)
        token = np.where((plain.child < 0) & (child >= 0), token, plain.token)
        np.testing.assert_array_equal(choice.child, child)
        np.testing.assert_array_equal(choice.token, token)
        if threshold == 1:
            np.testing.assert_array_equal(choice.child, plain.child)
        if threshold == 0:
            np.testing.assert_array_equal(choice.child, np.where(plain.child < 0, 5, plain.child))


@pytest.mark.errors
@pytest.mark.parametrize("rule", RULES[1:])
def test_a_rule_that_needs_q_refuses_a_tree_without_one(rule):
    node, *_ = make_nodes("chosen")
    with pytest.raises(ValueError, match=r"without q; expected what its children were drawn from\. Let the drafter"):
        choose_next(RULE[rule], node)
