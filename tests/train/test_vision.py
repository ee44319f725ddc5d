"""Runs on images of stripes: all widths learn, a run that was stopped twice ends as one that was not, and the model
folder answers as the trained network did. The optimiser against Adam by hand."""

import dataclasses
import functools
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.models import ghostnet, resnet
from jaxaroo.models.ghostnet import GhostNetConfig
from jaxaroo.models.resnet import ResNetConfig
from jaxaroo.models.vision import conv
from jaxaroo.train import vision
from jaxaroo.train.checkpoint import CheckpointConfig
from jaxaroo.train.data.images import FILES, in_order, normalise, read_cifar10
from jaxaroo.train.optimizer import OptimizerConfig
from jaxaroo.train.run import Outcome
from jaxaroo.train.vision import GhostOptions, ResNetOptions, VisionConfig, joint_optimizer, run

pytestmark = pytest.mark.optimizer
NETWORK = ResNetConfig(blocks=(1,), channels=4, classes=4, bits=(8, 6, 4, 2))
ADAM = OptimizerConfig(learning_rate=5e-3, weight_decay=5e-5, decay_to=0.1, clip_norm=None)
OPTIONS = ResNetOptions(network=NETWORK, float_epochs=2, epochs=2, optimizer=ADAM, scale_rate=5e-3)
STEPS = 20


def write_toy(folder, records=64, seed=0):
    """Four classes of stripes, across or along, in red or in blue, under noise."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    y, x = np.mgrid[:32, :32]
    for name in FILES["train"] + FILES["test"]:
        rows = []
        for label in rng.integers(0, 4, records):
            image = rng.normal(128, 25, (3, 32, 32))
            image[label // 2 * 2] += 140 * ((y if label % 2 else x) // 4 % 2) - 70
            rows.append(bytes([label]) + np.clip(image, 0, 255).astype(np.uint8).tobytes())
        (folder / name).write_bytes(b"".join(rows))
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("images") / "toy")


def settings(toy, out, **changes):
    usual = dict(batch_size=32, test_batch=48, log_every=4, evaluate_every=10, checkpoint=CheckpointConfig(every=7))
    return VisionConfig(**(dict(data=toy, out=out) | usual | changes))


@pytest.fixture(scope="module")
def unbroken(toy, tmp_path_factory):
    """A run to its end, by nothing disturbed."""
    out = tmp_path_factory.mktemp("vision") / "run"
    with jax.numpy_dtype_promotion("standard"):
        assert run("resnet20", settings(toy, out), OPTIONS) == Outcome(STEPS, True, None)
    return out


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_all_widths_learn_to_tell_the_stripes(unbroken):
    first = lines(unbroken / "float" / "metrics.jsonl")
    assert [r["step"] for r in first] == list(range(1, STEPS + 1))
    assert first[0]["loss"] > 0.9
    assert [r["step"] for r in lines(unbroken / "float" / "evaluation.jsonl")] == [10, 20]
    last = lines(unbroken / "joint" / "evaluation.jsonl")[-1]
    assert last.keys() == {"step", "top1_8", "top1_6", "top1_4", "top1_2"}
    assert all(last[f"top1_{b}"] > 0.9 for b in NETWORK.bits), last
    record = lines(unbroken / "joint" / "metrics.jsonl")[-1]
    assert {"nll_8", "nll_2", "accuracy_4", "learning_rate", "images", "seconds"} <= record.keys()
    assert record["images"] == 32
    for phase in ("float", "joint"):
        assert (unbroken / phase / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_folder_answers_as_the_evaluation_did(unbroken, toy):
    test = read_cifar10(toy, "test")
    [batch] = in_order(test, len(test.labels))
    images = jnp.asarray(batch.images)
    cfg, stored = resnet.load(unbroken / "joint" / "model")
    assert cfg == NETWORK
    serve = jax.jit(lambda bits: resnet.logits(cfg, stored, images, bits))
    last = lines(unbroken / "joint" / "evaluation.jsonl")[-1]
    for bits in cfg.bits:
        right = np.asarray(serve(jnp.int32(bits))).argmax(-1) == test.labels
        assert right.mean() == last[f"top1_{bits}"]
    cfg, stored = resnet.load(unbroken / "float" / "model")
    right = np.asarray(resnet.logits(cfg, stored, images)).argmax(-1) == test.labels
    assert right.mean() == lines(unbroken / "float" / "evaluation.jsonl")[-1]["top1"]
    assert cfg == dataclasses.replace(NETWORK, bits=())


@pytest.mark.slow
def test_running_statistics_come_to_those_of_the_images(unbroken, toy):
    """Of the first convolution, whose input no training changes: at the end of the float phase, which ends slowly."""
    _, stored = resnet.load(unbroken / "float" / "model")
    pixels = jnp.asarray(normalise(read_cifar10(toy, "train").pixels))
    y = np.asarray(conv(pixels, stored["params"]["stem"]["kernel"]), np.float64)
    found = stored["stats"]["stem"]
    ratio = np.asarray(found["var"][0]) / y.var((0, 1, 2))
    assert ((ratio > 0.6) & (ratio < 1.2)).all(), ratio  # crops have borders of zeros, and 0.9^20 of the 1 is left


@pytest.mark.proof
def test_a_run_stopped_in_each_phase_ends_as_one_that_was_not(unbroken, toy, tmp_path, monkeypatch):
    cfg, append, due = settings(toy, tmp_path / "run"), vision.append_records, [5, 5 + STEPS]
    seen = []

    def stop_when_due(path, records):
        append(path, records)
        if path.name == "metrics.jsonl":
            seen.extend(records)
            if due and len(seen) >= due[0]:
                due.pop(0)
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(vision, "append_records", stop_when_due)
    first = run("resnet20", cfg, OPTIONS)
    assert (first.finished, first.signal) == (False, signal.SIGINT)
    assert 5 <= first.step < STEPS
    assert not (cfg.out / "float" / "model").exists()
    second = run("resnet20", cfg, OPTIONS)
    assert (second.finished, second.signal) == (False, signal.SIGINT)
    assert (cfg.out / "float" / "model").exists()
    assert not (cfg.out / "joint" / "model").exists()
    assert run("resnet20", cfg, OPTIONS) == Outcome(STEPS, True, None)
    for phase in ("float", "joint"):
        for name in ("model/model.safetensors", "model/config.json", "evaluation.jsonl"):
            assert (cfg.out / phase / name).read_bytes() == (unbroken / phase / name).read_bytes(), (phase, name)
        plain = lambda r: {k: v for k, v in r.items() if k != "seconds"}
        found, wanted = (lines(out / phase / "metrics.jsonl") for out in (cfg.out, unbroken))
        assert list(map(plain, found)) == list(map(plain, wanted))
    before = {p: p.stat().st_mtime_ns for p in cfg.out.rglob("*.safetensors")}
    assert run("resnet20", cfg, OPTIONS).finished  # nothing is done again
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.slow
def test_a_float_teacher_and_network_may_come_from_another_run(unbroken, toy, tmp_path):
    options = dataclasses.replace(OPTIONS, start=unbroken / "float" / "model", kd="fp", epochs=0.2)
    assert run("resnet20", settings(toy, tmp_path / "run"), options) == Outcome(2, True, None)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {".lock", "images.sha256", "joint", "vision.yaml"}
    [last] = lines(tmp_path / "run" / "joint" / "evaluation.jsonl")
    assert last["top1_8"] > 0.7  # guessing has 0.25: it began as the float network


# --------------------------------------------------------------------------------------------------------------- ghost
GHOST = GhostOptions(
    network=GhostNetConfig(table="small", width=0.26, classes=4, head=16),  # a width that no other test has
    epochs=0.4,
    optimizer=OptimizerConfig(learning_rate=1e-3, clip_norm=None),
)


@pytest.mark.proof
def test_a_taught_network_is_folded_at_the_end_and_answers_as_before(unbroken, toy, tmp_path, monkeypatch):
    """The running mean of the weights is what is measured and written, and its statistics with it. Of one row, for
    every convolution has up to five branches to compile."""
    monkeypatch.setitem(ghostnet.TABLES, "small", ((3, 16, 24, 1, 2),))
    options = dataclasses.replace(GHOST, teacher=unbroken / "joint" / "model", ema=0.5)
    cfg = settings(toy, tmp_path / "run", evaluate_every=0)
    assert run("ghostnet", cfg, options) == Outcome(4, True, None)
    test = read_cifar10(toy, "test")
    images = jnp.asarray(normalise(test.pixels))
    found = {}
    for name in ("model", "branches"):
        network, params, stats = ghostnet.load(tmp_path / "run" / "ghost" / name)
        assert network == dataclasses.replace(options.network, folded=name == "model")
        found[name] = np.asarray(jax.jit(functools.partial(ghostnet.forward, network))(params, stats, images).logits)
    np.testing.assert_allclose(found["model"], found["branches"], rtol=1e-4, atol=1e-5)
    [last] = lines(tmp_path / "run" / "ghost" / "evaluation.jsonl")
    assert last == {"step": 4, "top1": (found["branches"].argmax(-1) == test.labels).mean()}
    losses = [r["loss"] for r in lines(tmp_path / "run" / "ghost" / "metrics.jsonl")]
    assert losses[0] > 1.5 * np.log(4)  # of labels and of the teacher


# ----------------------------------------------------------------------------------------------------------- optimiser
@pytest.mark.parametrize("alrs", ["off", "eta_only", "relative", "printed"])
def test_each_group_learns_by_its_own_adam(alrs):
    """Kernels with one state for all turns; norms, and scales of both sorts, as if other widths did not exist."""
    widths, turns = (8, 6, 2), (8, 6, 2, 8, 6, 2, 2)
    cfg = OptimizerConfig(learning_rate=0.02, weight_decay=0.1, schedule="linear", decay_to=0.5, clip_norm=None)
    options = ResNetOptions(network=dataclasses.replace(NETWORK, bits=widths), optimizer=cfg, scale_rate=0.4, alrs=alrs)
    rng = np.random.default_rng(0)
    tree = lambda: {
        "model": {
            "a": {"kernel": rng.normal(size=(2, 3)), "norm": rng.normal(size=(3, 2))},
            "head_bias": rng.normal(size=2),
        },
        "scales": {"a": {"rho": rng.normal(size=(2, 1)), "act": rng.normal(size=3)}},
    }
    f32 = lambda t: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), t)
    params, grads = f32(tree()), []
    for bits in turns:
        g, i = tree(), widths.index(bits)
        for x in (g["model"]["a"]["norm"], g["scales"]["a"]["act"]):
            x[[k for k in range(3) if k != i]] = 0  # another width's
        grads.append(jax.tree.map(lambda x: np.asarray(x, np.float32), g))

    want = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    moments = {}

    def adam(key, g):
        m, v, t = moments.get(key, (0.0, 0.0, 0))
        m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, t + 1
        moments[key] = (m, v, t)
        return m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)

    total = 3 * 3  # updates of a run of three steps
    for n, (bits, g) in enumerate(zip(turns, grads, strict=True)):
        g, i = jax.tree.map(lambda x: x.astype(np.float64), g), widths.index(bits)
        shape = 0.5 + 0.5 * (1 - n / (total - 1))
        rate, scale_rate = 0.02 * shape, 0.4 * shape
        model, scales = want["model"], want["scales"]["a"]
        model["a"]["kernel"] -= rate * (adam("kernel", g["model"]["a"]["kernel"]) + 0.1 * model["a"]["kernel"])
        model["head_bias"] -= rate * adam("head", g["model"]["head_bias"])
        model["a"]["norm"][i] -= rate * adam(("norm", i), g["model"]["a"]["norm"][i])
        scales["act"][i] -= scale_rate * adam(("act", i), g["scales"]["a"]["act"][i])
        mean, eta = min(np.abs(g["scales"]["a"]["rho"]).max(), 1), {8: 1.0, 6: 0.1, 2: 0.001}[bits]
        tied = {"off": scale_rate, "eta_only": eta * scale_rate, "relative": eta * scale_rate * (1 - mean)}
        tied["printed"] = eta * max(scale_rate - mean, 0)
        scales["rho"] -= tied[alrs] * adam(("rho", i), g["scales"]["a"]["rho"])

    tx = joint_optimizer(options, 3)
    state, update = tx.init(params), jax.jit(lambda *a, turn: tx.update(*a, turn=turn))
    for bits, g in zip(turns, grads, strict=True):
        updates, state = update(f32(g), state, params, turn=jnp.int32(bits))
        params = jax.tree.map(jnp.add, params, updates)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), params, want)
    assert update._cache_size() == 1


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.errors
@pytest.mark.slow
def test_what_cannot_be_gone_on_with_is_refused(unbroken, toy, tmp_path):
    cfg = settings(toy, unbroken)
    wrong = dataclasses.replace(OPTIONS, network=dataclasses.replace(NETWORK, bits=(8, 2)))
    with pytest.raises(ValueError, match=r"other settings: --seed was 0 and is 1; --network.bits was \(8, 6, 4, 2\)"):
        run("resnet20", dataclasses.replace(cfg, seed=1), wrong)
    run("resnet20", dataclasses.replace(cfg, log_every=9), OPTIONS)  # which changes nothing that is learned
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    with pytest.raises(FileExistsError, match="holds other files"):
        run("resnet20", settings(toy, tmp_path / "full"), OPTIONS)
    start = dataclasses.replace(OPTIONS, start=unbroken / "joint" / "model")
    with pytest.raises(ValueError, match=r"with widths \(8, 6, 4, 2\); expected .* and a float one"):
        run("resnet20", settings(toy, tmp_path / "new"), start)
    with pytest.raises(FileNotFoundError, match=r"has no data_batch_1\.bin"):
        run("resnet20", settings(tmp_path, tmp_path / "new"), OPTIONS)
    teacher = dataclasses.replace(GHOST, teacher=unbroken / "float" / "model", network=GhostNetConfig(classes=9))
    with pytest.raises(ValueError, match="tells 4 classes; expected 9"):
        run("ghostnet", settings(toy, tmp_path / "new"), teacher)
    assert not (tmp_path / "new").exists()


@pytest.mark.errors
def test_labels_that_the_network_does_not_tell_are_refused(toy, tmp_path):
    few = dataclasses.replace(OPTIONS, network=dataclasses.replace(NETWORK, classes=3))
    with pytest.raises(ValueError, match=r"has label 3; expected below 3, .* Give --network\.classes"):
        run("resnet20", settings(toy, tmp_path / "new"), few)
    assert not (tmp_path / "new").exists()


@pytest.mark.errors
@pytest.mark.slow
def test_a_later_phase_goes_on_with_the_same_images_alone(unbroken, toy, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(unbroken, out, ignore=shutil.ignore_patterns("joint"))
    other = write_toy(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"holds other images than when .* was left"):
        run("resnet20", settings(other, out), OPTIONS)
    assert not (out / "joint").exists()


@pytest.mark.errors
def test_other_images_are_noticed(toy, tmp_path):
    cfg = settings(toy, tmp_path / "run")
    mark = vision._mark(cfg, read_cifar10(toy, "train"))
    other = read_cifar10(write_toy(tmp_path / "other", seed=1), "train")
    assert mark != vision._mark(cfg, other)
    assert mark == vision._mark(dataclasses.replace(cfg, out=tmp_path), read_cifar10(toy, "train"))


@pytest.mark.errors
def test_settings_that_mean_nothing_are_refused(tmp_path):
    for name in ("batch_size", "test_batch", "log_every", "max_skipped"):
        with pytest.raises(ValueError, match=f"VisionConfig.{name}: found 0"):
            settings(tmp_path, tmp_path, **{name: 0})
    for wrong in (dict(epochs=0.0), dict(scale_rate=-1.0), dict(kappa=2.0), dict(network=ResNetConfig())):
        with pytest.raises(ValueError, match="found"):
            ResNetOptions(**wrong)
    for wrong in (dict(epochs=0.0), dict(smoothing=1.0), dict(ema=-0.1), dict(network=GhostNetConfig(folded=True))):
        with pytest.raises(ValueError, match="found"):
            GhostOptions(**wrong)
