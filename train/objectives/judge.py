"""A judge learns from labelled tokens which of them are good (Judge Decoding, 2501.19309).

z_t = w . h_t + b learns the cross-entropy of `labelled.py`. h_t is the target's last state, behind its final norm, at
the labelled token's own position: the state that has read the token, as the served rule sees it
(`infer/speculative/verify.py`). The target is frozen: no gradient reaches it. The paper's class weights were not
published; by default all tokens weigh alike.
"""

import jax

from ...models.decoder import Params, Remat, forward
from ...models.heads import JudgeConfig, judge_logit
from ...sharding.rules import REPLICATED, Rules
from ..data.pipeline import Batch
from ..step import LossFn, Terms
from .labelled import LabelledLossConfig, labelled
from .logprobs import segment_mask


def make_loss(
    cfg: JudgeConfig,
    loss_cfg: LabelledLossConfig = LabelledLossConfig(),
    *,
    rules: Rules = REPLICATED,
    remat: Remat = "none",
) -> LossFn:
    """The objective with the target's forward pass, for `make_train_step`.

    Its parameters are `{"head": ..., "target": ...}`, the target's layers stacked. There is nothing for `remat` to
    save: the backward pass is that of one product.
    """
    del remat

    def loss(params: Params, batch: Batch, key) -> tuple[Terms, Terms]:
        del key  # nothing is random here
        target = jax.lax.stop_gradient(params["target"])
        positions, mask = batch.positions, segment_mask(batch)
        hidden = forward(cfg.target, target, batch.tokens, positions, mask, key_positions=positions, rules=rules).hidden
        return labelled(judge_logit(params["head"], hidden), batch, loss_cfg)

    return loss
