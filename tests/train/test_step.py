"""Oracles: the loss by loops in float64, the update by finite differences; then what must not change a result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaroo.models.decoder import DecoderConfig, Model, init_params, logits, param_axes
from jaxaroo.sharding.mesh import MeshConfig, make_mesh, put_batch
from jaxaroo.sharding.rules import FSDP_TP, shardings_like
from jaxaroo.train.data.pipeline import Batch, count_units
from jaxaroo.train.objectives import sft
from jaxaroo.train.state import TrainState, init_state
from jaxaroo.train.step import Term, Turns, make_train_step

CFG = DecoderConfig(
    vocab_size=16, embed_dim=16, ffn_dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, tie_embeddings=True
)
LENGTHS = [11, 5, 9, 3, 12, 2, 7, 8, 4, 6, 12, 10, 3, 9, 5, 8]


def params():
    return init_params(CFG, jax.random.key(0))


def examples():
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 16, n + 1), n // 3, 0.5 if n == 9 else 1.0) for n in LENGTHS]  # ids, first scored, weight


def rows(groups, length=24, micro=1):
    """Each group of examples becomes a row."""
    out = {name: np.zeros((len(groups), length), np.int32) for name in Batch._fields}
    out["weights"] = out["weights"].astype(np.float32)
    out["mask"] = out["mask"].astype(bool)
    for row, group in enumerate(groups):
        at = 0
        for number, (ids, first, weight) in enumerate(group, 1):
            n = len(ids) - 1
            place = slice(at, at + n)
            out["tokens"][row, place], out["targets"][row, place] = ids[:-1], ids[1:]
            out["positions"][row, place], out["segments"][row, place] = np.arange(n), number
            out["mask"][row, place] = np.arange(n) >= first
            out["weights"][row, place] = (np.arange(n) >= first) * weight
            at += n
    return Batch(**{name: jnp.asarray(x.reshape(micro, -1, length)) for name, x in out.items()})


ONE_A_ROW = [[e] for e in examples()]
PACKED = [examples()[i : i + 2] for i in range(0, 16, 2)]


def oracle():
    """-sum w log p / tokens, one example at a time, in float64."""
    total = tokens = 0.0
    for ids, first, weight in examples():
        z = np.asarray(logits(Model(CFG, params()), jnp.asarray(ids[None, :-1])), np.float64)[0]
        logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
        scored = [logp[t, ids[t + 1]] for t in range(first, len(ids) - 1)]
        total, tokens = total - weight * sum(scored), tokens + len(scored)
    return total / tokens


@functools.cache
def gradient_step():
    """SGD with rate 1, so that the update is the gradient."""
    return make_train_step(sft.make_loss(CFG), optax.sgd(1.0), count_units)


def loss_and_gradient(batch, step=None, place=lambda tree: tree):
    state = init_state(place(params()), optax.sgd(1.0))
    new, metrics = (step or gradient_step())(state, batch)
    return float(metrics["loss"]), jax.tree.map(lambda a, b: np.asarray(a - b), params(), jax.device_get(new.params))


def assert_same(a, b, tolerance=1e-6):
    assert a[0] == pytest.approx(b[0], rel=tolerance)
    for x, y in zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1]), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


@pytest.mark.optimizer
def test_the_loss_is_that_of_a_loop():
    assert loss_and_gradient(rows(ONE_A_ROW))[0] == pytest.approx(oracle(), rel=1e-5)


@pytest.mark.optimizer
def test_the_update_goes_against_the_gradient():
    """A directional derivative, by a finite difference of the oracle's own loss."""
    loss, gradient = loss_and_gradient(rows(ONE_A_ROW))
    norm = float(optax.tree.norm(gradient))
    eps = 1e-3 / norm
    at = lambda d: loss_and_gradient_at(jax.tree.map(lambda p, g: p + d * g, params(), gradient))
    assert (at(eps) - at(-eps)) / (2 * eps) == pytest.approx(norm**2, rel=1e-2)
    assert loss > 0


def loss_and_gradient_at(p):
    return float(gradient_step()(init_state(p, optax.sgd(1.0)), rows(ONE_A_ROW))[1]["loss"])


@pytest.mark.optimizer
@pytest.mark.parametrize("micro", [2, *(pytest.param(n, marks=pytest.mark.proof) for n in (4, 8))])
@pytest.mark.slow
def test_micro_batches_change_nothing(micro):
    assert_same(loss_and_gradient(rows(ONE_A_ROW, micro=micro)), loss_and_gradient(rows(ONE_A_ROW)))
    assert_same(loss_and_gradient(rows(PACKED, micro=micro)), loss_and_gradient(rows(ONE_A_ROW)))


@pytest.mark.optimizer
@pytest.mark.slow
def test_padding_and_packing_change_nothing():
    want = loss_and_gradient(rows(ONE_A_ROW))
    assert_same(loss_and_gradient(rows(ONE_A_ROW, length=31)), want)
    assert_same(loss_and_gradient(rows(PACKED)), want)
    assert_same(loss_and_gradient(rows([[e] for e in examples()[::-1]])), want)


@pytest.mark.optimizer
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("sizes", [pytest.param(dict(fsdp=8), marks=pytest.mark.proof), dict(data=2, fsdp=2, tensor=2)])
@pytest.mark.slow
def test_eight_devices_change_nothing(micro, sizes):
    mesh = make_mesh(MeshConfig(**sizes))
    placed = FSDP_TP.shardings(mesh, param_axes(CFG), params())
    one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    tx = optax.sgd(1.0)
    shardings = TrainState(one, placed, {}, shardings_like(tx.init(params()), params(), placed), {}, one, one, one)
    with jax.set_mesh(mesh):
        step = make_train_step(sft.make_loss(CFG, rules=FSDP_TP), tx, count_units, shardings=shardings)
        batch = put_batch(mesh, FSDP_TP, jax.device_get(rows(ONE_A_ROW, micro=micro)))
        got = loss_and_gradient(batch, step, place=lambda tree: jax.device_put(tree, placed))
    assert_same(got, loss_and_gradient(rows(ONE_A_ROW)))


@pytest.mark.optimizer
def test_terms_are_divided_by_the_count_of_their_unit_over_the_window():
    """Two terms of different units, without a model: values are known."""

    def loss_fn(p, batch, key):
        each = Term(p["w"] * batch["x"] + batch["junk"], batch["on"], "token")
        mean = Term(p["w"] * batch["y"], jnp.ones(batch["y"].shape), "sequence")
        return {"a": each, "b": mean}, {"seen": Term(batch["x"], batch["on"], "token")}

    window = {
        "x": jnp.asarray([[1.0, 2.0], [3.0, 4.0]]),
        "junk": jnp.asarray([[0.0, 0.0], [0.0, jnp.inf]]),  # what has no weight may be anything
        "on": jnp.asarray([[1.0, 1.0], [2.0, 0.0]]),
        "y": jnp.asarray([[4.0], [6.0]]),
    }
    counts = lambda w: {"token": jnp.int32(3), "sequence": jnp.int32(2)}
    state = init_state({"w": jnp.float32(2.0)}, optax.sgd(1.0))
    state, metrics = make_train_step(loss_fn, optax.sgd(1.0), counts)(state, window)
    assert float(metrics["a"]) == pytest.approx(2 * (1 + 2 + 6) / 3)
    assert float(metrics["b"]) == pytest.approx(2 * (4 + 6) / 2)
    assert float(metrics["loss"]) == pytest.approx(16.0)
    assert float(metrics["seen"]) == pytest.approx(3.0)
    assert float(state.params["w"]) == pytest.approx(2 - 8.0)
    assert (int(metrics["tokens"]), int(metrics["sequences"])) == (3, 2)


@pytest.mark.optimizer
def test_each_step_and_micro_batch_has_a_key_of_its_own():
    def loss_fn(p, batch, key):
        draw = jax.random.uniform(key)
        return {"a": Term(p * draw * batch, jnp.ones_like(batch), "token")}, {}

    step = make_train_step(loss_fn, optax.sgd(1.0), lambda w: {"token": jnp.int32(1)})
    drawn = []
    for window in ([1.0, 0.0], [0.0, 1.0]):  # which micro-batch counts
        state = init_state(jnp.float32(1.0), optax.sgd(0.0), seed=3)
        for _ in range(2):
            state, metrics = step(state._replace(params=jnp.float32(1.0)), jnp.asarray(window))
            drawn.append(float(metrics["loss"]))
    assert len(set(drawn)) == 4
    other, _ = step(init_state(jnp.float32(1.0), optax.sgd(0.0), seed=4), jnp.asarray([1.0, 0.0]))
    assert float(1.0 - other.params) not in drawn


@pytest.mark.optimizer
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(bad):
    tx = optax.chain(optax.adam(0.1))

    def loss_fn(p, batch, key):
        return {"a": Term((p["w"] * batch) ** 2, jnp.ones_like(batch), "token")}, {}

    step = make_train_step(loss_fn, tx, lambda w: {"token": jnp.int32(1)}, ema_decay=0.5, schedule=lambda t: t * 1.0)
    state = init_state({"w": jnp.float32(2.0)}, tx, ema=True)
    trace = []
    for x in (1.0, bad, bad, 1.0, bad):
        before = jax.device_get((state.params, state.opt_state, state.ema))
        state, metrics = step(state, jnp.asarray([x]))
        after = jax.device_get((state.params, state.opt_state, state.ema))
        same = all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
        trace.append((same, int(metrics["skipped_in_a_row"]), float(metrics["learning_rate"])))
    assert trace == [(False, 0, 0.0), (True, 1, 1.0), (True, 2, 1.0), (False, 0, 1.0), (True, 1, 2.0)]
    assert (int(state.step), int(state.skipped)) == (5, 3)
    assert step._cache_size() == 1


@pytest.mark.optimizer
def test_a_gradient_that_is_not_finite_counts_as_well():
    def loss_fn(p, batch, key):
        return {"a": Term(jnp.sqrt(p * batch), jnp.ones_like(batch), "token")}, {}  # 0, with an infinite slope

    step = make_train_step(loss_fn, optax.sgd(1.0), lambda w: {"token": jnp.int32(1)})
    state, metrics = step(init_state(jnp.float32(1.0), optax.sgd(1.0)), jnp.asarray([0.0]))
    assert float(metrics["loss"]) == 0
    assert int(state.skipped) == 1


@pytest.mark.optimizer
def test_a_loss_that_is_not_finite_counts_whatever_its_gradient():
    loss_fn = lambda p, batch, key: ({"a": Term(p * batch + jnp.inf, jnp.ones_like(batch), "token")}, {})
    step = make_train_step(loss_fn, optax.sgd(1.0), lambda w: {"token": jnp.int32(1)})
    state, metrics = step(init_state(jnp.float32(1.0), optax.sgd(1.0)), jnp.asarray([2.0]))
    assert float(metrics["grad_norm"]) == 2.0
    assert (float(state.params), int(state.skipped)) == (1.0, 1)


def product(p, batch, key):
    """Elements p x, of weight w."""
    return {"a": Term(p["w"] * batch["x"], batch["w"], "token")}, {}


def taken(x, w, tx, number, dtype=jnp.float32):
    """A step of `product` from 2, and its metrics."""
    window = {"x": jnp.asarray(x, dtype), "w": jnp.asarray(w, dtype)}
    step = make_train_step(product, tx, lambda window: {"token": jnp.int32(number)})
    state, metrics = step(init_state({"w": jnp.asarray(2.0, dtype)}, tx), window)
    return state, {name: float(value) for name, value in metrics.items()}


@pytest.mark.optimizer
def test_the_norm_is_that_of_the_gradient_before_clipping():
    state, metrics = taken([[3.0, 4.0]], [[1.0, -2.0]], optax.chain(optax.clip(1.0), optax.sgd(0.5)), 1)
    assert metrics["loss"] == 2 * (3 - 8)  # a negative weight pushes the other way
    assert metrics["grad_norm"] == 5.0
    assert float(state.params["w"]) == 2.5


@pytest.mark.optimizer
def test_a_window_in_which_nothing_counts_has_no_loss_and_is_not_skipped():
    state, metrics = taken([[3.0]], [[0.0]], optax.sgd(1.0), 0)
    assert (metrics["loss"], metrics["tokens"], metrics["skipped_in_a_row"]) == (0.0, 0.0, 0.0)
    assert float(state.params["w"]) == 2.0


@pytest.mark.optimizer
def test_sums_are_in_single_precision_whatever_they_are_of():
    """bfloat16 knows no number between 256 and 258: neither elements nor micro-batches may be added up in it."""
    _, metrics = taken(np.ones((1, 257)), np.ones((1, 257)), optax.sgd(0.0), 257, jnp.bfloat16)
    assert metrics["loss"] == pytest.approx(2.0, rel=1e-6)
    _, metrics = taken(np.ones((259, 1)), np.ones((259, 1)), optax.sgd(0.0), 1, jnp.bfloat16)
    assert metrics["grad_norm"] == 259.0


@pytest.mark.optimizer
def test_the_old_state_is_given_up():
    tx = optax.adam(0.1)
    old = init_state({"w": jnp.arange(4.0)}, tx, ema=True)
    loss_fn = lambda p, batch, key: ({"a": Term(p["w"] * batch, jnp.ones(4), "token")}, {})
    make_train_step(loss_fn, tx, lambda w: {"token": jnp.int32(4)}, ema_decay=0.5)(old, jnp.ones((1, 1)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.opt_state, old.ema)))


@pytest.mark.optimizer
@pytest.mark.filterwarnings("ignore:Some donated buffers")  # they have another layout
def test_the_new_state_is_laid_out_as_told():
    mesh, tx = make_mesh(MeshConfig(fsdp=8)), optax.sgd(1.0)
    one, split = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((), ("fsdp",)))
    state = jax.device_put(init_state({"w": jnp.arange(8.0)}, tx), one)
    shardings = TrainState(one, {"w": split}, {}, tx.init({"w": split}), {}, one, one, one)
    loss_fn = lambda p, batch, key: ({"a": Term(p["w"] * batch, jnp.ones(8), "token")}, {})
    step = make_train_step(loss_fn, tx, lambda w: {"token": jnp.int32(1)}, shardings=shardings)
    new, _ = step(state, jnp.ones((1, 1)))
    assert new.params["w"].sharding == split
    np.testing.assert_array_equal(new.params["w"], np.arange(8.0) - 1)


@pytest.mark.optimizer
def test_frozen_parameters_stay_and_the_mean_follows():
    combine = lambda trained, frozen: {"w": trained["w"] + frozen["w"]}

    def loss_fn(p, batch, key):
        return {"a": Term(p["w"] * batch, jnp.ones_like(batch), "token")}, {}

    step = make_train_step(loss_fn, optax.sgd(1.0), lambda w: {"token": jnp.int32(1)}, combine=combine, ema_decay=0.75)
    state = init_state({"w": jnp.float32(1.0)}, optax.sgd(1.0), frozen={"w": jnp.float32(5.0)}, ema=True)
    state, metrics = step(state, jnp.asarray([2.0]))
    assert float(metrics["loss"]) == 12.0
    assert float(state.frozen["w"]) == 5.0
    assert float(state.params["w"]) == -1.0
    assert float(state.ema["w"]) == pytest.approx(0.75 * 1 + 0.25 * -1)


@pytest.mark.optimizer
@pytest.mark.slow
def test_it_learns_by_heart():
    tx = optax.adamw(2e-2)
    step, state = make_train_step(sft.make_loss(CFG), tx, count_units), init_state(params(), tx)
    batch = rows([examples()[:1], examples()[2:3]])
    for _ in range(120):
        state, metrics = step(state, batch)
    assert float(metrics["loss"]) < 0.05
    assert step._cache_size() == 1


# ------------------------------------------------------------------------------------------------------------- turns
def pull(params, batch, key, turn):
    """Towards each turn's own multiple of the batch; the gradient depends on where the last turn left the weight."""
    del key
    value = 0.5 * (params["w"][None] - turn * batch) ** 2
    ones = jnp.ones_like(value)
    return {"pull": Term(value, ones, "row")}, {"distance": Term(jnp.sqrt(2 * value), ones, "row")}


def by_turn(rate):
    """Plain descent whose rate falls with the turn's number."""

    def update(grads, state, params=None, *, turn):
        return jax.tree.map(lambda g: -(rate / turn) * g, grads), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def turning(values, names=("a", "b", "c")):
    count = lambda window: {"row": jnp.int32(window.size)}
    turns = Turns(names, lambda step, key: jnp.asarray(values, jnp.float32) + step.astype(jnp.float32))
    return make_train_step(pull, by_turn(0.25), count, turns=turns)


def test_turns_are_updates_one_after_the_other_on_one_window():
    window = jnp.asarray([[1.0, 3.0], [0.5, 2.5]])
    step, state = turning((1.0, 2.0, 4.0)), init_state({"w": jnp.float32(0.3)}, by_turn(0.25))
    w, batch = np.float64(np.float32(0.3)), np.asarray(window, np.float64).ravel()
    for number in range(2):
        losses = []
        for turn in (1.0 + number, 2.0 + number, 4.0 + number):
            losses.append(np.mean(0.5 * (w - turn * batch) ** 2))
            w -= 0.25 / turn * np.mean(w - turn * batch)
        state, metrics = step(state, window)
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
        np.testing.assert_allclose([metrics[f"loss_{n}"] for n in "abc"], losses, rtol=1e-5)
        np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
        assert {"distance_a", "distance", "grad_norm_c", "rows", "skipped_in_a_row"} <= metrics.keys()
        assert int(state.step) == number + 1


def test_turns_are_one_program():
    step, state = turning((1.0, 2.0, 4.0)), init_state({"w": jnp.float32(0.3)}, by_turn(0.25))
    for _ in range(3):
        state, _ = step(state, jnp.ones((1, 2)))
    assert step._cache_size() == 1


def test_a_turn_that_is_not_finite_is_left_out_alone():
    step, state = turning((1.0, np.inf, 4.0)), init_state({"w": jnp.float32(0.3)}, by_turn(0.25))
    state, metrics = step(state, jnp.ones((1, 2)))
    w = np.float64(np.float32(0.3))
    for turn in (1.0, 4.0):
        w -= 0.25 / turn * (w - turn)
    np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
    assert (int(state.step), int(state.skipped), int(metrics["skipped_in_a_row"])) == (1, 1, 1)


def test_each_turn_has_a_key_of_its_own():
    def loss(params, batch, key, turn):
        value = params["w"] * 0 + jax.random.uniform(key) + 0 * turn
        return {"u": Term(value, jnp.float32(1), "row")}, {}

    turns = Turns(("a", "b"), lambda step, key: jnp.stack([jax.random.uniform(key)] * 2))
    count = lambda window: {"row": jnp.int32(1)}
    step = make_train_step(loss, by_turn(1.0), count, turns=turns)
    state, first = step(init_state({"w": jnp.float32(0)}, by_turn(1.0)), jnp.ones((1, 1)))
    _, second = step(state, jnp.ones((1, 1)))
    assert len({float(m[f"u_{n}"]) for m in (first, second) for n in "ab"}) == 4
