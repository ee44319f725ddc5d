"""`jaxaroo label ...`, with a model that knows nothing: what is written, kept, gone on with and refused."""

import json

import jax
import numpy as np
import pytest

import jaxaroo
from jaxaroo.models.decoder import DecoderConfig, Model, init_params
from jaxaroo.models.hf import load, save
from jaxaroo.train.data.arithmetic import (
    ArithmeticConfig,
    arithmetic_tokenizer,
    check_lines,
    explain_lines,
    make_problem,
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """It writes digits and lines at random."""
    tokenizer = arithmetic_tokenizer()
    cfg = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        embed_dim=16,
        ffn_dim=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_positions=128,
        eos_ids=tokenizer.eos_ids,
    )
    folder = tmp_path_factory.mktemp("policy") / "model"
    save(folder, Model(cfg, init_params(cfg, jax.random.key(0))))
    tokenizer.save(folder)
    return folder


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def sample(run, policy, out, *more):
    asked = ("--data", "builtin:arithmetic", "--samples", 2, "--max-new-tokens", 12, "--max-seqs", 4)
    return run("label", "sample", "--model", policy, *asked, "--out", out, *more)


@pytest.mark.slow
def test_sampled_solutions_are_rows_of_steps_and_a_killed_job_goes_on(run, policy, tmp_path):
    status, _, err = sample(run, policy, tmp_path / "s.jsonl", "--limit", 3)
    assert (status, "wrote" in err) == (0, True)
    rows = rows_of(tmp_path / "s.jsonl")
    assert [row["id"] for row in rows] == ["0:0", "0:1", "1:0", "1:1", "2:0", "2:1"]
    for row in rows:
        problem = make_problem(ArithmeticConfig(), "train", int(row["id"].split(":")[0]))
        assert row["prompt"] == f"{problem.question}\n"
        assert row["truth"] == [int(ok) for ok in check_lines(problem, row["steps"])]
        assert row["feedback"] == explain_lines(problem, row["steps"])
        assert row["outcome"] == 0  # cut at 12 tokens
    assert any(row["steps"] for row in rows)
    whole = (tmp_path / "s.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    for left in (b"".join(lines[:2]) + lines[2][:20], b"".join(lines[:3])):  # within a line, and within a problem
        (tmp_path / "k.jsonl").write_bytes(left)
        assert sample(run, policy, tmp_path / "k.jsonl", "--limit", 3)[0] == 0
        assert (tmp_path / "k.jsonl").read_bytes() == whole
    (tmp_path / "note.txt").write_text("no newline behind it")
    assert sample(run, policy, tmp_path / "note.txt", "--limit", 3)[0] == 1
    assert (tmp_path / "note.txt").read_text() == "no newline behind it"
    for other in (("--samples", 3), ("--first", 1)):  # of which these rows are no beginning
        status, _, err = sample(run, policy, tmp_path / "k.jsonl", "--limit", 3, *other)
        assert (status, "name another --out" in err, (tmp_path / "k.jsonl").read_bytes()) == (1, True, whole)


@pytest.mark.slow
def test_a_problem_too_long_for_the_policy_keeps_none_from_being_asked(run, policy, tmp_path):
    write(tmp_path / "rows.jsonl", [{"prompt": "ben has 3 eggs .\n" * n, "answer": "7"} for n in (1, 99, 1)])
    base = ("label", "sample", "--model", policy, "--data", tmp_path / "rows.jsonl", "--samples", 2, "--max-seqs", 1)
    status, _, err = run(*base, "--max-new-tokens", 4, "--out", tmp_path / "o.jsonl")
    assert (status, "problem 1 was not asked: " in err) == (0, True)
    rows = rows_of(tmp_path / "o.jsonl")
    assert [row["id"] for row in rows] == ["0:0", "0:1", "1:0", "1:1", "2:0", "2:1"]
    assert [(row["steps"], row["outcome"], "error" in row) for row in rows[2:4]] == [([], 0, True)] * 2
    assert not any("error" in row for row in (*rows[:2], *rows[4:]))
    whole = (tmp_path / "o.jsonl").read_bytes()
    (tmp_path / "o.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
    assert run(*base, "--max-new-tokens", 4, "--out", tmp_path / "o.jsonl")[0] == 0
    assert (tmp_path / "o.jsonl").read_bytes() == whole
    status, _, err = run(*base, "--max-new-tokens", 500, "--out", tmp_path / "n.jsonl")
    assert (status, "max_tokens: found 500" in err) == (1, True)  # of which no problem is the reason


@pytest.mark.slow
def test_steps_are_labelled_by_completions_truth_or_outcome_and_files_can_agree(run, policy, tmp_path):
    rows = [
        {"id": "a", "prompt": "ben has 3 eggs .\n", "steps": ["3 + 4 = 7", "ans 7"], "answer": "7"}
        | {"outcome": 1, "truth": [1, 1]},
        {"id": "b", "prompt": "ben has 3 eggs .\n", "steps": ["3 + 4 = 8", "ans 8"], "answer": "7"}
        | {"outcome": 0, "truth": [0, 0]},
    ]
    write(tmp_path / "rows.jsonl", rows)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("\n")  # of no row, here as in every file of rows
    base = ("label", "steps", "--data", tmp_path / "rows.jsonl", "--out")
    assert run(*base, tmp_path / "truth.jsonl", "--by", "truth")[0] == 0
    assert [row["labels"] for row in rows_of(tmp_path / "truth.jsonl")] == [[1, 1], [0, 0]]
    assert run(*base, tmp_path / "outcome.jsonl", "--by", "outcome")[0] == 0
    assert [row["labels"] for row in rows_of(tmp_path / "outcome.jsonl")] == [[None, 1], [None, 0]]

    drawn = ("--model", policy, "--n", 2, "--max-new-tokens", 6, "--no-early-stop")
    status, _, err = run(*base, tmp_path / "mc.jsonl", *drawn)
    assert (status, "2 solutions" in err) == (0, True)
    labelled = rows_of(tmp_path / "mc.jsonl")
    assert [row["labels"][-1] for row in labelled] == [1, 0]  # the last step is checked, not drawn
    assert all(row["soft"][0] in (0, 0.5, 1) for row in labelled)
    job = (tmp_path / "mc.job.jsonl").read_bytes()
    assert run(*base, tmp_path / "mc.jsonl", *drawn)[0] == 0
    assert (tmp_path / "mc.job.jsonl").read_bytes() == job  # nothing was asked twice
    status, _, err = run(*base, tmp_path / "mc.jsonl", *drawn, "--temperature", 0.5)
    assert (status, "Set the same, or name another file" in err) == (1, True)

    write(tmp_path / "rows.jsonl", [rows[0], rows[0] | {"id": "long", "steps": ["3 + 4 = 7"] * 40}, rows[1]])
    status, _, err = run(*base, tmp_path / "some.jsonl", *drawn)
    assert (status, "1 solutions are too long for the completer, the first long; they are left out" in err) == (0, True)
    assert rows_of(tmp_path / "some.jsonl") == labelled
    status, _, err = run(*base, tmp_path / "none.jsonl", *drawn[:4], "--max-new-tokens", 500)
    assert (status, "--max-new-tokens 500 fits behind no row" in err) == (1, True)
    for change, message in (({"prompt": [{"role": "user", "content": "?"}]}, "prompt"), ({"id": None}, "id")):
        write(tmp_path / "bad.jsonl", [rows[0] | change])
        status, _, err = run("label", "steps", "--data", tmp_path / "bad.jsonl", "--out", tmp_path / "n.jsonl", *drawn)
        assert (status, message in err, "Traceback" in err) == (1, True, False)

    files = ("--weak", tmp_path / "mc.jsonl", "--strong", tmp_path / "truth.jsonl", "--out", tmp_path / "kept.jsonl")
    status, out, _ = run("label", "agree", *files, "--keep", "step", "--json")
    report = json.loads(out)
    assert (status, report["solutions"]) == (0, 2)
    assert report["kept_steps"] == sum(x is not None for row in rows_of(tmp_path / "kept.jsonl") for x in row["labels"])

    judged = [row | {"labels": row["truth"], "judge": at} for row, at in zip(rows, (-1, 1), strict=True)]
    write(tmp_path / "judged.jsonl", judged)  # of the second solution the judge finds the first step right
    files = ("--strong", tmp_path / "judged.jsonl", "--judge", "judge", "--out", tmp_path / "kept.jsonl")
    assert run("label", "agree", *files)[1] == "kept 1 of 2 solutions, 2 of 4 steps\n"
    assert [row["id"] for row in rows_of(tmp_path / "kept.jsonl")] == ["a"]


def test_a_known_answer_may_be_words(run, policy, tmp_path):
    row = {"id": "a", "prompt": "ben has 3 eggs .\n", "steps": ["the answer is yes"], "answer": "Yes"}
    write(tmp_path / "rows.jsonl", [row, {**row, "id": "b", "answer": "no"}])
    out = tmp_path / "mc.jsonl"
    assert run("label", "steps", "--data", tmp_path / "rows.jsonl", "--out", out, "--model", policy, "--n", 1)[0] == 0
    assert [row["labels"] for row in rows_of(out)] == [[1], [0]]


def test_a_completion_that_was_cut_makes_no_step_right(run, policy, tmp_path):
    """The last number before the cut is often that of the step, which is the answer here."""
    row = {"id": "a", "prompt": "ben has 3 eggs .\n", "steps": ["3 + 4 = 7", "ans 7"], "answer": "7"}
    write(tmp_path / "rows.jsonl", [row])
    asked = ("--data", tmp_path / "rows.jsonl", "--out", tmp_path / "mc.jsonl", "--model", policy)
    assert run("label", "steps", *asked, "--n", 16, "--max-new-tokens", 1, "--no-early-stop")[0] == 0
    [labelled] = rows_of(tmp_path / "mc.jsonl")
    assert labelled["soft"][0] <= 4 / 16  # those that ended at once, which leaves the answer as it stands; 9 otherwise
    assert labelled["soft"][1] == 1.0


@pytest.mark.optimizer
@pytest.mark.proof
def test_feedback_in_words_comes_first_and_labels_second(run, policy, tmp_path):
    assert sample(run, policy, tmp_path / "s.jsonl", "--limit", 8)[0] == 0
    rows = [row for row in rows_of(tmp_path / "s.jsonl") if row["steps"]]
    rows[0]["feedback"] = ["no:\u20285 keeps", *[None] * (len(rows[0]["steps"]) - 1)]  # somebody else's
    write(tmp_path / "s.jsonl", [*rows, {"id": "empty", "prompt": "?", "steps": [], "feedback": []}])
    status, out, _ = run("label", "feedback", "--data", tmp_path / "s.jsonl", "--out", tmp_path / "fb.jsonl", "--json")
    examples = rows_of(tmp_path / "fb.jsonl")
    told = [[said for said in row["feedback"] if said is not None] for row in rows]
    assert status == 0
    assert json.loads(out) == {
        "solutions": len(rows),
        "steps": sum(len(row["steps"]) for row in rows),
        "lines": sum(map(len, told)),
        "without_steps": 1,
    }
    assert examples[0]["completion"] == "no: 5 keeps"
    for row, lines, example in [*zip(rows, told, examples, strict=True)][1:]:
        prompt = row["prompt"] + "\n".join(row["steps"]) + "\n"
        assert example == {"id": row["id"], "prompt": prompt, "completion": "\n".join(lines)}

    short = ("--batch.size", 8, "--batch.max-length", 128, "--optimizer.warmup-steps", 0)
    first = ("--model", policy, "--data", tmp_path / "fb.jsonl", "--out", tmp_path / "sft", "--steps", 3)
    assert run("train", "sft", *first, *short)[0] == 0
    assert run("label", "steps", "--data", tmp_path / "s.jsonl", "--out", tmp_path / "l.jsonl", "--by", "truth")[0] == 0
    second = ("--model", tmp_path / "sft" / "model", "--data", tmp_path / "l.jsonl", "--out", tmp_path / "prm")
    same_places = ("--separator", "\n", "--between", "")
    assert run("train", "prm", *second, "--steps", 2, *short, *same_places)[0] == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "prm" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all()
    asked = ("--data", tmp_path / "l.jsonl", "--json")
    assert run("eval", "prm", "--model", tmp_path / "prm" / "model", *asked)[0] == 0


@pytest.mark.slow
def test_a_policy_cuts_its_solutions_where_it_is_unsure(run, policy, tmp_path):
    tokenizer, model = arithmetic_tokenizer(), load(policy)
    problems = [make_problem(ArithmeticConfig(), "train", i) for i in range(6)]
    rows = [{"id": str(i), "prompt": f"{p.question}\n", "steps": p.lines} for i, p in enumerate(problems)]
    rows[1] = {"id": "1", "prompt": rows[1]["prompt"], "completion": "\n".join(problems[1].lines)}
    of_steps = {"labels": [1], "soft": [1], "truth": [1], "feedback": ["so"], "judge": -1}
    rows = [row | of_steps | {"answer": "7", "outcome": 1, "source": "me"} for row in rows]
    write(tmp_path / "rows.jsonl", [*rows, {"prompt": "?", "steps": []}])
    base = ("label", "split", "--data", tmp_path / "rows.jsonl", "--model", policy, "--share", 0.3, "--shortest", 2)
    status, out, err = run(*base, "--out", tmp_path / "split.jsonl", "--json")
    assert (status, '--between ""' in err) == (0, True)

    logps, pieces = [], []
    for p in problems:
        prompt = tokenizer.encode(f"{p.question}\n")
        ids = prompt + tokenizer.encode("\n".join(p.lines), bos=False)
        logits = np.asarray(jaxaroo.logits(model, np.array([[*ids, *[0] * (128 - len(ids))]])), np.float64)[0]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        logps.append([logp[i - 1, ids[i]] for i in range(len(prompt), len(ids))])
        pieces.append(ids[len(prompt) :])
    behind = sorted(v for logp in logps for v in logp[1:])
    threshold = behind[round(0.3 * len(behind))]
    wanted = []
    for logp, ids in zip(logps, pieces, strict=True):
        steps = [[]]
        for value, token in zip(logp, ids, strict=True):
            if value < threshold and len(steps[-1]) >= 2:
                steps.append([])
            steps[-1].append(token)
        if len(steps[-1]) < 2:
            last = steps.pop()
            steps[-1] += last
        wanted.append(steps)

    found = rows_of(tmp_path / "split.jsonl")
    assert [[tokenizer.encode(step, bos=False) for step in row["steps"]] for row in found] == wanted
    assert ["".join(row["steps"]) for row in found] == ["\n".join(p.lines) for p in problems]
    kept = {"id", "prompt", "answer", "outcome", "source", "steps", "joiner"}
    assert [row.keys() for row in found] == [kept] * 6
    report, number = json.loads(out), sum(map(len, wanted))
    points = sum(v < threshold for v in behind)
    assert report.pop("threshold") == pytest.approx(np.exp(threshold), rel=1e-4)
    assert report == {
        "solutions": 6,
        "empty": 1,
        "share": points / len(behind),
        "merged": points - (number - 6),
        "steps": number,
        "mean_steps": number / 6,
    }
    status, out, _ = run(*base, "--out", tmp_path / "again.jsonl")
    assert (status, f"{points / len(behind):.2%} of all" in out) == (0, True)

    # Labels go by what the rows say stands between their steps: nothing.
    one = ("--data", tmp_path / "split.jsonl", "--out", tmp_path / "l.jsonl", "--model", policy, "--n", 1)
    assert run("label", "steps", *one, "--max-new-tokens", 4)[0] == 0
    assert json.loads((tmp_path / "l.job.jsonl").read_text().splitlines()[0])["job"]["joiner"] == ""
    write(tmp_path / "mixed.jsonl", [{"id": "x", "prompt": "?", "steps": ["1"], "answer": "1"}, found[0]])
    again = ("--data", tmp_path / "mixed.jsonl", "--out", tmp_path / "m.jsonl", "--model", policy, "--n", 1)
    status, _, err = run("label", "steps", *again)
    assert (status, "expected one for all" in err) == (1, True)
    assert run("label", "steps", *again, "--joiner", "\n", "--max-new-tokens", 4)[0] == 0


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (("--by", "line"), ["3 + 4 = 7\n", "7 + 9 = 16\n\n", "ans 16"]),
        (("--by", "separator", "--separator", "= "), ["3 + 4 = ", "7\n7 + 9 = ", "16\n\nans 16"]),
        (("--by", "separator"), ["3 + 4 = 7\n7 + 9 = 16\n\n", "ans 16"]),
        (("--by", "tokens", "--tokens", "5"), ["3 + 4 = 7", "\n7 + 9 =", " 16\n\nans", " 16"]),
        (("--by", "tokens", "--tokens", "99"), ["3 + 4 = 7\n7 + 9 = 16\n\nans 16"]),
    ],
)
def test_steps_of_any_kind_are_the_solution_again(run, policy, tmp_path, options, steps):
    cut = [{"prompt": "?", "completion": "3 + 4 = 7\n7 + 9 = 16\n\nans 16"}]
    asked = ("label", "split", "--model", policy, *options)
    write(tmp_path / "rows.jsonl", cut)
    status, out, _ = run(*asked, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "a.jsonl")
    assert (status, f"1 solutions, {len(steps):.2f} steps each" in out) == (0, True)
    assert rows_of(tmp_path / "a.jsonl") == [{"prompt": "?", "steps": steps, "joiner": ""}]
    assert run(*asked, "--data", tmp_path / "a.jsonl", "--out", tmp_path / "b.jsonl")[0] == 0
    assert rows_of(tmp_path / "b.jsonl") == rows_of(tmp_path / "a.jsonl")  # rows say that nothing stands between
    write(tmp_path / "rows.jsonl", [{"prompt": "?", "steps": ["3 + 4 = 7\n7 + 9 = 16", "ans 16"]}])
    assert run(*asked, "--data", tmp_path / "rows.jsonl", "--joiner", "\n\n", "--out", tmp_path / "b.jsonl")[0] == 0
    assert rows_of(tmp_path / "b.jsonl") == rows_of(tmp_path / "a.jsonl")


def test_white_space_around_lines_stays(run, tmp_path):
    write(tmp_path / "rows.jsonl", [{"prompt": "?", "completion": "\n so \n  3 + 4 = 7\n \n"}])
    assert run("label", "split", "--by", "line", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "o")[0] == 0
    assert rows_of(tmp_path / "o")[0]["steps"] == ["\n so \n", "  3 + 4 = 7\n \n"]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"completion": f"ans {'1' * 200}"}, (), "solution 1: "),  # more than the policy reads
        ({"source": "\ud800"}, ("--by", "line"), "surrogates not allowed"),  # half a character, while it is written
    ],
)
def test_a_split_that_fails_leaves_what_was_there(run, policy, tmp_path, change, options, message):
    row = {"prompt": "?", "completion": "ans 111111111"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | change) + "\n")
    (tmp_path / "out.jsonl").write_text("before\n")
    asked = ("--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out.jsonl", "--model", policy, *options)
    status, _, err = run("label", "split", *asked)
    assert (status, message in err) == (1, True)
    assert (tmp_path / "out.jsonl").read_text() == "before\n"
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "out.jsonl"}


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        ("label sample --model {policy} --data builtin:arithmetic --out {tmp}/o --samples 0", 2, "--samples 0"),
        ("label sample --model {policy} --data builtin:arithmetic --out {tmp}/o --temperature 0", 2, "all different"),
        ("label sample --model {tmp}/none --data builtin:arithmetic --out {tmp}/o --limit 0", 2, "--limit 0: expected"),
        ("label sample --model {tmp}/none --data {tmp}/odd.jsonl --out {tmp}/o --first -1", 2, "--first -1; expected"),
        ("label sample --model {tmp}/none --data builtin:arithmetic --out {tmp}/o", 1, "none"),
        (
            "label sample --model {policy} --data builtin:arithmetic --out {tmp}/odd.jsonl",
            1,
            "expected solution 0:0 of",
        ),
        ("label steps --data {tmp}/odd.jsonl --out {tmp}/o", 2, "the folder of a completer"),
        ("label steps --data {tmp}/bad.jsonl --out {tmp}/o --by truth", 1, "bad.jsonl:1"),
        ("label steps --data {tmp}/odd.jsonl --out {tmp}/o --by truth", 2, "row 0 of"),
        ("label steps --data {tmp}/odd.jsonl --out {tmp}/o --by outcome", 2, "has no `outcome`"),
        ("label steps --data {tmp}/odd.jsonl --out {tmp}/o --by guess", 2, "guess"),
        ("label steps --data {tmp}/list.jsonl --out {tmp}/o --by truth", 1, "list.jsonl:1"),
        ("label feedback --data {tmp}/odd.jsonl --out {tmp}/o", 1, "odd.jsonl: no `feedback`; expected a list of 1"),
        ("label feedback --data {tmp}/long.jsonl --out {tmp}/o", 1, "long.jsonl:1"),
        ("label split --data {tmp}/odd.jsonl --out {tmp}/o", 2, "--by adaptive; expected --model"),
        ("label split --data {tmp}/odd.jsonl --out {tmp}/o --by tokens", 2, "--by tokens; expected --model"),
        ("label split --data {tmp}/odd.jsonl --out {tmp}/none/o --by line", 1, "no folder"),
        ("label split --data {tmp}/odd.jsonl --out {tmp}/o --model {policy}", 1, "solution '0:0': 'b' comes back"),
        ("label split --data {tmp}/bad.jsonl --out {tmp}/o --by line", 1, "`prompt` and `steps`, texts, or `compl"),
        ("label split --data {tmp}/list.jsonl --out {tmp}/o --by line", 1, "list.jsonl:1"),
        ("label split --data {tmp}/odd.jsonl --out {tmp}/o --model {policy} --share 2", 1, "share: found 2"),
        ("label agree --strong {tmp}/odd.jsonl --out {tmp}/o", 2, "expected either --weak"),
        (
            "label agree --weak {tmp}/odd.jsonl --strong {tmp}/odd.jsonl --out {tmp}/o",
            1,
            "`labels` is None; expected a",
        ),
        ("label agree --weak {tmp}/odd.jsonl --strong {tmp}/none.jsonl --out {tmp}/o", 1, "none.jsonl"),
    ],
)
def test_bad_input(run, policy, tmp_path, argv, status, message):
    (tmp_path / "odd.jsonl").write_text('{"id": "0:0", "prompt": "q", "steps": ["b"], "answer": "1"}\n')
    (tmp_path / "list.jsonl").write_text('{"prompt": "q", "steps": ["a", null]}\n')
    (tmp_path / "long.jsonl").write_text('{"prompt": "q", "completion": "a"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "q"}\n')
    found, out, err = run(*argv.format(policy=policy, tmp=tmp_path).split())
    assert found == status
    assert message in out + err


@pytest.mark.errors
@pytest.mark.parametrize(
    ("by", "column", "value", "wanted"),
    [
        ("monte-carlo", "answer", "", "text, a number or words"),
        ("monte-carlo", "answer", 7, "text, a number or words"),
        ("outcome", "outcome", None, "0 or 1"),
        ("outcome", "outcome", -1, "0 or 1"),
        ("truth", "truth", [1], "0, 1 or null for each of 2 steps"),
        ("truth", "truth", None, "0, 1 or null for each of 2 steps"),
    ],
)
def test_labels_come_from_what_can_be_known(run, policy, tmp_path, by, column, value, wanted):
    """Nothing is written: -1 and null were a good step and a bad one, and to an empty answer no solution was right."""
    good = {"id": "a", "prompt": "?", "steps": ["3 + 4 = 7", "ans 7"], "answer": "7", "outcome": 1, "truth": [1, 1]}
    write(tmp_path / "rows.jsonl", [good, good | {"id": "b", column: value}])
    asked = ("--data", tmp_path / "rows.jsonl", "--out", tmp_path / "o.jsonl", "--by", by, "--model", policy)
    status, _, err = run("label", "steps", *asked)
    assert (status, f"has `{column}` {value!r}; expected {wanted}" in err) == (1, True)
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl"}


@pytest.mark.errors
@pytest.mark.parametrize("answer", ["", " . "])
def test_problems_whose_answer_says_nothing_are_not_asked(run, policy, tmp_path, answer):
    write(tmp_path / "rows.jsonl", [{"prompt": "?", "answer": "7"}, {"prompt": "?", "answer": answer}])
    asked = ("--data", tmp_path / "rows.jsonl", "--out", tmp_path / "o.jsonl", "--model", policy)
    status, _, err = run("label", "sample", *asked)
    assert (status, f"row 1 of {tmp_path / 'rows.jsonl'} has `answer` {answer!r}" in err) == (1, True)
    assert not (tmp_path / "o.jsonl").exists()
