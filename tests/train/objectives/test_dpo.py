"""Oracles: float64 NumPy with gradients in closed form, rows worked out by hand, and losses that TRL printed."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.objectives.dpo import (
    LOSSES,
    PUBLISHED,
    SCORES,
    DpoConfig,
    dpo,
    ld_sum,
    score,
    sppo_soft,
    wpo_weight,
)
from jaxaroo.train.objectives.preference import Sums, log_ratio

LN2 = math.log(2)
RANKED = ("aot", "aot_unpaired")
ROWS = [name for name in LOSSES if name not in RANKED]
S = lambda u: np.exp(-np.logaddexp(0, -np.asarray(u, np.float64)))
sp = lambda u: np.logaddexp(0, np.asarray(u, np.float64))


def sums(policy, reference, tokens):
    return Sums(*(jnp.asarray(x, jnp.float32) for x in (policy, reference, tokens)))


def sums_of(r_w, r_l):
    """One token a completion and a reference of 0: the policy's sums are the log-ratios."""
    r_w, r_l = np.asarray(r_w), np.asarray(r_l)
    return sums(r_w, 0 * r_w, np.ones_like(r_w)), sums(r_l, 0 * r_l, np.ones_like(r_l))


def config(name, **more):
    """The numbers of section 11, but for what a loss does not read."""
    eps = {"exo_pair": 1e-3}.get(name, 0.1)
    return DpoConfig(losses=((name, 1.0),), **{"eps": eps, **more})


@functools.partial(jax.jit, static_argnums=(0, 3))
def _both(name, w, l, cfg):
    def total(p_w, p_l):
        each = LOSSES[name](w._replace(policy=p_w), l._replace(policy=p_l), cfg)
        return jnp.sum(each), each

    (g_w, g_l), each = jax.grad(total, argnums=(0, 1), has_aux=True)(w.policy, l.policy)
    return each, g_w, g_l


def both(name, chosen, rejected, cfg):
    """Loss a pair and its gradients in float64, so that what compares them computes in it."""
    return [np.asarray(x, np.float64) for x in _both(name, chosen, rejected, cfg)]


def draw(seed, n=64):
    rng = np.random.default_rng(seed)
    side = lambda: sums(-rng.uniform(5, 60, n), -rng.uniform(5, 60, n), rng.integers(1, 30, n))
    return side(), side()


def table(name, w, l, cfg):
    """Section 4 in float64: loss, g_w, g_l of every pair."""
    (p_w, f_w, n_w), (p_l, f_l, n_l) = (tuple(np.asarray(x, np.float64) for x in side) for side in (w, l))
    b, eps, tau = cfg.beta, cfg.eps, cfg.tau
    r_w, r_l = p_w - f_w, p_l - f_l
    x, d = b * (r_w - r_l), r_w / n_w - r_l / n_l
    sd = lambda u: S(u) * S(-u)
    m, h = S(x / tau), 1 / (2 * b)
    e = np.exp(-np.maximum(x, -600))  # where this is cut, m is 0 in any case
    opposite = lambda value, g: (value, g, -g)
    rows = {
        "sigmoid": lambda: opposite(sp(-x), -b * S(-x)),
        "cdpo": lambda: opposite((1 - eps) * sp(-x) + eps * sp(x), b * (eps - S(-x))),
        "robust": lambda: opposite(
            ((1 - eps) * sp(-x) - eps * sp(x)) / (1 - 2 * eps), -b * (S(-x) + eps / (1 - 2 * eps))
        ),
        "hinge": lambda: opposite(np.maximum(0, 1 - x), np.where(x < 1, -b, 0.0)),
        "ipo": lambda: ((d - h) ** 2, 2 * (d - h) / n_w, -2 * (d - h) / n_l),
        "ipo_sum": lambda: opposite((r_w - r_l - h) ** 2, 2 * (r_w - r_l - h)),
        "exo_pair": lambda: opposite(
            S(x) * (-sp(-x) - np.log(1 - eps)) + S(-x) * (-sp(x) - np.log(eps)),
            b * sd(x) * (x - np.log((1 - eps) / eps)),
        ),
        "nca_pair": lambda: (
            sp(-b * r_w) + sp(b * r_w) / 2 + sp(b * r_l) / 2,
            b * (S(b * r_w) / 2 - S(-b * r_w)),
            b * S(b * r_l) / 2,
        ),
        "bco_pair": lambda: (sp(-b * r_w) + sp(b * r_l), -b * S(-b * r_w), b * S(b * r_l)),
        "sppo_hard": lambda: ((r_w - h) ** 2 + (r_l + h) ** 2, 2 * (r_w - h), 2 * (r_l + h)),
        "apo_zero": lambda: (1 - S(b * r_w) + S(b * r_l), -b * sd(b * r_w), b * sd(b * r_l)),
        "apo_down": lambda: (S(b * r_w) + 1 - S(x), b * (sd(b * r_w) - sd(x)), b * sd(x)),
        "discopop": lambda: opposite(
            (1 - m) * sp(-x) + m * e, b * (-(1 - m) * S(-x) - m * e + m * (1 - m) / tau * (e - sp(-x)))
        ),
        "sigmoid_norm": lambda: (sp(-b * d), -b * S(-b * d) / n_w, b * S(-b * d) / n_l),
    }
    return rows[name]()


WORKED = {  # loss, g_w, g_l at beta 0.1, P -12 and -15, F -13 and -14.5, 8 and 10 tokens; eps and tau as above
    "sigmoid": (0.620957, -0.046257, 0.046257),
    "cdpo": (0.635957, -0.036257, 0.036257),
    "robust": (0.602207, -0.058757, 0.058757),
    "hinge": (0.850000, -0.100000, 0.100000),
    "ipo": (23.280625, -1.206250, 0.965000),
    "ipo_sum": (12.250000, -7.000000, 7.000000),
    "exo_pair": (2.505517, -0.167972, 0.167972),
    "nca_pair": (1.350825, -0.021253, 0.024375),
    "bco_pair": (1.312856, -0.047502, 0.048750),
    "sppo_hard": (36.250000, -8.000000, 9.000000),
    "apo_zero": (0.962523, -0.024938, 0.024984),
    "apo_down": (0.987549, 0.000078, 0.024860),
    "discopop": (0.849338, -0.062520, 0.062520),
    "sigmoid_norm": (0.684435, -0.006195, 0.004956),
    "js_divergence": (0.660652, -0.013003, 0.030095),
    "forward_kl": (0.631154, -0.017218, 0.077164),
    "alpha_divergence": (0.627691, -0.028275, 0.059858),
}
PAIR = sums([-12.0], [-13.0], [8.0]), sums([-15.0], [-14.5], [10.0])


@pytest.mark.parametrize("row", WORKED)
def test_worked_rows_to_their_printed_digits(row):
    name, more = ("sigmoid", {"f": row}) if row in SCORES else (row, {})
    found = [float(x[0]) for x in both(name, *PAIR, config(name, **more))]
    np.testing.assert_allclose(found, WORKED[row], rtol=3e-7, atol=5.1e-7)  # half a unit of the sixth digit


@pytest.mark.parametrize("name", ROWS)
def test_values_and_gradients_are_those_of_the_table(name):
    for seed, more in ((0, {}), (1, {"beta": 0.7, "eps": 0.3, "tau": 0.6})):
        pairs, cfg = draw(seed), config(name, **more)
        for got, wanted, what in zip(
            both(name, *pairs, cfg), table(name, *pairs, cfg), ("loss", "g_w", "g_l"), strict=True
        ):
            # Sums carry about 4e-6 of their own rounding; cancelling parts are held to the size of the gradient.
            np.testing.assert_allclose(got, wanted, rtol=3e-5, atol=3e-6 * np.abs(wanted).max(), err_msg=what)


@pytest.mark.parametrize("name", [*ROWS, *RANKED])
def test_where_the_policy_is_the_reference(name):
    cfg = config(name, beta=0.3)
    _, pairs = draw(3)
    same = pairs._replace(reference=pairs.policy)
    b, eps = cfg.beta, cfg.eps
    expected = {
        "hinge": 1.0,
        "ipo": 1 / (4 * b**2),
        "ipo_sum": 1 / (4 * b**2),
        "exo_pair": -LN2 - math.log((1 - eps) * eps) / 2,
        "nca_pair": 2 * LN2,
        "bco_pair": 2 * LN2,
        "sppo_hard": 1 / (2 * b**2),
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "discopop": (LN2 + 1) / 2,
    }.get(name, LN2)
    loss, _, _ = both(name, same, same._replace(policy=same.policy - 3, reference=same.reference - 3), cfg)
    np.testing.assert_allclose(loss, np.full(64, expected), rtol=1e-6)
    _, metrics = dpo(same, same, cfg)
    for metric in ("chosen", "rejected", "margins", "accuracies"):
        np.testing.assert_array_equal(metrics[f"rewards/{metric}"], np.zeros(64))


def test_swapping_the_sides_negates_the_margin_and_costs_minus_x():
    w, l = draw(4)
    cfg = DpoConfig(beta=0.3)
    there, back = dpo(w, l, cfg), dpo(l, w, cfg)
    np.testing.assert_array_equal(there[1]["rewards/margins"], -back[1]["rewards/margins"])
    x = 0.3 * np.asarray(log_ratio(w) - log_ratio(l), np.float64)
    np.testing.assert_allclose(there[0]["sigmoid"] - back[0]["sigmoid"], -x, rtol=1e-5, atol=1e-5)


def test_losses_that_become_the_logistic_one():
    w, l = draw(5)
    plain = both("sigmoid", w, l, DpoConfig())
    for name in ("cdpo", "robust"):
        for got, wanted in zip(both(name, w, l, DpoConfig()), plain, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-6, err_msg=name)
    one = w._replace(tokens=jnp.ones(64)), l._replace(tokens=jnp.ones(64))
    for got, wanted in zip(both("sigmoid_norm", *one, DpoConfig()), plain, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
    first = [Sums(*(x[:1] for x in side)) for side in (w, l)]
    for name in RANKED:
        for got, wanted in zip(both(name, *first, DpoConfig()), plain, strict=True):
            np.testing.assert_allclose(got, wanted[:1], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("eps", [0.05, 0.2, 0.45])
def test_robust_is_unbiased_over_flipped_labels(eps):
    w, l = sums_of(np.linspace(-40, 40, 64), np.zeros(64))
    cfg = config("robust", eps=eps)
    mean = (1 - eps) * both("robust", w, l, cfg)[0] + eps * both("robust", l, w, cfg)[0]
    np.testing.assert_allclose(mean, both("sigmoid", w, l, cfg)[0], rtol=1e-5, atol=2e-6)


def test_where_gradients_vanish():
    for name, more, w, l in (
        ("ipo", {"beta": 0.2}, 5.0, 2.5),
        ("ipo_sum", {"beta": 0.2}, 5.0, 2.5),
        ("sppo_hard", {"beta": 0.2}, 2.5, -2.5),
        ("exo_pair", {"beta": 0.5, "eps": 0.2}, 2 * math.log(4), 0.0),
        ("cdpo", {"beta": 0.5, "eps": 0.2}, 2 * math.log(4), 0.0),
    ):
        for g in both(name, *sums_of([w], [l]), config(name, **more))[1:]:
            np.testing.assert_allclose(g, [0.0], atol=1e-7, err_msg=name)


def test_which_losses_see_the_other_side_and_which_a_common_shift():
    w, l = draw(6)
    shifted = [side._replace(policy=side.policy + 2.0) for side in (w, l)]
    for name in ("nca_pair", "bco_pair"):
        np.testing.assert_array_equal(both(name, w, l, DpoConfig())[1], both(name, w, shifted[1], DpoConfig())[1])
        np.testing.assert_array_equal(both(name, w, l, DpoConfig())[2], both(name, shifted[0], l, DpoConfig())[2])
    moved = lambda name: np.abs(both(name, *shifted, DpoConfig())[0] - both(name, w, l, DpoConfig())[0]).max()
    assert moved("sigmoid") < 1e-5
    for name in ("nca_pair", "bco_pair", "apo_zero", "apo_down", "sppo_hard"):
        assert moved(name) > 1e-3, name


def test_no_gradient_reaches_references_or_lengths():
    w, l = draw(7)
    for name in LOSSES:
        grads = jax.grad(lambda w, l, name=name: jnp.sum(LOSSES[name](w, l, config(name))), argnums=(0, 1))(w, l)
        for side in grads:
            np.testing.assert_array_equal(side.reference, np.zeros(64), err_msg=name)
            assert np.abs(side.policy).max() > 0, name


@pytest.mark.parametrize("f", SCORES)
@pytest.mark.slow
def test_far_from_the_reference_everything_stays_finite(f):
    far = np.array([-1e5, -1e4, -100.0, 0.0, 100.0, 1e4, 1e5])  # x from -1e4 to 1e4 and beyond at beta 0.1
    w, l = sums_of(*(g.ravel() for g in np.meshgrid(far, far)))
    for name in LOSSES:
        exponential = f in ("forward_kl", "alpha_divergence") and name in ("ipo", "ipo_sum")
        cfg = config(name, f=f, max_exponent=40.0 if exponential else 80.0)
        for what, values in zip(("loss", "g_w", "g_l"), both(name, w, l, cfg), strict=True):
            assert np.isfinite(values).all(), (name, what)
            assert np.isfinite(np.float32(values)).all(), (name, what)


@pytest.mark.parametrize("name", [n for n in ROWS if n not in ("ipo", "ipo_sum", "sppo_hard")])
def test_far_pairs_cost_what_float64_says(name):
    far = np.array([-1e5, -3e3, -400.0, 400.0, 3e3, 1e5])
    w, l = sums_of(*(g.ravel() for g in np.meshgrid(far, far)))
    cfg = config(name)
    for got, wanted in zip(both(name, w, l, cfg), table(name, w, l, cfg), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_scores_and_their_slopes():
    r = np.linspace(-8, 8, 65)
    for f, more, value, slope in (
        ("reverse_kl", {}, r, np.ones_like(r)),
        ("forward_kl", {}, 1 - np.exp(-r), np.exp(-r)),
        ("js_divergence", {}, LN2 + np.log(S(r)), S(-r)),
        ("alpha_divergence", {}, (np.exp(-0.5 * r) - 1) / -0.5, np.exp(-0.5 * r)),
        ("alpha_divergence", {"alpha": 1.7}, (np.exp(0.7 * r) - 1) / 0.7, np.exp(0.7 * r)),
        ("alpha_divergence", {"alpha": 1.0}, r, np.ones_like(r)),
    ):
        cfg = DpoConfig(f=f, **more)
        got, grad = score(jnp.asarray(r, jnp.float32), cfg), jax.grad(lambda r, c=cfg: jnp.sum(score(r, c)))
        np.testing.assert_allclose(got, value, rtol=2e-6, atol=1e-6, err_msg=f)
        np.testing.assert_allclose(grad(jnp.asarray(r, jnp.float32)), slope, rtol=2e-6, atol=1e-7, err_msg=f)
    cut = score(jnp.asarray([-80.0, -90.0, -1e4]), DpoConfig(f="forward_kl"))
    np.testing.assert_allclose(cut, np.full(3, -np.exp(80.0)), rtol=1e-5)
    cut = score(jnp.asarray([-24.0, -1e4]), DpoConfig(f="alpha_divergence", max_exponent=11.0))
    np.testing.assert_allclose(cut, np.full(2, -2 * np.expm1(11.0)), rtol=1e-5)


def test_scores_keep_their_constants_where_lengths_differ_and_do_not_reach_the_others():
    w, l = draw(8, 8)
    cfg = DpoConfig(f="js_divergence")
    s = [LN2 + np.log(S(np.asarray(log_ratio(side), np.float64))) for side in (w, l)]
    d = s[0] / np.asarray(w.tokens) - s[1] / np.asarray(l.tokens)
    np.testing.assert_allclose(both("ipo", w, l, cfg)[0], (d - 5) ** 2, rtol=1e-5)
    np.testing.assert_allclose(both("sigmoid_norm", w, l, cfg)[0], sp(-0.1 * d), rtol=1e-5)
    for name in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", *RANKED):
        np.testing.assert_array_equal(both(name, w, l, cfg)[0], both(name, w, l, DpoConfig())[0])


# -------------------------------------------------------------------------------------------------------------- ranks
def ranked(name, w, l, cfg, keep):
    """Loops in float64: sort, subtract, and give each loss to the pair whose value has the rank."""
    (p_w, f_w, _), (p_l, f_l, _) = (tuple(np.asarray(x, np.float64) for x in side) for side in (w, l))
    a, b = (p_w - p_l, f_w - f_l) if name == "aot" else (p_w - f_w, p_l - f_l)
    pairs = [i for i in range(len(a)) if keep[i]]
    loss, slope = np.zeros(len(a)), np.zeros(len(a))
    other = np.zeros(len(a))
    by_a, by_b = sorted(pairs, key=lambda i: a[i]), sorted(pairs, key=lambda i: b[i])
    for i, j in zip(by_a, by_b, strict=True):
        x = cfg.beta * (a[i] - b[j])
        loss[i] = (1 - cfg.eps) * sp(-x) + cfg.eps * sp(x)
        slope[i] = cfg.beta * (cfg.eps - S(-x))
        other[i if name == "aot" else j] = -slope[i]
    return loss, slope, other


@pytest.mark.parametrize("name", RANKED)
def test_ranked_losses_are_those_of_a_loop_and_padding_stays_out(name):
    w, l = draw(9, 24)
    cfg = DpoConfig(losses=((name, 1.0),), eps=0.1, beta=0.05)
    everything = np.ones(24, bool)
    for got, wanted in zip(both(name, w, l, cfg), ranked(name, w, l, cfg, everything), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-7)
    keep = np.random.default_rng(1).random(24) < 0.6

    def total(p_w, p_l):
        losses, _ = dpo(w._replace(policy=p_w), l._replace(policy=p_l), cfg, counted=jnp.asarray(keep))
        return jnp.sum(jnp.where(jnp.asarray(keep), losses[name], 0.0)), losses[name]

    (g_w, g_l), each = jax.grad(total, argnums=(0, 1), has_aux=True)(w.policy, l.policy)
    for got, wanted in zip((each, g_w, g_l), ranked(name, w, l, cfg, keep), strict=True):
        got = np.where(keep, np.asarray(got, np.float64), np.asarray(got, np.float64) * (got is not each))
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-7)
    assert np.isfinite(np.asarray(each)).all()


# ------------------------------------------------------------------------------------------------ lists and options
def test_a_list_is_weighted_name_by_name_and_sft_is_minus_the_sum():
    w, l = draw(10)
    mixed, _ = dpo(w, l, DpoConfig(losses=(("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 0.5))))
    assert list(mixed) == ["sigmoid", "bco_pair", "sft"]
    np.testing.assert_allclose(mixed["sigmoid"], 0.8 * both("sigmoid", w, l, DpoConfig())[0], rtol=1e-6)
    np.testing.assert_allclose(mixed["bco_pair"], 0.2 * both("bco_pair", w, l, DpoConfig())[0], rtol=1e-6)
    np.testing.assert_array_equal(mixed["sft"], -0.5 * w.policy)


def test_rewards_are_of_log_ratios_even_if_a_score_drives_the_loss():
    w, l = draw(11)
    _, metrics = dpo(w, l, DpoConfig(f="forward_kl", beta=0.2))
    np.testing.assert_allclose(metrics["rewards/chosen"], 0.2 * log_ratio(w), rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/rejected"], 0.2 * log_ratio(l), rtol=1e-6)


def test_a_judge_moves_the_targets_of_sppo():
    w, l = draw(12)
    win = np.random.default_rng(2).random(64).astype(np.float32)
    cfg = DpoConfig(losses=(("sppo_soft", 1.0),), beta=0.2)
    r_w, r_l = (np.asarray(log_ratio(side), np.float64) for side in (w, l))
    expected = (r_w - (win - 0.5) / 0.2) ** 2 + (r_l - ((1 - win) - 0.5) / 0.2) ** 2
    np.testing.assert_allclose(dpo(w, l, cfg, win=jnp.asarray(win))[0]["sppo_soft"], expected, rtol=1e-5)
    np.testing.assert_allclose(sppo_soft(w, l, jnp.ones(64), cfg), both("sppo_hard", w, l, cfg)[0], rtol=1e-6)
    assert not jax.grad(lambda p: jnp.sum(sppo_soft(w, l, p, cfg)))(jnp.asarray(win)).any()


def test_wpo_weighs_pairs_without_a_gradient_of_its_own():
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(2, 8, 5, 11)).astype(np.float64)  # side, pair, token, vocabulary
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    taken = np.take_along_axis(logp, rng.integers(0, 11, (2, 8, 5, 1)), -1)[..., 0]
    certainty = (taken - np.log((np.exp(logp) ** 2).sum(-1))).mean(-1)
    expected = np.array([math.prod(math.exp(certainty[side, i]) for side in (0, 1)) for i in range(8)])
    c = tuple(jnp.asarray(certainty, jnp.float32))
    np.testing.assert_allclose(wpo_weight(*c), expected, rtol=1e-5)
    assert expected.min() < 0.1 < expected.max()
    capped = wpo_weight(*c, DpoConfig(wpo_cap=0.1))
    np.testing.assert_allclose(capped, np.minimum(expected, 0.1), rtol=1e-5)

    w, l = draw(13, 8)
    cfg = DpoConfig(losses=(("hinge", 0.5), ("sft", 1.0)), wpo=True)
    losses, _ = dpo(w, l, cfg, certainty=(c[0], c[1]))
    np.testing.assert_allclose(losses["hinge"], 0.5 * expected * both("hinge", w, l, cfg)[0], rtol=1e-5)
    np.testing.assert_array_equal(losses["sft"], -w.policy)
    assert not jax.grad(lambda a: jnp.sum(dpo(w, l, cfg, certainty=(a, a))[0]["hinge"]))(c[0]).any()


def test_ld_sum_is_a_loop_over_tokens():
    rng = np.random.default_rng(4)
    logp = -rng.random((6, 9)).astype(np.float32)
    own, other = rng.integers(1, 10, 6), rng.integers(1, 10, 6)
    expected = []
    for i in range(6):
        total = 0.0
        for t in range(own[i]):
            total += float(logp[i, t]) * (1.0 if t < other[i] else 0.3)
        expected.append(total)
    spoilt = np.where(np.arange(9)[None] < own[:, None], logp, np.nan).astype(np.float32)
    value = lambda x, alpha: ld_sum(x, jnp.asarray(own), jnp.asarray(other), alpha)
    np.testing.assert_allclose(value(jnp.asarray(spoilt), 0.3), expected, rtol=1e-6)
    whole = [logp[i, : own[i]].sum() for i in range(6)]
    np.testing.assert_allclose(value(jnp.asarray(logp), 1.0), whole, rtol=1e-6)
    grad = np.asarray(jax.grad(lambda x: jnp.sum(value(x, 0.3)))(jnp.asarray(spoilt)))
    np.testing.assert_allclose((grad * logp).sum(1), expected, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------- against TRL
def test_losses_that_trl_printed(shared):
    found = np.load(shared / "goldens" / "trl_dpo.npz")
    n = found["completion_mask"].sum(1)
    sides = [sums(found["policy_logps"][i], found["reference_logps"][i], n[i]) for i in (slice(0, 4), slice(4, 8))]
    settings, compared = json.loads(str(found["settings"])), 0
    for row, s in settings.items():
        if s["wpo"]:
            continue  # needs log sum p^2, which is not stored
        cfg = DpoConfig(
            losses=tuple((name, 1.0) for name in s["names"]),
            beta=s["beta"],
            eps=s["label_smoothing"],
            tau=s["discopop_tau"],
            f=s["f_divergence"],
            alpha=s["alpha"],
        )
        losses, metrics = dpo(*sides, cfg)
        count = {"sft": n[:4].sum()}
        loss = sum(float(jnp.sum(value)) / count.get(name, 4) for name, value in losses.items())
        assert loss == pytest.approx(float(found[f"loss_{row}"]), rel=3e-5), row
        compared += 1
        if row == "sigmoid":
            for name in ("chosen", "rejected", "accuracies", "margins"):
                mean = float(jnp.mean(metrics[f"rewards/{name}"]))
                assert mean == pytest.approx(float(found[f"rewards_{name}"]), rel=1e-4), name
    assert compared == 19


# ------------------------------------------------------------------------------------------------------------- settings
def test_published_settings_are_known_losses():
    assert {name for p in PUBLISHED.values() for name, _ in p.config.losses} <= {*LOSSES, "sft"}
    assert PUBLISHED["EXO"].config.eps == 1e-3
    assert PUBLISHED["MPO"].config.losses == (("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0))


@pytest.mark.errors
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"losses": ()}, "found none"),
        ({"losses": (("sigmod", 1.0),)}, r"found 'sigmod'; .* Is 'sigmoid' meant\?"),
        ({"losses": (("sigmoid", -1.0),)}, "weight of sigmoid: found -1.0"),
        ({"losses": (("sigmoid", 1.0), ("sigmoid", 0.5))}, "every name once"),
        ({"beta": 0.0}, "expected a positive number"),
        ({"beta": 2.0}, "allow_large_beta"),
        ({"beta": 2.0, "losses": (("sigmoid_norm", 1.0), ("hinge", 1.0))}, "allow_large_beta"),
        ({"eps": 0.5}, "0 <= eps < 0.5"),
        ({"eps": -0.1}, "0 <= eps < 0.5"),
        ({"losses": (("exo_pair", 1.0),)}, "found 0 with exo_pair"),
        ({"tau": 0.0}, "0 < tau <= 1"),
        ({"tau": 1.5}, "0 < tau <= 1"),
        ({"f": "forward"}, "Is 'forward_kl' meant"),
        ({"alpha": math.nan}, "a finite number"),
        ({"max_exponent": 81.0}, "max_exponent <= 80"),
        ({"f": "forward_kl", "losses": (("ipo", 1.0),)}, "at most 40"),
        ({"ld_alpha": 1.5}, "0 <= ld_alpha <= 1"),
        ({"wpo": True, "losses": (("aot", 1.0),)}, "sorts pairs apart"),
        ({"wpo_cap": 0.0}, "a positive number"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DpoConfig(**settings)


@pytest.mark.errors
def test_columns_that_a_loss_needs_and_those_it_ignores_are_asked_for():
    w, l = draw(14, 8)
    DpoConfig(beta=2.0, losses=(("sigmoid_norm", 1.0), ("sft", 1.0))), DpoConfig(beta=2.0, allow_large_beta=True)
    with pytest.raises(ValueError, match="sppo_soft without `win`"):
        dpo(w, l, DpoConfig(losses=(("sppo_soft", 1.0),)))
    with pytest.raises(ValueError, match="or the reverse"):
        dpo(w, l, DpoConfig(), win=jnp.ones(8))
    with pytest.raises(ValueError, match="wpo without `certainty`"):
        dpo(w, l, DpoConfig(wpo=True))
    with pytest.raises(ValueError, match="or the reverse"):
        dpo(w, l, DpoConfig(), certainty=(jnp.ones(8), jnp.ones(8)))
    with pytest.raises(ValueError, match="without a reference"):
        dpo(w._replace(reference=None), l, DpoConfig())
