"""What is out of range is refused before anything is read."""

import pytest

from jaxaroo.infer.speculative.settings import SpeculationConfig


@pytest.mark.errors
@pytest.mark.parametrize(
    "change", [{"drafts": 0}, {"chains": 0}, {"beam": 0}, {"levels": 0}, {"nodes": 1}, {"eta": 2.0}]
)
def test_out_of_range_is_refused(change):
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=f"speculation: {name}={value}; expected"):
        SpeculationConfig(**{name: value})


def test_nothing_asked_is_plain_decoding():
    assert SpeculationConfig().drafter is None
