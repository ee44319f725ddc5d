"""The commands as they are typed: settings reach the run, results are printed, errors and stops have their status."""

import json
import signal

import pytest
import tyro

from jaxaroo.cli import vision
from jaxaroo.cli.vision import SUMMARIES, vision_command
from jaxaroo.train import vision as runs
from jaxaroo.train.data.images import AugmentConfig
from jaxaroo.train.run import Outcome


def call(kind, *argv):
    return tyro.cli(vision_command(kind), args=[str(a) for a in argv])


@pytest.fixture
def asked(monkeypatch):
    """What a command would run; it answers that it was done, or what stands behind the list."""
    calls = []

    def run(kind, settings, options, *, progress):
        assert progress
        calls.append((kind, settings, options))
        for name, found in (("float", {"top1": 0.5}), ("joint", {"top1_8": 0.75, "top1_2": 0.25})):
            (settings.out / name).mkdir(parents=True)
            line = json.dumps({"step": 3, **found}) + "\n"
            (settings.out / name / "evaluation.jsonl").write_text(line)
        return calls[0] if isinstance(calls[0], Outcome) else Outcome(3, True, None)

    monkeypatch.setattr(runs, "run", run)
    return calls


def test_settings_reach_the_run_and_results_are_printed(asked, tmp_path, capsys):
    options = ("--alrs", "printed", "--kd", "fp", "--network.bits", 8, 4, "--optimizer.learning-rate", 0.25)
    argv = ("--data", tmp_path, "--out", tmp_path / "r", "--batch-size", 7, "--augment.no-flip", *options)
    assert call("resnet20", *argv) == 0
    [(kind, settings, found)] = asked
    assert kind == "resnet20"
    assert (settings.data, settings.out, settings.batch_size) == (tmp_path, tmp_path / "r", 7)
    assert settings.augment == AugmentConfig(flip=False)
    assert (found.alrs, found.kd, found.network.bits, found.optimizer.learning_rate) == ("printed", "fp", (8, 4), 0.25)
    assert (found.optimizer.weight_decay, found.optimizer.clip_norm) == (5e-5, None)  # ours, not the optimiser's own
    out = capsys.readouterr()
    assert out.out.splitlines() == [
        "float: right of the test images: top1 0.5000",
        "joint: right of the test images: 8 0.7500, 2 0.2500",
    ]
    assert f"wrote {tmp_path / 'r' / 'joint' / 'model'}" in out.err


def test_ghostnet_has_options_of_its_own(asked, tmp_path):
    argv = ("--data", tmp_path, "--out", tmp_path / "r", "--teacher", tmp_path / "t", "--network.width", 0.5)
    assert call("ghostnet", *argv) == 0
    [(kind, _, found)] = asked
    assert (kind, found.teacher, found.network.width, found.smoothing) == ("ghostnet", tmp_path / "t", 0.5, 0.1)


def test_a_stop_has_the_status_of_its_signal(asked, tmp_path, capsys):
    asked.append(Outcome(2, False, signal.SIGINT))
    assert call("resnet20", "--data", tmp_path, "--out", tmp_path / "r") == 130
    assert f"stopped at step 2; go on with the same command, jaxaroo train resnet20 ... --out {tmp_path / 'r'}" in (
        capsys.readouterr().err
    )


@pytest.mark.errors
def test_missing_data_are_told_of(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no data_batch_1\.bin"):
        call("resnet20", "--data", tmp_path, "--out", tmp_path / "r")
    with pytest.raises(SystemExit):
        call("ghostnet", "--data", tmp_path)  # and no --out


def test_help_says_what_the_list_of_commands_says(capsys):
    for kind, summary in SUMMARIES.items():
        command = getattr(vision, f"train_{kind}")
        assert command.__doc__ == summary == vision_command(kind).__doc__.splitlines()[0]
