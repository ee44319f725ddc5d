"""Labels that two agree on (Athena-PRM, https://arxiv.org/abs/2506.09532).

A weak completer fails on steps that were right, a strong one recovers from steps that were wrong; where both say the
same, it is more often true. With first(x) the index of the first step that x calls wrong, R if there is none:

    solution  keep a solution if first(weak) = first(strong), labelled 1 up to there, 0 there, null behind
    step      keep a label if weak and strong give the same, null elsewhere; drop a solution without any

Known of the paper is its abstract: that only consistent labels are kept, and that about 5,000 sufficed. Whether it
drops solutions or steps, its completers, n and temperature are not; ours are both ways, solutions by default, with
n = 8 and temperature 0.8 for the completers.

Consensus with a judge is the first rule with a judge in the place of the strong completer (Qwen2.5-Math-PRM,
https://arxiv.org/abs/2501.07301, which kept about 40 %).
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

Row = dict[str, Any]
Labels = Sequence[int | float | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConsistencyConfig:
    """What has to agree."""

    keep: Literal["solution", "step"] = "solution"
    column: Literal["labels", "soft"] = "labels"
    threshold: float = 0.0  # a step is right if it is worth more; -1, 0 and 1 of PRM800K want one below 0

    def __post_init__(self):
        if self.keep not in ("solution", "step"):
            raise ValueError(f"ConsistencyConfig.keep: found {self.keep!r}; expected solution or step.")


class Report(NamedTuple):
    """What was compared and what is left. `_asdict` is JSON."""

    solutions: int  # with labels from both
    kept: int
    unmatched: int  # with labels from one alone
    unknown: int  # dropped because a step before the first error has no label: by keep="solution" alone
    steps: int  # with a label from both
    kept_steps: int
    kept_share: float  # of solutions, or of steps
    good_share: dict[str, float | None]  # of labelled steps by "weak", "strong" and "kept"; None if there is none


def agree(
    weak: Iterable[Mapping[str, Any]], strong: Iterable[Mapping[str, Any]], cfg: ConsistencyConfig = ConsistencyConfig()
) -> tuple[list[Row], Report]:
    """Rows of layout `steps` with what two label files agree on, in the order of the first.

    Rows are matched by `id`, or where they have none by prompt and steps. What else a row holds, and its `soft`
    labels, are the strong one's.

    Raises:
      ValueError: if a file holds a solution twice, or the two tell different steps of one.
    """
    first, second = _by_name(weak, "weak"), _by_name(strong, "strong")
    pairs = []
    for name, row in first.items():
        if name not in second:
            continue
        if [*row["steps"]] != [*second[name]["steps"]]:
            raise ValueError(f"agree: solution {name:.80} has other steps in the two files; expected the same.")
        pairs.append((second[name], _hard(row, cfg), _hard(second[name], cfg)))
    return _keep(pairs, len(first) + len(second) - 2 * len(pairs), cfg)


def consensus(
    rows: Iterable[Mapping[str, Any]], column: str = "judge", cfg: ConsistencyConfig = ConsistencyConfig()
) -> tuple[list[Row], Report]:
    """Rows whose labels and whose judge agree; the judge is "strong" in the report.

    The column holds labels like those of `labels`, or the index of the first wrong step, -1 for none. Rows without it
    count as unmatched.
    """
    pairs, unmatched = [], 0
    for row in rows:
        if row.get(column) is None:
            unmatched += 1
            continue
        pairs.append(({**row}, _hard(row, cfg), _judged(row, column, cfg)))
    return _keep(pairs, unmatched, cfg)


def first_error(labels: Labels) -> int | None:
    """Index of the first 0 of hard labels, their number if there is none; None where a missing label hides it."""
    for i, label in enumerate(labels):
        if not label:
            return None if label is None else i
    return len(labels)


# ----------------------------------------------------------------------------------------------------------- private
def _keep(pairs: Sequence[tuple[Mapping[str, Any], Labels, Labels]], unmatched: int, cfg: ConsistencyConfig):
    kept, unknown, both, labelled = [], 0, 0, {"weak": [], "strong": [], "kept": []}
    for row, a, b in pairs:
        both += sum(x is not None and y is not None for x, y in zip(a, b, strict=True))
        for name, labels in (("weak", a), ("strong", b)):
            labelled[name] += [label for label in labels if label is not None]
        if cfg.keep == "step":
            labels = [x if x == y else None for x, y in zip(a, b, strict=True)]
            agreed = any(label is not None for label in labels)
        else:
            at, other = first_error(a), first_error(b)
            if at is None or other is None:
                unknown += 1
                continue
            agreed = at == other
            labels = [1 if i < at else 0 if i == at else None for i in range(len(a))]
        if agreed:
            labelled["kept"] += [label for label in labels if label is not None]
            kept.append({**row, "labels": labels})
    steps = len(labelled["kept"])
    share = steps / max(both, 1) if cfg.keep == "step" else len(kept) / max(len(pairs), 1)
    good = {name: sum(labels) / len(labels) if labels else None for name, labels in labelled.items()}
    return kept, Report(len(pairs), len(kept), unmatched, unknown, both, steps, share, good)


def _hard(row: Mapping[str, Any], cfg: ConsistencyConfig) -> list[int | None]:
    labels = row.get(cfg.column)
    if not isinstance(labels, list | tuple):
        found = f"`{cfg.column}` is {labels!r:.40}"
        raise ValueError(
            f"{_name(row):.80}: {found}; expected a list, a label for each step. Label the solution first."
        )
    if len(labels) != len(row["steps"]):
        raise ValueError(f"{_name(row):.80}: found {len(labels)} labels; expected one for each step.")
    if wrong := [x for x in labels if x is not None and not (isinstance(x, int | float) and math.isfinite(x))]:
        raise ValueError(f"{_name(row):.80}: found label {wrong[0]!r:.40}; expected a number or null.")
    return [None if label is None else int(label > cfg.threshold) for label in labels]


def _judged(row: Mapping[str, Any], column: str, cfg: ConsistencyConfig) -> list[int | None]:
    """A judge's labels; of an index all that follows from it."""
    judge, R = row[column], len(row["steps"])
    if type(judge) is int and -1 <= judge < R:
        return [1] * R if judge < 0 else [1] * judge + [0] + [None] * (R - judge - 1)
    if not isinstance(judge, list | tuple):
        found = f"`{column}` is {judge!r:.40}"
        raise ValueError(f"consensus: {found}; expected labels, or the index of the first wrong step, -1 to {R - 1}.")
    return _hard({**row, cfg.column: judge}, cfg)


def _by_name(rows: Iterable[Mapping[str, Any]], which: str) -> dict[str, Row]:
    named: dict[str, Row] = {}
    for row in rows:
        if (name := _name(row)) in named:
            raise ValueError(f"agree: the {which} labels hold {name:.80} twice; expected it once. Remove one.")
        named[name] = {**row}
    return named


def _name(row: Mapping[str, Any]) -> str:
    return json.dumps(row["id"]) if "id" in row else json.dumps([row["prompt"], [*row["steps"]]])
