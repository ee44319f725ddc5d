"""The training state and the one jitted step: loss, gradients, update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ..models.decoder import DecoderConfig, Params, forward, lm_head

Metrics = dict[str, Float[Array, ""]]


class TrainState(NamedTuple):
    """Everything that changes from step to step; donated to the step that replaces it."""

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState


def init_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """A state at step 0; the parameters must have stacked layers."""
    return TrainState(jnp.int32(0), params, tx.init(params))


def next_token_loss(cfg: DecoderConfig, params: Params, tokens: Int[Array, "B T1"]) -> Float[Array, ""]:
    """Mean negative log-likelihood, in nats, of every token but the first given those before it."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1])[None], inputs.shape)
    logits = lm_head(cfg, params, forward(cfg, params, inputs, positions).hidden)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def make_train_step(
    cfg: DecoderConfig, tx: optax.GradientTransformation
) -> Callable[[TrainState, Int[Array, "B T1"]], tuple[TrainState, Metrics]]:
    """Build `step(state, tokens) -> (state, metrics)`; the buffers of the old state are donated."""

    def step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
        loss, grads = jax.value_and_grad(lambda p: next_token_loss(cfg, p, tokens))(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(step, donate_argnums=0)
