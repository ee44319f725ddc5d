"""Oracles: loops over parents in Python, and plain logits of each node's own text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxaroo.infer.speculative import tree as trees
from jaxaroo.infer.speculative.tree import DraftTree, make_chain
from jaxaroo.models.cache import keep_path
from jaxaroo.models.decoder import DecoderConfig, Model, forward, init_params, lm_head, logits, new_cache
from jaxaroo.models.decoder import unstack_layers as unstacked

B, C, S, LEVELS, MOST = 3, 9, 24, 6, 4


# -------------------------------------------------------------------------------------------------------- tree shapes
@st.composite
def drawn_trees(draw):
    """Parents before children, at most MOST of them, at most LEVELS deep; some invalid; drawn in any order."""
    return make_tree(np.random.default_rng(draw(st.integers(0, 2**32 - 1))), draw(st.floats(0, 1)))


def make_tree(rng, reach=0.5, drop=0.15):
    """`reach` 0 makes chains, 1 bushes."""
    parent, depth, order = np.full((B, C), -1), np.zeros((B, C), int), np.zeros((B, C), int)
    valid = rng.random((B, C)) > drop
    valid[:, 0] = True
    for b in range(B):
        for i in range(1, C):
            room = [j for j in range(i) if depth[b, j] < LEVELS and (parent[b, :i] == j).sum() < MOST]
            parent[b, i] = rng.choice(room) if rng.random() < reach else max(room)
            depth[b, i] = depth[b, parent[b, i]] + 1
            valid[b, i] &= valid[b, parent[b, i]]
        for u in range(C):
            kids = np.flatnonzero(parent[b] == u)
            order[b, kids] = rng.permutation(MOST)[: len(kids)]  # places may stay empty
    fields = [d.astype(np.int32) for d in (rng.integers(0, 16, (B, C)), parent, depth, order)]
    return DraftTree(*fields, valid)


def path_to(tree, b, i):
    """From the root down."""
    path = [i]
    while tree.parent[b, path[0]] >= 0:
        path = [int(tree.parent[b, path[0]]), *path]
    return path


ancestors = jax.jit(trees.ancestors, static_argnames="levels")
tree_mask = jax.jit(trees.tree_mask, static_argnames=("capacity", "levels"))
slot_positions = jax.jit(trees.slot_positions, static_argnames="capacity")
child_index = jax.jit(trees.child_index, static_argnames="most")
children = jax.jit(trees.children)
chain_of = jax.jit(make_chain)
lengths = st.lists(st.integers(0, S), min_size=B, max_size=B)  # past S - C, part of the tree falls off the end


@settings(max_examples=30)
@given(tree=drawn_trees())
def test_ancestors_are_those_met_on_the_way_up(tree):
    want = np.zeros((B, C, C), bool)
    for b, i in np.ndindex(B, C):
        want[b, i, path_to(tree, b, i)] = True
    np.testing.assert_array_equal(ancestors(tree.parent, levels=LEVELS), want)
    np.testing.assert_array_equal(want.sum(2) - 1, tree.depth)


@pytest.mark.parametrize("levels", range(1, C))
def test_ancestors_reach_as_many_levels_as_asked(levels):
    """Of the longest chain that fits: as many squarings as that takes, and no fewer."""
    parent = np.where(np.arange(C) <= levels, np.arange(C) - 1, 0)[None].astype(np.int32)
    want = np.tril(np.ones((C, C), bool)) & (np.arange(C) <= levels)[:, None]
    want[levels + 1 :] = np.eye(C, dtype=bool)[levels + 1 :] | (np.arange(C) == 0)[None]
    np.testing.assert_array_equal(ancestors(parent, levels=levels)[0], want)


@settings(max_examples=30)
@given(tree=drawn_trees(), length=lengths)
def test_a_node_sees_what_is_committed_and_its_own_path(tree, length):
    want = np.zeros((B, C, S), bool)
    for b, i in np.ndindex(B, C):
        want[b, i, : length[b]] = True
        for j in path_to(tree, b, i):
            if tree.valid[b, j] and length[b] + j < S:
                want[b, i, length[b] + j] = True
    got = tree_mask(tree, np.array(length, np.int32), capacity=S, levels=LEVELS)
    np.testing.assert_array_equal(got, want)


@settings(max_examples=30)
@given(tree=drawn_trees(), length=lengths)
def test_slots_stand_at_the_positions_of_what_they_hold(tree, length):
    got = np.asarray(slot_positions(tree, np.array(length, np.int32), capacity=S))
    for b in range(B):
        np.testing.assert_array_equal(got[b, : length[b]], np.arange(length[b]))
        held = got[b, length[b] : length[b] + C]
        np.testing.assert_array_equal(held, (length[b] + tree.depth[b])[: len(held)])


@settings(max_examples=30)
@given(tree=drawn_trees(), picks=st.lists(st.booleans(), min_size=B * C, max_size=B * C))
def test_children_of_a_set_of_nodes(tree, picks):
    alike = np.array(picks).reshape(B, C)
    got = np.asarray(children(tree, alike))
    for b, i in np.ndindex(B, C):
        assert got[b, i] == bool(i > 0 and tree.valid[b, i] and alike[b, tree.parent[b, i]])


@settings(max_examples=30)
@given(tree=drawn_trees(), at=st.lists(st.integers(0, C - 1), min_size=B, max_size=B))
def test_children_stand_where_they_were_drawn(tree, at):
    got = child_index(tree, np.arange(C)[None] == np.array(at)[:, None], most=MOST)
    want = np.full((B, MOST), -1)
    for b, i in np.ndindex(B, C):
        if i and tree.parent[b, i] == at[b] and tree.valid[b, i]:
            want[b, tree.order[b, i]] = i
    np.testing.assert_array_equal(got, want)
    assert got.dtype == jnp.int32
    fewer = child_index(tree, np.arange(C)[None] == np.array(at)[:, None], most=2)  # those drawn later are left out
    np.testing.assert_array_equal(fewer, want[:, :2])


def test_children_of_doubles_keep_the_places_of_their_chains():
    parent, order = [-1, 0, 1, 0, 3, 0, 5], [0, 0, 0, 1, 1, 2, 2]  # three chains of two
    ints = lambda row: np.array([row], np.int32)
    tree = DraftTree(
        ints([9, 5, 1, 4, 2, 5, 3]), ints(parent), ints([0, 1, 2] * 2 + [1]), ints(order), ints(order) >= 0
    )
    doubles = np.array([[False, True, False, False, False, True, False]])  # the first and the third, which agree so far
    np.testing.assert_array_equal(child_index(tree, doubles, most=3), [[2, -1, 6]])


@settings(max_examples=30)
@given(values=st.lists(st.integers(0, 99), min_size=B * 5, max_size=B * 5), stop=st.lists(st.integers(0, 4)))
def test_a_chain_hangs_together_and_ends_at_its_first_invalid_guess(values, stop):
    tokens = np.array(values, np.int32).reshape(B, 5)
    valid = np.ones((B, 4), bool)
    for b, place in enumerate((stop * B)[: B if stop else 0]):
        valid[b, place : place + 1] = False
    q = np.random.default_rng(0).random((B, 4, 7)).astype(np.float32)
    tree = jax.device_get(chain_of(tokens[:, 0], tokens[:, 1:], valid, q=q))
    np.testing.assert_array_equal(tree.tokens, tokens)
    for b in range(B):
        np.testing.assert_array_equal(tree.parent[b], [-1, 0, 1, 2, 3])
        np.testing.assert_array_equal(tree.depth[b], [0, 1, 2, 3, 4])
        np.testing.assert_array_equal(tree.order[b], 0)
        alive = True
        for i in range(1, 5):
            alive = alive and bool(valid[b, i - 1])
            assert bool(tree.valid[b, i]) == alive
            np.testing.assert_array_equal(
                tree.q[b, tree.q_row[b, i - 1]], q[b, i - 1]
            )  # draft i was drawn from q[i - 1]
    assert {d.dtype for d in tree[:4]} == {jnp.dtype(jnp.int32)}
    assert tree.valid[:, 0].all()
    assert chain_of(tree.tokens[:, 0], tree.tokens[:, 1:], tree.valid[:, 1:]).q_row is None


def test_take_row_takes_each_rows_own():
    x = np.arange(24.0, dtype=np.float32).reshape(3, 4, 2)
    np.testing.assert_array_equal(trees.take_row(jnp.asarray(x), jnp.array([3, 0, 2])), x[[0, 1, 2], [3, 0, 2]])


# ------------------------------------------------------------------------------------------------- trees in a decoder
SIZES = dict(vocab_size=16, embed_dim=16, ffn_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
CONFIGS = {"full": DecoderConfig(**SIZES), "window": DecoderConfig(**SIZES, window=3, window_layers=(True, False))}
LENGTH = np.array([7, 1, S - C], np.int32)  # the last tree ends with the cache


@functools.cache
def make_model(name):
    params = init_params(CONFIGS[name], jax.random.key(1))
    return Model(CONFIGS[name], unstacked(jax.tree.map(lambda w: w * 1.5, params)))


@functools.partial(jax.jit, static_argnames=("cfg", "single"))
def judged(cfg, params, prefix, tree, single):
    """Prefill, then all nodes at once: their logits, and the cache with their rows written."""
    positions = jnp.broadcast_to(jnp.arange(S)[None], (B, S))
    cache = forward(cfg, params, prefix, positions, cache=new_cache(cfg, B, S)).cache
    cache = cache._replace(length=jnp.asarray(LENGTH))
    mask = None if single else trees.tree_mask(tree, cache.length, S, LEVELS)
    where = None if single else trees.slot_positions(tree, cache.length, S)
    out = forward(cfg, params, tree.tokens, cache.length[:, None] + tree.depth, mask, cache, key_positions=where)
    return lm_head(cfg, params, out.hidden), out.cache


def plain_logits(model, texts):
    """After the last token of each text, by a whole forward without a cache."""
    ids = np.zeros((B * C, S), np.int32)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    last = np.array([len(text) - 1 for text in texts])
    keep = np.arange(S)[None] < np.array([len(text) for text in texts] + [1] * (B * C - len(texts)))[:, None]
    return np.asarray(logits(model, ids, keep))[np.arange(len(texts)), last]


def make_prefix(rng):
    return rng.integers(0, 16, (B, S)).astype(np.int32)  # past LENGTH: rows that must never be seen


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.slow
def test_logits_at_a_node_are_those_of_its_text(name, seed):
    model, rng = make_model(name), np.random.default_rng(seed)
    prefix, tree = make_prefix(rng), make_tree(rng, reach=0.3 * seed + 0.2)
    got, _ = judged(*model, prefix, tree, False)
    nodes = [(b, i) for b, i in np.ndindex(B, C) if tree.valid[b, i]]
    texts = [[*prefix[b, : LENGTH[b]], *tree.tokens[b, path_to(tree, b, i)]] for b, i in nodes]
    np.testing.assert_allclose([got[b, i] for b, i in nodes], plain_logits(model, texts), atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.slow
def test_a_chain_needs_no_mask(name):
    model, rng = make_model(name), np.random.default_rng(7)
    prefix, tokens = make_prefix(rng), rng.integers(0, 16, (B, LEVELS + 1)).astype(np.int32)
    tree = chain_of(tokens[:, 0], tokens[:, 1:], np.ones((B, LEVELS), bool))
    one, _ = judged(*model, prefix, tree, True)
    two, _ = judged(*model, prefix, tree, False)
    np.testing.assert_allclose(one, two, atol=1e-5)


@functools.partial(jax.jit, static_argnames="cfg")
def after(cfg, params, cache, path, kept, token):
    cache = keep_path(cache, path)
    cache = cache._replace(length=cache.length + kept)
    out = forward(cfg, params, token[:, None], cache.length[:, None], cache=cache)
    return lm_head(cfg, params, out.hidden)[:, 0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.slow
def test_what_follows_a_kept_path_is_as_if_it_had_been_read(name, seed):
    """Also from the root alone, and where the path's rows overlap those they move to."""
    model, rng = make_model(name), np.random.default_rng(10 + seed)
    prefix, tree = make_prefix(rng), make_tree(rng, drop=0)
    _, cache = judged(*model, prefix, tree, False)
    leaves = [int(np.argmax(tree.depth[0])), int(rng.integers(C)), 0 if seed == 0 else C - 1]
    paths = [path_to(tree, b, leaf) for b, leaf in enumerate(leaves)]
    padded = np.array([p + p[-1:] * (LEVELS + 1 - len(p)) for p in paths], np.int32)
    kept, token = np.array([len(p) for p in paths], np.int32), rng.integers(0, 16, B).astype(np.int32)
    got = after(*model, cache, padded, kept, token)
    texts = [[*prefix[b, : LENGTH[b]], *tree.tokens[b, paths[b]], token[b]] for b in range(B)]
    np.testing.assert_allclose(got, plain_logits(model, texts), atol=1e-4)
