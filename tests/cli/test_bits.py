"""`jaxaroo eval bits`, and the other commands on a master: what they say, and what they refuse."""

import json

import pytest

from jaxaroo.cli.main import main

ROWS = "--batch.size 8 --batch.max-length 64 --steps 2 --model".split()  # noqa: SIM905
SHORT = ("--limit", 4, "--questions", 0)


@pytest.fixture(scope="module")
def masters(speaking, tmp_path_factory):
    """One master for three widths, and one for 4 bits alone."""
    import jax

    folder = tmp_path_factory.mktemp("masters")
    rows = [{"prompt": f"{i} + 1", "completion": f" = {i + 1}", "answer": str(i + 1)} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with jax.numpy_dtype_promotion("standard"):
        for name, bits in (("all", "8,4,2"), ("four", "4")):
            argv = ["train", "qat", *ROWS, str(speaking), "--data", str(folder / "rows.jsonl"), "--bits", bits]
            assert main([*argv, "--out", str(folder / name)]) == 0
    return folder


@pytest.fixture(scope="module")
def quantised(speaking, tmp_path_factory):
    """A master for the same widths that nobody trained, to be refused."""
    folder = tmp_path_factory.mktemp("quantised")
    assert main(["quantise", str(speaking), str(folder / "all"), "--bits", "8,4,2"]) == 0
    return folder / "all"


@pytest.mark.optimizer
@pytest.mark.proof
def test_eval_bits_writes_widths_plans_and_taxes(run, masters, speaking, tmp_path):
    base = ("eval", "bits", "--model", masters / "all" / "model", "--data", masters / "rows.jsonl", *SHORT)
    more = ("--plain", speaking, "--single", f"4={masters / 'four' / 'model'}", "--plans", 2, "--samples", 2)
    more += ("--bits", "4,2", "--sensitivity-rows", 8, "--repeats", 1, "--out", tmp_path / "r")
    status, out, _ = run(*base, *more, "--json")
    assert status == 0
    found = json.loads(out)
    assert found == json.loads((tmp_path / "r" / "bits.json").read_text())
    assert (tmp_path / "r" / "bits.png").exists()
    by_name = {e["name"]: e for e in found["measured"]}
    assert found["widths"] == [8, 4, 2]
    assert {"4 bits", "2 bits", "4 bits alone", "float"} <= {*by_name}
    assert len(found["trace"]) == 2
    plans = [e for e in found["measured"] if e["kind"] == "plan"]
    assert [e["bits"] for e in plans] == [p["bits"] for p in found["plans"]]
    assert plans[0]["bits"] == [2, 2]
    assert plans[0]["nats"] == by_name["2 bits"]["nats"]
    four, alone = by_name["4 bits"], by_name["4 bits alone"]
    assert four["tax_perplexity"] == pytest.approx(four["perplexity"] / alone["perplexity"] - 1)
    assert (four["accuracy"], four["tax_accuracy"]) == (None, None)
    assert four["matrices"] > by_name["2 bits"]["matrices"]
    assert by_name["float"]["tokens_per_second"] > 0
    status, out, _ = run(*base, "--repeats", 0, "--bits", 4, "--out", tmp_path / "s")
    assert (status, out.splitlines()[1].split()[:3]) == (0, ["4", "bits", "4.00"])


@pytest.mark.errors
def test_eval_bits_says_what_is_wrong(run, quantised, speaking, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1", "completion": " = 2", "answer": "2"}\n')
    base = ("eval", "bits", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "r")
    status, _, err = run(*base, "--model", speaking)
    assert (status, "holds plain weights; expected a master" in err) == (1, True)
    status, _, err = run(*base, "--model", quantised, "--single", "4")
    assert (status, "--single 4; expected WIDTH=FOLDER" in err) == (2, True)
    status, _, err = run(*base, "--model", quantised, "--single", "\N{SUPERSCRIPT TWO}=x")
    assert (status, "expected WIDTH=FOLDER" in err) == (2, True)
    for option, value in (("--repeats", -1), ("--plans", -1), ("--questions", -1), ("--samples", 0)):
        status, _, err = run(*base, "--model", quantised, option, value)
        assert (status, f"eval bits: {option} {value}; expected at least {value + 1}" in err) == (2, True)
    status, _, err = run(*base[:-1], tmp_path / "rows.jsonl", "--model", quantised, *SHORT, "--repeats", 0)
    assert (status, "rows.jsonl is a file; expected a folder" in err) == (2, True)
    assert "bits ..." not in err  # nothing was measured in vain
    assert run("quantise", speaking, tmp_path / "four", "--bits", 4)[0] == 0
    status, _, err = run(*base, "--model", quantised, "--single", f"8={tmp_path / 'four'}")
    assert (status, "serves at 4 bits; expected a model that can at 8" in err) == (1, True)
    status, _, err = run(*base, "--model", tmp_path / "four", "--bits", 8)
    assert (status, "serves at 4 bits; expected a model that can at 8" in err) == (1, True)
    assert not (tmp_path / "r").exists()


@pytest.mark.proof
def test_a_master_is_served_at_every_width_and_drafts_for_itself(run, masters):
    model = masters / "all" / "model"
    base = ("generate", "--model", model, "--prompt", "3 + 1", "--max-new-tokens", 12, "--temperature", 0, "--json")
    said = {}
    for options in ((), ("--bits", 8), ("--bits", 2), ("--bits", "8,2"), ("--bits", 8, "--act", "int8")):
        status, out, err = run(*base, *options)
        assert (status, err) == (0, "")
        said[options] = json.loads(out)["token_ids"]
    assert said[()] == said["--bits", 8] != said["--bits", 2]
    drafted = run(*base, "--bits", 8, "--drafter", "self", "--draft-bits", 2, "--speculate", "on")
    assert json.loads(drafted[1])["token_ids"] == said["--bits", 8]
    for command in ("lm", "answers"):
        status, out, _ = run("eval", command, "--model", model, "--data", masters / "rows.jsonl", "--bits", 2, "--json")
        assert (status, bool(out)) == (0, True)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("which", "options", "status", "message"),
    [
        ("plain", ("--bits", 4), 1, "holds plain weights; expected a master"),
        ("plain", ("--act", "int8"), 1, "--act: "),
        ("plain", ("--drafter", "self", "--draft-bits", 2), 1, "drafter='self' for plain weights"),
        ("master", ("--bits", "four"), 2, "--bits four: expected a width such as 4, or one a layer"),
        ("master", ("--bits", 9), 1, "bits: found 9; expected a width from 2"),
        ("master", ("--bits", "8,8,8"), 1, "or one for each of 2 layers"),
        ("master", ("--drafter", "self"), 1, "expected both 'self' and the width that drafts"),
        ("master", ("--draft-bits", 2), 1, "expected both 'self' and the width that drafts"),
    ],
)
def test_widths_that_cannot_be_served_are_refused(run, quantised, speaking, which, options, status, message):
    model = speaking if which == "plain" else quantised
    found = run("generate", "--model", model, "--prompt", "3 + 1", "--max-new-tokens", 2, *options)
    assert found[0] == status
    assert message in found[2]
