"""One master at many widths: what each is worth, what it weighs, and how fast it decodes.

Quality is the likelihood of the targets of rows and, where rows have answers, greedy accuracy. Bytes are those of the
arrays on the device. Speed is measured in turns: every model writes the same number of tokens, one after the other, as
often as asked, so that a machine that gets slower does so for all of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from ..jaxlib_ext.qmm import QuantisedMatrix
from ..models.decoder import Model
from ..models.tokenizer import Tokenizer
from .engine import Engine
from .evaluate import Question, evaluate_answers, evaluate_lm
from .sampling import Sampling


class Quality(NamedTuple):
    """How good a model is."""

    nats: float  # a token
    perplexity: float
    accuracy: float | None  # of greedy answers; None where rows have none
    interval: tuple[float, float] | None  # 95 %


class Weight(NamedTuple):
    """Bytes on the device."""

    total: int  # of all parameters
    matrices: int  # of those that are quantised, their scales and gains included
    average_bits: float  # of a code; 0 where nothing is quantised


class Rows(NamedTuple):
    """What models are measured on."""

    tokens: Sequence[Any]  # ids of each row
    starts: Sequence[int]  # index of its first target
    questions: Sequence[Question]


def quality(model: Model, tokenizer: Tokenizer, rows: Rows, *, max_new_tokens: int = 64, batch: int = 32) -> Quality:
    """Likelihood of the rows, and greedy answers to the questions if there are any."""
    window = max(2, min(1024, max(map(len, rows.tokens))))
    report = evaluate_lm(model, rows.tokens, window=window, batch=batch, loss_from=list(rows.starts))
    if not rows.questions:
        return Quality(report.mean, report.perplexity, None, None)
    with Engine(model, tokenizer, max_seqs=batch) as engine:
        answers = evaluate_answers(engine, rows.questions, Sampling(temperature=0.0, max_tokens=max_new_tokens))
    return Quality(report.mean, report.perplexity, answers.accuracy, answers.interval)


def weigh(model: Model) -> Weight:
    """What a model takes."""
    is_matrix = lambda leaf: isinstance(leaf, QuantisedMatrix)
    leaves = jax.tree.leaves(model.params, is_leaf=is_matrix)
    matrices = [leaf for leaf in leaves if is_matrix(leaf)]
    codes = sum(int(np.prod(m.shape)) for m in matrices)
    bits = sum(int(np.prod(m.shape)) * m.bits for m in matrices)
    packed = sum(m.nbytes for m in matrices)
    plain = sum(leaf.nbytes for leaf in leaves if not is_matrix(leaf))
    return Weight(packed + plain, packed, bits / codes if codes else 0.0)


def decode_speed(
    models: Mapping[str, Model],
    *,
    batch: int = 1,
    prompt: int = 8,
    tokens: int = 64,
    repeats: int = 5,
    progress: bool = False,
) -> dict[str, list[float]]:
    """Tokens a second of each model, one number a turn; the first turn, which compiles, is not counted."""
    sampling = Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    prompts = [[1 + i] * prompt for i in range(batch)]
    engines = {name: Engine(model, max_seqs=batch, max_len=prompt + tokens) for name, model in models.items()}
    found: dict[str, list[float]] = {name: [] for name in models}
    with tqdm(total=(repeats + 1) * len(engines), desc="speed", disable=None if progress else True) as bar:
        for turn in range(repeats + 1):
            for name, engine in engines.items():
                before = engine.stats()
                engine.generate(prompts, sampling)
                spent = engine.stats()["decode_seconds"] - before["decode_seconds"]
                if turn:
                    found[name].append(batch * (tokens - 1) / spent)  # the first token is the prefill's
                bar.update()
    for engine in engines.values():
        engine.close()
    return found


def plot_widths(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Nats a token by average width: single widths on one line, plans on another, models of their own as marks.

    Args:
      path: PNG file.
      rows: of `jaxaroo eval bits`: `kind` ("width", "plan", "single" or "plain"), `average_bits`, `nats`.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    styles = {"width": ("o-", "one master, one width"), "plan": ("s--", "one master, a width a layer")}
    styles |= {"single": ("x", "trained at one width alone")}
    for kind, (style, label) in styles.items():
        if points := sorted((r["average_bits"], r["nats"]) for r in rows if r["kind"] == kind):
            axes.plot(*zip(*points, strict=True), style, label=label)
    for row in rows:
        if row["kind"] == "plain":
            axes.axhline(row["nats"], color="grey", linewidth=1, label="float")
    axes.set_xlabel("bits a weight, on average")
    axes.set_ylabel("nats a token")
    axes.set_yscale("log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
