"""`jaxaroo train ranked` and `train value-rounds`: loops that come to their end, with models that guess one digit."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from jaxaroo.cli.rounds import answered, brier, read_problems
from jaxaroo.infer.engine import Engine
from jaxaroo.infer.guided.value_guided import ivo
from jaxaroo.infer.sampling import Sampling
from jaxaroo.models import hf, reward
from jaxaroo.models.decoder import DecoderConfig, Model, forward, init_params
from jaxaroo.models.reward import RewardConfig, RewardModel, init_head, step_logits
from jaxaroo.models.tokenizer import load_tokenizer
from jaxaroo.train import run as runs
from jaxaroo.train.data import arithmetic
from jaxaroo.train.data.arithmetic import ArithmeticConfig, arithmetic_tokenizer, make_problem
from jaxaroo.train.data.pipeline import BatchConfig
from jaxaroo.train.labels.monte_carlo import step_seed
from jaxaroo.train.optimizer import OptimizerConfig
from jaxaroo.train.run import RunConfig

pytestmark = pytest.mark.optimizer
NOUNS = ("apples", "books", "coins", "eggs", "hats", "nuts", "pens", "shells")
NAMES = ("Ada", "Ben", "Cleo", "Dan")
TRAINING = ("--batch.size", 8, "--batch.max-length", 64, "--batch.no-packing", "--optimizer.learning-rate", 1e-2)


def right(noun):
    return 1 + NOUNS.index(noun) % 4


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A policy that has learned to answer with any of four digits; problems whose answer hangs on the noun."""
    home, tokenizer = tmp_path_factory.mktemp("rounds"), arithmetic_tokenizer()
    sizes = dict(embed_dim=16, ffn_dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, max_positions=128)
    cfg = DecoderConfig(vocab_size=tokenizer.vocab_size, **sizes, eos_ids=tokenizer.eos_ids)
    hf.save(home / "fresh", Model(cfg, init_params(cfg, jax.random.key(0))))
    tokenizer.save(home / "fresh")
    asked = [(name, noun) for name in NAMES for noun in NOUNS]
    prompt = lambda name, noun: f"how many {noun} does {name} have ?\n"
    guesses = [{"prompt": prompt(*q), "completion": f"ans {d}"} for q in asked for d in (1, 2, 3, 4)]
    problems = [{"prompt": prompt(*q), "answer": str(right(q[1]))} for q in asked]
    with jax.numpy_dtype_promotion("standard"):
        run = RunConfig(
            model=str(home / "fresh"),
            data=str(write(home / "guesses.jsonl", guesses)),
            out=home / "run",
            steps=80,
            batch=BatchConfig(size=8, max_length=64, packing=False),
            optimizer=OptimizerConfig(learning_rate=1e-2),
        )
        assert runs.start("sft", run).finished
    write(home / "problems.jsonl", problems[:24])
    write(home / "test.jsonl", problems[24:])
    policy = hf.read_config(home / "run" / "model")
    judge = RewardConfig(target=policy, separator=3)
    params = {"model": hf.load(home / "run" / "model", dtype="float32").params}
    params["head"] = init_head(judge, jax.random.key(5))
    reward.save(home / "judge", RewardModel(judge, params), like=home / "run" / "model")
    return home


def ranked(run, home, out, *more):
    asked = ("--model", home / "run" / "model", "--out", out, "--rounds", 2, "--max-new-tokens", 6, "--tested", 8)
    return run("train", "ranked", *asked, *TRAINING, *more)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def greedy_accuracy(model, rows):
    with Engine(hf.load(model), load_tokenizer(model)) as engine:
        results = engine.generate([r["prompt"] for r in rows], Sampling(temperature=0.0, max_tokens=6))
    return np.mean([res.outputs[0].text == f"ans {r['answer']}" for res, r in zip(results, rows, strict=True)])


@pytest.mark.slow
def test_a_policy_learns_from_its_own_right_answers(run, home, tmp_path):
    """Four digits at first, one for each noun in the end."""
    out, sizes = tmp_path / "out", ("--problems", 16, "--samples", 6, "--steps", 40)
    data = ("--data", home / "problems.jsonl", "--test", home / "test.jsonl", "--keep", "all")
    status, printed, err = ranked(run, home, out, *data, *sizes)
    assert (status, f"wrote {out / 'model'}" in err) == (0, True)
    problems, tests = rows_of(home / "problems.jsonl"), rows_of(home / "test.jsonl")
    reports = json.loads((out / "report.json").read_text())["rounds"]
    for number, report in enumerate(reports, 1):
        folder = out / f"round-{number}"
        samples, chosen = rows_of(folder / "samples.jsonl"), rows_of(folder / "selected.jsonl")
        assert [int(r["id"]) for r in samples] == [(16 * (number - 1) + i) % 24 for i in range(16)]  # and round again
        assert all(r["prompt"] == problems[int(r["id"])]["prompt"] for r in samples)
        good = {(r["id"], t) for r in samples for t in r["texts"] if t.split() == ["ans", r["answer"]]}
        assert {(r["id"].split(":")[0], r["completion"]) for r in chosen} == good  # right ones, all of them
        assert len(chosen) == len(good)  # and each once
        rewards = [r["rewards"] for r in rows_of(folder / "rewards.jsonl")]
        pairs = [zip(r["whole"], r["outcomes"], strict=True) for r in samples]
        assert rewards == [[outcome if whole else None for whole, outcome in each] for each in pairs]
        count = sum(t == f"ans {r['answer']}" for r in samples for t in r["texts"])
        assert (report["problems"], report["answers"], report["selected"]) == (16, 96, len(good))
        assert report["accuracy"] == count / 96
        accuracy = greedy_accuracy(folder / "run" / "model", tests)
        assert report["greedy_accuracy_on_test"] == accuracy
    assert 0.1 < reports[0]["accuracy"] < 0.45
    assert reports[1]["accuracy"] > reports[0]["accuracy"] + 0.2
    assert reports[1]["greedy_accuracy_on_test"] > 0.9
    assert weights(out / "model") == weights(out / "round-2" / "run" / "model")
    assert printed.count("\n") == 3
    assert f"{reports[1]['accuracy']:.4f}" in printed
    # Again: nothing to do. Otherwise: refused.
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.name not in (".lock", "rounds.yaml")}
    assert ranked(run, home, out, *data, *sizes)[:2] == (0, printed)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    status, _, err = ranked(run, home, out, *data, *sizes, "--optimizer.b1", 0.5)
    assert (status, "--optimizer.b1 was 0.9 and is 0.5" in err) == (1, True)


def kept(out):
    """Everything that an interruption must not change."""
    names = ("samples.jsonl", "rewards.jsonl", "selected.jsonl", "report.json", "run/model/model.safetensors")
    found = {f"{n}/{name}": (out / f"round-{n}" / name).read_bytes() for n in (1, 2) for name in names}
    return found | {"model": weights(out / "model"), "report": (out / "report.json").read_bytes()}


@pytest.mark.proof
def test_a_loop_that_was_stopped_ends_as_one_that_was_not(run, home, tmp_path, monkeypatch):
    """With a reward model, on the embedded task: stopped while it trains, and then while it asks."""
    data = ("--data", "builtin:arithmetic", "--reward", home / "judge", "--aggregate", "mean")
    sizes = ("--problems", 9, "--first", 100, "--samples", 4, "--max-seqs", 1, "--steps", 6, "--log-every", 1)
    again = lambda name: ranked(run, home, tmp_path / name, *data, *sizes)
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(arithmetic, "make_problem", lambda cfg, *a: made.append(a) or make_problem(cfg, *a))
        assert again("unbroken")[0] == 0
    assert {*made} == {("train", i) for i in range(100, 118)} | {("test", i) for i in range(8)}
    wanted = kept(tmp_path / "unbroken")
    ids = [[r["id"] for r in rows_of(tmp_path / "unbroken" / f"round-{n}" / "samples.jsonl")] for n in (1, 2)]
    assert ids == [[str(i) for i in range(100, 109)], [str(i) for i in range(109, 118)]]

    def check(number):
        """What is chosen is what the reward model likes best."""
        folder = tmp_path / "unbroken" / f"round-{number}"
        rewards = {r["id"]: r["rewards"] for r in rows_of(folder / "rewards.jsonl")}
        samples = {r["id"]: r for r in rows_of(folder / "samples.jsonl")}
        for r in rows_of(folder / "selected.jsonl"):
            name, i = r["id"].split(":")
            assert r["reward"] == max(x for x in rewards[name] if x is not None) == rewards[name][int(i)]
        for name, each in rewards.items():
            assert [x is not None for x in each] == samples[name]["whole"]
        return rewards

    assert len({x for each in check(1).values() for x in each}) > 2
    check(2)

    with monkeypatch.context() as patch:  # in the third step of round 1
        make, calls = runs.make_train_step, []

        def terminated(*args, **settings):
            step = make(*args, **settings)

            def counted(*state):
                calls.append(1)
                if len(calls) == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                return step(*state)

            return counted

        patch.setattr(runs, "make_train_step", terminated)
        status, _, err = again("stopped")
    assert status == 128 + signal.SIGTERM
    assert "stopped in round 1, step" in err
    assert "go on with the same command" in err
    assert not (tmp_path / "stopped" / "round-1" / "report.json").exists()

    with monkeypatch.context() as patch:  # between two waves of round 2, the third of which is half a problem
        ask, waves = Engine.generate, []

        def interrupt(self, prompts, *a, **k):
            sampled = (tmp_path / "stopped" / "round-2" / "samples.jsonl").exists()
            if sampled and len(waves) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            waves.extend([1] * sampled)
            return ask(self, prompts, *a, **k)

        patch.setattr(Engine, "generate", interrupt)
        status, _, err = again("stopped")
    assert (status, "stopped; go on with the same command" in err) == (128 + signal.SIGTERM, True)
    part = tmp_path / "stopped" / "round-2" / "samples.jsonl"
    whole = wanted["2/samples.jsonl"]
    assert 0 < len(part.read_bytes()) < len(whole)
    assert whole.startswith(part.read_bytes())
    part.write_bytes(whole[: len(part.read_bytes()) + 30])  # as a killed process would leave it
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert again("stopped")[0] == 0
    assert kept(tmp_path / "stopped") == wanted


@pytest.mark.slow
def test_a_reward_model_needs_no_answers(run, home, tmp_path, monkeypatch):
    """Its scores of an answer's steps become one reward as was asked for; what is malformed or too long has none."""
    asked = [{"prompt": row["prompt"], "completion": "?"} for row in rows_of(home / "problems.jsonl")[:7]]
    asked.append({"prompt": "how many eggs does Ada have ?\n" * 9, "completion": "?"})
    judge, said = reward.load(home / "judge"), []
    cfg = dataclasses.replace(judge.config, target=dataclasses.replace(judge.config.target, max_positions=32))
    reward.save(tmp_path / "judge", RewardModel(cfg, judge.params), like=home / "judge")

    def score(model, tokenizer, solutions, **_):
        said.extend(solutions)
        return [[0.25, 0.5, 0.75] if s.steps else [] for s in solutions]

    monkeypatch.setattr("jaxaroo.infer.step_scores.score_solutions", score)
    data = ("--data", write(tmp_path / "asked.jsonl", asked), "--reward", tmp_path / "judge", "--aggregate", "mean")
    sizes = ("--rounds", 1, "--problems", 8, "--samples", 4, "--max-new-tokens", 3, "--steps", 1)
    assert ranked(run, home, tmp_path / "out", *data, *sizes)[0] == 0
    folder = tmp_path / "out" / "round-1"
    samples = rows_of(folder / "samples.jsonl")
    whole = [row["whole"] for row in samples[:7]]
    assert {ok for each in whole for ok in each} == {True, False}  # three tokens are enough for some
    texts = [[t] if ok else [] for row in samples[:7] for t, ok in zip(row["texts"], row["whole"], strict=True)]
    assert [s.steps for s in said] == texts
    assert [r["rewards"] for r in rows_of(folder / "rewards.jsonl")] == [
        *([0.5 if ok else None for ok in e] for e in whole),
        [None] * 4,
    ]
    first = [f"{i}:{each.index(True)}" for i, each in enumerate(whole) if any(each)]
    assert [r["id"] for r in rows_of(folder / "selected.jsonl")] == first
    report = json.loads((folder / "report.json").read_text())
    assert (report["mean_reward"], report["accuracy"]) == (0.5, None)
    assert "greedy_accuracy_on_test" not in report


def sampled(home, rows, number, guidance=None, n=4):
    """What an engine says to these problems with these seeds."""
    model = home / "run" / "model"
    ask = dict(temperature=1.0, max_tokens=6, n=n)
    each = [Sampling(**ask, seed=step_seed(7, r["id"], number)) for r in rows]
    with Engine(hf.load(model), load_tokenizer(model), guidance=guidance) as engine:
        results = engine.generate([r["prompt"] for r in rows], each)
    asked = [{name: r[name] for name in ("id", "prompt", "answer")} for r in rows]
    said = [([o.text for o in r.outputs], [o.finish_reason for o in r.outputs]) for r in results]
    return [answered(row, *each) for row, each in zip(asked, said, strict=True)]


@pytest.mark.parametrize(("beta", "width"), [(40, 4), (0, "all")])
@pytest.mark.proof
def test_answers_of_the_second_round_are_guided_by_the_first(run, home, tmp_path, beta, width):
    """The right digit is always the same, so a value model soon knows it."""
    out, model = tmp_path / "out", home / "run" / "model"
    width = hf.read_config(model).vocab_size if width == "all" else width
    problems, tests = ([r | {"answer": "2"} for r in rows_of(home / f"{name}.jsonl")] for name in ("problems", "test"))
    asked = ("--model", model, "--data", write(tmp_path / "problems.jsonl", problems), "--out", out)
    asked += ("--test", write(tmp_path / "test.jsonl", tests))
    sizes = ("--rounds", 2, "--problems", 24, "--steps", 30, "--max-new-tokens", 6, "--seed", 7)
    status, _, _ = run("train", "value-rounds", *asked, *sizes, *TRAINING, "--beta", beta, "--width", width)
    assert status == 0
    one, two = (rows_of(out / f"round-{n}" / "samples.jsonl") for n in (1, 2))
    assert one == sampled(home, one, 1)
    plain, value = sampled(home, two, 2), reward.load(out / "round-1" / "run" / "model")
    assert two == sampled(home, two, 2, ivo(value, beta=beta, width=width))
    assert (two == plain) == (beta == 0)
    for folder, samples in ((out / "round-1", one), (out / "round-2", two)):
        texts = [(t, o == 1) for r in samples for t, o in zip(r["texts"], r["outcomes"], strict=True)]
        assert [(r["completion"], r["label"]) for r in rows_of(folder / "selected.jsonl")] == texts
    kind, begun, _ = runs.read_run(out / "round-2" / "run")
    assert (kind, begun.model) == ("value", str(out / "round-1" / "run" / "model"))
    assert reward.is_reward_model(out / "model")

    reports = json.loads((out / "report.json").read_text())["rounds"]
    tests = [{"id": str(i)} | r for i, r in enumerate(tests)]
    for number, (report, samples) in enumerate(zip(reports, (one, two), strict=True), 1):
        value = reward.load(out / f"round-{number}" / "run" / "model")
        rows = sampled(home, tests, number, ivo(value, beta=beta, width=width), n=1)
        assert report["guided_accuracy_on_test"] == np.mean([r["outcomes"] for r in rows])
        assert report["brier_on_test"] == brier(value, load_tokenizer(model), rows)
        assert report["mean_reward"] == report["accuracy"] == np.mean([r["outcomes"] for r in samples])
    if beta:
        assert reports[0]["accuracy"] < 0.5
        assert reports[1]["accuracy"] > 0.9


@pytest.mark.slow
def test_the_error_of_a_value_model_is_a_mean_over_tokens(home):
    model, tokenizer = reward.load(home / "judge"), load_tokenizer(home / "judge")
    long = {"id": "0", "prompt": "how many eggs does Ada have ?\n", "texts": ["ans 7", "3 + 4 = 7\nans 7"]}
    rows = [long | {"outcomes": [1, 0]}, long | {"id": "1", "prompt": "Ada has 3 eggs .\n", "outcomes": [0, 0]}]
    read = jax.jit(lambda tokens, at: forward(model.config.target, model.params["model"], tokens, at).hidden)
    errors = []
    for row in rows:
        for text, outcome in zip(row["texts"], row["outcomes"], strict=True):
            prompt = tokenizer.encode(row["prompt"])
            ids = [*prompt, *tokenizer.encode(text, bos=False), *tokenizer.eos_ids[:1]]
            padded = np.array([ids + [0] * (40 - len(ids))], np.int32)
            hidden = read(padded, np.arange(40, dtype=np.int32)[None])
            z = np.asarray(step_logits(model.config, model.params, hidden))[0, len(prompt) : len(ids)].astype(float)
            errors += [(1 / (1 + np.exp(-x)) - outcome) ** 2 for x in z]
    assert np.std(errors) > 1e-3
    for batch in (3, 4):
        np.testing.assert_allclose(brier(model, tokenizer, rows, batch=batch), np.mean(errors), rtol=1e-5)


def test_answers_that_say_nothing_have_no_error():
    assert brier(None, None, [{"id": "0", "prompt": "how many eggs ?\n", "texts": [""], "outcomes": [0]}]) is None


def test_answers_are_whole_and_right_or_not():
    texts = ["ans 7", "ans 7", "well", "ans 8", "1 + 6 = 7"]
    found = answered({"id": "0", "answer": "7"}, texts, ["stop", "length", "stop", "stop", "stop"])
    assert found["whole"] == [True, False, False, True, True]
    assert found["outcomes"] == [1, 0, 0, 0, 1]
    assert answered({"id": "0"}, texts[:2], ["stop"] * 2)["outcomes"] == [None, None]
    assert answered({"id": "0", "answer": "Paris"}, ["the answer is paris."], ["stop"])["outcomes"] == [1]


@pytest.mark.slow
def test_problems_of_the_embedded_task_and_of_files(home):
    hard = ArithmeticConfig(level=3, hi=50)
    size, read = read_problems("builtin:arithmetic", hard, "test")
    problem = make_problem(hard, "test", 12)
    assert (size, read(12)) == (None, {"id": "12", "prompt": f"{problem.question}\n", "answer": str(problem.answer)})
    size, read = read_problems(str(home / "problems.jsonl"), hard)
    assert (size, read(5)) == (24, {"id": "5"} | rows_of(home / "problems.jsonl")[5])


@pytest.mark.errors
@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        ("ranked --data {tmp}/asked.jsonl", 1, "row 0 of {tmp}/asked.jsonl has no `answer`"),
        ("ranked --data {tmp}/empty.jsonl", 1, "row 1 of {tmp}/empty.jsonl has the `answer` ''; expected a number"),
        ("ranked --data {home}/problems.jsonl --reward {home}/run/model", 1, "is no reward model"),
        ("ranked --data {home}/problems.jsonl --reward nope --dry-run", 1, "nope is no reward model; expected the"),
        ("ranked --data {home}/problems.jsonl --batch.max-length 999", 1, "at most the model's 128"),
        ("ranked --data {home}/problems.jsonl --test {tmp}/asked.jsonl", 1, "has no `answer`"),
        ("ranked --data {home}/problems.jsonl --temperature 0", 1, "expected answers that differ"),
        ("ranked --data {home}/problems.jsonl --keep worst", 2, "worst"),
        ("ranked --data {home}/none.jsonl", 1, "none.jsonl"),
        ("value-rounds --data {tmp}/asked.jsonl", 1, "has no `answer`"),
        ("value-rounds --data {home}/problems.jsonl --separator two_tokens", 1, "expected one token"),
        ("value-rounds --data {home}/problems.jsonl --width 999", 2, "--width 999; expected at most"),
        ("value-rounds --data {home}/problems.jsonl --reward outcome", 2, "--reward"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_asked(run, home, tmp_path, argv, status, message):
    write(tmp_path / "asked.jsonl", [{"prompt": "how many ?\n", "completion": "ans 1"}])
    write(tmp_path / "empty.jsonl", [{"prompt": "how many ?\n", "answer": answer} for answer in ("1", "")])
    kind, *argv = [a.format(home=home, tmp=tmp_path) for a in argv.split()]
    argv = [kind, "--batch.max-length", 64, *argv]
    found, out, err = run("train", *argv, "--model", home / "run" / "model", "--out", tmp_path / "out")
    assert found == status
    assert message.format(tmp=tmp_path) in out + err
    assert not (tmp_path / "out").exists()


@pytest.mark.errors
def test_nothing_selected_is_an_error_and_the_answers_stay(run, home, tmp_path):
    write(tmp_path / "hard.jsonl", [{"prompt": "how many eggs does Ada have ?\n", "answer": "999"}])
    status, _, err = ranked(run, home, tmp_path / "out", "--data", tmp_path / "hard.jsonl", "--steps", 2)
    assert (status, "none of 8 answers to 1 problems can be kept" in err) == (1, True)
    assert len(rows_of(tmp_path / "out" / "round-1" / "samples.jsonl")) == 1
