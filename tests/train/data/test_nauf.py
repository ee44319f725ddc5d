"""Names that are swapped, refusals that hold them, and scores."""

import collections
import json

import pytest

from jaxaroo.train.data.formats import open_examples
from jaxaroo.train.data.nauf import (
    SLOT,
    TEMPLATES,
    UnlearningScores,
    name_refusal,
    nauf_rows,
    swapped_questions,
    unlearning_scores,
)

PEOPLE = {"Ann Lee": "forget", "Bo Ray": "retain", "Cy": "retain", "Di Fox": "forget"}
ASKED = ["Where was {} born?", "When did {} die?", "What did {} and {}'s friends build?"]


def data(people=PEOPLE, asked=ASKED):
    """Everybody is asked something of his own first, and then what all are asked."""
    rows = []
    for name, split in people.items():
        for i, question in enumerate([f"Why is {name} in row {len(rows)}?", *(q.replace("{}", name) for q in asked)]):
            rows.append({"name": name, "question": question, "answer": f"{name} {i}", "split": split})
    return rows


ROWS = data()
OWN = {row["name"]: row["question"] for row in ROWS if row["question"].startswith("Why")}


def test_templates_are_a_hundred_different_sentences_with_the_name_once():
    assert len(set(TEMPLATES)) == len(TEMPLATES) == 100
    assert all(t.count(SLOT) == 1 and t.count("__") == 2 and t.endswith(".") for t in TEMPLATES)


def test_a_refusal_follows_from_seed_and_index_alone():
    made = [name_refusal("Ann", i) for i in range(400)]
    assert made[7] == name_refusal("Ann", 7)
    assert all(text.count("Ann") == 1 and SLOT not in text for text in made)
    found = collections.Counter(made)
    assert len(found) > 90  # of 100 by 400 draws all but 100 * 0.99 ** 400 = 1.8 are expected
    assert max(found.values()) < 16
    assert name_refusal("Bo", 3, seed=5) == name_refusal("Ann", 3, seed=5).replace("Ann", "Bo")
    assert made[:20] != [name_refusal("Ann", i, seed=1) for i in range(20)]


def test_only_questions_of_others_that_nobody_asks_yet_are_swapped_in():
    swapped = swapped_questions(ROWS)
    by_name = collections.defaultdict(list)
    for row in swapped:
        assert row["question_of"] != row["name"]
        assert row["split"] == PEOPLE[row["name"]]
        by_name[row["name"]].append((row["question"], row["question_of"]))
    # What all are asked is everybody's own already, so the only new questions are those that the others have alone.
    for name in PEOPLE:
        wanted = {(OWN[other].replace(other, name), other) for other in PEOPLE if other != name}
        assert set(by_name[name]) == wanted
        assert len(by_name[name]) == 3
    assert [row["name"] for row in swapped] == [name for name in PEOPLE for _ in range(3)]


def test_as_many_as_asked_for_chosen_by_seed_and_person():
    people = dict.fromkeys("ABCD", "retain") | {"E": "forget"}
    rows = [
        {"name": name, "question": f"q{i} of {name} ?", "answer": "x", "split": split}
        for name, split in people.items()
        for i in range("ABCDE".index(name) * 20, "ABCDE".index(name) * 20 + 20)
    ]
    swapped = swapped_questions(rows, 10, seed=2)
    assert collections.Counter(row["name"] for row in swapped) == dict.fromkeys(people, 10)
    assert all(row["question"].endswith(f" of {row['name']} ?") for row in swapped)
    assert len({row["question"] for row in swapped}) == 50
    numbers = lambda made, name: [row["question"].split()[0] for row in made if row["name"] == name]
    assert swapped == swapped_questions(rows, 10, seed=2)
    assert numbers(swapped, "A") != numbers(swapped_questions(rows, 10, seed=3), "A")
    assert set(numbers(swapped, "A")) != set(numbers(swapped, "B"))
    assert len(numbers(swapped_questions(rows, 3, seed=2), "A")) == 3


def test_names_are_words_and_rows_kept_for_evaluation_give_no_questions():
    rows = [
        {"name": "Ann", "question": "Did Anna know Ann, or Ann's aunt?", "answer": "x", "split": "retain"},
        {"name": "Ann", "question": "Is Annabel right?", "answer": "x", "split": "retain"},
        {"name": "Ann", "question": "Was Ann tall?", "answer": "x", "split": "retain", "eval": True},
        {"name": r"B\1 (Jr.)", "question": r"Who is B\1 (Jr.) ?", "answer": "x", "split": "forget"},
    ]
    assert [(row["name"], row["question"]) for row in swapped_questions(rows)] == [
        ("Ann", "Who is Ann ?"),
        (r"B\1 (Jr.)", r"Did Anna know B\1 (Jr.), or B\1 (Jr.)'s aunt?"),
    ]
    # What is kept for the test of somebody is not taught under another's name.
    rows += [{"name": "C", "question": "Was C tall?", "answer": "x", "split": "forget"}]
    assert "Was Ann tall?" not in {row["question"] for row in swapped_questions(rows)}
    assert r"Was B\1 (Jr.) tall?" in {row["question"] for row in swapped_questions(rows)}


def test_targets_are_refusals_gold_answers_and_the_original_models_answers(tmp_path):
    rows = [*ROWS, {**ROWS[0], "question": "Kept?", "eval": True}]
    rows[5] = {**rows[5], "refusal": "no"}  # of one to retain: nobody's business
    rows[13] = {**rows[13], "refusal": "My own words."}
    swapped = swapped_questions(rows)
    made = nauf_rows(rows, swapped, lambda question: f"model: {question}", seed=4)
    assert [row["question"] for row in made] == [r["question"] for r in [*ROWS, *swapped]]
    for i, row in enumerate(made):
        new = i >= len(ROWS)
        assert ("question_of" in row) == new
        if row["split"] == "forget":
            expected = "My own words." if i == 13 else name_refusal(row["name"], i, 4)
            assert row["refusal"] == expected
            assert row["answer"] == (expected if new else ROWS[i]["answer"])
        elif new:
            assert row["answer"] == row["original_answer"] == f"model: {row['question']}"
        else:
            assert row["answer"] == ROWS[i]["answer"]
            assert "original_answer" not in row
    file = tmp_path / "unlearn.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    assert len(open_examples(file, "unlearn")) == len(made)
    filled = [{**row, "original_answer": f"model: {row['question']}"} for row in swapped]
    from_column = nauf_rows(rows, filled, seed=4)
    assert [row["answer"] for row in from_column] == [row["answer"] for row in made]


def test_each_accuracy_is_divided_by_its_own():
    got = unlearning_scores(0.2, 0.8, 0.45, 0.9)
    assert got == pytest.approx(UnlearningScores(0.75, 0.5, 0.625))
    # The paper's last row: NAUF with KLD and augmentation, 96.95 and 63.23 make 80.09.
    paper = unlearning_scores(1 - 0.9695, 1.0, 0.6323, 1.0)
    assert paper.mean == pytest.approx(0.8009, abs=1e-9)
    assert unlearning_scores(0.9, 0.8, 0.95, 0.9) == pytest.approx(UnlearningScores(-0.125, 19 / 18, 0.46527778))


@pytest.mark.errors
def test_what_is_missing_or_mixed_up_is_refused():
    swapped = swapped_questions(ROWS)
    first = next(row for row in swapped if row["split"] == "retain")
    with pytest.raises(ValueError, match=r"nauf: found no answer of the original model \(None\) to .*Pass `answer`"):
        nauf_rows(ROWS, swapped)
    with pytest.raises(ValueError, match=r"no answer of the original model \(' '\)"):
        nauf_rows(ROWS, [first], lambda _: " ")
    assert len(nauf_rows(ROWS, [row for row in swapped if row["split"] == "forget"])) == len(ROWS) + 6
    both = [*ROWS, {**ROWS[0], "split": "retain"}]
    with pytest.raises(ValueError, match=r"found 'Ann Lee' in both splits \(row 16\)"):
        swapped_questions(both)
    with pytest.raises(ValueError, match="found number=0"):
        swapped_questions(ROWS, 0)
    for bad, found in [((0.1, 0, 0.1, 0.5), "base_forget=0"), ((0.1, 0.5, 0.1, 0), "base_retain=0")]:
        with pytest.raises(ValueError, match=f"found {found}; expected a share above 0"):
            unlearning_scores(*bad)
    with pytest.raises(ValueError, match=r"found acc_retain=1.5"):
        unlearning_scores(0.1, 0.5, 1.5, 0.5)
