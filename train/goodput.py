"""Where the time of a run went: what made steps, and what stood beside it, over all its starts.

out/goodput.jsonl has one line for each save of each session, a session being one start of the processes. The last line
of a session counts; whatever comes between it and the next session (steps that were lost, a queue, a new machine) is
time between sessions.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .metrics import append_records, read_records

PARTS = ("start", "compile", "data", "evaluate", "save")  # what is not steps


def recorder(path: Path, begun: float, restored: int) -> Callable[[int, dict[str, float]], None]:
    """What writes a line; it gets the step that is done, and seconds of each part since the loop began.

    Args:
      path: of the file.
      begun: when the process was told to train, `time.time()`.
      restored: the step that it goes on from.
    """
    looped = time.time()

    def write(step: int, seconds: dict[str, float]) -> None:
        now = time.time()
        seconds = {"start": looped - begun, **seconds}
        named = {f"seconds/{name}": seconds.get(name, 0.0) for name in PARTS}
        append_records(path, [{"step": step, "from": restored, "begun": begun, "now": now, **named}])

    return write


def goodput(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares of the whole time, from the first start to the last line.

    Returns:
      sessions; steps that were made, those that were lost and made again included only once; `seconds`; and `share`, of
      steps, of each part, and of what lies between sessions, which together are 1.
    """
    if not records:
        return {}
    last = {r["begun"]: r for r in records}  # of each session
    sessions = [last[begun] for begun in sorted(last)]
    whole = max(sessions[-1]["now"] - sessions[0]["begun"], 1e-9)
    inside = [r["now"] - r["begun"] for r in sessions]
    share = {name: sum(r[f"seconds/{name}"] for r in sessions) / whole for name in PARTS}
    share["between sessions"] = max(0.0, 1 - sum(inside) / whole)
    share = {"steps": max(0.0, 1 - sum(share.values())), **share}
    return {"sessions": len(sessions), "steps": sessions[-1]["step"], "seconds": whole, "share": share}


def told(path: Path) -> str:
    """The account in a line; empty if there is none."""
    found = goodput(read_records(path))
    if not found:
        return ""
    parts = ", ".join(f"{name} {share:.1%}" for name, share in found["share"].items() if share >= 0.001)
    times = "1 start" if found["sessions"] == 1 else f"{found['sessions']} starts"
    return f"{found['seconds']:.0f} s in {times}: {parts}"
