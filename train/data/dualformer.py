"""Solutions whose reasoning is partly left out, anew for each sample and epoch (Dualformer, 2410.09918).

    level   what is dropped from the trace of an A* search                 of a solution in lines
    0       nothing                                                        nothing
    1       `close` clauses                                                each line before the last, with this share
    2       `close` clauses, and costs (c0, c5, ...)                       the same
    3       those, and `create` clauses, each with probability `share`     the same
    4       the whole trace: the plan is left                              all lines before the last

A level is drawn by `probabilities`, and all follows from (seed, epoch, index), so that any row can be made alone. A
model that has seen all levels answers at once or thinks first, as its answer is begun for it: with `plan` it is fast,
with `create` it is slow, and with nothing it chooses. (The authors' program forces this first token. Of the embedded
task the fast one is `ans`.)

A trace is words: clauses begin with `create`, `close` or `plan` and go on to the next such word. The column of lines
is our adaptation; it keeps whole lines and what separates them, and lines that are left out leave no trace.

The authors' program keeps costs at level 3 in mazes, and drops 10 to 40 % of the clauses there; here level 3 is the
paper's. Its defaults of `probabilities` are not in it, ours are from memory of the paper: UNVERIFIED.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LEVELS = 5
_HEADS = ("create", "close", "plan")
_LINE = re.compile(r"[^\n]*\S[^\n]*\n?(?:[^\S\n]*\n)*(?:[^\S\n]*\Z)?")  # and the blank lines behind it


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualformerConfig:
    """How often each level is drawn, and how much a random one drops."""

    probabilities: tuple[float, ...] = (0.45, 1 / 6, 1 / 6, 1 / 6, 0.05)  # of levels 0 to 4
    share: float = 0.3
    seed: int = 0

    def __post_init__(self):
        p = self.probabilities
        if len(p) != LEVELS or not all(0 <= x <= 1 for x in p) or not math.isclose(sum(p), 1, abs_tol=1e-6):
            raise ValueError(f"DualformerConfig.probabilities: found {p}; expected {LEVELS} shares that sum to 1.")
        if not 0 <= self.share <= 1:
            raise ValueError(f"DualformerConfig.share: found {self.share}; expected 0 to 1.")
        if self.seed < 0:
            raise ValueError(f"DualformerConfig.seed: found {self.seed}; expected 0 or more.")


@dataclasses.dataclass(frozen=True, eq=False)
class DualformerExamples:
    """Random access to `epochs` versions of every row, one epoch after the other."""

    examples: Sequence[Mapping[str, Any]]
    epochs: int
    cfg: DualformerConfig = DualformerConfig()

    def __len__(self) -> int:
        return self.epochs * len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row with its level."""
        epoch, i = divmod(range(len(self))[index], len(self.examples))
        return dualformer_row(self.examples[i], i, epoch, self.cfg)


def dualformer_row(
    row: Mapping[str, Any], index: int, epoch: int = 0, cfg: DualformerConfig = DualformerConfig()
) -> dict[str, Any]:
    """A row of layout `sft` with part of its reasoning left out; `level` says how much.

    Args:
      row: prompt and completion, a text. Where the completion holds clauses it is taken for a trace, else for lines.
      index: of the row in its source.
      epoch: which version of it.
      cfg: how.

    Raises:
      ValueError: if the completion is no text.
    """
    if not isinstance(text := row.get("completion"), str):
        raise ValueError(
            f"dualformer: row {index} has columns {sorted(row)}, its completion is {type(text).__name__}; expected "
            "prompt and completion in text. Render messages first."
        )
    rng = np.random.default_rng([cfg.seed, epoch, index])
    level = _draw(cfg.probabilities, rng)
    if text.split(maxsplit=1)[:1] in (["create"], ["close"]) and "plan" in text.split():
        dropped = " ".join(drop_clauses(text.split(), level, rng, cfg.share))
    else:
        dropped = drop_lines(text, level, rng, cfg.share)
    return {**row, "completion": dropped, "level": level}


def drop_clauses(trace: Sequence[str], level: int, rng: np.random.Generator, share: float = 0.3) -> list[str]:
    """What a level leaves of the words of a trace and its plan.

    Args:
      trace: clauses `create x y c3 c5` and `close ...`, or Sokoban's longer ones, and the plan, `plan x y` ....
      level: 0 to 4.
      rng: which `create` clauses go at level 3.
      share: how likely each of them goes.

    Raises:
      ValueError: if the level is another, or the trace begins within a clause.
    """
    _check(level)
    if trace and trace[0] not in _HEADS:
        raise ValueError(f"drop_clauses: found {trace[0]!r} first; expected one of {', '.join(_HEADS)}.")
    clauses: list[list[str]] = []
    for word in trace:
        if word in _HEADS:
            clauses.append([])
        clauses[-1].append(word)
    gone = rng.random(len(clauses)) < share
    kept = []
    for clause, drop in zip(clauses, gone, strict=True):
        head = clause[0]
        if (head == "close" and level >= 1) or (head == "create" and (level == 4 or (level == 3 and drop))):
            continue
        without_costs = head == "create" and level >= 2
        kept += [word for word in clause if not (without_costs and re.fullmatch(r"c\d+", word))]
    return kept


def drop_lines(text: str, level: int, rng: np.random.Generator, share: float = 0.3) -> str:
    """What a level leaves of a solution in lines; the last line that is not blank is the answer, and stays.

    White space before the first line stays too, for a prompt may end where it begins.

    Args:
      text: a line a step.
      level: 0 keeps all, 1 to 3 drop each line before the last with this share, 4 drops all of them.
      rng: which lines go.
      share: how likely each of them goes.

    Raises:
      ValueError: if the level is another.
    """
    _check(level)
    body = text.lstrip()
    lines = _LINE.findall(body)
    gone = rng.random(len(lines)) < {0: 0.0, 4: 1.0}.get(level, share)
    kept = [line for line, drop in zip(lines[:-1], gone, strict=False) if not drop] + lines[-1:]
    return text[: len(text) - len(body)] + "".join(kept)


# ----------------------------------------------------------------------------------------------------------- private
def _draw(probabilities: Sequence[float], rng: np.random.Generator) -> int:
    """A level; never one of probability 0, however the sum is rounded."""
    possible = [level for level, p in enumerate(probabilities) if p]
    at = np.searchsorted(np.cumsum([probabilities[level] for level in possible]), rng.random(), side="right")
    return possible[min(int(at), len(possible) - 1)]


def _check(level: int) -> None:
    if level not in range(LEVELS):
        raise ValueError(f"dualformer: found level {level}; expected 0 to {LEVELS - 1}.")
