"""One job on many hosts that know nothing of each other: each does its part of the rows, and parts are put together.

Parts are contiguous and follow from their number alone, so a part can be done again, anywhere, and gives the same rows:
what is put together is what one host would have written, to the byte. A part that is under way has another name than
one that is whole.
"""

import dataclasses
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .output import UsageError

_COUNTS = (("JAXAROO_PROCESS_ID", "JAXAROO_NUM_PROCESSES"), ("SLURM_PROCID", "SLURM_NTASKS"))


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `index` of `count`."""

    index: int
    count: int

    def of(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Its rows."""
        return rows[self.index * len(rows) // self.count : (self.index + 1) * len(rows) // self.count]

    def path(self, out: Path) -> Path:
        """Where they go: `rows.jsonl` becomes `rows-00002-of-00008.jsonl`."""
        return out.with_name(f"{out.stem}-{self.index:05d}-of-{self.count:05d}{out.suffix}")

    def unfinished(self, out: Path) -> Path:
        """Where they stand while they are written."""
        path = self.path(out)
        return path.with_name(f"{path.stem}.unfinished{path.suffix}")


def shard_of(text: str | None, env: Mapping[str, str] = os.environ) -> Shard | None:
    """`2/8`, or `auto`: what SLURM or JAXAROO_PROCESS_ID and JAXAROO_NUM_PROCESSES say.

    Raises:
      UsageError: for anything else.
    """
    if text is None:
        return None
    given = text
    if text == "auto":
        told = (f"{env[index]}/{env[count]}" for index, count in _COUNTS if index in env and count in env)
        if (found := next(told, None)) is None:
            names = ", or ".join(" and ".join(pair) for pair in _COUNTS)
            raise UsageError(f"--shard auto: found none of {names}; expected both of a pair, or --shard INDEX/COUNT.")
        text = found
    match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if match is None or not int(match[1]) < int(match[2]):
        where = f"--shard {given}" + (f" ({text})" if given != text else "")
        raise UsageError(f"{where}: expected INDEX/COUNT with an index from 0 below the count, such as 2/8, or auto.")
    return Shard(int(match[1]), int(match[2]))


def label_merge(*, out: Path, remove: bool = False) -> int:
    """Put the parts of a job together that `--shard` wrote: `rows-00000-of-00008.jsonl` and so on become `rows.jsonl`.

    Nothing is written unless all parts are there and whole.

    Args:
      out: the --out that every part was given.
      remove: remove the parts afterwards.
    """
    parts = parts_of(out)
    partial = out.with_name(f".{out.name}.partial")
    try:
        with partial.open("wb") as file:
            for part in parts:
                with part.open("rb") as rows:
                    shutil.copyfileobj(rows, file)
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    if remove:
        for part in parts:
            part.unlink()
    with out.open("rb") as file:
        print(f"wrote {out}: {sum(1 for _ in file)} rows of {len(parts)} parts", file=sys.stderr)
    return 0


def parts_of(out: Path) -> list[Path]:
    """All parts of a job, in order.

    Raises:
      FileNotFoundError: if one is missing or not whole.
      ValueError: if there are parts of several jobs.
    """
    found: dict[int, set[int]] = {}
    shape = re.compile(rf"{re.escape(out.stem)}-(\d{{5}})-of-(\d{{5}}){re.escape(out.suffix)}")
    for path in out.parent.glob(f"{_glob_of(out.stem)}-*"):
        if match := shape.fullmatch(path.name):
            found.setdefault(int(match[2]), set()).add(int(match[1]))
    if not found:
        raise FileNotFoundError(f"label merge: found no part of {out}; expected what --shard wrote, beside it.")
    if len(found) > 1:
        several = ", ".join(map(str, sorted(found)))
        raise ValueError(f"label merge: found parts of jobs of {several} of {out}; expected one. Remove the others.")
    [(count, indices)] = found.items()
    if missing := sorted({*range(count)} - indices):
        where = [Shard(i, count) for i in missing[:5]]
        under = [s.index for s in where if s.unfinished(out).exists()]
        more = f" ({', '.join(map(str, under))} under way or stopped)" if under else ""
        raise FileNotFoundError(
            f"label merge: {len(missing)} of {count} parts of {out} are not whole: {_listed(missing)}{more}; expected "
            "all. Do them, with the command and --shard of each."
        )
    return [Shard(i, count).path(out) for i in range(count)]


# ----------------------------------------------------------------------------------------------------------- private
def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")


def _glob_of(text: str) -> str:
    """A pattern that matches this text alone."""
    return re.sub(r"([*?\[])", r"[\1]", text)
