"""Joint quantisation-aware training: the settings of `jaxaroo train qat`, and what they make of a decoder.

One int8 master that serves every width it was trained at (Double Rounding, 2502.01199). The parts are in `precision/`,
the objective in `objectives/double_rounding.py`.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import tyro
from jaxtyping import Array, Float

from ..models.decoder import DecoderConfig, Remat, param_shapes
from ..models.multi_precision import INPUT_AXES, MATRICES, QuantRules, path_name, quantised_paths
from ..models.quantise import QuantConfig
from ..models.safetensors import read_json
from ..sharding.rules import Rules
from .objectives import double_rounding
from .optimizer import OptimizerConfig
from .precision.distill import DistillConfig
from .precision.joint import ScaleConfig, hasb_turns, joint_optimizer, width_turns
from .step import LossFn, Turns


@dataclasses.dataclass(frozen=True, kw_only=True)
class QatOptions:
    """One int8 master that serves several widths.

    Attributes:
      bits: the widths, falling and with commas between them; the first is the master's.
      group: inputs that share a scale; one scale an output channel when not given.
      rules: matrices that differ, as REGEX=WIDTHS or REGEX=none for a path like layers/mlp/down; the first that matches
        counts, and every other matrix of attention and MLP has `bits`.
      init: where scales begin: 3 standard deviations, the least error over the widths, the largest weight, or LSQ's.
      gain: widths that have a learned factor of each output channel: those up to 3 bits, none, or all.
      scale_rate: learning rate of the scales at the master's width, the peak.
      alrs: how that rate depends on the width.
      scale_param: learn the logarithm of a scale, or as in the paper the scale.
      grad_scale: divide the gradient of a scale by the root of how many weights share it, as LSQ does.
      order: all widths in every step, or the highest, one between, and the lowest.
      layers: all layers of a turn have its width, or draw some of their own (HASB).
      sensitivity: for HASB, bits.json of `jaxaroo eval bits`, with the trace of each layer.
      redraw: the share of layers that draw, when it is largest.
      teacher: a width learns from the highest one as well, from the float model it began as, or from the data alone.
      kappa: what the teacher counts; the rest is the data.
      temperature: of both, when they are compared.
    """

    bits: Annotated[str, tyro.conf.arg(metavar="WIDTHS")] = "8,6,4,2"
    group: int | None = None
    rules: tuple[str, ...] = ()
    init: Literal["sigma3", "search", "absmax", "lsq"] = "sigma3"
    gain: Literal["low", "none", "all"] = "low"
    scale_rate: float = 1e-4
    alrs: Literal["relative", "printed", "eta_only", "off"] = "relative"
    scale_param: Literal["log2", "linear"] = "log2"
    grad_scale: bool = True
    order: Literal["all", "sandwich"] = "all"
    layers: Literal["uniform", "hasb"] = "uniform"
    sensitivity: str | None = None
    redraw: float = 1.0
    teacher: Literal["inplace", "fp", "none"] = "inplace"
    kappa: float = 0.5
    temperature: float = 1.0

    def __post_init__(self):
        read_widths(self.bits)
        _teaching(self)  # refuse, before anything is made
        _scales(self)
        if (self.layers == "hasb") != (self.sensitivity is not None):
            raise ValueError(
                f"train qat: layers={self.layers!r}, sensitivity={self.sensitivity}; expected both --layers hasb and "
                "--sensitivity, the bits.json of `jaxaroo eval bits`, or neither."
            )
        if self.layers == "hasb" and self.order == "sandwich":
            raise ValueError("train qat: order='sandwich', layers='hasb'; expected order 'all', in which layers draw.")
        if not 0 < self.redraw <= 1:
            raise ValueError(f"train qat: redraw={self.redraw}; expected a share above 0, up to 1.")


def read_widths(text: str) -> tuple[int, ...]:
    """`8,6,4,2` as numbers."""
    try:
        return QuantConfig(bits=tuple(int(part) for part in text.split(","))).bits
    except ValueError as e:
        raise ValueError(f"train qat: bits={text!r}; expected falling widths from 8 to 2, such as 8,6,4,2.") from e


def quant_rules(config: DecoderConfig, options: QatOptions) -> QuantRules:
    """Which matrices are quantised, and how.

    Raises:
      ValueError: for a rule that is none, that matches no matrix, or whose groups do not divide its inputs, and for
        rules that leave nothing to quantise.
    """

    def made(text: str) -> QuantConfig:
        widths = read_widths(text)
        gain = {"low": tuple(b for b in widths if b <= 3), "none": (), "all": widths}[options.gain]
        shared = {name: getattr(options, name) for name in ("group", "init", "scale_param", "grad_scale")}
        return QuantConfig(bits=widths, gain=gain, **shared)

    rules: list[tuple[str, QuantConfig | None]] = []
    for rule in options.rules:
        pattern, equals, text = rule.rpartition("=")
        if not equals or not _is_pattern(pattern):
            raise ValueError(f"train qat: rule {rule!r}; expected REGEX=WIDTHS or REGEX=none.")
        rules.append((pattern, None if text == "none" else made(text)))
    rules.append((MATRICES, made(options.bits)))
    shapes = {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(param_shapes(config))}
    quantised = quantised_paths(param_shapes(config), tuple(rules))  # refuses a rule that matches nothing
    for name, cfg in quantised.items():
        if (inputs := math.prod(shapes[name][-INPUT_AXES[name.split("/")[-1]] :])) % (cfg.group or inputs):
            raise ValueError(
                f"train qat: groups of {cfg.group} for the {inputs} inputs of {name}; expected a divisor of them. "
                "Leave --group out for one scale an output channel."
            )
    if not quantised:
        raise ValueError(f"train qat: rules {options.rules} leave every matrix float; expected some to quantise.")
    return tuple(rules)


def trained_widths(config: DecoderConfig, rules: QuantRules) -> tuple[int, ...]:
    """Those of all quantised matrices, falling."""
    return tuple(sorted({b for c in quantised_paths(param_shapes(config), rules).values() for b in c.bits})[::-1])


def make_loss(config: DecoderConfig, options: QatOptions, *, rules: Rules, remat: Remat) -> LossFn:
    """The objective at the width of a turn."""
    quant = quant_rules(config, options)
    master = trained_widths(config, quant)[0]
    return double_rounding.make_loss(config, quant, master, _teaching(options), rules=rules, remat=remat)


def make_turns(config: DecoderConfig, options: QatOptions, steps: int) -> Turns:
    """Widths of the updates of a step."""
    widths = trained_widths(config, quant_rules(config, options))
    if options.sensitivity is None:
        return width_turns(widths, config.num_layers, order=options.order)
    return hasb_turns(widths, read_traces(Path(options.sensitivity), config.num_layers), steps, most=options.redraw)


def make_optimizer(config: DecoderConfig, options: QatOptions, optimizer: OptimizerConfig, steps: int):
    """One state for the weights, and one for the scales at each width."""
    turns = len(make_turns(config, options, steps).names)
    return joint_optimizer(optimizer, _scales(options), steps, turns, quant_rules(config, options))


def read_traces(path: Path, layers: int) -> Float[Array, " L"]:
    """How sensitive each layer is, as `jaxaroo eval bits` wrote it down."""
    traces = read_json(path).get("trace")
    numbers = traces if isinstance(traces, list) else []
    if len(numbers) != layers or not all(type(t) in (int, float) and abs(t) < 1e30 for t in numbers):  # no NaN either
        raise ValueError(
            f"train qat: {path} has trace {str(traces)[:80]}; expected one number for each of {layers} layers, as "
            "`jaxaroo eval bits` writes them for this model."
        )
    return jnp.asarray(numbers, jnp.float32)


# ----------------------------------------------------------------------------------------------------------- private
def _teaching(options: QatOptions) -> DistillConfig | None:
    if options.teacher == "none":
        return None
    return DistillConfig(teacher=options.teacher, kappa=options.kappa, temperature=options.temperature)


def _scales(options: QatOptions) -> ScaleConfig:
    return ScaleConfig(learning_rate=options.scale_rate, alrs=options.alrs)


def _is_pattern(text: str) -> bool:
    try:
        return bool(re.compile(text))
    except re.error:
        return False
