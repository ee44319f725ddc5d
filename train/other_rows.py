"""Rows that bring something of other rows along: an answer to another prompt, a row to retain."""

import bisect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Examples = Sequence[Mapping[str, Any]]


class Mismatched:
    """Rows for KTO: each brings an answer to another prompt, to be put behind its own.

    Rows of one prompt often stand together; the answer is that of as many rows further on, so that each has its turn.
    """

    def __init__(self, examples: Examples):
        """Of rows of layout `unpaired`, of two prompts at least; all are read once."""
        known: dict[str, int] = {}
        ids = [known.setdefault(json.dumps(examples[i]["prompt"]), i) for i in range(len(examples))]
        if len(known) < 2:
            raise ValueError(
                f"train preference: {len(known)} prompt in {len(examples)} rows for kto; expected at least 2, to "
                "mismatch answers. --loss apo_zero_unpaired does without."
            )
        ends = [i + 1 for i in range(len(ids)) if i + 1 == len(ids) or ids[i] != ids[i + 1]]
        self._examples, self._others = examples, np.empty(len(ids), np.int64)
        for begin, end in zip([0, *ends], ends, strict=False):
            for i in range(begin, end):
                other = (i + end - begin) % len(ids)
                while ids[other] == ids[i]:  # at most twice: where the last row and the first are of one prompt
                    other = ends[bisect.bisect_right(ends, other)] % len(ids)
                self._others[i] = other

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Row `i`, with `mismatched`."""
        other = self._examples[int(self._others[i])]
        return {**self._examples[i], "mismatched": other["completion"]}


class ForgetAndRetain:
    """Rows to forget, each with a row to retain under `retain`; rows kept for evaluation are left out."""

    def __init__(self, examples: Examples):
        """Of rows of layout `unlearn`, some of both splits."""
        rows = [(i, examples[i]) for i in range(len(examples))]
        self._examples = examples
        self._forget = [i for i, row in rows if row["split"] == "forget" and not row.get("eval")]
        self._retain = [i for i, row in rows if row["split"] == "retain" and not row.get("eval")]
        if not self._forget or not self._retain:
            raise ValueError(
                f"train unlearn: {len(self._forget)} rows to forget and {len(self._retain)} to retain; expected some "
                "of both, apart from those that are kept for evaluation."
            )

    def __len__(self) -> int:
        return max(len(self._forget), len(self._retain))

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Both go round, the shorter list again, so that every row has its turn."""
        kept = self._examples[self._retain[i % len(self._retain)]]
        return {**self._examples[self._forget[i % len(self._forget)]], "retain": dict(kept)}
