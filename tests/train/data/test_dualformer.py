"""What each level leaves, word by word and line by line."""

import collections
import functools
import itertools
import re
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxaroo.train.data.arithmetic import ArithmeticConfig, ArithmeticExamples
from jaxaroo.train.data.dualformer import (
    LEVELS,
    DualformerConfig,
    DualformerExamples,
    _draw,
    drop_clauses,
    drop_lines,
    dualformer_row,
)

MAZE = "create 0 2 c0 c3 close 0 2 c0 c3 create 1 2 c1 c2 create 0 1 c1 c4 close 1 2 c1 c2 plan 0 2 plan 1 2"
SOKOBAN = "create worker 1 3 box 2 2 c0 c5 close worker 1 3 box 2 2 c0 c5 create worker 1 2 box 2 1 c1 c4 plan 1 3"
# Each level's own words, cut by hand; level 3 is one of those with some of its `create` clauses gone.
LEFT = {
    (MAZE, 1): "create 0 2 c0 c3 create 1 2 c1 c2 create 0 1 c1 c4 plan 0 2 plan 1 2",
    (MAZE, 2): "create 0 2 create 1 2 create 0 1 plan 0 2 plan 1 2",
    (MAZE, 4): "plan 0 2 plan 1 2",
    (SOKOBAN, 1): "create worker 1 3 box 2 2 c0 c5 create worker 1 2 box 2 1 c1 c4 plan 1 3",
    (SOKOBAN, 2): "create worker 1 3 box 2 2 create worker 1 2 box 2 1 plan 1 3",
    (SOKOBAN, 4): "plan 1 3",
}
rng = functools.partial(np.random.default_rng, 0)
only = lambda level, **more: DualformerConfig(probabilities=tuple(float(i == level) for i in range(LEVELS)), **more)


@pytest.mark.parametrize("trace", [MAZE, SOKOBAN])
def test_fixed_levels_leave_what_they_should(trace):
    assert drop_clauses(trace.split(), 0, rng()) == trace.split()
    for level in (1, 2, 4):
        assert drop_clauses(trace.split(), level, rng()) == LEFT[trace, level].split()
    assert drop_clauses(trace.split(), 3, rng(), 0.0) == LEFT[trace, 2].split()
    assert drop_clauses(trace.split(), 3, rng(), 1.0) == LEFT[trace, 4].split()


def test_level_3_leaves_each_create_clause_by_itself():
    clauses = re.findall(r"create \d \d", LEFT[MAZE, 2])
    wanted = {
        " ".join([*(c for c, keep in zip(clauses, bits, strict=True) if keep), LEFT[MAZE, 4]])
        for bits in itertools.product([0, 1], repeat=3)
    }
    many = np.random.default_rng(1)
    found = collections.Counter(" ".join(drop_clauses(MAZE.split(), 3, many)) for _ in range(2000))
    assert set(found) == wanted
    for clause in clauses:  # 30 % of each go: of 2000 within 5 standard deviations of 20.5
        gone = sum(n for text, n in found.items() if clause not in text)
        assert abs(gone - 600) < 103
    assert abs(found[LEFT[MAZE, 4]] - 2000 * 0.027) < 37  # all three at once, as independent ones do


lines = st.text(st.sampled_from("ab \t\n"), max_size=24)


@given(lines)
def test_level_0_gives_the_text_back_and_level_4_the_last_line(text):
    assert drop_lines(text, 0, rng()) == text
    real = [line for line in text.split("\n") if line.strip()]
    begin = text[: len(text) - len(text.lstrip())]
    answer = drop_lines(text, 4, rng())
    if not real:
        assert answer == text
    else:
        last = text.rindex(real[-1]) if len(real) > 1 else len(begin)
        assert answer == begin + text[last:]


@given(lines, st.sampled_from([1, 2, 3]), st.integers(0, 9))
def test_what_is_left_between_is_whole_lines_in_their_order(text, level, seed):
    left = drop_lines(text, level, np.random.default_rng(seed), 0.5)
    kept, real = ([line.strip() for line in t.split("\n") if line.strip()] for t in (left, text))
    rest = iter(real)
    assert all(line in rest for line in kept)  # a subsequence
    assert kept[-1:] == real[-1:]
    if kept == real:
        assert left == text


def test_blank_lines_go_with_the_line_before_them():
    text = " one\n\n  two\nthree\n \n\nfour\n"
    possible = [" one\n\n", "  two\n", "three\n \n\n"]
    seen = set()
    for seed in range(60):
        seen.add(drop_lines(text, 1, np.random.default_rng(seed), 0.5))
    assert seen == {
        " " + "".join([p[1:] if i == 0 else p for i, p in enumerate(possible) if bits[i]]) + "four\n"
        for bits in itertools.product([0, 1], repeat=3)
    }


def test_solutions_of_the_embedded_task_keep_their_answer_and_nothing_wrong():
    source = ArithmeticExamples(ArithmeticConfig(level=3), number=40)
    made = DualformerExamples(source, 3, DualformerConfig(share=0.5))
    assert len(made) == 120
    seen = collections.Counter()
    for i in range(120):
        row, original = made[i], source[i % 40]
        seen[row["level"]] += 1
        left, whole = row["completion"].split("\n"), original["completion"].split("\n")
        assert left[-1] == f"ans {row['answer']}"
        rest = iter(whole)
        assert all(line in rest for line in left)
        assert (left == whole) or row["level"] > 0
        assert (len(left) == 1) or row["level"] < 4
        assert {k: v for k, v in row.items() if k not in ("completion", "level")} == {
            k: v for k, v in original.items() if k != "completion"
        }
    assert set(seen) >= {0, 1, 2, 3}


def test_lines_of_a_solution_go_with_the_share_that_is_set():
    source = ArithmeticExamples(ArithmeticConfig(level=4), number=400)
    kept = whole = 0
    for i in range(400):
        whole += source[i]["completion"].count("\n")
        kept += dualformer_row(source[i], i, 0, only(2, share=0.6))["completion"].count("\n")
    assert whole > 1500
    assert abs(kept / whole - 0.4) < 5 * (0.4 * 0.6 / whole) ** 0.5


def test_levels_are_drawn_by_their_probabilities():
    row, cfg = {"prompt": "p", "completion": "a\nb"}, DualformerConfig(probabilities=(0.4, 0.0, 0.1, 0.3, 0.2))
    for epoch in (0, 1):
        found = collections.Counter(dualformer_row(row, i, epoch, cfg)["level"] for i in range(4000))
        assert found[1] == 0
        for level, p in enumerate(cfg.probabilities):
            assert abs(found[level] - 4000 * p) <= 5 * (4000 * p * (1 - p)) ** 0.5
    last = types.SimpleNamespace(random=lambda: 0.9999999)  # behind shares that sum to a little less than 1
    assert _draw((0.5, 0.4999995, 0.0, 0.0, 0.0), last) == 1
    for level in range(LEVELS):
        assert {dualformer_row(row, i, 0, only(level))["level"] for i in range(50)} == {level}


def test_any_row_can_be_made_alone_and_no_two_epochs_or_seeds_are_the_same():
    source = [{"prompt": "p", "completion": MAZE, "id": i} for i in range(30)]
    made = DualformerExamples(source, 2)
    rows = [made[i] for i in range(60)]
    assert [made[i] for i in reversed(range(60))] == rows[::-1]
    assert made[41] == dualformer_row(source[11], 11, 1)
    assert made[-1] == rows[-1]
    texts = lambda rows: [row["completion"] for row in rows]
    assert texts(rows[:30]) != texts(rows[30:])
    assert texts(rows[1:30]) != texts(rows[30:59])  # nor is an epoch the one before, moved on
    other = DualformerExamples(source, 1, DualformerConfig(seed=1))
    assert texts(rows[:30]) != texts(other[i] for i in range(30))
    assert len(set(texts(rows[:30]))) > 4  # rows that are the same are not dropped the same
    for row in rows:
        if row["level"] != 3:
            assert row["completion"] == (MAZE if row["level"] == 0 else LEFT[MAZE, row["level"]])
    with pytest.raises(IndexError):
        made[60]


def test_a_text_is_a_trace_only_if_it_begins_as_one_and_has_a_plan():
    text = "create a list\nplan ahead\nans 3"  # words of a trace: taken for one
    assert dualformer_row({"completion": text}, 0, 0, only(4))["completion"] == "plan ahead ans 3"
    for text in ("create a list\nans 3", "we create\nplan\nans 3"):
        assert dualformer_row({"completion": text}, 0, 0, only(4))["completion"] == "ans 3"
    assert dualformer_row({"completion": MAZE}, 0, 0, only(3, share=1.0))["completion"] == LEFT[MAZE, 4]
    assert dualformer_row({"completion": "close 1 2 c0 c1 plan 1 2"}, 0, 0, only(1))["completion"] == "plan 1 2"


@pytest.mark.errors
def test_what_cannot_be_dropped_is_refused():
    for row in ({"messages": []}, {"prompt": "p", "completion": [{"role": "assistant", "content": "x"}]}):
        with pytest.raises(ValueError, match=r"dualformer: row 3 has columns .*expected prompt and completion in text"):
            dualformer_row(row, 3)
    with pytest.raises(ValueError, match="drop_clauses: found '0' first"):
        drop_clauses(["0", "plan"], 1, rng())
    for level in (-1, 5):
        with pytest.raises(ValueError, match=f"found level {level}; expected 0 to 4"):
            drop_clauses(["plan"], level, rng())
        with pytest.raises(ValueError, match=f"found level {level}; expected 0 to 4"):
            drop_lines("a", level, rng())
    for bad in ((1.0,), (0.5, 0.5, 0.5, 0, 0), (1.5, -0.5, 0, 0, 0), (float("nan"), 0, 0, 0, 1)):
        with pytest.raises(ValueError, match=r"DualformerConfig.probabilities: found"):
            DualformerConfig(probabilities=bad)
    for bad in (dict(share=1.1), dict(share=float("nan")), dict(seed=-1)):
        with pytest.raises(ValueError, match="DualformerConfig"):
            DualformerConfig(**bad)
