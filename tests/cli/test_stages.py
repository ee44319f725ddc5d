"""Stages as lists of commands: what is done is not done again, and what fails ends all."""

import json
import sys
from pathlib import Path

import pytest

from jaxaroo.cli.stages import SMOKE, Ran, Sizes, Stage, read_done, run, stages, typed

ALL = (Stage("a", "First", (("one", "--x", "a b"), ("two",))), Stage("b", "Second", (("one", "--x", "a b"),)))


def recorded(out, fail=None):
    """Runs commands that say their number; the one named fails."""
    seen = []

    def call(args):
        seen.append(args[0])
        sys.stdout.write(f"said {len(seen)}\n")
        return 3 if args[0] == fail else 0

    return seen, lambda only=ALL: run(only, out, call)


def test_commands_run_in_order_and_what_they_say_is_kept(tmp_path, capsys):
    seen, go = recorded(tmp_path)
    assert go() == 0
    assert seen == ["one", "two", "one"]  # the same command of another stage is another
    told = capsys.readouterr()
    assert told.out == ""
    assert "[2/3] First, 0 s so far, about 0 min to go\n$ jaxaroo two\n" in told.err
    assert [(r.stage, r.command, r.said) for r in read_done(tmp_path)] == [
        ("a", "jaxaroo one --x 'a b'", "said 1\n"),
        ("a", "jaxaroo two", "said 2\n"),
        ("b", "jaxaroo one --x 'a b'", "said 3\n"),
    ]
    assert go() == 0
    assert seen == ["one", "two", "one"]


def test_a_command_that_fails_ends_all_and_is_the_first_the_next_time(tmp_path):
    seen, go = recorded(tmp_path, fail="two")
    assert go() == 3
    assert seen == ["one", "two"]
    with (tmp_path / "stages.jsonl").open("a") as file:  # of a process that was killed
        file.write('{"stage": "a", "comm')
    seen, go = recorded(tmp_path)
    assert go() == 0
    assert seen == ["two", "one"]
    assert len(read_done(tmp_path)) == 3


def test_what_is_left_is_told_by_what_was_spent(tmp_path, capsys):
    """By hand: of the usual seconds 70 are done, in 140 s; 70 and 22 are left, twice as slow: 184 s."""
    sft, prm = ("train", "sft", "--out", str(tmp_path / "run")), ("train", "prm", "--out", str(tmp_path / "prm"))
    all_stages = (Stage("a", "First", (sft, ("train", "sft"), prm)),)
    record = {"stage": "a", "command": typed(sft), "seconds": 140.0, "said": ""}
    (tmp_path / "stages.jsonl").write_text(json.dumps(record) + "\n")

    def call(args):
        if args[1] == "prm":
            (tmp_path / "prm").mkdir()
            (tmp_path / "prm" / "metrics.jsonl").write_text('{"loss": 3.0}\n{"loss": 0.51234}\n')
        else:
            sys.stdout.write(json.dumps({"accuracy": 0.25}))
        return 0

    assert run(all_stages, tmp_path, call) == 0
    told = capsys.readouterr().err
    assert "[2/3] First, 140 s so far, about 3 min to go\n" in told
    assert "0 s, accuracy 0.25\n" in told
    assert "0 s, loss 0.5123\n" in told


@pytest.mark.parametrize(
    ("said", "word"),
    [('{"accuracy": 0.5}', ", accuracy 0.5"), ('{"auroc": {"min": 0.5}}', ""), ('{"kept": 3}', ", kept 3"), ("[]", "")],
)
def test_a_word_is_made_of_numbers_alone(said, word, tmp_path, capsys):
    all_stages = (Stage("a", "First", (("eval",),)),)
    assert run(all_stages, tmp_path, lambda args: sys.stdout.write(said) and 0) == 0
    assert f"\n0 s{word}\n" in capsys.readouterr().err


def test_nothing_is_done_in_a_new_folder(tmp_path):
    assert read_done(tmp_path) == []
    assert typed(["a", Path("b c"), 1]) == "jaxaroo a 'b c' 1"


@pytest.mark.parametrize("sizes", [Sizes(), SMOKE])
def test_every_stage_reads_what_one_before_it_wrote(sizes):
    """By the paths in its commands: those behind --out, and the models in runs' folders."""
    out, written = Path("/q"), {"/q/questions.jsonl"}
    for stage in stages(out, sizes):
        for args in stage.commands:
            target = args[args.index("--out") + 1] if "--out" in args else None
            for arg in args:
                if arg.startswith("/q/") and arg != target:
                    assert arg.removesuffix("/model") in written, (stage.name, arg)
            written |= {target}
    assert json.dumps([stage._asdict() for stage in stages(out, sizes)])
    assert Ran("a", "b", 1.0, "c")._fields == ("stage", "command", "seconds", "said")
