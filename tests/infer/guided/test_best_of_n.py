"""Rules by hand and by exact loops; curves by playing the rules on every ordered draw."""

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxaroo.infer.evaluate import pass_at_k
from jaxaroo.infer.guided import best_of_n as module
from jaxaroo.infer.guided.best_of_n import Candidates, aggregate, best_of_k, best_of_n, curves, majority
from jaxaroo.infer.guided.best_of_n import weighted_majority as weighted

INF = math.inf
HOWS = ["min", "product", "last", "mean"]
close = lambda x: pytest.approx(x, rel=1e-14, abs=1e-15)
probability = st.floats(0, 1)
answer = st.sampled_from([None, Fraction(1), Fraction(1, 2), "red"])
weight = st.sampled_from([-INF, 0.0, 0.25, 0.5, 0.75, 1.0])  # sums of these are exact


def test_aggregates_by_hand():
    by_hand = {
        (0.5, 0.25, 0.75): (0.25, 0.09375, 0.75, 0.5),
        (0.75, 0.5, 0.25): (0.25, 0.09375, 0.25, 0.5),
        (0.9,): (0.9, 0.9, 0.9, 0.9),
        (1, 0, 1): (0, 0, 1, 2 / 3),
        (0.4,) * 1000: (0.4, 0, 0.4, 0.4),  # 0.4 ** 1000 is under 1e-308
    }
    for scores, values in by_hand.items():
        assert [aggregate(scores, how) for how in HOWS] == [close(v) for v in values]
        half = np.array(scores, np.float16)
        assert [aggregate(half, how) for how in HOWS] == [aggregate(half.tolist(), how) for how in HOWS]
    assert [aggregate([-3.0, 5.0], how) for how in ("min", "last", "mean")] == [-3, 5, 1]  # logits


@pytest.mark.parametrize("how", HOWS)
def test_what_is_malformed_scores_below_all_else(how):
    for scores in (None, [], [None], [0.5, None], [math.nan, 1.0], [0.5, INF], [-INF, 0.5], np.zeros(0), [2.0, None]):
        assert aggregate(scores, how) == -INF
    assert best_of_n([aggregate(s, how) for s in ([1.0, None], [], [0.0], [0.0])]) == 2


@given(st.lists(probability, min_size=1, max_size=6), st.data())
def test_aggregates_rise_with_every_step_and_a_product_has_no_order(scores, data):
    at, higher = data.draw(st.integers(0, len(scores) - 1)), data.draw(probability)
    raised = [max(s, higher) if i == at else s for i, s in enumerate(scores)]
    for how in HOWS:
        assert aggregate(raised, how) >= aggregate(scores, how)
    assert aggregate(scores, "product") == pytest.approx(math.prod(scores), rel=1e-12, abs=1e-300)
    assert aggregate(scores[::-1], "product") == aggregate(scores, "product")
    assert aggregate(scores, "min") <= aggregate(scores, "mean") + 1e-15


def test_choices_by_hand():
    assert [best_of_n(s) for s in ([0.5], [0.2, 0.7, 0.7], [-INF, -INF], np.array([-INF, -2.0]))] == [0, 1, 0, 1]
    a, b, c = Fraction(1), "b", Fraction(3)
    assert [majority(v) for v in ([a, b, b], [b, a, c], [None, None, a], [None], [])] == [b, b, a, None, None]
    assert majority([a, b, b, a]) == a
    assert majority([Fraction(2, 4), b, b, Fraction(1, 2), Fraction(1, 2)]) == Fraction(1, 2)
    assert weighted([a, b, b], [0.9, 0.4, 0.4]) == a
    assert weighted([a, b, b], [0.7, 0.4, 0.4]) == b
    assert weighted([a, b, c], [-INF, 0.0, 0.0]) == b
    assert weighted([a, None, b], np.array([-INF, 1.0, -INF])) is None
    assert weighted([a, a, a, b, b, b], [0.1, 0.2, 0.3, 0.3, 0.2, 0.1]) == a  # added in another order these differ
    assert weighted([b, b, b, a, a, a], [0.3, 0.2, 0.1, 0.1, 0.2, 0.3]) == b


@given(st.lists(st.tuples(answer, weight), max_size=7))
def test_votes_are_those_of_exact_sums(votes):
    def winner(votes):
        best = (None, Fraction(-1))
        for candidate, _ in votes:
            total = sum((Fraction(w) for a, w in votes if a == candidate), Fraction(0))
            if candidate is not None and total > best[1]:
                best = (candidate, total)
        return best[0]

    answers, weights = [a for a, _ in votes], [w for _, w in votes]
    assert weighted(answers, weights) == winner([(a, w) for a, w in votes if w >= 0])
    assert majority(answers) == weighted(answers, [0.5] * len(votes)) == winner([(a, 1) for a in answers])


def play(q, name, k):
    """Mean over every ordered draw of k: right picks by best_of_n, right votes by weight, and without weights."""
    best, heavy, plain, draws = 0, 0, 0, list(itertools.permutations(range(len(q.right)), k))
    for draw in draws:
        right, answers, scores = ([column[i] for i in draw] for column in (q.right, q.answers, q.scores[name]))
        best += right[best_of_n(scores)]
        for weights in (scores, None):
            allowed = [i for i in range(k) if weights is None or weights[i] >= 0]
            vote = majority(answers) if weights is None else weighted(answers, weights)
            ok = vote is not None and right[next(i for i in allowed if answers[i] == vote)]
            heavy, plain = heavy + ok * (weights is not None), plain + ok * (weights is None)
    return best / len(draws), heavy / len(draws), plain / len(draws)


five = lambda kind: st.lists(kind, min_size=5, max_size=5)
question = st.builds(Candidates, five(st.booleans()), five(answer), st.fixed_dictionaries({"a": five(weight)}))


@given(question, question)
@pytest.mark.slow
def test_curves_are_the_mean_over_all_ordered_draws(one, two):
    found = curves([one, two])
    assert (found.questions, found.n, found.k, found.enumerated) == (2, 5, [1, 2, 4, 5], [True] * 4)
    assert found.random == close(np.mean([one.right, two.right]))
    assert found.pass_at == [close(np.mean([pass_at_k(5, sum(q.right), k) for q in (one, two)])) for k in found.k]
    for at, k in enumerate(found.k):
        best, heavy, plain = np.mean([play(q, "a", k) for q in (one, two)], axis=0)
        assert [found.best_of["a"][at], found.weighted["a"][at]] == [close(best), close(heavy)]
        assert found.majority[at] == close(plain)
        assert best_of_k(one.right, one.scores["a"], k) == close(play(one, "a", k)[0])


def test_curves_by_hand_and_as_json():
    a, b = Fraction(1), Fraction(2)
    right, answers = [True, False, False, True], [a, b, b, a]
    scores = {"good": [0.9, 0.1, 0.2, 0.3], "bad": [0.1, 0.8, 0.9, -INF]}
    found = curves([Candidates(right, answers, scores)])
    assert (found.k, found.random, found.pass_at) == ([1, 2, 4], 0.5, close([0.5, 5 / 6, 1]))
    assert found.best_of == {"good": close([0.5, 5 / 6, 1]), "bad": close([0.5, 1 / 6, 0])}
    # pairs: aa right, bb wrong, four mixed ones are ties
    assert found.majority == close([0.5, 0.5, 0.5])
    # good: a outweighs b in every pair. bad: the last does not vote, alone it gives nothing; with one b it loses
    assert found.weighted == {"good": close([0.5, 5 / 6, 1]), "bad": close([0.25, 1 / 6, 0])}
    assert json.loads(json.dumps(found._asdict())) == found._asdict()
    rare = [True] + [False] * 2_999
    assert best_of_k(rare, [float(r) for r in rare], 1_500) == close(0.5)  # C(3000, 1500) is no float
    assert curves([Candidates([True], [None], {})])[:6] == (1, 1, [1], 1, [1], [0])  # right, but votes for nothing


@given(five(st.booleans()), st.integers(0, 10))
def test_an_oracle_reaches_pass_at_k_and_a_constant_the_mean(right, more):
    right = right + [bool(i % 3) for i in range(more)]
    n, mean = len(right), sum(right) / len(right)
    oracle, blind = [float(r) for r in right], [0.3] * n
    best = [best_of_k(right, oracle, k) for k in range(1, n + 1)]
    assert best == [close(pass_at_k(n, sum(right), k)) for k in range(1, n + 1)]
    assert best == sorted(best)
    assert [best_of_k(right, blind, k) for k in range(1, n + 1)] == [close(mean)] * n
    assert best_of_k(right, np.random.default_rng(more).random(n), 1) == close(mean)
    assert best_of_k(right, [-s for s in oracle], n) == (all(right))  # an adversary takes a wrong one if there is any


def test_what_is_too_much_to_enumerate_is_drawn_fairly(monkeypatch):
    rng = np.random.default_rng(0)
    answers = [Fraction(int(x)) for x in rng.integers(0, 4, 12)]
    right, scores = [a == 1 for a in answers], {"s": rng.random(12).tolist(), "one": [1.0] * 12}
    asked = [Candidates(right, answers, scores)]
    exact = curves(asked)  # C(12, 4) = 495, C(12, 8) = 495
    assert exact.enumerated == [True] * 5
    monkeypatch.setattr(module, "SUBSETS", 494)
    drawn, again, other = curves(asked * 20), curves(asked * 20), curves(asked * 20, seed=1)
    assert drawn.enumerated == [True, True, False, False, True]
    assert drawn == again
    assert drawn.weighted["one"] == drawn.majority  # the same subsets for every rule
    for mine, all_ in [(drawn.majority, exact.majority), (drawn.weighted["s"], exact.weighted["s"])]:
        assert mine == pytest.approx(all_, abs=4 * 0.5 / math.sqrt(494 * 20))
        assert [mine[at] == close(all_[at]) for at in range(5)] == [True, True, False, False, True]
    assert drawn.weighted["s"][2] != other.weighted["s"][2]
    one = curves(asked).weighted["s"][2]
    assert drawn.weighted["s"][2] != close(one)  # each question has subsets of its own
    assert (drawn.best_of, drawn.pass_at) == ({n: close(v) for n, v in exact.best_of.items()}, close(exact.pass_at))


def refused(message, function, *args):
    with pytest.raises(ValueError, match=message):
        function(*args)


@pytest.mark.errors
def test_what_cannot_be_chosen_is_refused():
    refused("how='max'; expected one of min, product, last, mean", aggregate, [0.5], "max")
    refused(r"shape \(1, 2\); expected those of one solution", aggregate, np.ones((1, 2)), "min")
    refused("from -0.5 to 0.5; expected probabilities for a product", aggregate, [0.5, -0.5], "product")
    refused("from 0.5 to 1.5; expected probabilities for a product", aggregate, [0.5, 1.5], "product")
    refused("one number or more, -inf for a malformed", best_of_n, [])
    refused("one number or more, -inf for a malformed", best_of_n, [0.5, math.nan])
    refused("found 1 weights; expected 2", weighted, ["a", "b"], [1.0])
    for wrong in (-0.5, math.nan, INF):
        refused(f"found a weight of {wrong}; expected 0 or more", weighted, ["a", "b"], [1.0, wrong])
    for flags, scores, k in [([True], [0.1, 0.2], 1), ([True], [0.1], 0), ([True], [0.1], 2), ([True], [math.nan], 1)]:
        refused(f"best_of_k: found {len(flags)} flags, .*, k={k}; expected", best_of_k, flags, scores, k)
    good = Candidates([True, False], ["a", "b"], {"s": [0.1, 0.2]})
    refused("no questions or no candidates", curves, [])
    refused("no questions or no candidates", curves, [Candidates([], [], {})])
    refused("question 1: found 1 flags, 2 answers", curves, [good, good._replace(right=[True])])
    refused("question 1: found 2 flags, 1 answers", curves, [good, good._replace(answers=["a"])])
    refused(r"scores \['t'\]; expected 2, 2 and \['s'\]", curves, [good, good._replace(scores={"t": [0.1, 0.2]})])
    refused("question 1: s: found 3 weights; expected 2", curves, [good, good._replace(scores={"s": [0.1] * 3})])
    refused("question 0: s: found a weight of -1.0", curves, [good._replace(scores={"s": [0.1, -1.0]})])
