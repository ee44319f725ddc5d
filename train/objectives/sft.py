"""Supervised fine-tuning: the likelihood of completions given their prompts.

    L = - sum_t w_t log p(y_t | x, y_<t) / #tokens

The sum runs over the tokens of completions, end tokens included; w is the weight of the row, 1 unless the data says
otherwise. The count is that of the whole window, so a long completion weighs more than a short one, as in TRL.
"""

from ...models.decoder import DecoderConfig, Params, Remat
from ...sharding.rules import REPLICATED, Rules
from ..data.pipeline import Batch
from ..step import LossFn, Term, Terms
from .logprobs import Scores, score_targets


def sft(policy: Scores, batch: Batch) -> tuple[Terms, Terms]:
    """Terms and metrics; `nll` is in nats a token, `entropy` what the model spreads over the next token.

    `mean_token_accuracy` is the share of tokens that it would have written itself.
    """
    ones = batch.mask.astype(policy.entropy.dtype)
    found = {"entropy": policy.entropy, "mean_token_accuracy": policy.greedy}
    metrics = {name: Term(value, ones, "token") for name, value in found.items() if value is not None}
    return {"nll": Term(-policy.logp, batch.weights, "token")}, metrics


def make_loss(cfg: DecoderConfig, *, rules: Rules = REPLICATED, remat: Remat = "none") -> LossFn:
    """The objective with its forward pass, for `make_train_step`."""

    def loss(params: Params, batch: Batch, key) -> tuple[Terms, Terms]:
        del key  # nothing is random here
        return sft(score_targets(cfg, params, batch, rules=rules, remat=remat), batch)

    return loss
