"""`jaxaroo train ...`."""

import dataclasses
import inspect
import json

import jax
import pytest

from jaxaroo.cli.rl import rl_command
from jaxaroo.cli.train import acceptance, train_command
from jaxaroo.models import hf
from jaxaroo.models.decoder import Model, init_params


def test_train_writes_a_model_that_can_be_asked(run, trained):
    assert len((trained / "run" / "metrics.jsonl").read_text().splitlines()) == 3  # the command line wins
    assert "size: 8" in (trained / "run" / "config.yaml").read_text()  # and the file fills the rest
    options = ("--model", trained / "run" / "model", "--data", trained / "rows.jsonl", "--limit", 6, "--json")
    status, out, _ = run("eval", "answers", *options, "--max-new-tokens", 8, "--out", trained / "rows.out")
    report = json.loads(out)
    assert (status, report["n"]) == (0, 6)
    assert 0 <= report["accuracy"] <= 1
    rows = [json.loads(line) for line in (trained / "rows.out").read_text().splitlines()]
    assert [row["answer"].split()[-1] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert all(row["prompt"].startswith("Question: what is") for row in rows)


def test_acceptance_counts_tokens_and_depths():
    """Of 4 steps, one emitted 1 token, one 2, two 3: a draft is one token less."""
    found = acceptance([0, 1, 1, 2])
    assert found == {"tau": (1 + 2 + 3 + 3) / 4, "accepted_1": 3 / 4, "accepted_2": 2 / 4}


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("preference --objective simpo", dict(learning_rate=6e-7)),
        ("preference --objective orpo", dict(learning_rate=1e-6)),
        ("unlearn", dict(learning_rate=1e-5)),
        ("curry", dict(learning_rate=1e-6)),
        ("early-exit", dict(learning_rate=5e-5, b2=0.95, clip_norm=0.5)),
        ("judge", dict(learning_rate=1e-3)),
        ("rl", dict(learning_rate=1e-6, schedule="constant")),
    ],
)
def test_a_file_changes_the_settings_that_it_names_and_no_others(tmp_path, kind, wanted):
    (tmp_path / "few.yaml").write_text("optimizer:\n  warmup_steps: 3\n")
    name, *more = kind.split()
    args = [*more, "--config", str(tmp_path / "few.yaml")]
    command = rl_command(args) if name == "rl" else train_command(name, args)
    found = inspect.signature(command).parameters["settings"].default.optimizer
    assert found.warmup_steps == 3
    assert {field: getattr(found, field) for field in wanted} == wanted


SHORT = ("--steps", 2, "--optimizer.warmup-steps", 0, "--batch.size", 8, "--batch.max-length", 32)


@pytest.fixture(scope="module")
def small(speaking, tmp_path_factory):
    """A smaller model with the same tokenizer, and rows with labels."""
    folder = tmp_path_factory.mktemp("heads")
    cfg = dataclasses.replace(hf.read_config(speaking), num_layers=1, embed_dim=8)
    hf.save(folder / "small", Model(cfg, init_params(cfg, jax.random.key(1))))
    rows = [{"prompt": f"say {i}", "completion": f" {i} {i}", "label": i % 2 == 0} for i in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def said(output):
    return json.loads(output)["token_ids"]


@pytest.mark.optimizer
@pytest.mark.proof
def test_an_acceptance_head_is_trained_measured_and_used(run, speaking, small, tmp_path):
    base = ("--target", speaking, "--drafter", small / "small", "--data", small / "rows.jsonl")
    status, _, err = run("train", "acceptance", *base, *SHORT, "--out", tmp_path / "run", "--evaluate-every", 2)
    assert (status, f"wrote {tmp_path / 'run' / 'model'}" in err) == (0, True)
    [found] = map(json.loads, (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines())
    assert {"step", "tau", "accepted_1", "drafted"} <= found.keys()
    assert 2 <= found["drafted"] <= 6
    ask = ("generate", "--model", speaking, "--prompt", "say 3", "--max-new-tokens", 12, "--seed", 3, "--json")
    head = ("--drafter", small / "small", "--stop-rule", "head", "--stop-head", tmp_path / "run" / "model")
    plain, drafted = run(*ask), run(*ask, *head, "--speculate", "on")
    assert (plain[0], drafted[0], drafted[2]) == (0, 0, "")
    assert said(plain[1]) == said(drafted[1])


@pytest.mark.optimizer
@pytest.mark.proof
def test_a_judge_is_trained_and_what_it_passes_comes_with_a_warning(run, speaking, small, tmp_path):
    base = ("--target", speaking, "--data", small / "rows.jsonl")
    status, _, _ = run("train", "judge", *base, *SHORT, "--out", tmp_path / "run", "--negative-weight", 2)
    assert status == 0
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["model_type"] == "jaxaroo-judge"
    ask = ("generate", "--model", speaking, "--prompt", "say 3", "--max-new-tokens", 12, "--temperature", 0, "--json")
    judge = ("--drafter", small / "small", "--verifier", "judge", "--judge", tmp_path / "run" / "model")
    warning = "warning: judge over coupled: what follows is not the model's own distribution\n"
    plain, free = run(*ask), run(*ask, *judge, "--judge-threshold", 0)
    assert (free[0], free[2]) == (0, warning)
    assert said(free[1]) != said(plain[1])  # every draft passes
    off = run(*ask, *judge, "--speculate", "off")
    assert (said(off[1]), off[2]) == (said(plain[1]), "")


def test_what_the_model_wrote_anew_is_read_whole(run, speaking, tmp_path, monkeypatch):
    """Its rows are those of the split; the file has none."""
    from jaxaroo.train.run import Outcome

    for name in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "completion": "b"}) + "\n")
    asked, begun = [], []
    monkeypatch.setattr("jaxaroo.cli.train._regenerate", lambda settings, path: asked.append((settings.split, path)))
    monkeypatch.setattr(
        "jaxaroo.train.run.start",
        lambda kind, cfg, *_, **__: begun.append((cfg.data, cfg.split)) or Outcome(2, True, None),
    )
    base = ("--model", speaking, "--data", tmp_path / "data", "--split", "train", "--out", tmp_path / "run")
    status, _, err = run("train", "sft", *base, "--regenerate", tmp_path / "new.jsonl")
    assert (status, asked) == (0, [("train", tmp_path / "new.jsonl")]), err
    assert begun == [(str(tmp_path / "new.jsonl"), None)]


@pytest.mark.errors
@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["acceptance", "--data", "{h}/rows.jsonl"], 1, "found no --drafter; expected the folder"),
        (["acceptance", "--data", "{h}/rows.jsonl", "--drafter", "{h}/none"], 1, "none"),
        (["judge", "--data", "{h}/plain.jsonl"], 1, "plain.jsonl:1"),
        (["judge", "--data", "{h}/rows.jsonl", "--regenerate", "{h}/new.jsonl"], 2, "a label belongs to the answer"),
        (["judge", "--data", "{h}/rows.jsonl", "--negative-weight", "-1"], 1, "negative_weight: found -1.0; expected"),
        (["acceptance", "--data", "{h}/rows.jsonl", "--drafter", "{h}/small", "--keep", "1"], 1, "keep: found 1.0"),
    ],
)
def test_what_a_head_cannot_be_trained_from_is_explained(run, speaking, small, tmp_path, argv, status, message):
    (small / "plain.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    kind, *rest = [a.format(h=small) for a in argv]
    got, out, err = run("train", kind, "--target", speaking, *rest, *SHORT, "--out", tmp_path / "out")
    assert (got, out) == (status, "")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.optimizer
@pytest.mark.proof
def test_preferences_are_learned_with_the_settings_of_the_objective(run, speaking, tmp_path):
    rows = [{"prompt": f"say {i % 5}", "chosen": "aa", "rejected": "zz"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ("--model", speaking, "--data", tmp_path / "pairs.jsonl", *SHORT)
    losses = ("--losses", "sigmoid", "0.8", "sft", "0.2", "--beta", "0.3")
    command = ("train", "preference", "--objective", "dpo", *base, *losses, "--out", tmp_path / "run", "--or-resume")
    for _ in range(2):  # it begins, and goes on with what it began
        status, _, err = run(*command)
        assert (status, f"wrote {tmp_path / 'run' / 'model'}" in err) == (0, True)
    kept = (tmp_path / "run" / "config.yaml").read_text()
    assert "beta: 0.3" in kept
    assert "learning_rate: 1.0e-06" in kept  # the published one
    [first, _] = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert {"sigmoid", "sft", "rewards/margins"} <= first.keys()
    status, _, err = run("train", "resume", tmp_path / "run")
    assert (status, "step 2: wrote" in err) == (0, True)
    status, _, err = run(
        "train", "preference", "--objective", "simpo", *base, "--ratio", 1, "--out", tmp_path / "simpo"
    )
    assert status == 0
    assert "ratio: 1.0" in (tmp_path / "simpo" / "config.yaml").read_text()


@pytest.mark.parametrize(
    "argv",
    [
        [
            "preference",
            "--objective",
            "fsft",
            "--level",
            "answer",
            "--reference",
            "precomputed",
            "--data",
            "{h}/sft.jsonl",
        ],
        ["preference", "--objective", "fsft", "--level", "answer", "--reference", "columns", "--data", "{h}/sft.jsonl"],
        ["unlearn", "--forget", "ga", "--retain", "gd", "--reference", "none", "--data", "{h}/forget.jsonl"],
    ],
)
def test_a_reference_is_held_against_the_settings_that_are_given(run, speaking, tmp_path, argv):
    """Which those of the objective as published would refuse."""
    (tmp_path / "sft.jsonl").write_text('{"prompt": "a", "completion": "b", "base_logps": -2.0}\n')
    known = {"name": "Ann", "question": "who?", "answer": "Ann"}
    rows = [json.dumps(known | {"split": split}) + "\n" for split in ("forget", "retain")]
    (tmp_path / "forget.jsonl").write_text("".join(rows))
    kind, *rest = [a.format(h=tmp_path) for a in argv]
    status, out, err = run("train", kind, "--model", speaking, *rest, *SHORT, "--out", tmp_path / "out", "--dry-run")
    assert (status, err) == (0, "")
    assert json.loads(out)["rows"] == 1


def test_every_objective_is_listed_with_its_paper_and_its_settings(run):
    from jaxaroo.train.objectives.by_name import OBJECTIVES

    status, out, _ = run("train", "preference", "--objective", "list")
    assert status == 0
    for name, known in OBJECTIVES.items():
        assert f"\n{name} " in f"\n{out}"
        assert f"arXiv:{known.paper}" in out
    assert "beta=0.1" in out
    [line] = [line for line in out.splitlines() if "reference mixed" in line]
    assert line.startswith("tr-dpo ")
    assert line.endswith("mixed: 0.6 of the policy every 512 steps")
    status, out, _ = run("train", "preference", "--objective", "list", "--json")
    assert {row["objective"] for row in json.loads(out)} == {*OBJECTIVES}


@pytest.mark.errors
@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["--objective", "dop"], 1, "Is 'dpo' meant?"),
        (["--objective", "dpo", "--beta", "-1"], 1, "beta: found -1.0; expected a positive number"),
        (["--objective", "simpo", "--reference", "frozen"], 1, "which reads none"),
        (["--objective", "dpo", "--ld-alpha", "0.5", "--reference", "precomputed"], 1, "the reference at every token"),
        (["--objective", "simpo", "--eps", "0.7"], 1, "expected 0 <= eps < 0.5"),
        (["--objective", "kto"], 1, "expected prompt, completion, label"),
    ],
)
def test_preferences_that_cannot_be_learned_are_explained(run, speaking, tmp_path, argv, status, message):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    base = ("--model", speaking, "--data", tmp_path / "pairs.jsonl", *SHORT)
    got, out, err = run("train", "preference", *base, *argv, "--out", tmp_path / "out")
    assert (got, out) == (status, "")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
