"""EAGLE, Jakiro and Kangaroo on equal data, with about equally many parameters at work: how good, how fast?

Trains a deep, narrow target on the embedded task with the command line, then each drafter on the same rows in the same
order, for several seeds, and measures every one beside plain decoding, in turns in one process. Equal means parameters
that a draft reads, but for embedding and head, which all share with the target: EAGLE's layer; Jakiro's with both
experts, each half as wide as EAGLE's MLP; Kangaroo's adapter with the first layers of the target.

    python -m benchmarks.drafters --work FOLDER        (what FOLDER holds already is not trained again)
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks import record
from jaxaroo.infer.sampling import Sampling
from jaxaroo.infer.speculative.load import load_speculation
from jaxaroo.infer.speculative.measure import Question, measure
from jaxaroo.infer.speculative.settings import SpeculationConfig
from jaxaroo.models import hf
from jaxaroo.models.decoder import DecoderConfig, Model, init_params
from jaxaroo.models.tokenizer import load_tokenizer
from jaxaroo.train.data.arithmetic import ArithmeticConfig, ArithmeticExamples, arithmetic_tokenizer

WIDTH, INNER = 128, 384
EXIT_LAYERS = (1, 2)  # of Kangaroo
COMMON = """
    --data builtin:arithmetic --batch.size 16 --batch.max-length 128 --batch.no-packing --checkpoint.every 1000
    --optimizer.learning-rate 1e-3 --optimizer.warmup-steps 50
""".split()  # noqa: SIM905 (as it is typed)
KINDS: dict[str, list[str]] = {
    "eagle": ["drafter", "--kind", "eagle"],
    "jakiro": ["drafter", "--kind", "jakiro", "--experts-dim", str(INNER // 2)],
    "jakiro-mixture": ["drafter", "--kind", "jakiro-mixture", "--experts-dim", str(INNER // 2)],
    **{f"kangaroo-{layer}": ["early-exit", "--exit-layer", str(layer)] for layer in EXIT_LAYERS},
}
TREE: dict[str, Any] = dict(nodes=16, beam=4, levels=4)
SERVED: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "eagle": [("EAGLE-2", TREE), ("EAGLE-1", dict(shape="static"))],
    "jakiro": [("Jakiro", TREE)],
    "jakiro-mixture": [("Jakiro, mixture", TREE)],
    **{f"kangaroo-{layer}": [(f"Kangaroo, {layer} of 12 layers", dict(drafts=4))] for layer in EXIT_LAYERS},
}


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--work", type=Path, required=True, help="folder for what is trained")
    args.add_argument("--seeds", type=int, default=3)
    args.add_argument("--target-steps", type=int, default=1200)
    args.add_argument("--steps", type=int, default=400)
    args.add_argument("--questions", type=int, default=32)
    args.add_argument("--repeats", type=int, default=3)
    args.add_argument("--only-train", action="store_true")
    opts = args.parse_args()
    result: dict[str, Any] = {"benchmark": "drafters", "target_steps": opts.target_steps, "steps": opts.steps}
    result |= {"seeds": opts.seeds, "environment": record.environment(), "rows": []}

    target = opts.work / "target" / "model"
    if not target.exists():
        fresh = opts.work / "fresh"
        write_fresh_target(fresh)
        steps = ["--steps", str(opts.target_steps)]
        command("train", "sft", "--model", fresh, *COMMON, *steps, "--out", opts.work / "target")
    for seed in range(opts.seeds):
        for kind, words in KINDS.items():
            out = opts.work / f"{kind}-{seed}"
            if not (out / "model").exists():
                more = ["--steps", str(opts.steps), "--seed", str(seed), "--out", out]
                command("train", *words, "--target", target, *COMMON, *more)
    if opts.only_train:
        return

    asked = ("eval", "answers", "--model", target, "--data", "builtin:arithmetic", "--limit", 200)
    result["target_accuracy"] = json.loads(command(*asked, "--max-new-tokens", 64, "--json"))["accuracy"]
    model, tokenizer = hf.load(target, dtype="float32"), load_tokenizer(target)
    result["target_parameters"] = sum(w.size for w in jax.tree.leaves(model.params))
    problems = ArithmeticExamples(ArithmeticConfig(), "test", opts.questions)
    questions = [Question(str(i), "sums", [problems[i]["prompt"]]) for i in range(opts.questions)]
    served = [(name, kind, settings) for kind, all_ in SERVED.items() for name, settings in all_]
    for temperature in (0.0, 1.0):
        for seed in range(opts.seeds):
            for name, kind, settings in [("lookup", "lookup", dict(drafts=4)), *served]:
                if kind == "lookup" and seed:
                    continue  # it has none
                folder = kind if kind == "lookup" else str(opts.work / f"{kind}-{seed}" / "model")
                spec = load_speculation(SpeculationConfig(drafter=folder, **settings), model.config)
                assert spec is not None
                sampling = Sampling(temperature=temperature, max_tokens=64, seed=seed)
                report = measure(model, tokenizer, spec, questions, sampling=sampling, repeats=opts.repeats)
                row = {"name": name, "seed": seed, "at_work": at_work(kind, spec.drafter_params, model), **report}
                result["rows"].append(row)
                print(
                    f"{name}, seed {seed}, T {temperature:g}: tau {report['tau']:.2f}, {report['speedup']:.2f}x, "
                    f"predicted {report['predicted_speedup']:.2f}x, same text {report['identical']:.0%}",
                    flush=True,
                )
                jax.clear_caches()  # every row has a loop of its own
    result["summary"] = summary(result["rows"])
    for line in result["summary"]:
        print(line)
    record.save("drafters-arithmetic-cpu", result)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each drafter and temperature: mean, least and most over seeds."""
    lines = []
    for name, temperature in dict.fromkeys((r["name"], r["temperature"]) for r in rows):
        these = [r for r in rows if (r["name"], r["temperature"]) == (name, temperature)]
        line: dict[str, Any] = {"name": name, "temperature": temperature, "seeds": len(these)}
        line |= {"parameters": these[0]["extra_parameters"], "at_work": these[0]["at_work"]}
        for field in ("tau", "speedup", "predicted_speedup", "identical"):
            values = [r[field] for r in these]
            line[field] = {"mean": statistics.mean(values), "least": min(values), "most": max(values)}
        lines.append(line)
    return lines


def at_work(kind: str, params: Any, model: Model) -> int:
    """Parameters that a draft reads, but for embedding and head."""
    own = sum(w.size for w in jax.tree.leaves(params))
    if not kind.startswith("kangaroo"):
        return own
    layers = sum(w.size for w in jax.tree.leaves(model.params["layers"])) // model.config.num_layers
    return own + int(kind.rsplit("-", 1)[1]) * layers


def write_fresh_target(folder: Path) -> None:
    """Twelve narrow layers with fresh weights, for the embedded task's tokens."""
    tokenizer = arithmetic_tokenizer()
    cfg = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        embed_dim=WIDTH,
        ffn_dim=INNER,
        num_layers=12,
        num_heads=4,
        num_kv_heads=4,
        head_dim=WIDTH // 4,
        tie_embeddings=True,
        max_positions=512,
        eos_ids=tokenizer.eos_ids,
    )
    hf.save(folder, Model(cfg, init_params(cfg, jax.random.key(0))))
    tokenizer.save(folder)


def command(*args: Any) -> str:
    argv = [sys.executable, "-m", "jaxaroo.cli.main", *map(str, args)]
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout.decode()


if __name__ == "__main__":
    main()
