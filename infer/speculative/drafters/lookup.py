"""Prompt lookup: what followed the last few tokens when they stood in the text before.

No network and no state: the drafts are copied from the prompt or the answer so far. For the longest n whose last n
tokens occur earlier, the latest place with `drafts` tokens behind it is taken, or else the earliest, which has most.
Where nothing matches, nothing is drafted. (Saxena, prompt-lookup-decoding, which takes the earliest place that has all
of the tokens behind it, and verifies a dummy token where there is none.)
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ..loop import Context, Drafter
from ..tree import make_chain


@functools.lru_cache
def make_drafter(drafts: int = 10, longest: int = 3) -> Drafter:
    """Copy up to `drafts` tokens from behind the latest repetition of the last `longest` tokens, or of fewer."""

    def propose(target, params, state, context: Context):
        copied, valid = look_up(context.tokens, context.filled, drafts, longest)
        return make_chain(context.root, copied, valid), state, context.cache

    return Drafter(
        name="lookup",
        nodes=drafts + 1,
        depth=drafts,
        most=1,
        proposal="chosen",
        chain=True,
        chains=False,
        pruned=False,
        start_layer=0,
        collect=(),
        init=lambda target, params, context, features, chunk: (),
        propose=propose,
        commit=lambda target, params, state, context, verdict: state,
    )


def look_up(
    tokens: Int[Array, "B S"], filled: Int[Array, " B"], drafts: int, longest: int
) -> tuple[Int[Array, "B n"], Bool[Array, "B n"]]:
    """The tokens that followed the longest repetition of the last tokens, and which of them exist."""
    S = tokens.shape[1]
    place = jnp.arange(S)[None]
    take = lambda i: jnp.take_along_axis(tokens, i, axis=1, mode="clip")
    behind = jnp.zeros_like(filled)  # the first copied token's place; 0: none found, for a match has tokens before it
    for n in range(longest, 0, -1):  # place i matches if the n tokens before it are the last n
        match = (place >= n) & (place < filled[:, None])
        for j in range(1, n + 1):
            match &= take(jnp.broadcast_to(place - j, tokens.shape)) == take(filled[:, None] - j)
        whole = match & (place + drafts <= filled[:, None])
        latest = S - 1 - jnp.argmax(whole[:, ::-1], axis=1)
        earliest = jnp.argmax(match, axis=1)  # 0 if none does
        found = jnp.where(jnp.any(whole, axis=1), latest, earliest)
        behind = jnp.where(behind > 0, behind, found)
    at = behind[:, None] + jnp.arange(drafts)[None]
    return take(at), (behind > 0)[:, None] & (at < filled[:, None])
