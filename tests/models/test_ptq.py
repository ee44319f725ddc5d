"""Oracles: optimal brain surgery in float64, the inverse Hessian found anew for every column, and NumPy's SVD."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxaroo.jaxlib_ext.qmm import qmm
from jaxaroo.models.decoder import DecoderConfig, forward, init_params, rms_norm, stack_layers, unstack_layers
from jaxaroo.models.multi_precision import MATRICES, from_master
from jaxaroo.models.ptq import gptq, layer_inputs, lorc, quantise_model, round_to_nearest, second_moments
from jaxaroo.models.quantise import QuantConfig, decode, init_scale, snap

CFG = DecoderConfig(
    vocab_size=20, embed_dim=32, ffn_dim=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True,
    qkv_bias=True, o_bias=True, mlp_bias=True, window=5, window_layers=(False, True, False),
)  # fmt: skip
PLAIN = DecoderConfig(vocab_size=20, embed_dim=32, ffn_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16)
FIELDS = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "gate_up", "up": "gate_up", "down": "down"}
FOUR, THREE = (QuantConfig(bits=(b,), init="absmax") for b in (4, 3))
GROUPED = QuantConfig(bits=(4,), init="absmax", group=32)
nearest_model = jax.jit(quantise_model, static_argnums=(0, 2, 3))
TOKENS = [np.random.default_rng(i).integers(0, 20, (2, 12)) for i in range(2)]


@functools.cache
def base(cfg):
    params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), 100))
    return unstack_layers(jax.tree.map(lambda w: w + 0.05 * jax.random.normal(next(keys), w.shape), params))


def bf16(x):
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def nearest(w, bits, size):
    """Codes and scales of absmax, element by element."""
    w, top = np.float64(w), 2 ** (bits - 1) - 1
    scale = bf16(np.abs(w.reshape(len(w), -1, size)).max(-1) / top)
    codes = np.zeros(w.shape)
    for n, k in np.ndindex(*w.shape):
        codes[n, k] = min(max(round(w[n, k] / scale[n, k // size]), -top - 1), top)  # Python rounds half to even
    return codes, scale


def brain_surgeon(w, H, scale, bits, damping=0.01):
    """Column by column: round it, then move what is not yet rounded by -error / [H^-1]_kk [H^-1]_k; all in float64."""
    w, H, top = np.array(w, np.float64), np.array(H, np.float64), 2 ** (bits - 1) - 1
    K, codes = w.shape[1], np.zeros(w.shape)
    H[np.diag_indices(K)] += damping * np.mean(np.diag(H))
    for k in range(K):
        inverse = np.linalg.inv(H[k:, k:])
        s = scale[:, k * scale.shape[1] // K]
        codes[:, k] = np.clip(np.rint(w[:, k] / s), -top - 1, top)
        error = (w[:, k] - codes[:, k] * s) / inverse[0, 0]
        w[:, k:] -= error[:, None] * inverse[0][None]
    return codes


def correlated(seed, tokens, K, N):
    """Inputs of which few directions carry most, as in a network, and weights."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, K // 4)) @ rng.normal(size=(K // 4, K)) + 0.3 * rng.normal(size=(tokens, K))
    w = rng.normal(size=(N, K)) * np.exp2(rng.integers(-2, 3, (N, 1)))
    return x.astype(np.float32), w.astype(np.float32)


def output_error(x, w, low):
    return np.sum((np.float64(x) @ (np.float64(w) - np.float64(low)).T) ** 2)


# --------------------------------------------------------------------------------------------------- round to nearest
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (4, 32), (3, 32), (2, 64)])
def test_nearest_codes_are_those_of_a_loop(bits, group):
    w = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    w[:, :8] = (
        np.float32([7, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -7.0]) / 7 * 4
    )  # ties, where the scale is 4 / 7 and exact
    want, scale = nearest(w, bits, group or 64)
    got = round_to_nearest(jnp.asarray(w), QuantConfig(bits=(bits,), group=group))
    assert (got["codes"].dtype, got["scale"].dtype) == (jnp.int8, jnp.bfloat16)
    np.testing.assert_array_equal(got["scale"].astype(jnp.float32), scale)
    np.testing.assert_array_equal(got["codes"], want)


# --------------------------------------------------------------------------------------------------------------- GPTQ
@pytest.mark.parametrize(("cfg", "seed", "K"), [(FOUR, 0, 160), (THREE, 1, 160), (FOUR, 2, 288), (GROUPED, 3, 160)])
@pytest.mark.slow
def test_codes_are_those_of_the_optimal_brain_surgeon(cfg, seed, K):
    """K of 160 is a block of 128 and a part of one, and 288 two and a part."""
    x, w = correlated(seed, 400, K, 8)
    H = np.float64(x).T @ np.float64(x)
    got = gptq(jnp.asarray(w), jnp.asarray(H, jnp.float32), cfg)
    scale = np.asarray(got["scale"].astype(jnp.float32), np.float64)
    np.testing.assert_array_equal(scale, nearest(w, cfg.master, cfg.group or K)[1])
    want = brain_surgeon(w, H, scale, cfg.master)
    assert (want != nearest(w, cfg.master, cfg.group or K)[0]).mean() > 0.1
    differ = (
        np.asarray(got["codes"]) != want
    )  # float32 may round what is nearly a tie the other way, and go on from there
    assert differ.any(1).sum() <= 1
    np.testing.assert_allclose(
        output_error(x, w, decode(got["codes"], got["scale"])),
        output_error(x, w, want * np.repeat(scale, K // scale.shape[1], 1)),
        rtol=2e-2,
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("cfg", [FOUR, THREE, GROUPED], ids=["4", "3", "4 in groups"])
@pytest.mark.parametrize("act_order", [False, True])
def test_outputs_have_less_error_than_with_nearest_codes(cfg, seed, act_order):
    x, w = correlated(seed, 400, 160, 8)
    x[:, 3] *= 20
    H = jnp.asarray(np.float64(x).T @ np.float64(x), jnp.float32)
    new, old = gptq(jnp.asarray(w), H, cfg, act_order=act_order), round_to_nearest(jnp.asarray(w), cfg)
    np.testing.assert_array_equal(new["scale"], old["scale"])
    error = [output_error(x, w, decode(m["codes"], m["scale"])) for m in (new, old)]
    assert error[0] < 0.5 * error[1]


def test_act_order_is_the_method_on_inputs_sorted_by_moment():
    x, w = correlated(5, 400, 160, 8)
    H = np.float64(x).T @ np.float64(x)
    order = np.argsort(-np.diag(H), kind="stable")
    got = gptq(jnp.asarray(w), jnp.asarray(H, jnp.float32), FOUR, act_order=True)
    scale = np.asarray(got["scale"].astype(jnp.float32), np.float64)
    want = np.zeros(w.shape)
    want[:, order] = brain_surgeon(w[:, order], H[order][:, order], scale, 4)
    assert (np.asarray(got["codes"]) != want).any(1).sum() <= 1
    plain = gptq(jnp.asarray(w), jnp.asarray(H, jnp.float32), FOUR)
    assert (np.asarray(got["codes"]) != np.asarray(plain["codes"])).mean() > 0.1


def test_inputs_that_say_nothing_of_each_other_have_nearest_codes():
    w = jnp.asarray(np.random.default_rng(1).normal(size=(8, 160)), jnp.float32)
    power = jnp.diag(jnp.asarray(np.random.default_rng(2).uniform(0.1, 9, 160), jnp.float32))
    for moments in (power, jnp.zeros((160, 160))):
        np.testing.assert_array_equal(gptq(w, moments, FOUR)["codes"], round_to_nearest(w, FOUR)["codes"])


def test_inputs_that_calibration_never_saw_change_nothing():
    """Their own codes are the nearest, and those of the others as if they were not there."""
    x, w = correlated(3, 400, 160, 8)
    dead = np.arange(0, 160, 7)
    x[:, dead] = 0
    H = np.float64(x).T @ np.float64(x)
    got = gptq(jnp.asarray(w), jnp.asarray(H, jnp.float32), FOUR)
    near = round_to_nearest(jnp.asarray(w), FOUR)
    np.testing.assert_array_equal(np.asarray(got["codes"])[:, dead], np.asarray(near["codes"])[:, dead])
    alive = np.setdiff1d(np.arange(160), dead)
    scale = np.asarray(got["scale"].astype(jnp.float32), np.float64)
    damping = 0.01 * len(alive) / 160  # the mean is over all inputs
    want = brain_surgeon(w[:, alive], H[np.ix_(alive, alive)], scale, 4, damping)
    assert (np.asarray(got["codes"])[:, alive] != want).any(1).sum() <= 1


def test_a_factor_of_the_moments_means_nothing_and_damping_does():
    x, w = correlated(4, 400, 160, 8)
    H = jnp.asarray(np.float64(x).T @ np.float64(x), jnp.float32)
    same, other = gptq(jnp.asarray(w), 2.0**-9 * H, FOUR)["codes"], gptq(jnp.asarray(w), H, FOUR, damping=1.0)["codes"]
    np.testing.assert_array_equal(same, gptq(jnp.asarray(w), H, FOUR)["codes"])
    assert (np.asarray(same) != np.asarray(other)).mean() > 0.05


def test_several_axes_of_outputs_and_of_inputs_are_flattened():
    x, w = correlated(6, 400, 160, 8)
    H = jnp.asarray(np.float64(x).T @ np.float64(x), jnp.float32)
    flat = gptq(jnp.asarray(w), H, GROUPED)
    split = gptq(jnp.asarray(w).reshape(2, 4, 10, 16), H, GROUPED, over=2)
    assert (split["codes"].shape, split["scale"].shape) == ((2, 4, 10, 16), (2, 4, 5))
    np.testing.assert_array_equal(split["codes"].reshape(8, 160), flat["codes"])
    np.testing.assert_array_equal(split["scale"].reshape(8, 5), flat["scale"])


def test_scales_start_as_the_config_says():
    x, w = correlated(7, 400, 160, 8)
    H = jnp.asarray(np.float64(x).T @ np.float64(x), jnp.float32)
    errors = {}
    for init in ("absmax", "search"):
        cfg = QuantConfig(bits=(3,), init=init)
        got = gptq(jnp.asarray(w), H, cfg)
        np.testing.assert_array_equal(got["scale"].astype(jnp.float32), snap(init_scale(jnp.asarray(w), cfg)))
        errors[init] = output_error(x, w, decode(got["codes"], got["scale"]))
    assert errors["search"] < errors["absmax"]


# --------------------------------------------------------------------------------------------------------------- LoRC
@pytest.mark.slow
def test_the_error_that_is_left_is_the_tail_of_singular_values():
    w = np.random.default_rng(3).normal(size=(3, 4, 40)).astype(np.float32)
    stored = round_to_nearest(jnp.asarray(w), THREE)
    low = np.asarray(decode(stored["codes"], stored["scale"]))
    singular = np.linalg.svd((np.float64(w) - low).reshape(12, 40), compute_uv=False)
    left = []
    for rank in (1, 2, 5, 11, 12):
        a, b = lorc(jnp.asarray(w), jnp.asarray(low), rank)
        assert (a.shape, b.shape) == ((3, 4, rank), (rank, 40))
        new = np.float64(low) + np.einsum("abr,rk->abk", np.float64(a), np.float64(b))
        left.append(np.linalg.norm(w - new))
        np.testing.assert_allclose(left[-1], np.sqrt(np.sum(singular[rank:] ** 2)), atol=1e-5)
        np.testing.assert_allclose(np.sum(np.float64(a) ** 2), np.sum(np.float64(b) ** 2), rtol=1e-5)  # shared evenly
    assert all(now < before for before, now in itertools.pairwise(left))


def test_low_rank_factors_of_a_weight_with_two_axes_of_inputs():
    w = jnp.asarray(np.random.default_rng(4).normal(size=(12, 5, 8)), jnp.float32)
    a, b = lorc(w, jnp.zeros_like(w), 12, over=2)
    np.testing.assert_allclose((a @ b).reshape(12, 5, 8), w, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- calibration
@pytest.mark.parametrize("cfg", [CFG, PLAIN], ids=["everything", "plain"])
@pytest.mark.slow
def test_the_second_forward_pass_is_the_first_to_the_bit(cfg):
    """Op by op, as both are written; the states between layers too, and what each matrix is multiplied with."""
    positions = jnp.broadcast_to(jnp.arange(12)[None], (2, 12))
    params, f64 = base(cfg), lambda tree: jax.tree.map(lambda w: np.asarray(w, np.float64), tree)
    want = forward(cfg, params, jnp.asarray(TOKENS[0]), positions, collect=tuple(range(cfg.num_layers)))
    hidden, inputs = layer_inputs(cfg, params, jnp.asarray(TOKENS[0]))
    np.testing.assert_array_equal(rms_norm(hidden, params["norm"], cfg.norm_eps), want.hidden)
    for i, (p, seen) in enumerate(zip(f64(params["layers"]), f64(inputs), strict=True)):
        x, attn, mlp = f64(want.collected[i]), p["attn"], p["mlp"]
        gain = params["layers"][i]["attn_norm"]
        np.testing.assert_array_equal(seen.qkv, rms_norm(want.collected[i], gain, cfg.norm_eps))
        middle = x + np.einsum("btnh,dnh->btd", seen.o, attn["o"]) + attn.get("o_bias", 0.0)
        normed = middle / np.sqrt(np.mean(middle**2, -1, keepdims=True) + cfg.norm_eps) * p["mlp_norm"]
        np.testing.assert_allclose(seen.gate_up, normed, rtol=1e-4, atol=1e-5)
        gate, up = (seen.gate_up @ mlp[name].T + mlp.get(f"{name}_bias", 0.0) for name in ("gate", "up"))
        np.testing.assert_allclose(seen.down, gate / (1 + np.exp(-gate)) * up, rtol=1e-4, atol=1e-5)
        out = middle + seen.down @ mlp["down"].T + mlp.get("down_bias", 0.0)
        np.testing.assert_allclose(out, (*want.collected, hidden)[i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_moments_are_sums_over_all_tokens_of_all_batches():
    got = second_moments(CFG, base(CFG), TOKENS)
    want = [layer_inputs(CFG, base(CFG), jnp.asarray(tokens))[1] for tokens in TOKENS]
    for i in range(3):
        for field in ("qkv", "o", "gate_up", "down"):
            rows = np.concatenate([np.float64(getattr(batch[i], field)).reshape(24, -1) for batch in want])
            np.testing.assert_allclose(getattr(got[i], field), rows.T @ rows, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- whole model
MIXED = (
    ("layers/attn/o", QuantConfig(bits=(8, 4, 2), group=32)),
    ("layers/attn/k", None),
    ("layers/mlp/down", QuantConfig(bits=(3,), group=64, init="search")),
    (MATRICES, QuantConfig(bits=(4,), init="absmax")),
)


def leaves(tree):
    for i, layer in enumerate(tree["layers"]):
        yield from ((i, block, name, layer[block][name]) for block in ("attn", "mlp") for name in layer[block])


@pytest.mark.slow
def test_every_matrix_is_quantised_as_its_rule_says():
    for method in ("rtn", "search"):
        master = unstack_layers(nearest_model(CFG, stack_layers(base(CFG)), MIXED, method))
        for i, block, name, leaf in leaves(master):
            w = base(CFG)["layers"][i][block][name]
            cfg = {"o": MIXED[0][1], "k": None, "down": MIXED[2][1]}.get(name, MIXED[3][1])
            if name not in FIELDS or cfg is None:
                np.testing.assert_array_equal(leaf, w)
                continue
            want = QuantConfig(bits=cfg.bits, group=cfg.group, init="absmax" if method == "rtn" else "search")
            scale = snap(init_scale(w, want, 2 if name == "o" else 1))
            np.testing.assert_array_equal(leaf["scale"].astype(jnp.float32), scale)
            if method == "rtn":
                np.testing.assert_array_equal(leaf["codes"], round_to_nearest(w, cfg, 2 if name == "o" else 1)["codes"])


@pytest.mark.slow
def test_the_whole_model_is_calibrated_layer_by_layer_on_what_the_quantised_layers_give():
    master = quantise_model(CFG, base(CFG), MIXED, "gptq", TOKENS)
    served = from_master(master, 8, MIXED)  # each at its own first width
    for i in range(3):
        so_far = base(CFG) | {"layers": served["layers"][:i] + base(CFG)["layers"][i:]}
        seen = [layer_inputs(CFG, so_far, jnp.asarray(tokens))[1][i] for tokens in TOKENS]
        for layer, block, name, leaf in leaves(master):
            cfg = {"o": MIXED[0][1], "k": None, "down": MIXED[2][1]}.get(name, MIXED[3][1])
            if layer != i or name not in FIELDS or cfg is None:
                continue
            rows = np.concatenate([np.float64(getattr(s, FIELDS[name])).reshape(24, -1) for s in seen])
            w = np.asarray(base(CFG)["layers"][i][block][name])
            scale = np.asarray(leaf["scale"].astype(jnp.float32), np.float64).reshape(-1, leaf["scale"].shape[-1])
            want = brain_surgeon(w.reshape(len(scale), -1), rows.T @ rows, scale, cfg.master)
            differ = np.asarray(leaf["codes"]).reshape(want.shape) != want
            assert differ.any(1).mean() < 0.1, (i, name)
            near = round_to_nearest(jnp.asarray(w), cfg, 2 if name == "o" else 1)["codes"]
            assert (np.asarray(leaf["codes"]) != np.asarray(near)).mean() > 0.1


@pytest.mark.slow
def test_the_master_is_served_and_does_better_than_nearest_codes():
    B, T = 2, 12
    positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    rules = ((MATRICES, THREE),)
    run = jax.jit(lambda params: forward(PLAIN, params, jnp.asarray(TOKENS[0]), positions).hidden)
    want, errors = run(base(PLAIN)), {}
    for method in ("rtn", "search", "gptq"):
        if method == "gptq":
            master = quantise_model(PLAIN, base(PLAIN), rules, method, TOKENS)
        else:
            master = nearest_model(PLAIN, base(PLAIN), rules, method)
        errors[method] = float(jnp.linalg.norm(run(from_master(master, 3, rules)) - want))
    assert errors["gptq"] < 0.8 * errors["rtn"]
    down, x = (
        master["layers"][1]["mlp"]["down"],
        jnp.asarray(np.random.default_rng(5).normal(size=(3, 64)), jnp.float32),
    )
    np.testing.assert_allclose(
        qmm(x, down["codes"], down["scale"], bits=3, master=3),
        np.float64(x) @ np.float64(decode(down["codes"], down["scale"])).T,
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_master_has_the_form_of_the_parameters():
    rules = ((MATRICES, FOUR),)
    stacked = quantise_model(PLAIN, stack_layers(base(PLAIN)), rules, "gptq", TOKENS)
    assert stacked["embed"] is base(PLAIN)["embed"]
    want = quantise_model(PLAIN, base(PLAIN), rules, "gptq", TOKENS)
    jax.tree.map(np.testing.assert_array_equal, stacked, stack_layers(want))


# ------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.errors
def test_what_cannot_be_meant_is_refused():
    w = jnp.ones((4, 32))
    with pytest.raises(ValueError, match=r"gptq: moments \(31, 31\) for a weight \(4, 32\); expected \(32, 32\)"):
        gptq(w, jnp.eye(31), FOUR)
    with pytest.raises(ValueError, match=r"gptq: moments with damping 0\.01 are not positive definite; expected X"):
        gptq(w, jnp.eye(32) - 2.0 * jnp.ones((32, 32)), FOUR)
    for low, rank in ((w[:3], 1), (w, 0), (w, 5)):
        with pytest.raises(
            ValueError, match=r"lorc: weights \(4, 32\) and .*; expected one shape, and a rank of at most"
        ):
            lorc(w, low, rank)
    params = base(PLAIN)
    with pytest.raises(ValueError, match="quantise_model: method='awq'; expected 'rtn', 'search' or 'gptq'"):
        quantise_model(PLAIN, params, method="awq")
    for method, data, found in (("gptq", None, "no"), ("rtn", TOKENS, "a")):
        with pytest.raises(ValueError, match=f"quantise_model: method='{method}' and {found} calibration; expected"):
            quantise_model(PLAIN, params, method=method, calibration=data)
    with pytest.raises(ValueError, match="calibration: found no batch; expected one or more of tokens"):
        quantise_model(PLAIN, params, method="gptq", calibration=[])
    for bad in (TOKENS[0][0], np.ones((2, 3), np.float32)):
        with pytest.raises(ValueError, match=r"calibration: found .* of shape .*; expected tokens \[B, T\]"):
            second_moments(PLAIN, params, [bad])
    gains = ((MATRICES, QuantConfig(bits=(4,), gain=(4,))),)
    with pytest.raises(ValueError, match="quantise_model: layers/attn/k has gains, and method='gptq'"):
        quantise_model(PLAIN, params, gains, "gptq", TOKENS)
    other = params | {"drafter": {"attn": {"q": jnp.ones((4, 32))}}}
    with pytest.raises(ValueError, match="quantise_model: drafter/attn/q and method='gptq'; expected matrices"):
        quantise_model(PLAIN, other, ((MATRICES, FOUR),), "gptq", TOKENS)
