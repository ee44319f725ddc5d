"""Oracle: the adapter element by element in float64. Equivalence: cached = uncached, whatever rows were committed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.models import kangaroo
from jaxaroo.models.checkpoint import fingerprint, load_for, save
from jaxaroo.models.decoder import DecoderConfig, RopeScaling
from jaxaroo.models.kangaroo import KangarooConfig
from jaxaroo.models.safetensors import CheckpointError

# A target with everything that the adapter must not inherit: shared heads, biases, head norms, windows, its own rope.
TARGET = DecoderConfig(
    vocab_size=11,
    embed_dim=12,
    ffn_dim=10,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,  # N H = 24 is not D
    rope_theta=500.0,
    rope_scaling=RopeScaling(kind="linear", factor=3.0),
    norm_eps=1e-3,
    window=2,
    qkv_bias=True,
    o_bias=True,
    qk_norm=True,
)
CFG = KangarooConfig(target=TARGET, exit_layer=2, rope_theta=100.0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 12)), jnp.float32)
POSITIONS = jnp.stack([jnp.arange(7), jnp.arange(7) + 5])

apply = jax.jit(functools.partial(kangaroo.forward, CFG))


@functools.cache
def params():
    fresh = kangaroo.init_params(CFG, jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), 10))
    return jax.tree.map(lambda w: w + 0.3 * jax.random.normal(next(keys), w.shape), fresh)


def norm(v, gain):
    return v / np.sqrt(np.mean(v * v) + TARGET.norm_eps) * gain


def turn(v, position):
    """Pairs (i, i + H/2) turned by position / theta^(2i/H)."""
    half, out = len(v) // 2, np.zeros_like(v)
    for i in range(half):
        a = position * CFG.rope_theta ** (-2 * i / len(v))
        out[i], out[i + half] = v[i] * np.cos(a) - v[i + half] * np.sin(a), v[i + half] * np.cos(a) + v[i] * np.sin(a)
    return out


def oracle(x, positions, see):
    """[B, T, D] in float64; `see(b, t, s)` says whether t may look at s."""
    positions = np.asarray(positions)
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params())
    x, (B, T, D), (N, H) = np.asarray(x, np.float64), x.shape, p["attn"]["q"].shape[:2]
    y = np.zeros((B, T, D))
    for b in range(B):
        normed = [norm(x[b, t], p["norm_in"]) for t in range(T)]
        for t in range(T):
            mixed = np.zeros((N, H))
            for n in range(N):
                q = turn(p["attn"]["q"][n] @ normed[t], positions[b, t])
                seen = [s for s in range(T) if see(b, t, s)]
                score = [q @ turn(p["attn"]["k"][n] @ normed[s], positions[b, s]) / np.sqrt(H) for s in seen]
                w = np.exp(score - np.max(score))
                for s, share in zip(seen, w / w.sum(), strict=True):
                    mixed[n] += share * (p["attn"]["v"][n] @ normed[s])
            added = sum(p["attn"]["o"][:, n] @ mixed[n] for n in range(N))
            y[b, t] = norm(x[b, t] + added, p["norm_out"])
    return y


def test_matches_the_float64_oracle():
    got = apply(params(), X, POSITIONS).hidden
    np.testing.assert_allclose(got, oracle(X, POSITIONS, lambda b, t, s: s <= t), rtol=0, atol=2e-5)


def test_a_mask_decides_what_is_seen():
    mask = np.random.default_rng(1).random((2, 7, 7)) < 0.5
    mask |= np.eye(7, dtype=bool)[None]
    got = apply(params(), X, POSITIONS, mask).hidden
    np.testing.assert_allclose(got, oracle(X, POSITIONS, lambda b, t, s: mask[b, t, s]), rtol=0, atol=2e-5)


def test_cached_equals_uncached_in_a_ragged_batch():
    """Rows 3 and 2 are committed, two more are read, and of the second row one is then read again."""
    positions = np.broadcast_to(np.arange(7, dtype=np.int32), (2, 7))
    whole = apply(params(), X, positions)
    cache = kangaroo.new_cache(CFG, 2, 9)
    cache = apply(params(), X[:, :3], positions[:, :3], None, cache).cache
    first = np.array([3, 2], np.int32)
    pick = lambda all_, start: np.stack([all_[b, s : s + 2] for b, s in enumerate(start)])
    out = apply(params(), pick(X, first), pick(positions, first), None, cache._replace(length=first))
    np.testing.assert_array_equal(out.cache.length, first)
    np.testing.assert_allclose(out.hidden, pick(whole.hidden, first), rtol=0, atol=2e-5)
    second = np.array([5, 3], np.int32)
    out = apply(params(), pick(X, second), pick(positions, second), None, out.cache._replace(length=second))
    np.testing.assert_allclose(out.hidden, pick(whole.hidden, second), rtol=0, atol=2e-5)


def test_the_target_gives_width_and_heads_alone():
    plain = dataclasses.replace(
        TARGET,
        num_layers=9,
        rope_theta=1e4,
        rope_scaling=None,
        window=None,
        num_kv_heads=4,
        qkv_bias=False,
        o_bias=False,
        qk_norm=False,
    )
    other = KangarooConfig(target=plain, exit_layer=8, rope_theta=100.0)
    np.testing.assert_array_equal(
        kangaroo.forward(CFG, params(), X, POSITIONS).hidden, kangaroo.forward(other, params(), X, POSITIONS).hidden
    )


def test_parameters_have_the_papers_number_and_their_axes():
    """4 D^2 where heads fill the width, and two norms; every axis is named."""
    square = KangarooConfig(target=dataclasses.replace(TARGET, head_dim=4, num_heads=3, num_kv_heads=1), exit_layer=1)
    shapes = jax.eval_shape(lambda: kangaroo.init_params(square, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 4 * 16 * 9 + 2 * 12
    axes = kangaroo.param_axes(CFG)
    named = jax.tree.map(lambda w, names: dict(zip(names, w.shape, strict=True)), params(), axes)
    sizes = {"embed": 12, "heads": 4, "kv_heads": 4, "head_dim": 6}
    assert all(
        size == sizes[name]
        for leaf in jax.tree.leaves(named, is_leaf=lambda x: "embed" in x)
        for name, size in leaf.items()
    )
    assert axes["attn"]["q"] == ("heads", "head_dim", "embed")
    assert axes["attn"]["o"] == ("embed", "heads", "head_dim")
    cache = kangaroo.new_cache(CFG, 2, 9, "bfloat16")
    assert [(leaf.shape, leaf.dtype) for leaf in cache.layers[0]] == [((2, 9, 4, 6), jnp.bfloat16)] * 2


def test_fresh_weights_follow_the_key_and_have_unit_norms():
    first, again, other = (kangaroo.init_params(CFG, jax.random.key(k)) for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert all(np.any(first["attn"][w] != other["attn"][w]) for w in "qkvo")
    np.testing.assert_array_equal(first["norm_in"], np.ones(12))
    np.testing.assert_array_equal(first["norm_out"], np.ones(12))
    assert np.std(first["attn"]["q"]) == pytest.approx(12**-0.5, rel=0.15)
    assert np.std(first["attn"]["o"]) == pytest.approx(24**-0.5, rel=0.15)


def test_bfloat16_activations_stay_close_and_keep_float32_weights():
    half = KangarooConfig(target=dataclasses.replace(TARGET, dtype="bfloat16"), exit_layer=2, rope_theta=100.0)
    got = kangaroo.forward(half, params(), X, POSITIONS).hidden
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), apply(params(), X, POSITIONS).hidden, rtol=0, atol=0.15)


def test_a_checkpoint_folder_brings_it_back(tmp_path):
    save(tmp_path / "adapter", kangaroo.KIND, CFG, params())
    cfg, got = load_for(tmp_path / "adapter", TARGET, kangaroo.config_of, kangaroo.param_shapes)
    assert cfg == CFG
    jax.tree.map(np.testing.assert_array_equal, got, params())


@pytest.mark.errors
@pytest.mark.parametrize("exit_layer", [0, 4, -1, 1.0, True])
def test_exit_layers_that_leave_nothing_are_refused(exit_layer):
    with pytest.raises(ValueError, match=f"exit_layer: found {exit_layer}; expected 1 to 3"):
        KangarooConfig(target=TARGET, exit_layer=exit_layer)


@pytest.mark.errors
def test_other_bad_settings_are_refused():
    with pytest.raises(ValueError, match="rope_theta: found 0; expected a positive number"):
        KangarooConfig(target=TARGET, exit_layer=1, rope_theta=0)
    fields = {"model_type": "jaxaroo-kangaroo", "target": fingerprint(TARGET), "rope_theta": 1.0}
    with pytest.raises(CheckpointError, match="missing exit_layer"):
        kangaroo.config_of(fields, TARGET)
    with pytest.raises(CheckpointError, match="exit_layer: found 9; expected 1 to 3"):
        kangaroo.config_of(fields | {"exit_layer": 9}, TARGET)
    with pytest.raises(CheckpointError, match=r"made for a target of .*'num_layers': 4"):
        kangaroo.config_of(fields | {"exit_layer": 1}, dataclasses.replace(TARGET, num_layers=5, window=None))
