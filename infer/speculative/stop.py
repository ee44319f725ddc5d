"""When to stop drafting. A rule is asked after every drafted token, or level of a tree, whether another is worth it.

`fixed`            never stops: every step drafts as many as the drafter's static maximum.
`confidence`       stops once the drafter's likeliest token has no more than a threshold's probability (Kangaroo,
                   2404.18911; its paper says `<=`, its code `<`).
`acceptance_head`  stops once a small head finds it likely that some draft so far will be refused (SpecDec++,
                   2405.19715).

A rule only ends a draft; what is drafted is kept and verified, also the token after which it stopped. Dropping a drawn
token for its own probability would bias the output. Every row stops for itself, so the draft of a row does not depend
on its neighbours. Thresholds and weights are traced parameters: changing them compiles nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ...models.heads import acceptance_logits


class StopRule(NamedTuple):
    """Two pure functions; `params` is whatever the rule documents."""

    name: str
    init: Callable[[int], Any]  # rows -> carry, every leaf with a leading axis of rows
    update: Callable[[Any, Any, Array, Array, Array], tuple[Any, Array]]
    # (params, carry, step [], top1_prob [B], hidden [B, D]) -> carry, stop [B]
    # step: the number of the newest draft, from 1; top1_prob: what its proposal gave the likeliest token, in float32;
    # hidden: the drafter's last state that it was drawn from, which has not read it


def fixed() -> StopRule:
    """Draft up to the drafter's maximum; no parameters."""
    return _FIXED


def confidence() -> StopRule:
    """Stop after a token (or level) of which the drafter was not sure: `top1_prob <= eta`.

    Its parameters are `{"eta": []}`. In Kangaroo eta is 0.6 for chains and 0.4 for trees.
    """
    return _CONFIDENCE


def acceptance_head() -> StopRule:
    """Stop when `1 - prod_j p_j > threshold`, with p_j the head's probability that draft j will be accepted.

    The head reads the drafter's state that has read draft j; the state that draft k is drawn from has read draft k - 1.
    So what is known of the drafts lags by one: nothing is asked after the first, and the newest is verified without
    having been assessed. At least two are drafted.

    Its parameters are those of the head in `models/heads.py`, `{"blocks": {"weight": [n, D, D], "bias": [n, D]},
    "head": {"weight": [2, D], "bias": [2]}}`, and `"threshold": []`.
    """
    return _ACCEPTANCE_HEAD


def acceptance(params: Any, hidden: Float[Array, "B D"]) -> Float[Array, " B"]:
    """How likely the head of `models/heads.py` finds it that what each state read last is accepted; in float32."""
    return jax.nn.softmax(acceptance_logits(params, hidden), axis=-1)[:, 1]


# ----------------------------------------------------------------------------------------------------------- private
def _never(params: Any, carry: tuple, step: Int[Array, ""], top1_prob: Float[Array, " B"], hidden: Array):
    return carry, jnp.zeros(top1_prob.shape, bool)


def _unsure(params: Any, carry: tuple, step: Int[Array, ""], top1_prob: Float[Array, " B"], hidden: Array):
    return carry, top1_prob <= params["eta"]


def _refused(
    params: Any, all_accepted: Float[Array, " B"], step: Int[Array, ""], top1_prob: Float[Array, " B"], hidden: Array
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    assessed = step > 1  # the state behind the first draft has read the root alone
    all_accepted = jnp.where(assessed, all_accepted * acceptance(params, hidden), all_accepted)
    return all_accepted, assessed & (1 - all_accepted > params["threshold"])


_FIXED = StopRule("fixed", lambda batch: (), _never)
_CONFIDENCE = StopRule("confidence", lambda batch: (), _unsure)
_ACCEPTANCE_HEAD = StopRule("acceptance head", lambda batch: jnp.ones(batch, jnp.float32), _refused)
