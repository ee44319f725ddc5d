"""Oracle: loops in float64 NumPy, values and the gradient p - p_ref chained by hand; then JAX's derivative of the
dense form."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from jaxaroo.jaxlib_ext.logit_tiles import Layout
from jaxaroo.jaxlib_ext.token_kl import reference, token_kl
from jaxaroo.sharding.mesh import MeshConfig, make_mesh

N, D, E, V = 37, 16, 10, 101
TRANSFORMS = [{}, {"softcap": 3.0}, {"scale": 0.5, "softcap": 2.0, "temperature": 0.7}, {"temperature": 2.5}]
TILES = [(37, 101), (8, 16), (7, 100), (1000, 1000)]
TILED = dict(token_tile=8, vocab_tile=16)
CLOSE = dict(rtol=0, atol=1e-5)


def inputs(dtype=jnp.float32, spread=1.0, sizes=(N, D, E, V), seed=0):
    """Logits of the order of `spread`, which stands in the hidden states."""
    N, D, E, V = sizes
    h, w, rh, rw = jax.random.split(jax.random.key(seed), 4)
    hidden, ref_hidden = jax.random.normal(h, (N, D)) * spread, jax.random.normal(rh, (N, E)) * spread
    head, ref_head = jax.random.normal(w, (V, D)) * D**-0.5, jax.random.normal(rw, (V, E)) * E**-0.5
    return tuple(x.astype(dtype) for x in (hidden, head, ref_hidden, ref_head))


def oracle(hidden, head, ref_hidden, ref_head, weights=None, scale=1.0, softcap=None, temperature=1.0):
    """Value of every token, and the gradient of their sum times `weights` to hidden and head."""
    args = (np.asarray(x).astype(np.float64) for x in (hidden, head, ref_hidden, ref_head))
    hidden, head, ref_hidden, ref_head = args

    def logp(h, w):
        z = scale * (w @ h)
        bent = z if softcap is None else softcap * np.tanh(z / softcap)
        slope = np.ones(len(z)) if softcap is None else 1 / np.cosh(z / softcap) ** 2
        bent = bent / temperature
        return bent - bent.max() - np.log(np.exp(bent - bent.max()).sum()), slope * scale / temperature

    values, dhidden, dhead = [], np.zeros_like(hidden), np.zeros_like(head)
    for n in range(len(hidden)):
        (ours, slope), (theirs, _) = logp(hidden[n], head), logp(ref_hidden[n], ref_head)
        values.append(sum(np.exp(theirs[v]) * (theirs[v] - ours[v]) for v in range(len(head))))
        dz = (1.0 if weights is None else float(weights[n])) * (np.exp(ours) - np.exp(theirs)) * slope
        dhidden[n] = dz @ head
        dhead += np.outer(dz, hidden[n])
    return np.array(values), (dhidden, dhead)


def value_and_grads(form, args, weights, argnums=(0, 1), **options):
    def loss(*args):
        kl = form(*args, **options)
        return jnp.sum(weights * kl), kl

    (_, kl), grads = jax.jit(jax.value_and_grad(loss, argnums=argnums, has_aux=True))(*args)
    return kl, grads


def assert_all_close(got, want, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a).astype(np.float64), b, **tolerance), got, want)


@pytest.fixture
def weights():
    """Another cotangent for every token, of either sign."""
    return jax.random.normal(jax.random.key(9), (N,))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("tiles", TILES)
def test_value_and_gradients_match_the_float64_oracle(tiles, transform, weights):
    args = inputs()
    got = value_and_grads(token_kl, args, weights, token_tile=tiles[0], vocab_tile=tiles[1], **transform)
    assert_all_close(got, oracle(*args, weights, **transform), **CLOSE)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_dense_reference_is_the_oracle_too_with_jaxs_own_derivative(transform, weights):
    args = inputs()
    dense = value_and_grads(reference, args, weights, **transform)
    assert_all_close(dense, oracle(*args, weights, **transform), **CLOSE)
    assert_all_close(value_and_grads(token_kl, args, weights, **TILED, **transform), dense, **CLOSE)


def test_a_case_by_hand():
    """Logits (2, 1, 0) of the policy and (1, 1, 0) of the reference; the other direction would be 0.1196."""
    one, head, ref_head = jnp.ones((1, 1)), jnp.asarray([[2.0], [1.0], [0.0]]), jnp.asarray([[1.0], [1.0], [0.0]])
    kl, (_, dhead) = value_and_grads(token_kl, (one, head, one, ref_head), jnp.ones(1), token_tile=1, vocab_tile=2)
    p, q = np.exp([2, 1, 0]) / np.exp([2, 1, 0]).sum(), np.exp([1, 1, 0]) / np.exp([1, 1, 0]).sum()
    np.testing.assert_allclose(kl, [0.123292], rtol=0, atol=1e-6)
    np.testing.assert_allclose(dhead[:, 0], p - q, rtol=0, atol=1e-6)


def test_large_logits(weights):
    """Up to 100, where float32 logits themselves are good to about 1e-5, and divergences are of the order of 100."""
    args = inputs(spread=30.0)
    assert 60 < max(float(jnp.abs(h @ w.T).max()) for h, w in (args[:2], args[2:])) < 140
    (kl, grads), (want, wanted) = value_and_grads(token_kl, args, weights, **TILED), oracle(*args, weights)
    assert_all_close(kl, want, rtol=1e-5, atol=1e-4)
    assert_all_close(grads, wanted, rtol=0, atol=1e-3)  # of entries up to 100


def test_logits_far_from_zero_and_far_apart_stay_finite(weights):
    args = inputs(spread=1e4)
    kl, grads = value_and_grads(token_kl, args, weights, **TILED)
    assert_all_close(kl, oracle(*args)[0], rtol=1e-4, atol=0)
    assert all(bool(jnp.isfinite(g).all()) for g in grads)


def test_bfloat16_inputs_accumulate_in_float32(weights):
    args = inputs(jnp.bfloat16)
    (kl, grads), (want, wanted) = value_and_grads(token_kl, args, weights, **TILED), oracle(*args, weights)
    assert (kl.dtype, *(g.dtype for g in grads)) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    assert_all_close(kl, want, **CLOSE)  # nothing is rounded before the sums
    for g, w in zip(grads, wanted, strict=True):
        assert_all_close(g, w, rtol=1e-2, atol=1e-2 * np.abs(w).max())


def test_a_reference_may_have_another_dtype_than_the_policy(weights):
    args = (*inputs()[:2], *inputs(jnp.bfloat16)[2:])
    assert_all_close(value_and_grads(token_kl, args, weights, **TILED), oracle(*args, weights), **CLOSE)


@pytest.mark.slow
def test_tiles_do_not_change_the_result(weights):
    args = inputs()
    first, *others = (
        value_and_grads(token_kl, args, weights, token_tile=c_t, vocab_tile=c_v)
        for c_t, c_v in [(37, 101), (5, 101), (37, 25), (1, 1), (12, 51)]
    )
    for other in others:
        assert_all_close(other, first, rtol=0, atol=2e-6)


def test_what_all_logits_have_in_common_costs_no_accuracy():
    """These logits are exact in float32; a log-sum-exp of them would be rounded to 1e-4."""
    head, ref_head = jnp.asarray(1024 + np.random.default_rng(0).integers(-64, 64, (2, V, 1)) / 64, jnp.float32)
    args = (jnp.ones((1, 1)), head, jnp.ones((1, 1)), ref_head)
    assert_all_close(token_kl(*args, **TILED), oracle(*args)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("extra", [0, 6])
def test_nothing_when_the_policy_is_the_reference(extra, spread, weights):
    """Also when the reference is written wider, with states of 0 there."""
    hidden, head, *_ = inputs(spread=spread)
    wide = jnp.pad(hidden, ((0, 0), (0, extra))), jnp.pad(head, ((0, 0), (0, extra)), constant_values=0.3)
    kl, grads = value_and_grads(token_kl, (hidden, head, *wide), weights, **TILED)
    assert_all_close((kl, grads), (np.zeros(N), (np.zeros((N, D)), np.zeros((V, D)))), rtol=0, atol=1e-6)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), spread=st.floats(0.1, 30.0), near=st.floats(-5.0, 0.0))
def test_it_is_the_oracle_and_not_negative_however_near(seed, spread, near):
    hidden, head, noise, _ = inputs(spread=spread, sizes=(N, D, D, V), seed=seed)
    args = (hidden, head, hidden + 10.0**near * noise, head)
    kl, tolerance = KL(*args), 1e-6 * (1 + spread)
    np.testing.assert_allclose(kl, oracle(*args)[0], rtol=1e-5, atol=4 * tolerance)
    assert float(kl.min()) >= -tolerance


KL = jax.jit(lambda *args: token_kl(*args, **TILED))


@pytest.mark.parametrize("form", [reference, lambda *args: token_kl(*args, **TILED)])
def test_no_gradient_goes_into_the_reference(form, weights):
    _, grads = value_and_grads(form, inputs(), weights, argnums=(0, 1, 2, 3))
    assert [bool(np.any(g)) for g in grads] == [True, True, False, False]


def test_no_logits_of_all_tokens_are_held():
    """The program is looked at, forward and backward: no array is larger than the largest input."""
    sizes, ones = (64, 4, 6, 48), jnp.ones(64)

    def largest(form, **options):
        program = jax.make_jaxpr(lambda *args: value_and_grads(form, args, ones, **options))(*inputs(sizes=sizes))
        return max(np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\w\[([\d,]+)\]", str(program)))

    assert largest(reference) == 64 * 48
    loops = functools.partial(largest, token_kl, impl="xla")
    assert loops(token_tile=16, vocab_tile=16) == 64 * 6
    assert loops(token_tile=16, vocab_tile=48) == 16 * 48
    assert loops(token_tile=1000, vocab_tile=16) == 64 * 16  # a tile is no longer than there are tokens


def test_the_backward_pass_keeps_the_inputs_themselves_and_two_numbers_a_token():
    args = inputs()
    kept = jax.tree.leaves(jax.vjp(lambda h, w: token_kl(h, w, *args[2:], **TILED), *args[:2])[1])
    own = [x for x in kept if not any(x is y for y in args)]
    assert (len(kept), [x.shape for x in own]) == (6, [(N,), (N,)])


@pytest.mark.parametrize("laid_out", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.slow
def test_tokens_and_vocabulary_over_eight_devices_give_the_same(masked, laid_out):
    """With a layout each device for itself, without one as the compiler sees fit; tokens of a mask alone, or all."""
    args, weights = inputs(sizes=(40, D, E, 102)), jax.random.normal(jax.random.key(9), (40,))
    mask = (jnp.arange(40) % 3 > 0) & (jnp.arange(40) < 30) if masked else None
    plain = lambda *args, **more: token_kl(*args, mask, **more)
    among = jnp.ones(40, bool) if mask is None else mask
    values, grads = value_and_grads(token_kl, args, jnp.where(among, weights, 0.0), **TILED)
    layout = Layout(PartitionSpec("fsdp"), "tensor") if laid_out else None
    with jax.set_mesh(mesh := make_mesh(MeshConfig(fsdp=4, tensor=2))):
        place = lambda x, *axes: jax.device_put(x, jax.sharding.NamedSharding(mesh, PartitionSpec(*axes)))
        split = [place(x, *axes) for x, axes in zip(args, [("fsdp",), ("tensor",)] * 2, strict=True)]
        assert all(len(x.sharding.device_set) == 8 for x in split)
        got = value_and_grads(plain, split, place(weights, "fsdp"), layout=layout, **TILED)
    assert_all_close(got, (jnp.where(among, values, 0.0), grads), rtol=0, atol=2e-6)


@pytest.mark.errors
def test_shapes_and_settings_that_cannot_be_are_refused():
    h, w, rh, rw = inputs()
    found = r"hidden \(37, 16\), head \(101, 16\), ref_hidden \(36, 10\), ref_head \(101, 10\); expected \[\.\.\., D\]"
    with pytest.raises(ValueError, match=f"token_kl: {found}"):
        token_kl(h, w, rh[1:], rw)
    for place, wrong in enumerate([h[0], w[:, 1:], rh[:, 1:], rw[1:], h[1:], w[1:], rh[0], rw[0]]):
        args = [h, w, rh, rw]
        args[place % 4] = wrong
        with pytest.raises(ValueError, match=r"expected \[\.\.\., D\], \[V, D\], \[\.\.\., E\], \[V, E\]"):
            token_kl(*args)
    for nothing in ([h[:0], w, rh[:0], rw], [h, w[:0], rh, rw[:0]], [h, w, rh[:, :0], rw[:, :0]]):
        with pytest.raises(ValueError, match=r"token_kl: hidden .*; expected something of each"):
            token_kl(*nothing)
    with pytest.raises(ValueError, match="token_kl: temperature=0, softcap=None; expected a temperature"):
        token_kl(h, w, rh, rw, temperature=0)
    with pytest.raises(ValueError, match="token_kl: token_tile=0, vocab_tile=4096; expected at least 1"):
        token_kl(h, w, rh, rw, token_tile=0)
