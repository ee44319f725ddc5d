"""Does GRPO raise a policy's accuracy within ten minutes on a laptop's two cores?

Trains `preset:tiny` on solutions of the embedded task of which half have a slip, as a policy is trained on what people
wrote, so it learns to be wrong more often than not; lets it learn from its own answers with `jaxaroo train rl`,
rewarded 1 where the final answer is right and 0 elsewhere; and asks the model, before and after, 500 problems that it
has never seen: once greedily, and four times at temperature 1. Problems of the three kinds share nothing but their
generator.

    python -m benchmarks.grpo_arithmetic
    python -m benchmarks.grpo_arithmetic --wrong 0 --sft-steps 2200       (a policy that has not learned enough)
    python -m benchmarks.grpo_arithmetic --algorithm tempo --name grpo-arithmetic-tempo-cpu
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.policy import SETTINGS, command
from jaxaroo.train.data.arithmetic import arithmetic_tokenizer
from jaxaroo.train.labels.truth import ArithmeticSolutions, SolutionsConfig

TASK = ("--data", "builtin:arithmetic")
SAMPLES, TESTED = 4, 500


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--algorithm", default="grpo")
    args.add_argument("--wrong", type=float, default=0.5, help="share of the solutions with a slip")
    args.add_argument("--sft-steps", type=int, default=3700)
    args.add_argument("--steps", type=int, default=100)
    args.add_argument("--groups", type=int, default=32)
    args.add_argument("--samples", type=int, default=16)
    args.add_argument("--learning-rate", type=float, default=1e-4)
    args.add_argument("--seed", type=int, default=0)
    args.add_argument("--policy", type=Path, help="folder of a model to begin with; trained here when not given")
    args.add_argument("--name", default="grpo-arithmetic-cpu", help="of the file of results")
    opts = args.parse_args()
    settings = f"""
        --algorithm {opts.algorithm} --steps {opts.steps} --groups {opts.groups} --samples {opts.samples}
        --seed {opts.seed} --packing --max-new-tokens 64 --max-length 256 --max-seqs {opts.groups * opts.samples}
        --checkpoint.every 100 --optimizer.learning-rate {opts.learning_rate} --optimizer.warmup-steps 10
    """.split()
    result: dict[str, Any] = {
        "benchmark": "grpo_arithmetic",
        "settings": settings,
        "sft_steps": opts.sft_steps,
        "wrong": opts.wrong,
    }
    result |= {"environment": record.environment()}
    with tempfile.TemporaryDirectory() as folder:
        policy, out = opts.policy, Path(folder) / "rl"
        if policy is None:
            data = ("--data", write_solutions(Path(folder), opts), "--tokenizer", Path(folder) / "tokenizer")
            given = [x for x in SETTINGS if x not in TASK]
            command("train", "sft", *given, *data, "--steps", opts.sft_steps, "--out", Path(folder) / "sft")
            policy = Path(folder) / "sft" / "model"
        result["before"] = accuracy(policy)
        print(f"before: {told(result['before'])}", flush=True)
        start = time.perf_counter()
        command("train", "rl", "--model", policy, *TASK, "--out", out, *settings)
        result["training_seconds"] = time.perf_counter() - start  # of the whole process: imports, compiling, export
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        result["step_seconds"] = record.spread([r["seconds"] for r in records])
        result["sampling_seconds"] = record.spread([r["seconds/sampling"] for r in records])
        tenth = max(1, len(records) // 10)
        for name in ("reward", "entropy", "frac_zero_std", "completion/mean_len", "sampler_gap"):
            values = [r[name] for r in records]
            means = [sum(values[i : i + tenth]) / len(values[i : i + tenth]) for i in range(0, len(values), tenth)]
            result.setdefault("curves", {})[name] = means  # each a mean over a tenth of the run
        result["after"] = accuracy(out / "model")
    print(f"after {result['training_seconds']:.0f} s of {opts.algorithm}: {told(result['after'])}")
    record.save(opts.name, result)


def write_solutions(folder: Path, opts: argparse.Namespace) -> Path:
    """As many as are seen, of problems behind those of `train rl`; and the tokenizer of the task."""
    made = ArithmeticSolutions(SolutionsConfig(wrong=opts.wrong, seed=opts.seed))
    rows = (made[500_000 + i] for i in range(16 * opts.sft_steps))
    lines = [json.dumps({"prompt": row["prompt"], "completion": "\n".join(row["steps"])}) + "\n" for row in rows]
    (folder / "tokenizer").mkdir()
    arithmetic_tokenizer().save(folder / "tokenizer")
    (folder / "solutions.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "solutions.jsonl"


def accuracy(model: Path) -> dict[str, Any]:
    """Greedy answers, and samples."""
    ask = ("eval", "answers", "--model", model, *TASK, "--max-new-tokens", 64, "--limit", TESTED, "--json")
    sampled = command(*ask, "--samples", SAMPLES, "--temperature", 1)
    return {"greedy": json.loads(command(*ask)), "sampled": json.loads(sampled)}


def told(found: dict[str, Any]) -> str:
    greedy, sampled = found["greedy"], found["sampled"]
    return f"accuracy {greedy['accuracy']:.3f} greedy, {sampled['accuracy']:.3f} at temperature 1"


if __name__ == "__main__":
    main()
