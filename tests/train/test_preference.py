"""Runs of `train preference`. Oracles: losses that TRL printed, from the checkpoints' own weights; and one run another.

What a loss is worth is tested in `objectives/test_by_name.py`; here it meets models, references, files and resumption.
"""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaroo.models import hf
from jaxaroo.models.decoder import DecoderConfig, Model, init_params, logits
from jaxaroo.models.lora import LoraConfig
from jaxaroo.models.tokenizer import byte_tokenizer
from jaxaroo.sharding.rules import REPLICATED
from jaxaroo.train import preference
from jaxaroo.train.checkpoint import CheckpointConfig
from jaxaroo.train.data.pipeline import BatchConfig, Batches
from jaxaroo.train.data.tokenise import Encoded
from jaxaroo.train.metrics import read_records
from jaxaroo.train.objectives.bco import BcoConfig
from jaxaroo.train.objectives.by_name import OBJECTIVES, sparsepo_terms
from jaxaroo.train.objectives.d2o import D2oConfig
from jaxaroo.train.objectives.dpo import DpoConfig
from jaxaroo.train.objectives.fsft import FsftConfig
from jaxaroo.train.objectives.kto import KtoConfig
from jaxaroo.train.objectives.logprobs import output_table, score_targets, target_kl
from jaxaroo.train.objectives.sequences import View
from jaxaroo.train.objectives.sparsepo import SparsepoConfig, activation_mask
from jaxaroo.train.objectives.unlearn import UnlearnConfig
from jaxaroo.train.optimizer import OptimizerConfig
from jaxaroo.train.preference import PreferenceOptions, make_loss, with_settings
from jaxaroo.train.recipe import RECIPES
from jaxaroo.train.references import OtherReferenceError
from jaxaroo.train.run import RunConfig, read_run, resume, start
from jaxaroo.train.state import init_state
from jaxaroo.train.step import Term, make_train_step

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


# ------------------------------------------------------------------------------------------------------- rows to tokens
TOKENS = byte_tokenizer()


def encoded(row, objective, config=None, reference="auto"):
    """Of each sequence the text that is learned, the text before it, and the numbers, of which all tokens have one."""
    options = PreferenceOptions(objective=objective, reference=reference)
    options = options if config is None else with_settings(options, config)
    found = preference.encoder(TOKENS, options)(row)
    names = preference.number_names(options)
    assert all({*(e.more or {})} == {*names} for e in found)
    assert all(len(e.more[name]) == len(e.ids) for e in found for name in names)
    bare = preference.bare_encoder(TOKENS, options)(row)
    assert [e.ids.tolist() for e in bare] == [e.ids.tolist() for e in found]
    one = lambda x: x[0] if (x == x[0]).all() else x
    return (
        [TOKENS.decode(e.ids[e.scored].tolist()) for e in found],
        [TOKENS.decode(e.ids[~e.scored].tolist()) for e in found],
        {name: [one(e.more[name]) for e in found] for name in names},
    )


def test_sequences_stand_in_their_order_each_with_its_own_numbers():
    pair = {"prompt": "say", "chosen": "a", "rejected": "bb", "score_chosen": 3.5, "score_rejected": 1.0}
    pair |= {"ref_chosen_logps": -2.0, "ref_rejected_logps": -5.0, "win": 0.75}
    learned, before, numbers = encoded(pair, "mm-dpo", reference="columns")
    assert (learned, before, numbers) == (["a", "bb"], ["say"] * 2, {"gap": [2.5] * 2, "reference": [-2.0, -5.0]})
    written = pair | {"margin": 7.0, "reference_sums": [-3.0, -4.0]}
    assert encoded(written, "mm-dpo", reference="precomputed")[2] == {"gap": [7.0] * 2, "reference": [-3.0, -4.0]}
    assert encoded(pair, "sppo", DpoConfig(losses=(("sppo_soft", 1.0),)))[2] == {"win": [0.75] * 2}
    row = {
        "prompt": "say",
        "completion": "a",
        "mismatched": "bb",
        "label": True,
        "ref_logps": -1.0,
        "ref_kl_logps": -9.0,
    }
    known = {"desirable": [1.0] * 2, "reference": [-1.0, -9.0]}
    assert encoded(row, "kto", reference="columns") == (["a", "bb"], ["say"] * 2, known)
    assert encoded(row | {"label": False}, "bco", reference="columns") == (
        ["a"], ["say"], {"desirable": [0.0], "reference": [-1.0]},
    )  # fmt: skip
    own = {"prompt": "say", "rejected": "no", "self_samples": ["a", "bb", "ccc"]}
    own |= {"ref_self_logps": [-1.0, -2.0, -3.0], "ref_rejected_logps": -8.0}
    assert encoded(own, "d2o", D2oConfig(samples=2), "columns") == (
        ["a", "bb", "no"], ["say"] * 3, {"reference": [-1.0, -2.0, -8.0]},
    )  # fmt: skip
    for logps in (-3.5, [-1.0, -2.5]):
        told = {"prompt": "say", "completion": "a", "base_logps": logps}
        assert encoded(told, "fsft", FsftConfig(level="answer"), "columns")[2] == {"reference": [-3.5]}
    forget = {"question": "who?", "answer": "Ann", "refusal": "no", "retain": {"question": "what?", "answer": "tea"}}
    for how, sides in (("npo", ["Ann"]), ("rgd", ["no"]), ("rdpo", ["no", "Ann"])):
        learned, before, _ = encoded(forget, "unlearn", UnlearnConfig(forget=how))
        assert [text.strip() for text in learned] == [*sides, "tea"]
        assert ["who?" in text for text in before] == [True] * len(sides) + [False]
        assert "what?" in before[-1]
        forget["weight"], forget["retain"]["weight"] = 0.25, 0.5
        options = with_settings(PreferenceOptions(objective="unlearn"), UnlearnConfig(forget=how))
        found = preference.encoder(TOKENS, options)(forget)
        assert [e.weight for e in found] == [None] * len(sides) + [0.5]  # None: the row's own


def test_either_answer_stands_behind_the_id_and_the_accepted_belief():
    row = {"prompt": "say", "chosen": "yes", "rejected": "n", "beliefs": ["cold", "hot"], "belief_id": 1}
    row |= {"belief_probs": [0.25, 0.75]}
    sequences = preference.encoder(TOKENS, PreferenceOptions(objective="gdpo-belief"))(row)
    for e, answer in zip(sequences, ("yes", "n"), strict=True):
        plain = lambda text: TOKENS.encode(text, bos=False)
        assert e.ids.tolist() == [*TOKENS.encode("say"), *plain(f"1<hot>{answer}"), TOKENS.eos_ids[0]]
        place = np.arange(len(e.ids)) - 4  # behind the first token and the prompt
        np.testing.assert_array_equal(e.scored, place >= 0)
        np.testing.assert_array_equal(e.more["id"], place == 0)
        np.testing.assert_array_equal(e.more["belief"], (place > 0) & (place <= 5))
        held = [e.more[name] for name in ("accepted", "held_0", "held_1", "held_2", "held_9")]
        assert all((x == wanted).all() for x, wanted in zip(held, (1.0, 0.25, 0.75, 0.0, 0.0), strict=True))


# ---------------------------------------------------------------------------------------------- what losses are made of
@pytest.mark.proof
def test_a_loss_hands_on_the_divergence_the_ids_and_the_states_of_the_models_it_ran():
    """Oracle: logits of both models, in float64."""
    params = {name: jax.jit(init_params, static_argnums=0)(CFG, jax.random.key(i)) for i, name in enumerate(("a", "b"))}
    params = jax.tree.map(lambda w: 3 * w, params)  # far from one another
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 256, (1, 10)).astype(np.int32)
    rows = [{"ids": ids[0]}] * 2
    encode = lambda row: (Encoded(row["ids"][:6], np.arange(6) > 2), Encoded(row["ids"][4:], np.arange(6) > 3))
    batch = next(Batches(rows, encode, BatchConfig(size=1, max_length=12), seed=0, parts=2))
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    sides, p, q = (np.s_[:5], np.s_[5:10]), [], []
    for name, found in (("a", p), ("b", q)):
        for at in (ids[:, :5], ids[:, 4:9]):
            z = np.asarray(logits(Model(CFG, params[name]), jnp.asarray(at))[0], np.float64)
            found.append(z - np.logaddexp.reduce(z, axis=-1, keepdims=True))
    score = jax.jit(lambda w: score_targets(CFG, w, batch, collect=(1, 2)))
    policy, reference = score(params["a"]), score(params["b"])
    tables = [output_table(CFG, params[name]) for name in ("a", "b")]
    kl = target_kl(policy.hidden, tables[0], reference.hidden, tables[1], batch, rules=REPLICATED)
    mask = np.asarray(batch.mask)
    assert not np.asarray(kl)[~mask].any()
    some = preference.id_logps(CFG, params["a"], policy, (7, 50, 3))
    for at, a, b in zip(sides, p, q, strict=True):
        own = mask[0, at]
        assert 0 < own.sum() < len(own)
        np.testing.assert_allclose(kl[0, at][own], (np.exp(b) * (b - a)).sum(-1)[own], rtol=2e-4)
        np.testing.assert_allclose(some[0, at][own], a[:, [7, 50, 3]][own], rtol=2e-4)
    cfg = SparsepoConfig(mask="activations")
    options = with_settings(PreferenceOptions(objective="sparsepo"), cfg)
    loss = make_loss(CFG, options, rules=REPLICATED, remat="none")
    terms, metrics = loss({"policy": params["a"], "reference": params["b"], "network": {}}, batch, None)
    wanted, _ = sparsepo_terms(View(batch, 2, policy, reference), cfg, kl=kl, network={})
    np.testing.assert_allclose(terms["sparsepo"].value, wanted["sparsepo"].value, rtol=1e-5)
    masks = activation_mask(reference.states, batch)
    np.testing.assert_allclose(metrics["mask/mean"].value, masks, rtol=1e-5, atol=1e-6)
    assert masks.any()


def test_a_mixed_reference_takes_its_share_at_its_steps_and_of_the_model_alone():
    base, now = {"w": jnp.asarray([1.0, 2.0])}, {"w": jnp.asarray([5.0, 2.5])}
    for objective, params in (("dpo", now), ("sparsepo", {"model": now, "network": {"u": jnp.ones(1)}})):
        options = PreferenceOptions(objective=objective, reference="mixed", mix=0.25, mix_every=3)
        carry = preference.carry_of(options)
        assert carry is not None
        for step in range(7):
            new = carry.advance(carry.init(base), params, {}, jnp.int32(step))
            wanted = [2.0, 2.125] if step in (2, 5) else [1.0, 2.0]
            np.testing.assert_array_equal(new["reference"]["w"], wanted, err_msg=f"{objective} {step}")


def test_a_reference_follows_the_policy_where_its_paper_has_it_so_and_nowhere_else():
    for name in OBJECTIVES:
        carry = preference.carry_of(PreferenceOptions(objective=name))
        held = {} if carry is None else carry.init({"w": jnp.ones(1)})
        assert ("reference" in held) == (name == "tr-dpo"), name
    assert preference.reference_of(PreferenceOptions(objective="tr-dpo", reference="frozen")) == "frozen"


def test_an_objectives_own_network_begins_from_the_seed_and_the_model_as_it_is():
    parts = preference.trainable_parts(CFG, PreferenceOptions(objective="sparsepo"), None)
    one, other = (parts.init({"w": jnp.ones(3)}, jax.random.key(seed)) for seed in (1, 2))
    np.testing.assert_array_equal(one["model"]["w"], np.ones(3))
    assert (one["network"]["u"]["unit"] != other["network"]["u"]["unit"]).any()


@pytest.mark.optimizer
def test_a_step_that_is_skipped_leaves_what_goes_along_as_it_was():
    """Oracle: by hand; the carry enters the loss, and follows parameters, metrics and counts of the good steps."""
    loss = lambda params, batch, key, carry: (
        {"l": Term(params["w"] * batch * carry["sum"], jnp.ones(2), "row")},
        {"m": Term(batch, jnp.ones(2), "row")},
    )
    advance = lambda carry, params, metrics, step: {
        "sum": carry["sum"] + params["w"] + 10 * metrics["m"] + 100 * metrics["rows"] + 1000 * step
    }
    step = make_train_step(loss, optax.sgd(1.0), lambda window: {"row": jnp.int32(window.size)}, advance=advance)
    state, w, total = init_state({"w": jnp.float32(3.0)}, optax.sgd(1.0), carry={"sum": jnp.float32(2.0)}), 3.0, 2.0
    for i, batch in enumerate(([0.5, 1.5], [0.5, np.inf], [1.0, -0.5])):
        state, metrics = step(state, jnp.asarray([batch], jnp.float32))
        assert float(metrics["skipped_in_a_row"]) == (i == 1)
        if i != 1:
            m = np.mean(batch)
            w = w - m * total
            total = total + w + 10 * m + 200 + 1000 * i
        np.testing.assert_allclose([state.params["w"], state.carry["sum"]], [w, total], rtol=1e-6)


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
@pytest.mark.proof
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
@pytest.mark.slow
def test_after_the_first_step_sums_are_written_again_by_the_same_model_alone(base, tmp_path):
    model = hf.load(base / "model", dtype="float32")

    def put(scale):
        params = jax.tree.map(lambda w: scale * w, model.params)
        hf.save(tmp_path / "model", model._replace(params=params), overwrite=True)
        byte_tokenizer().save(tmp_path / "model")

    put(1.0)
    cfg = settings(base, tmp_path / "run", model=str(tmp_path / "model"), steps=2)
    start("preference", cfg, PreferenceOptions(reference="precomputed"))
    path = tmp_path / "run" / "reference.npz"
    written = path.read_bytes()
    path.unlink()
    assert resume(tmp_path / "run").finished  # the same model, the same rows
    np.testing.assert_array_equal(np.load(path)["sums"], np.load(io.BytesIO(written))["sums"])
    put(1.05)
    path.unlink()
    with pytest.raises(
        OtherReferenceError, match="another model or of other rows; expected those that steps were taken against"
    ):
        resume(tmp_path / "run")
    assert not path.exists()
    put(1.0)
    path.write_bytes(written[:100])
    with pytest.raises(OtherReferenceError, match=r"cannot be read .* Remove it, to score again with the same model"):
        resume(tmp_path / "run")
    path.unlink()
    assert resume(tmp_path / "run").finished


@pytest.mark.optimizer
@pytest.mark.proof
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
@pytest.mark.proof
def test_adapters_are_held_against_the_model_without_them(base, tmp_path):
    cfg = settings(base, tmp_path / "lora", adapters="lora", lora=LoraConfig(rank=4, alpha=8))
    start("preference", cfg, PreferenceOptions())
    found = records(tmp_path / "lora")
    np.testing.assert_allclose(found[0]["loss"], np.log(2), rtol=1e-5)
    assert found[-1]["loss"] < 0.69
    assert (tmp_path / "lora" / "model" / "model.safetensors").stat().st_size > 10_000  # merged


@pytest.mark.optimizer
@pytest.mark.proof
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
@pytest.mark.proof
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


proof = pytest.mark.proof  # each is a run of its own
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
@pytest.mark.parametrize("name", ["kto", *(pytest.param(n, marks=proof) for n in KINDS if n != "kto")])
@pytest.mark.slow
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
@pytest.mark.proof
def test_d2o_takes_as_many_samples_as_it_is_told(base, tmp_path):
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
@pytest.mark.proof
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
@pytest.mark.parametrize(
    "given",
    [UNLEARN[0], *(pytest.param(c, marks=proof) for c in UNLEARN[1:])],
    ids=lambda c: f"{c.forget}, {c.retain}",
)
@pytest.mark.proof
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


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.errors
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(objective="dop"), "found 'dop'; expected one of .*'dpo' meant"),
        (dict(mix=0.0), "expected a share above 0"),
        (dict(mix_every=0), "at least 1 step"),
    ],
)
def test_options_that_mean_nothing_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        PreferenceOptions(**given)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(objective="simpo", reference="frozen"), "which reads none; expected auto or none"),
        (dict(mix=0.5), "mix=0.5 every 512 steps with reference='frozen', which stays as it is"),
        (dict(objective="tr-dpo", reference="frozen", mix_every=8), "every 8 steps with reference='frozen'"),
        (dict(reference="none"), "which reads one; expected auto, frozen"),
        (dict(objective="asft", reference="precomputed"), "reads the reference at every token"),
        (dict(objective="ld-dpo", reference="columns"), "reads the reference at every token"),
        (dict(objective="unlearn", reference="columns"), "whose rows have no column for it; expected auto, frozen"),
        (dict(reference="frozen", objective="unlearn", unlearn=UnlearnConfig(forget="ga")), "which reads none"),
    ],
)
def test_a_reference_that_does_not_go_with_its_objective_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        preference.trainable_parts(CFG, PreferenceOptions(**given), None)


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
    with pytest.raises(ValueError, match="1 prompt in 2 rows for kto; expected at least 2, to mismatch answers"):
        preference.prepare([{"prompt": "p", "completion": c} for c in "ab"], PreferenceOptions(objective="kto"))


def _origin(base):
    from jaxaroo.train.recipe import Origin

    return Origin(CFG, byte_tokenizer(), base / "model")
