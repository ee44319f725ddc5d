"""At the first step the model is its own reference, or the run is refused. Oracle: loops over the model's logits."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.models import hf
from jaxaroo.models.decoder import DecoderConfig, Model, init_params, logits
from jaxaroo.models.tokenizer import byte_tokenizer
from jaxaroo.sharding.rules import REPLICATED
from jaxaroo.train import preference, references
from jaxaroo.train.checkpoint import CheckpointConfig
from jaxaroo.train.data.pipeline import BatchConfig, Batches
from jaxaroo.train.metrics import read_records
from jaxaroo.train.optimizer import OptimizerConfig
from jaxaroo.train.preference import ROUNDING, PreferenceOptions, check_start, make_loss
from jaxaroo.train.run import RunConfig, resume, start

TOKENS = byte_tokenizer()
CFG = DecoderConfig(
    vocab_size=TOKENS.vocab_size, embed_dim=16, ffn_dim=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
    max_positions=128, eos_ids=TOKENS.eos_ids,
)  # fmt: skip
PARAMS = jax.jit(init_params, static_argnums=0)(CFG, jax.random.key(0))
ROWS = [{"prompt": f"say {i}", "chosen": "aa" * (1 + i % 3), "rejected": "z" * (1 + i % 2)} for i in range(8)]


def gap_of(options, params, rows, dtype="float32"):
    """What the loss reports of a batch that holds each of these rows once."""
    cfg = BatchConfig(size=1, max_length=48, packing=False)
    given = dict(seed=0, parts=2, more=preference.number_names(options), fixed_length=True)
    each = [next(Batches([row], preference.encoder(TOKENS, options), cfg, **given)) for row in rows]
    batch = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *each)
    number = preference.counts(options)(batch)
    assert int(number["example"]) == len(rows)
    loss = make_loss(dataclasses.replace(CFG, dtype=dtype), options, rules=REPLICATED, remat="none")
    found = loss(params, jax.tree.map(lambda x: jnp.asarray(x[0]), batch), None)[1]["reference_gap"]
    return float(jnp.sum(found.value * found.weight)) / int(number[found.unit])


def sums(params):
    """Of both answers of every row: the log-probability, and how many tokens it is of."""
    found, z = [], jax.jit(lambda ids: jax.nn.log_softmax(logits(Model(CFG, params), ids[None])[0]))
    for row in ROWS:
        for e in preference.encoder(TOKENS, PreferenceOptions())(row):
            logp = np.asarray(z(np.pad(e.ids, (0, 24 - len(e.ids)))), np.float64)
            found.append((logp[np.arange(len(e.ids) - 1), e.ids[1:]][e.scored[1:]].sum(), e.scored.sum()))
    return np.array(found).reshape(len(ROWS), 2, 2)


def test_the_gap_is_a_mean_over_sequences_of_nats_a_token():
    other = jax.tree.map(lambda w: 1.05 * w, PARAMS)
    options = PreferenceOptions()
    assert gap_of(options, {"policy": PARAMS, "reference": jax.tree.map(jnp.copy, PARAMS)}, ROWS) == 0
    got = gap_of(options, {"policy": PARAMS, "reference": other}, ROWS)
    (one, n), (two, _) = np.moveaxis(sums(PARAMS), 2, 0), np.moveaxis(sums(other), 2, 0)
    wanted = np.abs(one - two) / n
    assert wanted.min() > 2 * ROUNDING["float32"]  # each counts
    np.testing.assert_allclose(got, wanted.mean(), rtol=1e-3)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-3), ("bfloat16", 2e-2)])
def test_what_a_row_brings_may_be_off_by_rounding_and_no_more(dtype, most):
    logp, n = np.moveaxis(sums(PARAMS), 2, 0)
    off = np.zeros((len(ROWS), 2))
    off[::2, 0], off[1, 1] = 0.8 * most, -0.8 * most
    for fault in (0.0, 1.3 * most, -1.3 * most):
        off[3, 1] = fault  # one sequence of sixteen
        columns = (logp + off * n).tolist()
        rows = [r | {"ref_chosen_logps": c, "ref_rejected_logps": d} for r, (c, d) in zip(ROWS, columns, strict=True)]
        got = gap_of(PreferenceOptions(reference="columns"), {"policy": PARAMS}, rows, dtype)
        np.testing.assert_allclose(got, abs(fault) / off.size, rtol=0.02 if dtype == "float32" else 0.2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    hf.save(folder / "model", Model(CFG, PARAMS))
    TOKENS.save(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.mark.optimizer
@pytest.mark.slow
def test_a_run_against_another_model_is_refused_before_anything_is_lost(base, tmp_path, monkeypatch):
    """Its reference is written down off by one nat a token; without that file it goes on and scores again."""
    score = references._score

    def off(sequences, *args):
        return score(sequences, *args) - np.array([s.scored.sum() for s in sequences], np.float32)

    out = tmp_path / "run"
    cfg = RunConfig(
        model=str(base / "model"), data=str(base / "pairs.jsonl"), out=out, steps=3, log_every=1,
        batch=BatchConfig(size=8, max_length=48), checkpoint=CheckpointConfig(every=1),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"),
    )  # fmt: skip
    message = r"are 1 nats a token apart \(reference='precomputed'.* expected 0.001 in float32 .* Remove the run's"
    with monkeypatch.context() as patch:
        patch.setattr(references, "_score", off)
        with pytest.raises(ValueError, match=message):
            start("preference", cfg, PreferenceOptions(reference="precomputed"))
    assert not read_records(out / "metrics.jsonl")
    assert not [*(out / "checkpoints").glob("[0-9]*")]
    (out / "reference.npz").unlink()
    assert resume(out).finished
    gaps = [record["reference_gap"] for record in read_records(out / "metrics.jsonl")]
    assert gaps[0] == 0 < min(gaps[1:])


@pytest.mark.errors
@pytest.mark.parametrize(
    ("kind", "dtype", "message"),
    [
        ("auto", "float32", r"0.123 nats a token apart \(reference='frozen'.* expected 0.001 in float32.*Try one dev"),
        ("mixed", "bfloat16", r"reference='mixed'.* expected 0.02 in bfloat16 .* the model as it began.*--dtype"),
        ("precomputed", "float32", r"Remove the run's reference.npz and resume it, .* or take --reference frozen"),
    ],
)
def test_a_reference_that_is_another_model_is_refused(kind, dtype, message):
    options = PreferenceOptions(reference=kind)
    check_start(options, dtype, {"loss": jnp.float32(0.5), "reference_gap": jnp.float32(0)})
    with pytest.raises(ValueError, match=message):
        check_start(options, dtype, {"reference_gap": jnp.float32(0.12345)})


def test_columns_may_be_of_another_model_which_is_told(caplog):
    options = PreferenceOptions(reference="columns")
    check_start(options, "float32", {"reference_gap": jnp.float32(0)})
    check_start(PreferenceOptions(objective="simpo"), "float32", {"loss": jnp.float32(0.5)})
    assert not caplog.records
    check_start(options, "float32", {"reference_gap": jnp.float32(0.12345)})
    assert "0.123 nats a token apart: the columns are of another model" in caplog.text
