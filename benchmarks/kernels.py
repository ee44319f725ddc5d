"""What do the kernels move and hold, for chips that are not here; and on a chip that is, how fast are they?

Compiled: each kernel at the shapes of an 8B model (Llama 3), by the TPU's own compiler, for v5e, v5p, v6e and TPU7x.
`moved` are the bytes between the chip's large memory and its fast one, counted from the blocks of the compiled grid,
`least` those that the operation has to move: its operands and its result, once. `held` is fast memory. `floor_seconds`
is what the published rates allow, by bytes or by FLOPs, and no measurement. Then what a loss on logits of a training
step takes beside its inputs and gradients, by kernels, by XLA's loops and with all logits at once. Then whole decode
steps of that model at several widths: what a chip holds. Needs libtpu (extra `aot`).

Timed: top-k and top-p by sorting and by halving. On a GPU nothing is compiled for others; what is measured there
`kernel_times.py` says.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --steps 16 4              (widths of whole decode steps; none by default)
"""

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernel_times, record
from jaxaroo.jaxlib_ext import token_kl, token_stats
from jaxaroo.jaxlib_ext.expert_pair import Expert, expert_pair
from jaxaroo.jaxlib_ext.qmm import pack, qmm
from jaxaroo.jaxlib_ext.sampling import cut
from jaxaroo.jaxlib_ext.tree_attention import tree_attention
from jaxaroo.models.cache import Int4Rows, Int8Rows, init_cache
from jaxaroo.models.decoder import forward, init_params, lm_head, unstack_layers
from jaxaroo.models.multi_precision import init_scales, switch_bits, to_master
from jaxaroo.models.presets import preset
from jaxaroo.models.quantise import QuantConfig
from jaxaroo.sharding.topology import CHIPS, compile_for, devices_of, kernel_traffic

MATRICES = r"layers/(attn/[qkvo]|mlp/(gate|up|down))"
like = jax.ShapeDtypeStruct


class Case(NamedTuple):
    """An operation at a shape."""

    name: str
    run: Callable[..., Any]  # takes `impl`
    args: tuple[Any, ...]
    flops: float
    scalars: tuple[Any, ...] = ()  # that places of its kernel's blocks depend on

    @property
    def least(self) -> int:
        """Bytes of operands and result."""
        result = jax.eval_shape(functools.partial(self.run, impl="xla"), *self.args)
        leaves = [*jax.tree.leaves(self.args), *jax.tree.leaves(result)]
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def cases() -> list[Case]:
    """Decode and verify steps, batch 1 and more."""
    found = []
    for B, K, N, group in (
        (1, 4096, 14336, 0),
        (16, 4096, 14336, 0),
        (64, 4096, 14336, 0),
        (1, 14336, 4096, 0),
        (1, 4096, 4096, 128),
        (16, 4096, 4096, 128),
    ):
        for bits in (8, 6, 4, 3, 2):
            planes = jax.eval_shape(functools.partial(pack, bits=bits), like((N, K), jnp.int8))
            scale = like((N, K // group if group else 1), jnp.bfloat16)
            name = f"qmm {bits} bits, {B} x {K} -> {N}" + (f", groups of {group}" if group else "")
            run = functools.partial(qmm, bits=bits)
            found.append(Case(name, run, (like((B, K), jnp.bfloat16), planes, scale), 2.0 * B * K * N))
    for B, T, S, bits in (
        (1, 1, 32768, 16),
        (1, 8, 32768, 16),
        (1, 64, 32768, 16),
        (16, 1, 4096, 16),
        (1, 8, 32768, 8),
        (1, 8, 32768, 4),
    ):
        rows: Any = like((B, S, 8, 128), jnp.bfloat16)
        if bits < 16:
            side = like((B, S, 8), jnp.bfloat16)
            rows = (Int8Rows if bits == 8 else Int4Rows)(like((B, S, 8, 16 * bits), jnp.uint8), side, side)
        args = like((B, T, 32, 128), jnp.bfloat16), rows, rows, like((B, T, S), jnp.bool_)
        name = f"tree attention, {B} x {T} nodes over {S} rows of {bits} bits"
        found.append(Case(name, tree_attention, args, 4.0 * B * T * S * 32 * 128, (np.full(B, S, np.int32),)))
    expert = Expert(*(like((4096, 4096), jnp.bfloat16) for _ in range(3)))
    for R in (1, 10, 64):
        args = like((R, 4096), jnp.bfloat16), like((R, 4096), jnp.bfloat16), like((4, 4096), jnp.bfloat16)
        found.append(Case(f"expert pair, {R} rows", expert_pair, (*args, (expert, expert)), 12.0 * R * 4096 * 4096))
    for B, V in ((1, 128_256), (32, 151_936)):
        args = like((B, V), jnp.float32), like((B,), jnp.int32), like((B,), jnp.float32)
        found.append(Case(f"cut, {B} x {V}", cut, args, 0.0))
    return found


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--chips", nargs="+", choices=CHIPS, default=[*CHIPS])
    args.add_argument("--steps", nargs="*", type=int, default=[], help="widths of whole decode steps to compile")
    args.add_argument("--runs", type=int, default=20)
    opts = args.parse_args()
    result: dict[str, Any] = {"benchmark": "kernels", "environment": record.environment()}
    if jax.default_backend() == "gpu":
        for found in kernel_times.main(opts.runs):
            record.save("kernels-gpu", result | found)
        return
    devices_of(CHIPS[opts.chips[0]].topology)  # says at once if there is no compiler
    result["cuts"] = {f"{B} x {V}": cuts(B, V, opts.runs) for B in (1, 8) for V in (32_000, 128_256)}
    result["compiled"] = {case.name: compiled(case, opts.chips) for case in cases()}
    result["losses"] = {name: loss_on_logits(name, opts.chips) for name in ("token_stats", "token_kl")}
    result["decode_steps"] = {
        chip: {bits: decode_step(chip, bits) for bits in opts.steps} for chip in opts.chips if opts.steps
    }
    record.save("kernels", result)


def compiled(case: Case, chips: list[str]) -> dict[str, Any]:
    """One kernel, for every chip."""
    [traffic] = kernel_traffic(functools.partial(case.run, impl="tpu"), *case.args, scalars=case.scalars)
    found: dict[str, Any] = {"least": case.least, "moved": traffic.moved, "held": traffic.held, "chips": {}}
    found["share"] = traffic.moved / case.least
    for name in chips:
        chip, start = CHIPS[name], time.perf_counter()
        memory = compile_for(name, case.run, *case.args).memory_analysis()
        found["chips"][name] = {
            "seconds_to_compile": time.perf_counter() - start,
            "temporary_bytes": memory.temp_size_in_bytes,
            "floor_seconds": max(case.least / chip.read, case.flops / chip.bfloat16),
        }
    print(
        f"{case.name}: moved {found['share']:.3f} x {case.least / 2**20:.2f} MiB, held {traffic.held / 2**20:.1f} MiB",
        flush=True,
    )
    return found


def loss_on_logits(name: str, chips: list[str], N: int = 8192, V: int = 128_256, D: int = 4096) -> dict[str, Any]:
    """Forward and backward of a sum of log-probabilities, or of divergences from a reference of the same size."""
    h, w, y = like((N, D), jnp.bfloat16), like((V, D), jnp.bfloat16), like((N,), jnp.int32)
    given = (h, w, y) if name == "token_stats" else (h, w, h, w)

    def step(impl: str):
        def loss(h, w, *rest):
            if name == "token_stats":
                form = (
                    token_stats.reference if impl == "dense" else functools.partial(token_stats.token_stats, impl=impl)
                )
                return form(h, w, *rest).logp.sum()
            form = token_kl.reference if impl == "dense" else functools.partial(token_kl.token_kl, impl=impl)
            return form(h, w, *rest).sum()

        return jax.value_and_grad(loss, argnums=(0, 1))

    sizes = {"sweep": 1024, "dhidden": 512, "dhead": 256}  # rows of a tile of tokens; all of them are in use
    found: dict[str, Any] = {"tokens": N, "vocabulary": V, "width": D, "kernels": {}, "chips": {}}
    for kernel, rows in sizes.items():
        traffic = kernel_traffic(step("tpu"), *given, scalars=[np.int32([N // rows])])
        [one] = [t for t in traffic if t.name == kernel]
        found["kernels"][kernel] = {"moved": one.moved, "held": one.held}
    products = {"token_stats": (5, 4, 3), "token_kl": (8, 6, 4)}[name]  # of N D V: kernels, loops, all at once
    for chip in chips:
        row = found["chips"][chip] = {}
        for impl, times in zip(("auto", "xla", "dense"), products, strict=True):
            try:
                memory = compile_for(chip, step(impl), *given).memory_analysis()
                row[impl] = {"temporary_bytes": memory.temp_size_in_bytes}
            except jax.errors.JaxRuntimeError as e:
                row[impl] = {"said": str(e)[:200]}
            row[impl]["floor_seconds_of_products"] = 2 * times * N * D * V / CHIPS[chip].bfloat16
    print(name, found, flush=True)
    return found


def decode_step(chip: str, bits: int, batch: int = 1, capacity: int = 8192) -> dict[str, Any]:
    """One token of Llama 3 8B by weights of a width; 16 are bfloat16, and scales are one a row."""
    cfg = dataclasses.replace(preset("llama3-8b"), dtype="bfloat16")
    rules = ((MATRICES, QuantConfig(bits=(8, 6, 4, 3, 2))),)

    def served():
        params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), init_params(cfg, jax.random.key(0)))
        if bits == 16:
            return unstack_layers(params)
        return switch_bits(unstack_layers(to_master(params, init_scales(params, rules), rules)), bits, rules)

    def step(params, tokens, positions, cache):
        out = forward(cfg, params, tokens, positions, cache=cache)
        return jnp.argmax(lm_head(cfg, params, out.hidden), axis=-1), out.cache

    cache = jax.eval_shape(
        lambda: init_cache(cfg.num_layers, batch, capacity, cfg.num_kv_heads, cfg.head_dim, "bfloat16")
    )
    one, start = like((batch, 1), jnp.int32), time.perf_counter()
    try:
        done = compile_for(chip, step, jax.eval_shape(served), one, one, cache)
    except jax.errors.JaxRuntimeError as e:  # what does not fit is not compiled
        print(f"decode step, {bits} bits on {chip}: {str(e)[:200]}", flush=True)
        return {"fits": False, "said": str(e)[:400]}
    memory = done.memory_analysis()
    kernels = done.as_text().count('custom_call_target="tpu_custom_call"')
    found = {
        "fits": True,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    found |= {"kernels": kernels, "seconds_to_compile": time.perf_counter() - start}
    print(f"decode step, {bits} bits on {chip}: {found}", flush=True)
    return found


def cuts(B: int, V: int, runs: int) -> dict[str, Any]:
    """Top-k and top-p by sorting and by halving, by turns, on the device that is there."""
    z = 3 * jax.random.normal(jax.random.key(0), (B, V))
    given = z, jnp.full(B, 50), jnp.full(B, 0.9)
    sides = {name: jax.jit(functools.partial(cut, impl=name)) for name in ("sort", "auto")}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    assert jnp.array_equal(*(f(*given) for f in sides.values()))
    for _ in range(runs):
        for name, f in sides.items():
            start = time.perf_counter()
            jax.block_until_ready(f(*given))
            seconds[name].append(time.perf_counter() - start)
    found: dict[str, Any] = {name: record.spread(s) for name, s in seconds.items()}
    found["times_as_fast"] = record.spread([a / b for a, b in zip(*seconds.values(), strict=True)])
    print(f"cut, {B} x {V}: {found['times_as_fast']['median']:.1f} x as fast as sorting", flush=True)
    return found


if __name__ == "__main__":
    main()
