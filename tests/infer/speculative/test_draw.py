"""Whose noise: the target's own for `shared`, another for each node else, none for greedy rows; never a neighbour's."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.infer.sampling import Counts, Sampling, choose, gumbel, pack_sampling, warp
from jaxaroo.infer.speculative.draw import draft_logits, draft_noise

V = 8
ROWS = [
    (Sampling(temperature=1.0), 5, 0),
    (Sampling(temperature=0.0), 6, 1),
    (Sampling(temperature=0.7, top_k=3), 7, 2),
]
SAMPLING = pack_sampling(ROWS, 0, V)
POSITION = jnp.array([4, 5, 4], jnp.int32)
COUNTS = Counts(jnp.zeros((3, V), bool), jnp.zeros((3, V), jnp.int32))
LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, V)), jnp.float32)


@pytest.mark.slow
def test_shared_noise_draws_what_the_target_draws():
    noise = draft_noise(SAMPLING, POSITION, 2, V, "shared")
    for node in range(2):
        warped = warp(LOGITS[:, node], SAMPLING, COUNTS)
        mine = draft_logits(LOGITS, SAMPLING, COUNTS, "shared")[:, node]
        np.testing.assert_array_equal(mine, warped)
        np.testing.assert_array_equal(jnp.argmax(mine + noise[:, node], -1), choose(warped, SAMPLING, POSITION))


@pytest.mark.parametrize("draw", ["shared", "independent", "without_replacement", "mode"])
def test_greedy_rows_have_no_noise(draw):
    noise = np.asarray(draft_noise(SAMPLING, POSITION, 2, V, draw))
    assert not noise[1].any()
    assert noise[0].any() == (draw != "mode")


def test_own_noise_is_neither_the_targets_nor_another_nodes():
    noise = np.asarray(draft_noise(SAMPLING, POSITION, 3, V, "independent"))
    target = np.asarray(gumbel(jnp.uint32(5), jnp.int32(0), jnp.int32(4), V))
    seen = [target, *noise[0], *noise[2], *np.asarray(draft_noise(SAMPLING, POSITION + 1, 3, V, "independent"))[0]]
    assert len({row.tobytes() for row in seen}) == len(seen)
    later = draft_noise(SAMPLING, POSITION, 1, V, "independent", first=2)
    np.testing.assert_array_equal(later[:, 0], noise[:, 2])  # a node's noise is by its number


def test_noise_does_not_depend_on_neighbours():
    alone = pack_sampling(ROWS[2:], 0, V)
    mine = draft_noise(alone, POSITION[2:], 2, V, "independent")
    np.testing.assert_array_equal(mine[0], draft_noise(SAMPLING, POSITION, 2, V, "independent")[2])


def test_the_mode_is_of_the_logits_as_they_are():
    np.testing.assert_array_equal(draft_logits(LOGITS, SAMPLING, COUNTS, "mode"), LOGITS)
