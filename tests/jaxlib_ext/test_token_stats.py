"""Oracles: float64 NumPy for values, JAX's own derivative of the dense form for gradients, the compiler for memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxaroo.jaxlib_ext import logit_tiles as module
from jaxaroo.jaxlib_ext.logit_tiles import Layout
from jaxaroo.jaxlib_ext.token_stats import TokenStats, reference, token_stats

N, D, V = 37, 16, 101
TRANSFORMS = [{}, {"softcap": 3.0}, {"scale": 0.5, "softcap": 2.0, "temperature": 0.7}, {"temperature": 2.5}]
TILES = [(37, 101), (8, 16), (7, 100), (1, 1), (1000, 1000)]


def inputs(dtype=jnp.float32, spread=1.0):
    h, w, y = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(h, (N, D)).astype(dtype) * jnp.asarray(spread, dtype)
    return hidden, jax.random.normal(w, (V, D)).astype(dtype), jax.random.randint(y, (N,), 0, V)


def oracle(hidden, head, targets, scale=1.0, softcap=None, temperature=1.0):
    """Loops in float64, a token at a time."""
    rows = []
    for h, y in zip(np.float64(hidden), targets, strict=True):
        z = scale * np.float64(head) @ h
        z = (z if softcap is None else softcap * np.tanh(z / softcap)) / temperature
        lse = z.max() + np.log(np.exp(z - z.max()).sum())
        p = np.exp(z - lse)
        rows.append((z[y] - lse, lse, -(p * (z - lse)).sum(), y == z.argmax(), np.log((p * p).sum())))
    return TokenStats(*np.array(rows).T)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("tiles", TILES)
def test_values_match_the_float64_oracle(tiles, transform):
    args = inputs()
    got = token_stats(*args, token_tile=tiles[0], vocab_tile=tiles[1], want_sum_sq=True, **transform)
    want = oracle(*args, **transform)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


def test_the_dense_reference_is_the_oracle_too():
    args = inputs()
    got = reference(*args, want_sum_sq=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, oracle(*args))


def loss(form, cotangents, **options):
    """A different weight for every token of every result, so that no gradient can hide behind another."""

    def total(h, w, y):
        logp, lse, entropy, _, square = form(h, w, y, **options)
        stats = [s for s in (logp, lse, entropy, square) if s is not None]
        return sum(jnp.sum(c * s) for c, s in zip(cotangents, stats, strict=True))

    return total


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("tiles", [(8, 16), (37, 101), (10, 100)])
@pytest.mark.parametrize("part", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)])
def test_gradients_match_those_of_the_dense_form(part, tiles, transform):
    args = inputs()
    cotangents = [
        p * jax.random.normal(k, (N,)) for p, k in zip(part, jax.random.split(jax.random.key(1), 3), strict=True)
    ]
    tiled = loss(token_stats, cotangents, token_tile=tiles[0], vocab_tile=tiles[1], **transform)
    got = jax.jit(jax.grad(tiled, argnums=(0, 1)))(*args)
    want = jax.jit(jax.grad(loss(reference, cotangents, **transform), argnums=(0, 1)))(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), got, want)


def test_large_logits_stay_finite():
    args = inputs(spread=300.0)
    got = token_stats(*args, token_tile=8, vocab_tile=16, want_sum_sq=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-2), got, oracle(*args))
    grads = jax.grad(loss(token_stats, [jnp.ones(N)] * 3, token_tile=8, vocab_tile=16), argnums=(0, 1))(*args)
    assert all(bool(jnp.isfinite(g).all()) for g in grads)


def test_bfloat16_inputs_accumulate_in_float32():
    args = inputs(jnp.bfloat16)
    got = token_stats(*args, token_tile=8, vocab_tile=16, want_sum_sq=True)
    assert [s.dtype for s in got] == [jnp.float32] * 5
    exact = tuple(np.asarray(a, np.float32) for a in args[:2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, oracle(*exact, args[2]))
    gh, gw = jax.grad(loss(token_stats, [jnp.ones(N)] * 3, token_tile=8, vocab_tile=16), argnums=(0, 1))(*args)
    assert (gh.dtype, gw.dtype) == (jnp.bfloat16, jnp.bfloat16)


@pytest.mark.parametrize("form", [reference, functools.partial(token_stats, token_tile=8, vocab_tile=16)])
def test_the_sum_of_squares_gets_no_gradient_and_leaves_that_of_the_others(form):
    args, cotangents = inputs(), [jax.random.normal(k, (N,)) for k in jax.random.split(jax.random.key(1), 4)]
    grads = lambda *given, **options: jax.jit(jax.grad(loss(*given, **options), argnums=(0, 1)))(*args)
    none = grads(form, [jnp.zeros(N)] * 3 + cotangents[3:], want_sum_sq=True)
    assert all(not np.any(g) for g in none)
    with_it, without = grads(form, cotangents, want_sum_sq=True), grads(form, cotangents[:3])
    assert all(np.any(g) for g in without)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), with_it, without)


def test_the_sum_of_squares_goes_from_one_over_the_vocabulary_to_one_and_only_to_who_asks():
    """Of equal logits, and of one that stands out: the probabilities of the others vanish in float32."""
    hidden, head = jnp.asarray([[0.0], [200.0]]), jnp.zeros((V, 1)).at[V - 2].set(1.0)
    options = dict(token_tile=1, vocab_tile=16)
    got = token_stats(hidden, head, jnp.zeros(2, jnp.int32), want_sum_sq=True, **options)
    np.testing.assert_allclose(got.log_sum_sq, [-np.log(V), 0.0], rtol=0, atol=1e-6)
    assert token_stats(hidden, head, jnp.zeros(2, jnp.int32), **options).log_sum_sq is None


@pytest.mark.parametrize("form", [reference, functools.partial(token_stats, token_tile=8, vocab_tile=16)])
def test_greedy_is_the_most_likely_token_and_moves_nothing(form):
    """Half of the targets are the most likely token, and others come near: so says argmax in float64."""
    hidden, head, _ = inputs()
    order = np.argsort(np.float64(hidden) @ np.float64(head).T, axis=1)
    targets = jnp.asarray(np.where(np.arange(N) % 2, order[:, -1], order[:, -2]))
    np.testing.assert_array_equal(form(hidden, head, targets).greedy, np.arange(N) % 2)
    same = form(hidden, jnp.ones_like(head), targets).greedy  # a tie is no miss
    np.testing.assert_array_equal(same, np.ones(N))
    grads = jax.grad(lambda h, w: form(h, w, targets).greedy.sum(), argnums=(0, 1))(hidden, head)
    assert not any(np.any(g) for g in grads)


def test_memory_is_that_of_tiles():
    """At 8192 tokens and Qwen's vocabulary the compiler's own count of temporaries: the dense form needs 10.7 GiB."""
    shapes = [((8192, 2048), jnp.bfloat16), ((151_936, 2048), jnp.bfloat16), ((8192,), jnp.int32)]
    args = [jax.ShapeDtypeStruct(*s) for s in shapes]
    step = jax.jit(jax.value_and_grad(lambda h, w, y: token_stats(h, w, y).logp.sum(), argnums=(0, 1)))
    assert step.lower(*args).compile().memory_analysis().temp_size_in_bytes <= 2.2 * 2**30


MASKS = [np.zeros(N, bool), np.ones(N, bool), np.arange(N) % 3 == 1, np.arange(N) == N - 1, np.arange(N) < 16]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("tiles", [(8, 16), (37, 101), (5, 100)])
def test_a_mask_leaves_out_tokens_their_values_and_their_gradients(tiles, mask):
    args, options = inputs(), dict(token_tile=tiles[0], vocab_tile=tiles[1])
    poisoned = (jnp.where(mask[:, None], args[0], jnp.nan), *args[1:])  # nobody looks at them
    masked = lambda h, w, y, **more: token_stats(h, w, y, jnp.asarray(mask), **options, **more)
    got, want = masked(*poisoned, want_sum_sq=True), oracle(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, np.where(mask, b, 0), atol=2e-5), got, want)
    cotangents = [jax.random.normal(k, (N,)) for k in jax.random.split(jax.random.key(1), 3)]
    grads = jax.jit(jax.grad(loss(masked, cotangents), argnums=(0, 1)))(*poisoned)
    only = [jnp.where(mask, c, 0.0) for c in cotangents]
    wanted = jax.jit(jax.grad(loss(reference, only), argnums=(0, 1)))(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5), grads, wanted)


@pytest.mark.parametrize(("number", "tiles"), [(0, 0), (1, 1), (8, 1), (9, 2), (37, 5)])
@pytest.mark.slow
def test_tiles_without_a_token_are_skipped(number, tiles, monkeypatch):
    """By the calls of what computes a tile, where loops are Python's."""
    made, compute = [], module.logits_tile
    monkeypatch.setattr(module, "logits_tile", lambda *args: made.append(1) or compute(*args))
    h, w, y = inputs()
    mask = jnp.asarray(np.random.default_rng(0).permutation(N) < number)
    with jax.disable_jit():
        stats = functools.partial(token_stats, token_tile=8, vocab_tile=26, impl="xla")
        stats(h, w, y, mask)
        assert len(made) == 4 * tiles
        jax.grad(lambda h: stats(h, w, y, mask).logp.sum())(h)
    assert len(made) == 3 * 4 * tiles


def test_more_dimensions_of_tokens_are_as_one():
    h, w, y = inputs()
    flat = token_stats(h[:36], w, y[:36], jnp.arange(36) % 2 == 0, want_sum_sq=True)
    mask = (jnp.arange(36) % 2 == 0).reshape(2, 3, 6)
    cut = token_stats(h[:36].reshape(2, 3, 6, D), w, y[:36].reshape(2, 3, 6), mask, want_sum_sq=True)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.reshape(-1), b), cut, flat)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("shape", "tokens", "vocab"),
    [((8,), ("a", None), None), ((2, 4), ("a", None), "b"), ((2, 2, 2), ("a", "b"), "c"), ((2, 4), (None, "a"), "b"),
     ((8,), (None, None), "a"), ((2, 4), (("a", "b"), None), None), ((2, 4), (None, None), ("a", "b"))],
)  # fmt: skip
def test_each_device_does_its_own_part(shape, tokens, vocab, masked):
    """Oracle: one device. Masks differ from device to device, so some skip what others do not."""
    rng = np.random.default_rng(1)
    h, w = rng.normal(size=(8, 6, D)).astype(np.float32), rng.normal(size=(104, D)).astype(np.float32)
    order, mask = np.argsort(h @ w.T, axis=-1), jnp.asarray(rng.random((8, 6)) < np.linspace(0, 1, 8)[:, None])
    y = np.where(np.arange(6) % 2, order[..., -1], order[..., -2])  # the second best may be the best of its device
    cotangents = rng.normal(size=(3, 8, 6)).astype(np.float32)

    def total(h, w, layout):
        options = dict(token_tile=4, vocab_tile=16, softcap=4.0, want_sum_sq=True, layout=layout)
        stats = token_stats(h, w, y, mask if masked else None, **options)
        return sum(jnp.sum(c * s) for c, s in zip(cotangents, stats, strict=False)), stats

    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True), static_argnums=2)
    (_, want), wanted = step(h, w, None)
    axes = "abc"[: len(shape)]
    mesh = jax.make_mesh(shape, tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
    with jax.set_mesh(mesh):
        (_, got), gradients = step(h, w, Layout(PartitionSpec(*tokens), vocab))  # the sum's terms are compared instead
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    jax.tree.map(same, (got, gradients), (want, wanted))


@pytest.mark.errors
def test_shapes_and_settings_that_cannot_be_are_refused():
    h, w, y = inputs()
    with pytest.raises(ValueError, match=r"hidden \(37, 15\), head \(101, 16\)"):
        token_stats(h[:, :-1], w, y)
    with pytest.raises(ValueError, match=r"mask \(36,\), targets \(37,\)"):
        token_stats(h, w, y, jnp.ones(N - 1, bool))
    for nothing in ([h[:0], w, y[:0]], [h, w[:0], y], [h[:, :0], w[:, :0], y]):
        with pytest.raises(ValueError, match=r"token_stats: hidden \(\d+, \d+\), head .* expected something of each"):
            token_stats(*nothing)
    with pytest.raises(ValueError, match="temperature=0"):
        token_stats(h, w, y, temperature=0)
    with pytest.raises(ValueError, match="softcap=-1"):
        token_stats(h, w, y, softcap=-1.0)
    with pytest.raises(ValueError, match="token_tile=8, vocab_tile=0; expected at least 1"):
        token_stats(h, w, y, token_tile=8, vocab_tile=0)
