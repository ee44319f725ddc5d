"""The training loop: batches in, a trained state out, a bar while it lasts."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

from .step import Metrics, TrainState


def fit(
    state: TrainState,
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    batches: Iterable[Any],
    *,
    steps: int,
    seconds: float = float("inf"),
    log_every: int = 10,
    progress: bool = False,
) -> tuple[TrainState, list[dict[str, float]]]:
    """Take up to `steps` steps, or as many as fit into `seconds` (compilation counts).

    Returns:
      The state, and one record of metrics for every `log_every` steps and the last one. Metrics leave the device only
      then.
    """
    records: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    i, metrics = 0, {}

    def record() -> None:
        if i and (not records or records[-1]["step"] != i):
            records.append({"step": i} | {name: float(value) for name, value in metrics.items()})
            bar.set_postfix(loss=f"{records[-1]['loss']:.3f}")

    with tqdm(total=steps, desc="train", unit="step", disable=None if progress else True) as bar:
        for i, batch in zip(range(1, steps + 1), batches, strict=False):
            state, metrics = step(state, batch)
            bar.update()
            if i % log_every == 0:
                record()
            if time.perf_counter() > end:
                break
        record()
    return state, records
