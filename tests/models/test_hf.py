"""Oracles: the bytes of the files, and numpy's casts; of a master the floats that it stands for."""

import dataclasses
import functools
import json
import math
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
from jaxaroo.models.decoder import (
    DecoderConfig,
    init_params,
    logits,
    param_axes,
    param_shapes,
    unstack_layers,
)
from jaxaroo.models.multi_precision import MATRICES, from_master, init_scales, scale_axes, to_master
from jaxaroo.models.quantise import QuantConfig
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


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # ml_dtypes 0.7 says so, older ones do not
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


@pytest.mark.slow
def test_the_host_never_holds_a_shard(tmp_path):
    sizes = {"vocab_size": 9, "embed_dim": 512, "ffn_dim": 1024, "num_layers": 4}
    cfg = DecoderConfig(**sizes, num_heads=32, num_kv_heads=32, head_dim=16)
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), param_shapes(cfg))
    hf.save(folder := tmp_path / "it", hf.Model(cfg, params), max_shard_bytes=9 * 2**20)
    model = hf.load(folder, mesh=Mesh(jax.devices(), "fsdp"), rules=hf.Rules(embed="fsdp"))
    tensor, shard = 4 * 512 * 1024, max(path.stat().st_size for path in folder.iterdir())
    load = functools.partial(hf.load, folder, dtype="bfloat16")  # as stored, JAX on a CPU lives in what numpy read
    save = functools.partial(hf.save, tmp_path / "out", model, overwrite=True)
    for function, most in ((load, shard), (functools.partial(load, stacked=True), shard), (save, 1.5 * tensor)):
        used = []
        while not used or (len(used) < 3 and used[-1] >= most):  # what threads of other tests allocate only adds
            tracemalloc.start()
            kept = function()
            used.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert tensor < used[-1] < most, (used, kept)


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


# ------------------------------------------------------------------------------------------------------------ masters
MASTER = DecoderConfig(
    vocab_size=24, embed_dim=64, ffn_dim=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, qkv_bias=True,
    o_bias=True,
)  # fmt: skip
QUANT = (
    ("layers/attn/o", QuantConfig(group=32, gain=(4, 2))),
    ("layers/attn/k", None),
    ("layers/mlp/down", QuantConfig(bits=(6, 4), group=32)),
    (MATRICES, QuantConfig()),
)
IDS = np.random.default_rng(0).integers(0, 24, (2, 7))
LAYER = "model.layers.1."
Q, O, DOWN = (LAYER + name for name in ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight"))


@functools.cache
def master():
    """Layers stacked; every leaf has numbers of its own."""
    params = jax.jit(init_params, static_argnums=0)(MASTER, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 50))
    params = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(next(keys), w.shape), params)
    make = jax.jit(lambda p: to_master(p, init_scales(p, QUANT), QUANT))
    return hf.Model(MASTER, make(params))


def written(folder, **options):
    hf.save(folder, master(), quant=QUANT, **options)
    return folder


floats = jax.jit(lambda params, bits: from_master(params, bits, QUANT))


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape, np.asarray(a).tobytes()) == (b.dtype, b.shape, np.asarray(b).tobytes())


@pytest.mark.slow
def test_a_master_comes_back_to_the_bit_whatever_the_form(tmp_path):
    folder = written(tmp_path / "it")
    for stacked in (True, False):
        model, rules = hf.load_master(folder, stacked=stacked)
        assert model.config == MASTER
        same(model.params, master().params if stacked else unstack_layers(master().params))
        for name, more in (("a", {}), ("b", {"like": folder}), ("c", {"dtype": "float32"})):
            hf.save(tmp_path / name, model, quant=rules, overwrite=True, **more)
            assert bits(tmp_path / name) == bits(folder)
            assert config(tmp_path / name) == config(folder)
    hf.save(tmp_path / "parts", model, quant=rules, max_shard_bytes=10_000)
    assert bits(tmp_path / "parts") == bits(folder)
    half, _ = hf.load_master(folder, dtype="bfloat16")
    kinds = {jax.tree_util.keystr(path[-1:]): x.dtype for path, x in jax.tree_util.tree_leaves_with_path(half.params)}
    assert (kinds["['codes']"], kinds["['scale']"], kinds["['gain']"]) == (jnp.int8, jnp.bfloat16, jnp.bfloat16)
    assert (kinds["['embed']"], kinds["['q_bias']"]) == (jnp.bfloat16, jnp.bfloat16)
    hf.save(tmp_path / "half", master(), quant=QUANT, dtype="float16")
    for name, (dtype, _, data) in bits(tmp_path / "half").items():
        if dtype.name in ("int8", "bfloat16"):
            assert data == bits(folder)[name][2]
        else:
            assert dtype.name == "float16"
    assert hf.load_master(GOLDENS / "qwen3")[1] == ()


@pytest.mark.slow
def test_a_master_has_the_bytes_of_the_table(tmp_path):
    """A byte a code, and two a scale or gain: one an output channel or group, and one an output channel and width."""
    arrays, facts = tensors(folder := written(tmp_path / "it")), hf.describe(tmp_path / "it")
    N = {"q_proj": 64, "v_proj": 32, "o_proj": 64, "gate_proj": 96, "up_proj": 96, "down_proj": 64}  # outputs
    K = dict.fromkeys(N, 64) | {"down_proj": 96}
    groups = dict.fromkeys(N, 1) | {"o_proj": 2, "down_proj": 3}
    total = 0
    for name in (f"model.layers.{i}.{p}.{n}.weight" for i in (0, 1) for n in N for p in ("self_attn", "mlp")):
        if name in arrays:
            n = name.split(".")[-2]
            assert (arrays[name].dtype, arrays[name].nbytes) == (np.int8, N[n] * K[n])
            assert arrays[f"{name}_scale"].nbytes == 2 * N[n] * groups[n]
            total += N[n] * K[n] + 2 * N[n] * groups[n]
            assert (f"{name}_gain" in arrays) == (n == "o_proj")
    gains = sum(a.nbytes for name, a in arrays.items() if name.endswith("_gain"))
    assert gains == 2 * 2 * 64 * 2  # layers, bytes, outputs, widths
    rest = sum(a.nbytes for a in arrays.values() if a.dtype == np.float32)
    assert rest == 4 * (2 * 24 * 64 + 64 + 2 * (32 * 64 + 2 * 64 + (64 + 32 + 32) + 64))
    assert facts["bytes"] == sum(a.nbytes for a in arrays.values()) == total + gains + rest
    assert facts["bytes_by_dtype"] == {"int8": 2 * (3 * 64 * 64 - 32 * 64 + 3 * 96 * 64), "bfloat16": total + gains
                                       - 2 * (3 * 64 * 64 - 32 * 64 + 3 * 96 * 64), "float32": rest}  # fmt: skip
    assert facts["parameters"] == sum(math.prod(x.shape) for x in jax.tree.leaves(param_shapes(MASTER)))
    assert facts["bits"] == [8, 6, 4, 2]
    assert facts["fits"][8] == int((8 * 2**30 * 0.9 - facts["bytes"]) // (2 * 2 * 2 * 2 * 16))
    assert hf.describe(GOLDENS / "qwen3")["bits"] == []
    assert config(folder)["quantization_config"]["matrices"].keys() == {
        f"layers/{name}" for name in ("attn/q", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
    }


@pytest.mark.slow
def test_a_master_is_served_at_any_width_and_trained_as_floats(tmp_path):
    folder = written(tmp_path / "it")
    for given, width in ((None, 8), (8, 8), (4, 4), (2, 2), ((8, 2), (8, 2))):
        got = logits(hf.load(folder, bits=given), IDS)
        want = logits(hf.Model(MASTER, floats(master().params, jnp.array(width, jnp.int32))), IDS)
        assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
    off = np.linalg.norm(logits(hf.load(folder, bits=8, act="int8"), IDS) - logits(hf.load(folder), IDS))
    assert 0 < off < 0.05 * np.linalg.norm(want)
    for dtype in ("float32", "bfloat16"):
        got = hf.load(folder, stacked=True, dtype=dtype)
        widest = floats(master().params, jnp.int32(8))
        same(got.params, jax.tree.map(lambda x, d=dtype: x.astype(d), widest))
        assert got.config.dtype == dtype
    hf.save(tmp_path / "plain", got, like=folder)
    assert "quantization_config" not in config(tmp_path / "plain")
    refused("plain weights; expected a master", hf.load, tmp_path / "plain", bits=8, error=ValueError)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.slow
def test_a_master_on_eight_devices_is_the_same_master(stacked, tmp_path):
    folder = written(tmp_path / "it")
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    placed = {"mesh": mesh, "rules": FSDP_TP, "stacked": stacked}
    (_, params), rules = hf.load_master(folder, **placed)
    same(params, master().params if stacked else unstack_layers(master().params))
    axes, scales = param_axes(MASTER)["layers"], scale_axes(param_axes(MASTER), rules)["layers"]
    layer = params["layers"] if stacked else params["layers"][1]
    for group, name in (("attn", "q"), ("attn", "o"), ("mlp", "up"), ("mlp", "down")):
        leaf, spec = layer[group][name], lambda names: FSDP_TP.spec(*names[0 if stacked else 1 :])
        assert leaf["codes"].sharding.spec == spec(axes[group][name])
        assert leaf["scale"].sharding.spec == spec(scales[group][name]["rho"])
        assert not leaf["codes"].sharding.is_fully_replicated
    if stacked:
        got, want = hf.load(folder, **placed), hf.load(folder, stacked=True)
        same(got.params, want.params)
        assert not got.params["layers"]["mlp"]["up"].sharding.is_fully_replicated
    else:
        for width in (8, 4):
            got, want = logits(hf.load(folder, bits=width, **placed), IDS), logits(hf.load(folder, bits=width), IDS)
            assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def test_every_fault_of_a_master_is_named_at_once(tmp_path):
    arrays, folder = tensors(written(tmp_path / "it")), tmp_path / "it"
    gone = [f"{Q}_scale", f"{O}_gain", DOWN]
    faults = {
        O: arrays[O].astype("f4"),
        f"{O}_scale": arrays[f"{O}_scale"].astype("f4"),
        f"{DOWN}_scale": arrays[f"{DOWN}_scale"][:, :1],
        f"{Q}_gain": arrays[f"{O}_gain"],
        "model.norm.weight": arrays[Q][0],
        HEAD: arrays[HEAD].astype("f8"),
    }
    put(folder, {name: a for name, a in (arrays | faults).items() if name not in gone})
    said = [f"missing {name};" for name in gone]
    said += [f"{O} of dtype float32; expected one of int8;", f"{O}_scale of dtype float32; expected one of bfloat16;"]
    said += [f"{DOWN}_scale of shape [64, 1]; expected [64, 3];", f"unexpected {Q}_gain.", "norm.weight of dtype int8;"]
    said += [f"{HEAD} of dtype float64;"]
    for load in (hf.load, hf.load_master, hf.describe):
        refused("".join(f"(?=.*{re.escape(text)})" for text in said), load, folder)
    put(folder, arrays)
    hf.load_master(folder)
    config(folder, quantization_config=None)  # codes alone are no weights
    refused(f"{re.escape(Q)} of dtype int8; expected one of float32.*unexpected .*_scale; and", hf.load, folder)


def test_a_master_whose_config_lies_is_refused(tmp_path):
    folder = written(tmp_path / "it")
    told = config(folder)["quantization_config"]
    matrix = told["matrices"]["layers/attn/q"]
    for matrices, message in (
        ({"layers/attn/q": matrix | {"group": 128}}, "q_proj.weight: groups of 128 for 64 inputs; expected a divisor"),
        ({"layers/attn/q": matrix | {"group": 32}}, r"q_proj.weight_scale of shape \[64, 1\]; expected \[64, 2\]"),
        ({"layers/attn/q": matrix | {"gain": [2]}}, "missing model.layers.0.self_attn.q_proj.weight_gain"),
        ({"layers/attn/k": matrix}, "k_proj.weight of dtype float32; expected one of int8"),
        ({"layers/mlp/q": matrix}, "rules: 'layers/mlp/q' matches no matrix"),
        ({"attn/q": matrix}, "rules: 'attn/q' matches no matrix"),
        ({"layers/attn/.": matrix}, "quantisation: found 'layers/attn/.'"),
        ({"layers/attn/q": matrix | {"width": 1}}, "quantisation: found 'layers/attn/q'"),
        ({"layers/attn/q": matrix | {"bits": [4, 8]}}, "quantisation: found .*QuantConfig.bits"),
    ):
        config(folder, quantization_config=told | {"matrices": told["matrices"] | matrices})
        for load in (hf.load, hf.describe):
            refused(f"(?s)it.*{message}", load, folder)
    config(folder, quantization_config=told | {"quant_method": "gptq"})
    refused("config.json: quantization_config .*'gptq'.*expected plain weights, or 'jaxaroo'", hf.load, folder)


def test_only_a_master_is_saved_as_one(tmp_path):
    params, rules = master().params, QUANT
    q = params["layers"]["attn"]["q"]
    with_q = lambda **parts: {"layers": params["layers"] | {"attn": params["layers"]["attn"] | {"q": q | parts}}}
    view = hf.load(written(tmp_path / "it")).params
    for wrong, quant, message in (
        (with_q(codes=q["codes"].astype(jnp.int32)), rules, f"{Q} of dtype int32; expected int8"),
        (with_q(scale=q["scale"].astype(jnp.float32)), rules, f"{Q}_scale of dtype float32; expected bfloat16"),
        (with_q(scale=q["scale"][..., 0]), rules, f"{Q}_scale of shape .*; expected"),
        (with_q(gain=q["scale"]), rules, "parameters; expected"),
        ({}, (), f"{Q} of shape None"),
        (floats(params, jnp.int32(8)), rules, f"{Q} of shape None"),
        (view, (), "parameters; expected"),
        (view, rules, f"{Q} of shape None"),
    ):
        refused(message, hf.save, tmp_path / "no", hf.Model(MASTER, params | wrong), quant=quant, error=ValueError)
    assert not (tmp_path / "no").exists()
