"""Every combination of flags against the rules in plain words."""

import itertools

import numpy as np
import pytest

from jaxaroo.train.rewards.critique import CritiqueConfig, ask_actor, ask_critic, critique, read_verdict

FLAGS = [*itertools.product([False, True], repeat=4)]  # verdict, correct, malformed, refined
VERDICT, CORRECT, MALFORMED, REFINED = (list(column) for column in zip(*FLAGS, strict=True))


def test_stage_one_rewards_the_verdict_alone():
    got, metrics = critique(VERDICT, CORRECT, MALFORMED)
    for reward, (verdict, correct, malformed, _) in zip(got, FLAGS, strict=True):
        assert reward == (-1 if malformed else 1 if verdict == correct else 0)
    assert got.dtype == np.float32
    assert metrics == {"discrimination_acc": 0.25, "format_fail": 0.5}
    same, more = critique(VERDICT, CORRECT, MALFORMED, REFINED)
    np.testing.assert_array_equal(same, got)
    assert more == {"discrimination_acc": 0.25, "refine_acc": 0.25, "format_fail": 0.5}


@pytest.mark.parametrize(("weight", "malformed_reward"), [(0.2, -1.0), (0.5, -3.0)])
def test_stage_two_rewards_the_refined_answer_and_less_the_verdict(weight, malformed_reward):
    cfg = CritiqueConfig(stage=2, verdict_weight=weight, malformed=malformed_reward)
    got, metrics = critique(VERDICT, CORRECT, MALFORMED, REFINED, cfg)
    for reward, (verdict, correct, malformed, refined) in zip(got, FLAGS, strict=True):
        want = malformed_reward if malformed else (1 if refined else 0) + (weight if verdict == correct else 0)
        assert reward == pytest.approx(want, rel=1e-6)
    assert got.dtype == np.float32
    assert metrics == {"discrimination_acc": 0.25, "refine_acc": 0.25, "format_fail": 0.5}


def test_the_papers_weight_is_the_default():
    got, _ = critique([True], [True], [False], [False], CritiqueConfig(stage=2))
    np.testing.assert_array_equal(got, np.float32([0.2]))


def test_shares_are_of_all_critiques():
    _, metrics = critique([True, True, False], [True, False, False], [False, False, True], [True, True, True])
    assert metrics == pytest.approx({"discrimination_acc": 1 / 3, "refine_acc": 2 / 3, "format_fail": 1 / 3})


@pytest.mark.errors
def test_missing_flags_and_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="no refined answers in stage 2"):
        critique([True], [True], [False], cfg=CritiqueConfig(stage=2))
    with pytest.raises(ValueError, match=r"found \[1, 2, 1\] flags"):
        critique([True], [True, False], [False])
    with pytest.raises(ValueError, match="and some"):
        critique([], [], [])
    for bad in (dict(stage=3), dict(verdict_weight=-0.1), dict(malformed=0.0)):
        with pytest.raises(ValueError, match=f"CritiqueConfig.{next(iter(bad))}"):
            CritiqueConfig(**bad)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Fine. The answer is right.", True),
        ("The answer is wrong. No: The answer is right.\nExplanation: ...", True),
        ("The answer is right. No: The answer is wrong.", False),
        ("the answer is right", None),
        ("", None),
    ],
)
def test_the_verdict_that_stands_last_counts(text, says):
    assert read_verdict(text) is says


def test_prompts_are_of_the_questions_kind_and_texts_are_never_filled_in():
    cfg = CritiqueConfig(right="YES", wrong="NO", ask=r"\frac{1}{2} {question}|{attempt}|{right}{wrong}|{critique}")
    asked = ask_critic("{attempt}?\n", "{question}", cfg)
    assert asked == r"\frac{1}{2} {attempt}?|{question}|YESNO|{critique}"  # nobody has criticised it yet
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q\n"}]
    cfg = CritiqueConfig(refine="{critique}/{attempt}/{question}")
    assert ask_actor(chat, "a", "{right}", cfg) == [chat[0], {"role": "user", "content": "{right}/a/q"}]
    assert ask_actor("q", "a", "c", cfg) == "c/a/q"
    for default in (ask_critic("Q", "A"), ask_actor("Q", "A", "C")):
        assert "Q" in default
        assert "A\n" in default
    assert CritiqueConfig().right in ask_critic("Q", "A")


@pytest.mark.errors
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(right="right", wrong="not right"), "neither of them a part of the other"),
        (dict(wrong=""), "neither of them"),
        (dict(ask="{question}"), r"CritiqueConfig.ask: .* without {attempt}"),
        (dict(refine="{question}{attempt}"), r"CritiqueConfig.refine: .* without {critique}"),
        (dict(refine_tokens=0), "refine_tokens: found 0"),
    ],
)
def test_words_that_mean_nothing_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        CritiqueConfig(**bad)
