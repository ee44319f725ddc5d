"""Exchange single-width weights with Qwix (github.com/google/qwix): `QArray` to codes and scale, and back.

Ours are `[out..., in...]`, codes int8 and a scale `[out..., M]` for M groups of the flattened inputs. Qwix multiplies
with `[K, N]`, inputs first, and its scale has the rank of its values: `[M, N]`, each for K / M inputs. Qwix names the
width by a type, and holds 2 to 4 bits as int4 and 5 to 8 as int8.

Qwix is optional: pip install "jaxaroo[qwix]".
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8


def to_qarray(
    codes: Int8[Array, "..."],
    scale: Float[Array, "... M"],
    bits: int = 8,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Any:
    """A `qwix.QArray` `[K, N]` of the same weight.

    Args:
      codes: of a width, outputs first: a master's, or those of `qmm.switch_codes`.
      scale: of the same width (`qmm.scale_at`).
      bits: the width.
      dtype: of the scale there, which is that of what Qwix makes of it.
    """
    qwix = _qwix("to_qarray")
    out = scale.ndim - 1
    N, K, M = math.prod(scale.shape[:out]), math.prod(codes.shape[out:]), scale.shape[-1]
    if codes.dtype != jnp.int8 or not 2 <= bits <= 8:
        raise ValueError(f"to_qarray: {codes.dtype} codes of {bits} bits; expected int8, and 2 to 8 bits.")
    if codes.shape[:out] != scale.shape[:out] or K % M:
        raise ValueError(f"to_qarray: codes {codes.shape}, scale {scale.shape}; expected [out..., in...], [out..., M].")
    kind = {8: jnp.dtype(jnp.int8), 4: jnp.dtype(jnp.int4)}.get(bits, f"int{bits}")
    values = codes.reshape(N, K).T.astype(jnp.int4 if bits <= 4 else jnp.int8)
    return qwix.QArray(qvalue=values, scale=scale.reshape(N, M).T.astype(dtype), qtype=kind)


def from_qarray(array: Any) -> tuple[Int8[Array, "N K"], Float[Array, "N M"], int]:
    """Codes, scale and width of a `qwix.QArray` `[K, N]`.

    The scale is float32, as exact as it came. Masters have bfloat16 scales: where it does not fit, `encode` the decoded
    weight with the snapped scale.

    Raises:
      ValueError: if it has a zero point, is no matrix, no integer, or has tiles along its outputs.
    """
    _qwix("from_qarray")
    values, scale, kind = array.qvalue, array.scale, array.qtype
    name = kind if isinstance(kind, str) else jnp.dtype(kind).name
    if array.zero_point is not None or name not in {f"int{b}" for b in range(2, 9)}:
        raise ValueError(
            f"from_qarray: type {name}, {'no' if array.zero_point is None else 'a'} zero point; expected symmetric "
            "integers of 2 to 8 bits."
        )
    if (
        values.ndim != 2
        or scale.ndim != 2
        or scale.shape[1] not in (1, values.shape[1])
        or values.shape[0] % scale.shape[0]
    ):
        raise ValueError(f"from_qarray: values {values.shape}, scale {scale.shape}; expected [K, N] and [M, N].")
    bits = int(name[3:])
    scale = jnp.broadcast_to(scale.astype(jnp.float32), (scale.shape[0], values.shape[1]))
    return values.astype(jnp.int8).T, scale.T, bits


# ----------------------------------------------------------------------------------------------------------- private
def _qwix(where: str) -> Any:
    try:
        import qwix  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise ImportError(f'{where}: found no Qwix; expected an installation. Run pip install "jaxaroo[qwix]".') from e
    return qwix
