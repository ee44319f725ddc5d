"""Where steps are, and what stands at which token; oracles are plain lists and the tokenizer's own decoding."""

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxaroo.models.reward import StepText, one_token
from jaxaroo.models.tokenizer import byte_tokenizer, load_tokenizer
from jaxaroo.train.data.arithmetic import arithmetic_tokenizer
from jaxaroo.train.data.steps import (
    SplitConfig,
    StepsConfig,
    encode_steps,
    split_steps,
    split_tokens,
    step_targets,
)

GOLDENS = Path(__file__).parents[2] / "goldens" / "tokenizer"
STEPS = ["the emu ran", "3 + 4 = 7 <|sep|>", "the rain, the red dust"]
ROW = {"prompt": "the emu? ", "steps": STEPS, "labels": [1, None, 0]}
NAMES = ["byte", "llama2", "llama3", "qwen", "unigram"]


@functools.cache
def golden(name):
    return load_tokenizer(GOLDENS / name)


def separator_of(t):
    """Some control token that is no end and no padding."""
    taken = {*t.eos_ids, t.bos_id, t.pad_id}
    return min(i for i in t.special_ids if i not in taken)


def pieces(text, spans):
    """Steps and what lies between them."""
    cuts = [0, *(at for span in spans for at in span), len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(cuts)]
    assert cuts == sorted(cuts)
    assert "".join(parts) == text
    return parts[1::2], parts[::2]


lines = st.text(st.sampled_from("ab \t\r\n\u2028é"), max_size=30)


@given(lines)
def test_lines_are_what_an_editor_shows(text):
    steps, between = pieces(text, split_steps(text))
    assert steps == [line.rstrip() for line in text.split("\n") if line.strip()]
    assert not "".join(between).strip()


@given(lines, st.sampled_from(["\n\n", "a", "\n", "ab"]))
def test_separators_belong_to_no_step(text, separator):
    cfg = SplitConfig(how="separator", separator=separator)
    steps, _ = pieces(text, split_steps(text, cfg))
    assert steps == [part.rstrip() for part in text.split(separator) if part.strip()]


def test_a_known_text():
    text = "  a = 1\n\n \nb = 2  \r\nans 3\n"
    assert [text[a:b] for a, b in split_steps(text)] == ["  a = 1", "b = 2", "ans 3"]
    assert [text[a:b] for a, b in split_steps(text, SplitConfig(how="separator"))] == ["  a = 1", " \nb = 2  \r\nans 3"]
    assert split_steps("") == split_steps(" \n ") == []


@pytest.mark.parametrize("name", ["byte", "qwen", "llama3"])
@pytest.mark.parametrize("every", [1, 3, 1000])
def test_steps_of_so_many_tokens_cover_the_text(name, every):
    t, text = golden(name), "the emu ran é\u20ac\U0001f998 after\nthe ute. "
    ids = t.encode(text, bos=False)
    spans = split_steps(text, SplitConfig(how="tokens", tokens=every), t)
    steps, between = pieces(text, spans)
    assert "".join(between) == ""
    assert all(steps)
    # Oracle: a step ends where the first k * every tokens are whole characters.
    whole = [t.decode(ids[:k]) for k in range(every, len(ids), every)]
    ends = {len(part) for part in whole if text.startswith(part)} | {len(text)}
    assert ends <= {end for _, end in spans}
    assert len(steps) <= -(-len(ids) // every)


def test_a_cut_within_a_character_moves_to_its_beginning():
    t = byte_tokenizer()
    ids = t.encode("aé\u20acb", bos=False)
    assert len(ids) == 7
    wanted = {
        2: ["a", "é\u20acb"],
        3: ["aé", "\u20acb"],
        4: ["aé", "\u20acb"],
        5: ["aé", "\u20acb"],
        6: ["aé\u20ac", "b"],
    }
    for end, texts in wanted.items():
        assert ["aé\u20acb"[a:b] for a, b in split_tokens(t, ids, [end, 7])] == texts
    assert split_tokens(t, ids, np.asarray([4, 5, 7])) == [(0, 2), (2, 4)]  # the middle one would be empty
    assert split_tokens(t, [*ids, t.eos_ids[0]], [7, 8]) == [(0, 4)]  # an end token is no text
    assert split_tokens(t, [], []) == split_steps("", SplitConfig(how="tokens"), t) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("cfg", "around"), [(StepsConfig(), ("", "")), (StepsConfig(after_error="bad"), ("\n", "\n\n"))]
)
def test_a_label_stands_at_its_own_separator(name, cfg, around):
    t = golden(name)
    separator = separator_of(t)
    encoded = encode_steps(t, ROW, StepText(separator, *around), cfg)
    ids = encoded.ids.tolist()
    # Oracle: each text alone, then one separator.
    wanted, at = t.encode(ROW["prompt"]), []
    for i, step in enumerate(STEPS):
        wanted += [*t.encode(around[i > 0] + step, bos=False), separator]
        at.append(len(wanted) - 1)
    assert ids == wanted
    assert np.flatnonzero(encoded.scored).tolist() == [at[0], at[2]]
    assert encoded.labels.tolist() == [1.0 if i == at[0] else 0.0 for i in range(len(ids))]
    assert (encoded.ids.dtype, encoded.labels.dtype, encoded.scored.dtype) == (np.int32, np.float32, bool)
    assert not encoded.mismatch
    assert not {*ids} & {*t.eos_ids}


@pytest.mark.parametrize("t", [byte_tokenizer(), arithmetic_tokenizer()], ids=["byte", "arithmetic"])
def test_a_step_that_spells_the_separator_is_text(t):
    separator = one_token(t, "<|sep|>")
    assert t.decode([separator], skip_special=False).strip() == "<|sep|>"
    steps = ["1 + 1 = 2 <|sep|>", "<|sep|>", "ans 2"]
    encoded = encode_steps(
        t, {"prompt": "<|sep|> how many ?", "steps": steps, "labels": [1, 0.25, 1]}, StepText(separator)
    )
    assert (encoded.ids == separator).sum() == 3
    np.testing.assert_array_equal(encoded.ids == separator, encoded.scored)
    assert encoded.labels[encoded.scored].tolist() == [1.0, 0.25, 1.0]


def oracle_targets(labels, worth, cfg):
    """By the words of the specification, one step at a time."""
    out = []
    for i in range(len(labels)):
        earlier = [worth[label] for label in labels[:i] if worth[label] is not None]
        if any(value <= cfg.wrong for value in earlier):
            out.append(None if cfg.after_error == "mask" else 0.0)
        else:
            out.append(worth[labels[i]])
    return out


@pytest.mark.parametrize("after_error", ["mask", "bad"])
@pytest.mark.parametrize(
    ("scale", "neutral", "worth"),
    [
        ("signs", "good", {-1: 0.0, 0: 1.0, 1: 1.0, None: None}),
        ("signs", "bad", {-1: 0.0, 0: 0.0, 1: 1.0, None: None}),
        ("signs", "mask", {-1: 0.0, 0: None, 1: 1.0, None: None}),
        ("shares", "good", {0: 0.0, 0.25: 0.25, 1: 1.0, None: None}),
    ],
)
def test_targets_of_all_short_label_lists(scale, neutral, worth, after_error):
    for wrong in (0.0, 0.25):
        cfg = StepsConfig(scale=scale, neutral=neutral, after_error=after_error, wrong=wrong)
        for labels in itertools.product(worth, repeat=4):
            assert step_targets(labels, cfg) == oracle_targets(labels, worth, cfg)


def test_labels_after_the_first_error():
    labels = [1, 0.5, 0, 1, None, 0]
    assert step_targets(labels) == [1, 0.5, 0, None, None, None]
    assert step_targets(labels, StepsConfig(after_error="bad")) == [1, 0.5, 0, 0, 0, 0]
    assert step_targets([1, 0, -1, 1], StepsConfig(scale="signs")) == [1, 1, 0, None]


def test_shares_are_learned_from_their_own_column():
    t = byte_tokenizer()
    separator = one_token(t, "<|sep|>")
    row = ROW | {"soft": [0.75, 0.5, 0.125]}
    encoded = encode_steps(t, row, StepText(separator), StepsConfig(column="soft"))
    assert encoded.labels[encoded.ids == separator].tolist() == [0.75, 0.5, 0.125]
    nothing = encode_steps(t, ROW | {"labels": [None] * 3}, StepText(separator))
    assert not nothing.scored.any()


@pytest.mark.errors
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: encode_steps(t, ROW, StepText(259), StepsConfig(column="soft")), "expected `soft`, one for each"),
        (lambda t: encode_steps(t, ROW | {"labels": [1]}, StepText(259)), "found 1 values; expected `labels`"),
        (lambda t: step_targets([1, -1]), 'found label -1; expected 0 to 1.*Set scale="signs"'),
        (lambda t: step_targets([0.5], StepsConfig(scale="signs")), 'expected -1, 0 or 1.*Set scale="shares"'),
        (lambda t: step_targets([2.0]), "found label 2.0; expected 0 to 1"),
        (lambda t: step_targets([float("nan")]), "found label nan"),
        (lambda t: split_steps("a", SplitConfig(how="tokens")), "no tokenizer"),
        (lambda t: split_steps("1  +", SplitConfig(how="tokens"), arithmetic_tokenizer()), "comes back .* as '1 [+]'"),
        (lambda t: split_tokens(t, [1, 2], [1]), "found 2 ids and ends"),
        (lambda t: split_tokens(t, [1, 2], [0, 2]), "found 2 ids and ends"),
        (lambda t: split_tokens(t, [1, 2], [2, 2]), "found 2 ids and ends"),
        (lambda t: split_tokens(t, [1, 2], []), "found 2 ids and ends"),
        (lambda t: SplitConfig(how="word"), "SplitConfig.how: found 'word'"),
        (lambda t: SplitConfig(separator=""), "a string that is not empty"),
        (lambda t: SplitConfig(tokens=0), "tokens=0"),
        (lambda t: StepsConfig(after_error="drop"), "after_error: found 'drop'; expected mask or bad"),
        (lambda t: StepsConfig(scale="sign"), "scale: found 'sign'"),
        (lambda t: StepsConfig(wrong=1), "wrong: found 1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(byte_tokenizer())
