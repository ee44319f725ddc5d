"""The kernels, in the interpreter that looks for races and fills unwritten memory with NaN. Oracle: the dense forms,
which are held to float64 elsewhere; and the compiler of chips that are not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from jaxaroo.jaxlib_ext import logit_tiles, token_kl, token_stats
from jaxaroo.jaxlib_ext.logit_tiles import Layout, check_tiles
from jaxaroo.sharding.topology import CHIPS, compile_for, kernel_traffic

BENT = {"scale": 0.5, "softcap": 2.0, "temperature": 0.7}
like = jax.ShapeDtypeStruct


def inputs(N, V, D=32, E=16, dtype=jnp.float32, spread=1.0):
    """Of a policy and a reference of another width, logits of about `spread`; with a cotangent for every result."""
    keys = jax.random.split(jax.random.key(N * V), 6)
    draw = lambda key, n, width: (jax.random.normal(key, (n, width)) * (spread**0.5 * width**-0.25)).astype(dtype)
    streams = draw(keys[0], N, D), draw(keys[1], V, D), draw(keys[2], N, E), draw(keys[3], V, E)
    return streams, jax.random.randint(keys[4], (N,), 0, V), jax.random.normal(keys[5], (4, N))


def both(form, streams, targets, cotangents, mask=None, **options):
    """All results of an operation, and gradients that no result can hide from."""
    impl = {"kernel": "interpret-tpu", "loops of a gpu": "gpu", "dense": None}[form]

    def total(h, w, rh, rw):
        if form == "dense":
            found = (*token_stats.reference(h, w, targets, want_sum_sq=True, **options),)
            found += (token_kl.reference(h, w, rh, rw, **options),)
            found = found if mask is None else tuple(jnp.where(mask, x, 0.0) for x in found)
        else:
            found = (*token_stats.token_stats(h, w, targets, mask, want_sum_sq=True, impl=impl, **options),)
            found += (token_kl.token_kl(h, w, rh, rw, mask, impl=impl, **options),)
        weighed = (*found[:3], found[4])
        return sum(jnp.sum(c * x) for c, x in zip(cotangents, weighed, strict=True)), found

    (_, found), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True))(*streams)
    return found, grads


def assert_close(got, want, tolerance):
    """By the norm of what is wanted."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.float64(a), np.float64(b)
        assert np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1e-3 * np.sqrt(b.size))


@pytest.mark.parametrize(
    ("N", "V", "transform"), [(37, 101, BENT), (37, 101, {}), (300, 700, {}), (16, 256, {}), (1, 3, {})]
)
@pytest.mark.slow
def test_kernels_give_values_and_gradients_of_the_dense_form(N, V, transform):
    given = inputs(N, V)
    assert_close(both("kernel", *given, **transform), both("dense", *given, **transform), 3e-6)


@pytest.mark.slow
def test_a_gpu_has_larger_tiles_and_the_same_numbers(monkeypatch):
    given = inputs(2500, 700)
    mask = jnp.arange(2500) % 3 == 1
    sizes = []
    loops = logit_tiles._sweep_loops
    monkeypatch.setattr(
        logit_tiles, "_sweep_loops", lambda rule, o, *rest: sizes.append(o[:2]) or loops(rule, o, *rest)
    )
    got = both("loops of a gpu", *given, mask, token_tile=16, vocab_tile=32)
    assert_close(got, both("dense", *given, mask), 3e-6)
    assert set(sizes) == {(2048, 16384)}


@pytest.mark.parametrize("number", [17, 0, 16])
@pytest.mark.slow
def test_tokens_behind_the_mask_are_not_looked_at(number, monkeypatch):
    """With tiles of 16 tokens: a tile and one token, none, a whole tile."""
    monkeypatch.setattr(logit_tiles, "_held", lambda row, width: 16)
    jax.clear_caches()
    streams, targets, cotangents = inputs(300, 300)
    mask = jnp.asarray(np.random.default_rng(0).permutation(300) < number)
    poisoned = tuple(x if i % 2 else jnp.where(mask[:, None], x, jnp.nan) for i, x in enumerate(streams))
    got = both("kernel", poisoned, targets, cotangents, mask)
    assert_close(got, both("dense", streams, targets, cotangents, mask), 3e-6)
    jax.clear_caches()


@settings(max_examples=4)
@given(N=st.integers(1, 70), V=st.integers(1, 600), rows=st.sampled_from([16, 32, 128]), seed=st.integers(0, 9))
@pytest.mark.slow
def test_any_size_in_any_tiles(N, V, rows, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logit_tiles, "_held", lambda row, width: rows)
        jax.clear_caches()
        given = inputs(N, V)
        mask = jnp.asarray(np.random.default_rng(seed).random(N) < 0.6)
        assert_close(both("kernel", *given, mask), both("dense", *given, mask), 3e-6)


@pytest.mark.slow
def test_large_logits_stay_finite_and_bfloat16_is_summed_in_float32():
    given = inputs(40, 300, spread=100.0)
    assert_close(both("kernel", *given), both("dense", *given), 1e-4)  # a float32 at 400 is known to 3e-5
    streams, *rest = inputs(40, 300, dtype=jnp.bfloat16)
    got = both("kernel", streams, *rest)
    assert [x.dtype for x in got[1]] == [jnp.bfloat16] * 4
    want = both("dense", tuple(x.astype(jnp.float32) for x in streams), *rest)
    assert_close(got[0], want[0], 1e-5)
    assert_close(got[1], want[1], 1e-2)


@pytest.mark.parametrize(("shape", "tokens", "vocab"), [((2, 4), "a", "b"), ((8,), None, "a")])
def test_each_device_runs_the_kernels_on_its_own_part(shape, tokens, vocab):
    streams, targets, cotangents = inputs(48, 208)
    mask = jnp.arange(48) % 3 != 1
    want = both("dense", streams, targets, cotangents, mask)
    axes = "ab"[: len(shape)]
    mesh = jax.make_mesh(shape, tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
    with jax.set_mesh(mesh):
        got = both("kernel", streams, targets, cotangents, mask, layout=Layout(PartitionSpec(tokens), vocab))
    assert_close(got, want, 3e-6)


def lowered(platform, *, mesh=None, layout=None):
    """Whether there is a kernel in the program of a loss and its gradients."""
    args = like((64, 256), jnp.float32), like((512, 256), jnp.float32), like((64,), jnp.int32)
    f = lambda h, w, y: jax.grad(lambda h, w: token_stats.token_stats(h, w, y, layout=layout).logp.sum(), (0, 1))(h, w)
    text = str(jax.export.export(jax.jit(f), platforms=[platform])(*args).mlir_module())
    return text.count("tpu_custom_call")


def test_a_tpu_gets_kernels_also_where_each_device_does_its_part_and_nothing_else_does():
    assert [lowered(p) for p in ("tpu", "cuda", "cpu")] == [3, 0, 0]
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        assert lowered("tpu", layout=Layout(PartitionSpec("a"), "b")) == 3
        assert lowered("tpu") == 0


EIGHT = dict(N=8192, V=128_256, D=4096)


@pytest.mark.aot
@pytest.mark.parametrize(("op", "chip"), [*[("stats", chip) for chip in CHIPS], ("kl", "v5e"), ("kl", "tpu7x")])
def test_both_passes_compile_for_an_8b_model_within_its_inputs_and_gradients(op, chip, libtpu):
    N, V, D = EIGHT.values()
    h, w = like((N, D), jnp.bfloat16), like((V, D), jnp.bfloat16)
    if op == "stats":
        loss = lambda h, w, y: token_stats.token_stats(h, w, y).logp.sum()
        compiled = compile_for(chip, jax.value_and_grad(loss, argnums=(0, 1)), h, w, like((N,), jnp.int32))
    else:
        loss = lambda h, w, rh, rw: token_kl.token_kl(h, w, rh, rw).sum()
        compiled = compile_for(chip, jax.value_and_grad(loss, argnums=(0, 1)), h, w, h, w)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    dense = 3 * 4 * N * V  # logits, probabilities and their derivative
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.02 * dense


def test_each_pass_reads_the_head_once_for_a_thousand_tokens_or_the_tokens_once_for_hundreds_of_rows():
    N, V, D = EIGHT.values()
    args = like((N, D), jnp.bfloat16), like((V, D), jnp.bfloat16), like((N,), jnp.int32)
    loss = lambda h, w, y: token_stats.token_stats(h, w, y, impl="tpu").logp.sum()
    found = {t.name: t for t in kernel_traffic(jax.grad(loss, argnums=(0, 1)), *args, scalars=[np.int32([8])])}
    head, hidden = 2 * V * D, 2 * N * D
    assert found["sweep"].moved <= 1.02 * (8 * head + hidden)
    found |= {t.name: t for t in kernel_traffic(jax.grad(loss, argnums=(0, 1)), *args, scalars=[np.int32([16])])}
    assert found["dhidden"].moved <= 1.02 * (16 * head + 3 * hidden)
    found |= {t.name: t for t in kernel_traffic(jax.grad(loss, argnums=(0, 1)), *args, scalars=[np.int32([32])])}
    assert found["dhead"].moved <= 1.02 * (2 * head + -(-V // 512) * hidden)
    assert all(t.held <= 48 << 20 for t in found.values())


@pytest.mark.errors
def test_what_cannot_be_is_refused():
    tiles = functools.partial(logit_tiles.LogitTiles, 8, 8, 1.0, None)
    with pytest.raises(ValueError, match="here: a vocabulary of 16777217; expected at most 16777216"):
        check_tiles(tiles(1.0), (1 << 24) + 1, "here")
    wide = jnp.zeros((8, 80_000)), jnp.zeros((8, 80_000)), jnp.zeros(8, jnp.int32)
    with pytest.raises(ValueError, match="320000 bytes of hidden states a token; it is made for up to"):
        token_stats.token_stats(*wide, impl="tpu")
