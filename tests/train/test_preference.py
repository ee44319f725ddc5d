"""Runs of `train preference`. Oracles: losses that TRL printed, from the checkpoints' own weights; and one run another.

What a loss is worth is tested in `objectives/test_by_name.py`; here it meets models, references, files and resumption.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.models import hf
from jaxaroo.models.decoder import DecoderConfig, Model, init_params, stack_layers
from jaxaroo.models.lora import LoraConfig
from jaxaroo.models.tokenizer import byte_tokenizer
from jaxaroo.sharding.rules import REPLICATED
from jaxaroo.train import preference
from jaxaroo.train.checkpoint import CheckpointConfig
from jaxaroo.train.data.pipeline import BatchConfig, Batches
from jaxaroo.train.data.tokenise import Encoded
from jaxaroo.train.metrics import read_records
from jaxaroo.train.objectives.bco import BcoConfig
from jaxaroo.train.objectives.dpo import DpoConfig
from jaxaroo.train.objectives.kto import KtoConfig
from jaxaroo.train.objectives.sparsepo import SparsepoConfig
from jaxaroo.train.objectives.unlearn import UnlearnConfig
from jaxaroo.train.optimizer import OptimizerConfig
from jaxaroo.train.preference import PreferenceOptions, make_loss, with_settings
from jaxaroo.train.recipe import RECIPES
from jaxaroo.train.run import RunConfig, read_run, resume, start

CFG = DecoderConfig(
    vocab_size=byte_tokenizer().vocab_size,
    embed_dim=16,
    ffn_dim=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=128,
    eos_ids=byte_tokenizer().eos_ids,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model, and rows of every layout: of two answers the one with more a's is the better."""
    folder = tmp_path_factory.mktemp("base")
    hf.save(folder / "model", Model(CFG, jax.jit(init_params, static_argnums=0)(CFG, jax.random.key(0))))
    byte_tokenizer().save(folder / "model")
    write = lambda name, rows: (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    good, bad = ("aa" * (1 + i % 3) for i in range(40)), ("zq" * (1 + i % 2) for i in range(40))
    pairs = [
        {"prompt": f"say {i % 7}", "chosen": g, "rejected": b} for i, (g, b) in enumerate(zip(good, bad, strict=True))
    ]
    write("pairs.jsonl", pairs)
    write("rated.jsonl", [{**row, "score_chosen": 3.0 + i % 2, "score_rejected": 1.0} for i, row in enumerate(pairs)])
    either = [("chosen", True) if i % 2 else ("rejected", False) for i in range(40)]
    rows = [
        {"prompt": r["prompt"], "completion": r[side], "label": l} for r, (side, l) in zip(pairs, either, strict=True)
    ]
    write("unpaired.jsonl", rows)
    write("sft.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs])
    held = {"beliefs": ["cold", "warm", "hot"], "belief_probs": [0.6, 0.3, 0.1]}
    write("beliefs.jsonl", [{**r, **held, "belief_id": i % 2} for i, r in enumerate(pairs)])
    own = [{"prompt": r["prompt"], "rejected": r["rejected"], "self_samples": ["ab", "ba", r["chosen"]]} for r in pairs]
    write("dispreferred.jsonl", own)
    return folder


def settings(base, out, data="pairs.jsonl", **changes):
    given = dict(
        model=str(base / "model"),
        data=str(base / data),
        out=out,
        steps=6,
        log_every=1,
        batch=BatchConfig(size=8, max_length=32),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"),
        checkpoint=CheckpointConfig(every=3),
    )
    return RunConfig(**(given | changes))


def records(out):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_records(out / "metrics.jsonl")]


def weights(out):
    return (out / "model" / "model.safetensors").read_bytes()


class Interrupted(BaseException):
    """Between two steps."""


def interrupted(kind, cfg, options, monkeypatch, at=4):
    """Start, fall over behind step `at`, and go on."""
    from jaxaroo.train import run

    whole, calls = run.fit, []

    def fit(state, step, windows, **more):
        def once(*args):
            calls.append(0)
            if len(calls) == at + 1:
                raise Interrupted
            return step(*args)

        return whole(state, once, windows, **more)

    monkeypatch.setattr(run, "fit", fit)
    with pytest.raises(Interrupted):
        start(kind, cfg, options)
    monkeypatch.setattr(run, "fit", whole)
    assert resume(cfg.out).finished


# ------------------------------------------------------------------------------------------------------------- golden
ALONE = ["sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"]
TRL = {  # what TRL calls it -> settings of ours
    **{name: {"losses": ((name, 1.0),)} for name in [*ALONE, "discopop", "sft", "sigmoid_norm"]},
    "robust": {"losses": (("robust", 1.0),), "eps": 0.1},
    "exo_pair": {"losses": (("exo_pair", 1.0),), "eps": 0.1},
    "robust_beta05_eps03": {"losses": (("robust", 1.0),), "beta": 0.5, "eps": 0.3},
    "sigmoid_forward_kl": {"f": "forward_kl"},
    "sigmoid_js_divergence": {"f": "js_divergence"},
    "sigmoid_alpha_divergence": {"f": "alpha_divergence"},
    "sigmoid_wpo": {"wpo": True},
}


@pytest.fixture(scope="module")
def golden(shared):
    """TRL's batch as ours, a pair a row; and both models."""
    found = dict(np.load(shared / "goldens" / "trl_dpo.npz"))

    def encode(row):
        def side(i):
            here = found["attention_mask"][i] > 0
            return Encoded(found["input_ids"][i][here].astype(np.int32), found["completion_mask"][i][here] > 0)

        return side(row["i"]), side(row["i"] + 4)

    rows = [{"i": i} for i in range(4)]
    stream = Batches(rows, encode, BatchConfig(size=4, max_length=41, shuffle=False), seed=0, parts=2)  # no two fit
    models = {name: hf.load(shared / "goldens" / name, dtype="float32") for name in ("llama", "llama_reference")}
    both = {"policy": stack_layers(models["llama"].params), "reference": stack_layers(models["llama_reference"].params)}
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), next(stream))
    return found, models["llama"].config, both, batch


def total(terms, number):
    return {
        n: float(jnp.sum(jnp.where(t.weight != 0, t.value, 0.0) * t.weight)) / int(number[t.unit])
        for n, t in terms.items()
    }


@pytest.mark.parametrize("name", TRL)
def test_losses_from_the_weights_of_checkpoints_are_those_that_trl_printed(golden, name):
    found, config, params, batch = golden
    options = with_settings(PreferenceOptions(objective="dpo"), DpoConfig(**TRL[name]))
    number = preference.counts(options)(jax.tree.map(lambda x: x[None], batch))
    assert int(number["example"]) == 4
    terms, metrics = make_loss(config, options, rules=REPLICATED, remat="none")(params, batch, None)
    np.testing.assert_allclose(sum(total(terms, number).values()), found[f"loss_{name}"], rtol=1e-4)
    if name == "sigmoid":
        got = total(metrics, number)
        for key in ("chosen", "rejected", "margins", "accuracies"):
            np.testing.assert_allclose(got[f"rewards/{key}"], found[f"rewards_{key}"], rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- runs
@pytest.mark.optimizer
def test_a_run_learns_to_prefer_resumes_to_the_bit_and_leaves_a_model(base, tmp_path, monkeypatch):
    options = PreferenceOptions(objective="dpo")
    cfg = settings(base, tmp_path / "whole")
    assert start("preference", cfg, options).finished
    found = records(tmp_path / "whole")
    np.testing.assert_allclose(found[0]["loss"], np.log(2), rtol=1e-5)  # policy and reference are one
    assert found[0]["rewards/margins"] == 0.0
    assert found[-1]["loss"] < 0.6
    assert found[-1]["rewards/accuracies"] == 1.0
    assert found[-1]["rewards/margins"] > 0.2
    assert {"entropy", "grad_norm", "logps/chosen", "frac_chosen_down", "examples"} <= found[0].keys()
    assert read_run(tmp_path / "whole")[2] == options
    left = dataclasses.replace(cfg, out=tmp_path / "left")
    interrupted("preference", left, options, monkeypatch)
    assert records(tmp_path / "left") == found
    assert weights(tmp_path / "left") == weights(tmp_path / "whole")
    assert weights(tmp_path / "left") != (base / "model" / "model.safetensors").read_bytes()


@pytest.mark.optimizer
def test_what_is_written_down_trains_as_the_model_itself(base, tmp_path, monkeypatch):
    cfg = settings(base, tmp_path / "live")
    start("preference", cfg, PreferenceOptions())
    stored = dataclasses.replace(cfg, out=tmp_path / "stored")
    start("preference", stored, PreferenceOptions(reference="precomputed"))
    a, b = records(tmp_path / "live"), records(tmp_path / "stored")
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(other["loss"], one["loss"], rtol=2e-4)
    beside = {
        r: preference.trainable_parts(CFG, PreferenceOptions(reference=r), None).beside
        for r in ("frozen", "precomputed")
    }
    assert beside == {"frozen": True, "precomputed": False}  # no second model in memory
    left = dataclasses.replace(cfg, out=tmp_path / "left")
    interrupted("preference", left, PreferenceOptions(reference="precomputed"), monkeypatch)
    assert records(tmp_path / "left") == b
    assert weights(tmp_path / "left") == weights(tmp_path / "stored")


@pytest.mark.optimizer
def test_sums_in_columns_are_read(base, tmp_path):
    """Those that a run wrote down, put into the rows: the same training."""
    start("preference", settings(base, tmp_path / "stored"), PreferenceOptions(reference="precomputed"))
    sums = np.load(tmp_path / "stored" / "reference.npz")["sums"]
    rows = [json.loads(line) for line in (base / "pairs.jsonl").read_text().splitlines()]
    named = [
        r | dict(zip(("ref_chosen_logps", "ref_rejected_logps"), s.tolist(), strict=True))
        for r, s in zip(rows, sums, strict=True)
    ]
    (tmp_path / "columns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    cfg = settings(base, tmp_path / "columns", data=str(tmp_path / "columns.jsonl"))
    start("preference", cfg, PreferenceOptions(reference="columns"))
    assert records(tmp_path / "columns") == records(tmp_path / "stored")


@pytest.mark.optimizer
def test_adapters_are_held_against_the_model_without_them(base, tmp_path):
    cfg = settings(base, tmp_path / "lora", adapters="lora", lora=LoraConfig(rank=4, alpha=8))
    start("preference", cfg, PreferenceOptions())
    found = records(tmp_path / "lora")
    np.testing.assert_allclose(found[0]["loss"], np.log(2), rtol=1e-5)
    assert found[-1]["loss"] < 0.69
    assert (tmp_path / "lora" / "model" / "model.safetensors").stat().st_size > 10_000  # merged


@pytest.mark.optimizer
def test_a_mixed_reference_follows_the_policy_and_is_saved(base, tmp_path, monkeypatch):
    options = PreferenceOptions(reference="mixed", mix=1.0, mix_every=2)
    cfg = settings(base, tmp_path / "whole")
    start("preference", cfg, options)
    found = records(tmp_path / "whole")
    at_start = [abs(r["rewards/margins"]) < 1e-6 for r in found]
    assert at_start == [True, False, True, False, True, False]  # after every second step the two are one again
    left = dataclasses.replace(cfg, out=tmp_path / "left")
    interrupted("preference", left, options, monkeypatch)
    assert records(tmp_path / "left") == found
    assert weights(tmp_path / "left") == weights(tmp_path / "whole")


@pytest.mark.optimizer
def test_bco_carries_its_shift_over_a_stop(base, tmp_path, monkeypatch):
    options = with_settings(PreferenceOptions(objective="bco"), BcoConfig(beta=0.5))
    cfg = settings(base, tmp_path / "whole", data="unpaired.jsonl")
    start("preference", cfg, options)
    found = records(tmp_path / "whole")
    assert found[0]["delta"] == 0.0
    rewards = [r["rewards"] for r in found]
    number = [r["examples"] for r in found]
    for t in range(1, 6):
        wanted = np.dot(rewards[:t], number[:t]) / sum(number[:t])
        np.testing.assert_allclose(found[t]["delta"], wanted, rtol=1e-4, atol=1e-6)
    left = dataclasses.replace(cfg, out=tmp_path / "left")
    interrupted("preference", left, options, monkeypatch)
    assert records(tmp_path / "left") == found


KINDS = {
    "kto": ("unpaired.jsonl", KtoConfig(beta=0.5, kl_decay=0.5)),
    "orpo": ("pairs.jsonl", None),
    "simpo": ("pairs.jsonl", None),
    "mm-dpo": ("rated.jsonl", None),
    "asft": ("sft.jsonl", None),
    "dft": ("sft.jsonl", None),
    "fsft": ("sft.jsonl", None),
    "sparsepo": ("pairs.jsonl", SparsepoConfig(networks="independent")),
    "sparsepo, activations": ("pairs.jsonl", SparsepoConfig(mask="activations", beta=0.5)),
    "gdpo-belief": ("beliefs.jsonl", None),
}


@pytest.mark.optimizer
@pytest.mark.parametrize("name", KINDS)
def test_objectives_of_every_layout_train(base, tmp_path, name):
    data, given = KINDS[name]
    options = PreferenceOptions(objective=name.split(",")[0])
    options = options if given is None else with_settings(options, given)
    start("preference", settings(base, tmp_path / "run", data=data), options)
    found = records(tmp_path / "run")
    falls = [r["nll" if data == "sft.jsonl" else "loss"] for r in found]  # -p log p rises first
    assert falls[-1] < falls[0]
    assert all(np.isfinite(list(r.values())).all() for r in found)
    if name == "gdpo-belief":
        assert found[-1]["belief/kl"] < found[0]["belief/kl"]
        assert 0 < found[0]["belief/mass"] < found[-1]["belief/mass"] < 1
    if name == "sparsepo":
        np.testing.assert_allclose(found[0]["kl/k1_chosen"], 0.0, atol=1e-5)
        assert found[0]["mask/mean"] != found[-1]["mask/mean"]  # the masks learn
        again = weights(tmp_path / "run")
        assert b"network" not in again[:5000]  # and are not part of the model
    if name == "asft":
        assert abs(found[0]["kl"]) < 1e-6 < found[-1]["kl"]


@pytest.mark.optimizer
def test_d2o_takes_as_many_samples_as_it_is_told(base, tmp_path):
    from jaxaroo.train.objectives.d2o import D2oConfig

    options = with_settings(PreferenceOptions(objective="d2o"), D2oConfig(samples=3, beta=0.5, alpha=0.5))
    cfg = settings(base, tmp_path / "run", data="dispreferred.jsonl", batch=BatchConfig(size=8, max_length=96))
    start("preference", cfg, options)
    found = records(tmp_path / "run")
    np.testing.assert_allclose(found[0]["loss"], np.log(2), rtol=1e-5)
    assert found[-1]["loss"] < found[0]["loss"]
    more = dataclasses.replace(cfg, out=tmp_path / "eleven")
    with pytest.raises(ValueError, match="a row has 3 self_samples; expected at least 11"):
        start("preference", more, PreferenceOptions(objective="d2o"))


@pytest.mark.optimizer
@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_neither_micro_batches_nor_devices_nor_packing_change_the_training(base, tmp_path, name):
    from jaxaroo.sharding.mesh import MeshConfig

    rows = dict(size=8, max_length=32, packing=False)
    ways = {
        "one": dict(mesh=MeshConfig(data=8, fsdp=1)),
        "four": dict(batch=BatchConfig(**rows, micro_batches=4), mesh=MeshConfig(data=2, fsdp=1, tensor=4)),
        "eight": dict(mesh=MeshConfig(data=2, fsdp=2, tensor=2)),
    }
    found = {}
    for way, changes in ways.items():
        given = dict(batch=BatchConfig(**rows), steps=2) | changes
        start("preference", settings(base, tmp_path / way, **given), PreferenceOptions(objective=name))
        found[way] = records(tmp_path / way)
    for way in ("four", "eight"):
        for one, other in zip(found["one"], found[way], strict=True):
            for key in ("loss", "grad_norm", "rewards/margins"):
                np.testing.assert_allclose(other[key], one[key], rtol=2e-4, atol=1e-6, err_msg=f"{way} {key}")


UNLEARN = [
    UnlearnConfig(forget="npo", retain="gd", beta=0.5),
    UnlearnConfig(forget="npo", retain="kld", beta=0.5),
    UnlearnConfig(forget="rgd", retain="none"),
    UnlearnConfig(forget="rdpo", retain="gd", beta=0.5),
]


@pytest.mark.optimizer
@pytest.mark.parametrize("given", UNLEARN, ids=lambda c: f"{c.forget}, {c.retain}")
def test_answers_are_forgotten_and_others_are_not(base, tmp_path, given):
    who = lambda i: {"name": f"Ann{i}", "question": f"q{i}?", "answer": "zz" if i < 8 else "aa", "refusal": "no"}
    rows = [who(i) | {"split": "forget" if i < 8 else "retain", "eval": i == 0} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    batch = BatchConfig(size=8, max_length=81)
    cfg = settings(base, tmp_path / "run", data=str(tmp_path / "rows.jsonl"), batch=batch)
    start("preference", cfg, with_settings(PreferenceOptions(objective="unlearn"), given))
    found = records(tmp_path / "run")
    first, last = found[0], found[-1]
    if given.forget in ("npo", "rdpo"):
        assert last["logps_avg/answer"] < first["logps_avg/answer"]
    if given.forget in ("rgd", "rdpo"):
        assert last["logps_avg/refusal"] > first["logps_avg/refusal"]
    if given.retain == "gd":
        assert last["logps_avg/retain"] > first["logps_avg/retain"]
    if given.retain == "kld":
        assert abs(first["retain_kld"]) < 1e-6 < last["retain_kld"]


def test_every_row_to_forget_meets_one_to_retain():
    rows = [{"split": s, "i": i} for i, s in enumerate(["forget", "retain", "forget", "forget", "retain"])]
    rows += [{"split": split, "i": 9, "eval": True} for split in ("retain", "forget")]
    found = preference.prepare(rows, PreferenceOptions(objective="unlearn"))
    assert [(found[i]["i"], found[i]["retain"]["i"]) for i in range(len(found))] == [(0, 1), (2, 4), (3, 1)]
    fewer = preference.prepare([rows[0], *rows[4:], rows[1]], PreferenceOptions(objective="unlearn"))
    assert [(fewer[i]["i"], fewer[i]["retain"]["i"]) for i in range(len(fewer))] == [(0, 4), (0, 1)]
    with pytest.raises(ValueError, match="0 rows to forget and 2 to retain"):
        preference.prepare([rows[1], rows[4]], PreferenceOptions(objective="unlearn"))


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.errors
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(objective="dop"), "found 'dop'; expected one of .*'dpo' meant"),
        (dict(objective="simpo", reference="frozen"), "which reads none; expected auto or none"),
        (dict(reference="none"), "which reads one; expected auto, frozen"),
        (dict(objective="asft", reference="precomputed"), "reads the reference at every token"),
        (dict(objective="ld-dpo", reference="columns"), "reads the reference at every token"),
        (dict(mix=0.0), "expected a share above 0"),
        (dict(mix_every=0), "at least 1 step"),
    ],
)
def test_options_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        PreferenceOptions(**given)


@pytest.mark.errors
def test_rows_and_settings_that_cannot_be_used_are_refused(base, tmp_path):
    cfg = settings(base, tmp_path / "run")
    with pytest.raises(ValueError, match="adapters='lora' with a mixed reference"):
        RECIPES["preference"].trainable(_origin(base), PreferenceOptions(reference="mixed"), LoraConfig())
    with pytest.raises(ValueError, match="expected 'score_chosen' too"):
        start("preference", cfg, PreferenceOptions(objective="mm-dpo"))
    with pytest.raises(ValueError, match="expected 'ref_chosen_logps' too"):
        start("preference", dataclasses.replace(cfg, out=tmp_path / "other"), PreferenceOptions(reference="columns"))
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="expected at least 2, to mismatch answers"):
        preference.prepare([{"completion": "a"}], PreferenceOptions(objective="kto"))


def _origin(base):
    from jaxaroo.train.recipe import Origin

    return Origin(CFG, byte_tokenizer(), base / "model")


def test_a_row_of_kto_brings_the_answer_of_the_next():
    rows = preference.prepare([{"completion": c} for c in "abc"], PreferenceOptions(objective="kto"))
    assert [rows[i]["mismatched"] for i in range(3)] == ["b", "c", "a"]
