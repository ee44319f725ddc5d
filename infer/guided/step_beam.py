"""Search over partial answers: grow every one a few ways, score what came of it, keep the best, and again.

`search` is the loop, whatever a piece is and whoever scores it. `step_beam` grows by steps and keeps those whose last
step a reward model scores best; `deal.py` grows by tokens and asks a function of the user's.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ...models.reward import RewardModel
from ...models.tokenizer import Tokenizer
from ..engine import Engine
from ..requests import Answer, prompt_ids
from ..sampling import Sampling
from ..step_scores import Solution, score_solutions


class Partial(NamedTuple):
    """An answer as far as it is written."""

    pieces: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0  # natural, of its tokens under the policy
    score: float = 0.0
    ended: bool = False  # nothing more is to be written

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)


# (what stands for which question: its index and the partial answer) -> a score for each, higher is better
Judge = Callable[[Sequence[tuple[int, Partial]]], Sequence[float]]


def search(
    engine: Engine,
    prompts: Sequence[Any],
    sampling: Sampling,
    judge: Judge,
    *,
    beams: int = 4,
    expand: int = 4,
    rounds: int = 16,
    progress: bool = False,
) -> list[list[Partial]]:
    """Grow, score, keep; all questions at once.

    Args:
      engine: the policy's, with its tokenizer.
      prompts: texts, messages or token ids.
      sampling: of one piece: its tokens at most, and what it ends with; a seed makes it repeatable (None counts as 0).
        A piece that ends otherwise than at a stop string, or at its limit, ends the answer.
      judge: scores partial answers that have grown; those that ended keep the score they had then.
      beams: partial answers kept for a question.
      expand: ways that each is grown.
      rounds: pieces of an answer at most.
      progress: show a bar.

    Returns:
      For each prompt its best answers, the best first; those that had not ended after all rounds are not `ended`.

    Raises:
      ValueError: for sizes below 1, or greedy sampling, of which all ways would be one.
      RequestError: for a prompt that cannot be run.
    """
    if min(beams, expand, rounds) < 1 or (expand > 1 and not sampling.temperature) or sampling.n != 1:
        raise ValueError(
            f"search: beams={beams}, expand={expand}, rounds={rounds}, temperature={sampling.temperature}, "
            f"n={sampling.n}; expected 1 or more of each, a temperature above 0 if expand is above 1, and n of 1."
        )
    if engine.tokenizer is None:
        raise ValueError("search: found an engine without a tokenizer; expected one, for pieces are judged as text.")
    ids = [prompt_ids(prompt, engine.tokenizer) for prompt in prompts]
    kept: list[list[Partial]] = [[Partial()] for _ in prompts]
    sampling = dataclasses.replace(sampling, include_stop=True)
    for round_ in tqdm(range(rounds), desc="search", unit="round", disable=None if progress else True):
        growing = [(q, i, p) for q, beam in enumerate(kept) for i, p in enumerate(beam) if not p.ended]
        if not growing:
            break
        seeds = [np.random.default_rng([sampling.seed or 0, round_, q, i]).integers(2**32) for q, i, _ in growing]
        settings = [dataclasses.replace(sampling, n=expand, seed=int(seed)) for seed in seeds]
        results = engine.generate([[*ids[q], *p.token_ids] for q, _, p in growing], settings)
        grown: list[tuple[int, Partial]] = []
        for (q, _, p), result in zip(growing, results, strict=True):
            if result.error is not None and not round_:
                raise result.error
            if result.error is not None:  # no room to grow: it ends as it is
                grown.append((q, p._replace(ended=True)))
            grown += [(q, _grow(engine.tokenizer, p, a)) for a in result.outputs if result.error is None]
        grown = list({(q, p.token_ids): (q, p) for q, p in grown}.values())  # the same text twice is one
        scores = judge(grown)
        if len(scores) != len(grown) or not all(np.isfinite(scores)):
            raise ValueError(f"search: scores {list(scores)[:8]}; expected {len(grown)} finite numbers.")
        for q in {q for q, _, _ in growing}:
            fresh = [p._replace(score=float(s)) for (at, p), s in zip(grown, scores, strict=True) if at == q]
            pool = [p for p in kept[q] if p.ended] + fresh
            kept[q] = sorted(pool, key=lambda p: -p.score)[:beams]  # the first of equals, for sorting is stable
    return kept


def step_beam(
    engine: Engine,
    model: RewardModel,
    prompts: Sequence[Any],
    sampling: Sampling,
    *,
    beams: int = 4,
    expand: int = 4,
    rounds: int = 16,
    batch: int = 16,
    progress: bool = False,
) -> list[list[Partial]]:
    """Write answers step by step, keeping those whose last step a reward model scores best.

    Args:
      engine: the policy's.
      model: with the policy's tokenizer.
      prompts: texts or messages, for the reward model reads them too.
      sampling: of one step; `stop` is what steps end with, a newline for example.
      beams: as for `search`.
      expand: as for `search`.
      rounds: steps of an answer at most.
      batch: solutions scored at a time.
      progress: show a bar.
    """
    if not sampling.stop:
        raise ValueError("step_beam: found no stop string; expected what steps end with, such as a newline.")
    tokenizer: Any = engine.tokenizer

    text = model.config.text
    around = {text.between, tokenizer.decode([text.separator], skip_special=False)} - {""}

    def step(piece: str) -> str:
        """Without the end that is written around steps anyway: a model learned from steps that lack it."""
        return piece.removesuffix(next((end for end in sorted(around) if piece.endswith(end)), ""))

    def judge(grown: Sequence[tuple[int, Partial]]) -> list[float]:
        solutions = [Solution(prompts[q], [*map(step, p.pieces)]) for q, p in grown]
        scores = score_solutions(model, tokenizer, solutions, batch=batch)
        return [s[-1] if s else 0.0 for s in scores]

    return search(engine, prompts, sampling, judge, beams=beams, expand=expand, rounds=rounds, progress=progress)


# ----------------------------------------------------------------------------------------------------------- private
def _grow(tokenizer: Tokenizer, partial: Partial, answer: Answer) -> Partial:
    goes_on = answer.finish_reason == "length" or isinstance(answer.stop_reason, str)
    at_token = isinstance(answer.stop_reason, int)  # an end token is no text
    return Partial(
        (*partial.pieces, tokenizer.decode(answer.token_ids[:-1]) if at_token else answer.text or ""),
        (*partial.token_ids, *answer.token_ids),
        partial.logprob + answer.cumulative_logprob,
        ended=not goes_on or not answer.token_ids,
    )
