"""Oracle: sets in float64 and Python sorting. Kernels run step by step, with races looked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxaroo.jaxlib_ext.sampling import cut, reference
from jaxaroo.sharding.topology import CHIPS, compile_for

finding = jax.jit(cut, static_argnames="impl")
IMPLS = ("sort", "xla", "interpret-tpu")


def oracle(z, k, p):
    """The smallest logit of the kept set of one row; ties at either cut are kept."""
    z = np.asarray(z, np.float64)
    down = sorted(z, reverse=True)
    kept = [x for x in down if x >= down[(k or len(z)) - 1]]
    mass = np.exp(np.asarray(kept) - down[0])
    if p >= 1:
        return kept[-1]
    before = np.concatenate([[0.0], np.cumsum(mass)[:-1]]) / mass.sum()
    return min(x for x, b in zip(kept, before, strict=True) if b < p)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [1, 11])
def test_the_cut_is_that_of_the_sorted_row(rows, impl):
    rng = np.random.default_rng(rows)
    for scale in (0.1, 3.0, 30.0):
        z = (scale * rng.standard_normal((rows, 300))).astype(np.float32)
        k = rng.choice([0, 1, 2, 17, 299, 300], rows).astype(np.int32)
        p = rng.choice([1e-39, 1e-6, 0.1, 0.5, 0.9, 0.999, 1.0], rows).astype(np.float32)
        got = finding(jnp.asarray(z), jnp.asarray(k), jnp.asarray(p), impl=impl)
        np.testing.assert_array_equal(got, np.float32([oracle(*row) for row in zip(z, k, p, strict=True)]))


VALUES = st.lists(
    st.sampled_from([-np.inf, -1e30, -2.5, -1.0, -0.0, 0.0, 1e-30, 1.0, 1.5, 3e38]), min_size=6, max_size=6
)


@given(VALUES.filter(lambda z: max(z) > -np.inf), st.integers(0, 6), st.sampled_from([0.05, 0.3, 0.74, 1.0]))
def test_ties_zeros_and_extremes(z, k, p):
    """Both zeros are one number; what is removed already stays removed, unless nothing else is left to keep."""
    arrays = jnp.float32([z]), jnp.int32([k]), jnp.float32([p])
    got, want = finding(*arrays, impl="xla"), finding(*arrays, impl="sort")
    np.testing.assert_array_equal(got, want)


def test_all_rows_alike_and_a_row_of_one_number():
    z = jnp.zeros((3, 40)).at[1].set(-7.0)
    for impl in IMPLS:
        np.testing.assert_array_equal(
            finding(z, jnp.int32([1, 5, 0]), jnp.float32([0.1, 1, 0.5]), impl=impl), [0, -7, 0]
        )
        np.testing.assert_array_equal(
            finding(z[:, :1], jnp.int32([1, 0, 1]), jnp.float32([0.1, 1, 0.5]), impl=impl), [0, -7, 0]
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_the_likeliest_stays_however_small_its_share_has_to_be(impl):
    z = jnp.asarray([[1.0, 9.0, 10.0, -2.0]] * 4)
    p = jnp.float32([1e-37, 1e-39, 1e-45, 0.0])  # a few are no normal numbers, and may be taken for 0
    np.testing.assert_array_equal(finding(z, jnp.int32([0, 0, 3, 0]), p, impl=impl), [10.0] * 4)


def test_nothing_is_sorted():
    args = jnp.zeros((2, 64)), jnp.zeros(2, jnp.int32), jnp.ones(2)
    assert "sort" not in jax.jit(cut).lower(*args).as_text()
    assert "sort" in jax.jit(reference).lower(*args).as_text()


@pytest.mark.errors
def test_what_does_not_fit_together_is_refused():
    z, k, p = jnp.zeros((2, 8)), jnp.zeros(2, jnp.int32), jnp.ones(2)
    with pytest.raises(ValueError, match=r"cut: z float32\(2, 8\), k \(1,\), p \(2,\); expected float32 \[B, V\]"):
        cut(z, k[:1], p)
    with pytest.raises(ValueError, match=r"cut: z float32\(2, 0\).*V at least 1"):
        cut(z[:, :0], k, p)
    with pytest.raises(ValueError, match="cut: z bfloat16"):
        cut(z.astype(jnp.bfloat16), k, p)
    with pytest.raises(ValueError, match="cut: impl='radix'; expected one of auto"):
        cut(z, k, p, impl="radix")


@pytest.mark.aot
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.slow
def test_the_tpu_compiler_takes_the_kernel_at_large_vocabularies(chip, libtpu):
    like = jax.ShapeDtypeStruct
    for B, V in ((1, 128_256), (32, 151_936)):
        compiled = compile_for(
            chip, functools.partial(cut), like((B, V), jnp.float32), like((B,), jnp.int32), like((B,), jnp.float32)
        )
        assert "tpu_custom_call" in compiled.as_text()
        assert " sort(" not in compiled.as_text()
