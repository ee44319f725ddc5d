"""`jaxaroo bench ...`, and `generate` with a drafter: the same text."""

import json

import pytest


@pytest.mark.slow
def test_bench_writes_a_report_a_table_and_a_plot(run, speaking, tmp_path):
    prompts = tmp_path / "q.jsonl"
    prompts.write_text('{"question_id": 1, "category": "x", "turns": ["la la la la"]}\n')
    options = ("--model", speaking, "--drafter", "lookup", "--drafts", 3, "--prompts", prompts, "--max-new-tokens", 12)
    status, out, _ = run("bench", "speculative", *options, "--repeats", 1, "--no-parts", "--out", tmp_path / "b")
    assert status == 0
    assert {p.name for p in (tmp_path / "b").iterdir()} == {"report.json", "report.md", "acceptance.png"}
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert (report["drafter"], report["identical"], report["questions"]) == ("lookup", 1.0, 1)
    assert (report["seconds"], report["predicted_speedup"], report["verify_over_plain"]) == (None, None, None)
    assert report["speedup"] > 0
    assert out == (tmp_path / "b" / "report.md").read_text()
    assert " | - | 100% |" in out


def test_bench_says_what_is_missing(run, speaking, tmp_path):
    (tmp_path / "q.jsonl").write_text("{}\n")
    options = ("bench", "speculative", "--model", speaking, "--prompts", tmp_path / "q.jsonl")
    assert run(*options)[0::2] == (2, "jaxaroo: bench speculative: expected --drafter, a folder or lookup.\n")
    status, _, err = run(*options, "--drafter", "lookup")
    assert status == 1
    assert "q.jsonl:1: found" in err


def test_generate_with_a_drafter_writes_the_same(run, speaking):
    base = ("generate", "--model", speaking, "--prompt", "la la la", "--max-new-tokens", 20, "--seed", 3, "--json")
    plain, drafted = run(*base), run(*base, "--drafter", "lookup")
    assert json.loads(plain[1])["token_ids"] == json.loads(drafted[1])["token_ids"]
    assert plain[0] == drafted[0] == 0
    status, _, err = run(*base, "--drafter", "lookup", "--verifier", "rejection", "--draw", "independent")
    assert status == 1
    assert "draws nothing" in err
