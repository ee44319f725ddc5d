"""What labelled tokens teach: the cross-entropy that judges and reward models have in common.

    L = - sum_t m_t [ y_t log sigmoid(z_t) + c (1 - y_t) log(1 - sigmoid(z_t)) ] / #tokens

z_t is what a head says of the state that has read the labelled token, y_t its label, 1 good, 0 bad or between, m_t the
weight of the row, c what bad tokens count beside good ones. The count is that of labelled tokens in the whole window.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..data import pipeline
from ..data.pipeline import Batch
from ..step import Term, Terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelledLossConfig:
    """What a token of each class counts."""

    negative_weight: float = 1.0  # c; a good token counts 1

    def __post_init__(self):
        if not 0 < self.negative_weight < float("inf"):
            raise ValueError(
                f"LabelledLossConfig.negative_weight: found {self.negative_weight}; expected a positive number."
            )


def labelled(
    logit: Float[Array, "B T"], batch: Batch, cfg: LabelledLossConfig = LabelledLossConfig()
) -> tuple[Terms, Terms]:
    """Terms and metrics from what a head says of every token.

    Returns:
      `cross_entropy`; and as metrics `accuracy`, the share of tokens found what they are at a threshold of 0.5 (a label
      above it is good), `recall_of_bad`, the share of bad tokens found bad there (0 in a window that has none), `good`
      and `probability`, the means of y and of sigmoid(z), and `brier`, that of (sigmoid(z) - y)^2.
    """
    y, counted = labels_of(batch), batch.mask.astype(jnp.float32)
    z = logit.astype(jnp.float32)
    value = y * jax.nn.softplus(-z) + cfg.negative_weight * (1 - y) * jax.nn.softplus(z)
    good, right = y > 0.5, (z > 0) == (y > 0.5)
    as_number = lambda x: x.astype(jnp.float32)
    return {"cross_entropy": Term(value, batch.weights, "token")}, {
        "accuracy": Term(as_number(right), counted, "token"),
        "recall_of_bad": Term(as_number(right), counted * as_number(~good), "bad_token"),
        "good": Term(y, counted, "token"),
        "probability": Term(jax.nn.sigmoid(z), counted, "token"),
        "brier": Term((jax.nn.sigmoid(z) - y) ** 2, counted, "token"),
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
        raise ValueError("labelled: found a batch without labels; expected one made from examples that have them.")
    return batch.labels
