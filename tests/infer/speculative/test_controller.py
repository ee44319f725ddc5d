"""A simulator with known cost curves, where the best arm in hindsight is a sum; then every rule by itself."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from jaxaroo.infer.speculative.controller import (
    ControllerConfig,
    State,
    Trial,
    Yield,
    choose,
    expected_tau,
    init,
    observe,
    predicted_speedup,
)

CFG = ControllerConfig()
TICK = 0.013  # seconds of a plain step: no rule may depend on the unit


# ------------------------------------------------------------------------------------------------------- simulation
class World(NamedTuple):
    """What decoding costs, in plain steps of one row, and how text is accepted."""

    free: float = 1e9  # tokens a forward pass takes without taking longer
    draft: float = 0.05  # a draft, in plain steps
    rows: Callable[[int], int] = lambda call: 1
    alpha: Callable[[float], float] = lambda position: 0.0
    speed: Callable[[int, int], float] = lambda arm, call: 1.0  # factor of time
    depths: tuple[int, ...] = (0, 2, 4, 8)
    spread: float = 0.05  # of the time of calls
    tail: float = 0.0  # share of steps that take ten times as long
    catch_up: float = 0.0
    answer: int = 0  # tokens after which a row ends, in the middle of a call; 0 is never
    calls: int = 1600


class Outcome(NamedTuple):
    fixed: float  # time lost against the best arm in hindsight, as a share
    plain: float  # against plain decoding
    phase: float  # against the best arm at each moment, free to switch
    used: list[int]  # calls of each arm


def scores(world, rows, alpha, call):
    """Expected time of each arm for a token of a row, by loops."""
    found = []
    for arm, depth in enumerate(world.depths):
        work = max(1.0, rows * (depth + 1) / world.free) + world.draft * depth * max(1.0, rows / world.free)
        tau = sum(math.prod([alpha] * i) for i in range(depth + 1))
        found.append((world.speed(arm, call) * work, tau))
    return found


def simulate(world, seed, cfg=CFG):
    rng = np.random.default_rng(seed)
    state, last, position, compiled = init(cfg, world.depths), 0, 0.0, set()
    spent, best, each = 0.0, 0.0, np.zeros(len(world.depths))
    used = [0] * len(world.depths)
    for call in range(world.calls):
        rows, alpha = world.rows(call), world.alpha(position)
        price = [0.0 if last or not arm else world.catch_up * TICK for arm in range(len(world.depths))]
        arm = choose(cfg, state, rows, price)
        steps = 8 if arm else 32
        n, depth = rows * steps, world.depths[arm]
        accepted = np.floor(rng.exponential(size=n) / -math.log(alpha)) if alpha else np.zeros(n)
        tokens = n + int(np.minimum(accepted, depth).sum())
        noise = rng.lognormal(0, world.spread) * (1 + 9 * rng.binomial(steps, world.tail) / steps)
        truth = scores(world, rows, alpha, call)
        shape = arm, (rows - 1).bit_length()
        seconds = TICK * (steps * truth[arm][0] * noise + 500 * (shape not in compiled))
        told = tokens
        if world.answer:  # about so often a row ends, wherever it is in the call
            ended = rng.random(rows) < tokens / rows / world.answer
            told = int(tokens / rows * (rows - (ended * rng.random(rows)).sum()))
        state = observe(cfg, state, arm, rows, steps, seconds, told, shape in compiled, price[arm])
        compiled.add(shape)
        expected = np.array([t / tau for t, tau in truth]) * tokens / rows
        spent, each, best = spent + expected[arm] + price[arm] / TICK, each + expected, best + expected.min()
        position, last, used[arm] = position + tokens / rows, arm, used[arm] + 1
    return Outcome(spent / each.min() - 1, spent / each[0] - 1, spent / best - 1, used)


def steady(rows, alpha, **rest):
    return World(rows=lambda call: rows, alpha=lambda position: alpha, **rest)


STEADY = {
    f"{name} rows={rows} alpha={alpha}": steady(rows, alpha, free=free)
    for (name, free), several in {("memory", 1e9): (1, 16), ("mixed", 64.0): (8, 64), ("compute", 4.0): (1, 64)}.items()
    for rows, alpha in itertools.product(several, (0.0, 0.4, 0.8, 0.95))
}
HARD = {
    "equal": steady(4, 0.0, draft=0.0, catch_up=20),
    "equal but for catch-up": steady(4, 0.3, draft=0.39 / 2, depths=(0, 2), catch_up=60),
    "tails, never pays": steady(16, 0.0, tail=0.02),
    "tails, pays little": steady(16, 0.4, tail=0.02),
    "tails, pays": steady(1, 0.8, tail=0.01),
    "tails, compute": steady(16, 0.9, free=4.0, tail=0.02),
    "noise": steady(8, 0.7, spread=0.15),
    "noise, never pays": steady(8, 0.1, draft=0.2, spread=0.15),
    "catch-up, never pays": steady(8, 0.1, draft=0.1, catch_up=50),
    "catch-up, pays": steady(8, 0.8, catch_up=50),
    "catch-up, pays little": steady(2, 0.4, draft=0.1, catch_up=50),
    "dear drafts": steady(1, 0.6, draft=0.4, depths=(0, 1, 3, 6)),
    "one arm": steady(1, 0.6, depths=(0, 4)),
    "only the deepest pays": steady(1, 0.95, draft=0.05, speed=lambda arm, call: (1, 2.5, 2.5, 2)[arm]),
    "rows vary, never pays": World(rows=lambda call: 1 + call * 37 % 64, draft=0.2, catch_up=5),
    "rows vary": World(rows=lambda call: 1 + call * 37 % 64, alpha=lambda x: 0.9, free=64.0, catch_up=5),
    "a queue": World(rows=lambda call: max(1, 64 - call // 20 % 64), alpha=lambda x: 0.5, free=32.0, catch_up=5),
    "answers end": steady(8, 0.7, answer=200),
    "answers end, never pays": steady(8, 0.0, answer=200),
    "a slower machine": steady(4, 0.6, speed=lambda arm, call: 1 + 0.5 * (call // 700 % 2)),
    "a slower machine, never pays": steady(4, 0.0, speed=lambda arm, call: 1 + 0.5 * (call // 700 % 2)),
}
DRIFT = {
    f"{name}, rows={rows}": World(rows=lambda call, r=rows: r, alpha=alpha, free=64.0, calls=2600, catch_up=catch_up)
    for rows in (1, 8)
    for name, alpha, catch_up in (
        ("steps", lambda x: (0.0, 0.9, 0.3, 0.8)[int(x // 25000) % 4], 0),
        ("steps, catch-up", lambda x: (0.0, 0.9, 0.3, 0.8)[int(x // 25000) % 4], 5),
        ("waves", lambda x: 0.45 + 0.45 * math.sin(x / 15000), 0),
    )
}


@pytest.mark.parametrize("name", STEADY | HARD)
def test_at_most_two_percent_are_lost(name):
    """Against the best arm in hindsight, and so against plain decoding."""
    found = simulate((STEADY | HARD)[name], seed=1)
    assert found.fixed < 0.02, found
    assert found.plain < 0.02, found


@pytest.mark.parametrize("name", DRIFT)
def test_text_that_drifts_is_followed(name):
    found = simulate(DRIFT[name], seed=2)
    assert found.fixed < 0.02, found
    assert found.plain < 0.02, found
    assert found.phase < (0.1 if DRIFT[name].catch_up else 0.05), found  # what is dear to try is tried less often


def test_the_simulator_tells_good_from_bad():
    """Worlds in which a fixed arm, or never looking, would be far outside the bounds above."""
    for name, world in (STEADY | DRIFT).items():
        truth = [t / tau for t, tau in scores(world, world.rows(0), world.alpha(0.0), 0)]
        assert max(truth) > 1.04 * min(truth), name
    pays = [name for name, w in STEADY.items() if min(t / u for t, u in scores(w, w.rows(0), w.alpha(0.0), 0)) < 0.9]
    assert 8 < len(pays) < len(STEADY) - 4


# ---------------------------------------------------------------------------------------------------- rule by rule
def call(state, arm, tau=1.0, cost=1.0, rows=1, cfg=CFG, steps=100, **rest):
    return observe(cfg, state, arm, rows, steps, steps * cost, round(rows * steps * tau), **rest)


def follow(state, taus, costs, calls, rows=1, cfg=CFG, catch_up=()):
    """Do as told in a world without noise; the arms used."""
    used = []
    for _ in range(calls):
        arm = choose(cfg, state, rows, catch_up)
        price = catch_up[arm] if catch_up and arm != (used or [0])[-1] else 0.0
        state = call(state, arm, taus[arm], costs[arm], rows, cfg, catch_up=price)
        used.append(arm)
    return state, used


def known(costs, taus, arm=0, owed=0.0, rest=1e9, depths=(0, 2, 4, 8), bucket=0):
    """All arms have been seen; those out of use rest."""
    trials = {(a, bucket): Trial((c,) * 32, c, 0.0, 0, 1, rest, 0.0) for a, c in enumerate(costs)}
    yields = tuple(Yield((1e4 * t, 1e4), (600 * t, 600.0), 1) for t in taus)
    return State(depths[: len(costs)], yields, trials, {bucket: 100.0}, arm, owed)


def test_expected_tau_is_the_sum_over_all_outcomes():
    """Drafts are accepted until the first that is not; a step emits them and one more."""
    for gamma, alpha in itertools.product((1, 3, 5), (0.0, 0.3, 0.9, 1.0)):
        want = 0.0
        for fates in itertools.product((True, False), repeat=gamma):
            chance = math.prod(alpha if fate else 1 - alpha for fate in fates)
            want += chance * (1 + len(list(itertools.takewhile(bool, fates))))
        np.testing.assert_allclose(expected_tau(alpha, gamma), want, rtol=1e-12)


def test_predicted_speedup_is_the_ratio_of_tokens_a_second():
    tau, plain, phases = 3.2, 0.02, (0.004, 0.023, 0.001)
    want = (tau / math.fsum(phases)) / (1 / plain)
    np.testing.assert_allclose(predicted_speedup(tau, plain, *phases), want, rtol=1e-12)


def test_the_first_call_is_plain_and_drafters_follow_from_the_shallowest():
    _, used = follow(init(CFG, (0, 2, 4, 8)), (1, 1.6, 1.9, 2.0), (1, 1.05, 1.1, 1.2), 40)
    assert used[0] == 0
    assert [arm for arm, _ in itertools.groupby(used)][:2] == [0, 1]
    assert list(dict.fromkeys(used)) == [0, 1, 2, 3]
    assert used[-1] == 2


def test_calls_that_compile_do_not_count():
    state, _ = follow(init(CFG, (0, 4)), (1, 3), (1, 1.2), 20)
    for arm in (0, 1):
        assert call(state, arm, 3.0, 1e6, warm=False) == state
    assert observe(CFG, state, 1, 1, 8, 1.0, 0) == state  # nor those that gave nothing


def test_costs_are_kept_by_powers_of_two_of_rows():
    state = known((1.0, 1.3), (1, 3), arm=1, bucket=2)  # seen with 3 or 4 rows
    assert choose(CFG, state, 3) == choose(CFG, state, 4) == 1
    for rows in (3, 4, 5, 8, 9):
        new = call(state, 1, 3.0, 7.0, rows)
        changed = {key for key in new.trials if new.trials[key] != state.trials.get(key)}
        assert changed == {(1, {3: 2, 4: 2, 5: 3, 8: 3, 9: 4}[rows])}
    crowded = known((1.0, 9.0), (1, 3), arm=1, bucket=6)
    both = crowded._replace(trials=crowded.trials | state.trials, clocks=crowded.clocks | state.clocks)
    assert choose(CFG, both, 64) == 0
    assert choose(CFG, both, 4) == 1


def test_rests_double_while_an_arm_loses_up_to_a_limit():
    cfg = ControllerConfig(budget=0.9, rest=4, doublings=3)
    _, used = follow(init(cfg, (0, 4)), (1, 1.0), (1, 1.5), 200, cfg=cfg)
    visits = [i for i, arm in enumerate(used) if arm and not used[i - 1]]
    gaps = [b - a for a, b in itertools.pairwise(visits)]
    # a rest is 4 * 1.5 plain calls, doubled with every loss; the first visit has two calls, to be sure
    assert gaps[:4] == [2 + 12, 1 + 24, 1 + 48, 1 + 48]


def test_visits_lose_no_more_than_the_budget():
    cfg = ControllerConfig(budget=0.02, rest=1, doublings=1)
    _, used = follow(init(cfg, (0, 8)), (1, 1), (1, 6), 4000, cfg=cfg)
    lost = 500 * (sum(used) - 2)  # behind the first visit, of two calls
    assert 0.01 * 400000 < lost < 0.02 * 400000


def test_what_coming_back_costs_belongs_to_the_visit():
    """Plain decoding is looked at, and the drafter has to catch up behind that: this too must fit the budget."""
    dear, cheap = (
        follow(init(CFG, (0, 4)), (1, 2.0), (1, 1.2), 4000, catch_up=(0.0, price))[1] for price in (300.0, 0.0)
    )
    visits = [sum(1 for a, b in itertools.pairwise(used) if a == 1 and b == 0) for used in (dear, cheap)]
    assert visits[0] * 300 < 0.01 * 4000 * 120
    assert visits[1] > 2 * visits[0] > 0


def test_drifting_text_ends_all_rests():
    state = known((1.0, 1.2, 1.4), (1, 3.0, 3.0), arm=1)
    tired = {key: t._replace(losses=4, lost=50.0) for key, t in state.trials.items()}
    state = state._replace(trials=tired)
    assert choose(CFG, state, 1) == 1
    steady_text = call(state, 1, 3.0, 1.2)
    assert steady_text.trials[0, 0].losses == 4
    before = state
    for _ in range(6):  # until the slow average, of 10,000 steps, is given up
        if state.yields[1].slow[1] > 1e3:
            state = call(state, 1, 1.3, 1.2)
    assert state.yields[1].slow[1] < 1e3 < before.yields[1].slow[1]
    assert all((t.losses, t.lost, t.seconds) == (0, 0.0, 0.0) for t in state.trials.values())
    assert choose(CFG, state, 1) != 1


def test_an_arm_is_switched_on_once_staying_has_lost_its_catch_up():
    state, price = known((1.0, 1.0), (1, 2.0), rest=1e9), (0.0, 1000.0)
    used = []
    for _ in range(40):
        used.append(choose(CFG, state, 1, price))
        state = call(state, used[-1], 1.0, 1.0)
        if used[-1]:
            break
    assert used == [0] * 20 + [1]  # each call of 100 seconds loses 50
    assert choose(CFG, known((1.0, 1.0), (1, 2.0)), 1, (0.0, 0.0)) == 1


def test_drafters_that_cannot_win_are_not_visited():
    """What a shallow one gains bounds the gain of a deep one, in proportion to the depths."""
    taus = (1, 1.1, 2.0, 3.0)  # against the bound, to see that it is used: at most 1.1, 1.2, 1.4
    assert set(follow(init(CFG, (0, 2, 4, 8)), taus, (1, 1.45, 1.5, 1.6), 300)[1]) == {0, 1}
    assert set(follow(init(CFG, (0, 2, 4, 8)), taus, (1, 1.3, 1.35, 1.38), 300)[1]) == {0, 1, 3}


def test_plain_decoding_is_looked_at_however_bad_it_seemed():
    """It was measured while the machine was slow."""
    state, used = follow(known((4.0, 1.5), (1, 1.2), arm=1, rest=100.0), (1, 1.2), (1, 1.5), 600)
    assert state.arm == 0
    assert used.count(1) < 400


def test_a_step_that_takes_ten_times_as_long_changes_nothing():
    state = known((1.0, 1.2), (1, 1.5), arm=1)
    assert call(state, 1, 1.5, 12.0).trials[1, 0].cost == 1.2
    new, _ = follow(init(CFG, (0, 4)), (1, 3.0), (1, 1.2), 1)
    new = call(new, choose(CFG, new, 1), 3.0, 12.0)
    assert choose(CFG, new, 1) == 1  # the first call of the first visit: it is asked again
    new = call(new, 1, 3.0, 1.2)
    assert new.arm == 1


def test_a_visit_without_a_clear_end_has_few_calls():
    state = known((1.0, 2.0), (1, 2.0), rest=0.0)  # as good as the other, and noisy
    state = state._replace(trials=state.trials | {(1, 0): Trial((2.0,) * 32, 2.0)})
    used = follow(state, (1, 2.0), (1, 2.0), 60)[1]
    assert [(arm, len(list(group))) for arm, group in itertools.groupby(used)][:2] == [(1, CFG.visit), (0, 32)]


def test_a_visit_is_judged_by_what_it_saw_itself():
    state = known((1.0, 1.2), (1, 1.0), rest=0.0)
    first = call(state, 1, 2.0, 1.2)
    assert first.yields[1].quick == (200.0, 100.0)
    assert call(state, 0).yields[0].quick == (600.0, 600.0)  # the arm in use has a running one


def test_an_arm_that_was_left_rests():
    _, used = follow(init(CFG, (0, 4)), (1, 2.0), (1, 1.2), 20)
    assert used[:12] == [0] + [1] * 10 + [0]  # two calls of the visit, then eight as long as these


def test_nothing_is_changed_in_place():
    state, _ = follow(init(CFG, (0, 2, 4)), (1, 1.5, 1.6), (1, 1.2, 1.3), 9)
    before = copy.deepcopy(state)
    for arm in range(3):
        choose(CFG, state, 1, (0.0, 1.0, 1.0))
        call(state, arm, 1.9, 1.0)
        call(state, arm, 9.0, 9.0, catch_up=3.0)
    assert state == before


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ControllerConfig)])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=f"controller: {name}=0; expected"):
        ControllerConfig(**{name: 0})


def test_what_cannot_be_is_refused():
    for depths in ((), (1, 2), (0, 4, 2), (0, 2, 2), (-1, 0)):
        with pytest.raises(ValueError, match="expected 0, for plain decoding"):
            init(CFG, depths)
    state = init(CFG, (0, 4))
    with pytest.raises(ValueError, match="1 catch-up times; expected one for each of 2 arms"):
        choose(CFG, state, 1, (0.0,))
    for arm, rows, steps, seconds in ((2, 1, 1, 1.0), (-1, 1, 1, 1.0), (0, 0, 1, 1.0), (0, 1, 0, 1.0), (0, 1, 1, 0.0)):
        with pytest.raises(ValueError, match="expected a call that ran"):
            observe(CFG, state, arm, rows, steps, seconds, 1)
