"""Preference training: the settings of `jaxaroo train preference`, and what they make of a decoder.

The objectives stand in `objectives/by_name.py`, one paper a file behind it. Here is what they have in common: how rows
become sequences, where the reference comes from, and the loss with its forward passes.

    frozen        the model as it began, kept beside what is trained; under adapters it is there anyway
    precomputed   its sums for every row, written down before the first step (`references.py`)
    columns       the sums that the data bring, in `ref_chosen_logps` and so on
    mixed         a copy that follows the policy, every `mix_every` steps by `mix` (TR-DPO, 2404.09656)
    none          for objectives that read no reference

`auto` is frozen, or none where none is read.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ..jaxlib_ext.token_kl import token_kl
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
from .objectives.kto import KtoConfig
from .objectives.logprobs import Scores, output_table, score_targets
from .objectives.mm_dpo import MmDpoConfig
from .objectives.orpo import OrpoConfig
from .objectives.preference import check_name, check_number
from .objectives.sequences import View, count_examples, sequence_value
from .objectives.simpo import SimpoConfig
from .references import COLUMN
from .step import Advance, LossFn

Reference = Literal["auto", "frozen", "precomputed", "columns", "mixed", "none"]
Examples = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceOptions:
    """Learn from preferences, or fine-tune with an anchor.

    Attributes:
      objective: one of `--objective list`.
      reference: what the policy is held against; auto is the model as it began, for objectives that read one.
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

    def __post_init__(self):
        check_name("train preference: objective", self.objective, OBJECTIVES)
        check_number("train preference: mix", self.mix, 0 < self.mix <= 1, "a share above 0, up to 1")
        check_number("train preference: mix_every", self.mix_every, self.mix_every >= 1, "at least 1 step")
        reads, kind = objective_of(self).reads(settings_of(self)), reference_of(self)
        if (reads == "nothing") != (kind == "none"):
            what = "reads none" if reads == "nothing" else "reads one"
            raise ValueError(
                f"train preference: reference={self.reference!r} with {self.objective}, which {what}; expected "
                f"{'auto or none' if reads == 'nothing' else 'auto, frozen, precomputed, columns or mixed'}."
            )
        if reads in ("tokens", "kl") and kind in ("precomputed", "columns"):
            raise ValueError(
                f"train preference: reference={kind!r} with {self.objective}, which reads the reference at every "
                "token; expected frozen or mixed, for what is written down are sums."
            )


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
    return "none" if objective_of(options).reads(settings_of(options)) == "nothing" else "frozen"


# ---------------------------------------------------------------------------------------------------------------- rows
def encoder(tokenizer: Tokenizer, options: PreferenceOptions) -> Encode:
    """How a row becomes the sequences of an example, with the numbers that the objective wants."""
    objective, cfg = objective_of(options), settings_of(options)
    parts, names = objective.parts(cfg), number_names(options)
    sequences = _SEQUENCES[objective.layout]

    def encode(row: Mapping[str, Any]) -> tuple[Encoded, ...]:
        found = sequences(tokenizer, row, parts)
        numbers = {name: _numbers(name, row, parts, objective.layout) for name in names}
        spread = lambda i, e: {name: np.full(len(e.ids), numbers[name][i], np.float32) for name in names}
        return tuple(e._replace(more=spread(i, e)) for i, e in enumerate(found))

    return encode


def number_names(options: PreferenceOptions) -> tuple[str, ...]:
    """Of the numbers that examples bring."""
    stored = reference_of(options) in ("precomputed", "columns")
    return (*objective_of(options).more(settings_of(options)), *(["reference"] if stored else []))


def bare_encoder(tokenizer: Tokenizer, options: PreferenceOptions) -> Encode:
    """The sequences alone, to be scored by a reference."""
    objective, parts = objective_of(options), objective_of(options).parts(settings_of(options))
    return lambda row: _SEQUENCES[objective.layout](tokenizer, row, parts)


class Mismatched:
    """Rows for KTO: each brings the answer of the next one, to be put behind its own prompt."""

    def __init__(self, examples: Examples):
        """Of rows of layout `unpaired`, two at least."""
        if len(examples) < 2:
            raise ValueError(
                f"train preference: {len(examples)} row for kto; expected at least 2, to mismatch answers."
            )
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Row `i`, with `mismatched`."""
        other = self._examples[(i + 1) % len(self._examples)]
        return {**self._examples[i], "mismatched": other["completion"]}


def prepare(examples: Examples, options: PreferenceOptions) -> Examples:
    """The rows, with what the objective needs of other rows."""
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
            new["reference"] = jax.tree.map(lambda r, p: r + share * (p - r), carry["reference"], params)
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
      ValueError: for adapters under a mixed reference.
    """
    axes, frozen = param_axes(config), reference_of(options) == "frozen"
    if lora is not None:
        if reference_of(options) == "mixed":
            raise ValueError(
                "train preference: adapters='lora' with a mixed reference; expected all weights, or frozen."
            )
        merge = lambda adapters, base: apply_lora(lora, base, adapters)
        both = lambda adapters, base: {"policy": merge(adapters, base)} | ({"reference": base} if frozen else {})
        return Parts(lambda base, key: init_lora(lora, base, axes, key), lora_axes(lora, axes), True, both, merge)
    copy = lambda base, key: jax.tree.map(lambda w: w + 0.0, base)  # a buffer of its own: the reference stays
    if frozen:
        both = lambda params, base: {"policy": params, "reference": base}
        return Parts(copy, axes, True, both, lambda params, base: params)
    alone = lambda params, base: {"policy": params}
    return Parts(lambda base, key: base, axes, False, alone, lambda params, base: params)


def make_loss(config: DecoderConfig, options: PreferenceOptions, *, rules: Rules, remat: Remat) -> LossFn:
    """The objective with its forward passes."""
    objective, cfg = objective_of(options), settings_of(options)
    parts, reads = objective.parts(cfg), objective.reads(cfg)
    squares, owns = getattr(cfg, "wpo", False), objective.carry(cfg) is not None

    def loss(params: Params, batch: Batch, key: Any, carry: Any = None) -> Any:
        del key  # nothing is random here
        score = lambda weights, **more: score_targets(config, weights, batch, rules=rules, remat=remat, **more)
        policy, weights, reference = score(params["policy"], squares=squares), None, None
        if reference_of(options) in ("frozen", "mixed"):
            weights = params["reference"] if "reference" in params else carry["reference"]
            weights = jax.lax.stop_gradient(weights)
            reference = jax.lax.stop_gradient(score(weights))
        extra: list[Any] = []
        if reads == "kl" and reference is not None and weights is not None:
            extra.append(divergence(config, params["policy"], policy, weights, reference))
        if owns:
            extra.append(carry["objective"])
        return objective.terms(View(batch, parts, policy, reference), cfg, *extra)

    return loss


def divergence(
    config: DecoderConfig, params: Params, policy: Scores, ref_params: Params, reference: Scores
) -> jax.Array:
    """KL(reference || policy) at every target, over the whole vocabulary; [B, T]."""
    B, T, D = policy.hidden.shape
    flat = lambda scores: scores.hidden.reshape(B * T, D)
    tables = (output_table(config, p).astype(policy.hidden.dtype) for p in (params, ref_params))
    return token_kl(flat(policy), next(tables), flat(reference), next(tables)).reshape(B, T)


# ----------------------------------------------------------------------------------------------------------- private
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
}


def _pair(tokenizer: Tokenizer, row: Mapping[str, Any], parts: int) -> tuple[Encoded, ...]:
    return encode_pairs(tokenizer, row)


def _rows(tokenizer: Tokenizer, row: Mapping[str, Any], parts: int) -> tuple[Encoded, ...]:
    answers = ("completion", "mismatched")[:parts]
    return tuple(encode_pair(tokenizer, row["prompt"], row[name]) for name in answers)


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
}

# What of a row's columns is the reference's sum of each sequence.
_COLUMNS = {
    "pairs": lambda row, parts: [row["ref_chosen_logps"], row["ref_rejected_logps"]],
    "unpaired": lambda row, parts: [row["ref_logps"], *([row["ref_kl_logps"]] if parts == 2 else [])],
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
        return [row[name]] * parts
    except KeyError as e:
        raise ValueError(
            f"train preference: a row has columns {sorted(row)}; expected {e.args[0]!r} too, which this objective or "
            "its reference reads."
        ) from e
