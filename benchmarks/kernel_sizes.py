"""Which sizes of a launch are good on the GPU that is here? The tables behind `tiles_of` of the kernels of GPUs.

Times as in `kernel_times.py`, of the kernel alone at every size in the lists below; what does not fit says so.

    python -m benchmarks.kernel_sizes
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import kernel_times, record
from jaxaroo.jaxlib_ext import qmm_gpu, tree_attention, tree_attention_gpu

# qmm: outputs, blocks, shares, warps, stages; tree attention: queries, rows, parts, warps, stages
PRODUCTS = [
    (64, 2, 1, 4, 4), (64, 2, 1, 4, 3), (64, 2, 2, 4, 4), (64, 4, 1, 4, 3), (64, 1, 1, 4, 4), (64, 1, 4, 4, 3),
    (128, 1, 1, 4, 6), (128, 2, 2, 4, 3), (128, 1, 2, 8, 4), (64, 2, 4, 4, 3), (64, 4, 4, 4, 3),
]  # fmt: skip
ATTENTIONS = [
    (64, 33, 4, 3), (64, 33, 4, 2), (64, 66, 4, 2), (32, 66, 4, 4), (64, 50, 4, 3), (128, 16, 8, 3), (128, 33, 8, 2),
    (64, 6, 4, 3), (32, 17, 4, 3),
]  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    result: dict[str, Any] = {"benchmark": "kernel_sizes", "environment": record.environment(), "sizes": {}}
    for shape in [(B, 4096, 14336, 0, 4) for B in (1, 16, 64)] + [(1, 4096, 14336, 0, 8), (1, 14336, 4096, 0, 4)]:
        case = kernel_times.product(*shape)
        sizes = {str(size): functools.partial(product, shape, size) for size in PRODUCTS}
        result["sizes"][case.name] = times(case, sizes)
    for shape in ((1, 1, 32768, 16), (1, 8, 32768, 16), (1, 64, 32768, 16), (16, 1, 4096, 16), (1, 8, 32768, 8)):
        case, queries = kernel_times.attention(*shape), min(64, max(16, 4 * shape[1]))
        sizes = {str((queries, *size)): functools.partial(attention, (queries, *size)) for size in ATTENTIONS}
        result["sizes"][case.name] = times(case, sizes)
    record.save("kernel-sizes-gpu", result)


def times(case: kernel_times.Timed, forms: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    """Microseconds of an operation, or why there are none."""
    copies = max(6, -(-(300 << 20) // case.least))
    made = [jax.jit(case.operands)(jax.random.key(i)) for i in range(copies)]
    found: dict[str, Any] = {}
    for name, form in forms.items():
        program = jax.jit(lambda made, form=form: [form(*given) for given in made])
        try:
            seconds = kernel_times.by_turns({name: functools.partial(program, made)}, 5, copies, 20)[name]
            found[name] = round(sorted(seconds)[len(seconds) // 2] * 1e6, 1)
        except (ValueError, jax.errors.JaxRuntimeError) as e:
            found[name] = str(e)[:100]
    print(case.name, found, flush=True)
    return found


def product(shape: tuple[int, ...], size: tuple[int, ...], x, planes, scale):
    widths, t = (shape[4],), qmm_gpu.Tiles(*size)
    return qmm_gpu.launch(x, planes, scale.astype(jnp.float32), jnp.int32(shape[4]), widths, t=t)


def attention(size: tuple[int, ...], q, k, v):
    (B, T), S = q.shape[:2], k.shape[1] if isinstance(k, jax.Array) else k.codes.shape[1]
    bits = None if isinstance(k, jax.Array) else 8 if k.codes.shape[-1] == q.shape[-1] else 4
    leaves = lambda rows: (rows,) if bits is None else (rows.codes, rows.scale, rows.zero)
    bounds = jnp.tile(jnp.array([0, S], jnp.int32), (B, 1))
    words = tree_attention._pack(jnp.ones((B, T, S), bool))
    t = tree_attention_gpu.Tiles(*size)
    return tree_attention_gpu.launch(q, leaves(k), leaves(v), words, bounds, None, bits, t)


if __name__ == "__main__":
    main()
