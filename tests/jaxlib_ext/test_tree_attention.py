"""Oracle: loops in float64. Kernels run step by step, with races looked for and NaN in memory nobody has written."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.jaxlib_ext.tree_attention import dequantise, reference, tree_attention
from jaxaroo.models.cache import Int4Rows, Int8Rows, quantise_rows
from jaxaroo.sharding.topology import CHIPS, compile_for

# B, T, S, N, K, H, and rows of a block or more, one word of nodes or two, one part or several.
CASES = {
    "one query": ((1, 1, 300, 4, 2, 8), {}),
    "a tree in blocks": ((2, 7, 1300, 6, 2, 16), {}),
    "two words of nodes": ((1, 40, 200, 4, 1, 8), {}),
    "parts, the last of them empty": ((2, 3, 1300, 4, 4, 8), {"parts": 3}),
    "a soft cap": ((1, 5, 600, 4, 2, 16), {"softcap": 3.0, "parts": 2}),
}


def case(shape, seed=0, dtype=jnp.float32):
    """Sequences of unlike lengths; nodes see a random half of what is before the tree, and ancestors of it."""
    B, T, S, N, K, H = shape
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    mask = rng.random((B, T, S)) < 0.5
    for b in range(B):
        mask[b, :, S - b * S // 3 :] = False
        mask[b, :, 1] = True
    return draw(B, T, N, H) * 3, draw(B, S, K, H), draw(B, S, K, H), jnp.asarray(mask)


def oracle(q, k, v, mask, softcap=None, **_):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    y = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        rows = np.flatnonzero(mask[b, t])
        z = k[b, rows, n * k.shape[2] // N] @ q[b, t, n] / np.sqrt(H)
        z = z if softcap is None else softcap * np.tanh(z / softcap)
        p = np.exp(z - z.max())
        y[b, t, n] = (p / p.sum()) @ v[b, rows, n * k.shape[2] // N]
    return y


@functools.partial(jax.jit, static_argnames=("impl", "softcap", "parts"))
def attention(q, k, v, mask, impl="interpret-tpu", **settings):
    return tree_attention(q, k, v, mask, impl=impl, **settings)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", ["interpret-tpu", "xla"])
@pytest.mark.slow
def test_attention_is_that_of_loops(name, impl):
    shape, settings = CASES[name]
    given = case(shape)
    got, want = attention(*given, impl=impl, **settings), oracle(*given, **settings)
    assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)


def test_large_scores_of_bfloat16_stay_finite():
    q, k, v, mask = case((1, 3, 520, 4, 2, 32), dtype=jnp.bfloat16)
    got, want = attention(q * 100, k * 100, v, mask), oracle(q * 100, k * 100, v, mask)
    assert got.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(got, np.float64) - want) <= 1e-2 * np.linalg.norm(want)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["a tree in blocks", "parts, the last of them empty"])
@pytest.mark.slow
def test_codes_are_read_as_what_they_stand_for(name, bits):
    shape, settings = CASES[name]
    q, k, v, mask = case(shape)
    k, v = (quantise_rows(x * jnp.exp2(jnp.arange(shape[2]) % 5)[None, :, None, None], bits) for x in (k, v))
    floats = [dequantise(rows, shape[-1], jnp.float32) for rows in (k, v)]
    want = oracle(q, *floats, mask, **settings)
    for impl in ("interpret-tpu", "xla"):
        got = attention(q, k, v, mask, impl=impl, **settings)
        assert np.linalg.norm(got - want) <= 2e-6 * np.linalg.norm(want)


@pytest.mark.slow
def test_what_nobody_sees_does_not_matter_whatever_it_holds():
    """Neither rows behind the last one in use, nor a query that sees nothing, which gets finite numbers."""
    q, k, v, mask = case((2, 3, 700, 4, 2, 8))
    mask = mask.at[0, 2].set(False).at[:, :, 300:].set(False)
    got = attention(q, k, v, mask)
    other = attention(q, k.at[:, 300:].set(1e30), v.at[:, 300:].set(-7.0), mask)
    np.testing.assert_array_equal(got, other)
    assert jnp.isfinite(got).all()
    np.testing.assert_allclose(got[1], oracle(q, k, v, mask.at[0, 2, 0].set(True))[1], rtol=1e-4, atol=1e-5)
    nothing = attention(q, k, v, jnp.zeros_like(mask))
    np.testing.assert_array_equal(nothing, jnp.zeros_like(q))


@pytest.mark.parametrize("bits", [None, 8])
def test_gradients_are_those_of_the_reference(bits):
    q, k, v, mask = case((1, 3, 150, 4, 2, 8))
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.float32)
    if bits:
        k, v = quantise_rows(k, bits), quantise_rows(v, bits)
    over = (0,) if bits else (0, 1, 2)
    loss = lambda q, k, v, impl: jnp.sum(attention(q, k, v, mask, impl=impl) * weights)
    got, want = (jax.grad(loss, argnums=over)(q, k, v, impl) for impl in ("interpret-tpu", "xla"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)
    assert max(float(jnp.abs(x).max()) for x in got) > 0.01


def test_the_reference_is_what_others_call():
    given = case((1, 2, 40, 4, 2, 8))
    np.testing.assert_array_equal(jax.jit(reference)(*given), attention(*given, impl="xla"))


@pytest.mark.errors
def test_shapes_and_names_that_mean_nothing_are_refused():
    q, k, v, mask = case((1, 3, 40, 4, 2, 8))
    with pytest.raises(ValueError, match=r"tree_attention: q \(1, 3, 4, 8\), rows \(1, 40, 2, 8\), mask \(1, 3, 39\)"):
        tree_attention(q, k, v, mask[..., 1:])
    with pytest.raises(ValueError, match="K dividing N"):
        tree_attention(q[:, :, :3], k, v, mask)
    with pytest.raises(ValueError, match=r"k \(1, 40, 2, 8\), v \(1, 40, 1, 8\); expected rows that are"):
        tree_attention(q, k, v[:, :, :1], mask)
    with pytest.raises(ValueError, match="parts=0, softcap=None; expected 1 or more"):
        tree_attention(q, k, v, mask, parts=0)
    with pytest.raises(ValueError, match="softcap=0"):
        tree_attention(q, k, v, mask, softcap=0.0)
    with pytest.raises(ValueError, match="impl='cuda'; expected"):
        tree_attention(q, k, v, mask, impl="cuda")
    many = lambda x: jnp.tile(x, (1, 22, *(1 for _ in x.shape[2:])))
    with pytest.raises(ValueError, match=r"impl='tpu'; .* 66 nodes; it is made for up to 64"):
        tree_attention(many(q), k, v, many(mask), impl="tpu")
    assert tree_attention(many(q), k, v, many(mask)).shape == (1, 66, 4, 8)


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_each_platform_gets_its_own_program(platform):
    q, k, v, mask = case((1, 3, 256, 4, 2, 128))
    text = str(jax.export.export(jax.jit(tree_attention), platforms=[platform])(q, k, v, mask).mlir_module())
    assert ("tpu_custom_call" in text) == (platform == "tpu")


@pytest.mark.aot
@pytest.mark.parametrize("chip", [c if c == "v5e" else pytest.param(c, marks=pytest.mark.proof) for c in CHIPS])
@pytest.mark.slow
def test_the_tpu_compiler_takes_the_kernel_at_the_shapes_of_an_8b_model(chip, libtpu):
    """A float cache is read where it lies: what else the program holds is small."""
    like = jax.ShapeDtypeStruct
    for B, T, S, bits, parts in [
        (1, 1, 32768, None, 2),
        (8, 1, 8192, None, 1),
        (1, 64, 32768, None, 1),
        (1, 8, 4096, 8, 1),
        (1, 8, 4096, 4, 1),
    ]:
        rows = like((B, S, 8, 128), jnp.bfloat16)
        if bits:
            side = like((B, S, 8), jnp.bfloat16)
            rows = (Int8Rows if bits == 8 else Int4Rows)(like((B, S, 8, 16 * bits), jnp.uint8), side, side)
        args = like((B, T, 32, 128), jnp.bfloat16), rows, rows, like((B, T, S), jnp.bool_)
        compiled = compile_for(chip, functools.partial(tree_attention, parts=parts), *args)
        assert "tree_attention" in compiled.as_text()
        if bits is None:
            assert compiled.memory_analysis().temp_size_in_bytes < 0.03 * 2 * B * S * 8 * 128 * 2
