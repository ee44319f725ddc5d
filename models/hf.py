"""Hugging Face checkpoint folders: read one into a `Model`, write a `Model` as one.

`_LAYER` and `_ENDS` are the whole correspondence: for each of our parameters the name of its tensor and its axes,
`"NH,D"` meaning that the file holds `[N*H, D]` and we hold `[N, H, D]`. Import and export only reshape, so what passes
through unchanged is identical to the byte. Tensors pass one at a time: beside what is already placed the host holds
one of them, or the few that a CPU backend lets go of late; less than a shard.
"""

import dataclasses
import functools
import json
import logging
import math
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from ..sharding.rules import REPLICATED, Rules, divisible
from .decoder import DecoderConfig, Model, Params, param_axes, param_shapes
from .hf_config import ARCHITECTURES, canonical, config_to_hf, inside, read_config
from .safetensors import CheckpointError, TensorInfo, read_index, read_json, read_rows, read_tensor, swap_in, write

DType = Literal["float32", "bfloat16", "float16", "stored"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
_FLOATS = ("float32", "bfloat16", "float16")
# our path in a layer -> (tensor behind "model.layers.i.", its axes)
_LAYER = {
    "attn_norm": ("input_layernorm.weight", "D"),
    "attn.q": ("self_attn.q_proj.weight", "NH,D"),
    "attn.k": ("self_attn.k_proj.weight", "KH,D"),
    "attn.v": ("self_attn.v_proj.weight", "KH,D"),
    "attn.o": ("self_attn.o_proj.weight", "D,NH"),
    "attn.q_bias": ("self_attn.q_proj.bias", "NH"),
    "attn.k_bias": ("self_attn.k_proj.bias", "KH"),
    "attn.v_bias": ("self_attn.v_proj.bias", "KH"),
    "attn.o_bias": ("self_attn.o_proj.bias", "D"),
    "attn.q_norm": ("self_attn.q_norm.weight", "H"),
    "attn.k_norm": ("self_attn.k_norm.weight", "H"),
    "mlp_norm": ("post_attention_layernorm.weight", "D"),
    "mlp.gate": ("mlp.gate_proj.weight", "F,D"),
    "mlp.up": ("mlp.up_proj.weight", "F,D"),
    "mlp.down": ("mlp.down_proj.weight", "D,F"),
    "mlp.gate_bias": ("mlp.gate_proj.bias", "F"),
    "mlp.up_bias": ("mlp.up_proj.bias", "F"),
    "mlp.down_bias": ("mlp.down_proj.bias", "D"),
}
_ENDS = {
    "embed": ("model.embed_tokens.weight", "V,D"),
    "norm": ("model.norm.weight", "D"),
    "head": ("lm_head.weight", "V,D"),
}


def describe(folder: Path | str) -> dict[str, Any]:
    """What a checkpoint is, from its headers alone: for `jaxaroo info`. Sizes are in bytes, memories in GiB."""
    folder = Path(folder)
    cfg = read_config(folder)
    sources = _match(cfg, folder, headers_only=True)
    by_dtype: dict[str, int] = {}
    for source in sources:
        by_dtype[source.info.dtype.name] = by_dtype.get(source.info.dtype.name, 0) + source.info.nbytes
    parameters = sum(math.prod(s.info.shape) for s in sources)
    kv = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim
    fits = {gib: max(0, int((gib * 2**30 * 0.9 - 2 * parameters) // (2 * kv))) for gib in (8, 16, 24, 40, 80, 141)}
    return {
        "architecture": ARCHITECTURES[cfg.model_type],
        "parameters": parameters,
        "bytes": sum(by_dtype.values()),
        "bytes_by_dtype": by_dtype,
        "kv_bytes_per_token": {"float32": 4 * kv, "bfloat16": 2 * kv},
        "fits": fits,  # memory -> cached tokens beside bfloat16 weights, a tenth of the memory kept free
        "config": dataclasses.asdict(cfg),
    }


# ------------------------------------------------------------------------------------------------------------ import
def load(
    folder: Path | str,
    *,
    dtype: DType | None = None,
    stacked: bool = False,
    headless: bool = False,
    mesh: Mesh | None = None,
    rules: Rules = REPLICATED,
    progress: bool = False,
) -> Model:
    """Load a Hugging Face checkpoint folder.

    Args:
      folder: holds `config.json` and `model.safetensors`, or an index and shards.
      dtype: of parameters and activations; "stored" keeps each tensor as the file has it. None is float32 on CPU and
        bfloat16 on an accelerator.
      stacked: stack the layers, for training; else one tree per layer, for decoding.
      headless: only what stands under `model.`: of a folder with another head than that of a language model.
      mesh: where the parameters go; None is the default device.
      rules: which mesh axes each parameter lies on.
      progress: show a bar.

    Raises:
      CheckpointError: for a folder that cannot be trusted or understood; missing, unexpected and misshapen tensors are
        named together.
    """
    folder = Path(folder)
    cfg = read_config(folder)
    if headless:  # a tied head needs no tensor
        cfg = dataclasses.replace(cfg, tie_embeddings=True)
    sources = _match(cfg, folder, headless=headless)
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in (*_FLOATS, "stored"):
        raise ValueError(f"load: dtype={dtype!r}; expected one of {', '.join(_FLOATS)}, stored, or None.")
    embed = next(s for s in sources if s.path == ("embed",))
    cfg = dataclasses.replace(cfg, dtype=embed.info.dtype.name if dtype == "stored" else dtype)
    labels = param_axes(cfg)
    tree: Params = {}
    total = sum(s.info.nbytes for s in sources)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"load {folder.name}", disable=not progress) as bar:
        for source in sorted(sources, key=lambda s: (s.info.file, s.info.offset)):
            to = source.info.dtype if dtype == "stored" else jnp.dtype(dtype)
            names = _at(labels, ("layers", *source.path) if source.layer is not None else source.path)
            if source.layer is not None:
                names = names[1:]
            sharding = None if mesh is None else _fitting(mesh, rules, names, _our_shape(source.axes, cfg), source.path)
            leaf = _place(source, cfg, to, sharding)
            if source.layer is None:
                _put(tree, source.path, leaf)
            elif not stacked:
                _put(tree, ("layers", source.layer, *source.path), leaf)
            else:
                shape = (cfg.num_layers, *leaf.shape)
                stacked_as = None if mesh is None else _fitting(mesh, rules, ("layers", *names), shape, source.path)
                _put_stacked(tree, source, leaf, cfg.num_layers, stacked_as)
            bar.update(source.info.nbytes)
    if not stacked:
        tree["layers"] = tuple(tree["layers"][i] for i in range(cfg.num_layers))
    return Model(cfg, tree)


class _Source(NamedTuple):
    """One tensor of the file, and where it goes."""

    info: TensorInfo
    path: tuple[str, ...]
    layer: int | None
    axes: str


def _match(cfg: DecoderConfig, folder: Path, headers_only: bool = False, headless: bool = False) -> list[_Source]:
    """Pair every parameter with its tensor, or say all that is wrong."""
    index = read_index(folder)
    wrong, sources = [], []
    wanted = _names(cfg)
    for name, (path, layer, axes) in wanted.items():
        if name not in index:
            wrong.append(f"missing {name}")
            continue
        info, shape = index[name], _file_shape(axes, cfg)
        if info.shape != shape:
            wrong.append(f"{name} of shape {list(info.shape)}; expected {list(shape)}")
        elif info.dtype.name not in _FLOATS:
            wrong.append(f"{name} of dtype {info.dtype.name}; expected one of {', '.join(_FLOATS)}")
        sources.append(_Source(info, path, layer, axes))
    for name in sorted(index.keys() - wanted.keys()):
        if name.endswith("rotary_emb.inv_freq"):  # old exports carry it; it follows from the config
            continue
        if headless and not name.startswith("model."):
            continue
        if name == "lm_head.weight" and _same(index[name], index.get("model.embed_tokens.weight"), headers_only):
            continue  # some exports write a tied head twice
        wrong.append(f"unexpected {name}")
    if wrong:
        shown = "; ".join(wrong[:20]) + (f"; and {len(wrong) - 20} more" if len(wrong) > 20 else "")
        raise CheckpointError(f"{folder}: {shown}. The weights do not belong to this config.json ({cfg.model_type}).")
    return sources


def _names(cfg: DecoderConfig) -> dict[str, tuple[tuple[str, ...], int | None, str]]:
    """Tensor name -> (our path, layer, axes), for the parameters that this config has."""
    shapes = param_shapes(cfg)
    names: dict[str, tuple[tuple[str, ...], int | None, str]] = {}
    for key, (name, axes) in _ENDS.items():
        if key in shapes:
            names[name] = ((key,), None, axes)
    inside = [(tuple(key.split(".")), name, axes) for key, (name, axes) in _LAYER.items()]
    inside = [entry for entry in inside if _at(shapes["layers"], entry[0]) is not None]
    for i in range(cfg.num_layers):
        for path, name, axes in inside:
            names[f"model.layers.{i}.{name}"] = (path, i, axes)
    return names


def _place(source: _Source, cfg: DecoderConfig, dtype: Any, sharding: NamedSharding | None) -> jax.Array:
    """Read one tensor onto its device or devices, in our shape and dtype; done when it returns."""
    host = read_tensor(source.info).reshape(_our_shape(source.axes, cfg))
    if sharding is None or len(sharding.device_set) == 1:
        return jax.device_put(host, sharding).astype(dtype).block_until_ready()
    piece = lambda index: np.ascontiguousarray(host[index]).astype(dtype, copy=False)
    return jax.make_array_from_callback(host.shape, sharding, piece).block_until_ready()


def _fitting(mesh: Mesh, rules: Rules, names, shape: tuple[int, ...], path) -> NamedSharding:
    """What the mesh does not divide is replicated, as `Rules.shardings` does."""
    return NamedSharding(mesh, divisible(rules.spec(*names), shape, mesh.shape, ".".join(path), logging.DEBUG))


def _put_stacked(tree: Params, source: _Source, leaf: jax.Array, layers: int, sharding: NamedSharding | None) -> None:
    path = ("layers", *source.path)
    if (stack := _at(tree, path)) is None:
        stack = jnp.zeros((layers, *leaf.shape), leaf.dtype, device=sharding)
    if stack.dtype != leaf.dtype:
        found = f"{'.'.join(source.path)} is {leaf.dtype.name} in layer {source.layer}, {stack.dtype.name} in another"
        raise CheckpointError(f"{source.info.file}: {found}; expected one dtype to stack. Load it with a dtype.")
    _put(tree, path, _set_layer(stack, leaf, source.layer))


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, leaf: jax.Array, i: Any) -> jax.Array:
    """Move the bits: as bfloat16, XLA's CPU backend would convert the whole stack to float32 and back, NaNs changed."""
    as_bits = lambda x: jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    new = jax.lax.dynamic_update_index_in_dim(as_bits(stack), as_bits(leaf), i, 0)
    return jax.lax.bitcast_convert_type(new, stack.dtype)


# ------------------------------------------------------------------------------------------------------------ export
def save(
    folder: Path | str,
    model: Model,
    *,
    dtype: DType = "stored",
    like: Path | str | None = None,
    max_shard_bytes: int = 5 * 2**30,
    overwrite: bool = False,
) -> None:
    """Write a folder that transformers and `load` read. It appears whole or not at all.

    Args:
      folder: must not exist, or be empty, unless `overwrite`.
      model: layers stacked or as a tuple.
      dtype: of the tensors; "stored" writes each as the model holds it.
      like: the folder the model came from; its tokenizer files are copied, and its `config.json` where it still fits.
      max_shard_bytes: of one file.
      overwrite: replace what is there.
    """
    folder = Path(os.path.realpath(folder))  # of a link, what it points to is replaced
    if dtype not in (*_FLOATS, "stored"):
        raise ValueError(f"save: dtype={dtype!r}; expected one of {', '.join(_FLOATS)}, or stored.")
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"save: {folder} exists; expected a new or empty folder. Pass overwrite to replace it.")
    cfg, params = model
    parts = _parts(cfg, params)

    def get(name: str) -> np.ndarray:
        part, row, _ = parts[name]
        part = jnp.copy(part) if row is None else part[row]  # a jax.Array keeps what numpy has read of it
        return np.asarray(part).reshape(specs[name][1]).astype(specs[name][0], copy=False)

    width = lambda part: np.dtype(part.dtype if dtype == "stored" else jnp.dtype(dtype))
    specs = {name: (width(part), _file_shape(axes, cfg)) for name, (part, _, axes) in parts.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{secrets.token_hex(8)}.partial")  # not the folder's name: there may be no room
    try:
        partial.mkdir()
        _write_config(partial, cfg, specs["model.embed_tokens.weight"][0].name, like)
        write(partial, specs, get, max_shard_bytes=max_shard_bytes)
        swap_in(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _parts(cfg: DecoderConfig, params: Params) -> dict[str, tuple[jax.Array, int | None, str]]:
    """Tensor name -> (the parameter, which row of it when layers are stacked, axes); export loses and bends nothing."""
    stacked = not isinstance(params["layers"], tuple)
    tree = params if stacked else params | {"layers": dict(enumerate(params["layers"]))}
    parts, wrong = {}, []
    for name, (path, layer, axes) in _names(cfg).items():
        row, inside = (layer, ("layers",)) if stacked else (None, ("layers", layer))
        part, shape = _at(tree, path if layer is None else (*inside, *path)), _our_shape(axes, cfg)
        if (found := getattr(part, "shape", None)) != (shape if row is None else (cfg.num_layers, *shape)):
            wrong.append(f"{name} of shape {found}; expected {shape} a layer")
        parts[name] = (part, row, axes)
    count, wanted = len(jax.tree.leaves(params)), sum(row in (None, 0) for _, row, _ in parts.values())
    if wrong or count != wanted:
        shown = "; ".join(wrong[:20]) or f"{count} parameters; expected {wanted}"
        raise ValueError(f"save: {shown}. These parameters do not belong to model.config.")
    return parts


def _write_config(folder: Path, cfg: DecoderConfig, dtype: str, like: Path | str | None) -> None:
    config = config_to_hf(cfg, dtype)
    if like is not None:
        source, known, wanted = read_json(inside(Path(like), "config.json")), read_config(like), canonical(cfg)
        same_eos = known.eos_ids == wanted.eos_ids
        if dataclasses.replace(known, eos_ids=wanted.eos_ids) == wanted:
            dtypes = {key: dtype for key in ("dtype", "torch_dtype") if key in source} or {"torch_dtype": dtype}
            config = source | dtypes | ({} if same_eos else {"eos_token_id": config["eos_token_id"]})
        for name in TOKENIZER_FILES:
            path = inside(Path(like), name)
            if path.is_file() and (same_eos or name != "generation_config.json"):  # it would bring the old ones back
                shutil.copyfile(path, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- private
def _our_shape(axes: str, cfg: DecoderConfig) -> tuple[int, ...]:
    return tuple(_sizes(cfg)[c] for c in axes if c != ",")


def _file_shape(axes: str, cfg: DecoderConfig) -> tuple[int, ...]:
    return tuple(math.prod(_sizes(cfg)[c] for c in group) for group in axes.split(","))


def _sizes(cfg: DecoderConfig) -> dict[str, int]:
    return {
        "V": cfg.vocab_size,
        "D": cfg.embed_dim,
        "F": cfg.ffn_dim,
        "N": cfg.num_heads,
        "K": cfg.num_kv_heads,
        "H": cfg.head_dim,
    }


def _same(a: TensorInfo, b: TensorInfo | None, headers_only: bool) -> bool:
    """Whether two tensors are the same to the bit, some 16 MiB at a time."""
    if b is None or a[1:3] != b[1:3] or not a.shape:
        return False
    rows = max(1, 2**24 * a.shape[0] // max(1, a.nbytes))
    part = lambda info, i: read_rows(info, i, min(i + rows, info.shape[0])).tobytes()
    return headers_only or all(part(a, i) == part(b, i) for i in range(0, a.shape[0], rows))


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _put(tree: dict[Any, Any], path: tuple[Any, ...], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf
