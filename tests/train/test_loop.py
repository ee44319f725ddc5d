"""The loop counts, records, saves and stops; the step here only adds."""

import itertools
import signal
import types

import jax.numpy as jnp
import optax
import pytest

from jaxaroo.train import loop
from jaxaroo.train.loop import NotFiniteError, fit
from jaxaroo.train.state import init_state


def adding(state, window):
    row = (state.skipped_in_a_row + 1) * int(window == 0)  # 0 stands for a batch that cannot be learned
    state = state._replace(step=state.step + 1, params=state.params + window, skipped_in_a_row=row)
    return state, {"loss": jnp.float32(window), "inputs": jnp.int32(7), "skipped_in_a_row": row}


def start(step=0):
    return init_state(jnp.float32(0), optax.sgd(0.1))._replace(step=jnp.int32(step))


def run(windows, state=None, **settings):
    log, saved = [], []
    settings = {"steps": 25, "log": lambda r: log.append(r), "save": lambda s: saved.append(int(s.step)), **settings}
    state = fit(start() if state is None else state, adding, iter(windows), **settings)
    return state, log, saved


def test_every_step_sees_the_next_window_and_is_recorded():
    state, log, saved = run(itertools.count(1.0))
    assert (int(state.step), float(state.params)) == (25, 325)
    assert [len(records) for records in log] == [10, 10, 5]
    assert [(r["step"], r["loss"]) for records in log for r in records] == [(i, float(i)) for i in range(1, 26)]
    assert all(r["seconds"] > 0 and r["inputs"] == 7 for records in log for r in records)
    assert saved == [25]


def test_it_goes_on_from_the_step_of_the_state():
    state, log, saved = run(itertools.count(1.0), start(18), save_every=10)
    assert float(state.params) == sum(range(1, 8))
    assert [r["step"] for records in log for r in records] == list(range(19, 26))
    assert saved == [20, 25]
    assert run(itertools.count(1.0), start(25))[1:] == ([], [])


def test_the_first_step_of_all_is_looked_at_before_anything_is_written_down():
    seen, log = [], []
    run(itertools.count(1.0), check_start=seen.append)
    run(itertools.count(1.0), start(18), check_start=seen.append)
    assert [float(metrics["loss"]) for metrics in seen] == [1.0]

    def refuse(metrics):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run(itertools.count(1.0), check_start=refuse, log_every=1, save_every=1, log=log.append, save=log.append)
    assert not log


def test_what_is_saved_is_logged_first():
    order = []
    fit(
        start(),
        adding,
        itertools.count(1.0),
        steps=9,
        save_every=4,
        log=lambda records: order.append([r["step"] for r in records]),
        save=lambda state: order.append(int(state.step)),
    )
    assert order == [[1, 2, 3, 4], 4, [5, 6, 7, 8], 8, [9], 9]


def test_when_told_to_stop_it_logs_saves_and_leaves():
    asked = []
    state, log, saved = run(itertools.count(1.0), stop=lambda step: asked.append(step) or step == 13)
    assert int(state.step) == 13
    assert saved == [13]
    assert sum(map(len, log)) == 13
    assert asked == list(range(1, 14))


def test_too_many_bad_steps_in_a_row_end_the_run_without_a_save():
    windows = [1.0, 0.0, 0.0, 1.0, *[0.0] * 9]
    with pytest.raises(
        NotFiniteError, match=r"of 6 steps in a row, up to step 10, was not finite; expected less than 5"
    ):
        run(windows, max_skipped=5)
    saved = []
    with pytest.raises(NotFiniteError):
        run(windows, max_skipped=5, save_every=5, save=lambda s: saved.append(int(s.step)))
    assert saved == [5]
    assert int(run(windows[:12], steps=12, max_skipped=9)[0].step) == 12


def test_a_streak_between_two_logs_counts_as_well():
    with pytest.raises(NotFiniteError, match="of 6 steps in a row, up to step 8"):
        run([1.0, 1.0, *[0.0] * 6, *[1.0] * 20], max_skipped=5, log_every=20)


def test_windows_that_end_too_soon_are_an_error():
    with pytest.raises(ValueError, match="the windows end behind step 3; expected 25"):
        run([1.0] * 3)


def test_the_last_bad_step_that_is_too_much_ends_it_and_is_written_down_first():
    windows, log = [1.0, *[0.0] * 5], []
    with pytest.raises(NotFiniteError, match="of 5 steps in a row, up to step 6"):
        run(windows, max_skipped=5, log_every=2, log=log.extend)
    assert [r["loss"] for r in log] == windows
    assert int(run(windows[:5], steps=5, max_skipped=5)[0].step) == 5


def test_seconds_are_a_mean_since_the_last_log_and_the_bar_shows_the_rate(monkeypatch):
    now, shown, log = [100.0], [], []

    class Bar:
        def __init__(self, **settings):
            assert (settings["total"], settings["initial"]) == (5, 0)
            self.update, self.set_postfix = lambda: None, shown.append

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    def slow(state, window):
        now[0] += window
        return adding(state, window)

    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(loop, "tqdm", Bar)
    fit(start(), slow, iter([0.5, 1.5, 3.0, 4.0, 7.0]), steps=5, log_every=2, log=log.extend)
    assert [r["seconds"] for r in log] == [1.0, 1.0, 3.5, 3.5, 7.0]
    assert shown == [
        {"loss": "1.5000", "tokens/s": "7"},
        {"loss": "4.0000", "tokens/s": "2"},
        {"loss": "7.0000", "tokens/s": "1"},
    ]


def test_ctrl_c_between_steps_passes_through():
    def interrupting():
        yield from [1.0] * 3
        signal.raise_signal(signal.SIGINT)
        yield 1.0

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite run in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(interrupting())
    finally:
        signal.signal(signal.SIGINT, before)


def test_no_bar_in_a_log_file(capsys):
    fit(start(), adding, itertools.count(1.0), steps=3, progress=True)
    assert "train" not in capsys.readouterr().err
