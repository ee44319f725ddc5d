"""Rewards of critiques, in two stages (Critique-RL, https://arxiv.org/abs/2510.24320).

    stage I    r = [verdict = truth]                        is the criticised answer right or wrong?
    stage II   r = [refined answer right] + w [verdict = truth]
    both       r = -1 if the critique is malformed

A critique that only helps to refine learns to find fault with everything or with nothing; stage I teaches it to judge,
and in stage II w = 0.2 keeps it judging. The published scripts use RLOO with 4 critiques an answer on top.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class CritiqueConfig:
    """Which stage, and what counts what."""

    stage: Literal[1, 2] = 1
    verdict_weight: float = 0.2  # w, in stage II
    malformed: float = -1.0

    def __post_init__(self):
        if self.stage not in (1, 2):
            raise ValueError(f"CritiqueConfig.stage: found {self.stage!r}; expected 1 or 2.")
        if not 0 <= self.verdict_weight < float("inf"):
            raise ValueError(f"CritiqueConfig.verdict_weight: found {self.verdict_weight}; expected at least 0.")
        if not -float("inf") < self.malformed < 0:
            raise ValueError(f"CritiqueConfig.malformed: found {self.malformed}; expected a negative number.")


def critique(
    verdict: Sequence[bool],
    correct: Sequence[bool],
    malformed: Sequence[bool],
    refined_correct: Sequence[bool] | None = None,
    cfg: CritiqueConfig = CritiqueConfig(),
) -> tuple[np.ndarray, dict[str, float]]:
    """Rewards of B critiques, float32, and metrics.

    Args:
      verdict: the critique says that the answer is right; anything where it is malformed.
      correct: it is.
      malformed: no verdict can be read from the critique.
      refined_correct: the answer that was given after reading the critique is right; for stage II.
      cfg: which stage.

    Returns:
      Rewards `[B]`; `discrimination_acc` and `refine_acc`, shares of all critiques, to which a malformed one does not
      add, and `format_fail`, the share of malformed ones.

    Raises:
      ValueError: if the arguments differ in length or are empty, or stage II gets no refined answers.
    """
    if cfg.stage == 2 and refined_correct is None:
        raise ValueError("critique: found no refined answers in stage 2; expected whether each of them is right.")
    given = [verdict, correct, malformed] + ([] if refined_correct is None else [refined_correct])
    if len({len(x) for x in given}) != 1 or not len(verdict):
        raise ValueError(f"critique: found {[len(x) for x in given]} flags; expected as many of each, and some.")
    said, truth, bad, *refined = (np.asarray(x, bool) for x in given)
    judged = (said == truth) & ~bad
    reward, metrics = judged.astype(np.float32), {"discrimination_acc": float(judged.mean())}
    if refined:
        metrics["refine_acc"] = float((refined[0] & ~bad).mean())
    if cfg.stage == 2:
        reward = refined[0].astype(np.float32) + np.float32(cfg.verdict_weight) * reward
    return np.where(bad, np.float32(cfg.malformed), reward), metrics | {"format_fail": float(bad.mean())}
