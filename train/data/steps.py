"""Solutions as steps, and steps as tokens with labels: text -> spans, rows of layout `steps` -> what is learned.

    prompt  step 1 <sep>  step 2 <sep>  ...  step R <sep>        labels[i] stands at the i-th <sep>, and nowhere else

The score of a step is read at its separator. Prompt and steps are each tokenised alone, so the tokens up to separator
i are those of the prefix that ends there: one causal pass scores all steps as a pass over every prefix would. Text is
encoded without special tokens; only separators that are put in here have labels, whatever a step may spell.

Steps cut by AdaptiveStep (https://arxiv.org/abs/2502.13943) need nothing else: its score is read at the last token of
a step, where training puts in one rare token, and that token is the separator here.
"""

import dataclasses
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ...models.reward import StepText, render_steps
from ...models.tokenizer import Tokenizer
from .tokenise import Encoded

log = logging.getLogger(__name__)
Span = tuple[int, int]  # characters [start, end) of a text
Label = int | float | None  # int too: those who check types at run time tell them apart


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Where one step ends and the next begins."""

    how: Literal["line", "separator", "tokens"] = "line"
    separator: str = "\n\n"  # of "separator"
    tokens: int = 32  # of "tokens": in each step, the last one may have fewer

    def __post_init__(self):
        if self.how not in ("line", "separator", "tokens"):
            raise ValueError(f"SplitConfig.how: found {self.how!r}; expected line, separator or tokens.")
        if not self.separator or self.tokens < 1:
            found = f"separator={self.separator!r}, tokens={self.tokens}"
            raise ValueError(f"SplitConfig: found {found}; expected a string that is not empty, and 1 or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepsConfig:
    """What labels mean."""

    column: Literal["labels", "soft"] = "labels"
    scale: Literal["shares", "signs"] = "shares"  # 0, bad, to 1, good; or PRM800K's -1 bad, 0 neutral, 1 good
    neutral: Literal["good", "bad", "mask"] = "good"  # what 0 of "signs" is
    wrong: float = 0.0  # a step that is worth no more than this is an error
    after_error: Literal["mask", "bad"] = "mask"  # what steps after the first error teach

    def __post_init__(self):
        choices = {"column": ("labels", "soft"), "scale": ("shares", "signs"), "neutral": ("good", "bad", "mask")}
        for name, allowed in (choices | {"after_error": ("mask", "bad")}).items():
            if getattr(self, name) not in allowed:
                found = f"{getattr(self, name)!r}; expected {' or '.join(allowed)}"
                raise ValueError(f"StepsConfig.{name}: found {found}.")
        if not 0 <= self.wrong < 1:
            raise ValueError(f"StepsConfig.wrong: found {self.wrong}; expected 0 or more, and less than 1.")


def split_steps(text: str, cfg: SplitConfig = SplitConfig(), tokenizer: Tokenizer | None = None) -> list[Span]:
    """Where the steps of a text are.

    Between spans lies what separates steps. Of a line, and of what separators part, white space at the end belongs to
    no step, and what is blank is none. By tokens the spans cover the text, cut where characters begin.

    Raises:
      ValueError: if steps are counted in tokens, and there is no tokenizer or it does not give the text back.
    """
    if cfg.how != "tokens":
        separator = "\n" if cfg.how == "line" else cfg.separator
        spans, start = [], 0
        for piece in text.split(separator):
            if kept := piece.rstrip():
                spans.append((start, start + len(kept)))
            start += len(piece) + len(separator)
        return spans
    if tokenizer is None:
        raise ValueError("split_steps: steps of so many tokens, and no tokenizer; expected one. Pass it.")
    ids = tokenizer.encode(text, bos=False)
    if (back := tokenizer.decode(ids)) != text:
        found = f"{text!r:.60} comes back from the tokenizer as {back!r:.60}"
        raise ValueError(f"split_steps: {found}; expected the same. Split by line, or the text that came back.")
    return split_tokens(tokenizer, ids, [*range(cfg.tokens, len(ids), cfg.tokens), len(ids)] if ids else [])


def split_tokens(tokenizer: Tokenizer, ids: Sequence[int], ends: Sequence[int] | np.ndarray) -> list[Span]:
    """Where steps that end before these tokens are in `tokenizer.decode(ids)`, all of which they cover.

    A cut within a character moves to its beginning, and a step that then has no text is left out.

    Args:
      tokenizer: what gave the ids.
      ids: tokens of a solution.
      ends: index of the token after each step; they grow, and the last is the number of ids.
    """
    ends = [int(end) for end in ends]
    if ends != sorted({*ends}) or max(ends, default=0) != len(ids) or min(ends, default=1) < 1:
        found = f"{len(ids)} ids and ends {ends!r:.80}"
        raise ValueError(
            f"split_tokens: found {found}; expected ends that grow from 1 or more up to the number of ids."
        )
    text, cuts = tokenizer.decode(ids), [0]
    for end in ends:
        shared = os.path.commonprefix([tokenizer.decode(ids[:end]), text])  # noqa: RUF071 (no path)
        cuts.append(max(cuts[-1], len(shared)))
    return [(a, b) for a, b in itertools.pairwise(cuts) if a < b]


def step_targets(labels: Sequence[Label], cfg: StepsConfig = StepsConfig()) -> list[Label]:
    """What each step is worth to training, from 0, bad, to 1, good; None teaches nothing.

    Raises:
      ValueError: if a label is not of the scale.
    """
    targets: list[Label] = []
    after = False
    for label in labels:
        if after:
            targets.append(None if cfg.after_error == "mask" else 0.0)
            continue
        targets.append(_worth(label, cfg))
        after = targets[-1] is not None and targets[-1] <= cfg.wrong
    return targets


def encode_steps(
    tokenizer: Tokenizer, row: Mapping[str, Any], text: StepText, cfg: StepsConfig = StepsConfig()
) -> Encoded:
    """An example of layout `steps`: separators are scored where their step has a label that teaches something.

    Raises:
      ValueError: if the row lacks the column, or a label is not of the scale.
    """
    if cfg.column not in row or len(row[cfg.column]) != len(row["steps"]):
        found = f"columns {sorted(row)!r:.100}" if cfg.column not in row else f"{len(row[cfg.column])} values"
        raise ValueError(f"encode_steps: found {found}; expected `{cfg.column}`, one for each of the steps.")
    ids, ends = render_steps(tokenizer, row["prompt"], row["steps"], text)
    scored, labels = np.zeros(len(ids), bool), np.zeros(len(ids), np.float32)
    for end, target in zip(ends, step_targets(row[cfg.column], cfg), strict=True):
        if target is not None:
            scored[end], labels[end] = True, target
    return Encoded(np.asarray(ids, np.int32), scored, labels=labels)


class Weighted:
    """Rows with other weights."""

    def __init__(self, examples: Sequence[Mapping[str, Any]], weights: np.ndarray):
        """One weight a row."""
        self._examples, self._weights = examples, weights

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row, its weight times that."""
        row = self._examples[index]
        return {**row, "weight": row.get("weight", 1.0) * float(self._weights[index])}


def weigh_negatives(examples: Sequence[Mapping[str, Any]], cfg: StepsConfig, wanted: float) -> Weighted:
    """Solutions with a wrong step and those without, so that the former are this share of all weight.

    Args:
      examples: rows of layout `steps`.
      cfg: what their labels mean.
      wanted: the share, above 0 and below 1.

    Raises:
      ValueError: if all solutions that weigh anything hold a wrong step, or none does.
    """

    def told(row: Mapping[str, Any]) -> tuple[bool, float]:
        targets = step_targets(row[cfg.column], cfg)
        return any(t is not None and t <= cfg.wrong for t in targets), row.get("weight", 1.0)

    found = [told(examples[i]) for i in range(len(examples))]
    bad = np.array([is_bad for is_bad, _ in found], bool)
    own = np.array([weight for _, weight in found], np.float64)  # shares are of weight
    share = float(own[bad].sum() / own.sum()) if own.any() else 0.0
    if not (own[bad].any() and own[~bad].any()):
        raise ValueError(f"train: {share:.0%} of the solutions hold a wrong step; expected some of both to weigh.")
    log.info(
        "%.1f %% of %d solutions hold a wrong step; they now weigh %.1f %%", 100 * bad.mean(), len(bad), 100 * wanted
    )
    return Weighted(examples, np.where(bad, wanted / share, (1 - wanted) / (1 - share)))


# ----------------------------------------------------------------------------------------------------------- private
def _worth(label: Label, cfg: StepsConfig) -> Label:
    """A label on the scale from 0 to 1."""
    if label is None:
        return None
    if cfg.scale == "signs" and label in (-1, 0, 1):
        neutral = {"good": 1.0, "bad": 0.0, "mask": None}[cfg.neutral]
        return neutral if label == 0 else float(label > 0)
    if cfg.scale == "shares" and 0 <= label <= 1:
        return float(label)
    other = {"shares": "0 to 1", "signs": "-1, 0 or 1"}[cfg.scale]
    better = "signs" if label == -1 else "shares" if 0 < label < 1 else None
    hint = f' Set scale="{better}".' if better else " Correct it."
    raise ValueError(f"step_targets: found label {label}; expected {other}, as scale={cfg.scale!r} has it.{hint}")
