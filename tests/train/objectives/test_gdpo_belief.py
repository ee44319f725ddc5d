"""Oracles: the specification's worked row, and float64 loops over pairs whose tokens know what they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.data.pipeline import Batch
from jaxaroo.train.objectives.by_name import gdpo_belief_terms
from jaxaroo.train.objectives.gdpo_belief import (
    MOST,
    GdpoBeliefConfig,
    belief_metrics,
    calibration,
    conditional,
)
from jaxaroo.train.objectives.logprobs import Scores
from jaxaroo.train.objectives.preference import Sums
from jaxaroo.train.objectives.sequences import View

HELD = np.array([0.5, 0.3, 0.2])
LOGITS = np.array([1.0, 0.0, 0.0, -1.0])  # of the three ids and of something else
sp = lambda x: np.logaddexp(0, x)


def test_worked_row():
    def kl(z):
        return calibration(jnp.asarray(HELD[None], jnp.float32), jax.nn.log_softmax(z)[None, :3])[0]

    z = jnp.asarray(LOGITS, jnp.float32)
    np.testing.assert_allclose(kl(z), 0.096870, atol=1e-6)
    np.testing.assert_allclose(jax.grad(kl)(z), [0.034447, -0.103388, -0.003388, 0.072329], atol=1e-6)
    mass = np.exp(jax.nn.log_softmax(z))[:3].sum()
    np.testing.assert_allclose(mass, 0.927671, atol=1e-6)
    renormalised = jax.nn.log_softmax(z[:3])
    inner = calibration(jnp.asarray(HELD[None], jnp.float32), renormalised[None])[0]
    np.testing.assert_allclose(inner, 0.021792, atol=1e-6)
    np.testing.assert_allclose(kl(z), inner - np.log(mass), atol=1e-6)


def test_ids_may_be_named_in_any_order_and_one_belief_costs_the_mass_it_lacks():
    logp = jax.nn.log_softmax(jnp.asarray([LOGITS, LOGITS[[2, 0, 1, 3]]], jnp.float32))[:, :3]
    got = calibration(jnp.asarray([HELD, HELD[[2, 0, 1]]], jnp.float32), logp)
    np.testing.assert_allclose(got[0], got[1], rtol=1e-6)
    one = calibration(jnp.asarray([[1.0, 0.0]]), jnp.asarray([[-0.25, -jnp.inf]]))
    np.testing.assert_allclose(one, [0.25], rtol=1e-6)
    grads = jax.grad(lambda x: calibration(jnp.asarray([[1.0, 0.0]]), x)[0])(jnp.asarray([[-0.25, -jnp.inf]]))
    np.testing.assert_array_equal(grads, [[-1.0, 0.0]])


@pytest.mark.parametrize("held", [HELD, np.array([1.0, 0.0, 0.0]), np.array([0.5, 0.5, 0.0])])
def test_metrics_are_those_of_numpy(held):
    """Of three beliefs among ids for five; one that nobody holds is a belief all the same."""
    logp = np.asarray(jax.nn.log_softmax(jnp.asarray([*LOGITS, 0.5, 0.7])), np.float64)[[0, 1, 2, 4, 5]]
    p = np.exp(logp)[:3]
    row = lambda *x: jnp.asarray([x], jnp.float32)
    found = belief_metrics(row(*held, 0, 0), jnp.asarray([3.0]), row(*logp), jnp.asarray([1.0]))
    q = p / p.sum()
    m, part = (q + held) / 2, lambda a: a[a > 0] * np.log(a[a > 0])
    js = 0.5 * (part(held).sum() + part(q).sum() - ((held + q) * np.log(m)).sum())
    wanted = {"belief/mass": p.sum(), "belief/js": js, "belief_gap": abs(p[1] - held[1])}
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], [value], rtol=1e-4, err_msg=name)


def test_answers_are_judged_as_dpo_does():
    chosen, rejected = (Sums(*(jnp.asarray([x]) for x in row)) for row in ((-12.0, -13.0, 8.0), (-15.0, -14.5, 10.0)))
    np.testing.assert_allclose(conditional(chosen, rejected, GdpoBeliefConfig()), [0.620957], atol=1e-6)


# A pair: prompt, id, belief of two tokens, answers of two and of one token; then padding.
KIND = np.array([["p", "i", "b", "b", "a", "a", "p", "p", "i", "b", "b", "a", ""]])
SEGMENT = np.array([[1] * 6 + [2] * 6 + [0]])
RNG = np.random.default_rng(3)


@pytest.mark.slow
def test_terms_are_those_of_a_loop():
    mask, ones = np.isin(KIND, ["i", "b", "a"]), lambda k: jnp.asarray(k == KIND, jnp.float32)
    held = np.zeros(MOST)
    held[:3] = HELD
    more = {"id": ones("i"), "belief": ones("b"), "accepted": jnp.ones(KIND.shape)}
    more["beliefs"] = jnp.full(KIND.shape, 3.0)
    more |= {f"held_{k}": jnp.full(KIND.shape, x, jnp.float32) for k, x in enumerate(held)}
    ints = jnp.asarray(SEGMENT, jnp.int32)
    batch = Batch(ints, ints, ints, ints, jnp.asarray(mask), jnp.asarray(mask, jnp.float32) * 0.5, more=more)
    logp, reference = (jnp.asarray(RNG.normal(-1, 0.5, KIND.shape), jnp.float32) for _ in range(2))
    beliefs = jnp.asarray(RNG.normal(-2, 0.3, (*KIND.shape, MOST)), jnp.float32)
    cfg = GdpoBeliefConfig(beta=0.7, calibration=0.6, belief=0.9)
    score = lambda x: Scores(x, -x, x[..., None])
    view = View(batch, 2, score(logp), score(reference))
    terms, metrics = gdpo_belief_terms(view, cfg, beliefs=beliefs)
    p, f, b = (np.asarray(x, np.float64)[0] for x in (logp, reference, beliefs))
    r = [(p - f)[(SEGMENT[0] == s) & (KIND[0] == "a")].sum() for s in (1, 2)]
    wanted = {
        "calibration": 0.6 * (HELD * (np.log(HELD) - b[1, :3])).sum(),
        "dpo": sp(-0.7 * (r[0] - r[1])),
        "belief": -0.9 * p[2:4].mean(),
    }
    there = np.asarray(terms["dpo"].weight) > 0
    assert there.sum() == 1
    for name, value in wanted.items():
        np.testing.assert_allclose(np.asarray(terms[name].value)[there], [value], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(terms[name].weight[there], [0.5])
    np.testing.assert_allclose(np.asarray(metrics["rewards/margins"].value)[there], [0.7 * (r[0] - r[1])], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(metrics["belief/kl"].value)[there], [wanted["calibration"] / 0.6], rtol=1e-5)
    gap = abs(np.exp(b[1, 1]) - HELD[1])  # of the accepted one
    np.testing.assert_allclose(np.asarray(metrics["belief_gap"].value)[there], [gap], rtol=1e-5)
    assert np.asarray(metrics["length/chosen"].value)[there] == 2  # of the answer alone

    def total(logp):
        found, _ = gdpo_belief_terms(view._replace(policy=score(logp)), cfg, beliefs=beliefs)
        return sum(jnp.sum(t.value * t.weight) for t in found.values())

    slope = np.asarray(jax.grad(total)(logp))[0]
    assert not slope[~mask[0]].any()
    assert not slope[8:11].any()  # id and belief of the rejected side teach nothing
    assert slope[[2, 3, 4, 5, 11]].all()


@pytest.mark.errors
def test_settings_are_checked():
    for given, message in (
        (dict(beta=3.0), "at most 1"),
        (dict(belief=-1.0), "belief: found -1.0; expected at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            GdpoBeliefConfig(**given)
