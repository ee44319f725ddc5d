"""LoRA: low-rank adapters as a transform of the parameter tree (Hu et al., 2106.09685, section 4.1).

A targeted weight W, as a matrix [out, in], is used as

    W + s B A        B [out, r], A [r, in], s = alpha / r, or alpha / sqrt(r) with `rslora` (Kalajdzievski, 2312.03732)

with r the rank; the product's axes out and in are split as W's are. Adapters are a tree of their own that mirrors the
targeted paths with leaves `{"a", "b"}`, stacked or as a tuple of layers like the parameters they belong to.
`apply_lora` makes the weights that the forward pass sees and the ones that are exported: one function, so what was
trained is what is saved. It costs r multiplications a weight, once a forward pass however many tokens that has. There
is no dropout on the way into A: what is merged has nowhere to put it. The model without its adapters, the reference of
preference training, is `params`.

Only what is differentiated learns. `jax.grad` in the adapters alone, as the training step takes it with the model under
`frozen`, leaves W fixed; a loss that is differentiated in `params` too has to wrap them in `jax.lax.stop_gradient`.
"""

import dataclasses
import difflib
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .decoder import Params, stack_layers, unstack_layers

Path = tuple[str, ...]
Names = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which weights are adapted, and how strongly.

    `targets` are regular expressions, each for whole paths as in `layers/attn/q`, which name a weight in every layer.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = (r"layers/attn/[qkvo]", r"layers/mlp/(gate|up|down)")
    rslora: bool = False  # divide alpha by sqrt(rank), not by rank: updates keep their size as the rank grows

    def __post_init__(self):
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"LoraConfig.rank: found {self.rank!r}; expected a positive integer.")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"LoraConfig.alpha: found {self.alpha!r}; expected a positive number.")
        if not isinstance(self.targets, tuple) or not self.targets:
            raise ValueError(f"LoraConfig.targets: found {self.targets!r}; expected a tuple of regular expressions.")
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as e:
                raise ValueError(f"LoraConfig.targets: found {pattern!r} ({e}); expected a regular expression.") from e

    @property
    def scale(self) -> float:
        """The factor s of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def init_lora(cfg: LoraConfig, params: Params, axes: Params, key: jax.Array) -> Params:
    """Fresh float32 adapters: B is zero, so the adapted model is at first the model itself, to the bit.

    A is uniform within 1 / sqrt(in), variance 1 / (3 in), as in the paper's code (`kaiming_uniform_` with a = sqrt(5));
    the paper's text says Gaussian. The same key gives both forms of layers the same adapters.

    Args:
      cfg: rank and targets.
      params: the model, or its shapes; layers stacked or as a tuple.
      axes: `decoder.param_axes` of the model.
      key: of the randomness in A.

    Raises:
      ValueError: if a target matches no matrix, or `axes` are not those of `params`.
    """
    if isinstance(params.get("layers"), tuple):
        adapters = init_lora(cfg, jax.eval_shape(stack_layers, params), axes, key)
        return unstack_layers(adapters) if "layers" in adapters else adapters
    shapes = nnx.traversals.flatten_mapping(params)
    targets = _targets(cfg, axes)
    adapters = {}
    for (path, names), k in zip(targets.items(), jax.random.split(key, len(targets)), strict=True):
        shape = getattr(shapes.get(path), "shape", None)
        if shape is None or len(shape) != len(names):
            raise ValueError(
                f"init_lora: {'/'.join(path)} of shape {shape}, axes {names}; expected one axis a dimension. "
                "Pass the param_axes of this model."
            )
        lead, last = _split(names)
        bound = math.prod(shape[last:]) ** -0.5
        a_shape = (*shape[:lead], cfg.rank, *shape[last:])
        adapters[*path, "a"] = jax.random.uniform(k, a_shape, jnp.float32, -bound, bound)
        adapters[*path, "b"] = jnp.zeros((*shape[:last], cfg.rank), jnp.float32)
    return nnx.traversals.unflatten_mapping(adapters)


def lora_axes(cfg: LoraConfig, axes: Params) -> Params:
    """Logical axis names of adapters to stacked layers, for sharding; the rank is None, on every device whole."""
    names = {}
    for path, weight in _targets(cfg, axes).items():
        lead, last = _split(weight)
        names[*path, "a"] = (*weight[:lead], None, *weight[last:])
        names[*path, "b"] = (*weight[:last], None)
    return nnx.traversals.unflatten_mapping(names)


def apply_lora(cfg: LoraConfig, params: Params, adapters: Params) -> Params:
    """The adapted model: W + s B A for every target, every other leaf the very same array.

    Computed in float32 and rounded once, to W's dtype: bfloat16 loses an update below half a unit in W's last place.

    Raises:
      ValueError: if the adapters are not for these parameters or not of this rank.
    """
    return _merge(cfg, params, adapters, ())


# ----------------------------------------------------------------------------------------------------------- private
def _targets(cfg: LoraConfig, axes: Params) -> dict[Path, Names]:
    """Path -> axis names of the matrices that match, in the order of their paths."""
    flat = nnx.traversals.flatten_mapping(axes)
    matrices = {"/".join(path): path for path in sorted(flat) if not path[-1].endswith(("norm", "bias"))}
    wanted = set()
    for pattern in cfg.targets:
        if not (found := {name for name in matrices if re.fullmatch(pattern, name)}):
            near = ", ".join(difflib.get_close_matches(pattern, matrices, n=3, cutoff=0.0))
            raise ValueError(
                f"LoraConfig.targets: {pattern!r} matches no matrix; expected a regular expression for whole paths, "
                f"the nearest of which are {near}."
            )
        wanted |= found
    return {path: flat[path] for name, path in matrices.items() if name in wanted}


def _split(names: Names) -> tuple[int, int]:
    """How many axes lead, and where those begin that `decoder.project` contracts: two of o, heads and their size."""
    return int(names[0] == "layers"), len(names) - (2 if names[-1] == "head_dim" else 1)


def _merge(cfg: LoraConfig, params: Any, adapters: Any, path: Path) -> Any:
    if not isinstance(params, dict | tuple) and isinstance(adapters, dict) and adapters.keys() == {"a", "b"}:
        return _add(cfg, params, adapters["a"], adapters["b"], "/".join(path))
    if isinstance(params, tuple) and isinstance(adapters, tuple) and len(params) == len(adapters):
        return tuple(_merge(cfg, p, part, path) for p, part in zip(params, adapters, strict=True))
    if isinstance(params, dict) and isinstance(adapters, dict) and adapters.keys() <= params.keys():
        return params | {name: _merge(cfg, params[name], part, (*path, name)) for name, part in adapters.items()}
    show = lambda tree: ", ".join(map(str, tree)) if isinstance(tree, dict) else type(tree).__name__
    raise ValueError(
        f"apply_lora: {'/'.join(path) or 'params'} is {show(params)}, its adapter {show(adapters)}; expected adapters "
        "of these parameters, in the same form. Use stack_layers or unstack_layers if one has layers as a tuple."
    )


def _add(
    cfg: LoraConfig, w: Float[Array, "..."], a: Float[Array, "..."], b: Float[Array, "..."], where: str
) -> Float[Array, "..."]:
    lead, last, r = a.ndim + b.ndim - w.ndim - 2, b.ndim - 1, cfg.rank
    if a.shape != (*w.shape[: max(lead, 0)], r, *w.shape[last:]) or b.shape != (*w.shape[:last], r):
        raise ValueError(
            f"apply_lora: {where} of shape {w.shape}, a {a.shape}, b {b.shape}; expected [out..., in...], "
            f"[{r}, in...] and [out..., {r}] for rank {r}, all behind the same layers axis if there is one."
        )
    rows = cfg.scale * b.astype(jnp.float32).reshape(*w.shape[:lead], -1, r)
    delta = jnp.matmul(rows, a.astype(jnp.float32).reshape(*w.shape[:lead], r, -1), precision=jax.lax.Precision.HIGHEST)
    return (w.astype(jnp.float32) + delta.reshape(w.shape)).astype(w.dtype)
