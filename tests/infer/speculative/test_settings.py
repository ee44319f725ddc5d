"""What is out of range is refused before anything is read."""

import pytest

from jaxaroo.infer.speculative.settings import SpeculationConfig


@pytest.mark.errors
@pytest.mark.parametrize(
    "change",
    [
        *({name: 0} for name in ("drafts", "chains", "beam", "levels")),
        {"nodes": 1},
        {"eta": 2.0},
        {"stop_threshold": -0.1},
        {"judge_threshold": 1.5},
    ],
)
def test_out_of_range_is_refused(change):
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=f"speculation: {name}={value}; expected"):
        SpeculationConfig(**{name: value})


@pytest.mark.errors
def test_a_head_that_nobody_would_ask_is_refused():
    with pytest.raises(ValueError, match="stop_head='h' with stop_rule='confidence'; expected 'head'"):
        SpeculationConfig(stop_head="h", stop_rule="confidence")
    with pytest.raises(ValueError, match="judge='j' with verifier='auto'; expected 'judge'"):
        SpeculationConfig(judge="j")
    assert SpeculationConfig(judge="j", verifier="judge", stop_head="h", stop_rule="head").judge == "j"


def test_nothing_asked_is_plain_decoding():
    assert SpeculationConfig().drafter is None
