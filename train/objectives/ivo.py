"""A value model learns what a text is worth, from any of its tokens (IVO, Iterative Value Function Optimization,
2503.02368).

    L = sum_t m_t (V_t - R)^2 / #tokens        V_t = sigmoid(z_t)

z_t is the log-odds of a reward model at token t of an answer, and R the return of the whole answer, undiscounted: 1 if
it was right, 0 if not, or the mean over several answers that share the prefix. V then estimates the chance that the
policy, from here on, ends right: E[R | text up to t] minimises L. Rounds alternate: decode guided by V (`ivo` of
`infer/guided/value_guided.py`), see which answers were right, and fit V to these.

Of the paper the abstract is known: Monte-Carlo returns, on-policy rounds, token-level guidance. Squared error and the
sigmoid are ours.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...models.decoder import Params, Remat
from ...models.reward import RewardConfig
from ...sharding.rules import REPLICATED, Rules
from ..data.pipeline import Batch
from ..step import LossFn, Term, Terms
from .labelled import labels_of
from .prm import token_logits


def ivo(logit: Float[Array, "B T"], batch: Batch) -> tuple[Terms, Terms]:
    """Terms and metrics from the log-odds of every token; `return` and `value` are means over the tokens that count."""
    y, counted = labels_of(batch), batch.mask.astype(jnp.float32)
    value = jax.nn.sigmoid(logit.astype(jnp.float32))
    return {"squared_error": Term((value - y) ** 2, batch.weights, "token")}, {
        "return": Term(y, counted, "token"),
        "value": Term(value, counted, "token"),
    }


def make_loss(cfg: RewardConfig, *, rules: Rules = REPLICATED, remat: Remat = "none") -> LossFn:
    """The objective with its forward pass, for `make_train_step`; its parameters are those of a `RewardModel`."""

    def loss(params: Params, batch: Batch, key) -> tuple[Terms, Terms]:
        del key  # nothing is random here
        return ivo(token_logits(cfg, params, batch, rules=rules, remat=remat), batch)

    return loss
