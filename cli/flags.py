"""What every command understands beside its own settings: `--dry-run`, and `--json` where it is not one of them."""

import contextlib
import dataclasses
import functools
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .output import dumps

DRY, JSON = "--dry-run", "--json"
Command = Callable[..., int]
INPUTS = ("source", "folder", "model", "data", "tokenizer", "policy", "drafter", "strong", "weak", "prompts", "plain")
INPUTS += ("corpus", "guide", "stop_head", "test", "tune")  # settings that name what has to be there
RUNS = ("sft", "drafter", "early-exit", "acceptance", "judge", "prm", "orm", "value", "qat", "preference")


def understood(commands: dict[str, Command], args: list[str]) -> tuple[dict[str, Command], list[str]]:
    """Commands that do as the flags of a command line say, and the line without them.

    Args:
      commands: by name.
      args: the command line.
    """
    name = next((name for name in (" ".join(args[:2]), *args[:1]) if name in commands), None)
    if name is None:
        return commands, args
    command, has_json = commands[name], "json" in inspect.signature(commands[name]).parameters
    rest = [arg for arg in args if arg != DRY and (has_json or arg != JSON)]
    if DRY in args:
        command = dry(name, command)
    elif len(rest) < len(args):
        command = as_json(name, command)
    return commands | {name: command}, rest


def dry(name: str, command: Command) -> Command:
    """The command with the same settings, which says what it would do instead of doing it.

    All settings and inputs are read and checked, nothing is written. Training also reads every row of its data and lays
    the state out in the abstract, as its first seconds would.

    Args:
      name: of the command, as one types it.
      command: what it runs.
    """

    @functools.wraps(command)
    def told(*args: Any, **settings: Any) -> int:
        given = dict(inspect.signature(command).bind(*args, **settings).arguments)
        missing = [f"{key} {value}" for key, value in inputs(given) if not Path(value).expanduser().exists()]
        if missing:
            raise FileNotFoundError(f"{name}: found no {'; no '.join(missing)}; expected what is there to be read.")
        found: dict[str, Any] = {"command": f"jaxaroo {name}"}
        kind = {"train unlearn": "preference"}.get(name, name.removeprefix("train "))
        if kind in RUNS and "settings" in settings:  # not `--objective list`
            from ..train.examine import examine

            found |= examine(kind, settings["settings"], _options(settings))
        if kind in ("rl", "ranked"):
            from .rounds import need_reward

            rewards = settings["options"].reward
            for reward in (rewards,) if isinstance(rewards, str) else rewards:
                need_reward(kind, reward)
        print(dumps(found | {"settings": given}, indent=2))
        return 0

    return told


def as_json(name: str, command: Command) -> Command:
    """The command with the same settings, whose result is one JSON object.

    What it would print goes to standard error. The object names the command, its status and seconds, where it wrote,
    and of a run the model and the last line of its metrics.

    Args:
      name: of the command, as one types it.
      command: what it runs.
    """

    @functools.wraps(command)
    def told(*args: Any, **settings: Any) -> int:
        began = time.monotonic()
        with contextlib.redirect_stdout(sys.stderr):
            status = command(*args, **settings)
        found: dict[str, Any] = {"command": f"jaxaroo {name}", "status": status}
        found["seconds"] = round(time.monotonic() - began, 3)
        print(dumps(found | _left_in(_out(args, settings))))
        return status

    return told


def inputs(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and paths of what a command reads, within nested settings too."""
    for key, value in settings.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from inputs({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
        elif key in INPUTS:
            each = value if isinstance(value, tuple | list) else (value,)
            yield from ((key, str(v)) for v in each if isinstance(v, str | Path) and not _named(str(v)))


# ----------------------------------------------------------------------------------------------------------- private
def _named(value: str) -> bool:
    """Whether it is a name of something that is no file: preset:tiny, builtin:arithmetic, the drafter `lookup`."""
    return ":" in value or value in ("lookup", "aded", "self", "none", "")


def _out(args: tuple[Any, ...], settings: Mapping[str, Any]) -> Path | None:
    """Where a command writes."""
    of_run = getattr(settings.get("settings"), "out", None)
    named = (settings.get(name) for name in ("out", "target", "folder"))
    return next((Path(x) for x in (of_run, *named, *args) if isinstance(x, str | Path)), None)


def _left_in(out: Path | None) -> dict[str, Any]:
    if out is None:
        return {}
    found: dict[str, Any] = {"out": str(out)}
    if (out / "model").is_dir():
        found["model"] = str(out / "model")
    if (metrics := out / "metrics.jsonl").is_file():
        lines = metrics.read_text(encoding="utf-8").splitlines()
        found |= {"last": json.loads(lines[-1])} if lines else {}
    return found


def _options(settings: Mapping[str, Any]) -> Any:
    """Of the kind of training; preference training has those of its loss beside."""
    if "loss" in settings:
        from ..train.preference import with_settings

        return with_settings(settings["options"], settings["loss"])
    return settings["options"]
