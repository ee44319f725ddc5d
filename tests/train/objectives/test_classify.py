"""The losses from logits in float64; who gets a gradient; and that a step in training moves weights and statistics."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.models import ghostnet, resnet
from jaxaroo.models.ghostnet import GhostNetConfig
from jaxaroo.models.resnet import ResNetConfig
from jaxaroo.train.data.images import ImageBatch
from jaxaroo.train.objectives.classify import count_images, float_loss, ghost_loss, joint_loss
from jaxaroo.train.precision.distill import DistillConfig

FLOAT = ResNetConfig(blocks=(1,), channels=4, classes=3)
CFG = dataclasses.replace(FLOAT, bits=(8, 4, 2))


@functools.cache
def batch():
    images = jax.random.normal(jax.random.key(1), (6, 6, 6, 3))
    return ImageBatch(images, jnp.asarray([0, 1, 2, 2, 1, 0]), jnp.asarray([True, True, False, True, True, True]))


@functools.cache
def params():
    model, stats = resnet.init(FLOAT, jax.random.key(0))
    other = resnet.init(FLOAT, jax.random.key(5))
    wide, wide_stats = resnet.widen(CFG, model, stats)
    scales = resnet.init_scales(CFG, wide, wide_stats, batch().images)
    joint = {"model": wide, "scales": scales, "stats": wide_stats, "teacher": {"params": other[0], "stats": other[1]}}
    return {"model": model, "stats": stats}, joint


def logits_at(joint, bits):
    low = resnet.at_width(CFG, joint["model"], joint["scales"], bits)
    out = resnet.forward(CFG, low, joint["stats"], batch().images, bits, joint["scales"], train=True)
    return np.asarray(out.logits, np.float64), out.stats


def log_softmax(z):
    return z - z.max(-1, keepdims=True) - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))


def nll(z):
    return -log_softmax(z)[np.arange(6), np.asarray(batch().labels)]


def mean(term):
    weight = np.asarray(term.weight, np.float64)
    return float((np.asarray(term.value, np.float64) * weight).sum() / weight.sum())


@pytest.mark.optimizer
@pytest.mark.slow
def test_a_float_network_learns_labels_and_masked_images_do_not_count():
    plain, _ = params()
    terms, measured = float_loss(FLOAT)(plain, batch(), jax.random.key(0))
    out = resnet.forward(FLOAT, plain["model"], plain["stats"], batch().images, train=True)
    z, mask = np.asarray(out.logits, np.float64), np.asarray(batch().mask)
    assert [*terms] == ["nll"]
    assert terms["nll"].unit == "image"
    assert mean(terms["nll"]) == pytest.approx(nll(z)[mask].mean(), rel=1e-5)
    assert mean(measured["accuracy"]) == pytest.approx((z.argmax(-1) == np.asarray(batch().labels))[mask].mean())
    window = ImageBatch(*(x[None] for x in batch()))
    assert int(count_images(window)["image"]) == 5


@functools.cache
def jitted(distill):
    def value(joint, bits):
        terms, _ = joint_loss(CFG, distill)(joint, batch(), jax.random.key(0), bits)
        return terms["nll"].value, jnp.sum(terms["nll"].value * terms["nll"].weight)

    return jax.jit(lambda joint, bits: value(joint, bits)[0]), jax.jit(jax.grad(lambda j, b: value(j, b)[1]))


TEACHERS = [None, DistillConfig(kappa=0.3, temperature=2.0), DistillConfig(teacher="fp", kappa=0.3, temperature=2.0)]


@pytest.mark.optimizer
@pytest.mark.parametrize("distill", TEACHERS)
@pytest.mark.parametrize("bits", CFG.bits)
@pytest.mark.slow
def test_a_width_learns_labels_and_from_its_teacher(distill, bits):
    _, joint = params()
    z, _ = logits_at(joint, bits)
    wanted = nll(z)
    if distill is not None and (distill.teacher == "fp" or bits < 8):
        if distill.teacher == "fp":
            other = joint["teacher"]
            out = resnet.forward(FLOAT, other["params"], other["stats"], batch().images)  # with running statistics
            teacher = np.asarray(out.logits, np.float64)
        else:
            teacher, _ = logits_at(joint, 8)
        p, q = log_softmax(teacher / 2), log_softmax(z / 2)
        wanted = 0.7 * wanted + 0.3 * 4 * (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(jitted(distill)[0](joint, jnp.int32(bits)), wanted, rtol=2e-4, atol=1e-5)


@pytest.mark.optimizer
@pytest.mark.parametrize("distill", TEACHERS[1:])
@pytest.mark.slow
def test_no_gradient_passes_through_the_teacher(distill):
    """The inplace one is the student's own weights: what is left has to be the gradient for fixed logits."""
    _, joint = params()
    found = jitted(distill)[1](joint, jnp.int32(2))
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(found["teacher"]))
    if distill.teacher == "inplace":
        fixed = jnp.asarray(logits_at(joint, 8)[0], jnp.float32)

        def value(model):
            low = resnet.at_width(CFG, model, joint["scales"], 2)
            z = resnet.forward(CFG, low, joint["stats"], batch().images, 2, joint["scales"], train=True).logits
            own = -jax.nn.log_softmax(z)[jnp.arange(6), batch().labels]
            p, q = jax.nn.log_softmax(fixed / 2), jax.nn.log_softmax(z / 2)
            each = 0.7 * own + 1.2 * jnp.sum(jnp.exp(p) * (p - q), -1)
            return jnp.sum(each * batch().mask.astype(jnp.float32))

        wanted = jax.jit(jax.grad(value))(joint["model"])
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
        jax.tree.map(close, found["model"], wanted)


@pytest.mark.optimizer
@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.slow
def test_ghost_learns_smoothed_labels_and_all_that_its_teacher_says(monkeypatch, taught):
    """Its forward pass is put aside: it has tests of its own, and takes long to compile."""
    z = jax.random.normal(jax.random.key(7), (6, 3))
    moved = {"m": jnp.float32(2.0)}
    monkeypatch.setattr(ghostnet, "forward", lambda cfg, p, s, x, train: ghostnet.Output(z * p["w"], moved))
    _, joint = params()
    both = {"model": {"w": jnp.float32(1.0)}, "stats": {"m": jnp.float32(3.0)}, "teacher": joint["teacher"]}
    loss = ghost_loss(GhostNetConfig(classes=3), 0.2, FLOAT if taught else None)
    terms, _ = loss(both, batch(), jax.random.key(0))
    logp = log_softmax(np.asarray(z, np.float64))
    q = 0.8 * np.eye(3)[np.asarray(batch().labels)] + 0.2 / 3
    if taught:
        out = resnet.forward(FLOAT, both["teacher"]["params"], both["teacher"]["stats"], batch().images)
        q = q + np.exp(log_softmax(np.asarray(out.logits, np.float64)))
    np.testing.assert_allclose(terms["nll"].value, -(q * logp).sum(-1), rtol=1e-5)
    gradient = jax.grad(lambda p: jnp.sum(loss(p, batch(), jax.random.key(0))[0]["nll"].value))(both)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient["teacher"]))
    assert float(gradient["stats"]["m"]) == pytest.approx(6 / 2**20)


@pytest.mark.optimizer
@pytest.mark.slow
def test_the_gradient_in_the_statistics_is_the_way_they_go():
    _, joint = params()
    found = jitted(None)[1](joint, jnp.int32(4))["stats"]
    wanted = jax.tree.map(lambda old, new: 5 * (old - new) / 2**20, joint["stats"], logits_at(joint, 4)[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-12), found, wanted)
    assert np.asarray(found["stem"]["mean"])[1].any()
    assert not np.asarray(found["stem"]["mean"])[[0, 2]].any()
