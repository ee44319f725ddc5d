"""Oracle: loops over layers in NumPy, one leaf at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.models.decoder import unstack_layers
from jaxaroo.train.precision.layers import by_layer

RNG = np.random.default_rng(0)
Q, UP, EMBED = RNG.normal(size=(3, 2, 4)), RNG.normal(size=(3, 5)), RNG.normal(size=(6, 2))
TREE = {
    "embed": jnp.asarray(EMBED, jnp.float32),
    "layers": {"attn": {"q": jnp.asarray(Q, jnp.float32)}, "up": jnp.asarray(UP, jnp.float32)},
}
FORMS = {"stacked": TREE, "tuple": unstack_layers(TREE)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["sum", "max"])
def test_every_leaf_is_reduced_in_each_layer_alone(form, name):
    got = by_layer(FORMS[form], getattr(jnp, name))
    want = {"embed": getattr(EMBED, name)(), "layers/attn/q": [getattr(q, name)() for q in Q]}
    want["layers/up"] = [getattr(up, name)() for up in UP]
    assert got.keys() == want.keys()
    for path, value in want.items():
        assert got[path].shape == np.shape(value)
        np.testing.assert_allclose(got[path], value, rtol=1e-5, atol=1e-6)


@pytest.mark.errors
def test_a_leaf_that_some_layers_lack_is_refused():
    bare = dict(unstack_layers(TREE))
    bare["layers"] = (*bare["layers"][:2], {"attn": bare["layers"][2]["attn"]})
    with pytest.raises(ValueError, match=r"by_layer: layers/up is in 2 of 3 layers; expected it in every layer"):
        by_layer(bare)
