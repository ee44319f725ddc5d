"""`jaxaroo eval ...`."""

import json

import numpy as np
import pytest


def test_eval_lm_scores_completions_or_a_text(run, trained):
    model = ("--model", trained / "run" / "model")
    status, out, _ = run("eval", "lm", *model, "--data", trained / "rows.jsonl", "--json", "--window", 64)
    report = json.loads(out)
    completions = sum(len(f" {i} + 1 = {i + 1}\n#### {i + 1}") + 1 for i in range(30))  # bytes, and an end each
    assert (status, report["tokens"]) == (0, completions)
    assert report["perplexity"] == pytest.approx(np.exp(report["nll"] / report["tokens"]))
    (trained / "text.txt").write_text("a b c " * 40)
    status, out, _ = run("eval", "lm", *model, "--data", trained / "text.txt", "--json", "--window", 64)
    report = json.loads(out)
    assert report["tokens"] == 240
    assert report["bits_per_byte"] == pytest.approx(report["nll"] / np.log(2) / 240)


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        ("train sft --model preset:tiny --data builtin:arithmetic", 2, "--out"),
        ("train sft --modle x --data y --out z", 2, "--model"),
        ("train sfd", 2, "train sft"),
        ("train drafter --target preset:tiny --data builtin:arithmetic", 2, "--out"),
        ("train drafter --kind eagel --target x --data y --out z", 2, "eagle"),
        (
            "train early-exit --exit-layer 9 --target preset:tiny --data builtin:arithmetic --out {folder}/x",
            1,
            "exit_layer",
        ),
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
def test_training_commands_with_bad_input(run, trained, argv, status, message):
    (trained / "bad.yaml").write_text("model: preset:tiny\ndata: builtin:arithmetic\nbatch:\n  sise: 8\n")
    (trained / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    (trained / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    found, out, err = run(*argv.format(folder=trained).split())
    assert found == status
    assert message in out + err
    assert not (trained / "x").exists()
