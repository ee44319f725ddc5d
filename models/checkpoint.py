"""A small network beside a target: its parameters, its configuration, and which target it was made for.

A folder holds `model.safetensors`, whose tensors are named by their paths (`front.attn.q`), and `config.json`:

    {"model_type": "jaxaroo-eagle", every field of the config dataclass, "target": {what the target must be like}}

It appears whole or not at all, and every fault found on the way back is a `CheckpointError`. Whole decoders travel as
Hugging Face folders instead (`hf.py`), and training states through Orbax (`train/checkpoint.py`).

A config dataclass has a field `target: DecoderConfig`; its others are plain values and tuples of them. Its module has

    config_of = rebuild_config for its class        param_shapes(cfg)        and `load_for` brings the two together.
"""

import dataclasses
import json
import os
import secrets
import shutil
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .decoder import DecoderConfig, Params
from .hf_config import inside
from .safetensors import CheckpointError, TensorInfo, read_index, read_json, read_tensor, swap_in, write

Config = TypeVar("Config")
PREFIX = "jaxaroo-"  # of every model_type here
# What another target would compute differently with the same drafter; its weights are nobody's business here.
FINGERPRINT = ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "rope_theta")


class Loaded(NamedTuple):
    """What a folder holds."""

    kind: str
    config: dict[str, Any]  # as in the file, `model_type` and `target` included
    params: Params


# -------------------------------------------------------------------------------------------------------------- write
def save(folder: Path | str, kind: str, config: Any, params: Params, *, overwrite: bool = False) -> None:
    """Write a folder that `load` reads. It appears whole or not at all.

    Args:
      folder: must not exist, or be empty, unless `overwrite`.
      kind: what the network is, "eagle" for example.
      config: a frozen dataclass with a field `target`.
      params: nested dicts of arrays, each written in the dtype it has.
      overwrite: replace what is there.
    """
    folder = Path(os.path.realpath(folder))  # of a link, what it points to is replaced
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"save: {folder} exists; expected a new or empty folder. Pass overwrite to replace it.")
    flat = _flatten(params)
    specs = {name: (np.dtype(leaf.dtype), leaf.shape) for name, leaf in flat.items()}
    text = json.dumps(_describe(kind, config), indent=2, allow_nan=False) + "\n"
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        partial.mkdir()
        (partial / "config.json").write_text(text, encoding="utf-8")
        write(partial, specs, lambda name: np.asarray(flat[name]))
        swap_in(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fingerprint(target: DecoderConfig) -> dict[str, Any]:
    """What of a target a small network depends on."""
    return {name: getattr(target, name) for name in FINGERPRINT}


# --------------------------------------------------------------------------------------------------------------- read
def load(folder: Path | str) -> Loaded:
    """Read a folder that `save` wrote, whatever is in it.

    Raises:
      CheckpointError: for a folder that cannot be trusted or understood.
    """
    config = read_small_config(folder)
    index = read_index(Path(folder))
    return Loaded(config["model_type"].removeprefix(PREFIX), config, _read(index))


def load_for(
    folder: Path | str,
    target: DecoderConfig,
    config_of: Callable[[Mapping[str, Any], DecoderConfig], Config],
    param_shapes: Callable[[Config], Params],
) -> tuple[Config, Params]:
    """Read a network of one kind, for one target: `load_for(folder, target, eagle.config_of, eagle.param_shapes)`.

    Raises:
      CheckpointError: also for another kind or target, and for parameters that are not those of the configuration;
        missing, unexpected and misshapen ones are named together, before any is read.
    """
    cfg = config_of(read_small_config(folder), target)
    index = read_index(Path(folder))
    check_params(folder, index, param_shapes(cfg))
    return cfg, _read(index)


def read_small_config(folder: Path | str) -> dict[str, Any]:
    """The contents of `config.json`, if it is one of ours."""
    folder = Path(folder)
    config = read_json(inside(folder, "config.json"))
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind.startswith(PREFIX) or not isinstance(config.get("target"), dict):
        found = f"model_type {str(kind)[:80]!r}, target {str(config.get('target'))[:80]}"
        raise CheckpointError(
            f"{folder / 'config.json'}: {found}; expected '{PREFIX}...' and a table. Pass a drafter's or a head's "
            "folder; whole models are loaded by models/hf.py."
        )
    return config


def rebuild_config(cls: type[Config], kind: str, mapping: Mapping[str, Any], target: DecoderConfig) -> Config:
    """The config dataclass that `mapping` describes, for this target.

    Raises:
      CheckpointError: if it is of another kind or for another target, or if a field is missing, unknown or of the
        wrong type: a default that fills a gap in silence would compute something else.
    """
    if (found := mapping.get("model_type")) != PREFIX + kind:
        raise CheckpointError(f"config.json: found model_type {found!r}; expected {PREFIX + kind!r}. Load it as such.")
    made_for, wanted = mapping.get("target"), fingerprint(target)
    if made_for != wanted:
        made_for = made_for if isinstance(made_for, dict) else {}
        names = [name for name in {**wanted, **made_for} if made_for.get(name) != wanted.get(name)]
        there, here = ({name: side.get(name) for name in names} for side in (made_for, wanted))
        raise CheckpointError(
            f"config.json: made for a target of {there}; expected {here}. Use it with the model it was trained "
            "beside, or train one for this model."
        )
    hints = typing.get_type_hints(cls)
    wanted_fields = {f.name for f in dataclasses.fields(cls)} - {"target"}  # type: ignore[arg-type]
    given = {name: _thaw(value) for name, value in mapping.items() if name not in ("model_type", "target")}
    wrong = [f"missing {name}" for name in sorted(wanted_fields - given.keys())]
    wrong += [f"unknown {name[:80]!r}" for name in sorted(given.keys() - wanted_fields)]
    wrong += [
        f"{name}={str(given[name])[:80]}, expected {hints[name]}"
        for name in sorted(given.keys() & wanted_fields)
        if not _fits(given[name], hints[name])
    ]
    if wrong:
        raise CheckpointError(f"config.json: {'; '.join(wrong)}. Written by another version? Train or save it again.")
    try:
        return cls(target=target, **given)  # type: ignore[call-arg]
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from error


def check_params(where: Path | str, found: Mapping[str, Any], shapes: Params) -> None:
    """Refuse parameters that are not those of a configuration.

    Args:
      where: for the message.
      found: arrays or `TensorInfo`s, flat under their names or as a tree.
      shapes: the tree that the configuration asks for.
    """
    have, want = _flatten(found), _flatten(shapes)
    wrong = [f"missing {name}" for name in want if name not in have]
    wrong += [f"unexpected {name[:80]!r}" for name in have if name not in want]
    for name in (name for name in want if name in have):
        shape, dtype = tuple(have[name].shape), jnp.dtype(have[name].dtype)
        if shape != want[name].shape or not _same_sort(dtype, jnp.dtype(want[name].dtype)):
            wrong.append(f"{name} is {dtype} {list(shape)}, expected {want[name].dtype} {list(want[name].shape)}")
    if wrong:
        shown = "; ".join(wrong[:20]) + (f"; and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise CheckpointError(f"{where}: {shown}. The weights do not belong to this config.json.")


# ------------------------------------------------------------------------------------------------------------ private
def _describe(kind: str, config: Any) -> dict[str, Any]:
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    target = fields.pop("target")
    if clash := fields.keys() & {"model_type"}:
        raise ValueError(f"save: {type(config).__name__} has a field {min(clash)}, which config.json needs. Rename it.")
    return {"model_type": PREFIX + kind, **fields, "target": fingerprint(target)}


def _read(index: Mapping[str, TensorInfo]) -> Params:
    tree: Params = {}
    for name, info in index.items():
        if jax.dtypes.canonicalize_dtype(info.dtype) != info.dtype:  # 64 bits would lose half of them on the way
            raise CheckpointError(f"{info.file}: {name[:80]!r} is {info.dtype}; expected 32 bits at most. Cast it.")
        *parents, last = name.split(".")
        at: Any = tree
        for part in parents:
            at = at.setdefault(part, {}) if isinstance(at, dict) else None
        if not isinstance(at, dict) or last in at:
            raise CheckpointError(f"{info.file}: {name[:80]!r} stands inside another tensor; expected a tree of names.")
        at[last] = jnp.asarray(read_tensor(info))
    return tree


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Path, joined by dots, -> leaf."""
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.traversals.flatten_mapping(tree).items()}
    for name, leaf in flat.items():
        if not hasattr(leaf, "shape"):
            raise ValueError(f"checkpoint: {name} is {type(leaf).__name__}; expected nested dicts of arrays.")
    return flat


def _same_sort(dtype: Any, wanted: Any) -> bool:
    """A float may be stored narrower than it is trained; anything else must be what it is."""
    floats = ("float32", "bfloat16", "float16")
    return dtype == wanted or (dtype.name in floats and wanted.name in floats)


def _thaw(value: Any) -> Any:
    """JSON knows lists only; a frozen config holds tuples."""
    return tuple(map(_thaw, value)) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of an annotated type; a bool is no int, and an int may stand for a float."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin is tuple:
        each = [args[0]] * len(value) if isinstance(value, tuple) and args[-1:] == (...,) else args
        return isinstance(value, tuple) and len(each) == len(value) and all(map(_fits, value, each))
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint
