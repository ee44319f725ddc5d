"""What commands share: the error of a misused one, the types of their options, JSON on standard output."""

import dataclasses
import json
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
