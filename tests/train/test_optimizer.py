"""Oracle: every optimiser as a float64 loop over NumPy arrays, and schedules at points computed by hand."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaroo.models.decoder import DecoderConfig, param_shapes
from jaxaroo.train.optimizer import OptimizerConfig, decays, make_optimizer, make_schedule, update_ema

STEPS = 10
CFG = OptimizerConfig(learning_rate=3e-2, warmup_steps=3, weight_decay=0.3, schedule="linear", decay_to=0.2)
RATES = [3e-2 * r for r in (1 / 3, 2 / 3, 1, 1, *(1 - 0.8 * i / 6 for i in range(1, 7)))]  # of CFG, by hand
VARIANTS = {
    "adamw": CFG,
    "adamw with its numbers": dataclasses.replace(CFG, b1=0.8, b2=0.95, eps=1e-2),
    "lion": dataclasses.replace(CFG, name="lion"),
    "lion with its numbers": dataclasses.replace(CFG, name="lion", b1=0.5, b2=0.7),
    "sgd": dataclasses.replace(CFG, name="sgd"),
    "sgd without momentum": dataclasses.replace(CFG, name="sgd", momentum=0.0),
    "adafactor": dataclasses.replace(CFG, name="adafactor"),
    "no decay": dataclasses.replace(CFG, weight_decay=0.0),
}


def trees(number):
    """Parameters or gradients: stacked layers with gains, a matrix that adafactor factors and some that it does not."""
    rng = np.random.default_rng(number)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    layers = {
        "attn": {"q": draw(2, 3, 2, 4), "q_bias": draw(2, 3, 2)},
        "attn_norm": draw(2, 4),
        "up": draw(2, 130, 140),
    }
    return {"embed": draw(5, 4), "norm": draw(4), "layers": layers}


@functools.cache
def gradients():
    """Ten of them: some longer than the clipping norm and some shorter, small ones and large ones mixed."""
    size = [1e-3, 1.0, 30.0, 1e-4, 0.1, 1e-3, 5.0, 1e-2, 1e-3, 2.0]
    return [jax.tree.map(lambda g, s=s: g * np.float32(s), trees(7 + i)) for i, s in enumerate(size)]


def flat(tree):
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def factored(g, state, t):
    """Second moments of adafactor, as row and column means over the two largest axes if both have 128, else whole."""
    keep, square = 1 - (t + 1) ** -0.8, g * g + 1e-30
    if g.ndim < 2 or sorted(g.shape)[-2] < 128:
        state["v"] = keep * state.get("v", 0) + (1 - keep) * square
        return g / np.sqrt(state["v"])
    state["row"] = keep * state.get("row", 0) + (1 - keep) * square.mean(-1, keepdims=True)
    state["col"] = keep * state.get("col", 0) + (1 - keep) * square.mean(-2, keepdims=True)
    return g / np.sqrt(state["row"] * state["col"] / state["row"].mean(-2, keepdims=True))


def oracle(cfg, steps):
    """Parameters after each of the first `steps` steps."""
    params = {k: v.astype(np.float64) for k, v in flat(trees(0)).items()}
    states = {k: {} for k in params}
    b1, b2 = cfg.b1, cfg.b2 or {"adamw": 0.999, "lion": 0.99}.get(cfg.name, 0.0)
    rms = lambda x: np.sqrt(np.mean(x * x))
    for t, grads in zip(range(steps), gradients(), strict=False):
        grads = {k: g.astype(np.float64) for k, g in flat(grads).items()}
        norm = np.sqrt(sum((g * g).sum() for g in grads.values()))
        for k, g in grads.items():
            g, s, w = g * min(1.0, cfg.clip_norm / norm), states[k], params[k]
            if cfg.name == "adamw":
                s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
                s["v"] = b2 * s.get("v", 0) + (1 - b2) * g * g
                u = s["m"] / (1 - b1 ** (t + 1)) / (np.sqrt(s["v"] / (1 - b2 ** (t + 1))) + cfg.eps)
            elif cfg.name == "lion":
                u = np.sign(b1 * s.get("m", 0) + (1 - b1) * g)
                s["m"] = b2 * s.get("m", 0) + (1 - b2) * g
            elif cfg.name == "sgd":
                u = s["m"] = cfg.momentum * s.get("m", 0) + g
            else:
                u = factored(g, s, t)
                u = u / max(1.0, rms(u)) * max(rms(w), 1e-3)
            decay = 0.0 if k.endswith(("norm", "bias")) else cfg.weight_decay
            params[k] = w - RATES[t] * (u + decay * w)
    return params


def run(cfg, steps, params=None):
    """The same with optax, in one scan: whatever the state is, it keeps its structure, shapes and dtypes."""
    tx = make_optimizer(cfg, STEPS)

    def body(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jax.tree.map(jnp.asarray, trees(0) if params is None else params)
    grads = jax.tree.map(lambda *g: jnp.stack(g), *gradients()[:steps])
    return jax.jit(lambda p, g: jax.lax.scan(body, (p, tx.init(p)), g)[0])(params, grads)


@pytest.mark.optimizer
@pytest.mark.parametrize("steps", [1, STEPS])
@pytest.mark.parametrize("name", VARIANTS)
def test_steps_match_a_float64_loop(name, steps):
    got, want = flat(run(VARIANTS[name], steps)[0]), oracle(VARIANTS[name], steps)
    start = flat(trees(0))
    for k in want:  # the movement, not the parameters: those hardly change
        np.testing.assert_allclose(got[k] - start[k], want[k] - start[k], rtol=1e-3, atol=2e-6, err_msg=k)


@pytest.mark.optimizer
def test_a_part_may_have_a_weight_decay_of_its_own():
    """Oracle: each part under one optimizer of its own; nothing is clipped, so they know nothing of each other."""
    cfg = dataclasses.replace(CFG, clip_norm=None, name="sgd")
    both = {"model": trees(0), "network": trees(1)}
    grads = {"model": gradients()[0], "network": gradients()[1]}

    def update(params, grads, decay, **more):
        tx = make_optimizer(dataclasses.replace(cfg, weight_decay=decay), STEPS, **more)
        params = jax.tree.map(jnp.asarray, params)
        return jax.jit(lambda p, g: tx.update(g, tx.init(p), p)[0])(params, grads)

    got = update(both, grads, 0.3, own_decay={"network": 0.05})
    for part, decay in (("network", 0.05), ("model", 0.3)):
        alone = update(both[part], grads[part], decay)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got[part], alone)
    others = update(both["network"], grads["network"], 0.3)
    assert any((a != b).any() for a, b in zip(flat(got["network"]).values(), flat(others).values(), strict=True))


@pytest.mark.optimizer
@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor"])
@pytest.mark.slow
def test_moments_are_float32_whatever_the_parameters_are_in(name):
    cfg = dataclasses.replace(CFG, name=name)
    half = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), trees(0))
    same = jax.tree.map(lambda w: w.astype(jnp.float32), half)
    tx = make_optimizer(cfg, STEPS)
    grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.bfloat16), gradients()[2])
    got = tx.update(grads, tx.init(half), half)
    want = tx.update(jax.tree.map(lambda g: g.astype(jnp.float32), grads), tx.init(same), same)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    leaves = jax.tree.leaves(got)
    assert all(isinstance(x, jax.Array) and x.dtype in (jnp.float32, jnp.int32) for x in leaves)
    after, _ = run(cfg, STEPS, half)
    assert {w.dtype for w in jax.tree.leaves(after)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.optimizer
def test_a_second_moment_does_not_stand_still_in_bfloat16():
    """With b2 = 0.999 each step adds a thousandth, and bfloat16 rounds that away: v would stay at its first value."""
    tx = make_optimizer(OptimizerConfig(clip_norm=None), 1000)
    params = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    step = jax.jit(lambda state: tx.update({"w": jnp.full((2, 2), 0.5, jnp.bfloat16)}, state, params)[1])
    state = tx.init(params)
    for _ in range(400):
        state = step(state)
    (v,) = (x for x in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "nu")) if hasattr(x, "nu"))
    np.testing.assert_allclose(v.nu["w"], 0.25 * (1 - 0.999**400), rtol=1e-4)


@pytest.mark.optimizer
def test_clipping_is_by_the_norm_of_the_whole_gradient_and_exact():
    grads = {"w": jnp.array([[3.0, 0.0]]), "norm": jnp.array([0.0, 4.0])}  # norm 5
    update = lambda clip, g: make_optimizer(
        OptimizerConfig(name="sgd", momentum=0.0, learning_rate=1.0, schedule="constant", clip_norm=clip), 1
    ).update(g, make_optimizer(OptimizerConfig(name="sgd", momentum=0.0), 1).init(g), g)[0]
    third = lambda x: np.float32(x) / np.float32(5) * np.float32(2)
    np.testing.assert_array_equal(update(2.0, grads)["w"], [[-third(3), 0.0]])
    np.testing.assert_array_equal(update(2.0, grads)["norm"], [0.0, -third(4)])
    for clip in (None, 5.5):
        jax.tree.map(lambda u, g: np.testing.assert_array_equal(u, -g), update(clip, grads), grads)


@pytest.mark.optimizer
@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor"])
def test_without_a_gradient_only_matrices_shrink_by_rate_times_decay(name):
    cfg = OptimizerConfig(name=name, learning_rate=0.1, schedule="constant", weight_decay=0.25)
    tx, params = make_optimizer(cfg, 3), jax.tree.map(jnp.asarray, trees(0))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for (k, u), w in zip(flat(updates).items(), flat(params).values(), strict=True):
        want = 0.0 * w if k in {"norm", "layers/attn_norm", "layers/attn/q_bias"} else -0.025 * w
        np.testing.assert_allclose(u, want, rtol=1e-6, atol=1e-9, err_msg=k)


def test_norms_and_biases_of_a_model_do_not_decay_and_adapters_do():
    sizes = dict(vocab_size=7, embed_dim=4, ffn_dim=6, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2)
    cfg = DecoderConfig(**sizes, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True)
    params = param_shapes(cfg)
    kept = {k for k, decay in flat(decays(params)).items() if decay is False}
    inside = "attn_norm mlp_norm attn/q_norm attn/k_norm attn/q_bias attn/k_bias attn/v_bias attn/o_bias"
    inside += " mlp/gate_bias mlp/up_bias mlp/down_bias"
    assert kept == {"norm", *(f"layers/{name}" for name in inside.split())}
    shrunk = {k for k, decay in flat(decays(params)).items() if decay is True}
    inside = "attn/q attn/k attn/v attn/o mlp/gate mlp/up mlp/down"
    assert shrunk == {"embed", "head", *(f"layers/{name}" for name in inside.split())}
    adapters = {"layers": ({"attn": {"q": {"a": 0, "b": 0}}}, {"attn_norm": 0})}
    assert decays(adapters) == {"layers": ({"attn": {"q": {"a": True, "b": True}}}, {"attn_norm": False})}


@pytest.mark.parametrize(
    ("change", "steps", "points"),
    [
        ({"schedule": "constant"}, 9, {0: 1.0, 8: 1.0, 99: 1.0}),
        ({"schedule": "constant", "warmup_steps": 4}, 9, {0: 0.25, 2: 0.75, 3: 1.0, 4: 1.0, 8: 1.0}),
        ({"schedule": "linear"}, 11, {0: 1.0, 5: 0.55, 9: 0.19, 10: 0.1, 50: 0.1}),
        ({"schedule": "linear", "warmup_steps": 2}, 13, {0: 0.5, 1: 1.0, 2: 1.0, 3: 0.91, 7: 0.55, 12: 0.1, 13: 0.1}),
        ({"schedule": "linear", "decay_to": 0.0}, 3, {0: 1.0, 1: 0.5, 2: 0.0}),
        ({"warmup_steps": 4}, 17, {3: 1.0, 4: 1.0, 7: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 10: 0.55, 16: 0.1, 17: 0.1}),
        ({"warmup_steps": 4}, 17, {8: 0.1 + 0.9 * 0.75, 12: 0.1 + 0.9 * 0.25}),  # cosines of 60 and 120 degrees
        ({"schedule": "wsd", "warmup_steps": 5}, 20, {0: 0.2, 4: 1.0, 15: 1.0, 16: 0.775, 17: 0.55, 19: 0.1, 30: 0.1}),
        ({"schedule": "wsd", "warmup_steps": 18}, 20, {16: 17 / 18, 17: 1.0, 18: 1.0, 19: 0.1}),
        ({"schedule": "wsd"}, 4, {0: 1.0, 3: 1.0}),  # a fifth of four steps is none
        ({"warmup_steps": 3}, 3, {0: 1 / 3, 2: 1.0}),
        ({}, 1, {0: 1.0}),
    ],
)
def test_schedules_at_points_computed_by_hand(change, steps, points):
    schedule = make_schedule(OptimizerConfig(learning_rate=0.02, **change), steps)
    for t, share in points.items():
        np.testing.assert_allclose(schedule(t), 0.02 * share, rtol=1e-6, atol=1e-9, err_msg=f"step {t}")
    whole = jax.jit(jax.vmap(schedule))(jnp.arange(steps, dtype=jnp.int32))  # counts are int32, and traced
    np.testing.assert_allclose(whole, [float(schedule(t)) for t in range(steps)], rtol=1e-6, atol=1e-9)


def test_the_running_mean_is_the_closed_form():
    start, seen = {"w": jnp.array([1.0, -2.0])}, [np.array([0.5, 3.0]), np.array([-1.0, 4.0]), np.array([2.0, 0.0])]
    ema, d = start, 0.9
    for p in seen:
        ema = update_ema(ema, {"w": jnp.asarray(p, jnp.bfloat16)}, d)  # values that bfloat16 holds
    want = d**3 * np.array([1.0, -2.0]) + (1 - d) * (d**2 * seen[0] + d * seen[1] + seen[2])
    np.testing.assert_allclose(ema["w"], want, rtol=1e-6)
    assert ema["w"].dtype == jnp.float32


def test_the_running_mean_warms_up():
    """From 0 towards 1, what is missing after n steps is the product of (1 + t) / (10 + t): n! 9! / (n + 9)!."""
    ema, step = {"w": jnp.zeros(())}, jax.jit(update_ema, static_argnums=2)
    for t in range(5):
        ema = step(ema, {"w": jnp.ones(())}, 0.9999, jnp.int32(t))
    np.testing.assert_allclose(ema["w"], 1 - math.factorial(5) * math.factorial(9) / math.factorial(14), rtol=1e-6)
    late = step({"w": jnp.zeros(())}, {"w": jnp.ones(())}, 0.9999, jnp.int32(10**7))["w"]
    np.testing.assert_allclose(late, 1e-4, rtol=1e-6)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "adam"}, "name: found 'adam'; expected one of adamw, adafactor, sgd, lion"),
        ({"schedule": "cos"}, "schedule: found 'cos'; expected one of constant, linear, cosine, wsd"),
        *(
            ({name: math.nan}, f"{name}: found nan; expected a positive")
            for name in ("learning_rate", "eps", "clip_norm")
        ),
        *(({name: 0.0}, f"{name}: found 0.0; expected a positive") for name in ("learning_rate", "eps", "clip_norm")),
        *(({name: math.inf}, f"{name}: found inf") for name in ("learning_rate", "eps", "clip_norm", "weight_decay")),
        *(
            ({name: bad}, f"{name}: found {bad}; .* from 0 to")
            for name in ("b1", "b2", "momentum")
            for bad in (1.0, -0.1)
        ),
        *(({name: math.nan}, f"{name}: found nan") for name in ("b1", "b2", "momentum", "weight_decay", "decay_to")),
        ({"weight_decay": -0.1}, "weight_decay: found -0.1; expected 0 or a positive number"),
        ({"decay_to": 1.1}, "decay_to: found 1.1; expected a number from 0 to 1"),
        ({"decay_to": -0.1}, "decay_to: found -0.1"),
        *(({"warmup_steps": bad}, f"warmup_steps: found {bad}; expected 0 or a positive i") for bad in (-1, 0.1, True)),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=f"OptimizerConfig.{message}"):
        OptimizerConfig(**change)


@pytest.mark.errors
@pytest.mark.parametrize("steps", [0, 4, 10.0])
def test_a_run_shorter_than_its_warmup_is_refused(steps):
    with pytest.raises(
        ValueError, match=f"found {steps} steps and warmup_steps=5; expected at least 5 steps. Run longer"
    ):
        make_schedule(OptimizerConfig(warmup_steps=5), steps)
    with pytest.raises(ValueError, match="found 0 steps and warmup_steps=0; expected at least 1 steps"):
        make_schedule(OptimizerConfig(), 0)
