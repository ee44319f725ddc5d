"""What commands share: the error of a misused one, the types of their options, JSON, files that are gone on with."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

FloatType = Literal["float32", "bfloat16", "float16"]


class UsageError(Exception):
    """Arguments that do not go together."""


def dumps(value: Any) -> str:
    """JSON of settings and results, as one line."""

    def plain(x: Any) -> Any:
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return dataclasses.asdict(x)
        raise TypeError(f"{type(x).__name__} is not JSON")

    return json.dumps(value, ensure_ascii=False, default=plain)


def cut_half_line(path: Path) -> int:
    """Whole lines of a file, behind which nothing stands any more; a killed process may have left half a line."""
    with path.open("a+b") as file:
        file.seek(0)
        data = file.read()
        end = data.rfind(b"\n") + 1
        file.truncate(end)  # what is whole is not written anew, so that a stop here loses nothing
    return data[:end].count(b"\n")
