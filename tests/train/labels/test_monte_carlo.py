"""A random walk whose value is known labels itself; a job killed at any byte ends as one that was not."""

import errno
import io
import json

import numpy as np
import pytest

from jaxaroo.train.data.formats import DataError, open_examples
from jaxaroo.train.labels import monte_carlo
from jaxaroo.train.labels.monte_carlo import MonteCarloConfig, job_rows, label, read_job, step_seed

UP, TOP = 0.4, 5  # the walk goes up with this chance, and is right if it reaches the top before 0


def walk(start, seed):
    """One completion: the places that a walk visits, one a line."""
    rng, place, text = np.random.default_rng(seed), start, []
    while 0 < place < TOP:
        place += 1 if rng.random() < UP else -1
        text.append(str(place))
    return "\n".join(text)


def sample(prompts, n, seeds):
    """The walk goes on from the last place in the prompt."""
    assert len(prompts) == len(seeds)
    assert all(prompt.endswith("\n") for prompt in prompts)
    places = [int(prompt.split()[-1]) for prompt in prompts]
    return [[walk(p, [seed, i]) for i in range(n)] for p, seed in zip(places, seeds, strict=True)]


def check(problem, text):
    """The whole solution, from the first step on, is right if it ends at the goal."""
    places = [int(line) for line in text.split()]
    assert places[0] == int(problem["steps"][0])
    return places[-1] == problem["goal"]


def problem(name, steps, goal=TOP):
    return {"id": name, "prompt": f"walk {name}:\n", "steps": [str(s) for s in steps], "goal": goal}


def value(place):
    """Chance to reach the top first: solves v(i) = UP v(i + 1) + (1 - UP) v(i - 1), v(0) = 0, v(TOP) = 1."""
    A, b = np.eye(TOP + 1), np.zeros(TOP + 1)
    b[TOP] = 1
    for i in range(1, TOP):
        A[i, i + 1], A[i, i - 1] = -UP, -(1 - UP)
    return np.linalg.solve(A, b)[place]


JOB = [problem("a", [2, 1, 2, 3]), problem("b", [1, 0]), problem("c", [3, 4, 5]), problem("d", [4, 3, 2, 1, 0])]


@pytest.mark.slow
def test_soft_labels_are_unbiased_and_their_variance_falls_as_one_over_n(tmp_path):
    number = 1500
    spread = {}
    for n in (2, 8):
        solutions = [problem(f"{i}", [3, 2, 3]) for i in range(number)]
        cfg = MonteCarloConfig(n=n, early_stop=False, last_step="draw", batch=999, seed=n)
        rows = label(solutions, sample, check, tmp_path / f"{n}.jsonl", cfg)
        soft = np.array([row["soft"] for row in rows])
        for step, place in enumerate((3, 2, 3)):
            true = value(place)
            variance = true * (1 - true) / n
            assert abs(soft[:, step].mean() - true) < 4 * (variance / number) ** 0.5
            # The sample variance of `number` means of n draws has a relative error of about sqrt(2 / number).
            np.testing.assert_allclose(soft[:, step].var(), variance, rtol=5 * (2 / number) ** 0.5)
            hard = np.array([row["labels"][step] for row in rows])
            any_right = 1 - (1 - true) ** n
            assert abs(hard.mean() - any_right) < 4 * (any_right * (1 - any_right) / number) ** 0.5
            np.testing.assert_array_equal(hard, soft[:, step] > 0)
        spread[n] = soft.var(axis=0)
        assert abs(np.corrcoef(soft[:, 0], soft[:, 2])[0, 1]) < 4 / number**0.5  # steps are drawn independently
    np.testing.assert_allclose(spread[2] / spread[8], 4, rtol=0.3)


class Counted:
    """`sample`, and what it was asked."""

    def __init__(self, fail_at=None):
        self.asked, self.calls, self.fail_at = [], [], fail_at

    def __call__(self, prompts, n, seeds):
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append(len(prompts))
        self.asked += prompts
        return sample(prompts, n, seeds)


CFG = MonteCarloConfig(n=3, batch=3, threshold=0.0, seed=7)


def oracle(problems, cfg):
    """Row by row, in waves: what a plain loop over steps would write."""
    lines, stopped = [], set()
    for step in range(1, 1 + max(len(p["steps"]) for p in problems)):
        for p in problems:
            if len(p["steps"]) < step or p["id"] in stopped:
                continue
            if step == len(p["steps"]) and cfg.last_step == "check":
                right, n = int(int(p["steps"][-1]) == p["goal"]), 1
            else:
                seed, n = step_seed(cfg.seed, p["id"], step), cfg.n
                ends = [(walk(int(p["steps"][step - 1]), [seed, i]) or p["steps"][step - 1]) for i in range(n)]
                right = sum(int(text.split()[-1]) == p["goal"] for text in ends)
            lines.append((p["id"], step, n, right))
            if cfg.early_stop and right / n <= cfg.threshold:
                stopped.add(p["id"])
    return lines


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.4])
@pytest.mark.parametrize("last_step", ["check", "draw"])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_the_file_is_what_a_plain_loop_writes(tmp_path, early_stop, threshold, last_step, batch):
    cfg = MonteCarloConfig(n=3, batch=batch, threshold=threshold, early_stop=early_stop, last_step=last_step, seed=7)
    counted = Counted()
    rows = label(JOB, counted, check, tmp_path / "job.jsonl", cfg)
    header, *written = map(json.loads, (tmp_path / "job.jsonl").read_text().splitlines())
    assert header == {"job": {"n": 3, "seed": 7, "last_step": last_step, "joiner": "\n", "completer": ""}}
    wanted = oracle(JOB, cfg)
    assert [(row["problem"], row["step"], row["n"], row["right"]) for row in written] == wanted
    assert len(counted.asked) == sum(n == 3 for *_, n, _ in wanted)
    assert max(counted.calls) <= batch
    by_step = {(name, step): right / n for name, step, n, right in wanted}
    for p, row in zip(JOB, rows, strict=True):
        soft = [by_step.get((p["id"], step + 1)) for step in range(len(p["steps"]))]
        assert row["soft"] == soft
        assert row["labels"] == [None if share is None else int(share > threshold) for share in soft]
        assert {name: row[name] for name in p} == p
        if early_stop and 0 in row["labels"]:
            assert set(row["labels"][row["labels"].index(0) + 1 :]) <= {None}


def test_early_stopping_saves_what_lies_behind_the_first_error(tmp_path):
    solutions = [problem(f"{i}", [3, 0, 2, 3]) for i in range(4)]  # a walk that has ended never gets up again
    counts = {}
    for early_stop in (True, False):
        counted = Counted()
        cfg = MonteCarloConfig(n=8, early_stop=early_stop, last_step="draw")
        rows = label(solutions, counted, lambda p, text: text.split()[-1] == "5", tmp_path / f"{early_stop}", cfg)
        counts[early_stop] = len(counted.asked)
        assert all(row["labels"][1] == (None if row["labels"][0] == 0 and early_stop else 0) for row in rows)
    assert counts[False] == 16
    assert counts[True] == 8


def test_a_job_killed_at_any_byte_ends_as_an_unbroken_one(tmp_path):
    whole_path, path = tmp_path / "whole.jsonl", tmp_path / "job.jsonl"
    wanted = label(JOB, sample, check, whole_path, CFG)
    whole = whole_path.read_bytes()
    total = len(oracle(JOB, CFG))
    drawn = sum(n == 3 for *_, n, _ in oracle(JOB, CFG))
    assert whole.count(b"\n") == 1 + total
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    near = {end + by for end in (0, *ends) for by in (-1, 0, 1)} & {*range(len(whole) + 1)}
    for cut in sorted({*range(0, len(whole), 11)} | near):
        path.write_bytes(whole[:cut])
        counted = Counted()
        assert label(JOB, counted, check, path, CFG) == wanted
        assert path.read_bytes() == whole
        present = [json.loads(line) for line in whole[:cut].splitlines(keepends=True)[1:] if line.endswith(b"\n")]
        assert len(counted.asked) == drawn - sum(row["n"] == 3 for row in present)  # nothing is asked twice
    assert counted.asked == []
    for end in ends[:2] + ends[-1:]:  # a machine that lost power may leave zeros
        path.write_bytes(whole[:end] + bytes(9999))
        assert label(JOB, sample, check, path, CFG) == wanted
        assert path.read_bytes() == whole


def test_a_job_that_is_stopped_while_it_draws_keeps_every_finished_batch(tmp_path):
    whole = tmp_path / "whole.jsonl"
    wanted = label(JOB, sample, check, whole, CFG)
    asked, path = 0, tmp_path / "job.jsonl"
    for _ in range(20):  # killed in every second call
        counted = Counted(fail_at=1)
        try:
            rows = label(JOB, counted, check, path, CFG)
        except KeyboardInterrupt:
            asked += len(counted.asked)
            assert whole.read_bytes().startswith(path.read_bytes())
        else:
            asked += len(counted.asked)
            break
    assert rows == wanted
    assert path.read_bytes() == whole.read_bytes()
    assert asked == sum(n == 3 for *_, n, _ in oracle(JOB, CFG))


def test_a_full_disk_loses_nothing_that_was_written(tmp_path, monkeypatch):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "job.jsonl"
    label(JOB, sample, check, whole, CFG)
    room = [0]

    class Full(io.FileIO):
        """A file with room for so many bytes more: it takes what fits, then refuses."""

        def write(self, data):
            took = super().write(data[: min(len(data), room[0], 50)])  # and never much at once
            room[0] -= took
            if not took:
                raise OSError(errno.ENOSPC, "No space left on device")
            return took

    append = monte_carlo._append
    monkeypatch.setattr(
        monte_carlo, "_append", lambda file, rows: append(Full(file.fileno(), "r+", closefd=False), rows)
    )
    before, refused = b"", 0
    for more in (10, 100, 61, 333, 10**9):
        room[0] = more
        try:
            label(JOB, sample, check, path, CFG)
        except OSError as error:
            refused += error.errno == errno.ENOSPC
        now = path.read_bytes()
        assert whole.read_bytes().startswith(now)
        assert now.startswith(before[: before.rfind(b"\n") + 1])
        before = now
    assert (before, refused) == (whole.read_bytes(), 4)


def test_a_batch_is_on_the_disk_before_the_next_is_drawn(tmp_path):
    path, seen = tmp_path / "job.jsonl", []

    def look(prompts, n, seeds):
        seen.append(path.read_bytes())
        return sample(prompts, n, seeds)

    label(JOB, look, check, path, MonteCarloConfig(n=3, batch=2, last_step="draw", seed=7))
    whole = path.read_bytes().splitlines(keepends=True)
    assert [data.count(b"\n") for data in seen][:3] == [1, 3, 5]
    assert all(b"".join(whole[: data.count(b"\n")]) == data for data in seen)


def test_seeds_depend_on_seed_solution_and_step_alone(tmp_path):
    found = {}

    def look(prompts, n, seeds):
        found.update(zip(prompts, seeds, strict=True))
        return sample(prompts, n, seeds)

    cfg = MonteCarloConfig(n=2, early_stop=False, last_step="draw", batch=3)
    label(JOB, look, check, tmp_path / "all", cfg)
    everything, found = found, {}
    label(JOB[2:3], look, check, tmp_path / "one", cfg)
    assert len(found) == 3
    assert found.items() <= everything.items()
    assert len({*everything.values()}) == len(everything) == 14
    assert all(0 <= seed < 2**32 for seed in everything.values())
    assert len({step_seed(*x) for x in [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a1", 1)]}) == 5
    assert step_seed(0, "a", 1) == 4056187206  # as `printf '[0, "a", 1]' | b2sum -l 32` has it: for good


def test_another_threshold_reads_the_same_file(tmp_path):
    path = tmp_path / "job.jsonl"
    label(JOB, sample, check, path, MonteCarloConfig(n=3, early_stop=False, seed=7))
    size = path.stat().st_size
    for threshold in (0.0, 0.34, 0.7):
        cfg = MonteCarloConfig(n=3, threshold=threshold, seed=7)
        counted = Counted()
        fresh = label(JOB, sample, check, tmp_path / f"{threshold}", cfg)
        assert label(JOB, counted, check, path, cfg) == fresh == job_rows(JOB, read_job(path, cfg), cfg)
        assert counted.asked == []
    assert path.stat().st_size == size


def test_chats_are_rendered_by_the_caller_and_rows_are_of_the_layout(tmp_path):
    chats = [{**p, "prompt": [{"role": "user", "content": p["prompt"]}]} for p in JOB]
    render = lambda p, text: [*p["prompt"], {"role": "assistant", "content": text}]
    unpack = lambda prompts, n, seeds: sample([prompt[-1]["content"] for prompt in prompts], n, seeds)
    rows = label(chats, unpack, check, tmp_path / "job.jsonl", CFG, render=render)
    plain = label(JOB, sample, check, tmp_path / "plain.jsonl", CFG)
    assert [row["soft"] for row in rows] == [row["soft"] for row in plain]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    examples = open_examples(tmp_path / "rows.jsonl")
    assert (examples.layout, list(examples)) == ("steps", plain)


def test_a_completion_that_was_cut_is_drawn_and_not_right(tmp_path):
    """None of three is checked: what stands before it might end like a right answer."""
    cut = lambda prompts, n, seeds: [[None, "5", None] for _ in prompts]
    [row] = label([problem("a", [5, 5])], cut, check, tmp_path / "job.jsonl", CFG)
    assert (row["soft"], row["labels"]) == ([1 / 3, 1.0], [1, 1])
    assert json.loads((tmp_path / "job.jsonl").read_text().splitlines()[1])["n"] == 3


@pytest.mark.errors
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [lines[0].replace('"n": 3', '"n": 4'), *lines[1:]], "labels made with .*Set the same, or name"),
        (lambda lines: lines[1:], "labels made with None"),
        (lambda lines: ["a poem\n", *lines], "job.jsonl:1: Expecting value"),
        (lambda lines: [lines[0], "[1]\n", *lines[1:]], "job.jsonl:2: .*expected one JSON object a line"),
        (lambda lines: [*lines, lines[1]], "expected a step that was not there yet"),
        (lambda lines: [lines[0], '{"step": 1}\n'], 'job.jsonl:2: {"step": 1}; expected a step'),
        (lambda lines: ["a poem"], "expected a file of labels, or none. Name another file"),
        *[
            (
                lambda lines, new=new: [*lines[:-1], json.dumps(json.loads(lines[-1]) | new) + "\n"],
                "expected a step that",
            )
            for new in (
                {"right": 4},
                {"right": -1},
                {"right": "1"},
                {"n": 0},
                {"n": 2},
                {"step": 0},
                {"problem": ["a"]},
            )
        ],
    ],
)
def test_files_that_are_not_of_this_job(tmp_path, change, message):
    path = tmp_path / "job.jsonl"
    label(JOB, sample, check, path, CFG)
    changed = "".join(change(path.read_text().splitlines(keepends=True)))
    path.write_text(changed)
    with pytest.raises(DataError, match=message):
        label(JOB, sample, check, path, CFG)
    assert path.read_text() == changed  # a refused file is not touched


@pytest.mark.errors
def test_what_cannot_be_labelled(tmp_path):
    path = tmp_path / "job.jsonl"
    label(JOB, sample, check, path, CFG)
    counted = Counted()
    with pytest.raises(DataError, match="first 2 steps of 'c' are not those that were labelled"):
        label([problem("new", [2, 3]), *JOB[:2], problem("c", [3, 3, 5])], counted, check, path, CFG)
    assert counted.asked == []  # it is refused before the new one costs anything
    for bad, message in [
        ([JOB[0], JOB[0]], "solution 1 has id 'a'; expected a string that no other has"),
        ([JOB[0] | {"id": 3}], "solution 0 has id 3"),
        ([JOB[0] | {"steps": []}], "has steps \\[\\]"),
        ([JOB[0] | {"prompt": []}], "has prompt \\[\\]; expected text, or a function `render`"),
    ]:
        with pytest.raises(ValueError, match=message):
            label(bad, sample, check, tmp_path / "new", CFG)
    for wrong in (lambda prompts, n, seeds: [["1"] * 2] * len(prompts), lambda prompts, n, seeds: [["1"] * 3] * 9):
        with pytest.raises(ValueError, match="completions of step 1; expected 3 for each of 3 prompts"):
            label(JOB, wrong, lambda p, text: True, tmp_path / "short", CFG)
    for options in ({"n": 0}, {"batch": 0}, {"threshold": 1}, {"last_step": "skip"}):
        with pytest.raises(ValueError, match="MonteCarloConfig"):
            MonteCarloConfig(**options)
    assert label([], sample, check, tmp_path / "none", CFG) == []
