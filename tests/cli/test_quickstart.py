"""The whole story, as short as it goes; that it goes on where it was; and what it will not mix up."""

import dataclasses
import json

import pytest

from jaxaroo.cli import stages


@pytest.mark.optimizer
@pytest.mark.slow
def test_a_stage_runs_and_ends_in_a_page(run, tmp_path, monkeypatch):
    out_dir = tmp_path / "out"
    monkeypatch.setattr(stages, "SMOKE", dataclasses.replace(stages.SMOKE, policy=3, strong=4))
    status, _, err = run("quickstart", "--out", out_dir, "--smoke", "--only", "policies")
    assert status == 0, err
    assert f"wrote {out_dir / 'report.html'}" in err
    done = stages.read_done(out_dir)
    assert [one.command.split()[1:3] for one in done] == [["train", "sft"]] * 2 + [["eval", "answers"]] * 2
    assert json.loads(done[2].said)["n"] == stages.SMOKE.asked
    assert (out_dir / "policy" / "model" / "config.json").exists()
    assert (out_dir / "strong" / "loss.png").stat().st_size > 1000


@pytest.mark.optimizer
@pytest.mark.proof
def test_the_whole_of_it(run, tmp_path):
    """Twenty-eight commands, among them all kinds of training that the page tells of."""
    status, _, err = run("quickstart", "--out", tmp_path / "out", "--smoke")
    assert status == 0, err
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<h2>") == 5
    assert run("quickstart", "--out", tmp_path / "out", "--smoke")[0] == 0
    assert len(stages.read_done(tmp_path / "out")) == 28


def test_a_stop_says_how_to_go_on_and_another_way_of_beginning_is_refused(run, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "run", stop)
    status, _, err = run("quickstart", "--out", tmp_path / "out", "--smoke")
    assert status == 130
    assert f"the same command goes on: jaxaroo quickstart --out {tmp_path / 'out'} --smoke" in err
    status, _, err = run("quickstart", "--out", tmp_path / "out")
    assert (status, "was begun with --smoke" in err) == (2, True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    status, _, err = run("quickstart", "--out", tmp_path / "other")
    assert (status, "holds other files; expected a new folder" in err) == (1, True)
    monkeypatch.setattr(stages, "run", lambda *args: 7)
    assert run("quickstart", "--out", tmp_path / "third", "--smoke")[0] == 7
