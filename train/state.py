"""The training state: everything that changes from step to step, and nothing else."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, UInt32

from ..models.decoder import Params


class TrainState(NamedTuple):
    """Plain arrays, so that a checkpoint needs no conversion; donated to the state that replaces it."""

    step: Int[Array, ""]  # steps taken, skipped ones included
    params: Params  # what is trained: a model, or adapters to one
    frozen: Params  # what is not: empty, or the model under the adapters
    opt_state: optax.OptState
    ema: Params  # running mean of params, or empty
    key: UInt32[Array, "2"]  # data of the run's key; step t uses fold_in(key, t)
    skipped: Int[Array, ""]  # steps whose loss or gradient was not finite
    skipped_in_a_row: Int[Array, ""]  # the last ones of them, 0 after a good step
    carry: Any = ()  # what an objective takes along from step to step, without gradient; mostly nothing


def init_state(
    params: Params,
    tx: optax.GradientTransformation,
    *,
    seed: int = 0,
    frozen: Params | None = None,
    ema: bool = False,
    carry: Any = None,
) -> TrainState:
    """A state at step 0.

    Args:
      params: what to train; float32, layers stacked.
      tx: whose state to begin.
      seed: of the randomness inside steps.
      frozen: parameters that the loss reads and nobody changes.
      ema: keep a running mean of the parameters, which begins as a copy.
      carry: what the objective takes along at first.
    """
    zero = lambda: jnp.zeros((), jnp.int32)  # each its own buffer: donating one twice is an error at best
    mean: Any = jax.tree.map(lambda p: p.astype(jnp.float32) + 0.0, params) if ema else {}
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(
        zero(), params, frozen or {}, tx.init(params), mean, key, zero(), zero(), () if carry is None else carry
    )
