"""How failures are told, and where compiled programs are kept."""

import os

import pytest

from jaxaroo.cli.main import CACHE_VARIABLE


def test_an_interrupt_ends_with_130(run, speaking, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxaroo.models.hf.load_master", interrupted)
    status, _, err = run("generate", "--model", speaking, "--prompt", "a")
    assert (status, err.strip()) == (130, "jaxaroo: interrupted")


@pytest.mark.parametrize("folder", [None, "elsewhere", ""])
def test_programs_are_kept_in_a_folder_of_their_own_unless_the_environment_says_where(
    folder, run, monkeypatch, tmp_path
):
    shortest = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(shortest, raising=False)
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    if folder is not None:
        monkeypatch.setenv(CACHE_VARIABLE, folder)
    assert run("info")[0] == 2  # no model is named: a command that needs no JAX
    own = (str(tmp_path / "jaxaroo" / "xla"), "0.1")
    assert (os.environ[CACHE_VARIABLE], os.environ.get(shortest)) == (own if folder is None else (folder, None))
