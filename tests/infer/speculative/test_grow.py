"""Oracle: the same trees grown by loops over lists, with a drafter whose logits are a function of the whole path.

What is read must be exactly the nodes that the loops read, with the right ancestors in view.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.infer.speculative.grow import EAGLE_1, Read, grow_dynamic, grow_static, static_shape

B, V, D = 2, 7, 4
RNG = np.random.default_rng(3)
TABLE = RNG.normal(size=(B, D * V, V)).astype(np.float32)
AHEAD = RNG.normal(size=(B, D * V, V)).astype(np.float32)
ROOT = jnp.array([5, 6], jnp.int32)


def code(path):
    """A path as a vector: one token a level, at most D."""
    out = np.zeros(D * V, np.float32)
    for level, token in enumerate(path):
        out[level * V + token] = 1
    return out


def logp(row, path, table=TABLE, coarse=None):
    z = (code(path) @ table[row]).astype(np.float32)
    if coarse:
        z = np.round(z / coarse) * coarse
    return np.asarray(jax.nn.log_softmax(jnp.asarray(z)))


def fake(table=TABLE, ahead=None, coarse=None):
    """A drafter whose feature is the path of the parent, so that a wrong feature or token gives wrong logits."""
    reads = []

    def say(paths):  # [B, K, D * V]
        out = np.einsum("bkp,bpv->bkv", paths, table).astype(np.float32)
        two = np.einsum("bkp,bpv->bkv", paths, ahead).astype(np.float32) if ahead is not None else None
        if coarse:
            out = np.round(out / coarse) * coarse

        def feature_of(row, token):
            return jnp.asarray(np.take_along_axis(paths, np.asarray(row)[..., None], axis=1))

        return Read(jnp.asarray(out), feature_of, None, None if two is None else jnp.asarray(two))

    def expand(carry, tokens, features, depth, seen):
        paths = np.array(features)
        for b in range(B):
            for k in range(paths.shape[1]):
                paths[b, k, (depth - 1) * V + int(tokens[b, k])] = 1
        reads.append((paths, np.asarray(seen)))
        return say(paths)

    return say(np.zeros((B, 1, D * V), np.float32)), expand, reads


def grown_by_loops(row, beam, levels, nodes, coarse=None, ahead=None):
    """Paths with scores, in the order of the pool; the best `nodes - 1` of them in that order; what was read."""
    order = lambda scores: sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    pool, level, read, level_above = [], [((), np.float32(0))], [], None
    for depth in range(1, levels + 1):
        found = []
        for i, (path, score) in enumerate(level):
            if ahead is not None and depth == levels:
                lp = logp(row, level_above[i], ahead)
            else:
                lp = logp(row, path, coarse=coarse)
                if path:
                    read.append(path)
            best = order(lp)[:beam]
            found += [((*path, t), np.float32(score + min(lp[t], np.float32(0)))) for t in best]
        pool += found
        kept = order([s for _, s in found])[:beam]
        level = [found[i] for i in kept]
        level_above = [p[:-1] for p, _ in level]
    chosen = sorted(order([s for _, s in pool])[: nodes - 1])
    return [pool[i][0] for i in chosen], read


def paths_of(tree, row):
    tokens, parent = np.asarray(tree.tokens[row]), np.asarray(tree.parent[row])
    paths = [()]
    for node in range(1, len(tokens)):
        assert parent[node] < node
        paths.append((*paths[parent[node]], int(tokens[node])))
    return paths[1:]


def check_reads(reads, wanted):
    """Every node was read with its own path, and saw the draft rows of its ancestors and itself."""
    for row in range(B):
        rows = [path for paths, _ in reads for path in paths[row]]
        assert [tuple(np.argmax(p.reshape(D, V)[: int(p.sum())], axis=1)) for p in rows] == wanted[row]
        at = 0
        for paths, seen in reads:
            for k, path in enumerate(paths[row]):
                for j in range(seen.shape[2]):
                    above = bool((rows[j] <= path).all())  # an ancestor's ones are among one's own
                    assert seen[row, k, j] == above
            at += paths.shape[1]
            assert seen.shape[2] == at


@pytest.mark.parametrize("coarse", [None, 2.0, 100.0], ids=["", "ties", "all ties"])
@pytest.mark.parametrize("nodes", [6, 14, 4 + 3 * 16 + 1])
@pytest.mark.slow
def test_the_most_probable_nodes_are_kept_and_their_parents_with_them(nodes, coarse):
    first, expand, reads = fake(coarse=coarse)
    tree, _ = grow_dynamic(
        ROOT, first, expand, lambda z, depth: jax.nn.log_softmax(z, -1), beam=4, levels=4, nodes=nodes
    )
    wanted = [grown_by_loops(row, 4, 4, nodes, coarse) for row in range(B)]
    for row in range(B):
        assert paths_of(tree, row) == wanted[row][0]
        paths = paths_of(tree, row)
        assert len(set(paths)) == len(paths)  # siblings differ
        assert [len(p) for p in paths] == np.asarray(tree.depth[row, 1:]).tolist()
        assert tree.tokens[row, 0] == ROOT[row]
        for node, path in enumerate(paths, 1):  # the place among its siblings: the rank of its probability
            ranks = np.argsort(-logp(row, path[:-1], coarse=coarse), kind="stable").tolist()
            assert tree.order[row, node] == ranks.index(path[-1])
    check_reads(reads, [read for _, read in wanted])


@pytest.mark.parametrize("levels", [2, 4])
def test_the_last_level_hangs_under_the_children_of_the_node_that_guessed_it(levels):
    first, expand, reads = fake(ahead=AHEAD)
    tree, _ = grow_dynamic(
        ROOT, first, expand, lambda z, depth: jax.nn.log_softmax(z, -1), beam=3, levels=levels, nodes=12
    )
    wanted = [grown_by_loops(row, 3, levels, 12, ahead=AHEAD) for row in range(B)]
    assert [paths_of(tree, row) for row in range(B)] == [kept for kept, _ in wanted]
    check_reads(reads, [read for _, read in wanted])
    assert len(reads) == levels - 2  # one reading less


def test_impossible_tokens_are_invalid_with_all_below_them():
    first, expand, _ = fake()
    only = jnp.where(jnp.arange(V)[None, None] < 2, 0.0, -jnp.inf)
    score = lambda z, depth: jax.nn.log_softmax(z + only, -1)
    tree, _ = grow_dynamic(ROOT, first, expand, score, beam=3, levels=2, nodes=10)
    for row in range(B):
        paths = paths_of(tree, row)
        assert np.asarray(tree.valid[row, 1:]).tolist() == [all(t < 2 for t in p) for p in paths]
        assert sum(all(t < 2 for t in p) for p in paths) == 6


@pytest.mark.parametrize("with_q", [False, True])
def test_a_static_tree_holds_the_ranks_of_its_shape(with_q):
    shape = static_shape("0 1 2 00 01 10 000 100")
    first, expand, reads = fake()
    tree, _ = grow_static(ROOT, first, expand, lambda z, depth, first: (z, z / 2), shape, with_q=with_q)
    for row in range(B):
        by_rank = {(): ()}
        for path in shape.paths:
            above = by_rank[path[:-1]]
            ranks = np.argsort(-logp(row, above), kind="stable")
            by_rank[path] = (*above, int(ranks[path[-1]]))
        assert paths_of(tree, row) == [by_rank[p] for p in shape.paths]
        assert np.asarray(tree.order[row, 1:]).tolist() == [p[-1] for p in shape.paths]
        if with_q:
            for node, path in enumerate(((), *shape.paths)):
                if path in shape.inner:
                    z = code(by_rank[path]) @ TABLE[row] / 2
                    np.testing.assert_allclose(
                        tree.q[row, tree.q_row[row, node]], jax.nn.softmax(jnp.asarray(z)), rtol=1e-5
                    )
    assert np.asarray(tree.valid).all()
    assert [paths.shape[1] for paths, _ in reads] == [2, 2]
    check_reads(reads, [[tuple(_tokens(row, p)) for p in shape.inner[1:]] for row in range(B)])


def _tokens(row, ranks):
    path = ()
    for rank in ranks:
        path = (*path, int(np.argsort(-logp(row, path), kind="stable")[rank]))
    return path


def test_the_first_eagle_tree_has_25_nodes_and_four_levels_of_inner_ones():
    assert len(EAGLE_1.paths) == 25
    assert [sum(len(p) == d for p in EAGLE_1.inner) for d in range(6)] == [1, 4, 4, 1, 1, 0]
    assert EAGLE_1.most == 4
    assert max(map(len, EAGLE_1.paths)) == 5


@pytest.mark.errors
@pytest.mark.parametrize("text", ["", "0 0", "1", "0 00 02", "00", "0 01"])
def test_a_shape_with_gaps_is_refused(text):
    with pytest.raises(ValueError, match="static_shape: found"):
        static_shape(text)
