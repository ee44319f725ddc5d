"""Accounts of runs that are made up, added up by hand; and of a loop whose parts take a known time."""

import time

import jax.numpy as jnp
import pytest

from jaxaroo.train.goodput import goodput, recorder, told
from jaxaroo.train.loop import fit
from jaxaroo.train.metrics import read_records


def line(begun, now, step, **seconds):
    parts = dict.fromkeys(("start", "compile", "data", "evaluate", "save"), 0.0) | seconds
    return {"begun": begun, "now": now, "step": step, "from": 0} | {f"seconds/{k}": v for k, v in parts.items()}


def test_the_last_line_of_a_session_counts_and_gaps_are_between_sessions():
    """100 s, then 50 s in which the run was gone or did what was lost, then 50 s: 120 of 200 s made steps."""
    first = [line(1000, 1050, 5, start=10.0, compile=5.0), line(1000, 1100, 10, start=10.0, compile=5.0, save=5.0)]
    second = [line(1150, 1200, 20, start=4.0, data=6.0)]
    found = goodput([*first, *second])
    assert (found["sessions"], found["steps"], found["seconds"]) == (2, 20, 200)
    want = {"steps": 0.6, "start": 0.07, "compile": 0.025, "data": 0.03, "evaluate": 0.0, "save": 0.025}
    assert found["share"] == pytest.approx(want | {"between sessions": 0.25})
    assert sum(found["share"].values()) == pytest.approx(1)
    assert goodput([]) == {}


def test_a_line_says_what_a_run_did(tmp_path):
    path = tmp_path / "goodput.jsonl"
    assert told(path) == ""
    write = recorder(path, time.time() - 3, 7)
    write(9, {"compile": 1.0, "data": 0.25})
    [record] = read_records(path)
    assert (record["step"], record["from"], record["seconds/compile"], record["seconds/save"]) == (9, 7, 1.0, 0.0)
    assert 3 <= record["seconds/start"] < 10
    assert record["now"] - record["begun"] >= 3
    assert told(path).startswith("3 s in 1 start: ")
    assert "compile 3" in told(path)


def test_the_loop_counts_what_makes_no_steps():
    """Sleeps are at least as long as they say; a step is not counted, but for the first, which compiles."""

    class State:
        def __init__(self, step):
            self.step = step

    def step(state, window):
        time.sleep(0.2 if state.step == 0 else 0.05)
        return State(state.step + 1), {"loss": jnp.float32(1), "skipped_in_a_row": jnp.int32(0)}

    def windows():
        while True:
            time.sleep(0.1)
            yield 0

    lines = []
    fit(
        State(0), step, windows(), steps=4, save_every=2, save=lambda state: time.sleep(0.15),
        evaluate=lambda state: time.sleep(0.12), evaluate_every=4,
        account=lambda done, seconds: lines.append((done, dict(seconds))),
    )  # fmt: skip
    assert [done for done, _ in lines] == [2, 4]
    half, whole = (seconds for _, seconds in lines)
    least = {"compile": 0.2, "data": 0.2, "evaluate": 0.0, "save": 0.15}
    assert all(half[name] >= seconds for name, seconds in least.items())
    assert half["evaluate"] == 0
    assert whole["compile"] == half["compile"]
    assert all(whole[name] >= seconds for name, seconds in {"data": 0.4, "evaluate": 0.12, "save": 0.3}.items())
