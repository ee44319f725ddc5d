"""Three rewards for three kinds of answers (TruthRL, https://arxiv.org/abs/2509.25760).

    r = 1 if right, 0 if the model says that it does not know, -1 if wrong

A judge decides which. With GRPO on top, saying nothing is better than an error and worse than the answer. The binary
reward that the paper compares with is `TruthRLConfig(abstained=-1.0)`.

    truthfulness = w_1 right + w_2 abstained - w_3 wrong      shares of answers; the paper's weights are 1, 0, 1
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

Verdict = Literal["right", "abstained", "wrong"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TruthRLConfig:
    """What each kind of answer is worth."""

    right: float = 1.0
    abstained: float = 0.0
    wrong: float = -1.0

    def __post_init__(self):
        if not self.right > self.abstained >= self.wrong:
            raise ValueError(
                f"TruthRLConfig: found right={self.right}, abstained={self.abstained}, wrong={self.wrong}; expected a "
                "right answer to be worth more than none, and none at least as much as a wrong one."
            )


class Truthfulness(NamedTuple):
    """Shares of the answers that have a verdict; `_asdict` is JSON."""

    answers: int  # that have one
    accuracy: float
    abstention: float
    hallucination: float  # wrong answers
    truthfulness: float


def truthrl(verdicts: Sequence[Verdict | None], cfg: TruthRLConfig = TruthRLConfig()) -> np.ndarray:
    """Rewards `[B]`, float32; NaN where the judge gave no verdict, so that `grpo` leaves the answer out.

    Raises:
      ValueError: if a verdict is none of these.
    """
    _check("truthrl", verdicts)
    worth = {**dataclasses.asdict(cfg), None: np.nan}
    return np.asarray([worth[verdict] for verdict in verdicts], np.float32)


def truthfulness(
    verdicts: Sequence[Verdict | None], weights: tuple[float, float, float] = (1.0, 0.0, 1.0)
) -> Truthfulness:
    """Measure answers; those without a verdict are not counted.

    Args:
      verdicts: of answers.
      weights: w of right, abstained and wrong ones; the last is subtracted.

    Raises:
      ValueError: if there is no verdict, or one that is none of these.
    """
    _check("truthfulness", verdicts)
    counts = Counter(verdict for verdict in verdicts if verdict is not None)
    if not (number := counts.total()):
        raise ValueError("truthfulness: found no verdicts; expected at least one.")
    right, abstained, wrong = (counts[kind] / number for kind in get_args(Verdict))
    score = weights[0] * right + weights[1] * abstained - weights[2] * wrong
    return Truthfulness(number, right, abstained, wrong, score)


# ----------------------------------------------------------------------------------------------------------- private
def _check(where: str, verdicts: Sequence[Verdict | None]) -> None:
    if unknown := {*verdicts} - {*get_args(Verdict), None}:
        raise ValueError(f"{where}: found verdict {sorted(map(repr, unknown))[0]}; expected right, abstained or wrong.")
