"""Rounds without a model: what is chosen, and that a job which is stopped anywhere ends as if it had not been."""

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxaroo.train import rounds
from jaxaroo.train.data.formats import open_examples
from jaxaroo.train.data.pipeline import BatchConfig
from jaxaroo.train.rounds import (
    Loop,
    RankedOptions,
    RoundsConfig,
    ValueRoundsOptions,
    open_rounds,
    run_rounds,
    select,
    trajectories,
)
from jaxaroo.train.run import Outcome, RunConfig


def row(texts, rewards, outcomes=None, name="p", prompt="q\n"):
    texts = [*texts]
    outcomes = [None] * len(texts) if outcomes is None else [*outcomes]
    return {"id": name, "prompt": prompt, "texts": texts, "rewards": [*rewards], "outcomes": outcomes}


def chosen(rows, how, threshold):
    """Which answers are kept, by trying every answer against every other."""
    kept = []
    for r in rows:
        for i, reward in enumerate(r["rewards"]):
            usable = lambda j, r=r: r["rewards"][j] is not None and r["rewards"][j] > threshold
            if not usable(i):
                continue
            others = [j for j in range(len(r["texts"])) if j != i and usable(j)]
            if how == "best":
                beaten = any(r["rewards"][j] > reward or (r["rewards"][j] == reward and j < i) for j in others)
                keep = not beaten
            else:
                right = [j for j in others if r["outcomes"][j] in (1, None)]
                keep = r["outcomes"][i] in (1, None) and not any(
                    j < i and r["texts"][j] == r["texts"][i] for j in right
                )
            if keep:
                kept.append((f"{r['id']}:{i}", r["texts"][i], reward))
    return kept


answers = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from([None, -math.inf, math.nan, 0.0, 0.25, 0.5, 1.0]),
        st.sampled_from([0, 1, None]),
    ),
    min_size=1,
    max_size=6,
)


@given(st.lists(answers, min_size=1, max_size=4), st.sampled_from(["best", "all"]), st.sampled_from([-1.0, 0.0, 0.5]))
def test_selection_is_that_of_brute_force(problems, how, threshold):
    rows = [row(*zip(*each, strict=True), name=str(k)) for k, each in enumerate(problems)]
    wanted = chosen(rows, how, threshold)
    if not wanted:
        with pytest.raises(ValueError, match="none of"):
            select(rows, how, threshold)
        return
    found = select(rows, how, threshold)
    assert [(r["id"], r["completion"], r["reward"]) for r in found] == wanted
    assert all(r["prompt"] == "q\n" for r in found)


def test_a_reward_has_to_be_above_the_threshold_and_messages_are_answered_with_one():
    chat = [{"role": "user", "content": "q"}]
    rows = [row(["a", "b"], [0.5, 0.500001], prompt=chat)]
    [found] = select(rows, "all", 0.5)
    assert found["completion"] == [{"role": "assistant", "content": "b"}]
    assert found["prompt"] == chat
    assert len(select(rows, "all", 0.4999)) == 2
    assert [r["id"] for r in select([row("ab", [-3.0, -2.0])], "best", -math.inf)] == ["p:1"]  # logits are rewards too


@pytest.mark.errors
def test_nothing_left_to_learn_is_an_error_that_says_how_good_the_best_was():
    with pytest.raises(ValueError, match=r"none of 3 answers to 1 problems .* best reward is 0\.25; .* above 0\.5\. "):
        select([row("abc", [0.25, None, 0.1])], "best", 0.5)
    with pytest.raises(ValueError, match="all are malformed"):
        select([row("ab", [None, None])], "all", -math.inf)
    with pytest.raises(ValueError, match="how='worst'; expected best or all"):
        select([row("a", [1.0])], "worst")  # type: ignore[arg-type]


def test_a_value_model_learns_from_every_answer():
    found = trajectories([row("aab", [1.0, 1.0, 0.0], name="x"), row("c", [0.0], name="y")])
    assert [(r["id"], r["completion"], r["label"]) for r in found] == [
        ("x:0", "a", True),
        ("x:1", "a", True),
        ("x:2", "b", False),
        ("y:0", "c", False),
    ]


def test_an_answer_without_text_is_no_row_to_learn_from(tmp_path):
    """One that ended at once: it failed the check of all rows, and with them the round."""
    asked = {"id": "x", "prompt": "x?", "texts": ["", "a"], "rewards": [0.0, 1.0]}
    found = trajectories([asked])
    path = tmp_path / "selected.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in found), encoding="utf-8")
    assert [r["id"] for r in found] == ["x:1"]
    assert open_examples(path, "unpaired")[0]["completion"] == "a"


# ---------------------------------------------------------------------------------------------------------------- loop
ROUNDS, SAMPLES, WAVE = 2, 3, 2


class Stop(BaseException):
    """What a job is stopped by."""


def digest(*parts):
    return hashlib.blake2b(b"|".join(parts), digest_size=8).hexdigest()


def five(number):
    return [{"id": str(i), "prompt": f"q{i}\n", "answer": "1"} for i in range(5 * number, 5 * number + 5)]


def make_loop(base, tick=lambda: None, asked=None, leave=None):
    """Answers, rewards and weights are digests of what they come from. `tick` is called wherever a job may be stopped,
    and `leave` says whether a run saves and leaves instead of coming to its end."""

    def weights(before):
        return ((before or base) / "w").read_bytes()

    def sample(number, before, problems, done):
        for start in range(done - done % WAVE, len(problems), WAVE):
            wave = []
            tick()
            for r in problems[max(start, done) : start + WAVE]:
                if asked is not None:
                    asked.append((number, r["id"]))
                texts = [digest(weights(before), r["id"].encode(), bytes([i])) for i in range(SAMPLES)]
                outcomes = [int(int(t, 16) % 2) for t in texts]
                wave.append({**r, "texts": texts, "whole": [True] * SAMPLES, "outcomes": outcomes})
            yield wave

    def reward(rows):
        tick()
        return [[int(t, 16) % 5 / 4 if i else None for i, t in enumerate(r["texts"])] for r in rows]

    def choose(rows):
        tick()
        return select(rows, "best", 0.0)

    def learn(number, before, data, run):
        tick()
        run.mkdir(exist_ok=True)
        progress = run / "progress"
        progress.write_text("half")
        if leave is not None and leave(number):
            return Outcome(1, False, 15)
        tick()
        made = digest(weights(before), data.read_bytes()).encode()
        (run / "model").mkdir(exist_ok=True)
        (run / "model" / "w").write_bytes(made)
        tick()
        return Outcome(2, True, None)

    def measure(number, model):
        tick()
        return {"measured": digest(bytes([number]), (model / "w").read_bytes())}

    return Loop(five, sample, reward, choose, learn, measure)


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "w").write_bytes(b"first")
    return tmp_path / "base"


def tree(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("half", [False, True])
def test_a_job_stopped_anywhere_ends_as_one_that_was_not(base, tmp_path, monkeypatch, half):
    """It is stopped at each of the places in turn; `half` of the time, so to say, while something is being written."""
    unbroken = tmp_path / "unbroken"
    unbroken.mkdir()
    assert run_rounds(unbroken, ROUNDS, make_loop(base)).finished
    wanted, stopped, replace, append, left = tree(unbroken), 0, os.replace, rounds._append, [math.inf]

    def tick():
        left[0] -= 1
        if left[0] < 0:
            raise Stop

    def write(file, data):
        if half and left[0] <= 0:
            append(file, data[: len(data) // 2])
            raise Stop
        append(file, data)
        tick()

    monkeypatch.setattr(os, "replace", lambda *a: (tick(), replace(*a), tick())[1])
    monkeypatch.setattr(rounds, "_append", write)
    while True:
        out, asked = tmp_path / f"stopped-{stopped}", []
        out.mkdir()
        loop, left[0] = make_loop(base, tick, asked), stopped
        try:
            run_rounds(out, ROUNDS, loop)
        except Stop:
            left[0] = math.inf
        else:
            break
        assert run_rounds(out, ROUNDS, loop).finished
        hidden = lambda files: {name: data for name, data in files.items() if not name.endswith(".partial")}
        assert hidden(tree(out)) == hidden(wanted), stopped
        every = [(n, r["id"]) for n in (1, 2) for r in five(n)]
        assert sorted({*asked}) == sorted(every)
        assert len(asked) <= len(every) + half, stopped  # asked again is what was lost with the second half of a wave
        stopped += 1
    assert stopped > 40  # 2 rounds of 3 waves, 4 files and a run; and the last model


def test_a_run_that_leaves_ends_the_call_and_is_gone_on_with(base, tmp_path):
    once = iter([False, True, False])  # round 1 ends, round 2 leaves, and then ends
    out, told = tmp_path / "out", []
    out.mkdir()
    loop = make_loop(base, leave=lambda number: next(once))
    stand = run_rounds(out, ROUNDS, loop, told=told.append)
    assert (stand.finished, len(stand.reports), stand.outcome) == (False, 1, Outcome(1, False, 15))
    assert not (out / "model").exists()
    assert not (out / "round-2" / "report.json").exists()
    loop = loop._replace(reward=None, choose=None, sample=None)  # what is there already is not made again
    stand = run_rounds(out, ROUNDS, loop, told=told.append)
    assert (stand.finished, stand.outcome) == (True, None)
    assert [r["round"] for r in told] == [1, 1, 2]


def test_rounds_build_on_each_other_and_more_may_follow(base, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    one = run_rounds(out, 1, make_loop(base)).reports
    first = (out / "model" / "w").read_bytes()
    assert first == digest(b"first", (out / "round-1" / "selected.jsonl").read_bytes()).encode()
    with monkeypatch.context() as patch:
        patch.setattr(rounds, "swap_in", lambda *a: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            run_rounds(out, 2, make_loop(base))
    two = run_rounds(out, 2, make_loop(base)).reports
    assert two[:1] == one
    second = (out / "model" / "w").read_bytes()
    assert second == digest(first, (out / "round-2" / "selected.jsonl").read_bytes()).encode()
    assert json.loads((out / "report.json").read_text()) == {"rounds": two}
    with pytest.raises(ValueError, match="more than 1 rounds"):
        run_rounds(out, 1, make_loop(base))
    before = tree(out)
    stat = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    assert run_rounds(out, 2, make_loop(base, tick=None)).reports == two  # nothing at all is done again
    assert tree(out) == before
    assert {p: p.stat().st_mtime_ns for p in stat} == stat


def test_a_report_counts_what_the_files_hold(base, tmp_path):
    def sample(number, before, problems, done):
        some = dict(texts=["a", "b", "c", "d"], whole=[True, True, True, False], outcomes=[1, 0, 1, 0])
        yield [{**problems[0], **some}, *({**r, **some, "outcomes": [None] * 4} for r in problems[1:])]

    loop = make_loop(base)._replace(
        sample=sample,
        reward=lambda rows: [[0.5, 0.25, 0.75, -math.inf]] + [[0.0, 0.0, 0.0, None]] * 4,
        choose=lambda rows: select(rows, "all", 0.0),
    )
    [report] = run_rounds(base.parent, 1, loop).reports
    assert report.pop("measured")
    assert report == dict(
        round=1,
        problems=5,
        answers=20,
        malformed=5,
        mean_reward=1.5 / 15,
        accuracy=0.5,
        selected=2,
        share_selected=0.1,
    )
    rewards = (base.parent / "round-1" / "rewards.jsonl").read_text().splitlines()
    assert json.loads(rewards[0]) == {"id": "5", "rewards": [0.5, 0.25, 0.75, None]}


@pytest.mark.errors
def test_other_problems_answers_or_rewards_are_refused(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    loop = make_loop(base, leave=lambda number: True)
    run_rounds(out, 1, loop)
    other = loop._replace(problems=lambda number: [r | {"answer": "2"} for r in five(number)])
    with pytest.raises(ValueError, match="answers to other problems"):
        run_rounds(out, 1, other)
    with pytest.raises(ValueError, match="answers to other problems"):
        run_rounds(out, 1, loop._replace(problems=lambda number: five(number)[:4]))
    (out / "two").mkdir()
    with pytest.raises(ValueError, match="expected one for every answer"):
        run_rounds(out / "two", 1, loop._replace(reward=lambda rows: [[1.0]] * 5))
    (out / "three").mkdir()
    lazy = lambda *a: iter([[r for wave in loop.sample(*a) for r in wave][:3]])
    with pytest.raises(ValueError, match="3 problems were answered; expected all 5"):
        run_rounds(out / "three", 1, loop._replace(sample=lambda *a: (w for w in lazy(*a))))


@pytest.mark.errors
def test_nobody_else_works_there_at_the_same_time(base, tmp_path):
    out, refused = tmp_path / "out", []
    out.mkdir()

    def choose(rows):
        with pytest.raises(FileExistsError, match="another process is writing to"):
            run_rounds(out, 1, make_loop(base))
        refused.append(True)
        return select(rows, "best", 0.0)

    assert run_rounds(out, 1, make_loop(base)._replace(choose=choose)).finished
    assert refused


# ------------------------------------------------------------------------------------------------------------ settings
def settings(out, **changes):
    return RoundsConfig(**(dict(model=Path("m"), data="builtin:arithmetic", out=out) | changes))


@pytest.mark.errors
def test_a_job_goes_on_with_its_own_settings_alone(tmp_path):
    out = tmp_path / "out"
    open_rounds("ranked", settings(out), RankedOptions())
    open_rounds("ranked", settings(out, rounds=9, max_seqs=1), RankedOptions())
    other = settings(out, temperature=0.5, batch=BatchConfig(size=4))
    with pytest.raises(ValueError, match="other settings") as caught:
        open_rounds("ranked", other, RankedOptions(keep="all"))
    told = str(caught.value)
    for part in (
        "--temperature was 1.0 and is 0.5",
        "--batch.size was 8 and is 4",
        "keep was 'best' and is 'all'",
    ):
        assert part in told
    assert "seed" not in told
    with pytest.raises(ValueError, match="--kind was 'ranked' and is 'value-rounds'"):
        open_rounds("value-rounds", settings(out), ValueRoundsOptions())
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="holds other files; expected a new or empty folder"):
        open_rounds("ranked", settings(tmp_path / "else"), RankedOptions())
    moved = out.rename(tmp_path / "moved")
    open_rounds("ranked", settings(moved), RankedOptions())


@pytest.mark.errors
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: settings(Path("o"), rounds=0), "rounds: found 0; expected at least 1"),
        (lambda: settings(Path("o"), tested=-1), "tested: found -1; expected at least 0"),
        (lambda: settings(Path("o"), temperature=0.0), "expected answers that differ"),
        (lambda: settings(Path("o"), temperature=math.inf, samples=1), "expected answers that differ"),
        (lambda: RankedOptions(threshold=math.nan), "threshold=nan"),
        (lambda: ValueRoundsOptions(beta=-1.0), "beta=-1.0"),
        (lambda: ValueRoundsOptions(width=0), "width=0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    assert settings(Path("o"), temperature=0.0, samples=1).samples == 1


def test_a_run_is_begun_or_gone_on_with(tmp_path, monkeypatch):
    calls, end = [], Outcome(3, True, None)
    monkeypatch.setattr(rounds, "start", lambda kind, cfg, *a, **k: calls.append(("start", kind, cfg.out)) or end)
    monkeypatch.setattr(rounds, "resume", lambda out, **k: calls.append(("resume", out)) or end)
    cfg = RunConfig(model="preset:tiny", data="builtin:arithmetic", out=tmp_path / "run")
    assert rounds.learn("sft", cfg) == end
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.partial").touch()  # stopped before there was a run: `start` wants an empty folder
    rounds.learn("sft", cfg)
    assert not cfg.out.exists()
    cfg.out.mkdir()
    (cfg.out / "config.yaml").touch()
    rounds.learn("value", dataclasses.replace(cfg, steps=9))
    assert calls == [("start", "sft", cfg.out), ("start", "sft", cfg.out), ("resume", cfg.out)]
