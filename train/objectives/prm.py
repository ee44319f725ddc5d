"""A reward model learns which steps are right (Math-Shepherd, 2312.08935; Athena-PRM, 2506.09532).

z_t, the reward model's log-odds at the separator behind a step, learns the cross-entropy of `labelled.py`: the mean
over labelled steps of the window, soft labels as they are. The whole decoder is trained, and its value head if it has
one; with token pairs the two rows of the LM head are read as any other weights. What is trained is what gradients are
taken of: a run may leave the decoder as it is.

An outcome model is the same with one label, at the last step. Where its labels are outcomes and steps are labelled
later, training goes on from it (ORM initialisation).
"""

import jax
from jaxtyping import Array, Float

from ...models.decoder import Params, Remat, forward
from ...models.reward import RewardConfig, step_logits, surprisals
from ...sharding.rules import REPLICATED, Rules
from ..data.pipeline import Batch
from ..step import LossFn, Terms
from .labelled import LabelledLossConfig, labelled
from .logprobs import segment_mask


def make_loss(
    cfg: RewardConfig,
    loss_cfg: LabelledLossConfig = LabelledLossConfig(),
    *,
    rules: Rules = REPLICATED,
    remat: Remat = "none",
) -> LossFn:
    """The objective with its forward pass, for `make_train_step`; its parameters are those of a `RewardModel`."""

    def loss(params: Params, batch: Batch, key) -> tuple[Terms, Terms]:
        del key  # nothing is random here
        return labelled(token_logits(cfg, params, batch, rules=rules, remat=remat), batch, loss_cfg)

    return loss


def token_logits(
    cfg: RewardConfig, params: Params, batch: Batch, *, rules: Rules = REPLICATED, remat: Remat = "none"
) -> Float[Array, "B T"]:
    """The log-odds at every token of packed or padded rows, in float32; a token sees its own segment alone."""
    positions, mask = batch.positions, segment_mask(batch)
    hidden: jax.Array = forward(
        cfg.target,
        params["model"],
        batch.tokens,
        positions,
        mask,
        key_positions=positions,
        remat=remat,
        rules=rules,
    ).hidden
    surprise = surprisals(cfg, params, hidden, batch.tokens, positions) if cfg.surprisal else None
    return step_logits(cfg, params, hidden, surprise)
