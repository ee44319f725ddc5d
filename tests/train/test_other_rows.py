"""Oracles: by hand."""

import pytest

from jaxaroo.train.other_rows import ForgetAndRetain, Mismatched


@pytest.mark.parametrize(
    ("prompts", "wanted"),
    [
        ("abc", [1, 2, 0]),
        ("aabbcc", [2, 3, 4, 5, 0, 1]),  # as pairs that were taken apart stand
        ("aaab", [3, 3, 3, 0]),  # the first three go on to b: what is behind it is a again
        ("abba", [1, 3, 0, 1]),
        ("aabaaacaa", None),
    ],
)
def test_a_row_of_kto_brings_an_answer_to_another_prompt(prompts, wanted):
    """In turn: where prompts have equally many rows, each answer once."""
    rows = Mismatched([{"prompt": p, "completion": str(i)} for i, p in enumerate(prompts)])
    found = [int(rows[i]["mismatched"]) for i in range(len(rows))]
    assert [rows[i]["completion"] for i in range(len(rows))] == [str(i) for i in range(len(prompts))]
    assert not [i for i, other in enumerate(found) if prompts[i] == prompts[other]]
    assert wanted in (None, found)


def test_every_row_to_forget_meets_one_to_retain():
    rows = [{"split": s, "i": i} for i, s in enumerate(["forget", "retain", "forget", "forget", "retain"])]
    rows += [{"split": split, "i": 9, "eval": True} for split in ("retain", "forget")]
    found = ForgetAndRetain(rows)
    assert [(found[i]["i"], found[i]["retain"]["i"]) for i in range(len(found))] == [(0, 1), (2, 4), (3, 1)]
    fewer = ForgetAndRetain([rows[0], *rows[4:], rows[1]])
    assert [(fewer[i]["i"], fewer[i]["retain"]["i"]) for i in range(len(fewer))] == [(0, 4), (0, 1)]
    with pytest.raises(ValueError, match="0 rows to forget and 2 to retain"):
        ForgetAndRetain([rows[1], rows[4]])
