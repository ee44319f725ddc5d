"""Both halves, as short as they go."""

import shutil

import pytest


@pytest.mark.optimizer
def test_quickstart_trains_writes_loads_and_speaks(run, tmp_path):
    out_dir = tmp_path / "out"
    status, out, err = run("quickstart", "--out", out_dir, "--seconds", 2, "--steps", 3)
    assert status == 0
    assert out.startswith("There was movement")
    assert len(out) > 30
    assert "nats a byte" in err
    assert "how many" in out
    assert "config.yaml" in {p.name for p in (out_dir / "arithmetic").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (out_dir / "checkpoint").iterdir()
    }
    shutil.copy(out_dir / "checkpoint/config.json", out_dir / "notes.txt")
    assert run("quickstart", "--out", out_dir, "--seconds", 2)[0] == 1  # other files are not to be mixed up
