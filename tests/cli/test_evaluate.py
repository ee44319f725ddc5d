"""`jaxaroo eval ...`."""

import json

import numpy as np
import pytest


@pytest.mark.slow
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
    text = ("--data", trained / "text.txt", "--json", "--window", 64)
    status, out, _ = run("eval", "lm", *model, *text, "--tensor", 2)
    assert (status, json.loads(out)["nll"]) == (0, pytest.approx(report["nll"], rel=1e-5))


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
        ("eval lm --model {folder}/run/model --data {folder}/rows.jsonl --tensor 9", 2, "--tensor 9: found 8 devices"),
        (
            "eval answers --model {folder}/run/model --data {folder}/rows.jsonl --limit 0",
            2,
            "--limit 0: expected",
        ),
        (
            "eval lm --model {folder}/run/model --data {folder}/rows.jsonl --limit -1",
            2,
            "--limit -1: expected",
        ),
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


def test_questions_that_could_not_be_asked_are_told(run, speaking, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "answer": "1"}\n')
    asked = ("eval", "answers", "--model", speaking, "--data", tmp_path / "rows.jsonl", "--max-new-tokens", 500)
    status, out, err = run(*asked)
    assert (status, out.startswith("accuracy 0.0000")) == (0, True)
    assert "warning: 1 questions were not answered, the first: max_tokens: found 500" in err


@pytest.mark.slow
def test_a_question_that_could_not_be_asked_has_no_right_answer_to_choose(run, speaking, rewarding, tmp_path):
    rows = [{"prompt": "q " * n, "answer": "1"} for n in (1, 100)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("eval", "best-of-n", "--policy", speaking, "--model", rewarding, "--data", tmp_path / "rows.jsonl")
    status, out, err = run(*asked, "--samples", 2, "--max-new-tokens", 8, "--out", tmp_path / "a.jsonl", "--json")
    assert (status, json.loads(out)["questions"]) == (0, 2)
    assert "warning: 1 questions were not answered, the first: " in err
    assert [len(json.loads(line)["texts"]) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [2, 0]


@pytest.mark.errors
def test_files_that_could_not_be_written_are_refused_before_anything_is_read(run, tmp_path):
    for argv in ("answers --model x", "prm --model x", "best-of-n --policy x --model x"):
        status, _, err = run("eval", *argv.split(), "--data", "y", "--out", tmp_path / "no" / "a.jsonl")
        assert (status, "there is no folder" in err) == (2, True)
    status, _, err = run("eval", "best-of-n", "--policy", tmp_path / "later", "--model", tmp_path / "x", "--data", "y")
    assert (status, str(tmp_path / "x") in err) == (
        1,
        True,
    )  # the policy, which would answer first, is not there either


@pytest.fixture(scope="module")
def rewarding(speaking, tmp_path_factory):
    """A reward model that knows nothing, beside the model that speaks."""
    import jax

    from jaxaroo.models import hf, reward
    from jaxaroo.models.tokenizer import load_tokenizer

    decoder, tokenizer = hf.load(speaking), load_tokenizer(speaking)
    cfg = reward.RewardConfig(target=decoder.config, separator=reward.one_token(tokenizer, "<|sep|>"))
    head = reward.init_head(cfg, jax.random.key(1))
    folder = tmp_path_factory.mktemp("reward") / "model"
    reward.save(folder, reward.RewardModel(cfg, {"model": decoder.params, "head": head}), like=speaking)
    return folder


@pytest.mark.slow
def test_eval_prm_reports_scores_and_a_picture(run, rewarding, tmp_path):
    rows = [{"prompt": f"q{i} ", "steps": ["a b", "c"], "labels": [1, i % 2], "id": str(i)} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("eval", "prm", "--model", rewarding, "--data", tmp_path / "rows.jsonl", "--batch", 4)
    status, out, _ = run(*asked, "--json", "--out", tmp_path / "s.jsonl", "--plot", tmp_path / "r.png")
    report = json.loads(out)
    assert (status, report["solutions"], report["steps"], report["right"]) == (0, 6, 12, 9)
    assert (report["erroneous"], report["correct"]) == (3, 3)
    written = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert all(len(row["scores"]) == 2 and min(row["scores"]) > 0 for row in written)
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    status, out, _ = run(*asked)
    assert (status, f"AUROC {report['auroc']:.4f}" in out) == (0, True)


@pytest.mark.slow
def test_eval_best_of_n_shows_curves_between_one_answer_and_the_truth(run, speaking, rewarding, tmp_path):
    rows = [{"prompt": f"what is {i} ?", "answer": str(i)} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("eval", "best-of-n", "--policy", speaking, "--model", rewarding, "--data", tmp_path / "rows.jsonl")
    asked += ("--samples", 4, "--max-new-tokens", 8, "--limit", 2)
    status, out, _ = run(*asked, "--json", "--out", tmp_path / "a.jsonl", "--plot", tmp_path / "c.png")
    found = json.loads(out)
    assert (status, found["questions"], found["n"], found["k"]) == (0, 2, 4, [1, 2, 4])
    assert set(found["best_of"]) == {"min", "product", "last", "mean"}
    for values in found["best_of"].values():
        assert all(value <= most for value, most in zip(values, found["pass_at"], strict=True))
    written = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [len(row["scores"]) for row in written] == [4, 4]
    assert set(found["auroc"]) == set(found["within_question_auroc"]) == set(found["best_of"])
    assert (tmp_path / "c.png").stat().st_size > 1000
    status, out, _ = run(*asked)
    assert (status, out.split()[:3]) == (0, ["k", "oracle", "majority"])


@pytest.mark.slow
def test_a_guide_steers_answers_and_not_together_with_drafts(run, speaking, rewarding, tmp_path):
    rows = [{"prompt": f"q{i} ", "answer": "1"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = []
    for i, guided in enumerate([(), ("--guide", rewarding, "--guide-beta", 200)]):
        asked = ("eval", "answers", "--model", speaking, "--data", tmp_path / "rows.jsonl", "--max-new-tokens", 8)
        status, _, _ = run(*asked, *guided, "--out", tmp_path / f"{i}.jsonl", "--json")
        assert status == 0
        said.append([json.loads(line)["texts"] for line in (tmp_path / f"{i}.jsonl").read_text().splitlines()])
    assert said[0] != said[1]
    status, _, err = run("generate", "--model", speaking, "--prompt", "a", "--drafter", "lookup", "--guide", rewarding)
    assert (status, "both speculation and guidance" in err) == (1, True)


def test_a_scorer_that_knows_hard_questions_and_no_answers_is_found_out(
    run, rewarding, speaking, tmp_path, monkeypatch
):
    """Every answer to an easy question scores high, right or wrong; one to a hard question low."""
    from jaxaroo.infer import evaluate, step_scores

    answered = [
        dict(prompt=f"q{i}", answer="7", texts=["ans 7", "ans 8", "ans 7"][:3], correct=right)
        | dict(finish_reasons=["stop"] * 3, error=None)
        for i, right in enumerate(([True, False, True], [False, True, False]))
    ]
    report = evaluate.AnswersReport(2, 3, 3, 0.5, 0.0, (0.0, 1.0), None, {}, 1.0, 0, 0, answered)
    monkeypatch.setattr(evaluate, "evaluate_answers", lambda *a, **k: report)
    monkeypatch.setattr(step_scores, "score_solutions", lambda *a, **k: [[0.9]] * 3 + [[0.2]] * 3)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "answer": "7"}\n')
    asked = ("eval", "best-of-n", "--policy", speaking, "--model", rewarding, "--data", tmp_path / "rows.jsonl")
    found = json.loads(run(*asked, "--samples", 3, "--json")[1])
    assert found["within_question_auroc"]["min"] == 0.5
    assert (
        found["auroc"]["min"] == (2 * 2 + 2 * 0.5 + 2 * 0.5) / 9
    )  # wins of right and easy over wrong and hard, and ties
    assert found["best_of"]["min"][-1] == found["random"] == 0.5


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        ("eval prm --model {speaking} --data {tmp}/rows.jsonl", 1, "expected a reward model"),
        ("eval prm --model {rewarding} --data {tmp}/none.jsonl", 1, "none.jsonl"),
        ("eval prm --model {rewarding} --data {tmp}/rows.jsonl", 1, "rows.jsonl:1"),
        (
            "eval best-of-n --policy {speaking} --model {rewarding} --data {tmp}/rows.jsonl --samples 1",
            2,
            "--samples 1",
        ),
        (
            "eval best-of-n --policy {speaking} --model {speaking} --data {tmp}/rows.jsonl --limit 1 --samples 2 "
            "--max-new-tokens 2",
            1,
            "expected a reward model",
        ),
    ],
)
def test_reward_commands_with_bad_input(run, speaking, rewarding, tmp_path, argv, status, message):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "answer": "1"}\n')
    found, out, err = run(*argv.format(speaking=speaking, rewarding=rewarding, tmp=tmp_path).split())
    assert found == status
    assert message in out + err
