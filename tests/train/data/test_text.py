"""The verse that ships, and windows cut from it."""

import numpy as np
import pytest

from jaxaroo.train.data.text import read_verse, windows


def test_the_verse_ships_with_the_package():
    verse = read_verse()
    assert "There was movement at the station" in verse
    assert verse.isascii()
    assert len(verse) > 8000


def test_windows_are_runs_of_the_text_and_the_same_for_the_same_seed():
    ids = np.arange(50) * 7
    first, again, other = (windows(ids, 4, 10, seed, bos_id=3) for seed in (1, 1, 2))
    starts = set()
    for _ in range(60):
        batch = next(first)
        assert batch.tokens.shape == (1, 4, 10)
        assert batch.mask.all()
        assert (batch.weights == 1).all()
        assert (batch.segments == 1).all()
        np.testing.assert_array_equal(batch.tokens[..., 0], 3)
        np.testing.assert_array_equal(batch.tokens[..., 1:], batch.targets[..., :-1])
        np.testing.assert_array_equal(batch.positions, np.arange(10)[None, None].repeat(4, 1))
        np.testing.assert_array_equal(np.diff(batch.targets, axis=-1), 7)
        np.testing.assert_array_equal(batch.targets, next(again).targets)
        starts |= {*batch.targets[0, :, 0] // 7}
    assert starts == set(range(41))  # every window can be drawn, the last one included
    assert not np.array_equal(next(windows(ids, 4, 10, 1, 3)).targets, next(other).targets)


@pytest.mark.errors
def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="9 tokens of text; expected at least a window, 10"):
        next(windows(range(9), 1, 10, 0, 3))
