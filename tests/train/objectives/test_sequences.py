"""Oracle: loops over the examples that went into a batch, one sequence at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.data.pipeline import BatchConfig, Batches
from jaxaroo.train.data.tokenise import Encoded
from jaxaroo.train.objectives.logprobs import Scores
from jaxaroo.train.objectives.sequences import (
    View,
    all_sums,
    count_examples,
    counted,
    example_weights,
    measured,
    part_of,
    per_example,
    per_token,
    sequence_sum,
    sequence_value,
    side,
)

N = 23


class Rows:
    """Example i is G sequences of 3 to 9 tokens; token t of sequence g of it is 100 i + 10 g + t, modulo 997."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"i": i, "weight": 1.0 + (i % 3) / 4}


def sequence(i, g):
    length = 3 + (i * 5 + g * 3) % 7
    ids = (100 * i + 10 * g + np.arange(length)) % 997
    value = np.full(length, -(10.0 * i + g) - 0.5, np.float32)
    return Encoded(ids.astype(np.int32), np.arange(length) >= 1 + (i + g) % 2, more={"note": value})


def batch_of(parts, packing=True, size=4):
    encode = lambda row: tuple(sequence(row["i"], g) for g in range(parts))
    cfg = BatchConfig(size=size, max_length=40, packing=packing, shuffle=False)
    made = next(Batches(Rows(), encode, cfg, seed=0, parts=parts, more=("note",)))
    return jax.tree.map(lambda x: jnp.asarray(x[0]), made)


def examples_in(batch, parts):
    """(row, place in it, example) of everything that was packed, read off the first tokens of segments."""
    tokens, segments = np.asarray(batch.tokens), np.asarray(batch.segments)
    starts = {sequence(i, 0).ids[0]: i for i in range(N)}
    for row in range(len(tokens)):
        for place in range(segments[row].max() // parts):
            first = np.flatnonzero(segments[row] == place * parts + 1)[0]
            yield row, place, starts[tokens[row, first]]


@pytest.mark.parametrize(("parts", "packing"), [(1, True), (2, True), (2, False), (3, True)])
def test_sums_are_those_of_a_loop_over_examples(parts, packing):
    batch = batch_of(parts, packing)
    x = jnp.sin(batch.targets.astype(jnp.float32))  # something of every target
    n = batch.tokens.shape[1] // parts
    got = {name: np.asarray(f) for name, f in {
        "sum": sequence_sum(x, batch, parts),
        "value": sequence_value("note", batch, parts),
        "there": counted(batch, parts),
        "weight": example_weights(batch, parts),
    }.items()}  # fmt: skip
    seen = np.zeros(len(got["sum"]), bool)
    for row, place, i in examples_in(batch, parts):
        at = row * n + place
        seen[at] = True
        for g in range(parts):
            encoded = sequence(i, g)
            wanted = np.sin(encoded.ids[1:][encoded.scored[1:]].astype(np.float64)).sum()
            np.testing.assert_allclose(got["sum"][at, g], wanted, rtol=1e-5, atol=1e-6)
            assert got["value"][at, g] == -(10.0 * i + g) - 0.5
        np.testing.assert_allclose(got["weight"][at], 1.0 + (i % 3) / 4)
    assert seen.sum() >= (8 if packing else 4)
    np.testing.assert_array_equal(got["there"], seen)
    for name in ("sum", "value", "weight"):
        assert not got[name][~seen].any()


def test_tokens_know_their_sequence_and_its_number():
    batch = batch_of(2)
    parts = np.asarray(part_of(batch, 2))
    numbers = np.asarray(per_token(jnp.arange(len(counted(batch, 2)) * 2.0).reshape(-1, 2), batch, 2))
    segments, n = np.asarray(batch.segments), batch.tokens.shape[1] // 2
    for row in range(len(segments)):
        for t, segment in enumerate(segments[row]):
            assert parts[row, t] == ((segment - 1) % 2 if segment else -1)
            assert numbers[row, t] == (2 * n * row + segment - 1 if segment else 0)


def test_units_are_counted_over_the_window():
    batch = batch_of(2)
    window = jax.tree.map(lambda x: x.reshape(2, 2, -1), batch)
    found = {name: int(value) for name, value in count_examples(2)(window).items()}
    packed = [i for _, _, i in examples_in(batch, 2)]
    each = [sequence(i, g) for i in packed for g in range(2)]
    assert found["example"] == len(packed)
    assert found["sequence"] == 2 * len(packed)
    assert found["token"] == sum(e.scored[1:].sum() for e in each)
    assert found["first_token"] == sum(e.scored[1:].sum() for e in each[::2])
    assert found["first_input"] == sum(len(e.ids) - 1 for e in each[::2])
    assert found["last_token"] == sum(e.scored[1:].sum() for e in each[1::2]) != found["first_token"]


def test_a_view_gives_sums_of_the_model_that_ran_or_of_what_rows_brought():
    batch = batch_of(2)
    logp = -jnp.cos(batch.targets.astype(jnp.float32)) - 2
    policy = Scores(logp, logp * 0, jnp.zeros((*logp.shape, 1)))
    ran = all_sums(View(batch, 2, policy, policy._replace(logp=logp - 1)))
    there = np.asarray(counted(batch, 2))
    np.testing.assert_allclose((ran.policy - ran.reference)[there], ran.tokens[there], rtol=1e-5)
    assert all_sums(View(batch, 2, policy)).reference is None
    brought = batch._replace(more={"reference": batch.more["note"]})
    np.testing.assert_array_equal(
        all_sums(View(brought, 2, policy)).reference, np.where(there[:, None], sequence_value("note", batch, 2), 0)
    )
    np.testing.assert_array_equal(side(ran, 1).policy, ran.policy[:, 1])
    grads = jax.grad(lambda ref: all_sums(View(batch, 2, policy, policy._replace(logp=ref))).reference.sum())(logp)
    assert not np.asarray(grads).any()


def test_terms_carry_the_weight_of_the_row_and_metrics_do_not():
    batch = batch_of(2)
    policy = Scores(batch.weights, batch.weights, batch.weights[..., None])
    view, value = View(batch, 2, policy), jnp.ones(counted(batch, 2).shape)
    term, metric = per_example(value, view), measured({"m": value}, view)["m"]
    np.testing.assert_array_equal(term.weight, example_weights(batch, 2))
    np.testing.assert_array_equal(metric.weight, counted(batch, 2).astype(np.float32))
    assert (term.unit, metric.unit) == ("example", "example")


@pytest.mark.errors
def test_a_number_that_no_row_has_is_named():
    with pytest.raises(ValueError, match="found no 'gap' in the batch"):
        sequence_value("gap", batch_of(2), 2)
