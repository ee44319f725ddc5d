"""JSON of settings and results."""

import dataclasses
import json

import pytest

from jaxaroo.cli.output import cut_half_line, dumps


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


def test_what_a_killed_process_left_of_a_line_is_cut(tmp_path):
    path = tmp_path / "rows.jsonl"
    for found, kept in ((None, b""), (b"", b""), (b"a", b""), (b"a\nb\n", b"a\nb\n"), (b"a\nb\nhal", b"a\nb\n")):
        if found is not None:
            path.write_bytes(found)
        assert cut_half_line(path) == kept.count(b"\n")
        assert path.read_bytes() == kept
