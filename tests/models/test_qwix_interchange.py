"""Oracle: Qwix itself, where it is installed: what it makes of the codes, and what it says its own stand for."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.jaxlib_ext.qmm import scale_at, switch_codes
from jaxaroo.models.quantise import QuantConfig, decode, encode, init_scale, snap
from jaxaroo.models.qwix_interchange import from_qarray, to_qarray

WHY = 'Qwix is optional: pip install "jaxaroo[qwix]"'
CASES = [((6, 64), 1, None), ((6, 64), 1, 32), ((2, 3, 64), 1, None), ((6, 4, 32), 2, 64)]  # weight, over, group


def master(shape, over, group, bits=8):
    w = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    scale = snap(init_scale(w, QuantConfig(bits=(bits,), group=group), over))
    return encode(w, scale, bits), scale.astype(jnp.bfloat16)


@pytest.mark.parametrize(("shape", "over", "group"), CASES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_qwix_makes_the_same_weights_of_them(shape, over, group, bits):
    qwix = pytest.importorskip("qwix", reason=WHY)
    codes, scale = master(shape, over, group)
    codes, scale = switch_codes(codes, 8, bits), scale_at(scale, 8, bits)
    array = to_qarray(codes, scale, bits)
    N, K = int(np.prod(shape[: len(shape) - over])), int(np.prod(shape[len(shape) - over :]))
    np.testing.assert_allclose(qwix.dequantize(array), np.asarray(decode(codes, scale)).reshape(N, K).T, rtol=1e-6)
    assert array.shape == (K, N)
    assert array.scale_tile_shape == (K // scale.shape[-1], 1)
    back, step, width = from_qarray(array)
    assert (back.dtype, step.dtype, width) == (jnp.int8, jnp.float32, bits)
    np.testing.assert_array_equal(back, codes.reshape(N, K))
    np.testing.assert_array_equal(step.astype(jnp.bfloat16), scale.reshape(N, -1))


@pytest.mark.parametrize("kind", [jnp.int8, jnp.int4, "int2", "int3", "int5", "int6", "int7"])
@pytest.mark.parametrize("tiles", [None, 32])
def test_what_qwix_quantised_is_decoded_here(kind, tiles):
    qwix = pytest.importorskip("qwix", reason=WHY)
    w = jnp.asarray(np.random.default_rng(1).normal(size=(64, 6)), jnp.float32)
    array = qwix.quantize(w, kind, channelwise_axes=[1], tiled_axes={0: tiles} if tiles else {})
    codes, scale, bits = from_qarray(array)
    assert bits == int((kind if isinstance(kind, str) else jnp.dtype(kind).name)[3:])
    assert (codes.shape, scale.shape) == ((6, 64), (6, 64 // tiles if tiles else 1))
    np.testing.assert_allclose(decode(codes, scale), np.asarray(qwix.dequantize(array)).T, rtol=1e-6)
    np.testing.assert_array_equal(to_qarray(codes, scale, bits).qvalue, array.qvalue)
    assert to_qarray(codes, scale, bits).qvalue.dtype == array.qvalue.dtype
    assert to_qarray(codes, scale, bits).qtype == array.qtype


def test_one_scale_for_all_outputs_is_given_to_each():
    qwix = pytest.importorskip("qwix", reason=WHY)
    array = qwix.quantize(jnp.asarray(np.random.default_rng(2).normal(size=(64, 6)), jnp.float32), jnp.int8)
    codes, scale, _ = from_qarray(array)
    assert array.scale.shape == (1, 1)
    np.testing.assert_allclose(decode(codes, scale), np.asarray(qwix.dequantize(array)).T, rtol=1e-6)


def test_qwix_multiplies_with_them():
    qwix = pytest.importorskip("qwix", reason=WHY)
    codes, scale = master((6, 64), 1, None)
    x = np.random.default_rng(3).normal(size=(5, 64)).astype(np.float32)
    got = qwix.dot_general(jnp.asarray(x), to_qarray(codes, scale), (((1,), (0,)), ((), ())))
    np.testing.assert_allclose(got, np.float64(x) @ np.float64(decode(codes, scale)).T, rtol=1e-5, atol=1e-5)
    low = to_qarray(codes, scale, dtype=jnp.bfloat16)
    assert qwix.dequantize(low).dtype == jnp.bfloat16


# ------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.errors
def test_without_qwix_one_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)  # an import of it fails, whether it is installed or not
    codes, scale = master((6, 64), 1, None)
    for call in (lambda: to_qarray(codes, scale), lambda: from_qarray(None)):
        with pytest.raises(ImportError, match=r'found no Qwix; .*pip install "jaxaroo\[qwix\]"'):
            call()


@pytest.mark.errors
def test_what_has_no_counterpart_is_refused():
    qwix = pytest.importorskip("qwix", reason=WHY)
    codes, scale = master((6, 64), 1, None)
    for c, bits in ((codes.astype(jnp.int32), 8), (codes, 9), (codes, 1)):
        with pytest.raises(ValueError, match=r"to_qarray: int.* codes of . bits; expected int8, and 2 to 8 bits"):
            to_qarray(c, scale, bits)
    for s in (scale[:5], jnp.ones((6, 3))):
        with pytest.raises(ValueError, match=r"to_qarray: codes \(6, 64\), scale .*; expected \[out..., in...\]"):
            to_qarray(codes, s)
    w = jnp.asarray(np.random.default_rng(4).normal(size=(64, 6)), jnp.float32)
    others = (
        (jnp.int8, "minmax", "int8, a"),
        ("nf4", "absmax", "nf4, no"),
        (jnp.float8_e5m2, "absmax", "float8_e5m2, no"),
    )
    for kind, how, found in others:
        array = qwix.quantize(w, kind, channelwise_axes=[1], calibration_method=how)
        with pytest.raises(ValueError, match=f"from_qarray: type {found} zero point; expected symmetric integers"):
            from_qarray(array)
    for array in (
        qwix.quantize(w, jnp.int8, channelwise_axes=[0], tiled_axes={1: 2}),
        qwix.quantize(w.reshape(8, 8, 6), jnp.int8, channelwise_axes=[2]),
    ):
        with pytest.raises(ValueError, match=r"from_qarray: values .*, scale .*; expected \[K, N\] and \[M, N\]"):
            from_qarray(array)
