"""Many solutions of a question, one answer: the best by score, the vote, the weighted vote, and what they are worth.

    best of n   argmax_i a(s_i)        a is min, product, last or mean of the R step scores s_i of solution i
    majority    argmax_y |{i: y_i = y}|                      weighted majority    argmax_y sum_{i: y_i = y} a(s_i)
    best of k   sum over distinct scores v of  c_v / G_v * (C(L_v + G_v, k) - C(L_v, k)) / C(n, k)

The last is the accuracy to expect of the best of k of n solutions, drawn without putting back: G_v of them have the
score v, c_v of these are right, L_v of all score less. A score that tells right from wrong makes it pass@k.
(Math-Shepherd, arXiv:2312.08935, compares these rules.) Letters: n candidates, k drawn, R steps, M subsets.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from ..evaluate import pass_at_k

Answer = Fraction | str | None  # what `infer.evaluate.final_answer` gives
Aggregator = Literal["min", "product", "last", "mean"]

SUBSETS = 2000  # votes are counted in every subset of k if there are no more, else in so many random ones


def aggregate(scores: Float[np.ndarray, " R"] | Sequence[float | None] | None, how: Aggregator) -> float:
    """Make one score of a solution's step scores; the line with the final answer is a step like any other.

    A solution without steps, or with a score that is None, NaN or infinite, is malformed: -inf, below all others. The
    product is summed up as logarithms and returned as a probability; it is the same in any order of the steps, and
    under 1e-308 it is 0.

    Raises:
      ValueError: if the product is asked of what are not probabilities, or `how` is unknown.
    """
    if how not in _AGGREGATORS:
        raise ValueError(f"aggregate: found how={how!r}; expected one of {', '.join(_AGGREGATORS)}.")
    values = np.asarray([] if scores is None else scores, np.float64)  # None becomes NaN
    if values.ndim != 1:
        raise ValueError(f"aggregate: found scores of shape {values.shape}; expected those of one solution, [R].")
    if not values.size or not np.all(np.isfinite(values)):
        return -math.inf
    return _AGGREGATORS[how](values.tolist())


def best_of_n(scores: Float[np.ndarray, " n"] | Sequence[float]) -> int:
    """Choose the solution with the highest aggregate; of equal ones the first."""
    values = [float(s) for s in scores]
    if not values or any(map(math.isnan, values)):
        raise ValueError(f"best_of_n: found {values}; expected one number or more, -inf for a malformed solution.")
    return values.index(max(values))


def majority(answers: Sequence[Answer]) -> Answer:
    """Choose the answer that most solutions give; of equally frequent ones the first seen. None does not vote."""
    return weighted_majority(answers, [1.0] * len(answers))


def weighted_majority(answers: Sequence[Answer], weights: Float[np.ndarray, " n"] | Sequence[float]) -> Answer:
    """Choose the answer whose solutions weigh most together; of equal ones the first seen.

    Neither an answer that is None votes nor a weight of -inf; without a vote the answer is None.

    Raises:
      ValueError: if a weight is negative: such sums would count against frequent answers.
    """
    _check_weights("weighted_majority", weights, len(answers))
    voters = [i for i, (a, w) in enumerate(zip(answers, weights, strict=True)) if a is not None and w > -math.inf]
    totals = dict.fromkeys((answers[i] for i in voters), 0.0)
    for i in sorted(voters, key=lambda i: weights[i]):  # equal weights in another order give equal sums
        totals[answers[i]] += float(weights[i])
    return max(totals, key=totals.__getitem__, default=None)


def best_of_k(right: Sequence[bool], scores: Float[np.ndarray, " n"] | Sequence[float], k: int) -> float:
    """Give the chance that the best of k solutions, drawn without putting back, is right; exact over all subsets.

    Of solutions with equal scores each is as likely: it is what `best_of_n` does to solutions in random order.
    """
    n = len(scores)
    if not (len(right) == n and 1 <= k <= n) or any(math.isnan(s) for s in scores):
        found = f"{len(right)} flags, scores {[float(s) for s in scores]}, k={k}"
        raise ValueError(f"best_of_k: found {found}; expected a flag and a number for each, and 1 <= k <= n.")
    counts: dict[float, list[int]] = {}
    for score, is_right in sorted(zip(map(float, scores), map(bool, right), strict=True)):
        group = counts.setdefault(score, [0, 0])
        group[0], group[1] = group[0] + 1, group[1] + is_right
    below, shares = 0, []
    for tied, good in counts.values():
        highest = math.comb(below + tied, k) - math.comb(below, k)  # subsets in which no score is above this one
        shares.append(good * highest / (tied * math.comb(n, k)))
        below += tied
    return math.fsum(shares)


class Candidates(NamedTuple):
    """The n solutions of one question. Several scorers or aggregators can be compared, each under a name."""

    right: Sequence[bool]
    answers: Sequence[Answer]
    scores: Mapping[str, Sequence[float]]  # name -> aggregate of each solution, 0 or more, or -inf


class Curves(NamedTuple):
    """Accuracies to expect from k of n solutions, the mean over questions. `_asdict` is JSON."""

    questions: int
    n: int
    k: list[int]  # 1, 2, 4, ... and n; the lists below go with it
    random: float  # accuracy of a single solution
    pass_at: list[float]  # one of k is right: nothing can choose better
    majority: list[float]
    best_of: dict[str, list[float]]  # by name of the scores
    weighted: dict[str, list[float]]
    enumerated: list[bool]  # whether the votes are of all subsets, and so exact; the other rules always are


def curves(questions: Sequence[Candidates], *, seed: int = 0) -> Curves:
    """Tell what each rule gets right when it sees k of the n solutions of each question.

    Everything is an expectation over subsets in random order, so that ties favour nobody. A vote has no closed form:
    with more than `SUBSETS` subsets it is a mean over so many drawn at random, for each question anew and for all
    rules the same, with a standard error of at most 0.5 / sqrt(SUBSETS * questions). A vote is as right as the first
    solution that gave it.

    Args:
      questions: all with the same number of solutions and the same names of scores.
      seed: of the subsets.

    Raises:
      ValueError: naming the question that does not fit.
    """
    if not questions or not len(questions[0].right):
        raise ValueError("curves: found no questions or no candidates; expected at least one of each.")
    n, names = len(questions[0].right), list(questions[0].scores)
    for i, q in enumerate(questions):
        if (len(q.right), len(q.answers)) != (n, n) or {*q.scores} != {*names}:
            found = f"{len(q.right)} flags, {len(q.answers)} answers and scores {sorted(q.scores)}"
            raise ValueError(f"curves: question {i}: found {found}; expected {n}, {n} and {sorted(names)}.")
        for name in names:
            _check_weights(f"curves: question {i}: {name}", q.scores[name], n)
    ks = sorted({2**i for i in range(n.bit_length())} | {n})
    every = {k: _every_subset(n, k) for k in ks if math.comb(n, k) <= SUBSETS}
    votes: dict[str | None, list[list[float]]] = {name: [[] for _ in ks] for name in [None, *names]}  # None: unweighted
    for i, q in enumerate(questions):
        rng = np.random.default_rng([seed, i])
        for at, k in enumerate(ks):
            chosen = every[k] if k in every else _random_subsets(n, k, rng)
            for name, shares in votes.items():
                shares[at].append(_vote(chosen, q, [1.0] * n if name is None else q.scores[name]))
    mean = lambda values: math.fsum(values) / len(questions)
    return Curves(
        len(questions),
        n,
        ks,
        mean(sum(map(bool, q.right)) / n for q in questions),
        [mean(pass_at_k(n, sum(map(bool, q.right)), k) for q in questions) for k in ks],
        [mean(shares) for shares in votes[None]],
        {name: [mean(best_of_k(q.right, q.scores[name], k) for q in questions) for k in ks] for name in names},
        {name: [mean(shares) for shares in votes[name]] for name in names},
        [k in every for k in ks],
    )


# ----------------------------------------------------------------------------------------------------------- private
def _product(values: list[float]) -> float:
    if not 0 <= min(values) <= max(values) <= 1:
        raise ValueError(
            f"aggregate: found scores from {min(values):g} to {max(values):g}; expected probabilities for a product. "
            "Turn logits into probabilities, or take min, last or mean."
        )
    return math.exp(math.fsum(map(math.log, values))) if min(values) else 0.0


_AGGREGATORS = {
    "min": min,
    "product": _product,
    "last": lambda values: values[-1],
    "mean": lambda values: math.fsum(values) / len(values),
}


def _check_weights(where: str, weights: Float[np.ndarray, " n"] | Sequence[float], n: int) -> None:
    if len(weights) != n:
        raise ValueError(f"{where}: found {len(weights)} weights; expected {n}, one for each solution.")
    if wrong := [float(w) for w in weights if not (0 <= w < math.inf or w == -math.inf)]:
        raise ValueError(
            f"{where}: found a weight of {wrong[0]}; expected 0 or more, or -inf for no vote. "
            "Turn logits into probabilities."
        )


def _every_subset(n: int, k: int) -> Bool[np.ndarray, "M n"]:
    return _marked(np.array(list(itertools.combinations(range(n), k))), n)


def _random_subsets(n: int, k: int, rng: np.random.Generator) -> Bool[np.ndarray, "M n"]:
    return _marked(np.argpartition(rng.random((SUBSETS, n)), k - 1, axis=1)[:, :k], n)


def _marked(index: np.ndarray, n: int) -> Bool[np.ndarray, "M n"]:
    chosen = np.zeros((len(index), n), bool)
    np.put_along_axis(chosen, index, True, axis=1)
    return chosen


def _vote(chosen: Bool[np.ndarray, "M n"], q: Candidates, weights: Float[np.ndarray, " n"] | Sequence[float]) -> float:
    """How often the vote of a subset is right.

    In random order, the first seen among answers of equal weight is that of any of their solutions, each as likely;
    so a subset counts as the share of right ones among all solutions that gave a winning answer.
    """
    voters = [i for i, a in enumerate(q.answers) if a is not None and weights[i] > -math.inf]
    kinds = {answer: j for j, answer in enumerate(dict.fromkeys(q.answers[i] for i in voters))}
    totals = np.zeros((len(kinds) + 1, len(chosen)))  # one more, that nobody gives
    given, right = np.zeros_like(totals, dtype=np.int64), np.zeros_like(totals, dtype=np.int64)
    for i in sorted(voters, key=lambda i: weights[i]):  # as `weighted_majority` adds them
        j = kinds[q.answers[i]]
        totals[j] += np.where(chosen[:, i], float(weights[i]), 0.0)
        given[j] += chosen[:, i]
        right[j] += chosen[:, i] & bool(q.right[i])
    wins = totals == totals.max(axis=0, keepdims=True)
    seen, good = (given * wins).sum(axis=0), (right * wins).sum(axis=0)
    return float(np.mean(good / np.maximum(seen, 1)))
