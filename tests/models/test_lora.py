"""Oracles: W + s B A element by element, and a float64 decoder that never merges. Equivalences: stacked = tuple."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxaroo.models import hf
from jaxaroo.models.decoder import (
    DecoderConfig,
    Model,
    init_params,
    logits,
    param_axes,
    param_shapes,
    rope_frequencies,
    stack_layers,
    unstack_layers,
)
from jaxaroo.models.lora import LoraConfig, apply_lora, init_lora, lora_axes
from jaxaroo.sharding.rules import FSDP_TP

SIZES = dict(vocab_size=20, embed_dim=12, ffn_dim=14, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6)
CFG = DecoderConfig(**SIZES, qk_norm=True, model_type="qwen3")  # N H = 24 is not D
LORA = LoraConfig(rank=3, alpha=2.0)
WEIGHTS = ["attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down"]
TOKENS = np.random.default_rng(0).integers(0, 20, (2, 9))


@functools.cache
def base():
    params = init_params(CFG, jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), 100))
    return jax.tree.map(lambda w: w + 0.2 * jax.random.normal(next(keys), w.shape), params)


@functools.cache
def trained(lora=LORA):
    """Adapters as after training: b is no longer zero."""
    adapters = init_lora(lora, base(), param_axes(CFG), jax.random.key(3))
    keys = iter(jax.random.split(jax.random.key(4), 100))
    return jax.tree.map(lambda w: w + 0.3 * jax.random.normal(next(keys), w.shape), adapters)


def at(tree, path):
    return functools.reduce(lambda node, name: node[name], path.split("/"), tree)


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


# ------------------------------------------------------------------------------------------------------------ merged
@pytest.mark.parametrize(("rslora", "scale"), [(False, 2 / 3), (True, 2 / 3**0.5)])
@pytest.mark.slow
def test_every_weight_is_w_plus_scale_times_b_a(rslora, scale):
    lora = dataclasses.replace(LORA, rslora=rslora)
    merged, params, adapters = apply_lora(lora, base(), trained())["layers"], wide(base()), wide(trained())
    for path in WEIGHTS:
        w, a, b = (at(tree["layers"], path) for tree in (params, adapters, adapters))
        a, b = a["a"], b["b"]
        inputs = 2 if path == "attn/o" else 1  # axes
        want = np.empty(w.shape)
        for index in itertools.product(*map(range, w.shape)):
            layer, out, into = index[0], index[1:-inputs], index[-inputs:]
            want[index] = w[index] + scale * sum(b[(layer, *out, r)] * a[(layer, r, *into)] for r in range(3))
        np.testing.assert_allclose(at(merged, path), want, rtol=1e-5, atol=1e-6, err_msg=path)


def decode(params, adapters, scale):
    """A float64 decoder whose weights are matrices, adapted projections being x W^T + s x A^T B^T."""
    N, K, H = CFG.num_heads, CFG.num_kv_heads, CFG.head_dim
    norm = lambda x, gain: x / np.sqrt((x * x).mean(-1, keepdims=True) + CFG.norm_eps) * gain
    B, T = TOKENS.shape
    angle = np.arange(T)[:, None] * rope_frequencies(CFG)

    def rotate(x):
        pair = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * np.exp(1j * angle)[:, None]
        return np.concatenate([pair.real, pair.imag], -1)

    x = params["embed"][TOKENS]
    for p, ad in zip(params["layers"], adapters["layers"], strict=True):

        def linear(x, path, p=p, ad=ad):
            w, low = at(p, path), at(ad, path)
            a, b = low["a"].reshape(3, x.shape[-1]), low["b"].reshape(-1, 3)
            return x @ w.reshape(-1, x.shape[-1]).T + scale * (x @ a.T) @ b.T

        h = norm(x, p["attn_norm"])
        q = rotate(norm(linear(h, "attn/q").reshape(B, T, N, H), p["attn"]["q_norm"]))
        k = rotate(norm(linear(h, "attn/k").reshape(B, T, K, H), p["attn"]["k_norm"]))
        k, v = (np.repeat(y, N // K, 2) for y in (k, linear(h, "attn/v").reshape(B, T, K, H)))
        score = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H) + np.triu(np.full((T, T), -np.inf), 1)
        prob = np.exp(score - score.max(-1, keepdims=True))
        prob /= prob.sum(-1, keepdims=True)
        x = x + linear(np.einsum("bnts,bsnh->btnh", prob, v).reshape(B, T, N * H), "attn/o")
        h = norm(x, p["mlp_norm"])
        gate = linear(h, "mlp/gate")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, "mlp/up"), "mlp/down")
    return norm(x, params["norm"]) @ params["head"].T


@pytest.mark.slow
def test_the_merged_model_computes_what_the_unmerged_one_does():
    got = logits(Model(CFG, apply_lora(LORA, base(), trained())), TOKENS)
    want = decode(wide(unstack_layers(base())), wide(unstack_layers(trained())), 2 / 3)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert np.abs(got - logits(Model(CFG, base()), TOKENS)).max() > 0.5  # the adapters do matter here


def test_fresh_adapters_change_nothing_to_the_bit():
    adapters = init_lora(LORA, base(), param_axes(CFG), jax.random.key(5))
    assert all(np.abs(at(adapters["layers"], path)["a"]).min() > 0 for path in WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, apply_lora(LORA, base(), adapters), base())


def test_what_is_not_targeted_is_the_same_array():
    params, adapters = base(), {"layers": {"attn": {"q": trained()["layers"]["attn"]["q"]}}}
    for form in (lambda tree: tree, unstack_layers):
        before = form(params)
        after = apply_lora(LORA, before, form(adapters))
        same = jax.tree.map(lambda new, old: new is old, after, before)
        changed = {jax.tree_util.keystr(p) for p, is_same in jax.tree_util.tree_leaves_with_path(same) if not is_same}
        stacked = {"['layers']['attn']['q']"}
        assert changed == (stacked if form(params) is params else {f"['layers'][{i}]['attn']['q']" for i in range(3)})


def test_stacked_and_tuple_forms_agree():
    axes, key = param_axes(CFG), jax.random.key(6)
    stacked, unrolled = init_lora(LORA, base(), axes, key), init_lora(LORA, unstack_layers(base()), axes, key)
    assert isinstance(unrolled["layers"], tuple)
    jax.tree.map(np.testing.assert_array_equal, unrolled, unstack_layers(stacked))
    got = apply_lora(LORA, unstack_layers(base()), unstack_layers(trained()))
    want = apply_lora(LORA, base(), trained())
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-7), stack_layers(got), want)
    only = LoraConfig(targets=("head",))  # adapters without layers
    assert init_lora(only, unstack_layers(base()), axes, key).keys() == {"head"}


def test_compiled_and_exported_weights_are_the_same_to_the_bit():
    trained_on = jax.jit(apply_lora, static_argnums=0)(LORA, base(), trained())
    jax.tree.map(np.testing.assert_array_equal, trained_on, apply_lora(LORA, base(), trained()))


def test_a_bfloat16_weight_is_rounded_once():
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), base())
    merged = apply_lora(LORA, half, trained())
    whole = apply_lora(LORA, jax.tree.map(lambda w: w.astype(jnp.float32), half), trained())
    for path in WEIGHTS:
        got, want = (at(tree["layers"], path) for tree in (merged, whole))
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want).astype(ml_dtypes.bfloat16))


def test_a_merged_model_survives_export(tmp_path):
    model = Model(CFG, apply_lora(LORA, base(), trained()))
    hf.save(tmp_path / "merged", model)
    loaded = hf.load(tmp_path / "merged", dtype="float32", stacked=True)
    assert loaded.config == CFG
    np.testing.assert_array_equal(logits(loaded, TOKENS), logits(model, TOKENS))


# ---------------------------------------------------------------------------------------------------------- training
@pytest.mark.slow
def test_at_first_b_learns_and_a_does_not():
    """dL/dB = s G A^T and dL/dA = s B^T G, where G is the gradient in the merged weight."""
    loss = lambda params: (logits(Model(CFG, params), TOKENS) ** 2).mean()
    whole = jax.jit(jax.grad(loss))(base())
    adapters = init_lora(LORA, base(), param_axes(CFG), jax.random.key(7))
    gradient = jax.jit(jax.grad(lambda ad: loss(apply_lora(LORA, base(), ad))))
    for at_start, parts in ((True, adapters), (False, trained())):
        grads = gradient(parts)
        for path in WEIGHTS:
            g, low = at(grads["layers"], path), at(parts["layers"], path)
            if not at_start:
                assert np.abs(g["a"]).max() > 1e-4, path
                continue
            np.testing.assert_array_equal(g["a"], np.zeros_like(g["a"]))
            w = wide(at(whole["layers"], path))
            into = 2 if path == "attn/o" else 1
            rows = w.reshape(3, -1, int(np.prod(w.shape[-into:])))  # [L, out, in]
            want = 2 / 3 * np.einsum("loi,lri->lor", rows, wide(low["a"]).reshape(3, 3, -1))
            np.testing.assert_allclose(g["b"].reshape(want.shape), want, rtol=1e-3, atol=1e-6, err_msg=path)
            assert np.abs(want).max() > 1e-4, path


def test_a_is_uniform_within_the_papers_bound_and_no_two_layers_are_alike():
    big = dataclasses.replace(CFG, embed_dim=64, ffn_dim=96)
    adapters = init_lora(LoraConfig(rank=16), param_shapes(big), param_axes(big), jax.random.key(8))
    for path in WEIGHTS:
        a = np.asarray(at(adapters["layers"], path)["a"])
        bound = {"attn/o": 24, "mlp/down": 96}.get(path, 64) ** -0.5
        assert 0.98 * bound < np.abs(a).max() <= bound
        np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.05)
        assert a.dtype == np.float32
    drawn = [np.asarray(at(adapters["layers"], path)["a"])[i] for path in ("attn/q", "mlp/up") for i in range(3)]
    assert len({x.tobytes() for x in drawn}) == 6


# ----------------------------------------------------------------------------------------------- targets and sharding
@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (LoraConfig().targets, {f"layers/{path}" for path in WEIGHTS}),
        ((r"layers/attn/[qv]",), {"layers/attn/q", "layers/attn/v"}),
        ((r".*/o", "layers/attn/o", "head"), {"layers/attn/o", "head"}),
        ((".*",), {"embed", "head", *(f"layers/{path}" for path in WEIGHTS)}),  # no norm gain, no bias
    ],
)
def test_targets_are_patterns_over_whole_paths_to_matrices(targets, found):
    cfg = DecoderConfig(**SIZES, qk_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True)
    adapters = init_lora(LoraConfig(targets=targets), param_shapes(cfg), param_axes(cfg), jax.random.key(0))
    paths = {
        jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(adapters)
    }
    assert paths == {f"{path}/{part}" for path in found for part in "ab"}


def test_adapters_lie_where_their_weights_do():
    lora = dataclasses.replace(LORA, targets=(*LORA.targets, "embed"))
    axes = lora_axes(lora, param_axes(CFG))
    assert axes["embed"] == {"a": (None, "embed"), "b": ("vocab", None)}
    assert axes["layers"]["attn"] == {
        "q": {"a": ("layers", None, "embed"), "b": ("layers", "heads", "head_dim", None)},
        "k": {"a": ("layers", None, "embed"), "b": ("layers", "kv_heads", "head_dim", None)},
        "v": {"a": ("layers", None, "embed"), "b": ("layers", "kv_heads", "head_dim", None)},
        "o": {"a": ("layers", None, "heads", "head_dim"), "b": ("layers", "embed", None)},
    }
    assert axes["layers"]["mlp"]["down"] == {"a": ("layers", None, "ffn"), "b": ("layers", "embed", None)}
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(1, 2, 2), ("data", "fsdp", "tensor"))
    placed = jax.device_put(trained(), FSDP_TP.shardings(mesh, lora_axes(LORA, param_axes(CFG))))
    params = jax.device_put(base(), FSDP_TP.shardings(mesh, param_axes(CFG)))
    got, want = jax.jit(apply_lora, static_argnums=0)(LORA, params, placed), apply_lora(LORA, base(), trained())
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-6), got, want)


# ------------------------------------------------------------------------------------------------------------ errors
@pytest.mark.errors
@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(({"rank": bad}, f"rank: found {bad}; expected a positive integer") for bad in (0, -1, 2.0, True)),
        *(({"alpha": float(bad)}, f"alpha: found {bad}; expected a positive number") for bad in ("nan", "inf", "-1.0")),
        ({"alpha": 0.0}, "alpha: found 0.0"),
        ({"targets": ()}, r"targets: found \(\); expected a tuple of regular expressions"),
        ({"targets": "head"}, "targets: found 'head'; expected a tuple"),
        ({"targets": ("head", "layers/[q")}, r"targets: found 'layers/\[q' \(.*\); expected a regular expression"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=f"LoraConfig.{message}"):
        LoraConfig(**change)


@pytest.mark.errors
def test_a_target_that_matches_nothing_is_refused_with_the_nearest():
    shapes, axes, key = param_shapes(CFG), param_axes(CFG), jax.random.key(0)
    near = "'layers/attn/queries' matches no matrix; expected .*nearest of which are layers/attn/"
    with pytest.raises(ValueError, match=near):
        init_lora(LoraConfig(targets=("layers/attn/q", "layers/attn/queries")), shapes, axes, key)
    for pattern in ("attn/q", "layers/attn_norm", "layers/0/attn/q"):  # a part of a path, no matrix, an index
        with pytest.raises(ValueError, match="matches no matrix"):
            lora_axes(LoraConfig(targets=(pattern,)), axes)


@pytest.mark.errors
def test_adapters_of_another_model_are_refused():
    axes, key = param_axes(CFG), jax.random.key(0)
    with pytest.raises(ValueError, match=r"init_lora: head of shape None, axes .*Pass the param_axes of this model"):
        init_lora(LoraConfig(targets=("head",)), {k: v for k, v in base().items() if k != "head"}, axes, key)
    one = unstack_layers(base())["layers"][0]
    with pytest.raises(ValueError, match=r"layers/attn/k of shape \(2, 6, 12\), axes .*expected one axis a dimension"):
        init_lora(LORA, base() | {"layers": one}, axes, key)
    with pytest.raises(
        ValueError, match=r"layers is tuple, its adapter attn, mlp; .*Use stack_layers or unstack_layers"
    ):
        apply_lora(LORA, unstack_layers(base()), trained())
    with pytest.raises(ValueError, match=r"layers is .*, its adapter tuple; expected adapters"):
        apply_lora(LORA, base(), unstack_layers(trained()))
    with pytest.raises(ValueError, match=r"layers is tuple, its adapter tuple"):
        apply_lora(LORA, unstack_layers(base()), {"layers": unstack_layers(trained())["layers"][:2]})
    with pytest.raises(ValueError, match="params is embed, head, layers, norm, its adapter reward"):
        apply_lora(LORA, base(), {"reward": trained()["layers"]["attn"]["q"]})
    with pytest.raises(ValueError, match=r"layers/attn/k of shape \(3, 2, 6, 12\), a \(3, 3, 12\).*for rank 4"):
        apply_lora(dataclasses.replace(LORA, rank=4), base(), trained())
    q, o = (trained()["layers"]["attn"][name] for name in "qo")
    turned = q["b"].swapaxes(1, 2)  # as many numbers as there should be
    for wrong in (o, {"a": q["a"], "b": o["b"]}, {"a": q["a"][:2], "b": q["b"][:2]}, {"a": q["a"], "b": turned}):
        with pytest.raises(ValueError, match="apply_lora: layers/attn/q of shape"):
            apply_lora(LORA, base(), {"layers": {"attn": {"q": wrong}}})
