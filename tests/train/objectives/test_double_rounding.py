"""Oracles: fine-tuning of the weights that will be served, the formula by loops in float64, and a constant teacher."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.models.decoder import DecoderConfig, Model, init_params, logits, param_shapes
from jaxaroo.models.multi_precision import MATRICES, from_master, init_scales, to_master
from jaxaroo.models.quantise import QuantConfig
from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.sharding.rules import FSDP_TP
from jaxaroo.train.data.pipeline import Batch, count_units
from jaxaroo.train.objectives import sft
from jaxaroo.train.objectives.double_rounding import make_loss
from jaxaroo.train.optimizer import OptimizerConfig
from jaxaroo.train.precision.distill import DistillConfig, compare, distill
from jaxaroo.train.precision.joint import ScaleConfig, hasb_turns, joint_optimizer
from jaxaroo.train.state import init_state
from jaxaroo.train.step import make_train_step

CFG = DecoderConfig(
    vocab_size=11, embed_dim=32, ffn_dim=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, tie_embeddings=True
)
QUANT = (
    ("layers/attn/o", QuantConfig(gain=(4, 2))),
    ("layers/attn/k", None),
    ("layers/mlp/down", QuantConfig(bits=(8, 4), group=32)),
    (MATRICES, QuantConfig()),
)
PLANS = {"8": (8, 8), "6": (6, 6), "4": (4, 4), "2": (2, 2), "8,2": (8, 2), "4,8": (4, 8)}
RNG = np.random.default_rng(0)
TOKENS, TARGETS = RNG.integers(0, 11, (2, 7)), RNG.integers(0, 11, (2, 7))
MASK = np.array([[0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]], bool)
WEIGHTS = MASK * np.array([[1.0], [0.25]])
BATCH = Batch(
    *(jnp.asarray(x, jnp.int32) for x in (TOKENS, TARGETS, np.tile(np.arange(7), (2, 1)), np.ones((2, 7)))),
    jnp.asarray(MASK),
    jnp.asarray(WEIGHTS, jnp.float32),
)
TEACHING = {
    "none": None,
    "inplace": DistillConfig(kappa=0.3, temperature=2.0),
    "fp": DistillConfig(teacher="fp", kappa=0.6, temperature=0.5),
}


@functools.cache
def params():
    """Scales as after training, and a float teacher that has nothing to do with the model."""
    fresh = jax.jit(init_params, static_argnums=0)
    model = fresh(CFG, jax.random.key(1))
    scales = jax.jit(init_scales, static_argnums=1)(model, QUANT)
    keys = iter(jax.random.split(jax.random.key(2), 50))
    scales = jax.tree.map(lambda x: x * (1 + 0.02 * jax.random.normal(next(keys), x.shape)), scales)
    return {"model": model, "scales": scales, "teacher": fresh(CFG, jax.random.key(3))}


@functools.cache
def value_and_grad(teacher):
    loss = make_loss(CFG, QUANT, 8, TEACHING[teacher])

    def total(params, bits):
        terms, measured = loss(params, BATCH, jax.random.key(0), bits)
        (term,) = terms.values()
        assert {t.unit for t in (*terms.values(), *measured.values())} == {"token"}
        numbers = lambda terms: {name: (t.value, t.weight) for name, t in terms.items()}
        return jnp.sum(term.value * term.weight), (numbers(terms), numbers(measured))

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def terms_of(teacher, plan):
    return value_and_grad(teacher)(params(), jnp.asarray(plan, jnp.int32))


@jax.jit
def export(model, scales, bits):
    return from_master(to_master(model, scales, QUANT), bits, QUANT)


@functools.cache
def served(plan):
    """The weights of the stored integers at a width, or the float ones."""
    if plan == "teacher":
        return params()["teacher"]
    return export(params()["model"], params()["scales"], jnp.asarray(plan, jnp.int32))


def probabilities(plan, temperature=1.0):
    z = np.asarray(logits(Model(CFG, served(plan)), TOKENS), np.float64) / temperature
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@jax.jit
def fine_tuning(weights):
    terms, measured = sft.make_loss(CFG)(weights, BATCH, jax.random.key(0))
    return [{name: (t.value, t.weight) for name, t in found.items()} for found in (terms, measured)]


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.slow
def test_without_a_teacher_it_is_fine_tuning_of_the_weights_that_will_be_served(plan):
    _, (terms, measured) = terms_of("none", plan)[0]
    want, wanted = fine_tuning(served(plan))
    assert (terms.keys(), measured.keys()) == (want.keys(), wanted.keys())
    for name, (value, weight) in (want | wanted).items():
        np.testing.assert_allclose((terms | measured)[name][0], value, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal((terms | measured)[name][1], weight)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("teacher", ["inplace", "fp"])
@pytest.mark.slow
def test_with_a_teacher_it_is_the_formula(teacher, plan):
    cfg = TEACHING[teacher]
    kappa = 0.0 if teacher == "inplace" and min(plan) == 8 else cfg.kappa
    student, heat = probabilities(plan), cfg.temperature
    taught = probabilities("teacher" if teacher == "fp" else (8, 8), heat)
    (value, (terms, measured)), _ = terms_of(teacher, plan)
    want = 0.0
    for b, t in np.ndindex(2, 7):
        nll = -np.log(student[b, t, TARGETS[b, t]])
        p, q = taught[b, t], student[b, t] ** (1 / heat)
        q = q / q.sum()
        kl = sum(p[v] * (np.log(p[v]) - np.log(q[v])) for v in range(11))
        want += WEIGHTS[b, t] * ((1 - kappa) * nll + kappa * heat**2 * kl)
        np.testing.assert_allclose(measured["nll"][0][b, t], nll, rtol=1e-5, atol=1e-6)
        if kappa:
            assert kl > 1e-7
            np.testing.assert_allclose(measured["kl"][0][b, t], kl, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert terms.keys() == {"distill"}
    if not kappa:  # the widest model has nobody to learn from
        np.testing.assert_allclose(value, terms_of("none", plan)[0][0], rtol=1e-6)


@pytest.mark.parametrize("plan", [(8, 8), (2, 2), (8, 2)], ids=str)
@pytest.mark.parametrize("teacher", ["inplace", "fp"])
@pytest.mark.slow
def test_nothing_is_learned_through_the_teacher(teacher, plan):
    """The gradient is that of a loss whose teacher is a table of numbers."""
    cfg = TEACHING[teacher]
    table = logits(Model(CFG, served("teacher" if teacher == "fp" else (8, 8))), TOKENS)
    kappa = 0.0 if teacher == "inplace" and min(plan) == 8 else cfg.kappa
    got = terms_of(teacher, plan)[1]
    want = taught_by_numbers(params(), table, jnp.asarray(plan, jnp.int32), jnp.float32(kappa), cfg)
    for part in ("model", "scales"):
        size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want[part]))
        for (name, a), (_, b) in zip(leaves(got[part]), leaves(want[part]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5 * size, err_msg=name)
        assert all(np.abs(x).max() > 0 for name, x in leaves(got[part]) if "gain" not in name)
    assert all((np.asarray(x) == 0).all() for _, x in leaves(got["teacher"]))


def leaves(tree):
    return [(jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


@functools.partial(jax.jit, static_argnums=4)
def taught_by_numbers(params, table, bits, kappa, cfg):
    from jaxaroo.models.multi_precision import fake_quantise_tree
    from jaxaroo.train.objectives.logprobs import hidden_states

    def total(params):
        low = fake_quantise_tree(params["model"], params["scales"], bits, QUANT)
        z = jnp.einsum("btd,vd->btv", hidden_states(CFG, low, BATCH), low["embed"])
        term = distill(compare(z, table, BATCH.targets, cfg.temperature), BATCH, kappa, cfg)[0]["distill"]
        return jnp.sum(term.value * term.weight)

    return jax.grad(total)(params)


@pytest.mark.optimizer
@pytest.mark.proof
def test_one_program_serves_every_width_and_every_plan():
    count, loss = [], make_loss(CFG, QUANT, 8, TEACHING["inplace"])

    def counted(*args):
        count.append(0)
        return loss(*args)

    optimizer = OptimizerConfig(learning_rate=1e-2)
    tx = joint_optimizer(optimizer, ScaleConfig(learning_rate=1e-2), 4, 4, QUANT)
    turns = hasb_turns((8, 6, 4, 2), jnp.asarray([1.0, 2.0]), 4, epochs=4)
    step = make_train_step(counted, tx, count_units, turns=turns)
    state, window = (
        init_state({k: params()[k] for k in ("model", "scales")}, tx),
        jax.tree.map(lambda x: x[None], BATCH),
    )
    state = jax.tree.map(jnp.copy, state)
    losses, traced = [], []
    for _ in range(4):
        state, metrics = step(state, window)
        losses.append([float(metrics[f"nll_{b}"]) for b in (8, 6, 4, 2)])
        traced.append(len(count))
    assert len({*traced}) == 1
    assert step._cache_size() == 1
    assert np.mean(losses[-1]) < np.mean(losses[0])


@pytest.mark.slow
def test_layout_and_saving_of_memory_reach_the_decoder():
    """They change no number, so the program is looked at."""

    def program(teacher, **settings):
        loss = make_loss(CFG, QUANT, 8, TEACHING[teacher], **settings)
        shapes = {"model": param_shapes(CFG), "scales": params()["scales"], "teacher": param_shapes(CFG)}
        run = lambda params: [t.value for t in loss(params, BATCH, None, jnp.asarray([8, 2]))[0].values()]
        with jax.set_mesh(make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])):
            return str(jax.make_jaxpr(run)(shapes))

    for teacher in TEACHING:
        rows = "spec=P(('data', 'fsdp')"
        plain = program(teacher)
        assert rows not in plain
        assert rows in program(teacher, rules=FSDP_TP)
        assert program(teacher, remat="full").count("remat") > plain.count("remat")
