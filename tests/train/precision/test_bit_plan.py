"""Oracles: every plan of a few layers, enumerated, and costs from integers in float64, one matrix at a time."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.jaxlib_ext.qmm import QuantisedMatrix
from jaxaroo.models.decoder import DecoderConfig, init_params, unstack_layers
from jaxaroo.models.multi_precision import (
    DEFAULT_RULES,
    MATRICES,
    fake_quantise_tree,
    init_scales,
    switch_bits,
    to_master,
)
from jaxaroo.models.quantise import QuantConfig
from jaxaroo.train.precision.bit_plan import allocate, code_bits, pareto, perturbation, sizes

CFG = DecoderConfig(
    vocab_size=20, embed_dim=32, ffn_dim=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, o_bias=True
)  # fmt: skip
WIDTHS = (8, 6, 4, 2)
MIXED = (  # a leaf that stays float, and one that never goes below 4 bits nor above 6
    ("layers/attn/k", None),
    ("layers/mlp/down", QuantConfig(bits=(6, 4), group=32)),
    (MATRICES, QuantConfig()),
)
RULES = {"default": DEFAULT_RULES, "mixed": MIXED}
COUNT = {"q": 2048, "k": 1024, "v": 1024, "o": 2048, "gate": 2048, "up": 2048, "down": 2048}  # of a layer, by hand
cost_of = jax.jit(perturbation, static_argnums=(3, 4))


@functools.cache
def model(rules):
    params = jax.jit(init_params, static_argnums=0)(CFG, jax.random.key(1))
    return params, jax.jit(init_scales, static_argnums=1)(params, rules)


def stored(rules):
    """Path -> (codes, scale, master's width) as NumPy arrays."""
    master, found = to_master(*model(rules), rules), {}
    for part, names in (("attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for name in names:
            leaf, path = master["layers"][part][name], f"layers/{part}/{name}"
            if isinstance(leaf, dict):
                codes, scale = np.asarray(leaf["codes"], np.float64), np.asarray(leaf["scale"], np.float64)
                rows = codes.reshape(*scale.shape, -1) * 1.0
                found[path] = (rows, scale[..., None], 6 if rules == MIXED and name == "down" else 8)
    return found


def distances(rules):
    """Path -> squared distance of each width from the master, [L, W]."""
    found = {}
    for path, (codes, scale, h) in stored(rules).items():
        table = np.zeros((3, len(WIDTHS)))
        for j, b in enumerate(WIDTHS):
            b = min(max(b, 4), 6) if h == 6 else b
            k = 2.0 ** (h - b)
            low = np.clip(np.round(codes / k), -(2 ** (b - 1)), 2 ** (b - 1) - 1) * k
            table[:, j] = (((low - codes) * scale) ** 2).reshape(3, -1).sum(1)
        found[path] = table
    return found


def every_plan(cost, number, widths):
    """(cost, bits, index of each layer's width) of all of them."""
    L = len(cost)
    for plan in itertools.product(range(len(widths)), repeat=L):
        bits = sum(int(number[i]) * widths[j] for i, j in enumerate(plan))
        yield sum(cost[i][j] for i, j in enumerate(plan)), bits, plan


def problem(rng, L):
    """Costs over many orders of magnitude, sizes of any kind."""
    t = 10 ** rng.uniform(*((-5, 5) if rng.random() < 0.5 else (-1, 1)), L)
    cost = t[:, None] * np.array([0, 1.0, 16, 250])[None] * rng.uniform(0.5, 2, (L, 4))
    number = rng.integers(1, 10**9, L) if rng.random() < 0.5 else rng.integers(1, 6, L) * 10**6
    return cost, number


# ------------------------------------------------------------------------------------------------------------- costs
@pytest.mark.parametrize("rules", RULES)
def test_sizes_count_what_is_quantised(rules):
    params, _ = model(RULES[rules])
    want = sum(COUNT.values()) - (COUNT["k"] if rules == "mixed" else 0)
    for form in (params, unstack_layers(params)):
        np.testing.assert_array_equal(sizes(form, RULES[rules]), [want] * 3)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.slow
def test_a_width_costs_its_distance_from_the_master_times_the_mean_trace(rules):
    params, scales = model(RULES[rules])
    far = distances(RULES[rules])
    rng = np.random.default_rng(2)
    traces = {path: rng.uniform(0.5, 5, 3) for path in far}
    traces["layers/attn/o"][1] = -2.0  # counts as none
    given = {path: jnp.asarray(t, jnp.float32) for path, t in traces.items()}
    want = sum(np.maximum(t, 0)[:, None] / COUNT[path.split("/")[-1]] * far[path] for path, t in traces.items())
    got = cost_of(params, scales, given, WIDTHS, RULES[rules])
    np.testing.assert_allclose(got, want, rtol=1e-4)
    apart = cost_of(unstack_layers(params), unstack_layers(scales), given, WIDTHS, RULES[rules])
    np.testing.assert_allclose(apart, got, rtol=1e-5)
    one = np.array([3.0, -1.0, 0.5])  # a trace for the whole layer
    total = sum(COUNT[path.split("/")[-1]] for path in far)
    want = np.maximum(one, 0)[:, None] / total * sum(far.values())
    got = cost_of(params, scales, jnp.asarray(one, jnp.float32), WIDTHS, RULES[rules])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-12)


def test_weights_in_bfloat16_cost_what_their_float32_copies_do():
    params, scales = model(DEFAULT_RULES)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    traces = jnp.ones(3)
    want = cost_of(jax.tree.map(lambda w: w.astype(jnp.float32), half), scales, traces, WIDTHS, DEFAULT_RULES)
    np.testing.assert_array_equal(cost_of(half, scales, traces, WIDTHS, DEFAULT_RULES), want)


def test_a_plan_is_what_the_model_takes():
    """Bits of a plan are those of the codes it stands for, and each layer is as if it had that width alone."""
    params, scales = model(DEFAULT_RULES)
    cost = cost_of(params, scales, jnp.asarray([1.0, 30.0, 0.01]), WIDTHS, DEFAULT_RULES)
    plan = allocate(cost, sizes(params), WIDTHS, 5 * sizes(params).sum())
    assert plan.bits[1] > plan.bits[0] > plan.bits[2]
    codes = [leaf.shape for leaf in jax.tree.leaves(to_master(params, scales)) if leaf.dtype == jnp.int8]
    assert plan.size == sum(int(b) * np.prod(shape[1:]) for shape in codes for b in plan.bits) <= 5 * 3 * 12288
    mixed = fake_quantise_tree(params, scales, plan.bits)
    for layer, bits in enumerate(plan.bits):
        alone = fake_quantise_tree(params, scales, int(bits))["layers"]["mlp"]["up"][layer]
        np.testing.assert_array_equal(mixed["layers"]["mlp"]["up"][layer], alone)


# -------------------------------------------------------------------------------------------------------- allocation
def test_no_other_plan_is_better():
    rng = np.random.default_rng(0)
    for _ in range(60):
        cost, number = problem(rng, int(rng.integers(1, 6)))
        budget = int(rng.integers(2 * number.sum(), 8 * number.sum() + 1))
        got = allocate(cost, number, WIDTHS, budget)
        best = min((c, b) for c, b, _ in every_plan(cost, number, WIDTHS) if b <= budget)
        assert got.cost == pytest.approx(best[0], rel=1e-9, abs=0)
        assert got.size <= budget
        rows = [WIDTHS.index(b) for b in got.bits]
        assert got.cost == pytest.approx(cost[range(len(cost)), rows].sum())
        assert got.size == (number * got.bits).sum()
        assert got.bits.dtype == np.int32


def test_no_plan_is_over_its_budget_by_a_single_bit():
    """Sizes without a common divisor, and budgets that miss a plan by one bit in a thousand million."""
    number, cost = np.array([10**9, 10**9 + 7, 10**9 + 9]), np.array([[0, 1.0, 8], [0, 1.1, 9], [0, 0.9, 7]])
    plans = list(every_plan(cost, number, (8, 6, 4)))
    for budget in sorted({b - 1 for _, b, _ in plans})[1:]:
        got = allocate(cost, number, (8, 6, 4), budget)
        assert got.size <= budget
        assert got.cost == min(c for c, b, _ in plans if b <= budget)


def test_budgets_at_both_ends_leave_no_choice():
    rng = np.random.default_rng(1)
    for L in (1, 4, 40):
        cost, number = problem(rng, L)
        cost[L // 2] = 0  # a layer to which nothing matters
        most, least = (allocate(cost, number, WIDTHS, b * number.sum()) for b in (8, 2))
        assert (most.bits == 8).all()
        assert (least.bits == 2).all()
        assert most.cost == 0


def test_a_larger_trace_never_gets_fewer_bits():
    """Layers of one size with the same errors: also where the printed objective gives the most sensitive the fewest."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        t = 10 ** rng.uniform(-2, 2, 12)
        cost = t[:, None] * np.array([0, 0.01, 0.2, 3.0])[None]
        bits = allocate(cost, np.full(12, 1000), WIDTHS, int(rng.integers(24, 97)) * 1000).bits
        assert (np.diff(bits[np.argsort(t)]) >= 0).all()
    t = [1.0, 10.0, 100.0]
    mean_of_4 = [p for p in itertools.product(WIDTHS, repeat=3) if sum(p) == 12]
    assert min(mean_of_4, key=lambda p: sum(a * b for a, b in zip(t, p, strict=True))) == (8, 2, 2)
    got = allocate(np.array(t)[:, None] * np.array([0, 0.01, 0.2, 3.0])[None], [1, 1, 1], WIDTHS, 12)
    assert got.bits.tolist() == [2, 4, 6]


def test_more_budget_never_costs_more_and_free_bits_are_taken():
    rng = np.random.default_rng(4)
    cost, number = problem(rng, 8)
    costs = [allocate(cost, number, WIDTHS, b).cost for b in np.linspace(2 * number.sum(), 8 * number.sum(), 30)]
    assert all(b <= a for a, b in itertools.pairwise(costs))
    assert costs[-1] == 0 < costs[0]
    idle = np.array([[0, 0, 0, 0], [0, 1, 10, 100]])
    assert allocate(idle, [5, 5], WIDTHS, 14 * 5).bits.tolist() == [6, 8]


def test_time_is_a_second_budget():
    rng = np.random.default_rng(5)
    for _ in range(20):
        cost, number = problem(rng, 4)
        time = rng.uniform(0.1, 1, (4, 1)) * np.array([[4.0, 3.0, 2.0, 1.2]])
        plans = [(c, b, sum(time[i, j] for i, j in enumerate(p))) for c, b, p in every_plan(cost, number, WIDTHS)]
        budget, latest = rng.uniform(3, 7) * number.sum(), rng.uniform(1.5, 3.5) * time[:, 0].sum() / 4
        got = allocate(cost, number, WIDTHS, budget, latency=time, max_latency=latest)
        assert got.cost == pytest.approx(min(c for c, b, t in plans if b <= budget and t <= latest), rel=1e-9, abs=0)
        assert time[range(4), [WIDTHS.index(b) for b in got.bits]].sum() <= latest


def test_a_limit_that_is_the_sum_of_the_least_is_met_and_none_is_none():
    cost, number, time = np.array([[0, 1.0]] * 3), [10] * 3, np.array([[0.2, 0.1]] * 3)
    got = allocate(cost, number, (8, 4), 240, latency=time, max_latency=0.3)  # 0.1 + 0.1 + 0.1 > 0.3 in floats
    assert got.bits.tolist() == [4, 4, 4]
    assert allocate(cost, number, (8, 4), np.inf).bits.tolist() == [8, 8, 8]


def test_a_plan_takes_the_bits_that_rules_leave_it():
    params, scales = model(MIXED)
    clipped = [min(max(b, 4), 6) for b in WIDTHS]  # of down
    others = sum(COUNT.values()) - COUNT["k"] - COUNT["down"]
    want = [others * b + COUNT["down"] * c for b, c in zip(WIDTHS, clipped, strict=True)]
    for form in (params, unstack_layers(params)):
        np.testing.assert_array_equal(code_bits(form, WIDTHS, MIXED), [want] * 3)
    cost = np.array([[0, 1.0, 4, 9]] * 3)
    used = code_bits(params, WIDTHS, MIXED)
    with pytest.raises(ValueError, match=f"expected at least {3 * want[-1]}, every layer"):
        allocate(cost, used, WIDTHS, 2 * sizes(params, MIXED).sum())
    front = pareto(cost, used, WIDTHS, points=6)
    assert [front[0].size, front[-1].size] == [3 * want[-1], 3 * want[0]]
    for plan in front:
        matrices = jax.tree.leaves(
            switch_bits(unstack_layers(to_master(params, scales, MIXED)), plan.bits, MIXED),
            is_leaf=lambda leaf: isinstance(leaf, QuantisedMatrix),
        )
        served = [m for m in matrices if isinstance(m, QuantisedMatrix)]
        assert plan.size == sum(np.prod(m.shape) * m.bits for m in served)


def test_the_front_is_one_of_all_plans():
    rng = np.random.default_rng(6)
    cost, number = problem(rng, 5)
    front, plans = pareto(cost, number, WIDTHS, points=12), list(every_plan(cost, number, WIDTHS))
    assert (front[0].bits == 2).all()
    assert (front[-1].bits == 8).all()
    assert 5 < len(front) <= 12
    for a, b in itertools.pairwise(front):
        assert a.size < b.size
        assert a.cost > b.cost
    for plan in front:
        assert not any(b <= plan.size and c < plan.cost * (1 - 1e-9) for c, b, _ in plans)
    same = np.zeros((3, 4))
    assert len(pareto(same, [1, 1, 1], WIDTHS)) == 1  # nothing is gained by more


# ------------------------------------------------------------------------------------------------------------ errors
@pytest.mark.errors
def test_budgets_that_nothing_fits_are_refused():
    cost, number = np.array([[0, 1.0], [0, 2.0]]), [10, 20]
    with pytest.raises(ValueError, match="found budget_bits=59; expected at least 60, every layer at its least"):
        allocate(cost, number, (8, 2), 59.9)
    time = np.array([[2.0, 1.0], [2.0, 1.5]])
    with pytest.raises(ValueError, match=r"found max_latency=2\.4; expected at least 2\.5"):
        allocate(cost, number, (8, 2), 240, latency=time, max_latency=2.4)
    with pytest.raises(ValueError, match="no plan within budget_bits and max_latency together"):
        allocate(cost, number, (8, 2), 60, latency=time[:, ::-1], max_latency=2.6)


@pytest.mark.errors
def test_what_does_not_fit_together_is_refused():
    cost, number = np.array([[0, 1.0], [0, 2.0]]), [10, 20]
    for bad in (
        {"cost": cost[0]},
        {"sizes": [10]},
        {"sizes": [[10, 20]]},
        {"widths": (8, 4, 2)},
        {"widths": (8, 8)},
        {"widths": (8, 0)},
    ):
        with pytest.raises(ValueError, match=r"allocate: cost .*, sizes .*, widths .*; expected \[L, W\]"):
            allocate(**{"cost": cost, "sizes": number, "widths": (8, 2), "budget_bits": 240} | bad)
    for bad in ({"cost": cost * np.nan}, {"sizes": [10, 0]}):
        with pytest.raises(ValueError, match="a cost that is not finite or a size below 1"):
            allocate(**{"cost": cost, "sizes": number, "widths": (8, 2), "budget_bits": 240} | bad)
    for one in ({"latency": cost}, {"max_latency": 3.0}):
        with pytest.raises(ValueError, match="one of latency and max_latency; expected both or neither"):
            allocate(cost, number, (8, 2), 240, **one)
    for times in (cost[:1], -cost, np.full((2, 2), np.inf)):
        with pytest.raises(ValueError, match=r"allocate: latency .*; expected numbers from 0 up"):
            allocate(cost, number, (8, 2), 240, latency=times, max_latency=3.0)
    params, scales = model(DEFAULT_RULES)
    with pytest.raises(ValueError, match="perturbation: no trace of layers/attn/k, layers/attn/o"):
        perturbation(params, scales, {"layers/attn/q": jnp.ones(3)}, WIDTHS)
    with pytest.raises(ValueError, match="bit plan: mlp/up in no layer; expected rules that leave it float"):
        sizes({"mlp": {"up": jnp.ones((3, 64))}})
