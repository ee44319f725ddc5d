"""From tokens to sequences: sums over the completions of a batch whose examples are several sequences each.

An example of G sequences, such as the two of a pair, has G neighbouring segments in a row (`data/pipeline.py`). What is
found here has a place for every example that a row of T tokens could hold, T // G of them; `counted` says which are
there. Sums run over the tokens of completions, as the mask says, so neither prompts, padding nor the other sequences of
a packed row can enter.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..data import pipeline
from ..data.pipeline import Batch
from ..step import Term
from .logprobs import Scores
from .preference import Sums


class View(NamedTuple):
    """What an objective sees: the batch, and what policy and reference say of its targets."""

    batch: Batch
    parts: int  # G
    policy: Scores
    reference: Scores | None = None  # of the frozen model, without gradient; None if it was not run


def sequence_sum(x: Float[Array, "B T"], batch: Batch, parts: int) -> Float[Array, "n G"]:
    """Sums of x over the tokens of each completion, in float32; 0 where no sequence is."""
    kept = jnp.where(batch.mask, x.astype(jnp.float32), 0.0)
    return _by_example(kept, batch, parts, jax.ops.segment_sum)


def sequence_value(name: str, batch: Batch, parts: int) -> Float[Array, "n G"]:
    """A number that all tokens of a sequence have (`Batch.more`), once for each; 0 where no sequence is.

    Raises:
      ValueError: if the batch has no numbers of this name.
    """
    if batch.more is None or name not in batch.more:
        raise ValueError(f"sequence_value: found no {name!r} in the batch; expected examples that have it.")
    inside = batch.segments > 0
    found = _by_example(jnp.where(inside, batch.more[name], -jnp.inf), batch, parts, jax.ops.segment_max)
    return jnp.where(jnp.isfinite(found), found, 0.0)


def counted(batch: Batch, parts: int) -> Bool[Array, " n"]:
    """Which examples are there."""
    return jnp.all(sequence_sum(jnp.ones_like(batch.weights), batch, parts) > 0, axis=-1)


def example_weights(batch: Batch, parts: int) -> Float[Array, " n"]:
    """What each example counts: the weight of its row, 0 where none is."""
    weights = _by_example(jnp.where(batch.mask, batch.weights, 0.0), batch, parts, jax.ops.segment_max)
    return jnp.where(counted(batch, parts), jnp.max(weights, axis=-1), 0.0)


def part_of(batch: Batch, parts: int) -> Int[Array, "B T"]:
    """Which sequence of its example a token belongs to, from 0; -1 for padding."""
    return jnp.where(batch.segments > 0, (batch.segments - 1) % parts, -1)


def per_token(x: Float[Array, "n G"], batch: Batch, parts: int) -> Float[Array, "B T"]:
    """At every token the number of its sequence; 0 for padding."""
    B = batch.segments.shape[0]
    padded = jnp.pad(x.reshape(B, -1), ((0, 0), (1, 0)))  # segment 0
    return jnp.take_along_axis(padded, batch.segments, axis=1)


def all_sums(view: View, logp: Float[Array, "B T"] | None = None) -> Sums:
    """Sums of every sequence, [n, G]: from the reference that was run, else from numbers that the examples brought.

    Args:
      view: what is seen.
      logp: of the targets under the policy, if they are not to be those of the view.
    """
    batch, parts = view.batch, view.parts
    policy = sequence_sum(view.policy.logp if logp is None else logp, batch, parts)
    tokens = jnp.maximum(sequence_sum(jnp.ones_like(batch.weights), batch, parts), 1.0)
    if view.reference is not None:
        return Sums(policy, jax.lax.stop_gradient(sequence_sum(view.reference.logp, batch, parts)), tokens)
    if batch.more is not None and "reference" in batch.more:
        return Sums(policy, sequence_value("reference", batch, parts), tokens)
    return Sums(policy, None, tokens)


def side(sums: Sums, part: int | slice) -> Sums:
    """The sums of one sequence of each example, or of several."""
    return jax.tree.map(lambda x: x[:, part], sums)


def count_examples(parts: int) -> Callable[[Batch], dict[str, Int[Array, ""]]]:
    """A counting function for `make_train_step`.

    Returns:
      The units of `pipeline.count_units`; `example`; `first_token` and `last_token`, targets that count in the first
      sequence of an example and in the last, and `first_input`, all positions of the first.
    """

    def counts(window: Batch) -> dict[str, Int[Array, ""]]:
        found = pipeline.count_units(window)
        first = part_of(window, parts) == 0
        number = lambda where: jnp.sum(where, dtype=jnp.int32)
        return found | {
            "example": found["sequence"] // parts,
            "first_token": number(first & window.mask),
            "first_input": number(first),
            "last_token": number((part_of(window, parts) == parts - 1) & window.mask),
        }

    return counts


def per_example(value: Float[Array, " n"], view: View) -> Term:
    """A term of the loss with one value an example, weighted by its row."""
    return Term(value, example_weights(view.batch, view.parts), "example")


def measured(values: dict[str, Float[Array, " n"]], view: View) -> dict[str, Term]:
    """Metrics with one value an example: their means over examples, whatever rows weigh."""
    there = counted(view.batch, view.parts).astype(jnp.float32)
    return {name: Term(value, there, "example") for name, value in values.items()}


# ----------------------------------------------------------------------------------------------------------- private
def _by_example(x: Array, batch: Batch, parts: int, reduce: Callable[..., Array]) -> Array:
    """Reduce over every segment of every row: [B, T] -> [B * (T // G), G]."""
    places = x.shape[1] // parts * parts
    one = lambda row, segment: reduce(row, segment, num_segments=places + 1)[1:]
    return jax.vmap(one)(x, batch.segments).reshape(-1, parts)
