"""What one master for all widths costs, beside a model trained for each width; and what ALRS and HASB add.

A decoder of a million weights learns the solutions of GSM8K in floats, byte by byte. From there, for each seed:

    joint      one master for 8, 6, 4 and 2 bits, every width in every step
    no alrs    the same, scales learning at one rate
    hasb       the same, layers drawing widths of their own ever more often
    8, 6, 4, 2 a model for each width, as many steps

All learn from the data alone, at the same rates. A seed orders the data, and is the same for all arms. Quality is the
likelihood of solutions to questions of the test set. HASB is compared with `joint` at equal average bits: both serve
the plans that are best for each by its own Hessian.

    python -m benchmarks.multi_precision --data FOLDER --work FOLDER      (FOLDER of GSM8K's train.jsonl and test.jsonl;
                                                                           what is made already is not made again)
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

WIDTHS, PLANS = (8, 6, 4, 2), 7
ROWS = "--batch.size 8 --batch.max-length 320 --checkpoint.every 100000".split()  # noqa: SIM905
FLOAT = "--model preset:1m --steps 2000 --optimizer.learning-rate 2e-3 --optimizer.warmup-steps 50".split()  # noqa: SIM905
QAT = "--optimizer.learning-rate 2e-4 --optimizer.warmup-steps 10 --scale-rate 1e-3 --teacher none".split()  # noqa: SIM905
ARMS: dict[str, list[str]] = {
    "joint": [],
    "no alrs": ["--alrs", "off"],
    "hasb": ["--layers", "hasb"],
    **{str(b): ["--bits", str(b)] for b in WIDTHS},
}


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--data", type=Path, required=True, help="folder of GSM8K's files")
    args.add_argument("--work", type=Path, required=True, help="folder for what is made")
    args.add_argument("--seeds", type=int, default=3)
    args.add_argument("--steps", type=int, default=250)
    args.add_argument("--rows", type=int, default=400, help="test solutions to score")
    opts = args.parse_args()
    result: dict[str, Any] = {"benchmark": "multi_precision", "environment": record.environment()}
    result |= {"float": [*FLOAT, *ROWS], "settings": [*QAT, *ROWS, "--steps", str(opts.steps)], "arms": ARMS}
    opts.work.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test"):
        solutions = [json.loads(line)["answer"] for line in (opts.data / f"{name}.jsonl").read_text().splitlines()]
        rows = [json.dumps({"prompt": "\n", "completion": text}) + "\n" for text in solutions]
        (opts.work / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    plain = opts.work / "float"
    train("sft", plain, [*FLOAT, *ROWS, "--data", str(opts.work / "train.jsonl")])
    result["seeds"] = [one_seed(opts, plain / "model", seed) for seed in range(opts.seeds)]
    result["summary"] = summary(result["seeds"])
    print(json.dumps(result["summary"], indent=1))
    record.save("multi-precision-gsm8k-cpu", result)


def one_seed(opts: argparse.Namespace, plain: Path, seed: int) -> dict[str, Any]:
    """Train every arm, and measure it."""
    found: dict[str, Any] = {}
    common = ["--model", str(plain), "--data", str(opts.work / "train.jsonl"), *ROWS, *QAT]
    common += ["--steps", str(opts.steps), "--seed", str(seed)]
    for arm, settings in ARMS.items():
        name = f"{arm.replace(' ', '-')}-{seed}"
        report = opts.work / f"bits-{name}"
        more = ["--sensitivity", str(opts.work / f"bits-joint-{seed}" / "bits.json")] if arm == "hasb" else []
        train("qat", opts.work / name, [*common, *settings, *more])
        ask: list[Any] = ["--model", opts.work / name / "model", "--data", opts.work / "test.jsonl", "--out", report]
        ask += ["--limit", opts.rows, "--questions", 0, "--repeats", 0]
        ask += ["--plans", PLANS] if arm in ("joint", "hasb") else []
        ask += ["--plain", plain] if arm == "joint" and not seed else []
        if not (report / "bits.json").exists():
            command("eval", "bits", *ask)
        found[arm] = json.loads((report / "bits.json").read_text())
        print(arm, seed, [(e["name"], round(e["perplexity"], 4)) for e in found[arm]["measured"]], flush=True)
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
    more = lambda a, b: 100 * (a["perplexity"] / b["perplexity"] - 1)
    table: dict[str, Any] = {"float": at(seeds[0], "joint", "float")["perplexity"], "widths": {}, "plans": []}
    for b in WIDTHS:
        name = f"{b} bits"
        rows = {arm: [at(found, arm, name) for found in seeds] for arm in ("joint", "no alrs", "hasb", str(b))}
        row: dict[str, Any] = {arm: interval([e["perplexity"] for e in entries]) for arm, entries in rows.items()}
        row["joint above alone, percent"] = interval(
            [more(a, o) for a, o in zip(rows["joint"], rows[str(b)], strict=True)]
        )
        row["no alrs above joint, percent"] = interval(
            [more(o, a) for a, o in zip(rows["joint"], rows["no alrs"], strict=True)]
        )
        row["hasb above joint, percent"] = interval(
            [more(o, a) for a, o in zip(rows["joint"], rows["hasb"], strict=True)]
        )
        table["widths"][name] = row
    served = lambda found, arm: {e["average_bits"]: e for e in found[arm]["measured"] if e["kind"] == "plan"}
    each = [(served(found, "joint"), served(found, "hasb")) for found in seeds]
    for bits in sorted(set.intersection(*({*plans} for pair in each for plans in pair))):
        pairs = [(uniform[bits], hasb[bits]) for uniform, hasb in each]
        table["plans"].append(
            {
                "average_bits": bits,
                "joint": interval([u["perplexity"] for u, _ in pairs]),
                "hasb": interval([h["perplexity"] for _, h in pairs]),
                "hasb above joint, percent": interval([more(h, u) for u, h in pairs]),
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
