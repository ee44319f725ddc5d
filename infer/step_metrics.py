"""How good step scores are: do they rank steps, find first errors, and mean what they say?

    AUROC        P(score of a right step > score of a wrong one) + P(equal) / 2
    ProcessBench a_err = share of erroneous solutions whose first error is found, a_cor = share of right ones in which
                 none is; F1 = 2 a_err a_cor / (a_err + a_cor)                                    (arXiv:2412.06559)
    macro-F1     mean of the F1 of "right" and of "wrong" over steps                           (VisualProcessBench)
    ECE          sum over bins of count / all * |mean score - share right|            Brier    mean (score - label)^2

AUROC and not AUPRC, which favours groups with many positives where classes are unbalanced (arXiv:2401.06091). It is
given for all steps and for those up to the first error, which is the honest one: what follows an error is easy.

Labels are 1 (right), 0 (wrong) or None (not used). Soft labels are refused, for no single threshold suits every way to
make them. What the data do not define is None and never 0: the AUROC of one kind of steps, the share of no solutions.
"""

import math
import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from .guided.best_of_n import Curves

Numbers = Float[np.ndarray, " n"] | Sequence[float]
Labels = Int[np.ndarray, " n"] | Bool[np.ndarray, " n"] | Sequence[int | None]


class ProcessBench(NamedTuple):
    """How often first errors are found. What no solution stands behind is None."""

    erroneous: int  # solutions with an error
    correct: int  # solutions without
    acc_err: float | None
    acc_cor: float | None
    f1: float | None


def first_error(labels: Labels) -> int | None:
    """Find the first step labelled 0, -1 if every step is labelled 1; None if an unlabelled step leaves it open."""
    _check_labels("first_error", labels)
    for i, label in enumerate(labels):
        if label != 1:
            return None if label is None else i
    return -1


def first_below(scores: Numbers, threshold: float) -> int:
    """Predict the first error: the first step that scores less than the threshold, -1 if none does."""
    _check_numbers("first_below", np.array(scores, np.float64))
    return next((i for i, score in enumerate(scores) if score < threshold), -1)


def processbench(
    predicted: Int[np.ndarray, " n"] | Sequence[int], truth: Int[np.ndarray, " n"] | Sequence[int]
) -> ProcessBench:
    """Compare first errors, predicted and true, one of each a solution; -1 is none.

    Without erroneous or without right solutions there is no F1: it is None, not 0, which a scorer could have earned.

    Raises:
      ValueError: if an entry is not an index or -1, such as None or NaN, or the lengths differ.
    """
    found, true = _indices("predicted", predicted), _indices("truth", truth)
    if len(found) != len(true):
        raise ValueError(f"processbench: found {len(found)} predictions; expected {len(true)}, as there are truths.")
    hit, wrong = found == true, true >= 0
    return _processbench(*(int(np.sum(x)) for x in (hit & wrong, wrong, hit & ~wrong, ~wrong)))


class ScoredSteps(NamedTuple):
    """The steps of one solution, their scores as probabilities of being right."""

    scores: Numbers
    labels: Labels
    question: Hashable = None  # solutions with the same are of one question; None is a question of its own


def tune_threshold(rows: Sequence[ScoredSteps]) -> float:
    """Find the threshold, 0 < t <= 1, at which ProcessBench's F1 is highest; on other questions than are then measured.

    F1 only changes where a score is, so the best thresholds fill intervals. The middle of the widest one is taken, of
    equally wide ones the lowest. Solutions whose first error is unclear are left out.

    Raises:
      ValueError: if there is no erroneous or no right solution.
    """
    _check_rows("tune_threshold", rows)
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}  # low < t <= high finds the truth
    for row in rows:
        scores, at = [float(s) for s in row.scores], first_error(row.labels)
        if at is not None:
            spans[at >= 0].append((scores[at], min([1.0, *scores[:at]])) if at >= 0 else (0.0, min(scores)))
    E, C = len(spans[True]), len(spans[False])
    if not (E and C):
        raise ValueError(f"tune_threshold: found {E} erroneous and {C} right solutions; expected some of both.")
    possible = {side: np.array([s for s in all_ if s[0] < s[1]]).reshape(-1, 2) for side, all_ in spans.items()}
    edges = np.unique([0.0, 1.0, *possible[True].ravel(), *possible[False].ravel()])
    found = {  # solutions whose span holds an interval between edges
        side: np.searchsorted(np.sort(p[:, 0]), edges[1:]) - np.searchsorted(np.sort(p[:, 1]), edges[1:])
        for side, p in possible.items()
    }
    plateaus: list[list[float]] = []  # f1, low, high
    for low, high, e, c in zip(edges[:-1], edges[1:], found[True].tolist(), found[False].tolist(), strict=True):
        f1 = _harmonic(e, E, c, C)
        if plateaus and plateaus[-1][0] == f1:
            plateaus[-1][2] = float(high)
        else:
            plateaus.append([f1, float(low), float(high)])
    _, low, high = max(plateaus, key=lambda p: (p[0], p[2] - p[1]))
    middle = (low + high) / 2
    return middle if middle > low else high


def macro_f1(predicted: Bool[np.ndarray, " n"] | Sequence[bool], labels: Labels) -> float | None:
    """Average the F1 of right and of wrong steps; None if the labels hold only one kind.

    Args:
      predicted: whether each step is taken to be right.
      labels: of each step; those that are None are left out.
    """
    taken, true = _labelled("macro_f1", predicted, labels)
    if np.any(wrong := (taken != 0) & (taken != 1)):
        found = f"a prediction of {taken[wrong][0]:g}"
        raise ValueError(f"macro_f1: found {found}; expected True or False. Compare scores with a threshold first.")
    return _macro_f1(*_confusion(taken == 1, true))


def auroc(scores: Numbers, labels: Labels) -> float | None:
    """Give the chance that a right step scores above a wrong one, ties half; None if the labels hold only one kind."""
    values, right = _labelled("auroc", scores, labels)
    wins, pairs = _wins(_ranks(values), right, np.ones(len(right), np.int64))
    return wins / (2 * pairs) if pairs else None


def step_auroc(rows: Sequence[ScoredSteps]) -> tuple[float | None, float | None]:
    """Give the AUROC over all labelled steps, and over those up to and including the first that is labelled 0."""
    _check_rows("step_auroc", rows)
    steps = _flatten(rows)
    return auroc(steps.score, steps.right), auroc(steps.score[steps.early], steps.right[steps.early])


def within_question_auroc(scores: Numbers, labels: Labels, questions: Sequence[Hashable]) -> float | None:
    """Give the chance that a right step scores above a wrong one of the same question, ties half.

    It is the mean of the questions' AUROCs, each weighted by its pairs of a right and a wrong step; so questions with
    one kind do not count, and if all are such it is None.
    """
    if len(questions) != len(scores):
        raise ValueError(f"within_question_auroc: found {len(questions)} questions; expected {len(scores)}.")
    values, right = _labelled("within_question_auroc", scores, labels)
    known = [q for q, label in zip(questions, labels, strict=True) if label is not None]
    index, names = _numbered(known)
    wins, pairs = _wins_by_question(values, right, index, names).sum(axis=0).tolist()
    return wins / (2 * pairs) if pairs else None


def reliability(probabilities: Numbers, labels: Labels, bins: int = 10) -> list[dict[str, Any]]:
    """Compare scores with the share of right steps, in bins of equal width; the last one holds 1, others not their end.

    Returns:
      For each bin low, high, count, score (the mean) and right (the share), which are None in an empty bin.
    """
    values, right = _probabilities("reliability", probabilities, labels)
    if bins < 1:
        raise ValueError(f"reliability: found bins={bins}; expected 1 or more.")
    inner = np.arange(1, bins) / bins  # the doubles nearest to 0.1, 0.2, ...: multiples of 0.1 are not
    index = np.searchsorted(inner, values, side="right")
    table = []
    for b in range(bins):
        at = index == b
        row = {"low": b / bins, "high": (b + 1) / bins, "count": int(at.sum())}
        table.append(row | {"score": _mean(values[at]), "right": _mean(right[at])})
    return table


def ece(probabilities: Numbers, labels: Labels, bins: int = 10) -> float | None:
    """Give the expected calibration error over bins of equal width; None without a label."""
    return _ece(reliability(probabilities, labels, bins))


def brier(probabilities: Numbers, labels: Labels) -> float | None:
    """Give the mean squared distance from score to label; None without a label."""
    values, right = _probabilities("brier", probabilities, labels)
    return _mean((values - right) ** 2)


class StepReport(NamedTuple):
    """All of this file's figures; None is what the data do not define. `_asdict` is JSON."""

    solutions: int
    questions: int
    steps: int  # with a label
    right: int  # of these
    auroc: float | None
    auroc_to_error: float | None  # steps up to the first error
    within_question: float | None
    within_question_to_error: float | None
    threshold: float  # a step that scores less is taken to be wrong
    erroneous: int  # solutions
    correct: int
    unclear: int  # solutions whose first error is unknown, which ProcessBench's figures leave out
    acc_err: float | None
    acc_cor: float | None
    f1: float | None
    macro_f1: float | None
    ece: float | None
    brier: float | None
    reliability: list[dict[str, Any]]
    intervals: dict[str, tuple[float, float] | None]  # 95 %, by field


def evaluate_steps(
    rows: Sequence[ScoredSteps],
    *,
    threshold: float = 0.5,
    tuning: Sequence[ScoredSteps] = (),
    bins: int = 10,
    resamples: int = 1000,
    seed: int = 0,
) -> StepReport:
    """Measure step scores in every way of this file.

    Intervals are from 2.5 to 97.5 % of what resampled questions give (percentile bootstrap: a question's solutions
    stay together, for they are not independent). Resamples in which a figure is not defined are left out; with fewer
    than two questions, or no resamples, there are no intervals.

    Args:
      rows: solutions.
      threshold: under which a step is taken to be wrong; not used with `tuning`.
      tuning: solutions of other questions, on which to tune the threshold.
      bins: of the reliability table.
      resamples: of the bootstrap.
      seed: of the resamples.

    Raises:
      ValueError: naming row and step that do not fit, or a question that is in both sets.
    """
    if not 0 <= threshold <= 1 or resamples < 0:
        found = f"threshold={threshold}, resamples={resamples}"
        raise ValueError(f"evaluate_steps: found {found}; expected a probability, and 0 or more.")
    _check_rows("evaluate_steps", rows)
    if tuning:
        both = {r.question for r in rows} & {r.question for r in tuning} - {None}
        if both:
            found = f"question {next(iter(both))!r} in rows and in tuning"
            raise ValueError(f"evaluate_steps: found {found}; expected different questions. Split by question.")
        threshold = tune_threshold(tuning)
    steps = _flatten(rows)
    if not steps.right.size:
        raise ValueError("evaluate_steps: found no labelled step; expected at least one.")
    index, Q = _numbered([i if r.question is None else (r.question,) for i, r in enumerate(rows)])
    tables = _tables(rows, steps, index, Q, threshold)
    point = _figures(tables, np.ones(Q, np.int64))
    rng, drawn = np.random.default_rng(seed), {name: [] for name in point}
    for _ in range(resamples if Q > 1 else 0):
        for name, value in _figures(tables, np.bincount(rng.integers(Q, size=Q), minlength=Q)).items():
            drawn[name] += [] if value is None else [value]
    ends = lambda values: tuple(np.quantile(values, [0.025, 0.975]).tolist()) if values else None
    bench = tables.bench.sum(axis=0).tolist()
    table = reliability(steps.score, steps.right, bins)
    return StepReport(
        solutions=len(rows),
        questions=Q,
        steps=len(steps.right),
        right=int(steps.right.sum()),
        threshold=float(threshold),
        erroneous=bench[1],
        correct=bench[3],
        unclear=len(rows) - bench[1] - bench[3],
        ece=_ece(table),
        brier=brier(steps.score, steps.right),
        reliability=table,
        intervals={name: ends(values) if point[name] is not None else None for name, values in drawn.items()},
        **point,
    )


def plot_reliability(path: Path, table: Sequence[dict[str, Any]]) -> None:
    """Draw a reliability table: the share of right steps over the score, and how many steps stand behind it."""
    from matplotlib.figure import Figure  # not pyplot: that keeps a global state, and wants a display

    figure = Figure(figsize=(4.8, 5.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    full = [row for row in table if row["count"]]
    top.plot((0, 1), (0, 1), color="tab:gray", linestyle=":", label="calibrated")
    top.plot([r["score"] for r in full], [r["right"] for r in full], color="tab:blue", marker="o", label="measured")
    top.set(ylabel="share of right steps", xlim=(0, 1), ylim=(0, 1), title=f"ECE {_ece(table) or 0:.3f}")
    top.legend()
    wide = [row["high"] - row["low"] for row in table]
    bottom.bar([r["low"] for r in table], [r["count"] for r in table], wide, align="edge", color="tab:gray")
    bottom.set(xlabel="score", ylabel="steps")
    _save(figure, path)


def plot_best_of_k(path: Path, curves: Curves) -> None:
    """Draw what k samples are worth under each rule, between the random pick and pass@k."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    axes = figure.add_subplot(xlabel="k", ylabel="accuracy", ylim=(0, 1), title=f"{curves.questions} questions")
    axes.set_xscale("log", base=2)
    axes.set_xticks(curves.k, [str(k) for k in curves.k])
    axes.plot(curves.k, curves.pass_at, color="black", marker=".", label="pass@k")
    axes.plot(curves.k, curves.majority, color="tab:gray", marker=".", label="majority")
    axes.plot(curves.k, [curves.random] * len(curves.k), color="tab:gray", linestyle=":", label="random")
    for i, name in enumerate(curves.best_of):
        axes.plot(curves.k, curves.best_of[name], color=f"C{i}", marker=".", label=f"best of k, {name}")
        axes.plot(curves.k, curves.weighted[name], color=f"C{i}", linestyle="--", label=f"weighted majority, {name}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside it: lines go anywhere
    _save(figure, path)


# ----------------------------------------------------------------------------------------------------------- private
class _Steps(NamedTuple):
    """Every labelled step of all rows."""

    score: Float[np.ndarray, " n"]
    right: Bool[np.ndarray, " n"]
    early: Bool[np.ndarray, " n"]  # no later than the first error
    row: Int[np.ndarray, " n"]


class _Tables(NamedTuple):
    """What each question adds to every figure. Letter: Q questions."""

    steps: _Steps
    question: Int[np.ndarray, " n"]  # of each step
    ranks: tuple[Int[np.ndarray, " n"], Int[np.ndarray, " early"]]  # among all steps, among early ones
    within: tuple[Int[np.ndarray, "Q 2"], Int[np.ndarray, "Q 2"]]  # twice the wins, pairs
    bench: Int[np.ndarray, "Q 4"]  # found errors, erroneous solutions, found right, right solutions
    confusion: Int[np.ndarray, "Q 4"]


def _tables(rows: Sequence[ScoredSteps], steps: _Steps, index: np.ndarray, Q: int, threshold: float) -> _Tables:
    question, early = index[steps.row], steps.early
    bench, confusion = np.zeros((Q, 4), np.int64), np.zeros((Q, 4), np.int64)
    for q, row in zip(index, rows, strict=True):
        if (true := first_error(row.labels)) is not None:
            side, hit = (2 if true < 0 else 0), first_below(row.scores, threshold) == true
            bench[q, side : side + 2] += (int(hit), 1)
    np.add.at(confusion, (question, 2 * (steps.score < threshold) + ~steps.right), 1)
    each = lambda at: _wins_by_question(steps.score[at], steps.right[at], question[at], Q)
    ranks = _ranks(steps.score), _ranks(steps.score[early])
    return _Tables(steps, question, ranks, (each(slice(None)), each(early)), bench, confusion)


def _figures(t: _Tables, times: Int[np.ndarray, " Q"]) -> dict[str, float | None]:
    """What has an interval, when each question occurs so many times."""
    all_, early = slice(None), t.steps.early
    share = lambda wins, pairs: wins / (2 * pairs) if pairs else None
    count = lambda ranks, at: _wins(ranks, t.steps.right[at], times[t.question[at]])
    bench = _processbench(*(times @ t.bench).tolist())
    return {
        "auroc": share(*count(t.ranks[0], all_)),
        "auroc_to_error": share(*count(t.ranks[1], early)),
        "within_question": share(*(times @ t.within[0]).tolist()),
        "within_question_to_error": share(*(times @ t.within[1]).tolist()),
        "acc_err": bench.acc_err,
        "acc_cor": bench.acc_cor,
        "f1": bench.f1,
        "macro_f1": _macro_f1(*(times @ t.confusion).tolist()),
    }


def _check_rows(where: str, rows: Sequence[ScoredSteps]) -> None:
    for i, row in enumerate(rows):
        if not len(row.scores) or len(row.scores) != len(row.labels):
            found = f"{len(row.scores)} scores and {len(row.labels)} labels"
            raise ValueError(f"{where}: row {i}: found {found}; expected as many, and at least one.")
        _probabilities(f"{where}: row {i}", row.scores, row.labels, every=True)


def _check_labels(where: str, labels: Labels) -> None:
    if wrong := [label for label in labels if label is not None and label not in (0, 1)]:
        raise ValueError(f"{where}: found a label of {wrong[0]}; expected 1, 0 or None. Map soft labels and -1 first.")


def _check_numbers(where: str, values: Float[np.ndarray, " n"]) -> None:
    if np.isnan(values).any():
        raise ValueError(f"{where}: found a score that is NaN or None; expected a number for every step.")


def _flatten(rows: Sequence[ScoredSteps]) -> _Steps:
    flat = []
    for i, row in enumerate(rows):
        early = True
        for score, label in zip(row.scores, row.labels, strict=True):
            if label is not None:
                flat.append((float(score), bool(label), early, i))
                early &= bool(label)
    kinds = (np.float64, bool, bool, np.int64)
    return _Steps(*(np.array([f[j] for f in flat], kind) for j, kind in enumerate(kinds)))


def _labelled(where: str, scores: Any, labels: Labels, every: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels of the steps that have a label; numbers are asked of those only, unless of `every` one."""
    if len(scores) != len(labels):
        raise ValueError(f"{where}: found {len(scores)} scores and {len(labels)} labels; expected as many.")
    _check_labels(where, labels)
    known = [every or label is not None for label in labels]
    values = np.array([s for s, use in zip(scores, known, strict=True) if use], np.float64)  # None becomes NaN
    _check_numbers(where, values)
    return values, np.array([label for label, use in zip(labels, known, strict=True) if use]) == 1


def _probabilities(where: str, scores: Any, labels: Labels, every: bool = False) -> tuple[np.ndarray, np.ndarray]:
    values, right = _labelled(where, scores, labels, every)
    if np.any(wrong := (values < 0) | (values > 1)):
        raise ValueError(f"{where}: found a score of {values[wrong][0]:g}; expected a probability, 0 to 1.")
    return values, right


def _indices(name: str, values: Int[np.ndarray, " n"] | Sequence[int]) -> Int[np.ndarray, " n"]:
    array = np.asarray(values, None if len(values) else np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu" or np.any(array < -1):
        raise ValueError(f"processbench: {name}: found {array.tolist()}; expected step indices, -1 for no error.")
    return array


def _numbered(names: Sequence[Hashable]) -> tuple[Int[np.ndarray, " n"], int]:
    """Each name's number by first appearance, and how many there are."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], np.int64), len(numbers)


def _ranks(values: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Equal values have equal ranks."""
    return np.unique(values, return_inverse=True)[1]


def _wins(ranks: np.ndarray, right: np.ndarray, times: np.ndarray) -> tuple[int, int]:
    """Twice the pairs in which the right one is above (Mann-Whitney's U, ties half), and all pairs; whole numbers."""
    good = np.bincount(ranks, times * right).astype(np.int64)
    bad = np.bincount(ranks, times * ~right).astype(np.int64)
    return int(good @ (2 * (np.cumsum(bad) - bad) + bad)), int(good.sum()) * int(bad.sum())


def _wins_by_question(score: np.ndarray, right: np.ndarray, question: np.ndarray, Q: int) -> Int[np.ndarray, "Q 2"]:
    order = np.argsort(question, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(question, minlength=Q))[:-1])
    each = [_wins(_ranks(score[p]), right[p], np.ones(len(p), np.int64)) for p in parts]
    return np.array(each, np.int64).reshape(-1, 2)


def _confusion(taken: np.ndarray, right: np.ndarray) -> tuple[int, int, int, int]:
    """Right and taken to be, wrong but taken to be right, right but taken to be wrong, wrong and taken to be."""
    cases = (taken & right, taken & ~right, ~taken & right, ~taken & ~right)
    both, false_right, false_wrong, neither = (int(np.sum(case)) for case in cases)
    return both, false_right, false_wrong, neither


def _macro_f1(both: int, false_right: int, false_wrong: int, neither: int) -> float | None:
    if not (both + false_wrong and neither + false_right):
        return None
    f1 = lambda hits: 2 * hits / (2 * hits + false_right + false_wrong)
    return (f1(both) + f1(neither)) / 2


def _processbench(e: int, E: int, c: int, C: int) -> ProcessBench:
    return ProcessBench(E, C, e / E if E else None, c / C if C else None, _harmonic(e, E, c, C) if E and C else None)


def _harmonic(e: int, E: int, c: int, C: int) -> float:
    """The harmonic mean of e / E and c / C, rounded once, so that equal ones compare equal."""
    return 2 * e * c / (e * C + c * E) if e or c else 0.0


def _mean(values: np.ndarray) -> float | None:
    return math.fsum(values.tolist()) / len(values) if len(values) else None


def _ece(table: Sequence[dict[str, Any]]) -> float | None:
    total = sum(row["count"] for row in table)
    gaps = [row["count"] / total * abs(row["score"] - row["right"]) for row in table if row["count"]]
    return math.fsum(gaps) if total else None


def _save(figure: Any, path: Path) -> None:
    """The file appears whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        figure.savefig(partial, dpi=120, format=path.suffix[1:] or "png")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
