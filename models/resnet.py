"""ResNet for small images (He et al., 1512.03385, section 4.2), at several widths from one master (2502.01199).

    x -> conv 3x3 -> norm, ReLU -> stages of blocks -> mean over the image -> linear
    block:  y = ReLU(norm(conv(ReLU(norm(conv x)))) + short x)

Each stage doubles the channels and halves the image, where `short` takes every second pixel and adds channels of zeros
(their option A), so it has no weights. ResNet-20 has 3 stages of 3 blocks, 16 channels at first: 269,722 parameters.

Double Rounding trains it at {8, 6, 4, 2} bits at once: all convolutions but the first are quantised, weights by one
scale for all widths (`quantise.py`) and inputs, which come from a ReLU, by a learned scale at each width; first
convolution, last layer, norms and shortcuts are float, and each width has norms of its own. Three trees go together:

    params    kernels, the norms' gains and biases [W, C], the last layer
    scales    of each quantised convolution "rho" of its kernel and "act" [W] of its input, both log2 unless "linear"
    stats     running mean and variance of each norm, [W, C]

`at_width` rounds the kernels for a width and `forward` runs the rest, so training and serving share it. What is stored,
`to_stored`, holds int8 codes and bfloat16 scales in place of quantised kernels; those that `from_stored` makes of them
are the trained ones, to the bit.

Letters: B images, C channels, O and I channels out and in, Y and X rows and columns, W widths (1 in a float network).
"""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from ..jaxlib_ext.qmm import scale_at, switch_codes
from .decoder import Params, constant, weight
from .quantise import FLOOR, QuantConfig, decode, encode, fake_quantise, fake_quantise_activations, init_scale, scale_of
from .vision import batch_norm, conv, he_normal, load_folder, save_folder

KIND = "resnet"  # in checkpoints
CANDIDATES = 60  # scales that calibration tries for each width
Bits = int | Int32[Array, ""] | None
Mode = Literal["eval", "train", "calibrate"]


# ------------------------------------------------------------------------------------------------------------ config
@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """What is computed.

    Attributes:
      blocks: of each stage.
      channels: of the first stage; each further one has twice as many.
      classes: that images have.
      bits: widths that are trained together, falling; none for a float network.
      init: how scales of kernels begin (`quantise.QuantConfig`).
      scale_param: what is learned, log2 of a scale or the scale itself as in the paper.
    """

    blocks: tuple[int, ...] = (3, 3, 3)
    channels: int = 16
    classes: int = 10
    bits: tuple[int, ...] = ()
    init: Literal["sigma3", "search", "absmax", "lsq"] = "sigma3"
    scale_param: Literal["log2", "linear"] = "log2"

    def __post_init__(self):
        whole = lambda n: type(n) is int and n >= 1
        if not isinstance(self.blocks, tuple) or not self.blocks or not all(map(whole, self.blocks)):
            raise ValueError(f"ResNetConfig.blocks: found {self.blocks!r}; expected a positive integer a stage.")
        for name in ("channels", "classes"):
            if not whole(getattr(self, name)):
                raise ValueError(f"ResNetConfig.{name}: found {getattr(self, name)!r}; expected a positive integer.")
        QuantConfig(bits=(8,) if self.bits == () else self.bits, init=self.init, scale_param=self.scale_param)

    @property
    def quant(self) -> QuantConfig:
        """How kernels are quantised.

        Raises:
          ValueError: for a float network.
        """
        if not self.bits:
            raise ValueError("ResNetConfig.bits: found none; expected widths. Make a network of several with `widen`.")
        return QuantConfig(bits=self.bits, init=self.init, scale_param=self.scale_param)


class Output(NamedTuple):
    """What a forward pass leaves behind."""

    logits: Float[Array, "B classes"]
    stats: Params  # moved by the batch in training, as they were otherwise


# ------------------------------------------------------------------------------------------------------------ blocks
class Act(nnx.Variable):
    """What is learned beside the weights of a quantised convolution: the scales of its input, [W]."""


class Unit(nnx.Module):
    """Quantise the input, convolve, norm."""

    def __init__(self, cfg: ResNetConfig, inputs: int, outputs: int, stride: int, *, quantised: bool, rngs: nnx.Rngs):
        W = max(1, len(cfg.bits))
        self.stride, self.scale_param = stride, QuantConfig(scale_param=cfg.scale_param)
        self.kernel = nnx.Param(he_normal(rngs, (outputs, 3, 3, inputs)))
        self.norm = constant(1.0, (W, outputs), ("width", "channel"))
        self.norm_bias = constant(0.0, (W, outputs), ("width", "channel"))
        self.mean, self.var = nnx.BatchStat(jnp.zeros((W, outputs))), nnx.BatchStat(jnp.ones((W, outputs)))
        if quantised and cfg.bits:
            self.bits = cfg.bits
            self.act = Act(jnp.zeros(W))

    def __call__(
        self, x: Float[Array, "B Y X I"], i: int | Int32[Array, ""], bits: Bits, mode: Mode
    ) -> tuple[Float[Array, "B Yo Xo O"], Params]:
        found: Params = {}
        if mode == "calibrate" and hasattr(self, "act"):
            scale = jnp.stack([_least_error(x, b) for b in self.bits])
            found["act"] = jnp.log2(scale) if self.scale_param.scale_param == "log2" else scale
        elif bits is not None and hasattr(self, "act"):
            scale = scale_of(self.act[...][i], self.scale_param)
            x = fake_quantise_activations(x, scale, jnp.float32(0), bits)
        y = conv(x, self.kernel[...], self.stride)
        own = (v[...][i] for v in (self.norm, self.norm_bias, self.mean, self.var))
        y, new = batch_norm(y, *own, train=mode == "train")
        return y, found | {name: getattr(self, name)[...].at[i].set(row) for name, row in new.items()}


class Block(nnx.Module):
    """Two units and a shortcut."""

    def __init__(self, cfg: ResNetConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.stride = 1 if inputs == outputs else 2
        self.conv1 = Unit(cfg, inputs, outputs, self.stride, quantised=True, rngs=rngs)
        self.conv2 = Unit(cfg, outputs, outputs, 1, quantised=True, rngs=rngs)

    def __call__(self, x, i, bits, mode):
        y, first = self.conv1(x, i, bits, mode)
        y, second = self.conv2(jax.nn.relu(y), i, bits, mode)
        short = x[:, :: self.stride, :: self.stride]
        short = jnp.pad(short, [(0, 0)] * 3 + [(0, y.shape[-1] - x.shape[-1])])
        return jax.nn.relu(y + short), {"conv1": first, "conv2": second}


class Network(nnx.Module):
    """Everything, blocks under the names `block0`, `block1`, ..."""

    def __init__(self, cfg: ResNetConfig, *, rngs: nnx.Rngs):
        C = cfg.channels
        self.stem = Unit(cfg, 3, C, 1, quantised=False, rngs=rngs)
        stages = [C * 2**stage for stage, n in enumerate(cfg.blocks) for _ in range(n)]
        self.number = len(stages)
        for n, sizes in enumerate(itertools.pairwise([C, *stages])):
            setattr(self, f"block{n}", Block(cfg, *sizes, rngs=rngs))
        self.head = weight(rngs, (cfg.classes, stages[-1]), ("class", "channel"), stages[-1])
        self.head_bias = constant(0.0, (cfg.classes,), ("class",))

    def __call__(self, x, i, bits, mode):
        found: Params = {}
        x, found["stem"] = self.stem(x, i, bits, mode)
        x = jax.nn.relu(x)
        for name in (f"block{n}" for n in range(self.number)):
            x, found[name] = getattr(self, name)(x, i, bits, mode)
        mean = jnp.mean(x, (1, 2))
        y = jnp.einsum("bc,oc->bo", mean, self.head[...], preferred_element_type=jnp.float32)
        return y + self.head_bias[...][None], found


# ------------------------------------------------------------------------------------------------------------- trees
def init(cfg: ResNetConfig, key: jax.Array) -> tuple[Params, Params]:
    """Fresh float32 params and stats; the same key gives the same weights, whatever the widths."""
    _, params, stats, _ = nnx.split(Network(cfg, rngs=nnx.Rngs(params=key)), nnx.Param, nnx.BatchStat, ...)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def widen(cfg: ResNetConfig, params: Params, stats: Params) -> tuple[Params, Params]:
    """Params and stats of a float network for one of several widths, whose norms all begin as the float one's."""
    own = ("norm", "norm_bias", "mean", "var")
    copy = lambda path, x: jnp.repeat(x, len(cfg.quant.bits), 0) if path[-1].key in own else x
    return jax.tree_util.tree_map_with_path(copy, params), jax.tree_util.tree_map_with_path(copy, stats)


def init_scales(cfg: ResNetConfig, params: Params, stats: Params, images: Float[Array, "B Y X 3"]) -> Params:
    """Scales to start from: of kernels by `init_scale`; of inputs those of the least squared error on a batch.

    Inputs are those of the float network with its running statistics (calibration as in LSQ+, 2004.09576).

    Args:
      cfg: of several widths.
      params: of `widen`.
      stats: likewise.
      images: as the network is to see them in training.
    """
    blank = jax.tree.map(jnp.zeros_like, _variables(cfg)[2])
    _, found = _network(cfg, params, stats, blank)(images, 0, None, "calibrate")

    def one(kernel: Array) -> Array:
        scale = init_scale(kernel, cfg.quant, over=3)
        return jnp.log2(scale) if cfg.scale_param == "log2" else scale

    return _over_quantised(params, lambda unit, path: {"rho": one(unit["kernel"]), "act": _at(found, path)["act"]})


def at_width(cfg: ResNetConfig, params: Params, scales: Params, bits: int | Int32[Array, ""]) -> Params:
    """Params with quantised kernels as they are at a width; the gradient reaches kernels and scales."""

    def one(unit: Params, path: tuple[str, ...]) -> Params:
        scale = scale_of(_at(scales, path)["rho"], cfg.quant)
        quant: Any = dict(master=cfg.quant.master, grad_scale=cfg.quant.grad_scale)
        return unit | {"kernel": fake_quantise(unit["kernel"], scale, bits, **quant)}

    return params | _over_quantised(params, one)


def forward(
    cfg: ResNetConfig,
    params: Params,
    stats: Params,
    images: Float[Array, "B Y X 3"],
    bits: Bits = None,
    scales: Params | None = None,
    *,
    train: bool = False,
) -> Output:
    """Run the network.

    Args:
      cfg: what to compute.
      params: with the kernels of this width, those of `at_width`.
      stats: running statistics; used unless in training.
      images: normalised; at least 2 pixels a side where 2 stages follow the first, and so on.
      bits: the width of inputs and norms, one of the config's: an int32 array is traced, so that one program serves
        all. None or 0 rounds nothing, and has the norms of the first.
      scales: of inputs; needed at a width.
      train: take the batch's statistics, and let the running ones follow.
    """
    bits = None if isinstance(bits, int) and bits == 0 else bits
    if bits is None:
        i, act = 0, jax.tree.map(lambda s: jnp.zeros(s.shape), _variables(cfg)[2])
    elif scales is None or not cfg.bits or (isinstance(bits, int) and bits not in cfg.bits):
        raise ValueError(f"resnet.forward: bits={bits}; expected one of {cfg.bits} with scales, or None.")
    else:
        bits = jnp.asarray(bits, jnp.int32)
        i = jnp.argmin(jnp.abs(jnp.asarray(cfg.bits, jnp.int32) - bits[None]))
        act = _over_quantised(params, lambda unit, path: {"act": _at(scales, path)["act"]})
    logits, stats = _network(cfg, params, stats, act)(images, i, bits, "train" if train else "eval")
    return Output(logits, stats)


# ----------------------------------------------------------------------------------------------------------- storage
def to_stored(cfg: ResNetConfig, params: Params, stats: Params, scales: Params | None = None) -> Params:
    """What is kept of training: for each quantised kernel `{"codes", "scale", "act"}`, int8 and bfloat16."""
    if not cfg.bits:
        return {"params": params, "stats": stats}

    def one(unit: Params, path: tuple[str, ...]) -> Params:
        learned = _at(scales, path)
        scale, act = (scale_of(learned[name], cfg.quant) for name in ("rho", "act"))
        codes = encode(unit["kernel"], scale, cfg.quant.master)
        rest = {name: leaf for name, leaf in unit.items() if name != "kernel"}
        return rest | {"codes": codes, "scale": scale.astype(jnp.bfloat16), "act": act.astype(jnp.bfloat16)}

    return {"params": params | _over_quantised(params, one), "stats": stats}


def from_stored(cfg: ResNetConfig, stored: Params, bits: int | Int32[Array, ""]) -> tuple[Params, Params, Params]:
    """Params, stats and scales for `forward`, the kernels made of integer codes shifted to a width."""

    def kernel(unit: Params, path: tuple[str, ...]) -> Params:
        del path
        codes = switch_codes(unit["codes"], cfg.quant.master, bits)
        scale = scale_at(unit["scale"].astype(jnp.float32), cfg.quant.master, bits)
        rest = {name: unit[name] for name in ("norm", "norm_bias")}
        return rest | {"kernel": decode(codes, scale)}

    def act(unit: Params, path: tuple[str, ...]) -> Params:
        del path
        scale = unit["act"].astype(jnp.float32)  # snapped: its logarithm is that of no other bfloat16
        return {"act": jnp.log2(scale) if cfg.scale_param == "log2" else scale}

    params = stored["params"]
    return params | _over_quantised(params, kernel), stored["stats"], _over_quantised(params, act)


def logits(
    cfg: ResNetConfig, stored: Params, images: Float[Array, "B Y X 3"], bits: Bits = None
) -> Float[Array, "B classes"]:
    """From what is stored, at a width; of a float network, which has none, with bits None."""
    if not cfg.bits:
        return forward(cfg, stored["params"], stored["stats"], images, bits).logits
    bits = cfg.quant.master if bits is None else bits
    params, stats, scales = from_stored(cfg, stored, bits)
    return forward(cfg, params, stats, images, bits, scales).logits


def stored_shapes(cfg: ResNetConfig) -> Params:
    """The tree of `to_stored`; nothing is allocated."""
    params, stats, act = _variables(cfg)
    scales = _over_quantised(params, lambda unit, path: _scale_shapes(unit, _at(act, path))) if cfg.bits else None
    return jax.eval_shape(functools.partial(to_stored, cfg), params, stats, scales)


def save(folder: Path | str, cfg: ResNetConfig, stored: Params, *, overwrite: bool = False) -> None:
    """Write a folder that `load` reads; it appears whole or not at all."""
    save_folder(folder, KIND, cfg, stored, overwrite=overwrite)


def load(folder: Path | str) -> tuple[ResNetConfig, Params]:
    """Config and stored tree, for `logits`.

    Raises:
      CheckpointError: for a folder that cannot be trusted or understood.
    """
    return load_folder(folder, KIND, ResNetConfig, stored_shapes)


# ----------------------------------------------------------------------------------------------------------- private
@functools.lru_cache(maxsize=64)
def _abstract(cfg: ResNetConfig) -> Any:
    return nnx.split(nnx.eval_shape(lambda: Network(cfg, rngs=nnx.Rngs(0))), nnx.Param, nnx.BatchStat, Act)


def _variables(cfg: ResNetConfig) -> tuple[Params, Params, Params]:
    """Shapes of params, stats and the scales of inputs."""
    return tuple(nnx.to_pure_dict(state) for state in _abstract(cfg)[1:])  # type: ignore[return-value]


def _network(cfg: ResNetConfig, params: Params, stats: Params, act: Params) -> Any:
    return nnx.merge(_abstract(cfg)[0], params, stats, act)


def _over_quantised(params: Params, one: Any) -> Params:
    """`one(unit, path)` of every unit in blocks, as a tree of blocks."""
    blocks = {name: block for name, block in params.items() if name.startswith("block")}
    return {name: {unit: one(leaf, (name, unit)) for unit, leaf in block.items()} for name, block in blocks.items()}


def _at(tree: Any, path: tuple[str, ...]) -> Params:
    return functools.reduce(lambda node, name: node[name], path, tree)


def _scale_shapes(unit: Params, act: Params) -> Params:
    return {"rho": jax.ShapeDtypeStruct((unit["kernel"].shape[0], 1), jnp.float32), "act": act["act"]}


def _least_error(x: Float[Array, "..."], bits: int) -> Float[Array, ""]:
    """Of scales that reach from 5 % of the largest input to all of it, the one of the least squared error."""
    top = jnp.max(x)

    def better(best: tuple[Array, Array], share: Array) -> tuple[tuple[Array, Array], None]:
        scale = jnp.maximum(share * top / (2**bits - 1), FLOOR)
        error = jnp.sum((x - fake_quantise_activations(x, scale, jnp.float32(0), bits)) ** 2)
        least, chosen = best
        return (jnp.minimum(error, least), jnp.where(error < least, scale, chosen)), None

    start = (jnp.float32(jnp.inf), jnp.float32(1.0))
    scale = jax.lax.scan(better, start, jnp.geomspace(0.05, 1.0, CANDIDATES, dtype=jnp.float32))[0][1]
    return jnp.where(top > 0, scale, 1.0 / (2**bits - 1))  # a layer that is silent may speak later
