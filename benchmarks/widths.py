"""How much memory and time a decode step takes at each width of one master, and what the switch between them takes.

The weights are random, which changes nothing here. For floats and for each width: bytes of the parameters, what the
compiler says a decoding loop holds (arguments, and temporaries beside them), and tokens a second of plain greedy
decoding, all of them in turns in one process. Of the switch from the master: seconds, and temporaries of the largest.

    python -m benchmarks.widths
    python -m benchmarks.widths --shape llama-8b --dtype bfloat16      (on an accelerator)
"""

import argparse
import dataclasses
import functools
import time
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from benchmarks.shapes import SHAPES
from jaxaroo.infer import decode as device
from jaxaroo.infer.sampling import Sampling, pack_sampling
from jaxaroo.infer.widths import decode_speed, weigh
from jaxaroo.models.decoder import DecoderConfig, Model, Params, init_params, unstack_layers
from jaxaroo.models.multi_precision import MATRICES, init_scales, switch_bits, to_master
from jaxaroo.models.quantise import QuantConfig

WIDTHS, PROMPT = (8, 6, 4, 3, 2), 64


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--shape", choices=sorted(SHAPES), default="llama-100m")
    args.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args.add_argument("--group", type=int, help="inputs that share a scale; one an output channel if not given")
    args.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    args.add_argument("--tokens", type=int, default=64)
    args.add_argument("--runs", type=int, default=7)
    opts = args.parse_args()
    cfg = dataclasses.replace(SHAPES[opts.shape], dtype=opts.dtype)
    rules = ((MATRICES, QuantConfig(bits=WIDTHS, group=opts.group)),)
    master = random_master(cfg, rules, opts.dtype)
    models = {"float": Model(cfg, random_floats(cfg, opts.dtype))}
    switches: dict[str, Any] = {}
    for b in WIDTHS:
        jax.block_until_ready(jax.tree.leaves(switch_bits(master, b, rules)))  # compiles
        start = time.perf_counter()
        params = jax.block_until_ready(switch_bits(master, b, rules))
        switches[str(b)] = {"seconds": time.perf_counter() - start}
        models[str(b)] = Model(cfg, params)
    result: dict[str, Any] = {"benchmark": "widths", "shape": opts.shape, "dtype": opts.dtype, "group": opts.group}
    result |= {"environment": record.environment(), "switch": switches, "widths": {}}
    for name, model in models.items():
        result["widths"][name] = {"bytes": weigh(model)._asdict(), "program": program(model)}
    for batch in opts.batch:
        for name, rates in decode_speed(
            models, batch=batch, prompt=PROMPT, tokens=opts.tokens, repeats=opts.runs
        ).items():
            result["widths"][name][f"tokens_per_second_batch_{batch}"] = record.spread(rates)
    for name, row in result["widths"].items():
        times = [row[f"tokens_per_second_batch_{b}"]["median"] for b in opts.batch]
        print(name, row["bytes"], row["program"], [round(t, 1) for t in times])
    record.save(f"widths-{opts.shape}-{jax.default_backend()}", result)


def random_floats(cfg: DecoderConfig, dtype: str) -> Params:
    make = lambda key: jax.tree.map(lambda w: w.astype(dtype), init_params(cfg, key))
    return unstack_layers(jax.jit(make)(jax.random.key(0)))


def random_master(cfg: DecoderConfig, rules: Any, dtype: str) -> Params:
    """Codes and scales of the right shapes; the float weights are never there."""

    def make() -> Params:
        params = init_params(cfg, jax.random.key(0))
        return to_master(params, init_scales(params, rules), rules)

    def fill(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(1), zlib.crc32(jax.tree_util.keystr(path).encode()) % 2**31)
        if leaf.dtype == jnp.int8:
            return jax.random.randint(key, leaf.shape, -128, 128, jnp.int8)
        if leaf.dtype == jnp.bfloat16:
            return jnp.full(leaf.shape, 0.02 / 64, jnp.bfloat16)
        return (0.02 * jax.random.normal(key, leaf.shape)).astype(dtype)

    return unstack_layers(jax.tree_util.tree_map_with_path(fill, jax.eval_shape(make)))


def program(model: Model, batch: int = 1) -> dict[str, int]:
    """What the compiled decoding loop holds, in bytes; nothing runs."""
    cfg = model.config
    sampling = pack_sampling([(Sampling(temperature=0.0, max_tokens=8), 0, 0)] * batch, 0, cfg.vocab_size)
    length = np.full(batch, PROMPT, np.int32)
    rows = device.Rows(sampling, length, length + 8, np.full((batch, 4), -1, np.int32))
    params, tokens = jax.eval_shape(lambda: model.params), np.zeros((batch, 2 * PROMPT), np.int32)
    state = jax.eval_shape(functools.partial(device.prefill, cfg, chunk=PROMPT), params, tokens, rows)
    halt = np.zeros(batch, bool)
    found = device.decode.lower(cfg, params, state, rows, halt, np.int32(8)).compile().memory_analysis()
    return {"arguments": found.argument_size_in_bytes, "temporaries": found.temp_size_in_bytes}


if __name__ == "__main__":
    main()
