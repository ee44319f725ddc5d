"""Oracle: float64 loops over one state. What is saved is what is read, and no other network's head is taken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.models import checkpoint, heads
from jaxaroo.models.decoder import DecoderConfig
from jaxaroo.models.heads import AcceptanceConfig, JudgeConfig, acceptance_logits, judge_logit
from jaxaroo.models.safetensors import CheckpointError
from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.sharding.rules import FSDP_TP_SEQ

D = 6
TARGET = DecoderConfig(
    vocab_size=13, embed_dim=D, ffn_dim=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, max_positions=32
)
CONFIGS = {
    "judge": (JudgeConfig(target=TARGET), heads.judge_config_of),
    "acceptance": (AcceptanceConfig(target=TARGET, blocks=2), heads.acceptance_config_of),
    "acceptance of an adapter": (AcceptanceConfig(target=TARGET, exit_layer=1), heads.acceptance_config_of),
}
HIDDEN = np.random.default_rng(0).normal(size=(2, 3, D)).astype(np.float32)


def shaken(cfg):
    """Parameters of which none is what it starts as, biases included."""
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.asarray(draw.normal(size=x.shape), x.dtype), params(cfg))


def params(cfg):
    return heads.init_params(cfg, jax.random.key(0))


def test_a_judge_is_one_product():
    given = shaken(JudgeConfig(target=TARGET))
    assert given["bias"].shape == ()
    got = judge_logit(given, jnp.asarray(HIDDEN))
    want = [[sum(float(w) * float(x) for w, x in zip(given["weight"], h, strict=True)) for h in row] for row in HIDDEN]
    np.testing.assert_allclose(got, np.array(want) + float(given["bias"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_an_acceptance_head_is_residual_blocks_and_two_classes(blocks):
    given = shaken(AcceptanceConfig(target=TARGET, blocks=blocks))
    got = acceptance_logits(given, jnp.asarray(HIDDEN))
    for i in np.ndindex(2, 3):
        x = HIDDEN[i].astype(np.float64)
        for w, b in zip(*(np.asarray(given["blocks"][n], np.float64) for n in ("weight", "bias")), strict=True):
            y = np.array([sum(w[o, d] * x[d] for d in range(D)) + b[o] for o in range(D)])
            x = x + y / (1 + np.exp(-y))
        w, b = (np.asarray(given["head"][n], np.float64) for n in ("weight", "bias"))
        np.testing.assert_allclose(got[i], w @ x + b, rtol=0, atol=1e-4)


def test_half_precision_states_are_read_in_float32():
    for cfg, say in ((JudgeConfig(target=TARGET), judge_logit), (AcceptanceConfig(target=TARGET), acceptance_logits)):
        half = jnp.asarray(HIDDEN, jnp.bfloat16)
        got = say(shaken(cfg), half)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, say(shaken(cfg), half.astype(jnp.float32)))


def test_blocks_start_apart_and_a_judge_at_even_odds():
    blocks = params(AcceptanceConfig(target=TARGET, blocks=3))["blocks"]["weight"]
    assert len({w.tobytes() for w in np.asarray(blocks)}) == 3
    judge = params(JudgeConfig(target=TARGET))
    np.testing.assert_array_equal(jax.nn.sigmoid(judge_logit(judge, jnp.asarray(HIDDEN))), 0.5)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_a_place_on_a_mesh(name):
    cfg, _ = CONFIGS[name]
    shapes = heads.param_shapes(cfg)
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    placed = FSDP_TP_SEQ.shardings(mesh, heads.param_axes(cfg), shapes)
    assert jax.tree.structure(placed) == jax.tree.structure(shapes) == jax.tree.structure(params(cfg))
    assert {s.shape for s in jax.tree.leaves(shapes)} == {x.shape for x in jax.tree.leaves(params(cfg))}
    assert any("fsdp" in s.spec for s in jax.tree.leaves(placed))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_gives_back_what_was_saved(name, tmp_path):
    cfg, config_of = CONFIGS[name]
    given = shaken(cfg)
    checkpoint.save(tmp_path / "head", cfg_kind(cfg), cfg, given)
    found, loaded = checkpoint.load_for(tmp_path / "head", TARGET, config_of, heads.param_shapes)
    assert found == cfg
    jax.tree.map(np.testing.assert_array_equal, loaded, given)


def cfg_kind(cfg):
    return heads.JUDGE if isinstance(cfg, JudgeConfig) else heads.ACCEPTANCE


@pytest.mark.errors
def test_a_head_of_another_kind_or_network_is_refused(tmp_path):
    for name in ("judge", "acceptance"):
        cfg, config_of = CONFIGS[name]
        checkpoint.save(tmp_path / name, cfg_kind(cfg), cfg, params(cfg))
        deeper = dataclasses.replace(TARGET, num_layers=3)
        with pytest.raises(CheckpointError, match="num_layers"):
            checkpoint.load_for(tmp_path / name, deeper, config_of, heads.param_shapes)
    with pytest.raises(CheckpointError, match="'jaxaroo-judge'; expected 'jaxaroo-acceptance'"):
        checkpoint.load_for(tmp_path / "judge", TARGET, heads.acceptance_config_of, heads.param_shapes)
    with pytest.raises(CheckpointError, match="'jaxaroo-acceptance'; expected 'jaxaroo-judge'"):
        checkpoint.load_for(tmp_path / "acceptance", TARGET, heads.judge_config_of, heads.param_shapes)
    with pytest.raises(ValueError, match="blocks: found -1"):
        AcceptanceConfig(target=TARGET, blocks=-1)
