"""Logical axes to mesh axes, for parameters, optimiser states and caches."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxaroo.infer.decode import Rows, decode, prefill
from jaxaroo.infer.sampling import Sampling, pack_sampling
from jaxaroo.models.cache import cache_axes
from jaxaroo.models.decoder import DecoderConfig, param_axes, param_shapes, unstack_layers
from jaxaroo.sharding.rules import FSDP_TP, FSDP_TP_SEQ, REPLICATED, Rules, shardings_like

P = PartitionSpec
CFG = DecoderConfig(
    vocab_size=64, embed_dim=32, ffn_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True
)


@functools.cache
def mesh(data=1, fsdp=2, tensor=2):
    devices = np.array(jax.devices()[: data * fsdp * tensor])
    return Mesh(devices.reshape(data, fsdp, tensor), ("data", "fsdp", "tensor"))


def random_params(cfg):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32) / 4, param_shapes(cfg))


def test_a_spec_names_the_mesh_axis_of_each_dimension():
    assert FSDP_TP.spec("heads", "head_dim", "embed") == P("tensor", None, "fsdp")
    assert FSDP_TP.spec("batch", None, "vocab") == P(("data", "fsdp"), None, "tensor")
    assert FSDP_TP.spec("batch", "seq") == P(("data", "fsdp"), None)
    assert FSDP_TP_SEQ.spec("batch", "seq", "heads") == P(("data", "fsdp"), "sequence", "tensor")
    assert REPLICATED.spec("batch", "vocab") == P(None, None)
    with pytest.raises(AttributeError, match="haeds"):
        FSDP_TP.spec("haeds")
    with pytest.raises(TypeError, match="haeds"):
        Rules(haeds="tensor")


@pytest.mark.errors
def test_a_mesh_axis_used_twice_or_missing_is_refused():
    message = r"axes \('heads', 'embed'\) put mesh axis tensor on two dimensions"
    with pytest.raises(ValueError, match=message):
        Rules(heads="tensor", embed=("fsdp", "tensor")).spec("heads", "embed")
    with pytest.raises(ValueError, match=r"a.b lies on mesh axis sequence; the mesh has data, fsdp, tensor"):
        FSDP_TP_SEQ.shardings(mesh(), {"a": {"b": ("seq",)}}, {"a": {"b": jnp.zeros(8)}})
    with jax.set_mesh(mesh()), pytest.raises(ValueError, match=r"activation .* lies on mesh axis sequence"):
        FSDP_TP_SEQ.constrain(jnp.zeros((2, 2)), "batch", "seq")
    with pytest.raises(ValueError, match=r"a has axes \('embed',\) and shape \(2, 8\)"):
        FSDP_TP.shardings(mesh(), {"a": ("embed",)}, {"a": jnp.zeros((2, 8))})


def test_an_activation_is_pinned_on_a_mesh_and_left_alone_without():
    x = jnp.arange(32.0).reshape(4, 8)
    assert FSDP_TP.constrain(x, "batch", None) is x
    with jax.set_mesh(mesh()):
        got = jax.jit(lambda x: FSDP_TP.constrain(x * 1, "batch", "vocab"))(x)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh(), P(("data", "fsdp"), "tensor")), 2)
    np.testing.assert_array_equal(got, x)


def test_an_activation_that_does_not_divide_is_replicated_along_that_dimension(caplog):
    x = jnp.arange(28.0).reshape(4, 7)
    with jax.set_mesh(mesh()), caplog.at_level(logging.INFO):
        got = jax.jit(lambda x: FSDP_TP.constrain(x * 1, "batch", "vocab"))(x)
    assert got.sharding.is_equivalent_to(NamedSharding(mesh(), P(("data", "fsdp"), None)), 2)
    assert "('batch', 'vocab'): dimension 1 of size 7 is replicated; tensor = 2" in caplog.text
    np.testing.assert_array_equal(got, x)


def test_moments_of_several_widths_lie_as_their_parameter_does():
    """Stacked in front, or behind the layers; a shape that is another's is replicated."""
    on, like = mesh(), jax.ShapeDtypeStruct
    params = {"w": like((4, 8, 6), jnp.float32), "b": like((8,), jnp.float32)}
    places = FSDP_TP.shardings(on, {"w": ("layers", "embed", "ffn"), "b": ("embed",)}, params)
    state = {
        "all": {"w": like((5, 4, 8, 6), jnp.float32), "b": like((5, 8), jnp.float32)},
        "layer": {"w": like((4, 5, 8, 6), jnp.float32), "b": like((8,), jnp.float32)},
        "other": {"w": like((4, 5, 8, 7), jnp.float32), "b": like((5, 5, 8), jnp.float32)},
    }
    got = jax.tree.map(lambda s: s.spec, shardings_like(state, params, places))
    assert got["all"] == {"w": P(None, None, "fsdp", "tensor"), "b": P(None, "fsdp")}
    assert got["layer"] == {"w": P(None, None, "fsdp", "tensor"), "b": P("fsdp")}
    assert got["other"] == {"w": P(), "b": P()}


def test_an_optimiser_of_a_part_of_the_tree_follows_that_part():
    """Its paths begin where the part does. What two parameters of unlike shardings could claim is replicated."""
    on, like = mesh(), lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params = {"model": {"w": like(8, 6), "norm": like(8)}, "drafter": {"norm": like(8), "v": like(6)}}
    axes = {"model": {"w": ("embed", "ffn"), "norm": ("embed",)}, "drafter": {"norm": ("vocab",), "v": ("ffn",)}}
    places = FSDP_TP.shardings(on, axes, params)
    state = {"mu": params["model"], "nu": {"v": like(6)}, "whole": params, "rows": {"w": like(8)}}
    got = jax.tree.map(lambda s: s.spec, shardings_like(state, params, places))
    assert got["mu"] == {"w": P("fsdp", "tensor"), "norm": P()}
    assert got["nu"] == {"v": P("tensor")}
    assert got["whole"] == jax.tree.map(lambda s: s.spec, places)
    assert got["rows"] == {"w": P()}


def test_ways_are_the_devices_along_mesh_axes():
    assert FSDP_TP.ways(("data", "fsdp")) == 1  # no mesh
    with jax.set_mesh(Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))):
        said = [FSDP_TP.ways(axis) for axis in (("data", "fsdp"), "tensor", ("fsdp", "tensor"), "sequence", None)]
    assert said == [2, 4, 8, 1, 1]
    assert FSDP_TP.seq_and_batch == ("data", "fsdp")
    assert FSDP_TP_SEQ.seq_and_batch == ("sequence", "data", "fsdp")


def test_a_tree_of_names_becomes_a_tree_of_shardings():
    names = {"a": ("vocab", "embed"), "b": {"c": ("embed",)}, "d": (), "layers": ({"e": ("ffn", None)}, {"e": (None,)})}
    got = FSDP_TP.shardings(mesh(), names)
    assert got["a"] == NamedSharding(mesh(), P("tensor", "fsdp"))
    assert got["b"]["c"].spec == P("fsdp")
    assert got["d"].spec == P()
    assert [layer["e"].spec for layer in got["layers"]] == [P("tensor", None), P(None)]


def test_sizes_that_do_not_divide_are_replicated_and_logged_once_each(caplog):
    """50 tokens over 4, and 2 of the key-value heads over 4; a batch of 4 over 2 x 2 divides, one of 6 does not."""
    cfg = dataclasses.replace(CFG, vocab_size=50)
    on = mesh(1, 2, 4)
    with caplog.at_level(logging.INFO, "jaxaroo.sharding.rules"):
        got = FSDP_TP.shardings(on, param_axes(cfg), param_shapes(cfg))
    assert got["embed"].spec == P(None, "fsdp")
    assert got["layers"]["attn"]["k"].spec == P(None, None, None, "fsdp")
    assert got["layers"]["attn"]["q"].spec == P(None, "tensor", None, "fsdp")
    assert sorted(r.getMessage() for r in caplog.records) == [
        "embed: dimension 0 of size 50 is replicated; tensor = 4",
        "head: dimension 0 of size 50 is replicated; tensor = 4",
        "layers.attn.k: dimension 1 of size 2 is replicated; tensor = 4",
        "layers.attn.k_bias: dimension 1 of size 2 is replicated; tensor = 4",
        "layers.attn.v: dimension 1 of size 2 is replicated; tensor = 4",
        "layers.attn.v_bias: dimension 1 of size 2 is replicated; tensor = 4",
    ]
    assert {r.levelno for r in caplog.records} == {logging.INFO}
    placed = jax.device_put(random_params(cfg), got)  # JAX agrees
    assert placed["layers"]["mlp"]["down"].addressable_shards[0].data.shape == (2, 16, 16)
    rows = lambda n: FSDP_TP.shardings(mesh(2, 2, 2), ("batch",), jnp.zeros(n)).spec
    assert (rows(4), rows(6)) == (P(("data", "fsdp")), P(None))  # 6 would divide over either axis alone


OPTIMISERS = {
    "adamw": optax.adamw(1e-3),
    "lion": optax.lion(1e-3),
    "momentum": optax.sgd(1e-3, momentum=0.9),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=8),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.ema(0.9), optax.adam(optax.linear_schedule(1, 0, 9))),
    "masked": optax.masked(optax.adamw(1e-3), {"embed": False, "norm": True, "head": False, "layers": True}),
    "accumulated": optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
    "groups": optax.partition({"a": optax.adam(1e-3), "b": optax.sgd(1e-3, 0.9)}, lambda p: label(p)),
}
FOLLOWING = {  # trees like the parameters in each state; a masked one leaves out two leaves
    "adamw": 2, "lion": 1, "momentum": 1, "chain": 3, "accumulated": 3,
}  # fmt: skip


def label(params):
    return {name: jax.tree.map(lambda _, to="a" if name == "layers" else "b": to, params[name]) for name in params}


@pytest.mark.optimizer
@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_state_lies_where_its_parameters_lie(name):
    tx, on = OPTIMISERS[name], mesh(1, 4, 2)
    shapes = param_shapes(CFG)
    shardings = FSDP_TP.shardings(on, param_axes(CFG), shapes)
    state = jax.eval_shape(tx.init, shapes)
    got = shardings_like(state, shapes, shardings)
    assert jax.tree.structure(got) == jax.tree.structure(state)

    wanted = {jax.tree_util.keystr(path): place for path, place in jax.tree_util.tree_leaves_with_path(shardings)}
    sizes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    followed, leaves = [], jax.tree_util.tree_leaves_with_path(state)
    for (path, leaf), place in zip(leaves, jax.tree.leaves(got), strict=True):
        said = jax.tree_util.keystr(path)
        suffix = max((p for p in wanted if said.endswith(p)), key=len, default=None)
        if suffix and sizes[suffix] == leaf.shape:
            assert place == wanted[suffix], said
            followed.append(suffix)
        else:
            assert place == NamedSharding(on, P()), said
    if name in FOLLOWING:
        assert sorted(followed) == sorted([*wanted] * FOLLOWING[name])
    elif name == "masked":
        assert sorted(followed) == sorted([p for p in wanted if p not in ("['embed']", "['head']")] * 2)
    elif name == "groups":
        assert sorted(followed) == sorted([*wanted, *(p for p in wanted if "layers" in p)])
    else:  # adafactor: matrices have rows and columns of moments, vectors a whole one
        assert len(followed) == 6
        assert all("norm" in path or "bias" in path for path in followed)
    made = jax.jit(tx.init, out_shardings=got)(random_params(CFG))
    assert all(a.sharding == b for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(got), strict=True))


def test_of_two_parameters_the_longer_path_is_followed():
    """A moment of the wrong shape follows neither, even if its shape is that of the shorter path."""
    shapes = {"norm": jnp.zeros(4), "layers": {"norm": jnp.zeros(8)}}
    places = {"norm": NamedSharding(mesh(), P("fsdp")), "layers": {"norm": NamedSharding(mesh(), P("tensor"))}}
    got = shardings_like(
        {"mu": shapes, "row": {"layers": {"norm": jnp.zeros(4)}}, "norm": jnp.zeros(4)}, shapes, places
    )
    assert got["mu"]["norm"].spec == P("fsdp")
    assert got["mu"]["layers"]["norm"].spec == P("tensor")
    assert got["row"]["layers"]["norm"].spec == P()
    assert got["norm"].spec == P("fsdp")


@pytest.mark.slow
def test_greedy_decoding_with_heads_shared_out_gives_the_same_tokens():
    """Parameters and cache over `tensor`, rows over `fsdp`; the cache stays where it lies."""
    cfg = dataclasses.replace(CFG, qkv_bias=False)
    params = unstack_layers(random_params(cfg))
    tokens = jnp.pad(jax.random.randint(jax.random.key(1), (4, 8), 0, 64), ((0, 0), (0, 24)))
    greedy = pack_sampling([(Sampling(temperature=0.0), 0, 0)] * 4, 1, 64)
    rows = Rows(greedy, jnp.array([8, 5, 7, 1]), jnp.full(4, 32), jnp.full((4, 1), -1))

    def generate(params, place):
        state = prefill(cfg, params, tokens, rows, chunk=8)
        state = state._replace(cache=place(state.cache))
        return decode(cfg, params, state, rows, jnp.zeros(4, bool), jnp.int32(40))

    want = generate(params, lambda cache: cache)
    axes = param_axes(cfg)
    one = jax.tree.map(lambda a: a[1:], axes["layers"], is_leaf=lambda a: isinstance(a, tuple))
    placed = jax.device_put(params, FSDP_TP.shardings(mesh(), axes | {"layers": (one, one)}, params))
    place = lambda cache: jax.device_put(cache, FSDP_TP.shardings(mesh(), cache_axes(2), cache))
    got = generate(placed, place)
    assert placed["layers"][0]["attn"]["q"].addressable_shards[0].data.shape == (2, 8, 16)
    assert {c.addressable_shards[0].data.shape for c in jax.tree.leaves(got.cache.layers)} == {(2, 32, 1, 8)}
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(want.filled, 32)
    assert len({tuple(row) for row in np.asarray(want.tokens)[:, 8:]}) == 4  # the rows say different things
