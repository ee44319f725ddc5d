"""Every kind of verdict, and shares that can be counted by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.advantages.grpo import grpo
from jaxaroo.train.rewards.truthrl import Truthfulness, TruthRLConfig, truthfulness, truthrl

VERDICTS = ["right", "abstained", "wrong", "wrong", None, "right", "right", "wrong", "abstained"]


def test_three_rewards_and_nan_for_no_verdict():
    got = truthrl(VERDICTS)
    np.testing.assert_array_equal(got, np.float32([1, 0, -1, -1, np.nan, 1, 1, -1, 0]))
    assert got.dtype == np.float32
    binary = truthrl(VERDICTS, TruthRLConfig(abstained=-1.0))
    np.testing.assert_array_equal(binary, np.float32([1, -1, -1, -1, np.nan, 1, 1, -1, -1]))
    np.testing.assert_array_equal(truthrl(["wrong"], TruthRLConfig(right=2.0, abstained=0.5, wrong=0.25)), [0.25])


def test_in_a_group_silence_is_worth_more_than_an_error_and_a_missing_verdict_nothing():
    rewards = truthrl(["right", "abstained", "wrong", "wrong", None])
    got = np.asarray(grpo(jnp.asarray(rewards)[None])[0])[0]
    np.testing.assert_allclose(got, [1.305581, 0.261116, -0.783349, -0.783349, 0], rtol=0, atol=6e-7)


def test_shares_and_their_sum():
    assert truthfulness(VERDICTS) == pytest.approx(Truthfulness(8, 3 / 8, 2 / 8, 3 / 8, 0.0))
    weighted = truthfulness(["right", "abstained", "abstained", "wrong"], (2.0, 0.5, 4.0))
    assert weighted == pytest.approx(Truthfulness(4, 0.25, 0.5, 0.25, 2 * 0.25 + 0.5 * 0.5 - 4 * 0.25))
    # The paper's first column: 32.1 % right and 53.1 % wrong make -20.9 (its shares are rounded).
    made = ["right"] * 321 + ["wrong"] * 531 + ["abstained"] * 148
    assert truthfulness(made).truthfulness == pytest.approx(-0.21)


@pytest.mark.errors
def test_other_verdicts_none_at_all_and_rewards_in_another_order_are_refused():
    for refused in (truthrl, truthfulness):
        with pytest.raises(ValueError, match="found verdict 'correct'; expected right, abstained or wrong"):
            refused(["right", "correct"])
    with pytest.raises(ValueError, match="found no verdicts"):
        truthfulness([None])
    for bad in (dict(right=0.0), dict(abstained=-2.0), dict(wrong=float("nan"))):
        with pytest.raises(ValueError, match="TruthRLConfig: found"):
            TruthRLConfig(**bad)
