"""Oracles: float64 NumPy over rows to forget and rows to retain; gradients in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.data.pipeline import Batch
from jaxaroo.train.objectives.by_name import OBJECTIVES, unlearn_terms
from jaxaroo.train.objectives.logprobs import Scores
from jaxaroo.train.objectives.preference import Sums
from jaxaroo.train.objectives.sequences import View
from jaxaroo.train.objectives.unlearn import UnlearnConfig, answers_of, forget_loss, unlearn_metrics

sp = lambda x: np.logaddexp(0, x)
S = lambda x: np.exp(-np.logaddexp(0, -x))
P, F, N = (np.array(x) for x in ([-12.0, -3.0], [-10.0, -3.5], [6.0, 2.0]))
Q, G, M = (np.array(x) for x in ([-8.0, -9.0], [-9.0, -7.0], [4.0, 3.0]))
sums = lambda p, f, n: Sums(*(jnp.asarray(x, jnp.float32) for x in (p, f, n)))

KNOWN = {  # loss, and its slope in the sums of each sequence
    "ga": (P / N, [1 / N]),
    "npo": (2 / 0.3 * sp(0.3 * (P - F)), [2 * S(0.3 * (P - F))]),
    "rgd": (-Q / M, [-1 / M]),
    "rdpo": (sp(-0.3 * ((Q - G) - (P - F))), [-0.3 * S(-0.3 * (Q - G - P + F)), 0.3 * S(-0.3 * (Q - G - P + F))]),
}


@pytest.mark.parametrize("how", KNOWN)
def test_what_is_forgotten_costs_what_the_papers_say(how):
    cfg = UnlearnConfig(forget=how, beta=0.3)
    of = {"answer": (P, F, N), "refusal": (Q, G, M)}
    given = tuple(sums(*of[name]) for name in answers_of(cfg))
    value, slopes = KNOWN[how]
    np.testing.assert_allclose(forget_loss(given, cfg), value, rtol=1e-5)
    total = lambda ps: jnp.sum(forget_loss(tuple(s._replace(policy=p) for s, p in zip(given, ps, strict=True)), cfg))
    got = jax.grad(total)(tuple(s.policy for s in given))
    for slope, wanted in zip(got, slopes, strict=True):
        np.testing.assert_allclose(slope, wanted, rtol=1e-5)
    found = unlearn_metrics(given, sums(P, F, N), cfg)
    np.testing.assert_allclose(found["logps_avg/retain"], P / N, rtol=1e-6)
    for name in answers_of(cfg):
        np.testing.assert_allclose(found[f"logps_avg/{name}"], of[name][0] / of[name][2], rtol=1e-6)
    assert OBJECTIVES["unlearn"].reads(dataclasses.replace(cfg, retain="kld")) == "kl"
    assert OBJECTIVES["unlearn"].reads(cfg) == ("sums" if how in ("npo", "rdpo") else "nothing")
    assert found.keys() == {"logps_avg/retain", *(f"logps_avg/{name}" for name in answers_of(cfg))}


@pytest.mark.parametrize("retain", ["none", "gd", "kld"])
def test_what_is_retained_is_a_mean_over_its_tokens(retain):
    """Two examples in a row: forget, retain, forget, retain; the last of them weighs twice."""
    segments = np.array([[1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 0]])
    mask = np.array([[0, 1, 1, 0, 1, 1, 0, 1, 0, 1, 0]]) > 0
    weights = mask * np.where(segments > 2, 2.0, 1.0)
    ints = jnp.asarray(segments, jnp.int32)
    batch = Batch(ints, ints, ints, ints, jnp.asarray(mask), jnp.asarray(weights, jnp.float32))
    rng = np.random.default_rng(0)
    logp, kl = (jnp.asarray(rng.normal(-1, 0.3, segments.shape), jnp.float32) for _ in range(2))
    cfg = UnlearnConfig(forget="ga", retain=retain, retain_weight=0.5)

    def total(logp, kl):
        terms, _ = unlearn_terms(View(batch, 2, Scores(logp, logp, logp[..., None])), cfg, kl=kl)
        return {name: jnp.sum(jnp.where(t.weight != 0, t.value, 0) * t.weight) for name, t in terms.items()}, terms

    found, terms = total(logp, kl)
    kept = (np.isin(segments, [2, 4]) & mask) * weights
    wanted = {"gd": -0.5 * (np.asarray(logp) * kept).sum(), "kld": 0.5 * (np.asarray(kl) * kept).sum()}
    if retain == "none":
        assert found.keys() == {"forget_ga"}
    else:
        np.testing.assert_allclose(found[f"retain_{retain}"], wanted[retain], rtol=1e-5)
        assert terms[f"retain_{retain}"].unit == "last_token"
    x = np.asarray(logp, np.float64)[0]
    np.testing.assert_allclose(found["forget_ga"], x[1:3].mean() + 2 * x[7], rtol=1e-5)
    slope = np.asarray(jax.grad(lambda x: found_sum(total(x, kl)[0]))(logp))
    assert not slope[~mask].any()
    assert slope[np.isin(segments, [2, 4]) & mask].any() == (retain == "gd")


def found_sum(found):
    return sum(found.values())


@pytest.mark.errors
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(forget="nop"), "Is 'npo' meant"),
        (dict(retain="kl"), "Is 'kld' meant"),
        (dict(beta=0.0), "expected a positive number"),
        (dict(retain_weight=0.0), "retain_weight: found 0.0; expected a positive number"),
    ],
)
def test_settings_are_checked(given, message):
    with pytest.raises(ValueError, match=message):
        UnlearnConfig(**given)
