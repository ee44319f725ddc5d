"""GhostNetV3 (2404.11202): many branches for every convolution in training, one in use.

    ghost module     a = act(conv x), b = act(depthwise conv a), y = (a, b)              GhostNet (1911.11907)
                     y times sigmoid(attention x), from the third row on                  DFC attention, V2 (2211.12905)
    bottleneck       y = ghost(SE(depthwise conv, if stride 2, of ghost(x))) + short x

DFC attention is a convolution and two depthwise ones, 1 x 5 and 5 x 1, on the image at half its size, enlarged again by
repeating pixels; SE (squeeze and excite) weighs channels by two layers on their means. `short` is the identity, or a
depthwise and a 1 x 1 convolution where the shape changes; ghost modules have ReLU, but for the second of a bottleneck.

V3 trains each convolution of ghost modules, and the depthwise one between them, as a sum of branches, each with a norm:
3 convolutions of its kernel's size, one of 1 x 1 unless that is its size, and the identity where the shape stays. With
running statistics all of it is linear, so `fold` makes one kernel and one bias of them:

    W' = sum W gain / sqrt(var + eps)          b' = sum bias - mean gain / sqrt(var + eps)

a 1 x 1 kernel padded around, the identity a kernel of one 1 in the middle. Facts are of the paper and its released
network; the table and sizes are those of its ImageNet model at width 1.0.

Letters: B images, C channels, O and I channels out and in, Y and X rows and columns, N branches.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .decoder import Params, constant, weight
from .vision import EPS, batch_norm, conv, he_normal, load_folder, save_folder

KIND = "ghostnet"  # in checkpoints
BRANCHES = 3  # convolutions of the full size
Row = tuple[int, int, int, int, int]  # kernel, channels inside, channels out, squeeze and excite, stride
TABLES: dict[str, tuple[Row, ...]] = {
    "ghostnet": (
        (3, 16, 16, 0, 1),
        (3, 48, 24, 0, 2),
        (3, 72, 24, 0, 1),
        (5, 72, 40, 1, 2),
        (5, 120, 40, 1, 1),
        (3, 240, 80, 0, 2),
        (3, 200, 80, 0, 1),
        (3, 184, 80, 0, 1),
        (3, 184, 80, 0, 1),
        (3, 480, 112, 1, 1),
        (3, 672, 112, 1, 1),
        (5, 672, 160, 1, 2),
        (5, 960, 160, 0, 1),
        (5, 960, 160, 1, 1),
        (5, 960, 160, 0, 1),
        (5, 960, 160, 1, 1),
    ),
    "small": ((3, 16, 16, 0, 1), (3, 48, 24, 0, 2), (5, 72, 40, 1, 2)),  # a quick one of our own
}


# ------------------------------------------------------------------------------------------------------------ config
@dataclasses.dataclass(frozen=True, kw_only=True)
class GhostNetConfig:
    """What is computed.

    Attributes:
      table: rows of bottlenecks; `ghostnet` is the published one.
      width: factor on the channels of the table, rounded to multiples of 4.
      classes: that images have.
      stem_stride: 2 for ImageNet, 1 for images of 32 pixels.
      head: units of the last hidden layer.
      folded: one kernel in place of branches and norms, for use.
    """

    table: Literal["ghostnet", "small"] = "ghostnet"
    width: float = 1.0
    classes: int = 10
    stem_stride: int = 1
    head: int = 1280
    folded: bool = False

    def __post_init__(self):
        if self.table not in TABLES:
            raise ValueError(f"GhostNetConfig.table: found {self.table!r}; expected one of {', '.join(TABLES)}.")
        if not isinstance(self.width, int | float) or not 0 < self.width < math.inf:
            raise ValueError(f"GhostNetConfig.width: found {self.width!r}; expected a positive number.")
        for name in ("classes", "head"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"GhostNetConfig.{name}: found {getattr(self, name)!r}; expected a positive integer.")
        if self.stem_stride not in (1, 2) or type(self.folded) is not bool:
            found = f"stem_stride={self.stem_stride!r}, folded={self.folded!r}"
            raise ValueError(f"GhostNetConfig: found {found}; expected 1 or 2, true or false.")

    def channels(self, number: float) -> int:
        """So many of the table, at this width."""
        return divisible(number * self.width)


class Output(NamedTuple):
    """What a forward pass leaves behind."""

    logits: Float[Array, "B classes"]
    stats: Params  # moved by the batch in training, as they were otherwise; empty if folded


def divisible(number: float) -> int:
    """The nearest multiple of 4, halves up; not less than 4, nor below 90 % of the number."""
    near = max(4, int(number + 2) // 4 * 4)
    return near + 4 if near < 0.9 * number else near


# ------------------------------------------------------------------------------------------------------------ layers
class Convs(nnx.Module):
    """A sum of convolutions with norms, or the one they fold to; channels stay apart if depthwise.

    Branches are numbered as their norms are stacked: full convolutions, then 1 x 1, then the identity.
    """

    def __init__(
        self,
        cfg: GhostNetConfig,
        inputs: int,
        outputs: int,
        size: int | tuple[int, int] = 1,
        stride: int = 1,
        *,
        depthwise: bool = False,
        branched: bool = False,
        rngs: nnx.Rngs,
    ):
        self.stride, self.groups = stride, inputs if depthwise else 1
        shape = (outputs, *((size, size) if isinstance(size, int) else size), inputs // self.groups)
        if cfg.folded:
            self.kernel, self.bias = nnx.Param(he_normal(rngs, shape)), constant(0.0, (outputs,), ("channel",))
            return
        full = BRANCHES if branched else 1
        point, same = branched and size != 1, branched and inputs == outputs and stride == 1
        self.kernel = nnx.Param(jnp.stack([he_normal(rngs, shape) for _ in range(full)]))
        if point:
            self.point = nnx.Param(he_normal(rngs, (outputs, 1, 1, shape[-1])))
        N = full + point + same
        self.identity = same
        self.norm = constant(1.0, (N, outputs), ("branch", "channel"))
        self.norm_bias = constant(0.0, (N, outputs), ("branch", "channel"))
        self.mean, self.var = nnx.BatchStat(jnp.zeros((N, outputs))), nnx.BatchStat(jnp.ones((N, outputs)))

    def __call__(self, x: Float[Array, "B Y X I"], train: bool) -> tuple[Float[Array, "B Yo Xo O"], Params]:
        if hasattr(self, "bias"):
            return conv(x, self.kernel[...], self.stride, self.groups) + self.bias[...][None, None, None], {}
        parts = [conv(x, kernel, self.stride, self.groups) for kernel in self.kernel[...]]
        if hasattr(self, "point"):
            parts.append(conv(x, self.point[...], self.stride, self.groups))
        parts += [x] * self.identity
        variables = (self.norm, self.norm_bias, self.mean, self.var)
        each = [batch_norm(y, *(v[...][n] for v in variables), train=train) for n, y in enumerate(parts)]
        new = {name: jnp.stack([stats[name] for _, stats in each]) for name in ("mean", "var")}
        return functools.reduce(jnp.add, [y for y, _ in each]), new


class Ghost(nnx.Module):
    """A ghost module."""

    def __init__(self, cfg: GhostNetConfig, inputs: int, outputs: int, *, relu: bool, attention: bool, rngs: nnx.Rngs):
        half = -(-outputs // 2)
        self.outputs, self.relu = outputs, relu
        self.primary = Convs(cfg, inputs, half, branched=True, rngs=rngs)
        self.cheap = Convs(cfg, half, half, 3, depthwise=True, branched=True, rngs=rngs)
        if attention:
            self.gate = Convs(cfg, inputs, outputs, rngs=rngs)
            self.row = Convs(cfg, outputs, outputs, (1, 5), depthwise=True, rngs=rngs)
            self.column = Convs(cfg, outputs, outputs, (5, 1), depthwise=True, rngs=rngs)

    def __call__(self, x, train):
        act, found = jax.nn.relu if self.relu else lambda y: y, {}
        a, found["primary"] = self.primary(x, train)
        a = act(a)
        b, found["cheap"] = self.cheap(a, train)
        y = jnp.concatenate([a, act(b)], -1)[..., : self.outputs]
        if not hasattr(self, "gate"):
            return y, found
        z = halve(x)
        for name in ("gate", "row", "column"):
            z, found[name] = getattr(self, name)(z, train)
        return y * enlarge(jax.nn.sigmoid(z), y.shape[1:3]), found


class Bottleneck(nnx.Module):
    """Two ghost modules, what is between them, and a shortcut."""

    def __init__(self, cfg: GhostNetConfig, inputs: int, row: Row, *, attention: bool, rngs: nnx.Rngs):
        size, stride = row[0], row[4]
        inside, outputs = cfg.channels(row[1]), cfg.channels(row[2])
        self.ghost1 = Ghost(cfg, inputs, inside, relu=True, attention=attention, rngs=rngs)
        if stride > 1:
            self.depthwise = Convs(cfg, inside, inside, size, stride, depthwise=True, branched=True, rngs=rngs)
        if row[3]:
            squeezed = divisible(inside / 4)
            self.reduce = weight(rngs, (squeezed, inside), ("squeezed", "channel"), inside)
            self.reduce_bias = constant(0.0, (squeezed,), ("squeezed",))
            self.expand = weight(rngs, (inside, squeezed), ("channel", "squeezed"), squeezed)
            self.expand_bias = constant(0.0, (inside,), ("channel",))
        self.ghost2 = Ghost(cfg, inside, outputs, relu=False, attention=False, rngs=rngs)
        if inputs != outputs or stride > 1:
            self.short1 = Convs(cfg, inputs, inputs, size, stride, depthwise=True, rngs=rngs)
            self.short2 = Convs(cfg, inputs, outputs, rngs=rngs)

    def __call__(self, x, train):
        found: Params = {}
        y, found["ghost1"] = self.ghost1(x, train)
        if hasattr(self, "depthwise"):
            y, found["depthwise"] = self.depthwise(y, train)
        if hasattr(self, "reduce"):
            z = jax.nn.relu(_linear(jnp.mean(y, (1, 2)), self.reduce[...], self.reduce_bias[...]))
            z = jax.nn.relu6(_linear(z, self.expand[...], self.expand_bias[...]) + 3.0) / 6.0
            y = y * z[:, None, None]
        y, found["ghost2"] = self.ghost2(y, train)
        if hasattr(self, "short1"):
            x, found["short1"] = self.short1(x, train)
            x, found["short2"] = self.short2(x, train)
        return x + y, found


class Network(nnx.Module):
    """Everything, bottlenecks under the names `row0`, `row1`, ..."""

    def __init__(self, cfg: GhostNetConfig, *, rngs: nnx.Rngs):
        rows, C = TABLES[cfg.table], cfg.channels(16)
        self.stem = Convs(cfg, 3, C, 3, cfg.stem_stride, rngs=rngs)
        for n, row in enumerate(rows):
            setattr(self, f"row{n}", Bottleneck(cfg, C, row, attention=n > 1, rngs=rngs))
            C = cfg.channels(row[2])
        self.number = len(rows)
        last = cfg.channels(rows[-1][1])
        self.last = Convs(cfg, C, last, rngs=rngs)
        self.hidden = weight(rngs, (cfg.head, last), ("hidden", "channel"), last)
        self.hidden_bias = constant(0.0, (cfg.head,), ("hidden",))
        self.head = weight(rngs, (cfg.classes, cfg.head), ("class", "hidden"), cfg.head)
        self.head_bias = constant(0.0, (cfg.classes,), ("class",))

    def __call__(self, x, train):
        found: Params = {}
        x, found["stem"] = self.stem(x, train)
        x = jax.nn.relu(x)
        for name in (f"row{n}" for n in range(self.number)):
            x, found[name] = getattr(self, name)(x, train)
        x, found["last"] = self.last(x, train)
        x = jnp.mean(jax.nn.relu(x), (1, 2))
        x = jax.nn.relu(_linear(x, self.hidden[...], self.hidden_bias[...]))
        return _linear(x, self.head[...], self.head_bias[...]), found


def halve(x: Float[Array, "B Y X C"]) -> Float[Array, "B Yh Xh C"]:
    """Means of 2 x 2 pixels; a last odd row or column is left out."""
    Y, X = x.shape[1] // 2, x.shape[2] // 2
    if not Y or not X:
        raise ValueError(
            f"ghostnet: an image of {x.shape[1]} x {x.shape[2]} pixels where attention halves it; expected 2 x 2 or "
            "more. Use larger images, a stem_stride of 1, or a table of fewer strides."
        )
    return jnp.mean(x[:, : 2 * Y, : 2 * X].reshape(x.shape[0], Y, 2, X, 2, -1), (2, 4))


def enlarge(x: Float[Array, "B Yh Xh C"], size: tuple[int, ...]) -> Float[Array, "B Y X C"]:
    """Each pixel of the result is that at its place in the smaller image, rounded down."""
    for axis, n in zip((1, 2), size, strict=True):
        x = jnp.take(x, jnp.arange(n) * x.shape[axis] // n, axis)
    return x


# --------------------------------------------------------------------------------------------------------- functions
def init(cfg: GhostNetConfig, key: jax.Array) -> tuple[Params, Params]:
    """Fresh float32 params and stats; the same key gives the same weights."""
    _, params, stats = nnx.split(Network(cfg, rngs=nnx.Rngs(params=key)), nnx.Param, nnx.BatchStat)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def forward(
    cfg: GhostNetConfig, params: Params, stats: Params, images: Float[Array, "B Y X 3"], *, train: bool = False
) -> Output:
    """Run the network, with branches or folded as the config says.

    Args:
      cfg: what to compute.
      params: of `init` or `fold`.
      stats: running statistics; {} if folded.
      images: normalised.
      train: take the batch's statistics, and let the running ones follow.
    """
    if train and cfg.folded:
        raise ValueError("ghostnet.forward: a folded network has no branches to train; expected train=False.")
    return Output(*_whole(nnx.merge(_abstract(cfg)[0], params, stats)(images, train), stats))


def fold(cfg: GhostNetConfig, params: Params, stats: Params) -> tuple[GhostNetConfig, Params]:
    """The same network as one kernel and bias for each sum of branches."""

    def walk(node: Any, running: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if "norm" in node:
            return fold_branches(node, running)
        return {name: walk(part, running.get(name, {})) for name, part in node.items()}

    return dataclasses.replace(cfg, folded=True), walk(params, stats)


def fold_branches(params: Params, stats: Params) -> Params:
    """Kernel and bias of one sum of branches: `{"kernel" [full, O, Y, X, I], "point", "norm", "norm_bias"}`."""
    kernels = list(params["kernel"])
    (O, Y, X, I) = kernels[0].shape  # noqa: E741
    around = ((0, 0), (Y // 2, Y // 2), (X // 2, X // 2), (0, 0))
    if "point" in params:
        kernels.append(jnp.pad(params["point"], around))
    if len(kernels) < len(params["norm"]):  # of a group the i-th output is the i-th input
        one = jnp.arange(O)[:, None] % I == jnp.arange(I)[None]
        kernels.append(jnp.pad(one[:, None, None].astype(jnp.float32), around))
    factor = params["norm"] * jax.lax.rsqrt(stats["var"] + EPS)
    kernel = sum((k * f[:, None, None, None] for k, f in zip(kernels, factor, strict=True)), jnp.zeros((O, Y, X, I)))
    return {"kernel": kernel, "bias": jnp.sum(params["norm_bias"] - stats["mean"] * factor, 0)}


def shapes(cfg: GhostNetConfig) -> Params:
    """The tree that a folder holds, `{"params", "stats"}`; nothing is allocated."""
    _, params, stats = _abstract(cfg)
    tree = {"params": nnx.to_pure_dict(params)}
    return tree if cfg.folded else tree | {"stats": nnx.to_pure_dict(stats)}


def save(folder: Path | str, cfg: GhostNetConfig, params: Params, stats: Params, *, overwrite: bool = False) -> None:
    """Write a folder that `load` reads; it appears whole or not at all."""
    tree = {"params": params} if cfg.folded else {"params": params, "stats": stats}
    save_folder(folder, KIND, cfg, tree, overwrite=overwrite)


def load(folder: Path | str) -> tuple[GhostNetConfig, Params, Params]:
    """Config, params and stats, for `forward`.

    Raises:
      CheckpointError: for a folder that cannot be trusted or understood.
    """
    cfg, tree = load_folder(folder, KIND, GhostNetConfig, shapes)
    return cfg, tree["params"], tree.get("stats", {})


# ----------------------------------------------------------------------------------------------------------- private
@functools.lru_cache(maxsize=64)
def _abstract(cfg: GhostNetConfig) -> Any:
    return nnx.split(nnx.eval_shape(lambda: Network(cfg, rngs=nnx.Rngs(0))), nnx.Param, nnx.BatchStat)


def _whole(found: tuple[Array, Params], stats: Params) -> tuple[Array, Params]:
    """Folded parts have no statistics to give back."""
    return found if stats else (found[0], {})


def _linear(x: Float[Array, "B C"], w: Float[Array, "O C"], bias: Float[Array, " O"]) -> Float[Array, "B O"]:
    return jnp.einsum("bc,oc->bo", x, w, preferred_element_type=jnp.float32) + bias[None]
