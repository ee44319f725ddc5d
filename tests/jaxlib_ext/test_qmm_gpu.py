"""The kernel of GPUs against the products of `test_qmm`: without a GPU run step by step, with one as it is."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.jaxlib_ext import dispatch
from jaxaroo.jaxlib_ext.qmm import pack, qmm
from jaxaroo.jaxlib_ext.qmm_gpu import tiles_of, why_not
from tests.jaxlib_ext.for_gpus import lowered_for_cuda
from tests.jaxlib_ext.test_qmm import case, fast_product, repacked

# B, K, N, M: K that fills no block, many shares, rows of a tile and more, groups.
KERNEL = [
    (1, 256, 64, 1),
    (3, 1152, 64, 1),
    (2, 4352, 192, 1),
    (5, 2048, 64, 16),
    (17, 512, 128, 1),
    (64, 1024, 128, 2),
]


@functools.partial(jax.jit, static_argnames=("bits", "impl"))
def by_kernel(x, w, scale, bits, impl="interpret-gpu"):
    return qmm(x, w, scale, bits=bits, dtype=jnp.float32, impl=impl)


def small(shape):
    x, codes, scale = case(*shape)
    return (x * 1e4).astype(jnp.bfloat16), codes, scale


@pytest.mark.parametrize(("shape", "bits"), [*[(s, 4) for s in KERNEL], *[(KERNEL[2], b) for b in (8, 7, 6, 5, 3, 2)]])
def test_the_kernel_is_the_product(shape, bits):
    x, codes, scale = small(shape)
    want = fast_product(x, codes, scale, bits)
    got = by_kernel(x, repacked(codes, 8, bits), scale, bits)
    assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)


def test_inputs_that_fill_no_block_are_padded():
    x, codes, scale = small((3, 200, 64, 1))
    got, want = by_kernel(x, repacked(codes, 8, 4), scale, 4), fast_product(x, codes, scale, 4)
    assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("shape", [KERNEL[1], KERNEL[3]])
@pytest.mark.slow
def test_the_kernel_switches_master_codes_to_any_width(shape):
    x, codes, scale = small(shape)
    any_width = jax.jit(lambda b: qmm(x, codes, scale, bits=b, dtype=jnp.float32, impl="interpret-gpu"))
    for bits in (8, 6, 4, 3, 2):
        want = fast_product(x, codes, scale, bits)
        assert np.linalg.norm(any_width(jnp.int32(bits)) - want) <= 1e-6 * np.linalg.norm(want)
        assert np.linalg.norm(by_kernel(x, codes, scale, bits) - want) <= 1e-6 * np.linalg.norm(want)


def test_gradients_are_those_of_the_reference():
    x, codes, scale = case(5, 512, 64, 4)
    x, g = x.astype(jnp.bfloat16), jnp.asarray(np.random.default_rng(3).standard_normal((5, 64)), jnp.float32)
    planes = repacked(codes, 8, 4)
    got, want = (
        jax.grad(lambda x, impl=impl: jnp.sum(by_kernel(x, planes, scale, 4, impl) * g))(x)
        for impl in ("interpret-gpu", "xla")
    )
    np.testing.assert_array_equal(got, want)


def test_programs_for_cuda_have_the_kernel():
    for shape, bits in [*[(KERNEL[0], bits) for bits in (8, 6, 4, 3, 2)], *[(shape, 4) for shape in KERNEL[1:]]]:
        x, codes, scale = small(shape)
        f = functools.partial(qmm, bits=bits, impl="gpu")
        assert lowered_for_cuda(f, x, repacked(codes, 8, bits), scale).count("__gpu$xla.gpu.triton") == 1


def test_a_launch_fits_into_a_processor():
    """At most 200 KiB of loads under way, at every width, number of rows and size of groups that it serves."""
    for B, K, M in itertools.product((1, 17, 64), (4096, 1152, 1280), (1, 2)):
        for widths in ((8,), (4, 2, 1), (4, 2), (4, 1), (4,), (2, 1), (2,)):
            like = jax.ShapeDtypeStruct
            if why_not(like((B, K), jnp.bfloat16), like((4096, M), jnp.bfloat16), widths):
                continue
            t = tiles_of(B, 4096, K, M, widths)
            rows = max(16, 1 << (B - 1).bit_length())
            assert t.stages * t.blocks * sum(256 * rows + 16 * w * t.outputs for w in widths) <= 200 << 10
            assert 8 * min(widths) * t.blocks >= 16  # halves of a product
            assert K // 128 % t.blocks == 0
            assert K // M // 128 % t.blocks == 0
            assert 1 <= t.shares <= K // 128 // t.blocks


def test_odd_widths_of_many_rows_are_left_to_xla(monkeypatch):
    """As `benchmarks/results/kernels-gpu.json` has it."""
    monkeypatch.setattr(dispatch, "_on_hopper", lambda: True)
    x, codes, scale = small((64, 512, 64, 1))
    for bits, rows, kernels in ((3, 16, 1), (3, 17, 0), (4, 64, 1), (5, 64, 0)):
        text = lowered_for_cuda(functools.partial(qmm, bits=bits), x[:rows], repacked(codes, 8, bits), scale)
        assert text.count("__gpu$xla.gpu.triton") == kernels


@pytest.mark.errors
def test_what_it_is_not_made_for_is_refused_by_name():
    x, codes, scale = small((1, 384, 64, 1))
    with pytest.raises(ValueError, match="x is float32; the kernel of GPUs is made for bfloat16"):
        qmm(x.astype(jnp.float32), codes, scale, bits=8, impl="gpu")
    with pytest.raises(ValueError, match=r"384 inputs, groups of 384; with an odd width .* blocks of 256"):
        qmm(x, pack(codes // 64, 3), scale, bits=3, impl="gpu")
    with pytest.raises(ValueError, match="384 inputs, 63 outputs; that of GPUs is made for"):
        qmm(x, codes[:63], scale[:63], bits=8, impl="gpu")
    with pytest.raises(ValueError, match="65 rows; it is made for 1 to 64"):
        qmm(jnp.tile(x, (65, 1)), codes, scale, bits=8, impl="gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 7, 6, 5, 4, 3, 2])
def test_on_a_gpu(bits):
    for shape in KERNEL:
        x, codes, scale = small(shape)
        if bits % 2 and (shape[1] // 128 % 2 or (shape[3] > 1 and shape[1] // shape[3] % 256)):
            continue
        want = fast_product(x, codes, scale, bits)
        for w in (repacked(codes, 8, bits), codes):
            got = by_kernel(x, w, scale, bits, "gpu")
            assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)
