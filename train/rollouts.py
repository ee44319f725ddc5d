"""From sampled answers to what an update sees: rows of tokens, with numbers at the targets that were sampled.

An answer and its prompt are a sequence like any other (`data/pipeline.py`): what stands at a token's position predicts
its target, so the first token of an answer is the target of the prompt's last one. The mask covers the answer's tokens,
the one that ended it included, and nothing else. A row holds one answer, or with packing several, each of which sees
itself alone. Rows come in few sizes, so few programs are compiled; rows that fill up hold padding, and count nothing.

All of this is NumPy. G is the number of problems of a step, K that of answers to each, n = G K; the answers to one
problem are neighbours. R is the number of rows, M that of micro-batches.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from .data.pipeline import BUCKETS, Batch


class Sampled(NamedTuple):
    """One answer, as the policy gave it."""

    prompt: Sequence[int]  # token ids
    answer: Sequence[int]  # likewise; the token that ended it is the last one
    ended: bool  # by itself; otherwise it was cut
    text: str = ""  # of the answer, for those who reward it
    logprobs: Sequence[float] | None = None  # what the sampler says of its tokens


class Placed(NamedTuple):
    """Answers in rows, and where each stands."""

    batch: Batch  # leaves [R, T]
    row: Int[np.ndarray, " n"]  # -1 for an answer that was left out
    first: Int[np.ndarray, " n"]  # index of its first target


def problem_indices(seed: int, step: int, groups: int, size: int | None) -> list[int]:
    """Which problems a step asks: a function of its arguments alone.

    Args:
      seed: of the order.
      step: from 0.
      groups: problems of a step.
      size: how many there are, in an order that is drawn anew for every pass through them; None for no end, in their
        own order.
    """
    places = range(step * groups, (step + 1) * groups)
    if size is None:
        return list(places)
    passes = {p // size for p in places}
    order = {i: np.random.default_rng([seed, i]).permutation(size) for i in passes}
    return [int(order[p // size][p % size]) for p in places]


def lay_out(
    answers: Sequence[Sampled],
    kept: Sequence[bool] | Bool[np.ndarray, " n"],
    *,
    max_length: int,
    multiple: int = 1,
    packing: bool = False,
) -> Placed:
    """Put answers into rows.

    Args:
      answers: of a step.
      kept: which of them; the others, and those without tokens, are in no row.
      max_length: tokens of a row at most. Packed rows are that long; others as long as the longest answer needs, up to
        the next of `pipeline.BUCKETS`.
      multiple: of which the number of rows is one. It is the same for every step without packing; with packing it is
        `multiple` times a power of two.
      packing: several answers a row, each in the first row that has room, the longest first.

    Raises:
      ValueError: for an answer that does not fit in a row, or a prompt without tokens.
    """
    sizes = [len(a.prompt) + len(a.answer) - 1 for a in answers]
    for i, a in enumerate(answers):
        if not len(a.prompt) or sizes[i] > max_length:
            raise ValueError(
                f"lay_out: answer {i} has {len(a.prompt)} prompt tokens and {len(a.answer)} of its own; expected a "
                f"prompt, and at most {max_length + 1} together. Raise max_length, or sample shorter answers."
            )
    chosen = [i for i in range(len(answers)) if kept[i] and len(answers[i].answer)]
    if packing:
        rows, T = _first_fit(chosen, sizes, max_length), max_length
        R = multiple
        while len(rows) > R:
            R *= 2
    else:
        there = {*chosen}
        rows = [[i] if i in there else [] for i in range(len(answers))]
        longest = max(sizes, default=1)
        T = min(max_length, next((b for b in BUCKETS if b >= longest), max_length))
        R = -(-len(answers) // multiple) * multiple
    whole = {name: np.zeros((R, T), np.int32) for name in ("tokens", "targets", "positions", "segments")}
    mask, row_of, first_of = np.zeros((R, T), bool), np.full(len(answers), -1), np.zeros(len(answers), int)
    for row, members in enumerate(rows):
        at = 0
        for number, i in enumerate(members, 1):
            a, size = answers[i], sizes[i]
            ids, place = np.asarray([*a.prompt, *a.answer], np.int32), slice(at, at + size)
            whole["tokens"][row, place], whole["targets"][row, place] = ids[:-1], ids[1:]
            whole["positions"][row, place], whole["segments"][row, place] = np.arange(size), number
            row_of[i], first_of[i] = row, at + len(a.prompt) - 1
            mask[row, first_of[i] : at + size] = True
            at += size
    return Placed(Batch(**whole, mask=mask, weights=mask.astype(np.float32)), row_of, first_of)  # type: ignore[arg-type]


def spread(values: Sequence[Any] | np.ndarray, answers: Sequence[Sampled], placed: Placed) -> Float[np.ndarray, "R T"]:
    """Numbers of answers at their targets, 0 elsewhere.

    Args:
      values: of each answer one number, or one for each of its tokens; what is behind its last token is not read.
      answers: those that were laid out.
      placed: where.
    """
    out = np.zeros(placed.batch.mask.shape, np.float32)
    for i, answer in enumerate(answers):
        if placed.row[i] >= 0:
            n, value = len(answer.answer), np.asarray(values[i], np.float32)
            out[placed.row[i], placed.first[i] : placed.first[i] + n] = value if value.ndim == 0 else value[:n]
    return out


def token_grid(
    answers: Sequence[Sampled], samples: int, width: int
) -> tuple[Int[np.ndarray, "G K W"], Bool[np.ndarray, "G K W"]]:
    """Tokens of answers, each from index 0 on, and which are there: what `advantages.tempo` compares.

    Args:
      answers: of a step.
      samples: K.
      width: W, the longest that an answer may be.
    """
    tokens, mask = np.zeros((len(answers), width), np.int32), np.zeros((len(answers), width), bool)
    for i, a in enumerate(answers):
        tokens[i, : len(a.answer)], mask[i, : len(a.answer)] = a.answer, True
    return tokens.reshape(-1, samples, width), mask.reshape(-1, samples, width)


def split_rows(tree: Any, order: Int[np.ndarray, " R"], parts: int, micro_batches: int) -> list[Any]:
    """Windows of one update each: leaves [R, ...] in this order, cut into so many parts of [M, R / (parts M), ...]."""
    size = len(order) // parts
    if size * parts != len(order) or size % micro_batches:
        raise ValueError(
            f"split_rows: {len(order)} rows in {parts} parts of {micro_batches} micro-batches; expected a multiple."
        )
    cut = lambda x, rows: np.asarray(x)[rows].reshape(micro_batches, size // micro_batches, *np.shape(x)[1:])
    return [jax.tree.map(lambda x, i=i: cut(x, order[i * size : (i + 1) * size]), tree) for i in range(parts)]


# ----------------------------------------------------------------------------------------------------------- private
def _first_fit(chosen: Sequence[int], sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which answers share a row."""
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(chosen, key=lambda i: -sizes[i]):  # stable: equal lengths keep their order
        row = next((r for r, room in enumerate(free) if room >= sizes[i]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(length)
        rows[row].append(i)
        free[row] -= sizes[i]
    return rows
