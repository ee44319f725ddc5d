"""`jaxaroo train rl`: the decode engine samples, rewards of every kind, and a run that ends as if never stopped."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.cli import rl
from jaxaroo.cli.rl import make_online, make_reward
from jaxaroo.infer import engine
from jaxaroo.infer.guided.best_of_n import aggregate
from jaxaroo.infer.step_scores import Solution, score_solutions
from jaxaroo.models import hf, reward
from jaxaroo.models.decoder import DecoderConfig, Model, init_params, stack_layers
from jaxaroo.models.reward import RewardConfig, RewardModel, init_head
from jaxaroo.models.tokenizer import load_tokenizer
from jaxaroo.sharding.mesh import make_mesh
from jaxaroo.train import rl as loop
from jaxaroo.train import run as runs
from jaxaroo.train.algorithms import RlOptions, policy_scores
from jaxaroo.train.data.arithmetic import ArithmeticConfig, arithmetic_tokenizer, make_problem
from jaxaroo.train.data.pipeline import BatchConfig
from jaxaroo.train.metrics import read_records
from jaxaroo.train.optimizer import OptimizerConfig
from jaxaroo.train.rl import RlConfig
from jaxaroo.train.rollouts import Sampled, lay_out, spread
from jaxaroo.train.run import RunConfig
from tests.children import begin, finish, finish_all, several, wait_for

pytestmark = pytest.mark.optimizer
NOUNS = ("apples", "books", "coins", "eggs", "hats", "nuts", "pens", "shells")
NAMES = ("Ada", "Ben", "Cleo", "Dan")
ASKED = ("--groups", 8, "--samples", 8, "--max-new-tokens", 5, "--max-length", 32, "--optimizer.learning-rate", 1e-2)


def right(noun):
    return 1 + NOUNS.index(noun) % 4


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Of the eight that there are: programs for eight take long to compile."""
    monkeypatch.setattr(loop, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
    monkeypatch.setattr(runs, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A policy that has learned to answer with any of four digits; problems whose answer hangs on the noun."""
    home, tokenizer = tmp_path_factory.mktemp("rl"), arithmetic_tokenizer()
    sizes = dict(embed_dim=16, ffn_dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, max_positions=128)
    cfg = DecoderConfig(vocab_size=tokenizer.vocab_size, **sizes, eos_ids=tokenizer.eos_ids)
    hf.save(home / "fresh", Model(cfg, init_params(cfg, jax.random.key(0))))
    tokenizer.save(home / "fresh")
    asked = [(name, noun) for name in NAMES for noun in NOUNS]
    prompt = lambda name, noun: f"how many {noun} does {name} have ?\n"
    guesses = [{"prompt": prompt(*q), "completion": f"ans {d}"} for q in asked for d in (1, 2, 3, 4)]
    problems = [{"prompt": prompt(*q), "answer": str(right(q[1]))} for q in asked if q[1] in NOUNS[:3]]
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
    write(home / "problems.jsonl", problems[:9])
    write(home / "test.jsonl", problems[9:])
    policy = hf.read_config(home / "run" / "model")
    judge = RewardConfig(target=policy, separator=3)
    params = {"model": hf.load(home / "run" / "model", dtype="float32").params}
    params["head"] = init_head(judge, jax.random.key(5))
    reward.save(home / "judge", RewardModel(judge, params), like=home / "run" / "model")
    return home


def train(run, home, out, *more):
    return run("train", "rl", "--model", home / "run" / "model", "--out", out, *ASKED, *more)


def records(out):
    """Metrics without what a clock says."""
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in read_records(out / "metrics.jsonl")]


def weights(out):
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_policy_learns_which_of_its_answers_are_right(run, home, tmp_path):
    """Four digits at first, one for each noun in the end; of problems that it was never asked as well."""
    data = ("--data", home / "problems.jsonl", "--test", home / "test.jsonl", "--evaluate-every", 40, "--steps", 40)
    status, printed, err = train(run, home, tmp_path / "out", *data, "--groups", 9, "--max-seqs", 72)
    assert (status, printed, "wrote" in err) == (0, "", True)
    first, last = read_records(tmp_path / "out" / "evaluation.jsonl")
    assert first["greedy_accuracy"] < 0.6
    assert last["greedy_accuracy"] > 0.9
    told = records(tmp_path / "out")
    assert told[0]["reward"] < 0.4
    assert told[-1]["reward"] > 0.9
    assert all(r["sampler_gap"] < 1e-4 for r in told)  # what is trained is what was served, at every step
    from jaxaroo.infer.engine import Engine
    from jaxaroo.infer.sampling import Sampling

    rows = [json.loads(line) for line in (home / "test.jsonl").read_text().splitlines()]
    with Engine(hf.load(tmp_path / "out" / "model"), load_tokenizer(tmp_path / "out" / "model")) as engine:
        results = engine.generate([r["prompt"] for r in rows], Sampling(temperature=0.0, max_tokens=5))
    correct = [res.outputs[0].text == f"ans {r['answer']}" for res, r in zip(results, rows, strict=True)]
    assert np.mean(correct) == last["greedy_accuracy"]


@pytest.mark.proof
def test_drafted_answers_are_the_same_answers(run, home, tmp_path, monkeypatch):
    """Drafted by the policy as it began, judged by coupling."""
    made, Engine = [], engine.Engine
    monkeypatch.setattr(engine, "Engine", lambda *args, **more: made.append(Engine(*args, **more)) or made[-1])
    more = ("--data", home / "problems.jsonl", "--steps", 3, "--samples", 4)
    assert train(run, home, tmp_path / "plain", *more)[0] == 0
    assert (
        train(run, home, tmp_path / "drafted", *more, "--drafter", home / "run" / "model", "--speculate", "on")[0] == 0
    )
    assert [len(e.emitted_per_step()) > 2 for e in made] == [False, True]
    assert sum(made[1].emitted_per_step()[2:]) > 0  # some drafts were taken
    assert weights(tmp_path / "drafted") == weights(tmp_path / "plain")
    rounded = lambda told: [{k: round(v, 4) for k, v in r.items()} for r in told]
    assert rounded(records(tmp_path / "drafted")) == rounded(records(tmp_path / "plain"))
    status, _, err = train(
        run, home, tmp_path / "lossy", *more, "--drafter", home / "run" / "model", "--verifier", "rejection"
    )
    assert (status, "verifier rejection; expected coupled" in err) == (1, True)


@pytest.mark.proof
def test_two_processes_share_the_problems_and_learn_what_one_does(home, tmp_path):
    """Each answers half of them. A SIGTERM to one stops both after the same step, and the same command goes on."""
    asked = ("rl", "--model", home / "run" / "model", *ASKED, "--steps", 5, "--data", home / "problems.jsonl")
    asked = (*asked, "--kl-weight", 0.1, "--minibatches", 2, "--test", home / "test.jsonl", "--evaluate-every", 5)
    parts = ("--mesh.data", 2, "--mesh.fsdp", 4)
    finish(begin(*asked, "--out", tmp_path / "one"))
    finish_all(several(2, *asked, *parts, "--out", tmp_path / "two"))
    stopped = tmp_path / "stopped"
    children = several(2, *asked, *parts, "--out", stopped)
    wait_for(children[0], lambda: len(records(stopped)) >= 2)
    children[1].send_signal(signal.SIGTERM)
    outputs = finish_all(children, 143)
    assert all(f"jaxaroo train rl ... --out {stopped}" in output for output in outputs)
    assert 2 <= len(records(stopped)) < 5
    finish_all(several(2, *asked, *parts, "--out", stopped))
    one = records(tmp_path / "one")
    for other in (records(tmp_path / "two"), records(stopped)):
        assert len(other) == len(one) == 5
        for a, b in zip(other, one, strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    assert len({r["reward"] for r in one}) > 1
    measured = [read_records(tmp_path / name / "evaluation.jsonl") for name in ("one", "two", "stopped")]
    assert [r["step"] for r in measured[0]] == [0, 5]
    assert measured[0] == measured[1] == measured[2]


@pytest.mark.proof  # the loop itself is tried with a table for a sampler
def test_a_run_that_was_stopped_ends_as_one_that_was_not(run, home, tmp_path, monkeypatch):
    """With the engine and a reward model, on the embedded task."""
    more = ("--data", "builtin:arithmetic", "--reward", home / "judge", "--aggregate", "last", "--steps", 4)
    more = (*more, "--max-length", 96, "--epochs", 2, "--temperature", 1.3, "--evaluate-every", 2, "--tested", 4)
    assert train(run, home, tmp_path / "whole", *more)[0] == 0
    make, asked = rl.make_reward, []

    def interrupting(*args):
        given = make(*args)

        def called(problems, answers):
            asked.append(len(problems))
            if len(asked) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return given(problems, answers)

        return called

    monkeypatch.setattr(rl, "make_reward", interrupting)
    status, _, err = train(run, home, tmp_path / "parts", *more)
    assert status == 128 + signal.SIGTERM
    assert f"stopped at step 2; go on with the same command, jaxaroo train rl ... --out {tmp_path / 'parts'}" in err
    monkeypatch.setattr(rl, "make_reward", make)
    assert train(run, home, tmp_path / "parts", *more)[0] == 0
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    assert read_records(tmp_path / "parts" / "evaluation.jsonl") == read_records(
        tmp_path / "whole" / "evaluation.jsonl"
    )
    told = records(tmp_path / "whole")
    assert len({r["reward"] for r in told}) == 4  # other problems, or other answers, at every step
    assert all(0 < r["reward"] < 1 for r in told)
    status, _, err = train(run, home, tmp_path / "parts", *more, "--samples", 4)
    assert (status, "--samples was 8 and is 4" in err) == (1, True)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.slow
def test_the_trainer_says_of_sampled_tokens_what_the_sampler_said(home, tmp_path, temperature):
    sizes = dict(groups=3, samples=4, max_new_tokens=5, max_length=64, max_seqs=5, dtype="float32")
    model = home / "run" / "model"
    cfg = RlConfig(model=str(model), data="builtin:arithmetic", out=tmp_path, temperature=temperature, **sizes)
    online = make_online(cfg, RlOptions())
    policy, problems = hf.load(model, dtype="float32"), [online.problem(i) for i in (0, 1, 1)]
    found = [a for each in online.sample(policy, problems, 3, 0) for a in each]
    assert [len(online.sample(policy, problems, 3, 0)), len(found)] == [3, 12]
    placed = lay_out(found, [True] * 12, max_length=64)
    batch = jax.tree.map(jnp.asarray, placed.batch)
    params = stack_layers(policy.params)
    said = jax.jit(lambda params: policy_scores(policy.config, params, batch, temperature).logp)(params)
    np.testing.assert_allclose(
        np.where(batch.mask, said, 0), spread([a.logprobs for a in found], found, placed), atol=1e-4
    )
    eos = load_tokenizer(model).eos_ids
    assert all(a.ended == (a.answer[-1] in eos) for a in found)
    short = make_online(dataclasses.replace(cfg, max_new_tokens=1), RlOptions()).sample(policy, problems, 3, 0)
    assert not any(a.ended for each in short for a in each)  # cut in front of its end
    ids = [a.answer for a in found]
    assert len({tuple(a) for a in ids}) > 3
    assert ids[4:8] != ids[8:]  # the same problem twice in a step has other answers
    again = lambda step: [a.answer for each in online.sample(policy, problems, step, 0) for a in each]
    assert again(3) == ids  # a function of seed, step and problem
    assert again(4) != ids


def sampled(text, ended=True):
    return Sampled([1], [2], ended, text)


def test_rewards_of_outcomes():
    problems = [{"id": "0", "prompt": "p", "answer": "4"}, {"id": "1", "prompt": "p", "answer": "7"}]
    texts = [["ans 4", "ans 5", "nothing", "ans 4"], ["ans 7", "7", "", "i do not know\nans 7"]]
    ended = [[True, True, True, False], [True] * 4]
    answers = [[sampled(*a) for a in zip(*pair, strict=True)] for pair in zip(texts, ended, strict=True)]
    assert make_reward("outcome", None, RlOptions())(problems, answers) == [[1, 0, 0, 0], [1, 1, 0, 1]]
    # Of three kinds: who says that he does not know is not wrong, but has to come to an end.
    texts = [
        "ans 4",
        "ans 5",
        "I do NOT know",
        "so\nwell , i do not know .",
        "i do not know\nans 4",
        "i do not know",
        "",
    ]
    each = [sampled(text, i != 5) for i, text in enumerate(texts)]
    assert make_reward("truthrl", None, RlOptions())(problems[:1], [each]) == [[1, -1, 0, 0, 1, -1, -1]]
    said = make_reward("truthrl", None, RlOptions(abstention="Pass"))
    assert said(problems[:1], [[sampled("pass"), sampled("i do not know")]]) == [[0, -1]]


@pytest.mark.slow
def test_rewards_of_a_reward_model(home):
    cfg = RlConfig(model="m", data="d", out=home / "none", dtype="float32")
    judge = reward.load(home / "judge", dtype="float32")
    problems = [{"id": "0", "prompt": "how many eggs does Ada have ?\n", "answer": "4"}, {"id": "1", "prompt": "?"}]
    long = "\n".join(["3 + 4 = 7"] * 30) + "\nans 7"
    texts = [["3 + 4 = 7\nans 7", "ans 4", "3 + 4"], ["", long, "ans 1"]]
    answers = [[sampled(text, text != "3 + 4") for text in each] for each in texts]
    asked = [Solution(problems[0]["prompt"], ["3 + 4 = 7", "ans 7"]), Solution(problems[0]["prompt"], ["ans 4"])]
    scores = score_solutions(judge, load_tokenizer(home / "judge"), [*asked, Solution("?", ["ans 1"])], batch=4)
    assert scores[0][0] != scores[0][1]
    for how in ("min", "mean", "last"):
        found = make_reward(str(home / "judge"), cfg, RlOptions(aggregate=how, score_batch=4))(problems, answers)
        worth = [aggregate(s, how) for s in scores]
        # Cut, or without a final answer: 0. Longer than the model's positions: none.
        assert found == [[worth[0], worth[1], 0.0], [0.0, None, worth[2]]]


def test_what_cannot_be_trained_is_refused(run, home, tmp_path):
    problems = ("--data", home / "problems.jsonl")
    status, _, err = train(run, home, tmp_path / "out", *problems, "--evaluate-every", 1)
    assert (status, "--evaluate-every without --test; expected a file" in err) == (2, True)
    status, _, err = train(run, home, tmp_path / "out", *problems, "--reward", home / "run")
    assert (status, "is no reward model; expected the folder of one, or outcome, truthrl, critique" in err) == (1, True)
    for name in (home / "run", "nope"):
        more = (*problems, "--reward", "outcome", name, "--dry-run")
        status, _, err = train(run, home, tmp_path / "out", *more)
        assert (status, f"train rl: {name} is no reward model; expected the folder" in err) == (1, True)
    for names in (("outcome", home / "judge"), ("truthrl",), ("critique",)):
        assert train(run, home, tmp_path / "out", *problems, "--reward", *names, "--dry-run")[0] == 0
    status, _, err = train(run, home, tmp_path / "out", "--data", home / "guesses.jsonl")
    assert (status, "has no `answer`; expected one in every row" in err) == (1, True)
    for i, answer in enumerate(("", " \n")):
        rows = [{"prompt": "p", "answer": text} for text in ["4"] * i + [answer]]
        status, _, err = train(run, home, tmp_path / "out", "--data", write(tmp_path / "empty.jsonl", rows))
        found = f"row {i} of {tmp_path / 'empty.jsonl'} has the `answer` {answer!r}; expected a number or words"
        assert (status, found in err) == (1, True)
    status, _, err = train(run, home, tmp_path / "out", *problems, "--algorithm", "grop")
    assert (status, "found 'grop'" in err) == (1, True)
    status, _, err = train(run, home, tmp_path / "out", *problems, "--max-length", 12)
    assert (status, "row 0 of" in err, "expected at most 7, to leave 5 for an answer" in err) == (1, True, True)
    made = (f"{make_problem(ArithmeticConfig(), 'train', i).question}\n" for i in range(3 * 8))  # those of the run
    lengths = [len(arithmetic_tokenizer().encode(prompt)) for prompt in made]
    longest = max(lengths)
    more = ("--data", "builtin:arithmetic", "--steps", 3, "--max-length", longest + 4)
    status, _, err = train(run, home, tmp_path / "out", *more)
    found = f"row {lengths.index(longest)} of builtin:arithmetic has a prompt of {longest} tokens"
    assert (status, found in err, f"at most {longest - 1}" in err) == (1, True, True)
    assert run("train", "rl", "--help")[1].count("--algorithm") == 1
    write(tmp_path / "settings.yaml", [])
    (tmp_path / "settings.yaml").write_text("steps: 0\n")
    status, _, err = train(run, home, tmp_path / "out", *problems, "--config", tmp_path / "settings.yaml")
    assert (status, "steps: found 0" in err) == (1, True)
