"""Curry-DPO (2403.07230): the pairs of each prompt from easy to hard, and after each stage a new reference.

A stage learns the i-th pair of every prompt (`data/curriculum.py`) and is a run of its own, with a fresh optimizer; its
reference is the model it begins with, which is what the stage before has learned. So the loss begins at ln 2 in each.

out/curry.yaml            every setting
out/stages.jsonl          of each stage how many pairs it has, and how far apart their ratings are: `pair_gap`
out/stage-1/pairs.jsonl   what is learned
out/stage-1/run/          the run that learns it, a run like any other (`run.py`)
out/model/                the last stage's model

The stages go on where they were left, by whatever they were stopped.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..models.safetensors import swap_in
from .config import build, read_settings, write_settings
from .data.curriculum import curry_stages
from .data.formats import open_examples
from .objectives.dpo import DpoConfig
from .preference import PreferenceOptions, with_settings
from .rounds import learn
from .run import Outcome, RunConfig, alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurryOptions:
    """Stages of preference training.

    Attributes:
      stages: how many; as many as the prompt with the most pairs has, when not given.
      beta: of DPO, in every stage.
    """

    stages: int | None = None
    beta: float = 0.1

    def __post_init__(self):
        DpoConfig(beta=self.beta)  # refuses
        if self.stages is not None and self.stages < 1:
            raise ValueError(f"CurryOptions.stages: found {self.stages}; expected at least 1.")


def run_curry(cfg: RunConfig, options: CurryOptions, *, progress: bool = False) -> tuple[int, Outcome]:
    """Go through all stages, from where they were left.

    Args:
      cfg: of every stage's run; `data` has rows of layout `ranked`, `out` is the folder of all stages.
      options: how many, and how far from the reference.
      progress: show bars.

    Returns:
      How many stages are done, and how the last run was left.

    Raises:
      FileExistsError: if the folder holds something else, or another process writes there.
      ValueError: for other settings than it was begun with, and rows without pairs.
    """
    stages = _stages(cfg, options, progress)
    _open(cfg, options)
    model, outcome = cfg.model, None
    with alone(cfg.out):
        gap = lambda pairs: float(np.mean([p["score_chosen"] - p["score_rejected"] for p in pairs]))
        known = [{"stage": i, "pairs": len(pairs), "pair_gap": gap(pairs)} for i, pairs in enumerate(stages, 1)]
        _write(cfg.out / "stages.jsonl", _lines(known))
        for number, pairs in enumerate(stages, 1):
            folder = cfg.out / f"stage-{number}"
            folder.mkdir(exist_ok=True)
            data = folder / "pairs.jsonl"
            if not data.is_file():
                _write(data, _lines(pairs))
            at: Any = dict(data=str(data.absolute()), split=None, out=folder / "run")  # the rows were of a split
            run = dataclasses.replace(cfg, model=model, **at)
            outcome = learn("preference", run, _of_stage(options), progress=progress)
            if not outcome.finished:
                return number - 1, outcome
            model = str((folder / "run" / "model").absolute())
        partial = cfg.out / ".model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(model, partial)
        swap_in(partial, cfg.out / "model")
    assert outcome is not None
    return len(stages), outcome


# ----------------------------------------------------------------------------------------------------------- private
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stored:
    """What curry.yaml holds."""

    settings: RunConfig
    options: CurryOptions


def _stages(cfg: RunConfig, options: CurryOptions, progress: bool) -> Sequence[Sequence[Mapping[str, Any]]]:
    examples = open_examples(Path(cfg.data), "ranked", on_bad_row=cfg.on_bad_row, split=cfg.split, progress=progress)
    rows = [examples[i] for i in range(len(examples))]
    stages = curry_stages(rows, options.stages)
    if empty := [i for i, pairs in enumerate(stages, 1) if not pairs] or [1] * (not stages):
        raise ValueError(
            f"train curry: no prompt of {cfg.data} has {empty[0]} pairs; expected responses of different ratings. "
            "Lower --stages, or rate more responses."
        )
    return stages


def _of_stage(options: CurryOptions) -> PreferenceOptions:
    return with_settings(PreferenceOptions(), DpoConfig(beta=options.beta))


def _open(cfg: RunConfig, options: CurryOptions) -> None:
    path, stored = cfg.out / "curry.yaml", _Stored(settings=cfg, options=options)
    if path.is_file():
        then = build(_Stored, read_settings(_Stored, path))
        if dataclasses.replace(then.settings, out=cfg.out) != cfg or then.options != options:
            raise ValueError(
                f"train curry: {cfg.out} was begun with other settings (curry.yaml); expected the same, to go on. Give "
                "those, or choose another --out."
            )
    elif cfg.out.exists() and (not cfg.out.is_dir() or any(p.name != "curry.partial" for p in cfg.out.iterdir())):
        raise FileExistsError(f"train curry: {cfg.out} holds other files; expected a new or empty folder, or stages.")
    cfg.out.mkdir(parents=True, exist_ok=True)
    write_settings(stored, path)


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _write(path: Path, data: bytes) -> None:
    """The whole file, or none."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
