"""The rule, against a search through all cells."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxaroo.train.data.dstc import Cells, dstc_cells, dstc_pair
from jaxaroo.train.data.formats import open_examples


def brute(M):
    """All cells in the rule's own words: the best by (passes of the code, codes that pass the test), then by index."""
    J, K = len(M), len(M[0])
    by_code = [sum(M[j][k] for k in range(K)) for j in range(J)]
    by_test = [sum(M[j][k] for j in range(J)) for k in range(K)]
    cells = list(itertools.product(range(J), range(K)))
    good = sorted((c for c in cells if M[c[0]][c[1]]), key=lambda c: (-by_code[c[0]], c[0], by_test[c[1]], c[1]))
    bad = sorted((c for c in cells if not M[c[0]][c[1]]), key=lambda c: (by_code[c[0]], c[0], -by_test[c[1]], c[1]))
    return Cells(good[0], bad[0]) if good and bad else None


def matrices(J, K):
    return ([bits[j * K : (j + 1) * K] for j in range(J)] for bits in itertools.product([0, 1], repeat=J * K))


@pytest.mark.parametrize(("J", "K"), [(1, 1), (1, 3), (3, 1), (2, 3), (3, 3), (4, 2)])
def test_every_small_matrix_agrees_with_the_search(J, K):
    for M in matrices(J, K):
        assert dstc_cells(M) == brute(M), M


@given(st.lists(st.lists(st.integers(0, 1), min_size=5, max_size=5), min_size=6, max_size=6))
def test_larger_ones_do_too(M):
    assert dstc_cells(M) == brute(M)


def test_a_case_that_can_be_read():
    # Code 1 passes most. Of its tests, 3 is passed by one code and 0 by all. Codes 0 and 2 pass one each, so code 0 is
    # the worst; of what it fails, tests 1 and 2 are passed by two codes each: the first of equals.
    M = [[1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]]
    assert dstc_cells(M) == Cells((1, 3), (0, 1))


def row(passed, **more):
    codes = [f"code {j}" for j in range(len(passed))]
    return {
        "prompt": "p",
        "codes": codes,
        "tests": [f"test {k}" for k in range(len(passed[0]))],
        "passed": passed,
    } | more


def test_responses_are_code_and_test_and_the_pair_is_a_row_of_its_layout(tmp_path):
    pair = dstc_pair(row([[1, 0], [1, 1], [0, 0]], id=4, entry_point="f"))
    assert pair == {
        "prompt": "p",
        "id": 4,
        "chosen": "code 1\n\ntest 1",
        "rejected": "code 2\n\ntest 0",
        "chosen_cell": [1, 1],
        "rejected_cell": [2, 0],
    }
    chat = [{"role": "user", "content": "write it"}]
    asked = dstc_pair(row([[1, 0]], prompt=chat), joiner="#")
    assert asked["chosen"] == [{"role": "assistant", "content": "code 0#test 0"}]
    for name, made in {"text": pair, "chat": asked}.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps(made) + "\n")
        assert len(open_examples(file, "pairs")) == 1


def test_nothing_to_choose_is_none():
    for passed in ([[1, 1], [1, 1]], [[0, 0], [0, 0]], [[1]], [[0]], []):
        assert dstc_cells(passed) is None
    assert dstc_pair(row([[1, 1]])) is None
    same = row([[1, 0]])
    same["tests"] = ["test", "test"]
    assert dstc_pair(same) is None
    assert dstc_pair(row([[True, False]])) is not None
