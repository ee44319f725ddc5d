"""Codes that become bfloat16 where they stand, for kernels of GPUs.

Turning an integer into a float takes many times the instructions that a GPU has time for while it reads a code from
memory. But 2^7 + n of bfloat16 holds n < 128 in its last bits. So codes are read as halves, numbers of 16 bits: a field
of a half is moved to the end, put behind the exponent of 2^7, and 2^7 is taken away; with two halves in a register that
is three instructions for two codes. A signed field of w bits has its highest bit turned first, then it is a number
from 0 on, and 2^(w - 1) too much.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton
from jaxtyping import Array, BFloat16, Int16


def halves_of(x: Array) -> Int16[Array, "... halves"]:
    """The same bytes as numbers of 16 bits; the first byte is the low one."""
    if x.dtype.itemsize == 1:
        return jax.lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 2), jnp.int16)
    return jax.lax.bitcast_convert_type(x, jnp.int16).reshape(*x.shape[:-1], -1)


def field_of(halves: Int16[Array, "*n"], w: int, i: int, *, signed: bool, native: bool) -> BFloat16[Array, "*n"]:
    """Field i, of w <= 4 bits, of every half.

    Args:
      halves: numbers of 16 bits.
      w: width.
      i: which, from the lowest.
      signed: in two's complement.
      native: by instructions of the GPU; without, by operations that every device has.
    """
    mask, turned = (1 << w) - 1, (1 << (w - 1)) if signed else 0
    if not native:
        return _plain(halves, w * i, mask, turned)
    return _asm(
        halves,
        f"""
        shr.u32 t, $1, {w * i};
        lop3.b32 t, t, {_twice(mask)}, {_twice(0x4300 | turned)}, 0x6a;
        fma.rn.bf16x2 $0, t, one, less;""",
        less=-128 - turned,
    )


def bytes_of(halves: Int16[Array, "*n"], i: int, *, signed: bool, native: bool) -> BFloat16[Array, "*n"]:
    """Byte i of every half, its high four bits times 16 and its low ones: all of them are exact."""
    turned = 8 if signed else 0
    if not native:
        high = _plain(halves, 8 * i + 4, 15, turned)
        return high * jnp.bfloat16(16) + _plain(halves, 8 * i, 15, 0)
    return _asm(
        halves,
        f"""
        shr.u32 t, $1, {8 * i};
        shr.u32 u, $1, {8 * i + 4};
        lop3.b32 t, t, {_twice(15)}, {_twice(0x4300)}, 0x6a;
        lop3.b32 u, u, {_twice(15)}, {_twice(0x4300 | turned)}, 0x6a;
        fma.rn.bf16x2 t, t, one, low;
        fma.rn.bf16x2 u, u, one, less;
        fma.rn.bf16x2 $0, u, sixteen, t;""",
        less=-128 - turned,
    )


def _plain(halves, shift: int, mask: int, turned: int):
    fields = ((halves >> shift) & jnp.int16(mask)) ^ jnp.int16(0x4300 | turned)
    return jax.lax.bitcast_convert_type(fields, jnp.bfloat16) - jnp.bfloat16(128 + turned)


def _asm(halves, body: str, less: int):
    """Instructions on two halves at a time."""
    constants = {"one": 1, "sixteen": 16, "low": -128, "less": less}
    lines = [f"mov.b32 {name}, {_twice(_bits(x))};" for name, x in constants.items()]
    asm = f"{{ .reg .b32 t, u, {', '.join(constants)}; {' '.join(lines)} {body} }}"
    result = jax.ShapeDtypeStruct(halves.shape, jnp.bfloat16)
    how = dict(constraints="=r,r", pack=2, result_shape_dtypes=[result])
    return triton.elementwise_inline_asm(asm, args=[halves], **how)[0]  # type: ignore[arg-type]


def _bits(x: int) -> int:
    return int(np.asarray(x, jnp.bfloat16).view(np.uint16))


def _twice(x: int) -> str:
    return f"0x{x:04x}{x:04x}"
