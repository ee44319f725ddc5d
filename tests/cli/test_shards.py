"""Jobs in parts: what is put together is what one process would have written, to the byte."""

import json

import pytest

from jaxaroo.cli.output import UsageError
from jaxaroo.cli.shards import Shard, shard_of
from tests.cli.test_label import policy, sample  # noqa: F401  (a fixture)


def test_parts_are_contiguous_and_together_all():
    for size in (0, 1, 5, 8, 23):
        for count in (1, 2, 3, 8):
            parts = [Shard(i, count).of(list(range(size))) for i in range(count)]
            assert [x for part in parts for x in part] == list(range(size))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_part_is_named_or_found_in_the_environment():
    assert shard_of(None) is None
    assert shard_of("2/8") == Shard(2, 8)
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}
    assert shard_of("auto", slurm) == Shard(3, 4)
    assert shard_of("auto", slurm | {"JAXAROO_PROCESS_ID": "0", "JAXAROO_NUM_PROCESSES": "2"}) == Shard(0, 2)
    for bad, message in {
        "8/8": "--shard 8/8: expected INDEX/COUNT with an index from 0 below the count",
        "two": "--shard two: expected",
        "-1/2": "--shard -1/2: expected",
    }.items():
        with pytest.raises(UsageError, match=message):
            shard_of(bad, {})
    with pytest.raises(UsageError, match="--shard auto: found none of JAXAROO_PROCESS_ID and"):
        shard_of("auto", {"SLURM_PROCID": "3"})
    with pytest.raises(UsageError, match=r"--shard auto \(4/4\): expected"):
        shard_of("auto", slurm | {"SLURM_PROCID": "4"})


@pytest.mark.slow
def test_parts_of_sampling_and_labelling_are_the_whole_to_the_byte(run, policy, tmp_path, monkeypatch):  # noqa: F811
    whole, out = tmp_path / "whole.jsonl", tmp_path / "parts" / "rows.jsonl"
    out.parent.mkdir()
    assert sample(run, policy, whole, "--limit", 5)[0] == 0
    for i in (2, 0):
        assert sample(run, policy, out, "--limit", 5, "--shard", f"{i}/3")[0] == 0
    unfinished = out.with_name("rows-00001-of-00003.unfinished.jsonl")
    unfinished.write_text(whole.read_text().splitlines()[2] + "\n" + whole.read_text().splitlines()[3] + "\n{half")
    status, _, err = run("label", "merge", "--out", out)
    assert status == 1
    assert "1 of 3 parts" in err
    assert "are not whole: 1 (1 under way or stopped); expected all" in err
    assert not out.exists()
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "3")
    assert sample(run, policy, out, "--limit", 5, "--shard", "auto")[0] == 0  # goes on behind the last whole line
    assert not unfinished.exists()
    status, _, err = sample(run, policy, out, "--limit", 5, "--shard", "auto")
    assert (status, "is whole" in err) == (0, True)
    status, _, err = run("label", "merge", "--out", out)
    assert (status, "10 rows of 3 parts" in err) == (0, True)
    assert out.read_bytes() == whole.read_bytes()

    steps = ("label", "steps", "--data", whole, "--model", policy, "--n", 2, "--max-new-tokens", 4)
    assert run(*steps, "--out", tmp_path / "labels.jsonl")[0] == 0
    for i in range(2):
        assert run(*steps, "--out", tmp_path / "labelled.jsonl", "--shard", f"{i}/2")[0] == 0
    assert run("label", "merge", "--out", tmp_path / "labelled.jsonl", "--remove")[0] == 0
    assert (tmp_path / "labelled.jsonl").read_bytes() == (tmp_path / "labels.jsonl").read_bytes()
    assert not list(tmp_path.glob("labelled-?????-of-?????.jsonl"))
    assert any(row["labels"] for row in map(json.loads, (tmp_path / "labels.jsonl").read_text().splitlines()))


@pytest.mark.errors
def test_what_cannot_be_put_together_is_refused(run, tmp_path):
    out = tmp_path / "[rows].jsonl"
    status, _, err = run("label", "merge", "--out", out)
    assert (status, "found no part of" in err) == (1, True)
    for shard in (Shard(0, 2), Shard(0, 3)):
        shard.path(out).write_text("{}\n")
    status, _, err = run("label", "merge", "--out", out)
    assert (status, "parts of jobs of 2, 3" in err) == (1, True)
    assert not out.exists()
