"""Oracle: the stages run by hand, each from the model of the one before; and a stop in the middle changes nothing."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxaroo.models import hf
from jaxaroo.models.decoder import DecoderConfig, Model, init_params
from jaxaroo.models.tokenizer import byte_tokenizer
from jaxaroo.train import curry, run
from jaxaroo.train.checkpoint import CheckpointConfig
from jaxaroo.train.curry import CurryOptions, run_curry
from jaxaroo.train.data.pipeline import BatchConfig
from jaxaroo.train.metrics import read_records
from jaxaroo.train.optimizer import OptimizerConfig
from jaxaroo.train.preference import PreferenceOptions
from jaxaroo.train.run import Outcome, RunConfig, read_examples, start

pytestmark = pytest.mark.optimizer
CFG = DecoderConfig(
    vocab_size=byte_tokenizer().vocab_size,
    embed_dim=16,
    ffn_dim=24,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=128,
    eos_ids=byte_tokenizer().eos_ids,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    hf.save(folder / "model", Model(CFG, jax.jit(init_params, static_argnums=0)(CFG, jax.random.key(0))))
    byte_tokenizer().save(folder / "model")
    rated = lambda i: [("aa", 9.0), ("zz", 1.0), ("ab", 5.0 if i % 2 else 9.0)]  # of every second prompt one pair only
    rows = [
        {"prompt": f"say {i}", "responses": [{"completion": c, "rating": r} for c, r in rated(i)]} for i in range(24)
    ]
    (folder / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(base, out):
    return RunConfig(
        model=str(base / "model"),
        data=str(base / "ranked.jsonl"),
        out=out,
        steps=3,
        log_every=1,
        batch=BatchConfig(size=8, max_length=32),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"),
        checkpoint=CheckpointConfig(every=2),
    )


def losses(folder):
    return [r["loss"] for r in read_records(folder / "metrics.jsonl")]


@pytest.mark.proof
def test_stages_are_runs_one_from_the_other_and_a_stop_changes_nothing(base, tmp_path, monkeypatch):
    cfg = settings(base, tmp_path / "whole")
    done, outcome = run_curry(cfg, CurryOptions())
    assert (done, outcome.finished) == (2, True)
    stages = [tmp_path / "whole" / f"stage-{i}" for i in (1, 2)]
    pairs = [[json.loads(line) for line in (s / "pairs.jsonl").read_text().splitlines()] for s in stages]
    assert [len(p) for p in pairs] == [24, 12]
    assert {(p["chosen"], p["rejected"]) for p in pairs[0]} == {("aa", "zz")}
    assert {(p["chosen"], p["rejected"]) for p in pairs[1]} == {("aa", "ab")}
    known = [json.loads(line) for line in (tmp_path / "whole" / "stages.jsonl").read_text().splitlines()]
    assert known == [{"stage": 1, "pairs": 24, "pair_gap": 8.0}, {"stage": 2, "pairs": 12, "pair_gap": 4.0}]
    for stage in stages:
        np.testing.assert_allclose(losses(stage / "run")[0], np.log(2), rtol=1e-5)  # the reference is new
    hand = dataclasses.replace(cfg, model=str(stages[0] / "run" / "model"), data=str(stages[1] / "pairs.jsonl"))
    start("preference", dataclasses.replace(hand, out=tmp_path / "hand"), PreferenceOptions())
    assert losses(tmp_path / "hand") == losses(stages[1] / "run")
    final = (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    assert final == (stages[1] / "run" / "model" / "model.safetensors").read_bytes()

    fit, calls = run.fit, []

    def broken(*args, **more):
        calls.append(0)
        if len(calls) == 2:  # at the beginning of the second stage
            raise KeyboardInterrupt
        return fit(*args, **more)

    monkeypatch.setattr(run, "fit", broken)
    left = dataclasses.replace(cfg, out=tmp_path / "left")
    with pytest.raises(KeyboardInterrupt):
        run_curry(left, CurryOptions())
    assert not (tmp_path / "left" / "model").exists()
    assert run_curry(left, CurryOptions())[0] == 2
    assert (tmp_path / "left" / "model" / "model.safetensors").read_bytes() == final
    with pytest.raises(ValueError, match="was begun with other settings"):
        run_curry(left, CurryOptions(beta=0.2))


def test_a_stage_reads_its_own_pairs_whatever_split_the_rows_were_of(base, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        (tmp_path / "data" / f"{name}.jsonl").write_bytes((base / "ranked.jsonl").read_bytes())
    seen = []

    def learn(kind, cfg, options, *, progress):
        seen.append(len(read_examples(cfg, "pairs", progress)))
        (cfg.out / "model").mkdir(parents=True)
        return Outcome(cfg.steps, True, None)

    monkeypatch.setattr(curry, "learn", learn)
    cfg = dataclasses.replace(settings(base, tmp_path / "out"), data=str(tmp_path / "data"), split="train")
    done, outcome = run_curry(cfg, CurryOptions())
    assert (done, outcome.finished, seen) == (2, True, [24, 12])


@pytest.mark.errors
def test_what_cannot_be_staged_is_refused(base, tmp_path):
    cfg = settings(base, tmp_path / "out")
    with pytest.raises(ValueError, match="has 3 pairs; expected responses of different ratings"):
        run_curry(cfg, CurryOptions(stages=3))
    with pytest.raises(ValueError, match="stages: found 0"):
        CurryOptions(stages=0)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other").write_text("")
    with pytest.raises(FileExistsError, match="holds other files"):
        run_curry(cfg, CurryOptions())
