"""Hugging Face checkpoint folders: read one into a `Model`, write a `Model` as one.

`_LAYER` and `_ENDS` are the whole correspondence: for each of our parameters the name of its tensor and its axes,
`"NH,D"` meaning that the file holds `[N*H, D]` and we hold `[N, H, D]`. Import and export only reshape, so what passes
through unchanged is identical to the byte. Tensors pass one at a time: the host never
holds more than one of them beside what is already placed.
"""

import dataclasses
import functools
import json
import math
import os
import reprlib
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from ..sharding.rules import REPLICATED, Rules
from .decoder import DecoderConfig, Model, Params, RopeScaling, param_axes, param_shapes
from .safetensors import CheckpointError, TensorInfo, read_index, read_json, read_rows, read_tensor, write

DType = Literal["float32", "bfloat16", "float16", "stored"]

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
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
_MAX_LAYERS = 10_000  # a config is not trusted to make us count further
_brief = reprlib.repr  # whatever a file holds, a message stays short

# What transformers takes for a key that is not there; a null stays a null. We take no sizes but those that the shapes
# of the tensors prove, and no end token: its 2 for Llama and Mistral would end a Llama 3 text at "#".
_DEFAULTS: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "sliding_window": 4096}
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "max_window_layers": 28}
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131_072},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
}

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


# ------------------------------------------------------------------------------------------------------------ config
def read_config(folder: Path | str) -> DecoderConfig:
    """Read `config.json` (and the end tokens of `generation_config.json`).

    Raises:
      CheckpointError: for a file that is missing, malformed, of an architecture that is not supported, or that asks for
        something we would compute wrongly.
    """
    folder = Path(folder)
    cfg = config_from_hf(read_json(_inside(folder, "config.json")), where=str(folder / "config.json"))
    if (path := _inside(folder, "generation_config.json")).exists():
        cfg = dataclasses.replace(cfg, eos_ids=tuple(sorted({*cfg.eos_ids, *_eos_ids(read_json(path), str(path))})))
    return cfg


def config_from_hf(hf: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """Translate the contents of a Hugging Face `config.json`, either generation of its key names."""
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        found = f"model_type {_brief(kind)} (architectures {_brief(hf.get('architectures'))})"
        raise CheckpointError(f"{where}: {found}; expected one of {', '.join(ARCHITECTURES)}.")
    if hf.get("quantization_config") is not None:
        raise CheckpointError(f"{where}: quantization_config; expected plain weights. Use the unquantised model.")
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


def config_to_hf(cfg: DecoderConfig, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of a decoder, in key names that every transformers since version 4 reads."""
    cfg = _canonical(cfg)
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
      mesh: where the parameters go; None is the default device.
      rules: which mesh axes each parameter lies on.
      progress: show a bar.

    Raises:
      CheckpointError: for a folder that cannot be trusted or understood; missing, unexpected and misshapen tensors are
        named together.
    """
    folder = Path(folder)
    cfg = read_config(folder)
    sources = _match(cfg, folder)
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
            sharding = None if mesh is None else NamedSharding(mesh, rules.spec(*names))
            leaf = _place(source, cfg, to, sharding)
            if source.layer is None:
                _put(tree, source.path, leaf)
            elif not stacked:
                _put(tree, ("layers", source.layer, *source.path), leaf)
            else:
                _put_stacked(tree, source, leaf, cfg.num_layers, mesh, rules.spec("layers", *names))
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


def _match(cfg: DecoderConfig, folder: Path, headers_only: bool = False) -> list[_Source]:
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


def _put_stacked(tree: Params, source: _Source, leaf: jax.Array, layers: int, mesh: Mesh | None, spec: Any) -> None:
    path = ("layers", *source.path)
    sharding = None if mesh is None else NamedSharding(mesh, spec)
    if (stack := _at(tree, path)) is None:
        stack = jnp.zeros((layers, *leaf.shape), leaf.dtype, device=sharding)
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
        raise FileExistsError(
            f"save: {folder} exists; expected a new or an empty folder. Pass overwrite to replace it."
        )
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
        _swap_in(partial, folder)
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
        source, known, wanted = read_json(_inside(Path(like), "config.json")), read_config(like), _canonical(cfg)
        same_eos = known.eos_ids == wanted.eos_ids
        if dataclasses.replace(known, eos_ids=wanted.eos_ids) == wanted:
            dtypes = {key: dtype for key in ("dtype", "torch_dtype") if key in source} or {"torch_dtype": dtype}
            config = source | dtypes | ({} if same_eos else {"eos_token_id": config["eos_token_id"]})
        for name in TOKENIZER_FILES:
            path = _inside(Path(like), name)
            if path.is_file() and (same_eos or name != "generation_config.json"):  # it would bring the old ones back
                shutil.copyfile(path, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _swap_in(partial: Path, folder: Path) -> None:
    """Put the finished folder in place; an old one is removed only after the new one stands."""
    if not folder.exists():
        os.replace(partial, folder)
        return
    old = folder.with_name(f".{secrets.token_hex(8)}.old")
    os.replace(folder, old)
    try:
        os.replace(partial, folder)
    except BaseException:
        os.replace(old, folder)
        raise
    shutil.rmtree(old) if old.is_dir() else old.unlink()


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


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder, which may be a link, but not to the outside."""
    if not (real := Path(os.path.realpath(folder / name))).is_relative_to(os.path.realpath(folder)):
        raise CheckpointError(
            f"{folder / name}: a link to {real}; expected a file inside the folder. "
            f"If you trust it (a Hugging Face cache is made of links), copy it with `cp -rL {folder} COPY`."
        )
    return folder / name


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _put(tree: dict[Any, Any], path: tuple[Any, ...], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _number(
    hf: Mapping[str, Any], where: str, name: str, null: Any = None, *, integer: bool = True, above=0, most=2**31 - 1
) -> Any:
    value = null if hf.get(name) is None else hf[name]
    most = most if integer else 1e30
    good = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool) and above < value <= most
    if not good:
        found = f"{name} is {_brief(value) if name in hf else 'missing'}"
        kind = "an integer" if integer else "a number"
        raise CheckpointError(f"{where}: {found}; expected {kind} above {above}, at most {most}.")
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


def _canonical(cfg: DecoderConfig) -> DecoderConfig:
    """The same decoder as `config_from_hf` puts it."""
    some = any(cfg.windowed)
    return dataclasses.replace(
        cfg,
        window=cfg.window if some else None,
        window_layers=cfg.window_layers if some and not all(cfg.windowed) else (),
        eos_ids=tuple(sorted(set(cfg.eos_ids))),
        dtype="float32",
    )


def _rope(hf: dict[str, Any], where: str) -> dict[str, Any]:
    """Everything about rotary positions, `rope_scaling` before `rope_parameters` as transformers has it."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise CheckpointError(f"{where}: rope_parameters {_brief(rope)}; expected one object for all layers.")
    outside = {name: hf[name] for name in ("rope_theta", "partial_rotary_factor") if name in hf}
    trained = "original_max_position_embeddings"  # here, and only here, what stands outside comes first
    rope = {
        trained: hf["max_position_embeddings"],
        **outside,
        **rope,
        **({trained: hf[trained]} if trained in hf else {}),
    }
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
