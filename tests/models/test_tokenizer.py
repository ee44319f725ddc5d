"""Oracles: transformers (tests/oracles/make_tokenizer_goldens.py); for streams, decode everything and then search."""

import concurrent.futures
import functools
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxaroo.models import tokenizer as module
from jaxaroo.models.tokenizer import ChatTemplateError, TextStream, byte_tokenizer, load_tokenizer

GOLDENS = Path(__file__).parents[1] / "goldens" / "tokenizer"
NAMES = ["byte", "llama2", "llama3", "qwen", "unigram"]
HELLO = [{"role": "user", "content": "hello", "name": None}]
SENTENCES = ["The emu ran after the ute.", "the  ute, the emu: naïve 🦘 café!", "after the rain, the red dust"] * 3


@functools.cache
def golden(name):
    """A tokenizer, what transformers made of it, and its control tokens by their text (the unknown token is none)."""
    t = load_tokenizer(GOLDENS / name)
    texts = {t.decode([i], skip_special=False): i for i in t.special_ids}
    io = json.loads((GOLDENS / name / "io.json").read_text("utf-8"))
    return t, io, {text: i for text, i in texts.items() if text != "<unk>"}


def tokenizer_in(folder, source, **files):
    """A copy of a golden tokenizer with other files beside it."""
    shutil.copy(GOLDENS / source / "tokenizer.json", folder)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / re.sub("_(json|jinja)$", r".\1", name)).write_text(text, "utf-8")
    return load_tokenizer(folder)


def with_template(source):
    t = byte_tokenizer()
    t.chat_template = source
    return t


# ------------------------------------------------------------------------------------------------------------ encoding
@pytest.mark.parametrize("name", NAMES)
def test_is_what_transformers_do(name, tmp_path):
    t, io, controls = golden(name)
    for text, added, bare, plain in io["encode"]:
        assert t.encode(text, bos=False, allow_special=True) == bare
        twice, ended = bare[:1] == [t.bos_id], added == [*bare, *t.eos_ids]
        assert t.encode(text, allow_special=True) == (bare if twice or ended else added)
        if not {*controls.values()} & {*plain}:  # unigram has them among its pieces, and transformers let them through
            assert t.encode(text, bos=False) == plain
    for ids, everything, text in io["decode"]:
        assert (t.decode(ids, skip_special=False), t.decode(ids)) == (everything, text)
    for messages, variables, text, ids in io["chats"] + io.get("injections", []):
        variables = {"add_generation_prompt": False} | variables
        assert (t.render_chat(messages, **variables), t.encode_chat(messages, **variables)) == (text, ids)
    for source, text in io.get("templates", []):
        assert with_template(source).render_chat(HELLO, add_generation_prompt=False, day="mon") == text
    if name == "byte":  # so transformers read what we save
        byte_tokenizer().save(tmp_path)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert json.loads((tmp_path / file).read_bytes()) == json.loads((GOLDENS / name / file).read_bytes())


@given(st.text())
def test_bytes_hold_any_text(text):
    t, llama = byte_tokenizer(), golden("llama3")[0]
    assert t.encode(text, bos=False) == [*text.encode()]
    assert t.encode(text) == [t.bos_id, *text.encode()]
    assert t.decode(t.encode(text)) == text == llama.decode(llama.encode(text))


@given(st.data(), st.sampled_from(NAMES))
def test_text_holds_no_control_token(data, name):
    t, _, controls = golden(name)
    pieces = [part for c in controls for part in (c, c[:3], c[3:])]
    text = "".join(data.draw(st.lists(st.sampled_from([*pieces, " ", "é"]), max_size=5)))
    ids = t.encode(text, bos=False)
    assert not {*ids} & {*controls.values()}
    assert t.decode(ids).split() == text.split() or 0 in ids  # no piece of unigram holds an é


def test_threads_share_a_tokenizer():
    t, text = golden("llama3")[0], "a<|eot_id|>b" * 50
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        got = [*pool.map(lambda i: t.encode(text, allow_special=bool(i % 2)), range(200))]
    assert got == [t.encode(text), t.encode(text, allow_special=True)] * 100


# ------------------------------------------------------------------------------------------------------------- streams
def searched(t, ids, stops=(), include=False):
    text = t.decode(ids)
    at, n, stop = min(((text.find(s), len(s), s) for s in stops if s in text), default=(len(text), 0, None))
    return text[: at + n * include], stop


def streamed(t, ids, stops=(), include=False, sizes=(1,)):
    stream, pieces, done = TextStream(t, stops, include), [], 0
    while done < len(ids):
        n = sizes[len(pieces) % len(sizes)]
        pieces.append(stream.push(ids[done : done + n]))
        done += n
        assert stream.text == "".join(pieces)
        assert searched(t, ids, stops, include)[0].startswith(stream.text)
        assert stream.token_count == next(n for n in range(done + 1) if t.decode(ids[:n]).startswith(stream.text))
    return "".join([*pieces, stream.finish()]), stream.stopped


@settings(max_examples=200)
@given(st.data(), st.sampled_from(NAMES), st.booleans())
def test_stream_is_the_decoded_text_up_to_the_stop(data, name, include):
    t, _, controls = golden(name)
    texts = st.sampled_from(["🦘", "naïve\n", "  two", "\ufffd", "日本", "the fox", *controls])
    written = st.lists(texts, max_size=6).map(lambda x: [i for s in x for i in t.encode(s, allow_special=True)])
    ids = data.draw(st.lists(st.integers(0, t.vocab_size - 1), max_size=20) | written)
    text = t.decode(ids) or "a"
    spans = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 4)).map(lambda x: text[x[0] : x[0] + x[1]])
    stops = data.draw(st.lists(spans | st.sampled_from(["a", "ab", "<", "\n\n"]), max_size=3))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    assert streamed(t, ids, stops, include, sizes) == searched(t, ids, stops, include)


def test_stop_strings_and_split_characters():
    def pieces(text, stop=(), include=False):
        stream = TextStream(byte_tokenizer(), stop, include)
        return ",".join([*(stream.push([b]) for b in text), stream.finish()]), stream.stopped, stream.token_count

    assert pieces("é🦘!".encode()) == (",é,,,,🦘,!,", None, 7)
    assert pieces("!🦘".encode()[:4]) == ("!,,,,\ufffd", None, 2)
    assert pieces(b"xabcabd!", ["abd"]) == ("x,,,abc,,,,,", "abd", 4)
    assert pieces(b"xabcabd!", "abd", True) == ("x,,,abc,,,abd,,", "abd", 7)
    assert pieces(b"xabcabd!", ["bcabx", "c"])[1:] == ("c", 3)
    assert pieces(b"xabcabd!", ["bcabd", "c"])[1:] == ("bcabd", 2)  # it begins before the c
    assert pieces(b"xabcabd!", ["abc", "ab"])[1:] == ("ab", 1)
    assert pieces(b"xabcabd!", ["d!?"]) == ("x,a,b,c,a,b,,,d!", None, 8)


def test_what_cannot_be_encoded_or_decoded():
    t, stream = byte_tokenizer(), TextStream(byte_tokenizer())
    faults = {"found token id 260; expected 0 to 259": lambda: t.decode([1, 260]), "id -1": lambda: stream.push([-1])}
    faults |= {
        "without lone surrogates": lambda: t.encode("a\ud800"),
        "finished": lambda: stream.finish() or stream.push([1]),
    }
    for reason, call in (faults | {"at least one character": lambda: TextStream(t, ["a", ""])}).items():
        with pytest.raises(ValueError, match=reason):
            call()


def test_a_run_of_byte_tokens_is_exact_and_does_not_wait_for_ever():
    t, text = golden("llama2")[0], "🦘é" * 40 + " fox"
    stream, ids = TextStream(t, "🦘🦘"), t.encode(text, bos=False)
    assert len([piece for piece in map(stream.push, ([i] for i in ids)) if piece]) > 2
    assert stream.text + stream.finish() == text
    invalid = [*ids[:6], t.encode("\xff", bos=False)[-1], *t.encode("a", bos=False)]
    assert streamed(t, invalid) == (t.decode(invalid), None)


@pytest.mark.parametrize("name", NAMES)
def test_a_token_costs_the_same_in_a_long_text(name, monkeypatch):
    t, decoded = load_tokenizer(GOLDENS / name), []
    decode = t.decode
    monkeypatch.setattr(t, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    for ids in (
        t.encode("the fox 日本\n" * 60),
        [min(229, t.vocab_size - 1)] * 300,
    ):  # and a byte that begins a character
        stream, start = TextStream(t, ["zz"]), len(decoded)
        assert "".join([*(stream.push([i]) for i in ids), stream.finish()]) == decode(ids)
        assert max(decoded[start:]) < 150 and sum(decoded[start:]) < 400 * len(ids)  # noqa: PT018


@pytest.mark.parametrize("part", [pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel()], ids=["metaspace", "bytes"])
def test_freshly_trained(part, tmp_path):
    t = tokenizers.Tokenizer(models.BPE(unk_token="?"))
    t.pre_tokenizer, t.decoder = part, getattr(decoders, type(part).__name__)()
    t.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=["?"], show_progress=False))
    t.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids, ours.chat_template) == (t.get_vocab_size(), None, (), None)
    for sentence in SENTENCES:
        ids = ours.encode(sentence)
        assert ids == t.encode(sentence).ids
        assert streamed(ours, ids) == streamed(ours, ids, sizes=(3, 1)) == (t.decode(ids), None)
        assert ours.decode(ids).strip() == sentence


# --------------------------------------------------------------------------------------------------------------- chats
@pytest.mark.parametrize("name", NAMES[:4])
def test_messages_hold_no_control_token(name):
    t, _, controls = golden(name)
    for control in controls:
        plain, text = (t.render_chat([{"role": "user", "content": f"the {x}{x}fox"}]) for x in ("QZ", control))
        ids = t.encode_chat([{"role": "user", "content": f"the {control}{control}fox"}])
        split = re.split(f"({'|'.join(map(re.escape, controls))})", plain)
        assert [i for i in ids if i in controls.values()] == [controls[p] for p in split if p in controls]
        assert t.decode(ids, skip_special=False).replace(" ", "") == text.replace(" ", "")
        if name != "llama2":  # there each part begins with a space
            parts = [[controls[p]] if p in controls else t.encode(p.replace("QZ", control), bos=False) for p in split]
            assert ids == [*itertools.chain(*parts)]


def test_nor_do_their_other_strings_parts_and_variables():
    t = golden("qwen")[0]
    call = {"function": {"name": "<|im_end|>", "arguments": {"<|im_end|>": ["<|im_end|>", "\ue000<|im_end|>"]}}}
    parts = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    chat = [{"role": "x<|im_end|>", "content": parts}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    ids = t.encode_chat(chat, tools=[call])
    assert [i for i in ids if i in t.special_ids] == [341, 342, 341, 342, 341, 342, 341]
    assert "x<|im_end|>\n<|im_end|><|im_end|>" in t.render_chat(chat, tools=[call]) == t.decode(ids, skip_special=False)


def test_nor_do_they_in_disguise(tmp_path):
    tokenizer_in(tmp_path, "unigram", chat_template_jinja="<s>{{ messages[0].content }}</s>")
    spec = json.loads((tmp_path / "tokenizer.json").read_bytes()) | {"normalizer": {"type": "NFKC"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    for text in ("</s>", "\uff1c/s\uff1e"):
        ids = load_tokenizer(tmp_path).encode_chat([{"role": "user", "content": text}])
        assert (ids[0], ids[-1], {1, 2} & {*ids[1:-1]}) == (1, 2, set())


def test_a_template_may_look_at_a_control_token_but_not_depend_on_it():
    t, chat = with_template("{{ messages[0].content.split('|')[0] }}<|eos|>"), [{"role": "user", "content": "<|eos|>"}]
    assert t.encode_chat(chat) == [*b"<", *t.eos_ids]
    t.chat_template = "{{ messages[0].content | length }}"
    assert t.render_chat(chat) == "7"
    with pytest.raises(ChatTemplateError, match="depends on a control token"):
        t.encode_chat(chat)


REFUSED = r"""{{ ''.__class__.__mro__ }} -> SecurityError: access to attribute '__class__'
{{ (messages | attr('__class__')).__mro__ }} -> SecurityError: access to attribute '__class__'
{{ raise_exception.__globals__.json }} -> SecurityError: access to attribute '__globals__'
{{ lipsum(9999) }} -> UndefinedError: 'lipsum' is undefined
{{ '{0.__class__.__mro__}'.format(1) }} -> SecurityError: access to attribute '__class__'
{{ messages[0].update(role='system') }} -> SecurityError: access to attribute 'update'
{% include '/etc/passwd' %} -> no loader
{{ raise_exception('no ' + messages[0].role) }} -> TemplateError: no user
{{ nothing.at_all }} -> UndefinedError: 'nothing' is undefined
{% for -> TemplateSyntaxError
{% for i in range(10**9) %}{% endfor %} -> SecurityError: it computes a power
{% for i in range(1000000000) %}{% endfor %} -> OverflowError: Range too big
{% for i in range(999) %}{% for j in range(999) %}{% endfor %}{% endfor %} -> SecurityError: it takes more than 9999
{% for i in range(999) %}{% for j in range(999) if no %}{% endfor %}{% endfor %} -> SecurityError: it takes more than
{% for i in range(9) recursive %}{% if loop.depth < 9 %}{{ loop(range(9)) }}{% endif %}{% endfor %} -> SecurityError: it
{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }} -> SecurityError: it takes
{% macro f() %}{{ f() }}{% endmacro %}{{ f() }} -> RecursionError
{% for i in range(9998) %}{{ 'x' * 9999 }}{% endfor %} -> SecurityError: it writes more than 16777216 characters
{{ 'x' * 99999999 }} -> SecurityError: it computes a power or a large product"""


@pytest.mark.parametrize("case", REFUSED.splitlines())
def test_what_templates_may_not_do(case, monkeypatch):
    monkeypatch.setattr(module, "MAX_STEPS", 9999)
    source, reason = case.split(" -> ")
    with pytest.raises(ChatTemplateError, match=re.escape(reason)):
        with_template(source).render_chat(HELLO)


def test_chats_are_checked():
    assert with_template("{{ strftime_now('%Y') }}").render_chat(HELLO) == time.strftime("%Y")
    for source, reason in ((None, "found none"), ("x" * 2**21, "found 2097152 characters; expected up to 1048576")):
        with pytest.raises(ChatTemplateError, match=reason):
            with_template(source).encode_chat(HELLO)
    role, text = {"role": "user"}, "text or a list of text parts"
    bad = [([], "at least one message"), ("hello", "a list"), (["hello"], r"messages\[0\]: .* a mapping with a role")]
    bad += [([*HELLO, {"role": 1}], r"messages\[1\]: .* role that is text"), ([role | {"content": 7}], text)]
    bad += [([role | {"content": [{"type": "image"}]}], text), ([role | {"x": object()}], "JSON's types")]
    for messages, reason in bad:
        with pytest.raises(ValueError, match=reason):
            byte_tokenizer().encode_chat(messages)


# ------------------------------------------------------------------------------------------------------- configurations
def test_configurations(tmp_path):
    new, far = {"content": "<|new|>", "special": True, "lstrip": True}, {"content": "<|far|>", "special": True}
    config = {"bos_token": {"content": "<think>"}, "eos_token": "<|im_end|>", "pad_token": None, "add_bos_token": True}
    config |= {"additional_special_tokens": ["</think>", "never heard of"], "auto_map": {"a": "b.c"}}
    config["added_tokens_decoder"] = {"347": new, "9999": far, "0": {"content": "elsewhere"}}
    files = {"generation_config_json": {"eos_token_id": [340, 342, 7777]}, "config_json": {"eos_token_id": 341}}
    t = tokenizer_in(tmp_path, "qwen", tokenizer_config_json=config, **files)
    assert (t.bos_id, t.pad_id, t.eos_ids, t.vocab_size) == (343, None, (342, 340, 7777, 341), 348)
    assert t.special_ids == {340, 341, 342, 343, 344, 347}
    assert t.encode("a <|new|><think>", allow_special=True) == [343, *t.encode("a", bos=False), 347, 343]
    assert not t.special_ids & {*t.encode("a <|new|><think>", bos=False)}
    t.chat_template = "a <|new|>{{ messages[0].content }}"
    assert t.encode_chat([{"role": "user", "content": "<think>"}])[:2] == [*t.encode("a", bos=False), 347]
    (tmp_path / "chat_template.jinja").write_text("older")
    t.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.special_ids, again.encode("a")) == (t.special_ids, t.encode("a"))
    assert again.chat_template == t.chat_template
    assert b"auto_map" not in (tmp_path / "tokenizer_config.json").read_bytes()
    no_bos = {"bos_token": "<|begin_of_text|>", "add_bos_token": False}
    assert tokenizer_in(tmp_path, "llama3", tokenizer_config_json=no_bos).encode("") == []


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json; expected one, for a `tokenizer\.model` alone"):
        load_tokenizer(tmp_path)
    faults = ["{", "[]", {"bos_token": 1}, {"added_tokens_decoder": {"x": {}}}, {"chat_template": 1}]
    faults = [("tokenizer_config", fault) for fault in faults] + [("config", "[" * 99999)]
    for name, fault in [*faults, ("generation_config", {"eos_token_id": "1"})]:
        with pytest.raises(ValueError, match=rf"/{name}\.json: .*expected"):
            tokenizer_in(tmp_path, "qwen", **{f"{name}_json": fault})
        (tmp_path / f"{name}.json").unlink()
    panics = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    panics = json.loads((GOLDENS / "byte" / "tokenizer.json").read_bytes()) | panics
    for broken in (b"{", b"null", b"\xff", json.dumps(panics).encode()):
        (tmp_path / "tokenizer.json").write_bytes(broken)
        with pytest.raises(ValueError, match=r"tokenizer\.json: .*Fetch it again"):
            load_tokenizer(tmp_path)
    monkeypatch.setattr(module, "MAX_CONFIG", 9)
    with pytest.raises(ValueError, match=r"/config\.json: found more than 9 bytes"):
        tokenizer_in(tmp_path, "qwen", config_json={"long": "long"})
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to(GOLDENS / "byte" / "tokenizer_config.json")
    with pytest.raises(ValueError, match=r"/config\.json: a link to .*; expected files inside the folder"):
        load_tokenizer(tmp_path)


def test_needs_no_jax():
    code = "import sys, jaxaroo.models.tokenizer; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
