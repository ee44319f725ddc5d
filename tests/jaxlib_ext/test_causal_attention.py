"""Attention of rows to themselves. Oracles: loops in float64, and differentiation of scores that stand there whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.jaxlib_ext.causal_attention import causal_attention
from jaxaroo.jaxlib_ext.tree_attention import reference


def made(T, B=2, N=4, K=2, H=4, dtype=jnp.float32):
    """Queries, keys, values, a mask of several examples in the first row, and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, c = (jax.random.normal(key, (B, T, n, H), dtype) for key, n in zip(keys, (N, K, K, N), strict=True))
    at, of = jnp.arange(T), jnp.arange(T) // 90
    before = at[:, None] >= at[None]
    return q, k, v, jnp.stack([before & (of[:, None] == of[None]), *[before] * (B - 1)]), c


def gradients(f, q, k, v, mask, c):
    return jax.jit(jax.value_and_grad(lambda *x: (f(*x, mask) * c).astype(jnp.float32).sum(), argnums=(0, 1, 2)))(
        q, k, v
    )


def test_it_is_that_of_loops():
    q, k, v, mask, _ = made(130)
    got = np.asarray(jax.jit(causal_attention)(q, k, v, mask))
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    for b in range(2):
        for t in (0, 5, 89, 90, 127, 128, 129):
            seen = np.flatnonzero(np.asarray(mask[b, t]))
            for n in range(4):
                z = k[b, seen, n // 2] @ q[b, t, n] / 2.0
                p = np.exp(z - z.max())
                np.testing.assert_allclose(got[b, t, n], p @ v[b, seen, n // 2] / p.sum(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [300, 1, 127, 128, 129, 1100])
@pytest.mark.parametrize("whole", [False, True])
def test_values_and_gradients_are_those_of_whole_scores(length, whole):
    """Blocks of 128 and, of 1,100 rows, of 138."""
    got = gradients(functools.partial(causal_attention, whole=whole), *made(length))
    want = gradients(reference, *made(length))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6), got[1], want[1])


def test_products_are_in_half_and_sums_in_single():
    """Each product rounds its inputs to 8 bits: an error of some 2^-8 of what numbers are like."""
    q, k, v, mask, c = made(200, dtype=jnp.bfloat16)
    got = gradients(causal_attention, q, k, v, mask, c)
    assert [x.dtype for x in got[1]] == [jnp.bfloat16] * 3
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    want = gradients(reference, *wide, mask, c.astype(jnp.float32))
    for a, b in zip(got[1], want[1], strict=True):
        error = jnp.abs(a.astype(jnp.float32) - b)
        assert float(error.max() / jnp.abs(b).max()) < 0.02
    jaxpr = str(jax.make_jaxpr(lambda: jax.vjp(lambda *x: causal_attention(*x, mask), q, k, v)[1](c))())
    assert "preferred_element_type=float32" in jaxpr
    assert "preferred_element_type=bfloat16" not in jaxpr


def test_keys_of_another_type_get_gradients_of_theirs():
    q, k, v, mask, c = made(20)
    half = [x.astype(jnp.bfloat16) for x in (k, v)]
    dq, dk, dv = gradients(causal_attention, q, *half, mask, c)[1]
    assert (dq.dtype, dk.dtype, dv.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    want = gradients(causal_attention, q, *(x.astype(jnp.float32) for x in half), mask, c)[1]
    np.testing.assert_array_equal(dk, want[1].astype(jnp.bfloat16))
    np.testing.assert_array_equal(dv, want[2].astype(jnp.bfloat16))


def test_who_sees_nothing_has_an_output_and_moves_no_score():
    q, k, v, mask, c = made(10)
    mask = mask.at[1, 7:].set(False)
    (value, grads), (want, wanted) = (gradients(f, q, k, v, mask, c) for f in (causal_attention, reference))
    np.testing.assert_allclose(value, want, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, wanted)
    np.testing.assert_array_equal(grads[0][1, 7:], 0)


@pytest.mark.parametrize("far", [1.0, 1e4])
def test_large_scores_stay_finite(far):
    q, k, v, mask, c = made(40)
    (value, grads), (want, wanted) = (gradients(f, far * q, far * k, v, mask, c) for f in (causal_attention, reference))
    np.testing.assert_allclose(value, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * far), grads, wanted)


def test_curvature_is_that_of_whole_scores():
    """Forwards over backwards, as Hessians of a model are sampled."""
    q, k, v, mask, c = made(30)

    def moved(f):
        inner = jax.grad(lambda q, k, v: (f(q, k, v, mask) * c).sum(), argnums=(0, 1, 2))
        return jax.jit(lambda *x: jax.jvp(inner, x, (jnp.cos(q), jnp.sin(k), jnp.cos(v)))[1])(q, k, v)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), moved(causal_attention), moved(reference)
    )


@pytest.mark.parametrize("length", [256, 512])
def test_nothing_as_large_as_scores_is_kept(length):
    """Inputs, the output, and two numbers of each query and head."""
    q, k, v, mask, _ = made(length)
    kept = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(lambda *x: causal_attention(*x, mask), *x)[1], q, k, v))
    assert sum(x.size for x in kept if x.dtype != bool) == q.size + k.size + v.size + q.size + 2 * (2 * 4 * length)
    scores = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(lambda *x: reference(*x, mask), *x)[1], q, k, v))
    assert max(x.size for x in scores) == 2 * 4 * length**2


@pytest.mark.parametrize(("length", "share"), [(256, 0.75), (512, 0.625), (1024, 0.5625), (4096, 0.5625)])
def test_keys_behind_a_block_of_queries_are_not_multiplied(length, share):
    """By the compiler's count; the last block ends with the row, so of 8 blocks it is 9 / 16 of the whole."""
    shapes = [jax.ShapeDtypeStruct((1, length, 4, 32), jnp.float32)] * 3
    mask = jax.ShapeDtypeStruct((1, length, length), bool)
    flops = lambda f: jax.jit(f).lower(*shapes, mask).compile().cost_analysis()["flops"]
    whole = functools.partial(causal_attention, whole=True)
    assert flops(causal_attention) == pytest.approx(share * flops(whole), rel=0.02)


def test_gradients_leave_scores_as_they_lie():
    """Nothing as large as scores is transposed: they are what costs."""
    q, k, v, mask, c = made(256, H=32)
    compiled = jax.jit(lambda *x: jax.vjp(lambda *x: causal_attention(*x, mask), *x)[1](c)).lower(q, k, v).compile()
    lines = [line for line in compiled.as_text().splitlines() if " transpose(" in line or " copy(" in line]
    sizes = [int(np.prod([int(n) for n in line.split("[")[1].split("]")[0].split(",") if n])) for line in lines]
    assert lines
    assert max(sizes) <= q.size < 2 * 4 * 128 * 128


@pytest.mark.errors
def test_no_rows_are_refused():
    q, k, v, mask, _ = made(4)
    with pytest.raises(ValueError, match=r"causal_attention: q \(2, 0, 4, 4\); expected at least one row"):
        causal_attention(q[:, :0], k[:, :0], v[:, :0], mask[:, :0, :0])
