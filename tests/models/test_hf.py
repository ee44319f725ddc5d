"""Oracles: the files themselves, numpy's casts, and transformers 5.23's config classes (copied into tables here)."""

import dataclasses
import gc
import json
import re
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding

from jaxaroo.models import hf
from jaxaroo.models.decoder import DecoderConfig, Model, RopeScaling, param_axes, param_shapes, stack_layers
from jaxaroo.models.safetensors import CheckpointError, read_index, read_tensor, write
from jaxaroo.sharding.rules import FSDP_TP

GOLDENS = Path(__file__).parents[1] / "goldens"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
FLOATS = ("float32", "bfloat16", "float16")
SIZES = {"vocab_size": 9, "hidden_size": 128, "intermediate_size": 6, "num_hidden_layers": 3, "num_attention_heads": 32}


def tensors(folder):
    return {name: read_tensor(info) for name, info in read_index(folder).items()}


def bits(arrays):
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()}


def leaves(model, stacked=True):
    params = stack_layers(model.params) if stacked else model.params
    return {jax.tree_util.keystr(path): np.asarray(w) for path, w in jax.tree_util.tree_leaves_with_path(params)}


def put(folder, arrays, **options):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    write(folder, {n: (a.dtype, a.shape) for n, a in arrays.items()}, arrays.__getitem__, **options)


def configure(folder, text=None, **changes):
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config) if text is None else text)


@pytest.fixture
def folder(tmp_path):
    """A tied checkpoint in which every value is random bits: NaNs with payloads, infinities, denormals."""
    return scrambled("llama3_rope", tmp_path / "source")


def scrambled(name, folder, dtype=None):
    shutil.copytree(GOLDENS / name, folder)
    rng, arrays = np.random.default_rng(0), tensors(folder)
    for key, a in arrays.items():
        a = a.astype(dtype or a.dtype)
        arrays[key] = rng.integers(0, 256, a.nbytes, np.uint8).view(a.dtype).reshape(a.shape)
    put(folder, arrays, max_shard_bytes=30_000)
    return folder


# ------------------------------------------------------------------------------------------------- there and back
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_what_passes_through_is_the_same_to_the_bit(name, stacked, tmp_path):
    for source in (GOLDENS / name, scrambled(name, tmp_path / "scrambled")):
        model = hf.load(source, dtype="stored", stacked=stacked)
        assert isinstance(model.params["layers"], dict if stacked else tuple)
        hf.save(tmp_path / "like", model, like=source, overwrite=True)
        hf.save(tmp_path / "alone", model, max_shard_bytes=20_000, overwrite=True)
        assert bits(tensors(source)) == bits(tensors(tmp_path / "like")) == bits(tensors(tmp_path / "alone"))
        assert len([*(tmp_path / "alone").glob("*.safetensors")]) > 2
        like, alone, old = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "like", tmp_path / "alone", source))
        assert like == old
        assert alone["torch_dtype"] == old.get("dtype", old.get("torch_dtype")) == model.config.dtype
        assert hf.load(tmp_path / "alone", dtype="stored").config == model.config


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("wanted", [None, *FLOATS])
def test_a_dtype_is_what_numpy_casts_to(wanted, stored, tmp_path):
    source, to = scrambled("llama_bias", tmp_path / "it", stored), wanted or "float32"
    model, old = hf.load(source, dtype=wanted), tensors(source)
    assert model.config.dtype == to
    hf.save(tmp_path / "out", model)
    hf.save(tmp_path / "cast", hf.load(source, dtype="stored"), dtype=to)
    for written in (tensors(tmp_path / "out"), tensors(tmp_path / "cast")):
        with np.errstate(all="ignore"):
            for name, array in old.items():
                np.testing.assert_array_equal(written[name], array.astype(to), strict=True)
