"""Kangaroo's adapter learns what the whole target says of the next token (Liu et al., 2404.18911, section 3.2).

    L = - sum_t m_t sum_x softmax(head f_t)(x) log softmax(head y_t)(x) / #tokens

f_t is the target's last state, behind its final norm, and y_t the adapter's answer to the state that enters layer
`exit_layer`, both at the same position, from one forward pass over the data's own text: soft labels of all tokens of
completions, no feature loss, no noise. m is the weight of the row, and the count is that of the whole window, as in
`sft.py`. The target is frozen, head included: no gradient reaches it.

The two distributions are compared over tiles of tokens, whose logits are computed again for the gradient, so that of
`[B, T, V]` only a tile is ever held, twice.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...models import kangaroo
from ...models.decoder import DecoderConfig, Params, Remat, forward, lm_head
from ...models.kangaroo import KangarooConfig
from ...sharding.rules import REPLICATED, Rules
from ..data.pipeline import Batch
from ..step import LossFn, Term, Terms
from .logprobs import segment_mask


class Agreement(NamedTuple):
    """How a draft's distribution q stands to the target's p at every position, prompts and padding included."""

    cross_entropy: Float[Array, "B T"]  # -sum_x p log q, in nats
    overlap: Float[Array, "B T"]  # sum_x min(p, q): how likely a draft drawn from q is accepted
    same_mode: Float[Array, "B T"]  # 1 where both find the same token likeliest: a greedy draft is accepted


def kangaroo_loss(agreement: Agreement, batch: Batch) -> tuple[Terms, Terms]:
    """Terms and metrics; `acceptance` is expected at temperature 1, `agreement` at 0."""
    counted = batch.mask.astype(jnp.float32)
    return {"soft_nll": Term(agreement.cross_entropy, batch.weights, "token")}, {
        "acceptance": Term(agreement.overlap, counted, "token"),
        "agreement": Term(agreement.same_mode, counted, "token"),
    }


def compare(
    cfg: DecoderConfig,
    target: Params,
    final: Float[Array, "B T D"],
    draft: Float[Array, "B T D"],
    *,
    tile: int = 1024,
    rules: Rules = REPLICATED,
) -> Agreement:
    """Compare what the head makes of the target's states and of the draft's, about `tile` tokens at a time.

    Rows stay whole, so that a sharded batch stays where it is: a tile is a few positions of every row. Gradients reach
    `draft` alone.
    """
    B, T, _ = final.shape
    per_row = max(1, min(tile // B, T))
    number = -(-T // per_row)
    target, final = jax.lax.stop_gradient((target, final))

    @jax.checkpoint
    def one(states: tuple[jax.Array, jax.Array]) -> Agreement:
        z, w = (lm_head(cfg, target, state, rules=rules) for state in states)
        p, log_q = jax.nn.softmax(z, axis=-1), jax.nn.log_softmax(w, axis=-1)
        return Agreement(
            cross_entropy=-jnp.sum(p * log_q, axis=-1),
            overlap=jnp.sum(jnp.minimum(p, jnp.exp(log_q)), axis=-1),
            same_mode=(jnp.argmax(z, axis=-1) == jnp.argmax(w, axis=-1)).astype(jnp.float32),
        )

    pad = lambda x: jnp.pad(x, ((0, 0), (0, number * per_row - T), (0, 0)))
    split = lambda x: jnp.moveaxis(pad(x).reshape(B, number, per_row, -1), 1, 0)
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(B, number * per_row)[:, :T]
    return jax.tree.map(join, jax.lax.map(one, (split(final), split(draft))))


def make_loss(cfg: KangarooConfig, *, rules: Rules = REPLICATED, remat: Remat = "none") -> LossFn:
    """The objective with its forward pass, for `make_train_step`.

    Its parameters are `{"drafter": ..., "target": ...}`, the target's layers stacked. `remat` is of the adapter's
    backward pass; the target has none.
    """

    def loss(params: Params, batch: Batch, key) -> tuple[Terms, Terms]:
        del key  # nothing is random here
        target = jax.lax.stop_gradient(params["target"])
        final, draft = run(cfg, params["drafter"], target, batch, rules=rules, remat=remat)
        return kangaroo_loss(compare(cfg.target, target, final, draft, rules=rules), batch)

    return loss


def run(
    cfg: KangarooConfig,
    drafter: Params,
    target: Params,
    batch: Batch,
    *,
    rules: Rules = REPLICATED,
    remat: Remat = "none",
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """The target's last states and the adapter's, for packed or padded rows; a token sees its own segment alone."""
    positions, mask = batch.positions, segment_mask(batch)
    out = forward(
        cfg.target,
        target,
        batch.tokens,
        positions,
        mask,
        key_positions=positions,
        collect=(cfg.exit_layer,),
        rules=rules,
    )

    def adapt(params: Params, x: jax.Array) -> jax.Array:
        return kangaroo.forward(cfg, params, x, positions, mask, rules=rules).hidden

    if remat != "none":
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        adapt = jax.checkpoint(adapt, policy=dots if remat == "dots" else None)
    return out.hidden, adapt(drafter, out.collected[0])
