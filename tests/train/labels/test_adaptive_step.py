"""Thresholds against sorting, ends against a loop over tokens."""

import numpy as np
import pytest

from jaxaroo.models.tokenizer import byte_tokenizer
from jaxaroo.train.data.steps import split_tokens
from jaxaroo.train.labels.adaptive_step import AdaptiveStepConfig, adaptive_ends, adaptive_steps, choose_threshold


def responses(number=60, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [-rng.exponential(size=int(rng.integers(0, 90))).astype(dtype) for _ in range(number)]


def loop_ends(logp, threshold, shortest):
    """Steps as lists of tokens: begin one where the policy was unsure, unless the open one is too short."""
    steps = [[]]
    for value in logp:
        if value < threshold and len(steps[-1]) >= shortest:
            steps.append([])
        steps[-1].append(value)
    if len(steps) > 1 and len(steps[-1]) < shortest:
        last = steps.pop()
        steps[-1] += last
    return [int(n) for n in np.cumsum([len(step) for step in steps]) if n]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.25, 1.0])
def test_the_share_of_break_points_is_the_one_asked_for(share):
    logps = responses()
    threshold = choose_threshold(logps, share)
    tokens = sorted(float(v) for logp in logps for v in logp[1:])  # the first token of a response is no candidate
    wanted = round(share * len(tokens))
    assert sum(v < threshold for v in tokens) == wanted
    assert adaptive_steps(logps, AdaptiveStepConfig(share=share)).share == wanted / len(tokens)
    assert threshold in tokens or share == 1.0


def test_ties_at_the_threshold_are_no_break_points():
    logps = [np.array([0, -3, -1, -1, -1, -1, -0.5, 0, 0, 0, 0], np.float32)]
    assert [choose_threshold(logps, share) for share in (0.1, 0.2, 0.4, 0.5)] == [-1, -1, -1, -0.5]
    assert adaptive_steps(logps, AdaptiveStepConfig(share=0.4, shortest=1)).share == 0.1


@pytest.mark.parametrize("shortest", [1, 2, 4, 100])
@pytest.mark.parametrize("threshold", [-3.0, -1.0, -0.1, np.inf, -np.inf])
def test_ends_are_those_of_a_loop(shortest, threshold):
    for logp in [*responses(30, 1), np.zeros(0, np.float32), np.full(1, -9, np.float32), np.full(7, -9, np.float32)]:
        ends = adaptive_ends(logp, threshold, shortest)
        assert ends.tolist() == loop_ends(logp.tolist(), threshold, shortest)
        lengths = np.diff(ends, prepend=0)
        assert len(ends) <= 1 or lengths.min() >= shortest
        assert lengths.sum() == len(logp)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_data_set_has_one_threshold(dtype):
    logps = responses(40, 2, dtype)
    cfg = AdaptiveStepConfig(share=0.1, shortest=3)
    found = adaptive_steps(logps, cfg)
    assert found.threshold == choose_threshold(logps, 0.1)
    assert [e.tolist() for e in found.ends] == [loop_ends(p.tolist(), found.threshold, 3) for p in logps]
    points = sum(v < found.threshold for p in logps for v in p[1:])
    steps = sum(len(e) for e in found.ends) - sum(len(p) > 0 for p in logps)
    assert found.merged == points - steps
    assert found.merged > 0
    assert adaptive_steps(logps, AdaptiveStepConfig(share=0.1, shortest=1)).merged == 0
    unsure = [p.copy() for p in logps]
    for p in unsure:
        p[:1] = -99  # what a policy thinks of a first token moves nothing
    again = adaptive_steps(unsure, cfg)
    assert again.threshold == found.threshold
    assert [e.tolist() for e in again.ends] == [e.tolist() for e in found.ends]


def test_steps_become_text():
    t, text = byte_tokenizer(), "3 + 4 = 7, so 7"
    logp = np.full(len(text), -0.1)
    logp[[0, 8, 9, 11]] = -5.0
    found = adaptive_steps([logp], AdaptiveStepConfig(share=3 / 14, shortest=2))
    spans = split_tokens(t, t.encode(text, bos=False), found.ends[0])
    assert [text[a:b] for a, b in spans] == ["3 + 4 = ", "7, ", "so 7"]
    assert (found.threshold, found.merged) == (-0.1, 1)


@pytest.mark.errors
def test_what_has_no_threshold():
    with pytest.raises(ValueError, match="response 1 has values above 0 or NaN"):
        choose_threshold([np.zeros(3), np.array([0.5])], 0.1)
    with pytest.raises(ValueError, match="response 0 has values above 0 or NaN"):
        choose_threshold([np.array([np.nan])], 0.1)
    for nothing in ([], [np.zeros(1)]):
        with pytest.raises(ValueError, match="found no token behind the first"):
            choose_threshold(nothing, 0.1)
    for options in ({"share": -0.1}, {"share": 2}, {"shortest": 0}):
        with pytest.raises(ValueError, match="AdaptiveStepConfig"):
            AdaptiveStepConfig(**options)
