"""Runs of `train qat`. Oracle: the trained float weights and scales themselves, at every width."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.infer.engine import Engine
from jaxaroo.infer.sampling import Sampling
from jaxaroo.models import hf
from jaxaroo.models.decoder import DecoderConfig, Model, init_params, logits, unstack_layers
from jaxaroo.models.multi_precision import MATRICES, fake_quantise_tree
from jaxaroo.models.quantise import QuantConfig
from jaxaroo.models.tokenizer import byte_tokenizer
from jaxaroo.train import qat
from jaxaroo.train.checkpoint import CheckpointConfig
from jaxaroo.train.data.pipeline import BatchConfig
from jaxaroo.train.metrics import read_records
from jaxaroo.train.optimizer import OptimizerConfig
from jaxaroo.train.qat import QatOptions
from jaxaroo.train.run import RunConfig, read_run, resume, start

WIDTHS = (8, 6, 4, 2)
OPTIONS = QatOptions(group=32, scale_rate=1e-2, rules=("layers/attn/k=none", "layers/mlp/d.*=8,4"))
IDS = np.random.default_rng(0).integers(0, 250, (2, 9))
CFG = DecoderConfig(
    vocab_size=byte_tokenizer().vocab_size,
    embed_dim=32,
    ffn_dim=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    max_positions=128,
    eos_ids=byte_tokenizer().eos_ids,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    hf.save(folder / "model", Model(CFG, jax.jit(init_params, static_argnums=0)(CFG, jax.random.key(0))))
    byte_tokenizer().save(folder / "model")
    rows = [{"prompt": f"say {i % 5}", "completion": f" {i % 5} {i % 5} {i % 5}"} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bits.json").write_text(json.dumps({"trace": [0.5, 2.0]}))
    return folder


def settings(base, out, **changes):
    given = dict(
        model=str(base / "model"),
        data=str(base / "rows.jsonl"),
        out=out,
        steps=6,
        batch=BatchConfig(size=8, max_length=32),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        checkpoint=CheckpointConfig(every=3),
    )
    return RunConfig(**(given | changes))


class Seen:
    """What an evaluation is shown last; it may be interrupted when it is called for the `stop`th time."""

    def __init__(self, stop=None):
        self.calls, self.stop = 0, stop

    def __call__(self, config, frozen, trained):
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.frozen, self.trained = jax.tree.map(np.array, (frozen, trained))
        return {}


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """(folder, what was trained) of one whole run."""
    out, seen = tmp_path_factory.mktemp("run") / "out", Seen()
    with jax.numpy_dtype_promotion("standard"):
        assert start("qat", settings(base, out, evaluate_every=3), OPTIONS, evaluate=seen).finished
    return out, seen


at_width = jax.jit(fake_quantise_tree, static_argnums=3)


def oracle(seen, bits, options=OPTIONS):
    """The weights of the last update at a width, stacked."""
    rules = qat.quant_rules(CFG, options)
    return at_width(seen.trained["model"], seen.trained["scales"], jnp.asarray(bits, jnp.int32), rules)


def close(got, want):
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.slow
def test_the_loss_falls_at_every_width(run):
    out, seen = run
    lines = read_records(out / "metrics.jsonl")
    assert len(lines) == 6
    for bits in WIDTHS:
        losses = [line[f"nll_{bits}"] for line in lines]
        assert np.mean(losses[-2:]) < 0.9 * losses[0]
    assert np.mean([lines[-1][f"nll_{bits}"] for bits in WIDTHS]) == pytest.approx(lines[-1]["nll"])
    assert lines[0]["nll_8"] != lines[0]["nll_2"]
    assert all(line["kl_8"] == 0 < line["kl_2"] for line in lines)
    assert read_run(out)[::2] == ("qat", OPTIONS)
    assert seen.frozen == {}


@pytest.mark.optimizer
@pytest.mark.slow
def test_a_run_that_was_left_ends_in_the_same_bytes(base, run, tmp_path):
    left = tmp_path / "left"
    with pytest.raises(KeyboardInterrupt):
        start("qat", settings(base, left, evaluate_every=1), OPTIONS, evaluate=Seen(stop=5))
    assert [p.name for p in (left / "checkpoints").iterdir()] == ["3"]
    assert resume(left).finished
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    for name in names:
        assert (left / "model" / name).read_bytes() == (run[0] / "model" / name).read_bytes()


@pytest.mark.parametrize("bits", [8, 6, 4, 2, (8, 2), (2, 6)], ids=str)
@pytest.mark.slow
def test_what_was_trained_at_a_width_is_what_is_served_at_it(run, bits):
    out, seen = run
    model = hf.load(out / "model", bits=bits)
    close(logits(model, IDS), logits(Model(CFG, oracle(seen, bits)), IDS))
    if bits == 8:
        close(logits(hf.load(out / "model"), IDS), logits(model, IDS))
    each = (bits, bits) if isinstance(bits, int) else bits
    for layer, width in zip(model.params["layers"], each, strict=True):
        assert layer["attn"]["q"].bits == width
        assert layer["mlp"]["down"].bits == max(width, 4)
        assert isinstance(layer["attn"]["k"], jax.Array)


@pytest.mark.slow
def test_the_engine_generates_with_it(run):
    out, seen = run
    said = []
    for model in (hf.load(out / "model", bits=4), Model(CFG, unstack_layers(oracle(seen, 4)))):
        with Engine(model, byte_tokenizer(), max_len=64) as engine:
            results = engine.generate(["say 3", "say 4"], [Sampling(temperature=0.0, max_tokens=8)] * 2)
            said.append([r.outputs[0].token_ids for r in results])
    assert said[0] == said[1]
    assert len(said[0][0]) > 0


@pytest.mark.slow
def test_for_training_the_floats_of_the_master_come_back(run):
    out, seen = run
    got, want = hf.load(out / "model", stacked=True).params, oracle(seen, 8)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.optimizer
@pytest.mark.proof
def test_layers_draw_and_a_float_teacher_stays_what_it_was(base, run, tmp_path):
    """Begun with the master of another run, whose floats teach; what is written is the running mean."""
    out, seen = tmp_path / "out", Seen()
    options = QatOptions(
        bits="8,4,2", teacher="fp", layers="hasb", sensitivity=str(base / "bits.json"), gain="all", scale_rate=1e-2
    )
    model = run[0] / "model"
    before, kept = (model / "model.safetensors").read_bytes(), hf.load(model, stacked=True).params
    ran = settings(base, out, model=str(model), evaluate_every=1, ema=0.5, steps=3)
    assert start("qat", ran, options, evaluate=seen).finished
    jax.tree.map(np.testing.assert_array_equal, seen.frozen, kept)
    assert (model / "model.safetensors").read_bytes() == before
    for bits in (8, 2):
        close(logits(hf.load(out / "model", bits=bits), IDS), logits(Model(CFG, oracle(seen, bits, options)), IDS))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, seen.trained["model"], kept)
    assert all(jax.tree.leaves(moved))
    lines = read_records(out / "metrics.jsonl")
    assert all(line[f"kl_{bits}"] > 0 for line in lines for bits in (8, 4, 2))


# ------------------------------------------------------------------------------------------------------------ options
def test_rules_say_which_matrix_has_which_widths():
    shared = dict(group=32, init="search", scale_param="linear", grad_scale=False)
    options = QatOptions(**shared, rules=("(?=.*k).*k=none", ".*/down=8,3,2"), gain="low")
    assert qat.quant_rules(CFG, options) == (
        ("(?=.*k).*k", None),
        (".*/down", QuantConfig(bits=(8, 3, 2), gain=(3, 2), **shared)),
        (MATRICES, QuantConfig(gain=(2,), **shared)),
    )
    for gain, wanted in (("none", ()), ("all", WIDTHS)):
        assert qat.quant_rules(CFG, QatOptions(gain=gain))[-1][1].gain == wanted
    widths = lambda *rules, **given: qat.trained_widths(CFG, qat.quant_rules(CFG, QatOptions(rules=rules, **given)))
    assert widths() == WIDTHS
    assert widths(".*/down=5,3") == (8, 6, 5, 4, 3, 2)
    assert widths(".*=4,2") == (4, 2)  # what no matrix has is not trained


@pytest.mark.slow
def test_updates_of_a_step(tmp_path):
    names = lambda **given: qat.make_turns(CFG, QatOptions(**given), 10).names
    assert names() == ("8", "6", "4", "2")
    assert names(bits="8,4,3,2", order="sandwich") == ("8", "between", "2")
    (tmp_path / "bits.json").write_text('{"trace": [-1, 2.5]}')
    traces = qat.read_traces(tmp_path / "bits.json", 2)
    np.testing.assert_array_equal(traces, jnp.asarray([-1.0, 2.5]))
    assert traces.dtype == jnp.float32
    given = dict(bits="6,2", layers="hasb", sensitivity=str(tmp_path / "bits.json"))
    turns = qat.make_turns(CFG, QatOptions(**given), 100)
    assert turns.names == ("6", "2")
    keys = jax.random.split(jax.random.key(0), 500)
    drawn = jax.jit(jax.vmap(turns.draw, (None, 0)))
    rare, often = (np.mean(np.asarray(drawn(jnp.int32(t), keys))[:, 0] != 6) for t in (0, 99))
    assert 0.02 < rare < 0.08  # a tenth draws, and half of it or less another width
    assert 0.3 < often < 0.5
    none = qat.make_turns(CFG, QatOptions(**given, redraw=0.01), 100)
    assert np.mean(np.asarray(jax.jit(jax.vmap(none.draw, (None, 0)))(jnp.int32(99), keys))[:, 0] != 6) < 0.03


@pytest.mark.errors
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": "2,4"}, "bits='2,4'; expected falling widths"),
        ({"bits": "8,x"}, "bits='8,x'"),
        ({"bits": ""}, "bits=''"),
        ({"bits": "9,4"}, "bits='9,4'"),
        ({"layers": "hasb"}, "layers='hasb', sensitivity=None; expected both"),
        ({"sensitivity": "bits.json"}, "layers='uniform', sensitivity=bits.json; expected both"),
        ({"layers": "hasb", "sensitivity": "b", "order": "sandwich"}, "order='sandwich', layers='hasb'"),
        ({"redraw": 0.0}, "redraw=0.0"),
        ({"redraw": float("nan")}, "redraw=nan"),
        ({"kappa": 1.5}, "kappa: found 1.5"),
        ({"temperature": 0.0}, "temperature: found 0.0"),
        ({"scale_rate": -1.0}, "learning_rate: found -1.0"),
    ],
)
def test_options_that_mean_nothing_are_refused(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        QatOptions(**given)


@pytest.mark.errors
@pytest.mark.slow
def test_a_run_that_cannot_be_leaves_nothing_behind(base, run, tmp_path):
    for options, message, changes in (
        ({"rules": ("embed=4,2",)}, "'embed' matches no matrix", {}),
        ({"rules": (".*down",)}, "rule '.*down'; expected REGEX=WIDTHS or REGEX=none", {}),
        ({"rules": (".*(down=4",)}, "rule '.*(down=4'; expected REGEX=WIDTHS", {}),
        ({"rules": (".*down=2,4",)}, "bits='2,4'", {}),
        ({"rules": (".*=none",)}, "leave every matrix float", {}),
        ({"group": 64}, "groups of 64 for the 32 inputs of layers/attn/", {}),
        ({"group": 31}, "QuantConfig.group: found 31", {}),
        ({}, "adapters='lora'", {"adapters": "lora"}),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            start("qat", settings(base, tmp_path / "no", **changes), QatOptions(**options))
    for text in ('{"trace": [1, 2, 3]}', '{"trace": 1}', "{}", '{"trace": [1, "2"]}', '{"trace": [1, true]}',
                 f'{{"trace": [1, {10**400}]}}',
                 '{"trace": [1, 1e999]}', '{"trace": [1, 1e300]}', "[1, 2]", "no"):  # fmt: skip
        (tmp_path / "bits.json").write_text(text)
        options = QatOptions(layers="hasb", sensitivity=str(tmp_path / "bits.json"))
        with pytest.raises(ValueError, match=r"bits\.json"):
            start("qat", settings(base, tmp_path / "no"), options)
    with pytest.raises(ValueError, match="plain weights; expected a master"):
        hf.load(base / "model", bits=4)
    with pytest.raises(ValueError, match="plain weights; expected a master"):
        hf.load(base / "model", act="int8")
    for bits in (1, 9, (8, 4, 2), (8,), 4.0, (8, 4.5), True):
        with pytest.raises(ValueError, match="bits: found"):
            hf.load(run[0] / "model", bits=bits)
    assert not (tmp_path / "no").exists()
