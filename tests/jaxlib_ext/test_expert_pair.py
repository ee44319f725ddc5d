"""Oracle: the formulas in float64. The kernel runs step by step, with races looked for and NaN in unwritten memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.jaxlib_ext.expert_pair import Expert, expert_pair
from jaxaroo.sharding.topology import CHIPS, compile_for, kernel_traffic

SHAPES = [(1, 16, 24), (5, 32, 200), (3, 2048, 300)]  # R, D, F; the last has tiles, of which one is ragged
IMPLS = ("xla", "interpret-tpu")


def case(R, D, F, dtype=jnp.float32):
    rng = np.random.default_rng(R)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) * shape[-1] ** -0.5, dtype)
    expert = lambda: Expert(draw(F, D), draw(F, D), draw(D, F))
    return draw(R, D) * 3, draw(R, D) * D**0.5, draw(4, D) * 3, (expert(), expert())


def oracle(a, u, router, experts):
    a, u, router = (np.asarray(x, np.float64) for x in (a, u, router))
    silu = lambda x: x / (1 + np.exp(-x))
    e = []
    for gate, up, down in experts:
        gate, up, down = (np.asarray(w, np.float64) for w in (gate, up, down))
        e.append((silu(u @ gate.T) * (u @ up.T)) @ down.T)
    g = np.exp(u @ router.T)
    w, v = g[:, :2] / g[:, :2].sum(1, keepdims=True), g[:, 2:] / g[:, 2:].sum(1, keepdims=True)
    sign = np.where(g[:, 2] > g[:, 3], 1.0, -1.0)[:, None]
    return a + w[:, :1] * e[0] + w[:, 1:] * e[1], a + sign * (v[:, :1] * e[0] - v[:, 1:] * e[1])


mixed = jax.jit(expert_pair, static_argnames="impl")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_mixtures_are_those_of_the_formulas(shape, impl):
    given = case(*shape)
    for got, want in zip(mixed(*given, impl=impl), oracle(*given), strict=True):
        assert got.dtype == jnp.float32
        assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_is_summed_in_float32(impl):
    given = case(5, 256, 384, jnp.bfloat16)
    for got, want in zip(mixed(*given, impl=impl), oracle(*given), strict=True):
        assert np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want)


def test_gradients_are_those_of_the_reference_and_none_goes_through_the_sign():
    given = case(3, 32, 40)
    weights = [jnp.asarray(np.random.default_rng(i).standard_normal((3, 32)), jnp.float32) for i in range(2)]
    loss = lambda *given, impl: sum(jnp.sum(m * w) for m, w in zip(mixed(*given, impl=impl), weights, strict=True))
    got, want = (
        jax.grad(functools.partial(loss, impl=impl), argnums=(0, 1, 2, 3))(*given) for impl in ("interpret-tpu", "xla")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    assert all(float(jnp.abs(x).max()) > 1e-3 for x in jax.tree.leaves(got))


@pytest.mark.errors
def test_shapes_and_names_that_mean_nothing_are_refused():
    a, u, router, experts = case(3, 16, 24)
    with pytest.raises(ValueError, match=r"expert_pair: a \(3, 16\), u \(3, 16\), router \(3, 16\)"):
        expert_pair(a, u, router[:3], experts)
    with pytest.raises(ValueError, match=r"expected \[R, D\] twice"):
        expert_pair(a, u, router, (experts[0], experts[1]._replace(down=experts[1].up)))
    many = lambda x: jnp.tile(x, (22, 1))
    with pytest.raises(ValueError, match=r"impl='tpu'; .* 66 rows; it is made for up to 64"):
        expert_pair(many(a), many(u), router, experts, impl="tpu")
    with pytest.raises(ValueError, match="expert_pair: impl='gpu'; expected one of"):
        expert_pair(a, u, router, experts, impl="gpu")
    np.testing.assert_allclose(
        expert_pair(many(a), many(u), router, experts).main[:3], mixed(a, u, router, experts).main, rtol=1e-4, atol=1e-5
    )


@pytest.mark.aot
@pytest.mark.parametrize("chip", [c if c == "v5e" else pytest.param(c, marks=pytest.mark.proof) for c in CHIPS])
@pytest.mark.slow
def test_the_tpu_compiler_takes_the_kernel_at_the_shapes_of_an_8b_target(chip, libtpu):
    """And it moves what has to be moved: each weight once."""
    like, (D, F) = jax.ShapeDtypeStruct, (4096, 4096)
    expert = Expert(like((F, D), jnp.bfloat16), like((F, D), jnp.bfloat16), like((D, F), jnp.bfloat16))
    for R in (1, 10, 64):
        args = like((R, D), jnp.float32), like((R, D), jnp.bfloat16), like((4, D), jnp.bfloat16), (expert, expert)
        assert "expert_pair" in compile_for(chip, expert_pair, *args).as_text()
        [traffic] = kernel_traffic(functools.partial(expert_pair, impl="tpu"), *args)
        least = 6 * 2 * D * F + R * D * (4 + 2 + 4 + 4) + 4 * D * 2
        assert traffic.moved == least
