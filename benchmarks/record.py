"""What every result file holds besides its figures: machine, versions, commit, command."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Where and with what this process runs."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *(os.path.relpath(a) if os.path.exists(a) else a for a in sys.argv)]),
        "commit": _commit(),
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": _versions("jax", "jaxlib", "flax", "numpy", "transformers", "torch"),
    }


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, mid, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {"median": mid, "lower_quartile": low, "upper_quartile": high, "runs": len(seconds)}


def save(name: str, result: dict[str, Any]) -> None:
    """Write `results/name.json` and print the same document as the last line."""
    write(name, result)
    print(json.dumps(result))


def write(name: str, result: dict[str, Any]) -> None:
    """Write `results/name.json`."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def read(name: str) -> dict[str, Any]:
    """What `results/name.json` holds; {} if there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _versions(*names: str) -> dict[str, str]:
    """Of those that are installed: peers need not be."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _commit() -> str:
    """Of this checkout; JAXAROO_COMMIT names that of a copy without its history."""
    if named := os.environ.get("JAXAROO_COMMIT"):
        return named
    run = lambda *a: subprocess.run(a, cwd=RESULTS.parent, capture_output=True, text=True, check=False).stdout.strip()
    dirty = run("git", "status", "--porcelain", "--", ":(top,exclude)benchmarks/results")
    return run("git", "rev-parse", "--short", "HEAD") + ("-dirty" if dirty else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
