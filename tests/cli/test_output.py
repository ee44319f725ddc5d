"""JSON of settings and results."""

import dataclasses
import errno
import json
from pathlib import Path

import pytest

from jaxaroo.cli.output import UsageError, cut_half_line, dumps, expect_files, expect_folder, write_rows, write_whole


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


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    write_whole(path := tmp_path / "rows.jsonl", "old")
    real = Path.write_text

    def full(self, text, **options):
        real(self, text[:3], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "newer")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("rows.jsonl", "old")]


@pytest.mark.errors
def test_files_that_could_not_be_written_are_refused_by_flag(tmp_path):
    expect_files("eval prm", out=None, plot=tmp_path / "a.PNG")
    for files, message in (
        ({"out": tmp_path}, "--out: .* is a folder"),
        ({"out": tmp_path / "no" / "a.jsonl"}, "--out: there is no folder .*no; expected"),
        ({"plot": tmp_path / "a.txt"}, r"--plot .*a.txt: expected a name that ends in .png, .pdf, .svg"),
    ):
        with pytest.raises(UsageError, match="eval prm: " + message):
            expect_files("eval prm", **files)


@pytest.mark.errors
def test_a_file_is_no_folder_to_write_to(tmp_path):
    expect_folder("eval bits", tmp_path)
    expect_folder("eval bits", tmp_path / "new")
    write_rows(path := tmp_path / "rows.jsonl", iter([{"a": 1}, {"b": "Züge"}]))
    assert path.read_text(encoding="utf-8") == '{"a": 1}\n{"b": "Züge"}\n'
    with pytest.raises(UsageError, match=r"eval bits: --out .*rows.jsonl is a file; expected a folder"):
        expect_folder("eval bits", path)
