"""Kangaroo's adapter learns what the whole target says of the next token (Liu et al., 2404.18911, section 3.2).

    L = - sum_t m_t sum_x softmax(head f_t)(x) log softmax(head y_t)(x) / #tokens

f_t is the target's last state, behind its final norm, and y_t the adapter's answer to the state that enters layer
`exit_layer`, both at the same position, from one forward pass over the data's own text: soft labels of all tokens of
completions, no feature loss, no noise. m is the weight of the row, and the count is that of the whole window, as in
`sft.py`. The target is frozen, head included: no gradient reaches it.

The two distributions are compared tile by tile (`agreement.py`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...models import kangaroo
from ...models.decoder import Params, Remat, forward
from ...models.kangaroo import KangarooConfig
from ...sharding.rules import REPLICATED, Rules
from ..data.pipeline import Batch
from ..step import LossFn, Term, Terms
from .agreement import Agreement, compare
from .logprobs import output_table, segment_mask


def kangaroo_loss(agreement: Agreement, batch: Batch) -> tuple[Terms, Terms]:
    """Terms and metrics; `acceptance` is expected at temperature 1, `agreement` at 0."""
    counted = batch.mask.astype(jnp.float32)
    return {"soft_nll": Term(agreement.cross_entropy, batch.weights, "token")}, {
        "acceptance": Term(agreement.acceptance, counted, "token"),
        "agreement": Term(agreement.same_mode, counted, "token"),
    }


def make_loss(cfg: KangarooConfig, *, rules: Rules = REPLICATED, remat: Remat = "none") -> LossFn:
    """The objective with its forward pass, for `make_train_step`.

    Its parameters are `{"drafter": ..., "target": ...}`, the target's layers stacked. `remat` is of the adapter's
    backward pass; the target has none.
    """

    def loss(params: Params, batch: Batch, key) -> tuple[Terms, Terms]:
        del key  # nothing is random here
        target = jax.lax.stop_gradient(params["target"])
        final, draft = run(cfg, params["drafter"], target, batch, rules=rules, remat=remat)
        said = compare(final, output_table(cfg.target, target), draft, tile=1024, rules=rules)
        return kangaroo_loss(said, batch)

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
