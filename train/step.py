"""One step for every objective: loss, gradient, update, inside one jitted function that knows no objective.

A loss function returns terms: elements, their weights, and the unit they are counted in. A term adds

    sum_i weight_i value_i / (how many of its unit the whole window holds)

to the loss. A window is all micro-batches of a step on all devices, and its counts are known from masks before the
first micro-batch. So terms add up, and neither micro-batching nor padding, packing or sharding changes the result.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ..models.decoder import Params
from .optimizer import update_ema
from .state import TrainState

Window = Any  # batches of one step: every leaf has a leading axis of micro-batches


class Term(NamedTuple):
    """A weighted sum, to be divided by the window's count of `unit`; metrics are terms too, without gradient."""

    value: Float[Array, "..."]  # one an element
    weight: Float[Array, "..."]  # likewise; 0 leaves an element out, whatever its value
    unit: str  # a key of what the counting function returns: "token", "sequence", ...


Terms = Mapping[str, Term]
Metrics = dict[str, Float[Array, ""]]
LossFn = Callable[..., tuple[Terms, Terms]]  # model parameters, batch, key (, turn) -> terms of loss, metrics
Counts = Callable[[Window], Mapping[str, Array]]
Step = Callable[[TrainState, Window], tuple[TrainState, Metrics]]
Advance = Callable[[Any, Params, Metrics, Array], Any]  # (carry, new parameters, metrics, step from 0) -> new carry


class Turns(NamedTuple):
    """What differs between the updates of one step, such as the width of a network that is trained for several."""

    names: tuple[str, ...]  # one an update, behind the names of its metrics: `nll_8`, `nll_4`
    draw: Callable[[Array, Array], Any]  # (step, key) -> a tree whose leaves have a leading axis of updates


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    counts: Counts,
    *,
    combine: Callable[[Params, Params], Params] = lambda params, frozen: params,
    ema_decay: float = 0.0,
    schedule: optax.Schedule | None = None,
    shardings: Any = None,
    turns: Turns | None = None,
    advance: Advance | None = None,
) -> Step:
    """Build `step(state, window) -> (state, metrics)`; the buffers of the old state are donated.

    An update whose loss or gradient is not finite changes nothing but the counters. The metrics are the loss, its
    terms, what `loss_fn` measures (all of them means over the window), the norm of the gradient before clipping, the
    counts (`tokens`, ...), and how many steps in a row were skipped. With turns they are means over the updates, and
    each update's own stands under its name as well; a step counts as skipped if one of its updates was.

    Args:
      loss_fn: the objective; with turns its fourth argument is this update's.
      tx: clips, scales and applies; with turns `update` gets this update's as `turn`.
      counts: of every unit in a window.
      combine: the model's parameters from the trained and the frozen ones.
      ema_decay: of the running mean, if the state keeps one.
      schedule: that of `tx`, to report the learning rate of each step.
      shardings: of the state, for `jax.jit`; its leaves stay where they are if None.
      turns: make several updates of a step; one program serves all of them.
      advance: what becomes of `state.carry` after a good step. With it, the last argument of `loss_fn` is the carry.
    """

    def update(state: TrainState, window: Window, share: Mapping[str, Array], key: Array, *turn: Any):
        def loss_of(params: Params, batch: Any, key: Array) -> tuple[Array, Metrics]:
            carried = () if advance is None else (jax.lax.stop_gradient(state.carry),)
            terms, measured = loss_fn(combine(params, state.frozen), batch, key, *turn, *carried)
            parts = {name: _total(term, share) for name, term in terms.items()}
            loss = sum(parts.values(), start=jnp.float32(0))
            metrics = {name: _total(term, share) for name, term in measured.items()}
            return loss, jax.lax.stop_gradient({**parts, **metrics, "loss": loss})

        (_, metrics), grads = _over_window(jax.value_and_grad(loss_of, has_aux=True), state.params, window, key)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        extra: Any = {"turn": turn[0]} if turn else {}
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
        params: Any = optax.apply_updates(state.params, updates)
        ema = update_ema(state.ema, params, ema_decay) if state.ema else state.ema
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
        new = state._replace(
            params=keep(params, state.params), opt_state=keep(opt_state, state.opt_state), ema=keep(ema, state.ema)
        )
        return new, metrics | {"grad_norm": norm}, good

    def step(state: TrainState, window: Window) -> tuple[TrainState, Metrics]:
        number = counts(window)
        share = {unit: 1.0 / jnp.maximum(n, 1).astype(jnp.float32) for unit, n in number.items()}
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        if turns is None:
            new, metrics, good = update(state, window, share, key)
        else:
            draw_key, key = jax.random.split(key)

            def one(state: TrainState, turn: Any) -> tuple[TrainState, tuple[Metrics, Array]]:
                i, turn = turn
                state, metrics, good = update(state, window, share, jax.random.fold_in(key, i), turn)
                return state, (metrics, good)

            numbered = (jnp.arange(len(turns.names)), turns.draw(state.step, draw_key))
            new, (each, well) = jax.lax.scan(one, state, numbered)
            metrics = {name: jnp.mean(x) for name, x in each.items()}
            metrics |= {f"{name}_{turn}": x[i] for name, x in each.items() for i, turn in enumerate(turns.names)}
            good = jnp.all(well)
        if advance is not None:
            carry = advance(
                state.carry, new.params, metrics | {f"{unit}s": n for unit, n in number.items()}, state.step
            )
            new = new._replace(carry=jax.tree.map(lambda n, o: jnp.where(good, n, o), carry, state.carry))
        bad = 1 - good.astype(jnp.int32)
        new = new._replace(
            step=state.step + 1,
            skipped=state.skipped + bad,
            skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
        )
        metrics |= {f"{unit}s": n for unit, n in number.items()}
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.step - state.skipped), jnp.float32)
        return new, metrics | {"skipped_in_a_row": new.skipped_in_a_row}

    return jax.jit(step, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))


# ----------------------------------------------------------------------------------------------------------- private
def _total(term: Term, share: Mapping[str, Array]) -> Array:
    """What an element of weight 0 holds must not matter, not even if it is infinite."""
    value = jnp.where(term.weight != 0, term.value.astype(jnp.float32), 0.0)
    return jnp.sum(value * term.weight) * share[term.unit]


def _over_window(grad_fn: Callable[..., Any], params: Params, window: Window, key: Array) -> Any:
    """Sum of `((loss, metrics), gradient)` over the micro-batches, gradients in float32."""
    number = jax.tree.leaves(window)[0].shape[0]
    keys = jax.random.split(key, number)
    if number == 1:
        return grad_fn(params, jax.tree.map(lambda leaf: leaf[0], window), keys[0])

    def body(total, part):
        new = grad_fn(params, *part)
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, new), None

    shapes = jax.eval_shape(grad_fn, params, jax.tree.map(lambda leaf: leaf[0], window), keys[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
    return jax.lax.scan(body, zeros, (window, keys))[0]
