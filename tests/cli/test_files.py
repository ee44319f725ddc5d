"""`jaxaroo convert`, `quantise` and `info`."""

import json

import numpy as np
import pytest
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


@pytest.mark.parametrize("method", ["rtn", "search", "gptq"])
@pytest.mark.slow
def test_a_quantised_folder_holds_the_master_of_the_method(run, speaking, tmp_path, method):
    from jaxaroo.models import hf, multi_precision, ptq, quantise
    from jaxaroo.models.tokenizer import load_tokenizer

    (tmp_path / "text.txt").write_text("la di da " * 80)
    data = ("--data", tmp_path / "text.txt", "--length", 16, "--rows", 16) if method == "gptq" else ()
    status, out, _ = run("quantise", speaking, tmp_path / "q", "--bits", "4,2", "--method", method, *data)
    assert (status, out) == (0, f"wrote {tmp_path / 'q'}\n")
    found, quant = hf.load_master(tmp_path / "q")
    ids = load_tokenizer(speaking).encode("la di da " * 80)[:256]
    batches = list(np.asarray(ids, np.int32).reshape(2, 8, 16)) if method == "gptq" else None
    rules = ((multi_precision.MATRICES, quantise.QuantConfig(bits=(4, 2), init="absmax")),)
    model = hf.load(speaking, dtype="float32")
    want = ptq.quantise_model(model.config, model.params, rules, method, batches)
    for layer in (0, 1):
        for block, name in (("attn", "o"), ("mlp", "down")):
            got, expected = found.params["layers"][layer][block][name], want["layers"][layer][block][name]
            np.testing.assert_array_equal(got["codes"], expected["codes"])
            np.testing.assert_array_equal(got["scale"].astype("float32"), expected["scale"].astype("float32"))
    assert {cfg.bits for _, cfg in quant} == {(4, 2)}
    _, out, _ = run("info", tmp_path / "q")
    assert "a master that serves at 4, 2 bits" in out
    assert run("convert", tmp_path / "q", tmp_path / "again")[0] == 0
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("q", "again")]
    assert both[0] == both[1]


@pytest.mark.errors
def test_quantise_says_what_is_wrong(run, speaking, tmp_path):
    (tmp_path / "text.txt").write_text("la")
    base = ("quantise", speaking, tmp_path / "q")
    for options, code, message in (
        (("--bits", "4,8"), 1, "expected falling widths"),
        (("--bits", 4, "--method", "gptq"), 2, "expected data for gptq"),
        (("--bits", 4, "--data", "text.txt"), 2, "and for no other"),
        (("--bits", 4, "--method", "gptq", "--data", tmp_path / "text.txt"), 1, "expected 8 pieces of 128 at least"),
        (("--bits", 4, "--group", 5), 1, "expected None, 32, 64 or a multiple of 128"),
    ):
        status, _, err = run(*base, *options)
        assert (status, message in err) == (code, True), err
    assert not (tmp_path / "q").exists()
