"""Oracle: what transformers computed. Equivalences: stacked = unrolled, cached = full, split = whole, sharded = one."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxaroo.jaxlib_ext.causal_attention import causal_attention
from jaxaroo.models import decoder, hf
from jaxaroo.models.cache import dequantise_rows, quantise_rows
from jaxaroo.models.decoder import (
    DecoderConfig,
    Model,
    RopeScaling,
    forward,
    init_params,
    lm_head,
    logits,
    new_cache,
    param_axes,
    param_shapes,
    rope_frequencies,
    stack_layers,
    unstack_layers,
)
from jaxaroo.sharding.rules import FSDP_TP, FSDP_TP_SEQ

GOLDENS = Path(__file__).parents[1] / "goldens"
OURS = ["llama3_rope", "llama_bias", "llama_bf16", "llama_f16", "mistral_window", "qwen2_mixed", "qwen3"]
SHARED = ["llama", "llama_reference", "qwen2", "qwen3", "mistral_window"]

CFG = DecoderConfig(
    vocab_size=40,
    embed_dim=16,
    ffn_dim=24,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    window=5,
    window_layers=(False, True, False, True),
    qkv_bias=True,
    qk_norm=True,
)
T = 12
run = jax.jit(forward, static_argnums=0, static_argnames=("start_layer", "stop_layer", "collect", "remat", "rules"))


@functools.cache
def model() -> Model:
    """Random everything, biases and gains too: a zero bias would hide a missing one."""
    params = init_params(CFG, jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), 100))
    return Model(CFG, jax.tree.map(lambda w: w + 0.3 * jax.random.normal(next(keys), w.shape), params))


def batch(n=2, length=T):
    tokens = jax.random.randint(jax.random.key(3), (n, length), 0, CFG.vocab_size)
    return tokens, jnp.broadcast_to(jnp.arange(length)[None], (n, length))


def check_against_transformers(folder: Path):
    io = np.load(folder / "io.npz")
    cfg, params = hf.load(folder, dtype="float32")
    ids, real = io["input_ids"], io["attention_mask"] == 1
    got = logits(Model(cfg, params), ids, io["attention_mask"])
    np.testing.assert_allclose(np.asarray(got)[real], io["logits"][real], atol=1e-4)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
    for p in (params, stack_layers(params)):
        out = jax.jit(functools.partial(forward, cfg, collect=tuple(range(cfg.num_layers + 1))))(p, ids, positions)
        for mine, theirs in zip(out.collected, io["hidden"], strict=True):
            np.testing.assert_allclose(np.asarray(mine)[real], theirs[real], atol=1e-4)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.slow
def test_matches_transformers(name):
    check_against_transformers(GOLDENS / name)


@pytest.mark.parametrize("name", SHARED)
def test_matches_transformers_on_the_larger_goldens(name, shared):
    check_against_transformers(shared / "goldens" / name)


@pytest.mark.slow
def test_stacked_layers_compute_what_unrolled_ones_do():
    cfg, params = model()
    tokens, positions = batch()
    collect = (0, 1, 3, 4)
    scanned = run(cfg, params, tokens, positions, collect=collect)
    unrolled = run(cfg, unstack_layers(params), tokens, positions, collect=collect)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), scanned, unrolled)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("cut", [0, 1, 3, 4])
@pytest.mark.slow
def test_two_halves_make_a_whole(cut, stacked):
    cfg, params = model()
    params = params if stacked else unstack_layers(params)
    tokens, positions = batch()
    whole = run(cfg, params, tokens, positions, collect=(cut,))
    first = run(cfg, params, tokens, positions, stop_layer=cut, collect=(cut,))
    np.testing.assert_allclose(first.hidden, whole.collected[0], atol=1e-5)
    if cut < cfg.num_layers:
        second = run(cfg, params, first.hidden, positions, start_layer=cut)
        np.testing.assert_allclose(second.hidden, whole.hidden, atol=1e-5)


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 6], [3, 9]])
def test_cached_pieces_equal_the_uncached_whole(pieces):
    cfg, params = model()
    params = unstack_layers(params)
    tokens, positions = batch()
    whole = run(cfg, params, tokens, positions).hidden
    cache, start, got = new_cache(cfg, 2, 16), 0, []
    for n in pieces:
        out = run(cfg, params, tokens[:, start : start + n], positions[:, start : start + n], cache=cache)
        got.append(out.hidden)
        start += n
        cache = out.cache._replace(length=out.cache.length + n)
    np.testing.assert_allclose(jnp.concatenate(got, 1), whole, atol=1e-5)


@pytest.mark.parametrize(("dtype", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.slow
def test_pieces_read_all_keys_and_values_as_they_are_kept(dtype, bits, monkeypatch):
    """Oracle: no cache, and attention that rounds what it is given. In any pieces, codes are the same."""
    cfg, params = model()
    params = unstack_layers(params)
    tokens, positions = batch()
    kept = lambda x: dequantise_rows(quantise_rows(x, bits), x.dtype)
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "causal_attention", lambda q, k, v, *how: causal_attention(q, kept(k), kept(v), *how))
        want = jax.jit(lambda p: forward(cfg, p, tokens, positions).hidden)(params)
    caches = []
    for pieces in ([12], [1] * 12, [5, 1, 6]):
        cache, start, got = new_cache(cfg, 2, 16, dtype), 0, []
        for n in pieces:
            out = run(cfg, params, tokens[:, start : start + n], positions[:, start : start + n], cache=cache)
            got.append(out.hidden)
            start += n
            cache = out.cache._replace(length=out.cache.length + n)
        np.testing.assert_allclose(jnp.concatenate(got, 1), want, atol=1e-5)
        caches.append(cache)
    for other in caches[1:]:
        jax.tree.map(np.testing.assert_array_equal, caches[0], other)
    assert np.abs(want - run(cfg, params, tokens, positions).hidden).max() > 0.05  # rounding is seen


@pytest.mark.parametrize("name", ["qwen3", "mistral_window"])
@pytest.mark.slow
def test_logits_move_little_at_8_bits_and_more_at_4(name):
    """Measured on all goldens: 1 to 1.6 % of the logits' spread at 8 bits, 14 to 24 % at 4, where steps are 17 fold."""
    cfg, params = hf.load(GOLDENS / name, dtype="float32")
    ids = np.load(GOLDENS / name / "io.npz")["greedy_0"][None]
    positions = np.arange(ids.shape[1])[None]
    head = jax.jit(lm_head, static_argnums=0)
    z = {}
    for dtype in ("float32", "int8", "int4"):
        out = run(cfg, params, ids, positions, cache=new_cache(cfg, 1, ids.shape[1], dtype))
        z[dtype] = np.asarray(head(cfg, params, out.hidden))
    off = {d: np.sqrt(((z[d] - z["float32"]) ** 2).mean()) / z["float32"].std() for d in ("int8", "int4")}
    assert 0.005 < off["int8"] < 0.02
    assert 10 < off["int4"] / off["int8"] < 20


def test_rows_past_the_length_are_never_seen():
    cfg, params = model()
    params = unstack_layers(params)
    tokens, positions = batch()
    clean = run(cfg, params, tokens[:, :6], positions[:, :6], cache=new_cache(cfg, 2, 16)).cache
    clean = clean._replace(length=jnp.array([6, 3], jnp.int32))  # rows 3.. of the second sequence are abandoned
    dirty = jax.tree.map(lambda a: a.at[0, 6:].set(1e3).at[1, 3:].set(-1e3) if a.ndim > 1 else a, clean)
    next_tokens, at = tokens[:, 6:8], clean.length[:, None] + jnp.arange(2)[None]
    got, want = (run(cfg, params, next_tokens, at, cache=c).hidden for c in (dirty, clean))
    np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_a_tree_of_candidates_scores_like_each_branch_alone():
    """Two branches, level by level behind a prefix, in one pass: rows are not positions, and windows go by these."""
    cfg, params = model()
    params = unstack_layers(params)
    tokens, positions = batch(1, 16)
    prefix = run(cfg, params, tokens[:, :4], positions[:, :4], cache=new_cache(cfg, 1, 16)).cache
    prefix = prefix._replace(length=jnp.array([4], jnp.int32))
    depth = np.arange(12)[None] // 2  # node i is on branch i % 2; the branches are deeper than the window of 5
    mask = np.zeros((1, 12, 16), bool)
    mask[:, :, :4] = True
    for node in range(12):
        mask[0, node, 4 + node % 2 : 5 + node : 2] = True  # ancestors and itself
    key_positions = np.concatenate([np.arange(4), 4 + depth[0]])[None]
    tree = run(cfg, params, tokens[:, 4:], 4 + depth, mask, prefix, key_positions=key_positions)
    for branch in (0, 1):
        line = jnp.concatenate([tokens[:, :4], tokens[:, 4 + branch :: 2]], 1)
        alone = run(cfg, params, line, jnp.arange(10)[None]).hidden[:, 4:]
        np.testing.assert_allclose(tree.hidden[:, branch::2], alone, atol=1e-5)


def test_no_token_sees_a_later_one_nor_one_behind_its_window():
    cfg = dataclasses.replace(CFG, num_layers=1, window_layers=())  # one layer, so the window is a hard border
    params = jax.tree.map(lambda w: w[:1] if w.shape[0] == 4 else w, model().params["layers"])
    params = model().params | {"layers": params}
    hidden = jax.random.normal(jax.random.key(5), (1, T, cfg.embed_dim))
    grad = jax.jacobian(lambda h: run(cfg, params, h, batch(1)[1]).hidden[0].sum(-1))(hidden)[:, 0]
    reach = np.abs(grad).sum(-1) > 0  # [query, key]
    offset = np.arange(T)[:, None] - np.arange(T)[None]
    np.testing.assert_array_equal(reach, (offset >= 0) & (offset < cfg.window))


@pytest.mark.parametrize(("sizes", "whole"), [((1, 1, 1, 8), True), ((2, 2, 2, 1), False)])
def test_rows_that_are_shared_out_are_not_cut(sizes, whole, monkeypatch):
    asked = []
    monkeypatch.setattr(decoder, "causal_attention", lambda *given: asked.append(given[-1]) or causal_attention(*given))
    tokens, positions = batch(8, 256)
    mesh = Mesh(np.array(jax.devices()).reshape(sizes), ("data", "fsdp", "tensor", "sequence"))
    with jax.set_mesh(mesh):
        jax.eval_shape(lambda p: forward(CFG, p, tokens, positions, rules=FSDP_TP_SEQ), unstack_layers(model().params))
    assert asked == [whole] * CFG.num_layers


def test_of_an_mlp_gate_and_up_are_all_that_is_kept():
    """And nothing as large as scores; for the backward pass, of layers that are not computed again."""
    cfg = dataclasses.replace(CFG, ffn_dim=56)
    tokens, positions = batch(2, 24)
    params = unstack_layers(jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0)))
    kept = jax.eval_shape(lambda p: jax.vjp(lambda p: forward(cfg, p, tokens, positions).hidden, p)[1], params)
    sizes = [x.size for x in jax.tree.leaves(kept) if x.dtype != bool]
    assert sizes.count(2 * 24 * 56) == 2 * cfg.num_layers
    assert 2 * cfg.num_heads * 24 * 24 not in sizes


@pytest.mark.slow
def test_padding_on_either_side_changes_nothing():
    tokens, _ = batch(1, 7)
    alone = logits(model(), tokens)
    pad = jnp.full((1, 3), 9)
    ones, zeros = jnp.ones((1, 7), int), jnp.zeros((1, 3), int)
    right = logits(model(), jnp.concatenate([tokens, pad], 1), jnp.concatenate([ones, zeros], 1))[:, :7]
    left = logits(model(), jnp.concatenate([pad, tokens], 1), jnp.concatenate([zeros, ones], 1))[:, 3:]
    np.testing.assert_allclose(right, alone, atol=1e-5)
    np.testing.assert_allclose(left, alone, atol=1e-5)


@pytest.mark.parametrize("remat", ["dots", "full"])
@pytest.mark.slow
def test_remat_changes_no_gradient(remat):
    cfg, params = model()
    tokens, positions = batch()
    loss = lambda p, remat: (run(cfg, p, tokens, positions, remat=remat).hidden ** 2).sum()
    want, got = (jax.jit(jax.grad(loss), static_argnums=1)(params, r) for r in ("none", remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), got, want)


@pytest.mark.parametrize(("shape", "stacked"), [((1, 8, 1), True), ((1, 2, 2), True), ((2, 2, 2), False)])
@pytest.mark.slow
def test_sharded_equals_one_device(shape, stacked):
    cfg, params = model()
    params = params if stacked else unstack_layers(params)
    tokens, positions = batch(8)
    compute = lambda p, rules: lm_head(cfg, p, forward(cfg, p, tokens, positions, rules=rules).hidden, rules=rules)
    want = jax.jit(compute, static_argnums=1)(params, FSDP_TP)
    mesh = Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), ("data", "fsdp", "tensor"))
    axes = param_axes(cfg)
    if not stacked:
        one = jax.tree.map(lambda a: a[1:], axes["layers"], is_leaf=lambda a: isinstance(a, tuple))
        axes |= {"layers": (one,) * cfg.num_layers}
    placed = jax.device_put(params, shardings(mesh, axes, stacked))
    with jax.set_mesh(mesh):
        got = jax.jit(compute, static_argnums=1)(placed, FSDP_TP)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def shardings(mesh, axes, stacked):
    if stacked:
        return FSDP_TP.shardings(mesh, axes)
    ends = FSDP_TP.shardings(mesh, {k: v for k, v in axes.items() if k != "layers"})
    return ends | {"layers": tuple(FSDP_TP.shardings(mesh, layer) for layer in axes["layers"])}


def test_llama3_scaling_stretches_long_waves_only():
    scaling = RopeScaling(kind="llama3", factor=8.0, low_freq=1.0, high_freq=4.0, original_positions=8192)
    cfg = dataclasses.replace(CFG, head_dim=128, rope_theta=500_000.0)
    plain, scaled = rope_frequencies(cfg), rope_frequencies(dataclasses.replace(cfg, rope_scaling=scaling))
    wave = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wave < 8192 / 4], plain[wave < 8192 / 4])
    np.testing.assert_allclose(scaled[wave > 8192], plain[wave > 8192] / 8, rtol=1e-12)
    middle = (wave >= 8192 / 4) & (wave <= 8192)
    assert middle.any()
    assert ((scaled < plain) & (scaled > plain / 8))[middle].all()


def test_every_config_field_has_a_reader():
    root = Path(hf.__file__).parents[1]
    source = "".join(p.read_text() for folder in ("models", "infer") for p in (root / folder).glob("*.py"))
    fields = {f.name for f in dataclasses.fields(DecoderConfig)} - {"window_layers"}
    assert [f for f in sorted(fields) if f"cfg.{f}" not in source and f"config.{f}" not in source] == []
    assert CFG.windowed == CFG.window_layers  # read through the property


def test_shapes_and_axes_describe_what_init_makes():
    params = init_params(CFG, jax.random.key(0))
    shapes, axes = param_shapes(CFG), param_axes(CFG)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, shapes)
    ranks = jax.tree.map(len, axes, is_leaf=lambda a: isinstance(a, tuple))
    assert jax.tree.map(jnp.ndim, params) == ranks
    same = init_params(CFG, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, same)
    std = float(jnp.std(params["layers"]["mlp"]["down"]))
    assert std == pytest.approx(CFG.ffn_dim**-0.5, rel=0.1)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads=4, num_kv_heads=3"),
        ({"head_dim": 7}, "even number"),
        ({"window": 0}, "window: found 0"),
        ({"window_layers": (True,)}, "found 1 entries; expected 4"),
        ({"vocab_size": 0}, "vocab_size: found 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **change)


@pytest.mark.errors
def test_a_range_that_cannot_be_run_is_refused():
    cfg, params = model()
    tokens, positions = batch()
    hidden = jnp.zeros((2, T, cfg.embed_dim))
    with pytest.raises(ValueError, match="found tokens and start_layer=1"):
        run(cfg, params, tokens, positions, start_layer=1)
    with pytest.raises(ValueError, match="expected 0 <= start <= stop <= 4"):
        run(cfg, params, hidden, positions, start_layer=3, stop_layer=2)
    with pytest.raises(ValueError, match=r"collect=\[3\] is not reached"):
        run(cfg, params, tokens, positions, stop_layer=2, collect=(3,))
    with pytest.raises(ValueError, match="Use unstack_layers"):
        run(cfg, params, tokens, positions, cache=new_cache(cfg, 2, 16))
    with pytest.raises(ValueError, match="attention_mask of shape"):
        logits(model(), tokens, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="expected integers of shape"):
        logits(model(), tokens[0])
