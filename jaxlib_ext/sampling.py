"""Where top-k and top-p cut a distribution over a large vocabulary, without sorting it.

    cut = the smallest logit that is kept: of the k largest, of those the smallest set whose probabilities reach p

Ties at a cut are all kept. Both sets are upper sets, so the cut is found by halving: floats are taken as integers of
the same order, and each of 32 steps asks on which side of the middle the answer lies, by a count (top-k) or a sum
(top-p). A step reads the row once, in the kernel from fast memory.

The draw itself, argmax of logits and Gumbel noise, is one pass in XLA already, and its noise has to be that of
`jax.random`, which couples speculative decoding to plain decoding. Letters: B rows, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from .dispatch import Impl, Kernel, run


# 1. Reference: by sorting.
def reference(z: Float[Array, "B V"], k: Int[Array, " B"], p: Float[Array, " B"]) -> Float[Array, " B"]:
    """The smallest logit that top-k and then top-p keep."""
    V = z.shape[-1]
    down = -jnp.sort(-z, axis=-1)
    k = jnp.where(k > 0, k, V)
    kth = jnp.take_along_axis(down, k[:, None] - 1, axis=-1)  # [B, 1]
    prob = jax.nn.softmax(jnp.where(down >= kth, down, -jnp.inf), axis=-1)
    before = jnp.cumsum(prob, axis=-1) - prob  # the mass of likelier tokens
    kept = (before < p[:, None]) | (p[:, None] >= 1) | (jnp.arange(V)[None] == 0)
    return jnp.min(jnp.where(kept & (down >= kth), down, jnp.inf), axis=-1)


# 2. Kernel: some rows as a whole. z [b, V], k and p [b, 1] -> cut [b, 1]
def _kernel(z_ref, k_ref, p_ref, cut_ref):
    cut_ref[...] = _by_halving(z_ref[...], k_ref[...], p_ref[...])


def _by_halving(z: Float[Array, "b V"], k: Int[Array, "b 1"], p: Float[Array, "b 1"]) -> Float[Array, "b 1"]:
    order = _flipped(jax.lax.bitcast_convert_type(z, jnp.int32))
    low, high = jnp.min(order, axis=-1, keepdims=True), jnp.max(order, axis=-1, keepdims=True)
    top = jnp.max(z, axis=-1, keepdims=True)
    mass = jnp.exp(z - jnp.where(jnp.isfinite(top), top, 0.0))
    k = jnp.where(k > 0, k, z.shape[-1])
    count = lambda t: jnp.sum((order >= t).astype(jnp.int32), axis=-1, keepdims=True)
    kth = _largest(lambda t: count(t) >= k, low, high)
    above = lambda t: jnp.sum(jnp.where(order > t, mass, 0.0), axis=-1, keepdims=True)
    wanted = p * above(kth - 1)
    cut = _largest(lambda t: above(t) >= wanted, kth - 1, high) + 1
    cut = jnp.where(p < 1, jnp.minimum(cut, high), kth)  # p times a mass may be 0
    return jax.lax.bitcast_convert_type(_flipped(cut), jnp.float32)


def _flipped(x: Int[Array, "..."]) -> Int[Array, "..."]:
    """Bits of floats to integers of their order, and back."""
    return x ^ ((x >> 31) & 0x7FFFFFFF)


def _largest(holds: Callable[[Array], Bool[Array, "b 1"]], low: Int[Array, "b 1"], high: Int[Array, "b 1"]) -> Array:
    """The largest integer up to high that it holds for: at low it does, and where it does not, nowhere above."""

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up, whose sum may not fit
        good = holds(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle - 1)

    return jax.lax.fori_loop(0, 32, halve, (low, high))[0]


# 3. Launch: as many rows as a register has lines.
def _launch(z, k, p, interpret: Any = False):
    (B, V), rows = z.shape, min(8, z.shape[0])
    block = lambda n: pl.BlockSpec((rows, n), lambda i: (i, 0))
    return pl.pallas_call(
        _kernel,
        grid=(pl.cdiv(B, rows),),
        in_specs=[block(V), block(1), block(1)],
        out_specs=block(1),
        out_shape=jax.ShapeDtypeStruct((B, 1), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=64 << 20),
        interpret=interpret,
        name="cut",
    )(z, k[:, None], p[:, None])[:, 0]


_once = jax.jit(_launch, static_argnums=3)  # traced once, also where it is not lowered


# 4. Operation: the kernel on a TPU, halving in XLA elsewhere.
def cut(
    z: Float[Array, "B V"],
    k: Int[Array, " B"],
    p: Float[Array, " B"],
    *,
    impl: Impl | Literal["sort"] = "auto",
) -> Float[Array, " B"]:
    """The smallest logit that top-k and then top-p keep.

    Args:
      z: logits, float32; none is NaN.
      k: how many of the largest are kept, up to V; 0 keeps all.
      p: which part of the probability of those; 1 keeps all.
      impl: as `dispatch.run` takes it, xla being the same halving; sort is the reference.
    """
    if z.ndim != 2 or z.dtype != jnp.float32 or not k.shape == p.shape == z.shape[:1] or not z.shape[1]:
        found = f"z {z.dtype}{z.shape}, k {k.shape}, p {p.shape}"
        raise ValueError(f"cut: {found}; expected float32 [B, V], [B], [B], and V at least 1.")
    if impl == "sort":
        return reference(z, k, p)
    plain = lambda z, k, p: _by_halving(z, k[:, None], p[:, None])[:, 0]
    return run("cut", impl, plain, z, k, p, tpu=Kernel(_once))
