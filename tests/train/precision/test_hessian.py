"""Oracles: quadratics whose Hessian is given, and `jax.hessian` of small networks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.models.decoder import DecoderConfig, init_params, unstack_layers
from jaxaroo.train.data.pipeline import Batch
from jaxaroo.train.objectives.sft import make_loss
from jaxaroo.train.precision.hessian import hessian_trace

SHAPES = {"embed": (3,), "a": (2, 2, 2), "b": (2, 3)}  # 3 + 8 + 6 parameters; of a and b each layer is a block
RNG = np.random.default_rng(0)
HALF = RNG.normal(size=(17, 17))
FULL = (HALF + HALF.T) / 2 + 4 * np.eye(17)  # couples everything with everything
BLOCKS = {"embed": [[0, 1, 2]], "a": [range(3, 7), range(7, 11)], "b": [range(11, 14), range(14, 17)]}
PATH = {"embed": "embed", "a": "layers/a", "b": "layers/b"}


def quadratic(H):
    def loss(params):
        layers = params["layers"]
        if isinstance(layers, tuple):
            layers = jax.tree.map(lambda *x: jnp.stack(x), *layers)
        x = jnp.concatenate([params["embed"].ravel(), layers["a"].ravel(), layers["b"].ravel()])
        return 0.5 * x @ jnp.asarray(H, jnp.float32) @ x + x.sum()

    return loss


@functools.cache
def start():
    draw = lambda name: jnp.asarray(RNG.normal(size=SHAPES[name]), jnp.float32)
    return {"embed": draw("embed"), "layers": {"a": draw("a"), "b": draw("b")}}


def exact(H, name):
    """Trace and variance of one sample of each block of a name."""
    trace, variance = [], []
    for block in map(list, BLOCKS[name]):
        inside, others = H[np.ix_(block, block)], [i for i in range(17) if i not in block]
        trace.append(np.trace(inside))
        upper = inside[np.triu_indices(len(block), 1)]
        variance.append(4 * (upper**2).sum() + (H[np.ix_(block, others)] ** 2).sum())
    return (trace[0], variance[0]) if name == "embed" else (np.array(trace), np.array(variance))


@functools.cache
def many():
    """One estimate from many samples."""
    run = jax.jit(lambda p, key: hessian_trace(quadratic(FULL), p, key, samples=20_000, tolerance=0))
    return run(start(), jax.random.key(0))


def test_a_diagonal_hessian_is_exact_at_once():
    H = np.diag(np.arange(17.0) - 5)
    found = jax.jit(lambda p, key: hessian_trace(quadratic(H), p, key, least=2))(start(), jax.random.key(1))
    for name in SHAPES:
        np.testing.assert_allclose(found.trace[PATH[name]], exact(H, name)[0], rtol=1e-5, atol=1e-5)
        assert (np.asarray(found.error[PATH[name]]) < 1e-5).all()
    assert int(found.samples) == 2


def test_what_couples_layers_vanishes_in_the_mean_and_the_error_says_how_slowly():
    found = many()
    assert int(found.samples) == 20_000
    for name in SHAPES:
        trace, variance = exact(FULL, name)
        assert found.trace[PATH[name]].shape == np.shape(trace)
        want = np.sqrt(variance / 20_000)
        np.testing.assert_allclose(found.error[PATH[name]], want, rtol=0.05)
        assert (abs(found.trace[PATH[name]] - trace) < 3 * want).all()
        assert (want < 0.02 * abs(trace)).all()


def test_the_variance_of_an_estimate_falls_with_its_samples():
    """Over 200 estimates each, as the formula of a single sample divided by how many there are."""
    keys, params = jax.random.split(jax.random.key(2), 200), start()  # not made within `jit`, which would keep tracers
    for samples in (4, 32):
        one = lambda key, n=samples: hessian_trace(quadratic(FULL), params, key, samples=n, tolerance=0).trace
        found = jax.jit(jax.vmap(one))(keys)
        for name in SHAPES:
            got = np.var(np.asarray(found[PATH[name]]), axis=0)
            np.testing.assert_allclose(got, exact(FULL, name)[1] / samples, rtol=0.35)


@pytest.mark.slow
def test_sampling_ends_where_the_mean_hardly_moves():
    run = jax.jit(
        lambda p, key, tol, least: hessian_trace(quadratic(FULL), p, key, samples=500, tolerance=tol, least=least),
        static_argnums=(2, 3),
    )
    key, p = jax.random.key(3), start()
    loose, tight, never = (int(run(p, key, tol, 2).samples) for tol in (0.05, 0.005, 0.0))
    assert 2 <= loose < tight < never == 500
    assert int(run(p, key, 10.0, 25).samples) == 25
    flat = lambda blocks: np.concatenate([np.ravel(x) for x in blocks.values()])
    prefix = [hessian_trace(quadratic(FULL), p, key, samples=n, tolerance=0) for n in range(1, loose + 1)]
    means = [flat(found.trace) for found in prefix]  # of the same samples, more and more of them
    moved = [np.linalg.norm(b - a) / np.linalg.norm(b) for a, b in itertools.pairwise(means)]
    assert moved[-1] < 0.05
    assert all(m >= 0.05 for m in moved[:-1])
    each = [means[0], *((n + 2) * b - (n + 1) * a for n, (a, b) in enumerate(itertools.pairwise(means)))]
    for n in range(2, loose + 1):
        np.testing.assert_allclose(flat(prefix[n - 1].error), np.std(each[:n], axis=0, ddof=1) / np.sqrt(n), rtol=1e-3)
    assert np.isinf(flat(prefix[0].error)).all()  # one sample says nothing


def test_layers_as_a_tuple_are_the_same_layers():
    H = np.diag(np.arange(17.0) - 5)  # exact whatever the signs
    got = hessian_trace(quadratic(H), unstack_layers(start()), jax.random.key(1), samples=2, tolerance=0)
    for name in SHAPES:
        np.testing.assert_allclose(got.trace[PATH[name]], exact(H, name)[0], rtol=1e-5, atol=1e-5)


def test_groups_are_sums_and_what_is_in_none_is_held_still():
    groups = {"mine": "layers/a", "rest": "layers/.*"}
    run = lambda groups: jax.jit(
        lambda p, key: hessian_trace(quadratic(FULL), p, key, groups=groups, samples=4000, tolerance=0)
    )(start(), jax.random.key(4))
    found, both = run(groups), run({"both": "layers/[ab]"})
    a, b = exact(FULL, "a")[0], exact(FULL, "b")[0]
    assert found.trace.keys() == {"mine", "rest"}
    for got, want in ((found.trace["mine"], a), (found.trace["rest"], b), (both.trace["both"], a + b)):
        np.testing.assert_allclose(got, want, rtol=0.05)
    alone = jax.jit(lambda p, key: hessian_trace(quadratic(FULL), p, key, groups={"e": "embed"}, samples=2000))
    e = BLOCKS["embed"][0]
    variance = 4 * (FULL[np.ix_(e, e)][np.triu_indices(3, 1)] ** 2).sum()  # nothing from outside
    n = int(alone(start(), jax.random.key(5)).samples)
    np.testing.assert_allclose(alone(start(), jax.random.key(5)).error["e"], np.sqrt(variance / n), rtol=0.25)


def test_batches_are_averaged_and_integers_left_alone():
    H = np.stack([np.diag(np.arange(17.0)), np.diag(np.ones(17)), np.diag(-(np.arange(17.0) ** 2))])

    def loss(params, h):
        x = jnp.concatenate([params["embed"], params["layers"]["a"].ravel(), params["layers"]["b"].ravel()])
        return 0.5 * x @ h @ x * params["times"].astype(jnp.float32)

    params, batches = start() | {"times": jnp.int32(2)}, jnp.asarray(H, jnp.float32)
    found = hessian_trace(loss, params, jax.random.key(0), samples=2, batches=batches)
    assert found.trace.keys() == {*PATH.values()}
    for name in SHAPES:
        np.testing.assert_allclose(found.trace[PATH[name]], 2 * exact(H.mean(0), name)[0], rtol=1e-5)


def test_bfloat16_parameters_are_differentiated_in_float32():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), start())
    H = np.diag(1 + np.arange(17.0) / 1000)  # bfloat16 has no such numbers
    found = hessian_trace(quadratic(H), params, jax.random.key(0), samples=2)
    for name in SHAPES:
        np.testing.assert_allclose(found.trace[PATH[name]], exact(H, name)[0], rtol=1e-6)


@pytest.mark.slow
def test_a_network_agrees_with_the_hessian_that_is_formed():
    """Tanh layers in a scan, with an input and an output matrix."""
    rng = np.random.default_rng(5)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params, x, y = {"embed": draw(3), "layers": {"w": draw(2, 3, 3) / 2}}, draw(6, 3), draw(6)

    def loss(params):
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"]["w"])[0]
        return jnp.mean((h @ params["embed"] - y) ** 2)

    H = jax.hessian(loss)(params)
    w = np.asarray(H["layers"]["w"]["layers"]["w"], np.float64)
    want = [sum(w[layer, i, j, layer, i, j] for i in range(3) for j in range(3)) for layer in range(2)]
    run = jax.jit(lambda p, key: hessian_trace(loss, p, key, samples=10_000, tolerance=0))
    found = run(params, jax.random.key(0))
    assert (abs(np.asarray(found.trace["layers/w"]) - want) < 3 * np.asarray(found.error["layers/w"])).all()
    assert (np.asarray(found.error["layers/w"]) < 0.05 * np.abs(want)).all()
    assert float(found.trace["embed"]) == pytest.approx(np.trace(H["embed"]["embed"]), rel=0.05)


@pytest.mark.proof
def test_the_objective_of_a_decoder_has_a_trace():
    """Its log-probabilities have a backward pass of their own, which has to be differentiated forward."""
    cfg = DecoderConfig(vocab_size=7, embed_dim=4, ffn_dim=4, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2)
    params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(1))
    params = jax.tree.map(lambda w: 3 * w, params)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 7, (2, 5)), jnp.int32)
    ones = jnp.ones((2, 5), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32)[None], (2, 5))
    batch = Batch(tokens, jnp.roll(tokens, -1, 1), positions, ones, ones > 0, jnp.ones((2, 5)))
    objective = make_loss(cfg, remat="full")
    loss = lambda params: jnp.mean(objective(params, batch, None)[0]["nll"].value)

    def of_up(up):
        layers = params["layers"] | {"mlp": params["layers"]["mlp"] | {"up": up}}
        return loss(params | {"layers": layers})

    H = np.asarray(jax.jit(jax.jacfwd(jax.grad(of_up)))(params["layers"]["mlp"]["up"]), np.float64)
    want = [sum(H[layer, i, j, layer, i, j] for i in range(4) for j in range(4)) for layer in range(2)]
    run = jax.jit(lambda p, k: hessian_trace(loss, p, k, groups={"up": "layers/mlp/up"}, samples=3000, tolerance=0))
    found = run(params, jax.random.key(0))
    error = np.asarray(found.error["up"])
    assert (abs(np.asarray(found.trace["up"]) - want) < 3 * error).all()
    assert (3 * error < 0.5 * np.abs(want)).all()  # layers that change places, or a factor of two, would be seen


@pytest.mark.errors
def test_groups_without_leaves_or_half_in_layers_are_refused():
    run = functools.partial(hessian_trace, quadratic(FULL), start(), jax.random.key(0))
    with pytest.raises(ValueError, match=r"group 'q' has no leaf; .* The nearest to 'layers/attn' are layers/"):
        run(groups={"q": "layers/attn"})
    with pytest.raises(ValueError, match=r"group 'second' has no leaf; .*no earlier group matches"):
        run(groups={"first": "layers/.*", "second": "layers/a"})
    with pytest.raises(ValueError, match=r"group 'all' is '\.\*'; expected leaves in layers, or others, not both"):
        run(groups={"all": ".*"})
    for settings in ({"samples": 0}, {"tolerance": -1.0}):
        with pytest.raises(ValueError, match="hessian_trace: samples="):
            run(**settings)
