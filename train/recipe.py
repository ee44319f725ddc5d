"""What kinds of training there are: the data each reads, what it trains and what it leaves alone, its objective.

One dict, `RECIPES`, names them. `run.py` does for all of them what is the same for all.

What is trained beside a frozen target sees `{"target": ...}` and its own parameters; some kinds read a second frozen
network too, their companion.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from ..models import checkpoint, eagle, heads, hf, jakiro, kangaroo
from ..models.decoder import DecoderConfig, Model, Params, Remat, param_axes, param_shapes
from ..models.kangaroo import KangarooConfig
from ..models.lora import LoraConfig, apply_lora, init_lora, lora_axes
from ..models.safetensors import CheckpointError, read_json
from ..models.tokenizer import Tokenizer
from ..sharding.rules import Rules
from .data.formats import Layout
from .data.pipeline import count_units
from .data.tokenise import Encoded, encode_labelled, encode_sft
from .objectives import eagle as eagle_objective
from .objectives import jakiro as jakiro_objective
from .objectives import judge as judge_objective
from .objectives import kangaroo as kangaroo_objective
from .objectives import sft, specdec_pp
from .objectives.eagle import EagleLossConfig
from .objectives.jakiro import JakiroLossConfig
from .objectives.judge import JudgeLossConfig
from .objectives.specdec_pp import DrafterConfig, SpecDecPPConfig
from .step import Counts, LossFn


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class AcceptanceOptions:
    """SpecDec++'s head, which ends a draft that is likely to be refused.

    Attributes:
      drafter: folder of what drafts: a smaller model with the target's tokenizer, or a trained Kangaroo adapter.
      blocks: residual blocks of the head.
      refusal_weight: what a refusal counts beside an acceptance.
      keep: how often the text's own token stands in place of a draft.
    """

    drafter: str | None = None
    blocks: int = 3
    refusal_weight: float = 6.0
    keep: float = 0.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """A judge of the target's tokens.

    Attributes:
      negative_weight: what a bad token counts beside a good one.
    """

    negative_weight: float = 1.0


# -------------------------------------------------------------------------------------------------- what a run trains
class Companion(NamedTuple):
    """A second frozen network that the objective reads; with one, what is frozen is {"target": ..., "drafter": ...}."""

    load: Callable[[Mesh, Rules], Params]  # its float32 weights, layers stacked, where the rules say
    axes: Params
    shapes: Params


class Trainable(NamedTuple):
    """What of a model, or beside it, a run changes."""

    init: Callable[[Params, jax.Array], Params]  # (the model's weights, key) -> what is trained; may be the weights
    axes: Params  # logical axes of what is trained
    beside: bool  # the model's weights stay, frozen
    combine: Callable[[Params, Params], Params]  # (trained, frozen) -> what the objective sees
    result: Callable[[Params, Params], Params]  # (trained, frozen) -> what is written
    write: Callable[[Path, Params], None]  # on one process, with the result on the host
    companion: Companion | None = None


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


def beside_target(
    kind: str, cfg: Any, network: Any, name: str = "drafter", companion: Companion | None = None
) -> Trainable:
    """A small network beside a frozen target; `network` is its module in `models/`, `name` the objective's for it."""

    def combine(params: Params, frozen: Params) -> Params:
        return {name: params} | ({"target": frozen} if companion is None else frozen)

    return Trainable(
        init=lambda base, key: network.init_params(cfg, key),
        axes=network.param_axes(cfg),
        beside=True,
        combine=combine,
        result=lambda params, frozen: params,
        write=lambda folder, params: checkpoint.save(folder, kind, cfg, params, overwrite=True),
        companion=companion,
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
    counts: Counts = count_units
    paths: tuple[str, ...] = ()  # options that name folders


def _sft_loss(config: DecoderConfig, options: SftOptions, *, rules: Rules, remat: Remat) -> LossFn:
    del options
    return sft.make_loss(config, rules=rules, remat=remat)


def network_config(kind: str, config: DecoderConfig, options: Any) -> Any:
    """The configuration of the small network that a run of this kind trains beside its target."""
    if kind == "early-exit":
        return kangaroo.KangarooConfig(target=config, exit_layer=options.exit_layer)
    if kind == "judge":
        return heads.JudgeConfig(target=config)
    if kind == "acceptance":
        drafter = read_drafter(config, options)
        if isinstance(drafter, KangarooConfig):
            return heads.AcceptanceConfig(target=config, blocks=options.blocks, exit_layer=drafter.exit_layer)
        return heads.AcceptanceConfig(target=drafter, blocks=options.blocks)
    return _drafter_config(config, options)


def read_drafter(config: DecoderConfig, options: AcceptanceOptions) -> DrafterConfig:
    """What the folder of `options.drafter` holds, for this target.

    Raises:
      ValueError: if none is named, or it is of a kind that has no use for an acceptance head.
      CheckpointError: if it was made for another target or vocabulary.
    """
    if options.drafter is None:
        raise ValueError(
            "train acceptance: found no --drafter; expected the folder of what drafts, a smaller model or a Kangaroo "
            "adapter."
        )
    folder = Path(options.drafter)
    kind = read_json(folder / "config.json").get("model_type", "")
    if kind == checkpoint.PREFIX + kangaroo.KIND:
        return kangaroo.config_of(checkpoint.read_small_config(folder), config)
    if str(kind).startswith(checkpoint.PREFIX):
        raise ValueError(
            f"train acceptance: {folder} holds {str(kind)[:80]!r}; expected a smaller model or a Kangaroo adapter, "
            "whose drafts are chains that may end early."
        )
    drafter = hf.read_config(folder)
    if drafter.vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{folder}: a vocabulary of {drafter.vocab_size}; expected {config.vocab_size}, that of the target. Use a "
            "drafter with the same tokenizer."
        )
    return dataclasses.replace(drafter, dtype=config.dtype)


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


def _acceptance(origin: Origin, options: AcceptanceOptions, lora: LoraConfig | None) -> Trainable:
    _no_adapters(lora)
    _specdec_pp_config(options)  # refuses, before anything is made
    drafter, cfg = read_drafter(origin.config, options), network_config("acceptance", origin.config, options)
    assert options.drafter is not None
    companion = _companion(Path(options.drafter), drafter)
    return beside_target(heads.ACCEPTANCE, cfg, heads, "head", companion)


def _companion(folder: Path, cfg: DrafterConfig) -> Companion:
    if isinstance(cfg, KangarooConfig):
        axes, shapes = kangaroo.param_axes(cfg), kangaroo.param_shapes(cfg)

        def adapter(mesh: Mesh, rules: Rules) -> Params:
            params = checkpoint.load_for(folder, cfg.target, kangaroo.config_of, kangaroo.param_shapes)[1]
            placed = rules.shardings(mesh, axes, shapes)
            return jax.tree.map(lambda x, s: jax.device_put(x.astype("float32"), s), params, placed)

        return Companion(adapter, axes, shapes)

    def small(mesh: Mesh, rules: Rules) -> Params:
        return hf.load(folder, dtype="float32", stacked=True, mesh=mesh, rules=rules, progress=True).params

    return Companion(small, param_axes(cfg), param_shapes(cfg))


def _acceptance_loss(config: DecoderConfig, options: AcceptanceOptions, *, rules: Rules, remat: Remat) -> LossFn:
    drafter, cfg = read_drafter(config, options), _specdec_pp_config(options)
    return specdec_pp.make_loss(config, drafter, cfg, rules=rules, remat=remat)


def _specdec_pp_config(options: AcceptanceOptions) -> SpecDecPPConfig:
    return SpecDecPPConfig(refusal_weight=options.refusal_weight, keep=options.keep)


def _judge(origin: Origin, options: JudgeOptions, lora: LoraConfig | None) -> Trainable:
    _no_adapters(lora)
    _judge_loss_config(options)  # refuses, before anything is made
    return beside_target(heads.JUDGE, network_config("judge", origin.config, options), heads, "head")


def _judge_loss(config: DecoderConfig, options: JudgeOptions, *, rules: Rules, remat: Remat) -> LossFn:
    cfg = network_config("judge", config, options)
    return judge_objective.make_loss(cfg, _judge_loss_config(options), rules=rules, remat=remat)


def _judge_loss_config(options: JudgeOptions) -> JudgeLossConfig:
    return JudgeLossConfig(negative_weight=options.negative_weight)


def _no_adapters(lora: LoraConfig | None) -> None:
    if lora is not None:
        raise ValueError("train: adapters='lora' beside a drafter or head; expected 'none': its target is left alone.")


# EAGLE's and Kangaroo's own: betas 0.9 and 0.95, a learning rate of 5e-5, gradients clipped to 0.5; by the norm, where
# their code clips each number. They warm up for 2,000 of 800,000 steps, which a short run would never leave.
_GENTLE = {"optimizer": {"learning_rate": 5e-5, "b2": 0.95, "clip_norm": 0.5, "warmup_steps": 100}}

# A head is small, and what is under it stays: it may move faster. The numbers are ours.
_HEAD = {"optimizer": {"learning_rate": 1e-3, "warmup_steps": 100}}

RECIPES = {
    "sft": Recipe("sft", encode_sft, SftOptions, {}, lambda origin, _, lora: whole_model(origin, lora), _sft_loss),
    "drafter": Recipe("sft", encode_sft, DrafterOptions, _GENTLE, _drafter, _drafter_loss),
    "early-exit": Recipe("sft", encode_sft, EarlyExitOptions, _GENTLE, _early_exit, _early_exit_loss),
    "acceptance": Recipe(
        "sft", encode_sft, AcceptanceOptions, _HEAD, _acceptance, _acceptance_loss, paths=("drafter",)
    ),
    "judge": Recipe("unpaired", encode_labelled, JudgeOptions, _HEAD, _judge, _judge_loss, judge_objective.count_units),
}
