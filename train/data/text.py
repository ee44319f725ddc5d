"""Plain text as training data: the verse that ships with the package, cut into random windows of bytes.

`paterson.txt` holds three poems by A. B. Paterson (1864-1941), published 1889 to 1903 and in the public domain.
"""

from collections.abc import Iterator, Sequence
from importlib import resources

import numpy as np


def read_verse() -> str:
    """The text that the quick start trains on, about 9 kB."""
    return resources.files(__name__.rpartition(".")[0]).joinpath("paterson.txt").read_text(encoding="utf-8")


def windows(ids: Sequence[int], batch: int, length: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches of random windows, int32 of shape [batch, length + 1]; the same seed gives the same batches.

    Raises:
      ValueError: if the text is shorter than one window.
    """
    text = np.asarray(ids, np.int32)
    if len(text) <= length:
        raise ValueError(f"windows: {len(text)} tokens of text; expected more than the window, {length}.")
    rng = np.random.default_rng(seed)
    while True:
        start = rng.integers(0, len(text) - length, size=batch)
        yield text[start[:, None] + np.arange(length + 1)]
