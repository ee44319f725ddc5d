"""How good a policy does a laptop train in five minutes, from nothing?

Trains `preset:tiny` on the embedded task with the command line, times it, and asks the model 1,000 problems that it
has not seen: once greedily, and 500 of them four times at temperature 1.

    python -m benchmarks.policy
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import record

SETTINGS = """
    --model preset:tiny --data builtin:arithmetic --batch.size 16 --batch.max-length 128 --batch.no-packing
    --optimizer.learning-rate 2e-3 --optimizer.warmup-steps 50 --checkpoint.every 1000
""".split()  # noqa: SIM905 (as it is typed)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--steps", type=int, default=4500)
    opts = args.parse_args()
    result: dict[str, Any] = {"benchmark": "policy", "settings": [*SETTINGS, "--steps", str(opts.steps)]}
    result |= {"environment": record.environment()}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        start = time.perf_counter()
        command("train", "sft", *result["settings"], "--out", out)
        result["training_seconds"] = time.perf_counter() - start  # of the whole process: imports, compiling, export
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        result["step_seconds"] = record.spread([r["seconds"] for r in records])
        result["last_losses"] = [r["loss"] for r in records[-5:]]
        ask = ("eval", "answers", "--model", out / "model", "--data", "builtin:arithmetic", "--max-new-tokens", 64)
        result["greedy"] = json.loads(command(*ask, "--limit", 1000, "--json"))
        sampled = command(*ask, "--limit", 500, "--samples", 4, "--temperature", 1, "--json")
        result["sampled"] = json.loads(sampled)
    print(
        f"{result['training_seconds']:.0f} s of training: accuracy {result['greedy']['accuracy']:.3f} greedy, ", end=""
    )
    print(f"{result['sampled']['accuracy']:.3f} at temperature 1")
    record.save("policy-arithmetic-cpu", result)


def command(*args: Any) -> str:
    argv = [sys.executable, "-m", "jaxaroo.cli.main", *map(str, args)]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE)
    return done.stdout.decode()


if __name__ == "__main__":
    main()
