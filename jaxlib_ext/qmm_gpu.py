"""The GPU twin of `qmm`: outputs in tiles, codes that become bfloat16 on their way to the tensor cores.

Words are read as halves of 16 bits (`spread.py`): a half holds 16 / w fields of w bits, and each field of a tile of
halves is one product, with x in the same order. Codes are the left factor and x^T the right one, since a tile of a
tensor core is 64 high and may be 16 wide. Where there are fewer tiles of outputs than keep a GPU busy, inputs are cut
into shares too, which are summed afterwards.

Letters as in `qmm`; n outputs of a tile.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int32

from .spread import bytes_of, field_of, halves_of

_Switch = Callable[[Array, Array], Array] | None


class Tiles(NamedTuple):
    """Sizes of a launch."""

    outputs: int  # of a program
    blocks: int  # of 128 inputs, that a program multiplies at once
    shares: int  # of the inputs
    warps: int
    stages: int  # of loads under way


# 1. Kernel: one tile of outputs, one share of the inputs.
#   bits [1] | x of each plane [fields, all halves, rows] | planes [n, all halves] | scale [M, n] -> y [B, n]
def _kernel(bits_ref, *refs, widths: tuple[int, ...], switch: _Switch, group: int, chunks: int, t: Tiles, native: bool):
    x_refs, w_refs = refs[: len(widths)], refs[len(widths) : 2 * len(widths)]
    scale_ref, y_ref = refs[2 * len(widths) :]
    (B, n), rows, share = y_ref.shape, x_refs[0].shape[2], -(-chunks // t.shares)
    one_group = scale_ref.shape[0] == 1
    begin = pl.program_id(1) * share

    def codes_of(halves, p: int, field: int):
        if switch is not None:
            return switch(halves.astype(jnp.int32), bits_ref[0]).astype(jnp.bfloat16)
        if widths[p] == 8:
            return bytes_of(halves, field, signed=True, native=native)
        return field_of(halves, widths[p], field, signed=p == 0, native=native)

    def body(i, total):
        part = total if one_group else jnp.zeros_like(total)
        for p, (x_ref, w_ref) in enumerate(zip(x_refs, w_refs, strict=True)):
            size = w_ref.shape[1] // chunks
            halves = w_ref[:, pl.ds(i * size, size)]
            for field in range(x_ref.shape[0]):
                x = x_ref[field, pl.ds(i * size, size)]
                part += jnp.dot(codes_of(halves, p, field), x, preferred_element_type=jnp.float32)
        return part if one_group else total + part * scales(i * 128 * t.blocks // group)

    scales = lambda g: scale_ref[g].astype(jnp.float32)[:, None]
    total = jax.lax.fori_loop(begin, jnp.minimum(begin + share, chunks), body, jnp.zeros((n, rows), jnp.float32))
    total = total * scales(0) if one_group else total
    row = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[:, None], (rows, n))
    at = row, jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None], (rows, n))
    triton.store(y_ref.at[at], total.T, mask=row < B)


# 2. Launch: x in the order of the words, and the sum of shares.
def launch(
    x: Float[Array, "B K"],
    planes: tuple[Array, ...],
    scale: Float[Array, "N M"],
    bits: Int32[Array, ""],
    widths: tuple[int, ...],
    switch: _Switch = None,
    t: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "B N"]:
    """`x @ W^T`.

    Args:
      x: bfloat16.
      planes: of the widths `widths`.
      scale: of the codes as they are multiplied.
      bits: to which width codes are switched.
      widths: of the planes.
      switch: from int32 master codes to those of `bits`; None multiplies them as they are.
      t: sizes, if they are not those that were measured to be good.
      interpret: run it on any device, without Triton.
    """
    (B, K), (N, M) = x.shape, scale.shape
    blocks, rows = -(-K // 128), max(16, pl.next_power_of_2(B))
    t = t or tiles_of(B, N, K, M, widths)
    x = jnp.pad(x, ((0, rows - B), (0, blocks * 128 - K))).reshape(rows, blocks, 128)
    xs, below = [], sum(widths)
    for w in widths:
        below -= w
        one = x * jnp.asarray(1 << below, x.dtype)  # exact
        if switch is not None:
            xs.append(one.reshape(rows, -1).T[None])
        elif w == 8:  # input 2 r + i is byte i of half r
            xs.append(one.reshape(rows, -1, 2).transpose(2, 1, 0))
        else:  # input h 16 / w 4 w + j 4 w + r of a block is field j of half h of word r
            one = one.reshape(rows, blocks, 2, 16 // w, 4 * w).transpose(3, 1, 4, 2, 0)
            xs.append(one.reshape(16 // w, -1, rows))
    halves = planes if switch is not None else tuple(map(halves_of, planes))
    y = pl.pallas_call(
        functools.partial(
            _kernel, widths=widths, switch=switch, group=K // M, chunks=blocks // t.blocks, t=t, native=not interpret
        ),
        grid=(N // t.outputs, t.shares),
        in_specs=[
            pl.BlockSpec((1,), lambda i, s: (0,)),
            *(pl.BlockSpec(x.shape, lambda i, s: (0, 0, 0)) for x in xs),
            *(pl.BlockSpec((t.outputs, p.shape[1]), lambda i, s: (i, 0)) for p in halves),
            pl.BlockSpec((M, t.outputs), lambda i, s: (0, i)),
        ],
        out_specs=pl.BlockSpec((None, B, t.outputs), lambda i, s: (s, 0, i)),
        out_shape=jax.ShapeDtypeStruct((t.shares, B, N), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=t.warps, num_stages=t.stages),
        interpret=interpret,
        name="qmm",
    )(bits.reshape(1), *xs, *halves, scale.T)
    return y[0] if t.shares == 1 else jnp.sum(y, axis=0)


def tiles_of(B: int, N: int, K: int, M: int, widths: tuple[int, ...]) -> Tiles:
    """Those that were found good on an H200, with as many loads under way as fast memory holds."""
    outputs, wanted, stages, n = 64, 200, 3, 4 if B <= 16 and widths == (4,) else 2
    if M > 1:
        outputs, wanted, stages, n = 128 if N % 128 == 0 else 64, 128, 6, 2 if 1 in widths else 1
    blocks = -(-K // 128)
    n = next(m for m in (4, 2, 1) if m <= n and blocks % m == 0)
    row = 2 * max(16, pl.next_power_of_2(B)) * 128
    held = n * sum(row + outputs * 16 * w for w in widths)
    return Tiles(
        outputs, n, min(blocks // n, -(-wanted // (N // outputs))), 4, max(1, min(stages, (200 << 10) // held))
    )


def slower(x: Float[Array, "B K"], widths: tuple[int, ...]) -> bool:
    """Whether XLA's form was faster on an H200: odd widths of many rows, whose last bits are 16 products a half."""
    return 1 in widths and x.shape[0] > 16


def why_not(x: Float[Array, "B K"], scale: Float[Array, "N M"], widths: tuple[int, ...]) -> str:
    """Why it does not serve; empty if it does."""
    (_, K), (N, M) = x.shape, scale.shape
    if x.dtype != jnp.bfloat16:
        return f"x is {x.dtype}; the kernel of GPUs is made for bfloat16."
    if N % 64 or (8 in widths and K % 128):
        return f"{K} inputs, {N} outputs; that of GPUs is made for blocks of 128 at 8 bits, and blocks of 64."
    least = 256 if 1 in widths else 128  # a product of eight halves is none for a tensor core
    if least == 256 and (-(-K // 128) % 2 or (M > 1 and K // M % 256)):
        return f"{K} inputs, groups of {K // M}; with an odd width that of GPUs is made for blocks of 256."
    return ""
