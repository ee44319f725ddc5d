"""LLM-FP4: weights and activations as floats of 4 or 8 bits whose exponent bias is a real number (2310.16836).

A format has E exponent bits and M mantissa bits, one sign, and neither infinities nor NaN. With the bias B the value x
is represented by

    e = max(floor(log2 |x| + B), 1)        x_q = round(x / 2^(e - M - B)) 2^(e - M - B)

where |x| is at most (2 - 2^-M) 2^(2^E - 1 - B), half goes to even, and e = 1 is also that of numbers below
the least normal one. 2^-B is a scale by another name: y = x 2^B is rounded to a format of bias 0, and that is how it is
computed here, with exact exponents.

A weight has one bias for each output channel. Activations differ from channel to channel, and one bias B for all of
them, from the largest, would lose the small. Each input channel k may have a bias B + o_k with an integer o_k >= 0 if
its weights are divided by 2^o_k, which is exact (the paper's pre-shifted exponent bias):

    sum_k x_k w_nk = sum_k (x_k 2^o_k) (w_nk 2^-o_k)

Biases and formats are found by search, for least error of the layer's output. Matrices are `[out, in]`.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32


# ----------------------------------------------------------------------------------------------------------- formats
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class FloatFormat:
    """One sign bit, and these."""

    exponent: int
    mantissa: int

    def __post_init__(self):
        if not (1 <= self.exponent <= 6 and 0 <= self.mantissa <= 10):
            raise ValueError(
                f"FloatFormat: found E{self.exponent}M{self.mantissa}; expected 1 to 6 bits of exponent, 0 to 10 of "
                "mantissa."
            )

    @property
    def largest(self) -> float:
        """The largest number, at bias 0."""
        return (2 - 2.0**-self.mantissa) * 2.0 ** (2**self.exponent - 1)


FORMATS = {  # bits -> those that are tried; the second is where a search begins, E2M1 and E4M3
    4: tuple(FloatFormat(exponent=3 - m, mantissa=m) for m in range(3)),
    8: tuple(FloatFormat(exponent=7 - m, mantissa=m) for m in range(2, 7)),
}


def bias_of(fmt: FloatFormat, largest: Float[Array, "..."]) -> Float[Array, "..."]:
    """The bias at which this is the largest number of the format; that of 1 where it is 0."""
    some = largest >= float(jnp.finfo(jnp.float32).tiny)  # of what is below devices take no logarithm
    return jnp.log2(fmt.largest) - jnp.log2(jnp.where(some, largest, 1.0))  # the quotient may be too large for a float


def quantise_float(x: Float[Array, "..."], fmt: FloatFormat, bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """The nearest number of the format, half to even; what is beyond the largest becomes it.

    Args:
      x: any array; the result has its dtype.
      fmt: how many bits are what.
      bias: a scalar, or of x's rank with 1 where it is shared.
    """
    if bias.ndim not in (0, x.ndim):
        raise ValueError(
            f"quantise_float: bias {bias.shape}, x {x.shape}; expected (), or x's rank with 1 where shared."
        )
    whole = jnp.floor(-bias)
    scale, binade = jnp.exp2(-bias - whole), whole.astype(jnp.int32)  # 1 for whole biases; apart, neither underflows
    y = jnp.clip(jnp.ldexp(x.astype(jnp.float32), -binade) / scale, -fmt.largest, fmt.largest)
    step = jnp.maximum(jnp.frexp(y)[1] - 1, 1) - fmt.mantissa  # frexp: floor(log2 |y|) + 1, exactly
    return jnp.ldexp(jnp.ldexp(jnp.round(jnp.ldexp(y, -step)), step) * scale, binade).astype(x.dtype)


# --------------------------------------------------------------------------------------------------------- one matrix
class FloatMatrix(NamedTuple):
    """How the product of x `[T, K]` and a weight `[N, K]` is quantised."""

    weight_format: FloatFormat
    weight_bias: Float[Array, "N 1"]
    input_format: FloatFormat
    input_bias: Float[Array, ""]
    offsets: Int32[Array, " K"]  # o_k


def plain(x: Float[Array, "T K"], w: Float[Array, "N K"], bits: int = 4) -> FloatMatrix:
    """The biases of maxima, nothing searched: E2M1 or E4M3."""
    fmt, x, w = _formats(bits)[1], x.astype(jnp.float32), w.astype(jnp.float32)  # bfloat16 is too coarse for a bias
    bias = jnp.min(_channel_biases(x, fmt))
    return FloatMatrix(fmt, _row_biases(w, fmt), fmt, bias, _offsets(x, fmt, bias))


def search(x: Float[Array, "T K"], w: Float[Array, "N K"], bits: int = 4, rounds: int = 3) -> FloatMatrix:
    """Formats and biases with little error of x W^T; in each round those of the weight, then those of the inputs.

    Candidates for a bias are 0.01 + 1.19 i / 100 times that of the maximum, i = 0 .. 99, as in the authors' code: a
    factor of the bias, so that which scales are tried depends on the unit of x. What a round begins with is a candidate
    too: no step raises the error, which is at most that of `plain`.

    Args:
      x: calibration inputs (the paper: 32 sequences).
      w: the weight.
      bits: 4 or 8, of both.
      rounds: how often each side is searched.
    """
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    formats, want = _formats(bits), x @ w.T
    rows = {f: _row_biases(w, f) for f in formats}
    shared = {f: jnp.min(_channel_biases(x, f)) for f in formats}
    outer = inner = formats[1]  # those of the weight and of the inputs, so far
    for _ in range(rounds):
        low = _inputs(x, inner, shared[inner])
        tried = {f: _best_rows(low, w, want, f, rows[f]) for f in formats}
        rows = {f: bias for f, (_, bias) in tried.items()}
        outer = min(formats, key=lambda f: float(jnp.sum(tried[f][0])))
        low = quantise_float(w, outer, rows[outer])
        tried = {f: _best_shared(x, low, want, f, shared[f]) for f in formats}
        shared = {f: bias for f, (_, bias) in tried.items()}
        inner = min(formats, key=lambda f: float(tried[f][0]))
    return FloatMatrix(outer, rows[outer], inner, shared[inner], _offsets(x, inner, shared[inner]))


def quantise_inputs(x: Float[Array, "*lead K"], found: FloatMatrix) -> Float[Array, "*lead K"]:
    """x_k 2^o_k, quantised with the one bias of all channels."""
    shifted = jnp.ldexp(x, found.offsets.reshape((1,) * (x.ndim - 1) + found.offsets.shape))
    return quantise_float(shifted, found.input_format, found.input_bias)


def quantise_weight(w: Float[Array, "N K"], found: FloatMatrix) -> Float[Array, "N K"]:
    """w_nk 2^-o_k, quantised: to be multiplied with `quantise_inputs`.

    The weight is quantised before it is divided, as in the authors' code; so stored exponents span 2^E - 1 more than
    the format's own.
    """
    return jnp.ldexp(quantise_float(w, found.weight_format, found.weight_bias), -found.offsets[None])


# ----------------------------------------------------------------------------------------------------------- private
def _formats(bits: int) -> tuple[FloatFormat, ...]:
    if bits not in FORMATS:
        raise ValueError(f"llm_fp4: bits={bits!r}; expected one of {[*FORMATS]}.")
    return FORMATS[bits]


def _row_biases(w: Float[Array, "N K"], fmt: FloatFormat) -> Float[Array, "N 1"]:
    return bias_of(fmt, jnp.max(jnp.abs(w), 1, keepdims=True))


def _channel_biases(x: Float[Array, "T K"], fmt: FloatFormat) -> Float[Array, " K"]:
    """A channel of zeros has the bias of the largest, or it might be the least of all."""
    most = jnp.max(jnp.abs(x), 0)
    return bias_of(fmt, jnp.where(most > 0, most, jnp.max(most)))


def _offsets(x: Float[Array, "T K"], fmt: FloatFormat, bias: Float[Array, ""]) -> Int32[Array, " K"]:
    """How many binades below the shared bias's a channel's own is: as many as the format has exponents, at most."""
    above = jnp.round(_channel_biases(x, fmt)) - jnp.round(bias)
    return jnp.clip(above, 0, 2**fmt.exponent - 1).astype(jnp.int32)


def _inputs(x: Float[Array, "T K"], fmt: FloatFormat, bias: Float[Array, ""]) -> Float[Array, "T K"]:
    """Quantised with the bias of their channel, not shifted."""
    offsets = _offsets(x, fmt, bias)[None]
    return jnp.ldexp(quantise_float(jnp.ldexp(x, offsets), fmt, bias), -offsets)


@jax.jit
def _best_rows(low, w, want, fmt: FloatFormat, start: Float[Array, "N 1"]):
    error = lambda bias: jnp.sum((low @ quantise_float(w, fmt, bias).T - want) ** 2, 0)[:, None]
    return _best(error, start, _row_biases(w, fmt))


@jax.jit
def _best_shared(x, low, want, fmt: FloatFormat, start: Float[Array, ""]):
    error = lambda bias: jnp.sum((_inputs(x, fmt, bias) @ low.T - want) ** 2)
    return _best(error, start, jnp.min(_channel_biases(x, fmt)))


def _best(error: Callable[[Array], Array], start: Array, reference: Array) -> tuple[Array, Array]:
    """(least error, its bias), for each row alone if the error has rows; one candidate in memory at a time."""

    def better(best: tuple[Array, Array], factor: Array) -> tuple[tuple[Array, Array], None]:
        least, chosen = best
        bias = factor * reference
        e = error(bias)
        return (jnp.minimum(e, least), jnp.where(e < least, bias, chosen)), None

    factors = 0.01 + 1.19 / 100 * jnp.arange(100, dtype=jnp.float32)
    return jax.lax.scan(better, (error(start), start), factors)[0]
