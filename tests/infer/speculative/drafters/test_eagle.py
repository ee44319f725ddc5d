"""Identity with plain decoding on random weights; the state after any step is what a fresh reading gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.infer.decode import RUNNING
from jaxaroo.infer.speculative import loop, verify
from jaxaroo.infer.speculative.drafters.eagle import make_drafter
from jaxaroo.models import eagle
from jaxaroo.models.decoder import forward, lm_head
from jaxaroo.models.eagle import EagleConfig

TREE = dict(nodes=14, beam=4, levels=3)


@functools.cache
def drafter_of(target):
    cfg = EagleConfig(target=target)
    return cfg, eagle.init_params(cfg, jax.random.key(3))


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("llama", "shared"),
        pytest.param("window", "shared", marks=pytest.mark.proof),
        pytest.param("llama", "mode", marks=pytest.mark.proof),
        pytest.param("qwen3", "shared", marks=pytest.mark.proof),
    ],
)
@pytest.mark.slow
def test_output_is_that_of_plain_decoding_from_a_growing_tree(bench, name, draw):
    cfg, params = drafter_of(bench.targets[name])
    ran = bench.check_identity(make_drafter(cfg, draw=draw, **TREE), verify.coupled(), params, name=name)
    assert (ran.tally.emitted[:3, 2:].sum(1) > 0).any()  # some draft was right


@pytest.mark.proof
def test_output_is_that_of_plain_decoding_from_a_static_tree(bench):
    cfg, params = drafter_of(bench.targets["llama"])
    bench.check_identity(make_drafter(cfg, tree="static", draw="shared"), verify.coupled(), params)


@pytest.mark.proof
def test_one_row_alone(bench):
    cfg, params = drafter_of(bench.targets["llama"])
    bench.check_identity(make_drafter(cfg, draw="shared", **TREE), verify.coupled(), params, only=1)


@pytest.mark.slow
def test_draws_without_replacement_are_judged_by_what_they_were_drawn_from(bench):
    cfg, params = drafter_of(bench.targets["llama"])
    drafter = make_drafter(cfg, tree="static", draw="without_replacement")
    ran = bench.drafted(drafter, verify.rejection(4, "without_replacement"), params)
    assert ran.lines[0] == bench.plain().lines[0]  # greedy rows stay greedy
    assert ran.tally.emitted[1, 2:].sum() > 0


@pytest.mark.parametrize("steps", [0, 1, 2, 6])
@pytest.mark.slow
def test_the_state_is_what_a_fresh_reading_of_the_text_gives(bench, steps):
    """True features and the tokens behind them, in one pass as training makes it: what is trained is served."""
    target = bench.targets["llama"]
    cfg, params = drafter_of(target)
    weights = bench.weights("llama")
    state = bench.drafted(make_drafter(cfg, draw="shared", **TREE), verify.coupled(), params, steps=steps).state
    tokens = jnp.asarray(state.rows.tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)

    @jax.jit
    def fresh(tokens):
        features = forward(target, weights, tokens, positions).hidden
        following = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
        cache = eagle.new_cache(cfg, tokens.shape[0], tokens.shape[1])
        return eagle.forward(cfg, params, weights, features, following, positions, None, cache)

    want = fresh(tokens)
    for row in np.flatnonzero(np.asarray(state.rows.status) == RUNNING):
        filled = state.rows.filled[row]
        pairs = int(filled) - 1
        assert state.drafter.cache.length[row] == pairs
        np.testing.assert_allclose(state.drafter.last[row, 0], want.hidden[row, pairs - 1], atol=2e-5)
        mine, theirs = state.drafter.cache.layers[0], want.cache.layers[0]
        np.testing.assert_allclose(mine.k[row, :pairs], theirs.k[row, :pairs], atol=2e-5)
        np.testing.assert_allclose(mine.v[row, :pairs], theirs.v[row, :pairs], atol=2e-5)


@pytest.mark.slow
def test_every_node_hangs_where_an_uncached_reading_of_its_path_puts_it(bench):
    """Children are the likeliest tokens behind the pairs of the text and of the path, one behind the other."""
    target = bench.targets["llama"]
    cfg, params = drafter_of(target)
    weights, drafter = bench.weights("llama"), make_drafter(cfg, draw="mode", nodes=137, beam=8, levels=3)  # all of it
    tokens, rows = bench.pack()
    state = loop.prefill(target, loop.Weights(weights, params, ()), drafter, tokens, rows, chunk=16)
    at = state.rows
    context = loop.Context(at.tokens, at.filled, at.status == 0, at.cache, rows.sampling, at.counts)
    tree, _, _ = jax.jit(drafter.propose)(weights, params, state.drafter, context)
    row, pairs, T = 2, int(at.filled[2]) - 1, 16
    text = at.tokens[row : row + 1, : T + 1]
    positions = jnp.arange(T)[None]
    true = forward(target, weights, text[:, :T], positions).hidden

    @jax.jit
    def say(features, following):
        hidden = eagle.forward(cfg, params, weights, features, following, positions).hidden
        return hidden, lm_head(target, weights, hidden)

    @functools.cache
    def behind(path):
        """Feature and logits behind a path, its guessed features put where true ones would stand."""
        features, following = true, text[:, 1:]
        for i, token in enumerate(path):
            guessed = say(features, following)[0][:, pairs - 1 + i]
            features = features.at[:, pairs + i].set(guessed)
            following = following.at[:, pairs + i].set(token)
        return say(features, following)[1][0, pairs - 1 + len(path)]

    paths, seen = [()], 0
    for node in range(1, drafter.nodes):
        parent = paths[int(tree.parent[row, node])]
        ranked = jnp.argsort(-behind(parent))
        assert tree.tokens[row, node] == ranked[tree.order[row, node]]
        paths.append((*parent, int(tree.tokens[row, node])))
        seen += len(parent) > 1
    assert seen > 1  # nodes of the third level, which hang on guesses of guesses


def test_settings_are_traced(bench):
    """Temperatures, seeds and cuts change; nothing compiles again."""
    cfg, params = drafter_of(bench.targets["llama"])
    drafter = make_drafter(cfg, draw="shared", **TREE)
    bench.drafted(drafter, verify.coupled(), params)
    before = loop.decode._cache_size(), loop.prefill._cache_size()
    packed = bench.pack(bench.prompts[::-1], bench.samplings[::-1], [9, 8, 7, 6])
    bench.drafted(make_drafter(cfg, draw="shared", **TREE), verify.coupled(), params, packed=packed)
    assert (loop.decode._cache_size(), loop.prefill._cache_size()) == before


@pytest.mark.errors
def test_refusals(bench):
    cfg, _ = drafter_of(bench.targets["llama"])
    with pytest.raises(ValueError, match="would bias the output"):
        make_drafter(cfg, draw="without_replacement")
    with pytest.raises(ValueError, match="expected 'mode', 'shared' or 'without_replacement'"):
        make_drafter(cfg, tree="static", draw="independent")
    with pytest.raises(ValueError, match="expected 2 to 5 nodes"):
        make_drafter(cfg, nodes=6, beam=4, levels=1)
    with pytest.raises(ValueError, match="expected"):
        loop.check(make_drafter(cfg, **TREE), verify.rejection(4, "without_replacement"))
