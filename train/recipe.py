"""What kinds of training there are: the data each reads, what it trains and what it leaves alone, its objective.

One dict, `RECIPES`, names them. `run.py` does for all of them what is the same for all.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from ..models import checkpoint, eagle, hf, jakiro, kangaroo
from ..models.decoder import DecoderConfig, Model, Params, Remat, param_axes
from ..models.lora import LoraConfig, apply_lora, init_lora, lora_axes
from ..models.tokenizer import Tokenizer
from ..sharding.rules import Rules
from .data.formats import Layout
from .data.tokenise import Encoded, encode_sft
from .objectives import eagle as eagle_objective
from .objectives import jakiro as jakiro_objective
from .objectives import kangaroo as kangaroo_objective
from .objectives import sft
from .objectives.eagle import EagleLossConfig
from .objectives.jakiro import JakiroLossConfig
from .step import LossFn


# ------------------------------------------------------------------------------------------------------------ settings
@dataclasses.dataclass(frozen=True, kw_only=True)
class SftOptions:
    """Fine-tuning has none of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrafterOptions:
    """A drafter that reads the target's last hidden states.

    Attributes:
      kind: EAGLE's one layer; Jakiro's two experts, the second branch looking two tokens ahead; or their mixture.
      fc_bias: a bias where token and feature are joined.
      experts_dim: inner width of Jakiro's experts; the target's width when not given.
      noise: added to the features that the drafter reads, as EAGLE does.
    """

    kind: Literal["eagle", "jakiro", "jakiro-mixture"] = "eagle"
    fc_bias: bool = True
    experts_dim: int | None = None
    noise: float = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyExitOptions:
    """Kangaroo: the target's own first layers and a small adapter draft.

    Attributes:
      exit_layer: how many of the target's layers the drafter runs.
    """

    exit_layer: int = 2


# -------------------------------------------------------------------------------------------------- what a run trains
class Trainable(NamedTuple):
    """What of a model, or beside it, a run changes."""

    init: Callable[[Params, jax.Array], Params]  # (the model's weights, key) -> what is trained; may be the weights
    axes: Params  # logical axes of what is trained
    beside: bool  # the model's weights stay, frozen
    combine: Callable[[Params, Params], Params]  # (trained, frozen) -> what the objective sees
    result: Callable[[Params, Params], Params]  # (trained, frozen) -> what is written
    write: Callable[[Path, Params], None]  # on one process, with the result on the host


class Origin(NamedTuple):
    """The model a run begins with."""

    config: DecoderConfig
    tokenizer: Tokenizer
    like: Path | None  # the folder its weights come from


def whole_model(origin: Origin, lora: LoraConfig | None) -> Trainable:
    """All weights, or low-rank adapters to them; what is written is a Hugging Face folder either way."""
    axes = param_axes(origin.config)

    def write(folder: Path, params: Params) -> None:
        hf.save(folder, Model(origin.config, params), like=origin.like, overwrite=True)
        if origin.like is None:
            origin.tokenizer.save(folder)

    if lora is None:
        alone = lambda params, frozen: params
        return Trainable(lambda base, key: base, axes, False, alone, alone, write)
    merge = lambda adapters, base: apply_lora(lora, base, adapters)
    return Trainable(
        lambda base, key: init_lora(lora, base, axes, key), lora_axes(lora, axes), True, merge, merge, write
    )


def beside_target(kind: str, cfg: Any, network: Any) -> Trainable:
    """A small network beside a frozen target; `network` is its module in `models/`."""
    return Trainable(
        init=lambda base, key: network.init_params(cfg, key),
        axes=network.param_axes(cfg),
        beside=True,
        combine=lambda params, frozen: {"drafter": params, "target": frozen},
        result=lambda params, frozen: params,
        write=lambda folder, params: checkpoint.save(folder, kind, cfg, params, overwrite=True),
    )


# ------------------------------------------------------------------------------------------------------------- recipes
class Recipe(NamedTuple):
    """What one kind of training has that others have not."""

    layout: Layout
    encode: Callable[[Tokenizer, Mapping[str, Any]], Encoded]
    options: type  # a dataclass of the settings of this kind alone
    defaults: Mapping[str, Any]  # of the settings that all kinds have
    trainable: Callable[[Origin, Any, LoraConfig | None], Trainable]
    make_loss: Callable[..., LossFn]  # (decoder config, options, *, rules, remat)


def _sft_loss(config: DecoderConfig, options: SftOptions, *, rules: Rules, remat: Remat) -> LossFn:
    del options
    return sft.make_loss(config, rules=rules, remat=remat)


def network_config(kind: str, config: DecoderConfig, options: Any) -> Any:
    """The configuration of the small network that a run of this kind trains beside its target."""
    if kind == "early-exit":
        return kangaroo.KangarooConfig(target=config, exit_layer=options.exit_layer)
    return _drafter_config(config, options)


def _drafter_config(config: DecoderConfig, options: DrafterOptions) -> eagle.EagleConfig | jakiro.JakiroConfig:
    if options.kind == "eagle":
        return eagle.EagleConfig(target=config, fc_bias=options.fc_bias)
    kind = "mixture" if options.kind == "jakiro-mixture" else "contrastive"
    return jakiro.JakiroConfig(target=config, fc_bias=options.fc_bias, experts_dim=options.experts_dim, kind=kind)


def _drafter(origin: Origin, options: DrafterOptions, lora: LoraConfig | None) -> Trainable:
    _no_adapters(lora)
    cfg = _drafter_config(origin.config, options)
    network = eagle if options.kind == "eagle" else jakiro
    return beside_target(network.KIND, cfg, network)


def _drafter_loss(config: DecoderConfig, options: DrafterOptions, *, rules: Rules, remat: Remat) -> LossFn:
    cfg, guess = _drafter_config(config, options), EagleLossConfig(noise=options.noise)
    if isinstance(cfg, eagle.EagleConfig):
        return eagle_objective.make_loss(cfg, guess, rules=rules, remat=remat)
    return jakiro_objective.make_loss(cfg, JakiroLossConfig(guess=guess), rules=rules, remat=remat)


def _early_exit(origin: Origin, options: EarlyExitOptions, lora: LoraConfig | None) -> Trainable:
    _no_adapters(lora)
    cfg = network_config("early-exit", origin.config, options)
    return beside_target(kangaroo.KIND, cfg, kangaroo)


def _early_exit_loss(config: DecoderConfig, options: EarlyExitOptions, *, rules: Rules, remat: Remat) -> LossFn:
    cfg = network_config("early-exit", config, options)
    return kangaroo_objective.make_loss(cfg, rules=rules, remat=remat)


def _no_adapters(lora: LoraConfig | None) -> None:
    if lora is not None:
        raise ValueError("train: adapters='lora' beside a drafter; expected 'none', for its target is left alone.")


# EAGLE's and Kangaroo's own: betas 0.9 and 0.95, a learning rate of 5e-5, gradients clipped to 0.5; by the norm, where
# their code clips each number. They warm up for 2,000 of 800,000 steps, which a short run would never leave.
_GENTLE = {"optimizer": {"learning_rate": 5e-5, "b2": 0.95, "clip_norm": 0.5, "warmup_steps": 100}}

RECIPES = {
    "sft": Recipe("sft", encode_sft, SftOptions, {}, lambda origin, _, lora: whole_model(origin, lora), _sft_loss),
    "drafter": Recipe("sft", encode_sft, DrafterOptions, _GENTLE, _drafter, _drafter_loss),
    "early-exit": Recipe("sft", encode_sft, EarlyExitOptions, _GENTLE, _early_exit, _early_exit_loss),
}
