"""What goes into the engine and what comes out: prompts, checks, results, and the text of an answer as it grows.

Nothing here touches a device. A request that cannot run becomes a `RequestError` that names the parameter at fault;
the engine reports it in that request's result and runs the others.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from ..models.tokenizer import TextStream, Tokenizer
from .sampling import Sampling

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
FinishReason = Literal["stop", "length", "abort", "error"]
DEFAULT_MAX_TOKENS = 16


class RequestError(ValueError):
    """One request that cannot run, or that failed; its neighbours are unaffected."""

    def __init__(self, message: str, *, kind: str = "BadRequestError", param: str | None = None):
        super().__init__(message)
        self.message, self.kind, self.param = message, kind, param


class TokenLogprob(NamedTuple):
    """Natural-log probabilities at one position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token id, log-probability), likeliest first


@dataclasses.dataclass(frozen=True)
class Answer:
    """One sample. `token_ids` holds the stop token if one ended it; a stop string cuts both text and ids."""

    index: int
    text: str | None  # None without a tokenizer
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: int | str | None  # the stop token's id or the stop string
    logprobs: list[TokenLogprob] | None
    cumulative_logprob: float


class Timings(NamedTuple):
    """Seconds spent waiting, reading the prompt and writing the answer (of the slowest sample)."""

    queue: float
    prefill: float
    decode: float


@dataclasses.dataclass(frozen=True)
class Result:
    """One request's outcome; results come in the order of the prompts."""

    id: str
    prompt_token_ids: list[int]
    outputs: list[Answer]
    prompt_logprobs: list[TokenLogprob | None] | None  # the first token has none
    timings: Timings
    error: RequestError | None

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read and written."""
        wrote = sum(len(o.token_ids) for o in self.outputs)
        read = len(self.prompt_token_ids)
        return {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one sample gained since the last delta; the last one carries the finished result of the whole request."""

    id: str
    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    result: Result | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A checked request: token ids and a limit that fits."""

    id: str
    token_ids: list[int]
    sampling: Sampling
    seed: int
    max_tokens: int


def split_prompts(prompts: Any) -> list[Any]:
    """A single prompt becomes a list of one. A list of integers is one prompt, and so is a list of messages."""
    if isinstance(prompts, (str, Mapping, np.ndarray)):
        return [prompts]
    prompts = list(prompts)
    if prompts and all(_is_int(p) for p in prompts):
        return [prompts]
    if prompts and all(isinstance(p, Mapping) for p in prompts):
        return [prompts]
    return prompts


def prompt_ids(prompt: Any, tokenizer: Tokenizer | None) -> list[int]:
    """Tokens of a text, of messages up to where the answer begins, or as they are given.

    Raises:
      RequestError: for what is none of these.
    """
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if isinstance(prompt, (list, tuple)) and all(_is_int(p) for p in prompt):
        return [int(p) for p in prompt]
    if tokenizer is None:
        raise RequestError("prompt: found text; expected token ids, for this engine has no tokenizer.", param="prompt")
    if isinstance(prompt, str):
        return tokenizer.encode(prompt) if prompt else []
    if isinstance(prompt, (list, tuple)) and all(isinstance(p, Mapping) for p in prompt):
        try:
            return tokenizer.encode_chat(prompt)
        except (ValueError, TypeError) as e:
            raise RequestError(f"prompt: {e}", param="prompt") from e
    raise RequestError(
        f"prompt: found {type(prompt).__name__}; expected a string, token ids, or a list of chat messages.",
        param="prompt",
    )


def make_request(
    request_id: str,
    prompt: Any,
    sampling: Sampling,
    seed: int,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    max_len: int,
) -> Request:
    """Tokenise and check one prompt.

    Raises:
      RequestError: naming the parameter at fault, with the number found and the one allowed.
    """
    ids = prompt_ids(prompt, tokenizer)
    if not ids:
        raise RequestError("prompt: found nothing; expected at least one token.", param="prompt")
    if bad := [i for i in ids if not 0 <= i < vocab_size]:
        raise RequestError(f"prompt: found token id {bad[0]}; expected 0 to {vocab_size - 1}.", param="prompt")
    for name, tokens in (("stop_token_ids", sampling.stop_token_ids), ("logit_bias", sampling.logit_bias)):
        if bad := [i for i in tokens if not 0 <= i < vocab_size]:
            raise RequestError(f"{name}: found token id {bad[0]}; expected 0 to {vocab_size - 1}.", param=name)
    if sampling.stop and tokenizer is None:
        raise RequestError("stop: strings need a tokenizer; pass one, or use stop_token_ids.", param="stop")
    room = max_len - len(ids)
    if room < 1:
        raise RequestError(
            f"prompt: found {len(ids)} tokens; expected at most {max_len - 1}, so that one more fits in {max_len}.",
            param="prompt",
        )
    if sampling.max_tokens is not None and sampling.max_tokens > room:
        raise RequestError(
            f"max_tokens: found {sampling.max_tokens} on top of a prompt of {len(ids)}; "
            f"expected at most {room}, to stay within {max_len}.",
            param="max_tokens",
        )
    limit = sampling.max_tokens or min(DEFAULT_MAX_TOKENS, room)
    return Request(id=request_id, token_ids=ids, sampling=sampling, seed=seed, max_tokens=limit)


class AnswerStream:
    """Turns the tokens of one sample into text, finds stop strings, and remembers what was already handed out."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer | None, stop_ids: frozenset[int]):
        self.request, self.index = request, index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._stop_ids = stop_ids
        s = request.sampling
        self._text = None if tokenizer is None else TextStream(tokenizer, s.stop, s.include_stop)
        self._given = 0

    def push(self, tokens: Sequence[int], ended: FinishReason | None) -> Delta:
        """Take new tokens and how the row stands; return what may be shown. `finish_reason` tells if this was all."""
        released = ""
        for token in tokens:
            self.token_ids.append(token)
            at_stop = token in self._stop_ids
            hidden = at_stop and not self.request.sampling.include_stop
            if self._text is not None and not hidden:
                released += self._text.push([token])
                if self._text.stopped is not None:
                    break
            if at_stop:
                self.finish_reason, self.stop_reason = "stop", token
                break
        if self.finish_reason is None:
            self.finish_reason = ended
        if self._text is not None:
            if self.finish_reason is not None:
                released += self._text.finish()
            if self._text.stopped is not None:  # by a push, or by what finish gave free
                self.finish_reason, self.stop_reason = "stop", self._text.stopped
                del self.token_ids[self._text.token_count :]
        # ids are handed out only once their text cannot be cut any more
        safe = len(self.token_ids) if self._text is None or self.finish_reason else self._text.token_count
        new, self._given = self.token_ids[self._given : safe], max(self._given, safe)
        return Delta(self.request.id, self.index, released, new, self.finish_reason)

    def answer(self, logprobs: list[TokenLogprob], cumulative: float) -> Answer:
        """The finished sample."""
        text = None if self._text is None else self._text.text
        assert self.finish_reason is not None
        wanted = logprobs if self.request.sampling.logprobs is not None else None
        return Answer(self.index, text, self.token_ids, self.finish_reason, self.stop_reason, wanted, cumulative)


def _is_int(x: Any) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)
