"""What rows become, and the message of every fault; oracles are `json.loads` and pyarrow's own reading."""

import concurrent.futures
import contextlib
import gc
import json
import os
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxaroo.train.data import formats
from jaxaroo.train.data.formats import LAYOUTS, BadRow, DataError, open_examples

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
BELIEFS = {**PAIR, "beliefs": ["a", "b"], "belief_probs": [0.3, 0.7], "belief_id": 1}
RANKED = {"prompt": "p", "responses": [{"completion": "a", "rating": 1}, {"completion": "b", "rating": -2.5}]}
CODE = {"prompt": "p", "codes": ["x", "y"], "tests": ["t"], "passed": [[1], [0]]}
D2O = {"prompt": "p", "rejected": "r", "self_samples": ["s", "t"]}
UNLEARN = {"name": "n", "question": "q", "answer": "a", "split": "forget"}
GOOD = {  # one of each, every optional column there
    "sft": {"prompt": "p", "completion": "c", "weight": 0.5, "base_logps": [-1.0, -2.0], "extra": None},
    "pairs": {**PAIR, "score_chosen": 2, "score_rejected": 1.5, "ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0}
    | {"margin": 0.5, "win": 0.75, "weight": 0},
    "unpaired": {"prompt": "p", "completion": "c", "label": False, "ref_logps": -1.0, "ref_kl_logps": -2.0},
    "ranked": RANKED,
    "beliefs": {**BELIEFS, "rejected_belief_id": 0, "context": "", "weight": 2},
    "dispreferred": {**D2O, "ref_rejected_logps": -1.0, "ref_self_logps": [-1.0, -2.0], "weight": 1},
    "rollout": {"prompt": "p", "answer": 7},
    "code_tests": {**CODE, "entry_point": "f"},
    "unlearn": {**UNLEARN, "original_answer": "o", "refusal": "no", "eval": True, "weight": 0.5},
    "membership": {"text": "t", "label": 1, "split": "probe_dev"},
    "steps": {"prompt": "p", "steps": ["a", "b", "c", "d"], "labels": [1, 0.5, -1, None], "soft": [0.9, 0.5, 0, None]}
    | {"answer": "7", "outcome": 0, "source": "", "weight": 2.0, "id": 3},
}
WEIGHED = ("sft", "pairs", "unpaired", "beliefs", "dispreferred", "unlearn", "steps")  # what the pipeline trains on
SFT = [{"prompt": f"p{i}é\u2028", "completion": "c" * i + "c"} for i in range(5)]


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def fails(path, *words, **options):
    with pytest.raises(DataError) as caught:
        open_examples(path, **options)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)
    return str(caught.value)


def rows_of(examples):
    return [examples[i] for i in range(len(examples))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_good_row_of_every_layout_is_told_by_its_columns_and_comes_back(tmp_path, layout):
    for chosen in (layout, "auto"):
        examples = open_examples(write(tmp_path / "a.jsonl", GOOD[layout], GOOD[layout]), chosen)
        assert examples.layout == layout
        assert rows_of(examples) == [GOOD[layout]] * 2
        assert examples.skipped == ()


def test_lines_are_counted_as_an_editor_does(tmp_path):
    text = ["\ufeff" + json.dumps(SFT[0]), "", json.dumps(SFT[1]) + "\r", "  \r", "{", json.dumps(SFT[2])]
    (path := tmp_path / "a.jsonl").write_bytes("\n".join(text).encode())
    examples = open_examples(path, on_bad_row="skip")
    assert rows_of(examples) == SFT[:3] == list(examples)
    assert [examples.where(i) for i in range(3)] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:6"]
    assert [bad.where for bad in examples.skipped] == ["a.jsonl:5"]
    assert (examples[-1], examples.files, len(examples)) == (SFT[2], (path,), 3)
    with pytest.raises(IndexError):
        examples[3]
    assert fails(path, "1 of 4 rows are malformed; expected sft rows.\n  a.jsonl:5: not JSON").endswith(
        'leave them out with on_bad_row="skip".'
    )


def test_the_first_ten_faults_are_listed_and_all_are_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", SFT[0], *([{"prompt": "p"}] * 12))
    message = fails(path, "12 of 13 rows", "a.jsonl:11: no `completion`", "and 2 more")
    assert "a.jsonl:12" not in message
    assert len(open_examples(path, on_bad_row="skip").skipped) == 12
    assert "on_bad_row" not in fails(write(path, {"prompt": "p"}), "1 of 1 rows", layout="sft", on_bad_row="skip")


def change(layout, **columns):
    return layout, {**GOOD[layout], **columns}


FAULTS = [
    ("sft", [1], "[1]; expected one JSON object a line (`jq -c .[]` makes lines of a list)"),
    ("sft", {"prompt": "p", "completions": "c"}, "no `completion` among columns ['prompt', 'completions']; expected"),
    ("sft", {"prompt": "p", "completions": "c"}, "(is 'completions' meant?)"),
    ("sft", {"prompt": "p", "completion": None}, "no `completion`"),
    (*change("sft", completion=""), "`completion` is ''; expected a string that is not empty, or a list of messages"),
    (*change("sft", prompt=7), "`prompt` is 7; expected a string that is not empty, or a list of messages"),
    (*change("sft", weight=-1), "`weight` is -1; expected a finite number >= 0"),
    (*change("sft", weight=True), "`weight` is True; expected"),
    (*change("sft", weight=float("nan")), "`weight` is nan; expected"),
    (*change("sft", base_logps=[0.0, float("inf")]), "`base_logps[1]` is inf; expected a finite number"),
    (*change("sft", base_logps="x"), "`base_logps` is 'x'; expected a finite number, or a list of them"),
    (*change("sft", prompt=CHAT), "the row holds both strings and lists of messages"),
    ("sft", {"messages": []}, "`messages` is []; expected a list of 1 message or more"),
    ("sft", {"messages": "Hi"}, "`messages` is 'Hi'; expected a list"),
    ("sft", {"messages": ["Hi"]}, "`messages[0]` is 'Hi'; expected an object"),
    ("sft", {"messages": [*CHAT, {"role": "user"}]}, "no `messages[2].content` among columns ['role']"),
    ("sft", {"messages": [{"role": "user", "content": None}]}, "`messages[0].content` is None; expected a string"),
    ("sft", {"messages": [{"role": "", "content": "x"}]}, "`messages[0].role` is ''; expected"),
    ("sft", {"messages": [{"role": "user", "content": ""}]}, "expected a message that has content"),
    (*change("pairs", score_chosen=10**400), "`score_chosen` is 1000"),
    ("pairs", {**PAIR, "score_chosen": 1}, "one of `score_chosen` and `score_rejected`; expected both or neither"),
    ("pairs", {"chosen": "a", "rejected": CHAT}, "the row holds both strings and lists of messages"),
    ("pairs", {"chosen": "ab", "rejected": "a"}, "`rejected` is ''; expected a string that is not empty"),
    (*change("unpaired", label=1), "`label` is 1; expected true or false"),
    (*change("ranked", responses=RANKED["responses"][:1]), "expected a list of 2 response or more"),
    (*change("ranked", responses=[{"completion": "a", "rating": "5"}] * 2), "`responses[0].rating` is '5'; expected"),
    (*change("beliefs", belief_probs=[0.3, 0.698]), "sum 0.998; expected 2 numbers that sum to 1"),
    (*change("beliefs", belief_probs=[1.0]), "expected 2 numbers that sum to 1"),
    (*change("beliefs", belief_probs=[1.5, -0.5]), "`belief_probs[0]` is 1.5; expected a number from 0 to 1"),
    (*change("beliefs", belief_id=2), "`belief_id` is 2; expected less than 2, the number of beliefs"),
    (*change("beliefs", rejected_belief_id=9), "`rejected_belief_id` is 9; expected less than 2"),
    (*change("beliefs", belief_id=-1), "`belief_id` is -1; expected an integer >= 0"),
    (*change("dispreferred", ref_self_logps=[-1.0]), "`ref_self_logps` has 1 numbers; expected 2"),
    (*change("dispreferred", self_samples=["a", CHAT]), "the row holds both"),
    *((*change(name, weight=-1.0), "`weight` is -1.0; expected a finite number >= 0") for name in WEIGHED),
    (*change("pairs", win=float("nan")), "`win` is nan; expected a number from 0 to 1"),
    (*change("pairs", win=7), "`win` is 7; expected a number from 0 to 1"),
    (*change("code_tests", passed=[[1], [2]]), "`passed[1][0]` is 2; expected 0 or 1"),
    (*change("code_tests", passed=[[1]]), "`passed` has rows of [1]; expected codes x tests, [1, 1]"),
    (*change("code_tests", passed=[[1, 0], [0, 0]]), "`passed` has rows of [2, 2]; expected"),
    (*change("code_tests", codes=["x", ""]), "`codes[1]` is ''; expected a string"),
    (*change("unlearn", split="train"), "`split` is 'train'; expected `forget` or `retain`"),
    (*change("membership", label=2), "`label` is 2; expected 0 or 1"),
    (*change("membership", split="forget"), "`split` is 'forget'; expected train, dev or test"),
    (*change("steps", labels=[1, 1]), "`labels` has 2 values; expected 4, one for every step"),
    (*change("steps", labels=[1] * 5), "`labels` has 5 values; expected 4, one for every step"),
    (*change("steps", soft=[0.5]), "`soft` has 1 values; expected 4, one for every step"),
    (*change("steps", labels=[1, 1, 1, -0.5]), "`labels[3]` is -0.5; expected null, -1 or a number from 0 to 1"),
    (*change("steps", labels=[1, 1, 1, 2]), "`labels[3]` is 2; expected null, -1 or"),
    (*change("steps", labels=[1, 1, True, 1]), "`labels[2]` is True; expected null, -1 or"),
    (*change("steps", steps=["a", "b", "", "d"]), "`steps[2]` is ''; expected a string that is not empty"),
    (*change("steps", steps=[]), "`steps` is []; expected a list of 1 str or more"),
    (*change("steps", outcome=0.5), "`outcome` is 0.5; expected 0 or 1"),
    ("steps", {"prompt": "p", "steps": ["a"]}, "no `labels` among columns ['prompt', 'steps']; expected"),
    ("ranked", {"instruction": "i", "completions": []}, "`completions` is []; expected a list of 1 object or more"),
    ("ranked", {"instruction": "i", "completions": [{"response": "a"}] * 2}, "no `responses[0].rating` among"),
]


@pytest.mark.parametrize(("layout", "row", "message"), FAULTS)
def test_a_malformed_row_is_named_with_what_was_found_and_expected(tmp_path, layout, row, message):
    path = write(tmp_path / "a.jsonl", row, GOOD[layout])
    fails(path, "a.jsonl:1: ", message, layout=layout)
    examples = open_examples(path, layout, on_bad_row="skip")
    assert rows_of(examples) == [GOOD[layout]]
    (bad,) = examples.skipped
    assert isinstance(bad, BadRow)
    assert message in bad.message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", "completion": "\xff"}', "not UTF-8 ('utf-8' codec can't decode byte 0xff in position 31"),
        (b'{"prompt": "a", "completion": "\\ud800"}', "not UTF-8 ("),
        (b'{"prompt": "a", "completion": "c"', "not JSON (Expecting ',' delimiter"),
        (b'{"a":' * 100_000, "not JSON (maximum recursion depth exceeded"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON ("),
        (b"\0" * 40, "not JSON ("),
        ('{"prompt": "a", "completion": "c"}'.encode("utf-16-le"), "not JSON ("),
    ],
)
def test_what_is_no_json_object(tmp_path, line, message):
    (path := tmp_path / "a.jsonl").write_bytes(b"\n" + line + b"\n" + json.dumps(SFT[0]).encode())
    fails(path, "1 of 2 rows", f"a.jsonl:2: {message}")
    assert rows_of(open_examples(path, on_bad_row="skip")) == SFT[:1]


def test_strings_and_chats_do_not_mix_in_one_data_set(tmp_path):
    chat = {"prompt": CHAT[:1], "completion": CHAT[1:]}
    write(tmp_path / "a.jsonl", SFT[0], chat), write(tmp_path / "b.jsonl", chat, SFT[1])
    fails(tmp_path / "a.jsonl", "a.jsonl:2: with it, the data set holds both strings and lists of messages")
    examples = open_examples(tmp_path, on_bad_row="skip")
    assert rows_of(examples) == SFT[:2]
    assert [bad.where for bad in examples.skipped] == ["a.jsonl:2", "b.jsonl:1"]
    assert rows_of(open_examples(write(tmp_path / "c.jsonl", chat, {"messages": CHAT}))) == [chat, {"messages": CHAT}]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**PAIR, "self_samples": ["s"]}, ["fit pairs and dispreferred; expected"]),
        ({"prompt": "p", "chosen": "c", "rejcted": "r"}, ["'rejcted' meant to be 'rejected'", "fit no layout"]),
        (
            {"prompt": "p", "x": 1},
            ["a.jsonl:2: columns ['prompt', 'x'] fit no layout", "\n  sft: messages | prompt, completion\n"],
        ),
        (
            {"question": "q", "answer": "a", "name": "n"},
            ["fit no layout", "\n  unlearn: name, question, answer, split"],
        ),
    ],
)
def test_columns_of_no_layout_or_two(tmp_path, row, words):
    (path := tmp_path / "a.jsonl").write_text("nothing\n" + json.dumps(row))
    fails(path, *words, "Rename columns, or say which layout it is", on_bad_row="skip")


def test_the_larger_layout_wins_and_null_is_absent(tmp_path):
    rows = [BELIEFS, {**SFT[0], "answer": "7"}, {**SFT[0], "label": None, "weight": None}, {**PAIR, "completion": None}]
    found = [open_examples(write(tmp_path / "a.jsonl", row)) for row in rows]
    assert [examples.layout for examples in found] == ["beliefs", "sft", "sft", "pairs"]
    assert found[2].__len__() == 1


def test_a_prompt_alone_is_to_be_answered_and_beside_others_hides_no_misspelt_column(tmp_path):
    for row in ({"prompt": "p"}, {"prompt": [{"role": "user", "content": "x"}], "id": "7", "answer": None}):
        found = open_examples(write(tmp_path / "a.jsonl", row))
        assert (found.layout, found[0]["prompt"]) == ("rollout", row["prompt"])
    fails(write(tmp_path / "a.jsonl", {"prompt": "p", "anwser": "7"}), "Is 'anwser' meant to be 'answer'?")
    fails(write(tmp_path / "a.jsonl", {"id": "7"}), "fit no layout")


def test_known_nulls_are_left_out_and_others_stay(tmp_path):
    path = write(tmp_path / "a.jsonl", {**SFT[0], "weight": None, "other": None})
    assert open_examples(path)[0] == {**SFT[0], "other": None}


def test_adapters(tmp_path):
    def only(row, layout="auto"):
        examples = open_examples(write(tmp_path / "a.jsonl", row), layout)
        return examples.layout, examples[0]

    row = {"question": "1+1?", "answer": "It is\n#### 2", "id": 3}
    prompt = {"prompt": "Question: 1+1?\nAnswer:", "completion": " It is\n#### 2"}
    assert only(row) == ("sft", row | prompt)
    assert only(row, "rollout") == ("rollout", row | prompt)
    assert only(row | {"weight": 2.0}) == ("sft", row | prompt | {"weight": 2.0})
    scored = [{"response": "a", "overall_score": 5.0, "model": "m", "x": 1}, {"response": "b", "overall_score": 3}]
    layout, row = only({"instruction": "do", "completions": scored})
    assert (layout, row["prompt"]) == ("ranked", "do")
    assert row["responses"] == [{"completion": "a", "rating": 5.0, "source": "m"}, {"completion": "b", "rating": 3}]
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    wanted = {"prompt": start, "chosen": " same then x", "rejected": " same then y"}
    assert only({"chosen": start + " same then x", "rejected": start + " same then y"}) == ("pairs", wanted)
    longer = {"chosen": f"{start} d\n\nHuman: e\n\nAssistant: f", "rejected": f"{start} d"}  # the turn is not shared
    assert only(longer)[1] == {"prompt": start, "chosen": longer["chosen"][len(start) :], "rejected": " d"}
    assert only({"chosen": "abX", "rejected": "abY"})[1] == {"prompt": "ab", "chosen": "X", "rejected": "Y"}
    other = {"role": "assistant", "content": "No"}
    chats = {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [other]}
    assert only({"chosen": CHAT, "rejected": [CHAT[0], other], "prompt": None}) == ("pairs", chats)


def test_gdpo(tmp_path):
    row = {"prompt": "q", "accept_choice_id": 2, "accept_choice": "Yes", "accept_response": "y", "context": "k"}
    row |= {"reject_choice_id": "0", "reject_choice": "No", "reject_response": "n", "probabilities": [0.25, 0.25, 0.5]}
    wanted = {"beliefs": ["No", "1", "Yes"], "belief_probs": [0.25, 0.25, 0.5], "belief_id": 2}
    wanted |= {"rejected_belief_id": 0, "chosen": "y", "rejected": "n"}
    examples = open_examples(write(tmp_path / "a.jsonl", row))
    assert (examples.layout, examples[0]) == ("beliefs", row | wanted)
    bare = {k: v for k, v in row.items() if not k.endswith("_choice") and k != "reject_choice_id"}
    assert formats.gdpo(bare)["beliefs"] == ["0", "1", "2"]
    assert "rejected_belief_id" not in formats.gdpo(bare)
    fails(write(tmp_path / "b.jsonl", row | {"accept_choice_id": 5}), "`belief_id` is 5; expected less than 3")
    fails(
        write(tmp_path / "b.jsonl", row | {"accept_choice_id": "x"}), "`accept_choice_id` is 'x'; expected an integer"
    )


def steps_of(path, row):
    examples = open_examples(write(path, row))
    assert examples.layout == "steps"
    found = examples[0]
    assert {name: found[name] for name in row} == row  # nothing is lost, but for what got another name
    return found["prompt"], found["steps"], found["labels"], found.get("answer")


def test_published_steps(tmp_path):
    path = tmp_path / "a.jsonl"
    trl = {"prompt": "p", "completions": ["a", "b", "c"], "labels": [True, False, 0.5]}
    examples = open_examples(write(path, trl))
    assert (examples.layout, examples[0]["steps"], examples[0]["labels"]) == ("steps", ["a", "b", "c"], [1, 0, 0.5])
    assert [type(v) for v in examples[0]["labels"]] == [int, int, float]
    fails(write(path, trl | {"labels": [True]}), "`labels` has 1 values; expected 3")
    fails(write(path, trl | {"labels": "xyz"}), "`labels` is 'xyz'; expected a list")

    text = "Q + 1?  Step 1: a + b \u043a\u0438\nStep 2: c\nd \u043a\u0438\nStep 3: The answer is: 7 \u043a\u0438"
    marked = "Q + 1?  Step 1: a + b +\nStep 2: c\nd -\nStep 3: The answer is: 7 -"
    shepherd = {"input": text, "label": marked, "task": "GSM8K"}
    wanted = ["Step 1: a + b", "Step 2: c\nd", "Step 3: The answer is: 7"]
    assert steps_of(path, shepherd) == ("Q + 1?", wanted, [1, 0, 0], None)
    fails(write(path, shepherd | {"label": marked.replace("d -", "d x")}), "`label` has ", "with + or - for every")
    fails(write(path, shepherd | {"label": marked.replace("a +", "b +")}), "`label` has ", "the text of `input`")
    fails(write(path, shepherd | {"label": marked[:-1]}), "`label` has ")
    fails(write(path, shepherd | {"input": text.replace("Step 1:", "")}), "expected the text of `input`")
    plain = {"input": "a \u043a\u0438", "label": "a +"}
    fails(write(path, shepherd | plain), "expected a question, then `Step 1:`")

    option = lambda text, rating: {"text": text, "rating": rating, "flagged": None}
    ways = [option("x", -1), option("b", 0)]
    steps = [
        {"completions": [option("a", 1)], "human_completion": None, "chosen_completion": 0},
        {"completions": ways, "human_completion": None, "chosen_completion": 1},
        {"completions": ways[:1], "human_completion": option("c", None), "chosen_completion": None},
        {"completions": [option("d", None)], "human_completion": None, "chosen_completion": 0},
        {"completions": ways, "human_completion": None, "chosen_completion": None},
    ]
    question = {"problem": "1+1?", "ground_truth_answer": "2", "pre_generated_steps": None}
    row = {"labeler": "l", "generation": None, "question": question, "label": {"steps": steps, "total_time": 3}}
    assert steps_of(path, row) == ("1+1?", ["a", "b", "c", "d", "x"], [1, 0, 1, None, -1], "2")
    for at in (2, -1, "0"):
        bad = row | {"label": {"steps": [steps[1] | {"chosen_completion": at}]}}
        fails(write(path, bad), f"`label.steps[0].chosen_completion` is {at!r}; expected null, or 0 to 1")
    fails(write(path, row | {"label": {"steps": []}}), "`label.steps` is []; expected a list of 1 object or more")
    fails(write(path, row | {"question": "1+1?"}), "`question` is '1+1?'; expected an object")

    bench = {"id": "gsm8k-0", "generator": "g", "problem": "1+1?", "steps": ["a", "b", "c"], "final_answer_correct": 0}
    for label, labels in ((-1, [1, 1, 1]), (0, [0, None, None]), (1, [1, 0, None]), (2, [1, 1, 0])):
        assert steps_of(path, bench | {"label": label}) == ("1+1?", ["a", "b", "c"], labels, None)
    for label in (3, -2, True, "1"):
        fails(write(path, bench | {"label": label}), "`label` is ", "expected the index of one of 3 steps, or -1")


def test_a_pair_is_two_unpaired_rows(tmp_path):
    pair = {**PAIR, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0, "weight": 2.0}
    wanted = [{"prompt": "p", "completion": "c", "label": True, "ref_logps": -1.0, "weight": 2.0}]
    wanted += [{"prompt": "p", "completion": "r", "label": False, "ref_logps": -2.0, "weight": 2.0}]
    assert formats.pairs_to_unpaired(pair) == wanted
    assert len(open_examples(write(tmp_path / "a.jsonl", *formats.pairs_to_unpaired(PAIR)), "unpaired")) == 2
    with pytest.raises(DataError, match="no `prompt` among"):
        formats.pairs_to_unpaired({"chosen": "c", "rejected": "r"})


VALID = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in SFT)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 2), st.binary(max_size=3)), max_size=4))
def test_damaged_bytes_raise_our_error_and_spare_the_other_rows(tmp_path_factory, edits):
    raw = VALID
    for at, cut, new in edits:
        raw = raw[:at] + new + raw[at + cut * 20 :]
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(raw)
    good = []
    for line in raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        try:
            row = json.loads(line.decode())
            texts = [row["prompt"], row["completion"]]
            if all(type(text) is str and text.encode() for text in texts) and "messages" not in row:
                good.append(row)
        except (ValueError, TypeError, KeyError):
            pass
    try:
        found = rows_of(open_examples(path, "sft", on_bad_row="skip"))
    except DataError:
        found = []
    assert found == good
    with contextlib.suppress(DataError):
        assert rows_of(open_examples(path)) == good


def open_handles(path):
    """How many of this process's open files are that one."""
    names = []
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            names.append(os.readlink(f"/proc/self/fd/{handle}"))
    return names.count(str(path))


def test_threads_read_the_right_rows_and_the_file_is_closed_at_last(tmp_path):
    rows = [{"prompt": str(i), "completion": "x" * (i % 97 + 1)} for i in range(2000)]
    examples = open_examples(write(tmp_path / "a.jsonl", *rows))
    assert open_handles(tmp_path / "a.jsonl") == 1
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(examples.__getitem__, (i * 7 % 2000 for i in range(8000))))
    assert found == [rows[i * 7 % 2000] for i in range(8000)]
    with open(tmp_path / "a.jsonl", "r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"a\.jsonl:2000: not JSON .*The file has changed: open it again"):
        examples[1999]
    del examples
    gc.collect()
    assert open_handles(tmp_path / "a.jsonl") == 0


def test_lines_are_never_in_memory_together(tmp_path):
    path = write(tmp_path / "a.json", *[{"prompt": "p", "completion": "x" * 2**20}] * 30)
    tracemalloc.start()
    examples = open_examples(path)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(examples) == 30
    assert used < 8 * 2**20


def test_sources_and_splits(tmp_path):
    for name, row in [("train-1", SFT[1]), ("train-0", SFT[0]), ("test", SFT[2]), (".train-2", SFT[3])]:
        write(tmp_path / f"{name}.jsonl", row)
    examples = open_examples(tmp_path, split="train")
    assert rows_of(examples) == SFT[:2]
    assert [file.name for file in examples.files] == ["train-0.jsonl", "train-1.jsonl"]
    assert examples.where(1) == "train-1.jsonl:1"
    fails(tmp_path, "files of test and train; expected one split. Say split='train'")
    fails(tmp_path, "split: 'trian'; expected one of test, train. Is 'train' meant?", split="trian")
    fails(tmp_path / "test.jsonl", "one data set, and split='test'; expected a folder", split="test")
    fails(tmp_path / "none.jsonl", "no such file or folder; expected .jsonl")
    for name, words in [
        ("a.jsonl.gz", "type '.gz'; expected .jsonl, .json, .parquet or a folder. Unpack or convert"),
        ("a.csv", ".csv"),
    ]:
        fails(write(tmp_path / name), words)
    fails(tmp_path / "test.jsonl", "layout: 'pair'; expected one of auto, sft", "Is 'pairs' meant?", layout="pair")
    fails(tmp_path / "test.jsonl", "on_bad_row: 'drop'; expected one of fail, skip. Choose", on_bad_row="drop")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "no .jsonl, .parquet or state.json (of save_to_disk)")
    write(tmp_path / "empty" / "a.jsonl").write_bytes(b"\n \n")
    fails(tmp_path / "empty", "no rows; expected at least one")
    write(tmp_path / "empty" / "b.parquet")
    fails(tmp_path / "empty", "both .jsonl and .parquet; expected files of one format")
    (path := tmp_path / "secret.jsonl").symlink_to(tmp_path / "empty")
    fails(path, "both .jsonl and")


def test_parquet_and_saved_datasets(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow", reason="optional: reads Parquet and Arrow")
    from pyarrow import ipc, parquet

    chats = [{"prompt": [{"role": "user", "content": f"p{i}"}], "completion": CHAT[1:], "n": i} for i in range(3000)]
    chats[1500]["completion"], chats[2]["weight"] = [], 2.0
    wanted = [row for row in chats if row["completion"]]
    table = pa.Table.from_pylist(
        chats, pa.schema({**{k: pa.array([chats[0][k]]).type for k in chats[0]}, "weight": "f8"})
    )
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    examples = open_examples(tmp_path / "a.parquet", on_bad_row="skip")
    assert rows_of(examples) == wanted
    assert (examples.where(1500), examples.skipped[0].where) == ("a.parquet:row 1501", "a.parquet:row 1500")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    fails(tmp_path / "b.parquet", "b.parquet: cannot be read (", "expected parquet. Write it again.")

    def save(folder, *names, **state):
        folder.mkdir(parents=True, exist_ok=True)
        for i, name in enumerate(names):
            with pa.OSFile(str(folder / name), "wb") as file, ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table.slice(i * 1000, 1000), max_chunksize=300)
        state = {"_data_files": [{"filename": name} for name in names]} | state
        (folder / "state.json").write_text(json.dumps(state))
        (folder / "dataset_info.json").write_text("{}")
        return folder

    names = [f"data-0000{i}-of-00003.arrow" for i in range(3)]
    save(tmp_path / "hf" / "train", *names, _indices_files=None), save(tmp_path / "hf" / "test", names[0])
    (tmp_path / "hf" / "dataset_dict.json").write_text('{"splits": ["train", "test", ".."]}')
    for path in (tmp_path / "hf", tmp_path / "hf" / "train"):
        examples = open_examples(path, "sft", on_bad_row="skip")
        assert rows_of(examples) == wanted
        assert examples.skipped[0].where == f"{names[1]}:row 500"
    assert len(open_examples(tmp_path / "hf", split="test")) == 1000
    fails(tmp_path / "hf" / "test", "one data set, and split='test'; expected", split="test")
    fails(tmp_path / "hf", "split: 'tset'; expected one of train, test, ... Is 'test' meant?", split="tset")
    fails(tmp_path / "hf", "names '..'; expected what lies in this folder, no way out of it", split="..")
    save(tmp_path / "bad")
    (tmp_path / "bad" / names[0]).symlink_to(tmp_path / "hf" / "test" / names[0])
    for name in ("../hf/test/data-00000-of-00003.arrow", names[0], "\0.arrow", "missing.arrow", "x" * 300 + ".arrow"):
        save(tmp_path / "bad", _data_files=[{"filename": name}])
        fails(tmp_path / "bad", f"names {formats._brief(name)}; expected what lies in this folder")
    (tmp_path / "bad" / names[0]).unlink()
    fails(save(tmp_path / "bad", _data_files=["x"]), "state.json lists ['x']; expected .arrow files")
    picked = save(tmp_path / "bad", names[0], _indices_data_files=[{"filename": "i.arrow"}])
    fails(picked, "has '_indices_data_files', a choice of rows; expected all of them", "flatten_indices()")
    (picked / "state.json").write_text("[")
    fails(picked, "state.json: not JSON (")
    for offsets, words in [((0, 2, 4), ["1 of 2", ":row 1: cannot be read ("]), ((0, 999, 4), ["2 of 2", "Offset"])]:
        buffers = [None, *map(pa.py_buffer, (np.array(offsets, np.int32).tobytes(), b"ab\xff\xfe"))]
        text = pa.Array.from_buffers(pa.string(), 2, buffers)
        table = pa.table({"prompt": text, "completion": text})
        fails(save(tmp_path / "c", names[0]), *words, "expected plain values")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fails(tmp_path / "a.parquet", "a.parquet: Parquet or Arrow, and no pyarrow", 'pip install "jaxaroo[arrow]"')
