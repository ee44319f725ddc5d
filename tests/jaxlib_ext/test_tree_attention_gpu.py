"""The kernel of GPUs against the loops of `test_tree_attention`: without a GPU run step by step, with one as it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.jaxlib_ext import dispatch
from jaxaroo.jaxlib_ext.tree_attention import dequantise, tree_attention
from jaxaroo.jaxlib_ext.tree_attention_gpu import Tiles, tiles_of
from jaxaroo.models.cache import quantise_rows
from tests.jaxlib_ext.for_gpus import lowered_for_cuda
from tests.jaxlib_ext.test_tree_attention import case, oracle

# B, T, S, N, K, H: ragged blocks, whole ones, one word of nodes or two, several tiles of queries.
CASES = {
    "one query": ((1, 1, 300, 4, 2, 64), {}),
    "whole blocks of two sequences": ((2, 7, 512, 6, 2, 64), {}),
    "two words of nodes and three tiles": ((1, 40, 200, 4, 1, 64), {}),
    "a soft cap": ((3, 5, 600, 4, 2, 64), {"softcap": 3.0}),
}


@functools.partial(jax.jit, static_argnames=("impl", "softcap"))
def attention(q, k, v, mask, impl="interpret-gpu", softcap=None):
    return tree_attention(q, k, v, mask, impl=impl, softcap=softcap)


@pytest.mark.parametrize("name", CASES)
def test_attention_is_that_of_loops(name):
    shape, settings = CASES[name]
    given = case(shape)
    got, want = attention(*given, **settings), oracle(*given, **settings)
    assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.slow
def test_codes_are_read_as_what_they_stand_for(bits):
    q, k, v, mask = case((2, 7, 300, 6, 2, 64))
    k, v = (quantise_rows(x * jnp.exp2(jnp.arange(300) % 5)[None, :, None, None], bits) for x in (k, v))
    want = oracle(q, *(dequantise(rows, 64, jnp.float32) for rows in (k, v)), mask)
    got = attention(q, k, v, mask)
    assert np.linalg.norm(got - want) <= 2e-6 * np.linalg.norm(want)


@pytest.mark.slow
def test_rows_that_nobody_sees_are_not_read():
    """In front of a window and behind the last row in use: NaN there is in no block that a program reads."""
    q, k, v, mask = case((1, 3, 1024, 4, 2, 64))
    mask = mask.at[:, :, :400].set(False).at[:, :, 700:].set(False)
    unseen = (jnp.arange(1024) < 384) | (jnp.arange(1024) >= 704)  # whole blocks of 64
    nothing = jnp.where(unseen[None, :, None, None], jnp.nan, 0.0)
    q, k, v, nothing = (x.astype(jnp.bfloat16) for x in (q, k, v, nothing))
    assert tiles_of(q, 1024, 2, None).rows == 64
    got = attention(q, k + nothing, v + nothing, mask)
    want = oracle(q, k, v, mask)
    assert np.linalg.norm(np.asarray(got, np.float64) - want) <= 1e-2 * np.linalg.norm(want)


def test_a_query_that_sees_nothing_gets_finite_numbers():
    q, k, v, mask = case((2, 3, 300, 4, 2, 64))
    np.testing.assert_array_equal(attention(q, k, v, jnp.zeros_like(mask)), jnp.zeros_like(q))
    got = attention(q, k, v, mask.at[0, 2].set(False))
    np.testing.assert_array_equal(got[0, 2], jnp.zeros_like(q[0, 2]))
    np.testing.assert_allclose(got[1], oracle(q, k, v, mask.at[0, 2, 0].set(True))[1], rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_reference():
    q, k, v, mask = case((1, 3, 150, 4, 2, 64))
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.float32)
    loss = lambda q, k, v, impl: jnp.sum(attention(q, k, v, mask, impl=impl) * weights)
    got, want = (jax.grad(loss, argnums=(0, 1, 2))(q, k, v, impl) for impl in ("interpret-gpu", "xla"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_shares_keep_a_gpu_busy_and_are_no_smaller_than_blocks():
    q = lambda B, T, H=128: jax.ShapeDtypeStruct((B, T, 32, H), jnp.bfloat16)
    assert tiles_of(q(1, 1), 32768, 8, None) == Tiles(16, 64, 33, 4, 3)
    assert tiles_of(q(16, 1), 4096, 8, None).parts == 4
    assert tiles_of(q(1, 1), 256, 8, None).parts == 4
    assert tiles_of(q(64, 8), 128, 8, None).parts == 1


@pytest.mark.slow
def test_programs_for_cuda_have_both_kernels():
    for T, S, bits in ((1, 4096, None), (40, 300, None), (8, 256, 8), (8, 256, 4)):
        q, k, v, mask = case((1, T, S, 32, 8, 128), dtype=jnp.bfloat16)
        if bits:
            k, v = (quantise_rows(x.astype(jnp.float32), bits) for x in (k, v))
        text = lowered_for_cuda(functools.partial(tree_attention, impl="gpu"), q, k, v, mask)
        assert text.count("__gpu$xla.gpu.triton") == 2


def test_few_rows_and_float32_are_left_to_xla(monkeypatch):
    """As `benchmarks/results/kernel-sizes-gpu.json` has it."""
    monkeypatch.setattr(dispatch, "_on_hopper", lambda: True)
    for shape, dtype, kernels in (
        ((1, 1, 8192, 4, 2, 64), jnp.bfloat16, 2),
        ((1, 1, 8191, 4, 2, 64), jnp.bfloat16, 0),
        ((1, 1, 8192, 4, 2, 64), jnp.float32, 0),
    ):
        text = lowered_for_cuda(tree_attention, *case(shape, dtype=dtype))
        assert text.count("__gpu$xla.gpu.triton") == kernels


@pytest.mark.errors
def test_heads_that_it_is_not_made_for_are_refused_by_name():
    given = case((1, 3, 40, 4, 2, 8))
    with pytest.raises(ValueError, match=r"impl='gpu'; .* heads of 8; that of GPUs is made for 64, 128 and 256"):
        tree_attention(*given, impl="gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("shape", [(1, 1, 300, 32, 8, 128), (2, 8, 4096, 32, 8, 128), (1, 64, 777, 16, 8, 64)])
def test_on_a_gpu(shape, bits):
    q, k, v, mask = case(shape, dtype=jnp.bfloat16)
    if bits:
        k, v = (quantise_rows(x.astype(jnp.float32), bits) for x in (k, v))
    floats = [dequantise(x, shape[-1], jnp.float32) if bits else x for x in (k, v)]
    got, want = np.asarray(attention(q, k, v, mask, impl="gpu"), np.float64), oracle(q, *floats, mask)
    assert np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want)
