"""What does a jaxaroo training step cost beside the same step written by hand, and its tiled head beside a dense one?

The same supervised step of the same decoder is written here in plain jnp: a dense cross-entropy, optax, donated
buffers. After a check that both give the same loss and the same new parameters, the two run in turn in one process.
The figure is their difference: at most 5 % or 100 microseconds, whichever is more. Processor seconds stand beside
seconds, for on a shared machine they spread less. Then the host's part: `fit` over NumPy batches against a bare loop
over the same ones, and over a live `Batches`. Then the head alone, value and gradient: tiles hold one `[c_t, c_v]` of
the logits and compute them twice; dense, `[N, V]` is written and read several times. On accelerators a step is also set
against the peak: 6 FLOPs a token and weight, and 12 T N H L a token for attention without regard to its mask.

    python -m benchmarks.train_step                               (from the repository root)
    python -m benchmarks.train_step --shape qwen3-0.6b --batch 8 --length 2048       (on an accelerator)
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
import optax

from benchmarks import record
from jaxaroo.jaxlib_ext.token_stats import reference, token_stats
from jaxaroo.models.decoder import DecoderConfig, Params, init_params, rope_frequencies
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

RATE, CLIP, LOG_EVERY = 1e-4, 1.0, 10  # the last is `fit`'s own
PEAK = {"NVIDIA H200": {"bfloat16": 989e12}}  # dense FLOPs a second, by `device_kind`
HEADS = [(2048, 64, 69), (2048, 192, 259), (1024, 768, 32_000)]  # N, D, V
HEADS_ACCELERATOR = [*HEADS, (8192, 2048, 151_936)]


class Case(NamedTuple):
    shape: str
    batch: int
    length: int
    micro_batches: int


CASES = [Case("tiny", 16, 128, 1), Case("tiny", 16, 128, 4), Case("3m", 4, 512, 1)]
CASES_ACCELERATOR = [Case("qwen3-0.6b", 8, 2048, 1)]


def raw_step(cfg: DecoderConfig) -> tuple[optax.GradientTransformation, Callable]:
    """Optimiser and `step((params, opt_state), window) -> (state, loss)`, with nothing of jaxaroo's in them."""
    assert not any((cfg.window, cfg.qkv_bias, cfg.o_bias, cfg.mlp_bias)), "the raw step has none of these"
    tx = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(RATE, weight_decay=0.0))
    N, K, H = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    freq = jnp.asarray(rope_frequencies(cfg), jnp.float32)
    mul = partial(jnp.einsum, preferred_element_type=jnp.float32)
    cast = lambda x: x.astype(cfg.dtype)

    def project(x, w):  # matrices, or XLA transposes weights and gradients (CPU)
        return cast(mul("mi,oi->mo", x.reshape(-1, w.shape[-1]), cast(w)).reshape(*x.shape[:2], -1))

    def norm(x, gain):
        x = x.astype(jnp.float32)
        return cast(x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + cfg.norm_eps) * gain)

    def rotate(x, cos, sin):
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return cast(jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1))

    def layer(x, w, cos, sin, mask):
        a, m, (B, T, D) = w["attn"], w["mlp"], x.shape
        h = norm(x, w["attn_norm"])
        q, k, v = (project(h, a[name].reshape(-1, D)).reshape(B, T, -1, H) for name in "qkv")
        if cfg.qk_norm:
            q, k = norm(q, a["q_norm"]), norm(k, a["k_norm"])
        q = rotate(q, cos, sin).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)  # heads in front of rows, or XLA
        k, v = rotate(k, cos, sin).swapaxes(1, 2), v.swapaxes(1, 2)  # transposes the scores (CPU)
        score = jnp.where(mask[:, None, None], mul("bkgth,bksh->bkgts", q, k) * H**-0.5, -1e30)
        out = cast(mul("bkgts,bksh->bkgth", cast(jax.nn.softmax(score, axis=-1)), v)).transpose(0, 3, 1, 2, 4)
        x = x + project(out.reshape(B, T, N * H), a["o"].reshape(D, -1))
        h = norm(x, w["mlp_norm"])
        return x + project(jax.nn.silu(project(h, m["gate"])) * project(h, m["up"]), m["down"])

    def loss_sum(params, b: Batch):
        cos, sin = jnp.cos(angle := b.positions[..., None, None] * freq), jnp.sin(angle)
        mask = (b.segments[:, :, None] == b.segments[:, None]) & jnp.tril(jnp.ones((b.tokens.shape[1],) * 2, bool))
        x = cast(params["embed"][b.tokens])
        few = cfg.num_layers if cfg.num_layers <= 4 else 1  # unrolled, the residuals are not copied into stacks
        x, _ = jax.lax.scan(lambda x, w: (layer(x, w, cos, sin, mask), None), x, params["layers"], unroll=few)
        head = cast(params["embed" if cfg.tie_embeddings else "head"])
        z = mul("mi,oi->mo", norm(x, params["norm"]).reshape(-1, cfg.embed_dim), head)
        chosen = jnp.take_along_axis(z, b.targets.reshape(-1, 1), axis=-1)[:, 0]
        return jnp.sum(b.weights.reshape(-1) * (jax.nn.logsumexp(z, axis=-1) - chosen))

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


def both_sides(cfg: DecoderConfig, params: Params) -> dict[str, tuple[Any, Callable]]:
    """First state and step of each; the buffers of the states are their own."""
    mine, theirs = jax.tree.map(jnp.array, params), jax.tree.map(jnp.array, params)
    tx, step = raw_step(cfg)
    ours = make_optimizer(OptimizerConfig(learning_rate=RATE, schedule="constant", clip_norm=CLIP), 10**6)
    step_of_ours = make_train_step(sft.make_loss(cfg), ours, count_units)
    return {"raw": ((theirs, tx.init(theirs)), step), "jaxaroo": (init_state(mine, ours), step_of_ours)}


def check_same(cfg: DecoderConfig, params: Params, window: Batch) -> dict[str, float]:
    """Largest difference of loss and of new parameters after a float32 step; refuses above 1e-5."""
    sides = both_sides(dataclasses.replace(cfg, dtype="float32"), params)
    with jax.default_matmul_precision("highest"):
        (raw, _), loss = sides["raw"][1](sides["raw"][0], window)
        state, metrics = sides["jaxaroo"][1](sides["jaxaroo"][0], window)
    far = lambda a, b: [float(jnp.max(jnp.abs(x - y))) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)]
    found = {"loss": abs(float(loss - metrics["loss"])), "params": max(far(raw, state.params))}
    found["params_moved"] = min(far(raw, params))
    assert max(found["loss"], found["params"]) < 1e-5 < found["params_moved"], found
    return found


def in_turn(sides: Mapping[str, Callable[[], Any]], runs: int, steps: int = 1) -> dict[str, Any]:
    """Seconds a step of every side, run one after the other in an order that turns round; all but raw against raw."""
    wall, busy = {name: [] for name in sides}, {name: [] for name in sides}
    for i in range(runs):
        for name in list(sides)[:: 1 if i % 2 else -1]:
            begin, used = time.perf_counter(), time.process_time()
            sides[name]()
            wall[name].append((time.perf_counter() - begin) / steps)
            busy[name].append((time.process_time() - used) / steps)
    spread: Callable[..., Any] = lambda times: {name: record.spread(t) for name, t in times.items()}
    (base, *others), found = sides, {"seconds": spread(wall), "processor_seconds": spread(busy)}
    for name in others:
        ratio = {"ratio": [a / b for a, b in zip(wall[name], wall[base], strict=True)]}
        ratio["difference"] = [a - b for a, b in zip(wall[name], wall[base], strict=True)]
        ratio["processor_ratio"] = [a / b for a, b in zip(busy[name], busy[base], strict=True)]
        found[f"{name}_against_{base}"] = against = spread(ratio)
        against["within_target"] = against["ratio"]["median"] <= 1.05 or against["difference"]["median"] <= 100e-6
    return found


def measure_case(case: Case, dtype: str, runs: int, loops: bool) -> dict[str, Any]:
    """Steps on a batch that lies on the device; with `loops`, also the host's part."""
    tokenizer = arithmetic_tokenizer() if case.shape == "tiny" else byte_tokenizer()
    vocab = tokenizer.vocab_size if case.shape in ("tiny", "3m") else None
    cfg = dataclasses.replace(preset(case.shape, vocab_size=vocab), dtype=dtype)
    settings = BatchConfig(size=case.batch, micro_batches=case.micro_batches, max_length=case.length)
    examples: Any = ArithmeticExamples(ArithmeticConfig())
    live = Batches(examples, partial(encode_sft, tokenizer), settings, seed=0)
    stored = list(itertools.islice(live, 2 * LOG_EVERY))
    params = jax.jit(partial(init_params, cfg))(jax.random.key(0))
    row: dict[str, Any] = {**case._asdict(), "dtype": dtype, "vocab_size": cfg.vocab_size}
    row["largest_differences"] = check_same(cfg, params, stored[0])

    sides, here = both_sides(cfg, params), jax.device_put(stored[0])
    states = {name: first for name, (first, _) in sides.items()}

    def advance(name: str) -> None:
        states[name], _ = jax.block_until_ready(sides[name][1](states[name], here))

    row["first_call"] = {name: in_turn({name: partial(advance, name)}, 1)["seconds"][name] for name in sides}
    row |= in_turn({name: partial(advance, name) for name in sides}, runs)
    each = {name: t["median"] for name, t in row["seconds"].items()}
    row["tokens_per_second"] = {name: case.batch * case.length / t for name, t in each.items()}
    multiplied = sum(w.size for w in jax.tree.leaves(params)) - (0 if cfg.tie_embeddings else params["embed"].size)
    attention = 12 * case.length * cfg.num_heads * cfg.head_dim * cfg.num_layers
    row["step_flops"] = case.batch * case.length * (6.0 * multiplied + attention)
    peak = PEAK.get(jax.devices()[0].device_kind, {}).get(dtype)
    row["mfu"] = {name: row["step_flops"] / t / peak for name, t in each.items()} if peak else None
    if not loops:
        return row
    mesh, again = make_mesh(MeshConfig()), itertools.cycle(stored)

    def bare() -> None:
        step, losses = sides["raw"][1], []
        for window in itertools.islice(again, LOG_EVERY):
            states["raw"], loss = step(states["raw"], window)
            losses.append(loss)
        jax.device_get(losses)

    def looped(source) -> None:
        windows, state = (put_batch(mesh, REPLICATED, window) for window in source), states["jaxaroo"]
        states["jaxaroo"] = fit(state, sides["jaxaroo"][1], windows, steps=int(state.step) + LOG_EVERY)

    each_loop = {"raw": bare, "fit": lambda: looped(again), "fit_live_batches": lambda: looped(live)}
    with jax.set_mesh(mesh):
        in_turn(each_loop, 1)  # compiles for arrays on a mesh
        return row | {"loops": in_turn(each_loop, max(20, runs // 4), LOG_EVERY)}


def measure_head(N: int, D: int, V: int, dtype: str, runs: int) -> dict[str, Any]:
    """Value and gradient: dense with all statistics, tiled, and the plain dense loss that needs no entropy."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (N, D), dtype)
    head = jax.random.normal(keys[1], (V, D), dtype) * jnp.asarray(D**-0.5, dtype)
    targets = jax.random.randint(keys[2], (N,), 0, V)
    of = lambda f: lambda h, w: ((s := f(h, w, targets)).logp.mean(), s.entropy.mean())
    plain = lambda h, w: (reference(h, w, targets).logp.mean(), jnp.float32(0))
    losses = {"dense": of(reference), "tiled": of(token_stats), "dense_loss_only": plain}
    row, sides = {"N": N, "D": D, "V": V, "dtype": dtype, "temporary_bytes": {}, "value": {}}, {}
    for name, loss in losses.items():
        compiled: Any = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)).lower(hidden, head).compile()
        row["temporary_bytes"][name] = compiled.memory_analysis().temp_size_in_bytes
        row["value"][name] = float(compiled(hidden, head)[0][0])
        sides[name] = lambda run=compiled: jax.block_until_ready(run(hidden, head))
    return row | in_turn(sides, runs)


def main() -> None:
    cpu = jax.default_backend() == "cpu"
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--shape", choices=PRESETS, help="a preset; the usual cases when not given")
    args.add_argument("--dtype", default="float32" if cpu else "bfloat16")
    for option, usual in {"--batch": 8, "--length": 1024, "--micro-batches": 1, "--runs": 40}.items():
        args.add_argument(option, type=int, default=usual)
    args.add_argument("--name", default=None, help="of the results file")
    opts = args.parse_args()

    result: dict[str, Any] = {"benchmark": "train_step", "environment": record.environment(), "rows": [], "heads": []}
    one = Case(opts.shape, opts.batch, opts.length, opts.micro_batches)
    for i, case in enumerate([one] if opts.shape else CASES if cpu else CASES_ACCELERATOR):
        result["rows"].append(row := measure_case(case, opts.dtype, opts.runs, loops=i == 0))
        _print(str(case), row)
        _print("  loops", row.get("loops", {"seconds": {}}))
    for N, D, V in [] if opts.shape else HEADS if cpu else HEADS_ACCELERATOR:
        result["heads"].append(row := measure_head(N, D, V, opts.dtype, opts.runs if V < 10_000 else 20))
        _print(f"head {N=} {D=} {V=}, MiB: {[b >> 20 for b in row['temporary_bytes'].values()]}", row)
    record.save(opts.name or f"train-step-{opts.shape or 'usual'}-{jax.default_backend()}", result)


def _print(title: str, row: dict[str, Any]) -> None:
    print(title)
    for name, t in row["seconds"].items():
        line = f"  {name} {t['median'] * 1e3:.2f} ms" + (f", MFU {row['mfu'][name]:.1%}" if row.get("mfu") else "")
        for against in (v for k, v in row.items() if k.startswith(f"{name}_against_")):
            line += f", {against['ratio']['median']:.3f} x, processor {against['processor_ratio']['median']:.3f} x"
        print(line, flush=True)


if __name__ == "__main__":
    main()
