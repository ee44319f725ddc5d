"""Running statistics end a step as they should, by a float64 sum over micro-batches; nothing else notices them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaroo.train.state import init_state
from jaxaroo.train.statistics import follow, with_statistics
from jaxaroo.train.step import Term, make_train_step


def loss_fn(params, batch, key):
    """A weight pulled to 0, and statistics that follow the batch's mean and largest."""
    del key
    s = params["stats"]
    new = {"a": {"mean": s["a"]["mean"] + 0.1 * (batch.mean() - s["a"]["mean"])}, "top": s["top"] * 0.5 + batch.max()}
    value = 0.5 * (params["w"] * batch) ** 2 + follow(s, new)[None]
    return {"pull": Term(value, jnp.ones_like(value), "row")}, {}


def stepped(window, tx=None, steps=1):
    tx = with_statistics(optax.sgd(0.5)) if tx is None else tx
    params = {"w": jnp.float32(0.5), "stats": {"a": {"mean": jnp.float32(3.7)}, "top": jnp.full(3, 1.3)}}
    step = make_train_step(loss_fn, tx, lambda w: {"row": jnp.int32(w.size)})
    state = init_state(params, tx)
    for _ in range(steps):
        state, metrics = step(state, jnp.asarray(window, jnp.float32))
    return jax.device_get(state), metrics


@pytest.mark.optimizer
def test_they_are_what_the_forward_pass_says_averaged_over_micro_batches():
    window = np.random.default_rng(0).normal(2.0, 1.0, (2, 7))  # 14: no power of two
    state, metrics = stepped(window)
    w32 = np.asarray(window, np.float32).astype(np.float64)
    top = np.float64(np.float32(1.3))
    np.testing.assert_allclose(state.params["stats"]["a"]["mean"], 3.7 + 0.1 * (w32.mean() - 3.7), rtol=2e-6)
    np.testing.assert_allclose(state.params["stats"]["top"], [top * 0.5 + w32.max(1).mean()] * 3, rtol=2e-6)
    gradient = 0.5 * (w32**2).mean()
    np.testing.assert_allclose(state.params["w"], 0.5 - 0.5 * gradient, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (0.5 * (0.5 * w32) ** 2).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], gradient, rtol=1e-5)  # of the weight alone


@pytest.mark.optimizer
def test_the_inner_optimiser_does_not_see_them():
    """Weight decay and clipping by the whole norm would change them."""
    tx = with_statistics(optax.chain(optax.clip_by_global_norm(1e-3), optax.add_decayed_weights(0.5), optax.sgd(1.0)))
    state, _ = stepped(np.full((1, 4), 2.0), tx)
    assert state.params["stats"]["a"]["mean"] == pytest.approx(3.7 - 0.17, rel=1e-6)
    assert state.params["w"] == pytest.approx(0.5 - 1e-3 - 0.25, rel=1e-6)


@pytest.mark.optimizer
def test_a_bad_step_leaves_them():
    state, metrics = stepped(np.asarray([[1.0, np.inf]]))
    assert int(metrics["skipped_in_a_row"]) == 1
    assert state.params["stats"]["a"]["mean"] == np.float32(3.7)


@pytest.mark.optimizer
def test_extra_arguments_reach_the_inner_optimiser():
    def update(updates, state, params=None, *, turn):
        return jax.tree.map(lambda g: -turn * g, updates), state

    tx = with_statistics(optax.GradientTransformationExtraArgs(lambda params: (), update))
    grads = {"w": jnp.float32(2.0), "stats": {"m": jnp.float32(0.0)}}
    found, _ = tx.update(grads, tx.init(grads), grads, turn=3.0)
    assert float(found["w"]) == -6.0
