"""Lines that can be read again after any end, and a curve."""

import json

import numpy as np
import pytest

from jaxaroo.train.metrics import append_records, forget_after, plot_loss, read_records


def line(step, loss=1.0):
    return {"step": step, "loss": loss, "learning_rate": 0.1}


def test_lines_come_back(tmp_path):
    path = tmp_path / "m.jsonl"
    append_records(path, [line(1), line(2, float("nan"))])
    append_records(path, [line(3, float("inf"))])
    assert [(r["step"], r["loss"]) for r in read_records(path)] == [(1, 1.0), (2, None), (3, None)]
    for text in path.read_text().splitlines():
        json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON
    assert read_records(tmp_path / "none.jsonl") == []


def test_half_a_line_is_no_line_and_steps_to_come_are_forgotten(tmp_path):
    path = tmp_path / "m.jsonl"
    append_records(path, [line(i) for i in range(1, 8)])
    path.write_bytes(path.read_bytes() + b'{"step": 8, "lo\xff')
    assert [r["step"] for r in read_records(path)] == list(range(1, 8))
    forget_after(path, 5)
    append_records(path, [line(6, 9.0)])
    assert [(r["step"], r["loss"]) for r in read_records(path)] == [(i, 1.0) for i in range(1, 6)] + [(6, 9.0)]
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]
    forget_after(tmp_path / "new.jsonl", 0)
    assert (tmp_path / "new.jsonl").read_text() == ""


def test_the_curve_is_a_picture_of_what_was_recorded(tmp_path):
    from matplotlib.image import imread

    records = [line(i, None if i == 7 else 5 / i) for i in range(1, 60)]
    plot_loss(tmp_path / "a.png", records, "a run")
    plot_loss(tmp_path / "b.png", records[:30], "a run")
    plot_loss(tmp_path / "none.png", [], "nothing yet")
    a, b = imread(tmp_path / "a.png"), imread(tmp_path / "b.png")
    assert a.shape == b.shape
    assert not np.array_equal(a, b)
    blue = (a[..., 2] > 0.6) & (a[..., 0] < 0.3)
    rows = np.nonzero(blue)[0]
    left = np.nonzero(blue[:, : a.shape[1] // 5])[0]
    assert left.mean() < rows.max() - 100  # it falls from the left
