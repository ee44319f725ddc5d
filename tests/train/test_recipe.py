"""Every kind that trains beside a target: it learns, the target stays, it resumes to the bit, and it serves."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxaroo.infer.engine import Engine
from jaxaroo.infer.sampling import Sampling
from jaxaroo.infer.speculative.load import load_speculation
from jaxaroo.infer.speculative.settings import SpeculationConfig
from jaxaroo.infer.step_scores import Solution, score_solutions
from jaxaroo.models import checkpoint, heads, hf, kangaroo, reward
from jaxaroo.models.decoder import DecoderConfig, Model, init_params
from jaxaroo.models.lora import LoraConfig
from jaxaroo.models.tokenizer import byte_tokenizer
from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.train import run
from jaxaroo.train.checkpoint import CheckpointConfig, DamagedCheckpointError
from jaxaroo.train.data.pipeline import BatchConfig
from jaxaroo.train.data.tokenise import Encoded
from jaxaroo.train.metrics import read_records
from jaxaroo.train.optimizer import OptimizerConfig
from jaxaroo.train.recipe import (
    RECIPES,
    AcceptanceOptions,
    DrafterOptions,
    EarlyExitOptions,
    JudgeOptions,
    Origin,
    RewardOptions,
    network_config,
)
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
    labelled = [row | {"label": i % 5 > 2} for i, row in enumerate(rows)]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    small = dataclasses.replace(cfg, embed_dim=8, num_layers=1)
    hf.save(folder / "small", Model(small, init_params(small, jax.random.key(1))))
    adapter = kangaroo.KangarooConfig(target=cfg, exit_layer=1)
    checkpoint.save(folder / "adapter", kangaroo.KIND, adapter, kangaroo.init_params(adapter, jax.random.key(2)))
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


def stop_at(number):
    """An evaluation that is interrupted when it is called for the `number`th time."""
    calls = []

    def stop(*args):
        calls.append(0)
        if len(calls) == number:
            raise KeyboardInterrupt
        return {}

    return stop


@pytest.mark.optimizer
@pytest.mark.parametrize("name", [n if n == "eagle" else pytest.param(n, marks=pytest.mark.proof) for n in KINDS])
@pytest.mark.slow
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

    with pytest.raises(KeyboardInterrupt):
        start(kind, settings(target, left, evaluate_every=1), options, evaluate=stop_at(5))
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


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def answers(target, speculation, temperatures=(0.0, 1.0)):
    sampling = [Sampling(temperature=t, max_tokens=12, seed=1) for t in temperatures]
    with Engine(hf.load(target / "model"), byte_tokenizer(), speculation=speculation, speculate="on") as engine:
        said = [r.outputs[0].token_ids for r in engine.generate(["say 3", "say 4"], sampling)]
        return said, engine.stats()


@pytest.mark.optimizer
@pytest.mark.parametrize("name", ["small", "adapter"])
@pytest.mark.proof
def test_an_acceptance_head_trains_beside_two_frozen_networks_resumes_and_serves(target, tmp_path, name):
    options = AcceptanceOptions(drafter=str(target / name), blocks=1)
    before = [files(target / folder) for folder in ("model", name)]
    whole, left, seen = tmp_path / "whole", tmp_path / "left", []

    def evaluate(config, frozen, trained):
        seen.append(jax.tree.map(np.shape, frozen))
        return {}

    assert run.start("acceptance", settings(target, whole, evaluate_every=6), options, evaluate=evaluate).finished
    assert [files(target / folder) for folder in ("model", name)] == before
    [frozen] = seen
    assert frozen["target"]["embed"] == (byte_tokenizer().vocab_size, 16)
    assert ("embed" in frozen["drafter"]) == (name == "small")
    metrics = read_records(whole / "metrics.jsonl")
    for line in metrics:  # of drafts of tokens that count, 85 % but for the last of each row
        assert 0.5 < line["drawn"] < 1
        assert 0 < line["acceptance"] <= line["drawn"]
        assert line["weight"] == pytest.approx(6 * (line["drawn"] - line["acceptance"]) + line["acceptance"], rel=1e-4)
    assert len({line["acceptance"] for line in metrics}) == 6  # drawn anew in each step

    def stop_here(config, frozen, trained):
        seen.append(None)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        run.start("acceptance", settings(target, left, evaluate_every=1), options, evaluate=stop_here)
    assert [p.name for p in (left / "checkpoints").iterdir()] == ["3"]
    saved = sum(f.stat().st_size for f in (left / "checkpoints").rglob("*") if f.is_file())
    assert saved < sum(f.stat().st_size for f in (target / "model").iterdir())  # neither network is in it
    assert resume(left).finished
    assert files(left / "model") == files(whole / "model")
    assert records_of(left) == records_of(whole)

    drafting = SpeculationConfig(
        drafter=str(target / name), stop_rule="head", stop_head=str(whole / "model"), stop_threshold=0.6, drafts=5
    )
    config = hf.read_config(target / "model")
    said, stats = answers(target, load_speculation(drafting, config))
    assert said == answers(target, None)[0]
    assert 2 * stats["steps"] <= stats["drafted_tokens"] < 5 * stats["steps"]


def records_of(out):
    """Metrics without what a clock says."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_records(out / "metrics.jsonl")]


@pytest.mark.optimizer
@pytest.mark.slow
def test_a_head_knows_its_drafter_again(target, tmp_path, monkeypatch):
    """The frozen networks are not saved, but their fingerprints are."""
    other = tmp_path / "drafter"
    config = hf.read_config(target / "small")
    hf.save(other, Model(config, init_params(config, jax.random.key(1))))
    monkeypatch.chdir(tmp_path)
    options = AcceptanceOptions(drafter="drafter", blocks=1)
    assert run.start("acceptance", settings(target, tmp_path / "out", steps=1), options).finished
    assert read_run(tmp_path / "out")[2] == dataclasses.replace(options, drafter=str(other))  # from wherever it goes on
    hf.save(other, Model(config, init_params(config, jax.random.key(2))), overwrite=True)
    with pytest.raises(DamagedCheckpointError, match=r"bits of .*frozen.*drafter"):
        resume(tmp_path / "out")


@pytest.mark.optimizer
@pytest.mark.proof
def test_a_judge_trains_on_labels_and_what_it_passes_is_called_lossy(target, tmp_path):
    data, out = str(target / "labelled.jsonl"), tmp_path / "out"
    cfg = settings(target, out, data=data, steps=30, optimizer=OptimizerConfig(learning_rate=3e-2, warmup_steps=0))
    assert run.start("judge", cfg, JudgeOptions(negative_weight=2.0)).finished
    metrics = read_records(out / "metrics.jsonl")
    assert np.mean([r["loss"] for r in metrics[-5:]]) < 0.8 * metrics[0]["loss"]
    assert metrics[0]["loss"] == pytest.approx(
        np.log(2) * (1 + metrics[0]["bad_tokens"] / metrics[0]["tokens"]), rel=1e-4
    )
    assert all(0 < r["bad_tokens"] < r["tokens"] for r in metrics)
    assert np.mean([r["recall_of_bad"] for r in metrics[-5:]]) > 0.6
    base = SpeculationConfig(drafter=str(target / "small"), verifier="judge", judge=str(out / "model"))
    config = hf.read_config(target / "model")
    said = {}
    for threshold in (0.0, 1.0):  # all pass; none does, and the rule is its base
        spec = load_speculation(dataclasses.replace(base, judge_threshold=threshold), config)
        assert not spec.verifier.lossless
        said[threshold], _ = answers(target, spec)
    assert said[1.0] == answers(target, None)[0] != said[0.0]


@pytest.mark.parametrize("labels", [None, [0, 1, 1], [0, 1, 0]])
def test_a_run_is_known_again_by_its_labels_too(target, tmp_path, labels):
    cfg, seen = settings(target, tmp_path), []
    for given in (labels, [0, 1, 0.5]):
        given = None if given is None else np.float32(given)
        encode = lambda example, given=given: Encoded(np.arange(3), np.array([False, True, True]), labels=given)
        seen.append(run._mark_of(cfg, [{}, {}], encode))
    assert seen[0] != seen[1]
    if labels is None:  # as it was before there were any: runs go on
        rows = [[[0, 1, 2], [False, True, True], None]] * 2
        known = dataclasses.asdict(cfg.batch) | {"micro_batches": None}
        text = json.dumps([cfg.seed, known, 2, rows])
        assert seen[0] == run.hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(("name", "layer", "width"), [("small", None, 8), ("adapter", 1, 16)])
def test_a_head_belongs_to_the_network_whose_states_it_reads(target, name, layer, width):
    config = hf.read_config(target / "model")
    cfg = network_config("acceptance", config, AcceptanceOptions(drafter=str(target / name), blocks=2))
    assert (cfg.exit_layer, cfg.target.embed_dim, cfg.blocks) == (layer, width, 2)
    assert isinstance(network_config("judge", config, JudgeOptions()), heads.JudgeConfig)


@pytest.mark.errors
@pytest.mark.parametrize("name", ["eagle", "kangaroo", "acceptance", "judge"])
def test_adapters_beside_a_frozen_target_are_refused(target, name):
    kind, options = (KINDS | {"acceptance": ("acceptance", None), "judge": ("judge", None)})[name]
    config = hf.read_config(target / "model")
    origin = Origin(config, byte_tokenizer(), None)
    with pytest.raises(ValueError, match="beside a drafter"):
        RECIPES[kind].trainable(origin, options, LoraConfig())


@pytest.mark.errors
def test_what_cannot_draft_has_no_acceptance_head(target, tmp_path):
    config = hf.read_config(target / "model")
    ask = lambda folder: network_config("acceptance", config, AcceptanceOptions(drafter=folder and str(folder)))
    with pytest.raises(ValueError, match="found no --drafter; expected the folder"):
        ask(None)
    judge = heads.JudgeConfig(target=config)
    checkpoint.save(tmp_path / "judge", heads.JUDGE, judge, heads.init_params(judge, jax.random.key(0)))
    with pytest.raises(ValueError, match="holds 'jaxaroo-judge'; expected a smaller model or a Kangaroo adapter"):
        ask(tmp_path / "judge")
    narrow = dataclasses.replace(config, vocab_size=7)
    hf.save(tmp_path / "other", Model(narrow, init_params(narrow, jax.random.key(0))))
    with pytest.raises(ValueError, match=f"a vocabulary of 7; expected {config.vocab_size}"):
        ask(tmp_path / "other")
    deeper = dataclasses.replace(config, num_layers=3)
    with pytest.raises(ValueError, match="num_layers"):
        network_config("acceptance", deeper, AcceptanceOptions(drafter=str(target / "adapter")))
    with pytest.raises(ValueError, match="has rows of layouts sft and steps; expected a file of layout unpaired"):
        run.start("judge", settings(target, tmp_path / "out", data="builtin:arithmetic"))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ reward models
@pytest.fixture(scope="module")
def solutions(target):
    """Sums, half of them wrong in one step; the marker shows which, so that it can be learned at once."""
    rows = []
    for i in range(40):
        steps = [f"{i % 5}{'=' if i % 2 or k else '#'}" for k in range(2)]
        rows.append({"prompt": "q ", "steps": steps, "labels": [int(i % 2), int(i % 2)], "outcome": i % 2})
    (target / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


SEPARATED = dict(separator="<|sep|>", between=" ")


@pytest.mark.optimizer
@pytest.mark.proof
def test_a_reward_model_trains_scores_and_goes_on_from_outcomes(target, solutions, tmp_path):
    options = RewardOptions(**SEPARATED, inner=8)
    data = dict(data=str(target / "steps.jsonl"), steps=12)
    assert start("orm", settings(target, tmp_path / "orm", **data), options).finished
    model = str(tmp_path / "orm" / "model")
    assert start("prm", settings(target, tmp_path / "prm", **data | {"model": model}), options).finished
    losses = {k: [r["loss"] for r in read_records(tmp_path / k / "metrics.jsonl")] for k in ("orm", "prm")}
    assert losses["prm"][0] < losses["orm"][0]  # it begins where the outcomes left it, head included
    found = reward.load(tmp_path / "prm" / "model")
    scores = score_solutions(found, byte_tokenizer(), [Solution(r["prompt"], r["steps"]) for r in solutions])
    good = np.array([s for s, r in zip(scores, solutions, strict=True) if r["outcome"]])
    bad = np.array([s for s, r in zip(scores, solutions, strict=True) if not r["outcome"]])
    assert good[:, 1].mean() > bad[:, 1].mean() + 0.1
    assert hf.load(tmp_path / "prm" / "model").config.vocab_size == byte_tokenizer().vocab_size
    with pytest.raises(ValueError, match="is a reward model whose inner are not those asked for"):
        start("prm", settings(target, tmp_path / "no", **data | {"model": model}), RewardOptions(**SEPARATED))
    assert not (tmp_path / "no").exists()


@pytest.mark.optimizer
@pytest.mark.proof
def test_a_head_alone_learns_from_surprisal_and_leaves_the_decoder_as_it_is(target, solutions, tmp_path):
    options = RewardOptions(separator="\n", between="", surprisal=True, train="head")
    data = dict(data=str(target / "steps.jsonl"), steps=6)
    assert start("orm", settings(target, tmp_path / "orm", **data), options).finished
    again = data | {"model": str(tmp_path / "orm" / "model")}
    assert start("prm", settings(target, tmp_path / "prm", **again), options).finished
    kept = [hf.load(folder / "model").params for folder in (target, tmp_path / "orm", tmp_path / "prm")]
    for params in kept[1:]:
        jax.tree.map(np.testing.assert_array_equal, params, kept[0])
    outcome, steps = (reward.load(tmp_path / kind / "model") for kind in ("orm", "prm"))
    assert steps.config.surprisal
    assert steps.params["head"]["last"]["weight"].shape == (1, 16 + 2)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), outcome.params["head"], steps.params["head"])
    assert 0 < moved["last"]["weight"] < 0.1  # it went on from there

    left = tmp_path / "left"  # the same, stopped behind its first checkpoint and gone on with
    with pytest.raises(KeyboardInterrupt):
        start("orm", settings(target, left, evaluate_every=1, **data), options, evaluate=stop_at(5))
    assert resume(left).finished
    assert files(left / "model" / "reward") == files(tmp_path / "orm" / "model" / "reward")


EVERY = {
    "sft": {},
    "drafter": {"experts_dim": 24, "kind": "jakiro"},
    "early-exit": {"exit_layer": 1},
    "acceptance": {"drafter": "small", "blocks": 1},
    "judge": {},
    "prm": SEPARATED | {"inner": 8},
    "orm": SEPARATED,
    "value": SEPARATED,
    "qat": {"bits": "8,4"},
    "preference": {"objective": "dpo"},
}
FILES = {"judge": "labelled", "value": "labelled", "prm": "steps", "orm": "steps", "preference": "pairs"}


@pytest.mark.optimizer
@pytest.mark.slow
@pytest.mark.parametrize("kind", [k if k == "sft" else pytest.param(k, marks=pytest.mark.proof) for k in EVERY])
def test_a_mesh_of_eight_along_all_axes_gives_what_one_device_gives(target, solutions, tmp_path, monkeypatch, kind):
    """Parts of rows, weights, heads and sequences: losses, gradients, and what an update made of them."""
    pairs = [{"prompt": f"say {i % 5}", "chosen": f" {i % 5}" * 3, "rejected": " 9" * (1 + i % 3)} for i in range(40)]
    (target / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    given = EVERY[kind] | ({"drafter": str(target / "small")} if kind == "acceptance" else {})
    options = dataclasses.replace(RECIPES[kind].options(), **given)
    data = str(target / f"{FILES.get(kind, 'rows')}.jsonl")
    meshes = {"one": (MeshConfig(), 1), "eight": (MeshConfig(fsdp=2, tensor=2, sequence=2), 8)}
    found = {}
    for name, (mesh, devices) in meshes.items():
        monkeypatch.setattr(run, "make_mesh", lambda cfg, devices=devices: make_mesh(cfg, jax.devices()[:devices]))
        rows = BatchConfig(size=8, max_length=32, micro_batches=2)
        cfg = settings(target, tmp_path / name, data=data, steps=2, batch=rows, mesh=mesh)
        assert start(kind, cfg, options).finished
        found[name] = read_records(tmp_path / name / "metrics.jsonl")
    for one, eight in zip(found["one"], found["eight"], strict=True):
        assert one["grad_norm"] > 0
        for name in one.keys() - {"seconds"}:
            assert eight[name] == pytest.approx(one[name], rel=5e-4, abs=1e-6), name


@pytest.mark.optimizer
@pytest.mark.proof
def test_a_token_pair_is_trained_in_the_decoder_itself(target, solutions, tmp_path):
    options = RewardOptions(**SEPARATED, head="token-pair", good="+", bad="-", negative_share=0.75)
    out = tmp_path / "pair"
    assert start("prm", settings(target, out, data=str(target / "steps.jsonl")), options).finished
    found = reward.load(out / "model")
    assert (found.config.kind, found.config.good, found.params["head"]) == ("token_pair", ord("+"), {})
    line = read_records(out / "metrics.jsonl")[-1]
    assert 0 <= line["good"] <= 1
    assert 0 < line["brier"] < 1
    assert read_run(out)[2] == options


@pytest.mark.optimizer
@pytest.mark.slow
def test_a_value_model_learns_from_every_token(target, tmp_path):
    out = tmp_path / "value"
    run_ = settings(target, out, data=str(target / "labelled.jsonl"), steps=12)
    assert start("value", run_, RewardOptions(**SEPARATED)).finished
    losses = [r["squared_error"] for r in read_records(out / "metrics.jsonl")]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_wrong_solutions_weigh_what_is_asked_for(caplog):
    rows = [{"labels": [1, 0]}, {"labels": [1, 1]}, {"labels": [1, None], "weight": 2.0}, {"labels": [None, 1]}]
    with caplog.at_level("INFO"):
        weighed = RECIPES["prm"].prepare(rows, RewardOptions(negative_share=0.5))
    found = [weighed[i]["weight"] for i in range(4)]
    assert found == pytest.approx([2.5, 0.625, 1.25, 0.625])  # a fifth of all weight was wrong, and half of it is
    assert len(weighed) == 4
    assert "25.0 % of 4 solutions hold a wrong step; they now weigh 50.0 %" in caplog.text
    assert RECIPES["prm"].prepare(rows, RewardOptions()) is rows
    with pytest.raises(ValueError, match="0% of the solutions hold a wrong step"):
        RECIPES["prm"].prepare(rows[1:], RewardOptions(negative_share=0.5))
    with pytest.raises(ValueError, match="0% of the solutions hold a wrong step"):  # by weight, which its own is not
        RECIPES["prm"].prepare([rows[0] | {"weight": 0.0}, *rows[1:]], RewardOptions(negative_share=0.5))


@pytest.mark.errors
def test_steps_that_hold_what_separates_them_are_not_separated_again(target, solutions):
    origin = Origin(hf.read_config(target / "model"), byte_tokenizer(), None)
    encode = lambda between: RECIPES["prm"].encoder(origin, RewardOptions(separator="<|sep|>", between=between))
    row = solutions[0] | {"joiner": ""}
    assert len(encode("")(row).ids) == len(encode("")(solutions[0]).ids)
    with pytest.raises(ValueError, match=r"joined by '', and between='\\n'"):
        encode("\n")(row)


@pytest.mark.errors
def test_reward_models_that_cannot_be_are_refused(target, solutions, tmp_path):
    run_ = lambda **changes: settings(target, tmp_path / "x", **{"data": str(target / "steps.jsonl"), **changes})
    for kind, cfg, options, message in (
        ("prm", run_(), RewardOptions(separator="two tokens"), "expected one token"),
        ("prm", run_(adapters="lora"), RewardOptions(), "all of it is trained"),
        ("prm", run_(data=str(target / "rows.jsonl")), RewardOptions(), "rows.jsonl:1"),
        ("value", run_(data="builtin:arithmetic"), RewardOptions(), "expected a file of layout unpaired"),
        (
            "value",
            run_(data=str(target / "labelled.jsonl")),
            RewardOptions(**SEPARATED, surprisal=True),
            "found --surprisal",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            start(kind, cfg, options)
    with pytest.raises(ValueError, match="negative_share=1"):
        RewardOptions(negative_share=1.0)
    with pytest.raises(ValueError, match="expected a value head"):
        RewardOptions(head="token-pair", train="head")
    assert not (tmp_path / "x").exists()
