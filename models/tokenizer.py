"""Text to token ids and back, chat templates, and text that arrives one token at a time.

The `tokenizers` library does the work on what Hugging Face writes; no file can name another file or any code.

What a user wrote never becomes a control token: `encode` reads "<|im_end|>" as ten characters unless told otherwise,
and `encode_chat` tells the tokens that the template writes from the same characters in a message. Added tokens that
are not special (`<think>`) are content; a template that builds a token out of parts of messages is beyond defence.
Chat templates are foreign code: they run in Jinja's immutable sandbox on copies made of JSON's types, with bounds on
length, loop passes, calls, ranges, products and output. Not bounded are what one filter or method does with one value,
and the memory of a string that a template keeps doubling.
"""

import datetime
import functools
import itertools
import json
import math
import os
import re
import secrets
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

Messages = Sequence[Mapping[str, Any]]
MAX_TOKENIZER, MAX_CONFIG = 256 * 2**20, 16 * 2**20  # bytes of a file
MAX_TEMPLATE, MAX_CHAT = 2**20, 16 * 2**20  # characters of a chat template, and of what it writes
MAX_STEPS = 10**6  # loop passes and calls in one rendering
_STEPS = " steps"  # where they are counted: a variable that no template can spell
_HELD, _CONTEXT = 64, 5  # tokens that a `TextStream` holds back at most, and decodes again
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_BYTE_SPECIALS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>", "sep_token": "<|sep|>"}
_BYTE_TEMPLATE = """{{ bos_token }}{% for message in messages %}{{ message.role + '\\n' + message.content -}}
{{ eos_token if message.role == 'assistant' else sep_token }}{% endfor -%}
{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"""


class ChatTemplateError(ValueError):
    """A chat template that is missing, broken or unsafe, or that refuses the messages."""


class Tokenizer:
    """A vocabulary and its rules; `load_tokenizer` and `byte_tokenizer` make them, and threads may share one.

    Attributes:
      vocab_size: one more than the largest id; there may be holes below.
      bos_id, pad_id: None where the tokenizer names no such token.
      eos_ids: what ends an answer, by the configurations of tokenizer, generation and model.
      special_ids: the control tokens.
      chat_template: Jinja source, or None.
    """

    def __init__(self, spec: bytes, config: dict[str, Any], template: str | None, eos_ids=(), where="tokenizer"):
        self._config, self.chat_template = config, template
        self._names = {name: text for name in _NAMED if (text := _content(config.get(name), where))}
        # Whether text may hold control tokens is state of the backend: two of them, so that no call has to change it.
        self._control, self._plain = (_backend(spec, config, where) for _ in range(2))
        self._plain.encode_special_tokens = True
        ids = [self._control.token_to_id(self._names[name]) if name in self._names else None for name in _NAMED]
        self.bos_id, eos_id, self.pad_id, unk_id = ids[:4]
        self.eos_ids = tuple(dict.fromkeys(i for i in (eos_id, *eos_ids) if i is not None))
        self.vocab_size = 1 + max(self._control.get_vocab().values(), default=-1)
        special = {i: token for i, token in self._control.get_added_tokens_decoder().items() if token.special}
        self.special_ids = frozenset(special)
        # A model with a control token among its pieces can find it in text, where its characters have to stand for it.
        unknown = {*self._plain.encode("\U0010fffd", add_special_tokens=False).ids, unk_id}
        control = self.special_ids - unknown
        self._instead: dict[Any, list[int]] = {i: self._spelt(special[i].content, control) for i in control}
        # In `_plain` each control token has a stand-in that nobody can guess. `encode_chat` puts it where the template
        # wrote the token; then one call encodes template and messages alike, every merge in its context.
        secret = secrets.token_hex(8)
        self._stand_in = {token.content: f"\ue000{secret}.{i}\ue001" for i, token in special.items()}
        self._special = re.compile("|".join(map(re.escape, sorted(self._stand_in, key=len)[::-1])) or "(?!)")
        like = [(self._stand_in[t.content], {flag: getattr(t, flag) for flag in _FLAGS}) for t in special.values()]
        self._plain.add_tokens([AddedToken(stand_in, **flags) for stand_in, flags in like])
        self._instead |= {self._plain.token_to_id(self._stand_in[t.content]): [i] for i, t in special.items()}

        probe = self._control.encode("a0 <\n")  # and what the post-processor puts around it
        inside = [i for i, sequence in enumerate(probe.sequence_ids) if sequence is not None] or [len(probe.ids)]
        self._prefix, suffix = probe.ids[: inside[0]], probe.ids[inside[-1] + 1 :]
        self._suffix = [i for i in suffix if i not in self.eos_ids]
        if isinstance(add_bos := config.get("add_bos_token"), bool) and self.bos_id is not None:
            self._prefix = [self.bos_id] * add_bos + [i for i in self._prefix if i != self.bos_id]

    def encode(self, text: str, *, bos: bool = True, allow_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
          text: any text.
          bos: add what this tokenizer puts around text, BOS for most; but no end token, and nothing twice.
          allow_special: read control tokens in `text` as such; never for the text of others.
        """
        ids = _ids(self._control, text) if allow_special else self._text_ids(text)
        prefix = [] if ids[: len(self._prefix)] == self._prefix else [i for i in self._prefix if i not in ids[:1]]
        return [*prefix, *ids, *self._suffix] if bos else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of token ids; a hole in the vocabulary decodes to nothing, bytes that are not UTF-8 to U+FFFD."""
        if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"decode: found token id {bad[0]}; expected 0 to {self.vocab_size - 1}.")
        return self._control.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def render_chat(self, messages: Messages, *, add_generation_prompt: bool = True, **kwargs) -> str:
        """The text of a chat, for eyes; models get `encode_chat`.

        Args:
          messages: mappings with `role` and `content`, a string or a list of `{"type": "text", "text": ...}` to join.
          add_generation_prompt: end with what begins an answer.
          **kwargs: more variables for the template, such as `tools`.
        """
        return self._render(_chat(messages, add_generation_prompt, kwargs), datetime.datetime.now())

    def encode_chat(self, messages: Messages, *, add_generation_prompt: bool = True, **kwargs) -> list[int]:
        """Token ids of what `render_chat` writes; the template alone adds control tokens, BOS included."""
        chat, now = _chat(messages, add_generation_prompt, kwargs), datetime.datetime.now()
        text = self._render(chat, now)
        taken = {*text, *json.dumps(chat, ensure_ascii=False)}
        private = map(chr, itertools.chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)))
        left, right = itertools.islice((c for c in private if c not in taken), 2)
        if (marks := _mark(chat, self._special, left, right)) == chat:  # no string holds a control token
            ids, known = _ids(self._control, text), map(self._control.token_to_id, self._special.findall(text))
            if [i for i in ids if i in self._instead] == [i for i in known if i in self._instead]:
                return ids  # nor did a normalizer or the model find one in disguise
        marked = self._render(marks, now)
        if re.sub(f"[{left}{right}]", "", marked) != text:
            what = "its output depends on a control token in a message; expected it to copy message text"
            raise ChatTemplateError(f"chat template: {what}. Take the control token out of the message.")
        # Between marks is what a message holds, every second piece; a mark may have lost its twin to the template.
        pieces = re.split(f"{left}([^{left}{right}]*){right}|[{left}{right}]", marked)
        pieces[::2] = [self._special.sub(lambda found: self._stand_in[found[0]], piece) for piece in pieces[::2]]
        return self._text_ids("".join(piece or "" for piece in pieces))

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and, with the chat template in it, `tokenizer_config.json`."""
        (folder := Path(folder)).mkdir(parents=True, exist_ok=True)
        config = {k: v for k, v in self._config.items() if k != "auto_map"} | {"chat_template": self.chat_template}
        (folder / "tokenizer.json").write_text(self._control.to_str(pretty=True), "utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # one of another tokenizer would come first

    def _text_ids(self, text: str) -> list[int]:
        """Ids of text in which stand-ins, and nothing else, mean control tokens."""
        ids = _ids(self._plain, text)
        return ids if self._instead.keys().isdisjoint(ids) else [j for i in ids for j in self._instead.get(i, [i])]

    def _spelt(self, text: str, control: frozenset[int]) -> list[int]:
        found = [(self._plain.token_to_id(c), c) for c in text]
        parts = ([i] if i not in (None, *control) else _ids(self._plain, c) for i, c in found)
        return [i for part in parts for i in part if i not in control]

    def _render(self, chat: dict[str, Any], now: datetime.datetime) -> str:
        template, names = _compile(self.chat_template), {"tools": None, "documents": None, "strftime_now": now.strftime}
        written, size = [], 0
        try:
            for piece in template.generate({**self._names, **names, **chat, _STEPS: [MAX_STEPS]}):
                written.append(piece)
                if (size := size + len(piece)) > MAX_CHAT:
                    raise SecurityError(f"it writes more than {MAX_CHAT} characters")
        except Exception as e:  # foreign code: whatever it raises is its own failure
            raise ChatTemplateError(f"chat template: {type(e).__name__}: {e}") from e
        return "".join(written)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read `tokenizer.json` and the configurations beside it.

    Raises:
      FileNotFoundError: there is no `tokenizer.json`.
      ValueError: a file is malformed or too large; names it.
    """
    if (spec := _read(path := Path(folder) / "tokenizer.json", MAX_TOKENIZER, bytes)) is None:
        what = f"found no {path}; expected one, for a `tokenizer.model` alone is not read"
        raise FileNotFoundError(f"load_tokenizer: {what}. Convert it: transformers' AutoTokenizer, save_pretrained.")
    names = ("tokenizer_config.json", "generation_config.json", "config.json")
    config, *others = (_read(path.with_name(n), MAX_CONFIG, lambda data: {} | json.loads(data)) or {} for n in names)
    eos_ids = []
    for name, found in ((name, other.get("eos_token_id")) for name, other in zip(names[1:], others, strict=True)):
        eos_ids += found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(i) is int and i >= 0 for i in eos_ids):
            raise ValueError(f"{folder}/{name}: eos_token_id {found!r:.80}; expected an id or a list of ids.")
    template = _read(path.with_name("chat_template.jinja"), MAX_CONFIG, bytes.decode) or config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}.get("default")
    if not isinstance(template, str | None):
        raise ValueError(f"{folder}/tokenizer_config.json: chat_template {template!r:.80}; expected text or a list.")
    return Tokenizer(spec, config, template, eos_ids, str(folder))


def byte_tokenizer() -> Tokenizer:
    """The embedded default: every byte is a token, then `<|bos|>`, `<|eos|>`, `<|pad|>` and `<|sep|>`."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # other bytes get the characters from 256 on
    others = {b: 256 + n for n, b in enumerate(b for b in range(256) if b not in printable)}
    backend = tokenizers.Tokenizer(models.BPE(vocab={chr(others.get(b, b)): b for b in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _BYTE_SPECIALS.values()])
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 256)])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **_BYTE_SPECIALS}
    return Tokenizer(backend.to_str().encode(), config, _BYTE_TEMPLATE)


class TextStream:
    """Text of tokens as they come; nothing that was given out changes later.

    The pieces add up to `decode` of all ids, cut at the stop string that begins first (of two that begin together, at
    the shorter: it is complete first). Held back are incomplete characters and what may become a stop string. Only a
    window is decoded, so a token costs the same however long the text is: exact where a token's text depends on the 5
    tokens before it at most, as with byte-level and Metaspace decoders. Byte fallback (Llama 2) judges a run of byte
    tokens as a whole, so a run is held back too, up to 64 tokens: an invalid byte cannot spoil what went before. Ids
    past the vocabulary, which a model with a padded embedding can sample, are no text.

    Attributes:
      text: all that was given out.
      stopped: the stop string that was found; `finish` may find one too.
      token_count: length of the shortest prefix of the ids whose text covers `text`.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), include_stop: bool = False):
        self._stop, self._include_stop = (stop,) if isinstance(stop, str) else tuple(stop), include_stop
        if not all(isinstance(s, str) and s for s in self._stop):
            raise ValueError(f"TextStream: stop={stop!r}; expected strings of at least one character.")
        known, self._special, backend = tokenizer.vocab_size, tokenizer.special_ids, tokenizer._control
        self._decode = lambda ids: tokenizer.decode([i for i in ids if i < known])  # embeddings are padded at times
        self._name, self._byte = backend.id_to_token, "<0x..>" if "ByteFallback" in repr(backend.decoder) else "(?!)"
        self.stopped: str | None = None
        self._given, self._ready = [], ""  # given out; decoded, but it may become a stop string
        self._held, self._context = [], []  # ids not decoded yet, and visible ones before them
        self._covers = deque([0])  # how many characters the first token_count, token_count + 1, ... ids decode to
        self._decoded = self._released = self.token_count = 0
        self._in_bytes = self._finished = False

    @property
    def text(self) -> str:
        return "".join(self._given)

    def push(self, ids: Sequence[int]) -> str:
        """Take more ids; return the text that may be shown now, nothing once a stop string was found."""
        if self._finished:
            raise ValueError("TextStream.push: found a finished stream; expected an open one. Make a new one.")
        for token in ids if self.stopped is None else ():
            text, n = self._after([*self._held, token]), len(self._held) + 1
            self._held.append(token)
            if self._visible(token):
                self._in_bytes = re.fullmatch(self._byte, self._name(token) or "") is not None
            if n >= _HELD:  # too many: cut before what may be the beginning of a character
                self._advance(next((n - k for k in range(4) if self._after(self._held[: n - k])[-1:] != "\ufffd"), n))
            elif not self._in_bytes and text[-1:] != "\ufffd":
                self._advance(n)
        return self._release()

    def finish(self) -> str:
        """Return what was held back."""
        if self.stopped is None:
            self._advance(len(self._held))
        self._finished = True
        return self._release()

    def _advance(self, n: int) -> None:
        done, self._held = self._held[:n], self._held[n:]
        text, cover = self._after(done), self._decoded
        for part in (self._after(done[:k]) if k < n else text for k in range(1, n + 1)):
            cover = max(cover, self._decoded + len(os.path.commonprefix([part, text])))  # noqa: RUF071 (no path)
            self._covers.append(cover)
        self._ready, self._decoded = self._ready + text, self._decoded + len(text)
        # Within a run of bytes the context begins where a character does, so that the run stays valid.
        context = [i for i in [*([] if self._in_bytes else self._context), *done] if self._visible(i)]
        self._context = context if self._in_bytes else context[-_CONTEXT:]

    def _after(self, ids: Sequence[int]) -> str:
        return self._decode([*self._context, *ids])[len(self._decode(self._context)) :]

    def _visible(self, token: int) -> bool:
        return token not in self._special and self._name(token) is not None

    def _release(self) -> str:
        text, n = self._ready, len(self._ready)
        found = min(((at, len(s), s) for s in self._stop if (at := text.find(s)) >= 0), default=None)
        begun = (n - k for s in self._stop for k in range(1, min(len(s), n + 1)) if text.endswith(s[:k]))
        end = n if self._finished else min(begun, default=n)
        if found and found[0] <= end:
            self.stopped, end, n = found[2], found[0] + found[1] * self._include_stop, 0
        self._given.append(text[:end])
        self._ready, self._released = text[end:] if n else "", self._released + end
        while self._covers[0] < self._released:
            self._covers.popleft()
            self.token_count += 1
        return text[:end]


def _read(path: Path, limit: int, parse: Callable[[bytes], Any]) -> Any:
    """What `parse` makes of a file; None if there is no such file."""
    if not path.is_file():
        return None
    if not (real := path.resolve()).is_relative_to(path.parent.resolve()):
        remedy = "If you trust it (a Hugging Face cache is made of links), copy the folder with `cp -rL`."
        raise ValueError(f"{path}: a link to {real}; expected files inside the folder. {remedy}")
    with path.open("rb") as file:
        if len(data := file.read(limit + 1)) > limit:
            raise ValueError(f"{path}: found more than {limit} bytes; expected no more. Is it what its name says?")
    try:
        return parse(data)
    except (TypeError, ValueError, RecursionError) as e:
        raise ValueError(f"{path}: {e}; expected UTF-8, and in a .json file an object. Fetch it again.") from e


def _content(entry: Any, where: str) -> str | None:
    """The text of a token in `tokenizer_config.json`."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    if not isinstance(text, str | None):
        raise ValueError(f"{where}/tokenizer_config.json: found {entry!r:.80}; expected a token.")
    return text


def _backend(spec: bytes, config: dict[str, Any], where: str) -> tokenizers.Tokenizer:
    """The library's tokenizer, and what only the configuration knows of its tokens."""
    try:
        backend = tokenizers.Tokenizer.from_buffer(spec)
        backend.encode_batch(["a", "\U0010fffd"])  # some faults show only now
    except BaseException as e:  # the library's panics are no Exception
        if isinstance(e, KeyboardInterrupt):
            raise
        raise ValueError(f"{where}/tokenizer.json: {e}; expected a file of `tokenizers`. Fetch it again.") from e
    backend.no_truncation()
    backend.no_padding()
    declared = config.get("added_tokens_decoder") or {}
    if not isinstance(declared, dict) or not all(i.isdecimal() and isinstance(t, dict) for i, t in declared.items()):
        raise ValueError(
            f"{where}/tokenizer_config.json: added_tokens_decoder {declared!r:.60}; expected tokens by id."
        )
    more = config.get("additional_special_tokens")
    named = [config.get(name) for name in _NAMED] + (more if isinstance(more, list) else [])
    entries = [(int(i), declared[i]) for i in sorted(declared, key=int)]
    entries += [(None, {"content": _content(entry, where), "special": True}) for entry in named]
    added, size = backend.get_added_tokens_decoder(), 1 + max(backend.get_vocab().values(), default=-1)
    for i, entry in entries:
        text, special = _content(entry, where) or "", bool(entry.get("special"))
        at = backend.token_to_id(text)
        fits = i == size if at is None else i in (at, None) and not (at in added and added[at].special >= special)
        if fits:  # an id that does not come next, or has another token, is that of another tokenizer
            flags = {flag: bool(entry.get(flag)) for flag in _FLAGS}
            (backend.add_special_tokens if special else backend.add_tokens)([AddedToken(text, **flags)])
            size = max(size, 1 + (i or 0))
    return backend


def _ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        return backend.encode(text, add_special_tokens=False).ids
    except Exception as e:  # the library raises nothing more exact
        raise ValueError(f"encode: found {text!r:.80} ({e}); expected text, without lone surrogates.") from e


def _chat(messages: Any, add_generation_prompt: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The variables of a chat template, checked and copied: it meets no object with methods of its own."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"messages: found {messages!r:.80}; expected a list of at least one message.")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{i}]: found {message!r:.80}; expected a mapping with a role that is text.")
        content = message.get("content")
        if isinstance(content, list | tuple):
            texts = [p.get("text") for p in content if isinstance(p, Mapping) and p.get("type") == "text"]
            if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
                content = "".join(map(str, texts))
        if not isinstance(content, str | None):
            raise ValueError(f"messages[{i}]: content {content!r:.80}; expected text or a list of text parts.")
        checked.append({k: v for k, v in {**message, "content": content}.items() if v is not None})
    try:
        return json.loads(json.dumps({**kwargs, "messages": checked, "add_generation_prompt": add_generation_prompt}))
    except (TypeError, ValueError, RecursionError) as e:
        raise ValueError(f"chat: {e}; expected messages and variables of JSON's types.") from e


def _mark(value: Any, special: re.Pattern[str], left: str, right: str) -> Any:
    """Wrap the control tokens in all strings."""
    if isinstance(value, list):
        return [_mark(v, special, left, right) for v in value]
    if isinstance(value, dict):
        return {_mark(k, special, left, right): _mark(v, special, left, right) for k, v in value.items()}
    return special.sub(lambda found: left + found[0] + right, value) if isinstance(value, str) else value


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox that counts calls, and refuses what would take all time or memory at one stroke."""

    intercepted_binops = frozenset({"*", "**"})

    def call(self, context, obj, /, *args, **kwargs):
        return super().call(context, obj, *args, **kwargs) if _step(context) else None

    def call_binop(self, context, operator, left, right):
        if operator == "**" or math.prod(len(x) if hasattr(x, "__len__") else x for x in (left, right)) > MAX_CHAT:
            raise SecurityError("it computes a power or a large product")
        return super().call_binop(context, operator, left, right)


@jinja2.pass_context
def _step(context: Any, _: Any = None) -> bool:
    """Count a call or a pass of a loop; a filter, so that it can be put into loops."""
    context[_STEPS][0] -= 1
    if context[_STEPS][0] < 0:
        raise SecurityError(f"it takes more than {MAX_STEPS} loop passes and calls")
    return True


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; here it is only its body."""

    tags = frozenset({"generation"})  # pyright: ignore

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@functools.lru_cache(16)
def _compile(source: str | None) -> jinja2.Template:
    """A chat template with what transformers offers it, every loop counted."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    if source is None or len(source) > MAX_TEMPLATE:
        what = f"found {'none' if source is None else f'{len(source)} characters'}; expected up to {MAX_TEMPLATE}"
        raise ChatTemplateError(f"chat template: {what}. Add the model's chat_template.jinja, or pass plain text.")
    env = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    env.filters |= {"tojson": tojson, _STEPS: _step}
    env.globals["raise_exception"] = raise_exception
    del env.globals["lipsum"]  # text of any length in one call
    try:
        tree = env.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            at = {"lineno": loop.lineno, "environment": env}
            step = nodes.Filter(nodes.Const(None, **at), _STEPS, [], [], None, None, **at)
            loop.test = nodes.And(step, loop.test, **at) if loop.test else step
        return env.from_string(tree)
    except Exception as e:
        raise ChatTemplateError(f"chat template: {type(e).__name__}: {e}") from e
