"""Never slower: which way to decode next, learnt from the calls made so far. No JAX, and no clock of its own.

Arm 0 decodes plainly; the others draft, every one deeper than the last. With t the seconds of a step and tau the tokens
a running row gains by it, an arm is as good as its score t / tau is low. Of speculative decoding (2211.17192, section
3.3) with acceptance alpha, drafts of length gamma, and phases that take t_draft, t_verify and t_commit:

  E[tau] = (1 - alpha^(gamma + 1)) / (1 - alpha),    speedup = tau t_plain / (t_draft + t_verify + t_commit)

t depends on the machine and on how many rows run, so it is kept by powers of two of rows: the lower median of the last
calls, for a step now and then takes ten times as long. tau depends on the text alone, and drifts: a slow average, that
gives way to a quick one once the two contradict each other.

An arm in use is left for one that scores better as soon as staying has lost the seconds of the other's catch-up. Arms
out of use are visited for a call or a few. After a visit an arm rests: for as long as makes what the visit lost, and
the next catch-up, its part of the budget; and for a multiple of the visit, doubled with every visit that lost. Rests
end when what is known shifts. A drafter is not visited where it cannot win: acceptance only falls with depth, so it
gains at most in proportion to its depth what a shallower one gains.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """How to find out what is fastest.

    Attributes:
      budget: share of time that visits may lose, beside the first visit to every arm.
      margin: by how much an arm must be better to replace the one in use.
      window: calls whose median is an arm's cost.
      memory: calls of the slow average of tokens per step.
      recent: calls of the quick one.
      shift: relative change, beyond noise, that counts as another text or another machine.
      visit: calls a visit lasts at most; it ends sooner when the arm clearly lost or won.
      rest: an arm rests so many times as long as its visit took,
      doublings: and at most so many times twice that.
    """

    budget: float = 0.01
    margin: float = 0.01
    window: int = 16
    memory: int = 64
    recent: int = 6
    shift: float = 0.15
    visit: int = 8
    rest: int = 8
    doublings: int = 4

    def __post_init__(self):
        for name in ("budget", "margin", "shift"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"controller: {name}={getattr(self, name)}; expected a share between 0 and 1.")
        for name in ("window", "memory", "recent", "visit", "rest", "doublings"):
            if getattr(self, name) < 1:
                raise ValueError(f"controller: {name}={getattr(self, name)}; expected at least 1.")


class Yield(NamedTuple):
    """Tokens per row and step of an arm: fading sums of tokens and of rows times steps, slow and quick."""

    tokens: float = 0.0
    row_steps: float = 0.0
    recent_tokens: float = 0.0
    recent_row_steps: float = 0.0
    seen: int = 0  # number of the call that last told


class Trial(NamedTuple):
    """What is known of an arm with about so many rows."""

    costs: tuple[float, ...]  # seconds per step of the last calls
    losses: int = 0  # visits lost since it won or something shifted
    lost: float = 0.0  # seconds, by the last visit
    rest: float = 0.0  # seconds
    since: float = 0.0  # the bucket's time when it was last in use


class Visit(NamedTuple):
    """A try of an arm other than the one in use."""

    arm: int
    calls: int = 0
    seconds: float = 0.0
    lost: float = 0.0


class State(NamedTuple):
    """All that the controller knows. A caller may shorten calls of an arm other than `arm`: those are visits."""

    depths: tuple[int, ...]
    arm: int  # in use
    owed: float  # seconds that staying with it has lost
    visit: Visit | None
    yields: tuple[Yield, ...]
    trials: dict[tuple[int, int], Trial]  # by arm and bucket of rows
    clocks: dict[int, float]  # seconds spent, by bucket of rows
    calls: int


def expected_tau(alpha: float, gamma: int) -> float:
    """Tokens a step emits if each of `gamma` drafts is accepted with probability alpha, all before it given."""
    return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def predicted_speedup(tau: float, t_plain: float, t_draft: float, t_verify: float, t_commit: float) -> float:
    """Of speculative over plain decoding: tokens a step, times a plain step's seconds, over those of its phases."""
    return tau * t_plain / (t_draft + t_verify + t_commit)


def init(cfg: ControllerConfig, arms: Sequence[int]) -> State:
    """Know nothing, and decode plainly.

    Args:
      cfg: settings.
      arms: the depth to which each arm drafts: 0 first, for plain decoding, then growing.
    """
    depths = tuple(arms)
    if depths[:1] != (0,) or any(b <= a for a, b in zip(depths, depths[1:], strict=False)):
        raise ValueError(f"controller: found arms of depths {depths}; expected 0, for plain decoding, then growing.")
    return State(depths, 0, 0.0, None, (Yield(),) * len(depths), {}, {}, 0)


def choose(cfg: ControllerConfig, state: State, rows: int, catch_up: Sequence[float] = ()) -> int:
    """The arm for the next call.

    Args:
      cfg: settings.
      state: what is known.
      rows: that run.
      catch_up: seconds that it would take now to switch each arm on; none takes any if empty.
    """
    bucket, arms = _bucket(rows), range(len(state.depths))
    price = catch_up or (0.0,) * len(arms)
    if len(price) != len(arms):
        raise ValueError(f"controller: {len(price)} catch-up times for {len(arms)} arms; expected one each.")
    if state.visit is not None:
        return state.visit.arm
    score = _score(state, state.arm, bucket)
    if score == math.inf:
        return state.arm
    best = _best(state, bucket)
    if _score(state, best, bucket) < (1 - cfg.margin) * score and price[best] <= state.owed:
        return best
    clock, part = state.clocks[bucket], cfg.budget / max(1, len(arms) - 1)

    def rested(arm: int) -> bool:
        trial = state.trials.get((arm, bucket))
        if trial is None:
            return price[arm] <= clock
        return clock - trial.since >= max(trial.rest, (trial.lost + price[arm]) / part)

    hopes = {arm: _hope(state, arm, bucket) for arm in arms if arm != state.arm and rested(arm)}
    hopes = {arm: hope for arm, hope in hopes.items() if hope < (1 - cfg.margin) * score}
    return min(hopes, key=lambda arm: hopes[arm], default=state.arm)


def observe(
    cfg: ControllerConfig,
    state: State,
    arm: int,
    rows: int,
    steps: int,
    seconds: float,
    tokens: int,
    warm: bool = True,
    catch_up: float = 0.0,
) -> State:
    """Learn from a call.

    Args:
      cfg: settings.
      state: what was known before.
      arm: that ran.
      rows: that ran.
      steps: each of them made.
      seconds: the steps took.
      tokens: emitted, by all rows together.
      warm: false for a call that compiled: it says nothing of the arm's cost.
      catch_up: seconds spent before it to switch the arm on.
    """
    if not 0 <= arm < len(state.depths) or steps < 1 or not seconds > 0:
        raise ValueError(f"controller: found arm {arm}, {steps} steps, {seconds} seconds; expected a call that ran.")
    visit = state.visit if state.visit and state.visit.arm == arm else Visit(arm)
    if not warm or tokens < 1:
        return state if arm == state.arm else state._replace(visit=visit)
