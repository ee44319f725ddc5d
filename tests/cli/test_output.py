"""JSON of settings and results."""

import dataclasses
import json

import pytest

from jaxaroo.cli.output import dumps


@dataclasses.dataclass
class Settings:
    name: str
    size: int = 3


def test_settings_are_objects_and_text_stays_readable():
    assert json.loads(dumps({"a": Settings("b"), "c": [1, None]})) == {"a": {"name": "b", "size": 3}, "c": [1, None]}
    assert dumps("Züge") == '"Züge"'


def test_what_is_no_json_is_named():
    with pytest.raises(TypeError, match="set is not JSON"):
        dumps({1, 2})
