"""Hessian-aware stochastic bit-switching: each layer draws its own width (2502.01199, algorithm 1 and appendix A.3).

    sensitive       t_l >= mean t           p(b) = b / sum of the widths
    insensitive     t_l < mean t            p(b) = 1 / W

In every step a layer keeps the step's common width, or with probability sigma draws another from p. So the model meets
the mixtures of widths that it will be served with, and its sensitive layers are wide more often than others.

What is printed for sigma multiplies it by (epoch + 1) / epochs in every epoch, which ends near 0 where the text says
that it grows; `redraw_share` grows from sigma / epochs to sigma. With layers of nearly equal traces the mean is a coin:
the rule `top` takes a fixed share of the layers instead.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

Rule = Literal["mean", "top"]


def redraw_share(epoch: int | Int32[Array, ""], epochs: int, most: float = 1.0) -> Float[Array, ""]:
    """Probability with which a layer draws anew in an epoch, the first of which is 0: most (epoch + 1) / epochs."""
    if epochs < 1 or not 0 <= most <= 1:
        raise ValueError(f"redraw_share: epochs={epochs}, most={most}; expected at least 1, and a probability.")
    return most * jnp.minimum((jnp.asarray(epoch).astype(jnp.float32) + 1.0) / epochs, 1.0)


def width_probabilities(
    traces: Float[Array, " L"], widths: tuple[int, ...], rule: Rule = "mean", top: float = 0.3
) -> Float[Array, "L W"]:
    """With what probability a layer that draws gets each width.

    Args:
      traces: how sensitive each layer is, `hessian.hessian_trace`.
      widths: to draw from.
      rule: what makes a layer sensitive: a trace not below the mean, or being among the largest.
      top: share of the layers that are sensitive under the rule "top", at least one layer.
    """
    if rule not in ("mean", "top") or not 0 < top <= 1 or not widths:
        raise ValueError(
            f"width_probabilities: rule={rule!r}, top={top}, widths={widths}; expected 'mean' or 'top', a share above "
            "0 up to 1, and at least one width."
        )
    if rule == "mean":
        sensitive = traces >= jnp.mean(traces)
    else:
        rank = jnp.argsort(jnp.argsort(-traces))  # 0 for the largest; of equal ones the first
        sensitive = rank < max(1, round(top * traces.size))
    even = jnp.full((len(widths),), 1 / len(widths), jnp.float32)
    wide = jnp.asarray(widths, jnp.float32) / sum(widths)
    return jnp.where(sensitive[:, None], wide[None], even[None])


def sample_widths(
    traces: Float[Array, " L"],
    widths: tuple[int, ...],
    base: int | Int32[Array, ""],
    share: float | Float[Array, ""],
    key: Array,
    rule: Rule = "mean",
    top: float = 0.3,
) -> Int32[Array, " L"]:
    """The widths of one step, for `multi_precision.fake_quantise_tree`: traced, so no step compiles anew.

    Args:
      traces: how sensitive each layer is.
      widths: to draw from.
      base: the step's common width.
      share: probability with which a layer leaves it and draws, `redraw_share`.
      key: of the step.
      rule: as in `width_probabilities`.
      top: likewise.
    """
    draw_key, redraw_key = jax.random.split(key)
    p = width_probabilities(traces, widths, rule, top)
    drawn = jnp.asarray(widths, jnp.int32)[jax.random.categorical(draw_key, jnp.log(p))]
    redraw = jax.random.bernoulli(redraw_key, jnp.asarray(share, jnp.float32), traces.shape)
    return jnp.where(redraw, drawn, jnp.asarray(base, jnp.int32))
