"""Every kind that trains beside a target: it learns, the target stays, it resumes to the bit, and it serves."""

import json

import jax
import numpy as np
import pytest

from jaxaroo.infer.engine import Engine
from jaxaroo.infer.sampling import Sampling
from jaxaroo.infer.speculative.load import load_speculation
from jaxaroo.infer.speculative.settings import SpeculationConfig
from jaxaroo.models import hf
from jaxaroo.models.decoder import DecoderConfig, Model, init_params
from jaxaroo.models.lora import LoraConfig
from jaxaroo.models.tokenizer import byte_tokenizer
from jaxaroo.train.checkpoint import CheckpointConfig
from jaxaroo.train.data.pipeline import BatchConfig
from jaxaroo.train.metrics import read_records
from jaxaroo.train.optimizer import OptimizerConfig
from jaxaroo.train.recipe import RECIPES, DrafterOptions, EarlyExitOptions, Origin
from jaxaroo.train.run import RunConfig, read_run, resume, start

KINDS = {
    "eagle": ("drafter", DrafterOptions(kind="eagle")),
    "jakiro": ("drafter", DrafterOptions(kind="jakiro", experts_dim=24)),
    "jakiro-mixture": ("drafter", DrafterOptions(kind="jakiro-mixture")),
    "kangaroo": ("early-exit", EarlyExitOptions(exit_layer=1)),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("target"), byte_tokenizer()
    cfg = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        embed_dim=16,
        ffn_dim=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_positions=128,
        eos_ids=tokenizer.eos_ids,
    )
    hf.save(folder / "model", Model(cfg, init_params(cfg, jax.random.key(0))))
    tokenizer.save(folder / "model")
    rows = [{"prompt": f"say {i % 5}", "completion": f" {i % 5} {i % 5} {i % 5}"} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(target, out, **changes):
    base = dict(
        model=str(target / "model"),
        data=str(target / "rows.jsonl"),
        out=out,
        steps=6,
        batch=BatchConfig(size=8, max_length=32),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        checkpoint=CheckpointConfig(every=3),
    )
    return RunConfig(**(base | changes))


@pytest.mark.optimizer
@pytest.mark.parametrize(
    "name", [n if n in ("eagle", "kangaroo") else pytest.param(n, marks=pytest.mark.proof) for n in KINDS]
)
def test_trains_beside_its_target_resumes_to_the_bit_and_serves(target, tmp_path, name):
    kind, options = KINDS[name]
    before = (target / "model" / "model.safetensors").read_bytes()
    measured = []

    def evaluate(config, frozen, trained):
        measured.append(jax.tree.map(np.asarray, trained))
        return {"tau": 1.0}

    whole = tmp_path / "whole"
    assert start(kind, settings(target, whole, evaluate_every=3), options, evaluate=evaluate).finished
    assert (target / "model" / "model.safetensors").read_bytes() == before
    losses = [r["loss"] for r in read_records(whole / "metrics.jsonl")]
    assert np.mean(losses[-2:]) < losses[0]
    assert [r["step"] for r in read_records(whole / "evaluation.jsonl")] == [3, 6]
    assert len(measured) == 2
    assert read_run(whole)[2] == options

    left = tmp_path / "left"  # the same, stopped behind its first checkpoint and gone on with

    calls = []

    def stop_here(config, frozen, trained):
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        start(kind, settings(target, left, evaluate_every=1), options, evaluate=stop_here)
    assert [p.name for p in (left / "checkpoints").iterdir()] == ["3"]
    assert resume(left).finished
    written = [(d / "model" / "model.safetensors").read_bytes() for d in (whole, left)]
    assert written[0] == written[1]

    model = hf.load(target / "model")
    drafting = SpeculationConfig(drafter=str(whole / "model"), nodes=8, beam=3, levels=3, drafts=3)
    sampling = [Sampling(temperature=t, max_tokens=12, seed=1) for t in (0.0, 1.0)]
    answers = []
    for speculation in (None, load_speculation(drafting, model.config)):
        with Engine(model, byte_tokenizer(), speculation=speculation) as engine:
            answers.append([r.outputs[0].token_ids for r in engine.generate(["say 3", "say 4"], sampling)])
    assert answers[0] == answers[1]


@pytest.mark.errors
@pytest.mark.parametrize("name", ["eagle", "kangaroo"])
def test_adapters_beside_a_frozen_target_are_refused(target, name):
    kind, options = KINDS[name]
    config = hf.read_config(target / "model")
    origin = Origin(config, byte_tokenizer(), None)
    with pytest.raises(ValueError, match="beside a drafter"):
        RECIPES[kind].trainable(origin, options, LoraConfig())
