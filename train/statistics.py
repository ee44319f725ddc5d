"""Running statistics of batch norms in a training state.

Nobody trains them, but they have to be saved, skipped with a bad step and averaged over micro-batches like what is
trained. So they stand among the parameters, under `stats`, and a term of value 0 has in them the gradient old - new,
which their part of the optimiser takes off as it is: what is left is new. The gradient is counted in units of 2^-20,
exact in floats, so that the norm of the whole gradient remains that of the weights'.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ..models.decoder import Params

UNIT = 2.0**-20


def follow(old: Params, new: Params) -> Float[Array, ""]:
    """0, with the gradient (old - new) 2^-20 in `old`; to be added to the loss of each element."""
    gap = jax.tree.map(lambda o, n: jnp.sum(o * jax.lax.stop_gradient((o - n) * UNIT)), old, new)
    total = jnp.sum(jnp.stack(jax.tree.leaves(gap)))
    return total - jax.lax.stop_gradient(total)


def with_statistics(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner` for all but `stats`, and for these what `follow` means."""
    wide = optax.with_extra_args_support(inner)

    def rest(tree: Any) -> Any:
        return {name: part for name, part in tree.items() if name != "stats"}

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        others, state = wide.update(rest(updates), state, rest(params), **extra)
        moved = jax.tree.map(lambda g: -g / UNIT, updates["stats"])
        return {"stats": moved} | dict(others), state  # type: ignore[arg-type]

    return optax.GradientTransformationExtraArgs(lambda params: wide.init(rest(params)), update)
