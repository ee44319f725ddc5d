"""Double Rounding (2502.01199): the likelihood of completions, at the width of this turn, of a model that has several.

    L_b = sft at width b                                                        without a teacher
    L_b = (1 - kappa) sft_b + kappa T^2 KL(p_T(teacher) || p_T(student_b))      with one, `precision/distill.py`

The weights at a width are `multi_precision.fake_quantise_tree`, whose gradient reaches the float weights and the scales
straight through; the decoder runs on them unchanged. The teacher is the model itself at its highest width, as it is in
this very update, or the float model it began as.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from ...models.decoder import DecoderConfig, Params, Remat
from ...models.multi_precision import QuantRules, fake_quantise_tree
from ...sharding.rules import REPLICATED, Rules
from ..data.pipeline import Batch
from ..precision.distill import DistillConfig, compare_hidden, distill, kappa_at
from ..step import LossFn, Terms
from .logprobs import hidden_states, score_targets
from .sft import sft


def make_loss(
    cfg: DecoderConfig,
    quant: QuantRules,
    master: int,
    teaching: DistillConfig | None = None,
    *,
    rules: Rules = REPLICATED,
    remat: Remat = "none",
) -> LossFn:
    """The objective with its forward pass, for `make_train_step` with turns of one width a layer.

    It sees `{"model": weights, "scales": scales}`, and of a float teacher `"teacher": weights` as well.

    Args:
      cfg: the decoder.
      quant: what is quantised, and how.
      master: the highest width.
      teaching: who teaches, and how much; None is the data alone.
      rules: where activations lie on a mesh.
      remat: what the backward pass recomputes.
    """

    def loss(params: Params, batch: Batch, key: Array, bits: Int32[Array, " L"]) -> tuple[Terms, Terms]:
        del key  # widths were drawn for the whole turn
        low = fake_quantise_tree(params["model"], params["scales"], bits, quant)
        if teaching is None:
            return sft(score_targets(cfg, low, batch, rules=rules, remat=remat), batch)
        states = lambda weights: hidden_states(cfg, weights, batch, rules=rules, remat=remat)
        head = lambda weights: weights["embed"] if cfg.tie_embeddings else weights["head"]
        student = states(low)
        if teaching.teacher == "fp":
            teacher, teacher_head = states(params["teacher"]), head(params["teacher"])
        else:
            still: Any = jax.lax.stop_gradient(params)
            widest = lambda: states(fake_quantise_tree(still["model"], still["scales"], master, quant))
            alone = lambda: jax.lax.stop_gradient(student)  # the widest has nobody to learn from: kappa is 0
            teacher = jax.lax.cond(jnp.any(bits < master), widest, alone)
            teacher_head = head(still["model"])
        found = compare_hidden(student, teacher, head(low), teacher_head, batch.targets, teaching, rules=rules)
        return distill(found, batch, kappa_at(bits, master, teaching), teaching)

    return loss
