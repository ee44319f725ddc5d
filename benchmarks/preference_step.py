"""What does a step of preference training cost, in time and memory, and what does TRL's, for the same model and rows?

Random tokens under random weights, which changes nothing here: pairs with a prompt in front of either answer, or rows
with a label. A step is the loss with its reference, gradients, clipping at a norm of 1 and AdamW. Tokens are those of
the sequences that an objective trains on, prompts included, counted the same on both sides; kto's mismatched answers
and padding count for neither; that jaxaroo runs a prompt once for both answers changes no count. Sides run in turns in
one process. The first call, which compiles, stands apart.

The floor is the time that the least multiplications take at the rate of one large product, measured in the same
process: every token of a prompt and its answers once through the layers, the head for answers alone, three
times for what is trained and once for a reference; of kto without mismatched answers. No step can be faster, whatever
else it does.

Memory: of jaxaroo what the compiler says a step holds (arguments and temporaries; the state is updated in place), and
for both the most that a process of its own had resident, above what it had before it made the model.

    python -m benchmarks.preference_step
    python -m benchmarks.preference_step --against trl           (with trl and torch installed)
    python -m benchmarks.preference_step --shape llama-1b --dtype bfloat16 --length 2048     (on an accelerator)
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from jaxaroo.models import hf
from jaxaroo.models.decoder import DecoderConfig, Model, init_params, unstack_layers
from jaxaroo.models.tokenizer import byte_tokenizer
from jaxaroo.sharding.rules import REPLICATED
from jaxaroo.train import preference
from jaxaroo.train.data.pipeline import Batch, BatchConfig, Batches
from jaxaroo.train.data.pipeline import count_units as count_of
from jaxaroo.train.data.tokenise import Encoded
from jaxaroo.train.objectives.logprobs import score_targets
from jaxaroo.train.objectives.policy_gradient import PolicyGradientConfig, Rollout, count_units, policy_gradient
from jaxaroo.train.optimizer import OptimizerConfig, make_optimizer
from jaxaroo.train.preference import PreferenceOptions
from jaxaroo.train.state import init_state
from jaxaroo.train.step import make_train_step

BYTES = byte_tokenizer()
SMALL = DecoderConfig(
    vocab_size=16_384, embed_dim=256, ffn_dim=704, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64,
    max_positions=2048, eos_ids=BYTES.eos_ids,
)  # fmt: skip
LLAMA_1B = DecoderConfig(
    vocab_size=128_256, embed_dim=2048, ffn_dim=8192, num_layers=16, num_heads=32, num_kv_heads=8, head_dim=64,
    max_positions=8192, tie_embeddings=True, rope_theta=500_000.0,
)  # fmt: skip
SHAPES = {"small": SMALL, "llama-1b": LLAMA_1B}
OBJECTIVES = ("dpo", "kto", "orpo", "simpo", "grpo")
RATE = 1e-5
Side = Callable[[], None]


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--shape", choices=SHAPES, default="small")
    args.add_argument("--dtype", default="float32")
    args.add_argument("--pairs", type=int, default=8)
    args.add_argument("--length", type=int, default=256, help="longest sequence")
    args.add_argument("--row", type=int, default=768, help="tokens of a row that jaxaroo packs pairs into")
    args.add_argument("--runs", type=int, default=12)
    args.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    args.add_argument("--remat", choices=["none", "full"], default="none", help="what the backward pass does again")
    args.add_argument("--against", choices=["trl"])
    args.add_argument("--results", help="name of the results file, if not that of the shape and the backend")
    args.add_argument("--resident", nargs=2, metavar=("SIDE", "OBJECTIVE"), help="measure the memory of one side alone")
    opts = args.parse_args()
    cfg = dataclasses.replace(SHAPES[opts.shape], dtype=opts.dtype)
    if opts.resident:
        side, name = opts.resident
        import_side(side)
        before = resident()
        run = SIDES[side](name, cfg, opts)[0]
        for _ in range(3):
            run()
        print(json.dumps({"resident": resident() - before}))
        return
    result: dict[str, Any] = {"benchmark": "preference_step", "environment": record.environment()}
    result |= {"shape": opts.shape, "config": dataclasses.asdict(cfg), "pairs": opts.pairs, "length": opts.length}
    result |= {"row": opts.row, "remat": opts.remat, "objectives": {}}
    result["matmul_flops_per_second"] = rate = matmul_rate(cfg.dtype)
    for name in opts.objectives:
        result["objectives"][name] = measure(name, cfg, opts, rate)
        record.save(opts.results or f"preference-step-{opts.shape}-{jax.default_backend()}", result)


def measure(name: str, cfg: DecoderConfig, opts: argparse.Namespace, rate: float) -> dict[str, Any]:
    """One objective on all sides, by turns."""
    names = ["jaxaroo"] + (["trl"] if opts.against and name != "grpo" else [])
    made = {side: SIDES[side](name, cfg, opts) for side in names}
    tokens = sum(len(row) for sequences in rows_of(name, cfg, opts) for row in sequences[: trained(name)])
    found: dict[str, Any] = {"tokens": tokens, "sides": {}, "floor_seconds": least_flops(name, cfg, opts) / rate}
    first, seconds = {}, {side: [] for side in names}
    for side in names:
        first[side] = timed(made[side][0])
    for _ in range(opts.runs):
        for side in names:
            seconds[side].append(timed(made[side][0]))
    for side in names:
        spread = record.spread(seconds[side])
        row = {"first_call_seconds": first[side], "seconds": spread, "tokens_per_second": tokens / spread["median"]}
        row |= made[side][1]
        if jax.default_backend() == "cpu" and Path("/proc/self/status").exists():
            row["resident_bytes"] = alone(side, name, opts)
        if stats := jax.devices()[0].memory_stats():
            row["peak_device_bytes"] = stats["peak_bytes_in_use"]  # of the process so far
        found["sides"][side] = row
    if "trl" in names:
        ratios = [t / o for t, o in zip(seconds["trl"], seconds["jaxaroo"], strict=True)]
        found["times_as_fast_as_trl"] = record.spread(ratios)
        found["floor_times_as_fast_as_trl"] = found["sides"]["trl"]["seconds"]["median"] / found["floor_seconds"]
        both = [found["sides"][side].get("resident_bytes") for side in ("jaxaroo", "trl")]
        if all(both):
            found["share_of_memory_of_trl"] = both[0] / both[1]
    brief = {s: [round(r["tokens_per_second"]), r.get("resident_bytes")] for s, r in found["sides"].items()}
    print(name, brief, found.get("times_as_fast_as_trl", {}).get("median"), flush=True)
    return found


# --------------------------------------------------------------------------------------------------------------- rows
def rows_of(name: str, cfg: DecoderConfig, opts: argparse.Namespace) -> list[list[np.ndarray]]:
    """Token ids: of pairs both sequences, of kto's rows one; and where their prompts end."""
    rng = np.random.default_rng(0)
    top = min(cfg.vocab_size, BYTES.vocab_size - 8)
    found = []
    for _ in range(opts.pairs):
        prompt = rng.integers(3, top, rng.integers(opts.length // 8, opts.length // 4))
        answers = [
            rng.integers(3, top, rng.integers(opts.length // 3, opts.length - len(prompt) - 1)) for _ in range(2)
        ]
        found.append([np.concatenate([prompt, a]).astype(np.int32) for a in answers])
        PROMPTS[len(found) - 1] = len(prompt)
    return found


PROMPTS: dict[int, int] = {}


def trained(name: str) -> int:
    """Sequences of an example that are trained on."""
    return 1 if name == "kto" else 2


def window_of(name: str, cfg: DecoderConfig, opts: argparse.Namespace) -> Batch:
    """One window of one micro-batch, packed into as few rows as hold it."""
    rows, length = rows_of(name, cfg, opts), opts.row
    more = ("desirable",) if name == "kto" else ()

    def encode(row: Any) -> tuple[Encoded, ...]:
        i = row["i"]
        if i == len(rows):  # fits nowhere, and so ends the window
            ids = np.zeros(length // 2 + 1, np.int32)
            return tuple(Encoded(ids, ids == 0, more={n: ids.astype(np.float32) for n in more} or None) for _ in "ab")
        other = rows[(i + 1) % len(rows)][0][PROMPTS[(i + 1) % len(rows)] :]
        sequences = [rows[i][0], np.concatenate([rows[i][0][: PROMPTS[i]], other])] if name == "kto" else rows[i]
        label = {"desirable": float(i % 2)} if more else {}
        fill = lambda ids: {n: np.full(len(ids), x, np.float32) for n, x in label.items()}
        return tuple(Encoded(ids, np.arange(len(ids)) >= PROMPTS[i], more=fill(ids) or None) for ids in sequences)

    for size in range(1, len(rows) + 1):
        settings = BatchConfig(size=size, max_length=length, packing=True, shuffle=False)
        made = next(Batches([{"i": i} for i in range(len(rows) + 1)], encode, settings, seed=0, parts=2, more=more))
        if int(count_of(made)["sequence"]) == 2 * len(rows):
            return jax.tree.map(jnp.asarray, made)
    raise ValueError(f"--row {length}: expected room for both sequences of a pair, {2 * opts.length} tokens.")


# -------------------------------------------------------------------------------------------------------------- sides
def jaxaroo_side(name: str, cfg: DecoderConfig, opts: argparse.Namespace) -> tuple[Side, dict[str, Any]]:
    """A call makes one step; and what the compiler says it holds."""
    window = window_of(name, cfg, opts)
    tx = make_optimizer(OptimizerConfig(learning_rate=RATE, schedule="constant"), 1000)
    base = jax.jit(partial(init_params, cfg))(jax.random.key(0))
    if name == "grpo":
        gradient = PolicyGradientConfig()

        def loss(params, rollout, key):
            scores = score_targets(cfg, params, rollout.batch, rules=REPLICATED, remat=opts.remat)
            return policy_gradient(scores, rollout, gradient)

        advantages = jnp.where(window.segments % 2 == 1, 1.0, -1.0)
        state, window = init_state(base, tx), Rollout(window, advantages)
        step = make_train_step(loss, tx, count_units)
    else:
        options = PreferenceOptions(objective=name)
        parts = preference.trainable_parts(cfg, options, None)
        state = init_state(parts.init(base, jax.random.key(1)), tx, frozen=base if parts.beside else None)
        loss = preference.make_loss(cfg, options, rules=REPLICATED, remat=opts.remat)
        step = make_train_step(loss, tx, preference.counts(options), combine=parts.combine)
    held = step.lower(state, window).compile().memory_analysis()  # type: ignore[attr-defined]
    kept = [state]

    def run() -> None:
        kept[0], metrics = step(kept[0], window)
        jax.block_until_ready((kept[0], metrics))

    memory = {"argument_bytes": held.argument_size_in_bytes, "temporary_bytes": held.temp_size_in_bytes}
    return run, {"compiled": memory}


def trl_side(name: str, cfg: DecoderConfig, opts: argparse.Namespace) -> tuple[Side, dict[str, Any]]:
    """The loss of TRL's own trainer on its own collated batch, then torch's AdamW."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(tempfile.mkdtemp())
    params = jax.jit(partial(init_params, cfg))(jax.random.key(0))
    hf.save(folder / "model", Model(cfg, unstack_layers(params)))
    BYTES.save(folder / "model")
    load = lambda: AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = rows_of(name, cfg, opts)
    text = lambda ids: "".join(chr(97 + int(i) % 26) for i in ids)  # a byte a token, so as many tokens
    data = []
    for i, (chosen, rejected) in enumerate(rows):
        at = PROMPTS[i]
        pair = {"prompt": text(chosen[:at]), "chosen": text(chosen[at:]), "rejected": text(rejected[at:])}
        data.append(
            {"prompt": pair["prompt"], "completion": pair["chosen"], "label": bool(i % 2)} if name == "kto" else pair
        )
    shared: Any = dict(
        output_dir=str(folder / "out"), per_device_train_batch_size=len(rows), learning_rate=RATE, report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=opts.length,
    )  # fmt: skip
    kinds = trl_trainers()
    trainer_class, config_class, extra = kinds[name]
    model = load()
    arguments: Any = dict(model=model, args=config_class(**shared, **extra), train_dataset=Dataset.from_list(data))
    if name in ("dpo", "kto"):
        arguments["ref_model"] = load()
    trainer = trainer_class(**arguments, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    model.train()

    def run() -> None:
        loss = trainer.compute_loss(model, dict(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run, {"trl": trl.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}


def trl_trainers() -> dict[str, Any]:
    """Where this version of TRL keeps its trainers; experimental ones move."""
    import trl
    from trl.experimental import cpo, orpo

    kto: Any = trl
    if not hasattr(trl, "KTOTrainer"):
        from trl.experimental import kto
    return {
        "dpo": (trl.DPOTrainer, trl.DPOConfig, {}),
        "kto": (kto.KTOTrainer, kto.KTOConfig, {}),
        "orpo": (orpo.ORPOTrainer, orpo.ORPOConfig, {}),
        "simpo": (cpo.CPOTrainer, cpo.CPOConfig, dict(loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=1.0)),
    }


SIDES = {"jaxaroo": jaxaroo_side, "trl": trl_side}


# ------------------------------------------------------------------------------------------------------------ figures
def least_flops(name: str, cfg: DecoderConfig, opts: argparse.Namespace) -> float:
    """Of a step's matrix products, at 2 a multiplication."""
    D, N, K, H, F = cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.ffn_dim
    token = 2 * (2 * D * (N + K) * H + 3 * D * F)  # of a layer, attention apart
    passes = 4 if name in ("dpo", "kto") else 3
    total = 0.0
    for i, sequences in enumerate(rows_of(name, cfg, opts)):
        begin = PROMPTS[i]
        for j, ids in enumerate(sequences[: trained(name)]):
            seen = np.arange(begin if j else 0, len(ids) - 1) + 1.0
            layers = cfg.num_layers * (token * len(seen) + 4 * N * H * seen.sum())
            prompt = begin if name == "orpo" and j == 0 else 0  # whose likelihood counts
            total += passes * (layers + 2 * D * cfg.vocab_size * (len(ids) - begin + prompt))
    return total


def matmul_rate(dtype: str, runs: int = 7) -> float:
    """FLOPs a second of a large product, the best of several."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(x, x))
    return 2 * size**3 / min(timed(lambda: jax.block_until_ready(product(x, x))) for _ in range(runs))


def timed(run: Side) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def import_side(side: str) -> None:
    """Libraries are no part of what a step holds."""
    jax.block_until_ready(jnp.zeros(1) + 1)
    if side == "trl":
        import torch
        import trl

        trl_trainers()
        torch.zeros(1)
        assert trl


def resident() -> int:
    """The most bytes that this process had in memory so far; Linux says so (`ru_maxrss` would be the parent's too)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def alone(side: str, name: str, opts: argparse.Namespace) -> int:
    """The most that a process with this side alone has resident."""
    same = ["--shape", opts.shape, "--dtype", opts.dtype, "--pairs", opts.pairs, "--length", opts.length]
    same += ["--row", opts.row]
    argv = [sys.executable, "-m", "benchmarks.preference_step", *map(str, same), "--resident", side, name]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.decode().splitlines()[-1])["resident"]


if __name__ == "__main__":
    main()
