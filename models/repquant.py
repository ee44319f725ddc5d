"""RepQuant: quantise activations channel by channel, and serve them with one scale (2402.05628; RepQ-ViT, 2212.08254).

What leaves a norm differs from channel to channel, so each channel k is given its own quantiser

    q = clip(round(x / s_k) + z_k, 0, 2^b - 1)        x_q = (q - z_k) s_k

Then norm and next matrix are rewritten so that the same codes come from one pair (S, Z), the means of s and z. With
r = s / S and d = (Z - z) S

    gain <- gain / r        bias <- bias / r - d        W_nk <- W_nk r_k        c_n <- c_n + sum_k W_nk r_k d_k

the norm's output is x / r - d, every output of the layer is what it was, and (x / r - d) / S + Z = x / s + z. Z is
rounded to an integer, which the identity needs and the paper's mean is not. RMSNorm has no bias, and gets a symmetric
quantiser (z = 0, codes from -2^(b-1) to 2^(b-1) - 1): r alone. So it is for our decoders, `reparameterise_norms`.

The probabilities of a softmax are quantised on the grid of powers of the root of 2, which shifts can compute:

    q = clip(round(-2 log2(a / m)), 0, 2^b - 1)        a_q = m 2^-ceil(q / 2) (sqrt 2 if q is odd)

m is the largest to be represented, and what rounds beyond the last step is 0. Matrices are `[out..., in]`.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from .decoder import DecoderConfig, Params, stack_layers, unstack_layers
from .ptq import layer_inputs
from .quantise import code_range

PERCENTILES = (0.999, 0.9999, 0.99999)
NEXT = {"attn_norm": ("attn", ("q", "k", "v")), "mlp_norm": ("mlp", ("gate", "up"))}  # norm -> block, its matrices


# -------------------------------------------------------------------------------------------------- uniform quantiser
class Uniform(NamedTuple):
    """Scale and zero point of each channel, or of all of them."""

    scale: Float[Array, "..."]
    zero: Float[Array, "..."]  # whole numbers; 0 where codes are signed


def calibrate(x: Float[Array, "... K"], bits: int, *, symmetric: bool = False) -> Uniform:
    """For each channel the percentile, of three, at which clipping loses the least square error.

    A silent channel has the mean scale of the others: its r is 1, or the weights behind it, which do nothing, might be
    the largest of their rows.
    """
    rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    ordered = jnp.sort(jnp.abs(rows) if symmetric else rows, 0)
    tried, losses = [], []
    for p in PERCENTILES:
        if symmetric:
            scale = _quantile(ordered, p) / code_range(bits)[1]
            zero = jnp.zeros_like(scale)
        else:
            low, high = _quantile(ordered, 1 - p), _quantile(ordered, p)
            scale = jnp.where(high > low, (high - low) / (2**bits - 1), jnp.abs(low))  # what never changes is exact
            zero = jnp.round(-low / jnp.where(scale > 0, scale, 1.0))
        q = Uniform(jnp.where(scale > 0, scale, 1.0), zero)
        low = dequantise(quantise(rows, q, bits, symmetric=symmetric), q)
        tried.append(Uniform(scale, zero))
        losses.append(jnp.where(scale > 0, jnp.mean((rows - low) ** 2, 0), jnp.inf))
    best = jnp.argmin(jnp.stack(losses), 0)[None]
    pick = lambda *parts: jnp.take_along_axis(jnp.stack(parts), best, 0)[0]
    scale, zero = jax.tree.map(pick, *tried)
    live = jnp.sum(scale > 0).astype(jnp.float32)
    silent = jnp.where(live > 0, jnp.sum(scale) / jnp.maximum(live, 1.0), 1.0)
    return Uniform(jnp.where(scale > 0, scale, silent), zero)


def quantise(x: Float[Array, "..."], q: Uniform, bits: int, *, symmetric: bool = False) -> Int32[Array, "..."]:
    """Codes; a quantiser for each channel belongs to the last axis."""
    least, most = code_range(bits) if symmetric else (0, 2**bits - 1)
    codes = jnp.round(x.astype(jnp.float32) / _over(q.scale, x.ndim)) + _over(q.zero, x.ndim)
    return jnp.clip(codes, least, most).astype(jnp.int32)


def dequantise(codes: Int[Array, "..."], q: Uniform) -> Float[Array, "..."]:
    """The numbers that codes stand for."""
    return (codes.astype(jnp.float32) - _over(q.zero, codes.ndim)) * _over(q.scale, codes.ndim)


def shared(channels: Uniform) -> Uniform:
    """The one pair that serves all channels after reparameterisation."""
    return Uniform(jnp.mean(channels.scale, -1), jnp.round(jnp.mean(channels.zero, -1)))


# ------------------------------------------------------------------------------------------------- reparameterisation
def reparameterise_layer_norm(
    gain: Float[Array, " K"],
    bias: Float[Array, " K"],
    following: tuple[tuple[Float[Array, "... K"], Float[Array, "..."]], ...],
    channels: Uniform,
) -> tuple[Float[Array, " K"], Float[Array, " K"], tuple[tuple[Float[Array, "... K"], Float[Array, "..."]], ...]]:
    """A LayerNorm and every (weight, bias) that reads it, so that `shared(channels)` quantises between them."""
    one = shared(channels)
    r, d = channels.scale / one.scale, (one.zero - channels.zero) * one.scale

    def moved(w: Array, c: Array) -> tuple[Array, Array]:
        w = w * _over(r, w.ndim)
        return w, c + jnp.sum(w * _over(d, w.ndim), -1)

    return gain / r, bias / r - d, tuple(moved(w, c) for w, c in following)


def reparameterise_norms(params: Params, ratio: Mapping[str, Float[Array, "L D"]]) -> Params:
    """A decoder with the same outputs, whose norms give x / r: gains are divided by r, q, k, v, gate and up multiplied.

    Args:
      params: of `decoder.init_params`, layers stacked or as a tuple.
      ratio: r for "attn_norm", "mlp_norm" or both, one row a layer, as of `ratios`.
    """
    if extra := {*ratio} - {*NEXT}:
        raise ValueError(f"reparameterise_norms: ratios of {sorted(extra)}; expected some of {[*NEXT]}.")
    layers = dict(stack_layers(params)["layers"])
    for norm, r in ratio.items():
        block, names = NEXT[norm]
        gain, matrices = layers[norm], dict(layers[block])
        if r.shape != gain.shape:
            raise ValueError(f"reparameterise_norms: ratios {r.shape} for {norm} of {gain.shape}; expected its shape.")
        for name in names:
            w = matrices[name]
            wide = r.reshape(len(r), *(1,) * (w.ndim - 2), -1)
            matrices[name] = (w.astype(jnp.float32) * wide).astype(w.dtype)
        layers |= {norm: (gain.astype(jnp.float32) / r).astype(gain.dtype), block: matrices}
    new = params | {"layers": layers}
    return unstack_layers(new) if isinstance(params["layers"], tuple) else new


def norm_scales(
    cfg: DecoderConfig, params: Params, tokens: Int[Array, "B T"], bits: int
) -> dict[str, Float[Array, "L D"]]:
    """The symmetric scale of each channel of each norm's output, calibrated on whole sequences."""
    _, inputs = layer_inputs(cfg, params, tokens)
    seen = {"attn_norm": [x.qkv for x in inputs], "mlp_norm": [x.gate_up for x in inputs]}
    return {norm: jnp.stack([calibrate(x, bits, symmetric=True).scale for x in xs]) for norm, xs in seen.items()}


def ratios(scales: Mapping[str, Float[Array, "L D"]]) -> dict[str, Float[Array, "L D"]]:
    """r = s / S for each norm."""
    return {norm: s / jnp.mean(s, -1, keepdims=True) for norm, s in scales.items()}


# ------------------------------------------------------------------------------------------------------------ softmax
def quantise_softmax(a: Float[Array, "..."], most: Float[Array, ""], bits: int) -> Int32[Array, "..."]:
    """Codes from 0 to 2^b: the last, one more than b bits hold, stands for 0, as a mask does in the authors' code."""
    steps = jnp.round(-2 * jnp.log2(a.astype(jnp.float32) / most))
    return jnp.clip(steps, 0, 2**bits).astype(jnp.int32)


def dequantise_softmax(codes: Int[Array, "..."], most: Float[Array, ""], bits: int) -> Float[Array, "..."]:
    """One product and one shift of its exponent."""
    value = jnp.where(codes % 2 == 1, math.sqrt(2), 1.0).astype(jnp.float32) * most
    return jnp.where(codes < 2**bits, jnp.ldexp(value, -((codes + 1) // 2)), 0.0)


def calibrate_softmax(a: Float[Array, "..."], bits: int) -> Float[Array, ""]:
    """The percentile, of three, that as the largest probability loses the least square error."""
    flat = a.astype(jnp.float32).reshape(-1)
    tried = [_quantile(jnp.sort(flat), p) for p in PERCENTILES]
    loss = lambda most: jnp.mean((flat - dequantise_softmax(quantise_softmax(flat, most, bits), most, bits)) ** 2)
    return jnp.stack(tried)[jnp.argmin(jnp.stack([loss(most) for most in tried]))]


# ----------------------------------------------------------------------------------------------------------- private
def _over(v: Array, ndim: int) -> Array:
    """Give what belongs to the last axis, or to all, the leading axes it needs."""
    return v.reshape((1,) * (ndim - v.ndim) + v.shape)


def _quantile(ordered: Float[Array, "n ..."], p: float) -> Float[Array, "..."]:
    """Between the two nearest of n; where that is is known outside of float32, which is short of digits for it."""
    at = p * (len(ordered) - 1)
    i = int(at)
    return ordered[i] + (at - i) * (ordered[min(i + 1, len(ordered) - 1)] - ordered[i])
