"""Oracles: each leaf quantised alone, each layer alone, and the exported integers: what was trained is served."""

import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxaroo.jaxlib_ext.qmm import QuantisedMatrix, nbytes
from jaxaroo.models import multi_precision
from jaxaroo.models.decoder import (
    DecoderConfig,
    forward,
    init_params,
    new_cache,
    param_axes,
    stack_layers,
    unstack_layers,
)
from jaxaroo.models.multi_precision import (
    DEFAULT_RULES,
    INPUT_AXES,
    MATRICES,
    fake_quantise_tree,
    floats_of,
    from_master,
    init_scales,
    quantised_paths,
    read_rules,
    scale_axes,
    scales_of,
    switch_bits,
    to_master,
    write_rules,
)
from jaxaroo.models.presets import preset
from jaxaroo.models.quantise import QuantConfig, fake_quantise, init_scale, scale_of, snap
from jaxaroo.sharding.topology import compile_for

CFG = DecoderConfig(
    vocab_size=20, embed_dim=32, ffn_dim=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True,
    qkv_bias=True, o_bias=True, mlp_bias=True,
)  # fmt: skip
WEIGHTS = ["attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down"]
WIDTHS = (8, 6, 4, 3, 2)
MIXED = (  # every kind of config at once
    ("layers/attn/o", QuantConfig(bits=(8, 6, 4, 2), group=32, gain=(4, 2))),
    ("layers/attn/k", None),
    ("layers/attn/.", QuantConfig(bits=(6, 4, 3), scale_param="linear", init="absmax")),
    ("layers/mlp/down", QuantConfig(bits=(8, 4), group=64, init="search", grad_scale=False)),
    (MATRICES, QuantConfig(bits=(8, 6, 4, 3, 2))),
)
RULES = {"default": DEFAULT_RULES, "mixed": MIXED}
tree_at = jax.jit(fake_quantise_tree, static_argnums=3)
stored = jax.jit(to_master, static_argnums=2)
served = jax.jit(from_master, static_argnums=(2, 3))
init = jax.jit(init_scales, static_argnums=1)
init_one = jax.jit(init_scale, static_argnums=(1, 2))
served_static = jax.jit(from_master, static_argnums=(1, 2, 3))


@functools.cache
def base():
    params = jax.jit(init_params, static_argnums=0)(CFG, jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), 100))
    return jax.tree.map(lambda w: w + 0.05 * jax.random.normal(next(keys), w.shape), params)


@functools.cache
def learned(rules=DEFAULT_RULES):
    """Scales as after training: no longer where they started, and no bfloat16 values."""
    scales = init(base(), rules)
    keys = iter(jax.random.split(jax.random.key(3), 100))
    move = lambda x: x * (1 + 0.02 * jax.random.normal(next(keys), x.shape))
    return jax.tree.map(move, scales)


def at(tree, path):
    return functools.reduce(lambda node, name: node[name], path.split("/"), tree)


def equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


# ------------------------------------------------------------------------------------------------------------- rules
@pytest.mark.slow
def test_matrices_of_attention_and_mlp_are_quantised_and_nothing_else():
    assert list(quantised_paths(base())) == sorted(f"layers/{path}" for path in WEIGHTS)
    assert quantised_paths(unstack_layers(base())) == quantised_paths(base())
    everything = quantised_paths(base(), ((".*", QuantConfig(bits=(4, 2))),))  # embeddings, head, norms and biases stay
    assert everything == dict.fromkeys(quantised_paths(base()), QuantConfig(bits=(4, 2)))


def test_the_first_rule_that_matches_counts():
    got = quantised_paths(base(), MIXED)
    want = {"o": MIXED[0][1], "q": MIXED[2][1], "v": MIXED[2][1], "down": MIXED[3][1], "gate": MIXED[4][1]}
    assert {path.split("/")[-1]: cfg for path, cfg in got.items()} == want | {"up": MIXED[4][1]}


def test_the_table_of_inputs_is_that_of_the_axis_names():
    """What the projections contract, read off the parameters' labels: two axes where the last is a head's."""
    axes = param_axes(CFG)["layers"]
    for path in WEIGHTS:
        assert INPUT_AXES[path.split("/")[-1]] == (2 if at(axes, path)[-1] == "head_dim" else 1)
    assert {path.split("/")[-1] for path in WEIGHTS} == set(INPUT_AXES)


# ------------------------------------------------------------------------------------------------------------- scales
@pytest.mark.slow
def test_every_leaf_starts_alone():
    scales = init(base(), MIXED)
    for path, cfg in quantised_paths(base(), MIXED).items():
        w, leaf = at(base(), path), at(scales, path)
        over = 2 if path.endswith("/o") else 1
        inputs = int(np.prod(w.shape[-over:]))
        assert leaf["rho"].shape == (*w.shape[:-over], inputs // (cfg.group or inputs))
        for layer in range(3):
            want = init_one(w[layer], cfg, over)
            rho = leaf["rho"][layer]
            np.testing.assert_allclose(rho, np.log2(want) if cfg.scale_param == "log2" else want, rtol=1e-5)
        assert leaf.keys() == ({"rho", "gain"} if cfg.gain else {"rho"})
    assert scales["layers"]["attn"].keys() == {"q", "v", "o"}
    assert scales.keys() == {"layers"}
    again = stack_layers(init(unstack_layers(base()), MIXED))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), again, scales)
    assert init_scales(base(), ((MATRICES, None),)) == {}


# --------------------------------------------------------------------------------------------------- training = serving
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("form", [lambda tree: tree, unstack_layers], ids=["stacked", "tuple"])
@pytest.mark.slow
def test_trained_weights_are_served_weights_to_the_bit(rules, form):
    params, scales = form(base()), form(learned(rules))
    master = stored(params, scales, rules)
    for path, cfg in quantised_paths(params, rules).items():
        leaf = at(stack_layers(master), path)
        assert (leaf["codes"].dtype, leaf["scale"].dtype) == (jnp.int8, jnp.bfloat16)
        assert leaf["codes"].shape == at(base(), path).shape
        assert leaf.keys() == {"codes", "scale", *(["gain"] if cfg.gain else [])}
    for bits in WIDTHS:
        trained = tree_at(params, scales, jnp.int32(bits), rules)
        equal(served(master, jnp.int32(bits), rules, jnp.float32), trained)
    equal(served_static(master, 4, rules, jnp.float32), tree_at(params, scales, jnp.int32(4), rules))


@pytest.mark.slow
def test_exporting_op_by_op_gives_what_a_compiled_step_trained():
    one = lambda tree: {"attn": {"o": tree["layers"]["attn"]["o"]}}
    params, scales, rules = one(base()), one(learned(MIXED)), ((".*/o", MIXED[0][1]),)
    for bits in (8, 2):
        got = from_master(to_master(params, scales, rules), bits, rules)
        equal(got, tree_at(params, scales, jnp.int32(bits), rules))


@pytest.mark.slow
def test_bfloat16_weights_too():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), base())
    scales = init(params, MIXED)
    master = stored(params, scales, MIXED)
    for bits in WIDTHS:
        equal(served(master, jnp.int32(bits), MIXED, jnp.bfloat16), tree_at(params, scales, jnp.int32(bits), MIXED))


def test_floats_and_scales_of_a_master_make_it_again_gains_at_its_own_width_or_not():
    rules = (("layers/attn/.", QuantConfig(bits=(8, 4, 2), gain=(8, 2))), *MIXED[3:])
    master = stored(base(), learned(rules), rules)
    assert (master["layers"]["attn"]["q"]["gain"] != 1).any()
    equal(stored(floats_of(master, rules), scales_of(master, rules), rules), master)


@pytest.mark.slow
def test_each_leaf_is_quantised_as_it_would_be_alone():
    """Clipped to the widths of its config, and times the gain of its output channel at widths that have one."""
    for bits in WIDTHS:
        got = tree_at(base(), learned(MIXED), jnp.int32(bits), MIXED)
        for path, cfg in quantised_paths(base(), MIXED).items():
            w, leaf, width = at(base(), path), at(learned(MIXED), path), min(max(bits, cfg.bits[-1]), cfg.master)
            want = fake_quantise(w, scale_of(leaf["rho"], cfg), width, master=cfg.master)
            if width in cfg.gain:
                gain = np.asarray(leaf["gain"][..., cfg.gain.index(width)]).astype(ml_dtypes.bfloat16)
                assert np.abs(gain.astype(float) - 1).max() > 0.01
                want = np.float32(want * gain.astype(np.float32)[..., None, None])
            np.testing.assert_array_equal(at(got, path), want, err_msg=f"{path} {bits}")


def test_what_is_not_quantised_is_the_same_array():
    got = fake_quantise_tree(base(), learned(), 4)
    same = jax.tree.map(lambda new, old: new is old, got, base())
    changed = {jax.tree_util.keystr(p) for p, is_same in jax.tree_util.tree_leaves_with_path(same) if not is_same}
    assert changed == {"['layers']" + "".join(f"['{n}']" for n in path.split("/")) for path in WEIGHTS}


@pytest.mark.slow
def test_every_layer_has_its_own_width():
    plan = [8, 2, 4]
    for form in (lambda tree: tree, unstack_layers):
        params, scales = form(base()), form(learned(MIXED))
        got = stack_layers(tree_at(params, scales, jnp.array(plan, jnp.int32), MIXED))
        again = stack_layers(served(stored(params, scales, MIXED), jnp.array(plan, jnp.int32), MIXED, jnp.float32))
        for layer, bits in enumerate(plan):
            want = tree_at(base(), learned(MIXED), jnp.int32(bits), MIXED)["layers"]
            for mixed in (got, again):
                equal(
                    jax.tree.map(lambda w, i=layer: w[i], mixed["layers"]), jax.tree.map(lambda w, i=layer: w[i], want)
                )


def test_the_master_is_never_written():
    """8, then 4, then 8 bits again; not compiled, so that the very tree is read."""
    master = {"attn": {"o": jax.tree.map(jnp.copy, stored(base(), learned(), DEFAULT_RULES)["layers"]["attn"]["o"])}}
    before = jax.tree.map(np.array, master)
    first = from_master(master, 8)
    assert np.abs(first["attn"]["o"] - from_master(master, 4)["attn"]["o"]).max() > 0
    equal(from_master(master, 8), first)
    equal(jax.tree.map(np.array, master), before)


# ----------------------------------------------------------------------------------------------------------- training
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 9)))
POSITIONS = jnp.broadcast_to(jnp.arange(9)[None], (2, 9))
run = jax.jit(lambda params: forward(CFG, params, TOKENS, POSITIONS).hidden)


def test_the_decoder_runs_unchanged_on_either_weights():
    master = stored(base(), learned(), DEFAULT_RULES)
    outputs = {}
    for bits in (8, 4, 2):
        outputs[bits] = run(tree_at(base(), learned(), jnp.int32(bits), DEFAULT_RULES))
        got = run(served(master, jnp.int32(bits), DEFAULT_RULES, jnp.float32))
        np.testing.assert_allclose(got, outputs[bits], rtol=1e-6, atol=1e-6)
        unrolled = run(unstack_layers(served(master, jnp.int32(bits), DEFAULT_RULES, jnp.float32)))
        np.testing.assert_allclose(unrolled, outputs[bits], rtol=1e-5, atol=1e-5)
    error = [float(jnp.linalg.norm(outputs[b] - run(base())) / jnp.linalg.norm(run(base()))) for b in (8, 4, 2)]
    assert error[0] < 0.05 < error[1] < error[2]


@pytest.mark.slow
def test_one_program_trains_every_width_and_every_plan():
    count = []

    @jax.jit
    def step(params, scales, bits):
        count.append(bits.shape)

        def loss(params, scales):
            weights = fake_quantise_tree(params, scales, bits, MIXED)
            return jnp.mean(forward(CFG, weights, TOKENS, POSITIONS).hidden ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1))(params, scales)

    whole = {bits: step(base(), learned(MIXED), jnp.int32(bits)) for bits in WIDTHS}
    assert count == [()]
    assert len({float(loss) for loss, _ in whole.values()}) == len(WIDTHS)
    for plan in ((8, 8, 8), (8, 4, 2), (3, 3, 6), (2, 2, 2)):
        loss, (dparams, dscales) = step(base(), learned(MIXED), jnp.array(plan, jnp.int32))
        if len({*plan}) == 1:
            np.testing.assert_allclose(loss, whole[plan[0]][0], rtol=1e-6)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                (dparams, dscales),
                whole[plan[0]][1],
            )
        for path in quantised_paths(base(), MIXED):
            assert np.abs(at(dparams, path)).max() > 0, path
            assert np.abs(at(dscales, path)["rho"]).max() > 0, path
    assert count == [(), (3,)]


@pytest.mark.slow
def test_a_gain_learns_at_its_own_width_alone():
    def loss(scales, bits):
        return sum(jnp.sum(w**2) for w in jax.tree.leaves(fake_quantise_tree(base(), scales, bits, MIXED)["layers"]))

    for bits, index in ((8, None), (6, None), (4, 0), (2, 1)):
        grad = np.asarray(jax.jit(jax.grad(loss))(learned(MIXED), jnp.int32(bits))["layers"]["attn"]["o"]["gain"])
        assert grad.shape == (3, 32, 2)
        for i in range(2):
            assert (grad[..., i] != 0).all() if i == index else (grad[..., i] == 0).all()


@pytest.mark.slow
def test_a_config_decides_the_gradient_of_its_scales():
    """Divided by sqrt(n p_l) where the config says so, and by ln 2 s more where the logarithm is learned."""
    base_w = {"mlp": {"up": at(base(), "layers/mlp/up")[0]}}
    grads = {}
    for kind in ("log2", "linear"):
        for on in (True, False):
            rules = ((MATRICES, QuantConfig(scale_param=kind, grad_scale=on)),)
            scales = init_scales(base_w, rules)
            loss = lambda s, rules=rules: jnp.sum(fake_quantise_tree(base_w, s, 4, rules)["mlp"]["up"] ** 3)
            grads[kind, on] = jax.grad(loss)(scales)["mlp"]["up"]["rho"]
    start = np.asarray(snap(init_scale(base_w["mlp"]["up"], QuantConfig(), 1)))
    for kind in ("log2", "linear"):
        np.testing.assert_allclose(grads[kind, True] * np.sqrt(32 * 7), grads[kind, False], rtol=1e-5)
    np.testing.assert_allclose(grads["log2", True], np.log(2) * start * grads["linear", True], rtol=0.005)


# ------------------------------------------------------------------------------------------------------------ serving
@functools.cache
def master(rules=MIXED):
    return jax.tree.map(jnp.copy, unstack_layers(stored(base(), learned(rules), rules)))


@jax.jit
def both_ways(params):
    """Hidden states at once, and with a cache: six tokens, then three."""
    cache = new_cache(CFG, 2, 12)
    first = forward(CFG, params, TOKENS[:, :6], POSITIONS[:, :6], cache=cache)
    cache = first.cache._replace(length=first.cache.length + 6)
    then = forward(CFG, params, TOKENS[:, 6:], POSITIONS[:, 6:], cache=cache)
    return forward(CFG, params, TOKENS, POSITIONS).hidden, jnp.concatenate([first.hidden, then.hidden], axis=1)


def off(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


@pytest.mark.parametrize(
    "bits", [*WIDTHS[:1], *(pytest.param(b, marks=pytest.mark.proof) for b in WIDTHS[1:]), (8, 2, 4)], ids=str
)
@pytest.mark.slow
def test_the_decoder_multiplies_by_integers_what_it_multiplied_by_floats(bits):
    whole = jnp.int32(bits) if isinstance(bits, int) else jnp.array(bits, jnp.int32)
    floats = unstack_layers(served(master(), whole, MIXED, jnp.float32))
    view = switch_bits(master(), bits, MIXED)
    for got, want in zip(both_ways(view), both_ways(floats), strict=True):
        assert off(got, want) < 1e-5
    for i, layer in enumerate(view["layers"]):
        width = bits if isinstance(bits, int) else bits[i]
        for path in WEIGHTS:
            cfg, leaf = quantised_paths(base(), MIXED).get(f"layers/{path}"), at(layer, path)
            if cfg is None:
                assert leaf is at(master()["layers"][i], path)
            else:
                assert isinstance(leaf, QuantisedMatrix)
                assert leaf.bits == min(max(width, cfg.bits[-1]), cfg.master)


def test_switching_there_and_back_is_the_same_model_and_leaves_the_master_alone():
    before = jax.tree.map(np.array, master())
    buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(master())]
    views = [switch_bits(master(), bits, MIXED) for bits in (8, 4, 8)]
    outputs = [both_ways(view)[0] for view in views]
    np.testing.assert_array_equal(outputs[0], outputs[2])
    assert off(outputs[1], outputs[0]) > 0.01
    equal(jax.tree.map(np.array, master()), before)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(master())] == buffers
    for view in views:  # what a view has of the master is the master's own
        for i, layer in enumerate(view["layers"]):
            up = at(layer, "mlp/up")
            assert up.scale is at(master()["layers"][i], "mlp/up")["scale"]
            assert (up.planes[0] is at(master()["layers"][i], "mlp/up")["codes"]) == (up.bits == 8)
        assert view["embed"] is master()["embed"]


@pytest.mark.aot
@pytest.mark.slow
def test_the_tpu_compiler_writes_no_codes_anew_while_it_decodes_at_eight_bits(libtpu):
    """One layer of an 8B model: the codes of `o` have two axes of inputs, and a product wants one."""
    cfg = dataclasses.replace(preset("llama3-8b"), num_layers=1, vocab_size=1024, dtype="bfloat16")
    rules = ((MATRICES, QuantConfig(bits=(8, 4))),)

    def view():
        params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), init_params(cfg, jax.random.key(0)))
        return switch_bits(unstack_layers(to_master(params, init_scales(params, rules), rules)), 8, rules)

    def step(params, tokens, cache):
        return forward(cfg, params, tokens, tokens, cache=cache).hidden

    given = (
        jax.eval_shape(view),
        jax.ShapeDtypeStruct((1, 1), jnp.int32),
        jax.eval_shape(lambda: new_cache(cfg, 1, 512)),
    )
    program = compile_for("v5e", step, *given).as_text()
    assert program.count('custom_call_target="tpu_custom_call"') >= len(WEIGHTS)
    assert "s8[4096,4096]" in program
    assert not re.search(r"= s8\[\S+\]\S* copy\(", program)


def arrays(program):
    """(type, elements) of every array in a compiled program."""
    found = re.findall(r"\b(pred|[sufbc]\w*\d\w*)\[([\d,]*)\]", program)
    return {(kind, math.prod(map(int, shape.split(","))) if shape else 1) for kind, shape in found}


@pytest.mark.parametrize(("shape", "over"), [((256, 512), 1), ((256, 8, 64), 2), ((4, 64, 384), 1), ((256, 500), 1)])
def test_a_switch_makes_no_float_and_allocates_nothing_but_its_target(shape, over):
    """Whether inputs fill whole blocks or not, and however many planes a width has."""
    K = math.prod(shape[-over:])
    for bits in (7, 6, 4, 3, 2):
        codes = jax.ShapeDtypeStruct(shape, jnp.int8)
        program = multi_precision._repack.lower(codes, over=over, master=8, bits=bits).compile()
        assert {kind for kind, _ in arrays(program.as_text())} <= {"s8", "s32"}
        memory, wanted = program.memory_analysis(), nbytes(bits, 256, K) - 2 * 256
        pointers = memory.output_size_in_bytes - wanted  # of a tuple of planes
        assert (memory.temp_size_in_bytes, 0 <= pointers <= 8 * 3) == (0, True)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_view_has_the_bytes_of_the_table(bits):
    for rules in (DEFAULT_RULES, MIXED):
        got = want = 0
        for i, layer in enumerate(switch_bits(master(rules), bits, rules)["layers"]):
            for path, cfg in quantised_paths(base(), rules).items():
                leaf, kept = at(layer, path[7:]), at(master(rules)["layers"][i], path[7:])
                K = math.prod(leaf.shape[-INPUT_AXES[path.split("/")[-1]] :])
                N, width = math.prod(leaf.shape) // K, min(max(bits, cfg.bits[-1]), cfg.master)
                got += leaf.nbytes
                want += nbytes(width, N, K, K // (cfg.group or K)) + 2 * N * (width in cfg.gain)
                assert kept["codes"].nbytes + kept["scale"].nbytes == nbytes(8, N, K, K // (cfg.group or K))
        assert got == want


@pytest.mark.proof
def test_integer_activations_are_near():
    """A token's largest of 32 to 64 numbers is about 3 times their root mean square, so a step is 3 / 127 of it and its
    noise 3 / 127 / sqrt(12) = 0.7 %, seven times in each of three layers: in all 0.7 % sqrt(21) = 3 % or less, as the
    residual stream has parts that met fewer matrices."""
    for bits in (8, 4):
        want = both_ways(switch_bits(master(), bits, MIXED))
        got = both_ways(switch_bits(master(), bits, MIXED, act="int8"))
        for a, b in zip(got, want, strict=True):
            assert 1e-3 < off(a, b) < 0.03


@pytest.mark.slow
def test_half_precision_multiplies_exact_codes():
    """Rounded weights would add an error of their own to that of the activations."""
    half = dataclasses.replace(CFG, dtype="bfloat16")
    hidden = jax.jit(lambda params: forward(half, params, TOKENS, POSITIONS).hidden)
    floats = unstack_layers(served(master(), jnp.int32(4), MIXED, jnp.float32))
    got = hidden(switch_bits(master(), 4, MIXED))
    assert got.dtype == jnp.bfloat16
    exact = run(floats)
    assert off(got, exact) < off(hidden(floats), exact) < 0.02


def test_a_plan_of_widths_may_be_a_numpy_array():
    plan = np.array([8, 2, 4], np.int32)
    view, want = (switch_bits(master(), bits, MIXED) for bits in (plan, (8, 2, 4)))
    equal(view, want)


def test_axes_of_scales_go_with_scales():
    for rules in (DEFAULT_RULES, MIXED):
        axes, scales = scale_axes(param_axes(CFG), rules), learned(rules)
        named = lambda node: isinstance(node, tuple)
        assert jax.tree.structure(axes, is_leaf=named) == jax.tree.structure(scales)
        jax.tree.map(
            lambda names, x: None if len(names) == x.ndim else pytest.fail(f"{names}"), axes, scales, is_leaf=named
        )
    attn = axes["layers"]["attn"]
    assert attn["q"]["rho"] == ("layers", "heads", "head_dim", None)
    assert attn["o"] == dict.fromkeys(("rho", "gain"), ("layers", "embed", None))
    assert axes["layers"]["mlp"]["down"]["rho"] == ("layers", "embed", None)


def test_rules_that_were_written_are_read_as_plain_names():
    for rules in (DEFAULT_RULES, MIXED, ((MATRICES, None),)):
        written = json.loads(json.dumps(write_rules(base(), rules)))
        again = read_rules(written)
        assert dict(again) == {re.escape(name): cfg for name, cfg in quantised_paths(base(), rules).items()}
        if again:
            assert quantised_paths(base(), again) == quantised_paths(base(), rules)
    assert hash(again) == hash(())


# ------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.errors
def test_a_rule_that_matches_no_matrix_is_refused_with_the_nearest():
    for pattern in ("attn/q", "embed", "layers/attn_norm", "layers/attn/q_bias", "layers/0/attn/q"):
        rules = ((pattern, None), *DEFAULT_RULES)
        with pytest.raises(ValueError, match=f"rules: '{pattern}' matches no matrix; .*nearest of which are layers/"):
            quantised_paths(base(), rules)


@pytest.mark.errors
def test_scales_of_other_parameters_or_rules_are_refused():
    with pytest.raises(ValueError, match="scales: no rho for layers/attn/k; expected those of init_scales"):
        fake_quantise_tree(base(), learned(MIXED), 4)
    for params, scales in ((unstack_layers(base()), learned()), (base(), unstack_layers(learned()))):
        with pytest.raises(ValueError, match=r"scales: no rho for layers/attn/k; .*Use stack_layers or unstack_layers"):
            to_master(params, scales)
    gains = ((MATRICES, dataclasses.replace(QuantConfig(), gain=(2,))),)
    with pytest.raises(ValueError, match="scales: no gain for layers/attn/k"):
        fake_quantise_tree(base(), learned(), 4, gains)


@pytest.mark.errors
def test_widths_that_mean_nothing_are_refused():
    for bits in (1, 9):
        with pytest.raises(ValueError, match=f"bits: found {bits}; expected a width from 2 to 8"):
            fake_quantise_tree(base(), learned(), bits)
    for bad in (jnp.array([8, 4]), jnp.full((3, 2), 4)):
        with pytest.raises(
            ValueError, match=r"bits: shape \(.*\) for layers/attn/k of shape .*; expected a scalar, or one"
        ):
            fake_quantise_tree(base(), learned(), bad)
    with pytest.raises(ValueError, match=r"bits: shape \(2,\) for layers/attn/k"):
        fake_quantise_tree(unstack_layers(base()), unstack_layers(learned()), jnp.array([8, 4]))
    with pytest.raises(ValueError, match=r"bits: shape \(4,\) for layers/attn/k"):
        from_master(unstack_layers(to_master(base(), learned())), jnp.array([8, 4, 2, 2]))
    small = {"mlp": {"up": jnp.ones((3, 64))}}  # of no layer
    with pytest.raises(ValueError, match=r"bits: shape \(3,\) for mlp/up"):
        fake_quantise_tree(small, init_scales(small), jnp.array([8, 4, 2]))


@pytest.mark.errors
def test_views_that_cannot_be_are_refused():
    for bits in (1, 9, 4.0, True, (8, 4), (8, 4, 2, 2), (8, 4, 2.0), np.float32(4), jnp.int32(4), "842"):
        with pytest.raises(ValueError, match=r"bits: found .*expected a width from 2, the lowest of this master, to 8"):
            switch_bits(master(), bits, MIXED)  # type: ignore[arg-type]
    high = ((MATRICES, QuantConfig(bits=(8, 6))), ("layers/attn/k", QuantConfig(bits=(8, 4))))
    for bits in (3, (8, 8, 3)):  # else a model of 4 bits would pass for one of 3
        with pytest.raises(ValueError, match="expected a width from 4, the lowest of this master"):
            switch_bits(master(), bits, high[::-1])
    with pytest.raises(ValueError, match="switch_bits: found stacked layers; expected a tuple"):
        switch_bits(stored(base(), learned(), DEFAULT_RULES), 4)
