"""Notebooks run from their first cell to their last, in miniature, and keep what a real run of theirs showed."""

import os
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
nbformat = pytest.importorskip("nbformat", reason='needs the extra `dev`: pip install "jaxaroo[dev]"')


LONG = {"1_story"}  # a quick start in miniature, four minutes; tests/cli/test_quickstart.py has its first stage


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=pytest.mark.proof if p.stem in LONG else (), id=p.stem) for p in NOTEBOOKS]
)
def test_it_runs_in_miniature(path, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("JAXAROO_SMOKE", "1")
    monkeypatch.setenv("JAXAROO_WORK", str(tmp_path))
    one_device = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    monkeypatch.setenv("XLA_FLAGS", one_device)  # as on the machines they are for
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / ".ipython"))
    NotebookClient(nbformat.read(path, as_version=4), timeout=600, kernel_name="python3").execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_shows_what_a_run_showed(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not re.search(r"/(tmp|root|home|work)/", path.read_text(encoding="utf-8"))  # of one machine


def test_there_are_some():
    assert len(NOTEBOOKS) == 7
