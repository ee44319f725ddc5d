"""Pairs from codes and tests that a model wrote itself (DSTC, https://arxiv.org/abs/2411.13611).

    M[j,k] = 1 if code j passes test k          passes_j = sum_k M[j,k]          passed_k = sum_j M[j,k]

    chosen    (j+, k+)    M = 1:  j+ with the most passes,    k+ among those it passes, passed by the fewest codes
    rejected  (j-, k-)    M = 0:  j- with the fewest passes,  k- among those it fails, passed by the most codes

A code that passes many tests is likely right, all the more if it passes one that others fail; a code that fails a test
which most codes pass is likely wrong. So neither a bad test nor a bad code decides alone. A response is the code with
the test behind it, for both were judged. Ties go to the lowest index.

The order within each choice is a reconstruction of the paper's minimax rule, UNVERIFIED.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Cells(NamedTuple):
    """Which code with which test, (j, k) each."""

    chosen: tuple[int, int]
    rejected: tuple[int, int]


def dstc_cells(passed: Sequence[Sequence[int]]) -> Cells | None:
    """Choose two cells of the matrix; None if all are passed or none is.

    Args:
      passed: 0 or 1, a row for each code and a value for each test.
    """
    M = np.asarray(passed, bool)
    if M.ndim != 2 or M.all() or not M.any():
        return None
    by_code, by_test = M.sum(1), M.sum(0)
    best, worst = int(np.argmax(by_code)), int(np.argmin(by_code))  # the first of equals; both have such a cell
    hardest = np.where(M[best], by_test, len(M) + 1)
    easiest = np.where(M[worst], -1, by_test)
    return Cells((best, int(np.argmin(hardest))), (worst, int(np.argmax(easiest))))


def dstc_pair(row: Mapping[str, Any], joiner: str = "\n\n") -> dict[str, Any] | None:
    """A row of layout `pairs` of one of layout `code_tests`.

    Args:
      row: prompt, codes, tests and which pass; other columns stay, but for `entry_point`.
      joiner: stands between code and test.

    Returns:
      The pair, with `chosen_cell` and `rejected_cell`; None if all cells are passed or none is, or if both responses
      are the same text (which happens when a model wrote the same twice and it does not always do the same).
    """
    if (cells := dstc_cells(row["passed"])) is None:
        return None
    chosen, rejected = (f"{row['codes'][j]}{joiner}{row['tests'][k]}" for j, k in cells)
    if chosen == rejected:
        return None
    rest = {name: row[name] for name in row if name not in ("codes", "tests", "passed", "entry_point")}
    chat = not isinstance(row["prompt"], str)  # then responses are messages too
    wrap = lambda text: [{"role": "assistant", "content": text}] if chat else text
    pair = {**rest, "chosen": wrap(chosen), "rejected": wrap(rejected)}
    return {**pair, "chosen_cell": list(cells.chosen), "rejected_cell": list(cells.rejected)}
