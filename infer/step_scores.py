"""How good every step of a solution is, by a reward model: one causal forward pass, however many steps there are.

`score` is the jitted part; `score_solutions` renders, sorts, pads and batches. A solution's scores do not depend on
what shares its batch, nor on padding.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from ..models.decoder import Params, forward
from ..models.reward import RewardConfig, RewardModel, render_steps, step_logits, surprisals
from ..models.tokenizer import Tokenizer
from ..sharding.rules import REPLICATED, Rules

SHORTEST = 32  # least padded length of a row, doubled up to the longest solution


class Solution(NamedTuple):
    """What is scored: what was asked, and the steps of an answer, the final one included."""

    prompt: Any  # text or messages
    steps: Sequence[str]


@functools.partial(jax.jit, static_argnames=("cfg", "rules"))
def score(
    cfg: RewardConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    ends: Int[Array, "B S"],
    rules: Rules = REPLICATED,
) -> Float[Array, "B S"]:
    """Probability that each step is right.

    Args:
      cfg: of the reward model.
      params: its parameters, layers stacked or as a tuple.
      tokens: solutions as `models.reward.render_steps` gives them; padded on the right with anything.
      ends: where the separators stand.
      rules: where activations lie on a mesh.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    hidden = forward(cfg.target, params["model"], tokens, positions, rules=rules).hidden
    at_ends = lambda x: jnp.take_along_axis(x, ends[..., None], axis=1, mode="clip")
    surprise = at_ends(surprisals(cfg, params, hidden, tokens, positions)) if cfg.surprisal else None
    return jax.nn.sigmoid(step_logits(cfg, params, at_ends(hidden), surprise))


def score_solutions(
    model: RewardModel,
    tokenizer: Tokenizer,
    solutions: Sequence[Solution],
    *,
    batch: int = 16,
    mesh: Mesh | None = None,
    rules: Rules = REPLICATED,
    progress: bool = False,
) -> list[list[float]]:
    """Score every step of every solution.

    Args:
      model: whose parameters lie where `mesh` and `rules` say, if they are given.
      tokenizer: its own.
      solutions: those without steps get no scores.
      batch: solutions in one forward pass; a multiple of the devices that share a batch.
      mesh: devices to spread batches over.
      rules: how.
      progress: show a bar.

    Returns:
      For each solution the probabilities that its steps are right, in their order.

    Raises:
      ValueError: for a solution longer than the model's positions.
    """
    if batch < 1:
        raise ValueError(f"score_solutions: batch={batch}; expected at least 1.")
    rendered = []
    for i, solution in enumerate(solutions):
        found = render_steps(tokenizer, solution.prompt, solution.steps, model.config.text)
        if len(found[0]) > (most := model.config.target.max_positions):
            raise ValueError(
                f"score_solutions: solution {i} has {len(found[0])} tokens; expected at most the model's {most} "
                "positions. Shorten the prompt or the steps."
            )
        rendered.append(found)
    scores: list[list[float]] = [[] for _ in solutions]
    order = sorted((i for i, (_, ends) in enumerate(rendered) if ends), key=lambda i: -len(rendered[i][0]))
    spread = lambda x: x if mesh is None else jax.device_put(x, NamedSharding(mesh, rules.spec("batch", None)))
    with tqdm(total=len(order), desc="score", unit="solution", disable=None if progress else True) as bar:
        for part in (order[i : i + batch] for i in range(0, len(order), batch)):
            length = max(SHORTEST, 1 << (len(rendered[part[0]][0]) - 1).bit_length())
            steps = 1 << (max(len(rendered[i][1]) for i in part) - 1).bit_length()
            tokens, ends = np.zeros((batch, length), np.int32), np.zeros((batch, steps), np.int32)
            for row, i in enumerate(part):
                for array, values in zip((tokens, ends), rendered[i], strict=True):
                    array[row, : len(values)] = values
            found = np.asarray(score(model.config, model.params, spread(tokens), spread(ends), rules))
            for row, i in enumerate(part):
                scores[i] = found[row, : len(rendered[i][1])].tolist()
            bar.update(len(part))
    return scores
