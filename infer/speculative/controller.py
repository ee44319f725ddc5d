"""Never slower: which way to decode next, learnt from the calls made so far. No JAX, and no clock of its own.

Arm 0 decodes plainly, the others draft, each one deeper than the last. With t the seconds of a step and tau the tokens
it gives a running row, an arm is as good as its score t / tau is low. Of gamma drafts, each accepted with probability
alpha (2211.17192, section 3.3), and of the phases of a step:
  E[tau] = (1 - alpha^(gamma + 1)) / (1 - alpha),    speedup = tau t_plain / (t_draft + t_verify + t_commit)

t is kept by powers of two of rows, as the lower quartile of the last calls, or lower if these are few, for a step now
and then takes ten times as long. tau is a slow average, until drifting text has a quick one contradict it. The arm in
use is left for a better one when staying has lost the seconds of the other's catch-up. Arms out of use are visited for
a call or a few. Then they rest, until what the visit lost and the next catch-up fit their part of the budget, and for
a multiple of a call that doubles with every loss; all rests end when tokens drift. A drafter is not visited where it
cannot win: acceptance falls with depth, so beside a shallower one it gains at most in proportion.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControllerConfig:
    """How to find out what is fastest."""

    budget: float = 0.01  # share of time that visits may lose, beside the first to every arm
    margin: float = 0.01  # by how much an arm must be better to replace the one in use
    drift: float = 0.15  # relative change of tokens, beyond noise, that means another text
    window: int = 32  # calls that tell what a step costs
    memory: int = 64  # calls of the slow average of tokens
    recent: int = 6  # calls of the quick one
    visit: int = 8  # calls of a visit at most; it ends sooner if it is clear who won
    rest: int = 8  # an arm rests so many times as long as a call of its visit took, doubled with every loss,
    doublings: int = 4  # but not more often than this

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not (0 < value < 1 if name in ("budget", "margin", "drift") else value >= 1):
                raise ValueError(f"controller: {name}={value}; expected a share below 1, or a count of at least 1.")


class Trial(NamedTuple):
    """What is known of an arm with about so many rows."""

    costs: tuple[float, ...] = ()  # seconds of a step, in the last calls
    cost: float = 0.0  # a low quantile of these
    since: float = 0.0  # when it last ran, by the clock of the bucket
    losses: int = 0  # visits lost since it won, or the text changed
    calls: int = 0  # of the last visit
    seconds: float = 0.0  # that its calls took
    lost: float = 0.0  # seconds, against the arm in use, and the catch-up that coming back took


class Yield(NamedTuple):
    """What is known of an arm's tokens: fading sums of tokens and of rows times steps, slow and quick."""

    slow: tuple[float, float] = (0.0, 0.0)
    quick: tuple[float, float] = (0.0, 0.0)
    seen: int = 0  # the call that last told


class State(NamedTuple):
    """All that is known. Calls of another arm than `arm` are visits; their caller may make them short."""

    depths: tuple[int, ...]
    yields: tuple[Yield, ...]
    trials: dict[tuple[int, int], Trial]  # by arm and bucket of rows
    clocks: dict[int, float]  # seconds spent, by bucket of rows
    arm: int = 0  # in use
    owed: float = 0.0  # seconds that staying with it has lost
    visit: int | None = None  # the arm that is being visited


def expected_tau(alpha: float, gamma: int) -> float:
    """Tokens of a step whose gamma drafts are each accepted with probability alpha, given those before."""
    return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def predicted_speedup(tau: float, t_plain: float, t_draft: float, t_verify: float, t_commit: float) -> float:
    """Of speculative over plain decoding."""
    return tau * t_plain / (t_draft + t_verify + t_commit)


def init(cfg: ControllerConfig, arms: Sequence[int]) -> State:
    """Know nothing yet, and decode plainly; `arms` are the depths drafted to, 0 first and growing."""
    if list(arms) != sorted({0, *arms}) or arms[0] != 0:
        raise ValueError(f"controller: found depths {arms}; expected 0, for plain decoding, then growing ones.")
    return State(tuple(arms), (Yield(),) * len(arms), {}, {})


def choose(cfg: ControllerConfig, state: State, rows: int, catch_up: Sequence[float] = ()) -> int:
    """The arm for the next call of so many rows; `catch_up`: seconds to switch each arm on now, 0 if empty."""
    bucket, count = (rows - 1).bit_length(), len(state.depths)
    if len(price := catch_up or (0.0,) * count) != count:
        raise ValueError(f"controller: {len(price)} catch-up times; expected one for each of {count} arms.")
    score = [_score(state, arm, bucket) for arm in range(count)]
    goal, best = (1 - cfg.margin) * score[state.arm], score.index(min(score))
    if state.visit is not None or goal == math.inf:  # so many rows are new: nothing can be compared yet
        return state.arm if state.visit is None else state.visit
    if score[best] < goal and price[best] <= state.owed:
        return best
    hopes, clock = [], state.clocks[bucket]
    for arm in range(count):
        trial, rest = state.trials.get((arm, bucket)), price[arm]
        if trial is not None:
            rest = max(0.0, trial.lost + rest) * (count - 1) / cfg.budget
            rest = trial.since + max(rest, trial.seconds / max(1, trial.calls) * cfg.rest * 2**trial.losses)
        if arm != state.arm and clock >= rest and (hope := _hope(state, arm, bucket)) < goal:
            hopes.append((hope if trial else 0.0, arm))  # the shallow before the deep, whose hopes depend on them
    return min(hopes, default=(0.0, state.arm))[1]


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
    """Learn from a call if it was `warm`; `tokens` are of all rows; `catch_up` is not in `seconds`, and came before."""
    if not 0 <= arm < len(state.depths) or min(rows, steps) < 1 or not seconds > 0:
        raise ValueError(f"controller: arm {arm}, {rows} rows, {steps} steps, {seconds} s; expected a call that ran.")
    if not warm or tokens < 1:
        return state
    bucket, visits = (rows - 1).bit_length(), arm != state.arm
    now, last = max((shown.seen, other) for other, shown in enumerate(state.yields))
    trial, tau = state.trials.get((arm, bucket), Trial()), state.yields[arm]
    if visits and arm != state.visit:  # a new visit
        trial, tau = trial._replace(calls=0, seconds=0.0, lost=0.0), tau._replace(quick=(0.0, 0.0))
    costs, clock = (*trial.costs, seconds / steps)[-cfg.window :], state.clocks.get(bucket, 0.0) + seconds + catch_up
    trial = trial._replace(costs=costs, cost=sorted(costs)[len(costs) ** 2 // (4 * cfg.window)], since=clock)
    tau, drifted = _count(cfg, tau, tokens, rows * steps, now + 1)
    trials, clocks = {**state.trials, (arm, bucket): trial}, {**state.clocks, bucket: clock}
    if drifted:  # what lost may win now
        trials = {key: t._replace(losses=0, seconds=0.0, lost=0.0) for key, t in trials.items()}
    if not visits and last != arm and (last, bucket) in trials:  # coming back is a part of that visit
        trials[last, bucket] = trials[last, bucket]._replace(lost=trials[last, bucket].lost + catch_up)
    yields = (*state.yields[:arm], tau, *state.yields[arm + 1 :])
    new = State(state.depths, yields, trials, clocks, state.arm, state.owed)
    if visits:
        return _judge(cfg, new, trial, arm, bucket, seconds, tokens / rows)
    loss = 1 - min(_score(new, a, bucket) for a in range(len(yields))) / _score(new, arm, bucket)
    return new._replace(owed=state.owed + seconds * loss if loss > cfg.margin else 0.0)


# ----------------------------------------------------------------------------------------------------------- private
def _judge(cfg: ControllerConfig, state: State, trial: Trial, arm: int, bucket: int, seconds: float, gain: float):
    """After a call of a visit: go on with it, or take the arm into use, or let it rest."""
    mine, other = _score(state, arm, bucket), _score(state, state.arm, bucket)
    tokens, row_steps = state.yields[arm].quick
    known = len(trial.costs) > 1 and other < math.inf  # one call may be the one that takes ten times as long
    won = known and mine < (1 - cfg.margin) * other
    fresh = min((trial.cost, *trial.costs[-1:])) * row_steps / tokens  # older calls may be out of date
    clear = known and fresh * (1 - 2 * _noise(tokens, row_steps)) > (1 + cfg.drift) * other
    over = won or clear or trial.calls + 1 >= cfg.visit
    losses = 0 if won else min(state.trials[arm, bucket].losses + over, cfg.doublings)
    lost = trial.lost + (seconds - other * gain if other < math.inf else 0.0)
    trial = trial._replace(losses=losses, calls=trial.calls + 1, seconds=trial.seconds + seconds, lost=lost)
    trials = {**state.trials, (arm, bucket): trial}
    if not won:
        return state._replace(trials=trials, visit=None if over else arm)
    left = trials[state.arm, bucket]  # it was measured just now, and rests as after a visit like this one
    trials[state.arm, bucket] = trial._replace(costs=left.costs, cost=left.cost, lost=0.0)
    return state._replace(trials=trials, arm=arm, owed=0.0)


def _score(state: State, arm: int, bucket: int) -> float:
    """Seconds a row waits for a token; infinite while the arm has not been seen with so many rows."""
    trial, (tokens, row_steps) = state.trials.get((arm, bucket)), state.yields[arm].slow
    return math.inf if trial is None else trial.cost * row_steps / tokens


def _hope(state: State, arm: int, bucket: int) -> float:
    """The best score an arm can have, after what the arm in use and shallower ones seen since have shown."""
    depth, mine = state.depths[arm], state.yields[arm]
    costs = [state.trials.get((other, bucket), Trial()).cost for other in range(arm + 1)]
    tau, cost = depth + 1.0, costs[arm] or max(costs)
    for other, ((tokens, row_steps), _, seen) in enumerate(state.yields):
        if other and seen > mine.seen and (other < arm or other == state.arm):
            tau = min(tau, 1 + max(0.0, tokens / row_steps - 1) * max(1.0, depth / state.depths[other]))
    return cost / tau if arm else 0.0  # plain decoding is always worth a look, for nothing may be slower


def _count(cfg: ControllerConfig, tau: Yield, tokens: int, row_steps: int, now: int) -> tuple[Yield, bool]:
    """The averages after a call; if they contradict each other the slow one starts anew from the quick, and true."""
    fading = zip(tau[:2], (cfg.memory, cfg.recent), strict=True)
    slow, quick = ((t - t / n + tokens, r - r / n + row_steps) for (t, r), n in fading)
    drifted = abs(quick[0] / quick[1] * slow[1] / slow[0] - 1) > cfg.drift + 3 * _noise(*quick)
    return Yield(quick if drifted else slow, quick, now), drifted


def _noise(tokens: float, row_steps: float) -> float:
    """Relative error of an average of tokens, at most: that of drafts without end, which is geometric."""
    return math.sqrt(max(0.0, 1 - row_steps / tokens) / row_steps)
