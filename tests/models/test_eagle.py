"""Oracle: the network by loops in float64. Equivalences: cached = full for chains and trees, sharded = one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxaroo.models import checkpoint
from jaxaroo.models.decoder import DecoderConfig, rope_frequencies
from jaxaroo.models.eagle import EagleConfig, config_of, forward, init_params, new_cache, param_axes, param_shapes
from jaxaroo.sharding.rules import FSDP_TP

# N H = 16 is not D = 12; every bias and norm there is; a window, which the drafter does not have.
TARGET = DecoderConfig(
    vocab_size=20,
    embed_dim=12,
    ffn_dim=14,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rope_theta=100.0,
    window=2,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    qk_norm=True,
)
CFG = EagleConfig(target=TARGET)
B, T = 2, 7
RNG = np.random.default_rng(0)
FEATURES = jnp.asarray(RNG.normal(size=(B, T, 12)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(0, 20, (B, T)), jnp.int32)
POSITIONS = jnp.asarray([[0, 1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8, 9]], jnp.int32)
EMBED = {"embed": jnp.asarray(RNG.normal(size=(20, 12)), jnp.float32)}  # all that it sees of the target
run = jax.jit(forward, static_argnums=0, static_argnames="rules")


@functools.cache
def params(cfg=CFG):
    """Random everything: a bias of zero would hide one that is missing."""
    keys = iter(jax.random.split(jax.random.key(2), 100))
    fresh = init_params(cfg, jax.random.key(1))
    return jax.tree.map(lambda w: w + 0.3 * jax.random.normal(next(keys), w.shape), fresh)


def norm(x, gain):
    return x / np.sqrt((x * x).mean() + TARGET.norm_eps) * gain


def rotated(x, position):
    out = np.empty_like(x)
    for i, f in enumerate(rope_frequencies(TARGET)):
        c, s = np.cos(f * position), np.sin(f * position)
        out[i], out[i + 2] = x[i] * c - x[i + 2] * s, x[i + 2] * c + x[i] * s
    return out


def silu(x):
    return x / (1 + np.exp(-x))


def oracle(p, features, tokens, positions, mask):
    """One row; mask[t][s] says which pairs pair t sees."""
    p, embed, features = jax.tree.map(lambda x: np.asarray(x, np.float64), (p, EMBED["embed"], features))
    front, attn, mlp = p["front"], p["front"]["attn"], p["mlp"]
    z, q, k, v = [], [], [], []
    for f, x, at in zip(features, np.asarray(tokens), np.asarray(positions), strict=True):
        z.append(front["fc"] @ np.concatenate([embed[x], f]) + front["fc_bias"])
        heads = lambda name, z=z: [attn[name][h] @ z[-1] + attn[f"{name}_bias"][h] for h in range(len(attn[name]))]
        q.append([rotated(norm(head, attn["q_norm"]), at) for head in heads("q")])
        k.append([rotated(norm(head, attn["k_norm"]), at) for head in heads("k")])
        v.append(heads("v"))
    out = []
    for t in range(len(z)):
        a = z[t] + attn["o_bias"]
        for h in range(4):
            seen = [s for s in range(len(z)) if mask[t][s]]
            score = np.array([q[t][h] @ k[s][h // 2] for s in seen]) / 2.0
            prob = np.exp(score - score.max())
            mixed = sum(w * v[s][h // 2] for w, s in zip(prob / prob.sum(), seen, strict=True))
            a = a + attn["o"][:, h] @ mixed
        u = norm(a, front["mlp_norm"])
        inner = silu(mlp["gate"] @ u + mlp["gate_bias"]) * (mlp["up"] @ u + mlp["up_bias"])
        out.append(a + mlp["down"] @ inner + mlp["down_bias"])
    return np.array(out)


@pytest.mark.slow
def test_matches_float64_loops_and_is_causal_by_default():
    got = run(CFG, params(), EMBED, FEATURES, TOKENS, POSITIONS)
    assert got.cache is None
    causal = np.tril(np.ones((T, T), bool))
    for b in range(B):
        want = oracle(params(), FEATURES[b], TOKENS[b], POSITIONS[b], causal)
        np.testing.assert_allclose(got.hidden[b], want, rtol=0, atol=2e-5)


def test_a_mask_is_obeyed():
    mask = np.tril(RNG.random((B, T, T)) < 0.5) | np.eye(T, dtype=bool)[None]
    got = run(CFG, params(), EMBED, FEATURES, TOKENS, POSITIONS, jnp.asarray(mask))
    for b in range(B):
        want = oracle(params(), FEATURES[b], TOKENS[b], POSITIONS[b], mask[b])
        np.testing.assert_allclose(got.hidden[b], want, rtol=0, atol=2e-5)


def test_without_a_bias_it_is_the_network_with_a_bias_of_zero():
    bare, zero = dict(params()["front"]), dict(params()["front"])
    del bare["fc_bias"]
    zero["fc_bias"] = jnp.zeros(12)
    without = run(
        dataclasses.replace(CFG, fc_bias=False), params() | {"front": bare}, EMBED, FEATURES, TOKENS, POSITIONS
    )
    with_zero = run(CFG, params() | {"front": zero}, EMBED, FEATURES, TOKENS, POSITIONS)
    np.testing.assert_allclose(without.hidden, with_zero.hidden, rtol=0, atol=1e-6)
    assert jax.tree.structure(param_shapes(dataclasses.replace(CFG, fc_bias=False))["front"]) == jax.tree.structure(
        bare
    )


# ------------------------------------------------------------------------------------------------------------- cache
def test_cached_rows_behind_each_rows_own_length_equal_the_whole():
    """Row 0 has 3 pairs committed and row 1 has 2 (its third is a leftover); both go on with two more."""
    whole = run(CFG, params(), EMBED, FEATURES, TOKENS, POSITIONS).hidden
    first = run(CFG, params(), EMBED, FEATURES[:, :3], TOKENS[:, :3], POSITIONS[:, :3], None, new_cache(CFG, B, 12))
    np.testing.assert_allclose(first.hidden, whole[:, :3], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(first.cache.length, 0)
    length = jnp.asarray([3, 2], jnp.int32)
    cut = lambda x: jnp.stack([x[0, 3:5], x[1, 2:4]])
    cache = first.cache._replace(length=length)
    more = run(CFG, params(), EMBED, cut(FEATURES), cut(TOKENS), cut(POSITIONS), None, cache)
    np.testing.assert_allclose(more.hidden, cut(whole), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(more.cache.length, length)


@pytest.mark.slow
def test_a_tree_behind_cached_rows_equals_each_path_alone():
    """Nodes 0, 1 hang on the committed pairs; 2, 3 on node 0, 4 on node 1. Levels are fed one after the other."""
    parent = [-1, -1, 0, 0, 1]
    known, S, nodes = 2, 10, 5
    start = run(CFG, params(), EMBED, FEATURES[:, :2], TOKENS[:, :2], POSITIONS[:, :2], None, new_cache(CFG, B, S))
    cache = start.cache._replace(length=jnp.full(B, known, jnp.int32))
    paths = []
    for node in range(nodes):
        path = [node]
        while parent[path[0]] >= 0:
            path.insert(0, parent[path[0]])
        paths.append(path)
    got = []
    for level in ([0, 1], [2, 3, 4]):
        mask = np.zeros((B, len(level), S), bool)
        for i, node in enumerate(level):
            mask[:, i, [0, 1, *(known + n for n in paths[node])]] = True
        place = [2 + n for n in level]
        at = POSITIONS[:, :1] + jnp.asarray([[known + len(paths[n]) - 1 for n in level]])
        features, tokens = FEATURES[:, place[0] : place[-1] + 1], TOKENS[:, place[0] : place[-1] + 1]
        out = run(CFG, params(), EMBED, features, tokens, at, jnp.asarray(mask), cache)
        cache = out.cache._replace(length=out.cache.length + len(level))
        got.append(out.hidden)
    got = np.concatenate(got, axis=1)
    causal = np.tril(np.ones((T, T), bool))
    for b in range(B):
        for node, path in enumerate(paths):
            rows = [0, 1, *(2 + n for n in path)]
            at = int(POSITIONS[b, 0]) + np.arange(len(rows))
            want = oracle(params(), FEATURES[b, jnp.asarray(rows)], TOKENS[b, jnp.asarray(rows)], at, causal)
            np.testing.assert_allclose(got[b, node], want[-1], rtol=0, atol=2e-5)


def test_the_cache_fits_and_activations_keep_their_dtype():
    half = EagleConfig(target=dataclasses.replace(TARGET, dtype="bfloat16"))
    cache = new_cache(half, B, 9)
    assert cache.layers[0].k.shape == (B, 9, 2, 4)
    assert len(cache.layers) == 1
    assert {x.dtype for x in cache.layers[0]} == {jnp.dtype("bfloat16")}
    assert new_cache(half, B, 9, jnp.float32).layers[0].k.dtype == jnp.float32
    run_half = functools.partial(forward, half)
    out = jax.eval_shape(run_half, params(), EMBED, FEATURES, TOKENS, POSITIONS, None, cache)
    assert out.hidden.dtype == jnp.bfloat16
    assert out.cache.layers[0].k.dtype == jnp.bfloat16


# -------------------------------------------------------------------------------------------------------- parameters
@pytest.mark.slow
def test_fresh_parameters_follow_from_the_key():
    fresh, again, other = (init_params(CFG, jax.random.key(k)) for k in (1, 1, 2))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), fresh, again)
    assert all(jax.tree.leaves(same))
    assert not bool((fresh["front"]["fc"] == other["front"]["fc"]).any())
    assert not fresh["front"]["fc_bias"].any()
    big = EagleConfig(target=dataclasses.replace(TARGET, embed_dim=64))
    assert float(jnp.std(init_params(big, jax.random.key(0))["front"]["fc"])) == pytest.approx(128**-0.5, rel=0.03)


def test_sharded_equals_one_device():
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    want = run(CFG, params(), EMBED, FEATURES, TOKENS, POSITIONS).hidden
    with jax.set_mesh(mesh):
        placed = jax.device_put(params(), FSDP_TP.shardings(mesh, param_axes(CFG), param_shapes(CFG)))
        assert placed["front"]["fc"].sharding.spec == P(None, "fsdp")
        assert placed["mlp"]["down"].sharding.spec == P("fsdp", "tensor")
        got = run(CFG, placed, EMBED, FEATURES, TOKENS, POSITIONS, rules=FSDP_TP).hidden
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_a_saved_drafter_comes_back_for_its_target_alone(tmp_path):
    cfg = EagleConfig(target=TARGET, fc_bias=False)
    saved = init_params(cfg, jax.random.key(3))
    checkpoint.save(tmp_path / "drafter", "eagle", cfg, saved)
    back, got = checkpoint.load_for(tmp_path / "drafter", TARGET, config_of, param_shapes)
    assert back == cfg
    assert jax.tree.structure(got) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, got, saved)
    with pytest.raises(checkpoint.CheckpointError, match="num_layers"):
        checkpoint.load_for(tmp_path / "drafter", dataclasses.replace(TARGET, num_layers=4), config_of, param_shapes)


@pytest.mark.errors
@pytest.mark.parametrize("wrong", ["features", "positions"])
def test_shapes_that_do_not_belong_together_are_refused(wrong):
    features = FEATURES[:, :, :8] if wrong == "features" else FEATURES
    positions = POSITIONS[:, :3] if wrong == "positions" else POSITIONS
    with pytest.raises(ValueError, match=r"expected \[B, T, 12\]"):
        forward(CFG, params(), EMBED, features, TOKENS, positions)
