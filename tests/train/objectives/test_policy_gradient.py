"""Oracles: losses and gradients by loops in float64, token by token, answer by answer; then what must not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaroo.train.data.pipeline import Batch
from jaxaroo.train.objectives.logprobs import Scores
from jaxaroo.train.objectives.policy_gradient import (
    PolicyGradientConfig,
    Rollout,
    aggregate,
    count_units,
    policy_gradient,
    sequence_mean,
    surrogate_loss,
)
from jaxaroo.train.state import init_state
from jaxaroo.train.step import make_train_step

B, T = 8, 6
RNG = np.random.default_rng(1)
LENGTHS = np.array([[6, 0], [3, 3], [1, 4], [5, 0], [2, 2], [4, 0], [1, 1], [3, 2]])  # of the answers of each row
SEGMENTS = np.array([[1] * a + [2] * b + [0] * (T - a - b) for a, b in LENGTHS], np.int32)
MASK = SEGMENTS > 0
MASK[0, :2] = MASK[2, 1] = MASK[5, 3] = MASK[7, 0] = False  # prompts, and the end of an answer
MASK[3] = False  # an answer all of whose tokens are left out
WEIGHTS = (MASK * np.array([1.0, 0.5, 1, 1, 2, 1, 1, 1])[:, None]).astype(np.float32)
LOGP = -np.abs(RNG.normal(size=(B, T)))
OLD = LOGP - RNG.normal(size=(B, T)) * 0.4
REF = LOGP - RNG.normal(size=(B, T)) * 0.4
ENTROPY = np.abs(RNG.normal(size=(B, T)))
PER_ANSWER = np.take_along_axis(RNG.normal(size=(B, 3)), SEGMENTS, 1)
PER_TOKEN = RNG.normal(size=(B, T))
JUNK = np.where(MASK, 0, np.nan)  # outside the mask
f32 = lambda x: jnp.asarray(x, jnp.float32)


def batch():
    ints = jnp.asarray(SEGMENTS)
    return Batch(ints, ints, ints, ints, jnp.asarray(MASK), f32(WEIGHTS))


def rollout(advantages=PER_TOKEN, old=OLD, ref=REF):
    return Rollout(batch(), f32(advantages + JUNK), None if old is None else f32(old + JUNK), f32(ref + JUNK))


def answers():
    """The tokens of each answer that count; an answer may have none."""
    return [
        [(b, t) for t in range(T) if SEGMENTS[b, t] == n and MASK[b, t]]
        for b in range(B)
        for n in (1, 2)
        if (SEGMENTS[b] == n).any()
    ]


def oracle(logp, cfg, advantages=PER_TOKEN, frozen=None, micro=1):
    """The whole loss in float64; `frozen` is where log pi stands in what takes no gradient."""
    frozen = logp if frozen is None else frozen
    micro_tokens = MASK.reshape(micro, -1).sum(1)
    total = 0.0
    for answer in answers():
        for at in answer:
            own = lambda x, at=at, answer=answer: (
                np.exp(np.mean([x[a] - OLD[a] for a in answer])) if cfg.ratio == "sequence" else np.exp(x[at] - OLD[at])
            )
            A, rho = advantages[at], own(logp)
            if cfg.surrogate == "cispo":
                value = -min(own(frozen), cfg.cap) * A * logp[at]
            else:
                free = rho if cfg.dual_clip is None else min(rho, cfg.dual_clip)
                value = -min(free * A, min(max(rho, 1 - cfg.clip_low), 1 + cfg.clip_high) * A)
            if cfg.kl_weight:
                d = logp[at] - REF[at]
                k3 = np.exp(-d) - 1 + d
                value += (
                    cfg.kl_weight * {"k2": d**2 / 2, "k3": k3, "k3_corrected": np.exp(logp[at] - OLD[at]) * k3}[cfg.kl]
                )
            divisor = {
                "grpo": len(answer) * len(answers()),
                "dr_grpo": len(answers()) * (cfg.max_length or 0),
                "dapo": MASK.sum(),
                "bnpo": micro_tokens[at[0] * micro // B] * micro,
            }[cfg.aggregation]
            total += WEIGHTS[at] * value / divisor
    return total


def numeric(cfg, advantages=PER_TOKEN, micro=1):
    """The gradient on every log-probability."""
    out = np.zeros((B, T))
    for at in zip(*np.nonzero(MASK), strict=True):
        d = np.zeros((B, T))
        d[at] = 1e-6
        f = lambda x: oracle(x, cfg, advantages, LOGP, micro)
        out[at] = (f(LOGP + d) - f(LOGP - d)) / 2e-6
    return out


def total(terms, units):
    keep = lambda term: jnp.where(term.weight != 0, term.value, 0.0)
    return {name: jnp.sum(keep(t) * t.weight) / units[t.unit] for name, t in terms.items()}


@functools.partial(jax.jit, static_argnames="cfg")
def measured(logp, data, cfg):
    """Loss, its gradient, and the metrics of one micro-batch that is the whole window."""
    units = {name: n.astype(jnp.float32) for name, n in count_units(jax.tree.map(lambda x: x[None], data)).items()}

    def loss(logp):
        terms, metrics = policy_gradient(Scores(logp, f32(ENTROPY + JUNK), jnp.zeros((B, T, 1))), data, cfg)
        parts = total(terms, units)
        return sum(parts.values()), parts | total(metrics, units)

    (value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(logp)
    return value, gradient, parts


def compare(cfg, advantages=PER_TOKEN):
    value, gradient, _ = measured(f32(LOGP + JUNK), rollout(advantages), cfg)
    assert float(value) == pytest.approx(oracle(LOGP, cfg, advantages), rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, numeric(cfg, advantages), rtol=1e-4, atol=1e-6)


SETTINGS = {
    "ppo": dict(),
    "dapo": dict(clip_low=0.2, clip_high=0.28, kl_weight=0.3, kl="k3"),
    "dual": dict(dual_clip=1.3, aggregation="bnpo", kl_weight=0.1),
    "grpo": dict(aggregation="grpo", kl_weight=0.2, kl="k2"),
    "dr_grpo": dict(aggregation="dr_grpo", max_length=11),
    "cispo": dict(surrogate="cispo", cap=1.2, aggregation="grpo"),
    "gspo_and_cispo": dict(surrogate="cispo", ratio="sequence", cap=1.05),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradient_are_those_of_loops(name):
    compare(PolicyGradientConfig(**SETTINGS[name]))


def test_gspo_has_one_ratio_an_answer():
    cfg = PolicyGradientConfig(ratio="sequence", aggregation="grpo", clip_low=0.1, clip_high=0.15, kl_weight=0.2)
    compare(cfg, PER_ANSWER)


def test_the_data_meets_every_branch():
    """Of what the loops above compare, else they could agree about nothing."""
    metrics = measured(f32(LOGP + JUNK), rollout(), PolicyGradientConfig())[2]
    ratio = np.exp(LOGP - OLD)[MASK]
    A = PER_TOKEN[MASK]
    kl = np.exp(LOGP - OLD) * (np.exp(REF - LOGP) - 1 + LOGP - REF)
    want = {
        "entropy": ENTROPY[MASK].mean(),
        "adv_abs_mean": np.abs(A).mean(),
        "ratio": ratio.mean(),
        "ratio_max": ratio.max(),
        "clip_low": ((ratio < 0.8) & (A < 0)).mean(),
        "clip_high": ((ratio > 1.2) & (A > 0)).mean(),
        "kl_k3_corrected": kl[MASK].mean(),
    }
    assert {name: float(metrics[name]) for name in want} == pytest.approx(want, rel=1e-5)
    assert want["clip_low"] * want["clip_high"] > 0
    assert ((ratio < 0.8) & (A > 0)).any()
    assert ((ratio > 1.3) & (A < 0)).any()
    dual = measured(f32(LOGP + JUNK), rollout(), PolicyGradientConfig(**SETTINGS["dual"]))[2]
    assert float(dual["clip_high"]) == pytest.approx((((ratio > 1.2) & (A > 0)) | ((ratio > 1.3) & (A < 0))).mean())
    cispo = measured(f32(LOGP + JUNK), rollout(), PolicyGradientConfig(**SETTINGS["cispo"]))[2]
    assert float(cispo["clip_high"]) == pytest.approx((ratio > 1.2).mean())
    assert float(cispo["clip_low"]) == 0


def test_printed_values():
    got = surrogate_loss(jnp.zeros((1, 2)), jnp.full((1, 2), 0.3), jnp.asarray([[1.0, -1.0]]))
    np.testing.assert_allclose(got[0], [-1.2, 1.349859], rtol=0, atol=6e-7)


@pytest.mark.parametrize("name", ["ppo", "grpo", "cispo"])
def test_on_policy_the_gradient_is_minus_the_advantage_and_zero_advantages_give_none(name):
    cfg = PolicyGradientConfig(**{**SETTINGS[name], "kl_weight": 0.0, "aggregation": "dapo"})
    for old in (LOGP, None):  # None: the policy's own
        gradient = np.asarray(measured(f32(LOGP + JUNK), rollout(old=old), cfg)[1])
        np.testing.assert_allclose(gradient, np.where(MASK, -PER_TOKEN * WEIGHTS / MASK.sum(), 0), rtol=1e-5, atol=1e-7)
    assert not np.asarray(measured(f32(LOGP + JUNK), rollout(0 * PER_TOKEN), cfg)[1]).any()


def test_without_a_policy_that_sampled_the_penalty_is_corrected_all_the_same():
    cfg = PolicyGradientConfig(kl_weight=0.5)
    for x, y in zip(*(measured(f32(LOGP), rollout(old=old), cfg) for old in (LOGP, None)), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), x, y)


def test_no_gradient_passes_through_what_was_and_extremes_stay_finite():
    cfg = PolicyGradientConfig(kl_weight=0.5)

    def loss(advantages, old, ref):
        data = Rollout(batch(), advantages, old, ref)
        terms, _ = policy_gradient(Scores(f32(LOGP), f32(ENTROPY), jnp.zeros((B, T, 1))), data, cfg)
        return sum(jnp.sum(term.value) for term in terms.values())

    for gradient in jax.grad(loss, argnums=(0, 1, 2))(f32(PER_TOKEN), f32(OLD), f32(REF)):
        assert not np.asarray(gradient).any()
    far = np.where(np.arange(T) % 2, 300.0, -300.0)
    value, gradient, metrics = measured(f32(LOGP + far), rollout(), cfg)
    assert np.isfinite([float(value), *map(float, metrics.values())]).all()
    assert np.isfinite(np.asarray(gradient)).all()


def window(micro):
    """What a table of parameters says of the answers, cut into micro-batches; `at` are the rows of the table."""
    data = (rollout(), jnp.arange(B, dtype=jnp.int32))
    return jax.tree.map(lambda x: x.reshape(micro, B // micro, *x.shape[1:]), data)


@functools.cache
def step(cfg):
    def loss_fn(params, part, key):
        data, at = part
        logp = params["logp"][at]
        return policy_gradient(Scores(logp, jnp.ones(logp.shape), jnp.zeros((*logp.shape, 1))), data, cfg)

    return make_train_step(loss_fn, optax.sgd(1.0), lambda w: count_units(w[0]))


def loss_and_gradient(cfg, micro):
    state = init_state({"logp": f32(LOGP)}, optax.sgd(1.0))
    new, metrics = step(cfg)(state, window(micro))
    return metrics, LOGP - np.asarray(new.params["logp"], np.float64)


@pytest.mark.optimizer
@pytest.mark.parametrize("aggregation", ["grpo", "dr_grpo", "dapo", "bnpo"])
@pytest.mark.slow
def test_one_window_in_one_or_four_micro_batches(aggregation):
    """Through the train step; bnpo too is what its loop says, but another number in another cut."""
    cfg = PolicyGradientConfig(aggregation=aggregation, max_length=9, kl_weight=0.2)
    found = {micro: loss_and_gradient(cfg, micro) for micro in (1, 4)}
    for micro, (metrics, gradient) in found.items():
        assert float(metrics["loss"]) == pytest.approx(oracle(LOGP, cfg, micro=micro), rel=1e-5)
        np.testing.assert_allclose(gradient, numeric(cfg, micro=micro), rtol=1e-4, atol=1e-6)
        assert int(metrics["parts"]) == micro
    assert oracle(LOGP, cfg, micro=1) != pytest.approx(oracle(LOGP, cfg, micro=4), rel=1e-3) or aggregation != "bnpo"
    for name in ("adv_abs_mean", "ratio", "clip_low", "clip_high", "kl_k3_corrected", "entropy"):
        assert float(found[1][0][name]) == pytest.approx(float(found[4][0][name]), rel=1e-5)
    of_each = np.where(MASK, np.exp(LOGP - OLD), 0).reshape(4, -1).max(1)
    assert float(found[4][0]["ratio_max"]) == pytest.approx(of_each.mean(), rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_of_one_micro_batch_bnpo_is_dapo(weight):
    a, b = (
        measured(f32(LOGP), rollout(), PolicyGradientConfig(aggregation=name, kl_weight=weight))[:2]
        for name in ("bnpo", "dapo")
    )
    np.testing.assert_allclose(a[0], b[0], rtol=1e-5)
    np.testing.assert_allclose(a[1], b[1], rtol=1e-5, atol=1e-8)


def test_units_and_means_of_packed_answers():
    units = {name: aggregate(f32(LOGP), batch(), PolicyGradientConfig(aggregation=name, max_length=3)).unit for name in
             ("grpo", "dr_grpo", "dapo", "bnpo")}  # fmt: skip
    assert units == dict(grpo="sequence", dr_grpo="sequence", dapo="token", bnpo="part")
    counts = count_units(jax.tree.map(lambda x: x.reshape(2, B // 2, *x.shape[1:]), rollout()))
    assert {name: int(n) for name, n in counts.items()} == {
        "token": MASK.sum(), "sequence": len(answers()), "input": (SEGMENTS > 0).sum(), "part": 2
    }  # fmt: skip
    got = np.asarray(sequence_mean(f32(LOGP + JUNK), batch()))
    for answer in answers():
        for at in answer:
            assert got[at] == pytest.approx(np.mean([LOGP[a] for a in answer]), rel=1e-5)
    alone = jnp.tile(jnp.arange(1, T + 1, dtype=jnp.int32)[None], (B, 1))  # answers of one token fill the rows
    full = batch()._replace(segments=alone, mask=jnp.ones((B, T), bool))
    np.testing.assert_array_equal(sequence_mean(f32(LOGP), full), f32(LOGP))


@pytest.mark.errors
def test_settings_that_mean_nothing_and_a_missing_reference_are_refused():
    bad = [dict(surrogate="ppo"), dict(ratio="group"), dict(aggregation="mean"), dict(kl="k4"), dict(cap=0.0)]
    bad += [dict(dual_clip=1.2), dict(kl_weight=-0.1), dict(kl="k1", kl_weight=0.1)]
    bad += [dict(max_length=0), dict(max_length=None, aggregation="dr_grpo"), dict(max_length=-2)]
    for settings in bad:
        with pytest.raises(ValueError, match=f"PolicyGradientConfig.{next(iter(settings))}"):
            PolicyGradientConfig(**settings)
    for settings in (dict(clip_low=0.0), dict(clip_low=1.1), dict(clip_high=0.0)):
        with pytest.raises(ValueError, match="PolicyGradientConfig: found clip_low"):
            PolicyGradientConfig(**settings)
    assert PolicyGradientConfig(kl="k1").kl_weight == 0  # k1 may be measured
    scores = Scores(f32(LOGP), f32(ENTROPY), jnp.zeros((B, T, 1)))
    with pytest.raises(ValueError, match=r"kl_weight 0.1 and a rollout without logp_ref"):
        policy_gradient(scores, rollout()._replace(logp_ref=None), PolicyGradientConfig(kl_weight=0.1))
    assert [*policy_gradient(scores, rollout())[0]] == ["policy"]  # without a weight it is only measured
    terms, metrics = policy_gradient(scores, rollout()._replace(logp_ref=None))
    assert [*terms] == ["policy"]
    assert not [name for name in metrics if name.startswith("kl_")]
