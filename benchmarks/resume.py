"""Does a killed run end as if nothing had happened? Many kills at random moments, and a comparison of every bit.

A small run is made undisturbed. Then runs of the same settings are started, killed with SIGKILL at random moments and
resumed, over and over, until they finish; what a finished one leaves (parameters, their running mean, optimiser state,
random key, position in the data, every recorded metric, the exported model) must be identical to the undisturbed
run's. Half of the kills fall anywhere in the life of the process, the others between its first new step and its end.

    python -m benchmarks.resume --kills 50
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from benchmarks import record

STEPS = 60
SETTINGS = (
    f"--model preset:tiny --data builtin:arithmetic --steps {STEPS} --log-every 3 --checkpoint.every 5 --ema 0.9 "
    "--batch.size 8 --batch.max-length 96 --optimizer.learning-rate 2e-3"
).split()


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--kills", type=int, default=50)
    args.add_argument("--seed", type=int, default=0)
    opts = args.parse_args()
    result: dict[str, Any] = {"benchmark": "resume", "steps": STEPS, "settings": SETTINGS, "seed": opts.seed}
    result |= {"environment": record.environment()}
    with tempfile.TemporaryDirectory() as folder:
        result |= stress(Path(folder), opts.kills, random.Random(opts.seed))
    record.save(f"resume-{jax.default_backend()}", result)
    if result["different"]:
        sys.exit(f"{len(result['different'])} runs differ from the undisturbed one")


def stress(folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill and resume until there were so many kills and every run begun is finished."""
    start = time.monotonic()
    undisturbed = folder / "undisturbed"
    finish(begin("sft", *SETTINGS, "--out", undisturbed))
    life = time.monotonic() - start
    want, moments, different, runs = contents(undisturbed), [], [], 0
    while len(moments) < kills:
        out, command = folder / f"run{runs}", ("sft", *SETTINGS, "--out", folder / f"run{runs}")
        while True:
            child = begin(*command)
            if len(moments) == kills or (moment := kill_sometime(child, out, life, rng)) is None:
                finish(child)
                break
            moments.append(moment)
            print(f"kill {len(moments)} of {kills}: {moment}", flush=True)
            command = ("resume", out) if (out / "config.yaml").exists() else command
        different += [] if contents(out) == want else [{"run": runs, "kills": len(moments)}]
        runs += 1
    saving = sum(m["saving"] for m in moments)
    counts = {"kills": len(moments), "kills_during_a_save": saving, "runs": runs, "different": different}
    return counts | {"seconds_undisturbed": life, "moments": moments}


def begin(*args: Any) -> subprocess.Popen:
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = [sys.executable, "-m", "jaxaroo.cli.main", "train", *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)  # a pipe that nobody reads would fill up


def finish(child: subprocess.Popen) -> None:
    if status := child.wait(timeout=600):
        sys.exit(f"a run ended with status {status}; what it said stands above")


def kill_sometime(child: subprocess.Popen, out: Path, life: float, rng: random.Random) -> dict[str, Any] | None:
    """Where the run stood when it was killed; None if it was done first."""
    logged, size = out / "metrics.jsonl", -1
    if after_steps := rng.random() < 0.5:
        while child.poll() is None:
            now = logged.stat().st_size if logged.exists() else 0
            if 0 <= size < now:
                break
            size = now  # what a resumed run cuts off first makes it smaller
            time.sleep(0.001)
    end = time.monotonic() + rng.uniform(0, life / 3 if after_steps else life)
    while child.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    saving = any("tmp" in p.name for p in (out / "checkpoints").glob("*"))
    if child.poll() is not None:
        return None
    child.kill()
    child.wait()
    steps = [int(p.name) for p in (out / "checkpoints").glob("*") if p.name.isdecimal()]
    lines = len(logged.read_text().splitlines()) if logged.exists() else 0
    return {"saved": max(steps, default=0), "logged": lines, "saving": saving}


def contents(out: Path) -> dict[str, Any]:
    """All that must be the same, bits as bytes."""
    with ocp.CheckpointManager((out / "checkpoints").absolute()) as manager:
        items = ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
        found = manager.restore(STEPS, args=items)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "state": {
            jax.tree_util.keystr(p): np.asarray(x).tobytes() for p, x in jax.tree.leaves_with_path(found["state"])
        },
        "meta": found["meta"],
        "metrics": [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        "model": {f.name: f.read_bytes() for f in (out / "model").iterdir()},
    }


if __name__ == "__main__":
    main()
