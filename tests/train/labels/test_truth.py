"""Labels of the embedded task against Python's own arithmetic; published solutions against their file, read plainly."""

import json
import re

import numpy as np
import pytest

from jaxaroo.models.reward import StepText, one_token
from jaxaroo.train.data.arithmetic import ArithmeticConfig, arithmetic_tokenizer, check_lines, make_problem, solves
from jaxaroo.train.data.formats import DataError, gsm8k, open_examples
from jaxaroo.train.data.steps import encode_steps
from jaxaroo.train.labels.truth import (
    ArithmeticSolutions,
    SolutionsConfig,
    arithmetic_row,
    outcome_row,
    read_model_solutions,
)

HARD = ArithmeticConfig(level=3, hi=50)


def test_a_line_is_good_as_long_as_all_are_the_plans():
    problem = make_problem(HARD, "train", 4)
    right = problem.lines
    for at in range(len(right)):
        wrong = [*right[:at], "1 + 1 = 3", *right[at + 1 :]]
        row = arithmetic_row(problem, wrong)
        assert row["labels"] == [1] * at + [0] * (len(right) - at)
        assert row["outcome"] == int(at < len(right) - 1)  # the answer alone
        assert (row["steps"], row["answer"]) == (wrong, right[-1].split()[1])
    assert arithmetic_row(problem, right)["labels"] == [1] * len(right)
    assert arithmetic_row(problem, right)["prompt"] == problem.question + "\n"


def test_solutions_have_a_known_share_of_slips_and_come_back_alone():
    rows = ArithmeticSolutions(SolutionsConfig(problems=HARD, wrong=0.3, seed=1), "train", 600)
    made = [rows[i] for i in range(600)]
    for i, row in enumerate(made):
        problem = make_problem(HARD, "train", i)
        assert row["prompt"] == problem.question + "\n"
        assert (0 in row["labels"]) == (row["source"] != "right")
        assert row["labels"] == check_lines(problem, row["steps"])
        assert row["outcome"] == solves(problem, row["steps"])
        if row["source"] == "result":
            wrong = [line for line in row["steps"][:-1] if not true(line)]
            assert wrong == [row["steps"][row["labels"].index(0)]]
    wrong = sum(row["source"] != "right" for row in made)
    assert abs(wrong - 180) < 4 * (600 * 0.3 * 0.7) ** 0.5
    assert {row["source"] for row in made} == {"right", "result", "operator", "operand", "skip"}
    assert [row["outcome"] for row in made if row["source"] == "right"] == [1] * (600 - wrong)
    assert ArithmeticSolutions(rows.cfg)[17] == made[17]
    assert ArithmeticSolutions(rows.cfg, "test")[17] != made[17]
    assert len({row["id"] for row in made}) == 600
    sources = lambda **options: [ArithmeticSolutions(SolutionsConfig(**options))[i]["source"] for i in range(40)]
    assert sources(seed=1) != sources(seed=2)
    assert {*sources(wrong=0.0)} == {"right"}
    assert "right" not in sources(wrong=1.0)


def true(line):
    left, result = line.split(" = ")
    return max(0, eval(left.replace("/", "//"))) == int(result)


def test_a_solution_is_learned_up_to_its_first_error(tmp_path):
    rows, t = ArithmeticSolutions(SolutionsConfig(problems=HARD, wrong=1.0)), arithmetic_tokenizer()
    separator = one_token(t, "<|sep|>")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(rows[i]) + "\n" for i in range(20)))
    examples = open_examples(tmp_path / "rows.jsonl")
    assert examples.layout == "steps"
    for row in examples:
        encoded = encode_steps(t, row, StepText(separator))
        first = row["labels"].index(0)
        assert encoded.labels[encoded.scored].tolist() == [1.0] * first + [0.0]
        assert np.flatnonzero(encoded.ids == separator).tolist()[: first + 1] == np.flatnonzero(encoded.scored).tolist()


def test_an_outcome_is_the_label_of_the_last_step():
    row = {"steps": ["a", "b", "c"], "labels": [1, 1, 1], "x": 1}
    assert outcome_row(row, False) == {"steps": ["a", "b", "c"], "labels": [None, None, 0], "outcome": 0, "x": 1}
    assert outcome_row({"steps": ["a"]}, True) == {"steps": ["a"], "labels": [1], "outcome": 1}


QUESTION = {
    "question": "How many?",
    "ground_truth": "A: 1\nx\nA: 7.5",
    "small": {"is_correct": False, "solution": "3 + 4 = <<3+4=7>>7 \n\nso <<1<2>> A: 1\nA: 7"},
    "large": {"is_correct": True, "solution": "A: 7.5"},
}


def write(path, *questions):
    path.write_text("".join((q if isinstance(q, str) else json.dumps(q)) + "\n" for q in questions))
    return path


def test_model_solutions(tmp_path):
    small, large = read_model_solutions(write(tmp_path / "a.jsonl", QUESTION, ""))
    assert small == {
        "id": "a.jsonl:1:small",
        "prompt": "Question: How many?\nAnswer:",
        "steps": [" 3 + 4 = 7", "so <<1<2>> A: 1", "A: 7"],
        "labels": [None, None, 0],
        "answer": "7.5",
        "outcome": 0,
        "source": "small",
    }
    assert (large["steps"], large["labels"], large["outcome"]) == ([" A: 7.5"], [1], 1)
    kept = read_model_solutions(tmp_path / "a.jsonl", keep_calculations=True)
    assert kept[0]["steps"][0] == " 3 + 4 = <<3+4=7>>7"


@pytest.mark.errors
def test_malformed_solutions_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    for bad, message in [
        ("{", "a.jsonl:2: JSONDecodeError"),
        ("[]", "a.jsonl:2: AttributeError"),
        (QUESTION | {"ground_truth": "7"}, "a.jsonl:2: IndexError.*expected .*`A: ...`"),
        (QUESTION | {"small": {"solution": "A: 1"}}, "a.jsonl:2: KeyError 'is_correct'"),
        (QUESTION | {"small": {"solution": "A: 1", "is_correct": 1}}, "'small' has 1 lines and is_correct=1"),
        (QUESTION | {"small": {"solution": " ", "is_correct": True}}, "'small' has 0 lines"),
    ]:
        with pytest.raises(DataError, match=message):
            read_model_solutions(write(path, QUESTION, bad))
    with pytest.raises(DataError, match="no rows; expected at least one"):
        read_model_solutions(write(path, ""))
    with pytest.raises(DataError, match="cannot be read"):
        read_model_solutions(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="wrong: found 2"):
        SolutionsConfig(wrong=2)


def test_all_published_solutions(shared):
    path = shared / "data" / "gsm8k" / "example_model_solutions.jsonl"
    rows = read_model_solutions(path)
    plain = [json.loads(line) for line in path.read_text().splitlines()]
    models = ["6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"]
    found = [(q["question"], q["ground_truth"], model, q[model]) for q in plain for model in models]
    assert len(rows) == len(found) == 4 * 1319
    right = {model: sum(q[model]["is_correct"] for q in plain) for model in models}
    assert {m: sum(r["outcome"] for r in rows if r["source"] == m) for m in models} == right
    whole = read_model_solutions(path, keep_calculations=True)
    numbers = 0
    for row, kept, (question, truth, model, made) in zip(rows, whole, found, strict=True):
        assert (row["source"], row["answer"]) == (model, truth.rpartition("A: ")[2])
        text = re.sub(r"[ \t]+(?=\n|$)", "", made["solution"])
        assert "\n".join(kept["steps"]) == " " + text
        as_gsm8k = gsm8k({"question": question, "answer": text})
        assert kept["prompt"] + "\n".join(kept["steps"]) == as_gsm8k["prompt"] + as_gsm8k["completion"]
        assert row["labels"] == [None] * (len(row["steps"]) - 1) + [made["is_correct"]]
        numbers += "".join(kept["steps"]).count("<<")
        said = row["steps"][-1].rpartition("A: ")[2]
        if row["outcome"]:
            assert float(said.replace(",", "")) == pytest.approx(float(row["answer"].replace(",", "")))
    assert numbers > 10_000
    assert sum("<<" in step for row in rows for step in row["steps"]) < 10  # what was cut off, or never closed
