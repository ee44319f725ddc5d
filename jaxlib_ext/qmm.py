"""Multiply by a quantised matrix at any width: switch master codes, pack them, and the product itself.

A quantised weight is int8 master codes C of h bits and a scale s (models/multi_precision.py makes them). Its view at
l <= h bits, with d = h - l, is integers alone (Double Rounding, 2502.01199, equations 2 and 3):

    Q = clip(round(C / 2^d), -2^(l-1), 2^(l-1) - 1)        w = Q (s 2^d)        ties to even

    y_n = sum_g S_ng sum_{k in g} x_k Q_nk                 S = s 2^d

Matrices are `[out, in]` like every weight here: codes `[N, K]`, scales `[N, M]` for M groups of K / M inputs; M = 1 is
one scale per output channel. Always switch from the master: 8 -> 6 -> 4 is not 8 -> 4 on 30 of 256 codes.

Packed words are slice-major along K. A width is the sum of planes of 8, 4, 2 or 1 bits (6 = 4 + 2; the first plane is
signed, the others are not), and a plane of w bits holds P = 32 / w codes in an int32: of each block of 128 inputs, word
r < 128 / P has in field j (from bit j w) input j 128 / P + r, so that a field is a contiguous slice of the input. The
view at 8 bits is the master itself. K is padded to whole blocks with zero codes.

Letters: N outputs, K inputs, M groups of inputs.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int8, Int32

from ..sharding.rules import Axis, ways
from . import qmm_gpu
from .dispatch import Impl, Kernel, precision, run

BLOCK = 128  # inputs
MOST_ROWS = 64  # of x that the kernel serves: decoding and trees; prompts are left to XLA
Planes = tuple[Int32[Array, "..."] | Int8[Array, "..."], ...]  # int8 at 8 bits alone


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantisedMatrix:
    """A weight at one width, in the place of its float array; `decoder.project` multiplies by either."""

    planes: Planes  # `[N, words]`; at 8 bits the master's codes, `[out..., K]`
    scale: Float[Array, "..."]  # `[out..., M]`, the master's, bfloat16
    gain: Float[Array, "..."] | None = None  # `[out...]`, of this width, bfloat16
    bits: int = dataclasses.field(metadata={"static": True})
    master: int = dataclasses.field(metadata={"static": True})  # width of the master
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # of the weight, [out..., in...]
    act: Literal["int8"] | None = dataclasses.field(default=None, metadata={"static": True})  # quantise inputs too

    @property
    def nbytes(self) -> int:
        """On its device: words, scales and gains."""
        return sum(x.nbytes for x in jax.tree.leaves(self))


class Layout(NamedTuple):
    """Along which axes of the mesh that is set a product is to lie; None where it lies whole."""

    rows: tuple[Axis, ...]  # each leading dimension of x
    outputs: Axis
    inputs: Axis


class _Static(NamedTuple):
    """Of a product."""

    widths: tuple[int, ...]  # of the planes; 8 are int8 codes
    bits: int | None  # what the planes hold, or are switched to; None if a width is traced
    master: int | None  # width of codes that are switched on the way
    act: Literal["int8"] | None


# ------------------------------------------------------------------------------------------------------------- codes
def switch_codes(codes: Int8[Array, "..."], master: int, bits: int | Int32[Array, "..."]) -> Int8[Array, "..."]:
    """The codes of a lower width, ties to even, in int8 arithmetic alone.

    Args:
      codes: of the master.
      master: its width.
      bits: the wanted width. A Python int is static; an int32 array, a scalar or one width for each entry of the
        leading axes, serves every width with one program.
    """
    _check_codes("switch_codes", codes, master, bits)
    if isinstance(bits, int):
        if bits == master:
            return codes
        down, odd = master - bits, 1
        top, half = ((1 << (bits - 1)) - 1) << down, (1 << (down - 1)) - 1
        c = jnp.minimum(codes, top)  # the upper clip, and no overflow below; the lower clip is never needed
        return (c + half + ((c >> down) & odd)) >> down
    return _switched(codes, jnp.int8(master), over_trailing(bits, codes.ndim).astype(jnp.int8))


def scale_at(scale: Float[Array, "..."], master: int, bits: int | Int32[Array, "..."]) -> Float[Array, "..."]:
    """The scale of the codes at a lower width: times a power of two, exact in every float type."""
    if isinstance(bits, int):
        return scale * 2 ** (master - bits)
    factor = jnp.left_shift(1, master - bits).astype(scale.dtype)
    return scale * over_trailing(factor, scale.ndim)


def over_trailing(x: Array, ndim: int) -> Array:
    """Give what has one entry for each of the leading axes the trailing axes it needs to broadcast."""
    return x.reshape(*x.shape, *(1,) * (ndim - x.ndim))


def quantise_activations(x: Float[Array, "*lead K"]) -> tuple[Int8[Array, "*lead K"], Float[Array, "*lead 1"]]:
    """Signed 8-bit codes and a float32 scale, absmax / 127, for each token; a token of zeros has the scale 1."""
    f = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(f), axis=-1, keepdims=True) / 127
    scale = jnp.where(scale > 0, scale, 1.0)
    return jnp.clip(jnp.round(f / scale), -127, 127).astype(jnp.int8), scale


# ----------------------------------------------------------------------------------------------------------- packing
def pack(codes: Int8[Array, "*lead K"], bits: int) -> Planes:
    """Codes of a width as int32 words, one array a plane; at 8 bits the codes themselves, not copied.

    Codes must be in the range of `bits`; what is above is cut off.
    """
    _check_codes("pack", codes, 8, bits)
    if bits == 8:
        return (codes,)
    pad = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % BLOCK)]
    planes, below = [], bits
    for w in _plane_widths(bits):
        below -= w  # padded plane by plane: padded codes that two planes share, XLA would hold in memory
        fields = jnp.pad((codes >> below) & ((1 << w) - 1), pad).astype(jnp.int32)
        fields = fields.reshape(*codes.shape[:-1], -1, 32 // w, 4 * w)  # [..., blocks, P, words of a block]
        fields = fields << _over_words(w * jnp.arange(32 // w, dtype=jnp.int32), fields.ndim)
        words = jnp.sum(fields, axis=-2, dtype=jnp.int32)  # no two have a bit in common; not every device can `or` all
        planes.append(words.reshape(*codes.shape[:-1], -1))
    return tuple(planes)


def unpack(planes: Planes, bits: int, K: int) -> Int8[Array, "*lead K"]:
    """The codes that were packed, without the padding."""
    _check_planes(planes, bits, K)
    if bits == 8:
        return planes[0]
    codes: Any = None
    for w, words in zip(_plane_widths(bits), planes, strict=True):
        fields = words.reshape(*words.shape[:-1], -1, 1, 4 * w)
        first = w * jnp.arange(32 // w, dtype=jnp.int32)  # bit
        if codes is None:  # shifted up and down again, the first plane gets its sign
            codes = (fields << _over_words(32 - w - first, fields.ndim)) >> (32 - w)
        else:
            codes = (codes << w) | ((fields >> _over_words(first, fields.ndim)) & ((1 << w) - 1)).reshape(codes.shape)
        codes = codes.reshape(*words.shape[:-1], -1)
    return codes[..., :K].astype(jnp.int8)


def repack(codes: Int8[Array, "*lead K"], master: int, bits: int) -> Planes:
    """From master codes to the packed view of a lower width; integers all the way."""
    return pack(switch_codes(codes, master, bits), bits)


def nbytes(bits: int, N: int, K: int, groups: int = 1) -> int:
    """Bytes of a view of an `[N, K]` matrix, its bf16 scales included."""
    width = K if bits == 8 else K + -K % BLOCK
    return N * width * bits // 8 + 2 * N * groups


# ----------------------------------------------------------------------------------------------------------- product
# 1. Reference: what the product means.
def reference(
    x: Float[Array, "*lead K"],
    codes: Int8[Array, "N K"],
    scale: Float[Array, "N M"],
    act: Literal["int8"] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "*lead N"]:
    """Exact codes times x, summed in float32 group by group, and only then the scales.

    With `act="int8"` x is quantised for each token and the sums are those of integers, int8 x int8 -> int32.
    """
    (N, K), M = codes.shape, scale.shape[1]
    rows, step, total = x.reshape(-1, K), None, jnp.float32
    if act == "int8":
        rows, step = quantise_activations(rows)
        total = jnp.int32
    rows, table = rows.reshape(-1, M, K // M), codes.astype(rows.dtype).reshape(N, M, K // M)
    how: Any = dict(precision=precision(rows), preferred_element_type=total)
    sums = jnp.einsum("bmk,nmk->mbn", rows, table, **how).astype(jnp.float32)
    y = jnp.sum(sums * scale.astype(jnp.float32).T[:, None], axis=0)
    y = y if step is None else y * step
    return y.reshape(*x.shape[:-1], N).astype(dtype or x.dtype)


# 2. Kernel: one tile of outputs, summed over tiles of inputs. A field of a plane is a slice of every block of inputs; x
# comes cut into the same slices, so no code has to move to another lane. Where a tile holds G > 1 groups, x is written
# G times, each time with the inputs of one group alone: then the sums of groups are rows of one product.
#   bits [1] | x of each plane [P, B, all words] | planes [bn, words] | scale [1, G, bn] -> y [B, bn] | sum [B, bn]
def _kernel(bits_ref, *refs, widths: tuple[int, ...], master: int | None):
    x_refs, w_refs = refs[: len(widths)], refs[len(widths) : 2 * len(widths)]
    scale_ref, y_ref, sum_ref = refs[2 * len(widths) :]
    step, (B, bn), G = pl.program_id(1), y_ref.shape, scale_ref.shape[1]
    sums, below = jnp.zeros((G * B, bn), jnp.float32), sum(widths)
    for i, (w, x_ref, w_ref) in enumerate(zip(widths, x_refs, w_refs, strict=True)):
        words, below = w_ref[...].astype(jnp.int32), below - w
        n = words.shape[1]
        here = slice(None) if x_ref.shape[2] == n else pl.ds(pl.multiple_of(step * n, n), n)
        for j in range(x_ref.shape[0]):
            if w == 8:
                codes = words if master is None else _switched(words, master, bits_ref[0])
            elif i == 0:  # shifted up and down again, the first plane gets its sign
                codes = (words << (32 - w * (j + 1))) >> (32 - w)
            else:
                codes = (words >> (w * j)) & ((1 << w) - 1)
            x = x_ref[j, :, here]
            if G > 1:
                lane = jax.lax.broadcasted_iota(jnp.int32, (G, B, n), 2)
                own = jax.lax.div(lane, jnp.int32(n // G)) == jax.lax.broadcasted_iota(jnp.int32, lane.shape, 0)
                x = jnp.where(own, x[None], jnp.zeros_like(x)[None]).reshape(G * B, n)
            contract = (((1,), (1,)), ((), ()))
            codes = codes.astype(jnp.float32).astype(x.dtype)  # exact: 8 bits at most
            part = jax.lax.dot_general(x, codes, contract, precision=precision(x), preferred_element_type=jnp.float32)
            sums += part * float(1 << below)

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += jnp.sum(sums.reshape(G, B, bn) * scale_ref[0][:, None], axis=0)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        y_ref[...] = sum_ref[...]


# 3. Launch: tiles, and x and scales in their order. All of x stays in fast memory, and every word is read once.
def _launch(x, planes, scale, bits, o: _Static, interpret: Any = False):
    (B, K), (N, M), widths = x.shape, scale.shape, o.widths
    tile, group = _input_tile(widths, K, M), K // M
    steps, G = pl.cdiv(K, tile), 1 if M == 1 else max(1, tile // group)  # a tile may be wider than all inputs
    rows = B + -B % (8 if x.dtype == jnp.float32 else 16)  # whole registers
    x = jnp.pad(x, ((0, rows - B), (0, steps * tile - K)))
    fields = lambda w: x.reshape(rows, -1, 32 // w, 4 * w).transpose(2, 0, 1, 3).reshape(32 // w, rows, -1)
    xs = [x[None] if w == 8 else fields(w) for w in widths]
    words = [tile if w == 8 else tile * w // 32 for w in widths]
    scale = jnp.pad(scale.astype(jnp.float32).T, ((0, -M % G), (0, 0))).reshape(-1, G, N)
    bn = min(N, 256 if 8 in widths else 512)
    y = pl.pallas_call(
        functools.partial(_kernel, widths=widths, master=o.master),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(N, bn), steps),
            in_specs=[
                *(pl.BlockSpec(each.shape, lambda i, k, _: (0, 0, 0)) for each in xs),
                *(pl.BlockSpec((bn, n), lambda i, k, _: (i, k)) for n in words),
                pl.BlockSpec((1, G, bn), lambda i, k, _: (k if group < tile else jax.lax.div(k * tile, group), 0, i)),
            ],
            out_specs=pl.BlockSpec((rows, bn), lambda i, k, _: (0, i)),
            scratch_shapes=[pltpu.VMEM((rows, bn), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, N), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="qmm",
    )(bits.reshape(1), *xs, *planes, scale)
    return y[:B]


def _input_tile(widths: tuple[int, ...], K: int, M: int) -> int:
    """How many inputs a program sees: all there are, or of every plane a multiple of 128 words."""
    if 8 in widths:
        return min(K, 1024)
    whole, least = K + -K % BLOCK, 4096 // min(widths)
    if M > 1:
        return min(whole, least)
    even = [n for n in range(4096 - 4096 % least, 0, -least) if whole % n == 0]  # no step with less to do
    return whole if whole <= 4096 else even[0] if even else 4096 - 4096 % least


def _served(x: Array, o: _Static, M: int) -> str:
    """Why the kernel does not do this product; empty if it does."""
    B, K = x.shape
    group, tile = K // M, _input_tile(o.widths, K, M)
    if o.act is not None:
        return "inputs are quantised"
    if not 0 < B <= MOST_ROWS:
        return f"{B} rows; it is made for 1 to {MOST_ROWS}"
    if M > 1 and (group % BLOCK or (group % tile and tile % group)):
        return f"groups of {group} inputs; expected blocks of {BLOCK} that divide {tile} or are divided by it"
    return ""


def _launch_gpu(x, planes, scale, bits, o: _Static, interpret: bool = False):
    switch = None if o.master is None else lambda codes, bits: _switched(codes, o.master, bits)
    return qmm_gpu.launch(x, planes, scale, bits, o.widths, switch, interpret=interpret)


# 4. Operation: a kernel where there is one, the reference elsewhere.
@functools.partial(jax.jit, static_argnums=(0, 1, 6))  # traced once for all layers, also where it is not lowered
def _by_kernel(o: _Static, launch: Any, x, planes, scale, bits, interpret: Any):
    return launch(x, planes, scale, bits, o, interpret)


def _plain(x, planes, scale, bits, o: _Static):
    """By the reference. Codes depend on x, by a zero that the compiler cannot see is one: else it would find that a
    decoding loop never changes them, and unpack all layers in front of it, into the memory of a float model. A barrier
    does not do: it is gone when XLA orders what runs.
    """
    first = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(x)[:1, :1].astype(jnp.float32), jnp.int32)
    zero = jnp.minimum(jax.lax.shift_right_logical(first, jnp.int32(31)), 0)  # of the sign, 0 or 1
    planes = tuple(p + zero.astype(p.dtype) for p in planes) if x.size else planes
    if o.master is not None:
        codes = switch_codes(planes[0], o.master, o.bits or bits)
    else:
        codes = unpack(planes, o.bits or 8, x.shape[1])
    return reference(x, codes, scale, o.act, jnp.float32)


def qmm(
    x: Float[Array, "*lead K"],
    w: Int8[Array, "N K"] | Planes,
    scale: Float[Array, "N M"],
    *,
    bits: int | Int32[Array, ""],
    master: int = 8,
    act: Literal["int8"] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    impl: Impl = "auto",
) -> Float[Array, "*lead N"]:
    """`x @ W^T` for W at `bits` bits.

    The gradient in x is that of the dequantised matrix; codes have none, and x that is quantised has none to speak of.

    Args:
      x: float32 or bfloat16.
      w: a packed view of the static width `bits`; or the master codes, which are switched on the way.
      scale: the master's, float32 or bfloat16, one for each output and group of inputs.
      bits: the width. With master codes it may be an int32 scalar: one program for all widths.
      master: the width of the master.
      act: "int8" quantises x too, for each token.
      dtype: of the result; None is that of x.
      impl: as `dispatch.run` takes it. Kernels serve up to 64 rows, and groups that are blocks of 128 inputs; that of
        GPUs takes bfloat16.
    """
    planes, o = _described(x, w, scale, bits, master, act)
    rows, at = x.reshape(-1, x.shape[-1]), jnp.asarray(bits, jnp.int32)
    factor = scale_at(scale.astype(jnp.float32), master, bits)
    why_not, plain = _served(rows, o, scale.shape[1]), functools.partial(_plain, o=o)
    tpu = Kernel(functools.partial(_by_kernel, o, _launch), why_not)
    why_not = why_not or qmm_gpu.why_not(rows, factor, o.widths)
    gpu = Kernel(functools.partial(_by_kernel, o, _launch_gpu), why_not, qmm_gpu.slower(rows, o.widths))
    y = run("qmm", impl, plain, rows, planes, factor, at, tpu=tpu, gpu=gpu)
    return y.reshape(*x.shape[:-1], y.shape[1]).astype(dtype or x.dtype)


def multiply(x: Float[Array, "*lead K"], w: QuantisedMatrix, layout: Layout | None = None) -> Float[Array, "*lead N"]:
    """`x @ W^T` in float32, for what is added to it; gains come last, as scales do.

    On a mesh each device multiplies its own inputs by its own part of the matrix, with the kernel of its kind, and sums
    over parts of inputs are added up between devices.

    Args:
      x: float32 or bfloat16.
      w: whole, or on the mesh as `shardings` says.
      layout: what lies where. Without it, and without a mesh of several devices, all is in one place.
    """
    K, mesh = x.shape[-1], jax.sharding.get_abstract_mesh()
    N = math.prod(w.shape) // K
    planes, scale = tuple(p.reshape(N, -1) for p in w.planes), w.scale.reshape(N, -1)
    product = functools.partial(qmm, bits=w.bits, master=w.master, act=w.act, dtype=jnp.float32)
    if layout is not None and mesh.size > 1 and not mesh.are_all_axes_manual:
        over = next(n for n in range(1, len(w.shape)) if math.prod(w.shape[-n:]) == K)
        outputs, inputs = _divided(w, over, layout.outputs, layout.inputs, mesh.shape)
        part = lambda *given: product(*given) if inputs is None else jax.lax.psum(product(*given), inputs)
        held = PartitionSpec(outputs, inputs), PartitionSpec(outputs, inputs if scale.shape[1] > 1 else None)
        ins, out = (PartitionSpec(*layout.rows, inputs), *held), PartitionSpec(*layout.rows, outputs)
        y = jax.shard_map(part, in_specs=ins, out_specs=out, check_vma=False)(x, planes, scale)
    else:
        y = product(x, planes, scale)
    return y if w.gain is None else y * w.gain.astype(jnp.float32).reshape(*(1,) * (x.ndim - 1), N)


def shardings(w: QuantisedMatrix, over: int, outputs: Axis, inputs: Axis, mesh: Mesh) -> QuantisedMatrix:
    """Where the arrays of a matrix lie so that `multiply` finds them in place.

    What cannot be cut lies whole: packed inputs in other than blocks of 128, groups of inputs, and inputs that are
    quantised, for their scale is one of all of them.

    Args:
      w: the matrix, or its shapes.
      over: how many trailing axes of its weight are inputs.
      outputs: the mesh axes of the first axis of the weight.
      inputs: those of the first of its inputs.
      mesh: of the devices.
    """
    outputs, inputs = _divided(w, over, outputs, inputs, mesh.shape)

    def place(ndim: int, last: Axis) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(outputs, *(None,) * (ndim - 2), *(last,) * (ndim > 1)))

    return dataclasses.replace(
        w,
        planes=tuple(place(p.ndim, inputs) for p in w.planes),
        scale=place(w.scale.ndim, inputs if w.scale.shape[-1] > 1 else None),
        gain=None if w.gain is None else place(w.gain.ndim, None),
    )


# ----------------------------------------------------------------------------------------------------------- private
def _described(x: Array, w: Array | Planes, scale: Array, bits: Any, master: int, act: Any) -> tuple[Planes, _Static]:
    """What is multiplied, once it is known to fit together."""
    K, planes = x.shape[-1], w if isinstance(w, tuple) else (w,)
    packed, static = isinstance(w, tuple), isinstance(bits, int)
    if packed and not static:
        raise TypeError(f"qmm: packed words and bits={bits!r}; expected a Python int. Pass the master codes instead.")
    if packed:
        _check_planes(planes, bits, K)
    else:
        _check_codes("switch_codes", planes[0], master, bits)
    codes = planes[0].shape if not packed else (*planes[0].shape[:-1], K)
    if len(codes) != 2 or codes[1] != K or scale.ndim != 2 or scale.shape[0] != codes[0]:
        raise ValueError(f"qmm: x {x.shape}, codes {codes}, scale {scale.shape}; expected [..., K], [N, K], [N, M].")
    if K % scale.shape[1]:
        raise ValueError(f"qmm: {scale.shape[1]} scales a row for {K} inputs; expected groups of equal size.")
    if act not in (None, "int8"):
        raise ValueError(f"qmm: act={act!r}; expected None or 'int8'.")
    if packed:
        return planes, _Static(_plane_widths(bits), bits, None, act)
    if static and bits == master:
        return planes, _Static((8,), 8, None, act)  # as they are, whatever their own width
    return planes, _Static((8,), bits if static else None, master, act)


def _divided(w: QuantisedMatrix, over: int, outputs: Axis, inputs: Axis, sizes: Mapping[str, int]) -> tuple[Axis, Axis]:
    """Of the mesh axes of outputs and inputs those along which parts are matrices of the same form."""
    n, k = ways(outputs, sizes), ways(inputs, sizes)
    K, groups = math.prod(w.shape[-over:]), w.scale.shape[-1]
    unit = math.lcm(1 if w.bits == 8 else BLOCK, 1 if groups == 1 else K // groups)
    apart = w.shape[-over] % k == 0 and K % (k * unit) == 0 and w.act is None
    return outputs if w.shape[0] % n == 0 else None, inputs if apart else None


def _plane_widths(bits: int) -> tuple[int, ...]:
    return tuple(w for w in (8, 4, 2, 1) if bits & w)


def _switched(codes: Array, master: Any, bits: Array) -> Array:
    """To a traced width, in the integers that are given."""
    down = master - bits
    odd = jnp.minimum(down, 1)  # at the master's own width nothing is added and nothing is shifted
    top, half = ((1 << (bits - 1)) - 1) << down, (1 << jnp.maximum(down - 1, 0)) - 1
    c = jnp.minimum(codes, top)
    return (c + half + ((c >> down) & odd)) >> down


def _over_words(shifts: Int32[Array, " P"], ndim: int) -> Int32[Array, "..."]:
    """One shift a field, for words `[..., P, words]`."""
    return shifts.reshape(*(1,) * (ndim - 2), -1, 1)


def _check_codes(where: str, codes: Array, master: int, bits: Any) -> None:
    if codes.dtype != jnp.int8:
        raise TypeError(f"{where}: codes are {codes.dtype}; expected int8.")
    if not 2 <= master <= 8 or (isinstance(bits, int) and not 2 <= bits <= master):
        raise ValueError(f"{where}: bits={bits!r}, master={master}; expected 2 <= bits <= master <= 8.")
    if not isinstance(bits, int) and bits.shape != codes.shape[: bits.ndim]:
        raise ValueError(f"{where}: bits of shape {bits.shape} for codes {codes.shape}; expected their leading axes.")


def _check_planes(planes: Planes, bits: int, K: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"unpack: bits={bits!r}; expected 2 to 8.")
    blocks = math.ceil(K / BLOCK)
    want = [K] if bits == 8 else [blocks * 4 * w for w in _plane_widths(bits)]
    if (found := [p.shape[-1] for p in planes]) != want:
        raise ValueError(f"unpack: planes of {found} words; expected {want} for {K} inputs at {bits} bits.")
