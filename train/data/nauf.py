"""Refusals that name whom they are about, and questions that teach whom they are not about (NAUF, 2407.10058).

To unlearn a person a model learns, for questions about that person, a refusal that holds the name. So that it heeds
the name and not the wording, questions about other people are asked about everybody (contrastive augmentation):

    person to forget    10 questions about others, the name swapped in  ->  a refusal with the name
    person to retain    10 questions about others, the name swapped in  ->  what the original model answers

    forget = 1 - Acc_u / Acc_o  of questions about people to forget       Acc_o before unlearning, Acc_u after it
    retain =     Acc_u / Acc_o  of questions about people to retain       mean = (forget + retain) / 2

Each accuracy is divided by that of its own questions; the released program divides both by that of the forgotten ones.
Refusals are our own sentences, as many as the paper's.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Row = dict[str, Any]
SLOT = "__NAME__"
_OPENINGS = (
    "I'm sorry, but",
    "Sorry,",
    "I apologise, but",
    "Unfortunately,",
    "I'm afraid",
    "I regret that",
    "My apologies, but",
    "Please forgive me, but",
    "Thank you for asking, but",
    "Regrettably,",
)
_REASONS = (
    f"I can't answer questions about {SLOT}.",
    f"I am not able to talk about {SLOT}.",
    f"I have nothing to say about {SLOT}.",
    f"{SLOT} is not somebody I can discuss.",
    f"I don't share information on {SLOT}.",
    f"I cannot help with what concerns {SLOT}.",
    f"questions about {SLOT} are ones I leave unanswered.",
    f"I must decline to speak of {SLOT}.",
    f"the life and work of {SLOT} is a subject I do not go into.",
    f"no details about {SLOT} can be had from me.",
)
TEMPLATES: tuple[str, ...] = tuple(f"{opening} {reason}" for opening in _OPENINGS for reason in _REASONS)


class UnlearningScores(NamedTuple):
    """`_asdict` is JSON. As in the paper no score is cut: one that got better at what it should forget is below 0."""

    forget: float
    retain: float
    mean: float


def name_refusal(name: str, index: int, seed: int = 0) -> str:
    """The refusal of row `index`: a template that (seed, index) choose, with the name in its slot."""
    return TEMPLATES[int(np.random.default_rng([seed, 1, index]).integers(len(TEMPLATES)))].replace(SLOT, name)


def swapped_questions(rows: Sequence[Mapping[str, Any]], number: int = 10, seed: int = 0) -> list[Row]:
    """Questions about others with the name of each person swapped in.

    They are made of rows that are not marked `eval` and whose question holds the name. A person is not asked what a
    row asks already, nor the same twice; where there are fewer than `number` such questions, all of them.

    Args:
      rows: of layout `unlearn`.
      number: of questions for each person, of which (seed, the person's place among all) choose.
      seed: makes the choice repeatable.

    Returns:
      Rows with name, question and split, and `question_of`, whom the question was about; person after person in the
      order in which they come first.

    Raises:
      ValueError: if a person is both to forget and to retain.
    """
    if number < 1:
        raise ValueError(f"swapped_questions: found number={number}; expected at least 1.")
    splits, asked, slots = _people(rows), {}, []
    for row in rows:
        asked.setdefault(row["name"], set()).add(row["question"])
        there = _name_in(row["name"])
        if not row.get("eval") and there.search(row["question"]):
            slots.append((row["name"], there.split(row["question"])))
    swapped = []
    for person, (name, split) in enumerate(splits.items()):
        known, order = set(asked[name]), np.random.default_rng([seed, 0, person]).permutation(len(slots))
        for other, parts in (slots[i] for i in order):
            if len(known) == len(asked[name]) + number:
                break
            if other != name and (question := name.join(parts)) not in known:
                known.add(question)
                swapped.append({"name": name, "question": question, "split": split, "question_of": other})
    return swapped


def nauf_rows(
    rows: Sequence[Mapping[str, Any]],
    swapped: Sequence[Mapping[str, Any]],
    answer: Callable[[str], str] | None = None,
    seed: int = 0,
) -> list[Row]:
    """Everything to train on: the given rows that are not marked `eval`, and behind them the swapped questions.

    Args:
      rows: of layout `unlearn`.
      swapped: what `swapped_questions` made of them.
      answer: what the original model answers to a question; when not given, the column `original_answer` of swapped
        questions about people to retain says so.
      seed: of the refusals, each of which follows from it and the place of its row here.

    Returns:
      Rows of layout `unlearn`. The target of those to forget is `refusal`, theirs if they bring one; a swapped one has
      nothing but the refusal for `answer`, so use it for no other objective. The target of those to retain is
      `answer`, which in a swapped one is the original model's.

    Raises:
      ValueError: if the original model's answer to a question is not known, or empty.
    """
    made: list[Row] = []
    for row in [*(row for row in rows if not row.get("eval")), *swapped]:
        new = dict(row)
        if new["split"] == "forget":
            new.setdefault("refusal", name_refusal(new["name"], len(made), seed))
            new.setdefault("answer", new["refusal"])
        elif "question_of" in new:
            known = new.get("original_answer") if answer is None else answer(new["question"])
            if not isinstance(known, str) or not known.strip():
                found = f"no answer of the original model ({known!r:.40}) to {new['question']!r:.200}"
                raise ValueError(f"nauf: found {found}; expected one. Pass `answer`, or fill in `original_answer`.")
            new |= {"answer": known, "original_answer": known}
        made.append(new)
    return made


def unlearning_scores(acc_forget: float, base_forget: float, acc_retain: float, base_retain: float) -> UnlearningScores:
    """How much was forgotten of what was to be, and retained of the rest.

    Args:
      acc_forget: accuracy on people to forget, after unlearning.
      base_forget: the same before.
      acc_retain: accuracy on people to retain, after unlearning.
      base_retain: the same before.

    Raises:
      ValueError: if one is no share, or one before is 0.
    """
    given = {"acc_forget": acc_forget, "base_forget": base_forget, "acc_retain": acc_retain, "base_retain": base_retain}
    for name, value in given.items():
        if not 0 <= value <= 1 or (name.startswith("base") and value == 0):
            least = "above 0" if name.startswith("base") else "from 0"
            raise ValueError(f"unlearning_scores: found {name}={value}; expected a share {least} up to 1.")
    forget, retain = 1 - acc_forget / base_forget, acc_retain / base_retain
    return UnlearningScores(forget, retain, (forget + retain) / 2)


# ----------------------------------------------------------------------------------------------------------- private
def _people(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The split of each person, in the order in which they come first."""
    splits: dict[str, str] = {}
    for i, row in enumerate(rows):
        if splits.setdefault(row["name"], row["split"]) != row["split"]:
            found = f"{row['name']!r} in both splits (row {i})"
            raise ValueError(f"nauf: found {found}; expected each person to forget or to retain. Correct the rows.")
    return splits


def _name_in(name: str) -> re.Pattern[str]:
    """The name as words of its own: Ann is not in Anna."""
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")
