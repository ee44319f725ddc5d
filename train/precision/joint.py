"""One model trained at several widths in turn: which widths a step takes, and what each of its updates changes.

    for every window                                            (Double Rounding, 2502.01199, algorithm A.2)
        for b in widths, high to low
            g = gradient of the loss at width b, in the weights and in the scales they share
            weights <- AdamW(g)                                 one state for all widths, as the paper
            scales  <- Adam_b(g), at the rate of width b        one state a width (alrs.py)

The weights' optimiser and schedule are those of every other run (`train/optimizer.py`), counted in updates. Scales have
no weight decay, and are not clipped: Adam divides their gradients anyhow.

What is trained is `{"model": weights, "scales": scales}` with layers stacked; a turn is one width a layer, int32[L].
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from ...jaxlib_ext.qmm import over_trailing
from ...models.multi_precision import QuantRules, path_name, quantised_paths
from ..optimizer import OptimizerConfig, make_optimizer, make_schedule
from ..step import Turns
from .alrs import mean_clipped, per_width, width_rate
from .hasb import redraw_share, sample_widths


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """How scales learn.

    Attributes:
      learning_rate: of the scales at the master's width, the peak; the schedule is that of the weights.
      alrs: how the rate depends on the width: by the paper's factor and the gradients' size, as printed (never below
        0), by the factor alone, or not at all.
    """

    learning_rate: float = 1e-4
    alrs: Literal["relative", "printed", "eta_only", "off"] = "relative"

    def __post_init__(self):
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"ScaleConfig.learning_rate: found {self.learning_rate}; expected a positive number.")
        if self.alrs not in ("relative", "printed", "eta_only", "off"):
            raise ValueError(f"ScaleConfig.alrs: found {self.alrs!r}; expected relative, printed, eta_only or off.")


class JointState(NamedTuple):
    """Of the optimiser."""

    weights: Any
    scales: Any  # every leaf `[L, W, ...]`
    updates: Int32[Array, ""]  # made so far


# ------------------------------------------------------------------------------------------------------------- widths
def width_turns(widths: tuple[int, ...], layers: int, *, order: Literal["all", "sandwich"] = "all") -> Turns:
    """One update for each width, high to low; or the highest, one drawn from between, and the lowest."""
    if order == "all" or len(widths) < 3:
        base = jnp.asarray(widths, jnp.int32)[:, None]
        return Turns(tuple(map(str, widths)), lambda step, key: jnp.tile(base, (1, layers)))

    def draw(step: Array, key: Array) -> Int32[Array, "3 L"]:
        between = jax.random.choice(key, jnp.asarray(widths[1:-1], jnp.int32))
        three = jnp.stack([jnp.int32(widths[0]), between, jnp.int32(widths[-1])])
        return jnp.tile(three[:, None], (1, layers))

    return Turns((str(widths[0]), "between", str(widths[-1])), draw)


def hasb_turns(
    widths: tuple[int, ...], traces: Float[Array, " L"], steps: int, *, epochs: int = 10, most: float = 1.0
) -> Turns:
    """One update for each width, in which layers leave it ever more often for a draw of their own (`hasb.py`).

    Args:
      widths: high to low.
      traces: how sensitive each layer is.
      steps: of the whole run; the share that draws grows in `epochs` equal parts of it.
      epochs: how many.
      most: the share in the last one.
    """

    def draw(step: Array, key: Array) -> Int32[Array, "W L"]:
        share = redraw_share(step * epochs // steps, epochs, most)
        each = [sample_widths(traces, widths, b, share, jax.random.fold_in(key, b)) for b in widths]
        return jnp.stack(each)

    return Turns(tuple(map(str, widths)), draw)


# ----------------------------------------------------------------------------------------------------------- optimiser
def joint_optimizer(
    cfg: OptimizerConfig, scales: ScaleConfig, steps: int, turns: int, rules: QuantRules
) -> optax.GradientTransformationExtraArgs:
    """What `make_train_step` applies in every turn: `update(grads, state, params, turn=bits[L])`.

    Gains learn at the scales' rate at their own width, whatever that is: they are shared with no other.

    Args:
      cfg: of the weights, and of the scales what is not theirs alone.
      scales: what is.
      steps: of the whole run.
      turns: updates in each of them.
      rules: those that the scales were made with.
    """
    in_updates = dataclasses.replace(cfg, warmup_steps=cfg.warmup_steps * turns)
    weights = make_optimizer(in_updates, steps * turns)
    schedule = make_schedule(dataclasses.replace(in_updates, learning_rate=scales.learning_rate), steps * turns)
    widths = tuple(sorted({b for _, c in rules if c is not None for b in c.bits}, reverse=True))
    direction = per_width(optax.scale_by_adam(cfg.b1, 0.999 if cfg.b2 is None else cfg.b2, cfg.eps), widths)

    def init(params: Any) -> JointState:
        own = jax.vmap(direction.init)(params["scales"]["layers"])
        return JointState(weights.init(params["model"]), own, jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, *, turn: Any = None, **extra: Any):
        del extra
        grads = updates
        model, new_weights = weights.update(grads["model"], state.weights, params["model"])
        step = lambda g, s, bits: direction.update(g, s, None, bits=bits)
        u, moments = jax.vmap(step)(grads["scales"]["layers"], state.scales, turn)
        rate, mean = jnp.asarray(schedule(state.updates), jnp.float32), mean_clipped(grads["scales"])
        chosen = quantised_paths(params["model"], rules)

        def apply(path: tuple[Any, ...], u: Array) -> Array:
            name, part = path_name(path).rsplit("/", 1)
            own = chosen[f"layers/{name}"]
            down = own.master - jnp.clip(turn, own.bits[-1], own.master)
            if part == "gain" or scales.alrs == "off":
                return -rate * u
            return -over_trailing(width_rate(rate, mean, down, scales.alrs), u.ndim) * u

        learned = {"layers": jax.tree_util.tree_map_with_path(apply, u)}
        new = JointState(new_weights, moments, state.updates + 1)
        return {"model": model, "scales": learned}, new

    return optax.GradientTransformationExtraArgs(init, update)
