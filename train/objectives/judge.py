"""A judge learns from labelled tokens which of them are good (Judge Decoding, 2501.19309).

    L = - sum_t m_t [ y_t log sigmoid(z_t) + c (1 - y_t) log(1 - sigmoid(z_t)) ] / #tokens        z_t = w . h_t + b

h_t is the target's last state, behind its final norm, at the labelled token's own position: the state that has read the
token, as the served rule sees it (`infer/speculative/verify.py`). y_t is the label, 1 good, 0 bad or between, m_t the
weight of the row, c what bad tokens count. The count is that of labelled tokens in the whole window. The target is
frozen: no gradient reaches it. The paper's class weights were not published; c = 1 weighs all tokens alike.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ...models.decoder import Params, Remat, forward
from ...models.heads import JudgeConfig, judge_logit
from ...sharding.rules import REPLICATED, Rules
from ..data import pipeline
from ..data.pipeline import Batch
from ..step import LossFn, Term, Terms
from .logprobs import segment_mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeLossConfig:
    """What a token of each class counts."""

    negative_weight: float = 1.0  # c; a good token counts 1

    def __post_init__(self):
        if not 0 < self.negative_weight < float("inf"):
            raise ValueError(
                f"JudgeLossConfig.negative_weight: found {self.negative_weight}; expected a positive number."
            )


def judge(logit: Float[Array, "B T"], batch: Batch, cfg: JudgeLossConfig = JudgeLossConfig()) -> tuple[Terms, Terms]:
    """Terms and metrics from what the judge says of every token.

    Returns:
      `cross_entropy`; and as metrics `accuracy`, the share of tokens found what they are at a threshold of 0.5 (a label
      above it is good), `recall_of_bad`, the share of bad tokens that are refused there (0 in a window that has none),
      and `probability`, the mean of sigmoid(z).
    """
    y, counted = labels_of(batch), batch.mask.astype(jnp.float32)
    z = logit.astype(jnp.float32)
    value = y * jax.nn.softplus(-z) + cfg.negative_weight * (1 - y) * jax.nn.softplus(z)
    good, right = y > 0.5, (z > 0) == (y > 0.5)
    as_number = lambda x: x.astype(jnp.float32)
    return {"cross_entropy": Term(value, batch.weights, "token")}, {
        "accuracy": Term(as_number(right), counted, "token"),
        "recall_of_bad": Term(as_number(right), counted * as_number(~good), "bad_token"),
        "probability": Term(jax.nn.sigmoid(z), counted, "token"),
    }


def count_units(batch: Batch) -> dict[str, Int[Array, ""]]:
    """The units of `pipeline.count_units`, and bad_token: those whose label is not above 0.5."""
    bad = jnp.sum(batch.mask & (labels_of(batch) <= 0.5), dtype=jnp.int32)
    return pipeline.count_units(batch) | {"bad_token": bad}


def labels_of(batch: Batch) -> Float[Array, "*M B T"]:
    """The labels of a batch that has some.

    Raises:
      ValueError: if it was made without.
    """
    if batch.labels is None:
        raise ValueError("judge: found a batch without labels; expected one made from examples that have them.")
    return batch.labels


def make_loss(
    cfg: JudgeConfig, loss_cfg: JudgeLossConfig = JudgeLossConfig(), *, rules: Rules = REPLICATED, remat: Remat = "none"
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
        return judge(judge_logit(params["head"], hidden), batch, loss_cfg)

    return loss
