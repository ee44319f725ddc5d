"""Oracles: Python loops over one row at a time, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.infer.speculative.stop import StopRule, acceptance, acceptance_head, confidence, fixed

B, D, STEPS = 5, 6, 7
RNG = np.random.default_rng(0)
TOP1 = RNG.random((STEPS, B)).astype(np.float32)
HIDDEN = RNG.normal(size=(STEPS, B, D)).astype(np.float32)
HEAD = {
    "blocks": {
        "weight": RNG.normal(size=(3, D, D), scale=0.4).astype(np.float32),
        "bias": RNG.normal(size=(3, D)).astype(np.float32),
    },
    "head": {
        "weight": RNG.normal(size=(2, D), scale=0.2).astype(np.float32),
        "bias": np.array([-0.5, 1.5], np.float32),
    },
}


@functools.partial(jax.jit, static_argnames="rule")
def scan(rule: StopRule, params, top1, hidden):
    """What the rule says after each step, [STEPS, B], as a drafter asks it."""

    def step(carry, x):
        return rule.update(params, carry, *x)

    steps = jnp.arange(1, top1.shape[0] + 1, dtype=jnp.int32)
    return jax.lax.scan(step, rule.init(top1.shape[1]), (steps, top1, hidden))[1]


def probability(hidden):
    """Of acceptance, for one state in float64."""
    x = hidden.astype(np.float64)
    for weight, bias in zip(HEAD["blocks"]["weight"], HEAD["blocks"]["bias"], strict=True):
        y = weight.astype(np.float64) @ x + bias
        x = x + y / (1 + np.exp(-y))
    z = HEAD["head"]["weight"].astype(np.float64) @ x + HEAD["head"]["bias"]
    return 1 / (1 + np.exp(z[0] - z[1]))


def test_fixed_never_stops():
    assert not scan(fixed(), (), 0 * TOP1, HIDDEN).any()


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.6, 1.0])
def test_confidence_stops_at_the_threshold_and_below(eta):
    top1 = TOP1.copy()
    top1[2, 1] = top1[3, 3] = np.float32(eta)  # the paper stops there too
    want = [[float(p) <= float(np.float32(eta)) for p in row] for row in top1]
    np.testing.assert_array_equal(scan(confidence(), {"eta": np.float32(eta)}, top1, HIDDEN), want)


def test_the_head_is_that_of_the_float64_loop():
    got = jax.jit(acceptance)(HEAD, HIDDEN[0])
    np.testing.assert_allclose(got, [probability(h) for h in HIDDEN[0]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_the_head_stops_on_the_product_of_what_it_has_seen(threshold):
    """The state at step k has read draft k - 1; the first has read the root, and says nothing of any draft."""
    want = np.zeros((STEPS, B), bool)
    for row in range(B):
        product = 1.0
        for k in range(2, STEPS + 1):
            product *= probability(HIDDEN[k - 1, row])
            want[k - 1, row] = 1 - product > threshold
    assert not want[0].any()
    if 0 < threshold < 1:
        assert 0 < want[1:].mean() < 1  # the cases tell rules apart
    got = scan(acceptance_head(), HEAD | {"threshold": np.float32(threshold)}, TOP1, HIDDEN)
    np.testing.assert_array_equal(got, want)


def test_rows_stop_for_themselves():
    rule, params = acceptance_head(), HEAD | {"threshold": np.float32(0.7)}
    together = np.asarray(scan(rule, params, TOP1, HIDDEN))
    order = np.array([3, 0, 4, 1, 2])
    np.testing.assert_array_equal(scan(rule, params, TOP1[:, order], HIDDEN[:, order]), together[:, order])


def test_parameters_are_traced_and_rules_are_one_object():
    """Two calls give the same rule, so a drafter made twice compiles once; a new threshold compiles nothing."""
    assert all(make() is make() for make in (fixed, confidence, acceptance_head))
    scan.clear_cache()
    for value in (0.1, 0.5):
        scan(confidence(), {"eta": np.float32(value)}, TOP1, HIDDEN)
        scan(acceptance_head(), HEAD | {"threshold": np.float32(value)}, TOP1, HIDDEN)
    assert scan._cache_size() == 2


def test_half_precision_states_are_judged_in_float32():
    rule, params = acceptance_head(), HEAD | {"threshold": np.float32(0.7)}
    carry, _ = rule.update(params, rule.init(B), jnp.int32(2), jnp.asarray(TOP1[0]), HIDDEN[0].astype(jnp.bfloat16))
    assert carry.dtype == jnp.float32
    want = [probability(np.asarray(h)) for h in HIDDEN[0].astype(jnp.bfloat16).astype(np.float32)]
    np.testing.assert_allclose(carry, want, rtol=0, atol=1e-5)
