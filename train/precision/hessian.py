"""How sensitive a layer is: the trace of its block of the Hessian, by random signs (HAWQ-V2, 1911.03852; Hutchinson).

    z_i = +1 or -1, each with probability 1/2       x_l = <z_l, (H z)_l>        E x_l = tr H_ll

    Var x_l = 4 sum_{i < j in l} H_ij^2 + sum_{i in l, j not in l} H_ij^2

What couples one layer with another has mean zero, so one product H z serves every layer; it costs some variance, which
the error that is returned includes. H z is the forward derivative of the gradient, and H is never formed.

Measure at a trained float model: elsewhere the Hessian is no measure of what a small change costs, and traces may even
be negative. Everything is float32. Memory is that of a gradient, twice: let the loss rematerialise.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ...models.decoder import DecoderConfig, Params
from ...models.multi_precision import QuantRules, path_name, quantised_paths
from ..data.pipeline import Batch
from ..objectives import sft
from .layers import by_layer

Blocks = dict[str, Float[Array, "..."]]  # group -> [L], or a scalar outside layers


class Traces(NamedTuple):
    """Estimates for each group, one a layer `[L]`, or a scalar outside layers."""

    trace: Blocks
    error: Blocks  # standard error of the trace
    samples: Int32[Array, ""]  # how many products H z it took


def hessian_trace(
    loss: Callable[..., Float[Array, ""]],
    params: Params,
    key: Array,
    *,
    groups: Mapping[str, str] | None = None,
    samples: int = 50,
    tolerance: float = 1e-2,
    least: int = 10,
    batches: Any = None,
) -> Traces:
    """Trace of the Hessian of a loss for each group of parameters, layer by layer.

    Sampling ends when the running mean, of all groups together, moves by less than `tolerance` of itself.

    Args:
      loss: of the parameters; with `batches` of the parameters and one batch.
      params: where the Hessian is taken, layers stacked or as a tuple.
      key: of the signs.
      groups: name -> regular expression for whole paths like `layers/attn/q`. A leaf belongs to the first that matches;
        those that belong to none are held still. None is one group for every float leaf, named by its path.
      samples: at most so many products, each for all groups.
      tolerance: 0 takes all samples.
      least: samples before which nothing ends: two may agree by chance.
      batches: every leaf with a leading axis; the Hessian is the mean over it, one batch in memory at a time.

    Raises:
      ValueError: if a group matches no leaf, or both leaves in layers and others.
    """
    if samples < 1 or not tolerance >= 0:
        raise ValueError(f"hessian_trace: samples={samples}, tolerance={tolerance}; expected 1 or more, 0 or more.")
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    group_of = _assign(leaves, groups)
    chosen = {i: x.astype(jnp.float32) for i, (path, x) in enumerate(leaves) if path_name(path) in group_of}

    def at(moved: dict[int, Array], *batch: Any) -> Float[Array, ""]:
        return loss(structure.unflatten([moved.get(i, leaf) for i, (_, leaf) in enumerate(leaves)]), *batch)

    def product(z: dict[int, Array]) -> dict[int, Array]:
        one = lambda *batch: jax.jvp(jax.grad(lambda moved: at(moved, *batch)), (chosen,), (z,))[1]
        if batches is None:
            return one()
        add = lambda total, batch: (jax.tree.map(jnp.add, total, one(batch)), None)
        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, z), batches)
        return jax.tree.map(lambda t: t / jax.tree.leaves(batches)[0].shape[0], total)

    def sample(key: Array) -> Blocks:
        z = {i: jax.random.rademacher(jax.random.fold_in(key, i), x.shape, jnp.float32) for i, x in chosen.items()}
        Hz = product(z)
        parts = by_layer(structure.unflatten([z[i] * Hz[i] if i in z else None for i in range(len(leaves))]))
        found: Blocks = {}
        for name, group in group_of.items():
            found[group] = found[group] + parts[name] if group in found else parts[name]
        return found

    def more(state: tuple[Array, Blocks, Blocks, Array]) -> Array:
        count, _, _, moved = state
        return (count < samples) & ((count < least) | ~(moved < tolerance))

    def step(state: tuple[Array, Blocks, Blocks, Array]) -> tuple[Array, Blocks, Blocks, Array]:
        count, old, squares, _ = state  # Welford's recurrence: squares of distances from the mean, without cancellation
        x, n = sample(jax.random.fold_in(key, count)), count + 1
        mean = jax.tree.map(lambda m, x: m + (x - m) / n.astype(jnp.float32), old, x)
        squares = jax.tree.map(lambda s, x, m, o: s + (x - o) * (x - m), squares, x, mean, old)
        change = jax.tree.map(jnp.subtract, mean, old)
        return n, mean, squares, _norm(change) / jnp.maximum(_norm(mean), jnp.finfo(jnp.float32).tiny)

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), jax.eval_shape(sample, key))
    count, mean, squares, _ = jax.lax.while_loop(more, step, (jnp.int32(0), zeros, zeros, jnp.float32(jnp.inf)))
    n = count.astype(jnp.float32)
    error = jax.tree.map(lambda s: jnp.where(n > 1, jnp.sqrt(s / (n * jnp.maximum(n - 1, 1.0))), jnp.inf), squares)
    return Traces(mean, error, count)


def matrix_traces(
    config: DecoderConfig, params: Params, rules: QuantRules, batches: Batch, key: Array, *, samples: int = 50
) -> Traces:
    """How sensitive each quantised matrix of a decoder is in each layer: `hessian_trace` of the mean loss of a token.

    Args:
      config: the decoder.
      params: its float weights, layers stacked.
      rules: which matrices.
      batches: every leaf with a leading axis of batches.
      key: of the signs.
      samples: products with the Hessian at most.
    """
    objective = sft.make_loss(config, remat="full")

    def loss(params: Params, batch: Batch) -> Float[Array, ""]:
        term = objective(params, batch, key)[0]["nll"]
        return jnp.sum(term.value * term.weight) / jnp.maximum(jnp.sum(batch.mask), 1)

    groups = {name: re.escape(name) for name in quantised_paths(params, rules)}
    return hessian_trace(loss, params, key, groups=groups, samples=samples, batches=batches)


# ----------------------------------------------------------------------------------------------------------- private
def _assign(leaves: list[tuple[Any, Any]], groups: Mapping[str, str] | None) -> dict[str, str]:
    """Path of each leaf that belongs to a group -> its group."""
    names = dict.fromkeys(path_name(path) for path, x in leaves if jnp.issubdtype(x.dtype, jnp.floating))
    if groups is None:
        return {name: name for name in names}
    first = {name: next((g for g, rule in groups.items() if re.fullmatch(rule, name)), None) for name in names}
    chosen = {name: group for name, group in first.items() if group is not None}
    for group, rule in groups.items():
        inside = {name.startswith("layers/") for name in chosen if chosen[name] == group}
        if not inside:
            near = ", ".join(difflib.get_close_matches(rule, names, n=3, cutoff=0.0))
            raise ValueError(
                f"hessian_trace: group {group!r} has no leaf; expected a regular expression for whole paths that no "
                f"earlier group matches. The nearest to {rule!r} are {near}."
            )
        if len(inside) == 2:
            raise ValueError(
                f"hessian_trace: group {group!r} is {rule!r}; expected leaves in layers, or others, not both."
            )
    return chosen


def _norm(blocks: Blocks) -> Float[Array, ""]:
    return jnp.sqrt(sum((jnp.sum(x * x) for x in blocks.values()), start=jnp.float32(0)))
