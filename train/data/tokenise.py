"""Examples -> token ids, and which of them are learned: the tokenisation contract of every layout.

The prompt is rendered with its generation prompt, then prompt and completion together; the first must be a prefix of
the second, token by token, so that training sees the very ids that generation will. Where a tokenizer merges across
the border they are not: then the completion is tokenised alone and appended, and the example is counted as a
`mismatch`. A completion ends with an end token. No token is put in front twice.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from ...models.tokenizer import Tokenizer

Truncation = Literal["keep_start", "keep_end"]
Text = str | Sequence[Mapping[str, Any]]


class Encoded(NamedTuple):
    """One sequence; `scored` marks the tokens of completions, which the model is to predict, or those with a label."""

    ids: np.ndarray  # int32 [T]
    scored: np.ndarray  # bool [T]
    mismatch: bool = False  # a prompt was no prefix of prompt + completion
    labels: np.ndarray | None = None  # float32 [T]: what a token is worth, from 0, bad, to 1, good; 0 where not scored
    more: Mapping[str, np.ndarray] | None = None  # float32 [T] each: further numbers of every token
    pieces: np.ndarray | None = None  # int [T]: which part of its completion a token is, if none may be cut away
    weight: float | None = None  # of its loss, if not that of the row


def encode_pair(tokenizer: Tokenizer, prompt: Text, completion: Text) -> Encoded:
    """A prompt and its completion, both text or both lists of messages.

    Raises:
      ValueError: if one is text and the other messages, or the tokenizer names no end token.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        before, both = tokenizer.encode(prompt), tokenizer.encode(prompt + completion)
        return _join(tokenizer, before, both, lambda: tokenizer.encode(completion, bos=False))
    if isinstance(prompt, str) or isinstance(completion, str):
        kinds = " and ".join("text" if isinstance(x, str) else "messages" for x in (prompt, completion))
        raise ValueError(f"encode_pair: prompt and completion are {kinds}; expected both of one kind.")
    before, both = tokenizer.encode_chat(prompt), tokenizer.encode_chat([*prompt, *completion], **_CLOSED)
    return _join(tokenizer, before, both, lambda: _contents(tokenizer, completion))


def encode_messages(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> Encoded:
    """A conversation of which every turn of the assistant is scored.

    Templates that write earlier turns differently once later ones follow (some drop their reasoning) have no common
    prefix; then the last turn alone is scored, as generation would see it.

    Raises:
      ValueError: if no message is the assistant's.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        roles = [message["role"] for message in messages]
        raise ValueError(f"encode_messages: found roles {roles}; expected at least one `assistant` to learn from.")
    messages = messages[: turns[-1] + 1]  # what follows the last answer teaches nothing
    if turns[0] == 0:
        turns = turns[1:]  # an opening line of the assistant has no prompt
    if not turns:
        raise ValueError("encode_messages: the only `assistant` message comes first; expected a prompt before it.")
    ids = tokenizer.encode_chat(messages, **_CLOSED)
    scored = np.zeros(len(ids), bool)
    for i in turns:
        before = tokenizer.encode_chat(messages[:i])
        after = tokenizer.encode_chat(messages[: i + 1], **_CLOSED)
        if after[: len(before)] != before or ids[: len(after)] != after:
            return encode_pair(tokenizer, messages[: turns[-1]], messages[turns[-1] :])
        scored[len(before) : len(after)] = True
    if ids[-1] not in tokenizer.eos_ids and not _ends_turn(tokenizer, ids):
        ids, scored = [*ids, _end(tokenizer)], np.append(scored, True)
    return Encoded(np.asarray(ids, np.int32), scored)


def encode_sft(tokenizer: Tokenizer, example: Mapping[str, Any]) -> Encoded:
    """An example of layout `sft`."""
    if "messages" in example:
        return encode_messages(tokenizer, example["messages"])
    return encode_pair(tokenizer, example["prompt"], example["completion"])


def encode_labelled(tokenizer: Tokenizer, example: Mapping[str, Any]) -> Encoded:
    """An example of layout `unpaired`: every token of the completion, its end included, has the row's label."""
    encoded = encode_pair(tokenizer, example["prompt"], example["completion"])
    return encoded._replace(labels=encoded.scored * np.float32(example["label"]))


def encode_pairs(tokenizer: Tokenizer, example: Mapping[str, Any]) -> tuple[Encoded, Encoded]:
    """An example of layout `pairs`: the prompt with the chosen completion, and with the rejected one."""
    chosen, rejected = (encode_pair(tokenizer, example["prompt"], example[side]) for side in ("chosen", "rejected"))
    return chosen, rejected


def truncate(encoded: Encoded, max_length: int, how: Truncation = "keep_start") -> Encoded:
    """At most `max_length` tokens, from the start or from the end.

    The first token that is left is never scored, as nothing stands before it. What then has no scored token is of no
    use; callers drop and count it. So it is with a completion in pieces that loses all of one.
    """
    ids, scored, mismatch, labels, more, pieces, weight = encoded
    if len(ids) > max_length:
        part = slice(max_length) if how == "keep_start" else slice(-max_length, None)
        ids, scored = ids[part], scored[part]
        labels = None if labels is None else labels[part]
        more = None if more is None else {name: numbers[part] for name, numbers in more.items()}
        pieces = None if pieces is None else pieces[part]
    if len(scored) and scored[0]:
        scored = scored & (np.arange(len(scored)) > 0)
    if pieces is not None and encoded.pieces is not None:
        lost = {*encoded.pieces[encoded.scored].tolist()} - {*pieces[scored].tolist()}
        scored = scored & (not lost)
    labels = None if labels is None else np.where(scored, labels, np.float32(0))
    return Encoded(ids, scored, mismatch, labels, more, pieces, weight)


# ----------------------------------------------------------------------------------------------------------- private
_CLOSED = {"add_generation_prompt": False}


def _join(tokenizer: Tokenizer, before: list[int], both: list[int], alone: Any) -> Encoded:
    mismatch = both[: len(before)] != before
    ids = [*before, *alone()] if mismatch else both
    if not _ends_turn(tokenizer, ids[len(before) :]):
        ids = [*ids, _end(tokenizer)]
    scored = np.arange(len(ids)) >= len(before)
    return Encoded(np.asarray(ids, np.int32), scored, mismatch)


def _ends_turn(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether an end token closes these, with at most white space behind it (templates put a newline there)."""
    last = max((i for i, token in enumerate(ids) if token in tokenizer.eos_ids), default=None)
    return last is not None and not tokenizer.decode(ids[last + 1 :]).strip()


def _end(tokenizer: Tokenizer) -> int:
    if not tokenizer.eos_ids:
        raise ValueError("encode: this tokenizer names no end token; expected `eos_token` in tokenizer_config.json.")
    return tokenizer.eos_ids[0]


def _contents(tokenizer: Tokenizer, completion: Sequence[Mapping[str, Any]]) -> list[int]:
    """What the messages say, without the template's dress."""
    texts = []
    for message in completion:
        content = message.get("content") or ""
        texts.append(content if isinstance(content, str) else "".join(part["text"] for part in content))
    return tokenizer.encode("\n".join(texts), bos=False)
