"""How a drafter turns logits into drafts, and whose noise it uses.

`mode`        the likeliest tokens, whatever the temperature. Chosen: any rule may judge them.
`shared`      the tokens that come first under the noise the target itself will use at that position. Under the rule
              `coupled` the output is that of plain decoding whatever is drafted, so looking is allowed; a drafter that
              nearly agrees with the target then nearly always finds the token the target will draw, at any
              temperature. Chosen, too: what is drafted is a function of the text and the request's seed.
`independent` / `without_replacement` drawn with noise of the drafter's own, for the rules that compare p with q.

A row's bias, penalties, temperature and cuts apply to the drafter's logits as to the target's, except under `mode`.
All noise depends on a request's seed, its sample's index, the token's position and the node alone: what a row drafts
does not depend on its neighbours. No draw is looked at twice: a position that is drafted again has not been decided
by the first draft's noise.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..sampling import Counts, SamplingArrays, gumbel, warp

Draw = Literal["mode", "shared", "independent", "without_replacement"]
DRAFT_STREAM = 0x5EED_D4AF  # folded in where plain decoding folds in a position: no text is so long


def draft_logits(
    logits: Float[Array, "B n V"], sampling: SamplingArrays, counts: Counts, draw: Draw
) -> Float[Array, "B n V"]:
    """What drafts are drawn from: the logits themselves for `mode`, else with every processor of the row."""
    if draw == "mode":
        return logits
    return jax.vmap(warp, in_axes=(1, None, None), out_axes=1)(logits, sampling, counts)


def draft_noise(
    sampling: SamplingArrays, position: Int[Array, " B"], nodes: int, vocab: int, draw: Draw, first: int = 0
) -> Float[Array, "B n V"]:
    """Gumbel noise for the tokens at `position` behind `nodes` nodes; none for greedy rows, and none for `mode`.

    The target's own noise is the same for all nodes. `first` numbers nodes that would draw at the same position.
    """
    shape = (position.shape[0], nodes, vocab)
    if draw == "mode":
        return jnp.zeros(shape)

    def shared(seed, sample_index, at):
        return jnp.broadcast_to(gumbel(seed, sample_index, at, vocab)[None], (nodes, vocab))

    def own(seed, sample_index, at):
        base = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample_index), DRAFT_STREAM)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.fold_in(base, at), first + jnp.arange(nodes))
        return jax.vmap(lambda key: jax.random.gumbel(key, (vocab,)))(keys)

    def noise():
        drawn = jax.vmap(shared if draw == "shared" else own)(sampling.seed, sampling.sample_index, position)
        return jnp.where(sampling.temperature[:, None, None] > 0, drawn, 0.0)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), noise, lambda: jnp.zeros(shape))
