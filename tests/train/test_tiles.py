"""Against the function on all tokens at once; and what lies where, read off shapes and shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.sharding.rules import FSDP_TP, FSDP_TP_SEQ, REPLICATED
from jaxaroo.train.tiles import fetched, over_tiles

B, T = 4, 12
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, 3)), jnp.float32)
N = jnp.arange(B * T).reshape(B, T)


def work(part, rules):
    x, n = part
    return {"a": jnp.sum(jnp.sin(x), axis=-1) * n.astype(jnp.float32), "b": x[..., :2] ** 2}


@pytest.mark.parametrize("tile", [1, 8, 20, 1000])
def test_tiles_are_put_together_as_if_there_were_none(tile):
    seen = []
    tiled = jax.jit(
        lambda given: over_tiles(lambda p, r: seen.append(p[1].shape) or work(p, r), given, tile, REPLICATED)
    )
    jax.tree.map(np.testing.assert_array_equal, tiled((X, N)), jax.jit(work, static_argnums=1)((X, N), REPLICATED))
    assert set(seen) == {(B, min(max(1, tile // B), T))}


@pytest.mark.parametrize(
    "shape", [{"fsdp": 4}, {"fsdp": 2, "sequence": 2}, {"sequence": 4}, {"fsdp": 8}, {"sequence": 8}]
)
def test_devices_take_tiles_of_their_own_tokens(shape):
    """With 8 ways the 4 rows, or the 12 tokens, stay whole: then they are not shared out."""
    rules = FSDP_TP_SEQ if "sequence" in shape else FSDP_TP
    count, seen = int(np.prod(list(shape.values()))), []

    def one(part, within):
        seen.append((part[1].shape, within.batch))
        return work(part, within)

    with jax.set_mesh(make_mesh(MeshConfig(**{"fsdp": 1, **shape}), jax.devices()[:count])):
        got = jax.jit(lambda given: over_tiles(one, given, 8, rules))((X, N))
    jax.tree.map(np.testing.assert_array_equal, got, jax.jit(work, static_argnums=1)((X, N), REPLICATED))
    rows, tokens = seen[0][0]
    alone = shape in ({"fsdp": 8}, {"sequence": 8})
    assert rows * tokens == (8 if alone else 8 * count)
    if "sequence" in shape and not alone:
        assert (rows, seen[0][1]) == (B * shape["sequence"], ("sequence", "data", "fsdp"))


def test_gradients_pass_through_tiles_and_nothing_but_a_tile_is_kept():
    loss = lambda x: jnp.sum(over_tiles(work, (x, N), 8, REPLICATED)["a"] ** 2)
    np.testing.assert_allclose(
        jax.grad(loss)(X), jax.grad(lambda x: jnp.sum(work((x, N), REPLICATED)["a"] ** 2))(X), rtol=1e-6
    )
    assert "remat" in str(jax.make_jaxpr(jax.grad(loss))(X))


def test_a_table_is_fetched_whole_but_for_its_vocabulary():
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        placed = jax.jit(lambda x: fetched(x * 1, FSDP_TP))(jnp.ones((6, 8)))
    assert placed.sharding.spec[0] == "tensor"
    assert len(placed.sharding.spec) == 1 or placed.sharding.spec[1] is None
