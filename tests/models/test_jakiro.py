"""Oracles: experts and branches in float64 behind EAGLE's attention, the sorted form of the paper's code, enumeration.

What stands before the experts is EAGLE's, to the bit, and has its own oracle in test_eagle.py: an EAGLE whose MLP is
zero shows it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxaroo.models import checkpoint, eagle, jakiro
from jaxaroo.models.decoder import DecoderConfig
from jaxaroo.models.decoder import init_params as target_init
from jaxaroo.models.jakiro import JakiroConfig
from jaxaroo.sharding.rules import FSDP_TP

TARGET = DecoderConfig(
    vocab_size=9,
    embed_dim=12,
    ffn_dim=14,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    qkv_bias=True,
    mlp_bias=True,  # of the target: experts have none
)
CFG = JakiroConfig(target=TARGET, experts_dim=10)
MIX = dataclasses.replace(CFG, kind="mixture")
B, T = 2, 6
RNG = np.random.default_rng(1)
FEATURES = jnp.asarray(RNG.normal(size=(B, T, 12)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(0, 9, (B, T)), jnp.int32)
POSITIONS = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
SEEN = {k: w for k, w in target_init(TARGET, jax.random.key(9)).items() if k != "layers"}  # the layers are not needed
run = jax.jit(jakiro.forward, static_argnums=0, static_argnames="rules")
run_mixture = jax.jit(jakiro.forward_mixture, static_argnums=0, static_argnames="rules")
run_eagle = jax.jit(eagle.forward, static_argnums=0)


@functools.cache
def params(cfg=CFG):
    keys = iter(jax.random.split(jax.random.key(2), 100))
    fresh = jakiro.init_params(cfg, jax.random.key(1))
    return jax.tree.map(lambda w: w + 0.3 * jax.random.normal(next(keys), w.shape), fresh)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@functools.cache
def parts(cfg=CFG):
    """a [B, T, D], both experts' outputs [B, T, 2, D] and the router's logits [B, T, 4 or 2], in float64."""
    p = params(cfg)
    silent = jax.tree.map(jnp.zeros_like, eagle.init_params(eagle.EagleConfig(target=TARGET), jax.random.key(0)))
    both = {"front": p["front"], "mlp": silent["mlp"]}
    hidden = run_eagle(eagle.EagleConfig(target=TARGET), both, SEEN, FEATURES, TOKENS, POSITIONS).hidden
    p, a = jax.tree.map(lambda x: np.asarray(x, np.float64), (p, hidden))
    u = a / np.sqrt((a * a).mean(-1, keepdims=True) + TARGET.norm_eps) * p["front"]["mlp_norm"]
    outputs = np.empty((B, T, 2, 12))
    for b, t, e in np.ndindex(B, T, 2):
        expert = p[f"expert_{e}"]
        gate = expert["gate"] @ u[b, t]
        outputs[b, t, e] = expert["down"] @ (gate / (1 + np.exp(-gate)) * (expert["up"] @ u[b, t]))
    return a, outputs, u @ p["router"].T


# -------------------------------------------------------------------------------------------------------- contrastive
@pytest.mark.slow
def test_both_guesses_match_float64_in_the_sorted_form_too():
    """The form of the paper's code sorts the experts by weight, and takes the second from the first."""
    a, e, g = parts()
    got = run(CFG, params(), SEEN, FEATURES, TOKENS, POSITIONS)
    signs = set()
    for b, t in np.ndindex(B, T):
        w, v = softmax(g[b, t, :2]), softmax(g[b, t, 2:])
        first = int(np.argmax(w))
        main = a[b, t] + w[0] * e[b, t, 0] + w[1] * e[b, t, 1]
        sorted_main = a[b, t] + w[first] * e[b, t, first] + w[1 - first] * e[b, t, 1 - first]
        heavy = int(np.argmax(v))
        sorted_contrast = a[b, t] + v[heavy] * e[b, t, heavy] - v[1 - heavy] * e[b, t, 1 - heavy]
        sign = 1 if g[b, t, 2] > g[b, t, 3] else -1
        contrast = a[b, t] + sign * (v[0] * e[b, t, 0] - v[1] * e[b, t, 1])
        signs.add(sign)
        for want in (main, sorted_main):
            np.testing.assert_allclose(got.main[b, t], want, rtol=0, atol=2e-5)
        for want in (contrast, sorted_contrast):
            np.testing.assert_allclose(got.contrast[b, t], want, rtol=0, atol=2e-5)
    assert signs == {1, -1}


def test_the_sign_flips_where_the_routers_last_two_logits_cross():
    """Almost equal weights, so that the contrast is half the difference of the experts, one way or the other."""
    rows = np.zeros((4, 12), np.float32)
    rows[2] = 1e-6 * RNG.normal(size=12)
    a, e, _ = parts()
    got = run(CFG, params() | {"router": jnp.asarray(rows)}, SEEN, FEATURES, TOKENS, POSITIONS)
    u = a / np.sqrt((a * a).mean(-1, keepdims=True) + TARGET.norm_eps) * np.asarray(params()["front"]["mlp_norm"])
    sign = np.sign(u @ rows[2].astype(np.float64))
    assert {*sign.flat} == {1.0, -1.0}
    want = a + sign[..., None] * (e[:, :, 0] - e[:, :, 1]) / 2
    np.testing.assert_allclose(got.contrast, want, rtol=0, atol=3e-5)
    np.testing.assert_allclose(got.main, a + (e[:, :, 0] + e[:, :, 1]) / 2, rtol=0, atol=3e-5)


def test_cached_equals_whole():
    """The attention's part is EAGLE's; here it is seen that the cache goes in and comes out."""
    for cfg, go in ((CFG, run), (MIX, run_mixture)):
        whole = go(cfg, params(cfg), SEEN, FEATURES, TOKENS, POSITIONS)
        half = (FEATURES[:, :3], TOKENS[:, :3], POSITIONS[:, :3])
        rest = (FEATURES[:, 3:], TOKENS[:, 3:], POSITIONS[:, 3:])
        first = go(cfg, params(cfg), SEEN, *half, None, jakiro.new_cache(cfg, B, 8))
        cache = first.cache._replace(length=jnp.full(B, 3, jnp.int32))
        more = go(cfg, params(cfg), SEEN, *rest, None, cache)
        for all_, a, b in zip(whole[:2], first[:2], more[:2], strict=True):
            np.testing.assert_allclose(np.concatenate([a, b], axis=1), all_, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ mixture
def test_branches_and_their_mixture_match_float64():
    a, e, g = parts(MIX)
    out = run_mixture(MIX, params(MIX), SEEN, FEATURES, TOKENS, POSITIONS)
    given = jakiro.branch_log_probs(MIX, SEEN, out)
    mixed = jakiro.mixture_log_probs(given)
    head = np.asarray(SEEN["head"], np.float64)
    for b, t in np.ndindex(B, T):
        w, q = softmax(g[b, t]), []
        for i in range(2):
            f = a[b, t] + e[b, t, i]
            np.testing.assert_allclose(out.branches[b, t, i], f, rtol=0, atol=2e-5)
            q.append(softmax(head @ f))
            np.testing.assert_allclose(given[b, t, i], np.log(w[i] * q[i]), rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(out.weights[b, t], w, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(mixed[b, t], np.log(w[0] * q[0] + w[1] * q[1]), rtol=1e-4, atol=2e-5)


def test_a_token_hands_on_the_feature_of_the_branch_that_gave_it_most():
    out = run_mixture(MIX, params(MIX), SEEN, FEATURES, TOKENS, POSITIONS)
    given = np.asarray(jakiro.branch_log_probs(MIX, SEEN, out))
    tokens = np.stack([RNG.permutation(9)[:5] for _ in range(B * T)]).reshape(B, T, 5)
    got = jakiro.winning_features(out, jnp.asarray(given), jnp.asarray(tokens))
    winners = set()
    for b, t, n in np.ndindex(B, T, 5):
        x = tokens[b, t, n]
        winner = 0 if given[b, t, 0, x] >= given[b, t, 1, x] else 1
        winners.add((n, winner))
        np.testing.assert_array_equal(got[b, t, n], out.branches[b, t, winner])
    assert len(winners) == 10  # at every place, both


# ------------------------------------------------------------------------------------------- parameters and mistakes
def test_parameters_are_those_of_the_paper():
    """Counted by hand: fc 12 x 24 + 12, attention, norm, two experts of three matrices, router."""
    sizes = lambda cfg: {k: sum(w.size for w in jax.tree.leaves(v)) for k, v in jakiro.param_shapes(cfg).items()}
    front = 12 * 24 + 12 + 2 * 16 * 12 + 2 * 8 * 12 + (16 + 8 + 8) + 12
    assert sizes(CFG) == {"front": front, "expert_0": 360, "expert_1": 360, "router": 48}
    whole = JakiroConfig(target=TARGET, kind="mixture", fc_bias=False)
    assert sizes(whole) == {"front": front - 12, "expert_0": 432, "expert_1": 432, "router": 24}
    fresh = jakiro.init_params(CFG, jax.random.key(1))
    assert not bool((fresh["expert_0"]["gate"] == fresh["expert_1"]["gate"]).any())


def test_sharded_equals_one_device():
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    want = run(CFG, params(), SEEN, FEATURES, TOKENS, POSITIONS)
    with jax.set_mesh(mesh):
        axes, shapes = jakiro.param_axes(CFG), jakiro.param_shapes(CFG)
        placed = jax.device_put(params(), FSDP_TP.shardings(mesh, axes, shapes))
        assert "tensor" in placed["expert_1"]["gate"].sharding.spec
        got = run(CFG, placed, SEEN, FEATURES, TOKENS, POSITIONS, rules=FSDP_TP)
    np.testing.assert_allclose(got.main, want.main, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.contrast, want.contrast, rtol=0, atol=1e-5)


def test_half_precision_goes_through():
    half = dataclasses.replace(TARGET, dtype="bfloat16")
    args = (params(), SEEN, FEATURES, TOKENS, POSITIONS)
    out = jax.eval_shape(functools.partial(jakiro.forward, dataclasses.replace(CFG, target=half)), *args)
    assert (out.main.dtype, out.contrast.dtype) == (jnp.bfloat16, jnp.bfloat16)
    mix = dataclasses.replace(MIX, target=half)
    out = jax.eval_shape(functools.partial(jakiro.forward_mixture, mix), params(MIX), *args[1:])
    given = jax.eval_shape(functools.partial(jakiro.branch_log_probs, mix), SEEN, out)
    assert (out.branches.dtype, out.log_weights.dtype, given.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    assert jakiro.new_cache(mix, B, 4).layers[0].k.dtype == jnp.bfloat16


def test_a_saved_drafter_comes_back_with_its_kind(tmp_path):
    for name, cfg in (("a", CFG), ("b", JakiroConfig(target=TARGET, kind="mixture"))):
        saved = jakiro.init_params(cfg, jax.random.key(3))
        checkpoint.save(tmp_path / name, "jakiro", cfg, saved)
        back, got = checkpoint.load_for(tmp_path / name, TARGET, jakiro.config_of, jakiro.param_shapes)
        assert back == cfg
        jax.tree.map(np.testing.assert_array_equal, got, saved)
    with pytest.raises(checkpoint.CheckpointError, match="jaxaroo-eagle"):
        checkpoint.load_for(tmp_path / "a", TARGET, eagle.config_of, eagle.param_shapes)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: JakiroConfig(target=TARGET, experts_dim=0), "experts_dim: found 0"),
        (lambda: JakiroConfig(target=TARGET, kind="both"), "found 'both'; expected 'contrastive' or 'mixture'"),
        (lambda: jakiro.forward(MIX, {}, {}, FEATURES, TOKENS, POSITIONS), "Use jakiro.forward_mixture"),
        (lambda: jakiro.forward_mixture(CFG, {}, {}, FEATURES, TOKENS, POSITIONS), r"Use jakiro.forward\."),
    ],
)
def test_mistakes_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()
