"""The loop counts, records and stops; the step here only adds."""

import itertools
import time

import jax.numpy as jnp

from jaxaroo.train.loop import fit
from jaxaroo.train.step import TrainState


def adding(state, batch):
    return state._replace(step=state.step + 1, params=state.params + batch), {"loss": jnp.float32(batch)}


def start():
    return TrainState(jnp.int32(0), jnp.float32(0), None)


def test_every_step_sees_the_next_batch_and_the_last_is_recorded():
    state, records = fit(start(), adding, itertools.count(1.0), steps=25, log_every=10)
    assert (int(state.step), float(state.params)) == (25, 325)
    assert records == [{"step": 10, "loss": 10.0}, {"step": 20, "loss": 20.0}, {"step": 25, "loss": 25.0}]


def test_it_stops_when_the_batches_or_the_time_run_out():
    state, records = fit(start(), adding, [1.0] * 3, steps=25)
    assert int(state.step) == 3
    assert [r["step"] for r in records] == [3]
    assert fit(start(), adding, [], steps=25)[1] == []

    def slow(state, batch):
        time.sleep(0.05)
        return adding(state, batch)

    state, records = fit(start(), slow, itertools.count(1.0), steps=1000, seconds=0.2, log_every=100)
    assert 0 < int(state.step) < 1000
    assert records[-1]["step"] == int(state.step)
