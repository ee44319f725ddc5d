"""Rounds: a model answers, what there is to learn from its answers is chosen, a run learns it; and so again.

ranked        reward-ranked fine-tuning (RAFT, 2304.06767; Athena-7B, 2506.09532): of the policy's answers the best, or
              all right ones, are what it learns next.
value-rounds  IVO (2503.02368): V learns how the answers end of the policy that is guided by the V of the round before,
              in the first round of the policy itself. Answers that share a prefix share its tokens, so the squared
              error makes V there the mean of their returns.

out/rounds.yaml              every setting
out/round-1/samples.jsonl    a line a problem, with its answers, in the order of the problems
out/round-1/rewards.jsonl    what each answer is worth; null for one that is malformed or too long
out/round-1/selected.jsonl   what is learned
out/round-1/run/             the run that learns it, a run like any other (`run.py`)
out/round-1/report.json      written last: then the round is done
out/model/, out/report.json  the last round's model, and the reports of all rounds

samples.jsonl grows by whole lines; each of the other files is there whole or not at all. So a job that was left, by
whatever it was stopped, goes on behind its last whole line or its run's last checkpoint, and asks nothing twice.

Of both papers the loop is known. Ours: each round learns from its own answers alone, begins with the model of the round
before and with a fresh optimizer (`start_from="base"`: with the first model), and sees other problems than the one
before.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from tqdm import tqdm

from ..models.safetensors import swap_in
from .checkpoint import CheckpointConfig
from .config import build, read_settings, write_settings
from .data.arithmetic import ArithmeticConfig
from .data.pipeline import BatchConfig
from .optimizer import OptimizerConfig
from .run import Outcome, RunConfig, alone, resume, start

Row = dict[str, Any]
Kind = Literal["ranked", "value-rounds"]
Keep = Literal["best", "all"]


# ------------------------------------------------------------------------------------------------------------ settings
@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """Settings that both kinds have.

    Attributes:
      model: folder of the policy.
      data: problems, rows with `question` and `answer` (GSM8K) or with `prompt` and `answer`; or builtin:arithmetic.
      out: folder of the rounds. What was left there is gone on with.
      rounds: how many; more than were asked for at first may follow later.
      problems: in each round, in the order of the data; behind the last row comes the first again.
      first: the first problem.
      samples: answers to each problem.
      temperature: of the answers.
      max_new_tokens: tokens of an answer at most.
      test: file of problems that are never learned from, to measure each round's result by; of the embedded task its
        test problems.
      tested: how many of them.
      steps: updates in each round.
      start_from: each round begins with the model of the one before, or with the first.
      seed: of answers, data order and fresh weights.
      dtype: of activations; float32 on CPU and bfloat16 elsewhere when not given.
      max_seqs: answers written at the same time.
      log_every: steps between looks at the metrics.
    """

    model: Path
    data: str
    out: Path
    rounds: int = 3
    problems: int = 1000
    first: int = 0
    samples: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 512
    test: str | None = None
    tested: int = 100
    steps: int = 200
    start_from: Literal["last", "base"] = "last"
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] | None = None
    max_seqs: int = 32
    log_every: int = 10
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(keep=1)
    arithmetic: ArithmeticConfig = ArithmeticConfig()

    def __post_init__(self):
        least = dict.fromkeys(("rounds", "problems", "samples", "max_new_tokens", "steps", "max_seqs", "log_every"), 1)
        for name, low in (least | {"first": 0, "tested": 0}).items():
            if getattr(self, name) < low:
                raise ValueError(f"RoundsConfig.{name}: found {getattr(self, name)}; expected at least {low}.")
        if not 0 <= self.temperature < math.inf or (self.samples > 1 and not self.temperature):
            found = f"temperature={self.temperature}, samples={self.samples}"
            raise ValueError(f"RoundsConfig: found {found}; expected answers that differ: a temperature above 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankedOptions:
    """Those of reward-ranked fine-tuning.

    Attributes:
      reward: folder of a reward model; or `outcome`: 1 for an answer that is right, 0 for one that is not.
      aggregate: how one reward is made of the scores of an answer's steps.
      keep: the best answer of each problem; or all that are not known to be wrong, the same text once.
      threshold: an answer is kept if its reward is above this.
      score_batch: answers scored at a time.
    """

    reward: str = "outcome"
    aggregate: Literal["min", "product", "last", "mean"] = "min"
    keep: Keep = "best"
    threshold: float = 0.0
    score_batch: int = 32

    def __post_init__(self):
        if math.isnan(self.threshold) or self.score_batch < 1:
            found = f"threshold={self.threshold}, score_batch={self.score_batch}"
            raise ValueError(f"RankedOptions: found {found}; expected numbers, the second at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueRoundsOptions:
    """Those of value models.

    Attributes:
      beta: how much a value weighs where it guides.
      width: candidates for each token.
      separator: a token of the vocabulary that answers do not use; a value model has one, and never reads it.
      inner: width of the value head's ReLU layer; a linear head when not given.
    """

    beta: float = 2.0
    width: int = 4
    separator: str = "<|sep|>"
    inner: int | None = None

    def __post_init__(self):
        if not 0 <= self.beta < math.inf or self.width < 1:
            found = f"beta={self.beta}, width={self.width}"
            raise ValueError(f"ValueRoundsOptions: found {found}; expected 0 or more, and 1 or more.")


# ------------------------------------------------------------------------------------------------- what is learned from
def select(rows: Sequence[Row], how: Keep = "best", threshold: float = 0.0) -> list[Row]:
    """Choose the answers that a policy is fine-tuned on, as rows of layout `sft`.

    Args:
      rows: problems with `texts`, `rewards` and `outcomes` (1, 0, or None where no answer is known) of their answers.
        A reward of None, -inf or NaN is that of a malformed answer, which is never chosen.
      how: "best" takes the answer of the highest reward, of equal ones the first; "all" takes all that are not known to
        be wrong, in their order, the same text of a problem once.
      threshold: rewards have to be above it.

    Raises:
      ValueError: if nothing is left.
    """
    if how not in ("best", "all"):
        raise ValueError(f"select: how={how!r}; expected best or all.")
    chosen = []
    for row in rows:
        texts, rewards = row["texts"], row["rewards"]
        above = [i for i, r in enumerate(rewards) if r is not None and r > threshold]
        if how == "best":
            kept = sorted(above, key=lambda i: -rewards[i])[:1]  # of equal ones the first: sorting is stable
        else:
            right = [i for i in above if row["outcomes"][i] != 0]
            kept = sorted({texts[i]: i for i in reversed(right)}.values())
        chosen += [_example(row, i) | {"reward": rewards[i]} for i in kept]
    if not chosen:
        known = [r for row in rows for r in row["rewards"] if r is not None and math.isfinite(r)]
        best = f"the best reward is {max(known):g}" if known else "all are malformed"
        raise ValueError(
            f"select: none of {sum(len(row['texts']) for row in rows)} answers to {len(rows)} problems can be kept, as "
            f"{best}; expected some above {threshold:g}. Begin anew with a lower threshold, more samples, or a policy "
            "that solves some of these problems."
        )
    return chosen


def trajectories(rows: Sequence[Row]) -> list[Row]:
    """Every answer that says something with its return, as rows of layout `unpaired`: what a value model learns from.

    One that ended at once has no text, which no row of that layout may lack.
    """
    each = [(row, i, r) for row in rows for i, r in enumerate(row["rewards"]) if row["texts"][i]]
    return [_example(row, i) | {"label": r == 1} for row, i, r in each]


# ------------------------------------------------------------------------------------------------------------ the loop
class Loop(NamedTuple):
    """What one kind of rounds does; `before` is the model of the round before, None in the first.

    All depends on its arguments alone, so that what is done again after a stop is the same.
    """

    problems: Callable[[int], Sequence[Row]]  # (round) -> rows with `id` and `prompt`
    # (round, before, its problems, how many of them are answered) -> the others, some at a time, in their order; each
    # with `texts`, `whole` (neither cut nor without a final answer) and `outcomes`
    sample: Callable[[int, Path | None, Sequence[Row], int], Iterator[Sequence[Row]]]
    reward: Callable[[Sequence[Row]], Sequence[Sequence[float | None]]]  # of every answer
    choose: Callable[[Sequence[Row]], Sequence[Row]]  # rows with `rewards` -> what is learned
    learn: Callable[[int, Path | None, Path, Path], Outcome]  # (round, before, data, folder of the run)
    measure: Callable[[int, Path], Mapping[str, Any]]  # (round, its model) -> more for its report


class Stand(NamedTuple):
    """Where the rounds were left."""

    reports: list[Row]  # of rounds that are done
    finished: bool
    outcome: Outcome | None = None  # of the run that was stopped


def open_rounds(kind: Kind, settings: RoundsConfig, options: Any) -> None:
    """Make the folder, or see that what was left there was begun with the same settings.

    How many rounds there are, and how many answers are written at the same time, may change.

    Raises:
      FileExistsError: if the folder holds something else.
      ValueError: naming the settings that are not what they were.
    """
    out, path = settings.out, settings.out / "rounds.yaml"
    stored: Any = {"kind": kind, "settings": settings, kind.replace("-", "_"): options}
    if path.is_file():
        then = _flat(dataclasses.asdict(build(_Stored, read_settings(_Stored, path))))
        now = _flat(dataclasses.asdict(_Stored(**stored)))
        names = [n for n in {**then, **now} if n not in _MAY_CHANGE and then.get(n) != now.get(n)]
        if names:
            spell = lambda name: "--" + name.removeprefix("settings.").replace("_", "-")
            listed = [f"{spell(n)} was {then.get(n)!r} and is {now.get(n)!r}" for n in names]
            raise ValueError(
                f"train {kind}: {out} was begun with other settings: {'; '.join(listed)}. Give the same to go on, or "
                "choose another --out."
            )
    elif out.exists() and (not out.is_dir() or any(p.name != "rounds.partial" for p in out.iterdir())):
        raise FileExistsError(f"train {kind}: {out} holds other files; expected a new or empty folder, or rounds.")
    out.mkdir(parents=True, exist_ok=True)
    write_settings(_Stored(**stored), path)


def run_rounds(
    out: Path,
    rounds: int,
    loop: Loop,
    *,
    told: Callable[[Row], None] = lambda report: None,
    progress: bool = False,
) -> Stand:
    """Go through all rounds, from where they were left.

    Args:
      out: their folder.
      rounds: how many.
      loop: what each does.
      told: is called with the report of each round that is done.
      progress: show bars on a terminal.

    Raises:
      FileExistsError: if another process writes there.
      ValueError: if what is there is of other problems or samples, or of more rounds.
    """
    if (out / f"round-{rounds + 1}" / "report.json").is_file():
        raise ValueError(f"rounds: {out} holds more than {rounds} rounds that are done; expected no more than asked.")
    reports, before = [], None
    with alone(out):
        for number in range(1, rounds + 1):
            folder = out / f"round-{number}"
            model, done = folder / "run" / "model", folder / "report.json"
            if not done.is_file():
                folder.mkdir(exist_ok=True)
                outcome = _round(number, before, folder, loop, progress)
                if not outcome.finished:
                    return Stand(reports, False, outcome)
            reports.append(json.loads(done.read_text(encoding="utf-8")))
            told(reports[-1])
            before = model
        assert before is not None
        _publish(out, before, reports)
    return Stand(reports, True)


def learn(kind: str, cfg: RunConfig, options: Any = None, *, progress: bool = False) -> Outcome:
    """Begin a run, or go on with the one in its folder; of one that is done the model is written again."""
    if (cfg.out / "config.yaml").is_file():
        return resume(cfg.out, progress=progress)
    shutil.rmtree(cfg.out, ignore_errors=True)  # what is left of one that did not come to begin
    return start(kind, cfg, options, progress=progress)


# ----------------------------------------------------------------------------------------------------------- private
_MAY_CHANGE = {"settings.out", "settings.rounds", "settings.max_seqs"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stored:
    """What rounds.yaml holds: the options of its own kind, and null for those of the other."""

    kind: Kind
    settings: RoundsConfig
    ranked: RankedOptions | None = None
    value_rounds: ValueRoundsOptions | None = None


def _round(number: int, before: Path | None, folder: Path, loop: Loop, progress: bool) -> Outcome:
    """From problems to a model and a report; what is there already stays."""
    problems = loop.problems(number)
    rows = _answer(number, before, folder / "samples.jsonl", problems, loop, progress)
    path = folder / "rewards.jsonl"
    if not path.is_file():
        rewards = [[r if r is None or math.isfinite(r) else None for r in each] for each in loop.reward(rows)]
        if [len(each) for each in rewards] != [len(row["texts"]) for row in rows]:
            raise ValueError(f"rounds: {len(rewards)} lists of rewards; expected one for every answer of each problem.")
        each = zip(rows, rewards, strict=True)
        _write(path, b"".join(_line({"id": row["id"], "rewards": r}) for row, r in each))
    rewarded = zip(rows, _read(path, path.read_bytes()), strict=True)
    rows = [{**row, "rewards": found["rewards"]} for row, found in rewarded]
    path = folder / "selected.jsonl"
    if not path.is_file():
        _write(path, b"".join(map(_line, loop.choose(rows))))
    outcome = loop.learn(number, before, path, folder / "run")
    if outcome.finished:
        selected = path.read_bytes().count(b"\n")
        report = _summary(number, rows, selected) | dict(loop.measure(number, folder / "run" / "model"))
        _write(folder / "report.json", json.dumps(report, indent=1).encode() + b"\n")
    return outcome


def _answer(
    number: int, before: Path | None, path: Path, problems: Sequence[Row], loop: Loop, progress: bool
) -> list[Row]:
    """The problems with their answers; asked are those behind the last whole line of the file."""
    with path.open("a+b") as file:
        file.seek(0)
        data = file.read()
        end = data.rfind(b"\n") + 1
        rows = _read(path, data[:end])
        known = lambda row: {name: row.get(name) for name in ("id", "prompt", "answer")}
        if len(rows) > len(problems) or any(known(a) != known(b) for a, b in zip(rows, problems, strict=False)):
            raise ValueError(
                f"rounds: {path} holds answers to other problems than those of the data now; expected the same data as "
                "when the rounds were begun. Put them back, or choose another folder."
            )
        file.truncate(end)
        if len(rows) == len(problems):
            return rows
        with (
            tqdm(
                total=len(problems),
                initial=len(rows),
                desc=f"round {number}: answers",
                unit="problem",
                disable=None if progress else True,
            ) as bar,
            contextlib.closing(loop.sample(number, before, problems, len(rows))) as waves,  # type: ignore[type-var]
        ):
            for wave in waves:
                _append(file, b"".join(map(_line, wave)))
                rows += wave
                bar.update(len(wave))
        if [row["id"] for row in rows] != [row["id"] for row in problems]:
            raise ValueError(f"rounds: {len(rows)} problems were answered; expected all {len(problems)}, in order.")
    return rows


def _summary(number: int, rows: Sequence[Row], selected: int) -> Row:
    mean = lambda values: math.fsum(values) / len(values) if values else None
    every = lambda name: [x for row in rows for x in row[name]]
    known = lambda name: [x for x in every(name) if x is not None]
    return {
        "round": number,
        "problems": len(rows),
        "answers": len(every("texts")),
        "malformed": every("whole").count(False),
        "mean_reward": mean(known("rewards")),
        "accuracy": mean(known("outcomes")),
        "selected": selected,
        "share_selected": selected / len(every("texts")),
    }


def _publish(out: Path, model: Path, reports: Sequence[Row]) -> None:
    """The last model beside the reports of all rounds; these are written last."""
    path, text = out / "report.json", json.dumps({"rounds": reports}, indent=1).encode() + b"\n"
    if path.is_file() and path.read_bytes() == text and (out / "model").is_dir():
        return
    partial = out / ".model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model, partial)
    swap_in(partial, out / "model")
    _write(path, text)


def _example(row: Row, i: int) -> Row:
    """Answer `i` in the form of its prompt, text or messages."""
    text: Any = row["texts"][i]
    if not isinstance(row["prompt"], str):
        text = [{"role": "assistant", "content": text}]
    return {"id": f"{row['id']}:{i}", "prompt": row["prompt"], "completion": text}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _read(path: Path, data: bytes) -> list[Row]:
    rows = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as e:
            raise ValueError(f"{path}:{number}: found {line[:80]!r}; expected JSON. Restore the file.") from e
    return rows


def _append(file: BinaryIO, data: bytes) -> None:
    """Return once the disk has it."""
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _write(path: Path, data: bytes) -> None:
    """The whole file, or none."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        _append(file, data)
    os.replace(partial, path)
