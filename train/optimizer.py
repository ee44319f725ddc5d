"""Optimisers, learning-rate schedules and the running mean of parameters: one frozen config, optax underneath.

Every optimiser is the same chain, in float32 whatever the parameters are in:

    gradient -> clipped by its global norm -> direction u -> W - lr(t) (u + weight_decay W)

so the weight decay is decoupled (Loshchilov & Hutter, 1711.05101) and means the same for each of them:

    adamw      u = m' / (sqrt(v') + eps), m' and v' the bias-corrected means of g and g^2 (Kingma & Ba, 1412.6980)
    lion       u = sign(b1 m + (1 - b1) g), then m <- b2 m + (1 - b2) g (Chen et al., 2302.06675)
    sgd        u = m <- momentum m + g
    adafactor  u = g over a factored root mean square, clipped to a root mean square of 1, times that of W (Shazeer &
               Stern, 1804.04235, with optax's constants: b2 = 1 - t^-0.8, no momentum). Its learning rate is relative
               to the weights, some 1e-3 to 1e-2. Both root mean squares are of a leaf, so of all stacked layers.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ..models.decoder import Params

Optimizer = Literal["adamw", "adafactor", "sgd", "lion"]
Schedule = Literal["constant", "linear", "cosine", "wsd"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How a gradient becomes an update."""

    name: Optimizer = "adamw"
    learning_rate: float = 1e-5  # the peak
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    decay_to: float = 0.1  # the last step's share of the peak; `constant` ignores it, and 0 makes that step idle
    b1: float = 0.9  # adamw, lion
    b2: float | None = None  # adamw, lion; None is their papers': 0.999 and 0.99
    eps: float = 1e-8  # adamw
    momentum: float = 0.9  # sgd
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0  # of the whole gradient; None clips nothing

    def __post_init__(self):
        for name, kind in (("name", Optimizer), ("schedule", Schedule)):
            if getattr(self, name) not in get_args(kind):
                self._refuse(name, f"one of {', '.join(get_args(kind))}")
        unset = [name for name in ("b2", "clip_norm") if getattr(self, name) is None]
        for name in ("learning_rate", "eps", "clip_norm"):
            if name not in unset and not 0 < getattr(self, name) < math.inf:
                self._refuse(name, "a positive number" + " or None" * (name == "clip_norm"))
        for name in ("b1", "b2", "momentum"):
            if name not in unset and not 0 <= getattr(self, name) < 1:
                self._refuse(name, "a number from 0 to below 1" + " or None" * (name == "b2"))
        if not 0 <= self.decay_to <= 1:
            self._refuse("decay_to", "a number from 0 to 1, a share of the peak")
        if not 0 <= self.weight_decay < math.inf:
            self._refuse("weight_decay", "0 or a positive number")
        if not isinstance(self.warmup_steps, int) or isinstance(self.warmup_steps, bool) or self.warmup_steps < 0:
            self._refuse("warmup_steps", "0 or a positive integer, in steps")

    def _refuse(self, name: str, expected: str):
        raise ValueError(f"OptimizerConfig.{name}: found {getattr(self, name)!r}; expected {expected}.")


def make_schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of step t, for t from 0 to `steps` - 1, in float32.

    With w warm-up steps, step t < w has (t + 1) / w of the peak: the first learns already, and step w - 1 is at the
    peak. `constant` stays there. The others are at the peak at step w too and at `decay_to` of it at the last step, and
    stay there behind it: `linear` on a straight line, `cosine` on half a wave (Loshchilov & Hutter, 1608.03983), `wsd`
    (warm-up, stable, decay; Hu et al., 2404.06395) at the peak but for the last fifth of the steps, which is linear.

    Args:
      cfg: the shape and its peak.
      steps: of the whole run.

    Raises:
      ValueError: for a run without steps, or with fewer than its warm-up.
    """
    w = cfg.warmup_steps
    if not isinstance(steps, int) or steps < max(w, 1):
        raise ValueError(
            f"make_schedule: found {steps!r} steps and warmup_steps={w}; expected at least {max(w, 1)} steps. "
            "Run longer, or warm up for fewer steps."
        )
    last = steps - 1
    begin = max(w, last - steps // 5) if cfg.schedule == "wsd" else w

    def learning_rate(count: Any) -> Float[Array, ""]:
        t = jnp.asarray(count).astype(jnp.float32)
        done = jnp.clip((t - begin) / max(last - begin, 1), 0.0, 1.0)
        if cfg.schedule == "constant":
            left = jnp.ones_like(t)
        else:
            left = 0.5 + 0.5 * jnp.cos(jnp.pi * done) if cfg.schedule == "cosine" else 1.0 - done
        return cfg.learning_rate * jnp.minimum((t + 1.0) / max(w, 1), 1.0) * (cfg.decay_to + (1 - cfg.decay_to) * left)

    return learning_rate


def decays(params: Params) -> Any:
    """For every parameter, whether weight decay shrinks it: all but norm gains and biases.

    The last name of the path decides, for the gains of stacked layers have two axes as a matrix has.
    """
    fixed = lambda path: jax.tree_util.keystr(path[-1:], simple=True).endswith(("norm", "bias"))
    return jax.tree_util.tree_map_with_path(lambda path, _: not fixed(path), params)


def make_optimizer(
    cfg: OptimizerConfig, steps: int, own_decay: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """The chain of this file's docstring.

    Updates and state are float32, for bfloat16 parameters too; `optax.apply_updates` adds in float32 and rounds once.

    Args:
      cfg: which optimiser, and its numbers.
      steps: of the whole run, for the schedule.
      own_decay: weight decay of parts of the parameters, by their names at the top, instead of that of `cfg`.
    """
    b2 = {"adamw": 0.999, "lion": 0.99}.get(cfg.name, 0.0) if cfg.b2 is None else cfg.b2
    directions = {
        "adamw": lambda: optax.scale_by_adam(cfg.b1, b2, cfg.eps),
        "lion": lambda: optax.scale_by_lion(cfg.b1, b2),
        "sgd": lambda: optax.trace(cfg.momentum) if cfg.momentum else optax.identity(),
        "adafactor": lambda: optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
        ),
    }
    clip = optax.identity() if cfg.clip_norm is None else optax.clip_by_global_norm(cfg.clip_norm)
    decay = _weight_decay(cfg.weight_decay, own_decay or {})
    rate = optax.scale_by_learning_rate(make_schedule(cfg, steps))
    return _in_float32(optax.chain(clip, directions[cfg.name](), decay, rate))


def update_ema(ema: Params, params: Params, decay: float, step: Int[Array, ""] | None = None) -> Params:
    """A step of the running mean: ema <- d ema + (1 - d) params, with d = `decay`, in float32.

    With `step`, the number of updates before this one, d = min(decay, (1 + step) / (10 + step)): the mean forgets what
    it began with, and is slow only once it has seen enough (as TensorFlow's `ExponentialMovingAverage`).
    """
    rate = 1 - decay if step is None else jnp.maximum(1 - decay, 9.0 / (10.0 + step.astype(jnp.float32)))
    return jax.tree.map(lambda e, p: e + rate * (p.astype(jnp.float32) - e), ema, params)


# ----------------------------------------------------------------------------------------------------------- private
def _weight_decay(usual: float, own: Mapping[str, float]) -> optax.GradientTransformation:
    """As `optax.add_decayed_weights`, with a strength for each part."""
    strength = lambda path: own.get(jax.tree_util.keystr(path[:1], simple=True), usual)
    add = lambda path, u, w, shrinks: u + strength(path) * w if shrinks and strength(path) else u

    def update(updates: Any, params: Any = None) -> Any:
        return jax.tree_util.tree_map_with_path(add, updates, params, decays(params))

    return optax.stateless(update)


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """optax keeps second moments in the parameters' dtype, and bfloat16 forgets what is 1/256 of them a step."""
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    return optax.GradientTransformation(
        lambda params: tx.init(wide(params)),
        lambda updates, state, params=None: tx.update(wide(updates), state, wide(params)),
    )
