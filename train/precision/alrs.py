"""Adaptive learning-rate scaling: what the scales learn at each width (Double Rounding, 2502.01199, equations 6 and 7).

One scale serves all widths, and its gradient doubles with every bit that is dropped. So the paper lets it learn more
slowly at lower widths: with h the master's width, d = h - b, and m the mean over the scales of the largest gradient,

    eta_b = 10^(-d/2) for even d, 5 10^(-(d+1)/2) for odd d         m = mean_i min(max |clip(g_i, 1)|, 1)

    printed     rate_b = max(eta_b (rate - m), 0)
    relative    rate_b = eta_b rate (1 - m)
    eta_only    rate_b = eta_b rate

What is printed subtracts a gradient from a learning rate: with the paper's rate of 5e-4 and its own gradients of 1e-2
and more the result is negative, which would climb. It is kept for comparison, stopped at 0; `relative` is what we use.

Adam divides by a mean of squared gradients. If all widths shared it, that of the lowest would decide for all of them,
so `per_width` keeps one state a width.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from ...models.decoder import Params
from .layers import by_layer

Mode = Literal["relative", "printed", "eta_only"]
ETA = (1.0, 0.5, 0.1, 0.05, 0.01, 0.005, 0.001)  # at d = 0 to 6


# ------------------------------------------------------------------------------------------------------------- rates
def eta(down: int | Int32[Array, "*n"]) -> Float[Array, "*n"]:
    """The factor of a width that is `down` bits below the master's; a traced one is kept within 0 to 6."""
    if isinstance(down, int) and not 0 <= down < len(ETA):
        raise ValueError(f"eta: {down} bits below the master; expected 0 to {len(ETA) - 1}.")
    return jnp.asarray(ETA, jnp.float32)[jnp.clip(jnp.asarray(down), 0, len(ETA) - 1)]


def width_rate(
    rate: float | Float[Array, ""],
    mean: float | Float[Array, ""],
    down: int | Int32[Array, "*n"],
    mode: Mode = "relative",
) -> Float[Array, "*n"]:
    """The learning rate of the scales at a width, never below 0.

    Args:
      rate: that of the master's width.
      mean: `mean_clipped` of this step's gradients, before the update.
      down: how many bits the width is below the master's; a traced one serves all widths with one program.
      mode: which of the three formulas.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"width_rate: mode={mode!r}; expected one of {', '.join(get_args(Mode))}.")
    rate, mean = jnp.asarray(rate, jnp.float32), jnp.asarray(mean, jnp.float32)
    if mode == "printed":
        rate = jnp.maximum(rate - mean, 0.0)
    elif mode == "relative":
        rate = rate * (1.0 - mean)
    return eta(down) * rate


def mean_clipped(grads: Params) -> Float[Array, ""]:
    """m, from 0 to 1: how large the gradients of the scales are, the largest of each matrix in each layer.

    Clipping is by value; for the paper's one scale a layer, clipping by norm would be the same. Gains have a gradient
    at their own width alone, so they do not count.

    Args:
      grads: of the tree of `multi_precision.init_scales`, layers stacked or as a tuple.
    """
    largest = by_layer(grads, lambda g, axes: jnp.max(jnp.minimum(jnp.abs(g.astype(jnp.float32)), 1.0), axes))
    each = [m.reshape(-1) for name, m in largest.items() if name.split("/")[-1] != "gain"]
    if not each:
        raise ValueError("mean_clipped: no scales in the gradients; expected the tree of init_scales.")
    return jnp.mean(jnp.concatenate(each))


# ----------------------------------------------------------------------------------------------------------- moments
def per_width(inner: optax.GradientTransformation, widths: Sequence[int]) -> optax.GradientTransformationExtraArgs:
    """Keep one state of `inner` for each width, and let a step see and change that of its own width alone.

    `update(grads, state, params, bits=...)` takes the width, traced or not; the states are one tree with a leading axis
    [W], so one program serves all widths. A traced width that is none of `widths` counts as the nearest of them.

    The step count of `inner` is that of the width. So a schedule belongs outside, on the count of all steps, and so
    does the rate: `updates = -width_rate(...) * u` with u of `per_width(optax.scale_by_adam(), widths)`.

    With one width a layer, map over the layers: `jax.vmap(tx.init)(stacked)`, then `jax.vmap(tx.update)`.

    Args:
      inner: such as `optax.scale_by_adam()`.
      widths: all that training uses.
    """
    if not widths or len({*widths}) != len(widths):
        raise ValueError(f"per_width: widths={tuple(widths)}; expected at least one, each of them once.")
    wide = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        copies = lambda x: jnp.broadcast_to(jnp.asarray(x)[None], (len(widths), *jnp.shape(x)))
        return jax.tree.map(copies, wide.init(params))

    def update(updates: Any, state: Any, params: Any = None, *, bits: Any = None, **extra: Any) -> tuple[Any, Any]:
        if bits is None or (isinstance(bits, int) and bits not in widths):
            raise ValueError(f"per_width: bits={bits}; expected one of {tuple(widths)}.")
        away = jnp.abs(jnp.asarray(widths, jnp.int32) - jnp.asarray(bits, jnp.int32)[None])
        i = jnp.argmin(away)
        updates, new = wide.update(updates, jax.tree.map(lambda s: s[i], state), params, **extra)
        return updates, jax.tree.map(lambda s, n: s.at[i].set(n), state, new)

    return optax.GradientTransformationExtraArgs(init, update)
