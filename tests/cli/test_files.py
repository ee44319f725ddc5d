"""`jaxaroo convert` and `jaxaroo info`."""

import json

from safetensors import safe_open


def test_convert_there_and_back_is_the_same_to_the_byte(run, speaking, tmp_path):
    status, out, _ = run("convert", speaking, tmp_path / "a", "--max-shard-gb", 1e-5)
    assert (status, "wrote" in out) == (0, True)
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    assert run("convert", tmp_path / "a", tmp_path / "b")[0] == 0
    assert (tmp_path / "b/model.safetensors").read_bytes() == (speaking / "model.safetensors").read_bytes()
    assert (tmp_path / "b/tokenizer.json").read_bytes() == (speaking / "tokenizer.json").read_bytes()
    assert run("convert", speaking, tmp_path / "b", "--overwrite", "--dtype", "bfloat16")[0] == 0
    _, out, _ = run("info", tmp_path / "b", "--json")
    assert json.loads(out)["bytes_by_dtype"].keys() == {"bfloat16"}


def test_info_describes_without_loading(run, speaking):
    status, out, _ = run("info", speaking, "--json")
    facts = json.loads(out)
    with safe_open(speaking / "model.safetensors", "numpy") as file:
        held = sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118 (not a dict)
    assert facts["parameters"] == held
    assert (status, facts["architecture"]) == (0, "LlamaForCausalLM")
    assert facts["bytes"] == 4 * held == sum(facts["bytes_by_dtype"].values())
    assert facts["kv_bytes_per_token"]["bfloat16"] == 2 * 2 * 1 * 8 * 2  # K and V, layers, heads, head size, bytes
    status, out, _ = run("info", speaking)
    assert f"{held:,} parameters" in out
