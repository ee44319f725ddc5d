"""Preference training: the settings of `jaxaroo train preference`, and what they make of a decoder.

The objectives stand in `objectives/by_name.py`, one paper a file behind it. Here is what they have in common: how rows
become sequences, where the reference comes from, and the loss with its forward passes.

    frozen        the model as it began, kept beside what is trained; under adapters it is there anyway
    precomputed   its sums for every row, written down before the first step (`references.py`)
    columns       the sums that the data bring, in `ref_chosen_logps` and so on
    mixed         a copy that follows the policy, every `mix_every` steps by `mix` (TR-DPO, 2404.09656)
    none          for objectives that read no reference

`auto` is none where none is read, mixed for TR-DPO, else frozen. All but columns begin as the model itself: a first
step that finds the two apart ends the run (`check_start`).
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from ..models.decoder import DecoderConfig, Params, Remat, param_axes
from ..models.lora import LoraConfig, apply_lora, init_lora, lora_axes
from ..models.tokenizer import Tokenizer
from ..sharding.rules import Rules
from .data.pipeline import Batch, Encode
from .data.tokenise import Encoded, encode_pair, encode_pairs, encode_sft
from .objectives.asft import AsftConfig
from .objectives.bco import BcoConfig
from .objectives.by_name import OBJECTIVES, Objective
from .objectives.cpo import CpoConfig
from .objectives.d2o import D2oConfig
from .objectives.dft import DftConfig
from .objectives.dpo import DpoConfig
from .objectives.fsft import FsftConfig
from .objectives.gdpo_belief import MOST, GdpoBeliefConfig
from .objectives.kto import KtoConfig
from .objectives.logprobs import Scores, output_table, score_targets, target_kl
from .objectives.mm_dpo import MmDpoConfig
from .objectives.orpo import OrpoConfig
from .objectives.preference import check_name, check_number
from .objectives.sequences import View, all_sums, count_examples, sequence_value
from .objectives.simpo import SimpoConfig
from .objectives.sparsepo import SparsepoConfig
from .objectives.unlearn import UnlearnConfig, answers_of
from .optimizer import OptimizerConfig, make_optimizer
from .other_rows import Examples, ForgetAndRetain, Mismatched
from .references import COLUMN
from .step import Advance, LossFn, Metrics, Term

log = logging.getLogger(__name__)
Reference = Literal["auto", "frozen", "precomputed", "columns", "mixed", "none"]
ROUNDING = {"float32": 1e-3, "bfloat16": 2e-2}  # nats a token by which a model may differ from itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceOptions:
    """Learn from preferences, or fine-tune with an anchor.

    Attributes:
      objective: one of `--objective list`.
      reference: what the policy is held against; auto is what the paper of the objective has.
      mix: what of the policy goes into a mixed reference.
      mix_every: steps between two mixtures.
    """

    objective: str = "dpo"
    reference: Reference = "auto"
    mix: float = 0.6
    mix_every: int = 512
    dpo: Annotated[DpoConfig | None, tyro.conf.Suppress] = None
    mm_dpo: Annotated[MmDpoConfig | None, tyro.conf.Suppress] = None
    kto: Annotated[KtoConfig | None, tyro.conf.Suppress] = None
    bco: Annotated[BcoConfig | None, tyro.conf.Suppress] = None
    orpo: Annotated[OrpoConfig | None, tyro.conf.Suppress] = None
    simpo: Annotated[SimpoConfig | None, tyro.conf.Suppress] = None
    cpo: Annotated[CpoConfig | None, tyro.conf.Suppress] = None
    d2o: Annotated[D2oConfig | None, tyro.conf.Suppress] = None
    dft: Annotated[DftConfig | None, tyro.conf.Suppress] = None
    asft: Annotated[AsftConfig | None, tyro.conf.Suppress] = None
    fsft: Annotated[FsftConfig | None, tyro.conf.Suppress] = None
    sparsepo: Annotated[SparsepoConfig | None, tyro.conf.Suppress] = None
    gdpo_belief: Annotated[GdpoBeliefConfig | None, tyro.conf.Suppress] = None
    unlearn: Annotated[UnlearnConfig | None, tyro.conf.Suppress] = None

    def __post_init__(self):
        check_name("train preference: objective", self.objective, OBJECTIVES)
        check_number("train preference: mix", self.mix, 0 < self.mix <= 1, "a share above 0, up to 1")
        check_number("train preference: mix_every", self.mix_every, self.mix_every >= 1, "at least 1 step")


def objective_of(options: PreferenceOptions) -> Objective:
    """What the name stands for."""
    return OBJECTIVES[options.objective]


def settings_of(options: PreferenceOptions) -> Any:
    """Of the objective: those given, or the published ones."""
    known = objective_of(options).config
    return getattr(options, field_of(known)) or known


def field_of(config: Any) -> str:
    """Under which name of `PreferenceOptions` settings of this type are kept."""
    return {cls: name for name, cls in _CONFIGS.items()}[type(config)]


def with_settings(options: PreferenceOptions, config: Any) -> PreferenceOptions:
    """The options with these settings of their objective, and of no other."""
    empty: Any = dict.fromkeys(_CONFIGS)
    return dataclasses.replace(options, **(empty | {field_of(config): config}))


def reference_of(options: PreferenceOptions) -> Reference:
    """The kind of reference that a run has; never auto."""
    if options.reference != "auto":
        return options.reference
    objective = objective_of(options)
    return "none" if objective.reads(settings_of(options)) == "nothing" else objective.reference


def check_reference(options: PreferenceOptions) -> None:
    """That the objective, with the settings it has, reads such a reference; options are complete by then.

    Raises:
      ValueError: if it reads none and there is one, or the reverse; where what it reads is not written down; and for
        settings of a mixture that there is not.
    """
    objective, name, kind = objective_of(options), options.objective, reference_of(options)
    reads = objective.reads(settings_of(options))
    if (reads == "nothing") != (kind == "none"):
        what = "reads none" if reads == "nothing" else "reads one"
        raise ValueError(
            f"train preference: reference={options.reference!r} with {name}, which {what}; expected "
            f"{'auto or none' if reads == 'nothing' else 'auto, frozen, precomputed, columns or mixed'}."
        )
    if reads in ("tokens", "kl") and kind in ("precomputed", "columns"):
        raise ValueError(
            f"train preference: reference={kind!r} with {name}, which reads the reference at every token; expected "
            "frozen or mixed, for what is written down are sums."
        )
    usual = PreferenceOptions()
    if kind != "mixed" and (options.mix, options.mix_every) != (usual.mix, usual.mix_every):
        raise ValueError(
            f"train preference: mix={options.mix:g} every {options.mix_every} steps with reference={kind!r}, which "
            "stays as it is; expected --reference mixed."
        )
    if kind == "columns" and objective.layout not in _COLUMNS:
        raise ValueError(
            f"train preference: reference='columns' with {name}, whose rows have no column for it; expected auto, "
            "frozen, precomputed or mixed."
        )


# ---------------------------------------------------------------------------------------------------------------- rows
def encoder(tokenizer: Tokenizer, options: PreferenceOptions) -> Encode:
    """How a row becomes the sequences of an example, with the numbers that the objective wants."""
    objective, cfg = objective_of(options), settings_of(options)
    parts, names = objective.parts(cfg), number_names(options)
    sequences = _sequences_of(options)

    def encode(row: Mapping[str, Any]) -> tuple[Encoded, ...]:
        found = sequences(tokenizer, row, parts)
        constant = [name for name in names if name not in (found[0].more or {})]
        numbers = {name: _numbers(name, row, parts, objective.layout) for name in constant}
        spread = lambda i, e: {name: np.full(len(e.ids), numbers[name][i], np.float32) for name in constant}
        return tuple(e._replace(more={**(e.more or {}), **spread(i, e)}) for i, e in enumerate(found))

    return encode


def number_names(options: PreferenceOptions) -> tuple[str, ...]:
    """Of the numbers that examples bring."""
    stored = reference_of(options) in ("precomputed", "columns")
    return (*objective_of(options).more(settings_of(options)), *(["reference"] if stored else []))


def bare_encoder(tokenizer: Tokenizer, options: PreferenceOptions) -> Encode:
    """The sequences alone, to be scored by a reference."""
    sequences, parts = _sequences_of(options), objective_of(options).parts(settings_of(options))
    return lambda row: sequences(tokenizer, row, parts)


def prepare(examples: Examples, options: PreferenceOptions) -> Examples:
    """The rows, with what the objective needs of other rows."""
    if objective_of(options).layout == "unlearn":
        return ForgetAndRetain(examples)  # type: ignore[return-value]
    parts = objective_of(options).parts(settings_of(options))
    return Mismatched(examples) if objective_of(options).layout == "unpaired" and parts == 2 else examples  # type: ignore[return-value]


def counts(options: PreferenceOptions) -> Callable[[Batch], dict[str, jax.Array]]:
    """The units of `count_examples`; of rows with labels also good_example and bad_example."""
    parts = objective_of(options).parts(settings_of(options))
    plain = count_examples(parts)
    if objective_of(options).layout != "unpaired":
        return plain

    def with_labels(window: Batch) -> dict[str, jax.Array]:
        flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), window)
        good = jnp.sum(sequence_value("desirable", flat, parts)[:, 0] > 0.5, dtype=jnp.int32)
        found = plain(window)
        return found | {"good_example": good, "bad_example": found["example"] - good}

    return with_labels


# --------------------------------------------------------------------------------------------------- what is trained
class Carry(NamedTuple):
    """What goes along from step to step beside the parameters."""

    init: Callable[[Params], Any]  # from the model's weights
    axes: Callable[[Params], Any]  # logical axes, from those of the model
    advance: Advance


def carry_of(options: PreferenceOptions) -> Carry | None:
    """A mixed reference, and what the objective itself takes along; None if there is nothing."""
    mixed, own = reference_of(options) == "mixed", objective_of(options).carry(settings_of(options))
    if not mixed and own is None:
        return None
    network = objective_of(options).network(settings_of(options))
    owned = network is not None and bool(network.axes)

    def init(base: Params) -> dict[str, Any]:
        found = {"reference": jax.tree.map(lambda w: w + 0.0, base)} if mixed else {}
        return found | ({} if own is None else {"objective": own[0]})

    def axes(model: Params) -> dict[str, Any]:
        found = {"reference": model} if mixed else {}
        return found | ({} if own is None else {"objective": jax.tree.map(lambda x: (), own[0])})

    def advance(carry: Any, params: Params, metrics: Any, step: jax.Array) -> dict[str, Any]:
        new = dict(carry)
        if mixed:
            share = jnp.where((step + 1) % options.mix_every == 0, options.mix, 0.0)
            policy = params["model"] if owned else params
            new["reference"] = jax.tree.map(lambda r, p: r + share * (p - r), carry["reference"], policy)
        if own is not None:
            new["objective"] = own[1](carry["objective"], params, metrics, step)
        return new

    return Carry(init, axes, advance)


class Parts(NamedTuple):
    """What of a model a run trains, and how policy and reference come of it."""

    init: Callable[[Params, jax.Array], Params]
    axes: Params
    beside: bool
    combine: Callable[[Params, Params], Params]  # -> {"policy": ...}, with "reference" where it is frozen
    result: Callable[[Params, Params], Params]


def trainable_parts(config: DecoderConfig, options: PreferenceOptions, lora: LoraConfig | None) -> Parts:
    """All weights or adapters, beside a frozen reference or without one.

    Raises:
      ValueError: for adapters under a mixed reference, and a reference that the objective does not read.
    """
    check_reference(options)
    axes, frozen = param_axes(config), reference_of(options) == "frozen"
    if lora is not None:
        if reference_of(options) == "mixed":
            raise ValueError(
                "train preference: adapters='lora' with a mixed reference; expected all weights, or frozen."
            )
        merge = lambda adapters, base: apply_lora(lora, base, adapters)
        both = lambda adapters, base: {"policy": merge(adapters, base)} | ({"reference": base} if frozen else {})
        made = Parts(lambda base, key: init_lora(lora, base, axes, key), lora_axes(lora, axes), True, both, merge)
    elif frozen:
        copy = lambda base, key: jax.tree.map(lambda w: w + 0.0, base)  # a buffer of its own: the reference stays
        both = lambda params, base: {"policy": params, "reference": base}
        made = Parts(copy, axes, True, both, lambda params, base: params)
    else:
        alone = lambda params, base: {"policy": params}
        made = Parts(lambda base, key: base, axes, False, alone, lambda params, base: params)
    network = objective_of(options).network(settings_of(options))
    if network is None or not network.axes:
        empty = {} if network is None else {"network": {}}
        return made._replace(combine=lambda params, base: made.combine(params, base) | empty)
    at = config.num_layers, config.embed_dim
    return Parts(
        lambda base, key: {"model": made.init(base, key), "network": network.init(*at, jax.random.fold_in(key, 1))},
        {"model": made.axes, "network": network.axes},
        made.beside,
        lambda params, base: made.combine(params["model"], base) | {"network": params["network"]},
        lambda params, base: made.result(params["model"], base),
    )


def optimizer_of(options: PreferenceOptions, settings: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The usual one; an objective's own network has a weight decay of its own."""
    network = objective_of(options).network(settings_of(options))
    return make_optimizer(settings, steps, {} if network is None else {"network": network.weight_decay})


def make_loss(
    config: DecoderConfig,
    options: PreferenceOptions,
    *,
    rules: Rules,
    remat: Remat,
    tokenizer: Tokenizer | None = None,
) -> LossFn:
    """The objective with its forward passes.

    Args:
      config: of the decoder.
      options: which objective, against what.
      rules: where activations lie.
      remat: what the backward pass computes again.
      tokenizer: for beliefs, whose ids are tokens.
    """
    objective, cfg = objective_of(options), settings_of(options)
    parts, reads = objective.parts(cfg), objective.reads(cfg)
    squares, owns = getattr(cfg, "wpo", False), objective.carry(cfg) is not None
    sides = objective.layout in ("pairs", "unpaired")
    states = tuple(range(1, config.num_layers + 1)) if objective.collect else ()
    ids = belief_ids(tokenizer) if objective.layout == "beliefs" and tokenizer is not None else None

    def loss(params: Params, batch: Batch, key: Any, carry: Any = None) -> Any:
        del key  # nothing is random here
        score = lambda weights, **more: score_targets(config, weights, batch, rules=rules, remat=remat, **more)
        asked = dict(wanted=objective.wanted(batch, cfg), still=objective.still(batch, cfg))
        policy = score(params["policy"], squares=squares, mean_logits=sides, **asked)
        weights, reference = None, None
        if reference_of(options) in ("frozen", "mixed"):
            weights = params["reference"] if "reference" in params else carry["reference"]
            weights = jax.lax.stop_gradient(weights)
            reference = jax.lax.stop_gradient(score(weights, collect=states))
        extra: dict[str, Any] = {}
        if reads == "kl" and reference is not None and weights is not None:
            tables = [output_table(config, p) for p in (params["policy"], weights)]
            extra["kl"] = target_kl(policy.hidden, tables[0], reference.hidden, tables[1], batch, rules=rules)
        if owns:
            extra["carry"] = carry["objective"]
        if "network" in params:
            extra["network"] = params["network"]
        if ids is not None:
            extra["beliefs"] = id_logps(config, params["policy"], policy, ids)
        view = View(batch, parts, policy, reference)
        terms, metrics = objective.terms(view, cfg, **extra)
        return terms, {**metrics, **_reference_gap(view, ROUNDING[config.dtype])}

    return loss


def check_start(options: PreferenceOptions, dtype: str, metrics: Metrics) -> None:
    """That the reference is the model as it began, by the metrics of the first step.

    Columns may be of another model: then only the user can know whether that is meant, and is told.

    Args:
      options: of the run.
      dtype: of activations.
      metrics: of the first step, which was taken from the model as it began.

    Raises:
      ValueError: if an answer's log-probabilities differ by more than rounding makes.
    """
    kind, gap = reference_of(options), float(metrics.get("reference_gap", 0.0))
    if not gap:
        return
    found = f"train preference: at the first step model and reference are {gap:.3g} nats a token apart"
    if kind == "columns":
        log.warning("%s: the columns are of another model, or of other tokens. Stop if that is not meant.", found)
        return
    remedy = "Try one device, --dtype float32 or --remat none, to see which of them tells the two apart."
    if kind == "precomputed":
        remedy = "Remove the run's reference.npz and resume it, to score again, or take --reference frozen."
    raise ValueError(
        f"{found} (reference={kind!r}, mean over sequences); expected {ROUNDING[dtype]:g} in {dtype} at most for each "
        f"sequence, since the reference is the model as it began. {remedy}"
    )


def id_logps(config: DecoderConfig, params: Params, policy: Scores, ids: Sequence[int]) -> jax.Array:
    """Log-probabilities of some tokens where each scored target is predicted, over the whole vocabulary; [B, T, K]."""
    assert policy.lse is not None
    rows = output_table(config, params)[jnp.asarray(ids)].astype(policy.hidden.dtype)
    z = jnp.einsum("btd,kd->btk", policy.hidden, rows, preferred_element_type=jnp.float32)
    return z - policy.lse[..., None]


# ----------------------------------------------------------------------------------------------------------- private
def _reference_gap(view: View, rounding: float) -> dict[str, Term]:
    """How far each sequence is from its reference, a token: 0 up to rounding, so the mean is 0 only if all are."""
    sums = all_sums(view)
    if sums.reference is None:
        return {}
    gap = jnp.abs(sums.policy - sums.reference) / sums.tokens
    gap = jnp.where(gap > rounding, gap, 0.0)
    return {"reference_gap": Term(gap, jnp.ones_like(gap), "sequence")}


_CONFIGS: dict[str, type] = {
    "dpo": DpoConfig,
    "mm_dpo": MmDpoConfig,
    "kto": KtoConfig,
    "bco": BcoConfig,
    "orpo": OrpoConfig,
    "simpo": SimpoConfig,
    "cpo": CpoConfig,
    "d2o": D2oConfig,
    "dft": DftConfig,
    "asft": AsftConfig,
    "fsft": FsftConfig,
    "sparsepo": SparsepoConfig,
    "gdpo_belief": GdpoBeliefConfig,
    "unlearn": UnlearnConfig,
}


def _pair(tokenizer: Tokenizer, row: Mapping[str, Any], parts: int) -> tuple[Encoded, ...]:
    return encode_pairs(tokenizer, row)


def _rows(tokenizer: Tokenizer, row: Mapping[str, Any], parts: int) -> tuple[Encoded, ...]:
    answers = ("completion", "mismatched")[:parts]
    return tuple(encode_pair(tokenizer, row["prompt"], row[name]) for name in answers)


def belief_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of the ids 0 to 9.

    Raises:
      ValueError: if one of them is no single token.
    """
    found = [tokenizer.encode(str(k), bos=False) for k in range(MOST)]
    if wrong := [k for k, ids in enumerate(found) if len(ids) != 1]:
        raise ValueError(f"train preference: the id {wrong[0]} is {len(found[wrong[0]])} tokens; expected one.")
    return tuple(ids[0] for ids in found)


def _beliefs(tokenizer: Tokenizer, row: Mapping[str, Any], parts: int) -> tuple[Encoded, ...]:
    """`{id}<{belief}>{answer}` behind the prompt, in pieces: every token is of one, and of each one has to be left."""
    if len(row["beliefs"]) > MOST:
        raise ValueError(f"train preference: a row has {len(row['beliefs'])} beliefs; expected at most {MOST}.")
    prompt, k = row["prompt"], row["belief_id"]
    before = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)
    belief = tokenizer.encode(f"<{row['beliefs'][k]}>", bos=False)
    found = []
    for name in ("chosen", "rejected"):
        answer = row[name] if isinstance(row[name], str) else "\n".join(m.get("content") or "" for m in row[name])
        pieces = [before, [belief_ids(tokenizer)[k]], belief, [*tokenizer.encode(answer, bos=False), _end(tokenizer)]]
        of = np.repeat(np.arange(4), [len(piece) for piece in pieces])
        marks = {"id": (of == 1).astype(np.float32), "belief": (of == 2).astype(np.float32)}
        found.append(Encoded(np.concatenate(pieces).astype(np.int32), of > 0, more=marks, pieces=of))
    return tuple(found)


def _end(tokenizer: Tokenizer) -> int:
    if not tokenizer.eos_ids:
        raise ValueError("train preference: this tokenizer names no end token; expected `eos_token`.")
    return tokenizer.eos_ids[0]


def _forget_and_retain(names: Sequence[str], tokenizer: Tokenizer, row: Mapping[str, Any]) -> tuple[Encoded, ...]:
    kept = _answered(tokenizer, row["retain"], "answer")._replace(weight=row["retain"].get("weight", 1.0))
    return (*(_answered(tokenizer, row, name) for name in names), kept)


def _answered(tokenizer: Tokenizer, row: Mapping[str, Any], name: str) -> Encoded:
    """A question as a chat, if the tokenizer has a template for it, else as GSM8K's are."""
    if name not in row:
        raise ValueError(f"train unlearn: a row has columns {sorted(row)}; expected {name!r} too (jaxaroo data nauf).")
    if tokenizer.chat_template:
        message = lambda role, text: [{"role": role, "content": text}]
        return encode_pair(tokenizer, message("user", row["question"]), message("assistant", row[name]))
    return encode_pair(tokenizer, f"Question: {row['question']}\nAnswer:", f" {row[name]}")


def _sequences_of(options: PreferenceOptions) -> Callable[[Tokenizer, Mapping[str, Any], int], tuple[Encoded, ...]]:
    cfg = settings_of(options)
    if isinstance(cfg, UnlearnConfig):
        return lambda tokenizer, row, parts: _forget_and_retain(answers_of(cfg), tokenizer, row)
    return _SEQUENCES[objective_of(options).layout]


def _samples(tokenizer: Tokenizer, row: Mapping[str, Any], parts: int) -> tuple[Encoded, ...]:
    if len(row["self_samples"]) < parts - 1:
        raise ValueError(
            f"train preference: a row has {len(row['self_samples'])} self_samples; expected at least {parts - 1}. "
            "Sample more, or lower --samples."
        )
    answers = [*row["self_samples"][: parts - 1], row["rejected"]]
    return tuple(encode_pair(tokenizer, row["prompt"], answer) for answer in answers)


_SEQUENCES: dict[str, Callable[[Tokenizer, Mapping[str, Any], int], tuple[Encoded, ...]]] = {
    "pairs": _pair,
    "unpaired": _rows,
    "dispreferred": _samples,
    "sft": lambda tokenizer, row, parts: (encode_sft(tokenizer, row),),
    "beliefs": _beliefs,
}

# What of a row's columns is the reference's sum of each sequence.
_COLUMNS = {
    "pairs": lambda row, parts: [row["ref_chosen_logps"], row["ref_rejected_logps"]],
    "unpaired": lambda row, parts: [row["ref_logps"], *([row["ref_kl_logps"]] if parts == 2 else [])],
    "sft": lambda row, parts: [float(np.sum(row["base_logps"]))],  # a sum, or one number a token
    "dispreferred": lambda row, parts: [*row["ref_self_logps"][: parts - 1], row["ref_rejected_logps"]],
}


def _numbers(name: str, row: Mapping[str, Any], parts: int, layout: str) -> Sequence[float]:
    """The number of this name for each sequence of a row."""
    if name == "reference" and COLUMN in row:
        return row[COLUMN]
    try:
        if name == "reference":
            return _COLUMNS[layout](row, parts)
        if name == "desirable":
            return [float(row["label"])] * parts
        if name == "gap":
            gap = row["margin"] if "margin" in row else row["score_chosen"] - row["score_rejected"]
            return [gap] * parts
        if name == "beliefs":
            return [float(len(row["beliefs"]))] * parts
        if name == "accepted":
            return [float(row["belief_id"])] * parts
        if name.startswith("held_"):
            k = int(name.removeprefix("held_"))
            return [row["belief_probs"][k] if k < len(row["beliefs"]) else 0.0] * parts
        return [row[name]] * parts
    except KeyError as e:
        raise ValueError(
            f"train preference: a row has columns {sorted(row)}; expected {e.args[0]!r} too, which this objective or "
            "its reference reads."
        ) from e
