"""Quantise a weight at a width, with its gradient: Double Rounding (2502.01199, equations 1 to 5) on single arrays.

A weight W with the scale s of its output channel, or of its group of inputs, is used at l <= h bits as

    C = clip(round(W / s), n_h, p_h)        Q = clip(round(C / 2^d), n_l, p_l)        W_l = Q (s 2^d)        d = h - l

with n_b = -2^(b-1), p_b = 2^(b-1) - 1 and ties to even. Training differentiates this by the straight-through rule: with
v = W / s, G the gradient in W_l and m = (2^d n_l < v < 2^d p_l),

    dL/dW = G m        dL/ds = sum over the elements of s of G (2^d Q - m v)

The paper's scales are one a layer; here it is one for each output channel or group of inputs. Scales are snapped to
bfloat16 in the forward pass. What is exported are C (int8) and s (bfloat16), and both factors of Q s have at most 8
significant bits, so the float32 weights of training and of serving are the same numbers, to the bit.

A weight is `[out..., in...]`, its scale `[out..., M]` for M groups of the flattened inputs (M = 1 is one scale a
channel): their ranks say how many axes are inputs. Leading axes, as of stacked layers, are outputs like the others.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32

from ..jaxlib_ext.qmm import over_trailing

FLOOR = 1e-8  # of every scale


# ------------------------------------------------------------------------------------------------------------ config
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How the weights under one rule are quantised."""

    bits: tuple[int, ...] = (8, 6, 4, 2)  # the widths trained together, falling; the first is the master's
    group: int | None = None  # inputs that share a scale: 32, 64 or a multiple of 128; None is one per output channel
    scale_param: Literal["log2", "linear"] = "log2"  # what is learned: log2 s, or s itself as in the paper
    init: Literal["sigma3", "search", "absmax", "lsq"] = "sigma3"
    emphasis: tuple[float, ...] = ()  # of each width's error in "search"; () is 1 for all
    gain: tuple[int, ...] = ()  # widths whose weights are multiplied by a learned factor of the output channel
    grad_scale: bool = True  # divide the gradient of a scale by sqrt(n p_l), n elements sharing it (LSQ, 1902.08153)

    def __post_init__(self):
        widths = self.bits if isinstance(self.bits, tuple) else ()
        ints = widths and all(type(b) is int and 2 <= b <= 8 for b in widths)
        if not ints or any(a <= b for a, b in itertools.pairwise(widths)):
            raise ValueError(f"QuantConfig.bits: found {self.bits!r}; expected falling integers from 8 to 2.")
        g = self.group
        if g is not None and (type(g) is not int or g < 32 or (g not in (32, 64) and g % 128)):
            raise ValueError(f"QuantConfig.group: found {g!r}; expected None, 32, 64 or a multiple of 128.")
        for name, kinds in (("scale_param", ("log2", "linear")), ("init", ("sigma3", "search", "absmax", "lsq"))):
            if getattr(self, name) not in kinds:
                raise ValueError(f"QuantConfig.{name}: found {getattr(self, name)!r}; expected one of {kinds}.")
        a = self.emphasis
        fits = isinstance(a, tuple) and len(a) == len(widths) and self.init == "search"
        if a != () and not (fits and all(math.isfinite(x) and x >= 0 for x in a) and any(a)):
            raise ValueError(
                f"QuantConfig.emphasis: found {a!r} with init {self.init!r}; expected () or, for 'search', a number "
                f"from 0 up for each of {self.bits}, not all 0."
            )
        if not isinstance(self.gain, tuple) or len({*self.gain}) != len(self.gain) or not {*self.gain} <= {*widths}:
            raise ValueError(f"QuantConfig.gain: found {self.gain!r}; expected a tuple of widths among {self.bits}.")

    @property
    def master(self) -> int:
        """Width of the codes that are stored."""
        return self.bits[0]


# ----------------------------------------------------------------------------------------------------------- weights
def code_range(bits: Any) -> tuple[Any, Any]:
    """Least and greatest code: Python ints for a Python int, int32 arrays for an int32 array."""
    half = 1 << (bits - 1)
    return -half, half - 1


@jax.custom_jvp
def snap(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """The nearest value that bfloat16 has, at least `FLOOR`, in float32; the gradient passes unchanged.

    A conversion to bfloat16 and back would not do: XLA may leave such a pair out (`xla_allow_excess_precision`).
    """
    return jax.lax.reduce_precision(jnp.maximum(scale, FLOOR), exponent_bits=8, mantissa_bits=7)


snap.defjvps(lambda tangent, out, scale: tangent)


def scale_of(rho: Float[Array, "..."], cfg: QuantConfig) -> Float[Array, "..."]:
    """The snapped scale of the learned parameter."""
    return snap(jnp.exp2(rho) if cfg.scale_param == "log2" else rho)


def fake_quantise(
    w: Float[Array, "..."],
    scale: Float[Array, "... M"],
    bits: int | Int32[Array, "..."],
    *,
    master: int = 8,
    grad_scale: bool = False,
) -> Float[Array, "..."]:
    """W_l, in float32 inside and in W's dtype outside, with the gradients of the module's docstring.

    Args:
      w: the weight, outputs first.
      scale: the master's, one for each output and group of inputs.
      bits: l; an int32 array is traced, so one program serves all widths. It may have leading axes of w.
      master: h.
      grad_scale: divide the gradient of the scale by sqrt(n p_l), n elements sharing it.
    """
    _check_shapes("fake_quantise", w, scale)
    if isinstance(bits, int) and not 2 <= bits <= master:
        raise ValueError(f"fake_quantise: bits={bits}; expected 2 to {master}, the master's.")
    bits = jnp.asarray(bits, jnp.int32)
    if bits.shape != w.shape[: bits.ndim] or bits.ndim >= scale.ndim:
        raise ValueError(f"fake_quantise: bits of shape {bits.shape}, weight {w.shape}; expected its leading axes.")
    return _fake_quantise(w, scale.astype(jnp.float32), bits, master, grad_scale)


def encode(w: Float[Array, "..."], scale: Float[Array, "... M"], master: int = 8) -> Int8[Array, "..."]:
    """Master codes; the only use that is ever made of the float weight in serving."""
    _check_shapes("encode", w, scale)
    return _master_codes(w, scale, master)[1].astype(jnp.int8)


def decode(codes: Int8[Array, "..."], scale: Float[Array, "... M"]) -> Float[Array, "..."]:
    """Float32 weights from codes and the scale of their width; for oracles and small models."""
    _check_shapes("decode", codes, scale)
    return codes.astype(jnp.float32) * spread(scale.astype(jnp.float32), codes.shape)


def spread(scale: Float[Array, "... M"], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Scales `[out..., M]`, ready to multiply a weight of this shape `[out..., in...]`."""
    inputs = shape[scale.ndim - 1 :]
    if scale.shape[-1] == 1:
        return over_trailing(scale[..., 0], len(shape))
    size = math.prod(inputs) // scale.shape[-1]
    return jnp.broadcast_to(scale[..., None], (*scale.shape, size)).reshape(shape)


def init_scale(w: Float[Array, "..."], cfg: QuantConfig, over: int = 1) -> Float[Array, "... M"]:
    """The master's scale to start from, float32 and not yet snapped.

    "sigma3" reaches 3 standard deviations, a compromise that keeps 2 bits alive; "search" has the least sum of squared
    errors at the config's widths among 90 scales; "absmax" reaches the largest weight; "lsq" is LSQ's, for comparison
    (at 8 bits it makes every 2-bit code zero). Where a channel or group is all zeros, the scale is that of a fresh
    weight of variance 1 / inputs.

    Args:
      w: the weight, outputs first.
      cfg: group, init and widths.
      over: how many trailing axes are inputs.
    """
    inputs = math.prod(w.shape[w.ndim - over :])
    size = cfg.group or inputs
    if inputs % size:
        raise ValueError(
            f"init_scale: groups of {size} for {inputs} inputs; expected a divisor of them, or group=None."
        )
    rows = w.astype(jnp.float32).reshape(*w.shape[: w.ndim - over], inputs // size, size)
    top = code_range(cfg.master)[1]
    if cfg.init == "absmax":
        scale = jnp.max(jnp.abs(rows), -1) / top
    elif cfg.init == "lsq":
        scale = 2 * jnp.mean(jnp.abs(rows), -1) / top**0.5
    elif cfg.init == "sigma3":
        mean, sigma = jnp.mean(rows, -1), jnp.std(rows, -1)
        scale = (jnp.abs(mean) + 3 * sigma) / (top + 1)
    else:
        scale = _search(rows, cfg)
    return jnp.where(scale <= FLOOR, 3 * inputs**-0.5 / (top + 1), scale)  # so that NaN stays what it is


def init_gain(w: Float[Array, "..."], scale: Float[Array, "... M"], cfg: QuantConfig) -> Float[Array, "... G"]:
    """For each width in `cfg.gain`, the least-squares factor <W, W_l> / <W_l, W_l> of each output channel."""
    gains = []
    for bits in cfg.gain:
        low = fake_quantise(w.astype(jnp.float32), scale, bits, master=cfg.master)
        total = lambda x: jnp.sum(x.reshape(*scale.shape[:-1], -1), -1)
        power = total(low * low)
        gains.append(jnp.where(power > 0, total(w.astype(jnp.float32) * low) / jnp.where(power > 0, power, 1.0), 1.0))
    return jnp.stack(gains, -1)


# ------------------------------------------------------------------------------------------------------- activations
def fake_quantise_activations(
    x: Float[Array, "..."], scale: Float[Array, "..."], zero: Float[Array, "..."], bits: int | Int32[Array, ""]
) -> Float[Array, "..."]:
    """clip(round((x - zero) / scale), 0, 2^bits - 1) scale + zero: learned, unsigned, one pair for each width.

    Args:
      x: activations.
      scale: a scalar, or of x's rank with 1 where it is shared.
      zero: likewise; 0 after a ReLU.
      bits: the width, 1 to 8; an int32 scalar is traced.
    """
    for name, p in (("scale", scale), ("zero", zero)):
        if p.ndim and (p.ndim != x.ndim or any(a not in (1, b) for a, b in zip(p.shape, x.shape, strict=True))):
            raise ValueError(
                f"fake_quantise_activations: {name} {p.shape}, x {x.shape}; expected () or 1 where shared."
            )
    f32 = lambda p: p.astype(jnp.float32)
    return _fake_quantise_activations(x, f32(scale), f32(zero), jnp.asarray(bits, jnp.int32))


# ----------------------------------------------------------------------------------------------------------- private
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _fake_quantise(w, scale, bits, master: int, grad_scale: bool):
    _, codes = _master_codes(w, scale, master)
    _, low, factor = _low_codes(codes, bits, master)
    step = scale * over_trailing(factor, scale.ndim)
    return (low * spread(step, w.shape)).astype(w.dtype)


def _fake_quantise_fwd(w, scale, bits, master, grad_scale):
    return _fake_quantise(w, scale, bits, master, grad_scale), (w, scale, bits)


def _fake_quantise_bwd(master, grad_scale, saved, g):
    w, scale, bits = saved  # v and Q are computed again: a saved mask would be as large as the weight
    v, codes = _master_codes(w, scale, master)
    (least, most), low, factor = _low_codes(codes, bits, master)
    g, f = g.astype(jnp.float32), w.astype(jnp.float32)
    bound = lambda code: spread(scale * over_trailing(factor * code, scale.ndim), w.shape)
    inside = (bound(least) < f) & (f < bound(most))  # exact, as v would not be
    error = over_trailing(factor, w.ndim) * low - jnp.where(inside, v, 0.0)
    dscale = (g * error).reshape(*scale.shape, -1).sum(-1)
    if grad_scale:
        dscale = dscale * over_trailing(jax.lax.rsqrt(most * (w.size // scale.size)), scale.ndim)
    return jnp.where(inside, g, 0.0).astype(w.dtype), dscale, None


_fake_quantise.defvjp(_fake_quantise_fwd, _fake_quantise_bwd)


@jax.custom_vjp
def _fake_quantise_activations(x, scale, zero, bits):
    return (_activation_codes(x, scale, zero, bits)[2] * scale + zero).astype(x.dtype)


def _fake_quantise_activations_fwd(x, scale, zero, bits):
    return _fake_quantise_activations(x, scale, zero, bits), (x, scale, zero, bits)


def _fake_quantise_activations_bwd(saved, g):
    x, scale, zero, bits = saved
    v, most, q = _activation_codes(x, scale, zero, bits)
    g, inside = g.astype(jnp.float32), (v > 0) & (v < most)
    dscale, dzero = _sum_to(g * (q - jnp.where(inside, v, 0.0)), scale), _sum_to(jnp.where(inside, 0.0, g), zero)
    return jnp.where(inside, g, 0.0).astype(x.dtype), dscale, dzero, None


_fake_quantise_activations.defvjp(_fake_quantise_activations_fwd, _fake_quantise_activations_bwd)


def _activation_codes(x, scale, zero, bits):
    v, most = (x.astype(jnp.float32) - zero) / scale, ((1 << bits) - 1).astype(jnp.float32)
    return v, most, jnp.clip(jnp.round(v), 0.0, most)


def _sum_to(x: jax.Array, like: jax.Array) -> jax.Array:
    """Sum over the axes along which `like` was shared."""
    shared = tuple(i for i, n in enumerate(like.shape) if n == 1)
    return x.sum() if like.ndim == 0 else x.sum(shared, keepdims=True)


def _master_codes(w, scale, master: int):
    """v to a unit in its last place, and C exactly, both float32.

    XLA multiplies by a reciprocal where it sees that a divisor is broadcast, and divides where it does not, so what v
    rounds to near a tie would depend on the program around it. C s is exact, and so is what W has beyond it.
    """
    (least, most), w = code_range(master), w.astype(jnp.float32)
    s = spread(scale.astype(jnp.float32), w.shape)
    v = w / s
    near = jnp.clip(jnp.round(v), least - 1, most + 1)
    twice, odd = 2 * (w - near * s), near.astype(jnp.int32) & 1 == 1
    up, down = (twice > s) | ((twice == s) & odd), (twice < -s) | ((twice == -s) & odd)
    return v, jnp.clip(near + up.astype(jnp.float32) - down.astype(jnp.float32), least, most)


def _low_codes(codes, bits, master: int):
    """Range, Q and 2^d, float32; everything but Q has the shape of bits."""
    factor = jnp.left_shift(1, master - bits).astype(jnp.float32)
    least, most = (end.astype(jnp.float32) for end in code_range(bits))
    wide = lambda x: over_trailing(x, codes.ndim)
    return (least, most), jnp.clip(jnp.round(codes / wide(factor)), wide(least), wide(most)), factor


def _search(rows: Float[Array, "... M size"], cfg: QuantConfig) -> Float[Array, "... M"]:
    """One candidate after the other, so that memory is that of one."""
    unit = jnp.sqrt(jnp.mean(rows * rows, -1)) * 2.0 ** (8 - cfg.master)  # the root mean square: the mean may not be 0

    def error(scale):
        total = jnp.zeros_like(scale)
        for bits, alpha in zip(cfg.bits, cfg.emphasis or (1.0,) * len(cfg.bits), strict=True):
            low = fake_quantise(rows, scale[..., None], bits, master=cfg.master)
            total = total + alpha * jnp.sum((rows - low) ** 2, -1)
        return total

    def better(best, factor):
        least, chosen = best
        scale = jnp.maximum(factor * unit, FLOOR)
        e = error(scale)
        return (jnp.minimum(e, least), jnp.where(e < least, scale, chosen)), None

    start = (jnp.full_like(unit, jnp.inf), 0 * unit)  # NaN, as is then every error, where a weight is not finite
    return jax.lax.scan(better, start, jnp.geomspace(0.004, 0.06, 90, dtype=jnp.float32))[0][1]


def _check_shapes(where: str, w: Array, scale: Array) -> None:
    out = scale.ndim - 1
    inputs = math.prod(w.shape[out:])
    if not 1 <= out < w.ndim or scale.shape[:-1] != w.shape[:out] or not scale.shape[-1] or inputs % scale.shape[-1]:
        raise ValueError(
            f"{where}: weight {w.shape}, scale {scale.shape}; expected [out..., in...] and [out..., M], M a divisor "
            "of the inputs."
        )
