"""What a run writes down of itself: one JSON line a step, and the loss as a curve."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, float]


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Add lines behind those of earlier steps; what is not finite is written as null, which JSON can hold."""
    plain = lambda v: v if not isinstance(v, float) or math.isfinite(v) else None
    lines = [json.dumps({name: plain(value) for name, value in record.items()}) + "\n" for record in records]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last one that a killed process left half is not one."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps behind this one: a run that resumes there will take them again."""
    kept = [record for record in read_records(path) if record["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    append_records(partial, kept)
    os.replace(partial, path)


def board_writer() -> Any:
    """What writes for TensorBoard; looked for before anything is made.

    Raises:
      ValueError: if it is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as e:
        raise ValueError('train: tensorboard needs tensorboardX. Run pip install "jaxaroo[tensorboard]".') from e
    return SummaryWriter


def recorder(out: Path, begin: int, writer: Any, stack: contextlib.ExitStack) -> Callable[[Sequence[Record]], None]:
    """Write the metrics of a run; lines behind `begin` are of steps that will be taken again.

    Args:
      out: the run's folder.
      begin: step that it begins or goes on at.
      writer: of `board_writer`, or None.
      stack: closes what is opened here.
    """
    path = out / "metrics.jsonl"
    forget_after(path, begin)
    board = writer and stack.enter_context(writer(str(out / "tensorboard"), purge_step=begin))

    def record(records: Sequence[Record]) -> None:
        append_records(path, records)
        if board is not None:
            for line in records:
                for name in line.keys() - {"step"}:
                    board.add_scalar(name, line[name], line["step"])

    return record


def plot_loss(path: Path, records: list[dict[str, Any]], title: str) -> None:
    """A picture of the loss over steps, with its running median, and of the learning rate."""
    from matplotlib.figure import Figure  # not pyplot: that keeps a global state, and wants a display

    known = [r for r in records if r.get("loss") is not None]
    steps, loss = [r["step"] for r in known], [r["loss"] for r in known]
    figure = Figure(figsize=(8, 4.5))
    figure.subplots_adjust(left=0.09, right=0.87, bottom=0.12, top=0.92)  # finding them is half of the time it takes
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="loss (nats a token)")
    axes.plot(steps, loss, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
    axes.plot(steps, _running_median(loss), color="tab:blue", label="running median")
    axes.grid(alpha=0.3)
    if known and "learning_rate" in known[0]:
        rate = axes.twinx()
        rate.set_ylabel("learning rate")
        rate.plot(steps, [r["learning_rate"] for r in known], color="tab:gray", linestyle=":", label="learning rate")
    figure.legend(loc="upper right", bbox_to_anchor=(1, 1), bbox_transform=axes.transAxes)
    figure.savefig(path, dpi=120)


# ----------------------------------------------------------------------------------------------------------- private
def _running_median(values: list[float]) -> list[float]:
    """Over about a twentieth of the curve, behind each point."""
    width = max(1, len(values) // 20)
    windows = (sorted(values[max(0, i - width + 1) : i + 1]) for i in range(len(values)))
    return [window[len(window) // 2] for window in windows]
