"""Oracle: a reader of the English that knows nothing of the plan. Then what the checker must and must not take."""

import re

import numpy as np
import pytest

from jaxaroo.models.tokenizer import TextStream
from jaxaroo.train.data.arithmetic import (
    SLIPS,
    SPLITS,
    ArithmeticConfig,
    arithmetic_tokenizer,
    check_lines,
    explain_lines,
    make_problem,
    slip_lines,
    solves,
)

GRID = [(level, hi) for level in (1, 2, 3, 4) for hi in (20, 50, 99)]


def problems(level, hi, count=150, split="train"):
    return [make_problem(ArithmeticConfig(level=level, hi=hi), split, i) for i in range(count)]


def read_english(question):
    """Follow the story sentence by sentence, with floats, so that an uneven share would show."""
    start, *story, ask = re.split(r"(?<=[.?]) ", question)
    total = float(re.search(r"has (\d+)", start)[1])
    for sentence in story:
        numbers = [int(n) for n in re.findall(r"\d+", sentence)]
        if "friend has" in sentence:
            continue
        if "packs" in sentence:
            total += (1 if "buys" in sentence else -1) * numbers[0] * numbers[1]
        elif "times" in sentence:
            total *= numbers[0]
        elif "share" in sentence:
            total /= numbers[0]
        else:
            total += numbers[0] * (1 if re.search("finds|more", sentence) else -1)
    assert ask.startswith("how many")
    return total, len(story)


@pytest.mark.parametrize(("level", "hi"), GRID)
def test_the_answer_is_what_the_english_says(level, hi):
    fewest, most = ArithmeticConfig(level=level).events
    kinds = set()
    for p in problems(level, hi):
        total, events = read_english(p.question)
        assert p.answer == total
        assert fewest <= events <= most
        assert 11 <= p.start <= hi
        assert all(0 < int(line.split()[-1]) <= 999 for line in p.lines)
        assert check_lines(p, p.lines) == [True] * len(p.lines)
        assert solves(p, p.lines)
        kinds |= {line.op for line in p.plan} | ({"friend"} if "friend has" in p.question else set())
    assert kinds == [{"+", "-"}, {"+", "-", "*"}, {"+", "-", "*", "/"}, {"+", "-", "*", "/", "friend"}][level - 1]


def test_every_equation_is_true():
    for p in problems(4, 99):
        for line in p.lines[:-1]:
            left, right = line.split(" = ")
            assert eval(left) == int(right)


def test_an_example_depends_on_seed_split_and_index_alone():
    cfg = ArithmeticConfig(level=3)
    assert make_problem(cfg, "train", 70_000) == make_problem(cfg, "train", 70_000)
    first = {split: {make_problem(cfg, split, i).question for i in range(200)} for split in SPLITS}
    assert all(len(questions) > 190 for questions in first.values())
    assert len(first["train"] & first["test"]) < 5
    assert make_problem(ArithmeticConfig(level=3, seed=1), "train", 0) != make_problem(cfg, "train", 0)


def test_the_checker_takes_what_means_the_same_and_nothing_else():
    p = next(p for p in problems(2, 20) if p.plan[0].op == "*" and p.plan[1].op == "+")
    a, _, b, _, c = p.lines[0].split()
    same = [f"{b} * {a} = {c}", f"  {a}*{b}={c} ", " ".join(f"{a} * {b} = {c}")]
    for line in same:
        assert check_lines(p, [line, *p.lines[1:]]) == [True] * len(p.lines)
    wrong = [f"{a} * {b} = {int(c) + 1}", f"{a} + {b} = {c}", f"0{a} * {b} = {c}", f"{a} * {b} = {c} .", "", "ans 1", c]
    for line in wrong:
        assert check_lines(p, [line, *p.lines[1:]]) == [False] * len(p.lines)
        assert solves(p, [line, *p.lines[1:]])  # the answer is right all the same
    assert check_lines(p, [*p.lines, "ans 1"])[-1] is False
    assert not solves(p, p.lines[:-1])
    assert not solves(p, [])
    minus = next(p for p in problems(1, 20) if p.plan[0].op == "-")
    a, _, b, _, c = minus.lines[0].split()
    assert check_lines(minus, [f"{b} - {a} = {c}"]) == [False]


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_has_one_first_wrong_line_and_goes_on_to_an_answer(slip):
    rng, made, firsts = np.random.default_rng(0), 0, set()
    for p in problems(3, 50):
        if (found := slip_lines(p, slip, rng)) is None:
            continue
        lines, first = found
        made += 1
        firsts.add(first)
        assert lines[:first] == p.lines[:first]
        assert check_lines(p, lines) == [i < first for i in range(len(lines))]
        assert lines[-1].startswith("ans ")
        assert len(lines) == len(p.lines) or (slip == "skip" and len(lines) < len(p.lines))
        stated = [line.split() for line in lines[:-1]]
        true = [max(0, eval(f"{a}{op.replace('/', '//')}{b}")) == int(c) for a, op, b, _, c in stated]
        assert true.count(False) == (slip == "result")  # the other slips are sound arithmetic on the wrong thing
        if slip == "skip":  # a whole event: a product goes with the line that uses it
            heads = [i for i, line in enumerate(p.plan) if line.right is not None]
            spans = [range(i, i + 1 + (p.plan[i].left is not None)) for i in heads]
            without = [[line.op for i, line in enumerate(p.plan) if i not in span] for span in spans]
            assert [op for _, op, *_ in stated] in without
            assert all(b != "0" for _, _, b, *_ in stated)
    assert made > 100
    assert len(firsts) > 2


def test_a_line_is_explained_by_the_plans_own_and_whether_it_keeps_to_it():
    rng, seen = np.random.default_rng(1), {"keeps": 0, "loses": 0, None: 0}
    tokenizer = arithmetic_tokenizer()
    for n, p in enumerate(problems(3, 50)):
        lines, first = slip_lines(p, SLIPS[n % 4], rng) or (p.lines, len(p.lines))
        said = explain_lines(p, lines)
        assert [text is not None for text in said] == [i <= first for i in range(len(lines))]
        for line, text in zip(lines, said, strict=True):
            seen[text and text.split()[-1]] += 1
            if text is None:
                continue
            *stated, verdict = text.split()
            assert verdict == ("keeps" if stated == line.split() else "loses")
            if stated[0] == "ans":
                assert int(stated[1]) == read_english(p.question)[0]
            else:
                assert eval("".join(stated[:3]).replace("/", "//")) == int(stated[4])
            ids = tokenizer.encode(text, bos=False)
            assert tokenizer.decode(ids) == text  # in words of the task: unknown ones and control tokens are lost
    assert min(seen.values()) > 60


def test_what_is_said_of_lines_that_mean_the_same_or_are_too_many():
    p = next(p for p in problems(2, 20) if p.plan[0].op == "*" and p.plan[1].op == "+")
    a, _, b, _, c = p.lines[0].split()
    assert explain_lines(p, [f"{b}*{a} = {c}"]) == [f"{p.lines[0]} keeps"]
    assert explain_lines(p, ["", "ans 1"]) == [f"{p.lines[0]} loses", None]
    assert explain_lines(p, [*p.lines, "ans 1", "ans 2"])[len(p.lines) - 1 :] == [f"{p.lines[-1]} keeps", "loses", None]
    assert explain_lines(p, []) == []


def test_text_survives_the_tokenizer():
    tokenizer = arithmetic_tokenizer()
    assert 60 <= tokenizer.vocab_size <= 80
    unknown = tokenizer.encode("<|unk|>", bos=False, allow_special=True)
    for p in problems(4, 99) + problems(3, 20):
        text = "\n".join([p.question, *p.lines])
        ids = tokenizer.encode(text, bos=False)
        assert tokenizer.decode(ids) == text
        assert not {*unknown} & {*ids}
        stream = TextStream(tokenizer)
        assert "".join([*(stream.push([i]) for i in ids), stream.finish()]) == text
    assert tokenizer.encode("5")[0] == tokenizer.bos_id
    assert len(tokenizer.encode("123", bos=False)) == 3


@pytest.mark.errors
def test_what_cannot_be_made_is_refused():
    for options, message in (({"level": 5}, "level: found 5"), ({"hi": 100}, "hi: found 100; expected 12 to 99")):
        with pytest.raises(ValueError, match=message):
            ArithmeticConfig(**options)
    with pytest.raises(ValueError, match="split='dev'"):
        make_problem(ArithmeticConfig(), "dev", 0)
    with pytest.raises(ValueError, match="slip='typo'"):
        slip_lines(problems(1, 20, 1)[0], "typo", np.random.default_rng(0))
