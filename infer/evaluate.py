"""How good a model is: right answers to questions, and the likelihood of text.

    accuracy  right / (questions * samples)                pass@k  1 - C(n - c, k) / C(n, k), the mean over questions
    majority  the vote of a question's final answers       nll     -sum log p(token | those before it), in nats

Samples of one question are not independent. The standard error is that of the mean of the questions' shares of right
samples; the interval is Wilson's, for as many independent samples as would have this standard error.
"""

import dataclasses
import functools
import math
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from ..jaxlib_ext.logit_tiles import layout_of
from ..jaxlib_ext.token_stats import token_stats
from ..models.decoder import DecoderConfig, Model, Params, forward
from ..sharding.rules import SERVING
from .devices import mesh_of, on_mesh
from .engine import Engine
from .requests import Prompt, Result
from .sampling import Sampling

LONGEST_NUMBER = 100  # characters; what is longer is compared as text
WAVES = 16  # samples per slot in one call of the engine: how often the bar moves, and how much is in flight
SHORTEST = 16  # least padded length of a row of tokens, doubled up to the window

_MARKERS = (  # in order of trust; of one kind the last counts
    re.compile(r"####"),
    re.compile(r"^[ \t]*ans\b", re.ASCII | re.MULTILINE),
    re.compile(r"\b(?i:the (?:final )?answer is)\b|^[ \t]*A:", re.ASCII | re.MULTILINE),
)
_NUMBER = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(?:/(\d+(?:\.\d*)?|\.\d+))?", re.ASCII)
_MIXED = re.compile(r"(\d+)\s+(\d+/\d+)", re.ASCII)  # 1 1/2
_IN_TEXT = re.compile(r"(?:(?<![\w)])[+-])?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?", re.ASCII)


def final_answer(text: str) -> Fraction | str | None:
    """The number, or else the words, that a solution ends with; None if there is neither.

    It stands behind the last `####`, up to the end of the line; else behind the last `ans` that opens a line; else the
    last "the answer is", or `A:` that opens a line; else it is the last number anywhere. 0.5, 1/2, 1,234 and 1 1/2 are
    exact; `$`, `%`, commas, spaces and a last full stop do not count. All else, like "18 dollars", is lower-case words.
    """
    text = text.replace("\N{MINUS SIGN}", "-")
    for marker in _MARKERS:
        if found := deque(marker.finditer(text), maxlen=1):
            return _value(text[found[0].end() :].lstrip(" \t\r\n:=").partition("\n")[0])
    found = deque(_IN_TEXT.finditer(text), maxlen=1)
    return _value(found[0][0]) if found else None


def known_answer(text: str) -> Fraction | str | None:
    """What a text that is known to be right says: its final answer, or all of it where it marks none, like `yes`."""
    return _value(text) if (found := final_answer(text)) is None else found


def same_answer(a: Fraction | str | None, b: Fraction | str | None) -> bool:
    """Whether two final answers agree; nothing agrees with nothing."""
    return a is not None and a == b


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, drawn without putting back, hold one of the c right ones."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k: n={n}, c={c}, k={k}; expected 0 <= c <= n and 1 <= k <= n.")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def wilson_interval(share: float, n: int | float, z: float = 1.959963984540054) -> tuple[float, float]:
    """Between which shares the truth lies when `share` of n was seen (Wilson, 1927); z = 1.96 is 95 %."""
    centre, scale = share + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


class Question(NamedTuple):
    """What is asked, and a text whose final answer is right; words without a marker or number are the answer itself."""

    prompt: Prompt
    answer: str
    meta: Mapping[str, Any] | None = None  # whatever the caller's check wants to know


class AnswersReport(NamedTuple):
    """Shares from 0 to 1. `_asdict` is JSON if the prompts are, and so is each of `rows`, a question: index, prompt and
    answer; of each sample texts, extracted ("17", "1/2"), correct, tokens and finish_reasons; error, if it was refused.
    """

    n: int  # questions
    samples: int  # of each
    correct: int  # samples, of n * samples
    accuracy: float
    standard_error: float
    interval: tuple[float, float]  # 95 %
    majority: float | None  # accuracy of the votes; None with one sample
    pass_at: dict[int, float]  # pass@k by k = 1, 2, 4, ... up to `samples`
    mean_output_tokens: float
    cut: int  # samples that ended at max_tokens
    failed: int  # questions with an error
    rows: list[dict[str, Any]]


def evaluate_answers(
    engine: Engine,
    questions: Sequence[Question],
    sampling: Sampling,
    *,
    samples: int = 1,
    progress: bool = False,
    check: Callable[[Question, str], bool] | None = None,
) -> AnswersReport:
    """Let an engine, one with a tokenizer, answer questions; count what is right. `progress` shows a bar on a terminal.

    Each question gets a seed of its own, made of its index and that of `sampling` (None counts as 0): the same call
    gives the same report, whatever was generated before. `check` tells whether a text is right; None compares final
    answers. Votes are over final answers in any case: a text without one does not vote, the first seen wins a tie, and
    the vote is as right as the first text that gave it.
    """
    if not questions or samples < 1 or sampling.n not in (1, samples) or (samples > 1 and not sampling.temperature):
        found = f"{len(questions)} questions, samples={samples}, n={sampling.n}, temperature={sampling.temperature}"
        raise ValueError(f"evaluate_answers: {found}; expected at least one, n of 1, and 1 sample at temperature 0.")
    judged, step = [], max(1, WAVES * engine.max_seqs // samples)
    with tqdm(total=len(questions), desc="answers", unit="question", disable=None if progress else True) as bar:
        for start in range(0, len(questions), step):
            part = questions[start : start + step]
            draws = [np.random.default_rng([sampling.seed or 0, start + i]) for i in range(len(part))]
            settings = [dataclasses.replace(sampling, n=samples, seed=int(d.integers(2**32))) for d in draws]
            results = engine.generate([q.prompt for q in part], settings)
            judged += [_judge(start + i, part[i], result, samples, check) for i, result in enumerate(results)]
            bar.update(len(part))
    rows, votes = (list(column) for column in zip(*judged, strict=True))
    n, right = len(rows), [sum(r["correct"]) for r in rows]
    accuracy = sum(right) / (n * samples)
    error = math.sqrt(math.fsum((c / samples - accuracy) ** 2 for c in right)) / n
    independent = min(accuracy * (1 - accuracy) / error**2, n * samples) if error else n * samples
    interval = wilson_interval(accuracy, n if accuracy in (0, 1) else independent)
    majority = sum(votes) / n if samples > 1 else None
    passed = {2**i: math.fsum(pass_at_k(samples, c, 2**i) for c in right) / n for i in range(samples.bit_length())}
    mean = sum(sum(r["tokens"]) for r in rows) / (n * samples)
    cut, failed = sum(r["finish_reasons"].count("length") for r in rows), sum(r["error"] is not None for r in rows)
    return AnswersReport(n, samples, sum(right), accuracy, error, interval, majority, passed, mean, cut, failed, rows)


class LmReport(NamedTuple):
    """Of all rows together. `_asdict` is JSON."""

    tokens: int  # that were scored
    nll: float  # their sum, nats
    mean: float  # nats per token
    perplexity: float  # e to the mean
    bits_per_byte: float | None


def evaluate_lm(
    model: Model,
    token_rows: Sequence[Sequence[int] | np.ndarray],
    *,
    window: int,
    stride: int | None = None,
    batch: int,
    progress: bool = False,
    loss_from: int | Sequence[int] | None = None,
    num_bytes: int | None = None,
) -> LmReport:
    """Score every token of every row once, given those before it. `progress` shows a bar on a terminal.

    A row of more than `window` tokens is read in windows of that many, `batch` of them at a time: the first at the
    row's start, each further one `stride` tokens on (None is half a window), the last at its end. A window, which has
    positions from 0, scores what no earlier one scored: tokens with at least `window - stride` before them. A row's
    first token is never scored, for nothing is before it; put BOS there. `loss_from` is the index from which tokens
    are scored (where an answer begins), for all rows or for each. `num_bytes` of scored text give bits per byte.
    """
    stride = max(1, window // 2) if stride is None else stride
    starts = [loss_from or 0] * len(token_rows) if isinstance(loss_from, int | None) else loss_from
    if not 1 <= stride < window or min(batch, num_bytes or 1) < 1 or len(starts) != len(token_rows):
        found = f"window={window}, stride={stride}, batch={batch}, num_bytes={num_bytes}, {len(starts)} in loss_from"
        raise ValueError(f"evaluate_lm: {found}; expected 1 <= stride < window, 1 or more, and {len(token_rows)}.")
    windows, V = [], model.config.vocab_size
    for i, (row, start) in enumerate(zip(token_rows, starts, strict=True)):
        ids = np.asarray(row, None if len(row) else np.int32)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or np.any((ids < 0) | (ids >= V)):
            raise ValueError(f"evaluate_lm: row {i}; expected a list of token ids, 0 to {V - 1}.")
        windows += _cut(ids, start, window, stride)
    if not windows:
        raise ValueError("evaluate_lm: found no token to score; expected rows of two or more, longer than loss_from.")
    windows.sort(key=lambda w: -len(w[0]))  # the longest first: what cannot fit fails at once
    sums = []
    bar = tqdm(total=len(windows), desc="perplexity", unit="window", disable=None if progress else True)
    with bar, on_mesh(mesh_of(model.params)):
        for part in (windows[i : i + batch] for i in range(0, len(windows), batch)):
            sums.append(_window_nll(model.config, model.params, *_pad(part, batch, window)))
            jax.block_until_ready(sums[-2:-1])  # the device always has one more to do
            bar.update(len(part))
    nll = math.fsum(np.concatenate(jax.device_get(sums)).tolist())
    tokens = sum(last - first for _, first, last in windows)
    perplexity = math.inf if nll / tokens > 709 else math.exp(nll / tokens)
    return LmReport(tokens, nll, nll / tokens, perplexity, nll / math.log(2) / num_bytes if num_bytes else None)


# ----------------------------------------------------------------------------------------------------------- private
def _cut(ids: np.ndarray, start: int, window: int, stride: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """What the model sees at a time, and which of it counts: first .. last - 1."""
    done, end = 1, min(window, len(ids))  # the first token is nobody's successor
    while done < len(ids):
        begin = max(0, end - window)
        if end > start:
            yield ids[begin:end], max(done, start) - begin, end - begin
        done, end = end, min(end + stride, len(ids))


def _pad(part: list[tuple[np.ndarray, int, int]], batch: int, window: int) -> Any:
    """Tokens, first and last of a batch whose sides are of few sizes; rows that pad it score nothing."""
    length = min(max(SHORTEST, 1 << (len(part[0][0]) - 1).bit_length()), window)
    tokens, ends = np.zeros((batch, length), np.int32), np.zeros((2, batch), np.int32)
    for i, (ids, first, last) in enumerate(part):
        tokens[i, : len(ids)], ends[:, i] = ids, (first, last)
    return tokens, *ends


@functools.partial(jax.jit, static_argnames="cfg")
def _window_nll(
    cfg: DecoderConfig, params: Params, tokens: Int[Array, "B T"], first: Int[Array, " B"], last: Int[Array, " B"]
) -> Float[Array, " B"]:
    """Negative log-likelihood of tokens first .. last - 1 of each row, float32, without [B, T, V] logits."""
    at = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = jnp.broadcast_to(at, tokens.shape)
    hidden = forward(cfg, params, tokens, positions, rules=SERVING).hidden  # causal: padding is never seen
    head = params["embed"] if cfg.tie_embeddings else params["head"]
    layout = layout_of(SERVING, hidden, head)
    logp = token_stats(hidden, head.astype(hidden.dtype), jnp.roll(tokens, -1, axis=1), layout=layout).logp
    scored = (at + 1 >= first[:, None]) & (at + 1 < last[:, None])
    return -jnp.sum(jnp.where(scored, logp, 0.0), axis=1)


def _judge(index: int, question: Question, result: Result, samples: int, check) -> tuple[dict[str, Any], bool]:
    if any(o.text is None for o in result.outputs):
        raise ValueError("evaluate_answers: found an answer without text; expected an engine with a tokenizer.")
    gold = known_answer(question.answer)
    texts, finals = [o.text or "" for o in result.outputs], [final_answer(o.text or "") for o in result.outputs]
    right = [bool(check(question, t)) if check else same_answer(f, gold) for t, f in zip(texts, finals, strict=True)]
    right = [ok and o.finish_reason != "error" for ok, o in zip(right, result.outputs, strict=True)]
    right += [False] * (samples - len(right))
    votes = Counter(f for f in finals if f is not None)
    vote = bool(votes) and right[finals.index(max(votes, key=lambda f: votes[f]))]
    extracted, tokens = [f if f is None else str(f) for f in finals], [len(o.token_ids) for o in result.outputs]
    row = dict(index=index, prompt=question.prompt, answer=question.answer, texts=texts, extracted=extracted)
    row |= dict(correct=right, tokens=tokens, finish_reasons=[o.finish_reason for o in result.outputs])
    return row | {"error": result.error and result.error.message}, vote


def _value(text: str) -> Fraction | str | None:
    text = text.strip(" \t\r\n$%*`,").rstrip(" \t\r\n$%*`,.")
    bare = re.sub(r"[$%]|,(?=\d)", "", text)
    sign, bare = (-1, bare[1:].strip()) if bare[:1] == "-" else (1, bare.removeprefix("+"))
    mixed = _MIXED.fullmatch(bare)
    found = _NUMBER.fullmatch(mixed[2] if mixed else "".join(bare.split()))
    if found and len(bare) <= LONGEST_NUMBER and (below := Fraction(found[2] or 1)):
        return sign * (Fraction(found[1]) / below + (Fraction(mixed[1]) if mixed else 0))
    return " ".join(text.casefold().split()) or None
