"""Settings as YAML: frozen dataclasses to a file and back, every key and type checked.

A file may leave out what has a default. What it does hold has to be known and of the right type; all that is wrong
is named at once, with the nearest name for one that is not known.
"""

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A settings file that says what no setting means."""


def read_settings(kind: type[Config], path: Path) -> dict[str, Any]:
    """The settings a file holds, checked against `kind`; nested dataclasses stay mappings, as `build` wants them.

    Raises:
      ConfigError: for what is not YAML, not a mapping, unknown or of another type.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: {' '.join(str(e).split())}; expected YAML.") from e
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found {type(tree).__name__}; expected names and values.")
    if problems := list(_problems(kind, tree, "")):
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    return tree


def build(kind: type[Config], tree: Mapping[str, Any], under: Config | None = None) -> Config:
    """A dataclass from checked settings. What a nested mapping leaves out is as in the default it changes.

    Args:
      kind: the dataclass.
      tree: settings, as `read_settings` gives them.
      under: has what the tree leaves out, at any depth; the dataclass's own defaults when not given.

    Raises:
      ConfigError: if a setting without a default is missing.
      ValueError: from the dataclasses themselves.
    """
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    default = {f.name: _default_of(f) if under is None else getattr(under, f.name) for f in fields}
    values = {name: _value(hints[name], value, default[name]) for name, value in tree.items()}
    if under is not None:
        return dataclasses.replace(under, **values)  # type: ignore[type-var]
    needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in needed if name not in values]:
        raise ConfigError(f"{kind.__name__}: found no {', '.join(missing)}; expected a value for each.")
    return kind(**values)


def write_settings(config: Any, path: Path) -> None:
    """Write every setting, defaults too, so that a later version's defaults change nothing; whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(partial, path)


# ----------------------------------------------------------------------------------------------------------- private
def _problems(kind: Any, tree: Mapping[str, Any], prefix: str):
    hints = typing.get_type_hints(kind)
    for name, value in tree.items():
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1)
            hint = f" Did you mean {prefix}{near[0]}?" if near else ""
            yield f"{prefix}{name} is unknown; expected one of {', '.join(hints)}.{hint}"
        elif not (nested := _nested(hints[name])) or not isinstance(value, dict):
            if not _fits(hints[name], value):
                yield f"{prefix}{name}: found {value!r}; expected {_spell(hints[name])}."
        else:
            yield from _problems(nested, value, f"{prefix}{name}.")


def _nested(hint: Any) -> Any:
    """The dataclass that a hint names, also as `T | None`."""
    return next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None)


def _fits(hint: Any, value: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(arg, value) for arg in args)
    if origin is typing.Literal:
        return value in args and type(value) in {type(arg) for arg in args}
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        kinds = args[:1] * len(value) if args[1:] == (...,) else args
        return len(kinds) == len(value) and all(map(_fits, kinds, value))
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return (isinstance(value, int | float) and not isinstance(value, bool)) or _number(value) is not None
    if hint is Path:
        return isinstance(value, str)
    return type(value) is hint


def _default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _value(hint: Any, value: Any, default: Any = None) -> Any:
    if (nested := _nested(hint)) and isinstance(value, Mapping):
        return build(nested, value, default if isinstance(default, nested) else None)
    hints = {hint, *typing.get_args(hint)}
    if isinstance(value, str) and Path in hints and str not in hints:
        return Path(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in hints and int not in hints:
        return float(value)
    if float in hints and str not in hints and (number := _number(value)) is not None:
        return number
    if isinstance(value, list):
        args = next((typing.get_args(h) for h in (hint, *hints) if typing.get_origin(h) is tuple), (Any, ...))
        return tuple(map(_value, args[:1] * len(value) if args[1:] == (...,) else args, value))
    return value


def _number(value: Any) -> float | None:
    """What is written `1e-5`: a number to everybody but YAML 1.1, which reads text."""
    try:
        return float(value) if isinstance(value, str) else None
    except ValueError:
        return None


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    if typing.get_origin(hint) is tuple:
        args = typing.get_args(hint)
        each = _spell(args[0]) if args[1:] == (...,) else f"{' and '.join(map(_spell, args))}, in this order"
        return f"a list of {each}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_spell(arg) for arg in typing.get_args(hint))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    return names.get(hint, "null" if hint in (None, type(None)) else "names and values")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
