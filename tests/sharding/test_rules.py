"""Logical axes to mesh axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxaroo.sharding.rules import FSDP_TP, REPLICATED, Rules


def test_a_spec_names_the_mesh_axis_of_each_dimension():
    assert FSDP_TP.spec("heads", "head_dim", "embed") == PartitionSpec("tensor", None, "fsdp")
    assert FSDP_TP.spec("batch", None, "vocab") == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert REPLICATED.spec("batch", "vocab") == PartitionSpec(None, None)
    with pytest.raises(AttributeError, match="haeds"):
        FSDP_TP.spec("haeds")
    with pytest.raises(TypeError, match="haeds"):
        Rules(haeds="tensor")


def test_an_activation_is_pinned_on_a_mesh_and_left_alone_without():
    x = jnp.arange(32.0).reshape(4, 8)
    assert FSDP_TP.constrain(x, "batch", None) is x
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(1, 2, 2), ("data", "fsdp", "tensor"))
    with jax.set_mesh(mesh):
        got = jax.jit(lambda x: FSDP_TP.constrain(x * 1, "batch", "vocab"))(x)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor")), 2)
    np.testing.assert_array_equal(got, x)


def test_a_tree_of_names_becomes_a_tree_of_shardings():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(1, 2, 2), ("data", "fsdp", "tensor"))
    got = FSDP_TP.shardings(mesh, {"a": ("vocab", "embed"), "b": {"c": ("embed",)}})
    assert got["a"] == NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    assert got["b"]["c"].spec == PartitionSpec("fsdp")
