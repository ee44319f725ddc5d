"""Each command with good and bad input, in this process; what it prints, and what it returns."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from jaxaroo.cli import main
from jaxaroo.models.tokenizer import byte_tokenizer

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A checkpoint that has a tokenizer: the golden's vocabulary is smaller than bytes, so a model of our own."""
    import jax

    from jaxaroo.models.decoder import DecoderConfig, Model, init_params
    from jaxaroo.models.hf import save

    tokenizer = byte_tokenizer()
    cfg = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        embed_dim=16,
        ffn_dim=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_positions=128,
        eos_ids=tokenizer.eos_ids,
    )
    folder = tmp_path_factory.mktemp("models") / "speaking"
    save(folder, Model(cfg, init_params(cfg, jax.random.key(0))))
    tokenizer.save(folder)
    return folder


def run(capsys, *argv):
    status = main([str(a) for a in argv])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_generate_prints_rows_that_transformers_would_continue_alike(capsys):
    io = np.load(GOLDENS / "qwen3" / "io.npz")
    real = int(io["attention_mask"][0].sum())
    prompt, want = io["input_ids"][0, :real].tolist(), io["greedy_0"].tolist()
    tokens = ",".join(map(str, prompt))
    options = ("--max-new-tokens", len(want) - real, "--temperature", 0, "--json")
    status, out, err = run(capsys, "generate", "--model", GOLDENS / "qwen3", "--tokens", tokens, *options)
    [row] = map(json.loads, out.splitlines())
    assert (status, err) == (0, "")
    assert row["prompt_token_ids"] == prompt
    assert prompt + row["token_ids"] == want
    assert (row["finish_reason"], row["text"], row["error"]) == ("length", None, None)
    assert row["timings"].keys() == {"queue", "prefill", "decode"}


def test_generate_streams_text_and_repeats_with_a_seed(capsys, speaking):
    argv = ("generate", "--model", speaking, "--prompt", "hi", "--max-new-tokens", 20, "--seed", 3)
    status, plain, _ = run(capsys, *argv)
    _, rows, _ = run(capsys, *argv, "--json")
    [row] = map(json.loads, rows.splitlines())
    assert (status, plain) == (0, row["text"] + "\n")
    assert row["prompt"] == "hi"
    assert len(row["token_ids"]) == 20
    _, ids, _ = run(capsys, "generate", "--model", GOLDENS / "llama_f16", "--tokens", "1,2", "--max-new-tokens", 3)
    assert len(ids.split()) == 3


def test_generate_answers_a_file_of_prompts_and_reports_the_bad_ones(capsys, speaking, tmp_path):
    rows = [
        {"prompt": "hi"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"tokens": [104, 105]},
        {"prompt": "x" * 200},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    argv = ("generate", "--model", speaking, "--prompts", file, "--max-new-tokens", 5, "--seed", 1, "--n", 2)
    status, out, _ = run(capsys, *argv, "--json")
    got = [json.loads(line) for line in out.splitlines()]
    assert status == 1  # one could not be answered
    assert sorted((r["id"], r["index"]) for r in got) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    bad = next(r for r in got if r["id"] == 3)
    assert bad["error"]["param"] == "prompt"
    assert "found 201 tokens; expected at most 127" in bad["error"]["message"]
    status, out, err = run(capsys, *argv)
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
def test_a_malformed_line_is_named(capsys, speaking, tmp_path, content, message):
    (tmp_path / "prompts.jsonl").write_text(content)
    status, out, err = run(capsys, "generate", "--model", speaking, "--prompts", tmp_path / "prompts.jsonl")
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
        (["info", "{m}/none"], 1, "config.json"),
        (["convert", "{m}", "{m}"], 2, "source and target are both"),
        (["convert", "{m}", "{g}"], 1, "expected a new or empty folder"),
    ],
)
def test_bad_input_is_explained_without_a_traceback(capsys, speaking, argv, status, message):
    argv = [a.format(m=speaking, g=GOLDENS / "qwen3") for a in argv]
    got, out, err = run(capsys, *argv)
    assert (got, out) == (status, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.errors
def test_a_misspelt_option_is_answered_with_the_right_one(capsys, speaking):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--model", str(speaking), "--promt", "a"])
    err = capsys.readouterr()
    assert stop.value.code == 2
    assert "--prompt" in err.err + err.out


def test_convert_there_and_back_is_the_same_to_the_byte(capsys, speaking, tmp_path):
    status, out, _ = run(capsys, "convert", speaking, tmp_path / "a", "--max-shard-gb", 1e-5)
    assert (status, "wrote" in out) == (0, True)
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    assert run(capsys, "convert", tmp_path / "a", tmp_path / "b")[0] == 0
    assert (tmp_path / "b/model.safetensors").read_bytes() == (speaking / "model.safetensors").read_bytes()
    assert (tmp_path / "b/tokenizer.json").read_bytes() == (speaking / "tokenizer.json").read_bytes()
    assert run(capsys, "convert", speaking, tmp_path / "b", "--overwrite", "--dtype", "bfloat16")[0] == 0
    _, out, _ = run(capsys, "info", tmp_path / "b", "--json")
    assert json.loads(out)["bytes_by_dtype"].keys() == {"bfloat16"}


def test_info_describes_without_loading(capsys, speaking):
    status, out, _ = run(capsys, "info", speaking, "--json")
    facts = json.loads(out)
    with safe_open(speaking / "model.safetensors", "numpy") as file:
        held = sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118 (not a dict)
    assert facts["parameters"] == held
    assert (status, facts["architecture"]) == (0, "LlamaForCausalLM")
    assert facts["bytes"] == 4 * held == sum(facts["bytes_by_dtype"].values())
    assert facts["kv_bytes_per_token"]["bfloat16"] == 2 * 2 * 1 * 8 * 2  # K and V, layers, heads, head size, bytes
    status, out, _ = run(capsys, "info", speaking)
    assert f"{held:,} parameters" in out


def test_an_interrupt_ends_with_130(capsys, speaking, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxaroo.models.hf.load", interrupted)
    status, _, err = run(capsys, "generate", "--model", speaking, "--prompt", "a")
    assert (status, err.strip()) == (130, "jaxaroo: interrupted")


@pytest.mark.optimizer
@pytest.mark.optimizer
def test_quickstart_trains_writes_loads_and_speaks(capsys, tmp_path):
    out_dir = tmp_path / "out"
    status, out, err = run(capsys, "quickstart", "--out", out_dir, "--seconds", 2, "--steps", 3)
    assert status == 0
    assert out.startswith("There was movement")
    assert len(out) > 30
    assert "nats a byte" in err
    assert "how many" in out
    assert "config.yaml" in {p.name for p in (out_dir / "arithmetic").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (out_dir / "checkpoint").iterdir()
    }
    shutil.copy(out_dir / "checkpoint/config.json", out_dir / "notes.txt")
    assert run(capsys, "quickstart", "--out", out_dir, "--seconds", 2)[0] == 1  # other files are not to be mixed up


# --------------------------------------------------------------------------------------------------- train and evaluate
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few steps on a file of rows, with settings from a file and from the command line."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"question": f"what is {i} + 1 ?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "settings.yaml").write_text("steps: 7\nlog_every: 2\nbatch:\n  size: 8\n  max_length: 64\n")
    base = ["train", "sft", "--model", "preset:tiny", "--data", str(folder / "rows.jsonl")]
    argv = [*base, "--config", str(folder / "settings.yaml"), "--out", str(folder / "run"), "--steps", "3"]
    with jax_numpy_promotion("standard"):
        assert main(argv) == 0
    return folder


def jax_numpy_promotion(mode):
    import jax

    return jax.numpy_dtype_promotion(mode)


def test_train_writes_a_model_that_can_be_asked(capsys, trained):
    assert len((trained / "run" / "metrics.jsonl").read_text().splitlines()) == 3  # the command line wins
    assert "size: 8" in (trained / "run" / "config.yaml").read_text()  # and the file fills the rest
    options = ("--model", trained / "run" / "model", "--data", trained / "rows.jsonl", "--limit", 6, "--json")
    status, out, _ = run(capsys, "eval", "answers", *options, "--max-new-tokens", 8, "--out", trained / "rows.out")
    report = json.loads(out)
    assert (status, report["n"]) == (0, 6)
    assert 0 <= report["accuracy"] <= 1
    rows = [json.loads(line) for line in (trained / "rows.out").read_text().splitlines()]
    assert [row["answer"].split()[-1] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert all(row["prompt"].startswith("Question: what is") for row in rows)


def test_eval_lm_scores_completions_or_a_text(capsys, trained):
    model = ("--model", trained / "run" / "model")
    status, out, _ = run(capsys, "eval", "lm", *model, "--data", trained / "rows.jsonl", "--json", "--window", 64)
    report = json.loads(out)
    completions = sum(len(f" {i} + 1 = {i + 1}\n#### {i + 1}") + 1 for i in range(30))  # bytes, and an end each
    assert (status, report["tokens"]) == (0, completions)
    assert report["perplexity"] == pytest.approx(np.exp(report["nll"] / report["tokens"]))
    (trained / "text.txt").write_text("a b c " * 40)
    status, out, _ = run(capsys, "eval", "lm", *model, "--data", trained / "text.txt", "--json", "--window", 64)
    report = json.loads(out)
    assert report["tokens"] == 240
    assert report["bits_per_byte"] == pytest.approx(report["nll"] / np.log(2) / 240)


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        ("train sft --model preset:tiny --data builtin:arithmetic", 2, "--out"),
        ("train sft --modle x --data y --out z", 2, "--model"),
        ("train sfd", 2, "train sft"),
        ("train", 2, "train sft"),
        ("train sft --config {folder}/bad.yaml --out {folder}/x", 1, "Did you mean batch.size?"),
        ("train sft --config {folder}/none.yaml --out {folder}/x", 1, "none.yaml"),
        ("train sft --model preset:tiny --data {folder}/bad.jsonl --out {folder}/x", 1, "bad.jsonl:2"),
        ("train sft --model preset:tiny --data {folder}/rows.jsonl --out {folder}/run", 1, "jaxaroo train resume"),
        ("train resume {folder}", 1, "expected the --out folder of a run"),
        ("eval answers --model {folder}/run/model --data {folder}/pairs.jsonl", 1, "expected an `answer`"),
        ("eval answers --model {folder}/run/model --data {folder}/rows.jsonl --samples 2", 2, "--temperature above 0"),
        ("eval lm --model {folder}/nothing --data {folder}/rows.jsonl", 1, "nothing"),
    ],
)
def test_training_commands_with_bad_input(capsys, trained, argv, status, message):
    (trained / "bad.yaml").write_text("model: preset:tiny\ndata: builtin:arithmetic\nbatch:\n  sise: 8\n")
    (trained / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    (trained / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    try:
        found, out, err = run(capsys, *argv.format(folder=trained).split())
    except SystemExit as e:  # tyro's own
        found, (out, err) = e.code, capsys.readouterr()
    assert found == status
    assert message in out + err
    assert not (trained / "x").exists()
