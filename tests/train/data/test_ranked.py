"""Pairs of ranked answers."""

import math

from jaxaroo.train.data.ranked import Judged, ranked_pair


def pair(*answers, margin=0.0):
    found = ranked_pair([Judged(*a) for a in answers], margin)
    return found and (found[0].text, found[1].text)


def test_the_best_stands_beside_the_worst_and_of_equals_the_first():
    assert pair(("a", 0.2), ("b", 0.9), ("c", 0.1), ("d", 0.5)) == ("b", "c")
    assert pair(("a", 0.9), ("b", 0.9), ("c", 0.1), ("d", 0.1)) == ("a", "c")


def test_nothing_is_made_of_what_nothing_sets_apart():
    assert pair() is None
    assert pair(("a", 0.5)) is None
    assert pair(("a", 0.5), ("b", 0.5)) is None
    assert pair(("a", 0.5), ("b", 0.25), margin=0.25) is None
    assert pair(("a", 0.5), ("b", 0.24), margin=0.25) == ("a", "b")
    assert pair(("same", 0.9), ("same", 0.1)) is None  # a judge that contradicts itself


def test_what_cannot_be_judged_is_neither():
    assert pair(("a", -math.inf), ("b", math.nan), ("c", 0.3), ("d", 0.2), ("e", math.inf)) == ("c", "d")
    assert pair(("a", -math.inf), ("b", 0.3)) is None
