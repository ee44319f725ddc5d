"""`jaxaroo train rl --reward critique`: attempts as problems, verdicts, an actor that refines."""

import json

import jax
import pytest

from jaxaroo.cli.critique import make_reward, read_attempts
from jaxaroo.infer.engine import Engine
from jaxaroo.infer.sampling import Sampling
from jaxaroo.models import hf
from jaxaroo.models.decoder import DecoderConfig, Model, init_params
from jaxaroo.models.tokenizer import load_tokenizer
from jaxaroo.sharding.mesh import make_mesh
from jaxaroo.train import rl as loop
from jaxaroo.train import run as runs
from jaxaroo.train.algorithms import RlOptions
from jaxaroo.train.data.arithmetic import ArithmeticConfig, arithmetic_tokenizer
from jaxaroo.train.data.pipeline import BatchConfig
from jaxaroo.train.metrics import read_records
from jaxaroo.train.optimizer import OptimizerConfig
from jaxaroo.train.rewards.critique import CritiqueConfig
from jaxaroo.train.rl import RlConfig
from jaxaroo.train.rollouts import Sampled
from jaxaroo.train.run import RunConfig

pytestmark = pytest.mark.optimizer
NOUNS = ("apples", "books", "coins", "eggs", "hats", "nuts", "pens", "shells")
WORDS = ("--critique.ask", "{question}\n{attempt}\n", "--critique.right", "keeps", "--critique.wrong", "loses")
CFG = CritiqueConfig(
    ask="{question}\n{attempt}\n", right="keeps", wrong="loses", refine="{attempt}{critique}\n{question}\n"
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def question(noun):
    return f"how many {noun} does Ada have ?\n"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(loop, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
    monkeypatch.setattr(runs, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A critic that says `keeps`, `loses` or `has` of anything; an answer is right if it is 3."""
    home, tokenizer = tmp_path_factory.mktemp("critique"), arithmetic_tokenizer()
    sizes = dict(embed_dim=16, ffn_dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, max_positions=64)
    cfg = DecoderConfig(vocab_size=tokenizer.vocab_size, **sizes, eos_ids=tokenizer.eos_ids)
    hf.save(home / "fresh", Model(cfg, init_params(cfg, jax.random.key(0))))
    tokenizer.save(home / "fresh")
    attempts = [(noun, digit) for noun in NOUNS for digit in (3, 7)]
    rows = [{"prompt": question(noun), "completion": f"ans {digit}", "answer": "3"} for noun, digit in attempts]
    write(home / "attempts.jsonl", rows[:12])
    write(home / "test.jsonl", rows[12:])
    asked = [f"{row['prompt']}{row['completion']}\n" for row in rows]
    talk = [{"prompt": prompt, "completion": word} for prompt in asked for word in ("keeps", "loses", "has")]
    talk += [{"prompt": question(noun), "completion": f"ans {digit}"} for noun, digit in attempts]
    with jax.numpy_dtype_promotion("standard"):
        run = RunConfig(
            model=str(home / "fresh"),
            data=str(write(home / "talk.jsonl", talk)),
            out=home / "run",
            steps=80,
            batch=BatchConfig(size=8, max_length=64, packing=False),
            optimizer=OptimizerConfig(learning_rate=1e-2),
        )
        assert runs.start("sft", run).finished
    return home


@pytest.mark.proof
def test_a_critic_learns_to_judge(run, home, tmp_path):
    """Of attempts that it has never seen as well; and what it is rewarded for is told."""
    out = tmp_path / "out"
    more = ("--algorithm", "rloo", "--reward", "critique", *WORDS, "--data", home / "attempts.jsonl", "--steps", 40)
    more = (*more, "--test", home / "test.jsonl", "--evaluate-every", 40, "--groups", 12, "--samples", 4)
    more = (*more, "--max-new-tokens", 3, "--max-length", 32, "--optimizer.learning-rate", 1e-2, "--max-seqs", 48)
    status, _, err = run("train", "rl", "--model", home / "run" / "model", "--out", out, *more)
    assert status == 0, err
    first, last = read_records(out / "evaluation.jsonl")
    assert first["discrimination_acc"] <= 0.75
    assert last == {"step": 40, "discrimination_acc": 1.0, "format_fail": 0.0}
    told = read_records(out / "metrics.jsonl")
    assert told[0]["critique/format_fail"] > 0.1  # `has` is no verdict
    for r in told:  # 1 for a right verdict, -1 for none
        assert r["reward"] == pytest.approx(r["critique/discrimination_acc"] - r["critique/format_fail"])


def said(text, ended=True):
    return Sampled([1], [2], ended, text)


@pytest.mark.slow
def test_stage_two_asks_the_actor_about_what_is_well_formed(home):
    """Oracle: the engine, asked by hand."""
    cfg = CritiqueConfig(**{**vars(CFG), "stage": 2, "actor": str(home / "run" / "model"), "refine_tokens": 4})
    settings = RlConfig(model="m", data="d", out=home, dtype="float32", max_seqs=4)
    _, read = read_attempts(str(home / "attempts.jsonl"), ArithmeticConfig(), cfg, 0)
    problems, texts = [read(i) for i in range(8)], ["keeps", "loses", "has", "loses keeps", "keeps"]
    answers = [[said(t, ended=i < 4) for i, t in enumerate(texts)] for _ in problems]
    with Engine(hf.load(home / "run" / "model"), load_tokenizer(home / "run" / "model")) as engine:
        wanted, refined = [], []
        for problem in problems:
            assert problem["correct"] == (problem["attempt"] == "ans 3")
            for i, text in enumerate(texts):
                if i in (2, 4):
                    wanted.append(-1)
                    continue
                prompt = problem["attempt"] + text + "\n" + problem["question"]
                [result] = engine.generate([prompt], Sampling(temperature=0.0, max_tokens=4))
                output = result.outputs[0]
                refined.append(output.text == "ans 3" and output.finish_reason == "stop")
                wanted.append(refined[-1] + 0.2 * (problem["correct"] == (i in (0, 3))))
    found = make_reward(settings, cfg)(problems, answers)
    assert [value for each in found.values for value in each] == pytest.approx(wanted)
    assert 0 < sum(refined) < len(refined)
    assert found.metrics["critique/refine_acc"] == pytest.approx(sum(refined) / 40)
    assert (found.metrics["critique/format_fail"], found.metrics["critique/too_long"]) == (0.4, 0.0)


def test_what_is_too_long_for_the_actor_is_not_right(home):
    cfg = CritiqueConfig(**{**vars(CFG), "stage": 2, "actor": str(home / "run" / "model"), "refine_tokens": 60})
    settings = RlConfig(model="m", data="d", out=home, dtype="float32", max_seqs=4)
    _, read = read_attempts(str(home / "attempts.jsonl"), ArithmeticConfig(), cfg, 0)
    found = make_reward(settings, cfg)([read(0)], [[said("keeps"), said("loses")]])
    assert found.values == [pytest.approx([0.2, 0.0])]
    assert (found.metrics["critique/too_long"], found.metrics["critique/refine_acc"]) == (1.0, 0.0)


def test_the_embedded_task_has_attempts_with_slips():
    size, read = read_attempts("builtin:arithmetic", ArithmeticConfig(), CFG, 0)
    rows = [read(i) for i in range(40)]
    assert size is None
    assert 10 < sum(row["correct"] for row in rows) < 30
    for row in rows:
        assert row["prompt"] == row["question"] + row["attempt"] + "\n"
        assert row["correct"] == (row["attempt"].splitlines()[-1] == f"ans {row['answer']}")
    assert read(3) != read_attempts("builtin:arithmetic", ArithmeticConfig(), CFG, 0, "test")[1](3)
    assert [read_attempts("builtin:arithmetic", ArithmeticConfig(), CFG, 1)[1](i) for i in range(40)] != rows


def test_rows_of_label_sample_and_others_are_attempts(tmp_path):
    rows = [
        {"prompt": "q", "steps": ["a", "ans 3"], "answer": "3", "outcome": 0},  # what is known goes first
        {"prompt": "q", "completion": "a\nans 3", "answer": "3"},
        {"prompt": "q", "completion": "a\nans 4", "answer": "3"},
        {"prompt": "q", "completion": None, "steps": ["b"], "outcome": 1},
    ]
    size, read = read_attempts(str(write(tmp_path / "rows.jsonl", rows)), ArithmeticConfig(), CFG, 0)
    assert size == 4
    assert [read(i)["attempt"] for i in range(4)] == ["a\nans 3", "a\nans 3", "a\nans 4", "b"]
    assert [read(i)["correct"] for i in range(4)] == [False, True, False, True]


@pytest.mark.errors
def test_attempts_that_cannot_be_judged_are_refused(run, home, tmp_path):
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "q", "completion": "b", "outcome": 1}])
    out = ("--model", home / "run" / "model", "--out", tmp_path / "out", "--data", rows, "--reward", "critique")
    out = (*out, "--max-length", 32, "--max-new-tokens", 3)
    two = ("--critique.stage", 2)
    status, _, err = run("train", "rl", *out, *WORDS, *two)
    assert (status, "stage 2 of critique without an actor; give --critique.actor" in err) == (1, True)
    status, _, err = run("train", "rl", *out, *WORDS, *two, "--critique.actor", home / "run" / "model")
    assert (status, "row 0 has columns" in err, "an `answer` in text" in err) == (1, True, True)
    write(rows, [{"prompt": 7, "completion": "b", "outcome": 1}])
    status, _, err = run("train", "rl", *out, *WORDS)
    assert (status, "row 0 has the prompt 7; expected a text, or messages" in err) == (1, True)
    write(rows, [{"prompt": "q", "completion": "b"}])
    status, _, err = run("train", "rl", *out, *WORDS)
    assert (status, "`outcome`, 0 or 1, or else" in err) == (1, True)
    write(rows, [{"prompt": "q", "completion": "b", "answer": " "}])
    status, _, err = run("train", "rl", *out, *WORDS)
    assert (status, "row 0 has the `answer` ' '; expected a number or words" in err) == (1, True)
    write(rows, [{"prompt": "q", "completion": "b", "answer": "", "outcome": 1}])  # of no use in stage 2 alone
    status, _, err = run("train", "rl", *out, *WORDS, *two, "--critique.actor", home / "run" / "model")
    assert (status, "row 0 has the `answer` ''; expected a number or words" in err) == (1, True)
    assert read_attempts(str(rows), ArithmeticConfig(), CFG, 0)[0] == 1
    with pytest.raises(ValueError, match="critique beside other rewards"):
        RlOptions(reward=("critique", "outcome"))
    assert not (tmp_path / "out").exists()
