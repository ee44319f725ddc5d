"""What is learned from an example; the golden tokenizers bring templates and merges of real families."""

import functools
from pathlib import Path

import numpy as np
import pytest

from jaxaroo.models.tokenizer import byte_tokenizer, load_tokenizer
from jaxaroo.train.data.arithmetic import ArithmeticConfig, ArithmeticExamples, arithmetic_tokenizer
from jaxaroo.train.data.tokenise import (
    Encoded,
    encode_labelled,
    encode_messages,
    encode_pair,
    encode_pairs,
    encode_sft,
    truncate,
)

GOLDENS = Path(__file__).parents[2] / "goldens" / "tokenizer"
USER, ANSWER = {"role": "user", "content": "the emu?"}, {"role": "assistant", "content": "it ran"}
MORE = {"role": "user", "content": "where to?"}


@functools.cache
def golden(name):
    return load_tokenizer(GOLDENS / name)


def scored_text(t, encoded):
    return t.decode([int(i) for i in encoded.ids[encoded.scored]], skip_special=False)


@pytest.mark.parametrize("name", ["byte", "llama2", "llama3", "qwen", "unigram"])
def test_text_is_the_prompt_as_generation_sees_it_then_the_completion_then_an_end(name):
    t = golden(name)
    prompt, completion = "the emu ran after the ute. ", "the rain, the red dust"
    encoded = encode_pair(t, prompt, completion)
    ids, start = list(encoded.ids), int(np.argmax(encoded.scored))
    assert ids[:start] == t.encode(prompt)  # what the engine is given
    assert ids[-1] in t.eos_ids
    assert ids.count(t.bos_id) <= 1
    assert encoded.scored.tolist() == [i >= start for i in range(len(ids))]
    if encoded.mismatch:  # these write a space before a text that is tokenised alone
        assert name in ("llama2", "unigram")
        assert t.decode(ids) == prompt + " " + completion
    else:
        assert ids[:-1] == t.encode(prompt + completion)


def test_a_merge_across_the_border_is_a_mismatch_and_the_prompt_stays_as_it_is():
    t = golden("qwen")
    prompt, completion = "after th", "e rain"
    assert t.encode(prompt + completion)[: len(t.encode(prompt))] != t.encode(prompt)  # the case is real
    encoded = encode_pair(t, prompt, completion)
    assert encoded.mismatch
    assert list(encoded.ids) == [*t.encode(prompt), *t.encode(completion, bos=False), t.eos_ids[0]]
    assert int(encoded.scored.sum()) == len(encoded.ids) - len(t.encode(prompt))


def test_an_end_token_is_not_put_twice():
    t = byte_tokenizer()
    chat = encode_pair(t, [USER], [ANSWER])
    assert [int(i) in t.eos_ids for i in chat.ids].count(True) == [
        i in t.eos_ids for i in t.encode_chat([USER, ANSWER], add_generation_prompt=False)
    ].count(True)


@pytest.mark.parametrize("name", ["llama3", "qwen"])
def test_a_chat_is_the_prompt_with_its_generation_prompt_and_what_the_template_writes_next(name):
    t = golden(name)
    encoded = encode_pair(t, [USER], [ANSWER])
    prompt = t.encode_chat([USER])
    assert list(encoded.ids[: len(prompt)]) == prompt
    assert list(encoded.ids) == t.encode_chat([USER, ANSWER], add_generation_prompt=False)
    assert not encoded.scored[: len(prompt)].any()
    assert encoded.scored[len(prompt) :].all()
    assert "it ran" in scored_text(t, encoded)
    assert not encoded.mismatch


@pytest.mark.parametrize("name", ["llama3", "qwen"])
def test_every_turn_of_the_assistant_is_learned_and_no_other(name):
    t = golden(name)
    chat = [USER, ANSWER, MORE, {"role": "assistant", "content": "to the rain"}]
    encoded = encode_messages(t, chat)
    text = scored_text(t, encoded)
    assert text.index("it ran") < text.index("to the rain")
    assert "emu" not in text
    assert "where" not in text
    assert "user" not in text
    assert "assistant" not in text  # the generation prompt is given, not learned
    assert sum(int(i) in t.eos_ids for i in encoded.ids[encoded.scored]) == 2
    again = encode_messages(t, [*chat, MORE])  # an unanswered question adds nothing
    assert list(again.ids) == list(encoded.ids)
    assert encode_sft(t, {"messages": chat}).ids.tolist() == encoded.ids.tolist()


def test_a_template_that_rewrites_earlier_turns_leaves_the_last_one():
    """Some templates drop the reasoning of earlier turns, so those never stand before a later one like that."""
    t = byte_tokenizer()
    t.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' and not loop.last %}-{% else %}"
        "{{ m.content }}{% endif %}<|eos|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    encoded = encode_messages(t, [USER, ANSWER, MORE, {"role": "assistant", "content": "home"}])
    assert scored_text(t, encoded) == "home<|eos|>"
    assert t.decode([int(i) for i in encoded.ids], skip_special=False).startswith("user:the emu?<|eos|>assistant:-")


def test_a_chat_that_the_template_will_not_continue_is_joined_from_its_contents():
    t = byte_tokenizer()
    t.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    parts = {"role": "assistant", "content": [{"type": "text", "text": "to "}, {"type": "text", "text": "town"}]}
    for completion, said in [([ANSWER], "it ran"), ([ANSWER, parts], "it ran\nto town")]:
        encoded = encode_pair(t, [USER], completion)
        assert encoded.mismatch
        assert t.decode([int(i) for i in encoded.ids], skip_special=False) == f"1the emu?>{said}<|eos|>"


def test_an_opening_line_of_the_assistant_is_read_but_not_learned():
    t = golden("qwen")
    chat = [ANSWER, USER, {"role": "assistant", "content": "home"}]
    encoded = encode_messages(t, chat)
    assert "home" in scored_text(t, encoded)
    assert "it ran" not in scored_text(t, encoded)
    assert encoded.ids.tolist() == t.encode_chat(chat, add_generation_prompt=False)


def test_a_generation_prompt_that_no_written_turn_begins_with_is_a_mismatch():
    """Some templates open a thought for generation which they leave out of what was said."""
    t = byte_tokenizer()
    t.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<|eos|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:<think>{% endif %}"
    )
    encoded = encode_messages(t, [USER, ANSWER])
    assert encoded.mismatch
    assert scored_text(t, encoded) == "it ran<|eos|>"
    assert t.decode([int(i) for i in encoded.ids], skip_special=False).endswith("assistant:<think>it ran<|eos|>")


def test_a_template_without_end_tokens_gets_one_that_is_learned():
    t = byte_tokenizer()
    t.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    encoded = encode_messages(t, [USER, ANSWER, MORE, {"role": "assistant", "content": "home"}])
    assert scored_text(t, encoded) == "it ran\nhome\n<|eos|>"


def test_an_end_in_the_prompt_does_not_end_the_completion_and_the_first_of_several_does():
    t = byte_tokenizer()
    t.chat_template = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}<|eos|>{% endif %}{% endfor %}"
    end = t.eos_ids[0]
    t.eos_ids = (end, 65)
    encoded = encode_pair(t, [USER], [{"role": "assistant", "content": ""}])
    assert list(encoded.ids) == [*t.encode_chat([USER]), end]
    assert encoded.ids[-2] == end
    assert np.flatnonzero(encoded.scored).tolist() == [len(encoded.ids) - 1]


def test_the_embedded_task_is_learned_from_the_first_equation_on():
    t, example = arithmetic_tokenizer(), ArithmeticExamples(ArithmeticConfig())[5]
    encoded = encode_sft(t, example)
    assert scored_text(t, encoded) == example["completion"] + " <|eos|>"
    assert not encoded.mismatch
    assert ArithmeticExamples(ArithmeticConfig(), "test")[5] != example
    assert example["completion"].endswith(f"ans {example['answer']}")


def test_truncation_keeps_one_end_and_never_scores_the_first_token():
    whole = Encoded(np.arange(10, dtype=np.int32), np.arange(10) >= 4)
    start, end = truncate(whole, 6), truncate(whole, 6, "keep_end")
    assert start.ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert start.scored.tolist() == [False] * 4 + [True] * 2
    assert end.ids.tolist() == [4, 5, 6, 7, 8, 9]
    assert end.scored.tolist() == [False] + [True] * 5
    assert truncate(whole, 4).scored.sum() == 0
    assert truncate(whole, 10).ids.tolist() == whole.ids.tolist()
    assert [truncate(whole._replace(mismatch=m), 6).mismatch for m in (True, False)] == [True, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: encode_pair(t, "a", [ANSWER]), "text and messages"),
        (lambda t: encode_messages(t, [USER]), "at least one `assistant`"),
        (lambda t: encode_messages(t, [ANSWER]), "a prompt before it"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(byte_tokenizer())


def test_a_tokenizer_without_an_end_is_refused():
    t = byte_tokenizer()
    t.eos_ids = ()
    with pytest.raises(ValueError, match="no end token"):
        encode_pair(t, "a", "b")


@pytest.mark.parametrize("label", [True, False])
def test_a_labelled_completion_has_its_label_on_every_token_and_its_end(label):
    t = golden("byte")
    row = {"prompt": "the emu?", "completion": " it ran", "label": label}
    got, plain = encode_labelled(t, row), encode_pair(t, row["prompt"], row["completion"])
    np.testing.assert_array_equal(got.ids, plain.ids)
    np.testing.assert_array_equal(got.scored, plain.scored)
    assert plain.labels is None
    assert got.labels.dtype == np.float32
    assert got.labels.tolist() == [float(scored and label) for scored in plain.scored]
    assert plain.scored[-1]


def test_the_two_of_a_pair_are_the_prompt_with_either_completion():
    t = golden("byte")
    chosen, rejected = encode_pairs(t, {"prompt": "the emu?", "chosen": " it ran", "rejected": " no idea"})
    for got, completion in ((chosen, " it ran"), (rejected, " no idea")):
        want = encode_pair(t, "the emu?", completion)
        np.testing.assert_array_equal(got.ids, want.ids)
        np.testing.assert_array_equal(got.scored, want.scored)
    assert scored_text(t, chosen).startswith(" it ran")
    chat = encode_pairs(
        golden("qwen"), {"prompt": [USER], "chosen": [ANSWER], "rejected": [MORE | {"role": "assistant"}]}
    )
    assert scored_text(golden("qwen"), chat[1]).startswith("where to?")


def test_labels_are_cut_with_their_tokens():
    """And a token that has nothing before it keeps none."""
    given = Encoded(
        np.arange(6, dtype=np.int32), np.array([0, 0, 1, 1, 1, 1], bool), False, np.float32([0, 0, 1, 0.5, 0, 1])
    )
    for how, ids, scored, labels in (
        ("keep_start", [0, 1, 2, 3], [0, 0, 1, 1], [0, 0, 1, 0.5]),
        ("keep_end", [2, 3, 4, 5], [0, 1, 1, 1], [0, 0.5, 0, 1]),
    ):
        got = truncate(given, 4, how)
        assert (got.ids.tolist(), got.scored.tolist(), got.labels.tolist()) == (ids, scored, labels)
        assert got.labels.dtype == np.float32
    assert truncate(given, 6).labels.tolist() == given.labels.tolist()
    assert truncate(given._replace(labels=None), 4).labels is None


def test_of_a_completion_in_pieces_each_keeps_a_token_or_none_is_scored():
    pieces = np.array([0, 0, 1, 2, 2, 3, 3])
    encoded = Encoded(np.arange(7, dtype=np.int32), pieces > 0, pieces=pieces)
    for most, how, left in ((7, "keep_start", 5), (6, "keep_start", 4), (5, "keep_start", 0), (4, "keep_start", 0)):
        cut = truncate(encoded, most, how)
        assert (len(cut.ids), cut.scored.sum()) == (most, left)
        np.testing.assert_array_equal(cut.pieces, pieces[:most])
    assert [truncate(encoded, most, "keep_end").scored.sum() for most in (7, 6, 5, 4)] == [5, 5, 0, 0]
