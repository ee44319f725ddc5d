"""A step begins where the policy was unsure (AdaptiveStep, https://arxiv.org/abs/2502.13943).

The policy reads its own responses; with p_t the probability of the token at t,

    break points = { t : p_t < c }        c such that a fixed share of all tokens (2 %) are break points

From the abstract and the public repository: a threshold on the probability, set by a share over the data set, 2 %.
Ours, and not checked against the paper: a new step starts at the token that is a break point, not behind it; the
first token of a response, which begins a step in any case, is no break point and does not count for the share; a
step shorter than the least length takes the next one in, the last one goes to the one before it.

Ends are those of `data.steps.split_tokens`, which turns them into text. Labels follow as for any steps; the score is
read at the separator that `data.steps` puts behind each.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveStepConfig:
    """How many steps, and how short."""

    share: float = 0.02  # of tokens that are break points, before short steps are merged
    shortest: int = 4  # tokens of a step, unless the response has fewer (ours)

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"AdaptiveStepConfig.share: found {self.share}; expected a share from 0 to 1.")
        if self.shortest < 1:
            raise ValueError(f"AdaptiveStepConfig.shortest: found {self.shortest}; expected 1 or more.")


class AdaptiveSteps(NamedTuple):
    """Where the steps of a data set end."""

    ends: list[Int[np.ndarray, " _"]]  # of each response: index of the token after each step
    threshold: float  # log-probability below which a token is a break point
    share: float  # of tokens that are: the share asked for or, with ties at the threshold, less
    merged: int  # break points that merging took away


def adaptive_steps(
    logps: Sequence[Float[np.ndarray, " _"]], cfg: AdaptiveStepConfig = AdaptiveStepConfig()
) -> AdaptiveSteps:
    """Cut all responses of a data set at one threshold.

    Args:
      logps: log-probabilities of each response's tokens under the policy that wrote it.
      cfg: how many steps, and how short.
    """
    logps = [np.asarray(logp, np.float64) for logp in logps]
    threshold = choose_threshold(logps, cfg.share)
    ends = [adaptive_ends(logp, threshold, cfg.shortest) for logp in logps]
    points = sum(int((logp[1:] < threshold).sum()) for logp in logps)
    candidates = sum(max(0, len(logp) - 1) for logp in logps)
    kept = sum(max(0, len(e) - 1) for e in ends)
    return AdaptiveSteps(ends, threshold, points / max(candidates, 1), points - kept)


def choose_threshold(logps: Sequence[Float[np.ndarray, " _"]], share: float) -> float:
    """The log-probability that `share` of all tokens, rounded to whole ones, lie below; fewer where there are ties.

    Raises:
      ValueError: if there is no token, or what was given is no log-probability.
    """
    for i, logp in enumerate(logps):
        if not (np.asarray(logp) <= 1e-3).all():  # NaN included; rounding may leave log 1 a little above 0
            raise ValueError(f"choose_threshold: response {i} has values above 0 or NaN; expected log-probabilities.")
    tokens = np.concatenate([np.zeros(0, np.float64), *(np.asarray(logp, np.float64)[1:] for logp in logps)])
    if not len(tokens):
        raise ValueError("choose_threshold: found no token behind the first of any response; expected some.")
    below = round(share * len(tokens))
    return float(np.partition(tokens, below)[below]) if below < len(tokens) else float("inf")


def adaptive_ends(logp: Float[np.ndarray, " T"], threshold: float, shortest: int) -> Int[np.ndarray, " R"]:
    """Index of the token after each step of one response; none if it has no token."""
    cuts = [0]
    for t in np.flatnonzero(np.asarray(logp, np.float64) < threshold).tolist():
        if t - cuts[-1] >= shortest:
            cuts.append(t)
    if len(cuts) > 1 and len(logp) - cuts[-1] < shortest:
        cuts.pop()
    return np.asarray([*cuts[1:], len(logp)][: len(logp)], np.int64)
