"""What the two vision networks share: convolution, batch norm, and the folders that hold them.

    batch norm    y = gain (x - m) / sqrt(v + eps) + bias          (Ioffe & Szegedy, 1502.03167)

In training m and v are mean and variance of the batch, and the running statistics r move towards them, r <- r +
(1 - momentum) (batch's - r), the variance unbiased there; else m and v are the running ones. They go in and come out:
no module holds what changes.

Images are `[B, Y, X, C]`, kernels `[O, Y, X, I]`, outputs first as `quantise.py` wants them, with I inputs of a group.

A folder holds `model.safetensors`, whose tensors are named by their paths, and `config.json`, the fields of the config
dataclass under `{"model_type": "jaxaroo-..."}`. It appears whole or not at all.
"""

import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from .checkpoint import PREFIX, check_params
from .decoder import Params
from .hf_config import inside
from .safetensors import CheckpointError, read_index, read_json, read_tensor, swap_in, write

Config = TypeVar("Config")
MOMENTUM, EPS = 0.9, 1e-5


# ------------------------------------------------------------------------------------------------------------ layers
def conv(
    x: Float[Array, "B Y X C"], kernel: Float[Array, "O Ky Kx I"], stride: int = 1, groups: int = 1
) -> Float[Array, "B Yo Xo O"]:
    """Convolve, with zeros around the image: half a kernel on each side, whatever the stride."""
    sides = [(n // 2, n // 2) for n in kernel.shape[1:3]]
    names = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "OHWI", "NHWC"))
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        sides,
        dimension_numbers=names,
        feature_group_count=groups,
        preferred_element_type=jnp.float32,
    )


def batch_norm(
    x: Float[Array, "B Y X C"],
    gain: Float[Array, " C"],
    bias: Float[Array, " C"],
    mean: Float[Array, " C"],
    var: Float[Array, " C"],
    *,
    train: bool,
) -> tuple[Float[Array, "B Y X C"], Params]:
    """y, and the running statistics `{"mean", "var"}` behind it; no gradient passes through these."""
    new = {"mean": mean, "var": var}
    if train:
        number = x.size // x.shape[-1]
        mean, var = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
        batch = jax.lax.stop_gradient({"mean": mean, "var": var * (number / max(number - 1, 1))})
        new = jax.tree.map(lambda old, b: old + (1 - MOMENTUM) * (b - old), new, batch)
    over = lambda p: p[None, None, None]
    return (x - over(mean)) * over(gain * jax.lax.rsqrt(var + EPS)) + over(bias), new


def he_normal(rngs: nnx.Rngs, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Kernels of variance 2 / inputs, for what a ReLU follows (He et al., 1502.01852)."""
    return jax.random.normal(rngs.params(), shape, jnp.float32) * (2.0 / int(np.prod(shape[1:]))) ** 0.5


# ----------------------------------------------------------------------------------------------------------- folders
def save_folder(folder: Path | str, kind: str, cfg: Any, tree: Params, *, overwrite: bool = False) -> None:
    """Write a folder that `load_folder` reads; each array in the dtype it has.

    Raises:
      FileExistsError: if the folder holds anything, unless `overwrite`.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"save: {folder} exists; expected a new or empty folder. Pass overwrite to replace it.")
    flat = _flatten(tree)
    text = json.dumps({"model_type": PREFIX + kind, **dataclasses.asdict(cfg)}, indent=2, allow_nan=False) + "\n"
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        partial.mkdir()
        (partial / "config.json").write_text(text, encoding="utf-8")
        specs = {name: (np.dtype(leaf.dtype), leaf.shape) for name, leaf in flat.items()}
        write(partial, specs, lambda name: np.asarray(flat[name]))
        swap_in(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_folder(
    folder: Path | str, kind: str, cls: type[Config], shapes_of: Callable[[Config], Params]
) -> tuple[Config, Params]:
    """Config and arrays of a folder of one kind.

    Args:
      folder: that `save_folder` wrote.
      kind: what it has to be.
      cls: of the config, whose own checks a file has to pass.
      shapes_of: the tree of arrays that a config asks for.

    Raises:
      CheckpointError: for another kind, for missing, unknown or impossible settings, and for arrays that are not those
        of the settings; these are named together, before any is read.
    """
    folder = Path(folder)
    path = inside(folder, "config.json")
    found = read_json(path)
    if (name := found.pop("model_type", None)) != PREFIX + kind:
        raise CheckpointError(f"{path}: model_type {str(name)[:80]!r}; expected {PREFIX + kind!r}. Load it as such.")
    wanted = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if wrong := sorted(found.keys() ^ wanted):
        raise CheckpointError(f"{path}: missing or unknown {str(wrong)[:200]}; expected {sorted(wanted)}.")
    try:
        cfg = cls(**{name: _thaw(value) for name, value in found.items()})
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: {str(e)[:300]}") from e
    shapes, index = shapes_of(cfg), read_index(folder)
    check_params(folder, index, shapes)
    read = lambda path, s: jnp.asarray(read_tensor(index[_name(path)])).astype(s.dtype)
    return cfg, jax.tree_util.tree_map_with_path(read, shapes)


# ----------------------------------------------------------------------------------------------------------- private
def _flatten(tree: Params) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(key.key) for key in path)


def _thaw(value: Any) -> Any:
    """JSON knows lists only; a frozen config holds tuples."""
    return tuple(map(_thaw, value)) if isinstance(value, list) else value
