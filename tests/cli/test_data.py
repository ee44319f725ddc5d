"""`jaxaroo data ...`: what is written, that it is read by what comes next, and what is refused."""

import collections
import json
import shutil
import sys

import pytest

from jaxaroo.models.tokenizer import load_tokenizer
from jaxaroo.train.data.arithmetic import ArithmeticConfig, ArithmeticExamples
from jaxaroo.train.data.dstc import dstc_pair
from jaxaroo.train.data.dualformer import DualformerConfig, DualformerExamples
from jaxaroo.train.data.formats import open_examples
from jaxaroo.train.data.nauf import SLOT, TEMPLATES


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def left(tmp_path):
    """Names in the folder, hidden ones too: no half of a file stays."""
    return lambda: sorted(path.name for path in tmp_path.iterdir())


linux = pytest.mark.skipif(sys.platform != "linux", reason="runs code, with the guards of Linux")
CODES = {
    "prompt": "double é\u2028it",
    "codes": ["def f(x): return 2 * x", "def f(x): return x * x", "def f(x): return 4"],
    "tests": ["assert f(2) == 4", "assert f(3) == 6"],
}
PASSED = [[1, 1], [1, 0], [1, 0]]


@linux
def test_codes_are_run_where_it_is_not_known_what_passes(run, tmp_path, left):
    known = {**CODES, "passed": [[0, 1], [1, 0], [1, 0]], "id": 2}
    rows = [CODES, known, {**CODES, "passed": None, "tests": ["pass"]}, {**CODES, "passed": [[1, 1]] * 3}]
    data = write(tmp_path / "codes.jsonl", rows)
    status, out, err = run(
        "data", "code-pairs", "--data", data, "--out", tmp_path / "p.jsonl", "--json", "--workers", 2
    )
    assert (status, json.loads(out)) == (0, {"prompts": 4, "pairs": 2, "runs": 9})
    assert "wrote" in err
    wanted = [dstc_pair({**CODES, "passed": PASSED}), dstc_pair(known)]
    assert rows_of(tmp_path / "p.jsonl") == wanted
    assert wanted[0]["chosen"] == "def f(x): return 2 * x\n\nassert f(3) == 6"
    assert len(open_examples(tmp_path / "p.jsonl", "pairs")) == 2
    assert left() == ["codes.jsonl", "p.jsonl"]


@linux
@pytest.mark.slow
def test_limits_are_those_that_are_asked_for(run, tmp_path):
    row = {"prompt": "p", "codes": ["x = bytearray(300 * 2**20)", "import time; time.sleep(5)"], "tests": ["pass"]}
    asked = ("data", "code-pairs", "--data", write(tmp_path / "c.jsonl", [row]), "--out")
    assert run(*asked, tmp_path / "a.jsonl", "--memory-mib", 200)[0] == 0
    assert rows_of(tmp_path / "a.jsonl")[0]["chosen_cell"] == [1, 0]
    assert run(*asked, tmp_path / "b.jsonl", "--wall-seconds", 3)[0] == 0
    assert rows_of(tmp_path / "b.jsonl")[0]["chosen_cell"] == [0, 0]


@pytest.mark.errors
def test_rows_of_codes_that_are_malformed_are_named(run, tmp_path, left):
    good = {**CODES, "passed": PASSED}
    bad = {
        "{": "expected one JSON object",
        "[1]": "expected one JSON object",
        '{"prompt": "\\ud800", "codes": ["a"], "tests": ["b"]}': "expected one JSON object",
        json.dumps(
            {**good, "prompt": ""}
        ): "`prompt` is ''; expected a string that is not empty, or a list of messages",
        json.dumps(
            {**good, "prompt": [{"role": "user"}]}
        ): "expected a string that is not empty, or a list of messages",
        json.dumps({**good, "codes": []}): "`codes` is []; expected a list of strings",
        json.dumps({**good, "codes": ["", "a", "b"]}): "`codes` is ['', 'a', 'b']; expected a list of strings",
        json.dumps({**good, "tests": "a"}): "`tests` is 'a'; expected a list of strings",
        json.dumps({k: v for k, v in good.items() if k != "tests"}): "`tests` is None; expected a list of strings",
        json.dumps({**good, "passed": PASSED[:2]}): "expected 3 lists of 2 values 0 or 1, or none to have them run",
        json.dumps({**good, "passed": [[1]] * 3}): "expected 3 lists of 2 values 0 or 1, or none to have them run",
        json.dumps({**good, "passed": [[1, 0.0]] * 3}): "expected 3 lists of 2 values 0 or 1, or none to have them run",
        json.dumps({**good, "passed": [[1, 2]] * 3}): "expected 0 or 1",
        json.dumps({**good, "prompt": [{"role": "user", "content": "x"}]}): "found both strings and lists of messages",
    }
    for line, message in bad.items():
        data = tmp_path / "c.jsonl"
        data.write_text(json.dumps(good) + "\n\n" + line + "\n")
        status, out, err = run("data", "code-pairs", "--data", data, "--out", tmp_path / "p.jsonl")
        assert (status, out) == (1, "")
        assert f"{data}:3: " in err
        assert message in err
        assert left() == ["c.jsonl"]


def test_stages_are_files_that_preference_training_reads(run, tmp_path, left):
    responses = lambda *ratings: [{"completion": f"c{i}", "rating": r} for i, r in enumerate(ratings)]
    rows = [{"prompt": "a", "responses": responses(1, 4, 2)}, {"prompt": "b", "responses": responses(3, 5)}]
    data = write(tmp_path / "ranked.jsonl", [*rows, {"prompt": "c", "responses": responses(2, 2)}])
    status, out, err = run("data", "curry", "--data", data, "--out", tmp_path / "stages")
    assert (status, out) == (0, "2 stages of 2, 1 pairs\n")
    assert f"wrote {tmp_path / 'stages'}" in err
    first, second = rows_of(tmp_path / "stages" / "stage-1.jsonl"), rows_of(tmp_path / "stages" / "stage-2.jsonl")
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in first] == [("a", "c1", "c0"), ("b", "c1", "c0")]
    assert [(r["prompt"], r["chosen"], r["rejected"], r["stage"]) for r in second] == [("a", "c1", "c2", 1)]
    assert len(open_examples(tmp_path / "stages" / "stage-1.jsonl", "pairs")) == 2
    assert left() == ["ranked.jsonl", "stages"]
    (tmp_path / ".one.partial").mkdir()
    (tmp_path / ".one.partial" / "stage-7.jsonl").write_text("left by a killed one")
    one = run("data", "curry", "--data", data, "--out", tmp_path / "one", "--stages", 1, "--json")
    assert (one[0], json.loads(one[1])) == (0, {"stages": [2]})
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["stage-1.jsonl"]
    status, _, err = run("data", "curry", "--data", data, "--out", tmp_path / "three", "--stages", 3)
    assert (status, "found 3 stages with [2, 1, 0] pairs" in err) == (1, True)
    status, _, err = run("data", "curry", "--data", data, "--out", tmp_path / "more", "--key", "ref_logps")
    assert (status, "expected `ref_logps`" in err) == (1, True)
    assert left() == ["one", "ranked.jsonl", "stages"]


def people():
    return [
        {"name": name, "question": f"{asked} {name}?", "answer": f"{name}.", "split": split}
        for name, split, asked in [("Ann", "forget", "Who is"), ("Bo", "retain", "Where is"), ("Cy", "retain", "Why")]
    ]


def test_questions_are_asked_elsewhere_and_their_answers_read(run, tmp_path, left):
    data = write(tmp_path / "unlearn.jsonl", people())
    base = ("data", "nauf", "--data", data)
    status, out, _ = run(*base, "--ask", tmp_path / "ask.jsonl", "--json")
    assert (status, json.loads(out)) == (0, {"rows": 3, "swapped": 6, "to_answer": 4, "cut": 0, "written": 4})
    asked = rows_of(tmp_path / "ask.jsonl")
    wanted = ["Who is Bo?", "Why Bo?", "Who is Cy?", "Where is Cy?"]
    assert sorted(row["question"] for row in asked) == sorted(wanted)
    answers = [{**row, "original_answer": f"about {row['question']}"} for row in asked]
    write(tmp_path / "answers.jsonl", answers)
    status, out, _ = run(*base, "--out", tmp_path / "out.jsonl", "--answers", tmp_path / "answers.jsonl")
    assert (status, out) == (0, "9 rows, 6 swapped questions, 4 to be answered\n")
    made = rows_of(tmp_path / "out.jsonl")
    assert len(open_examples(tmp_path / "out.jsonl", "unlearn")) == 9
    forget = [row for row in made if row["split"] == "forget"]
    assert [row["name"] for row in forget] == ["Ann"] * 3
    assert all(row["refusal"].replace("Ann", SLOT) in TEMPLATES for row in forget)
    new = [row for row in made if row["split"] == "retain" and "question_of" in row]
    assert {row["question"]: row["answer"] for row in new} == {q: f"about {q}" for q in wanted}
    lacking = write(tmp_path / "fewer.jsonl", answers[1:])
    for more in ((), ("--answers", lacking)):
        status, _, err = run(*base, "--out", tmp_path / "no.jsonl", *more)
        assert (status, "no answer of the original model to" in err, "Give --model; or --ask" in err) == (1, True, True)
    lacking.write_text('{"question": "x"}\n')
    status, _, err = run(*base, "--out", tmp_path / "no.jsonl", "--answers", lacking)
    assert (status, f"{lacking}:1: found columns ['question']" in err) == (1, True)
    assert left() == ["answers.jsonl", "ask.jsonl", "fewer.jsonl", "out.jsonl", "unlearn.jsonl"]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.slow
def test_or_the_original_model_answers_here(run, speaking, tmp_path, chat):
    model = tmp_path / "model"
    shutil.copytree(speaking, model)
    if not chat:
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": None}))
    assert bool(load_tokenizer(model).chat_template) == chat
    data = write(tmp_path / "unlearn.jsonl", people())
    greedy = ("--max-new-tokens", 8, "--temperature", 0, "--json", *(["--chat"] if chat else []))

    def said(question):
        prompt = question if chat else f"Question: {question}\nAnswer:"
        return json.loads(run("generate", "--model", model, "--prompt", prompt, *greedy)[1])

    config = json.loads((model / "config.json").read_text()) | {"eos_token_id": said("Who is Bo?")["token_ids"][2]}
    (model / "config.json").write_text(json.dumps(config))  # so that one answer at least ends by itself
    answers = {question: said(question) for question in ("Who is Bo?", "Why Bo?", "Who is Cy?", "Where is Cy?")}
    whole = {question: a["text"].strip() for question, a in answers.items() if a["finish_reason"] == "stop"}
    assert 0 < len(whole) < 4
    more = ("--model", model, "--max-new-tokens", 8, "--max-seqs", 2)
    status, out, _ = run("data", "nauf", "--data", data, "--out", tmp_path / "out.jsonl", *more)
    told = f"{5 + len(whole)} rows, 6 swapped questions, 4 to be answered, {4 - len(whole)} left out"
    assert (status, out) == (0, f"{told}, for their answers were cut\n")
    new = [row for row in rows_of(tmp_path / "out.jsonl") if "question_of" in row]
    assert [row["name"] for row in new if row["split"] == "forget"] == ["Ann"] * 2
    for column in ("answer", "original_answer"):
        assert {row["question"]: row[column] for row in new if row["split"] == "retain"} == whole


def test_solutions_are_shortened_anew_in_each_epoch(run, tmp_path):
    source = ArithmeticExamples(ArithmeticConfig(), number=30)
    data = write(tmp_path / "sft.jsonl", [source[i] for i in range(30)])
    base = ("data", "dualformer", "--data", data, "--out")
    status, out, _ = run(*base, tmp_path / "out.jsonl", "--epochs", 3, "--seed", 5, "--share", 0.5, "--json")
    made = rows_of(tmp_path / "out.jsonl")
    examples = DualformerExamples(source, 3, DualformerConfig(seed=5, share=0.5))
    assert made == [examples[i] for i in range(90)]
    counts = collections.Counter(row["level"] for row in made)
    assert (status, json.loads(out)) == (0, {"rows": 90, "levels": [counts[level] for level in range(5)]})
    assert len(open_examples(tmp_path / "out.jsonl", "sft")) == 90
    assert run(*base, tmp_path / "fast.jsonl", "--probabilities", 0, 0, 0, 0, 1)[0] == 0
    assert [row["completion"] for row in rows_of(tmp_path / "fast.jsonl")] == [f"ans {r['answer']}" for r in made[:30]]
    status, _, err = run(*base, tmp_path / "no.jsonl", "--probabilities", 1, 1, 0, 0, 0)
    assert (status, "expected 5 shares that sum to 1" in err) == (1, True)
    assert run(*base, tmp_path / "no.jsonl", "--epochs", 0)[0] == 2


def test_files_are_mixed_by_weight(run, tmp_path):
    a = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": str(i)} for i in range(10)])
    b = write(tmp_path / "b.jsonl", [{"prompt": "b", "completion": str(i)} for i in range(3)])
    base = ("data", "mix", "--data", a, b, "--number", 20)
    status, out, _ = run(*base, "--weights", 1, 0.25, "--out", tmp_path / "out.jsonl")
    assert (status, out) == (0, "20 rows: 16 of a.jsonl, 4 of b.jsonl\n")
    made = rows_of(tmp_path / "out.jsonl")
    counts = collections.Counter((row["prompt"], row["completion"]) for row in made)
    assert sum(n for (name, _), n in counts.items() if name == "b") == 4
    assert {n for (name, _), n in counts.items() if name == "a"} == {1, 2}  # 16 of 10
    assert run(*base, "--weights", 1, 0.25, "--out", tmp_path / "again.jsonl")[0] == 0
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()
    assert run(*base, "--weights", 1, 0.25, "--out", tmp_path / "other.jsonl", "--seed", 1)[0] == 0
    assert (tmp_path / "other.jsonl").read_bytes() != (tmp_path / "out.jsonl").read_bytes()
    status, out, _ = run(*base, "--out", tmp_path / "even.jsonl", "--json")
    assert (status, json.loads(out)) == (0, {"rows": 20, "of": [10, 10]})
    c = write(tmp_path / "c.jsonl", [{"text": "x", "label": 1}])
    status, _, err = run("data", "mix", "--data", a, c, "--number", 2, "--out", tmp_path / "no.jsonl")
    assert (status, "found rows of membership and sft" in err) == (1, True)
    assert run(*base, "--weights", 1, "--out", tmp_path / "no.jsonl")[0] == 2
    assert run("data", "mix", "--data", a, "--number", 0, "--out", tmp_path / "no.jsonl")[0] == 2
    status, _, err = run(*base, "--weights", -1, 1, "--out", tmp_path / "no.jsonl")
    assert (status, "none negative" in err) == (1, True)
    assert not (tmp_path / "no.jsonl").exists()


def test_the_second_stage_of_dmt_keeps_a_share_of_the_first(run, tmp_path):
    """All general rows once, of the special ones the share's nearest number, none of them twice."""
    row = lambda name, i: {"prompt": name, "completion": str(i)}
    special = write(tmp_path / "special.jsonl", [row("special", i) for i in range(40)])
    general = write(tmp_path / "general.jsonl", [row("general", i) for i in range(25)])
    base = ("data", "mix", "--data", special, general)
    for share, again in ((0.1, 4), (1 / 256, 1), (0, 0), (1, 40)):
        out = tmp_path / f"{again}.jsonl"
        status, said, _ = run(*base, "--dmt-share", share, "--out", out, "--seed", 3)
        assert (status, said) == (0, f"{again + 25} rows: {again} of special.jsonl, 25 of general.jsonl\n")
        made = [(row["prompt"], int(row["completion"])) for row in rows_of(out)]
        assert sorted(i for name, i in made if name == "general") == [*range(25)]
        assert len({i for name, i in made if name == "special"}) == again
        assert len(made) == 25 + again
        assert made != sorted(made)  # shuffled together
    no = ("--out", tmp_path / "no.jsonl")
    for share in (-0.1, 1.5):
        status, _, err = run(*base, "--dmt-share", share, *no)
        assert (status, f"found share={share}; expected 0 to 1" in err) == (1, True)
    for more in (("--number", 9), ("--weights", 1, 2), ("--data", special), ("--data", special, general, general)):
        status, _, err = run(*base, "--dmt-share", 0.1, *no, *more)
        assert (status, "--dmt-share with" in err, "expected two files" in err) == (2, True, True)
    status, _, err = run(*base, *no)
    assert (status, "expected at least one file and one row, or --dmt-share" in err) == (2, True)
    assert not (tmp_path / "no.jsonl").exists()


@pytest.mark.errors
def test_what_is_there_stays_and_nothing_half_appears(run, tmp_path, left, monkeypatch):
    data = write(tmp_path / "d.jsonl", [{**CODES, "passed": [[1, 1]] * 3}])
    kept = tmp_path / "kept.jsonl"
    kept.write_text("mine\n")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    options = {"code-pairs": (), "curry": (), "nauf": (), "dualformer": (), "mix": ("--number", 1)}
    for command, more in options.items():
        for out in (kept, tmp_path / "dangling"):
            status, _, err = run("data", command, "--data", data, "--out", out, *more)
            assert (status, f"{out} exists; expected a new name" in err) == (1, True)
        status, _, err = run("data", command, "--data", data, "--out", tmp_path / "no" / "out", *more)
        assert (status, f"no folder {tmp_path / 'no'}" in err) == (1, True)
    assert kept.read_text() == "mine\n"
    status, _, err = run("data", "code-pairs", "--data", data, "--out", tmp_path / "new.jsonl")  # no pair in it
    assert (status, f"no rows for {tmp_path / 'new.jsonl'}" in err) == (1, True)
    status, _, err = run("data", "nauf", "--data", data)
    assert (status, "expected either --out or --ask" in err) == (2, True)
    both = ("--answers", data, "--model", tmp_path)
    assert run("data", "nauf", "--data", data, "--out", tmp_path / "new.jsonl", *both)[0] == 2
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    messages = write(tmp_path / "m.jsonl", [{"messages": chat}])
    status, _, err = run("data", "dualformer", "--data", messages, "--out", tmp_path / "new.jsonl")
    assert (status, "expected prompt and completion in text" in err) == (1, True)
    several = write(tmp_path / "s.jsonl", [{**CODES, "passed": PASSED}] * 3)
    found = iter([{"prompt": "the first one"}])  # and then it breaks
    monkeypatch.setattr("jaxaroo.train.data.dstc.dstc_pair", lambda row: next(found, None) or int("broken"))
    status, _, err = run("data", "code-pairs", "--data", several, "--out", tmp_path / "new.jsonl")
    assert (status, "broken" in err) == (1, True)
    assert left() == ["d.jsonl", "dangling", "kept.jsonl", "m.jsonl", "s.jsonl"]


def test_a_command_without_its_second_word_lists_them(run):
    status, out, _ = run("data", "--help")
    assert status == 0
    for name in ("code-pairs", "curry", "nauf", "dualformer", "mix"):
        assert name in out


# -------------------------------------------------------------------------------------------------------------- pairs
def test_pairs_of_scored_steps_are_read_by_preference_training(run, tmp_path):
    """Worth by hand: the last score of each; the prompt of which all answers are worth the same has no pair."""
    row = lambda prompt, steps, scores, **more: {"prompt": prompt, "steps": steps, "scores": scores, **more}
    data = [
        row("p", ["a", "b"], [0.9, 0.2]),
        row("q", ["x"], [0.5]),
        row("p", ["c"], [0.7], joiner=""),
        row("q", ["y"], [0.5]),
        row("p", ["d", "e"], [0.1, 0.4], joiner="; "),
    ]
    out = tmp_path / "pairs.jsonl"
    status, said, _ = run("data", "pairs", "--data", write(tmp_path / "scored.jsonl", data), "--out", out)
    assert (status, said) == (0, "1 pairs of 2 prompts\n")
    assert rows_of(out) == [
        {"prompt": "p", "chosen": "c", "rejected": "a\nb", "score_chosen": 0.7, "score_rejected": 0.2}
    ]
    assert open_examples(out, "pairs")[0]["chosen"] == "c"
    more = ("--aggregate", "min", "--out", tmp_path / "min.jsonl", "--json")
    status, said, _ = run("data", "pairs", "--data", tmp_path / "scored.jsonl", *more)
    assert json.loads(said) == {"prompts": 2, "pairs": 1}
    assert rows_of(tmp_path / "min.jsonl")[0]["rejected"] == "d; e"  # 0.1, which its first step is worth
    status, _, err = run(
        "data", "pairs", "--data", tmp_path / "scored.jsonl", "--margin", 0.6, "--out", tmp_path / "no"
    )
    assert (status, "no prompt of the 2 of" in err, (tmp_path / "no").exists()) == (1, True, False)


def test_pairs_of_chosen_answers_by_scores_and_by_outcomes(run, tmp_path):
    """Rows of `eval best-of-n`: an answer that has no steps is neither."""
    chat = [{"role": "user", "content": "p"}]
    rows = [
        {"prompt": chat, "texts": ["a", "b", "c"], "scores": [[0.9], [], [0.1, 0.3]], "correct": [False, True, True]}
    ]
    data = write(tmp_path / "chosen.jsonl", rows)
    found = {}
    for by in ("scores", "outcome"):
        assert run("data", "pairs", "--data", data, "--by", by, "--out", tmp_path / f"{by}.jsonl")[0] == 0
        [found[by]] = rows_of(tmp_path / f"{by}.jsonl")
    assert (found["scores"]["chosen"], found["scores"]["rejected"]) == ("a", "c")
    assert (found["outcome"]["chosen"], found["outcome"]["rejected"]) == ("b", "a")
    assert found["outcome"]["prompt"] == chat


def test_labels_of_answers_by_outcome_and_by_scores(run, tmp_path):
    """Worth by hand: b is cut and has no score, c is worth its last step."""
    answers = {"texts": ["a", "b", "c"], "scores": [[0.9, 0.2], [], [0.1, 0.6]], "correct": [True, False, False]}
    data = write(tmp_path / "chosen.jsonl", [{"prompt": "p", **answers}])
    status, said, _ = run("data", "labelled", "--data", data, "--out", tmp_path / "outcome.jsonl")
    assert (status, said) == (0, "3 rows of 3 answers, 1 good\n")
    labels = lambda name: {row["completion"]: row["label"] for row in rows_of(tmp_path / name)}
    assert labels("outcome.jsonl") == {"a": True, "b": False, "c": False}
    assert len(open_examples(tmp_path / "outcome.jsonl", "unpaired")) == 3
    asked = ("data", "labelled", "--data", data, "--by", "scores", "--out")
    assert json.loads(run(*asked, tmp_path / "s.jsonl", "--json")[1]) == {"answers": 3, "rows": 2, "good": 1}
    assert labels("s.jsonl") == {"a": False, "c": True}
    assert run(*asked, tmp_path / "m.jsonl", "--aggregate", "mean", "--threshold", 0.5)[0] == 0
    assert labels("m.jsonl") == {"a": True, "c": False}
    write(tmp_path / "none.jsonl", [{"prompt": "p", "texts": ["b"], "scores": [[]]}])
    status, _, err = run(
        "data", "labelled", "--data", tmp_path / "none.jsonl", "--by", "scores", "--out", tmp_path / "no"
    )
    assert (status, "none of the 1 answers" in err, (tmp_path / "no").exists()) == (1, True, False)


def test_answers_that_say_nothing_or_were_cut_are_left_out(run, tmp_path):
    """Rows as `eval best-of-n` and `label sample` write them: one such answer is no reason to refuse all."""
    answers = {"texts": ["ans 1", "", "ans 2", "ans", "3 +"], "scores": [[0.5], [], [0.3], [0.1], [0.9]]}
    answers |= {"extracted": ["1", None, "2", None, "3"], "finish_reasons": ["stop"] * 4 + ["length"]}
    refused = {"prompt": "long", "texts": [], "scores": [], "correct": [False] * 5, "error": "too long"}
    row = {"prompt": "p", **answers, "correct": [False, False, True, False, False]}
    data = write(tmp_path / "chosen.jsonl", [row, refused])
    assert run("data", "pairs", "--data", data, "--by", "scores", "--out", tmp_path / "pairs.jsonl")[0] == 0
    [pair] = rows_of(tmp_path / "pairs.jsonl")
    assert (pair["chosen"], pair["rejected"]) == ("ans 1", "ans 2")
    assert run("data", "labelled", "--data", data, "--out", tmp_path / "labelled.jsonl")[0] == 0
    assert [r["completion"] for r in rows_of(tmp_path / "labelled.jsonl")] == ["ans 1", "ans 2", "ans", "3 +"]
    steps = [{"prompt": "p", "steps": steps, "outcome": len(steps)} for steps in ([], ["a"])]
    asked = ("--data", write(tmp_path / "steps.jsonl", steps), "--out", tmp_path / "of_steps.jsonl")
    assert run("data", "labelled", *asked)[0] == 0
    assert rows_of(tmp_path / "of_steps.jsonl") == [{"prompt": "p", "completion": "a", "label": True}]


@pytest.mark.errors
@pytest.mark.parametrize(
    ("row", "by", "said"),
    [
        ({"prompt": "p", "steps": "abc", "outcome": 1}, "outcome", "found columns ['outcome', 'prompt', 'steps']"),
        ({"prompt": "p", "completion": 5, "outcome": 1}, "outcome", "found columns ['completion', 'outcome',"),
        ({"prompt": "p", "texts": [5], "correct": [1]}, "outcome", "found columns ['correct', 'prompt', 'texts']"),
        (
            {"prompt": "p", "texts": ["a"], "scores": [[1.0]], "extracted": []},
            "scores",
            "`extracted` is []; expected one for each answer, or none",
        ),
        (
            {"steps": ["a"], "scores": [1.0]},
            "scores",
            "found columns ['scores', 'steps']; expected `prompt` with",
        ),
        ({"prompt": "p", "steps": ["a"]}, "scores", "`scores` is None; expected one for each answer (`eval prm --out`"),
        ({"prompt": "p", "steps": ["a"]}, "outcome", "`outcome` is None; expected one for each answer."),
        (
            {"prompt": "p", "texts": ["a", "b"], "correct": [True]},
            "outcome",
            "`correct` is [True]; expected one for",
        ),
        ({"prompt": "p", "texts": ["a"], "scores": [0.5]}, "scores", "`scores` is [0.5]; expected one for each answer"),
    ],
)
def test_rows_that_nobody_ranked_are_refused(run, tmp_path, left, row, by, said):
    data = write(tmp_path / "rows.jsonl", [{"prompt": "p", "steps": ["a"], "scores": [1.0], "outcome": 1}, row])
    status, _, err = run("data", "pairs", "--data", data, "--by", by, "--out", tmp_path / "out.jsonl")
    assert (status, left()) == (1, ["rows.jsonl"])
    assert f"rows.jsonl:2: {said}" in err
