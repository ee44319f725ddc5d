"""`jaxaroo train ...`."""

import json

from jaxaroo.cli.train import acceptance


def test_train_writes_a_model_that_can_be_asked(run, trained):
    assert len((trained / "run" / "metrics.jsonl").read_text().splitlines()) == 3  # the command line wins
    assert "size: 8" in (trained / "run" / "config.yaml").read_text()  # and the file fills the rest
    options = ("--model", trained / "run" / "model", "--data", trained / "rows.jsonl", "--limit", 6, "--json")
    status, out, _ = run("eval", "answers", *options, "--max-new-tokens", 8, "--out", trained / "rows.out")
    report = json.loads(out)
    assert (status, report["n"]) == (0, 6)
    assert 0 <= report["accuracy"] <= 1
    rows = [json.loads(line) for line in (trained / "rows.out").read_text().splitlines()]
    assert [row["answer"].split()[-1] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert all(row["prompt"].startswith("Question: what is") for row in rows)


def test_acceptance_counts_tokens_and_depths():
    """Of 4 steps, one emitted 1 token, one 2, two 3: a draft is one token less."""
    found = acceptance([0, 1, 1, 2])
    assert found == {"tau": (1 + 2 + 3 + 3) / 4, "accepted_1": 3 / 4, "accepted_2": 2 / 4}
