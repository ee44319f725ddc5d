"""Settings survive the way to a file and back; what is wrong in a file is named, all of it."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from jaxaroo.train.config import ConfigError, build, read_settings, write_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    names: tuple[str, ...] = ("a",)
    loud: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    model: str
    out: Path
    steps: int = 3
    limit: int | None = None
    kind: Literal["x", "y"] = "x"
    inner: Inner = Inner()


def load(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    return build(Outer, read_settings(Outer, tmp_path / "c.yaml"))


def test_there_and_back(tmp_path):
    config = Outer(model="m", out=Path("o"), limit=4, kind="y", inner=Inner(rate=1e-5, names=("b", "c"), loud=True))
    write_settings(config, tmp_path / "c.yaml")
    assert build(Outer, read_settings(Outer, tmp_path / "c.yaml")) == config


def test_defaults_fill_what_a_file_leaves_out(tmp_path):
    got = load(tmp_path, "model: m\nout: o\ninner:\n  rate: 2\n")
    assert got == Outer(model="m", out=Path("o"), inner=Inner(rate=2.0))
    assert type(got.inner.rate) is float
    assert load(tmp_path, "model: m\nout: o\nlimit: null\n").limit is None
    assert load(tmp_path, "model: m\nout: o\ninner:\n  rate: 1e-5\n").inner.rate == 1e-5  # text to YAML 1.1


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
