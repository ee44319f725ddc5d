"""Runs as users have them: processes that are killed, stopped, moved to other devices, and gone on with."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxaroo.models.hf import load
from jaxaroo.sharding.mesh import MeshConfig
from jaxaroo.train import run
from jaxaroo.train.checkpoint import CheckpointConfig
from jaxaroo.train.data.pipeline import BatchConfig
from jaxaroo.train.metrics import read_records
from jaxaroo.train.optimizer import OptimizerConfig
from jaxaroo.train.recipe import SftOptions
from tests.children import begin, end, finish, finish_all, several, wait_for

pytestmark = pytest.mark.optimizer
STEPS = 24
OPTIONS = (
    "--model preset:tiny --data builtin:arithmetic --batch.size 8 --batch.max-length 96 --optimizer.learning-rate 2e-3 "
    f"--steps {STEPS} --log-every 3 --checkpoint.every 5 --ema 0.9"
).split()


def settings(out, **changes):
    given = dict(
        model="preset:tiny",
        data="builtin:arithmetic",
        out=out,
        steps=STEPS,
        log_every=3,
        ema=0.9,
        batch=BatchConfig(size=8, max_length=96),
        optimizer=OptimizerConfig(learning_rate=2e-3),
        checkpoint=CheckpointConfig(every=5),
    )
    return run.RunConfig(**(given | changes))


def records(out):
    """Metrics without what a clock says."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_records(out / "metrics.jsonl")]


def last_checkpoint(out):
    """Saved by as many devices as read it."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager((out / "checkpoints").absolute()) as manager:
        found = manager.restore(STEPS, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    return found["state"]


def last_state(out):
    return [np.asarray(x) for x in jax.tree.leaves(last_checkpoint(out))]


def last_meta(out):
    return json.loads((out / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text())


def assert_same_run(out, other):
    assert records(out) == records(other)
    assert last_meta(out) == last_meta(other)
    for a, b in zip(last_state(out), last_state(other), strict=True):
        assert a.tobytes() == b.tobytes()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (out / "model" / name).read_bytes() == (other / "model" / name).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(begin("sft", *OPTIONS, "--out", out))
    return out


def test_a_run_leaves_a_model_its_settings_metrics_and_a_curve(undisturbed):
    assert [r["step"] for r in records(undisturbed)] == list(range(1, STEPS + 1))
    losses = [r["loss"] for r in records(undisturbed)]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 1
    model = load(undisturbed / "model")
    state = last_checkpoint(undisturbed)
    np.testing.assert_array_equal(model.params["embed"], state["ema"]["embed"])
    assert not np.array_equal(state["ema"]["embed"], state["params"]["embed"])
    rates = [r["learning_rate"] for r in records(undisturbed)]
    assert rates[0] == pytest.approx(2e-3)
    assert rates[-1] == pytest.approx(2e-4)
    assert (undisturbed / "loss.png").stat().st_size > 1000
    kind, cfg, options = run.read_run(undisturbed)
    assert (kind, options) == ("sft", SftOptions())
    assert cfg == settings(undisturbed, dtype="float32")
    assert sorted(int(p.name) for p in (undisturbed / "checkpoints").iterdir()) == [15, 20, 24]


def steps_logged(out):
    return len(read_records(out / "metrics.jsonl"))


SIGHTS = {
    "before the first checkpoint": lambda out: steps_logged(out) >= 3,
    "during a save": lambda out: any("tmp" in p.name for p in (out / "checkpoints").glob("*")),
    "between logs": lambda out: steps_logged(out) >= 16,
}


@pytest.mark.slow
def test_killed_three_times_it_ends_as_if_it_had_not_been(undisturbed, tmp_path):
    out = tmp_path / "killed"
    command = ("sft", *OPTIONS, "--out", out)
    for sight in SIGHTS.values():
        child = begin(*command)
        wait_for(child, lambda sight=sight: sight(out))
        end(child)
        command = ("resume", out)
    assert steps_logged(out) < STEPS
    finish(begin(*command))
    assert_same_run(out, undisturbed)


@pytest.mark.proof
def test_fifty_kills_at_random_moments():
    """Writes benchmarks/results/resume-cpu.json; some eight minutes."""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-m", "benchmarks.resume", "--kills", "50"], cwd=root, check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.proof)])
@pytest.mark.slow
def test_told_to_stop_it_saves_and_says_how_to_go_on(undisturbed, tmp_path, number):
    out = tmp_path / "stopped"
    child = begin("sft", *OPTIONS, "--out", out)
    wait_for(child, lambda: steps_logged(out) >= 6)
    child.send_signal(number)
    assert f"jaxaroo train resume {out}" in finish(child, 128 + number)
    saved = max(int(p.name) for p in (out / "checkpoints").iterdir())
    assert saved == steps_logged(out)
    assert 6 <= saved < STEPS
    assert not (out / "model").exists()
    finish(begin("resume", out))
    assert_same_run(out, undisturbed)


@pytest.mark.proof
def test_on_other_devices_the_order_is_the_same_and_the_losses_agree(undisturbed, tmp_path):
    """Begun on one device, gone on with on eight; beside it a whole run on eight."""
    out = tmp_path / "moved"
    child = begin("sft", *OPTIONS, "--out", out)
    wait_for(child, lambda: steps_logged(out) >= 12)
    child.send_signal(signal.SIGTERM)
    finish(child, 143)
    assert run.resume(out, mesh=MeshConfig(data=2, fsdp=2, tensor=2)).finished
    assert run.start("sft", settings(tmp_path / "eight")).finished
    for other in (out, tmp_path / "eight"):
        assert_close_run(other, undisturbed)


def test_finished_runs_are_left_alone_and_resume_needs_a_run(undisturbed, tmp_path):
    before = (undisturbed / "metrics.jsonl").read_bytes()
    assert run.resume(undisturbed, mesh=MeshConfig()).finished
    assert (undisturbed / "metrics.jsonl").read_bytes() == before
    with pytest.raises(
        FileExistsError, match=r"holds a run; expected a new or empty folder. Go on with `jaxaroo train"
    ):
        run.start("sft", settings(undisturbed))
    with pytest.raises(FileNotFoundError, match=r"expected the --out folder of a run\. Those of `train rl`, "):
        run.resume(tmp_path)


def assert_close_run(out, other):
    """The same samples in the same order, and losses that differ by rounding."""
    order = ("step", "tokens", "sequences", "inputs")
    for a, b in zip(records(out), records(other), strict=True):
        assert [a[name] for name in order] == [b[name] for name in order]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert last_meta(out)["data"] == last_meta(other)["data"]


@pytest.mark.proof
def test_two_processes_train_as_one_and_one_goes_on_where_two_were_stopped(tmp_path):
    """A SIGTERM to one process stops both after the same step."""
    both, shards = ("--mesh.data", 2, "--mesh.fsdp", 4), ("--batch.shards", 2)
    one = tmp_path / "one"
    finish(begin("sft", *OPTIONS, *shards, "--out", one))
    two = tmp_path / "two"
    finish_all(several(2, "sft", *OPTIONS, *shards, *both, "--out", two))
    assert_close_run(two, one)
    for a, b in zip(
        jax.tree.leaves(load(one / "model").params), jax.tree.leaves(load(two / "model").params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    theirs = (two / "checkpoints" / str(STEPS) / "state" / "ocdbt.process_1" / "d").iterdir()
    largest = max(theirs, key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])  # which process 0 need not read
    outputs = finish_all(several(2, "resume", two))
    assert all(f"checkpoint {STEPS} is damaged" in output and "going on from 20" in output for output in outputs)
    assert_close_run(two, one)
    stopped = tmp_path / "stopped"
    children = several(2, "sft", *OPTIONS, *shards, *both, "--out", stopped)
    wait_for(children[0], lambda: steps_logged(stopped) >= 6)
    children[1].send_signal(signal.SIGTERM)
    outputs = finish_all(children, 143)
    assert all(f"jaxaroo train resume {stopped}" in output for output in outputs)
    assert steps_logged(stopped) < STEPS
    assert run.resume(stopped).finished
    assert_close_run(stopped, one)
    killed = tmp_path / "killed"  # the other hears of it, says so and ends; both go on from the last whole checkpoint
    command = ("sft", *OPTIONS, *shards, *both, "--out", killed, "--or-resume")
    children = several(2, *command)
    wait_for(children[0], lambda: steps_logged(killed) >= 6)
    children[1].kill()
    began = time.monotonic()
    while children[0].poll() is None and time.monotonic() - began < 100:  # 16 s where nothing else runs
        time.sleep(0.1)
    took = time.monotonic() - began
    for child in children:
        end(child)
    assert children[0].returncode not in (0, -signal.SIGKILL), children[0].said
    assert took < 60
    assert re.search("stopped sending heartbeats|cannot reach the others", children[0].said), children[0].said
    finish_all(several(2, *command))
    assert_close_run(killed, one)


@pytest.mark.proof
def test_four_processes_train_as_one(tmp_path):
    """Of two devices each, along all axes of a mesh, so that every weight has parts in all of them."""
    few = (*OPTIONS, "--batch.shards", 4, "--batch.micro-batches", 2, "--steps", 4)
    one, four = tmp_path / "one", tmp_path / "four"
    finish(begin("sft", *few, "--out", one))
    finish_all(several(4, "sft", *few, "--mesh.data", 2, "--mesh.fsdp", 2, "--mesh.tensor", 2, "--out", four))
    order = ("step", "tokens", "sequences", "inputs")
    assert len(records(four)) == 4
    for a, b in zip(records(four), records(one), strict=True):
        assert [a[name] for name in order] == [b[name] for name in order]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_folder_belongs_to_one_process_at_a_time(tmp_path):
    out = tmp_path / "one"
    child = begin("sft", *OPTIONS, "--out", out)
    wait_for(child, lambda: steps_logged(out) >= 3)
    with pytest.raises(FileExistsError, match="another process is writing to"):
        run.resume(out)
    end(child)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.proof
def test_adapters_to_a_model_on_disk_and_rows_of_a_file(undisturbed, tmp_path):
    """LoRA on a checkpoint: the base stays as it is, and the export is merged."""
    rows = [{"prompt": f"what is {i} ?", "completion": f"{i} = {i}"} for i in range(40)]
    data = jsonl(tmp_path / "rows.jsonl", [*rows, {"prompt": "no completion"}])
    cfg = settings(
        tmp_path / "lora",
        model=str(undisturbed / "model"),
        data=data,
        adapters="lora",
        ema=0.0,
        steps=6,
        batch=BatchConfig(size=8, max_length=64, packing=False, micro_batches=2),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        tensorboard=True,
    )
    with pytest.raises(ValueError, match=r"rows.jsonl:41"):
        run.start("sft", cfg)
    assert not cfg.out.exists()
    cfg = run.dataclasses.replace(cfg, on_bad_row="skip")
    assert run.start("sft", cfg).finished
    base, tuned = load(undisturbed / "model").params, load(cfg.out / "model").params
    np.testing.assert_array_equal(base["embed"], tuned["embed"])
    difference = np.asarray(tuned["layers"][0]["attn"]["q"] - base["layers"][0]["attn"]["q"])
    rank = np.linalg.matrix_rank(difference.reshape(-1, difference.shape[-1]), tol=1e-6)
    assert 1 <= rank <= cfg.lora.rank
    [events] = (cfg.out / "tensorboard").iterdir()
    assert b"grad_norm" in events.read_bytes()
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager((cfg.out / "checkpoints").absolute()) as manager:
        found = manager.restore(6, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    assert not found["frozen"]
    adapters = 3 * cfg.lora.rank * (4 * (64 + 64) + 3 * (64 + 256))  # of three layers: q, k, v, o; gate, up, down
    assert sum(x.size for x in jax.tree.leaves(found) if x.ndim > 1) == 3 * adapters  # and two moments; not the model


@pytest.mark.slow
def test_what_is_not_finite_ends_the_run_and_leaves_its_checkpoints(tmp_path):
    rate = OptimizerConfig(learning_rate=1e30, warmup_steps=0, clip_norm=None)
    cfg = settings(tmp_path / "out", optimizer=rate, max_skipped=4, checkpoint=CheckpointConfig(every=1, keep=30))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ArithmeticError, match="of 4 steps in a row"):
        run.start("sft", cfg)
    assert [r["skipped_in_a_row"] for r in records(cfg.out)][-1] == 4
    assert not (cfg.out / "model").exists()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.proof
def test_the_seed_decides_the_order(undisturbed, tmp_path):
    assert run.start("sft", settings(tmp_path / "other", seed=1, steps=3)).finished
    order = [r["tokens"] for r in records(tmp_path / "other")]
    assert order != [r["tokens"] for r in records(undisturbed)[:3]]


@pytest.mark.proof
def test_a_run_knows_its_data_again(tmp_path):
    rows = [{"prompt": f"what is {i} ?", "completion": f"{i} = {i}"} for i in range(40)]
    data = jsonl(tmp_path / "rows.jsonl", rows)
    cfg = settings(tmp_path / "out", data=data, steps=2, batch=BatchConfig(size=8, max_length=64), ema=0.0)
    assert run.start("sft", cfg).finished
    for changed in (rows[:-1], [{**row, "completion": "0"} for row in rows]):
        jsonl(tmp_path / "rows.jsonl", changed)
        with pytest.raises(ValueError, match=r"rows.jsonl, the tokenizer, the seed or the batch"):
            run.resume(cfg.out)
    jsonl(tmp_path / "rows.jsonl", rows)
    assert run.resume(cfg.out).finished


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model="preset:tinny"), "tiny"),
        (dict(data="builtin:algebra"), "expected builtin:arithmetic"),
        (dict(batch=BatchConfig(size=8, max_length=4096)), "at most the model's"),
        (dict(data="nowhere.jsonl"), "nowhere.jsonl"),
        (dict(mesh=MeshConfig(data=3)), "8"),
        (dict(batch=BatchConfig(size=4)), "4"),
    ],
)
def test_what_cannot_be_run_leaves_nothing_behind(tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        run.start("sft", settings(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changes", "message"), [(dict(steps=0), "steps: found 0"), (dict(ema=1.0), "ema: found 1.0")])
def test_settings_are_checked(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)
