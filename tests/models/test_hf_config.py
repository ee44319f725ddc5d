"""Oracle: what the config classes of transformers 5.23 make of the same keys; then what is refused, and a fuzz."""

import contextlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxaroo.models.decoder import DecoderConfig, RopeScaling
from jaxaroo.models.hf_config import config_from_hf, config_to_hf, read_config, read_quantisation
from jaxaroo.models.quantise import QuantConfig
from jaxaroo.models.safetensors import CheckpointError


def config(folder, name="config.json", **changes):
    found = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))
    return found


def refused(message, function, *args, error=CheckpointError, **options):
    with pytest.raises(error, match=message):
        function(*args, **options)


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
            assert config_from_hf(SIZES | {"model_type": kind} | keys) == decoder(kind, **change)
    for kind, part in re.findall(r"(\w+) (\w+)", NOT_SAID):
        other = decoder(kind, **{part: 5 if part == "window" else not DEFAULTS[kind].get(part, False)})
        refused(f"'{kind}' cannot express", config_to_hf, other, error=ValueError)
    loose = decoder("qwen2", window=5, window_layers=(True,) * 3, eos_ids=(7, 2, 7))
    assert config_from_hf(config_to_hf(loose)) == decoder("qwen2", window=5, eos_ids=(2, 7))


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
        refused(f"(?s){path}: .*({message})", read_config, path.parent)


ENTRY = {"bits": [8, 4], "group": 32, "gain": [4]}
OF_A_MASTER = {"quant_method": "jaxaroo", "version": 1, "matrices": {"layers/attn/q": ENTRY, "layers/mlp/up": {}}}
NAMES = ["", "q", "layers/attn/[qk]", ".*/q", "layers/attn/./q", "layers/.+/q", "layers/attn/q\n", "(?i)layers/attn/q"]
NAMES += [
    "layers/attn/q|layers/mlp/up",
    "layers/attn/x",
    "embed",
    "layers/attn_norm",
    "a" * 10**6 + "/q",
    "\\w*/q",
    "é/q",
]
MATRICES = [{name: ENTRY} for name in NAMES if name != "q"]
MATRICES += [{"layers/attn/q": entry} for entry in (None, [], 7, "8", {"width": 8}, {"bits": 8}, {"bits": [2, 4]})]
MATRICES += [
    {"layers/attn/q": {"bits": bits}} for bits in ([], [9], [8.0], [True], ["8"], [[8]], {}, [10**400], [8] * 10**6)
]
MATRICES += [{"layers/attn/q": {"group": group}} for group in (0, -32, 31, 33, 192.0, True, "32", [32], 10**400 + 1)]
MATRICES += [{"layers/attn/q": {"gain": gain}} for gain in (4, [3], [4, 4], [[4]], [{}], "4", [None])]
MATRICES += [
    {"layers/attn/q": {"init": "search", "emphasis": e}}
    for e in ([1], [1, 2, 3, -1], ["a"] * 4, [10**400] * 4, 7, [[]])
]
MATRICES += [{"layers/attn/q": {name: value}} for name in ("scale_param", "init") for value in ("x", [], {}, None, 7)]


def test_the_quantisation_of_a_master_is_read_as_it_was_written():
    keys = SIZES | {"model_type": "llama"}
    rules = dict(read_quantisation(keys | {"quantization_config": OF_A_MASTER}))
    assert rules == {"layers/attn/q": QuantConfig(bits=(8, 4), group=32, gain=(4,)), "layers/mlp/up": QuantConfig()}
    assert config_from_hf(keys | {"quantization_config": OF_A_MASTER}) == config_from_hf(keys)
    for plain in (keys, keys | {"quantization_config": None}):
        assert read_quantisation(plain) == ()
    assert read_quantisation({"quantization_config": OF_A_MASTER | {"matrices": {}}}) == ()


def test_another_quantisation_is_refused_by_name_and_in_few_words():
    other = [OF_A_MASTER | change for change in ({"version": 2}, {"version": None}, {"quant_method": "gptq"})]
    other += [{key: value for key, value in OF_A_MASTER.items() if key != gone} for gone in ("version", "quant_method")]
    other += [{"quant_method": "awq", "bits": 4}, {}, [], "jaxaroo", True, 0, {"quant_method": ["jaxaroo"]}]
    for found in other:
        for read in (read_quantisation, lambda hf, where: config_from_hf(SIZES | {"model_type": "llama"} | hf, where)):
            refused("(?s)it: quantization_config .*expected plain weights, or 'jaxaroo' of version 1", read,
                    {"quantization_config": found}, "it")  # fmt: skip


@pytest.mark.parametrize("matrices", [None, [], "x", 7, *MATRICES], ids=lambda m: str(m)[:60])
def test_a_file_names_matrices_and_no_patterns_and_numbers_that_mean_something(matrices):
    with pytest.raises(CheckpointError, match=r"it: quantisation: found ") as e:
        read_quantisation({"quantization_config": OF_A_MASTER | {"matrices": matrices}}, "it")
    assert len(str(e.value)) < 600


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
        cfg = read_config(path.parent)
    assert cfg is None or config_from_hf(config_to_hf(cfg)) == cfg
