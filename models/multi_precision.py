"""Multi-precision networks: one int8 master serves every lower width (Double Rounding, 2502.01199).

What `quantise.py` does to one weight is done here to a tree of parameters. The leaves named in `INPUT_AXES` may be
chosen by rules: (regular expression for a whole path like `layers/attn/q`, config or None), of which the first match
counts. Three trees go with one another:

    params    the float weights, which learn by the straight-through rule
    scales    what learns beside them: `{"rho"}`, with s = 2^rho, or `{"rho", "gain"}` in the place of each chosen leaf
    master    what is stored: `{"codes", "scale"}`, int8 and bfloat16, or with "gain", in the place of each chosen leaf

`fake_quantise_tree(params, scales, bits)` and `from_master(to_master(params, scales), bits)` are the same weights to
the bit. `switch_bits` derives from a master what serves: in the place of each chosen leaf a `QuantisedMatrix`, which
the decoder multiplies by without ever making floats of it.
"""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int32

from ..jaxlib_ext import qmm
from ..jaxlib_ext.qmm import QuantisedMatrix, over_trailing, repack, scale_at, switch_codes
from ..sharding.rules import SERVING, Rules
from .decoder import DecoderConfig, Model, Params, param_axes, unstack_layers
from .quantise import QuantConfig, decode, encode, fake_quantise, init_gain, init_scale, scale_of, snap, spread

# How many trailing axes of a leaf are its inputs; `decoder.project` contracts these. No other leaf is ever quantised.
INPUT_AXES = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}

Bits = int | Int32[Array, ""] | Int32[Array, " L"]
QuantRules = tuple[tuple[str, QuantConfig | None], ...]
MATRICES = r"(.*/)?(attn/[qkvo]|mlp/(gate|up|down))"
_NAME = r"[a-zA-Z0-9_/]{1,80}"  # of a matrix, as a file may have it
DEFAULT_RULES: QuantRules = ((MATRICES, QuantConfig()),)


# ------------------------------------------------------------------------------------------------------------- trees
def quantised_paths(params: Params, rules: QuantRules = DEFAULT_RULES) -> dict[str, QuantConfig]:
    """Path -> config of every leaf that is quantised; a path names a weight in every layer.

    Raises:
      ValueError: if a rule matches no matrix.
    """
    names = dict.fromkeys(path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
    return {name: cfg for name, cfg in _assign(tuple(names), rules).items() if cfg is not None}


def init_scales(params: Params, rules: QuantRules = DEFAULT_RULES) -> Params:
    """The tree of what is learned beside the weights: float32, `{"rho"}` or `{"rho", "gain"}` for each chosen leaf."""

    def one(leaf: _Leaf) -> Params:
        scale = init_scale(leaf.value, leaf.cfg, INPUT_AXES[leaf.name.split("/")[-1]])
        parts = {"rho": jnp.log2(scale) if leaf.cfg.scale_param == "log2" else scale}
        return parts | ({"gain": init_gain(leaf.value, snap(scale), leaf.cfg)} if leaf.cfg.gain else {})

    return _only(_replace(params, rules, one, lambda _: None)) or {}


def fake_quantise_tree(params: Params, scales: Params, bits: Bits, rules: QuantRules = DEFAULT_RULES) -> Params:
    """The model at a width, as the forward pass uses it: chosen leaves replaced, the others the very same arrays.

    A width that a leaf's config does not reach becomes the nearest that it does: rules may keep a leaf at 4 bits or
    above while others go to 2.

    Args:
      params: the float weights, layers stacked or as a tuple.
      scales: tree of `init_scales`, in the same form.
      bits: one width for all, or one a layer; an int32 array is traced, so one program serves all widths.
      rules: those of `init_scales`.
    """

    def one(leaf: _Leaf) -> jax.Array:
        w, cfg, learned = leaf.value, leaf.cfg, _beside(scales, leaf)
        width = _width(bits, leaf, w.shape)
        scale = scale_of(learned["rho"], cfg)
        low = fake_quantise(w.astype(jnp.float32), scale, width, master=cfg.master, grad_scale=cfg.grad_scale)
        return _with_gain(low, learned, scale.ndim, width, cfg).astype(w.dtype)

    return _replace(params, rules, one)


def to_master(params: Params, scales: Params, rules: QuantRules = DEFAULT_RULES) -> Params:
    """What is stored: for each chosen leaf int8 codes and bfloat16 scales, and gains; the other leaves as they are."""

    def one(leaf: _Leaf) -> Params:
        learned = _beside(scales, leaf)
        scale = scale_of(learned["rho"], leaf.cfg)
        parts = {"codes": encode(leaf.value, scale, leaf.cfg.master), "scale": scale.astype(jnp.bfloat16)}
        return parts | ({"gain": snap(learned["gain"]).astype(jnp.bfloat16)} if leaf.cfg.gain else {})

    return _replace(params, rules, one)


def from_master(
    master: Params, bits: Bits, rules: QuantRules = DEFAULT_RULES, dtype: jax.typing.DTypeLike = jnp.float32
) -> Params:
    """Float weights of type `dtype` at a width, or one width a layer; for oracles and small models.

    They are those of `fake_quantise_tree`, to the bit.
    """

    def one(leaf: _Leaf) -> jax.Array:
        stored, cfg = leaf.value, leaf.cfg
        width = _width(bits, leaf, stored["codes"].shape)
        scale = scale_at(stored["scale"].astype(jnp.float32), cfg.master, width)
        low = decode(switch_codes(stored["codes"], cfg.master, width), scale)
        return _with_gain(low, stored, scale.ndim, width, cfg).astype(dtype)

    return _replace(master, rules, one)


def switch_bits(
    master: Params,
    bits: int | Sequence[int] | Int32[np.ndarray, " L"],
    rules: QuantRules = DEFAULT_RULES,
    *,
    act: Literal["int8"] | None = None,
) -> Params:
    """The model at a width, ready to serve: `decoder.forward` takes it as it takes floats.

    Integers alone, one pass over each master; at 8 bits the codes themselves serve, but for those of `o`, which are
    copied to have their inputs on one axis. The master is left as it is, and what is not quantised is the very same
    array, so several widths of one master can be held at once.

    Args:
      master: of `to_master` or `hf.load_master`, layers as a tuple.
      bits: one width for all, or one a layer. Where rules differ, a matrix that does not reach it has the nearest that
        it does.
      rules: those that it was made with.
      act: "int8" quantises what enters each matrix as well, token by token.
    """
    if not isinstance(master["layers"], tuple):
        raise ValueError("switch_bits: found stacked layers; expected a tuple of layers. Use unstack_layers.")
    layers = len(master["layers"])
    each = tuple(bits) if isinstance(bits, Sequence | np.ndarray) else (bits,) * layers
    least = min((cfg.bits[-1] for _, cfg in rules if cfg is not None), default=2)  # else all would have more than said
    if len(each) != layers or not all(isinstance(b, Integral) and least <= b <= 8 for b in each):
        raise ValueError(
            f"bits: found {bits}; expected a width from {least}, the lowest of this master, to 8, or one for each of "
            f"{layers} layers."
        )

    def one(leaf: _Leaf) -> QuantisedMatrix:
        stored, cfg = leaf.value, leaf.cfg
        width: Any = _width(int(each[leaf.layer[0]] if leaf.layer else each[0]), leaf, stored["codes"].shape)
        codes, over = stored["codes"], INPUT_AXES[leaf.name.split("/")[-1]]
        return QuantisedMatrix(
            planes=_whole(codes, over) if width == 8 else _repack(codes, over=over, master=cfg.master, bits=width),
            scale=stored["scale"],
            gain=stored["gain"][..., cfg.gain.index(width)] if width in cfg.gain else None,
            bits=width,
            master=cfg.master,
            shape=codes.shape,
            act=act,
        )

    return _replace(master, rules, one)


def place(model: Model, mesh: Mesh, rules: Rules = SERVING) -> Model:
    """The model with every array on a mesh, ready to serve there; layers become a tuple."""
    params = unstack_layers(model.params)
    return model._replace(params=jax.device_put(params, placements(model.config, params, mesh, rules)))


def placements(cfg: DecoderConfig, params: Params, mesh: Mesh, rules: Rules = SERVING) -> Params:
    """Where every array of a model that serves lies on a mesh: floats, and the parts of quantised matrices.

    Args:
      cfg: of the model.
      params: its parameters or their shapes, layers as a tuple.
      mesh: of the devices.
      rules: which mesh axes each logical axis lies on.
    """
    axes = param_axes(cfg)
    layer = jax.tree.map(lambda names: names[1:], axes["layers"], is_leaf=lambda node: isinstance(node, tuple))
    axes = axes | {"layers": (layer,) * cfg.num_layers}

    def one(path: Any, leaf: Any) -> Any:
        names: Any = axes
        for key in path:
            names = names[key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key]
        if not isinstance(leaf, QuantisedMatrix):
            return rules.shardings(mesh, names, leaf)
        over = INPUT_AXES[path[-1].key]
        (outputs,), (inputs,) = rules.spec(names[0]), rules.spec(names[-over])
        return qmm.shardings(leaf, over, outputs, inputs, mesh)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda node: isinstance(node, QuantisedMatrix))


def floats_of(master: Params, rules: QuantRules = DEFAULT_RULES) -> Params:
    """Float32 weights of which `to_master`, with `scales_of`, makes this master: C s, which has no gain yet."""
    plain = tuple((pattern, cfg and dataclasses.replace(cfg, gain=())) for pattern, cfg in rules)
    return from_master(master, 8, plain)


def scales_of(master: Params, rules: QuantRules = DEFAULT_RULES) -> Params:
    """The tree that `to_master` made a master with, snapped: for what is computed from `floats_of` and scales."""

    def one(leaf: _Leaf) -> Params:
        scale = leaf.value["scale"].astype(jnp.float32)
        parts = {"rho": jnp.log2(scale) if leaf.cfg.scale_param == "log2" else scale}
        return parts | ({"gain": leaf.value["gain"].astype(jnp.float32)} if leaf.cfg.gain else {})

    return _only(_replace(master, rules, one, lambda _: None)) or {}


def scale_axes(axes: Params, rules: QuantRules = DEFAULT_RULES) -> Params:
    """Logical axis names of the tree of `init_scales`, from those of the parameters (`decoder.param_axes`)."""
    flat = nnx.traversals.flatten_mapping(axes)
    found: dict[tuple[str, ...], tuple[str | None, ...]] = {}
    for name, cfg in _assign(tuple("/".join(path) for path in flat), rules).items():
        if cfg is not None:
            path = tuple(name.split("/"))
            found[*path, "rho"] = (*flat[path][: -INPUT_AXES[path[-1]]], None)
            if cfg.gain:
                found[*path, "gain"] = found[*path, "rho"]
    return nnx.traversals.unflatten_mapping(found)


def write_rules(params: Params, rules: QuantRules) -> dict[str, Any]:
    """What rules make of a model's leaves, as JSON: path -> the config of each that is quantised."""
    return {name: dataclasses.asdict(cfg) for name, cfg in quantised_paths(params, rules).items()}


def read_rules(written: Any) -> QuantRules:
    """The rules of `write_rules`; whatever a file holds, patterns are plain names.

    Raises:
      ValueError: for anything else.
    """
    fields = {f.name for f in dataclasses.fields(QuantConfig)}
    rules = []
    for name, entry in written.items() if isinstance(written, Mapping) else [("rules", None)]:
        known = re.fullmatch(_NAME, name) and name.split("/")[-1] in INPUT_AXES
        if not known or not isinstance(entry, Mapping) or not entry.keys() <= fields:
            raise ValueError(f"quantisation: found {name[:80]!r}: {str(entry)[:80]}; expected a matrix and its config.")
        values: Any = {key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()}
        try:
            rules.append((re.escape(name), QuantConfig(**values)))
        except (TypeError, ValueError, OverflowError) as e:  # whose words may hold all that the file does
            found = f"{str(entry)[:80]} for {name!r}: {str(e)[:160]}"
            raise ValueError(f"quantisation: found {found}; expected a config of this matrix.") from e
    return tuple(rules)


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path without its layer, `layers/attn/q`, as rules write it."""
    return "/".join(k.key for k in path if isinstance(k, jax.tree_util.DictKey))


# ----------------------------------------------------------------------------------------------------------- private
@functools.partial(jax.jit, static_argnames=("over", "master", "bits"))
def _repack(codes: Array, *, over: int, master: int, bits: int) -> Any:
    return repack(codes.reshape(-1, math.prod(codes.shape[codes.ndim - over :])), master, bits)


def _whole(codes: Array, over: int) -> tuple[Array]:
    """The master's own codes, inputs on one axis: two would have a TPU write them anew in front of every product."""
    return (codes if over == 1 else codes.reshape(*codes.shape[: codes.ndim - over], -1),)


class _Leaf(NamedTuple):
    """A quantised leaf."""

    name: str  # its path without the layer, `layers/attn/q`
    layer: tuple[int, int] | None  # which of how many, if layers are a tuple
    path: tuple[Any, ...]
    value: Any
    cfg: QuantConfig


def _with_gain(w, learned, ndim: int, bits, cfg: QuantConfig):
    """Multiply float32 weights by their gain at this width; `ndim` is that of their scale."""
    if not cfg.gain:
        return w
    gains, bits = snap(learned["gain"].astype(jnp.float32)), over_trailing(jnp.asarray(bits, jnp.int32), ndim)
    gain = jnp.ones((*gains.shape[:-1], 1), jnp.float32)
    for i, b in enumerate(cfg.gain):
        gain = jnp.where(bits == b, gains[..., i : i + 1], gain)
    return w * spread(gain, w.shape)


def _width(bits: Bits, leaf: _Leaf, shape: tuple[int, ...]) -> int | Int32[Array, "..."]:
    """The width of one leaf: its layer's, within the range of its config."""
    least, most = leaf.cfg.bits[-1], leaf.cfg.master
    if isinstance(bits, int):
        if not 2 <= bits <= 8:
            raise ValueError(f"bits: found {bits}; expected a width from 2 to 8.")
        return min(max(bits, least), most)
    bits = jnp.asarray(bits, jnp.int32)
    if bits.ndim:
        layers = shape[0] if leaf.layer is None else leaf.layer[1]
        if bits.shape != (layers,) or not leaf.name.startswith("layers/"):
            raise ValueError(
                f"bits: shape {bits.shape} for {leaf.name} of shape {shape}; expected a scalar, or one width a layer "
                "where all quantised weights are in layers."
            )
        bits = bits if leaf.layer is None else bits[leaf.layer[0]]
    return jnp.clip(bits, least, most)


def _assign(names: tuple[str, ...], rules: QuantRules) -> dict[str, QuantConfig | None]:
    matrices = [name for name in names if name.split("/")[-1] in INPUT_AXES]
    for pattern, _ in rules:
        if not any(re.fullmatch(pattern, name) for name in matrices):
            near = ", ".join(difflib.get_close_matches(pattern, matrices, n=3, cutoff=0.0))
            raise ValueError(
                f"rules: {pattern!r} matches no matrix; expected a regular expression for whole paths, the nearest of "
                f"which are {near}. Embeddings, heads, norms and biases stay float."
            )
    first = lambda name: next((cfg for pattern, cfg in rules if re.fullmatch(pattern, name)), None)
    return {name: first(name) for name in matrices}


def _replace(tree: Params, rules: QuantRules, one: Callable[[_Leaf], Any], other: Callable = lambda x: x) -> Params:
    """`one` of every quantised leaf, or entry of a master, and `other` of the rest."""
    stored = lambda node: isinstance(node, dict) and "codes" in node
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=stored)
    chosen = _assign(tuple(dict.fromkeys(path_name(path) for path, _ in leaves)), rules)
    new = []
    for path, value in leaves:
        name = path_name(path)
        cfg = chosen.get(name)
        unrolled = name.startswith("layers/") and isinstance(path[1], jax.tree_util.SequenceKey)
        layer = (path[1].idx, len(tree["layers"])) if unrolled else None
        new.append(other(value) if cfg is None else one(_Leaf(name, layer, path, value, cfg)))
    return structure.unflatten(new)


def _beside(scales: Params, leaf: _Leaf) -> Params:
    """What the tree of scales has for a leaf."""
    node: Any = scales
    try:
        for key in leaf.path:
            node = node[key.key if isinstance(key, jax.tree_util.DictKey) else key.idx]
        missing = {"rho", *(["gain"] if leaf.cfg.gain else [])} - {*node}
    except (KeyError, IndexError, TypeError):
        missing = {"rho"}
    if missing:
        raise ValueError(
            f"scales: no {' and '.join(sorted(missing))} for {leaf.name}; expected those of init_scales for these "
            "rules and parameters, in the same form. Use stack_layers or unstack_layers if one has layers as a tuple."
        )
    return node


def _only(node: Any) -> Any:
    """The tree without its Nones, and without what then is empty; None if that is all."""
    if isinstance(node, dict):
        return {name: kept for name, part in node.items() if (kept := _only(part)) is not None} or None
    if isinstance(node, tuple):
        parts = tuple(map(_only, node))
        return None if all(part is None for part in parts) else parts
    return node
