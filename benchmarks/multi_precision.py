"""What one master for all widths costs, beside a model trained for each width; and what ALRS and HASB add.

A decoder of a million weights learns the embedded task in floats. From there, for each seed:

    joint      one master for 8, 6, 4 and 2 bits, every width in every step
    no alrs    the same, scales learning at one rate
    hasb       the same, layers drawing widths of their own ever more often
    8, 6, 4, 2 a model for each width, as many steps

All learn from the data alone, at the same rates and in the same order. Quality is the likelihood of solutions that
no model has seen, and greedy accuracy on as many problems. HASB is compared with `joint` at equal average bits: both
serve the plans that are best for each by its own Hessian.

    python -m benchmarks.multi_precision --work FOLDER        (what FOLDER holds already is not made again)
"""

import argparse
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.policy import command

WIDTHS = (8, 6, 4, 2)
ROWS = "--data builtin:arithmetic --batch.size 16 --batch.max-length 128 --checkpoint.every 100000".split()  # noqa: SIM905
FLOAT = [
    "--model",
    "preset:1m",
    "--steps",
    "2500",
    "--optimizer.learning-rate",
    "2e-3",
    "--optimizer.warmup-steps",
    "50",
]
QAT = [
    "--optimizer.learning-rate",
    "2e-4",
    "--optimizer.warmup-steps",
    "10",
    "--scale-rate",
    "1e-3",
    "--teacher",
    "none",
]
ARMS: dict[str, list[str]] = {
    "joint": [],
    "no alrs": ["--alrs", "off"],
    "hasb": ["--layers", "hasb"],
    **{str(b): ["--bits", str(b)] for b in WIDTHS},
}


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--work", type=Path, required=True, help="folder for what is made")
    args.add_argument("--seeds", type=int, default=3)
    args.add_argument("--steps", type=int, default=300)
    args.add_argument("--problems", type=int, default=1000)
    opts = args.parse_args()
    result: dict[str, Any] = {"benchmark": "multi_precision", "environment": record.environment()}
    result |= {"float": [*FLOAT, *ROWS], "settings": [*QAT, *ROWS, "--steps", str(opts.steps)], "arms": ARMS}
    opts.work.mkdir(parents=True, exist_ok=True)
    plain = opts.work / "float" / "model"
    train("sft", opts.work / "float", [*FLOAT, *ROWS])
    result["seeds"] = [one_seed(opts, plain, seed) for seed in range(opts.seeds)]
    result["summary"] = summary(result["seeds"])
    print(json.dumps(result["summary"], indent=1))
    record.save("multi-precision-arithmetic-cpu", result)


def one_seed(opts: argparse.Namespace, plain: Path, seed: int) -> dict[str, Any]:
    """Train every arm, and measure it."""
    found: dict[str, Any] = {}
    folder = lambda arm: opts.work / f"{arm.replace(' ', '-')}-{seed}"
    common = ["--model", str(plain), *ROWS, *QAT, "--steps", str(opts.steps), "--seed", str(seed)]
    for arm, settings in ARMS.items():
        more = ["--sensitivity", str(opts.work / f"bits-joint-{seed}" / "bits.json")] if arm == "hasb" else []
        train("qat", folder(arm), [*common, *settings, *more])
        ask = [
            "--model",
            folder(arm) / "model",
            "--data",
            "builtin:arithmetic",
            "--out",
            opts.work / f"bits-{arm.replace(' ', '-')}-{seed}",
        ]
        ask += ["--limit", opts.problems, "--questions", opts.problems, "--repeats", 0]
        if arm in ("joint", "hasb"):
            ask += ["--plans", 5]
        if arm == "joint" and seed == 0:
            ask += ["--plain", plain]
        report = opts.work / f"bits-{arm.replace(' ', '-')}-{seed}" / "bits.json"
        if not report.exists():
            command("eval", "bits", *ask, "--json")
        found[arm] = json.loads(report.read_text())
        print(arm, seed, [(e["name"], round(e["nats"], 5), e["accuracy"]) for e in found[arm]["measured"]], flush=True)
    return found


def train(kind: str, out: Path, settings: list[str]) -> None:
    """Unless it is done; what was left half-way is begun again."""
    if (out / "model" / "config.json").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    command("train", kind, *settings, "--out", out)


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, with half of a 95 % interval (Student's t)."""
    at = lambda found, arm, name: next(e for e in found[arm]["measured"] if e["name"] == name)
    table: dict[str, Any] = {"widths": {}, "alrs": {}, "plans": {}}
    for b in WIDTHS:
        name = f"{b} bits"
        rows = {arm: [at(found, arm, name) for found in seeds] for arm in ("joint", "no alrs", "hasb", str(b))}
        for arm, entries in rows.items():
            label = "alone" if arm == str(b) else arm
            table["widths"].setdefault(name, {})[label] = {
                "nats": interval([e["nats"] for e in entries]),
                "accuracy": interval([e["accuracy"] for e in entries]),
            }
        both = list(zip(rows["joint"], rows[str(b)], strict=True))
        table["widths"][name]["tax"] = {
            "perplexity_percent": interval([100 * (a["perplexity"] / o["perplexity"] - 1) for a, o in both]),
            "accuracy_points": interval([100 * (o["accuracy"] - a["accuracy"]) for a, o in both]),
        }
        both = list(zip(rows["joint"], rows["no alrs"], strict=True))
        table["alrs"][name] = interval([o["nats"] - a["nats"] for a, o in both])  # above 0: ALRS is better
    for arm in ("joint", "hasb"):
        for i in range(5):
            plans = [[e for e in found[arm]["measured"] if e["kind"] == "plan"] for found in seeds]
            entries = [p[i] for p in plans if i < len(p)]
            table["plans"].setdefault(arm, []).append(
                {
                    "average_bits": statistics.mean(e["average_bits"] for e in entries),
                    "nats": interval([e["nats"] for e in entries]),
                    "accuracy": interval([e["accuracy"] for e in entries]),
                }
            )
    return table


def interval(values: list[float]) -> dict[str, float]:
    """Mean, and half of its 95 % interval; of up to five values."""
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), math.nan)
    half = t * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": statistics.mean(values), "half_interval": half}


if __name__ == "__main__":
    main()
