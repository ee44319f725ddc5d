"""What does a jaxaroo training step cost beside the same step written by hand, and its tiled head beside a dense one?

A step is matrix products, which no library makes faster, and what stands around them: masks, counts, the check that a
loss is finite, metrics, the loop on the host. So the same supervised step of the same decoder is written here in plain
jnp, as one would for a single model: one file, a dense cross-entropy, optax, donated buffers. After a check that both
give the same loss and the same new parameters, the two run in turn in one process, and the figure is their difference:
at most 5 % or 100 microseconds, whichever is more. Then the host's part: `fit` over NumPy batches against a bare loop
over the same ones, and `fit` over a live `Batches`. Then the head alone, value and gradient: tiles hold one
`[c_t, c_v]` of the logits and compute them twice; dense, `[N, V]` is written and read several times. Which is faster
depends on whether that fits the caches; which is smaller does not. On accelerators the work is also set against the
peak: 6 FLOPs a token and weight, and 12 T N H L a token for attention without regard to its mask.

    python -m benchmarks.train_step                               (from the repository root)
    python -m benchmarks.train_step --shape qwen3-0.6b --dtype bfloat16 --batch 8 --length 2048
"""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import record
from jaxaroo.jaxlib_ext.token_stats import reference, token_stats
from jaxaroo.models.decoder import DecoderConfig, Params, init_params, param_shapes, rope_frequencies
from jaxaroo.models.presets import PRESETS, preset
from jaxaroo.models.tokenizer import byte_tokenizer
from jaxaroo.sharding.mesh import MeshConfig, make_mesh, put_batch
from jaxaroo.sharding.rules import REPLICATED
from jaxaroo.train.data.arithmetic import ArithmeticConfig, ArithmeticExamples, arithmetic_tokenizer
from jaxaroo.train.data.pipeline import Batch, BatchConfig, Batches, count_units
from jaxaroo.train.data.tokenise import encode_sft
from jaxaroo.train.loop import fit
from jaxaroo.train.objectives import sft
from jaxaroo.train.optimizer import OptimizerConfig, make_optimizer
from jaxaroo.train.state import init_state
from jaxaroo.train.step import make_train_step

RATE, CLIP = 1e-4, 1.0
LOG_EVERY = 10
PEAK = {"NVIDIA H200": {"bfloat16": 989e12}}  # dense FLOPs a second, by `device_kind`
HEADS = [(2048, 64, 69), (2048, 192, 259), (1024, 768, 32_000)]  # N, D, V
HEADS_ACCELERATOR = [*HEADS, (8192, 2048, 151_936)]


class Case(NamedTuple):
    """What is trained, and on how much."""

    shape: str  # a preset
    batch: int  # rows of a step
    length: int
    micro_batches: int


CASES = [Case("tiny", 16, 128, 1), Case("tiny", 16, 128, 4), Case("3m", 4, 512, 1)]
CASES_ACCELERATOR = [Case("qwen3-0.6b", 8, 2048, 1)]


# ------------------------------------------------------------------------------------------------------ the raw step
def raw_step(cfg: DecoderConfig) -> tuple[optax.GradientTransformation, Callable]:
    """Optimiser and `step((params, opt_state), window) -> (state, loss)`, with nothing of jaxaroo's in them."""
    assert cfg.window is None and not (cfg.qkv_bias or cfg.o_bias or cfg.mlp_bias), "the raw step has none of these"
    N, K, H = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    freq = jnp.asarray(rope_frequencies(cfg), jnp.float32)
    mul = partial(jnp.einsum, preferred_element_type=jnp.float32)
    cast = lambda x: x.astype(cfg.dtype)

    def norm(x, gain):
        x = x.astype(jnp.float32)
        return cast(x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + cfg.norm_eps) * gain)

    def rotate(x, cos, sin):
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return cast(jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1))

    def layer(x, w, cos, sin, mask):
        a, (B, T) = w["attn"], x.shape[:2]
        h = norm(x, w["attn_norm"])
        q, k, v = (cast(mul("btd,nhd->btnh", h, cast(a[name]))) for name in "qkv")
        if cfg.qk_norm:
            q, k = norm(q, a["q_norm"]), norm(k, a["k_norm"])
        q, k = rotate(q, cos, sin).reshape(B, T, K, N // K, H), rotate(k, cos, sin)
        score = jnp.where(mask[:, None, None], mul("btkgh,bskh->bkgts", q, k) * H**-0.5, -1e30)
        out = cast(mul("bkgts,bskh->btkgh", cast(jax.nn.softmax(score, axis=-1)), v)).reshape(B, T, N, H)
        x = x + cast(mul("btnh,dnh->btd", out, cast(a["o"])))
        h, m = norm(x, w["mlp_norm"]), w["mlp"]
        h = jax.nn.silu(cast(mul("btd,fd->btf", h, cast(m["gate"])))) * cast(mul("btd,fd->btf", h, cast(m["up"])))
        return x + cast(mul("btf,df->btd", h, cast(m["down"])))

    def loss_sum(params, b: Batch):
        angle = b.positions[..., None, None] * freq
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        T = b.tokens.shape[1]
        mask = (b.segments[:, :, None] == b.segments[:, None]) & jnp.tril(jnp.ones((T, T), bool))
        x = cast(params["embed"][b.tokens])
        x, _ = jax.lax.scan(lambda x, w: (layer(x, w, cos, sin, mask), None), x, params["layers"])
        head = params["embed"] if cfg.tie_embeddings else params["head"]
        z = mul("btd,vd->btv", norm(x, params["norm"]), cast(head))
        chosen = jnp.take_along_axis(z, b.targets[..., None], axis=-1)[..., 0]
        return jnp.sum(b.weights * (jax.nn.logsumexp(z, axis=-1) - chosen))

    tx = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(RATE, weight_decay=0.0))

    @partial(jax.jit, donate_argnums=0)
    def step(state, window: Batch):
        params, opt_state = state
        number = jnp.maximum(jnp.sum(window.mask), 1).astype(jnp.float32)
        grad = jax.value_and_grad(lambda p, b: loss_sum(p, b) / number)
        if window.mask.shape[0] == 1:
            loss, g = grad(params, jax.tree.map(lambda a: a[0], window))
        else:
            add = lambda total, b: (jax.tree.map(jnp.add, total, grad(params, b)), None)
            (loss, g), _ = jax.lax.scan(add, (jnp.float32(0), jax.tree.map(jnp.zeros_like, params)), window)
        updates, opt_state = tx.update(g, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return tx, step


# ------------------------------------------------------------------------------------------------------ measurements
def open_batches(case: Case) -> tuple[int | None, Callable[[], Batches]]:
    """A vocabulary to train (None: the preset's), and packed batches of the embedded task from their beginning."""
    tokenizer = arithmetic_tokenizer() if case.shape == "tiny" else byte_tokenizer()
    examples: Any = ArithmeticExamples(ArithmeticConfig())
    settings = BatchConfig(size=case.batch, micro_batches=case.micro_batches, max_length=case.length)
    vocab = tokenizer.vocab_size if case.shape in ("tiny", "3m") else None
    return vocab, lambda: Batches(examples, partial(encode_sft, tokenizer), settings, seed=0)


def both_sides(cfg: DecoderConfig, params: Params) -> dict[str, tuple[Any, Callable]]:
    """First state and step of each; the buffers of the states are their own."""
    copy = lambda: jax.tree.map(jnp.array, params)
    tx, step = raw_step(cfg)
    ours = make_optimizer(OptimizerConfig(learning_rate=RATE, schedule="constant", clip_norm=CLIP), 10**6)
    return {
        "raw": ((mine := copy(), tx.init(mine)), step),
        "jaxaroo": (init_state(copy(), ours), make_train_step(sft.make_loss(cfg), ours, count_units)),
    }


def check_same(cfg: DecoderConfig, params: Params, window: Batch) -> dict[str, float]:
    """Largest difference of loss and of new parameters after a float32 step; refuses above 1e-5."""
    sides = both_sides(dataclasses.replace(cfg, dtype="float32"), params)
    with jax.default_matmul_precision("highest"):
        (raw, _), loss = sides["raw"][1](sides["raw"][0], window)
        state, metrics = sides["jaxaroo"][1](sides["jaxaroo"][0], window)
    apart = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), raw, state.params)
    moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), raw, params)
    found = {"loss": abs(float(loss) - float(metrics["loss"])), "params": float(max(jax.tree.leaves(apart)))}
    found["params_moved"] = float(min(jax.tree.leaves(moved)))
    assert found["loss"] < 1e-5 and found["params"] < 1e-5 < found["params_moved"], found
    return found


def in_turn(sides: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    """Seconds of each run of each side, one after the other, in an order that turns round every time."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(runs):
        for name in sorted(sides, reverse=bool(i % 2)):
            start = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - start)
    return times


def measure_case(case: Case, dtype: str, runs: int) -> dict[str, Any]:
    """Steps on a batch that lies on the device, then loops over batches that do not."""
    vocab, make = open_batches(case)
    cfg = dataclasses.replace(preset(case.shape, vocab_size=vocab), dtype=dtype)
    params = jax.jit(partial(init_params, cfg))(jax.random.key(0))
    stored = list(itertools.islice(make(), 4 * LOG_EVERY))
    row: dict[str, Any] = {**case._asdict(), "dtype": dtype, "vocab_size": cfg.vocab_size}
    row["largest_differences"] = check_same(cfg, params, stored[0])

    sides, here, states = both_sides(cfg, params), jax.device_put(stored[0]), {}

    def advance(name: str) -> None:
        states[name], _ = jax.block_until_ready(sides[name][1](states[name], here))

    for name, (first, _) in sides.items():
        states[name] = first
        start = time.perf_counter()
        advance(name)
        row.setdefault("first_call_seconds", {})[name] = time.perf_counter() - start
    times = in_turn({name: partial(advance, name) for name in sides}, runs)
    row["step_seconds"] = {name: record.spread(t) for name, t in times.items()}
    row["slower_than_raw"] = _against(times, "jaxaroo", "raw")
    tokens = case.batch * case.length
    row["tokens_per_second"] = {name: tokens / t["median"] for name, t in row["step_seconds"].items()}
    peak = PEAK.get(jax.devices()[0].device_kind, {}).get(dtype)
    work = step_flops(cfg, case)
    row["step_flops"], row["peak_flops_per_second"] = work, peak
    row["mfu"] = {name: peak and work / t["median"] / peak for name, t in row["step_seconds"].items()}

    mesh, live, again = make_mesh(MeshConfig()), make(), itertools.cycle(stored)
    next(live)  # its threads have started

    def bare() -> None:
        losses = []
        for window in itertools.islice(again, LOG_EVERY):
            states["raw"], loss = sides["raw"][1](states["raw"], window)
            losses.append(loss)
        jax.device_get(losses)

    def looped(windows) -> None:
        windows, state = (put_batch(mesh, REPLICATED, w) for w in windows), states["jaxaroo"]
        states["jaxaroo"] = fit(
            state, sides["jaxaroo"][1], windows, steps=int(state.step) + LOG_EVERY, log_every=LOG_EVERY
        )

    loops = {"raw": bare, "fit": lambda: looped(again), "fit_live_batches": lambda: looped(live)}
    with jax.set_mesh(mesh):
        in_turn(loops, 2)
        times = in_turn(loops, max(20, runs // 5))
    times = {name: [t / LOG_EVERY for t in ts] for name, ts in times.items()}
    row["loop_step_seconds"] = {name: record.spread(t) for name, t in times.items()}
    row["loop_slower_than_raw"] = {name: _against(times, name, "raw") for name in ("fit", "fit_live_batches")}
    return row


def step_flops(cfg: DecoderConfig, case: Case) -> float:
    """6 a token and weight that is multiplied (a table that is only looked up is not), and attention's products."""
    shapes = param_shapes(cfg)
    weights = sum(s.size for s in jax.tree.leaves(shapes)) - (0 if cfg.tie_embeddings else shapes["embed"].size)
    attention = 12 * case.length * cfg.num_heads * cfg.head_dim * cfg.num_layers
    return case.batch * case.length * (6.0 * weights + attention)


def measure_head(N: int, D: int, V: int, dtype: str, runs: int) -> dict[str, Any]:
    """Value and gradient: tiled, dense with all statistics, and the plain dense loss that needs no entropy."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (N, D), dtype)
    head = jax.random.normal(keys[1], (V, D), dtype) * jnp.asarray(D**-0.5, dtype)
    targets = jax.random.randint(keys[2], (N,), 0, V)
    entropy = {"tiled": token_stats, "dense": reference}
    loss = {
        name: lambda h, w, f=f: ((s := f(h, w, targets)).logp.mean(), s.entropy.mean()) for name, f in entropy.items()
    }
    loss["dense_loss_only"] = lambda h, w: (reference(h, w, targets).logp.mean(), jnp.float32(0))
    row: dict[str, Any] = {"N": N, "D": D, "V": V, "dtype": dtype, "temporary_bytes": {}, "value": {}}
    sides = {}
    for name, f in loss.items():
        compiled = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True)).lower(hidden, head).compile()
        row["temporary_bytes"][name] = compiled.memory_analysis().temp_size_in_bytes
        row["value"][name] = float(compiled(hidden, head)[0][0])
        sides[name] = lambda run=compiled: jax.block_until_ready(run(hidden, head))
    times = in_turn(sides, runs)
    row["seconds"] = {name: record.spread(t) for name, t in times.items()}
    row["tiled_over_dense"] = record.spread([a / b for a, b in zip(times["tiled"], times["dense"], strict=True)])
    return row


def main() -> None:
    cpu = jax.default_backend() == "cpu"
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--shape", choices=PRESETS, help="a preset; the usual cases when not given")
    args.add_argument("--dtype", default="float32" if cpu else "bfloat16")
    args.add_argument("--batch", type=int, default=8)
    args.add_argument("--length", type=int, default=1024)
    args.add_argument("--micro-batches", type=int, default=1)
    args.add_argument("--runs", type=int, default=100)
    args.add_argument("--name", default=None, help="of the results file")
    opts = args.parse_args()

    result: dict[str, Any] = {"benchmark": "train_step", "environment": record.environment(), "rows": [], "heads": []}
    usual = CASES if cpu else CASES_ACCELERATOR
    for case in [Case(opts.shape, opts.batch, opts.length, opts.micro_batches)] if opts.shape else usual:
        result["rows"].append(measure_case(case, opts.dtype, opts.runs))
        _print_case(result["rows"][-1])
    for N, D, V in [] if opts.shape else HEADS if cpu else HEADS_ACCELERATOR:
        result["heads"].append(measure_head(N, D, V, opts.dtype, max(20, opts.runs // (1 if V < 10_000 else 5))))
        _print_head(result["heads"][-1])
    record.save(opts.name or f"train-step-{opts.shape or 'usual'}-{jax.default_backend()}", result)


# ----------------------------------------------------------------------------------------------------------- private
def _against(times: Mapping[str, list[float]], name: str, base: str) -> dict[str, Any]:
    """Ratio and difference of neighbouring runs, and whether the median is within the target."""
    pairs = list(zip(times[name], times[base], strict=True))
    ratio, apart = record.spread([a / b for a, b in pairs]), record.spread([a - b for a, b in pairs])
    within = ratio["median"] <= 1.05 or apart["median"] <= 100e-6
    return {"ratio": ratio, "seconds": apart, "within_target": within}


def _print_case(row: dict[str, Any]) -> None:
    print("preset:{shape}, {batch} x {length}, {micro_batches} micro-batches, {dtype}:".format(**row))
    for what in ("step_seconds", "loop_step_seconds"):
        print(f"  {what}:", ", ".join(f"{name} {t['median'] * 1e3:.2f} ms" for name, t in row[what].items()))
    speeds = (f"{name} {t:.0f} tokens/s" for name, t in row["tokens_per_second"].items())
    verdict = {"step": row["slower_than_raw"], **row["loop_slower_than_raw"]}
    ratios = (
        f"{name} {v['ratio']['median']:.3f} x raw ({'ok' * v['within_target'] or 'over'})"
        for name, v in verdict.items()
    )
    print("  " + ", ".join([*speeds, *ratios]))
    if row["peak_flops_per_second"]:
        print("  of the peak: " + ", ".join(f"{name} {m:.1%}" for name, m in row["mfu"].items()))


def _print_head(row: dict[str, Any]) -> None:
    sides = (
        f"{n} {t['median'] * 1e3:.2f} ms, {row['temporary_bytes'][n] / 2**20:.1f} MiB"
        for n, t in row["seconds"].items()
    )
    print("head N={N} D={D} V={V}: ".format(**row) + "; ".join(sides))


if __name__ == "__main__":
    main()
