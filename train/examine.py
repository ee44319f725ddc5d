"""What a run would be, without making it: its data read and checked, its state laid out in the abstract."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ..sharding.mesh import make_mesh
from .data.tokenise import Encoded
from .recipe import RECIPES
from .references import COLUMN
from .run import RunConfig, origin_of, read_examples, state_shapes

ROWS = 256  # that are tokenised, to say how long they are


def examine(kind: str, cfg: RunConfig, options: Any) -> dict[str, Any]:
    """Read and check all that a run would read but weights; nothing is written, and nothing of the state allocated.

    Args:
      kind: a key of `RECIPES`.
      cfg: settings of the run.
      options: those of this kind.

    Returns:
      Rows and their tokens (means over the first `ROWS`, before they are cut), updates, trained and all parameters,
      mesh, and the bytes of the state that the fullest device would hold.

    Raises:
      ValueError: for settings, data or a model that cannot be used, as the run itself would.
    """
    recipe, origin = RECIPES[kind], origin_of(cfg)
    what = recipe.trainable(origin, options, cfg.lora if cfg.adapters == "lora" else None)
    examples = recipe.prepare(read_examples(cfg, recipe.layout(options), True), options)
    encode, mesh = recipe.encoder(origin, options), make_mesh(cfg.mesh)
    known = {} if recipe.scored(origin, options) is None else {COLUMN: [0.0] * recipe.parts(options)}  # of no row yet
    few = [encode({**examples[i], **known}) for i in range(min(ROWS, len(examples)))]
    rows = [*itertools.chain.from_iterable((e,) if isinstance(e, Encoded) else e for e in few)]
    tx = recipe.optimizer(origin, options, cfg.optimizer, cfg.steps)
    with jax.set_mesh(mesh):
        like = state_shapes(cfg, origin, what, tx, mesh)
    count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
    mean = lambda values: round(sum(values) / max(len(few), 1), 1)
    return {
        "rows": len(examples),
        "tokens_a_row": mean([len(e.ids) for e in rows]),
        "learned_tokens_a_row": mean([int(sum(e.scored)) for e in rows]),
        "longer_than_max_length": sum(len(e.ids) > cfg.batch.max_length for e in rows),
        "updates": cfg.steps,
        "rows_an_update": cfg.batch.size,
        "trained_parameters": count(like.params),
        "frozen_parameters": count(like.frozen),
        "mesh": dict(mesh.shape),
        "state_bytes_a_device": _bytes_a_device(like),
    }


# ----------------------------------------------------------------------------------------------------------- private
def _bytes_a_device(like: Any) -> int:
    """Of all arrays of a state: what one device holds. Rules cut evenly, so all hold the same."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * _width(x.dtype) for x in jax.tree.leaves(like))


def _width(dtype: Any) -> int:
    """Bytes of an element; a random key is two words."""
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize
