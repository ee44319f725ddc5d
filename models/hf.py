"""Hugging Face checkpoint folders: read one into a `Model`, write a `Model` as one.

`_LAYER` and `_ENDS` are the whole correspondence: for each of our parameters the name of its tensor and its axes,
`"NH,D"` meaning that the file holds `[N*H, D]` and we hold `[N, H, D]`. Import and export only reshape, so what passes
through unchanged is identical to the byte. Tensors pass one at a time: beside what is already placed the host holds
one of them, or the few that a CPU backend lets go of late; less than a shard.

A master (`multi_precision.py`) is such a folder too: the tensor of a quantised matrix is int8, beside it stands
`NAME_scale` `[out, M]`, and perhaps `NAME_gain`, in bfloat16; `config.json` says how in its `quantization_config`.
"""

import dataclasses
import functools
import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from ..sharding.rules import REPLICATED, Rules, divisible
from .decoder import DecoderConfig, Model, Params, param_axes, param_shapes
from .hf_config import ARCHITECTURES, QUANT_METHOD, canonical, config_to_hf, inside, read_config, read_quantisation
from .multi_precision import INPUT_AXES, QuantRules, from_master, quantised_paths, switch_bits, write_rules
from .quantise import QuantConfig
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
_MASTER = ("codes", "scale", "gain")  # of a quantised matrix
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
    cfg, quant = read_config(folder), _quantisation(folder)
    sources = _match(cfg, folder, quant, headers_only=True)
    by_dtype: dict[str, int] = {}
    for source in sources:
        by_dtype[source.info.dtype.name] = by_dtype.get(source.info.dtype.name, 0) + source.info.nbytes
    parameters = sum(math.prod(s.info.shape) for s in sources if s.wanted.path[-1] not in ("scale", "gain"))
    weights = sum(by_dtype.values()) if quant else 2 * parameters
    kv = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim
    fits = {gib: max(0, int((gib * 2**30 * 0.9 - weights) // (2 * kv))) for gib in (8, 16, 24, 40, 80, 141)}
    return {
        "architecture": ARCHITECTURES[cfg.model_type],
        "parameters": parameters,
        "bytes": sum(by_dtype.values()),
        "bytes_by_dtype": by_dtype,
        "kv_bytes_per_token": {"float32": 4 * kv, "bfloat16": 2 * kv},
        "fits": fits,  # memory -> cached tokens beside bfloat16 weights or the master, a tenth of it kept free
        "bits": sorted({b for _, c in quant if c for b in c.bits}, reverse=True),  # of a master
        "config": dataclasses.asdict(cfg),
    }


# ------------------------------------------------------------------------------------------------------------ import
def load(
    folder: Path | str,
    *,
    dtype: DType | None = None,
    bits: int | Sequence[int] | None = None,
    act: Literal["int8"] | None = None,
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
      bits: of a master the width to serve at, or one a layer; None is its highest.
      act: of a master, "int8" quantises what enters its matrices as well.
      stacked: stack the layers, for training; else one tree per layer, for decoding. A master becomes floats then.
      headless: only what stands under `model.`: of a folder with another head than that of a language model.
      mesh: where the parameters go; None is the default device.
      rules: which mesh axes each parameter lies on.
      progress: show a bar.

    Raises:
      CheckpointError: for a folder that cannot be trusted or understood; missing, unexpected and misshapen tensors are
        named together.
      ValueError: for widths below the lowest that any of its matrices has, and for widths of plain weights.
    """
    model, quant = load_master(
        folder, dtype=dtype, stacked=stacked, headless=headless, mesh=mesh, rules=rules, progress=progress
    )
    if not quant:
        if bits is not None or act is not None:
            raise ValueError(f"load: bits={bits}, act={act} of {folder}, plain weights; expected a master (train qat).")
        return model
    if stacked:
        widest = jax.jit(from_master, static_argnames=("bits", "rules", "dtype"))
        return model._replace(params=widest(model.params, bits=8, rules=quant, dtype=model.config.dtype))
    return model._replace(params=switch_bits(model.params, 8 if bits is None else bits, quant, act=act))


def load_master(
    folder: Path | str,
    *,
    dtype: DType | None = None,
    stacked: bool = False,
    headless: bool = False,
    mesh: Mesh | None = None,
    rules: Rules = REPLICATED,
    progress: bool = False,
) -> tuple[Model, QuantRules]:
    """The parameters as they are stored, for `multi_precision.switch_bits`; rules are () for plain weights.

    The arguments are those of `load`; codes and scales are as in the file whatever the dtype.
    """
    folder = Path(folder)
    cfg, quant = read_config(folder), _quantisation(folder)
    if headless:  # a tied head needs no tensor
        cfg = dataclasses.replace(cfg, tie_embeddings=True)
    sources = _match(cfg, folder, quant, headless=headless)
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in (*_FLOATS, "stored"):
        raise ValueError(f"load: dtype={dtype!r}; expected one of {', '.join(_FLOATS)}, stored, or None.")
    embed = next(s for s in sources if s.wanted.path == ("embed",))
    cfg = dataclasses.replace(cfg, dtype=embed.info.dtype.name if dtype == "stored" else dtype)
    tree: Params = {}
    total = sum(s.info.nbytes for s in sources)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"load {folder.name}", disable=not progress) as bar:
        for source in sorted(sources, key=lambda s: (s.info.file, s.info.offset)):
            want = source.wanted
            stored = dtype == "stored" or want.path[-1] in _MASTER
            sharding = None if mesh is None else _fitting(mesh, rules, want.names, want.shape, want.path)
            leaf = _place(source, source.info.dtype if stored else jnp.dtype(dtype), sharding)
            if want.layer is None:
                _put(tree, want.path, leaf)
            elif not stacked:
                _put(tree, ("layers", want.layer, *want.path), leaf)
            else:
                shape, names = (cfg.num_layers, *leaf.shape), ("layers", *want.names)
                stacked_as = None if mesh is None else _fitting(mesh, rules, names, shape, want.path)
                _put_stacked(tree, source, leaf, cfg.num_layers, stacked_as)
            bar.update(source.info.nbytes)
    if not stacked:
        tree["layers"] = tuple(tree["layers"][i] for i in range(cfg.num_layers))
    return Model(cfg, tree), quant


class _Wanted(NamedTuple):
    """A tensor that a config asks for."""

    path: tuple[str, ...]  # of our parameter, in its layer
    layer: int | None
    shape: tuple[int, ...]  # ours, without the layers
    flat: tuple[int, ...]  # the file's
    names: tuple[str | None, ...]  # logical axes of ours
    dtypes: tuple[str, ...]


class _Source(NamedTuple):
    """One tensor of the file, and where it goes."""

    info: TensorInfo
    wanted: _Wanted


def _quantisation(folder: Path) -> QuantRules:
    return read_quantisation(read_json(inside(folder, "config.json")), str(folder / "config.json"))


def _match(
    cfg: DecoderConfig, folder: Path, quant: QuantRules, headers_only: bool = False, headless: bool = False
) -> list[_Source]:
    """Pair every parameter with its tensor, or say all that is wrong."""
    index = read_index(folder)
    wrong, sources = [], []
    try:
        wanted = _names(cfg, quant)
    except ValueError as e:  # a file may ask for matrices that there are not
        raise CheckpointError(f"{folder / 'config.json'}: {e}") from e
    for name, want in wanted.items():
        if name not in index:
            wrong.append(f"missing {name}")
            continue
        info = index[name]
        if info.shape != want.flat:
            wrong.append(f"{name} of shape {list(info.shape)}; expected {list(want.flat)}")
        elif info.dtype.name not in want.dtypes:
            wrong.append(f"{name} of dtype {info.dtype.name}; expected one of {', '.join(want.dtypes)}")
        sources.append(_Source(info, want))
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


def _names(cfg: DecoderConfig, quant: QuantRules) -> dict[str, _Wanted]:
    """Tensor name -> what it must be, for the parameters that this config has."""
    shapes, labels = param_shapes(cfg), param_axes(cfg)
    names: dict[str, _Wanted] = {}
    for key, (name, axes) in _ENDS.items():
        if key in shapes:
            names[name] = _Wanted((key,), None, shapes[key].shape, _file_shape(axes, cfg), labels[key], _FLOATS)
    chosen = quantised_paths(shapes, quant)
    inside = []
    for key, (name, axes) in _LAYER.items():
        path = tuple(key.split("."))
        if (part := _at(shapes["layers"], path)) is not None:
            float_ = _Wanted(
                path, None, part.shape[1:], _file_shape(axes, cfg), _at(labels["layers"], path)[1:], _FLOATS
            )
            config = chosen.get("/".join(("layers", *path)))
            inside += _stored(name, float_, config) if config else [(name, float_)]
    for i in range(cfg.num_layers):
        names |= {f"model.layers.{i}.{name}": want._replace(layer=i) for name, want in inside}
    return names


def _stored(name: str, want: _Wanted, config: QuantConfig) -> list[tuple[str, _Wanted]]:
    """Codes, scales and gains in the place of a matrix."""
    out = len(want.shape) - INPUT_AXES[want.path[-1]]
    inputs, rows = math.prod(want.shape[out:]), math.prod(want.shape[:out])
    if inputs % (config.group or inputs):
        raise ValueError(f"{name}: groups of {config.group} for {inputs} inputs; expected a divisor of them.")

    def beside(part: str, number: int) -> _Wanted:
        shape, names = (*want.shape[:out], number), (*want.names[:out], None)
        return _Wanted((*want.path, part), None, shape, (rows, number), names, ("bfloat16",))

    found = [(name, want._replace(path=(*want.path, "codes"), dtypes=("int8",)))]
    found += [(f"{name}_scale", beside("scale", inputs // (config.group or inputs)))]
    return found + ([(f"{name}_gain", beside("gain", len(config.gain)))] if config.gain else [])


def _place(source: _Source, dtype: Any, sharding: NamedSharding | None) -> jax.Array:
    """Read one tensor onto its device or devices, in our shape and dtype; done when it returns."""
    host = read_tensor(source.info).reshape(source.wanted.shape)
    if sharding is None or len(sharding.device_set) == 1:
        return jax.device_put(host, sharding).astype(dtype).block_until_ready()
    piece = lambda index: np.ascontiguousarray(host[index]).astype(dtype, copy=False)
    return jax.make_array_from_callback(host.shape, sharding, piece).block_until_ready()


def _fitting(mesh: Mesh, rules: Rules, names, shape: tuple[int, ...], path) -> NamedSharding:
    """What the mesh does not divide is replicated, as `Rules.shardings` does."""
    return NamedSharding(mesh, divisible(rules.spec(*names), shape, mesh.shape, ".".join(path), logging.DEBUG))


def _put_stacked(tree: Params, source: _Source, leaf: jax.Array, layers: int, sharding: NamedSharding | None) -> None:
    want = source.wanted
    path = ("layers", *want.path)
    if (stack := _at(tree, path)) is None:
        stack = jnp.zeros((layers, *leaf.shape), leaf.dtype, device=sharding)
    if stack.dtype != leaf.dtype:
        found = f"{'.'.join(want.path)} is {leaf.dtype.name} in layer {want.layer}, {stack.dtype.name} in another"
        raise CheckpointError(f"{source.info.file}: {found}; expected one dtype to stack. Load it with a dtype.")
    _put(tree, path, _set_layer(stack, leaf, want.layer))


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
    quant: QuantRules = (),
    like: Path | str | None = None,
    max_shard_bytes: int = 5 * 2**30,
    overwrite: bool = False,
) -> None:
    """Write a folder that transformers and `load` read. It appears whole or not at all.

    Args:
      folder: must not exist, or be empty, unless `overwrite`.
      model: layers stacked or as a tuple.
      dtype: of the tensors; "stored" writes each as the model holds it. Codes and scales are written as they are.
      quant: if the parameters are a master, the rules it was made with.
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
    parts = _parts(cfg, params, quant)

    def get(name: str) -> np.ndarray:
        part, row, _ = parts[name]
        part = jnp.copy(part) if row is None else part[row]  # a jax.Array keeps what numpy has read of it
        return np.asarray(part).reshape(specs[name][1]).astype(specs[name][0], copy=False)

    kept = lambda want: dtype == "stored" or want.path[-1] in _MASTER
    width = lambda part, want: np.dtype(part.dtype if kept(want) else jnp.dtype(dtype))
    specs = {name: (width(part, want), want.flat) for name, (part, _, want) in parts.items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{secrets.token_hex(8)}.partial")  # not the folder's name: there may be no room
    try:
        partial.mkdir()
        _write_config(partial, cfg, specs["model.embed_tokens.weight"][0].name, quant, like)
        write(partial, specs, get, max_shard_bytes=max_shard_bytes)
        swap_in(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _parts(cfg: DecoderConfig, params: Params, quant: QuantRules) -> dict[str, tuple[jax.Array, int | None, _Wanted]]:
    """Tensor name -> (the parameter, which row of it when layers are stacked, what it must be); nothing is bent."""
    stacked = not isinstance(params["layers"], tuple)
    tree = params if stacked else params | {"layers": dict(enumerate(params["layers"]))}
    parts, wrong = {}, []
    for name, want in _names(cfg, quant).items():
        row, inside = (want.layer, ("layers",)) if stacked else (None, ("layers", want.layer))
        part, shape = _at(tree, want.path if want.layer is None else (*inside, *want.path)), want.shape
        if (found := getattr(part, "shape", None)) != (shape if row is None else (cfg.num_layers, *shape)):
            wrong.append(f"{name} of shape {found}; expected {shape} a layer")
        elif want.path[-1] in _MASTER and part.dtype.name not in want.dtypes:
            wrong.append(f"{name} of dtype {part.dtype}; expected {want.dtypes[0]}")
        parts[name] = (part, row, want)
    count, wanted = len(jax.tree.leaves(params)), sum(row in (None, 0) for _, row, _ in parts.values())
    if wrong or count != wanted:
        shown = "; ".join(wrong[:20]) or f"{count} parameters; expected {wanted}"
        raise ValueError(f"save: {shown}. These parameters do not belong to model.config.")
    return parts


def _write_config(folder: Path, cfg: DecoderConfig, dtype: str, quant: QuantRules, like: Path | str | None) -> None:
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
    config.pop("quantization_config", None)  # of the model it came from
    if quant:
        matrices = write_rules(param_shapes(cfg), quant)
        config["quantization_config"] = {"quant_method": QUANT_METHOD, "version": 1, "matrices": matrices}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------- private
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
