"""Stages and mixtures, against loops that know nothing of how they are made."""

import collections
import fractions
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxaroo.train.data.curriculum import Mixture, curry_pairs, curry_stages, dmt_mixture, mixture
from jaxaroo.train.data.formats import open_examples

ratings = st.lists(st.integers(1, 5), min_size=2, max_size=6)


def ranked(values, **more):
    responses = [{"completion": f"answer {i}", "rating": v} for i, v in enumerate(values)]
    return {"prompt": "p", "responses": responses, **more}


def source(name, number):
    return [{"name": name, "i": i} for i in range(number)]


def rows_of(made):
    return [made[i] for i in range(len(made))]


@given(ratings)
def test_pairs_are_the_best_against_all_that_are_worse_the_worst_first(values):
    best = values.index(max(values))
    wanted = []
    for rating in range(1, max(values)):  # from the worst upwards, equal ones in their order
        wanted += [(best, i) for i, v in enumerate(values) if v == rating]
    pairs = curry_pairs(ranked(values, id=7))
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [(f"answer {a}", f"answer {b}") for a, b in wanted]
    assert [(p["score_chosen"], p["score_rejected"]) for p in pairs] == [(values[a], values[b]) for a, b in wanted]
    assert [p["stage"] for p in pairs] == list(range(len(pairs)))
    assert all(p["id"] == 7 and p["prompt"] == "p" and "responses" not in p for p in pairs)
    gaps = [p["score_chosen"] - p["score_rejected"] for p in pairs]
    assert gaps == sorted(gaps, reverse=True)
    assert all(gap > 0 for gap in gaps)


def test_pairs_are_rows_of_their_layout_and_one_of_two_responses_is_the_plain_one(tmp_path):
    import json

    pairs = curry_pairs(ranked([2.5, 4.0]))
    plain = {"prompt": "p", "chosen": "answer 1", "rejected": "answer 0", "score_chosen": 4.0, "score_rejected": 2.5}
    assert pairs == [{**plain, "stage": 0}]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(p) + "\n" for p in curry_pairs(ranked([5, 2, 3, 5]))))
    assert len(open_examples(file, "pairs")) == 2


def test_another_column_orders_but_does_not_choose():
    row = ranked([4, 3, 2, 1])
    for response, logps in zip(row["responses"], [-9.0, -5.0, -30.0, -20.0], strict=True):
        response["ref_logps"] = logps
    pairs = curry_pairs(row, "ref_logps")
    assert [p["rejected"] for p in pairs] == ["answer 2", "answer 3", "answer 1"]
    assert {p["chosen"] for p in pairs} == {"answer 0"}
    assert [p["ref_chosen_logps"] - p["ref_rejected_logps"] for p in pairs] == [21.0, 11.0, -4.0]
    assert [p["score_rejected"] for p in pairs] == [2, 1, 3]
    del row["responses"][2]["ref_logps"]
    assert ["ref_chosen_logps" in p for p in curry_pairs(row)] == [True, False, True]


def test_a_stage_has_that_pair_of_every_prompt_that_has_so_many():
    rows = [ranked(v, id=i) for i, v in enumerate([[1, 2, 3, 4], [5, 5], [1, 3], [2, 1, 2, 3]])]
    stages = curry_stages(rows)
    found = [[(p["id"], p["score_chosen"] - p["score_rejected"]) for p in stage] for stage in stages]
    assert found == [[(0, 3), (2, 2), (3, 2)], [(0, 2), (3, 1)], [(0, 1), (3, 1)]]
    assert [{p["stage"] for p in stage} for stage in stages] == [{0}, {1}, {2}]
    assert curry_stages(rows, 1) == stages[:1]
    assert curry_stages(rows, 4) == [*stages, []]
    assert curry_stages([ranked([1, 1])]) == []
    for row in rows:
        for response, logps in zip(row["responses"], [-1.0, -2.0, -3.0, -4.0], strict=False):
            response["ref_logps"] = logps
    ordered = curry_stages(rows, key="ref_logps")[0]
    assert [(p["id"], p["rejected"]) for p in ordered] == [(0, "answer 2"), (2, "answer 0"), (3, "answer 2")]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.25, 0.249, 1.0])
def test_dmt_keeps_all_that_is_general_and_a_share_of_what_is_special(share):
    special, general = source("special", 30), source("general", 41)
    made = dmt_mixture(special, general, share, seed=3)
    rows = rows_of(made)
    counts = collections.Counter((row["name"], row["i"]) for row in rows)
    assert set(counts.values()) == {1}
    assert {i for name, i in counts if name == "general"} == set(range(41))
    kept = {0.0: 0, 0.001: 1, 0.25: 8, 0.249: 7, 1.0: 30}[share]  # 7.5 goes up, 7.47 down, a trace is one row
    assert sum(name == "special" for name, _ in counts) == kept
    assert rows != sorted(rows, key=lambda row: (row["name"], row["i"]))
    assert rows == rows_of(dmt_mixture(special, general, share, seed=3))
    assert rows != rows_of(dmt_mixture(special, general, share, seed=4))
    at = [i for i, row in enumerate(rows) if row["name"] == "special"]
    assert kept < 7 or (min(at) < 20 and max(at) > len(rows) - 20)  # among the others, not before or behind them


def test_which_special_rows_come_again_depends_on_the_seed():
    chosen = lambda seed: {r["i"] for r in rows_of(dmt_mixture(source("s", 60), [], 0.1, seed))}
    assert len(chosen(0) | chosen(1) | chosen(2)) > 6
    assert len(dmt_mixture(source("s", 1000), source("g", 5))) == 5 + 4  # k = 1/256
    assert rows_of(dmt_mixture([], source("g", 3), 0.5)) != []


weights = st.lists(st.sampled_from([0.0, 0.1, 0.25, 1.0, 1 / 3, 7.5]), min_size=3, max_size=3).filter(any)


@given(weights, st.integers(0, 60), st.integers(0, 5))
def test_shares_are_less_than_a_row_from_exact_and_no_row_comes_again_too_early(w, number, seed):
    sources = [source("a", 4), source("b", 7), source("c", 1)]
    made = mixture(sources, w, number, seed)
    rows = rows_of(made)
    assert len(rows) == len(made) == number
    total = sum(map(fractions.Fraction, w))
    for name, weight, size in zip("abc", w, (4, 7, 1), strict=True):
        mine = [row["i"] for row in rows if row["name"] == name]
        assert abs(len(mine) - number * fractions.Fraction(weight) / total) < 1
        assert len(mine) == 0 or weight > 0
        for start in range(0, len(mine), size):  # pass by pass: all rows once before any comes again
            part = mine[start : start + size]
            assert len(set(part)) == len(part)
    assert made.places.tolist() == mixture(sources, w, number, seed).places.tolist()


def test_orders_differ_between_passes_sources_and_seeds_and_any_row_can_be_made_alone():
    sources = [source("a", 50), source("b", 50)]
    made = mixture(sources, [1, 1], 200, seed=1)
    rows = rows_of(made)
    walks = {name: [row["i"] for row in rows if row["name"] == name] for name in "ab"}
    orders = [walks["a"][:50], walks["a"][50:], walks["b"][:50], walks["b"][50:]]
    orders += [[row["i"] for row in rows_of(mixture(sources, [1, 1], 200, seed=2)) if row["name"] == "a"][:50]]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert all(x != y for x, y in itertools.combinations([*orders, list(range(50))], 2))
    names = [row["name"] for row in rows]
    runs = sum(x != y for x, y in itertools.pairwise(names))
    assert 60 < runs < 140  # of 199 places two sources in a random order change at about half
    assert [made[i] for i in (150, 3, 3)] == [rows[150], rows[3], rows[3]]
    assert made[-1] == rows[-1]
    with pytest.raises(IndexError):
        made[200]


def test_three_to_one_is_three_to_one():
    made = mixture([source("a", 5), source("b", 5)], [3, 1], 400)
    assert np.bincount(made.places[:, 0]).tolist() == [300, 100]
    assert isinstance(made, Mixture)
    # 7 rows by thirds: 2 1/3 each, and the first of equal remainders gets the seventh
    assert np.bincount(mixture([source("x", 1)] * 3, [1, 1, 1], 7).places[:, 0]).tolist() == [3, 2, 2]
    # by 0.5, 0.3, 0.2: 3.5, 2.1, 1.4
    assert np.bincount(mixture([source("x", 1)] * 3, [5, 3, 2], 7).places[:, 0]).tolist() == [4, 2, 1]


@pytest.mark.errors
def test_what_cannot_be_mixed_or_staged_is_refused():
    some = [source("a", 2), source("b", 2)]
    for bad in ([1], [0, 0], [-1, 2], [float("nan"), 1], [float("inf"), 1]):
        with pytest.raises(ValueError, match=r"mixture: found weights .*expected one each"):
            mixture(some, bad, 3)
    with pytest.raises(ValueError, match="found no rows in source 1, whose weight is 2"):
        mixture([source("a", 2), []], [1, 2], 3)
    assert len(mixture([source("a", 2), []], [1, 0], 3)) == 3
    with pytest.raises(ValueError, match="found number=-1"):
        mixture(some, [1, 1], -1)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"dmt_mixture: found share=.*expected 0 to 1"):
            dmt_mixture(some[0], some[1], share)
    with pytest.raises(ValueError, match="found stages=0"):
        curry_stages([ranked([1, 2])], 0)
    row = ranked([1, 2])
    row["responses"][0]["ref_logps"] = -1.0
    with pytest.raises(ValueError, match=r"found response 1 with columns .*expected `ref_logps`"):
        curry_pairs(row, "ref_logps")
