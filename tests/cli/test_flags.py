"""`--dry-run`: settings and inputs are read, nothing is written. `--json`: one object, of every command."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxaroo.cli.flags import RUNS, inputs
from jaxaroo.train.recipe import RECIPES


@dataclasses.dataclass(frozen=True)
class Inner:
    drafter: str = "lookup"
    corpus: Path | None = None


def test_inputs_are_found_in_nested_settings_and_names_are_none():
    given = {"model": "preset:tiny", "data": Path("rows.jsonl"), "out": Path("o"), "inner": Inner(corpus=Path("c.txt"))}
    assert dict(inputs(given)) == {"data": "rows.jsonl", "corpus": "c.txt"}
    assert dict(inputs({"drafter": "folder", "model": None})) == {"drafter": "folder"}
    assert [*inputs({"data": (Path("a"), "builtin:arithmetic", Path("b"))})] == [("data", "a"), ("data", "b")]


def test_every_kind_of_run_is_known():
    assert set(RUNS) == set(RECIPES)


def test_a_run_is_said_and_not_made(run, trained, tmp_path):
    out = tmp_path / "run"
    options = ("--model", "preset:tiny", "--data", trained / "rows.jsonl", "--out", out, "--steps", 5)
    status, said, _ = run("train", "sft", *options, "--dry-run")
    found = json.loads(said)
    rows = len((trained / "rows.jsonl").read_text().splitlines())
    assert (status, found["rows"], found["updates"], found["settings"]["settings"]["steps"]) == (0, rows, 5, 5)
    assert found["trained_parameters"] > 0
    assert not out.exists()


def test_settings_of_an_objective_are_said(run, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    options = ("--objective", "simpo", "--model", "preset:tiny", "--data", pairs, "--out", tmp_path / "run")
    status, said, _ = run("train", "preference", *options, "--ratio", "0.7", "--dry-run")
    found = json.loads(said)
    assert (status, found["rows"], found["settings"]["loss"]["ratio"]) == (0, 1, 0.7)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("eval lm --model nowhere --data nothing.jsonl", "eval lm: found no model nowhere; no data nothing.jsonl"),
        ("label steps --data nothing.jsonl --out labels.jsonl", "label steps: found no data nothing.jsonl"),
        ("generate --model nowhere --prompt x --drafter gone", "generate: found no model nowhere; no drafter gone"),
        ("train resume gone", "train resume: found no folder gone"),
        ("convert nowhere there", "convert: found no source nowhere"),
        ("train rl --model nowhere --data builtin:arithmetic --out o", "train rl: found no model nowhere"),
    ],
)
def test_what_is_not_there_is_named(run, command, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, said, err = run(*command.split(), "--dry-run")
    assert (status, said) == (1, "")
    assert named in err
    assert not [*tmp_path.iterdir()]


def test_misuse_is_still_misuse(run, capsys):
    status, _, err = run("eval", "lm", "--mdel", "x", "--dry-run")
    assert status == 2
    assert "--mdel" in err


@pytest.mark.optimizer
@pytest.mark.slow
def test_any_command_tells_its_result_as_json(run, trained, tmp_path):
    options = ("--model", "preset:tiny", "--data", trained / "rows.jsonl", "--steps", 2, "--batch.max-length", 64)
    status, said, err = run("train", "sft", *options, "--out", tmp_path / "run", "--json")
    found = json.loads(said)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert (status, found["status"], found["last"]) == (0, 0, records[-1])
    assert found["model"] == str(tmp_path / "run" / "model")
    assert "step 2: wrote" in err
    status, said, err = run("convert", tmp_path / "run" / "model", tmp_path / "again", "--json")
    found = json.loads(said)
    assert (found["command"], found["out"]) == ("jaxaroo convert", str(tmp_path / "again"))
    assert f"wrote {tmp_path / 'again'}" in err  # what it would print
    status, said, _ = run("info", tmp_path / "again", "--json")  # has its own
    assert json.loads(said)["architecture"]
    status, said, err = run("train", "sft", *options, "--out", tmp_path / "run", "--json")  # one that fails
    assert (status, said) == (1, "")
    assert "holds a run" in err
