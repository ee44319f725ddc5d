"""A loop around a sampler made of a table: what it learns, what it must not change, what it says, where it goes on."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.models import hf
from jaxaroo.models.decoder import DecoderConfig, Model, init_params, logits
from jaxaroo.models.tokenizer import byte_tokenizer
from jaxaroo.sharding.mesh import MeshConfig, make_mesh
from jaxaroo.train import rl
from jaxaroo.train.advantages.constrained import ConstrainedConfig
from jaxaroo.train.algorithms import RlOptions
from jaxaroo.train.checkpoint import CheckpointConfig
from jaxaroo.train.loop import NotFiniteError
from jaxaroo.train.metrics import read_records
from jaxaroo.train.optimizer import OptimizerConfig
from jaxaroo.train.rl import Online, RlConfig, read_origin, resolve, run_rl
from jaxaroo.train.rollouts import Sampled, problem_indices

pytestmark = pytest.mark.optimizer
TOKENIZER = byte_tokenizer()
CFG = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size,
    embed_dim=16,
    ffn_dim=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=64,
    eos_ids=TOKENIZER.eos_ids,
)
END = TOKENIZER.eos_ids[0]
TABLE = [[65, END], [66, 67, END], [68, END], [65, 69, 70]]  # what is answered to every problem; the last one is cut
PROBLEMS = [{"id": str(i), "prompt": [10 + i, 20], "right": 65 if i % 2 else 68} for i in range(4)]
SIZES = dict(groups=2, samples=4, max_new_tokens=4, max_length=16, dtype="float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl") / "model"
    hf.save(folder, Model(CFG, init_params(CFG, jax.random.key(0))))
    TOKENIZER.save(folder)
    return folder


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Of the eight that there are: programs for eight take long to compile."""
    monkeypatch.setattr(rl, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))


def settings(model, out, **changes):
    rate = OptimizerConfig(learning_rate=5e-3, schedule="constant")
    given = dict(model=str(model), data="table", out=out, steps=2, optimizer=rate) | SIZES
    return RlConfig(**(given | changes))


def from_table(policy, problems, step, first=0):
    return [[Sampled(p["prompt"], ids, ids[-1] == END) for ids in TABLE] for p in problems]


def right(problems, answers):
    """1 for an answer that begins with the right token, 0 for the others."""
    return [[float(a.answer[0] == p["right"]) for a in each] for p, each in zip(problems, answers, strict=True)]


def chances(policy):
    """How likely the right first token is, of each problem."""
    found = np.asarray(jax.nn.softmax(read_logits(policy.params, np.array([p["prompt"] for p in PROBLEMS], np.int32))))
    each = {f"right_{i}": float(found[i, p["right"]]) for i, p in enumerate(PROBLEMS)}
    return each | {f"other_{i}": float(found[i, 66]) for i in range(len(PROBLEMS))}


@jax.jit
def read_logits(params, ids):
    return logits(Model(CFG, params), ids)[:, -1]


def online(**changes):
    given = dict(size=len(PROBLEMS), problem=lambda i: PROBLEMS[i], sample=from_table, rewards=[right], measure=chances)
    return Online(**(given | changes))


def records(out):
    """Metrics without what a clock says."""
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in read_records(out / "metrics.jsonl")]


def weights(out):
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["grpo", "ppo"])
@pytest.mark.slow
def test_rewarded_answers_become_likelier(model, tmp_path, name):
    """The table never changes; the policy does."""
    rate = OptimizerConfig(learning_rate=1e-2, schedule="constant")
    cfg = settings(model, tmp_path / "out", steps=12, evaluate_every=12, optimizer=rate)
    outcome = run_rl(cfg, RlOptions(algorithm=name), online())
    assert outcome == (12, True, None)
    first, last = read_records(tmp_path / "out" / "evaluation.jsonl")
    assert (first["step"], last["step"]) == (0, 12)
    for i in range(4):
        assert last[f"right_{i}"] > 2 * first[f"right_{i}"]
        if name != "ppo":  # whose first values are 0, so that to have been sampled is no fault
            assert last[f"other_{i}"] < first[f"other_{i}"]
    told = records(tmp_path / "out")
    assert [r["step"] for r in told] == list(range(1, 13))
    named = {"reward", "reward_std", "frac_zero_std", "completion/mean_len", "completion/truncated_frac", "clip/low"}
    named |= {"clip/high", "ratio/max", "entropy", "adv_abs_mean", "grad_norm", "loss", "learning_rate", "tokens"}
    named |= {"value_loss", "explained_variance"} if name == "ppo" else set()
    assert not named - {*told[0]}
    assert (told[0]["completion/mean_len"], told[0]["completion/truncated_frac"]) == (2.5, 0.25)
    share = {65: 0.5, 68: 0.25}  # two of the four answers begin with 65
    for r in told:
        asked = [PROBLEMS[i]["right"] for i in problem_indices(0, r["step"] - 1, 2, 4)]
        np.testing.assert_allclose(r["reward"], np.mean([share[token] for token in asked]))
    assert (told[0]["tokens"], told[0]["sequences"], told[0]["ratio/max"]) == (20, 8, 1)
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"rl.yaml", "model", "reward.png", "checkpoints"}


@pytest.mark.slow
def test_groups_of_equal_rewards_change_nothing(model, tmp_path):
    flat = lambda problems, answers: [[0.3] * 4] * len(problems)
    run_rl(settings(model, tmp_path / "out"), RlOptions(), online(rewards=[flat]))
    assert weights(tmp_path / "out") == (model / "model.safetensors").read_bytes()
    assert [(r["frac_zero_std"], r["grad_norm"], r["adv_abs_mean"]) for r in records(tmp_path / "out")] == [
        (1, 0, 0)
    ] * 2


@pytest.mark.slow
def test_an_answer_without_a_reward_is_as_if_it_were_not_there(model, tmp_path):
    """Whatever it says."""
    missing = lambda value: lambda problems, answers: [[1.0, value, 0.0, 0.5] for _ in problems]

    def other(policy, problems, step, first):
        return [
            [a._replace(answer=[90, 91, 92, 93]) if i == 1 else a for i, a in enumerate(each)]
            for each in from_table(policy, problems, step)
        ]

    for name, reward, sample in (("a", missing(None), from_table), ("b", missing(float("nan")), other)):
        run_rl(settings(model, tmp_path / name), RlOptions(), online(rewards=[reward], sample=sample))
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != (model / "model.safetensors").read_bytes()
    a = records(tmp_path / "a")[0]
    assert (a["frac_rewarded"], a["sequences"], a["tokens"], a["reward"]) == (0.75, 6, 14, 0.5)
    nothing = lambda problems, answers: [[None] * 4 for _ in problems]
    run_rl(settings(model, tmp_path / "c", steps=1), RlOptions(), online(rewards=[nothing]))
    assert weights(tmp_path / "c") == (model / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_further_updates_see_what_the_sampler_was(model, tmp_path):
    """The ratio is 1 before the first update of a step alone, and the clip stops what has moved too far."""
    cfg = settings(
        model, tmp_path / "out", steps=2, epochs=3, optimizer=OptimizerConfig(learning_rate=2e-2, schedule="constant")
    )
    run_rl(cfg, RlOptions(kl_weight=0.05), online())
    told = records(tmp_path / "out")
    assert all(r["ratio/max"] > 1.05 for r in told)
    assert max(r["clip/high"] + r["clip/low"] for r in told) > 0
    assert told[1]["kl/k3_corrected"] > told[0]["kl/k3_corrected"] > 0
    assert all(r["kl_penalty"] != 0 for r in told)


@pytest.mark.slow
def test_minibatches_are_all_answers_each_once(model, tmp_path, monkeypatch):
    seen, measured, make = [], [], rl.make_train_step

    def spy(*args, **kwargs):
        step = make(*args, **kwargs)

        def watched(state, window):
            seen.append(np.asarray(window.batch.tokens)[np.asarray(window.batch.mask).any(-1)][:, :2].tolist())
            state, metrics = step(state, window)
            measured.append({name: float(metrics[name]) for name in ("ratio_max", "grad_norm", "learning_rate")})
            return state, metrics

        return watched

    monkeypatch.setattr(rl, "make_train_step", spy)
    rate = OptimizerConfig(learning_rate=2e-2, schedule="linear", decay_to=0.0)  # the last update is idle
    cfg = settings(model, tmp_path / "out", steps=1, epochs=2, minibatches=4, optimizer=rate, seed=1)
    run_rl(cfg, RlOptions(), online())
    asked = sorted([PROBLEMS[i]["prompt"] for i in problem_indices(1, 0, 2, 4) for _ in range(4)])
    assert [len(part) for part in seen] == [2] * 8
    for epoch in (seen[:4], seen[4:]):
        assert sorted(row for part in epoch for row in part) == asked
    assert seen[:4] != seen[4:]
    each = lambda name: [m[name] for m in measured]
    told = records(tmp_path / "out")[0]
    assert told["ratio/max"] == max(each("ratio_max")) > each("ratio_max")[-1]
    np.testing.assert_allclose(told["grad_norm"], np.mean(each("grad_norm")))
    assert told["learning_rate"] == each("learning_rate")[-1] != each("learning_rate")[0]


@pytest.mark.proof
def test_a_mesh_of_eight_along_all_axes_gives_what_one_device_gives(model, tmp_path, monkeypatch):
    mesh = MeshConfig(fsdp=2, tensor=2, sequence=2)
    asked = dict(groups=4, epochs=2, max_length=32)
    run_rl(settings(model, tmp_path / "one", **asked), RlOptions(kl_weight=0.1), online())
    monkeypatch.setattr(rl, "make_mesh", make_mesh)
    run_rl(settings(model, tmp_path / "eight", **asked, mesh=mesh), RlOptions(kl_weight=0.1), online())
    for one, eight in zip(records(tmp_path / "one"), records(tmp_path / "eight"), strict=True):
        assert one["grad_norm"] > 0
        assert eight == pytest.approx(one, rel=5e-4, abs=1e-6)


@pytest.mark.errors
def test_processes_share_whole_problems(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    assert rl._share(8) == slice(4, 6)
    with pytest.raises(ValueError, match="groups=6 over 4 processes; expected a multiple, one share each"):
        rl._share(6)


@pytest.mark.slow
def test_nothing_compiles_after_the_first_steps(model, tmp_path):
    """Counted by JAX itself: every trace and every compilation in the process reports its duration."""
    compiled, after = [], []
    listen = lambda name, _, **__: compiled.append(name) if "compile" in name or "trace" in name else None
    jax.monitoring.register_event_duration_secs_listener(listen)

    def reward(problems, answers):
        after.append(len(compiled))
        return right(problems, answers)

    def sample(policy, problems, step, first):  # other lengths, and another number of answers with a reward
        return [
            [a._replace(answer=[*a.answer[:-1]] + [a.answer[-1]] * (1 + step % 2)) for a in each]
            for each in from_table(policy, problems, step)
        ]

    cfg = settings(model, tmp_path / "out", steps=5, epochs=2, checkpoint=CheckpointConfig(every=100))
    run_rl(cfg, RlOptions(algorithm="tempo", kl_weight=0.1), online(rewards=[reward], sample=sample))
    assert after[0] < after[1]
    assert after[1:] == [after[1]] * 4


@pytest.mark.parametrize(("name", "devices"), [("tempo", 8), pytest.param("constrained", 1, marks=pytest.mark.proof)])
@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_one_that_was_not(model, tmp_path, monkeypatch, name, devices):
    monkeypatch.setattr(rl, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:devices]))
    two = name == "constrained"
    options = RlOptions(algorithm=name, kl_weight=0.1, constrained=ConstrainedConfig(thresholds=(0.4, 0.5)))
    short = lambda problems, answers: [[1.0 / len(a.answer) for a in each] for each in answers]
    rewards = [right, short] if two else [right]
    begin = lambda out, **more: run_rl(
        settings(model, tmp_path / out, steps=5, epochs=2, evaluate_every=2), options, online(rewards=rewards, **more)
    )
    assert begin("whole").finished

    def interrupted(policy, problems, step, first):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return from_table(policy, problems, step)

    assert begin("parts", sample=interrupted) == (4, False, signal.SIGTERM)
    assert not (tmp_path / "parts" / "model").exists()
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:  # of a step that a killed process took
        file.write(json.dumps({"step": 5, "reward": 9.0}) + "\n")
    assert begin("parts") == (5, True, None)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    evaluated = lambda out: read_records(tmp_path / out / "evaluation.jsonl")
    assert evaluated("parts") == evaluated("whole")
    assert [r["step"] for r in evaluated("whole")] == [0, 2, 4, 5]
    told = records(tmp_path / "whole")
    if two:
        assert (told[0]["lambda/0"], told[0]["lambda/1"]) == (0, 0)
        gap = [told[0][f"constraint/{i}_value"] - t for i, t in enumerate((0.4, 0.5))]
        raw = -0.1 * np.array(gap)  # the slope of tanh at 0 is 1, and nothing is clipped
        np.testing.assert_allclose([told[1]["lambda/0"], told[1]["lambda/1"]], np.tanh(raw), rtol=1e-4)
        np.testing.assert_allclose(told[0]["constraint/1_value"], np.mean([1 / len(ids) for ids in TABLE]), rtol=1e-6)
    else:
        assert told[0]["tree/branch_frac"] > 0
    # Once more: done, and the model is written again.
    before = weights(tmp_path / "whole")
    assert begin("whole") == (5, True, None)
    assert weights(tmp_path / "whole") == before


@pytest.mark.slow
def test_settings_and_problems_have_to_be_those_it_was_begun_with(model, tmp_path):
    out = tmp_path / "out"
    run_rl(settings(model, out, steps=1), RlOptions(), online())
    changed = settings(model, out, steps=1, temperature=0.5)
    with pytest.raises(
        ValueError, match=r"other settings: --temperature was 1.0 and is 0.5; --algorithm was 'grpo' and"
    ):
        run_rl(changed, RlOptions(algorithm="rloo"), online())
    with pytest.raises(ValueError, match=r"the problems of .* are not those that"):
        run_rl(settings(model, out, steps=1), RlOptions(), online(problem=lambda i: {**PROBLEMS[i], "prompt": [1]}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(FileExistsError, match="holds other files"):
        run_rl(settings(model, tmp_path / "other"), RlOptions(), online())


@pytest.mark.parametrize(
    ("changes", "options", "given", "message"),
    [
        (dict(samples=1), {}, {}, "samples=1 with grpo, which compares"),
        (dict(packing=True), dict(algorithm="ppo"), {}, "packing with ppo; expected an answer a row"),
        ({}, {}, dict(rewards=[right, right]), "2 rewards with grpo; expected 1"),
        ({}, dict(algorithm="constrained", kl_weight=0.1), {}, "1 rewards with constrained; expected 2, one for each"),
        ({}, {}, dict(size=0), "holds no problems"),
        (dict(evaluate_every=1), {}, dict(measure=None), "evaluate_every=1 without test problems"),
        ({}, {}, dict(rewards=[lambda p, a: [[1.0]]]), r"rewards of \[1\] answers .* expected 4 for each of 2"),
        (dict(max_length=65), {}, {}, "max_length=65; expected at most the model's 64 positions"),
    ],
)
def test_what_does_not_fit_together_is_refused(model, tmp_path, changes, options, given, message):
    with pytest.raises(ValueError, match=message):
        run_rl(settings(model, tmp_path / "out", **changes), RlOptions(**options), online(**given))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(temperature=0.0), "temperature: found 0.0; expected 0.001 or more"),
        (dict(max_new_tokens=16), "max_new_tokens=16, max_length=16; expected room for a prompt"),
        *(
            (dict.fromkeys([name], 0), f"{name}: found 0; expected at least 1")
            for name in ("steps", "groups", "epochs")
        ),
        (dict(tested=-1), "tested: found -1; expected at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(model, tmp_path, **changes)


@pytest.mark.slow
def test_losses_that_are_not_finite_end_the_run(model, tmp_path):
    params = hf.load(model, stacked=True).params
    broken = tmp_path / "broken"
    hf.save(broken, Model(CFG, params | {"embed": jnp.full_like(params["embed"], jnp.inf)}))
    TOKENIZER.save(broken)
    with pytest.raises(NotFiniteError, match="of 3 updates in a row, up to step 3, was not finite"):
        run_rl(settings(broken, tmp_path / "out", steps=5, max_skipped=3), RlOptions(), online())


@pytest.mark.proof
def test_adapters_learn_beside_value_heads(model, tmp_path):
    cfg = settings(model, tmp_path / "out", steps=3, adapters="lora", minibatches=2, packing=False)
    run_rl(cfg, RlOptions(algorithm="ppo", kl_weight=0.1), online())
    assert weights(tmp_path / "out") != (model / "model.safetensors").read_bytes()
    told = records(tmp_path / "out")
    assert told[2]["kl/k3_corrected"] > 1e-6  # from the model without adapters
    assert told[2]["value_loss"] != told[0]["value_loss"]


@pytest.mark.slow
def test_the_sampler_gets_layers_apart_on_one_device_in_the_type_of_activations(model, tmp_path, monkeypatch):
    monkeypatch.setattr(rl, "make_mesh", make_mesh)
    given = []

    def sample(policy, problems, step, first):
        given.append(policy)
        return from_table(policy, problems, step)

    run_rl(settings(model, tmp_path / "out", steps=1, dtype="bfloat16"), RlOptions(), online(sample=sample))
    wanted = hf.load(model, dtype="bfloat16")
    assert given[0].config == wanted.config
    assert jax.tree.structure(given[0].params) == jax.tree.structure(wanted.params)
    for found, leaf in zip(jax.tree.leaves(given[0].params), jax.tree.leaves(wanted.params), strict=True):
        assert (found.dtype, found.shape, len(found.sharding.device_set)) == (leaf.dtype, leaf.shape, 1)
        if not found.is_deleted():  # what is not cut apart may be the trainer's own
            np.testing.assert_array_equal(found, leaf)


def test_where_a_run_begins(model, tmp_path):
    cfg = settings(model, tmp_path, dtype=None)
    assert read_origin(cfg).config.embed_dim == 16
    assert (resolve(cfg).dtype, os.path.isabs(resolve(cfg).data), cfg.updates) == ("float32", True, 1)
