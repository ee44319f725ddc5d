"""`jaxaroo plan`."""

import dataclasses
import json
import re
import subprocess
from typing import get_args

import pytest

from jaxaroo.cli import plan as module


@pytest.fixture(autouse=True)
def own_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.aot
@pytest.mark.optimizer
def test_a_step_is_accounted_for_and_remembered(run, libtpu, monkeypatch, tmp_path):
    ask = ("plan", "sft", "--model", "preset:tiny", "--topology", "v5e:2x2", "--mesh", "fsdp=2,tensor=2", "--seq", 64)
    status, out, err = run(*ask)
    assert status == 0, err
    assert "sft of preset:tiny on v5e:2x2, 4 devices, fsdp=2,tensor=2" in out
    assert re.search(r"fits: 0\.\d\d of 15\.75 GiB a device", out)
    assert re.search(r"at best .* s a step, by (products|memory|links)", out)
    assert "remembered" not in out
    monkeypatch.setattr(module, "_compile", lambda *_: pytest.fail("compiled again"))
    status, again, _ = run(*ask)
    assert status == 0
    assert again == out[:-1] + ", remembered\n"
    facts = json.loads(run(*ask, "--json")[1])
    assert facts[0]["fits"]
    assert facts[0]["request"]["mesh"] == "fsdp=2,tensor=2"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    [path] = (tmp_path / "jaxaroo" / "plans").glob("*.json")
    path.write_text(path.read_text()[:40])  # a process was killed
    assert run(*ask)[:2] != (0, again)
    assert json.loads(path.read_text())["fits"]


def pretended(request, kept):
    """A compiler that lets a step fit which computes everything twice, in four parts."""
    fits = request.remat == "full" and request.micro_batches >= 4 and "tensor=1" not in request.mesh
    limits = dict(products=2.0, memory=1.0, links={}, seconds=2.0, bound_by="products", most_utilisation=0.5)
    found = dict(fits=fits, said="", available=16 << 30, total=(8 if fits else 32) << 30, arguments={"parameters": 1})
    found |= dict(temporaries=1, open_loops=0, flops=1e12, collectives={}, seconds_to_compile=1.0, devices=4, tokens=8)
    return found | (dict(bounds=limits, seconds=2.0) if fits else dict(bounds=None))


def test_what_does_not_fit_is_refused_with_the_smallest_change_that_does(run, libtpu, monkeypatch):
    monkeypatch.setattr(module, "_compile", pretended)
    ask = ["plan", "sft", "--model", "preset:tiny", "--topology", "v5e:2x2", "--batch", 16, "--seq", 64]
    status, out, err = run(*ask)
    assert status == 0
    assert "DOES NOT FIT: 32.00 of 16.00 GiB" in out
    assert re.findall("trying (.*)", err) == [
        "--remat dots", "--remat full", "--micro-batches 2 --remat full", "--micro-batches 4 --remat full"
    ]  # fmt: skip
    advice = re.search(r"it fits with (.*?): 8\.00 of 16\.00 GiB, at best 2 s a step", out)
    assert advice
    status, out, _ = run(*ask, *advice[1].split())
    assert (status, "fits: 8.00 of" in out, "remembered" in out) == (0, True, True)
    status, out, _ = run(*ask, "--tries", 2)
    assert status == 1
    assert "none of 2 other settings fits; the least is 32.00 GiB" in out


@pytest.mark.aot
@pytest.mark.optimizer
def test_the_compiler_says_what_does_not_fit_and_searched_meshes_are_ranked(run, libtpu):
    ask = ("--model", "preset:llama3-8b", "--topology", "v5e:1x1", "--batch", 1, "--seq", 128, "--tries", 0)
    status, out, _ = run("plan", "sft", *ask)
    assert status == 1
    assert "DOES NOT FIT" in out
    ask = ("--model", "preset:tiny", "--topology", "v5e:2x2", "--mesh", "fsdp=4", "--batch", 4, "--seq", 256)
    status, out, _ = run("plan", "decode", *ask, "--search")
    assert status == 0
    rows = [line.split() for line in out.splitlines()[1:]]
    assert sorted(row[0] for row in rows) == ["fsdp=2,tensor=2", "fsdp=4"]
    assert [float(row[2]) for row in rows] == sorted(float(row[2]) for row in rows)


def test_meshes_that_cut_rows_come_last_and_never_of_a_cache(libtpu):
    ask = module.Request(what="sft", model="preset:tiny", topology="v5e:2x2", mesh="fsdp=2,tensor=2", seq=64)
    assert [r.mesh for r in module.other_meshes(ask)] == [
        "fsdp=4,tensor=1",
        "fsdp=1,tensor=2,sequence=2",
        "fsdp=2,tensor=1,sequence=2",
        "fsdp=1,tensor=1,sequence=4",
    ]
    assert [r.mesh for r in module.other_meshes(dataclasses.replace(ask, seq=63))] == ["fsdp=4,tensor=1"]
    assert [r.mesh for r in module.other_meshes(dataclasses.replace(ask, what="decode"))] == ["fsdp=4,tensor=1"]


@pytest.mark.aot
@pytest.mark.slow
def test_a_whole_step_of_speculative_decoding_is_asked_for_by_its_drafter(run, libtpu):
    ask = ("plan", "decode", "--model", "preset:tiny", "--topology", "v5e:1x1", "--batch", 2, "--seq", 256)
    status, out, err = run(*ask, "--drafter", "kangaroo")
    assert status == 0, err
    assert out.startswith("decode (kangaroo) of preset:tiny")
    assert re.search(r"\n  drafter +0\.\d+ GiB", out)
    assert "loops run as long as the data say, and are counted once" in out
    status, _, err = run(*ask, "--drafter", "kangaroo", "--nodes", 8)
    assert (status, "--drafter with --nodes or --bits; expected one of them" in err) == (2, True)


def test_all_kinds_that_can_be_planned_can_be_asked_for():
    from jaxaroo.train.plan import KINDS

    assert {*get_args(module.What)} == {*KINDS, "rl", "decode"}


def test_a_plan_that_cannot_be_remembered_is_told_all_the_same(run, libtpu, monkeypatch, tmp_path, caplog):
    (tmp_path / "jaxaroo").write_text("a file where the folder should be")
    monkeypatch.setattr(module, "_compile", pretended)
    status, out, _ = run("plan", "sft", "--model", "preset:tiny", "--topology", "v5e:2x2", "--tries", 0)
    assert status == 1
    assert "DOES NOT FIT" in out
    assert "plan: not remembered: " in caplog.text


@pytest.mark.errors
@pytest.mark.parametrize(("status", "said"), [(-9, "status -9 and without an answer: killed"), (1, "see above")])
def test_a_compiler_that_dies_is_told(run, libtpu, monkeypatch, status, said):
    dead = lambda *_, **__: subprocess.CompletedProcess([], status, stdout="a library says hello\n")
    monkeypatch.setattr(module.subprocess, "run", dead)
    found, _, err = run("plan", "sft", "--model", "preset:tiny", "--topology", "v5e:2x2", "--mesh", "fsdp=4")
    assert (found, said in err) == (1, True), err


@pytest.mark.errors
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--mesh", "tensr=2"), "--mesh tensr=2: no axis tensr; expected data, fsdp, tensor or sequence"),
        (("--mesh", "fsdp"), "--mesh fsdp: expected sizes by axis, such as fsdp=16,tensor=4"),
        (("--topology", "v3:2x2"), "topology 'v3:2x2'; expected one such as v5e:4x4"),
        (("--topology", "v5e:3x5"), "devices_of: 'v5e:3x5' is not known to the compiler"),
        (("--mesh", "fsdp=3"), "the sizes multiply to 3, expected 4"),
        (("--batch", 6), "6 rows of a micro-batch on the parts data=1 x fsdp=4 = 4"),
        (("--model", "preset:tiney"), "Did you mean 'tiny'"),
    ],
)
def test_what_cannot_be_is_said(run, libtpu, wrong, said):
    given = {"--model": "preset:tiny", "--topology": "v5e:2x2"} | {wrong[0]: wrong[1]}
    status, _, err = run("plan", "sft", *(x for pair in given.items() for x in pair))
    assert status in (1, 2)
    assert said in err
