"""How long does the quick start take, from nothing, and what do its stages come to?

`jaxaroo quickstart` in a process of its own, with an empty compilation cache; the package is installed already. Seconds
are those of each command, figures what the commands said.

    python -m benchmarks.quickstart
    python -m benchmarks.quickstart --smoke
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

from benchmarks import record
from jaxaroo.cli.stages import read_done

KEPT = ("accuracy", "interval", "auroc", "kept", "solutions", "k", "majority", "pass_at", "best_of", "prompts", "pairs")


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--smoke", action="store_true", help="the smallest one, as tests run it")
    opts = args.parse_args()
    environment = record.environment()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        command = [sys.executable, "-m", "jaxaroo.cli.main", "quickstart", "--out", str(out)]
        began = time.monotonic()
        subprocess.run([*command, *(["--smoke"] if opts.smoke else [])], env=env, check=True)
        seconds = time.monotonic() - began
        done = read_done(out)
        commands = [
            {"stage": ran.stage, "command": _shown(ran.command, folder), "seconds": round(ran.seconds, 1)}
            | {"said": _kept(ran.said)}
            for ran in done
        ]
        report = (out / "report.html").stat().st_size
        measured = json.loads((out / "bits" / "bits.json").read_text(encoding="utf-8"))["measured"]
        drafts = {p.name: json.loads((p / "report.json").read_text()) for p in sorted((out / "bench").iterdir())}
    names = dict.fromkeys(ran.stage for ran in done)
    result = {
        "benchmark": "quickstart",
        "environment": environment,
        "smoke": opts.smoke,
        "seconds": round(seconds, 1),
        "stages": {name: round(sum(ran.seconds for ran in done if ran.stage == name), 1) for name in names},
        "bits": [{key: m[key] for key in ("name", "perplexity", "accuracy", "total")} for m in measured],
        "drafts": {name: {k: found[k] for k in ("tau", "speedup", "identical")} for name, found in drafts.items()},
        "report_bytes": report,
        "commands": commands,
    }
    record.save(f"quickstart{'-smoke' if opts.smoke else ''}-{environment['backend']}", result)


def _shown(command: str, folder: str) -> str:
    """With no path of this machine."""
    return command.replace(f"{folder}/", "")


def _kept(said: str) -> Any:
    try:
        found = json.loads(said)
    except json.JSONDecodeError:
        return None
    return {name: value for name, value in found.items() if name in KEPT} if isinstance(found, dict) else None


if __name__ == "__main__":
    main()
