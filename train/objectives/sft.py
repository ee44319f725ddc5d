"""Supervised fine-tuning: the likelihood of completions given their prompts.

    L = - sum_t w_t log p(y_t | x, y_<t) / #tokens

The sum runs over the tokens of completions, end tokens included; w is the weight of the row, 1 unless the data says
otherwise. The count is that of the whole window, so a long completion weighs more than a short one, as in TRL.
"""

import jax.numpy as jnp

from ...models.decoder import DecoderConfig, Params, Remat
from ...sharding.rules import REPLICATED, Rules
from ..data.pipeline import Batch
from ..step import LossFn, Term, Terms
from .logprobs import Scores, score_targets


def sft(policy: Scores, batch: Batch) -> tuple[Terms, Terms]:
    """Terms and metrics; `nll` is in nats a token."""
    return {"nll": Term(-policy.logp, batch.weights, "token")}, token_metrics(policy, batch)


def token_metrics(policy: Scores, batch: Batch) -> dict[str, Term]:
    """Means over tokens that count: `entropy`, what the model spreads over the next one, in nats; and, under TRL's
    name, `mean_token_accuracy`, the share that it would have written itself, where that is known."""
    ones = batch.mask.astype(jnp.float32)
    found = {"entropy": policy.entropy, "mean_token_accuracy": policy.greedy}
    return {name: Term(value, ones, "token") for name, value in found.items() if value is not None}


def make_loss(cfg: DecoderConfig, *, rules: Rules = REPLICATED, remat: Remat = "none") -> LossFn:
    """The objective with its forward pass, for `make_train_step`."""

    def loss(params: Params, batch: Batch, key) -> tuple[Terms, Terms]:
        del key  # nothing is random here
        return sft(score_targets(cfg, params, batch, rules=rules, remat=remat), batch)

    return loss
