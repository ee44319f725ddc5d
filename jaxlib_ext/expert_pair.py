"""Jakiro's block: two small SwiGLU experts, the router's two softmaxes, and the two mixtures of them (2502.06282).

    E_b(u) = down_b (silu(gate_b u) * up_b u)        g = router u in R^4
    w = softmax(g_0, g_1)    main     = a + w_0 E_0 + w_1 E_1
    v = softmax(g_2, g_3)    contrast = a + s (v_0 E_0 - v_1 E_1)    s = 1 if g_2 > g_3 else -1, without gradient

The kernel goes through both experts' inner widths in tiles, reads every weight once, and writes nothing between input
and output.

Letters: R rows, D width, F inner width of an expert.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from .dispatch import Impl, Kernel, precision, run

MOST_ROWS = 64  # drafting and trees; training is left to XLA


class Expert(NamedTuple):
    """Weights of a SwiGLU without biases, `[out, in]`."""

    gate: Float[Array, "F D"]
    up: Float[Array, "F D"]
    down: Float[Array, "D F"]


class Mixed(NamedTuple):
    """Both mixtures, float32."""

    main: Float[Array, "R D"]
    contrast: Float[Array, "R D"]


# 1. Reference
def reference(
    a: Float[Array, "R D"], u: Float[Array, "R D"], router: Float[Array, "4 D"], experts: tuple[Expert, Expert]
) -> Mixed:
    """One product after the other, each rounded to the type of u, as the decoder's MLP does."""
    wide = lambda x, w: _dot(x, w.astype(x.dtype))
    times = lambda x, w: wide(x, w).astype(x.dtype)
    outputs = [times(jax.nn.silu(times(u, e.gate)) * times(u, e.up), e.down).astype(jnp.float32) for e in experts]
    return _mix(a.astype(jnp.float32), outputs[0], outputs[1], wide(u, router))


def _mix(a, e0, e1, g) -> Mixed:
    """From float32: sums of a few terms of the size of features, to be rounded once."""
    column = lambda i: g[:, i : i + 1]
    w, v = (jax.nn.sigmoid(column(i) - column(i + 1)) for i in (0, 2))  # the softmax of two
    sign = jnp.where(column(2) > column(3), 1.0, -1.0)
    return Mixed(a + w * e0 + (1 - w) * e1, a + sign * (v * e0 - (1 - v) * e1))


def _dot(x, w):
    """x w^T in float32."""
    how = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, how, precision=precision(x), preferred_element_type=jnp.float32)


# 2. Kernel: a tile of the inner widths. a, u [R, D]; router [4, D]; gate, up [bf, D], down [D, bf] of both experts
#   -> main, contrast [R, D]; kept from tile to tile: E_0, E_1 [R, D]
def _kernel(a_ref, u_ref, router_ref, *refs, F: int):
    weights, (main_ref, contrast_ref), sums = refs[:6], refs[6:8], refs[8:]
    step, u = pl.program_id(0), u_ref[...]

    @pl.when(step == 0)
    def _():
        for sum_ref in sums:
            sum_ref[...] = jnp.zeros_like(sum_ref)

    bf = weights[0].shape[0]
    inside = step * bf + jax.lax.broadcasted_iota(jnp.int32, (1, bf), 1) < F  # behind the end may be anything
    for (gate, up, down), sum_ref in zip((weights[:3], weights[3:]), sums, strict=True):
        inner = jax.nn.silu(_dot(u, gate[...].astype(u.dtype))) * _dot(u, up[...].astype(u.dtype))
        inner = jnp.where(inside, inner, 0.0).astype(u.dtype)
        sum_ref[...] += _dot(inner, jnp.where(inside, down[...], jnp.zeros_like(down)).astype(u.dtype))

    @pl.when(step == pl.num_programs(0) - 1)
    def _():
        g = _dot(u, router_ref[...].astype(u.dtype))
        mixed = _mix(a_ref[...].astype(jnp.float32), sums[0][...], sums[1][...], g)
        main_ref[...], contrast_ref[...] = mixed


# 3. Launch
def _launch(a, u, router, experts, interpret: Any = False) -> Mixed:
    (R, D), F = u.shape, experts[0].gate.shape[0]
    bf = min(F, max(128, (4 << 20) // (6 * D * experts[0].gate.dtype.itemsize) // 128 * 128))
    whole = lambda *shape: pl.BlockSpec(shape, lambda i: (0, 0))
    rows, columns = pl.BlockSpec((bf, D), lambda i: (i, 0)), pl.BlockSpec((D, bf), lambda i: (0, i))
    return Mixed(
        *pl.pallas_call(
            functools.partial(_kernel, F=F),
            grid=(pl.cdiv(F, bf),),
            in_specs=[whole(R, D), whole(R, D), whole(4, D), *[rows, rows, columns] * 2],
            out_specs=[whole(R, D), whole(R, D)],
            out_shape=[jax.ShapeDtypeStruct((R, D), jnp.float32)] * 2,
            scratch_shapes=[pltpu.VMEM((R, D), jnp.float32)] * 2,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=64 << 20),
            interpret=interpret,
            name="expert_pair",
        )(a, u, router, *experts[0], *experts[1])
    )


# 4. Operation: the kernel on a TPU, the reference elsewhere.
_once = jax.jit(_launch, static_argnums=4)  # traced once, also where it is not lowered


def expert_pair(
    a: Float[Array, "R D"],
    u: Float[Array, "R D"],
    router: Float[Array, "4 D"],
    experts: tuple[Expert, Expert],
    *,
    impl: Impl = "auto",
) -> Mixed:
    """Both mixtures of two experts.

    Args:
      a: what they are added to.
      u: what experts and router see.
      router: its four rows.
      experts: of one inner width.
      impl: as `dispatch.run` takes it. The kernel serves up to 64 rows.
    """
    (R, D), F = u.shape, experts[0].gate.shape[0]
    shapes = [tuple(w.shape for w in e) for e in experts]
    if a.shape != (R, D) or router.shape != (4, D) or shapes != [((F, D), (F, D), (D, F))] * 2:
        found = f"a {a.shape}, u {u.shape}, router {router.shape}, experts {shapes}"
        raise ValueError(f"expert_pair: {found}; expected [R, D] twice, [4, D], ([F, D], [F, D], [D, F]) twice.")
    why_not = f"{R} rows; it is made for up to {MOST_ROWS}." if R > MOST_ROWS else ""
    return run("expert_pair", impl, reference, a, u, router, experts, tpu=Kernel(_once, why_not))
