"""Oracle: AdamW for the weights and one Adam for each width of each layer, by hand in float64; counts of many draws."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaroo.models.quantise import QuantConfig
from jaxaroo.train.optimizer import OptimizerConfig
from jaxaroo.train.precision.joint import ScaleConfig, hasb_turns, joint_optimizer, width_turns
from jaxaroo.train.state import init_state
from jaxaroo.train.step import Term, make_train_step

WIDTHS, L = (8, 6, 4, 2), 2
RULES = (
    ("layers/attn/q", QuantConfig(bits=(8, 6, 4, 2), gain=(6, 2))),
    ("layers/mlp/up", QuantConfig(bits=(8, 4))),  # stops at 4 bits
    ("layers/mlp/down", QuantConfig(bits=(6, 2))),  # has a master of its own
)
RANGES = {"q": (8, 2), "up": (8, 4), "down": (6, 2)}
WEIGHTS = {
    ("embed",): (5, 3),
    ("layers", "attn", "q"): (L, 2, 2, 3),
    ("layers", "attn_norm"): (L, 3),
    ("layers", "mlp", "up"): (L, 4, 3),
    ("layers", "mlp", "down"): (L, 3, 4),
}
SCALES = {
    ("layers", "attn", "q", "rho"): (L, 2, 2, 1),
    ("layers", "attn", "q", "gain"): (L, 2, 2, 2),
    ("layers", "mlp", "up", "rho"): (L, 4, 3),
    ("layers", "mlp", "down", "rho"): (L, 3, 1),
}
CFG = OptimizerConfig(
    learning_rate=3e-2, warmup_steps=1, weight_decay=0.2, clip_norm=4.0, decay_to=0.2, b2=0.99, eps=1e-6
)
STEPS, RATE = 3, 0.07
UNIFORM = [(b, b) for b in WIDTHS]
PLANS = [*UNIFORM, (8, 2), (2, 6), (4, 4), (6, 8), *UNIFORM[::-1]]  # of the layers, in each update


def nested(flat):
    tree = {}
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def drawn(shapes, number, size=1.0):
    rng = np.random.default_rng(number)
    return {path: np.float64(np.float32(size * rng.normal(size=shape))) for path, shape in shapes.items()}


def gradients(number, plan):
    """Those of scales are from far below to above 1, and a gain has one at its own width alone."""
    weights, scales = drawn(WEIGHTS, 100 + number), drawn(SCALES, 200 + number, 0.002 * 2**number)
    gain = scales["layers", "attn", "q", "gain"]
    for layer, bits in enumerate(plan):
        for i, width in enumerate((6, 2)):
            gain[layer, ..., i] *= bits == width
    return weights, scales


f32 = lambda flat: nested({path: jnp.asarray(x, jnp.float32) for path, x in flat.items()})
both = lambda weights, scales: {"model": f32(weights), "scales": f32(scales)}


def share_of_peak(update, turns):
    """Warm-up, then half a wave; counted in updates."""
    warm, last = CFG.warmup_steps * turns, STEPS * turns - 1
    done = min(max((update - warm) / (last - warm), 0), 1)
    return min((update + 1) / warm, 1) * (CFG.decay_to + (1 - CFG.decay_to) * (1 + math.cos(math.pi * done)) / 2)


def adam(moments, grad):
    moments["n"] = moments.get("n", 0) + 1
    moments["m"] = 0.9 * moments.get("m", 0.0) + 0.1 * grad
    moments["v"] = 0.99 * moments.get("v", 0.0) + 0.01 * grad**2
    m, v = moments["m"] / (1 - 0.9 ** moments["n"]), moments["v"] / (1 - 0.99 ** moments["n"])
    return m / (np.sqrt(v) + CFG.eps)


def scale_rate(share, mean, down, mode):
    rate = RATE * share
    if mode == "off":
        return rate
    each = {"relative": rate * (1 - mean), "printed": max(rate - mean, 0.0), "eta_only": rate}[mode]
    return each * (5 * 10 ** (-(down + 1) / 2) if down % 2 else 10 ** (-down / 2))


def by_hand(weights, scales, mode, turns):
    """Every state behind each of the updates."""
    weights, scales, moments, states = dict(weights), {p: x.copy() for p, x in scales.items()}, {}, []
    for number, plan in enumerate(PLANS):
        dw, ds = gradients(number, plan)
        norm, share = math.sqrt(sum((g**2).sum() for g in dw.values())), share_of_peak(number, turns)
        for path, g in dw.items():
            u = adam(moments.setdefault(path, {}), g * min(1, CFG.clip_norm / norm))
            if path[-1] != "attn_norm":
                u = u + CFG.weight_decay * weights[path]
            weights[path] = weights[path] - CFG.learning_rate * share * u
        sizes = [min(np.abs(g[i]).max(), 1) for path, g in ds.items() if path[-1] == "rho" for i in range(L)]
        for path, g in ds.items():
            most, least = RANGES[path[-2]]
            for i, bits in enumerate(plan):
                u = adam(moments.setdefault((path, i, bits), {}), g[i])
                down = most - min(max(bits, least), most)
                rate = RATE * share if path[-1] == "gain" else scale_rate(share, np.mean(sizes), down, mode)
                scales[path][i] -= rate * u
        states.append((dict(weights), {p: x.copy() for p, x in scales.items()}))
    return states


@pytest.mark.optimizer
@pytest.mark.parametrize("mode", ["relative", "printed", "eta_only", "off"])
@pytest.mark.slow
def test_every_width_of_every_layer_has_an_adam_of_its_own_and_the_weights_have_one(mode):
    turns, traces = len(WIDTHS), []
    tx = joint_optimizer(CFG, ScaleConfig(learning_rate=RATE, alrs=mode), STEPS, turns, RULES)
    weights, scales = drawn(WEIGHTS, 1), drawn(SCALES, 2)

    @jax.jit
    def step(params, state, grads, plan):
        traces.append(plan.shape)
        updates, state = tx.update(grads, state, params, turn=plan)
        return optax.apply_updates(params, updates), state

    params = both(weights, scales)
    state = tx.init(params)
    for number, (want_w, want_s) in enumerate(by_hand(weights, scales, mode, turns)):
        before = params["scales"]
        params, state = step(params, state, both(*gradients(number, PLANS[number])), jnp.asarray(PLANS[number]))
        want = both(want_w, want_s)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), params, want)
        moved = np.asarray(params["scales"]["layers"]["attn"]["q"]["gain"] != before["layers"]["attn"]["q"]["gain"])
        for layer, bits in enumerate(PLANS[number]):
            assert moved[layer].all(axis=(0, 1)).tolist() == [bits == 6, bits == 2]
    assert traces == [(L,)]
    assert int(state.updates) == len(PLANS) == STEPS * turns


def test_a_rate_that_is_none_is_refused():
    for rate in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"ScaleConfig.learning_rate: found {rate}; expected a positive"):
            ScaleConfig(learning_rate=rate)
    with pytest.raises(
        ValueError, match=r"ScaleConfig.alrs: found 'mean'; expected relative, printed, eta_only or off"
    ):
        ScaleConfig(alrs="mean")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- widths
KEYS = jax.random.split(jax.random.key(5), 4000)


def draws(turns, *steps):
    """Plans `[4000, updates, L]` of as many keys, for each of the steps."""
    draw = jax.jit(jax.vmap(turns.draw, (None, 0)))
    return [np.asarray(draw(jnp.int32(step), KEYS)) for step in steps]


def near(found, p):
    """Within 3 standard deviations of a share p of `found`'s entries."""
    found = np.asarray(found).ravel()
    return abs(found.mean() - p) <= 3 * math.sqrt(max(p * (1 - p), 1e-12) / found.size)


def test_all_widths_in_turn_high_to_low():
    for widths, order in ((WIDTHS, "all"), ((8, 4), "sandwich"), ((4,), "sandwich")):
        turns = width_turns(widths, 3, order=order)
        assert turns.names == tuple(map(str, widths))
        plan = turns.draw(jnp.int32(0), KEYS[0])
        assert plan.dtype == jnp.int32
        np.testing.assert_array_equal(plan, [[b] * 3 for b in widths])


def test_a_sandwich_is_the_highest_one_between_and_the_lowest():
    turns = width_turns((8, 6, 4, 3, 2), 3, order="sandwich")
    assert turns.names == ("8", "between", "2")
    (plans,) = draws(turns, 0)
    assert plans.shape == (4000, 3, 3)
    assert (plans == plans[..., :1]).all()  # one width for all layers
    assert (plans[:, 0] == 8).all()
    assert (plans[:, 2] == 2).all()
    for bits in range(9):
        assert near(plans[:, 1, 0] == bits, 1 / 3 if bits in (6, 4, 3) else 0)


TRACES = jnp.asarray([1.0, 1.0, 5.0, 1.0])  # the third layer is sensitive: its trace is above the mean


def test_layers_draw_widths_of_their_own_with_the_probabilities_of_the_paper():
    (plans,) = draws(hasb_turns(WIDTHS, TRACES, 100), 99)  # in the last part of the run all of them draw
    assert (plans.dtype, plans.shape) == (np.int32, (4000, 4, 4))
    for layer in range(4):
        for i, bits in enumerate(WIDTHS):
            assert near(plans[:, :, layer] == bits, (0.4, 0.3, 0.2, 0.1)[i] if layer == 2 else 0.25)
    for one in range(4):  # and no update's draw says anything about another's, nor a layer's
        for other in range(one):
            assert near(plans[:, one, 0] == plans[:, other, 0], 0.25)
            assert near(plans[:, 0, one] == plans[:, 0, other], 0.25)
            assert near(plans[:, one, 2] == plans[:, other, 2], 0.4**2 + 0.3**2 + 0.2**2 + 0.1**2)


def test_layers_that_do_not_draw_have_the_width_of_the_turn():
    turns = hasb_turns(WIDTHS, TRACES, 100, most=0.0)
    assert turns.names == ("8", "6", "4", "2")
    for plans in draws(turns, 0, 99):
        np.testing.assert_array_equal(plans, np.tile(np.array(WIDTHS)[None, :, None], (4000, 1, 4)))


@pytest.mark.parametrize("most", [1.0, 0.5])
def test_ever_more_layers_draw(most):
    """In five equal parts of the run; one in four of what is drawn is what the layer would have had."""
    turns, base = hasb_turns(WIDTHS, TRACES, 100, epochs=5, most=most), np.array(WIDTHS)[None, :, None]
    parts = (1, 1, 2, 3, 5)
    for plans, part in zip(draws(turns, 0, 19, 20, 55, 99), parts, strict=True):
        assert near(np.delete(plans, 2, axis=2) != base, most * part / 5 * 3 / 4)


@pytest.mark.optimizer
def test_every_step_of_a_run_draws_anew_in_one_program():
    def loss(params, batch, key, turn):
        code = jnp.sum(turn * 10 ** jnp.arange(4)).astype(jnp.float32)  # the plan, digit by digit
        one = jnp.float32(1)
        return {"loss": Term(params["w"], one, "row")}, {"plan": Term(code, one, "row")}

    tx = optax.with_extra_args_support(optax.sgd(0.1))
    turns = hasb_turns(WIDTHS, TRACES, 1)
    step = make_train_step(loss, tx, lambda window: {"row": jnp.int32(1)}, turns=turns)
    state, plans = init_state({"w": jnp.float32(0)}, tx), []
    for _ in range(8):
        state, metrics = step(state, jnp.ones((1, 1)))
        plans += [int(metrics[f"plan_{b}"]) for b in WIDTHS]
    assert len(set(plans)) > 24  # of 256, drawn 32 times: 30 are expected
    assert all(set(str(plan)) <= set("8642") for plan in plans)
    assert step._cache_size() == 1
