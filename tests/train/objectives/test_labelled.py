"""Oracles: float64 loops over labelled tokens, whatever made the logits."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.data import pipeline
from jaxaroo.train.data.pipeline import Batch
from jaxaroo.train.objectives.labelled import LabelledLossConfig, count_units, labelled

MASK = np.array([[0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1, 1]], bool)
LABELS = (MASK * np.array([[1, 0, 1, 0, 0.7, 1, 0], [1, 0, 0.2, 1, 0.5, 1, 0]])).astype(np.float32)
WEIGHTS = (MASK * np.array([[1.0], [0.25]])).astype(np.float32)
LOGITS = np.random.default_rng(0).normal(size=MASK.shape).astype(np.float32) * 3
NEGATIVE = 2.5


def batch():
    ones = jnp.ones(MASK.shape, jnp.int32)
    return Batch(ones, ones, ones, ones, jnp.asarray(MASK), jnp.asarray(WEIGHTS), jnp.asarray(LABELS))


def test_terms_and_metrics_are_those_of_the_float64_loop():
    terms, metrics = labelled(jnp.asarray(LOGITS), batch(), LabelledLossConfig(negative_weight=NEGATIVE))
    total = dict.fromkeys(("cross_entropy", "accuracy", "recall_of_bad", "good", "probability", "brier"), 0.0)
    for at in zip(*np.nonzero(MASK), strict=True):
        y, p = float(LABELS[at]), 1 / (1 + np.exp(-float(LOGITS[at])))
        total["cross_entropy"] -= float(WEIGHTS[at]) * (y * np.log(p) + NEGATIVE * (1 - y) * np.log(1 - p))
        right = (p > 0.5) == (y > 0.5)
        total["accuracy"] += right
        total["recall_of_bad"] += right and y <= 0.5
        total["good"] += y
        total["probability"] += p
        total["brier"] += (p - y) ** 2
    found = {name: float(jnp.sum(term.value * term.weight)) for name, term in (terms | metrics).items()}
    assert found == pytest.approx(total, rel=1e-5)


def test_large_logits_stay_finite():
    extreme = jnp.asarray(np.where(LABELS > 0.5, -1e4, 1e4).astype(np.float32))
    terms, _ = labelled(extreme, batch())
    assert np.isfinite(np.asarray(terms["cross_entropy"].value)).all()


def test_units_are_counted_by_a_loop():
    data = batch()
    got = {name: int(n) for name, n in count_units(data).items()}
    assert got == {name: int(n) for name, n in pipeline.count_units(data).items()} | {
        "bad_token": sum(bool(MASK[i]) and LABELS[i] <= 0.5 for i in np.ndindex(*MASK.shape))
    }
    terms, metrics = labelled(jnp.zeros(MASK.shape), data)
    units = {name: term.unit for name, term in (terms | metrics).items()}
    bad = {"recall_of_bad": "bad_token"}
    assert units == dict.fromkeys(units, "token") | bad


@pytest.mark.errors
def test_batches_without_labels_and_weights_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="found a batch without labels"):
        labelled(jnp.asarray(LOGITS), batch()._replace(labels=None))
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="negative_weight"):
            LabelledLossConfig(negative_weight=weight)
