"""How near a drafter's distribution comes to its target's, token by token: what all objectives of drafters compare.

    C_t = - sum_x p_t(x) log q_t(x)      A_t = sum_x min(p_t(x), q_t(x))      p = softmax(head f), q the drafter's

C is the loss, A how often a draft from q is accepted at temperature 1. Logits are made tile by tile (`../tiles.py`): no
`[B, T, V]` is held, each device makes those of its own tokens, and what the head has of other devices is fetched once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...sharding.rules import REPLICATED, Rules
from ..tiles import fetched, over_tiles

LogQ = Callable[[Any, Float[Array, "V D"], Rules], Float[Array, "R each V"]]


class Agreement(NamedTuple):
    """Of every token, prompts and padding included; float32."""

    cross_entropy: Float[Array, "B T"]  # in nats; the only one that carries a gradient
    acceptance: Float[Array, "B T"]  # sum min(p, q)
    same_mode: Float[Array, "B T"]  # 1 where both find the same token likeliest: a greedy draft is accepted


def log_probs(
    hidden: Float[Array, "R each D"], head: Float[Array, "V D"], rules: Rules = REPLICATED
) -> Float[Array, "R each V"]:
    """Log-probabilities that a frozen head makes of hidden states, float32."""
    head = jax.lax.stop_gradient(head).astype(hidden.dtype)
    z = jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(rules.constrain(z, "batch", "seq", "vocab"))


def compare(
    wanted: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    drafted: Any,
    log_q: LogQ = log_probs,
    *,
    tile: int = 256,
    rules: Rules = REPLICATED,
) -> Agreement:
    """Hold guessed distributions against softmax(head wanted), tile by tile, forward and backward.

    Args:
      wanted: the target's states; theirs to stop, if nothing shall reach them.
      head: the target's output embedding; no gradient reaches it.
      drafted: a tree of arrays `[B, T, ...]` from which `log_q` makes log-probabilities.
      log_q: a tile of `drafted`, the head and rules -> log-probabilities, float32.
      tile: tokens of a device whose logits are held at a time: a few [tile, V] of float32.
      rules: where tokens and vocabulary lie on a mesh.
    """
    head = fetched(jax.lax.stop_gradient(head).astype(wanted.dtype), rules)

    def one(part: Any, rules: Rules) -> Agreement:
        log_p, guess = log_probs(part[0], head, rules), log_q(part[1], head, rules)
        p = jnp.exp(log_p)
        overlap = jnp.sum(jnp.minimum(p, jnp.exp(jax.lax.stop_gradient(guess))), axis=-1)
        same = jnp.argmax(log_p, axis=-1) == jnp.argmax(guess, axis=-1)
        return Agreement(-jnp.sum(p * guess, axis=-1), overlap, same.astype(jnp.float32))

    return over_tiles(one, (wanted, drafted), tile, rules)
