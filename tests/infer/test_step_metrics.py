"""Every figure by hand and by plain loops over pairs, steps and thresholds; intervals by copying whole questions."""

import functools
import json
import math
import os
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxaroo.infer import step_metrics as module
from jaxaroo.infer.guided.best_of_n import Candidates, curves
from jaxaroo.infer.step_metrics import (
    ProcessBench,
    ScoredSteps,
    auroc,
    brier,
    ece,
    evaluate_steps,
    first_below,
    first_error,
    macro_f1,
    plot_best_of_k,
    plot_reliability,
    processbench,
    reliability,
    step_auroc,
    tune_threshold,
    within_question_auroc,
)

close = lambda x: pytest.approx(x, rel=1e-13, abs=1e-15)
eighth = st.integers(0, 8).map(lambda i: i / 8)
label = st.sampled_from([1, 1, 0, None])
step = st.tuples(eighth, label)
row = lambda steps, question=None: ScoredSteps([s for s, _ in steps], [y for _, y in steps], question)
solution = st.builds(row, st.lists(step, min_size=1, max_size=5), st.sampled_from(["p", "q", None]))


def test_first_errors_by_hand():
    errors = {(1, 1): -1, (1, 0, 1): 1, (0,): 0, (True, False, None): 1, (1, None, 0): None, (1, None): None, (): -1}
    assert {labels: first_error(labels) for labels in errors} == errors
    assert [first_below([0.5, 0.4, 0.1], t) for t in (0.3, 0.4, 0.45, 0.6, 0.1)] == [2, 2, 1, 0, -1]


def test_processbench_by_hand():
    # of four erroneous one is found at its step, one too early, one too late, one not; of three right ones two are kept
    predicted, truth = [2, 0, 3, -1, -1, -1, 0], [2, 1, 1, 5, -1, -1, -1]
    f1 = 2 * (1 / 4) * (2 / 3) / (1 / 4 + 2 / 3)
    for kind in (list, np.array):
        assert processbench(kind(predicted), kind(truth)) == ProcessBench(4, 3, 1 / 4, 2 / 3, close(f1))
    assert processbench([1, 0], [0, -1]) == (1, 1, 0, 0, 0)  # earned
    assert processbench([1, 0], [1, 1]) == (2, 0, 0.5, None, None)  # not defined
    assert processbench([-1], [-1]) == (0, 1, None, 1, None)
    assert processbench([], []) == (0, 0, None, None, None)


def f1_of(rows, t):
    """ProcessBench's F1 of decided rows as an exact fraction."""
    hits, first = {True: [], False: []}, lambda flags: next((i for i, flag in enumerate(flags) if flag), -1)
    for r in rows:
        true = first(y == 0 for y in r.labels)
        hits[true >= 0].append(true == first(s < t for s in r.scores))
    a, b = (Fraction(sum(h), len(h)) for h in hits.values())
    return 2 * a * b / (a + b) if a + b else Fraction(0)


@given(st.lists(solution, min_size=1, max_size=6))
def test_the_tuned_threshold_is_the_middle_of_the_widest_best_interval(rows):
    rows += [ScoredSteps([0.875, 0.25, 0.5], [1, 0, 1]), ScoredSteps([0.75, 0.625], [1, 1])]
    clear = [r for r in rows if None not in r.labels[: r.labels.index(0) if 0 in r.labels else None]]
    cells = [f1_of(clear, (i + 0.5) / 8) for i in range(8)]  # i / 8 < t <= (i + 1) / 8
    assert cells == [f1_of(clear, (i + 1) / 8) for i in range(8)]
    runs = [(i, j) for i in range(8) for j in range(i + 1, 9) if {*cells[i:j]} == {max(cells)}]
    low, high = max(runs, key=lambda run: (run[1] - run[0], -run[0]))
    assert tune_threshold(rows) == (low + high) / 16


def test_tuned_thresholds_by_hand():
    wrong, right = ScoredSteps([0.9, 0.3], [1, 0]), ScoredSteps([0.8, 0.6], [1, 1])
    assert tune_threshold([wrong, right]) == close(0.45)  # 0.3 < t <= 0.6
    assert tune_threshold([wrong, right, ScoredSteps([0.9, 0.5, 0.0], [1, None, 0])]) == close(0.45)  # unclear
    assert tune_threshold([ScoredSteps([0.3], [0]), ScoredSteps([0.3], [1])]) == 0.5  # all are as bad: 0 < t <= 1
    narrow, wide, perfect = ScoredSteps([0.2, 0.1], [1, 0]), ScoredSteps([0.9, 0.6], [1, 0]), ScoredSteps([1.0], [1])
    assert tune_threshold([narrow, wide, perfect]) == close(0.75)  # 0.1 < t <= 0.2 is as good, and narrower
    narrow, wide = ScoredSteps([0.25, 0.125], [1, 0]), ScoredSteps([0.625, 0.5], [1, 0])
    assert tune_threshold([wide, narrow, perfect]) == 0.1875  # both are as wide
    for low in (0.3, math.nextafter(0.3, 1)):  # no number lies between, and one of the two middles is rounded down
        high = math.nextafter(low, 1)
        assert tune_threshold([ScoredSteps([low], [0]), ScoredSteps([high], [1])]) == high


def pairs(scores, labels):
    """Wins of right over wrong steps, ties half, and how many pairs there are."""
    wins, count = Fraction(0), 0
    for s, y in zip(scores, labels, strict=True):
        for t, z in zip(scores, labels, strict=True):
            if y == 1 and z == 0:
                wins, count = wins + Fraction(1 if s > t else 0) + Fraction(s == t) / 2, count + 1
    return wins, count


share = lambda wins, count: float(wins / count) if count else None


def columns(rows):
    """Scores, labels and questions of all steps."""
    names = [i if r.question is None else r.question for i, r in enumerate(rows)]
    flat = [(s, y, q) for r, q in zip(rows, names, strict=True) for s, y in zip(r.scores, r.labels, strict=True)]
    return tuple([f[i] for f in flat] for i in range(3))


def up_to_error(rows):
    ends = [r.labels.index(0) + 1 if 0 in r.labels else len(r.labels) for r in rows]
    return [r._replace(scores=r.scores[:e], labels=r.labels[:e]) for r, e in zip(rows, ends, strict=True)]


@given(st.lists(step, max_size=12))
def test_auroc_is_the_share_of_pairs_to_the_last_bit_and_only_order_counts(steps):
    scores, labels, _ = row(steps)
    area = share(*pairs(scores, labels))
    assert auroc(scores, labels) == area
    for monotone in (math.exp, lambda s: 2 * s - 7, lambda s: s**3 if s else -math.inf):
        assert auroc([monotone(s) for s in scores], labels) == area
    turned = auroc([-s for s in scores], labels)
    assert turned == (None if area is None else close(1 - area))
    assert auroc(np.array(scores), [None if y is None else 1 - y for y in labels]) == turned


def test_areas_by_hand():
    assert auroc([0.9, 0.4, 0.4, 0.1], [1, 1, 0, 0]) == (1 + 1 + 0.5 + 1) / 4
    assert auroc(np.array([1, 0], np.float32), np.array([True, False])) == 1
    assert [auroc([0.1, 0.2], y) for y in ([1, 1], [0, 0], [None, 1])] == [None] * 3
    # q is easy, r is hard, and inside each the scorer is wrong
    scores, labels = [0.8, 0.9, 0.81, 0.1, 0.2, 0.7], [1, 0, 1, 0, 0, 1]
    assert auroc(scores, labels) == 6 / 9
    assert within_question_auroc(scores, labels, [*"qqq", *"rrr"]) == (0 + 2) / (2 + 2)
    assert within_question_auroc(scores, labels, [*"qqqrr", "q"]) == 0
    assert within_question_auroc(scores, labels, range(6)) is None
    assert within_question_auroc([0.5], [None], ["q"]) is None
    # after the first error all is wrong, and easily seen to be
    rows = [ScoredSteps([0.6, 0.7, 0.1, 0.1], [1, 0, 0, 0]), ScoredSteps([0.9, 0.5, 0.8], [None, 1, 1])]
    assert step_auroc(rows) == ((2 + 2 + 3) / 9, 1 / 3)


@given(st.lists(solution, min_size=1, max_size=6))
def test_areas_within_questions_and_up_to_errors_are_those_of_loops(rows):
    scores, labels, questions = columns(rows)
    assert step_auroc(rows) == (share(*pairs(scores, labels)), share(*pairs(*columns(up_to_error(rows))[:2])))
    wins, count = Fraction(0), 0
    for q in {*questions}:
        here = [i for i, name in enumerate(questions) if name == q]
        more = pairs([scores[i] for i in here], [labels[i] for i in here])
        wins, count = wins + more[0], count + more[1]
    assert within_question_auroc(scores, labels, questions) == share(wins, count)


@given(st.lists(st.tuples(st.booleans(), label), max_size=12))
def test_macro_f1_is_the_mean_over_both_kinds(steps):
    each = []
    known = [(taken, y) for taken, y in steps if y is not None]
    for kind in (1, 0):
        hits, found = sum(taken == kind == y for taken, y in known), sum(taken == kind for taken, _ in known)
        real = sum(y == kind for _, y in known)
        f1 = 2 * (hits / found) * (hits / real) / (hits / found + hits / real) if hits else 0
        each.append(f1 if real else None)
    want = None if None in each else close(sum(each) / 2)
    assert macro_f1([taken for taken, _ in steps], [y for _, y in steps]) == want


def test_macro_f1_by_hand():
    assert macro_f1([True, True, True, False], [1, 1, 0, 0]) == close((4 / 5 + 2 / 3) / 2)
    assert macro_f1(np.array([True, False, True]), np.array([1, 0, 0])) == close(2 / 3)
    assert macro_f1([True, True], [1, 0]) == close((2 / 3 + 0) / 2)
    assert [macro_f1([True, False], y) for y in ([1, 1], [0, 0], [1, None])] == [None] * 3


@given(st.lists(st.tuples(st.integers(0, 20), label), max_size=12), st.sampled_from([1, 4, 10]))
def test_calibration_is_that_of_loops_over_exact_bins(steps, bins):
    known = [(Fraction(i, 20), y) for i, y in steps if y is not None]
    error, scores, labels = Fraction(0), [i / 20 for i, _ in steps], [y for _, y in steps]
    table = reliability(scores, labels, bins)
    assert [(r["low"], r["high"]) for r in table] == [(b / bins, (b + 1) / bins) for b in range(bins)]
    for b, found in enumerate(table):
        inside = [(p, y) for p, y in known if min(math.floor(p * bins), bins - 1) == b]
        mean = lambda xs, n=len(inside): close(float(sum(xs) / Fraction(n))) if n else None
        assert (found["count"], found["score"]) == (len(inside), mean([p for p, _ in inside]))
        assert found["right"] == mean([y for _, y in inside])
        error += abs(sum(p - y for p, y in inside))
    squares = sum(((p - y) ** 2 for p, y in known), Fraction(0))
    assert ece(scores, labels, bins) == (close(float(error / len(known))) if known else None)
    assert brier(scores, labels) == (close(float(squares / len(known))) if known else None)


def test_calibration_by_hand():
    scores, labels = [0.05, 0.15, 0.3, 0.95, 1.0, 0.7], [0, 1, 1, 1, 1, None]
    table = reliability(scores, labels)
    assert [r["count"] for r in table] == [1, 1, 0, 1, 0, 0, 0, 0, 0, 2]  # 0.3 opens a bin, 1 is in the last
    assert table[9] == {"low": 0.9, "high": 1.0, "count": 2, "score": close(0.975), "right": 1.0}
    assert table[2] == {"low": 0.2, "high": 0.3, "count": 0, "score": None, "right": None}
    assert ece(scores, labels) == close((0.05 + 0.85 + 0.7 + 2 * 0.025) / 5)
    assert ece(scores, labels, bins=1) == close(abs(2.45 - 4) / 5)
    assert brier(scores, labels) == close((0.05**2 + 0.85**2 + 0.7**2 + 0.05**2) / 5)


def figures(rows, threshold):
    """What has an interval, by the functions that the tests above compare with loops."""
    scores, labels, _ = columns(rows)
    true = [(first_below(r.scores, threshold), first_error(r.labels)) for r in rows]
    bench = processbench(*zip(*[t for t in true if t[1] is not None], strict=True))
    return dict(
        zip(("auroc", "auroc_to_error"), step_auroc(rows), strict=True),
        within_question=within_question_auroc(*columns(rows)),
        within_question_to_error=within_question_auroc(*columns(up_to_error(rows))),
        **{name: getattr(bench, name) for name in ("acc_err", "acc_cor", "f1")},
        macro_f1=macro_f1([s >= threshold for s in scores], labels),
    )


@functools.cache
def many():
    """Twelve questions, easy and hard ones, with one to three solutions each, and two solutions of no question."""
    rng, rows = np.random.default_rng(3), []
    for q in [*range(12), None, None]:
        ease = rng.uniform(0.3, 0.9)
        for _ in range(1 if q is None else rng.integers(1, 4)):
            labels = [None if u < 0.1 else int(u < ease) for u in rng.random(rng.integers(1, 6))]
            scores = [round(float(np.clip(0.4 * (y or 0) + 0.6 * rng.random(), 0, 1)), 1) for y in labels]
            rows.append(ScoredSteps(scores, labels, q))
    return rows


def test_a_report_holds_every_figure():
    rows, threshold = many(), 0.45
    report = evaluate_steps(rows, threshold=threshold, resamples=0, bins=7)
    (scores, labels, _), want = columns(rows), figures(rows, threshold)
    assert {name: getattr(report, name) for name in want} == want
    assert None not in want.values()
    assert (report.ece, report.brier) == (ece(scores, labels, 7), brier(scores, labels))
    assert report.reliability == reliability(scores, labels, 7)
    assert (report.solutions, report.questions, report.threshold) == (len(rows), 14, 0.45)
    assert (report.steps, report.right) == (sum(y is not None for y in labels), labels.count(1))
    truth = [first_error(r.labels) for r in rows]
    assert report.unclear == truth.count(None) > 0
    assert (report.correct, report.erroneous) == (truth.count(-1), len(rows) - truth.count(-1) - truth.count(None))
    assert report.intervals == dict.fromkeys(want)


def test_intervals_are_those_of_whole_questions_copied():
    rows, seed, resamples = many(), 5, 25
    report = evaluate_steps(rows, resamples=resamples, seed=seed)
    groups = {}
    for i, r in enumerate(rows):
        groups.setdefault(("alone", i) if r.question is None else r.question, []).append(r)
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(resamples):
        copies = [(name, time) for time, name in enumerate(np.array(list(groups), object)[rng.integers(14, size=14)])]
        drawn.append(figures([r._replace(question=copy) for copy in copies for r in groups[copy[0]]], 0.5))
    for name, interval in report.intervals.items():
        assert interval == close(tuple(np.quantile([d[name] for d in drawn], [0.025, 0.975])))
        assert interval[0] < getattr(report, name) < interval[1]
    assert evaluate_steps(rows, resamples=resamples, seed=6).intervals != report.intervals
    assert evaluate_steps(rows, resamples=resamples, seed=5) == report
    assert json.loads(json.dumps(report._asdict()))["intervals"]["f1"] == list(report.intervals["f1"])


def test_what_is_not_defined_is_none_and_left_out_of_resamples():
    right, wrong = ScoredSteps([0.9, 0.8], [1, 1], "p"), ScoredSteps([0.7, 0.3], [1, 0], "q")
    report = evaluate_steps([right, right], resamples=9)
    assert report[4:8] == (None,) * 4
    assert (report.acc_err, report.acc_cor, report.f1, report.macro_f1) == (None, 1, None, None)
    assert set(report.intervals.values()) == {None}  # one question
    two = evaluate_steps([right, wrong], resamples=50)
    assert two.intervals["f1"] == two.intervals["auroc"] == two.intervals["within_question"] == (1, 1)
    assert evaluate_steps([right._replace(question=1), wrong._replace(question=None)]).questions == 2  # row 1 is not 1
    half = evaluate_steps([ScoredSteps([0.5, 0.6], [1, None])], threshold=0.5)
    assert (half.acc_cor, half.unclear, half.brier) == (None, 1, 0.25)


def test_a_threshold_is_tuned_on_other_questions():
    rows = many()
    tuning = [r._replace(question=("other", r.question), scores=[s / 2 for s in r.scores]) for r in rows]
    report = evaluate_steps(rows, tuning=tuning, resamples=0)
    assert report.threshold == tune_threshold(tuning) != tune_threshold(rows)
    assert report == evaluate_steps(rows, threshold=tune_threshold(tuning), resamples=0)
    assert evaluate_steps(rows, tuning=[r._replace(question=None) for r in tuning], resamples=0) == report


CURVES = [Candidates([True, False, True, True], ["a", "b", "a", "a"], {"min": [0.4, 0.9, 0.4, 0.4]})]


def test_pictures_hold_the_figures(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    table, found = reliability([0.1, 0.15, 0.9], [0, 1, 1]), curves(CURVES)
    plot_reliability(tmp_path / "r.png", table)
    plot_best_of_k(tmp_path / "b.svg", found)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "b.svg").read_bytes()
    top, bottom = drawn[0].axes
    np.testing.assert_allclose(top.lines[1].get_xydata(), [[0.125, 0.5], [0.9, 1.0]])
    assert [bar.get_height() for bar in bottom.patches] == [0, 2, 0, 0, 0, 0, 0, 0, 0, 1]
    assert [round(bar.get_x() * 10, 9) for bar in bottom.patches] == [*range(10)]
    assert top.get_title() == f"ECE {ece([0.1, 0.15, 0.9], [0, 1, 1]):.3f}"
    lines = {line.get_label(): line for line in drawn[1].axes[0].lines}
    want = {"pass@k": found.pass_at, "majority": found.majority, "random": [0.75] * 3}
    want |= {"best of k, min": found.best_of["min"], "weighted majority, min": found.weighted["min"]}
    assert {name: line.get_ydata().tolist() for name, line in lines.items()} == want
    assert len({*map(tuple, want.values())}) == 5
    assert all(line.get_xdata().tolist() == [1, 2, 4] for line in lines.values())


@pytest.mark.parametrize("draw", [lambda p: plot_best_of_k(p, curves(CURVES)), lambda p: plot_reliability(p, [])])
def test_a_picture_appears_whole_or_not_at_all(draw, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def dies(self, file, **settings):
        file.write_bytes(b"half")
        raise OSError("disk full")

    path, replace, seen = tmp_path / "a.png", os.replace, []
    monkeypatch.setattr(module.os, "replace", lambda a, b: (seen.append(a.read_bytes()[-8:-4]), replace(a, b))[1])
    draw(path)
    before = path.read_bytes()
    assert seen == [b"IEND"]
    monkeypatch.setattr(Figure, "savefig", dies)
    with pytest.raises(OSError, match="disk full"):
        draw(path)
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("a.png", before)]


def refused(message, function, *args, **options):
    with pytest.raises(ValueError, match=message):
        function(*args, **options)


@pytest.mark.errors
def test_what_cannot_be_measured_is_refused():
    good = ScoredSteps([0.5, 0.6], [1, 0], "p")
    for wrong in ([None], [math.nan], [0.0], [-2], [[0]], ["a"]):
        refused("predicted: found .*; expected step indices, -1 for no error", processbench, wrong, [0])
        refused("truth: found .*; expected step indices, -1 for no error", processbench, [0], wrong)
    refused("found 1 predictions; expected 2", processbench, [0], [0, 1])
    for function in (auroc, macro_f1, ece, brier, functools.partial(within_question_auroc, questions=["q"])):
        for soft in (0.4, -1, math.nan):
            refused(f"found a label of {soft}; expected 1, 0 or None. Map soft", function, [1], [soft])
        refused("found a score that is NaN or None", function, [math.nan], [1])
        refused("found a score that is NaN or None", function, [None], [1])
    refused("found a label of 0.4", first_error, [1, 0.4])
    refused("first_below: found a score that is NaN", first_below, [0.4, math.nan], 0.5)
    refused("auroc: found 2 scores and 1 labels", auroc, [1, 2], [1])
    refused("found a prediction of 0.7; expected True or False", macro_f1, [0.7, 1], [1, 0])
    refused("found 1 questions; expected 2", within_question_auroc, [1, 2], [1, 0], ["q"])
    for function in (reliability, ece, brier):
        for score in (1.5, -0.5):
            refused(f"found a score of {score}; expected a probability", function, [0.2, score], [0, 1])
    refused("found bins=0; expected 1 or more", reliability, [0.5], [1], 0)
    for function in (evaluate_steps, step_auroc, tune_threshold):
        for bad, message in [
            (ScoredSteps([], []), "0 scores and 0 labels"),
            (ScoredSteps([0.5], [1, 0]), "1 scores and 2 labels"),
            (ScoredSteps([0.5, math.nan], [1, None]), "a score that is NaN or None"),
            (ScoredSteps([0.5, 1.5], [1, None]), "a score of 1.5; expected a probability"),
            (ScoredSteps([0.5], [0.5]), "a label of 0.5"),
        ]:
            refused(f"{function.__name__}: row 1: found {message}", function, [good, bad])
    refused("found 1 erroneous and 0 right solutions; expected some of both", tune_threshold, [good])
    refused("found question 'p' in rows and in tuning", evaluate_steps, [good], tuning=[good])
    refused("found no labelled step", evaluate_steps, [ScoredSteps([0.5], [None])])
    for wrong in ({"threshold": 1.5}, {"threshold": math.nan}, {"resamples": -1}):
        refused("expected a probability, and 0 or more", evaluate_steps, [good], **wrong)
