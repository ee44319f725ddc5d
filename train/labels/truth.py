"""Labels that are known: of every step in the embedded task, of whole solutions in published ones."""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.arithmetic import (
    SLIPS,
    SPLITS,
    ArithmeticConfig,
    Problem,
    Split,
    check_lines,
    make_problem,
    slip_lines,
    solves,
)
from ..data.formats import DataError, gsm8k
from ..data.steps import split_steps

Row = dict[str, Any]
_ANSWER = re.compile(r"^A:(.*)", re.MULTILINE)
_CALCULATION = re.compile(r"<<[^<>\n]*>>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolutionsConfig:
    """Solutions of the embedded task: right ones, and ones with a slip in them."""

    problems: ArithmeticConfig = dataclasses.field(default_factory=ArithmeticConfig)
    wrong: float = 0.5  # share that have a slip
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.wrong <= 1:
            raise ValueError(f"SolutionsConfig.wrong: found {self.wrong}; expected a share from 0 to 1.")


@dataclasses.dataclass(frozen=True)
class ArithmeticSolutions:
    """Random access to solutions of the embedded task as rows of layout `steps`, made when asked for."""

    cfg: SolutionsConfig
    split: Split = "train"
    number: int = 1_000_000

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Row:
        """A solution of problem `index`; `source` is the kind of slip, or `right`."""
        problem = make_problem(self.cfg.problems, self.split, index)
        rng = np.random.default_rng([self.cfg.seed, SPLITS.index(self.split), index])
        lines, source = problem.lines, "right"
        if rng.random() < self.cfg.wrong:
            while True:  # some slips leave some problems right, but a result that is off never does for long
                source = SLIPS[int(rng.integers(len(SLIPS)))]
                if (slipped := slip_lines(problem, source, rng)) is not None:
                    lines = slipped[0]
                    break
        return {"id": f"{self.split}:{index}", **arithmetic_row(problem, lines), "source": source}


def arithmetic_row(problem: Problem, lines: Sequence[str]) -> Row:
    """Any solution of a problem of the embedded task as a row of layout `steps`.

    A label is 1 as long as every line is the plan's; from the first that is not, all are 0. The outcome is the answer's
    alone.
    """
    lines = [*lines]
    labels = [int(right) for right in check_lines(problem, lines)]
    row = {"prompt": f"{problem.question}\n", "steps": lines, "labels": labels, "answer": str(problem.answer)}
    return row | {"outcome": int(solves(problem, lines))}


def outcome_row(row: Row, right: bool) -> Row:
    """A solution of which only the outcome is known: the last step's label, and no other; what an ORM learns from."""
    return {**row, "labels": [*[None] * (len(row["steps"]) - 1), int(right)], "outcome": int(right)}


def read_model_solutions(path: str | os.PathLike[str], *, keep_calculations: bool = False) -> list[Row]:
    """Solutions of grade-school-math's `example_model_solutions.jsonl` as rows of layout `steps`.

    Each line of the file has a question and what four models made of it. Steps are lines. Prompt and steps joined by
    newlines are prompt and completion of `formats.gsm8k`.

    Args:
      path: the file.
      keep_calculations: leave `<<16-3=13>>` in the text.

    Raises:
      DataError: if a line is malformed, or no line is there.
    """
    path, rows = Path(path), []
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected example_model_solutions.jsonl.") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows += _model_solutions(f"{path.name}:{number}", line, keep_calculations)
    if not rows:
        raise DataError(f"{path}: no rows; expected at least one. Name another file.")
    return rows


# ----------------------------------------------------------------------------------------------------------- private
def _model_solutions(where: str, line: str, keep_calculations: bool) -> list[Row]:
    """The rows of one question."""
    try:
        found = json.loads(line)
        models = {name: value for name, value in found.items() if isinstance(value, dict)}
        answer, rows = _ANSWER.findall(found["ground_truth"])[-1].strip(), []
        for model, made in models.items():
            text = made["solution"] if keep_calculations else _CALCULATION.sub("", made["solution"])
            row = gsm8k({"question": found["question"], "answer": text})
            steps = [row["completion"][a:b] for a, b in split_steps(row["completion"])]
            if not steps or type(made["is_correct"]) is not bool:
                raise ValueError(f"{model!r} has {len(steps)} lines and is_correct={made['is_correct']!r}")
            row = {"id": f"{where}:{model}", "prompt": row["prompt"], "steps": steps, "answer": answer}
            rows.append({**outcome_row(row, made["is_correct"]), "source": model})
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        wanted = "`question`, `ground_truth` with a line `A: ...`, and models with `solution` and `is_correct`"
        raise DataError(f"{where}: {type(error).__name__} {str(error)[:100]}; expected {wanted}.") from error
    return rows
