"""`jaxaroo generate` with good and bad input."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxaroo.infer.engine import Engine
from jaxaroo.infer.sampling import Sampling
from jaxaroo.models.hf import load

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.mark.slow
def test_generate_prints_rows_that_transformers_would_continue_alike(run):
    io = np.load(GOLDENS / "qwen3" / "io.npz")
    real = int(io["attention_mask"][0].sum())
    prompt, want = io["input_ids"][0, :real].tolist(), io["greedy_0"].tolist()
    tokens = ",".join(map(str, prompt))
    options = ("--max-new-tokens", len(want) - real, "--temperature", 0, "--json")
    status, out, err = run("generate", "--model", GOLDENS / "qwen3", "--tokens", tokens, *options)
    [row] = map(json.loads, out.splitlines())
    assert (status, err) == (0, "")
    assert row["prompt_token_ids"] == prompt
    assert prompt + row["token_ids"] == want
    assert (row["finish_reason"], row["text"], row["error"]) == ("length", None, None)
    assert row["timings"].keys() == {"queue", "prefill", "decode"}


@pytest.mark.slow
def test_generate_streams_text_and_repeats_with_a_seed(run, speaking):
    argv = ("generate", "--model", speaking, "--prompt", "hi", "--max-new-tokens", 20, "--seed", 3)
    status, plain, _ = run(*argv)
    _, rows, _ = run(*argv, "--json")
    [row] = map(json.loads, rows.splitlines())
    assert (status, plain) == (0, row["text"] + "\n")
    assert row["prompt"] == "hi"
    assert len(row["token_ids"]) == 20
    _, ids, _ = run("generate", "--model", GOLDENS / "llama_f16", "--tokens", "1,2", "--max-new-tokens", 3)
    assert len(ids.split()) == 3


@pytest.mark.slow
def test_two_devices_say_what_one_says(run):
    argv = ("generate", "--model", GOLDENS / "qwen3", "--tokens", "5,6,7", "--max-new-tokens", 12, "--temperature", 0)
    _, alone, _ = run(*argv)
    status, together, err = run(*argv, "--tensor", 2)
    assert (status, err, together) == (0, "", alone)


@pytest.mark.errors
@pytest.mark.parametrize("tensor", [0, 9])
def test_devices_that_are_not_there_are_refused(run, tensor):
    status, _, err = run("generate", "--model", GOLDENS / "qwen3", "--tokens", "1", "--tensor", tensor)
    assert status == 2
    assert f"--tensor {tensor}: found 8 devices; expected 1 to as many as there are." in err


@pytest.mark.slow
def test_generate_keeps_keys_and_values_as_it_is_told(run):
    """At 4 bits another text than with floats, that of the engine, and no other with drafts."""
    model = load(GOLDENS / "qwen3", dtype="float32")
    with Engine(model, kv_dtype="int4") as engine:
        [result] = engine.generate([5, 6, 7, 5, 6], Sampling(temperature=0.0, max_tokens=30))
    argv = ("generate", "--model", GOLDENS / "qwen3", "--tokens", "5,6,7,5,6", "--max-new-tokens", 30)
    said = {}
    for options in ((), ("--kv-dtype", "int4"), ("--kv-dtype", "int4", "--drafter", "lookup", "--speculate", "on")):
        status, out, err = run(*argv, "--temperature", 0, "--json", *options)
        assert (status, err) == (0, "")
        said[options] = json.loads(out)["token_ids"]
    floats, codes, drafted = said.values()
    assert codes == drafted == result.outputs[0].token_ids
    assert codes != floats


@pytest.mark.slow
def test_generate_answers_a_file_of_prompts_and_reports_the_bad_ones(run, speaking, tmp_path):
    rows = [
        {"prompt": "hi"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"tokens": [104, 105]},
        {"prompt": "x" * 200},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    argv = ("generate", "--model", speaking, "--prompts", file, "--max-new-tokens", 5, "--seed", 1, "--n", 2)
    status, out, _ = run(*argv, "--json")
    got = [json.loads(line) for line in out.splitlines()]
    assert status == 1  # one could not be answered
    assert sorted((r["id"], r["index"]) for r in got) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    bad = next(r for r in got if r["id"] == 3)
    assert bad["error"]["param"] == "prompt"
    assert "found 201 tokens; expected at most 127" in bad["error"]["message"]
    status, out, err = run(*argv)
    assert status == 1
    assert out.count("--- prompt") == 6
    assert "prompt 3: prompt: found 201 tokens" in err


@pytest.mark.errors
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": ', "prompts.jsonl:2: not JSON"),
        ('{"text": "a"}', 'prompts.jsonl:1: found \'{"text": "a"}\'; expected'),
        ("[1]", "prompts.jsonl:1: found '[1]'"),
        ('{"prompt": 5}', "prompts.jsonl:1: found"),
        ('{"prompt": "a", "tokens": [1]}', "prompts.jsonl:1: found"),
        ("", "no prompts in"),
    ],
)
def test_a_malformed_line_is_named(run, speaking, tmp_path, content, message):
    (tmp_path / "prompts.jsonl").write_text(content)
    status, out, err = run("generate", "--model", speaking, "--prompts", tmp_path / "prompts.jsonl")
    assert (status, out) == (2, "")
    assert message in err


@pytest.mark.errors
@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["generate", "--model", "{m}"], 2, "exactly one of --prompt, --prompts and --tokens"),
        (["generate", "--model", "{m}", "--prompt", "a", "--tokens", "1"], 2, "exactly one of"),
        (["generate", "--model", "{m}", "--tokens", "1,x"], 2, "--tokens '1,x'; expected integers"),
        (["generate", "--model", "{m}", "--prompt", "a", "--top-p", "2"], 1, "Sampling.top_p: found 2.0; expected"),
        (["generate", "--model", "no-such-folder", "--prompt", "a"], 1, "no-such-folder"),
        (["generate", "--model", "{g}", "--prompt", "a"], 1, "tokenizer.json"),
        (["generate", "--model", "{g}", "--tokens", "1", "--chat"], 2, "--chat"),
        (["generate", "--model", "{g}", "--tokens", "1", "--kv-dtype", "int5"], 2, "int5"),
        (["info", "{m}/none"], 1, "config.json"),
        (["convert", "{m}", "{m}"], 2, "source and target are both"),
        (["convert", "{m}", "{g}"], 1, "expected a new or empty folder"),
    ],
)
def test_bad_input_is_explained_without_a_traceback(run, speaking, argv, status, message):
    argv = [a.format(m=speaking, g=GOLDENS / "qwen3") for a in argv]
    got, out, err = run(*argv)
    assert (got, out) == (status, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.errors
def test_a_misspelt_option_is_answered_with_the_right_one(run, speaking):
    status, out, err = run("generate", "--model", speaking, "--promt", "a")
    assert status == 2
    assert "--prompt" in err + out
