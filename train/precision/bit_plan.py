"""The best width for every layer under a budget: an integer program over what each width costs in each layer.

    cost_l(b) = mean trace_l ||W_l(b) - W_l(h)||^2          mean trace = tr H_ll / n_l
    min sum_l cost_l(b_l)       such that       sum_l n_l b_l <= budget       and, if wanted, sum_l time_l(b_l) <= T

HAWQ-V2 (1911.03852) has the cost, second order in what quantisation changes; here the change is from the master, which
is what is stored. Double Rounding (2502.01199, algorithm 2) prints sum_l mean trace_l b_l, to be made small: that gives
sensitive layers fewer bits, so it is not used. A trace below 0 is an estimate of a small one and counts as 0.

A layer is one variable: all its quantised matrices have one width, `bits[L]` of models/multi_precision.py, within what
the rules allow each of them. No search needs training.

Letters: L layers, W widths.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Int64
from scipy.optimize import Bounds, LinearConstraint, milp

from ...models.decoder import Params
from ...models.multi_precision import DEFAULT_RULES, QuantRules, fake_quantise_tree, path_name, quantised_paths
from .layers import by_layer, layer_of

SCALE = 1e6  # of the dearest choice: HiGHS stops within an absolute 1e-6 of the optimum, which cannot be set from scipy


class Plan(NamedTuple):
    """One width a layer, and what that costs."""

    bits: Int32[np.ndarray, " L"]  # as `fake_quantise_tree` and `from_master` take them
    cost: float
    size: int  # bits of all codes


# ------------------------------------------------------------------------------------------------------------- costs
def sizes(params: Params, rules: QuantRules = DEFAULT_RULES) -> Int64[np.ndarray, " L"]:
    """How many quantised weights each layer has."""
    return np.sum([*_counts(params, rules).values()], axis=0)


def code_bits(params: Params, widths: Sequence[int], rules: QuantRules = DEFAULT_RULES) -> Int64[np.ndarray, "L W"]:
    """Bits of the codes of each layer at each width; a matrix that rules keep from it has the nearest they allow."""
    chosen, b = quantised_paths(params, rules), np.asarray(widths, np.int64)
    each = [n[:, None] * b.clip(chosen[k].bits[-1], chosen[k].master)[None] for k, n in _counts(params, rules).items()]
    return np.sum(each, axis=0)


def perturbation(
    params: Params,
    scales: Params,
    traces: Float[Array, " L"] | Mapping[str, Float[Array, " L"]],
    widths: Sequence[int],
    rules: QuantRules = DEFAULT_RULES,
) -> Float[Array, "L W"]:
    """What each width costs in each layer, in nats of the loss that the traces are of.

    Args:
      params: the float weights, layers stacked or as a tuple.
      scales: tree of `init_scales`, in the same form.
      traces: `hessian.hessian_trace(...).trace`: of every quantised matrix by its path, or one sum for all quantised
        matrices of a layer. They are sums; what they are means of is known here.
      widths: to choose from. One that rules keep a leaf from counts as the nearest that they allow.
      rules: those of `init_scales`.
    """
    counts = _counts(params, rules)
    if isinstance(traces, Mapping):
        if missing := sorted({*counts} - {*traces}):
            raise ValueError(f"perturbation: no trace of {', '.join(missing)}; expected one for each of {[*counts]}.")
        mean = {name: traces[name] / jnp.asarray(n, jnp.float32) for name, n in counts.items()}
    else:
        mean = dict.fromkeys(counts, traces / jnp.asarray(sizes(params, rules), jnp.float32))
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    master = fake_quantise_tree(wide, scales, 8, rules)

    def cost(bits: Int32[Array, ""]) -> Float[Array, " L"]:
        low = fake_quantise_tree(wide, scales, bits, rules)
        distance = by_layer(jax.tree.map(lambda a, b: (a - b) ** 2, low, master))
        return sum((jnp.maximum(mean[name], 0.0) * distance[name] for name in counts), start=jnp.float32(0)[None])

    return jax.lax.map(cost, jnp.asarray(widths, jnp.int32)).T


# -------------------------------------------------------------------------------------------------------- allocation
def allocate(
    cost: Any,
    sizes: Any,
    widths: Sequence[int],
    budget_bits: float,
    *,
    latency: Any = None,
    max_latency: float | None = None,
) -> Plan:
    """The plan of least cost within the budget, exactly; differences under 1e-12 of the dearest choice are none.

    Where more bits cost nothing and fit, they are taken.

    Args:
      cost: `[L, W]`.
      sizes: integers: weights of each layer, `[L]`, or bits of its codes at each width, `[L, W]` (`code_bits`), which
        differ where rules keep matrices from a width.
      widths: W of them.
      budget_bits: for the codes of all layers; scales and padding are beside it.
      latency: `[L, W]`, of each layer at each width.
      max_latency: of all layers together.

    Raises:
      ValueError: if nothing fits.
    """
    table, number = np.asarray(cost, np.float64), np.asarray(sizes, np.int64)
    times = None if latency is None else np.asarray(latency, np.float64)
    _check(table, number, widths, times, max_latency)
    bits, rows = np.asarray(widths, np.int64), np.arange(len(table))
    used = _bits_at(number, bits)
    limits: list[tuple[str, Any, Any]] = [
        ("budget_bits", used, math.floor(min(budget_bits, used.max(1).sum())))  # more than all is no limit
    ]
    if times is not None and max_latency is not None:
        limits.append(("max_latency", times, float(max_latency)))
    for name, spent, limit in limits:
        if (least := spent.min(1).sum()) > _grant(limit):
            raise ValueError(f"allocate: found {name}={limit}; expected at least {least}, every layer at its least.")
    fits = lambda plan: all(spent[rows, plan].sum() <= _grant(limit) for _, spent, limit in limits)
    plan = _solve(table, limits, fits)
    for layer in range(len(table)):
        for j in np.argsort(-bits):
            higher = np.where(rows == layer, j, plan)
            if bits[j] > bits[plan[layer]] and table[layer, j] <= table[layer, plan[layer]] and fits(higher):
                plan = higher
    return Plan(bits[plan].astype(np.int32), float(table[rows, plan].sum()), int(used[rows, plan].sum()))


def pareto(cost: Any, sizes: Any, widths: Sequence[int], *, points: int = 16) -> list[Plan]:
    """Plans for `points` budgets from the smallest width to the largest, without those that cost what smaller ones do.

    They come by rising size and falling cost.
    """
    used = _bits_at(np.asarray(sizes, np.int64), np.asarray(widths, np.int64))
    plans: list[Plan] = []
    for budget in np.linspace(used.min(1).sum(), used.max(1).sum(), points):
        plan = allocate(cost, sizes, widths, round(budget))
        if not plans or plan.cost < plans[-1].cost:
            plans.append(plan)
    return plans


# ----------------------------------------------------------------------------------------------------------- private
def _bits_at(number: Int64[np.ndarray, "..."], widths: Int64[np.ndarray, " W"]) -> Int64[np.ndarray, "L W"]:
    return number if number.ndim == 2 else number[:, None] * widths[None]


def _counts(params: Params, rules: QuantRules) -> dict[str, Int64[np.ndarray, " L"]]:
    """Path -> how many weights each layer has there."""
    chosen = quantised_paths(params, rules)
    if outside := [name for name in chosen if not name.startswith("layers/")]:
        raise ValueError(f"bit plan: {', '.join(outside)} in no layer; expected rules that leave it float.")
    counts: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if (name := path_name(path)) not in chosen:
            continue
        if layer_of(path) is None:
            counts[name] = np.full(leaf.shape[0], leaf.size // leaf.shape[0], np.int64)
        else:
            counts.setdefault(name, np.zeros(len(params["layers"]), np.int64))[layer_of(path)] += leaf.size
    return counts


def _grant(limit: float) -> float:
    """Bits are counted exactly; sums of times are rounded."""
    return limit if isinstance(limit, int) else limit * (1 + 1e-9)


def _solve(table: Any, limits: list[tuple[str, Any, Any]], fits: Callable[[Any], bool]) -> Any:
    """Index of the width of each layer."""
    L, W = table.shape
    regret = table - table.min(1, keepdims=True)
    regret = regret * (SCALE / regret.max()) if regret.max() > 0 else regret
    within = [LinearConstraint(np.kron(np.eye(L), np.ones(W)), 1, 1)]  # one width each
    for _, spent, limit in limits:
        unit = spent.max() or 1.0
        within.append(LinearConstraint((spent / unit).reshape(1, -1), -np.inf, limit / unit))
    while True:
        found = milp(
            regret.ravel(), integrality=np.ones(L * W), bounds=Bounds(0, 1), constraints=within,
            options={"mip_rel_gap": 0.0},
        )  # fmt: skip
        if found.x is None:
            raise ValueError(f"allocate: no plan within budget_bits and max_latency together. {found.message}")
        plan = found.x.reshape(L, W).argmax(1)
        if fits(plan):
            return plan
        # HiGHS lets a row be exceeded by some 1e-6 of its largest number: refuse this plan and no other.
        within.append(LinearConstraint(np.eye(W)[plan].reshape(1, -1), -np.inf, L - 1))


def _check(table: Any, number: Any, widths: Sequence[int], times: Any, max_latency: float | None) -> None:
    W = len(widths)
    fits = number.shape in (table.shape[:1], table.shape)
    if table.ndim != 2 or table.shape[1] != W or not fits or not W or len({*widths}) != W or min(widths) < 1:
        found = f"cost {table.shape}, sizes {number.shape}, widths {tuple(widths)}"
        raise ValueError(f"allocate: {found}; expected [L, W], [L] or [L, W], and W, each once.")
    if not np.isfinite(table).all() or (number < 1).any():
        raise ValueError("allocate: found a cost that is not finite or a size below 1; expected neither.")
    if (times is None) != (max_latency is None):
        raise ValueError("allocate: found one of latency and max_latency; expected both or neither.")
    if times is not None and (times.shape != table.shape or not np.isfinite(times).all() or (times < 0).any()):
        raise ValueError(f"allocate: latency {times.shape}; expected numbers from 0 up, {table.shape} as the costs.")
