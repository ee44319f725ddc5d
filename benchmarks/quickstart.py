"""How long does the quick start take, from nothing, and what do its stages come to?

`jaxaroo quickstart` in a process of its own, with an empty compilation cache; the package is installed already. Seconds
are those of each command, figures what the commands said. The smoke test runs again, in another folder, with the
programs that the first one kept, as in CI that keeps a cache. The run that is none also draws docs/quickstart.png.

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
from jaxaroo.cli.main import CACHE_VARIABLE
from jaxaroo.cli.stages import read_done

KEPT = ("accuracy", "interval", "auroc", "kept", "solutions", "k", "majority", "pass_at", "best_of", "prompts", "pairs")


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--smoke", action="store_true", help="the smallest one, as tests run it")
    opts = args.parse_args()
    environment = record.environment()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        seconds = [_run(folder, out, opts.smoke)]
        if opts.smoke:
            seconds.append(_run(folder, Path(folder) / "again", opts.smoke))
        done = read_done(out)
        commands = [
            {"stage": ran.stage, "command": _shown(ran.command, folder), "seconds": round(ran.seconds, 1)}
            | {"said": _kept(ran.said)}
            for ran in done
        ]
        report = (out / "report.html").stat().st_size
        measured = json.loads((out / "bits" / "bits.json").read_text(encoding="utf-8"))["measured"]
        losses = {name: _losses(out / name / "metrics.jsonl") for name in ("policy", "strong")}
        drafts = {p.name: json.loads((p / "report.json").read_text()) for p in sorted((out / "bench").iterdir())}
    names = dict.fromkeys(ran.stage for ran in done)
    result = {
        "benchmark": "quickstart",
        "environment": environment,
        "smoke": opts.smoke,
        "seconds": round(seconds[0], 1),
        "seconds_with_programs_kept": [round(s, 1) for s in seconds[1:]],
        "stages": {name: round(sum(ran.seconds for ran in done if ran.stage == name), 1) for name in names},
        "bits": [{key: m[key] for key in ("name", "perplexity", "accuracy", "total")} for m in measured],
        "drafts": {name: {k: found[k] for k in ("tau", "speedup", "identical")} for name, found in drafts.items()},
        "losses": losses,
        "report_bytes": report,
        "commands": commands,
    }
    record.save(f"quickstart{'-smoke' if opts.smoke else ''}-{environment['backend']}", result)
    if not opts.smoke:
        draw(result, Path(__file__).parents[1] / "docs" / "quickstart.png")


def _run(folder: str, out: Path, smoke: bool) -> float:
    """The command, with a cache that is this folder's; its seconds."""
    env = {name: value for name, value in os.environ.items() if name != CACHE_VARIABLE}
    command = [sys.executable, "-m", "jaxaroo.cli.main", "quickstart", "--out", str(out)]
    began = time.monotonic()
    subprocess.run(
        [*command, *(["--smoke"] if smoke else [])], env=env | {"XDG_CACHE_HOME": f"{folder}/cache"}, check=True
    )
    return time.monotonic() - began


def draw(result: dict[str, Any], path: Path) -> None:
    """The picture of a result: losses, answers chosen among k, quality by bytes, tokens a step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    loss, best, bits, tau = figure.subplots(1, 4)
    for name, points in result["losses"].items():
        loss.plot(*zip(*points, strict=True), label=name)
    loss.set(xlabel="updates", ylabel="nats a token", title="losses", yscale="log")
    [chosen] = [c["said"] for c in result["commands"] if "eval best-of-n" in c["command"]]
    curves = {"knows the truth": chosen["pass_at"], "reward model": chosen["best_of"]["min"]}
    for name, values in (curves | {"majority": chosen["majority"]}).items():
        best.plot(chosen["k"], [100 * v for v in values], "o-", label=name)
    best.set(xlabel="answers", ylabel="right (%)", title="chosen among k", xscale="log")
    best.set_xticks(chosen["k"], [str(k) for k in chosen["k"]], minor=False)
    best.minorticks_off()
    for m in result["bits"]:
        bits.plot([m["total"] / 1000], [100 * m["accuracy"]], "o", label=m["name"])
    bits.set(xlabel="weights (kB)", ylabel="solved greedily (%)", title="one checkpoint", ylim=(0, 100))
    drafts = result["drafts"]
    tau.bar([*drafts], [found["tau"] for found in drafts.values()])
    tau.set(ylabel="tokens a step", title="lossless drafts")
    for axes in (loss, best, bits):
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _losses(path: Path) -> list[tuple[int, float]]:
    """Steps and their mean loss, twenty at a time."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    parts = [records[i : i + 20] for i in range(0, len(records), 20)]
    return [(part[-1]["step"], round(sum(r["loss"] for r in part) / len(part), 4)) for part in parts]


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
