"""Equivalence: any mesh = one device, and two processes = one. Run as a script, this file is one process of two."""

import dataclasses
import functools
import json
import logging
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxaroo.models.decoder import DecoderConfig, forward, lm_head, param_axes, param_shapes
from jaxaroo.sharding.mesh import AXES, MeshConfig, exchange, gather, local_rows, make_mesh, put_batch, start_processes
from jaxaroo.sharding.rules import FSDP_TP, FSDP_TP_SEQ, REPLICATED, Rules

P = PartitionSpec
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiles in half the time
CFG = DecoderConfig(vocab_size=64, embed_dim=32, ffn_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)


# ------------------------------------------------------------------------------------------------------- equivalence
def host_batch():
    """Two micro-batches of eight rows of eight tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (2, 8, 8), np.int32)
    weights = {"weight": rng.random((2, 8, 8), "f"), "row_weight": rng.random((2, 8), "f")}
    return {"tokens": tokens, "targets": np.roll(tokens, -1, 2)} | weights


def loss_and_gradient(params, batch, rules):
    """Mean loss over what counts, micro-batches one after the other."""

    def loss(params):
        def add(total, micro):
            positions = jnp.broadcast_to(jnp.arange(8)[None], micro["tokens"].shape)
            hidden = forward(CFG, params, micro["tokens"], positions, rules=rules).hidden
            logp = jax.nn.log_softmax(lm_head(CFG, params, hidden, rules=rules))
            nll = -jnp.take_along_axis(logp, micro["targets"][..., None], axis=-1)[..., 0]
            return total + jnp.sum(nll * micro["weight"] * micro["row_weight"][:, None]), None

        total = jax.lax.scan(add, jnp.float32(0), batch)[0]
        return total / jnp.sum(batch["weight"] * batch["row_weight"][..., None])

    return jax.value_and_grad(loss)(params)


@functools.cache
def initial():
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32) / 4, param_shapes(CFG))


@functools.cache
def on_one_device():
    step = functools.partial(loss_and_gradient, rules=REPLICATED)
    return jax.jit(step, compiler_options=QUICK)(initial(), host_batch())


def on_mesh(mesh, rules, batch):
    """Parameters and batch where the rules put them, and the jitted step's result."""
    places = rules.shardings(mesh, param_axes(CFG), param_shapes(CFG))
    put = lambda a, place: jax.make_array_from_callback(a.shape, place, lambda index: a[index])
    params = jax.tree.map(put, initial(), places)
    placed = put_batch(mesh, rules, batch)
    step = jax.jit(
        functools.partial(loss_and_gradient, rules=rules),
        in_shardings=(places, jax.tree.map(lambda a: a.sharding, placed)),
        out_shardings=(NamedSharding(mesh, P()), places),
        compiler_options=QUICK,
    )
    with jax.set_mesh(mesh):
        return params, placed, step(params, placed)


def assert_close(got, want):
    (loss, grads), (want_loss, want_grads) = got, want
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), grads, want_grads)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(want_grads))  # there is something to compare


@pytest.mark.parametrize(
    ("cfg", "rules", "weight", "tokens"),  # what one device holds of mlp.gate [2, 64, 32] and of tokens [2, 8, 8]
    [
        (MeshConfig(), FSDP_TP, (2, 64, 4), (2, 1, 8)),
        (MeshConfig(tensor=2), FSDP_TP, (2, 32, 8), (2, 2, 8)),
        (MeshConfig(data=2, tensor=2), FSDP_TP, (2, 32, 16), (2, 2, 8)),
        (MeshConfig(sequence=2, tensor=2), FSDP_TP_SEQ, (2, 32, 16), (2, 4, 4)),
    ],
    ids=["fsdp", "tensor-fsdp", "data-fsdp-tensor", "sequence-fsdp-tensor"],
)
@pytest.mark.slow
def test_loss_and_gradients_do_not_depend_on_the_mesh(cfg, rules, weight, tokens):
    params, batch, (loss, grads) = on_mesh(make_mesh(cfg), rules, host_batch())
    for tree in (params, grads):
        gate = tree["layers"]["mlp"]["gate"]
        assert gate.sharding.spec == P(None, "tensor", "fsdp")
        assert gate.addressable_shards[0].data.shape == weight
    assert batch["tokens"].sharding.spec == P(None, ("data", "fsdp"), rules.seq)
    assert batch["tokens"].addressable_shards[0].data.shape == tokens
    assert batch["row_weight"].addressable_shards[0].data.shape == tokens[:2]
    jax.tree.map(np.testing.assert_array_equal, batch, host_batch())
    assert_close((loss, grads), on_one_device())


# -------------------------------------------------------------------------------------------------------------- mesh
def test_a_mesh_has_four_axes_in_the_order_of_the_devices():
    mesh = make_mesh(MeshConfig(data=2, tensor=2, sequence=2))
    assert dict(mesh.shape) == dict(data=2, fsdp=1, tensor=2, sequence=2)
    assert mesh.axis_names == AXES
    assert mesh.axis_types == (AxisType.Auto,) * 4
    np.testing.assert_array_equal([d.id for d in mesh.devices.flat], range(8))
    chosen = make_mesh(MeshConfig(data=-1, fsdp=2), jax.devices()[5:1:-1])
    assert [d.id for d in chosen.devices.flat] == [5, 4, 3, 2]
    assert dict(chosen.shape) == dict(data=2, fsdp=2, tensor=1, sequence=1)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX asks of a TPU when it lays out a mesh: 4 x 2 chips a slice."""

    id: int
    coords: tuple
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU of tomorrow"
    core_on_chip: int = 0
    process_index: int = 0


def test_on_tpus_neighbours_are_neighbours_and_only_data_crosses_slices(monkeypatch):
    monkeypatch.setattr("jaxaroo.sharding.mesh.Mesh", lambda grid, axes, axis_types: grid)
    chips = [Chip(8 * s + 4 * y + x, (x, y, 0), s) for s in range(2) for y in range(2) for x in range(4)]
    grid = make_mesh(MeshConfig(data=4, fsdp=2, tensor=2), chips[::-1])
    assert grid.shape == (4, 2, 2, 1)
    for copy in grid:
        assert len({c.slice_index for c in copy.flat}) == 1
    far = lambda a, b: sum(
        min(abs(i - j), n - abs(i - j)) for i, j, n in zip(a.coords, b.coords, (4, 2, 1), strict=True)
    )
    assert all(far(*pair[:, 0]) == 1 for copy in grid for pair in copy)
    assert make_mesh(MeshConfig(data=2, tensor=2), chips[:8]).shape == (2, 2, 2, 1)  # splits the longer side
    with pytest.raises(ValueError, match="data=1 over 2 TPU slices; expected a multiple: only copies"):
        make_mesh(MeshConfig(), chips)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(tensor=0), r"MeshConfig.tensor: found 0; expected a positive integer, or -1"),
        (dict(data=-2), r"MeshConfig.data: found -2"),
        (dict(data=-1), r"MeshConfig: data and fsdp are -1; expected at most one"),
        (dict(tensor=3), r"data=1 x fsdp=-1 x tensor=3 x sequence=1 on 8 devices; .* a divisor of 8: 1, 2, 4, 8\."),
        (dict(fsdp=2, tensor=2), r"on 8 devices; .* multiply to 4, expected 8. data=2 or fsdp=4 or tensor=4 or sequ"),
        (dict(data=8, fsdp=2), r"multiply to 16, expected 8. data=4 or fsdp=1 would fit; -1 stands for what is left\."),
        (dict(fsdp=3, tensor=3), r"multiply to 9, expected 8. No single change would fit"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(**sizes))


# ----------------------------------------------------------------------------------------------------------- batches
def test_one_process_reads_every_row_and_gets_back_what_it_put(caplog):
    mesh = make_mesh(MeshConfig(data=2, tensor=2, sequence=2))
    assert local_rows(mesh, FSDP_TP, 6) == slice(0, 6)
    assert local_rows(mesh, REPLICATED, 3) == slice(0, 3)
    batch = {"odd": np.arange(60).reshape(2, 6, 5), "deep": np.random.rand(1, 2, 4, 3) > 0.5, "rows": np.ones((3, 4))}
    with caplog.at_level(logging.DEBUG, "jaxaroo.sharding.rules"):
        placed = put_batch(mesh, FSDP_TP_SEQ, batch)
    said = "put_batch: odd: dimension 2 of size 5 is replicated; sequence = 2"
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [(logging.DEBUG, said)]
    assert placed["odd"].addressable_shards[0].data.shape == (2, 3, 5)
    assert placed["deep"].sharding.spec == P(None, ("data", "fsdp"), "sequence")
    assert put_batch(mesh, Rules(batch="tensor"), batch["rows"]).addressable_shards[2].data.shape == (3, 2)
    back = gather(placed | {"host": 3})
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(back))
    jax.tree.map(np.testing.assert_array_equal, back, batch | {"host": 3})


@pytest.mark.errors
def test_rows_that_do_not_divide_are_refused():
    mesh = make_mesh(MeshConfig(data=2))
    message = r"put_batch: a.b has 12 rows in this process, for 8 of the parts data=2 x fsdp=4 = 8; expected a multiple"
    with pytest.raises(ValueError, match=message):
        put_batch(mesh, FSDP_TP, {"a": {"b": np.zeros((2, 12, 8))}})
    with pytest.raises(ValueError, match=r"put_batch: the batch has shape \(8,\)"):
        put_batch(mesh, FSDP_TP, np.zeros(8))
    with pytest.raises(ValueError, match=r"a batch of 12 rows over data=2 x fsdp=4 = 8; expected a multiple of 8"):
        local_rows(mesh, FSDP_TP, 12)


# --------------------------------------------------------------------------------------------------------- processes
JOINED = dict(coordinator_address="h:1", num_processes=2, process_id=1, cluster_detection_method="deactivate")
ENV = dict(JAXAROO_COORDINATOR="h:1", JAXAROO_NUM_PROCESSES="2", JAXAROO_PROCESS_ID="1")
SLURM = dict(SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="1(x2)", SLURM_GPUS_ON_NODE="4")


@pytest.mark.parametrize(
    ("given", "env", "wanted"),
    [
        ({}, {}, None),
        (dict(num_processes=1), ENV, None),
        (dict(coordinator="h:1", num_processes=1, process_id=0), {}, None),
        (dict(coordinator="h:1", num_processes=2, process_id=1), ENV | {"JAXAROO_PROCESS_ID": "0"}, JOINED),
        ({}, ENV, JOINED),
        ({}, ENV | SLURM, JOINED),
        ({}, dict(JAXAROO_COORDINATOR="auto"), {}),
        ({}, SLURM, dict(cluster_detection_method="slurm", local_device_ids=[0, 1, 2, 3])),
        ({}, SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, dict(cluster_detection_method="slurm")),
        ({}, SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "2"}, None),
        ({}, dict(TPU_WORKER_HOSTNAMES="a,b"), {}),
        ({}, dict(TPU_WORKER_HOSTNAMES="localhost"), None),
        ({}, dict(TPU_WORKER_HOSTNAMES="a", MEGASCALE_NUM_SLICES="2"), {}),
    ],
)
def test_processes_are_found_in_arguments_then_in_the_environment(given, env, wanted, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "environ", env)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: calls.append(settings))
    start_processes(**given)
    assert calls == ([] if wanted is None else [wanted | dict(heartbeat_timeout_seconds=25)])
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    start_processes(**given)
    assert len(calls) == (wanted is not None)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("given", "env", "message"),
    [
        (dict(coordinator="h:1"), ENV, "coordinator=h:1 without num_processes, process_id; expected all three"),
        ({}, dict(JAXAROO_NUM_PROCESSES="2"), "PROCESSES=2 without JAXAROO_COORDINATOR, JAXAROO_PROCESS_ID"),
        (dict(coordinator="auto", num_processes=2), {}, "without process_id; .* the coordinator 'auto' alone"),
        (dict(num_processes=1, process_id=1), {}, "num_processes=1, process_id=1 without coordinator"),
        (dict(coordinator="h:1", num_processes=2, process_id=2), {}, "process_id=2; expected .* 0 <= process id"),
        (dict(coordinator="h", num_processes=2, process_id=0), {}, "=h, .* expected a coordinator host:port"),
        ({}, ENV | {"JAXAROO_NUM_PROCESSES": "two"}, "JAXAROO_NUM_PROCESSES is 'two'; expected a whole number"),
    ],
)
def test_settings_of_processes_that_cannot_be_are_refused(given, env, message, monkeypatch):
    monkeypatch.setattr(os, "environ", env)
    with pytest.raises(ValueError, match=f"start_processes: .*{message}"):
        start_processes(**given)


@pytest.mark.errors
def test_processes_must_be_joined_before_a_device_is_touched():
    jax.devices()
    with pytest.raises(RuntimeError, match="Call start_processes first"):
        start_processes(coordinator="127.0.0.1:1", num_processes=2, process_id=0)


def test_two_processes_compute_what_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | dict(XLA_FLAGS="--xla_force_host_platform_device_count=4", JAX_PLATFORMS="cpu")
    address = f"127.0.0.1:{port}"  # JAX would listen on every interface
    env |= dict(JAXAROO_COORDINATOR=address, JAX_COORDINATOR_BIND_ADDRESS=address, JAXAROO_NUM_PROCESSES="2")
    children = []
    try:
        for i in range(2):
            command = [sys.executable, __file__, str(tmp_path / f"{i}.npz")]
            with open(tmp_path / f"{i}.log", "w") as log:
                own = env | {"JAXAROO_PROCESS_ID": str(i)}
                children.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
        for process in children:
            assert process.wait(120) == 0
    except (AssertionError, subprocess.TimeoutExpired) as failure:
        pytest.fail(f"{failure}\n" + "\n".join((tmp_path / f"{i}.log").read_text()[-4000:] for i in range(2)))
    finally:
        for process in children:
            process.kill()
            process.wait()
    first, second = (dict(np.load(tmp_path / f"{i}.npz")) for i in range(2))
    mine = {name: (first.pop(name), second.pop(name)) for name in [*first] if name.startswith("mine")}
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], name)
    grads = jax.tree.unflatten(jax.tree.structure(initial()), [first[f"grad{i}"] for i in range(len(first) - 3)])
    assert_close((first["loss"], grads), on_one_device())
    np.testing.assert_array_equal(first["tokens"], host_batch()["tokens"])
    np.testing.assert_array_equal(first["whole"], host_batch()["tokens"])
    assert [rows.tolist() for rows in mine["mine_rows"]] == [[0, 4], [4, 8]]
    assert [rows.tolist() for rows in mine["mine_crossed"]] == [[0, 8], [0, 8]]
    refused = "local_rows: process 0 holds the rows [(0, 1), (2, 3), (4, 5), (6, 7)]; expected one contiguous range"
    assert str(mine["mine_refused"][0]).startswith(refused)
    assert [own.tolist() for own in mine["mine_own"]] == [[0, 1], [1, 1]]
    said = '[{"who": "é", "loss": [NaN, 0.1]}, {"who": "éééé", "loss": [NaN, 1.1]}]'  # by both: texts of two lengths
    assert [json.dumps(json.loads(str(one)), ensure_ascii=False) for one in mine["mine_said"]] == [said] * 2


def child(path):
    """One of two processes with four devices each."""
    start_processes()
    start_processes()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = local_rows(mesh, FSDP_TP, 8)
    _, placed, (loss, grads) = on_mesh(mesh, FSDP_TP, jax.tree.map(lambda a: a[:, rows], host_batch()))
    own = NamedSharding(Mesh(jax.local_devices()[:2], "x"), P("x"))
    own = jax.device_put(np.array([jax.process_index(), 1]), own)
    loss, grads, tokens, own = gather((loss, grads, placed["tokens"], own))
    pairs = [jax.devices()[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]  # each tensor pair lies in both processes
    crossed = local_rows(across := make_mesh(MeshConfig(tensor=2), pairs), FSDP_TP, 8)
    try:
        refused = str(local_rows(make_mesh(MeshConfig(), pairs), FSDP_TP, 8))
    except NotImplementedError as error:
        refused = str(error)
    found = {f"grad{i}": grad for i, grad in enumerate(jax.tree.leaves(grads))}
    whole = gather(put_batch(across, FSDP_TP, host_batch()["tokens"]))
    mine = dict(rows=(rows.start, rows.stop), crossed=(crossed.start, crossed.stop), own=own, refused=refused)
    i = jax.process_index()
    mine["said"] = json.dumps(exchange({"who": "é" * (1 + 3 * i), "loss": [float("nan"), 0.1 + i]}))
    np.savez(path, loss=loss, tokens=tokens, whole=whole, **found, **{f"mine_{name}": a for name, a in mine.items()})


if __name__ == "__main__":
    child(sys.argv[1])
