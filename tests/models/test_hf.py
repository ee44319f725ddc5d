"""Oracles: the bytes of the files, numpy's casts, and what transformers 5.23's config classes make of the same keys."""

import contextlib
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
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from safetensors.numpy import save_file

from jaxaroo.models import hf
from jaxaroo.models.decoder import DecoderConfig, RopeScaling, param_axes, param_shapes
from jaxaroo.models.safetensors import CheckpointError, read_index, read_tensor
from jaxaroo.sharding.rules import FSDP_TP

GOLDENS = Path(__file__).parents[1] / "goldens"
HEAD, EMBED, FLOATS = "lm_head.weight", "model.embed_tokens.weight", ("float32", "bfloat16", "float16")
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


FIELDS = {"vocab_size": 9, "embed_dim": 128, "ffn_dim": 6, "num_layers": 3, "num_heads": 32}
SIZES = {"vocab_size": 9, "hidden_size": 128, "intermediate_size": 6, "num_hidden_layers": 3, "num_attention_heads": 32}
DEFAULTS = {  # what transformers has where config.json says no more than SIZES
    "llama": {"num_kv_heads": 32, "head_dim": 4, "max_positions": 2048},
    "mistral": {"num_kv_heads": 8, "head_dim": 4, "max_positions": 131072, "window": 4096},
    "qwen2": {"num_kv_heads": 32, "head_dim": 4, "max_positions": 32768, "qkv_bias": True},
    "qwen3": {"num_kv_heads": 32, "head_dim": 128, "max_positions": 32768, "qk_norm": True},
}
decoder = lambda kind, **change: DecoderConfig(**(FIELDS | DEFAULTS[kind] | {"model_type": kind} | change))
LINEAR, TWO = {"type": "linear", "factor": 2}, RopeScaling(kind="linear", factor=2.0)
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4.0}
LONG, TRAINED = RopeScaling(kind="llama3", factor=8.0, original_positions=2048), "original_max_position_embeddings"
USED, FULL, SLIDING = {"use_sliding_window": True}, "full_attention", "sliding_attention"
MIXED, BIASED = {"window": 4096, "window_layers": (False, True, True)}, {"attention_bias": True, "mlp_bias": True}
NULLS = dict.fromkeys(["num_key_value_heads", "head_dim", "rope_scaling", "rope_parameters", "eos_token_id"])
PART, IGNORED = "partial_rotary_factor", {"hidden_act": "swish", "sliding_window": 5, "layer_types": [7]}
READ = [  # families, keys of config.json, and what they change of DEFAULTS; Llama-3-8B-Gradient-1048k has that theta
    ("llama mistral qwen2 qwen3", {}, {}),
    ("llama mistral qwen2 qwen3", NULLS, {"num_kv_heads": 32, "head_dim": 4}),
    ("llama", BIASED, {"qkv_bias": True, "o_bias": True, "mlp_bias": True}),
    ("qwen3", BIASED, {"qkv_bias": True, "o_bias": True}),
    ("llama", IGNORED | {"rope_theta": 3580165449, PART: 1.0}, {"rope_theta": 3580165449.0}),
    ("qwen3", {"rope_parameters": {"rope_theta": 5, "rope_type": "default"}, "rope_theta": 7}, {"rope_theta": 5.0}),
    ("mistral", {"rope_parameters": LINEAR, "rope_theta": 7}, {"rope_theta": 7.0, "rope_scaling": TWO}),
    ("llama", {"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 5}}, {"rope_scaling": TWO}),
    ("llama", {"rope_scaling": LLAMA3}, {"rope_scaling": LONG}),
    ("qwen2", BIASED | {"rope_scaling": LLAMA3 | {TRAINED: 9}, TRAINED: 2048}, {"rope_scaling": LONG}),
    ("mistral", USED | BIASED | {"sliding_window": None, "layer_types": [SLIDING]}, {"window": None}),
    ("qwen2 qwen3", {"sliding_window": 7, "max_window_layers": 0}, {}),
    ("qwen2 qwen3", USED | {"sliding_window": None, "max_window_layers": 0}, {}),
    ("qwen2", USED | {"num_hidden_layers": 29}, MIXED | {"num_layers": 29, "window_layers": (False,) * 28 + (True,)}),
    ("qwen2 qwen3", USED | {"max_window_layers": 1, "layer_types": None}, MIXED),
    ("qwen2 qwen3", USED | {"max_window_layers": 2, "layer_types": [FULL, SLIDING, SLIDING]}, MIXED),
    ("qwen2 qwen3", USED | {"sliding_window": 7, "layer_types": [SLIDING] * 3}, {"window": 7}),
]
NOT_SAID = """llama window, llama qk_norm, llama qkv_bias, llama o_bias, mistral qkv_bias, mistral mlp_bias,
    qwen2 qkv_bias, qwen2 o_bias, qwen2 mlp_bias, qwen2 qk_norm, qwen3 qkv_bias, qwen3 mlp_bias, qwen3 qk_norm"""


def test_a_config_means_what_it_means_to_transformers():
    for kinds, keys, change in READ:
        for kind in kinds.split():
            assert hf.config_from_hf(SIZES | {"model_type": kind} | keys) == decoder(kind, **change)
    for kind, part in re.findall(r"(\w+) (\w+)", NOT_SAID):
        other = decoder(kind, **{part: 5 if part == "window" else not DEFAULTS[kind].get(part, False)})
        refused(f"'{kind}' cannot express", hf.config_to_hf, other, error=ValueError)
    loose = decoder("qwen2", window=5, window_layers=(True,) * 3, eos_ids=(7, 2, 7))
    assert hf.config_from_hf(hf.config_to_hf(loose)) == decoder("qwen2", window=5, eos_ids=(2, 7))


each = lambda name, *values: [{name: value} for value in values]
BASE = SIZES | USED | {"model_type": "qwen2", "max_window_layers": 1, "num_key_value_heads": 32}
COUNTS = [*SIZES, "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"]
BAD = {  # what the message says, and the keys, or what is done to the file, that must bring it
    "model_type .*expected one of llama, mistral, qwen2, qwen3": each("model_type", "gpt2", None, 7, ["llama"], ...),
    "quantization_config": each("quantization_config", {"bits": 4}, {}),
    "hidden_act .*expected 'silu'": each("hidden_act", "gelu", None, [], 1),
    "rope scaling .*linear, llama3": each("rope_scaling", *({"type": t} for t in ("yarn", "dynamic", [], None))),
    "longrope": each("rope_parameters", {"rope_type": "longrope", "type": "linear", "factor": 2.0}),
    "rope_parameters .*one object": each("rope_scaling", "x", [1]) + each("rope_parameters", 7, {FULL: LINEAR}),
    "factor is": each("rope_scaling", *({"type": "linear", "factor": f} for f in (None, 0, -1.0, "2", True, 10**400))),
    f"low < high|{TRAINED} is": each("rope_scaling", *(LLAMA3 | x for x in ({"low_freq_factor": 4}, {TRAINED: None}))),
    f"{PART} is": each(PART, 0.5, "1") + each("rope_scaling", LINEAR | {PART: 0.5}),
    "rope_theta is": each("rope_theta", None, 0, "1", True, []) + each("rope_parameters", {"rope_theta": None}),
    "rms_norm_eps is": each("rms_norm_eps", None, 0, -1e-6, "x", False, [], 10**400),
    "num_kv_heads=3; |head_dim: found 3; ": each("num_key_value_heads", 3) + each("head_dim", 3),
    "max_window_layers is": each("max_window_layers", None, -1, "1", 1.0),
    "layer_types .*a window of 4096; expected 3": each("layer_types", [FULL], [FULL] * 4, ["x"] * 3, [[]] * 3, FULL),
    "layer_types .*no window; expected 3": [{"layer_types": [SLIDING] * 3, "sliding_window": None}],
    "expected true or false": each("use_sliding_window", 1, "true") + each("tie_word_embeddings", 1, "false", []),
    "eos_token_id is": each("eos_token_id", "2", -1, 2.0, True, [None], [[2]], {"a": 2}, 2**31, 10**400),
    "cannot be read|key 'a' stands twice": [Path.unlink, lambda path: path.write_text('{"a": 1, "a": 1}')],
    "a link to .*cp -rL": [lambda path: path.symlink_to(path.rename(path.parents[1] / "outside"))],
}
BAD |= {f"{name} is": each(name, 0, -4, 2.0, "9", True, [], 2**31, 10**400) for name in COUNTS}
BAD |= {f"{name} is (None|missing)": each(name, None, ...) for name in SIZES}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_config_is_refused_by_name(tmp_path, message):
    (path := tmp_path / "it" / "config.json").parent.mkdir()
    for harm in BAD[message]:
        path.write_text(json.dumps(BASE))
        harm(path) if callable(harm) else config(path.parent, **harm)
        refused(f"(?s){path}: .*({message})", hf.load, path.parent)


KEYS = sorted({key for _, keys, _ in READ for key in keys} | SIZES.keys() | {"quantization_config", PART})
ODD = [None, True, 0, 1, -1, 2, 7.5, 1e-300, 10**400, 2**31, 10_000, float("nan"), "", "linear", [], [[]], {}, {"a": 1}]
ODD += [LINEAR, LLAMA3, [2, 1], [FULL] * 3, [FULL, SLIDING, SLIDING], [SLIDING] * 3, ..., USED, "silu", 28, "mistral"]


@settings(max_examples=500, deadline=2000)
@given(st.sampled_from([*DEFAULTS]), st.dictionaries(st.sampled_from(KEYS), st.sampled_from(ODD), max_size=4))
def test_fuzz_ends_in_our_error_or_in_a_config_that_can_be_written(tmp_path_factory, kind, changes):
    (path := tmp_path_factory.getbasetemp() / "config.json").write_text(json.dumps(BASE | {"model_type": kind}))
    config(path.parent, **changes)
    cfg = None
    with contextlib.suppress(CheckpointError):
        cfg = hf.read_config(path.parent)
    assert cfg is None or hf.config_from_hf(hf.config_to_hf(cfg)) == cfg


def test_every_fault_of_the_tensors_is_named_at_once(tmp_path):
    arrays = tensors(folder := scrambled("llama_f16", tmp_path / "it"))
    gone = [name for name in arrays if "layers.1.mlp" in name]
    faults = {"a.b": arrays[HEAD], HEAD: arrays[HEAD].T, "model.norm.weight": np.arange(32)}
    put(folder, {name: array for name, array in (arrays | faults).items() if name not in gone})
    named = [*(f"missing {name};" for name in gone), f"{HEAD} of shape [32, 96]; expected [96, 32];", "unexpected a.b."]
    refused("".join(f"(?=.*{re.escape(text)})" for text in [*named, "norm.weight of dtype int64;"]), hf.load, folder)
    config(folder, num_hidden_layers=9)
    refused(r"missing model\.layers.* and \d+ more\.", hf.load, folder)


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
    cfg = dataclasses.replace(decoder("llama"), embed_dim=512, ffn_dim=1024, num_layers=4, head_dim=16)
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
    source = scrambled("qwen3", tmp_path / "it")
    for name in hf.TOKENIZER_FILES:
        (source / name).write_text(f'{{"it": "{name}"}}')
    for one, other, found in ((None, 5, (5,)), (7, [5, 3], (3, 5, 7)), ([9, 7], None, (7, 9)), (2, ..., (2,))):
        config(source, "generation_config.json", eos_token_id=other)
        config(source, eos_token_id=one)
        cfg, params = hf.load(source, dtype="stored")
        before = content(source)
        hf.save(source, (cfg, params), like=source, overwrite=True)
        assert content(source).keys() == before.keys()
        for eos in (found, (1,), ()):
            hf.save(tmp_path / "out", (dataclasses.replace(cfg, eos_ids=eos), params), like=source, overwrite=True)
            assert hf.read_config(tmp_path / "out").eos_ids == eos
            assert config(tmp_path / "out") | {"eos_token_id": 0} == config(source) | {"eos_token_id": 0}
