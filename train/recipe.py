"""What kinds of training there are: the data each reads, what it trains and what it leaves alone, its objective.

One dict, `RECIPES`, names them. `run.py` does for all of them what is the same for all.

What is trained beside a frozen target sees `{"target": ...}` and its own parameters; some kinds read a second frozen
network too, their companion.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from ..models import checkpoint, eagle, heads, hf, jakiro, kangaroo, reward
from ..models.decoder import DecoderConfig, Model, Params, Remat, param_axes, param_shapes
from ..models.kangaroo import KangarooConfig
from ..models.lora import LoraConfig, apply_lora, init_lora, lora_axes
from ..models.multi_precision import init_scales, scale_axes, to_master
from ..models.reward import RewardConfig, RewardModel
from ..models.safetensors import CheckpointError, read_json
from ..models.tokenizer import Tokenizer
from ..sharding.rules import Rules
from . import preference, qat
from .data.formats import Layout
from .data.pipeline import Encode, count_units
from .data.steps import StepsConfig, encode_steps, weigh_negatives
from .data.tokenise import Encoded, encode_labelled, encode_sft
from .labels.truth import outcome_row
from .objectives import eagle as eagle_objective
from .objectives import ivo, labelled, prm, sft, specdec_pp
from .objectives import jakiro as jakiro_objective
from .objectives import judge as judge_objective
from .objectives import kangaroo as kangaroo_objective
from .objectives.eagle import EagleLossConfig
from .objectives.jakiro import JakiroLossConfig
from .objectives.labelled import LabelledLossConfig
from .objectives.specdec_pp import DrafterConfig, SpecDecPPConfig
from .optimizer import OptimizerConfig, make_optimizer
from .preference import Carry, PreferenceOptions
from .qat import QatOptions
from .step import Counts, LossFn, Metrics, Turns


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """A model that says how good a step is, or from any token how an answer will end.

    Attributes:
      head: read the score from two tokens' logits, or by a value head.
      inner: width of the value head's ReLU layer; a linear head when not given.
      separator: the token behind each step, where its score is read.
      good: the two tokens, for token pairs.
      bad: the other.
      start: text before the first step.
      between: text before every other one.
      surprisal: let the value head read how unlikely the decoder itself finds each step. The separator had better be a
        token that the decoder would write there, such as the newline.
      train: the decoder and the head, or the head alone, which is fast and keeps what the decoder knows.
      negative_weight: what a wrong step counts beside a right one.
      negative_share: weigh solutions that hold a wrong step until they are this share of all; 0 leaves them as they
        are, 0.5 is one to one.
      labels: what the labels of steps mean.
    """

    head: Literal["value", "token-pair"] = "value"
    inner: int | None = None
    separator: str = "<|sep|>"
    good: str = "<|good|>"
    bad: str = "<|bad|>"
    start: str = ""
    between: str = "\n"
    surprisal: bool = False
    train: Literal["all", "head"] = "all"
    negative_weight: float = 1.0
    negative_share: float = 0.0
    labels: StepsConfig = StepsConfig()

    def __post_init__(self):
        if not 0 <= self.negative_share < 1:
            raise ValueError(f"train: negative_share={self.negative_share}; expected 0, or a share below 1.")
        if self.train == "head" and self.head == "token-pair":
            raise ValueError("train: train='head' with head='token-pair'; expected a value head, for a pair has none.")


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
    carry: Carry | None = None


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
Examples = Sequence[Mapping[str, Any]]


class Recipe(NamedTuple):
    """What one kind of training has that others have not."""

    layout: Callable[[Any], Layout]  # from its options
    encoder: Callable[[Origin, Any], Encode]  # (origin, options) -> how an example becomes tokens
    options: type  # a dataclass of the settings of this kind alone
    defaults: Mapping[str, Any]  # of the settings that all kinds have
    trainable: Callable[[Origin, Any, LoraConfig | None], Trainable]
    make_loss: Callable[..., LossFn]  # (origin, options, *, rules, remat)
    counts: Callable[[Any], Counts] = lambda options: count_units
    paths: tuple[str, ...] = ()  # options that name folders
    prepare: Callable[[Examples, Any], Examples] = lambda examples, options: examples  # rows, with more in them
    optimizer: Callable[[Origin, Any, OptimizerConfig, int], Any] = (  # (..., ..., settings, steps of the run)
        lambda origin, options, settings, steps: make_optimizer(settings, steps)
    )
    parts: Callable[[Any], int] = lambda options: 1  # sequences of an example
    more: Callable[[Any], tuple[str, ...]] = lambda options: ()  # further numbers of tokens
    scored: Callable[[Origin, Any], Encode | None] = lambda origin, options: None  # by a reference, before the run
    turns: Callable[[Origin, Any, int], Turns | None] = lambda origin, options, steps: None  # updates of one step
    check_start: Callable[[Origin, Any, Metrics], None] = lambda origin, options, metrics: None  # those of step 1


def _sft_loss(origin: Origin, options: SftOptions, *, rules: Rules, remat: Remat) -> LossFn:
    del options
    return sft.make_loss(origin.config, rules=rules, remat=remat)


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


def _drafter_loss(origin: Origin, options: DrafterOptions, *, rules: Rules, remat: Remat) -> LossFn:
    cfg, guess = _drafter_config(origin.config, options), EagleLossConfig(noise=options.noise)
    if isinstance(cfg, eagle.EagleConfig):
        return eagle_objective.make_loss(cfg, guess, rules=rules, remat=remat)
    return jakiro_objective.make_loss(cfg, JakiroLossConfig(guess=guess), rules=rules, remat=remat)


def _early_exit(origin: Origin, options: EarlyExitOptions, lora: LoraConfig | None) -> Trainable:
    _no_adapters(lora)
    cfg = network_config("early-exit", origin.config, options)
    return beside_target(kangaroo.KIND, cfg, kangaroo)


def _early_exit_loss(origin: Origin, options: EarlyExitOptions, *, rules: Rules, remat: Remat) -> LossFn:
    cfg = network_config("early-exit", origin.config, options)
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


def _acceptance_loss(origin: Origin, options: AcceptanceOptions, *, rules: Rules, remat: Remat) -> LossFn:
    drafter, cfg = read_drafter(origin.config, options), _specdec_pp_config(options)
    return specdec_pp.make_loss(origin.config, drafter, cfg, rules=rules, remat=remat)


def _specdec_pp_config(options: AcceptanceOptions) -> SpecDecPPConfig:
    return SpecDecPPConfig(refusal_weight=options.refusal_weight, keep=options.keep)


def _judge(origin: Origin, options: JudgeOptions, lora: LoraConfig | None) -> Trainable:
    _no_adapters(lora)
    _judge_loss_config(options)  # refuses, before anything is made
    return beside_target(heads.JUDGE, network_config("judge", origin.config, options), heads, "head")


def _judge_loss(origin: Origin, options: JudgeOptions, *, rules: Rules, remat: Remat) -> LossFn:
    cfg = network_config("judge", origin.config, options)
    return judge_objective.make_loss(cfg, _judge_loss_config(options), rules=rules, remat=remat)


def _judge_loss_config(options: JudgeOptions) -> LabelledLossConfig:
    return LabelledLossConfig(negative_weight=options.negative_weight)


def reward_config(origin: Origin, options: RewardOptions) -> RewardConfig:
    """Of the reward model that a run with these options trains.

    Raises:
      ValueError: for tokens that the tokenizer lacks, and if the run begins with a reward model of another form.
    """
    token = lambda text: reward.one_token(origin.tokenizer, text)
    pair: Any = {}
    if options.head == "token-pair":
        pair = {"kind": "token_pair", "good": token(options.good), "bad": token(options.bad)}
    cfg = RewardConfig(
        target=origin.config,
        separator=token(options.separator),
        inner=options.inner,
        start=options.start,
        between=options.between,
        surprisal=options.surprisal,
        **pair,
    )
    if origin.like is not None and reward.is_reward_model(origin.like):
        found = reward.read_config(origin.like, origin.config)
        if found != cfg:
            differ = [f.name for f in dataclasses.fields(cfg) if getattr(found, f.name) != getattr(cfg, f.name)]
            raise ValueError(
                f"train: {origin.like} is a reward model whose {', '.join(differ)} are not those asked for; expected "
                "the same, to go on from its head. Give the options it was trained with."
            )
    return cfg


def _reward(origin: Origin, options: RewardOptions, lora: LoraConfig | None) -> Trainable:
    """The whole decoder or none of it, and the value head: that of the reward model it begins with, or a fresh one."""
    if lora is not None:
        raise ValueError("train: adapters='lora' for a reward model; expected 'none': all of it is trained.")
    cfg = reward_config(origin, options)
    known = origin.like is not None and reward.is_reward_model(origin.like)

    def head(key: jax.Array) -> Params:
        return reward.read_head(origin.like, cfg) if known and origin.like else reward.init_head(cfg, key)

    def write(folder: Path, params: Params) -> None:
        model = RewardModel(cfg, params)
        reward.save(folder, model, like=origin.like, tokenizer=origin.tokenizer, overwrite=True)

    if options.train == "head":
        join = lambda params, frozen: {"model": frozen, "head": params}
        return Trainable(lambda base, key: head(key), reward.head_axes(cfg), True, join, join, write)
    alone = lambda params, frozen: params
    axes = {"model": param_axes(origin.config), "head": reward.head_axes(cfg)}
    return Trainable(lambda base, key: {"model": base, "head": head(key)}, axes, False, alone, alone, write)


def _value(origin: Origin, options: RewardOptions, lora: LoraConfig | None) -> Trainable:
    if options.surprisal:
        raise ValueError("train value: found --surprisal; expected none: it is of steps, and a value is of tokens.")
    return _reward(origin, options, lora)


def _reward_loss(origin: Origin, options: RewardOptions, *, rules: Rules, remat: Remat) -> LossFn:
    cfg = LabelledLossConfig(negative_weight=options.negative_weight)
    return prm.make_loss(reward_config(origin, options), cfg, rules=rules, remat=remat)


def _value_loss(origin: Origin, options: RewardOptions, *, rules: Rules, remat: Remat) -> LossFn:
    return ivo.make_loss(reward_config(origin, options), rules=rules, remat=remat)


def _steps_encoder(origin: Origin, options: RewardOptions) -> Encode:
    text, tokenizer = reward_config(origin, options).text, origin.tokenizer

    def encode(row: Mapping[str, Any]) -> Encoded:
        if row.get("joiner", text.between) != text.between:  # of `label split`, whose steps hold what separates them
            raise ValueError(
                f"train prm: steps of a row are joined by {row['joiner']!r}, and between={text.between!r} stands "
                "before each; expected the same. Set --between to what joins them."
            )
        return encode_steps(tokenizer, row, text, options.labels)

    return encode


def _outcome_encoder(origin: Origin, options: RewardOptions) -> Encode:
    """One label, at the last step: whether the solution is right."""
    text, tokenizer = reward_config(origin, options).text, origin.tokenizer

    def encode(row: Mapping[str, Any]) -> Encoded:
        if "outcome" not in row:
            raise ValueError(f"train orm: a row has columns {sorted(row)}; expected an `outcome`, 0 or 1.")
        return encode_steps(tokenizer, outcome_row(dict(row), bool(row["outcome"])), text)

    return encode


def _weigh_negatives(examples: Examples, options: RewardOptions) -> Examples:
    """Negative up-sampling, by weight."""
    share = options.negative_share
    return weigh_negatives(examples, options.labels, share) if share else examples  # type: ignore[return-value]


def _qat(origin: Origin, options: QatOptions, lora: LoraConfig | None) -> Trainable:
    """The weights and their scales; what is written is the master."""
    if lora is not None:
        raise ValueError("train qat: adapters='lora'; expected 'none': a master is made of all weights.")
    rules, axes = qat.quant_rules(origin.config, options), param_axes(origin.config)
    taught = options.teacher == "fp"

    def init(base: Params, key: jax.Array) -> Params:
        model = jax.tree.map(lambda w: w + 0.0, base) if taught else base  # a buffer of its own: the teacher stays
        return {"model": model, "scales": init_scales(base, rules)}

    def write(folder: Path, master: Params) -> None:
        hf.save(folder, Model(origin.config, master), quant=rules, like=origin.like, overwrite=True)
        if origin.like is None:
            origin.tokenizer.save(folder)

    return Trainable(
        init,
        axes={"model": axes, "scales": scale_axes(axes, rules)},
        beside=taught,
        combine=lambda params, frozen: params | ({"teacher": frozen} if taught else {}),
        result=lambda params, frozen: to_master(params["model"], params["scales"], rules),
        write=write,
    )


def _qat_loss(origin: Origin, options: QatOptions, *, rules: Rules, remat: Remat) -> LossFn:
    return qat.make_loss(origin.config, options, rules=rules, remat=remat)


def _preference(origin: Origin, options: PreferenceOptions, lora: LoraConfig | None) -> Trainable:
    """The decoder or adapters to it; what is written is a Hugging Face folder either way."""
    parts = preference.trainable_parts(origin.config, options, lora)
    write = whole_model(origin, None).write
    return Trainable(*parts, write, carry=preference.carry_of(options))


def _preference_loss(origin: Origin, options: PreferenceOptions, *, rules: Rules, remat: Remat) -> LossFn:
    return preference.make_loss(origin.config, options, rules=rules, remat=remat, tokenizer=origin.tokenizer)


def _scored(origin: Origin, options: PreferenceOptions) -> Encode | None:
    if preference.reference_of(options) != "precomputed":
        return None
    return preference.bare_encoder(origin.tokenizer, options)


def _no_adapters(lora: LoraConfig | None) -> None:
    if lora is not None:
        raise ValueError("train: adapters='lora' beside a drafter or head; expected 'none': its target is left alone.")


# EAGLE's and Kangaroo's own: betas 0.9 and 0.95, a learning rate of 5e-5, gradients clipped to 0.5; by the norm, where
# their code clips each number. They warm up for 2,000 of 800,000 steps, which a short run would never leave.
_GENTLE = {"optimizer": {"learning_rate": 5e-5, "b2": 0.95, "clip_norm": 0.5, "warmup_steps": 100}}

# A head is small, and what is under it stays: it may move faster. The numbers are ours.
_HEAD = {"optimizer": {"learning_rate": 1e-3, "warmup_steps": 100}}

_SFT = lambda origin, options: partial(encode_sft, origin.tokenizer)
_LABELLED = lambda origin, options: partial(encode_labelled, origin.tokenizer)

_ROWS: Callable[[Any], Layout] = lambda options: "sft"
_STEPS: Callable[[Any], Layout] = lambda options: "steps"
_ALONE: Callable[[Any], Layout] = lambda options: "unpaired"
_BY_LABEL = lambda options: labelled.count_units

RECIPES = {
    "sft": Recipe(_ROWS, _SFT, SftOptions, {}, lambda origin, _, lora: whole_model(origin, lora), _sft_loss),
    "drafter": Recipe(_ROWS, _SFT, DrafterOptions, _GENTLE, _drafter, _drafter_loss),
    "early-exit": Recipe(_ROWS, _SFT, EarlyExitOptions, _GENTLE, _early_exit, _early_exit_loss),
    "acceptance": Recipe(_ROWS, _SFT, AcceptanceOptions, _HEAD, _acceptance, _acceptance_loss, paths=("drafter",)),
    "judge": Recipe(_ALONE, _LABELLED, JudgeOptions, _HEAD, _judge, _judge_loss, _BY_LABEL),
    "prm": Recipe(
        _STEPS, _steps_encoder, RewardOptions, {}, _reward, _reward_loss, _BY_LABEL, prepare=_weigh_negatives
    ),
    "orm": Recipe(_STEPS, _outcome_encoder, RewardOptions, {}, _reward, _reward_loss, _BY_LABEL),
    "value": Recipe(_ALONE, _LABELLED, RewardOptions, {}, _value, _value_loss, _BY_LABEL),
    "qat": Recipe(
        _ROWS,
        _SFT,
        QatOptions,
        {},
        _qat,
        _qat_loss,
        paths=("sensitivity",),
        optimizer=lambda origin, options, settings, steps: qat.make_optimizer(origin.config, options, settings, steps),
        turns=lambda origin, options, steps: qat.make_turns(origin.config, options, steps),
    ),
    "preference": Recipe(
        lambda options: preference.objective_of(options).layout,
        lambda origin, options: preference.encoder(origin.tokenizer, options),
        PreferenceOptions,
        {"optimizer": {"learning_rate": 1e-6}},
        _preference,
        _preference_loss,
        preference.counts,
        prepare=preference.prepare,
        parts=lambda options: preference.objective_of(options).parts(preference.settings_of(options)),
        more=preference.number_names,
        scored=_scored,
        optimizer=lambda origin, options, settings, steps: preference.optimizer_of(options, settings, steps),
        check_start=lambda origin, options, metrics: preference.check_start(options, origin.config.dtype, metrics),
    ),
}
