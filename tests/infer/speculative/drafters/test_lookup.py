"""Oracle: a loop over the text. Identity with plain decoding, and repetition that pays."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxaroo.infer.speculative import verify
from jaxaroo.infer.speculative.drafters.lookup import look_up, make_drafter

S = 24


def oracle(text, drafts, longest):
    for n in range(longest, 0, -1):
        places = [i for i in range(n, len(text)) if text[i - n : i] == text[-n:]]
        if places:
            whole = [i for i in places if i + drafts <= len(text)]
            place = whole[-1] if whole else places[0]
            return text[place : place + drafts]
    return []


@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=S), min_size=4, max_size=4))
def test_copies_what_a_loop_over_the_text_finds(texts):
    tokens = np.full((4, S), 1, np.int32)  # what stands behind the text must not matter
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    copied, valid = look_up(jnp.asarray(tokens), jnp.array([len(t) for t in texts]), 4, 3)
    found = [c[v].tolist() for c, v in zip(np.asarray(copied), np.asarray(valid), strict=True)]
    assert found == [oracle(text, 4, 3) for text in texts]


@pytest.mark.parametrize("name", ["llama", "window"])
@pytest.mark.slow
def test_output_is_that_of_plain_decoding(bench, name):
    bench.check_identity(make_drafter(6), verify.coupled(), name=name)


@pytest.mark.slow
def test_one_row_alone(bench):
    bench.check_identity(make_drafter(6), verify.coupled(), only=2)


@pytest.mark.slow
def test_text_that_repeats_itself_takes_fewer_steps(bench):
    """A tiny greedy model soon repeats itself, and then copies pay."""
    plain = bench.plain()
    ran = bench.drafted(make_drafter(6), verify.coupled())
    steps = ran.tally.emitted[0].sum()
    assert len(plain.lines[0]) - len(bench.prompts[0]) - 1 > 1.3 * steps
