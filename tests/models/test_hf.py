"""Oracles: the bytes of the files, and numpy's casts."""

import dataclasses
import functools
import json
import os
import re
import shutil
import tracemalloc
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from safetensors.numpy import save_file

from jaxaroo.models import hf
from jaxaroo.models.decoder import DecoderConfig, param_axes, param_shapes
from jaxaroo.models.safetensors import CheckpointError, read_index, read_tensor
from jaxaroo.sharding.rules import FSDP_TP

GOLDENS = Path(__file__).parents[1] / "goldens"
HEAD, EMBED, UP = "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
FLOATS = ("float32", "bfloat16", "float16")
tensors = lambda folder: {name: read_tensor(info) for name, info in read_index(folder).items()}
bits = lambda folder: {name: (a.dtype, a.shape, a.tobytes()) for name, a in tensors(folder).items()}
content = lambda folder: {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}
put = lambda folder, arrays: save_file(arrays, folder / "model.safetensors")


def scrambled(name, folder, dtype=None):  # random bits: NaNs with payloads, infinities, denormals
    shutil.copytree(GOLDENS / name, folder, ignore=shutil.ignore_patterns("model*", "io.npz"))
    rng, arrays = np.random.default_rng(0), {n: a.astype(dtype or a.dtype) for n, a in tensors(GOLDENS / name).items()}
    put(folder, {n: np.frombuffer(rng.bytes(a.nbytes), a.dtype).reshape(a.shape) for n, a in arrays.items()})
    return folder


def config(folder, name="config.json", **changes):
    found = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))
    return found


def refused(message, function, *args, error=CheckpointError, **options):
    with pytest.raises(error, match=message):
        function(*args, **options)


NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))
CASES = [(name, None, "stored", stacked, 0) for name in NAMES for stacked in (0, 1)]
CASES += [("qwen3", a, b, 0, 0) for a in FLOATS for b in FLOATS] + [("llama_f16", None, None, 0, 0)]
CASES += [("qwen3", "bfloat16", b, stacked, 1) for b in ("stored", "float16") for stacked in (0, 1)]


@pytest.mark.parametrize(("golden", "stored", "wanted", "stacked", "sharded"), CASES)
@pytest.mark.filterwarnings("ignore:.*encountered in cast")
def test_what_is_kept_is_kept_to_the_bit_and_casts_are_numpys(golden, stored, wanted, stacked, sharded, tmp_path):
    source, (like, parts, cast) = scrambled(golden, tmp_path / "it", stored), (tmp_path / name for name in "abc")
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor")) if sharded else None
    cfg, params = model = hf.load(source, dtype=wanted, stacked=bool(stacked), mesh=mesh, rules=FSDP_TP)
    hf.save(like, model, like=source)
    hf.save(parts, model, max_shard_bytes=20_000)
    hf.save(cast, hf.load(source, dtype="stored"), dtype=cfg.dtype)
    assert wanted != "stored" or bits(source) == bits(like) == bits(parts)
    cast_to = {None: "float32", "stored": stored or cfg.dtype}.get(wanted, wanted)
    old = {name: a.astype(cast_to) for name, a in tensors(source).items()}
    for name, a in [item for folder in (like, parts, cast) for item in tensors(folder).items()]:
        assert a.dtype == old[name].dtype == cfg.dtype
        np.testing.assert_array_equal(a.astype("f4"), old[name].astype("f4"))
    assert len({info.file for info in read_index(parts).values()}) > 2
    assert hf.read_config(parts) == hf.read_config(source)
    key = "dtype" if "dtype" in config(source) else "torch_dtype"
    assert config(like) == config(source) | {key: cfg.dtype}
    if sharded:
        layers = params["layers"] if stacked else params["layers"][1]
        spec = lambda axes: FSDP_TP.spec(*axes[1 if axes[0] == "layers" and not stacked else 0 :])
        wanted = jax.tree.map(spec, param_axes(cfg), is_leaf=lambda axes: isinstance(axes, tuple))
        assert jax.tree.map(lambda w: w.sharding.spec, params | {"layers": layers}) == wanted


def test_each_tensor_keeps_its_own_dtype_unless_they_cannot_be_stacked(tmp_path):
    arrays, out = tensors(folder := scrambled("llama_bf16", tmp_path / "it")), tmp_path / "out"
    put(folder, arrays := {name: a.astype("f4") if "norm" in name else a for name, a in arrays.items()})
    for stacked in (False, True):
        hf.save(out, hf.load(folder, dtype="stored", stacked=stacked), overwrite=True)
        assert bits(out) == bits(folder)
    put(folder, arrays | {UP: arrays[UP].astype("f2")})
    hf.save(out, hf.load(folder, dtype="stored"), overwrite=True)
    assert bits(out) == bits(folder)
    refused("mlp.up is float16 in layer 1, bfloat16 in another", hf.load, folder, dtype="stored", stacked=True)
    hf.load(folder, dtype="float32", stacked=True)


def test_every_fault_of_the_tensors_is_named_at_once(tmp_path):
    arrays = tensors(folder := scrambled("llama_f16", tmp_path / "it"))
    gone = [name for name in arrays if "layers.1.mlp" in name]
    faults = {"a.b": arrays[HEAD], HEAD: arrays[HEAD].T, "model.norm.weight": np.arange(32)}
    put(folder, {name: array for name, array in (arrays | faults).items() if name not in gone})
    named = [*(f"missing {name};" for name in gone), f"{HEAD} of shape [32, 96]; expected [96, 32];", "unexpected a.b."]
    refused("".join(f"(?=.*{re.escape(text)})" for text in [*named, "norm.weight of dtype int64;"]), hf.load, folder)
    config(folder, num_hidden_layers=9)
    refused(r"missing model\.layers.* and \d+ more\.", hf.load, folder)
    config(folder, num_hidden_layers=10_001)
    refused("num_hidden_layers is 10001; .*at most 10000", hf.load, folder)


def test_a_tied_head_may_be_there_too_if_it_is_the_same_to_the_bit(tmp_path, monkeypatch):
    arrays = tensors(folder := scrambled("llama3_rope", tmp_path / "it"))
    arrays |= {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8), EMBED: np.zeros((2**18, 32), "f4")}
    config(folder, vocab_size=2**18)
    (other := arrays[EMBED].copy())[-1, -1] = -0.0  # equal, but other bits
    for head in (other, arrays[EMBED].astype("f2"), arrays[EMBED][1:], np.zeros((), "f4")):
        put(folder, arrays | {HEAD: head})
        refused("it: unexpected lm_head.weight. The", hf.load, folder)
    put(folder, arrays | {HEAD: arrays[EMBED]})
    assert hf.load(folder).params.keys() == {"embed", "norm", "layers"}
    monkeypatch.delattr(hf, "read_tensor")
    monkeypatch.delattr(hf, "read_rows")
    facts, size = hf.describe(folder), sum(a.size for name, a in arrays.items() if "inv_freq" not in name)
    assert (facts["parameters"], facts["bytes"], facts["bytes_by_dtype"]) == (size, 4 * size, {"float32": 4 * size})
    assert hf.describe(GOLDENS / "qwen3")["kv_bytes_per_token"] == {"float32": 2 * 2 * 2 * 16 * 4, "bfloat16": 256}


def test_the_host_never_holds_a_shard(tmp_path):
    sizes = {"vocab_size": 9, "embed_dim": 512, "ffn_dim": 1024, "num_layers": 4}
    cfg = DecoderConfig(**sizes, num_heads=32, num_kv_heads=32, head_dim=16)
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), param_shapes(cfg))
    hf.save(folder := tmp_path / "it", hf.Model(cfg, params), max_shard_bytes=9 * 2**20)
    model = hf.load(folder, mesh=Mesh(jax.devices(), "fsdp"), rules=hf.Rules(embed="fsdp"))
    tensor, shard = 4 * 512 * 1024, max(path.stat().st_size for path in folder.iterdir())
    load = functools.partial(hf.load, folder, dtype="bfloat16")  # as stored, JAX on a CPU lives in what numpy read
    save = functools.partial(hf.save, tmp_path / "out", model)
    for function, most in ((load, shard), (functools.partial(load, stacked=True), shard), (save, 1.5 * tensor)):
        tracemalloc.start()
        kept = function()
        used, _ = tracemalloc.get_traced_memory()[1], tracemalloc.stop()
        assert tensor < used < most, kept


@pytest.mark.parametrize("where", ["new fsync 1", "new replace 2", "old fsync 2", "old replace 5", "old replace 6"])
def test_a_failed_save_changes_nothing(where, tmp_path, monkeypatch):
    target, name, nth = where.split()
    shutil.copytree(GOLDENS / "llama_f16", tmp_path / "old")
    model, before = hf.load(GOLDENS / "llama_f16"), content(tmp_path)
    results = [*[DEFAULT] * (int(nth) - 1), OSError(28, "No space left on device"), *[DEFAULT] * 9]
    monkeypatch.setattr(os, name, Mock(wraps=getattr(os, name), side_effect=results))
    refused("No space", hf.save, tmp_path / target, model, max_shard_bytes=50_000, overwrite=True, error=OSError)
    assert content(tmp_path) == before


def test_a_save_replaces_only_when_told_and_leaves_nothing_beside(tmp_path, monkeypatch):
    (cfg, params), here = hf.load(GOLDENS / "llama_f16"), tmp_path / "here"
    shutil.copytree(GOLDENS / "llama_f16", here / "old")
    monkeypatch.chdir(here)
    Path("file").write_text("precious")
    Path("to").mkdir()
    Path("link").symlink_to("to")
    for name in ("old", "file"):
        refused("Pass overwrite to replace it", hf.save, name, (cfg, params), error=FileExistsError)
    for part in ({"norm": params["embed"]}, {"norm": None}, {"more": params["norm"]}, {"layers": params["layers"][:1]}):
        refused("do not belong to model.config", hf.save, "new", (cfg, params | part), error=ValueError)
    names = ["old", "file", "to", "link", "empty/", "a b%s{}\n'\"\\☃", "x" * 255, "./deep/er", str(here / "absolute")]
    for name in names:
        hf.save(name, (cfg, params), overwrite=name in ("old", "file", "link"))
        assert {path.name for path in Path(name).iterdir()} == {"config.json", "model.safetensors"}
        assert hf.load(name).config == cfg
    assert {path.name for path in here.iterdir()} == {*names[:4], "empty", *names[5:7], "deep", "absolute"}


def test_like_brings_the_tokenizer_and_the_end_tokens_unless_they_changed(tmp_path):
    source, out = scrambled("qwen3", tmp_path / "it"), tmp_path / "out"
    for name in hf.TOKENIZER_FILES:
        (source / name).write_text(f'{{"it": "{name}"}}')
    brought = lambda folder: [(folder / name).read_text() for name in hf.TOKENIZER_FILES]
    for one, other, found in ((None, 5, (5,)), (7, [5, 3], (3, 5, 7)), ([9, 7], None, (7, 9)), (2, ..., (2,))):
        config(source, "generation_config.json", eos_token_id=other)
        before, _ = brought(source), config(source, eos_token_id=one)
        cfg, params = hf.load(source, dtype="stored")
        for eos in ((), (1,), found):
            hf.save(out, (dataclasses.replace(cfg, eos_ids=eos), params), like=source, overwrite=True)
            assert hf.read_config(out).eos_ids == eos
            assert config(out) | {"eos_token_id": 0} == config(source) | {"eos_token_id": 0}
        hf.save(source, (cfg, params), like=source, overwrite=True)
        assert brought(source) == brought(out) == before
    for name in ("tokenizer.json", "generation_config.json", "config.json"):
        (source / name).symlink_to((source / name).rename(tmp_path / name))
        refused(f"{name}: a link to .*cp -rL", hf.save, out, (cfg, params), like=source, overwrite=True)
        shutil.copyfile(tmp_path / name, (source / name).unlink() or source / name)
    assert brought(source) == brought(out)
    (source / "generation_config.json").write_text("{")
    refused("generation_config.json: .*plain JSON", hf.load, source)


@pytest.mark.parametrize("stacked", [True, False])
def test_what_a_mesh_does_not_divide_is_whole_on_every_device(stacked):
    """The golden's sizes are no multiples of 8; loading onto such a mesh reads the same bits."""
    mesh = Mesh(np.array(jax.devices()).reshape(1, 1, 8), ("data", "fsdp", "tensor"))
    model = hf.load(GOLDENS / "llama_bias", dtype="stored", stacked=stacked, mesh=mesh, rules=FSDP_TP)
    want = hf.load(GOLDENS / "llama_bias", dtype="stored", stacked=stacked)
    whole = [leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(model.params)]
    assert any(whole)
    assert not all(whole)
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(want.params), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
