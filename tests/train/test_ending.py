"""Errors of the talk and runs that hang, in this process and in children; signals are tried by `test_run.py`."""

import subprocess
import sys
import time

import jax
import pytest

from jaxaroo.train.ending import LostProcessError, preempted, stop_signals, together, watched

AGAIN = "jaxaroo train resume somewhere/run"
GLOO = "UNKNOWN: Gloo all-reduce failed: Read error [127.0.0.1]:60291: Connection reset by peer\nmore"


def failing(message, monkeypatch, count):
    monkeypatch.setattr(jax, "process_count", lambda: count)
    with together(AGAIN):
        raise jax.errors.JaxRuntimeError(message)


def test_an_error_of_the_talk_says_what_it_means_and_what_to_do(monkeypatch, caplog):
    with pytest.raises(LostProcessError, match=r"process 0 of 2 cannot reach .*reset by peer\).* resume somewhere/run"):
        failing(GLOO, monkeypatch, 2)
    assert "process 0 of 2 cannot reach the others" in caplog.text  # before anything else is closed


@pytest.mark.parametrize(("message", "count"), [(GLOO, 1), ("RESOURCE_EXHAUSTED: Out of memory", 2)])
def test_other_errors_are_left_as_they_are(message, count, monkeypatch):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message.split(":")[0]):
        failing(message, monkeypatch, count)


def test_one_process_is_never_stopped_by_others_and_signals_are_put_back():
    assert not preempted(3)
    with stop_signals() as stopped, together(AGAIN):
        assert stopped() is None


def watch_in_a_child(body):
    code = f"""
import time
from jaxaroo.train.ending import watched

def a_collective_that_nobody_joins():
    time.sleep(60)

with watched(1.0, "jaxaroo train resume somewhere/run") as alive:
    {body}
print("done")
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_a_run_that_hangs_ends_with_its_stacks():
    found = watch_in_a_child("alive(); a_collective_that_nobody_joins()")
    assert found.returncode == 1
    assert "process 0 of 1 has done nothing for 1 s; expected a step" in found.stderr
    assert "in a_collective_that_nobody_joins" in found.stderr
    assert "jaxaroo train resume somewhere/run" in found.stderr


@pytest.mark.slow
def test_it_counts_from_the_first_thing_done_and_not_while_things_move():
    found = watch_in_a_child("time.sleep(2); [(alive(), time.sleep(0.3)) for _ in range(6)]")
    assert (found.returncode, found.stdout) == (0, "done\n"), found.stderr


def test_nothing_watches_where_nothing_is_asked_for():
    began = time.monotonic()
    with watched(0, AGAIN) as alive:
        alive()
    with watched(1000, AGAIN) as alive:
        alive()
    assert time.monotonic() - began < 100  # leaving does not wait
