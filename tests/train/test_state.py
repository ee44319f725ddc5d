"""What a run begins with."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaroo.train.state import init_state


@pytest.mark.optimizer
def test_a_state_begins_at_step_0_with_everything_it_will_keep():
    params, frozen = {"w": jnp.arange(3.0)}, {"v": jnp.ones(2)}
    state = init_state(params, optax.adam(0.1), seed=5, frozen=frozen, ema=True)
    assert [int(state.step), int(state.skipped), int(state.skipped_in_a_row)] == [0, 0, 0]
    np.testing.assert_array_equal(state.params["w"], params["w"])
    np.testing.assert_array_equal(state.ema["w"], params["w"])
    np.testing.assert_array_equal(state.key, jax.random.key_data(jax.random.key(5)))
    assert state.frozen is frozen
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(optax.adam(0.1).init(params))
    assert init_state(params, optax.sgd(0.1)).ema == {}
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    assert init_state(half, optax.sgd(0.1), ema=True).ema["w"].dtype == jnp.float32  # a mean moves by less than 1/256


@pytest.mark.optimizer
def test_no_two_leaves_share_a_buffer():
    """Each is donated to the next step; one that is donated twice ends the process."""
    state = init_state({"w": jnp.arange(3.0)}, optax.adam(0.1), ema=True)
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(places)) == len(places)
