"""Plain text as training data: the verse that ships with the package, cut into random windows of bytes.

`paterson.txt` holds three poems by A. B. Paterson (1864-1941), published 1889 to 1903 and in the public domain.
"""

from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import numpy as np

from .pipeline import Batch


def read_verse() -> str:
    """The text that the quick start trains on, about 9 kB."""
    return resources.files(__name__.rpartition(".")[0]).joinpath("paterson.txt").read_text(encoding="utf-8")


def windows(ids: Sequence[int], batch: int, length: int, seed: int, bos_id: int) -> Iterator[Batch]:
    """Endless batches of random windows, [1, batch, length]; the same seed gives the same batches.

    Each begins with `bos_id`, as prompts will, and goes on with `length` targets from anywhere in the text.

    Raises:
      ValueError: if the text is shorter than one window.
    """
    text = np.asarray(ids, np.int32)
    if len(text) < length:
        raise ValueError(f"windows: {len(text)} tokens of text; expected at least a window, {length}.")
    rng = np.random.default_rng(seed)
    while True:
        start = rng.integers(0, len(text) - length + 1, size=batch)
        targets = text[start[:, None] + np.arange(length)][None]
        tokens = np.concatenate([np.full((1, batch, 1), bos_id, np.int32), targets[..., :-1]], axis=-1)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        ones = np.ones_like(tokens)
        fields: Any = (tokens, targets, positions, ones, ones.astype(bool), ones.astype(np.float32))
        yield Batch(*fields)
