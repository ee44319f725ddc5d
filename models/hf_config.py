"""The `config.json` of a Hugging Face checkpoint, into a `DecoderConfig` and back.

The only file that knows Hugging Face's names for settings. What we would compute wrongly is refused, and a config that
its family cannot express is not written.
"""

import dataclasses
import functools
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .decoder import DecoderConfig, RopeScaling
from .multi_precision import QuantRules, read_rules
from .safetensors import CheckpointError, read_json

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
QUANT_METHOD = "jaxaroo"  # in `quantization_config`: who else meets it refuses
_MAX_LAYERS = 10_000  # a config is not trusted to make us count further
_brief = reprlib.repr  # whatever a file holds, a message stays short


# What transformers takes for a key that is not there; a null stays a null. Of its default sizes we take those that the
# shapes of tensors then prove, and its end token not at all: 2, for Llama and Mistral, would end a Llama 3 text at "#".
_DEFAULTS: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "sliding_window": 4096}
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "max_window_layers": 28}
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131_072},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}


def read_config(folder: Path | str) -> DecoderConfig:
    """Read `config.json` (and the end tokens of `generation_config.json`).

    Raises:
      CheckpointError: for a file that is missing, malformed, of an architecture that is not supported, or that asks for
        something we would compute wrongly.
    """
    folder = Path(folder)
    cfg = config_from_hf(read_json(inside(folder, "config.json")), where=str(folder / "config.json"))
    if (path := inside(folder, "generation_config.json")).exists():
        cfg = dataclasses.replace(cfg, eos_ids=tuple(sorted({*cfg.eos_ids, *_eos_ids(read_json(path), str(path))})))
    return cfg


def config_from_hf(hf: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """Translate the contents of a Hugging Face `config.json`, either generation of its key names."""
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        found = f"model_type {_brief(kind)} (architectures {_brief(hf.get('architectures'))})"
        raise CheckpointError(f"{where}: {found}; expected one of {', '.join(ARCHITECTURES)}.")
    read_quantisation(hf, where)
    hf = _DEFAULTS | _FAMILY_DEFAULTS[kind] | dict(hf)
    if (act := hf["hidden_act"]) not in ("silu", "swish"):
        raise CheckpointError(f"{where}: hidden_act {_brief(act)}; expected 'silu'.")
    get = functools.partial(_number, hf, where)
    heads, embed, layers = get("num_attention_heads"), get("hidden_size"), get("num_hidden_layers", most=_MAX_LAYERS)
    rope = _rope(hf, where)
    window, window_layers = _windows(hf, kind, layers, where)
    biased = kind in ("llama", "qwen3") and _flag(hf, "attention_bias", where)
    try:
        return DecoderConfig(
            vocab_size=get("vocab_size"),
            embed_dim=embed,
            ffn_dim=get("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=get("num_key_value_heads", heads),
            head_dim=get("head_dim", embed // heads),
            rope_theta=_number(rope, where, "rope_theta", integer=False),
            rope_scaling=_rope_scaling(rope, where),
            norm_eps=get("rms_norm_eps", integer=False),
            window=window,
            window_layers=window_layers,
            qkv_bias=biased or kind == "qwen2",
            o_bias=biased,
            mlp_bias=kind == "llama" and _flag(hf, "mlp_bias", where),
            qk_norm=kind == "qwen3",
            tie_embeddings=_flag(hf, "tie_word_embeddings", where),
            max_positions=get("max_position_embeddings"),
            eos_ids=_eos_ids(hf, where),
            model_type=kind,
        )
    except ValueError as e:
        raise e if isinstance(e, CheckpointError) else CheckpointError(f"{where}: {e}") from e


def read_quantisation(hf: Mapping[str, Any], where: str = "config.json") -> QuantRules:
    """How the matrices of a master are quantised (`multi_precision.py`), from a `config.json`; () for plain weights."""
    found = hf.get("quantization_config")
    if found is None:
        return ()
    if not isinstance(found, Mapping) or found.get("quant_method") != QUANT_METHOD or found.get("version") != 1:
        raise CheckpointError(
            f"{where}: quantization_config {_brief(found)}; expected plain weights, or {QUANT_METHOD!r} of version 1. "
            "Use the unquantised model."
        )
    try:
        return read_rules(found.get("matrices"))
    except ValueError as e:
        raise CheckpointError(f"{where}: {e}") from e


def config_to_hf(cfg: DecoderConfig, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of a decoder, in key names that every transformers since version 4 reads."""
    cfg = canonical(cfg)
    hf: dict[str, Any] = {
        "architectures": [ARCHITECTURES[cfg.model_type]],
        "model_type": cfg.model_type,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.embed_dim,
        "intermediate_size": cfg.ffn_dim,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "rope_theta": cfg.rope_theta,
        "rope_scaling": _rope_scaling_to_hf(cfg.rope_scaling),
        "rms_norm_eps": cfg.norm_eps,
        "max_position_embeddings": cfg.max_positions,
        "tie_word_embeddings": cfg.tie_embeddings,
        "torch_dtype": dtype,
        "eos_token_id": list(cfg.eos_ids) if len(cfg.eos_ids) > 1 else next(iter(cfg.eos_ids), None),
    }
    if cfg.model_type == "llama":
        hf |= {"attention_bias": cfg.o_bias, "mlp_bias": cfg.mlp_bias}
    elif cfg.model_type == "mistral":
        hf["sliding_window"] = cfg.window
    else:
        kinds = ["sliding_attention" if w else "full_attention" for w in cfg.windowed]
        hf |= {"use_sliding_window": cfg.window is not None, "sliding_window": cfg.window, "layer_types": kinds}
        hf["max_window_layers"] = cfg.windowed.index(True) if any(cfg.windowed) else cfg.num_layers
        if cfg.model_type == "qwen3":
            hf["attention_bias"] = cfg.o_bias
    if config_from_hf(hf) != cfg:
        raise ValueError(
            f"config_to_hf: {cfg.model_type!r} cannot express this config, {cfg}; expected one that can. "
            f"Set model_type to one of {', '.join(ARCHITECTURES)} that has these parts."
        )
    return hf


def inside(folder: Path, name: str) -> Path:
    """A file of the folder, which may be a link, but not to the outside."""
    if not (real := Path(os.path.realpath(folder / name))).is_relative_to(os.path.realpath(folder)):
        raise CheckpointError(
            f"{folder / name}: a link to {real}; expected a file inside the folder. "
            f"If you trust it (a Hugging Face cache is made of links), copy it with `cp -rL {folder} COPY`."
        )
    return folder / name


def canonical(cfg: DecoderConfig) -> DecoderConfig:
    """The same decoder as `config_from_hf` puts it."""
    some = any(cfg.windowed)
    return dataclasses.replace(
        cfg,
        window=cfg.window if some else None,
        window_layers=cfg.window_layers if some and not all(cfg.windowed) else (),
        eos_ids=tuple(sorted(set(cfg.eos_ids))),
        dtype="float32",
    )


# ----------------------------------------------------------------------------------------------------------- private
def _number(
    hf: Mapping[str, Any], where: str, name: str, null: Any = None, *, integer: bool = True, above=0, most=2**31 - 1
) -> Any:
    value = null if hf.get(name) is None else hf[name]
    most = most if integer else 1e30
    good = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool) and above < value <= most
    if not good:
        found = "missing" if value is None and name not in hf else _brief(value)
        kind = "an integer" if integer else "a number"
        raise CheckpointError(f"{where}: {name} is {found}; expected {kind} above {above}, at most {most}.")
    return value if integer else float(value)


def _flag(hf: Mapping[str, Any], name: str, where: str) -> bool:
    value = hf.get(name)
    if not isinstance(value, bool | None):
        raise CheckpointError(f"{where}: {name} is {_brief(value)}; expected true or false.")
    return bool(value)


def _eos_ids(hf: Mapping[str, Any], where: str) -> tuple[int, ...]:
    value = hf.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
        raise CheckpointError(f"{where}: eos_token_id is {_brief(value)}; expected an id or a list of ids.")
    return tuple(sorted(set(ids)))


def _windows(hf: Mapping[str, Any], kind: str, layers: int, where: str) -> tuple[int | None, tuple[bool, ...]]:
    """The window, and which layers it limits when not all."""
    if kind == "llama":
        return None, ()
    used = hf["sliding_window"] is not None and (kind == "mistral" or _flag(hf, "use_sliding_window", where))
    window = _number(hf, where, "sliding_window") if used else None
    if kind == "mistral":
        return window, ()
    kinds = hf.get("layer_types")
    if kinds is None:
        first = _number(hf, where, "max_window_layers", above=-1) if used else layers
        flags = tuple(i >= first for i in range(layers))
    else:
        known = ["full_attention", "sliding_attention"] if used else ["full_attention"]
        if not isinstance(kinds, list) or len(kinds) != layers or not all(k in known for k in kinds):
            found = f"layer_types {_brief(kinds)} and {f'a window of {window}' if used else 'no window'}"
            raise CheckpointError(f"{where}: {found}; expected {layers} of {', '.join(known)}.")
        flags = tuple(k == "sliding_attention" for k in kinds)
    return (window, () if all(flags) else flags) if any(flags) else (None, ())


def _rope(hf: dict[str, Any], where: str) -> dict[str, Any]:
    """Everything about rotary positions, `rope_scaling` before `rope_parameters` as transformers has it."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise CheckpointError(f"{where}: rope_parameters {_brief(rope)}; expected one object for all layers.")
    outside = {name: hf[name] for name in ("rope_theta", "partial_rotary_factor") if name in hf}
    trained = "original_max_position_embeddings"  # here, and only here, what stands outside comes first
    first, last = {trained: hf["max_position_embeddings"]}, {trained: hf[trained]} if trained in hf else {}
    rope = first | outside | dict(rope) | last
    if rope.get("partial_rotary_factor") not in (None, 1):
        found = _brief(rope["partial_rotary_factor"])
        raise CheckpointError(f"{where}: partial_rotary_factor is {found}; expected 1, all of a head rotated.")
    return rope


def _rope_scaling(rope: Mapping[str, Any], where: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    get = functools.partial(_number, rope, where, integer=False)
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=get("factor"))
    if kind == "llama3":
        low, high = get("low_freq_factor"), get("high_freq_factor")
        if low >= high:
            raise CheckpointError(f"{where}: low_freq_factor {low}, high_freq_factor {high}; expected low < high.")
        trained = _number(rope, where, "original_max_position_embeddings")
        return RopeScaling(
            kind="llama3", factor=get("factor"), low_freq=low, high_freq=high, original_positions=trained
        )
    raise CheckpointError(f"{where}: rope scaling {_brief(kind)}; expected one of default, linear, llama3.")


def _rope_scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq,
        "high_freq_factor": scaling.high_freq,
        "original_max_position_embeddings": scaling.original_positions,
    }
