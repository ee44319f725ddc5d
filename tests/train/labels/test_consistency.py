"""All pairs of short label lists against rules in plain words; hand-made files for matching and the report."""

import itertools

import numpy as np
import pytest

from jaxaroo.train.labels.consistency import ConsistencyConfig, agree, consensus, first_error
from jaxaroo.train.labels.monte_carlo import MonteCarloConfig, label


def row(labels, name="a", **more):
    return {"id": name, "prompt": "p", "steps": [str(i) for i in range(len(labels))], "labels": [*labels], **more}


def oracle(a, b):
    """Both say where the first error is, and the same; None if they do not."""
    for x, y in zip(a, b, strict=True):
        if x is None or y is None or x != y:
            return None
        if x == 0:
            break
    length = len(a[: a.index(0) + 1]) if 0 in a else len(a)
    return [*a[:length], *[None] * (len(a) - length)]


LABELS = [*itertools.product([0, 1, None], repeat=3)]


def test_solutions_are_kept_where_the_first_errors_agree():
    for a, b in itertools.product(LABELS, LABELS):
        kept, report = agree([row(a, who="weak")], [row(b, who="strong")])
        wanted = oracle(a, b)
        assert [r["labels"] for r in kept] == ([] if wanted is None else [wanted])
        assert all(r["who"] == "strong" for r in kept)
        assert report.unknown == (first_error(a) is None or first_error(b) is None)
        assert (report.solutions, report.kept, report.unmatched) == (1, len(kept), 0)


def test_steps_are_kept_where_labels_agree():
    for a, b in itertools.product(LABELS, LABELS):
        kept, report = agree([row(a)], [row(b)], ConsistencyConfig(keep="step"))
        wanted = [x if x == y else None for x, y in zip(a, b, strict=True)]
        assert [r["labels"] for r in kept] == ([wanted] if {0, 1} & {*wanted} else [])
        both = [x == y for x, y in zip(a, b, strict=True) if None not in (x, y)]
        assert (report.steps, report.kept_steps, report.unknown) == (len(both), sum(both), 0)
        assert report.kept_share == sum(both) / max(len(both), 1)


def test_first_error():
    cases = {(1, 1): 2, (1, 0): 1, (0, None): 0, (1, None, 0): None, (None,): None, (): 0, (1, 0, None): 1}
    assert {labels: first_error(labels) for labels in cases} == cases


def test_the_report_counts_what_it_says():
    weak = [row([1, 0, None], "a"), row([0, None, None], "b"), row([1, 1, 1], "c"), row([1], "only weak")]
    strong = [row([1, 1, 1], "c"), row([1, 0, None], "a"), row([1, 1, 0], "b"), row([0], "only"), row([1], "strong")]
    kept, report = agree(weak, strong)
    assert [(r["id"], r["labels"]) for r in kept] == [("a", [1, 0, None]), ("c", [1, 1, 1])]  # the order of the first
    assert report._asdict() == {
        "solutions": 3,
        "kept": 2,
        "unmatched": 3,
        "unknown": 0,
        "steps": 2 + 1 + 3,
        "kept_steps": 5,
        "kept_share": 2 / 3,
        "good_share": {"weak": 4 / 6, "strong": 6 / 8, "kept": 4 / 5},
    }
    kept, report = agree(weak, strong, ConsistencyConfig(keep="step"))
    assert [r["labels"] for r in kept] == [[1, 0, None], [1, 1, 1]]
    assert report.kept_share == 5 / 6
    assert agree([], [])[1].good_share == {"weak": None, "strong": None, "kept": None}


def test_shares_are_compared_behind_the_threshold():
    weak, strong = row([1, 1, 0], soft=[0.5, 0.25, 0.0]), row([1, 1, 1], soft=[1.0, 0.5, 0.25])
    for threshold, wanted in [(0.0, []), (0.25, []), (0.4, []), (0.6, [])]:
        assert agree([weak], [strong], ConsistencyConfig(column="soft", threshold=threshold))[0] == wanted
    strong["soft"] = [0.75, 0.5, 0.25]
    kept, _ = agree([weak], [strong], ConsistencyConfig(column="soft", threshold=0.4, keep="step"))
    assert [r["labels"] for r in kept] == [[1, None, 0]]
    kept, _ = agree([weak], [strong], ConsistencyConfig(column="soft", threshold=0.8))
    assert [(r["labels"], r["soft"]) for r in kept] == [([0, None, None], strong["soft"])]
    signs = row([1, 0, -1])
    assert agree([signs], [signs])[0][0]["labels"] == [1, 0, None]
    assert agree([signs], [signs], ConsistencyConfig(threshold=-0.5))[0][0]["labels"] == [1, 1, 0]


def test_rows_without_ids_are_matched_by_what_they_say():
    strip = lambda r, prompt: {"prompt": prompt, "steps": r["steps"], "labels": r["labels"]}
    weak = [strip(row([1, 1]), "p"), strip(row([0, 0]), "q")]
    strong = [strip(row([0, 0]), "q"), strip(row([1, 1]), "r")]
    kept, report = agree(weak, strong)
    assert [r["prompt"] for r in kept] == ["q"]
    assert report.unmatched == 2


def test_a_judge_agrees_by_labels_or_by_the_first_wrong_step():
    rows = [row([1, 0, None], "a", judge=1), row([1, 1, 1], "b", judge=-1), row([1, 0, None], "c", judge=2)]
    rows += [row([0, None, None], "d", judge=-1), row([0, None, None], "e", judge=0), row([1, 1, 1], "f")]
    rows += [row([1, 0, 1], "g", judge=[1, 0, 1]), row([1, 0, 1], "h", judge=[1, 1, 0])]
    rows += [row([1, 1, 1], "i", judge=None), row([1, 1, 0], "j", judge=2)]
    kept, report = consensus(rows)
    assert [(r["id"], r["labels"]) for r in kept] == [
        ("a", [1, 0, None]),
        ("b", [1, 1, 1]),
        ("e", [0, None, None]),
        ("g", [1, 0, None]),
        ("j", [1, 1, 0]),
    ]
    assert (report.solutions, report.kept, report.unmatched) == (8, 5, 2)
    assert consensus([row([1, 0], other=1)], "other")[1].kept == 1


@pytest.mark.slow
def test_a_completer_agrees_with_itself(tmp_path):
    """With the same draws always; with fresh draws the more often, the more there are."""
    rng = np.random.default_rng(3)
    chances = np.round(rng.random((120, 3)) ** 2, 3)  # of a right completion, from each step
    problems = [{"id": str(i), "prompt": "p", "steps": ["a"] * 3, "chance": c.tolist()} for i, c in enumerate(chances)]

    def completer(n, seed):
        def sample(prompts, n, seeds):
            draws = [np.random.default_rng(seed).random(n) for seed in seeds]
            steps = [prompt.count("a") - 1 for prompt in prompts]
            return [[f"{step} {u}" for u in draw] for step, draw in zip(steps, draws, strict=True)]

        def check(problem, text):
            step, u = text.split("\n")[-1].split()
            return float(u) < problem["chance"][int(step)]

        cfg = MonteCarloConfig(n=n, seed=seed, last_step="draw")
        return label(problems, sample, check, tmp_path / f"{n}-{seed}", cfg)

    same = completer(4, 0)
    for keep in ("solution", "step"):
        kept, report = agree(same, same, ConsistencyConfig(keep=keep))
        assert [r["labels"] for r in kept] == [r["labels"] for r in same]
        assert (report.kept, report.kept_share, report.unknown) == (120, 1.0, 0)
    shares = [agree(completer(n, 1), completer(n, 2))[1].kept_share for n in (4, 64, 2000)]
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] > 0.97


@pytest.mark.errors
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: agree([row([1]), row([1])], []), 'the weak labels hold "a" twice'),
        (lambda: agree([row([1])], [row([float("nan")])]), "found label nan; expected a number or null"),
        (lambda: agree([row([1])], [row(["good"])]), "found label 'good'; expected a number or null"),
        (lambda: agree([], [row([1]), row([1])]), 'the strong labels hold "a" twice'),
        (lambda: agree([row([1])], [row([1, 1])]), 'solution "a" has other steps in the two files'),
        (lambda: agree([row([1]) | {"labels": [1, 1]}], [row([1])]), '"a": found 2 labels; expected one for each step'),
        (lambda: consensus([row([1], judge=1)]), "`judge` is 1; expected labels, or the index .* -1 to 0"),
        (lambda: consensus([row([1], judge=True)]), "`judge` is True"),
        (lambda: consensus([row([1], judge="-1")]), "`judge` is '-1'"),
        (lambda: ConsistencyConfig(keep="steps"), "keep: found 'steps'; expected solution or step"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
