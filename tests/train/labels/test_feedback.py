"""The text of stage 1 by hand, and its tokens against those that stage 2 reads."""

import numpy as np
import pytest

from jaxaroo.models.reward import StepText, one_token, render_steps
from jaxaroo.models.tokenizer import byte_tokenizer
from jaxaroo.train.data.arithmetic import (
    SLIPS,
    ArithmeticConfig,
    arithmetic_tokenizer,
    explain_lines,
    make_problem,
    slip_lines,
)
from jaxaroo.train.data.tokenise import encode_sft
from jaxaroo.train.labels.feedback import feedback_example

ROW = {"id": "a", "prompt": "3 and 4 ?\n", "steps": ["3 + 4 = 7", "7 + 1 = 9", "ans 9"], "labels": [1, 0, None]}
SAID = ["right", "7 + 1 is 8", None]


def rows(number=40):
    """Solutions of the embedded task, right ones and wrong ones, with their feedback."""
    rng, made = np.random.default_rng(0), []
    for i in range(number):
        problem = make_problem(ArithmeticConfig(level=3), "train", i)
        found = slip_lines(problem, SLIPS[i % 4], rng) if i % 2 else None
        lines = found[0] if found else problem.lines
        made.append({"prompt": f"{problem.question}\n", "steps": lines, "feedback": explain_lines(problem, lines)})
    return made


def test_the_prompt_is_the_whole_solution_and_the_completion_a_line_for_each_step_that_has_feedback():
    found = feedback_example({**ROW, "feedback": SAID})
    assert found == {
        "prompt": "3 and 4 ?\n3 + 4 = 7\n7 + 1 = 9\nans 9\n",
        "completion": "right\n7 + 1 is 8",
    }
    found = feedback_example({**ROW, "feedback": SAID}, start="S:", between="; ", closing=" #\n")
    assert found["prompt"] == "3 and 4 ?\nS:3 + 4 = 7; 7 + 1 = 9; ans 9 #\n"
    found = feedback_example({**ROW, "feedback": [" yes,\n\n right\t", "no\u2028no", "as before"]})
    assert found["completion"] == "yes, right\nno no\nas before"


@pytest.mark.parametrize("start", ["", "one "])
@pytest.mark.parametrize("tokenizer", [arithmetic_tokenizer(), byte_tokenizer()], ids=["words", "bytes"])
def test_stage_two_reads_the_tokens_of_stage_one(tokenizer, start):
    newline, control = one_token(tokenizer, "\n"), one_token(tokenizer, "<|sep|>")
    for row in rows():
        encoded = encode_sft(tokenizer, feedback_example(row, start=start))
        first = int(np.argmax(encoded.scored))
        told = [said for said in row["feedback"] if said is not None]
        assert tokenizer.decode(encoded.ids[first:].tolist()) == "\n".join(told)
        ids, ends = render_steps(tokenizer, row["prompt"], row["steps"], StepText(newline, start, ""))
        assert encoded.ids[:first].tolist() == ids
        assert ends[-1] == first - 1  # where the last score is read, feedback begins
        ids, _ = render_steps(tokenizer, row["prompt"], row["steps"], StepText(control, start, "\n"))
        assert encoded.ids[: first - 1].tolist() == [i for i in ids if i != control]


@pytest.mark.errors
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "no `feedback`; expected a list of 3"),
        ({"feedback": None}, "no `feedback`; expected a list of 3"),
        ({"feedback": ["right"]}, r"`feedback` \['right'\]; expected a list of 3"),
        ({"feedback": "right"}, "`feedback` 'right'; expected a list of 3"),
        ({"feedback": ["right", " \n", None]}, r"`feedback\[1\]` is ' \\n'; expected a text that is not blank"),
        ({"feedback": ["right", 0, None]}, r"`feedback\[1\]` is 0; expected a text"),
        ({"feedback": [None, None, None]}, "null for every step"),
        ({"feedback": ["right", None, "right"]}, "null at 1 and text behind it"),
        ({"feedback": SAID, "prompt": [{"role": "user", "content": "3 and 4 ?"}]}, "`prompt` holds messages"),
    ],
)
def test_what_has_no_feedback_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        feedback_example({**ROW, **change})
