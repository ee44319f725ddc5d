"""Every combination of flags against the rules in plain words."""

import itertools

import numpy as np
import pytest

from jaxaroo.train.rewards.critique import CritiqueConfig, critique

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
