"""How fast does plain decoding run, against the memory that it has to read?

A decode step at small batch reads every weight once and the whole key-value cache, and computes little: its floor is
bytes over bandwidth. So this prints tokens per second, the bytes a step must read, the bandwidth that this achieves,
and beside it what the same machine does in the same run when it only reads (a matrix-vector product of 4096 x 4096, and
one that reads about as many bytes as a decode step) or copies. `--against transformers` runs Hugging Face `generate`
with the same weights and prompts, interleaved. `--busy N` keeps N other processes spinning meanwhile: on shared
machines that is the common case, and thread pools differ most there.

    python -m benchmarks.decode                               (from the repository root)
    python -m benchmarks.decode --against transformers --busy 2
    python -m benchmarks.decode --shape llama-8b --dtype bfloat16      (on an accelerator)
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from benchmarks.shapes import SHAPES
from jaxaroo.infer.engine import Engine
from jaxaroo.infer.sampling import Sampling
from jaxaroo.models import hf
from jaxaroo.models.decoder import Model, init_params, unstack_layers

PROMPT, NEW = 64, 128


def measure_bandwidth(dtype: str, need: float, repeats: int = 10) -> dict[str, float]:
    """Bytes per second of matrix-vector products (reads) and of a copy (read + write), the best of `repeats`.

    `matvec` is square; `matvec_long` reads about `need` bytes, which no cache of a CPU holds.
    """
    size = 8192 if jax.default_backend() != "cpu" else 4096
    w, x = jnp.ones((size, size), dtype), jnp.ones(size, dtype)
    rows = max(1, round(need / (w.nbytes / size)))
    long = jnp.ones((rows, size), dtype)
    matvec = jax.jit(lambda w, x: jnp.einsum("oi,i->o", w, x, preferred_element_type=jnp.float32))
    copy = jax.jit(lambda w: w + 1)
    best = lambda f: min(_seconds(f) for _ in range(repeats))
    jax.block_until_ready((matvec(w, x), matvec(long, x), copy(w)))
    return {
        "matvec": w.nbytes / best(lambda: matvec(w, x).block_until_ready()),
        "matvec_long": long.nbytes / best(lambda: matvec(long, x).block_until_ready()),
        "copy": 2 * w.nbytes / best(lambda: copy(w).block_until_ready()),
    }


def step_bytes(model: Model, batch: int, mean_length: float) -> float:
    """What one decode step must read: all weights but the embedding table's other rows, and the committed cache."""
    cfg, params = model
    weights = sum(w.nbytes for w in jax.tree.leaves(params))
    if not cfg.tie_embeddings:
        weights -= params["embed"].nbytes
    row = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * jnp.dtype(cfg.dtype).itemsize
    return weights + batch * mean_length * row


def ours(model: Model, prompts: np.ndarray) -> Callable[[], dict[str, float]]:
    """One run of the engine: wall seconds, and those of the decode loop alone."""
    engine = Engine(model, max_seqs=len(prompts))
    settings = Sampling(temperature=0.0, max_tokens=NEW, ignore_eos=True)

    def run() -> dict[str, float]:
        before = engine.stats()
        start = time.perf_counter()
        results = engine.generate(prompts.tolist(), settings)
        wall = time.perf_counter() - start
        assert all(len(r.outputs[0].token_ids) == NEW for r in results)
        after = engine.stats()
        return {"wall": wall, "decode": after["decode_seconds"] - before["decode_seconds"]}

    return run


def transformers(model: Model, prompts: np.ndarray) -> Callable[[], dict[str, float]]:
    """Hugging Face `generate`, greedy, same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        hf.save(folder + "/m", model)
        dtype = getattr(torch, model.config.dtype)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        peer: Any = AutoModelForCausalLM.from_pretrained(folder + "/m", dtype=dtype).to(device).eval()
    ids = torch.tensor(prompts).to(device)
    mask = torch.ones_like(ids)

    def run() -> dict[str, float]:
        start = time.perf_counter()
        with torch.no_grad():
            out = peer.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0
            )
        out = out.cpu()
        assert out.shape[1] == PROMPT + NEW
        return {"wall": time.perf_counter() - start}

    return run


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--shape", choices=SHAPES, default="llama-100m")
    args.add_argument("--dtype", default="float32" if jax.default_backend() == "cpu" else "bfloat16")
    args.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    args.add_argument("--runs", type=int, default=20)
    args.add_argument("--against", choices=["transformers"])
    args.add_argument("--busy", type=int, default=0, help="other processes to keep spinning")
    args.add_argument("--name", default=None, help="of the results file")
    opts = args.parse_args()

    result: dict[str, Any] = {"benchmark": "decode", "shape": opts.shape, "dtype": opts.dtype}
    result |= {"prompt": PROMPT, "new": NEW, "busy": opts.busy, "environment": record.environment(), "rows": []}
    cfg = SHAPES[opts.shape]
    cfg = type(cfg)(**{**cfg.__dict__, "dtype": opts.dtype})
    make = jax.jit(lambda k: jax.tree.map(lambda w: w.astype(opts.dtype), init_params(cfg, k)))
    model = Model(cfg, unstack_layers(make(jax.random.key(0))))
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(opts.busy)]
    try:
        measure(model, opts, result)
    finally:
        for other in others:
            other.kill()
    record.save(opts.name or f"decode-{opts.shape}-{jax.default_backend()}{'-busy' * bool(opts.busy)}", result)


def measure(model: Model, opts: argparse.Namespace, result: dict[str, Any]) -> None:
    """Fill `result["rows"]`, one for each batch size."""
    cfg = model.config
    for batch in opts.batch:
        prompts = np.random.default_rng(0).integers(3, cfg.vocab_size, (batch, PROMPT))
        sides = {"jaxaroo": ours(model, prompts)}
        if opts.against:
            sides["transformers"] = transformers(model, prompts)
        first = {name: _seconds(run) for name, run in sides.items()}  # compiles
        times: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        reads = []
        for _ in range(opts.runs):  # interleaved, so that a busy moment hits all
            for name, run in sides.items():
                times[name].append(run())
            reads.append(measure_bandwidth(opts.dtype, step_bytes(model, batch, PROMPT + NEW / 2), repeats=3))
        result["rows"].append(_row(model, batch, first, times, reads))
        _print_row(result["rows"][-1])


def _row(model, batch, first, times, reads) -> dict[str, Any]:
    wall = {name: record.spread([t["wall"] for t in runs]) for name, runs in times.items()}
    decode = record.spread([t["decode"] / (NEW - 1) for t in times["jaxaroo"]])
    need = step_bytes(model, batch, PROMPT + NEW / 2)
    matvec = record.spread([r["matvec"] for r in reads])
    achieved = need / decode["median"]
    row = {
        "batch": batch,
        "first_call_seconds": first,
        "wall_seconds": wall,
        "tokens_per_second": {name: batch * NEW / w["median"] for name, w in wall.items()},
        "decode_step_seconds": decode,
        "step_bytes": need,
        "achieved_bytes_per_second": achieved,
        "matvec_bytes_per_second": matvec,
        "long_matvec_bytes_per_second": record.spread([r["matvec_long"] for r in reads]),
        "copy_bytes_per_second": record.spread([r["copy"] for r in reads]),
        "fraction_of_matvec_bandwidth": achieved / matvec["median"],
    }
    if "transformers" in wall:
        pairs = zip(times["transformers"], times["jaxaroo"], strict=True)
        row["speedup_over_transformers"] = record.spread([t["wall"] / o["wall"] for t, o in pairs])
    return row


def _print_row(row: dict[str, Any]) -> None:
    speeds = ", ".join(f"{name} {rate:.1f} tokens/s" for name, rate in row["tokens_per_second"].items())
    print(f"batch {row['batch']}: {speeds}")
    print(
        f"  step {row['decode_step_seconds']['median'] * 1e3:.2f} ms reads {row['step_bytes'] / 1e6:.1f} MB: ", end=""
    )
    print(
        f"{row['achieved_bytes_per_second'] / 1e9:.2f} GB/s, {row['fraction_of_matvec_bandwidth']:.0%} of matvec ",
        end="",
    )
    copied = row["copy_bytes_per_second"]["median"] / 1e9
    print(f"{row['matvec_bytes_per_second']['median'] / 1e9:.2f} GB/s (copy {copied:.2f} GB/s)")
    if "speedup_over_transformers" in row:
        print(f"  {row['speedup_over_transformers']['median']:.2f} x transformers")


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
