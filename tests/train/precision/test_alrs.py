"""Oracles: the table of the paper, formulas in float64, and one float64 Adam for each width, run by hand."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaroo.models.decoder import unstack_layers
from jaxaroo.train.precision.alrs import eta, mean_clipped, per_width, width_rate

WIDTHS = (8, 6, 4, 2)
MODES = ("relative", "printed", "eta_only")


def trees(number, size=1.0):
    """Scales of three stacked layers, or gradients of them."""
    rng = np.random.default_rng(number)
    draw = lambda *shape: jnp.asarray(size * rng.normal(size=shape), jnp.float32)
    return {"layers": {"attn": {"q": {"rho": draw(3, 2, 4, 1)}}, "up": {"rho": draw(3, 5, 2)}}}


# ------------------------------------------------------------------------------------------------------------- rates
def test_eta_is_the_papers_table():
    formula = lambda d: 5 * 10 ** (-(d + 1) / 2) if d % 2 else 10 ** (-d / 2)
    np.testing.assert_allclose([float(eta(d)) for d in range(7)], [formula(d) for d in range(7)], rtol=1e-6)
    at = lambda master, widths: [float(eta(master - b)) for b in widths]
    assert at(8, (8, 6, 4, 2)) == pytest.approx([1, 0.1, 0.01, 0.001])
    assert at(4, (4, 3, 2)) == pytest.approx([1, 0.5, 0.1])
    traced = jax.jit(eta)(jnp.arange(7, dtype=jnp.int32))
    np.testing.assert_array_equal(traced, [eta(d) for d in range(7)])
    assert (np.diff(traced) < 0).all()
    assert traced.dtype == jnp.float32


@pytest.mark.parametrize("mode", MODES)
def test_rates_are_the_formulas_and_never_negative_nor_rising_as_bits_fall(mode):
    rate = jax.jit(width_rate, static_argnums=3)
    for lam, m in itertools.product([5e-4, 0.3, 2.0], [0.0, 1e-4, 1e-2, 0.5, 1.0]):
        got = np.asarray(rate(lam, m, jnp.arange(7, dtype=jnp.int32), mode))
        each = {"relative": lam * (1 - m), "printed": max(lam - m, 0), "eta_only": lam}[mode]
        np.testing.assert_allclose(got, [each * 10 ** -math.ceil(d / 2) * (5 if d % 2 else 1) for d in range(7)], 1e-5)
        assert (got >= 0).all()
        assert (np.diff(got) <= 0).all()
        assert float(width_rate(lam, m, 4, mode)) == got[4]


def test_what_is_printed_would_climb_and_stops_at_nothing():
    """The paper's rate, and the size of its own gradients."""
    assert 5e-4 - 1e-2 < 0
    assert float(width_rate(5e-4, 1e-2, 0, "printed")) == 0
    assert float(width_rate(5e-4, 1e-4, 2, "printed")) == pytest.approx(4e-5)
    assert float(width_rate(5e-4, 1e-2, 0)) == pytest.approx(4.95e-4)


def test_the_mean_is_over_matrices_and_layers_each_by_its_largest():
    grads = trees(0, 0.6)
    grads["layers"]["up"]["gain"] = jnp.full((3, 5, 1), 0.7)  # of another kind: does not count
    largest = []
    for leaf in (grads["layers"]["attn"]["q"]["rho"], grads["layers"]["up"]["rho"]):
        largest += [min(max(abs(x) for x in np.asarray(layer, np.float64).ravel()), 1.0) for layer in leaf]
    assert any(m == 1 for m in largest)
    assert any(m < 1 for m in largest)
    for form in (grads, unstack_layers(grads)):
        assert float(mean_clipped(form)) == pytest.approx(np.mean(largest), rel=1e-6)
    huge = jax.tree.map(lambda g: -1e30 * jnp.ones_like(g), grads)
    assert float(mean_clipped(huge)) == 1


# ----------------------------------------------------------------------------------------------------------- moments
def adam(state, g, b1=0.9, b2=0.999, eps=1e-8):
    state["t"] = state.get("t", 0) + 1
    state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    state["v"] = b2 * state.get("v", 0) + (1 - b2) * g * g
    return state["m"] / (1 - b1 ** state["t"]) / (np.sqrt(state["v"] / (1 - b2 ** state["t"])) + eps)


@pytest.mark.optimizer
def test_each_width_has_an_adam_of_its_own_in_one_program():
    tx, traced = per_width(optax.scale_by_adam(), WIDTHS), []

    @jax.jit
    def update(grads, state, bits):
        traced.append(1)
        return tx.update(grads, state, None, bits=bits)

    state, own = tx.init(trees(0)), {b: {} for b in WIDTHS}
    for t, bits in enumerate([8, 2, 2, 6, 8, 4, 2, 8, 6, 2]):
        grads = trees(t, 2.0 ** (8 - bits))
        before = state
        updates, state = update(grads, state, jnp.int32(bits))
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            want = adam(own[bits].setdefault(str(path), {}), np.asarray(g, np.float64))
            np.testing.assert_allclose(dict(jax.tree_util.tree_leaves_with_path(updates))[path], want, rtol=2e-4)
        i = WIDTHS.index(bits)
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
            for j in range(len(WIDTHS)):
                assert (np.asarray(old)[j] == np.asarray(new)[j]).all() == (j != i)
    assert len(traced) == 1


@pytest.mark.optimizer
def test_the_lowest_width_does_not_decide_for_the_others():
    """Gradients as large as section 2.2 of the method finds them: 64 times as large at 2 bits as at 8."""
    update = lambda tx: jax.jit(lambda g, state, bits: tx.update(g, state, None, bits=bits))
    sizes = []
    for tx in (per_width(optax.scale_by_adam(), WIDTHS), optax.with_extra_args_support(optax.scale_by_adam())):
        state, step = tx.init(jnp.zeros(4)), update(tx)
        for _ in range(20):
            for bits, size in ((8, 0.29), (2, 18.5)):
                updates, state = step(jnp.full(4, size), state, jnp.int32(bits))
                sizes.append(float(jnp.abs(updates).max()) if bits == 8 else None)
    own, one = sizes[38], sizes[78]
    assert own == pytest.approx(1, rel=1e-3)
    assert abs(one - 1) > 0.2  # what the 2-bit gradient left in the moments


@pytest.mark.optimizer
def test_mapped_over_layers_each_has_a_width_of_its_own():
    tx = per_width(optax.scale_by_adam(), WIDTHS)
    step = jax.jit(lambda g, state, bits: jax.vmap(lambda g, s, b: tx.update(g, s, None, bits=b))(g, state, bits))
    one = jax.jit(lambda g, state, bits: tx.update(g, state, None, bits=bits))
    layer = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    state = jax.vmap(tx.init)(trees(0)["layers"])
    alone = [tx.init(layer(trees(0)["layers"], i)) for i in range(3)]
    for t, bits in enumerate([(8, 2, 4), (8, 8, 6), (2, 2, 4), (6, 8, 4)]):
        grads = trees(t)["layers"]
        updates, state = step(grads, state, jnp.asarray(bits, jnp.int32))
        for i in range(3):
            want, alone[i] = one(layer(grads, i), alone[i], jnp.int32(bits[i]))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), layer(updates, i), want)
    np.testing.assert_array_equal(state.count, [[2, 1, 0, 1], [2, 0, 0, 2], [0, 1, 3, 0]])  # layer, width


@pytest.mark.optimizer
def test_a_traced_width_that_is_not_in_the_list_is_the_nearest():
    tx = per_width(optax.scale_by_adam(), WIDTHS)
    step = jax.jit(lambda state, bits: tx.update(jnp.ones(2), state, None, bits=bits)[1])
    for bits, i in ((9, 0), (7, 0), (3, 2), (1, 3)):
        np.testing.assert_array_equal(step(tx.init(jnp.ones(2)), jnp.int32(bits)).count, np.arange(4) == i)


# ------------------------------------------------------------------------------------------------------------ errors
@pytest.mark.errors
def test_what_means_nothing_is_refused():
    for down in (-1, 7):
        with pytest.raises(ValueError, match=f"eta: {down} bits below the master; expected 0 to 6"):
            eta(down)
    with pytest.raises(ValueError, match="width_rate: mode='none'; expected one of relative, printed, eta_only"):
        width_rate(0.1, 0.0, 0, "none")
    with pytest.raises(ValueError, match="mean_clipped: no scales in the gradients"):
        mean_clipped({"layers": {"up": {"gain": jnp.ones((3, 1))}}})
    for widths in ((), (8, 8)):
        with pytest.raises(ValueError, match="per_width: widths="):
            per_width(optax.identity(), widths)
    tx = per_width(optax.identity(), WIDTHS)
    for bits in ({}, {"bits": 5}):
        with pytest.raises(ValueError, match=r"per_width: bits=.*; expected one of \(8, 6, 4, 2\)"):
            tx.update(jnp.ones(2), tx.init(jnp.ones(2)), None, **bits)
