"""Lines that can be read again after any end, and a curve."""

import contextlib
import json

import numpy as np
import pytest

from jaxaroo.train import metrics
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


def test_what_is_no_record_is_left_out_and_an_older_attempt_to_forget_leaves_nothing(tmp_path):
    path = tmp_path / "m.jsonl"
    append_records(path, [line(1), line(2)])
    with path.open("a") as file:
        file.write('3\n{"loss": 1}\n{"step": null}\n\n[1]\n')
    append_records(path, [line(3)])
    append_records(tmp_path / "m.partial", [line(9)])  # what a killed process left
    assert [r["step"] for r in read_records(path)] == [1, 2, 3]
    forget_after(path, 9)
    assert [r["step"] for r in read_records(path)] == [1, 2, 3]


def test_the_curve_holds_each_step_the_median_of_those_behind_it_and_the_rate(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **settings: figures.append(self))
    loss = np.random.default_rng(0).normal(size=100).tolist()
    plot_loss(tmp_path / "a.png", [line(i, x) for i, x in enumerate(loss)], "a run")
    (each, median), (rate,) = (axes.lines for axes in figures[0].axes)
    np.testing.assert_array_equal(each.get_ydata(), loss)
    np.testing.assert_array_equal(median.get_ydata()[4:], [np.median(loss[i - 4 : i + 1]) for i in range(4, 100)])
    np.testing.assert_array_equal(rate.get_ydata(), [0.1] * 100)
    assert metrics._running_median(loss[:3]) == loss[:3]


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


def test_a_recorder_forgets_steps_to_come_and_tells_the_board(tmp_path):
    said, closed = [], []

    class Board:
        def __init__(self, folder, purge_step):
            said.append((folder, purge_step))
            self.add_scalar = lambda *scalar: said.append(scalar)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            closed.append(0)

    append_records(tmp_path / "metrics.jsonl", [line(i) for i in range(1, 6)])
    with contextlib.ExitStack() as stack:
        record = metrics.recorder(tmp_path, 3, Board, stack)
        record([{"step": 4, "loss": 9.0}])
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert (said, closed) == ([(str(tmp_path / "tensorboard"), 3), ("loss", 9.0, 4)], [0])
    with contextlib.ExitStack() as stack:
        metrics.recorder(tmp_path, 9, None, stack)([{"step": 10, "loss": 1.0}])
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 10]
