"""What is learned when, and in which proportion: pairs from easy to hard, and mixtures of sources.

Curry-DPO (https://arxiv.org/abs/2403.07230) makes several pairs of one ranked prompt and trains on them in stages:

    R_1 >= ... >= R_n     pairs (R_1, R_n), (R_1, R_n-1), ..., (R_1, R_2)     gap R_1 - R_i, the largest first

The best response is always the chosen one. A large gap is easy; stage i takes the i-th pair of every prompt, and what
was learned is the next stage's reference. Responses as good as the best make no pair. That the losing responses are
taken from the worst upwards is how the paper draws its four; its settings of each stage are UNVERIFIED.

DMT (https://arxiv.org/abs/2310.05492) learns special skills first, and then general ones with a few rows of the first
stage among them (a share k = 1/256), so that the skills stay.

Mixtures hold numbers of rows, not rows: what stands at a place follows from the arguments and the place.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Int

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Random access to rows of several sources in one order."""

    sources: tuple[Sequence[Mapping[str, Any]], ...]
    places: Int[np.ndarray, "N 2"]  # which source, and which of its rows

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """The row at this place, as its source gives it."""
        source, row = self.places[range(len(self))[index]].tolist()
        return self.sources[source][row]


def curry_pairs(row: Mapping[str, Any], key: str = "rating") -> list[Row]:
    """Pairs of one prompt, easy first.

    Args:
      row: of layout `ranked`. The response with the highest rating is chosen in every pair, the first of equals.
      key: column of the responses whose gap says how easy a pair is: `rating`, or `ref_logps` as the paper's other
        order has it. Equal gaps keep the order of the responses.

    Returns:
      Rows of layout `pairs`: ratings are their scores, `stage` counts them from 0, and what else the row holds stays.
      None at all if no response is rated below the best.

    Raises:
      ValueError: if a response lacks the column.
    """
    responses: list[Mapping[str, Any]] = list(row["responses"])
    if (lacking := next((i for i, r in enumerate(responses) if key not in r), None)) is not None:
        found = f"response {lacking} with columns {sorted(responses[lacking])}"
        raise ValueError(f"curry_pairs: found {found}; expected `{key}`. Add it, or order by another column.")
    best = max(responses, key=lambda r: r["rating"])
    losers = sorted((r for r in responses if r["rating"] < best["rating"]), key=lambda r: r[key])
    rest = {name: value for name, value in row.items() if name != "responses"}
    pairs = []
    for stage, loser in enumerate(losers):
        pair = {**rest, "chosen": best["completion"], "rejected": loser["completion"]}
        pair |= {"score_chosen": best["rating"], "score_rejected": loser["rating"]}
        if "ref_logps" in best and "ref_logps" in loser:
            pair |= {"ref_chosen_logps": best["ref_logps"], "ref_rejected_logps": loser["ref_logps"]}
        pairs.append({**pair, "stage": stage})
    return pairs


def curry_stages(rows: Sequence[Mapping[str, Any]], stages: int | None = None, key: str = "rating") -> list[list[Row]]:
    """Rows of every stage: the i-th pair of all prompts that have so many.

    Args:
      rows: of layout `ranked`.
      stages: how many; as many as the prompt with the most pairs has, when not given.
      key: as in `curry_pairs`.
    """
    if stages is not None and stages < 1:
        raise ValueError(f"curry_stages: found stages={stages}; expected at least 1.")
    pairs = [curry_pairs(rows[i], key) for i in range(len(rows))]
    number = max(map(len, pairs), default=0) if stages is None else stages
    return [[of_prompt[i] for of_prompt in pairs if i < len(of_prompt)] for i in range(number)]


def dmt_mixture(
    special: Sequence[Mapping[str, Any]],
    general: Sequence[Mapping[str, Any]],
    share: float = 1 / 256,
    seed: int = 0,
) -> Mixture:
    """DMT's second stage: all of the general rows, and a share of those of the first stage, shuffled together.

    The share is rounded to the nearest number of rows, and to one if it is less; no row comes twice.

    Args:
      special: rows of the first stage.
      general: rows of the second.
      share: of the special rows that come again, k, from 0 to 1.
      seed: which of them, and of the order.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"dmt_mixture: found share={share}; expected 0 to 1.")
    rng = np.random.default_rng([seed, len(special), len(general)])
    kept = min(len(special), max(1, math.floor(share * len(special) + 0.5))) if share else 0
    of_special = rng.choice(len(special), kept, replace=False) if kept else np.zeros(0, np.int64)
    rows = np.concatenate([of_special, np.arange(len(general))])
    places = np.stack([np.repeat([0, 1], [kept, len(general)]), rows], axis=1)
    return Mixture((special, general), rng.permutation(places))


def mixture(
    sources: Sequence[Sequence[Mapping[str, Any]]], weights: Sequence[float], number: int, seed: int = 0
) -> Mixture:
    """Rows of several sources, by weight.

    Of `number` rows each source gives its share, rounded up or down so that the shares add up: fewer than one row
    from exact. Which source stands where is shuffled. A source is gone through in a shuffled order; where its rows
    are used up, it begins again in another.

    Args:
      sources: random access to rows.
      weights: one for each, in any unit.
      number: rows of the mixture.
      seed: of all orders.

    Raises:
      ValueError: if weights are not one for each source, negative or all 0, or an empty source has a weight.
    """
    if len(weights) != len(sources) or not all(0 <= w < math.inf for w in weights) or not sum(weights) > 0:
        found = f"weights {list(weights)} for {len(sources)} sources"
        raise ValueError(f"mixture: found {found}; expected one each, none negative and not all 0.")
    if number < 0:
        raise ValueError(f"mixture: found number={number}; expected 0 or more.")
    for i, (source, weight) in enumerate(zip(sources, weights, strict=True)):
        if weight and not len(source):
            raise ValueError(f"mixture: found no rows in source {i}, whose weight is {weight}; expected some.")
    counts = _apportion(weights, number)
    places = [
        np.stack([np.full(count, i), _walk(len(source), count, [seed, i])], axis=1)
        for i, (source, count) in enumerate(zip(sources, counts, strict=True))
    ]
    which = np.random.default_rng([seed, len(sources)]).permutation(np.repeat(np.arange(len(sources)), counts))
    order = np.empty(number, np.int64)  # the n-th place of source i holds its n-th row
    order[np.argsort(which, kind="stable")] = np.arange(number)
    return Mixture(tuple(sources), np.concatenate(places)[order])


# ----------------------------------------------------------------------------------------------------------- private
def _apportion(weights: Sequence[float], number: int) -> list[int]:
    """Whole shares that add up; the largest remainders are rounded up, of equal ones the first."""
    total = sum(map(Fraction, weights))
    exact = [number * Fraction(w) / total for w in weights]
    counts = [math.floor(x) for x in exact]
    order = sorted(range(len(weights)), key=lambda i: counts[i] - exact[i])
    for i in order[: number - sum(counts)]:
        counts[i] += 1
    return counts


def _walk(rows: int, count: int, seed: list[int]) -> Int[np.ndarray, " N"]:
    """The first `count` rows of pass after pass, each in an order of its own."""
    passes = -(-count // rows) if count else 0
    orders = [np.random.default_rng([*seed, i]).permutation(rows) for i in range(passes)]
    return np.concatenate([np.zeros(0, np.int64), *orders])[:count]
