"""`jaxaroo label ...`, with a model that knows nothing: what is written, kept, gone on with and refused."""

import json

import jax
import pytest

from jaxaroo.models.decoder import DecoderConfig, Model, init_params
from jaxaroo.models.hf import save
from jaxaroo.train.data.arithmetic import ArithmeticConfig, arithmetic_tokenizer, check_lines, make_problem


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


def sample(run, policy, out, *more):
    asked = ("--data", "builtin:arithmetic", "--samples", 2, "--max-new-tokens", 12, "--max-seqs", 4)
    return run("label", "sample", "--model", policy, *asked, "--out", out, *more)


def test_sampled_solutions_are_rows_of_steps_and_a_killed_job_goes_on(run, policy, tmp_path):
    status, _, err = sample(run, policy, tmp_path / "s.jsonl", "--limit", 3)
    assert (status, "wrote" in err) == (0, True)
    rows = rows_of(tmp_path / "s.jsonl")
    assert [row["id"] for row in rows] == ["0:0", "0:1", "1:0", "1:1", "2:0", "2:1"]
    for row in rows:
        problem = make_problem(ArithmeticConfig(), "train", int(row["id"].split(":")[0]))
        assert row["prompt"] == f"{problem.question}\n"
        assert row["truth"] == [int(ok) for ok in check_lines(problem, row["steps"])]
        assert row["outcome"] == 0  # cut at 12 tokens
    assert any(row["steps"] for row in rows)
    whole = (tmp_path / "s.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "k.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:20])
    assert sample(run, policy, tmp_path / "k.jsonl", "--limit", 3)[0] == 0
    assert (tmp_path / "k.jsonl").read_bytes() == whole


def test_steps_are_labelled_by_completions_truth_or_outcome_and_files_can_agree(run, policy, tmp_path):
    rows = [
        {"id": "a", "prompt": "ben has 3 eggs .\n", "steps": ["3 + 4 = 7", "ans 7"], "answer": "7"}
        | {"outcome": 1, "truth": [1, 1]},
        {"id": "b", "prompt": "ben has 3 eggs .\n", "steps": ["3 + 4 = 8", "ans 8"], "answer": "7"}
        | {"outcome": 0, "truth": [0, 0]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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

    files = ("--weak", tmp_path / "mc.jsonl", "--strong", tmp_path / "truth.jsonl", "--out", tmp_path / "kept.jsonl")
    status, out, _ = run("label", "agree", *files, "--keep", "step", "--json")
    report = json.loads(out)
    assert (status, report["solutions"]) == (0, 2)
    assert report["kept_steps"] == sum(x is not None for row in rows_of(tmp_path / "kept.jsonl") for x in row["labels"])


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        ("label sample --model {policy} --data builtin:arithmetic --out {tmp}/o --samples 0", 2, "--samples 0"),
        ("label sample --model {policy} --data builtin:arithmetic --out {tmp}/o --temperature 0", 2, "all different"),
        ("label sample --model {tmp}/none --data builtin:arithmetic --out {tmp}/o", 1, "none"),
        ("label sample --model {policy} --data builtin:arithmetic --out {tmp}/odd.jsonl", 1, "a multiple of"),
        ("label steps --data {tmp}/odd.jsonl --out {tmp}/o", 2, "the folder of a completer"),
        ("label steps --data {tmp}/bad.jsonl --out {tmp}/o --by truth", 1, "bad.jsonl:1"),
        ("label steps --data {tmp}/odd.jsonl --out {tmp}/o --by truth", 2, "row 0 of"),
        ("label steps --data {tmp}/odd.jsonl --out {tmp}/o --by outcome", 2, "has no `outcome`"),
        ("label steps --data {tmp}/odd.jsonl --out {tmp}/o --by guess", 2, "guess"),
        ("label agree --weak {tmp}/odd.jsonl --strong {tmp}/none.jsonl --out {tmp}/o", 1, "none.jsonl"),
    ],
)
def test_bad_input(run, policy, tmp_path, argv, status, message):
    (tmp_path / "odd.jsonl").write_text('{"id": "0:0", "prompt": "q", "steps": ["a"], "answer": "1"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "q"}\n')
    found, out, err = run(*argv.format(policy=policy, tmp=tmp_path).split())
    assert found == status
    assert message in out + err
