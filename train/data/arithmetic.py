"""The embedded task: seeded word problems whose every step can be checked.

A problem tells how an amount changes: gains, losses, packs, multiples, shares, and at times what a friend has, which
does not matter. Its solution is one equation a line and a last line `ans N`. All of it follows from (seed, split,
index), so any example can be made alone, and a checker that replays the plan says of each line of any solution whether
it is right. Numbers are spelled digit by digit, so a small model can carry.
"""

import dataclasses
import functools
import re
from typing import Literal, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from ...models.tokenizer import Tokenizer

Split = Literal["train", "validation", "test"]
Slip = Literal["result", "operator", "operand", "skip"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SLIPS: tuple[Slip, ...] = ("result", "operator", "operand", "skip")
MOST = 999  # no amount of a right solution is larger

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Ivy")
NOUNS = ("apples", "books", "coins", "eggs", "hats", "nuts", "pens", "shells")
_GAINS = ("{name} finds {v} {noun} .", "{name} gets {v} more {noun} .")
_LOSSES = ("{name} loses {v} {noun} .", "{name} gives away {v} {noun} .")
_PACKS = {"+": "{name} buys {a} packs of {b} {noun} .", "-": "{name} sells {a} packs of {b} {noun} ."}
_TIMES, _SHARE = "now {name} has {v} times as many .", "{v} friends share the {noun} , {name} keeps one part ."
_FRIEND = "a friend has {v} {noun} ."
_START, _ASK = "{name} has {v} {noun} .", "how many {noun} does {name} have ?"
_SPECIALS = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>", "sep_token": "<|sep|>"}
_JUDGEMENTS = ("<|good|>", "<|bad|>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArithmeticConfig:
    """How hard the problems are."""

    level: int = 2  # 1 gains and losses; 2 packs too; 3 multiples and shares too; 4 distractors too
    hi: int = 20  # start amounts and changes are drawn up to here
    seed: int = 0

    def __post_init__(self):
        if self.level not in (1, 2, 3, 4):
            raise ValueError(f"ArithmeticConfig.level: found {self.level}; expected 1 to 4.")
        if not 12 <= self.hi <= 99:
            raise ValueError(f"ArithmeticConfig.hi: found {self.hi}; expected 12 to 99.")

    @property
    def events(self) -> tuple[int, int]:
        """Fewest and most events of a problem."""
        return {1: (2, 2), 2: (2, 3), 3: (3, 4), 4: (4, 5)}[self.level]


@dataclasses.dataclass(frozen=True)
class ArithmeticExamples:
    """Random access to problems as rows of layout `sft`, made when asked for."""

    cfg: ArithmeticConfig
    split: Split = "train"
    number: int = 1_000_000

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, str]:
        """`prompt` ends with a newline, `completion` is the solution, `answer` the number alone."""
        problem = make_problem(self.cfg, self.split, index)
        lines = "\n".join(problem.lines)
        return {"prompt": f"{problem.question}\n", "completion": lines, "answer": str(problem.answer)}


class Equation(NamedTuple):
    """One line of a plan. None on the left is the amount so far, None on the right the product just made."""

    left: int | None
    op: str
    right: int | None


class Problem(NamedTuple):
    """A question and how to answer it."""

    question: str
    start: int
    plan: tuple[Equation, ...]

    @property
    def lines(self) -> list[str]:
        """The solution, `ans N` last."""
        return _write(self.start, self.plan)

    @property
    def answer(self) -> int:
        """The number asked for."""
        return int(self.lines[-1].split()[1])


def make_problem(cfg: ArithmeticConfig, split: Split, index: int) -> Problem:
    """The problem with this index; splits share none of their randomness."""
    if split not in SPLITS or index < 0:
        raise ValueError(f"make_problem: split={split!r}, index={index}; expected one of {SPLITS} and an index >= 0.")
    rng = np.random.default_rng([cfg.seed, SPLITS.index(split), index, cfg.level, cfg.hi])
    draw = lambda low, high: int(rng.integers(low, high + 1))
    words = {"name": NAMES[draw(0, len(NAMES) - 1)], "noun": NOUNS[draw(0, len(NOUNS) - 1)]}
    start = total = draw(11, cfg.hi)
    text, plan = [_START.format(v=start, **words)], []
    kinds = ["gain", "loss", "packs", "times", "share", "friend"][: {1: 2, 2: 3, 3: 5, 4: 6}[cfg.level]]
    for _ in range(draw(*cfg.events)):
        while (event := _event(kinds[draw(0, len(kinds) - 1)], total, cfg.hi, draw)) is None:
            pass  # this kind does not fit the amount so far
        sentence, numbers, equations, total = event
        text.append(sentence.format(**numbers, **words))
        plan += equations
    return Problem(" ".join([*text, _ASK.format(**words)]), start, tuple(plan))


def check_lines(problem: Problem, lines: list[str]) -> list[bool]:
    """Whether each line is right: it states the plan's equation, and all lines before it were right.

    Spaces do not matter, nor does the order of the two numbers around + and *.
    """
    wanted, right = [_parse(line) for line in problem.lines], True
    verdicts = []
    for i, line in enumerate(lines):
        right = right and i < len(wanted) and _parse(line) == wanted[i]
        verdicts.append(right)
    return verdicts


def explain_lines(problem: Problem, lines: list[str]) -> list[str | None]:
    """What there is to say of each line, in words of the task: the plan's own line there, then `keeps` or `loses`.

    A right line keeps to the plan, the first wrong one loses it, and behind that there is nothing to say (None). To
    say it is to work the line out anew and to compare. Where the plan has no more lines, `loses` stands alone.
    """
    wanted, verdicts = problem.lines, check_lines(problem, lines)
    told = verdicts.index(False) + 1 if False in verdicts else len(lines)
    said = [" ".join([*wanted[i : i + 1], "keeps" if verdicts[i] else "loses"]) for i in range(told)]
    return [*said, *[None] * (len(lines) - told)]


def solves(problem: Problem, lines: list[str]) -> bool:
    """Whether the last line is the right answer, however it was reached."""
    return bool(lines) and _parse(lines[-1]) == ("ans", problem.answer)


def slip_lines(problem: Problem, slip: Slip, rng: np.random.Generator) -> tuple[list[str], int] | None:
    """A solution with one slip, worked on to its end, and the index of the first wrong line.

    Args:
      problem: what to solve wrongly.
      slip: a result off by a carry, a wrong operator, a number copied wrongly from the question, an event left out.
      rng: where it happens, and how.

    Returns:
      Lines and index, or None when this slip leaves every line of this problem right.
    """
    if slip not in SLIPS:
        raise ValueError(f"slip_lines: slip={slip!r}; expected one of {', '.join(SLIPS)}.")
    plan, at, off = list(problem.plan), int(rng.integers(len(problem.plan))), None
    line = plan[at]
    numbers = [int(n) for n in re.findall(r"\d+", problem.question)]
    if slip == "result":
        off = (at, int(rng.choice([-10, 10, -1, 1])))
    elif slip == "operator":
        plan[at] = line._replace(op=str(rng.choice([op for op in "+-*" if op != line.op])))
    elif slip == "operand":
        plan[at] = line._replace(right=int(rng.choice(numbers)))
    else:
        both = at + 1 < len(plan) and plan[at + 1].right is None  # a product goes with the line that uses it
        del plan[at - (line.right is None) : at + 1 + both]
    lines = _write(problem.start, tuple(plan), off)
    verdicts = check_lines(problem, lines)
    return (lines, verdicts.index(False)) if False in verdicts else None


@functools.cache
def arithmetic_tokenizer() -> Tokenizer:
    """A token for every word, digit and sign of the task; `decode(encode(text))` is the text again."""
    sentences = " ".join([*_GAINS, *_LOSSES, *_PACKS.values(), _TIMES, _SHARE, _FRIEND, _START, _ASK, "ans"])
    words = sorted({w for w in sentences.split() if "{" not in w})
    vocabulary = [*_SPECIALS.values(), *_JUDGEMENTS, "<|unk|>", "\n", *"0123456789+-*/=", *NAMES, *NOUNS, *words]
    backend = tokenizers.Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token="<|unk|>"))
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in vocabulary[:7]])
    spaces = pre_tokenizers.Split(Regex(" +"), "removed")
    backend.pre_tokenizer = pre_tokenizers.Sequence([spaces, pre_tokenizers.Split(Regex(r"\d|\n"), "isolated")])
    joined = [decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse()]
    tidy = [decoders.Replace(Regex(r"(?<=\d) (?=\d)"), ""), decoders.Replace(Regex(" ?\n ?"), "\n")]
    backend.decoder = decoders.Sequence([*joined, *tidy])
    bos = _SPECIALS["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, vocabulary.index(bos))]
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **_SPECIALS}
    return Tokenizer(backend.to_str().encode(), config | {"unk_token": "<|unk|>"}, None)


# ----------------------------------------------------------------------------------------------------------- private
def _event(kind, total, hi, draw):
    """(sentence, its numbers, equations, new total), or None when the kind does not fit."""
    if kind == "friend":
        return _FRIEND, {"v": draw(2, hi)}, [], total
    if kind == "packs":
        op, a, b = "+-"[draw(0, 1)], draw(2, 9), draw(2, 9)
        after = total + a * b if op == "+" else total - a * b
        equations = [Equation(a, "*", b), Equation(None, op, None)]
        return (_PACKS[op], {"a": a, "b": b}, equations, after) if 0 < after <= MOST else None
    op, low, high = {"gain": ("+", 2, hi), "loss": ("-", 2, hi), "times": ("*", 2, 5), "share": ("/", 2, 9)}[kind]
    v = draw(low, high)
    after = _apply(total, op, v)
    if not 0 < after <= MOST or (op == "/" and total % v):
        return None
    sentence = {"+": _GAINS, "-": _LOSSES, "*": (_TIMES,), "/": (_SHARE,)}[op]
    return sentence[draw(0, len(sentence) - 1)], {"v": v}, [Equation(None, op, v)], after


def _apply(a: int, op: str, b: int) -> int:
    """In a wrong solution a division may not come out even, nor a difference stay above 0."""
    return {"+": a + b, "-": max(0, a - b), "*": a * b, "/": a // max(b, 1)}[op]


def _write(total: int, plan: tuple[Equation, ...], off: tuple[int, int] | None = None) -> list[str]:
    """Work a plan to its end; `off` is a line and by how much its result is wrong."""
    lines, product = [], 0
    for i, line in enumerate(plan):
        a = total if line.left is None else line.left
        b = product if line.right is None else line.right
        result = _apply(a, line.op, b)
        if off is not None and off[0] == i:
            result = max(0, result + off[1])
        lines.append(f"{a} {line.op} {b} = {result}")
        total, product = (result, 0) if line.left is None else (total, result)
    return [*lines, f"ans {total}"]


def _parse(line: str) -> tuple | None:
    """What a line states, in a form that is the same for `3 + 4` and `4 + 3`; None if it states nothing."""
    text = "".join(line.split())
    number = "(0|[1-9][0-9]{0,8})"
    if found := re.fullmatch(f"ans{number}", text):
        return "ans", int(found[1])
    if not (found := re.fullmatch(rf"{number}([+*/-]){number}={number}", text)):
        return None
    a, op, b, result = int(found[1]), found[2], int(found[3]), int(found[4])
    return ("=", *(sorted((a, b)) if op in "+*" else (a, b)), op, result)
