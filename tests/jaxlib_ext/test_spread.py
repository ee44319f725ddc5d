"""Every half there is, 65,536 of them, against integers in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxaroo.jaxlib_ext.spread import bytes_of, field_of, halves_of

EVERY = np.arange(1 << 16).astype(np.uint16).view(np.int16)


def oracle(halves, w, shift, signed):
    x = (halves.view(np.uint16).astype(np.int64) >> shift) & ((1 << w) - 1)
    return x - (1 << w) * (x >= 1 << (w - 1)) if signed else x


def cases():
    for signed in (False, True):
        for w in (1, 2, 4):
            for i in range(16 // w):
                if w > 1 or not signed:
                    yield (lambda x, n, w=w, i=i, s=signed: field_of(x, w, i, signed=s, native=n)), w, w * i, signed
        for i in range(2):
            yield (lambda x, n, i=i, s=signed: bytes_of(x, i, signed=s, native=n)), 8, 8 * i, signed


def test_every_field_of_every_half_is_its_number():
    for spread, *what in cases():
        got = np.asarray(jax.jit(lambda x, spread=spread: spread(x, False))(EVERY))
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got.astype(np.int64), oracle(EVERY, *what))


@pytest.mark.gpu
def test_instructions_do_what_the_plain_form_does():
    def kernel(x_ref, y_ref, *, spread):
        y_ref[...] = spread(x_ref[...], True)

    for spread, *what in cases():
        call = pl.pallas_call(
            lambda x, y, spread=spread: kernel(x, y, spread=spread),
            grid=16,
            in_specs=[pl.BlockSpec((4096,), lambda i: (i,))],
            out_specs=pl.BlockSpec((4096,), lambda i: (i,)),
            out_shape=jax.ShapeDtypeStruct(EVERY.shape, jnp.bfloat16),
            compiler_params=triton.CompilerParams(),
        )
        np.testing.assert_array_equal(np.asarray(call(EVERY)).astype(np.int64), oracle(EVERY, *what))


def test_halves_are_the_bytes_in_their_order():
    words = np.random.default_rng(0).integers(-(1 << 31), 1 << 31, (3, 8)).astype(np.int32)
    np.testing.assert_array_equal(halves_of(jnp.asarray(words)), words.view(np.int16))
    for dtype in (np.int8, np.uint8):
        codes = words.view(dtype)
        np.testing.assert_array_equal(halves_of(jnp.asarray(codes)), codes.view(np.int16))
