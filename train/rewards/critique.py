"""Rewards of critiques, in two stages (Critique-RL, https://arxiv.org/abs/2510.24320).

    stage I    r = [verdict = truth]                        is the criticised answer right or wrong?
    stage II   r = [refined answer right] + w [verdict = truth]
    both       r = -1 if the critique is malformed

A critique that only helps to refine learns to find fault with everything or with nothing; stage I teaches it to judge,
and in stage II w = 0.2 keeps it judging. The published scripts use RLOO with 4 critiques an answer on top, and in stage
II a penalty on the distance from the critic of stage I; the released rewards differ from the paper's in that a wrong
verdict is worth -1 too, in both stages, however the refined answer turns out.

A critique ends in a verdict: of the texts `right` and `wrong` the one that stands last in it. One with neither, or that
was cut, is malformed. What the critic is asked, and the actor that refines, are texts with fields in braces; braces
around anything else stay as they are.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

_FIELD = re.compile(r"\{(question|attempt|critique|right|wrong)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CritiqueConfig:
    """Which stage, what counts what, and the words.

    Attributes:
      stage: 1, verdicts alone; 2, answers that were refined by an actor too.
      actor: folder of the model that refines, in stage 2; greedily, and it is never trained.
      refine_tokens: tokens of a refined answer at most.
      verdict_weight: w, in stage 2.
      malformed: reward of a critique without a verdict.
      right: what a critique says of an answer that it holds to be right.
      wrong: and of one that it does not.
      ask: what the critic is asked, of {question}, {attempt}, {right} and {wrong}. Of a conversation it is the last
        message, in the place of the question.
      refine: what the actor is asked, of these and {critique}.
    """

    stage: Literal[1, 2] = 1
    actor: str | None = None
    refine_tokens: int = 512
    verdict_weight: float = 0.2
    malformed: float = -1.0
    right: str = "The answer is right."
    wrong: str = "The answer is wrong."
    ask: str = (
        "{question}\n\nProposed answer:\n{attempt}\n\nCheck it step by step, and end with the sentence `{right}` or "
        "`{wrong}`\n"
    )
    refine: str = (
        "{question}\n\nProposed answer:\n{attempt}\n\nWhat a reviewer says of it:\n{critique}\n\nAnswer anew, and heed "
        "the review.\n"
    )

    def __post_init__(self):
        if self.stage not in (1, 2):
            raise ValueError(f"CritiqueConfig.stage: found {self.stage!r}; expected 1 or 2.")
        if not 0 <= self.verdict_weight < float("inf"):
            raise ValueError(f"CritiqueConfig.verdict_weight: found {self.verdict_weight}; expected at least 0.")
        if not -float("inf") < self.malformed < 0:
            raise ValueError(f"CritiqueConfig.malformed: found {self.malformed}; expected a negative number.")
        if self.refine_tokens < 1:
            raise ValueError(f"CritiqueConfig.refine_tokens: found {self.refine_tokens}; expected at least 1.")
        if not self.right or not self.wrong or self.right in self.wrong or self.wrong in self.right:
            found = f"right={self.right!r}, wrong={self.wrong!r}"
            raise ValueError(f"CritiqueConfig: found {found}; expected two texts, neither of them a part of the other.")
        for name, fields in (("ask", ("question", "attempt")), ("refine", ("question", "attempt", "critique"))):
            if missing := [f"{{{field}}}" for field in fields if f"{{{field}}}" not in getattr(self, name)]:
                raise ValueError(f"CritiqueConfig.{name}: {getattr(self, name)!r} is without {', '.join(missing)}.")


def read_verdict(text: str, cfg: CritiqueConfig = CritiqueConfig()) -> bool | None:
    """Whether a critique says that the answer is right; None if it does not say."""
    right, wrong = text.rfind(cfg.right), text.rfind(cfg.wrong)
    return None if right == wrong else right > wrong  # both are -1 where neither is there


def question_of(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """The question's own words: the last message of a conversation."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def ask_critic(prompt: Any, attempt: str, cfg: CritiqueConfig = CritiqueConfig()) -> Any:
    """The prompt for a critique of an attempt, of the same kind as the question's prompt."""
    return _instead(prompt, cfg.ask, {"attempt": attempt}, cfg)


def ask_actor(prompt: Any, attempt: str, critique: str, cfg: CritiqueConfig = CritiqueConfig()) -> Any:
    """The prompt for an answer that heeds a critique, of the same kind as the question's prompt."""
    return _instead(prompt, cfg.refine, {"attempt": attempt, "critique": critique}, cfg)


def critique(
    verdict: Sequence[bool],
    correct: Sequence[bool],
    malformed: Sequence[bool],
    refined_correct: Sequence[bool] | None = None,
    cfg: CritiqueConfig = CritiqueConfig(),
) -> tuple[np.ndarray, dict[str, float]]:
    """Rewards of B critiques, float32, and metrics.

    Args:
      verdict: the critique says that the answer is right; anything where it is malformed.
      correct: it is.
      malformed: no verdict can be read from the critique.
      refined_correct: the answer that was given after reading the critique is right; for stage II.
      cfg: which stage.

    Returns:
      Rewards `[B]`; `discrimination_acc` and `refine_acc`, shares of all critiques, to which a malformed one does not
      add, and `format_fail`, the share of malformed ones.

    Raises:
      ValueError: if the arguments differ in length or are empty, or stage II gets no refined answers.
    """
    if cfg.stage == 2 and refined_correct is None:
        raise ValueError("critique: found no refined answers in stage 2; expected whether each of them is right.")
    given = [verdict, correct, malformed] + ([] if refined_correct is None else [refined_correct])
    if len({len(x) for x in given}) != 1 or not len(verdict):
        raise ValueError(f"critique: found {[len(x) for x in given]} flags; expected as many of each, and some.")
    said, truth, bad, *refined = (np.asarray(x, bool) for x in given)
    judged = (said == truth) & ~bad
    reward, metrics = judged.astype(np.float32), {"discrimination_acc": float(judged.mean())}
    if refined:
        metrics["refine_acc"] = float((refined[0] & ~bad).mean())
    if cfg.stage == 2:
        reward = refined[0].astype(np.float32) + np.float32(cfg.verdict_weight) * reward
    return np.where(bad, np.float32(cfg.malformed), reward), metrics | {"format_fail": float(bad.mean())}


# ----------------------------------------------------------------------------------------------------------- private
def _instead(prompt: Any, template: str, texts: Mapping[str, str], cfg: CritiqueConfig) -> Any:
    """The template, filled in, in the place of the question."""
    fields = {"question": question_of(prompt).rstrip("\n"), "right": cfg.right, "wrong": cfg.wrong, **texts}
    said = _FIELD.sub(lambda found: fields.get(found[1], found[0]), template)  # in one go: texts may hold braces
    return said if isinstance(prompt, str) else [*prompt[:-1], {"role": "user", "content": said}]
