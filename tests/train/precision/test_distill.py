"""Oracles: loops over tokens in float64, and finite differences of them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.sharding.rules import FSDP_TP
from jaxaroo.train.data.pipeline import Batch
from jaxaroo.train.objectives.logprobs import Scores
from jaxaroo.train.objectives.sft import sft
from jaxaroo.train.precision.distill import Compared, DistillConfig, compare, compare_hidden, distill, kappa_at

B, T, D, E, V = 2, 5, 4, 3, 7
RNG = np.random.default_rng(0)
STUDENT, TEACHER = 2 * RNG.normal(size=(B, T, D)), 2 * RNG.normal(size=(B, T, E))
HEAD, TEACHER_HEAD = RNG.normal(size=(V, D)), RNG.normal(size=(V, E))
TARGETS = RNG.integers(0, V, (B, T))
MASK = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]], bool)
WEIGHTS = MASK * np.array([[1.0], [0.25]])
f32 = lambda x: jnp.asarray(x, jnp.float32)
hidden = jax.jit(compare_hidden, static_argnums=5)


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def loss_of(student, head, kappa, temperature, kinds=("nll", "kl")):
    """The weighted sum over all tokens, divided by how many count."""
    total = 0.0
    for b in range(B):
        for t in range(T):
            z, w = head @ student[b, t], TEACHER_HEAD @ TEACHER[b, t]
            nll = -np.log(softmax(z)[TARGETS[b, t]])
            p, q = softmax(w / temperature), softmax(z / temperature)
            kl = sum(p[v] * (np.log(p[v]) - np.log(q[v])) for v in range(V))
            total += WEIGHTS[b, t] * ((1 - kappa) * nll + kappa * temperature**2 * kl)
    return total / MASK.sum()


@functools.partial(jax.jit, static_argnums=3)
def loss_and_gradient(student, head, kappa, cfg):
    def loss(student, head):
        found = compare_hidden(student, f32(TEACHER), head, f32(TEACHER_HEAD), jnp.asarray(TARGETS), cfg)
        term = distill(found, batch(), kappa, cfg)[0]["distill"]
        return (term.value * term.weight).sum() / float(MASK.sum())

    return jax.value_and_grad(loss, (0, 1))(student, head)


def batch():
    zeros = jnp.zeros((B, T), jnp.int32)
    return Batch(zeros, jnp.asarray(TARGETS), zeros, zeros + 1, jnp.asarray(MASK), f32(WEIGHTS))


@pytest.mark.parametrize("tile", [1024, 4, 1])
@pytest.mark.parametrize(("kappa", "temperature"), [(0.5, 1.0), (0.3, 2.5), (1.0, 0.5), (0.0, 1.0)])
def test_loss_and_gradient_are_those_of_the_loops(kappa, temperature, tile):
    cfg = DistillConfig(temperature=temperature, tile=tile)
    value, (on_student, on_head) = loss_and_gradient(f32(STUDENT), f32(HEAD), kappa, cfg)
    assert float(value) == pytest.approx(loss_of(STUDENT, HEAD, kappa, temperature), rel=1e-5)
    for got, x, at in ((on_student, STUDENT, 0), (on_head, HEAD, 1)):
        want = np.zeros_like(x)
        for i in np.ndindex(x.shape):
            moved = [[STUDENT.copy(), HEAD.copy()] for _ in range(2)]
            moved[0][at][i] += 1e-5
            moved[1][at][i] -= 1e-5
            want[i] = (loss_of(*moved[0], kappa, temperature) - loss_of(*moved[1], kappa, temperature)) / 2e-5
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-6)
    assert not np.asarray(on_student)[~MASK].any()


def test_without_a_teacher_it_is_supervised_fine_tuning():
    """Term for term: the same values, weights and unit, so a window counts the same tokens."""
    found = hidden(f32(STUDENT), f32(TEACHER), f32(HEAD), f32(TEACHER_HEAD), jnp.asarray(TARGETS))
    scores = Scores(-found.nll, jnp.zeros((B, T)), f32(STUDENT))
    terms, metrics = distill(found, batch(), 0.0)
    (got,), (want,) = terms.values(), sft(scores, batch())[0].values()
    np.testing.assert_array_equal(got.value, want.value)
    np.testing.assert_array_equal(got.weight, want.weight)
    assert got.unit == want.unit == "token"
    other = distill(found, batch(), 0.7)[0]["distill"]
    np.testing.assert_array_equal(other.weight, want.weight)
    assert other.unit == "token"
    assert other.value.dtype == got.value.dtype == jnp.float32
    for name in ("nll", "kl"):
        np.testing.assert_array_equal(metrics[name].value, getattr(found, name))
        np.testing.assert_array_equal(metrics[name].weight, MASK)
        assert metrics[name].unit == "token"


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equal_models_have_nothing_to_teach(temperature):
    student, cfg = f32(STUDENT), DistillConfig(temperature=temperature)

    def kl(student):
        return compare_hidden(student, f32(STUDENT), f32(HEAD), f32(HEAD), jnp.asarray(TARGETS), cfg).kl

    np.testing.assert_allclose(jax.jit(kl)(student), np.zeros((B, T)), atol=1e-6)  # 2^-23 of logits up to 8
    gradient = jax.jit(jax.grad(lambda s: kl(s).sum()))(student)
    np.testing.assert_allclose(gradient, np.zeros((B, T, D)), atol=1e-6)
    far = jax.jit(jax.grad(lambda s: kl(s + 1e-2 * f32(RNG.normal(size=(B, T, D)))).sum()))(student)
    assert float(jnp.abs(far).max()) > 1e-4  # what a small difference does


def test_the_teacher_learns_nothing():
    def loss(teacher, teacher_head):
        found = compare_hidden(f32(STUDENT), teacher, f32(HEAD), teacher_head, jnp.asarray(TARGETS))
        return distill(found, batch(), 0.5)[0]["distill"].value.sum()

    for gradient in jax.jit(jax.grad(loss, (0, 1)))(f32(TEACHER), f32(TEACHER_HEAD)):
        assert not np.asarray(gradient).any()
    logits = lambda z, w: compare(z, w, jnp.asarray(TARGETS)).kl.sum()
    on = jax.grad(logits, (0, 1))(f32(STUDENT @ HEAD.T), f32(TEACHER @ TEACHER_HEAD.T))
    assert np.asarray(on[0]).any()
    assert not np.asarray(on[1]).any()


def test_one_head_for_both_gets_the_gradient_of_the_student_alone():
    def loss(head, teacher_head):
        found = compare_hidden(f32(STUDENT), f32(STUDENT[:, ::-1]), head, teacher_head, jnp.asarray(TARGETS))
        return distill(found, batch(), 0.5)[0]["distill"].value.sum()

    both = jax.jit(jax.grad(lambda head: loss(head, head)))(f32(HEAD))
    np.testing.assert_allclose(both, jax.jit(jax.grad(loss))(f32(HEAD), f32(HEAD)), rtol=1e-6, atol=1e-7)


def test_states_and_logits_say_the_same():
    z, w = STUDENT @ HEAD.T, TEACHER @ TEACHER_HEAD.T
    want = compare(f32(z), f32(w), jnp.asarray(TARGETS), 1.7)
    for tile in (1024, 6, 1):
        cfg = DistillConfig(temperature=1.7, tile=tile)
        got = hidden(f32(STUDENT), f32(TEACHER), f32(HEAD), f32(TEACHER_HEAD), jnp.asarray(TARGETS), cfg)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_low_precision_states_give_float32_numbers_and_the_head_a_float32_sum():
    low = [x.astype(jnp.bfloat16) for x in (f32(STUDENT), f32(TEACHER))]
    head, teacher_head, targets = f32(HEAD), f32(TEACHER_HEAD), jnp.asarray(TARGETS)
    found = hidden(*low, head, teacher_head, targets, DistillConfig(tile=2))
    z = np.einsum("btd,vd->btv", *(np.asarray(x.astype(jnp.bfloat16), np.float64) for x in (low[0], head)))
    want = [-np.log(softmax(z[b, t])[TARGETS[b, t]]) for b in range(B) for t in range(T)]
    np.testing.assert_allclose(found.nll.ravel(), want, rtol=1e-5)
    assert found.nll.dtype == found.kl.dtype == jnp.float32
    many = lambda x: jnp.tile(x, (1, 40, 1))  # 400 tokens: a bfloat16 sum over tiles would lose most of them
    nll = lambda head: compare_hidden(
        many(low[0]), many(low[1]), head, teacher_head, jnp.tile(targets, (1, 40)), DistillConfig(tile=2)
    ).nll.sum()
    once = lambda head: compare_hidden(low[0], low[1], head, teacher_head, targets, DistillConfig(tile=2)).nll.sum()
    got, one = jax.jit(jax.grad(nll))(head), jax.jit(jax.grad(once))(head)
    np.testing.assert_allclose(got, 40 * np.asarray(one), rtol=1e-4, atol=1e-4)


def test_no_logits_of_all_tokens_are_held():
    """The program is looked at, forward and backward, for an array of every token by the vocabulary."""
    rows, length, vocab = 2, 64, 50

    def loss(student, head, tile):
        targets = jnp.zeros((rows, length), jnp.int32)
        found = compare_hidden(student, jnp.ones((rows, length, E)), head, jnp.ones((vocab, E)), targets, tile)
        return (found.nll + found.kl).sum()

    def largest(tile):
        args = (jnp.ones((rows, length, D)), jnp.ones((vocab, D)))
        program = str(jax.make_jaxpr(jax.grad(lambda *a: loss(*a, DistillConfig(tile=tile)), (0, 1)))(*args))
        shapes = [[int(n) for n in shape.split(",")] for shape in re.findall(r"f32\[([\d,]+)\]", program)]
        return max(np.prod(shape) for shape in shapes if vocab in shape)

    assert largest(tile=8) == 8 * vocab
    assert largest(tile=1024) == rows * length * vocab


def test_the_teacher_counts_below_its_own_width_and_a_float_one_everywhere():
    inplace, fp = DistillConfig(kappa=0.4), DistillConfig(teacher="fp", kappa=0.4)
    at = jax.jit(kappa_at, static_argnums=(1, 2))
    for bits in (8, 6, 2):
        for given in (bits, jnp.int32(bits)):
            assert float(at(given, 8, inplace)) == (0 if bits == 8 else np.float32(0.4))
            assert float(at(given, 8, fp)) == np.float32(0.4)
    for layers, want in (([8, 8, 8], 0), ([8, 4, 8], np.float32(0.4)), ([2, 2, 2], np.float32(0.4))):
        assert float(at(jnp.asarray(layers, jnp.int32), 8, inplace)) == want
    assert float(at(4, 4, inplace)) == 0
    traced = []

    @jax.jit
    def value(bits):
        traced.append(1)
        found = Compared(jnp.ones((B, T)), 3 * jnp.ones((B, T)))
        return distill(found, batch(), kappa_at(bits, 8, inplace), inplace)[0]["distill"].value[0, 0]

    assert [float(value(jnp.int32(b))) for b in (8, 4)] == pytest.approx([1.0, 0.6 + 0.4 * 3])
    assert len(traced) == 1


def test_layout_reaches_the_logits():
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])):
        args = (f32(STUDENT), f32(TEACHER), f32(HEAD), f32(TEACHER_HEAD), jnp.asarray(TARGETS))
        program = lambda **rules: str(jax.make_jaxpr(functools.partial(compare_hidden, **rules))(*args))
        assert "spec=P(('data', 'fsdp')" not in program()
        assert "spec=P(('data', 'fsdp')" in program(rules=FSDP_TP)


@pytest.mark.errors
def test_what_means_nothing_is_refused():
    for bad in ({"teacher": "me"}, {"kappa": 1.1}, {"kappa": -0.1}, {"temperature": 0.0}, {"tile": 0}):
        with pytest.raises(ValueError, match=f"DistillConfig.{next(iter(bad))}: found {next(iter(bad.values()))!r}"):
            DistillConfig(**bad)
    z, y = jnp.ones((2, 3, 7)), jnp.zeros((2, 3), jnp.int32)
    for args in ((z, z[..., :6], y), (z, z, y[:1])):
        with pytest.raises(ValueError, match=r"compare: student .*; expected \[..., V\], \[..., V\], \[...\]"):
            compare(*args)
