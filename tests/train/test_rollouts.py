"""Oracle: answers put into rows by hand, and every token's number looked for where it has to stand."""

import time

import numpy as np
import pytest

from jaxaroo.train.rollouts import Sampled, lay_out, problem_indices, split_rows, spread, token_grid

ANSWERS = [
    Sampled([5, 6, 7], [8, 9, 2], True),
    Sampled([5, 6, 7], [8], False),
    Sampled([4], [3, 3, 3, 2], True),
    Sampled([4], [2], True),
    Sampled([4, 4], [], False),
    Sampled([1, 1, 1, 1], [6, 6, 2], True),
]
ALL = [True] * 6


def sequences(placed):
    """Every sequence of a layout as (all of its tokens, those that count), read as a forward pass would read it."""
    b, found = placed.batch, []
    for r in range(len(b.tokens)):
        for s in range(1, b.segments[r].max() + 1):
            at = np.flatnonzero(b.segments[r] == s)
            np.testing.assert_array_equal(at, np.arange(at[0], at[-1] + 1))  # in one piece
            np.testing.assert_array_equal(b.positions[r, at], np.arange(len(at)))
            np.testing.assert_array_equal(b.targets[r, at[:-1]], b.tokens[r, at[1:]])
            counted = b.targets[r, at[b.mask[r, at]]]
            found.append(([b.tokens[r, at[0]], *b.targets[r, at]], counted.tolist()))
    return found


@pytest.mark.parametrize("packing", [False, True])
def test_the_mask_covers_the_tokens_of_answers_and_nothing_else(packing):
    kept = [True, True, True, False, True, True]
    placed = lay_out(ANSWERS, kept, max_length=9, multiple=2, packing=packing)
    wanted = [([*a.prompt, *a.answer], list(a.answer)) for a, k in zip(ANSWERS, kept, strict=True) if k and a.answer]
    assert sorted(sequences(placed)) == sorted(wanted)
    b = placed.batch
    assert b.mask.sum() == 3 + 1 + 4 + 3  # prompts and padding do not count
    assert not b.mask[b.segments == 0].any()
    np.testing.assert_array_equal(b.weights, b.mask)
    assert [(r >= 0) for r in placed.row] == [True, True, True, False, False, True]
    for i in (0, 1, 2, 5):  # where each is said to stand
        place = slice(placed.first[i], placed.first[i] + len(ANSWERS[i].answer))
        np.testing.assert_array_equal(b.targets[placed.row[i], place], ANSWERS[i].answer)
        assert b.mask[placed.row[i], place].all()


def test_rows_come_in_few_sizes():
    shape = lambda answers, **how: lay_out(answers, [True] * len(answers), **how).batch.tokens.shape
    assert shape(ANSWERS, max_length=200, multiple=4) == (8, 64)
    assert shape([Sampled([1] * 60, [2] * 6, True)] * 3, max_length=200) == (3, 128)
    assert shape([Sampled([1] * 60, [2] * 6, True)] * 3, max_length=100) == (3, 100)
    assert lay_out(ANSWERS, [False] * 6, max_length=70).batch.tokens.shape == (6, 64)
    # Packed, the longest first: 6 5 4 | 3 1 of 15; 6 | 5 1 | 4 | 3 of 6; with one more 6 | 5 1 | 4 | 4 | 3, up to 8.
    assert shape(ANSWERS, max_length=15, packing=True) == (2, 15)
    assert shape(ANSWERS, max_length=6, packing=True) == (4, 6)
    assert shape([*ANSWERS, ANSWERS[2]], max_length=6, packing=True) == (8, 6)
    assert shape([*ANSWERS, ANSWERS[2]], max_length=6, multiple=3, packing=True) == (6, 6)


def test_many_answers_are_laid_out_one_after_the_other():
    """Half a second; half a minute if each looks at all others."""
    began = time.process_time()
    placed = lay_out([Sampled([1], [2], True)] * 40_000, [True] * 40_000, max_length=2)
    assert time.process_time() - began < 10
    assert placed.row.tolist() == [*range(40_000)]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"answer 1 has 5 prompt tokens and 3 of its own; .* at most 7 together"):
        lay_out([Sampled([1] * 5, [2, 2], True), Sampled([1] * 5, [2, 2, 2], True)], [True] * 2, max_length=6)
    with pytest.raises(ValueError, match="answer 0 has 0 prompt tokens"):
        lay_out([Sampled([], [2], True)], [True], max_length=6)


@pytest.mark.parametrize("packing", [False, True])
def test_numbers_of_answers_and_of_tokens_find_their_targets(packing):
    kept = [True, True, False, True, True, True]
    placed = lay_out(ANSWERS, kept, max_length=9, packing=packing)
    width = 5
    grid = np.arange(6 * width, dtype=np.float32).reshape(6, width) + 1
    per_token, per_answer = spread(grid, ANSWERS, placed), spread([1.5, 2.5, 3.5, 4.5, 5.5, 6.5], ANSWERS, placed)
    for i, a in enumerate(ANSWERS):
        for t in range(len(a.answer)):
            at = placed.row[i], placed.first[i] + t
            if kept[i]:
                assert per_token[at] == grid[i, t]
                assert per_answer[at] == i + 1.5
    assert np.count_nonzero(per_token) == np.count_nonzero(per_answer) == placed.batch.mask.sum()
    assert not per_token[~placed.batch.mask].any()


def test_a_grid_of_tokens_begins_with_each_answer():
    tokens, mask = token_grid(ANSWERS, 2, 5)
    assert tokens.shape == mask.shape == (3, 2, 5)
    for i, a in enumerate(ANSWERS):
        assert tokens[i // 2, i % 2][mask[i // 2, i % 2]].tolist() == list(a.answer)
        assert mask[i // 2, i % 2].tolist() == [t < len(a.answer) for t in range(5)]


def test_rows_are_split_in_the_order_given_each_once():
    tree = {"x": np.arange(12 * 3).reshape(12, 3), "y": np.arange(12)}
    order = np.random.default_rng(0).permutation(12)
    parts = split_rows(tree, order, 3, 2)
    assert [p["x"].shape for p in parts] == [(2, 2, 3)] * 3
    np.testing.assert_array_equal(np.concatenate([p["y"].reshape(-1) for p in parts]), order)
    np.testing.assert_array_equal(np.concatenate([p["x"].reshape(-1, 3) for p in parts]), tree["x"][order])
    for rows, parts_, micro in ((10, 3, 1), (12, 3, 3)):
        with pytest.raises(ValueError, match=f"{rows} rows in {parts_} parts of {micro} micro-batches"):
            split_rows({"y": np.arange(rows)}, np.arange(rows), parts_, micro)


def test_problems_are_a_function_of_seed_and_step():
    assert problem_indices(3, 2, 4, None) == [8, 9, 10, 11]
    asked = [i for step in range(14) for i in problem_indices(3, step, 3, 7)]
    for start in range(0, 42, 7):
        assert sorted(asked[start : start + 7]) == list(range(7))  # every pass asks each once
    passes = {tuple(asked[start : start + 7]) for start in range(0, 42, 7)}
    assert len(passes) > 1  # in another order
    assert asked != [i for step in range(14) for i in problem_indices(4, step, 3, 7)]
    assert problem_indices(3, 5, 3, 7) == asked[15:18]
    assert len(problem_indices(0, 1, 5, 2)) == 5  # fewer problems than are asked at once
