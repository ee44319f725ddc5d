"""The training loop: windows in, a trained state out; log and save are functions that the caller passes."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from tqdm import tqdm

from .metrics import Record
from .state import TrainState
from .step import Metrics, Step


class NotFiniteError(ArithmeticError):
    """Too many steps in a row had a loss or gradient that is not finite."""


def fit(
    state: TrainState,
    step: Step,
    windows: Iterator[Any],
    *,
    steps: int,
    check_start: Callable[[Metrics], None] = lambda metrics: None,
    log: Callable[[list[Record]], None] = lambda records: None,
    save: Callable[[TrainState], None] = lambda state: None,
    stop: Callable[[int], bool] = lambda step: False,
    evaluate: Callable[[TrainState], None] = lambda state: None,
    evaluate_every: int = 0,
    log_every: int = 10,
    save_every: int | None = None,
    max_skipped: int = 10,
    alive: Callable[[], None] = lambda: None,
    account: Callable[[int, dict[str, float]], None] = lambda step, seconds: None,
    progress: bool = False,
) -> TrainState:
    """Go on from the state's step until `steps` steps are taken, or until `stop`.

    Metrics stay on the devices until `log_every` steps are through, or a save is due: the host never waits for a step
    in between. A save comes after the log, so what was saved is also written down.

    Args:
      state: where to begin; its buffers are donated.
      step: of `make_train_step`.
      windows: arrays for one step each.
      steps: number of the last step.
      check_start: gets the metrics of step 1; what it raises ends the run before anything is written down.
      log: gets one record a step: its number, metrics, and seconds (a mean over the steps since the last call).
      save: called every `save_every` steps, after the last one, and when told to stop.
      stop: asked after every step, with its number.
      evaluate: called every `evaluate_every` steps, if that is not 0, and after the last one.
      evaluate_every: steps between evaluations.
      log_every: steps between logs.
      save_every: steps between saves; None saves at the end alone.
      max_skipped: this many skipped steps in a row end the run, without a save.
      alive: called whenever something was done.
      account: called after every save, with the step and the seconds since the loop began that made no steps: waiting
        for data, compiling (the first step, until it is on its way), evaluating and saving.
      progress: show a bar.

    Raises:
      NotFiniteError: after `max_skipped` skipped steps in a row.
    """
    done, since = int(state.step), time.perf_counter()
    pending: list[Metrics] = []
    aside: dict[str, float] = {"compile": 0.0, "data": 0.0, "evaluate": 0.0, "save": 0.0}

    @contextlib.contextmanager
    def counted(part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        aside[part] += time.perf_counter() - began

    with tqdm(total=steps, initial=done, desc="train", unit="step", disable=None if progress else True) as bar:

        def flush() -> None:
            nonlocal since
            found = jax.device_get(pending)
            now = time.perf_counter()
            seconds, since = (now - since) / max(1, len(found)), now
            first = done - len(found) + 1
            records: list[Record] = [
                {"step": first + i, **{name: value.item() for name, value in m.items()}, "seconds": seconds}
                for i, m in enumerate(found)
            ]
            pending.clear()
            log(records)
            if records:
                rate = sum(r.get("inputs", 0) for r in records) / (seconds * len(records))
                bar.set_postfix({"loss": f"{records[-1]['loss']:.4f}"} | ({"tokens/s": f"{rate:.0f}"} if rate else {}))
            worst = max(records, key=lambda r: r["skipped_in_a_row"], default={"skipped_in_a_row": -1})
            if (row := worst["skipped_in_a_row"]) >= max_skipped:
                raise NotFiniteError(
                    f"fit: loss or gradient of {row} steps in a row, up to step {worst['step']}, was not finite; "
                    f"expected less than {max_skipped}. Every checkpoint has parameters from before them; try a lower "
                    "learning rate, or look at the data of these steps."
                )

        while done < steps:
            with counted("data"):
                window = next(windows, None)
            if window is None:
                raise ValueError(f"fit: the windows end behind step {done}; expected {steps} of them.")
            with contextlib.nullcontext() if aside["compile"] else counted("compile"):
                state, metrics = step(state, window)
            done += 1
            if done == 1:
                check_start(metrics)
            pending.append(metrics)
            bar.update()
            stopping = stop(done)
            saving = done == steps or stopping or (save_every is not None and done % save_every == 0)
            if saving or len(pending) >= log_every:
                flush()
            alive()
            if evaluate_every and (done == steps or done % evaluate_every == 0):
                with counted("evaluate"):
                    evaluate(state)  # before the save, which says that this step is done with
                alive()
            if saving:
                with counted("save"):
                    save(state)
                alive()
                account(done, aside)
            if stopping:
                break
    return state
