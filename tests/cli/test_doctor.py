"""`jaxaroo doctor`: nothing is wrong here; and each thing that can be is said, with what mends it."""

import importlib.metadata
import json
import os
import sys
from types import SimpleNamespace

import jax
import pytest

from jaxaroo.cli import doctor as module
from jaxaroo.cli.doctor import EXTRAS


def findings(run):
    status, out, _ = run("doctor", "--json")
    return status, {one["name"]: one for one in json.loads(out)}


def test_what_is_here_is_said_and_nothing_is_wrong(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    status, out, _ = run("doctor")
    assert status == 0, out
    assert "all is well" in out
    assert f"ok    jax                      {jax.__version__}" in out
    status, found = findings(run)
    assert status == 0
    asked = {name for name in found if name.startswith("device ")}
    assert len(asked) == len(jax.local_devices())
    assert "for a first product" in found["device 0"]["found"]
    assert {f"extra {name}" for name in EXTRAS} <= found.keys()
    assert "of" in found["memory"]["found"]
    assert found["compiled programs"]["found"].startswith(str(tmp_path / "jaxaroo"))


@pytest.mark.parametrize(
    ("package", "version", "said"),
    [("tyro", "0.1", "0.1; expected <2,>=1.0.0"), ("grain", None, "not installed; expected <0.3,>=0.2.18")],
)
def test_a_package_that_is_too_old_or_missing_is_wrong_and_its_fix_a_command(run, monkeypatch, package, version, said):
    real = importlib.metadata.version

    def pretended(name):
        if name != package:
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", pretended)
    status, found = findings(run)
    assert status == 1
    assert (found[package]["state"], found[package]["found"]) == ("wrong", said)
    bounds = said.partition("expected ")[2]
    assert found[package]["fix"] == f'{sys.executable} -m pip install "{package}{bounds}"'
    assert f"1 things are wrong: {package}" in run("doctor")[1]


def test_an_extra_that_is_not_there_is_no_fault(run, monkeypatch):
    monkeypatch.setattr(module, "EXTRAS", {"made-up": ("no-such-package", "nothing")})
    status, found = findings(run)
    assert status == 0
    assert found["extra made-up"]["state"] == "note"
    assert found["extra made-up"]["fix"].endswith('pip install "jaxaroo[made-up]"')


def test_accelerators_that_jax_does_not_see_are_found_by_their_files(tmp_path):
    assert [*module._unseen(tmp_path)] == []
    for file in ("proc/driver/nvidia/version", "dev/accel0"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    found = [*module._unseen(tmp_path)]
    assert [(one.name, one.state) for one in found] == [("NVIDIA GPU", "wrong"), ("TPU", "wrong")]
    assert ["jaxaroo[cuda]" in found[0].fix, "jaxaroo[tpu]" in found[1].fix] == [True, True]
    (tmp_path / "dev/accel0").unlink()
    (tmp_path / "dev/vfio").mkdir()
    (tmp_path / "dev/vfio/0").touch()
    assert [one.name for one in module._unseen(tmp_path)] == ["NVIDIA GPU", "TPU"]


def test_a_device_that_fails_and_one_that_miscounts_are_wrong(run, monkeypatch):
    def fails(x, device):
        raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: all of it is taken\nmore")

    with monkeypatch.context() as now:
        now.setattr(jax, "device_put", fails)
        found = [*module._devices()]
    assert {one.state for one in found} == {"wrong"}
    assert found[0].found.endswith("RuntimeError: CUDA_ERROR_OUT_OF_MEMORY: all of it is taken")
    with monkeypatch.context() as now:
        now.setattr(jax, "device_put", lambda x, device: 2 * x)
        found = [*module._devices()]
    assert found[0].found.endswith("a product came out wrong")

    def none():
        raise RuntimeError("Unknown backend: 'tpus'")

    monkeypatch.setattr(jax, "local_devices", none)
    monkeypatch.setenv("JAX_PLATFORMS", "tpus")
    [one] = module._devices()
    assert (one.state, "JAX_PLATFORMS is 'tpus'" in one.fix) == ("wrong", True)


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written_is_wrong(tmp_path, monkeypatch):
    tmp_path.chmod(0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert [one.state for one in module._folders()] == ["wrong", "ok"]


def test_a_cache_that_is_a_file_and_a_full_disk_are_wrong(tmp_path, monkeypatch):
    (tmp_path / "jaxaroo").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache, _ = module._folders()
    assert (cache.state, cache.fix) == ("wrong", "set XDG_CACHE_HOME to a folder that can be")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert [one.state for one in module._folders()] == ["wrong", "wrong"]
