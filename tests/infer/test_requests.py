"""Prompts in every form, checks that name their field, and text that is handed out once it is final."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxaroo.infer.requests import AnswerStream, Request, RequestError, Result, Timings, make_request, split_prompts
from jaxaroo.infer.sampling import Sampling
from jaxaroo.models.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("given_", "count"),
    [
        ("text", 1),
        ([1, 2, 3], 1),
        (np.array([1, 2]), 1),
        (CHAT, 1),
        (["a", "b"], 2),
        ([[1, 2], [3]], 2),
        ([CHAT, CHAT], 2),
        (["a", [1], CHAT], 3),
        ([], 0),
        ([np.array([1, 2])], 1),
        ((1, 2), 1),
    ],
)
def test_one_prompt_and_a_list_of_prompts_are_told_apart(given_, count):
    assert len(split_prompts(given_)) == count


def make(prompt, sampling=Sampling(), **options):
    return make_request(
        "0", prompt, sampling, 1, **{"tokenizer": TOKENIZER, "vocab_size": 260, "max_len": 32} | options
    )


def test_every_form_of_a_prompt_becomes_ids():
    ids = TOKENIZER.encode("hi")
    assert make("hi").token_ids == make(ids).token_ids == make(tuple(ids)).token_ids == make(np.array(ids)).token_ids
    assert make(CHAT).token_ids == TOKENIZER.encode_chat(CHAT)
    assert TOKENIZER.eos_ids[0] not in make("say <|eos|>").token_ids


def test_the_limit_is_what_was_asked_or_the_default_cut_to_fit():
    assert make("x" * 5).max_tokens == 16
    assert make("x" * 25).max_tokens == 32 - 26
    assert make("x" * 25, Sampling(max_tokens=6)).max_tokens == 6


@pytest.mark.errors
@pytest.mark.parametrize(
    ("prompt", "sampling", "options", "param", "message"),
    [
        ("", Sampling(), {}, "prompt", "found nothing"),
        ([], Sampling(), {}, "prompt", "found nothing"),
        ([260], Sampling(), {}, "prompt", "found token id 260; expected 0 to 259"),
        ([True], Sampling(), {}, "prompt", "found list; expected a string"),
        (None, Sampling(), {}, "prompt", "found NoneType"),
        ([{"role": 3}], Sampling(), {}, "prompt", "prompt: "),
        ("hi", Sampling(), {"tokenizer": None}, "prompt", "has no tokenizer"),
        ([1], Sampling(stop=["a"]), {"tokenizer": None}, "stop", "strings need a tokenizer"),
        ("x" * 31, Sampling(), {}, "prompt", "found 32 tokens; expected at most 31"),
        ("x" * 20, Sampling(max_tokens=12), {}, "max_tokens", "found 12 on top of a prompt of 21; expected at most 11"),
        ("x", Sampling(stop_token_ids=[260]), {}, "stop_token_ids", "found token id 260"),
        ("x", Sampling(logit_bias={-1: 1.0}), {}, "logit_bias", "found token id -1"),
    ],
)
def test_what_cannot_run_names_its_field(prompt, sampling, options, param, message):
    with pytest.raises(RequestError, match=message) as error:
        make(prompt, sampling, **options)
    assert error.value.param == param


def stream(stop=(), stop_ids=(), include_stop=False):
    s = Sampling(max_tokens=100, stop=stop, include_stop=include_stop)
    return AnswerStream(
        Request(id="7", token_ids=[1], sampling=s, seed=0, max_tokens=100), 2, TOKENIZER, frozenset(stop_ids)
    )


@given(
    st.text(alphabet="ab<é🦘", max_size=20),
    st.lists(st.text(alphabet="ab<é", min_size=1, max_size=3), max_size=2),
    st.lists(st.integers(1, 5), min_size=1, max_size=20),
)
def test_any_cutting_of_any_text_hands_out_the_same(text, stop, sizes):
    ids = list(text.encode())
    found = [(text.find(s), s) for s in stop if s in text]
    cut = min(found)[0] if found else len(text)
    answer, shown, given_ids, at = stream(stop), "", [], 0
    for size in [*sizes, len(ids)]:
        delta = answer.push(ids[at : at + size], "length" if at + size >= len(ids) else None)
        shown, at = shown + delta.text, at + size
        given_ids += delta.token_ids
        assert (delta.id, delta.index) == ("7", 2)
        assert text[:cut].startswith(shown)
        if delta.finish_reason:
            break
    assert shown == text[:cut]
    assert answer.finish_reason == ("stop" if found else "length")
    assert given_ids == answer.token_ids == ids[: len(answer.token_ids)]
    assert len(answer.token_ids) == len(text[:cut].encode())
    assert answer.answer([], 0.0).text == shown


def test_a_stop_token_is_kept_in_the_ids_and_shown_only_when_asked():
    for include, text in ((False, "a"), (True, "ab")):
        answer = stream(stop_ids=[98], include_stop=include)
        delta = answer.push([97, 98, 99], None)
        assert (delta.text, delta.token_ids, delta.finish_reason) == (text, [97, 98], "stop")
        assert answer.stop_reason == 98


def test_a_stop_string_found_at_the_very_end_cuts_text_and_ids():
    """An incomplete character is U+FFFD once nothing can follow it, and only then a match."""
    answer = stream(stop=["\ufffd"])
    assert answer.push([97, 0xF0], None).text == "a"
    delta = answer.push([], "length")
    assert (delta.text, delta.finish_reason, answer.stop_reason) == ("", "stop", "\ufffd")
    assert (answer.answer([], 0.0).text, answer.token_ids) == ("a", [97])


def test_ids_past_the_vocabulary_are_no_text():
    """A model whose embedding is padded can sample them."""
    answer = stream()
    delta = answer.push([97, 300, 98], "length")
    assert (delta.text, delta.token_ids) == ("ab", [97, 300, 98])


def test_usage_adds_up_over_samples():
    answer = stream()
    answer.push([97, 97], "length")
    result = Result("0", [1, 2, 3], [answer.answer([], 0.0)] * 2, None, Timings(0, 0, 0), None)
    assert result.usage == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
