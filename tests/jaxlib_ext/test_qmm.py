"""Oracles: the second rounding by float64 division, packed words bit by bit in Python integers, float64 products."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxaroo.jaxlib_ext.qmm import (
    QuantisedMatrix,
    multiply,
    nbytes,
    pack,
    qmm,
    quantise_activations,
    reference,
    repack,
    scale_at,
    switch_codes,
)
from jaxaroo.jaxlib_ext.qmm import unpack as unpack_words
from jaxaroo.sharding.topology import CHIPS, compile_for, kernel_traffic

WIDTHS = (8, 6, 4, 3, 2)
unpack = jax.jit(unpack_words, static_argnums=(1, 2))
switch = jax.jit(switch_codes, static_argnums=(1, 2))
switch_traced = jax.jit(switch_codes, static_argnums=1)
packed = jax.jit(pack, static_argnums=1)
repacked = jax.jit(repack, static_argnums=(1, 2))


def every_code(bits):
    return np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).astype(np.int8)


def round_again(codes, master, bits):
    low = np.rint(np.float64(codes) / 2.0 ** (master - bits))
    return np.clip(low, -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)


def random_codes(bits, shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).choice(every_code(bits), shape))


# ------------------------------------------------------------------------------------------------------------ switch
@pytest.mark.parametrize(("master", "bits"), [(h, l) for h in (8, 6, 4) for l in range(2, h + 1)])
def test_switching_is_the_second_rounding_on_every_code(master, bits):
    codes = every_code(master)
    want = round_again(codes, master, bits)
    assert (want.min(), want.max()) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)  # the whole range is reached
    for got in (switch(codes, master, bits), switch_traced(codes, master, jnp.int32(bits))):
        assert got.dtype == jnp.int8
        np.testing.assert_array_equal(got, want)


def test_one_program_switches_every_layer_to_its_own_width():
    codes = jnp.asarray(np.tile(every_code(8), (7, 2, 1)))
    got = switch_traced(codes, 8, jnp.arange(2, 9, dtype=jnp.int32))
    for layer, bits in enumerate(range(2, 9)):
        np.testing.assert_array_equal(got[layer], np.tile(round_again(every_code(8), 8, bits), (2, 1)))


@pytest.mark.parametrize(
    ("bits", "share", "bias"), [(7, 0.5, 0.25), (6, 0.25, 0.125), (4, 1 / 16, 1 / 32), (2, 1 / 64, None)]
)
def test_ties_go_to_even_and_so_nothing_drifts(bits, share, bias):
    codes, step = every_code(8), 2 ** (8 - bits)
    low = np.asarray(switch(codes, 8, bits), int)
    ties = codes.astype(int) % step == step // 2
    assert ties.mean() == share
    inside = codes < 2 ** (bits - 1) * step - step // 2  # above, codes are clipped
    assert (~inside).sum() == step // 2  # 1, 2, 8 and 32 of 256
    assert (low[ties & inside] % 2 == 0).all()
    if bias is not None:  # over whole periods of two steps
        period = slice(128 - 2 * step, 128 + 2 * step) if bits > 4 else slice(128 - 4 * step, 128 + 4 * step)
        error = lambda q: (q - codes / step)[period].mean()
        assert error(low) == 0
        assert error(np.floor(codes / step + 0.5)) == bias


@pytest.mark.parametrize("bits", range(2, 8))
def test_the_error_of_switching_is_bounded(bits):
    codes, step, top = every_code(8).astype(int), 2 ** (8 - bits), 2 ** (bits - 1) - 1
    error = np.abs(codes - step * np.asarray(switch(every_code(8), 8, bits), int))
    reached = codes <= step * top + step // 2
    assert error[reached].max() == step // 2
    assert (~reached).sum() == step // 2 - 1
    assert error[~reached].max(initial=0) <= step - 1


def test_a_chain_of_switches_is_not_one_switch():
    codes = every_code(8)
    chain = lambda *widths: functools.reduce(
        lambda c, hl: np.asarray(switch(c, *hl)), itertools.pairwise(widths), codes
    )
    for middle, bits, differ in ((6, 4, 30), (4, 2, 24), (6, 2, 6)):
        assert (chain(8, middle, bits) != chain(8, bits)).sum() == differ


def test_quantising_the_dequantised_master_is_switching_if_scales_are_bfloat16():
    """In float32, (C s) / (s 2^d) has the ties of C / 2^d only when C s is exact."""
    scales = np.exp2(np.random.default_rng(1).uniform(-12, -2, 1000)).astype(np.float32)
    codes = every_code(8).astype(np.float32)[None]
    wrong = {}
    for kind, s in (("bfloat16", scales.astype(ml_dtypes.bfloat16).astype(np.float32)), ("float32", scales)):
        s = s[:, None]
        for bits in range(2, 8):
            low = np.rint((codes * s) / (s * np.float32(2 ** (8 - bits))))
            low = np.clip(low, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            wrong[kind] = wrong.get(kind, 0) + (low != np.asarray(switch(every_code(8), 8, bits))[None]).sum()
    assert wrong["bfloat16"] == 0
    assert 0.003 < wrong["float32"] / (6 * 256 * 1000) < 0.012


def arrays(text):
    """(type, elements) of every array in a compiled program."""
    found = re.findall(r"\b(pred|[sufbc]\w*\d\w*)\[([\d,]*)\]", text)
    return {(kind, int(np.prod([int(n) for n in shape.split(",")])) if shape else 1) for kind, shape in found}


def test_switching_makes_no_float_and_nothing_wider_than_a_byte():
    codes = jax.ShapeDtypeStruct((24, 384), jnp.int8)
    assert ("f32", 12) in arrays("x = f32[3,4]{1,0} convert(s8[3,4] y)")  # what reads the program does see a float
    for bits in (7, 6, 4, 3, 2):
        program = switch.lower(codes, 8, bits).compile()
        assert {kind for kind, _ in arrays(program.as_text())} == {"s8"}
        memory = program.memory_analysis()
        assert (memory.temp_size_in_bytes, memory.output_size_in_bytes) == (0, 24 * 384)
    program = switch_traced.lower(codes, 8, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    assert arrays(program.as_text()) == {("s8", 24 * 384), ("s8", 1), ("s32", 1)}
    assert program.memory_analysis().temp_size_in_bytes == 0
    for bits in (6, 4, 3, 2):
        program = repacked.lower(codes, 8, bits).compile()
        assert {kind for kind, _ in arrays(program.as_text())} <= {"s8", "s32"}
        assert program.memory_analysis().temp_size_in_bytes == 0
        ragged = repacked.lower(jax.ShapeDtypeStruct((24, 200), jnp.int8), 8, bits).compile().memory_analysis()
        pointers = ragged.output_size_in_bytes - 24 * 256 * bits // 8  # of a tuple of planes
        assert (ragged.temp_size_in_bytes, 0 <= pointers <= 8 * 3) == (0, True)


def test_the_scale_of_a_width_is_exact():
    scale = np.exp2(np.random.default_rng(2).uniform(-20, 0, (3, 5, 2)))
    for dtype in (ml_dtypes.bfloat16, np.float32):
        s = jnp.asarray(scale.astype(dtype))
        for bits in range(2, 9):
            want = np.asarray(s, np.float64) * 2.0 ** (8 - bits)
            for got in (scale_at(s, 8, bits), scale_at(s, 8, jnp.int32(bits))):
                assert got.dtype == s.dtype
                np.testing.assert_array_equal(np.asarray(got, np.float64), want)
    layered = scale_at(jnp.asarray(scale), 8, jnp.array([8, 4, 2], jnp.int32))
    np.testing.assert_array_equal(layered, np.float32(scale) * np.array([1, 16, 64])[:, None, None])


# ------------------------------------------------------------------------------------------------------------ packing
@pytest.mark.parametrize(
    ("bits", "planes"), [(7, (4, 2, 1)), (6, (4, 2)), (5, (4, 1)), (4, (4,)), (3, (2, 1)), (2, (2,))]
)
def test_every_field_of_every_word_is_where_the_layout_says(bits, planes):
    K = 200
    codes = np.asarray(random_codes(bits, (3, K)))
    got = packed(codes, bits)
    assert len(got) == len(planes)
    below = bits
    for w, words in zip(planes, got, strict=True):
        below -= w
        P = 32 // w
        R = 128 // P
        assert (words.dtype, words.shape) == (jnp.int32, (3, 2 * R))
        for n in range(3):
            for b in range(2):
                for r in range(R):
                    word = int(words[n, b * R + r]) % 2**32
                    for j in range(P):
                        k = b * 128 + j * R + r
                        code = int(codes[n, k]) if k < K else 0
                        assert (word >> (j * w)) % 2**w == (code >> below) % 2**w


@pytest.mark.parametrize("bits", range(2, 9))
def test_unpacking_gives_back_what_was_packed(bits):
    for shape in ((2, 3, 200), (5, 128)):
        codes = random_codes(bits, shape, seed=bits)
        planes = packed(codes, bits)
        got = unpack(planes, bits, shape[-1])
        assert got.dtype == jnp.int8
        np.testing.assert_array_equal(got, codes)


def test_a_view_is_made_again_from_the_master_word_for_word():
    master = random_codes(8, (6, 256))
    kept = np.array(master)
    for bits in WIDTHS:
        view = [np.array(words) for words in repacked(master, 8, bits)]
        repacked(master, 8, 2)
        for before, after in zip(view, repacked(master, 8, bits), strict=True):
            np.testing.assert_array_equal(before, after)
        np.testing.assert_array_equal(unpack(tuple(map(jnp.asarray, view)), bits, 256), round_again(kept, 8, bits))
    np.testing.assert_array_equal(master, kept)  # 8 -> 4 -> 8 is the master: no view is written into it
    assert repacked(master, 8, 8)[0].shape == master.shape


@pytest.mark.parametrize(
    ("bits", "channel", "group"),
    [(8, 1.0005, 1.0156), (6, 0.7505, 0.7656), (4, 0.5005, 0.5156), (3, 0.3755, 0.3906), (2, 0.2505, 0.2656)],
)
def test_bytes_are_those_of_the_table(bits, channel, group):
    N, K = 3, 4096
    size = sum(words.nbytes for words in packed(random_codes(bits, (N, K)), bits))
    for groups, want in ((1, channel), (K // 128, group)):
        scales = jnp.zeros((N, groups), jnp.bfloat16)
        assert nbytes(bits, N, K, groups) == size + scales.nbytes
        assert round(nbytes(bits, N, K, groups) / (N * K), 4) == want
    ragged = sum(words.nbytes for words in packed(random_codes(bits, (N, 200)), bits))
    assert nbytes(bits, N, 200) == ragged + 2 * N == {8: 600, 6: 576, 4: 384, 3: 288, 2: 192}[bits] + 2 * N


# ------------------------------------------------------------------------------------------------------------ product
SHAPES = [(1, 128, 5, 1), (3, 200, 7, 1), (8, 256, 6, 2), (17, 160, 1, 5), (64, 320, 9, 10)]  # B, K, N, M
static = jax.jit(qmm, static_argnames=("bits", "master", "act"))
traced = jax.jit(qmm, static_argnames=("master", "act"))


def case(B, K, N, M):
    rng = np.random.default_rng(B)
    x = jnp.asarray(rng.standard_normal((B, K)), jnp.float32)
    scale = jnp.asarray(np.exp2(rng.uniform(-9, -6, (N, M))).astype(ml_dtypes.bfloat16))
    return x, random_codes(8, (N, K), seed=B), scale


def product(x, codes, scale, bits):
    """y_bn = sum_k x_bk Q_nk S_n(group of k), float64."""
    (N, K), M = codes.shape, scale.shape[1]
    low = round_again(np.asarray(codes), 8, bits)
    y = np.zeros((x.shape[0], N))
    for n in range(N):
        for k in range(K):
            y[:, n] += np.asarray(x[:, k], np.float64) * (low[n, k] * float(scale[n, k * M // K]) * 2.0 ** (8 - bits))
    return y


@pytest.mark.parametrize("shape", [*SHAPES[:2], *(pytest.param(s, marks=pytest.mark.proof) for s in SHAPES[2:])])
@pytest.mark.slow
def test_the_product_at_every_width(shape):
    x, codes, scale = case(*shape)
    for bits in WIDTHS:
        want = product(x, codes, scale, bits)
        got = static(x, repacked(codes, 8, bits), scale, bits=bits)
        assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)
        for other in (static(x, codes, scale, bits=bits), traced(x, codes, scale, bits=jnp.int32(bits))):
            # The same codes in another program, whose sums may be of another order.
            assert np.linalg.norm(other - got) <= 1e-6 * np.linalg.norm(want)


def test_one_program_multiplies_at_every_width():
    count = []

    def counted(x, codes, scale, bits):
        count.append(bits)
        return qmm(x, codes, scale, bits=bits)

    step = jax.jit(counted)
    for bits in WIDTHS:
        step(*case(*SHAPES[0]), jnp.int32(bits))
    assert len(count) == 1


def test_leading_axes_of_activations_stay():
    x, codes, scale = case(8, 256, 6, 2)
    got = static(x.reshape(2, 4, 256), codes, scale, bits=4)
    np.testing.assert_allclose(got, static(x, codes, scale, bits=4).reshape(2, 4, 6), rtol=1e-5, atol=1e-5)


def test_bfloat16_activations_meet_exact_codes():
    """Rounded once, at the end: weights scaled in bfloat16 would be off in every third digit."""
    x, codes, scale = case(64, 320, 9, 10)
    x = x.astype(jnp.bfloat16)
    got, want = static(x, codes, scale, bits=8), product(x, codes, scale, 8)
    assert got.dtype == jnp.bfloat16
    same = np.asarray(got) == want.astype(ml_dtypes.bfloat16)
    assert same.mean() > 0.99
    early = (
        np.asarray(x, np.float64)
        @ (
            (np.asarray(codes) * np.repeat(np.asarray(scale, np.float32), 32, 1))
            .astype(ml_dtypes.bfloat16)
            .astype(np.float64)
        ).T
    )
    assert (early.astype(ml_dtypes.bfloat16) == want.astype(ml_dtypes.bfloat16)).mean() < 0.9


def test_the_gradient_in_x_is_that_of_the_dequantised_matrix():
    x, codes, scale = case(3, 200, 7, 1)
    g = np.random.default_rng(3).standard_normal((3, 7)).astype(np.float32)
    low = round_again(np.asarray(codes), 8, 4) * np.asarray(scale, np.float64) * 16
    got = jax.grad(lambda x: jnp.sum(static(x, repack(codes, 8, 4), scale, bits=4) * g))(x)
    np.testing.assert_allclose(got, g @ low, rtol=1e-5, atol=1e-5 * np.abs(g @ low).max())
    half = jax.grad(lambda x: jnp.sum(static(x, codes, scale, bits=4).astype(jnp.float32) * g))(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float64), g @ low, rtol=0.02, atol=0.02 * np.abs(g @ low).max())


# ------------------------------------------------------------------------------------------------------------- kernel
# B, K, N, M: one tile; K that fills no block; ragged tiles of N and K; groups within a tile, and of several tiles.
KERNEL = [(1, 256, 40, 1), (3, 200, 24, 1), (2, 4352, 520, 1), (5, 2048, 16, 16), (64, 1152, 9, 9), (2, 8192, 8, 2)]
NARROW = [(2, 43, 8, 1), (1, 16, 3, 1)]  # K of half a block and less


@functools.partial(jax.jit, static_argnames=("bits", "impl"))
def by_kernel(x, w, scale, bits, impl="interpret-tpu"):
    return qmm(x, w, scale, bits=bits, dtype=jnp.float32, impl=impl)


def fast_product(x, codes, scale, bits):
    """As `product`, without loops."""
    low = round_again(np.asarray(codes), 8, bits) * 2.0 ** (8 - bits)
    weights = low * np.repeat(np.asarray(scale, np.float64), codes.shape[1] // scale.shape[1], axis=1)
    return np.asarray(x, np.float64) @ weights.T


@pytest.mark.parametrize(
    ("shape", "bits"), [*[(shape, 3) for shape in KERNEL + NARROW], *[(KERNEL[2], bits) for bits in (4, 6, 2, 8, 7, 5)]]
)
@pytest.mark.slow
def test_the_kernel_is_the_product(shape, bits):
    """Step by step, races looked for, and with NaN in all memory that nobody has written."""
    x, codes, scale = case(*shape)
    x = (x * 1e4).astype(jnp.bfloat16 if shape[0] in (5, 64) else jnp.float32)
    want = fast_product(x, codes, scale, bits)
    got = by_kernel(x, repacked(codes, 8, bits), scale, bits)
    assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("shape", KERNEL[1:4])
@pytest.mark.slow
def test_the_kernel_switches_master_codes_to_any_width(shape):
    x, codes, scale = case(*shape)
    for bits in WIDTHS:
        want = fast_product(x, codes, scale, bits)
        got = jax.jit(lambda b: qmm(x, codes, scale, bits=b, dtype=jnp.float32, impl="interpret-tpu"))(jnp.int32(bits))
        assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)
        static_bits = by_kernel(x, codes, scale, bits)
        assert np.linalg.norm(static_bits - want) <= 1e-6 * np.linalg.norm(want)


def test_the_kernels_gradients_are_those_of_the_reference():
    x, codes, scale = case(5, 512, 9, 4)
    scale, g = scale.astype(jnp.float32), jnp.asarray(np.random.default_rng(3).standard_normal((5, 9)), jnp.float32)
    planes = repacked(codes, 8, 4)
    loss = lambda x, scale, impl: jnp.sum(by_kernel(x, planes, scale, 4, impl) * g)
    got, want = (jax.grad(loss, argnums=(0, 1))(x, scale, impl) for impl in ("interpret-tpu", "xla"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()), got, want)


def test_what_the_kernel_does_not_serve_goes_to_xla_and_says_why_when_named():
    x, codes, scale = case(3, 200, 7, 1)
    many = jnp.tile(x, (22, 1))
    np.testing.assert_allclose(qmm(many, codes, scale, bits=8)[:3], qmm(x, codes, scale, bits=8), rtol=2e-5, atol=1e-5)
    for impl in ("tpu", "interpret-tpu"):
        with pytest.raises(ValueError, match=f"qmm: impl='{impl}'; .* 66 rows; it is made for 1 to 64"):
            qmm(many, codes, scale, bits=8, impl=impl)
    with pytest.raises(ValueError, match="inputs are quantised"):
        qmm(x, codes, scale, bits=8, act="int8", impl="tpu")
    with pytest.raises(ValueError, match="groups of 40 inputs; expected blocks of 128"):
        qmm(x, codes, jnp.ones((7, 5)), bits=8, impl="tpu")
    with pytest.raises(
        ValueError, match="qmm: impl='triton'; expected one of auto, xla, tpu, gpu, interpret-tpu, interpret-gpu"
    ):
        qmm(x, codes, scale, bits=8, impl="triton")
    assert qmm(x[:0], codes, scale, bits=8).shape == (0, 7)


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_each_platform_gets_its_own_program(platform):
    """One function: the kernel where it is lowered for a TPU, XLA's product elsewhere and under a mesh of several."""
    x, codes, scale = case(8, 256, 6, 2)
    f = jax.jit(lambda x, w, scale: multiply(x, matrix(codes, scale, 4, (6,))))
    text = str(jax.export.export(f, platforms=[platform])(x, codes, scale).mlir_module())
    assert ("tpu_custom_call" in text) == (platform == "tpu")
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        shared = str(jax.export.export(f, platforms=[platform])(x, codes, scale).mlir_module())
    assert "tpu_custom_call" not in shared


@pytest.mark.aot
@pytest.mark.parametrize("chip", ["v5e", *(pytest.param(c, marks=pytest.mark.proof) for c in CHIPS if c != "v5e")])
@pytest.mark.slow
def test_the_tpu_compiler_takes_the_kernel_at_the_shapes_of_an_8b_model(chip, libtpu):
    """No copy of the words is made, and what the grid moves is at most 1.15 x what has to be moved."""
    for B, K, N, M, bits in [
        (1, 4096, 14336, 1, 4),
        (16, 14336, 4096, 1, 2),
        (64, 4096, 4096, 32, 4),
        (1, 4096, 6144, 1, 6),
    ]:
        like = jax.ShapeDtypeStruct
        planes = jax.eval_shape(lambda c, bits=bits: pack(c, bits), like((N, K), jnp.int8))
        args = like((B, K), jnp.bfloat16), planes, like((N, M), jnp.bfloat16)
        f = functools.partial(qmm, bits=bits, dtype=jnp.float32)
        compiled = compile_for(chip, f, *args)
        assert "qmm" in compiled.as_text()
        assert not re.search(r"= s32\[\S+\]\{[^S}]*\} copy", compiled.as_text())  # but into S(1), fast memory
        least = nbytes(bits, N, K, M) + 2 * B * K + 4 * B * N
        [traffic] = kernel_traffic(functools.partial(f, impl="tpu"), *args)
        assert least * 0.99 < traffic.moved <= 1.15 * least
        assert traffic.held < 8 << 20


@pytest.mark.aot
@pytest.mark.slow
def test_the_tpu_compiler_takes_every_width_and_switched_codes(libtpu):
    like = jax.ShapeDtypeStruct
    x, scale = like((8, 1024), jnp.float32), like((256, 1), jnp.bfloat16)
    for bits in (8, 7, 5, 3):
        planes = jax.eval_shape(lambda c, bits=bits: pack(c, bits), like((256, 1024), jnp.int8))
        assert "qmm" in compile_for("v5e", functools.partial(qmm, bits=bits), x, planes, scale).as_text()
    any_width = lambda x, codes, scale, bits: qmm(x, codes, scale, bits=bits)
    args = x, like((256, 1024), jnp.int8), scale, like((), jnp.int32)
    assert "qmm" in compile_for("v6e", any_width, *args).as_text()


# ---------------------------------------------------------------------------------------------------------- a matrix
multiplied = jax.jit(multiply)


def matrix(codes, scale, bits, out, gain=None, **settings):
    """In the shape of a weight `[*out, K]`, as `multi_precision.switch_bits` makes it."""
    planes = (codes.reshape(*out, -1),) if bits == 8 else repacked(codes, 8, bits)
    shape, scale = (*out, codes.shape[1]), scale.reshape(*out, -1)
    return QuantisedMatrix(planes=planes, scale=scale, gain=gain, bits=bits, master=8, shape=shape, **settings)


@pytest.mark.parametrize("act", [None, "int8"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_matrix_of_any_shape_multiplies_with_its_gains_last(bits, act):
    """With act, whole numbers times whole numbers: what is left is the rounding of scales, gains and few sums."""
    x, codes, scale = case(8, 256, 6, 2)
    gain = jnp.asarray(np.linspace(0.5, 1.5, 6).reshape(2, 3).astype(ml_dtypes.bfloat16))
    rows, step = (np.asarray(a, np.float64) for a in quantise_activations(x)) if act else (x, 1.0)
    want = product(rows, codes, scale, bits) * step
    for factor in (gain, None):
        w = matrix(codes, scale, bits, (2, 3), factor, act=act)
        got = multiplied(x, w)
        full = want * (1.0 if factor is None else np.asarray(gain, np.float64).reshape(1, 6))
        assert got.dtype == jnp.float32
        assert np.linalg.norm(got - full) <= (3e-7 if act else 1e-6) * np.linalg.norm(full)
        assert w.nbytes == nbytes(bits, 6, 256, 2) + (0 if factor is None else 2 * 6)
    half = multiplied(x.astype(jnp.bfloat16), w)  # rounded where the caller wants it, not here
    assert half.dtype == jnp.float32
    if act is None:
        exact = product(x.astype(jnp.bfloat16).astype(jnp.float32), codes, scale, bits)
        assert np.linalg.norm(half - exact) <= 1e-6 * np.linalg.norm(exact)


@pytest.mark.slow
def test_integer_activations_are_off_by_half_a_step_at_most():
    """|y' - y| <= sum_k |w_nk| step_b / 2, step_b = max_k |x_bk| / 127; and by about a third of that in each entry."""
    x, codes, scale = case(64, 320, 9, 10)
    for bits in (8, 4):
        dense = np.abs(product(np.eye(320), codes, scale, bits))  # |w|, [K, N]
        bound = np.abs(np.asarray(x, np.float64)).max(1, keepdims=True) / 127 / 2 * dense.sum(0)[None]
        error = np.abs(multiplied(x, matrix(codes, scale, bits, (9,), act="int8")) - product(x, codes, scale, bits))
        assert (error <= bound).all()
        assert error.max() > 0.02 * bound.max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_result_has_the_type_that_is_asked_for(dtype):
    x, codes, scale = case(8, 256, 6, 2)
    for given in (x, x.astype(jnp.bfloat16)):
        got = qmm(given, codes, scale, bits=8, dtype=dtype)
        assert got.dtype == dtype
        want = product(given.astype(jnp.float32), codes, scale, 8).astype(dtype)
        np.testing.assert_allclose(np.float64(got), np.float64(want), rtol=0.008 if dtype == jnp.bfloat16 else 3e-5)
        assert qmm(given, codes, scale, bits=8).dtype == given.dtype


# -------------------------------------------------------------------------------------------------------- activations
def test_activations_are_quantised_token_by_token():
    x = np.random.default_rng(4).standard_normal((2, 3, 50)) * np.exp2(np.arange(-3, 3).reshape(2, 3, 1))
    x[1, 1] = 0
    x[0, 2, 7] = -99.0  # the largest may be negative
    x = x.astype(np.float32)
    codes, scale = quantise_activations(jnp.asarray(x))
    assert (codes.dtype, scale.dtype, scale.shape) == (jnp.int8, jnp.float32, (2, 3, 1))
    for token in np.ndindex(2, 3):
        top = np.abs(x[token]).max()
        step = np.float64(top) / 127 if top else 1.0
        np.testing.assert_allclose(scale[token], step, rtol=2e-7)
        assert np.abs(x[token] / step - np.asarray(codes[token], float)).max() < 0.5 + 1e-4
        assert np.abs(np.asarray(codes[token], int)).max() == (127 if top else 0)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_integer_activations_multiply_in_integers(shape):
    x, codes, scale = case(*shape)
    q, step = (np.asarray(a, np.float64) for a in quantise_activations(x))
    for bits in (8, 4):
        want = product(q, codes, scale, bits) * step
        np.testing.assert_allclose(
            static(x, codes, scale, bits=bits, act="int8"), want, rtol=3e-6, atol=1e-6 * np.abs(want).max()
        )
    text = static.lower(x, codes, scale, bits=8, act="int8").as_text()
    assert re.search(r"dot_general.*xi8>.*xi8>.*xi32>", text)  # int8 x int8 -> int32


# ------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.errors
def test_widths_and_shapes_that_mean_nothing_are_refused():
    x, codes, scale = case(3, 200, 7, 1)
    for bits, master in ((1, 8), (9, 8), (6, 4), (4, 9)):
        with pytest.raises(ValueError, match=f"switch_codes: bits={bits}, master={master}; expected 2 <= bits"):
            switch_codes(codes, master, bits)
    with pytest.raises(TypeError, match="switch_codes: codes are int32; expected int8"):
        switch_codes(codes.astype(jnp.int32), 8, 4)
    with pytest.raises(ValueError, match=r"bits of shape \(3,\) for codes \(7, 200\); expected their leading axes"):
        switch_codes(codes, 8, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="pack: bits=1"):
        pack(codes, 1)
    planes = pack(codes, 6)
    with pytest.raises(
        ValueError, match=r"unpack: planes of \[32, 16\] words; expected \[32\] for 200 inputs at 4 bits"
    ):
        unpack_words(planes, 4, 200)
    with pytest.raises(ValueError, match=r"unpack: bits=9; expected 2 to 8"):
        unpack_words(planes, 9, 200)
    with pytest.raises(ValueError, match=r"unpack: planes of .* for 300 inputs"):
        qmm(jnp.zeros((3, 300)), planes, scale, bits=6)
    with pytest.raises(TypeError, match=r"qmm: packed words and bits=.*expected a Python int"):
        qmm(x, planes, scale, bits=jnp.int32(6))
    with pytest.raises(ValueError, match=r"qmm: x \(3, 200\), codes \(7, 200\), scale \(6, 1\); expected"):
        qmm(x, codes, scale[:6], bits=8)
    with pytest.raises(ValueError, match=r"qmm: x \(3, 128\), codes \(7, 200\)"):
        qmm(x[:, :128], codes, scale, bits=8)
    with pytest.raises(ValueError, match="qmm: 3 scales a row for 200 inputs; expected groups of equal size"):
        qmm(x, codes, jnp.ones((7, 3)), bits=8)
    with pytest.raises(ValueError, match="qmm: act='int4'; expected None or 'int8'"):
        qmm(x, codes, scale, bits=8, act="int4")


def test_the_reference_is_the_product_of_its_codes():
    x, codes, scale = case(3, 200, 7, 1)
    np.testing.assert_allclose(reference(x, codes, scale), static(x, codes, scale, bits=8), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_a_loop_unpacks_one_matrix_at_a_time(bits):
    """Of several that it never changes; otherwise it would hold a float copy of all of them."""
    K, layers = 256, 6
    codes = jnp.zeros((layers, K, K), jnp.int8)
    one = lambda c: QuantisedMatrix(
        planes=repack(c, 8, bits), scale=jnp.ones((K, 1), jnp.bfloat16), bits=bits, master=8, shape=(K, K)
    )
    matrices = tuple(one(c) for c in codes)

    @jax.jit
    def loop(x, matrices):
        def body(_, x):
            for w in matrices:
                x = multiply(x, w)
            return x

        return jax.lax.fori_loop(0, 5, body, x)

    taken = loop.lower(jnp.ones((1, K)), matrices).compile().memory_analysis().temp_size_in_bytes
    assert taken < 3 * 4 * K * K  # of 6 matrices; a product by itself may hold its codes and its floats


def test_a_gradient_passes_through_a_product():
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(-8, 8, (6, 128)), jnp.int8)
    w = QuantisedMatrix(
        planes=pack(codes, 4), scale=jnp.full((6, 1), 0.5, jnp.bfloat16), bits=4, master=4, shape=(6, 128)
    )
    back = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
    got = jax.grad(lambda x: jnp.sum(multiply(x, w) * back))(jnp.ones((2, 128)))
    np.testing.assert_allclose(got, np.asarray(back, np.float64) @ (0.5 * np.asarray(codes, np.float64)), rtol=1e-5)
