"""Oracle: a Python loop that writes one row at a time."""

import jax.numpy as jnp
import numpy as np

from jaxaroo.models.cache import LayerCache, init_cache, write_rows


def loop(old, length, new):
    out = np.array(old)
    for b in range(new.shape[0]):
        for t in range(new.shape[1]):
            if length[b] + t < out.shape[1]:
                out[b, length[b] + t] = new[b, t]
    return out


def test_rows_land_behind_the_committed_ones_and_never_past_the_end():
    rng = np.random.default_rng(0)
    k, v = (rng.normal(size=(3, 8, 2, 4)).astype(np.float32) for _ in range(2))
    new_k, new_v = (rng.normal(size=(3, 3, 2, 4)).astype(np.float32) for _ in range(2))
    length = np.array([0, 4, 6])  # the last row has room for two of three
    got = write_rows(LayerCache(jnp.asarray(k), jnp.asarray(v)), jnp.asarray(length), new_k, new_v)
    np.testing.assert_array_equal(got.k, loop(k, length, new_k))
    np.testing.assert_array_equal(got.v, loop(v, length, new_v))


def test_rows_take_the_dtype_of_the_cache():
    cache = init_cache(2, 1, 4, 1, 2, jnp.bfloat16)
    assert (len(cache.layers), cache.capacity, cache.layers[0].k.dtype) == (2, 4, jnp.bfloat16)
    new = jnp.full((1, 1, 1, 2), 1.001, jnp.float32)
    got = write_rows(cache.layers[0], cache.length, new, new)
    assert got.k.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got.v[0, :, 0, 0], np.float32), [1.0, 0, 0, 0])
