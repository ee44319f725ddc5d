"""Settings survive the way to a file and back; what is wrong in a file is named, all of it."""

import dataclasses
import os
from pathlib import Path
from typing import Literal

import pytest

from jaxaroo.train.config import ConfigError, build, read_settings, write_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    names: tuple[str, ...] = dataclasses.field(default_factory=lambda: ("a",))
    loud: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Either:
    number: int | float = 1
    named: str | float = "a"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    model: str
    out: Path
    steps: int = 3
    limit: int | None = None
    kind: Literal["x", "y"] = "x"
    level: Literal[1, 2] = 1
    inner: Inner = Inner()
    mix: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filled:
    inner: Inner = Inner(rate=2.0, loud=True)
    other: Inner | None = Inner(rate=3.0)
    bare: Inner = dataclasses.field(default_factory=Inner)


def load(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    return build(Outer, read_settings(Outer, tmp_path / "c.yaml"))


def test_there_and_back(tmp_path):
    config = Outer(model="m", out=Path("o"), limit=4, kind="y", inner=Inner(rate=1e-5, names=("b", "c"), loud=True))
    config = dataclasses.replace(config, mix=(("a", 1.0), ("b", 2.5)))
    write_settings(config, tmp_path / "c.yaml")
    assert build(Outer, read_settings(Outer, tmp_path / "c.yaml")) == config


def test_defaults_fill_what_a_file_leaves_out(tmp_path):
    got = load(tmp_path, "model: m\nout: o\ninner:\n  rate: 2\n")
    assert got == Outer(model="m", out=Path("o"), inner=Inner(rate=2.0))
    assert type(got.inner.rate) is float
    assert load(tmp_path, "model: m\nout: o\nlimit: null\n").limit is None
    assert load(tmp_path, "model: m\nout: o\ninner:\n  rate: 1e-5\n").inner.rate == 1e-5  # text to YAML 1.1


def test_a_part_that_is_named_in_part_keeps_the_rest_of_its_default():
    found = build(Filled, {"inner": {"names": ["c"]}, "other": {"loud": True}, "bare": {"rate": 1}})
    assert found == Filled(
        inner=Inner(rate=2.0, names=("c",), loud=True), other=Inner(rate=3.0, loud=True), bare=Inner(rate=1.0)
    )
    assert build(Filled, {"other": None}) == Filled(other=None)


def test_settings_lie_over_others_at_any_depth():
    under = Outer(model="m", out=Path("o"), steps=7, inner=Inner(rate=2.0, loud=True))
    found = build(Outer, {"model": "n", "inner": {"names": ["c"]}}, under)
    assert found == dataclasses.replace(under, model="n", inner=Inner(rate=2.0, names=("c",), loud=True))
    assert build(Outer, {}, under) == under


def test_lists_of_lists_have_their_types_too(tmp_path):
    assert load(tmp_path, "model: m\nout: o\nmix: [[a, 1], [b, 2e-1]]\n").mix == (("a", 1.0), ("b", 0.2))
    for wrong in ("[[a]]", "[[a, b]]", "[a, 1]", "[[1, 1]]"):
        with pytest.raises(
            ConfigError, match=r"mix: found .*; expected a list of a list of text and a number, in this"
        ):
            load(tmp_path, f"model: m\nout: o\nmix: {wrong}\n")


def test_where_two_types_will_do_a_value_keeps_its_own():
    got = build(Either, {"number": 2, "named": "1e-5"})
    assert (got.named, type(got.number)) == ("1e-5", int)


def test_a_write_that_is_cut_short_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path, config = tmp_path / "c.yaml", Outer(model="m", out=Path("o"))
    write_settings(config, path)
    before = path.read_bytes()

    def full(*paths):
        raise OSError("no space left")

    with monkeypatch.context() as changed:
        changed.setattr(os, "replace", full)
        with pytest.raises(OSError, match="no space left"):
            write_settings(dataclasses.replace(config, model="other"), path)
    assert path.read_bytes() == before
    write_settings(config, path)
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"model: \xff")
    with pytest.raises(ConfigError, match=r"c.yaml: .*expected YAML"):
        read_settings(Outer, tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("modle: m", ["modle is unknown; expected one of model, out", "Did you mean model?"]),
        ("inner:\n  rates: 1", ["inner.rates is unknown", "Did you mean inner.rate?"]),
        (
            "steps: three\nkind: z",
            ["steps: found 'three'; expected a whole number", "kind: found 'z'; expected one of x"],
        ),
        ("steps: true", ["steps: found True; expected a whole number"]),
        ("steps: 1.5", ["steps: found 1.5"]),
        ("limit: a", ["limit: found 'a'; expected a whole number or null"]),
        ("inner: 3", ["inner: found 3; expected names and values"]),
        ("inner:\n  names: a", ["inner.names: found 'a'; expected a list of text"]),
        ("inner:\n  names: [b, 1]", ["inner.names: found ['b', 1]; expected a list of text"]),
        ("inner:\n  rate: true", ["inner.rate: found True; expected a number"]),
        ("level: true", ["level: found True; expected one of 1, 2"]),
        ("", ["found no model, out; expected a value for each"]),
        ("inner:\n  loud: 1", ["inner.loud: found 1; expected true or false"]),
        ("inner:\n  rate: fast", ["inner.rate: found 'fast'; expected a number"]),
        ("model: 3\nout: o", ["model: found 3; expected text"]),
        ("- a", ["found list; expected names and values"]),
        ("a: [", ["expected YAML"]),
        ("model: m", ["found no out; expected a value"]),
        ("model: !!python/object/apply:os.system [ls]", ["expected YAML"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, messages):
    with pytest.raises(ConfigError) as e:
        load(tmp_path, text)
    for message in messages:
        assert message in str(e.value)
