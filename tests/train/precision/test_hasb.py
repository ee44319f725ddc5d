"""Oracles: the probabilities written out, and frequencies of many draws against the binomial distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.precision.hasb import redraw_share, sample_widths, width_probabilities

WIDTHS = (8, 6, 4, 2)
TRACES = jnp.asarray([0.1, 5.0, 0.2, 3.0], jnp.float32)  # mean 2.075
EVEN, WIDE = [0.25] * 4, [0.4, 0.3, 0.2, 0.1]
DRAWS = 20_000
sample = jax.jit(sample_widths, static_argnums=(1, 5, 6))


@functools.cache
def many(share, rule="mean", base=4):
    keys = jax.random.split(jax.random.key(7), DRAWS)
    one = lambda key: sample_widths(TRACES, WIDTHS, jnp.int32(base), share, key, rule)
    return np.asarray(jax.jit(jax.vmap(one))(keys))


def near(count, p):
    """Within three standard deviations of the binomial distribution."""
    return abs(count - DRAWS * p) <= 3 * np.sqrt(DRAWS * p * (1 - p))


def test_sensitive_layers_have_wide_widths_more_often():
    p = np.asarray(width_probabilities(TRACES, WIDTHS))
    np.testing.assert_allclose(p, [EVEN, WIDE, EVEN, WIDE], rtol=1e-6)
    np.testing.assert_allclose(p @ np.array(WIDTHS), [5, 6, 5, 6], rtol=1e-6)
    three = np.asarray(width_probabilities(TRACES, (2, 4, 3)))  # in whatever order
    np.testing.assert_allclose(three, [[1 / 3] * 3, [2 / 9, 4 / 9, 3 / 9]] * 2, rtol=1e-6)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_frequencies_are_the_probabilities(share):
    drawn = many(share)
    assert drawn.dtype == np.int32
    for layer, p in enumerate([EVEN, WIDE, EVEN, WIDE]):
        for i, b in enumerate(WIDTHS):
            assert near((drawn[:, layer] == b).sum(), share * p[i] + (1 - share) * (b == 4))


def test_layers_draw_on_their_own_and_what_is_drawn_does_not_depend_on_whether():
    drawn = many(0.3)
    for i, j in ((0, 1), (1, 2), (0, 3)):
        for a in (8, 2):
            p = [0.3 * (EVEN, WIDE, EVEN, WIDE)[layer][WIDTHS.index(a)] for layer in (i, j)]
            assert near(((drawn[:, i] == a) & (drawn[:, j] == a)).sum(), p[0] * p[1])


def test_a_share_of_nothing_keeps_the_common_width():
    for base in WIDTHS:
        np.testing.assert_array_equal(sample(TRACES, WIDTHS, base, 0.0, jax.random.key(base)), [base] * 4)


def test_one_key_is_one_draw_and_one_program_serves_all():
    traced = []

    @functools.partial(jax.jit, static_argnums=1)
    def draw(traces, widths, base, share, key):
        traced.append(1)
        return sample_widths(traces, widths, base, share, key)

    found = set()
    for seed in range(20):
        args = (TRACES + seed, WIDTHS, jnp.int32(WIDTHS[seed % 4]), jnp.float32(1 - seed / 100), jax.random.key(seed))
        first, again = draw(*args), draw(*args)
        np.testing.assert_array_equal(first, again)
        found.add(tuple(np.asarray(first).tolist()))
    assert len(traced) == 1
    assert len(found) > 15


def test_the_largest_traces_are_sensitive_under_the_rule_top():
    """Where the mean calls half of nearly equal layers sensitive, or one giant alone."""
    nearly = jnp.asarray([1.0, 1.01, 0.99, 1.02, 0.98, 1.03, 0.97, 1.04, 0.96, 1.001], jnp.float32)
    wide = lambda traces, rule, **top: np.asarray(width_probabilities(traces, WIDTHS, rule, **top))[:, 0] > 0.3
    assert wide(nearly, "mean").sum() == 5
    np.testing.assert_array_equal(np.nonzero(wide(nearly, "top"))[0], [3, 5, 7])
    np.testing.assert_array_equal(np.nonzero(wide(nearly, "top", top=0.5))[0], [1, 3, 5, 7, 9])
    giant = nearly.at[4].set(1000.0)
    np.testing.assert_array_equal(np.nonzero(wide(giant, "mean"))[0], [4])
    np.testing.assert_array_equal(np.nonzero(wide(giant, "top"))[0], [4, 5, 7])
    assert wide(jnp.ones(10), "top").sum() == 3  # equal ones too
    assert wide(jnp.ones(2), "top").sum() == 1
    drawn = (many(1.0, "top") == 8).sum(0)  # one of four layers
    assert all(near(count, p) for count, p in zip(drawn, [0.25, 0.4, 0.25, 0.25], strict=True))


def test_the_share_grows_to_its_greatest():
    epochs = 10
    got = [float(redraw_share(e, epochs, 0.8)) for e in range(epochs)]
    np.testing.assert_allclose(got, [0.08 * (e + 1) for e in range(epochs)], rtol=1e-6)
    assert float(jax.jit(redraw_share, static_argnums=1)(jnp.int32(4), 10)) == pytest.approx(0.5)
    assert float(redraw_share(25, epochs)) == 1
    printed = np.cumprod([(e + 1) / epochs for e in range(epochs)])
    assert printed[-1] < 1e-3  # what is printed compounds


@pytest.mark.errors
def test_what_means_nothing_is_refused():
    for settings in ({"rule": "median"}, {"top": 0.0}, {"top": 1.5}, {"widths": ()}):
        with pytest.raises(ValueError, match=r"width_probabilities: rule=.*; expected 'mean' or 'top'"):
            width_probabilities(**{"traces": TRACES, "widths": WIDTHS} | settings)
    for epochs, most in ((0, 1.0), (5, 1.1), (5, -0.1)):
        with pytest.raises(ValueError, match=f"redraw_share: epochs={epochs}, most={most}; expected at least 1"):
            redraw_share(0, epochs, most)
