"""Labels from completions (Math-Shepherd, https://arxiv.org/abs/2312.08935).

For the first k steps of a solution draw n completions from a completer;

    soft_k = share of them that are right        hard_k = 1 if soft_k > threshold else 0        k = 1 .. R

With `early_stop` a solution is left at its first step whose hard label is 0. So work goes in waves: first step 1 of all
solutions, then step 2 of those that go on, and a wave is cut into batches over solutions.

The job is a file of JSON lines: a header, then a row for every step that was asked, in the order of the waves. A batch
is on the disk before the next begins. Whatever ended a job, a full disk included, calling it again goes on behind the
last whole line, and asks nothing twice; seeds depend on (seed, solution, step) alone, so the file becomes the one that
an unbroken job writes, byte for byte, if `sample` draws each prompt by its seed whatever else is in its batch.
"""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from ..data.formats import DataError

Row = dict[str, Any]
Problem = Mapping[str, Any]  # `id`, different for each; `prompt`, `steps`, and whatever `check` wants to know
# prompts, n, seeds -> n texts of each prompt; None for one that was cut, which is not right whatever it came to
Sample = Callable[[list[Any], int, list[int]], Sequence[Sequence[str | None]]]
Check = Callable[[Problem, str], bool]  # whether the whole solution, steps and completion, is right


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonteCarloConfig:
    """How steps are labelled. Over 4 completions, "any is right" becomes less exact (second hand, Math-Shepherd)."""

    n: int = 8  # completions of each step
    threshold: float = 0.0  # hard labels are 1 where more than this share is right; 0 is "any"
    early_stop: bool = True  # ask nothing behind the first step whose hard label is 0
    last_step: Literal["check", "draw"] = "check"  # a solution that is finished is right or wrong: nothing to draw
    joiner: str = "\n"  # behind every step
    batch: int = 64  # steps in one call of `sample`
    seed: int = 0
    completer: str = ""  # what draws, by a name of the caller's: another one does not go on with this one's file

    def __post_init__(self):
        if min(self.n, self.batch) < 1:
            raise ValueError(f"MonteCarloConfig: found n={self.n}, batch={self.batch}; expected 1 or more of each.")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"MonteCarloConfig.threshold: found {self.threshold}; expected 0 or more, less than 1.")
        if self.last_step not in ("check", "draw"):
            raise ValueError(f"MonteCarloConfig.last_step: found {self.last_step!r}; expected check or draw.")


def label(
    problems: Sequence[Problem],
    sample: Sample,
    check: Check,
    path: str | os.PathLike[str],
    cfg: MonteCarloConfig = MonteCarloConfig(),
    *,
    render: Callable[[Problem, str], Any] | None = None,
    progress: bool = False,
) -> list[Row]:
    """Label the steps of solutions; go on where the file at `path` ends.

    Args:
      problems: solutions, as rows of layout `steps` with an `id` and without labels.
      sample: n completions of every prompt.
      check: whether a whole solution is right.
      path: the job's file.
      cfg: how.
      render: what a completer is asked, from a solution and the text of its first steps; None puts the text behind
        the prompt, which then has to be text too.
      progress: show a bar on a terminal.

    Returns:
      `job_rows` of the finished job.

    Raises:
      DataError: if the file is of another job, or was changed.
    """
    _check_problems(problems, render)
    done, end = _read(Path(path), cfg)
    job_rows(problems, done, cfg)  # what is there has to be of these solutions, before more is asked
    render = render or (lambda problem, text: problem["prompt"] + text)
    going, total = [*problems], sum(len(problem["steps"]) for problem in problems)
    with (
        open(path, "r+b" if end else "wb", buffering=0) as file,
        tqdm(total=total, desc="labels", unit="step", disable=None if progress else True) as bar,
    ):
        file.truncate(end)  # what a killed process left of a line
        file.seek(end)
        if not end:
            _append(file, [{"job": _header(cfg)}])
        for step in range(1, 1 + max((len(problem["steps"]) for problem in problems), default=0)):
            going = [problem for problem in going if len(problem["steps"]) >= step]
            wanted = [problem for problem in going if (problem["id"], step) not in done]
            bar.update(len(going) - len(wanted))
            for part in (wanted[i : i + cfg.batch] for i in range(0, len(wanted), cfg.batch)):
                rows = _ask(part, step, sample, check, render, cfg)
                _append(file, rows)
                done |= {(row["problem"], step): row for row in rows}
                bar.update(len(part))
            stopped = [problem for problem in going if cfg.early_stop and not _hard(done[problem["id"], step], cfg)]
            bar.update(sum(len(problem["steps"]) - step for problem in stopped))
            out = {problem["id"] for problem in stopped}
            going = [problem for problem in going if problem["id"] not in out]
    return job_rows(problems, done, cfg)


def read_job(path: str | os.PathLike[str], cfg: MonteCarloConfig) -> dict[tuple[str, int], Row]:
    """What the file of a job holds by now, by solution and step; what a killed process left of a line does not count.

    Raises:
      DataError: if the file is of another job, or was changed.
    """
    return _read(Path(path), cfg)[0]


def job_rows(problems: Sequence[Problem], done: Mapping[tuple[str, int], Row], cfg: MonteCarloConfig) -> list[Row]:
    """Rows of layout `steps`: hard labels in `labels`, shares in `soft`, null for steps that are not to be asked.

    Raises:
      DataError: if a row is of other steps than the solution has now.
    """
    labelled = []
    for problem in problems:
        rows = [done.get((problem["id"], step)) for step in range(1, 1 + len(problem["steps"]))]
        for step, row in enumerate(rows, 1):
            if row is not None and row["text"] != _digest(problem, step):
                found = f"job_rows: the first {step} steps of {problem['id']!r} are not those that were labelled"
                raise DataError(f"{found}; expected the same prompt and steps. Label them anew, in another file.")
        first = next((i for i, row in enumerate(rows) if row is not None and not _hard(row, cfg)), len(rows))
        if cfg.early_stop:  # a job that did not stop there may have asked more
            rows[first + 1 :] = [None] * len(rows[first + 1 :])
        hard = [None if row is None else int(_hard(row, cfg)) for row in rows]
        soft = [None if row is None else row["right"] / row["n"] for row in rows]
        labelled.append({**problem, "labels": hard, "soft": soft})
    return labelled


def step_seed(seed: int, problem: str, step: int) -> int:
    """The seed of a step's completions: below 2**32, and the same in every run."""
    text = json.dumps([seed, problem, step]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big")


# ----------------------------------------------------------------------------------------------------------- private
def _ask(part: Sequence[Problem], step: int, sample: Sample, check: Check, render: Callable, cfg: MonteCarloConfig):
    """Rows of one step of some solutions."""
    finished = [cfg.last_step == "check" and len(problem["steps"]) == step for problem in part]
    before = [cfg.joiner.join(problem["steps"][:step]) for problem in part]
    prompts, seeds = [], []
    for problem, text, final in zip(part, before, finished, strict=True):
        if not final:
            prompts.append(render(problem, text + cfg.joiner))
            seeds.append(step_seed(cfg.seed, problem["id"], step))
    drawn = [[*texts] for texts in sample(prompts, cfg.n, seeds)] if prompts else []
    if (found := [len(texts) for texts in drawn]) != [cfg.n] * len(prompts):
        wanted = f"{cfg.n} for each of {len(prompts)} prompts"
        raise ValueError(f"label: `sample` gave {found!r:.80} completions of step {step}; expected {wanted}.")
    rows, completions = [], iter(drawn)
    for problem, text, final in zip(part, before, finished, strict=True):
        ends = [] if final else next(completions)
        texts = [text] if final else [text + cfg.joiner + end for end in ends if end is not None]
        right = sum(bool(check(problem, whole)) for whole in texts)
        digest = _digest(problem, step)
        n = 1 if final else cfg.n
        rows.append({"problem": problem["id"], "step": step, "n": n, "right": right, "text": digest})
    return rows


def _hard(row: Row, cfg: MonteCarloConfig) -> bool:
    return row["right"] / row["n"] > cfg.threshold


def _digest(problem: Problem, step: int) -> str:
    """Of what was labelled, so that a file is not taken for that of other solutions."""
    text = json.dumps([problem["prompt"], list(problem["steps"][:step])]).encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def _header(cfg: MonteCarloConfig) -> Row:
    """The settings that a row depends on; others may change between calls."""
    return {name: getattr(cfg, name) for name in ("n", "seed", "last_step", "joiner", "completer")}


def _check_problems(problems: Sequence[Problem], render: Callable | None) -> None:
    seen: set[str] = set()
    for i, problem in enumerate(problems):
        name, steps = problem.get("id"), problem.get("steps")
        if not isinstance(name, str) or name in seen:
            fault = f"has id {name!r:.60}; expected a string that no other has"
        elif not steps or not all(isinstance(step, str) for step in steps):
            fault = f"has steps {steps!r:.60}; expected one string or more"
        elif render is None and not isinstance(problem.get("prompt"), str):
            fault = f"has prompt {problem.get('prompt')!r:.60}; expected text, or a function `render`"
        else:
            seen.add(name)
            continue
        raise ValueError(f"label: solution {i} {fault}. Give it one.")


def _read(path: Path, cfg: MonteCarloConfig) -> tuple[dict[tuple[str, int], Row], int]:
    """The rows of whole lines, and where in the file these end."""
    data = path.read_bytes() if path.exists() else b""
    end = data.rfind(b"\n") + 1
    if not end and not _line({"job": _header(cfg)}).startswith(data):
        raise DataError(f"{path}: {data[:40]!r}; expected a file of labels, or none. Name another file.")
    done: dict[tuple[str, int], Row] = {}
    for number, row in enumerate(_lines(path, data[:end]), 1):
        if number == 1:
            if row.get("job") != _header(cfg):
                found = f"{path}: labels made with {row.get('job')}; expected {_header(cfg)}"
                raise DataError(f"{found}. Set the same, or name another file.")
            continue
        if not _is_verdict(row, cfg) or (row["problem"], row["step"]) in done:
            found = f"{path.name}:{number}: {json.dumps(row)[:80]}"
            raise DataError(f"{found}; expected a step that was not there yet. Remove the file, or restore it.")
        done[row["problem"], row["step"]] = row
    return done, end


def _is_verdict(row: Row, cfg: MonteCarloConfig) -> bool:
    """Whether a row is one that this job could have written."""
    kinds = {"problem": str, "step": int, "n": int, "right": int, "text": str}
    if row.keys() != kinds.keys() or any(type(row[name]) is not kind for name, kind in kinds.items()):
        return False
    return row["step"] >= 1 and row["n"] in (1, cfg.n) and 0 <= row["right"] <= row["n"]


def _lines(path: Path, data: bytes) -> Iterator[Row]:
    for number, line in enumerate(data.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            row = error
        if not isinstance(row, dict):
            found = f"{path.name}:{number}: {str(row)[:80]}"
            raise DataError(f"{found}; expected one JSON object a line. Remove the file, or restore it.")
        yield row


def _line(row: Row) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _append(file: io.FileIO, rows: Sequence[Row]) -> None:
    """Write rows, and return once the disk has them."""
    data = b"".join(map(_line, rows))
    while data:
        data = data[file.write(data) :]
    os.fsync(file.fileno())
