"""`--dry-run`: what a command would do. All settings and inputs are read and checked, nothing is written.

Training also reads every row of its data and lays the state out in the abstract, as its first seconds would.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

FLAG = "--dry-run"
INPUTS = ("source", "folder", "model", "data", "tokenizer", "policy", "drafter", "strong", "weak", "prompts", "plain")
INPUTS += ("corpus", "guide", "stop_head", "test", "tune")  # settings that name what has to be there
RUNS = ("sft", "drafter", "early-exit", "acceptance", "judge", "prm", "orm", "value", "qat", "preference")


def dry(name: str, command: Callable[..., int]) -> Callable[..., int]:
    """The command with the same settings, which says what it would do instead of doing it.

    Args:
      name: of the command, as one types it.
      command: what it runs.
    """

    @functools.wraps(command)
    def told(*args: Any, **settings: Any) -> int:
        given = {f"argument {i}": value for i, value in enumerate(args)} | settings
        missing = [f"{key} {value}" for key, value in inputs(given) if not Path(value).expanduser().exists()]
        if missing:
            raise FileNotFoundError(f"{name}: found no {'; no '.join(missing)}; expected what is there to be read.")
        found: dict[str, Any] = {"command": f"jaxaroo {name}"}
        kind = {"train unlearn": "preference"}.get(name, name.removeprefix("train "))
        if kind in RUNS and "settings" in settings:  # not `--objective list`
            from ..train.examine import examine

            found |= examine(kind, settings["settings"], _options(settings))
        print(json.dumps(found | {"settings": _plain(given)}, indent=2, ensure_ascii=False))
        return 0

    return told


def inputs(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and paths of what a command reads, within nested settings too."""
    for key, value in settings.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from inputs({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
        elif key in INPUTS and isinstance(value, str | Path) and not _named(str(value)):
            yield key, str(value)


# ----------------------------------------------------------------------------------------------------------- private
def _named(value: str) -> bool:
    """Whether it is a name of something that is no file: preset:tiny, builtin:arithmetic, the drafter `lookup`."""
    return ":" in value or value in ("lookup", "aded", "self", "none", "")


def _options(settings: Mapping[str, Any]) -> Any:
    """Of the kind of training; preference training has those of its loss beside."""
    if "loss" in settings:
        from ..train.preference import with_settings

        return with_settings(settings["options"], settings["loss"])
    return settings["options"]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
