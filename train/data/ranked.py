"""Pairs for preference training from answers that somebody has ranked: of each prompt the best beside the worst."""

from collections.abc import Sequence
from typing import NamedTuple


class Judged(NamedTuple):
    """An answer and what it is worth; -inf or NaN for one that cannot be judged."""

    text: str
    worth: float


def ranked_pair(answers: Sequence[Judged], margin: float = 0.0) -> tuple[Judged, Judged] | None:
    """The best answer and the worst, the first of equals; None where nothing sets two apart.

    Args:
      answers: to one prompt. Those that cannot be judged are left out, and so is a worst one that says what the best
        does: the same text is worth the same.
      margin: by more than this the two differ.
    """
    known = [a for a in answers if abs(a.worth) < float("inf")]
    if not known:
        return None
    best, worst = max(known, key=lambda a: a.worth), min(known, key=lambda a: a.worth)
    return (best, worst) if best.text != worst.text and best.worth - worst.worth > margin else None
