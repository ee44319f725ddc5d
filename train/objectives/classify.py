"""What networks of images learn: the likelihood of labels, and what a teacher says of them.

    float    CE                                                                      ResNet (1512.03385)
    joint    CE_b                                              at the width b of this turn (2502.01199)
             (1 - kappa) CE_b + kappa T^2 KL(p_T(teacher) || p_T(student_b))         with a teacher (`distill.py`)
    ghost    - sum q log p - sum p_teacher log p                                     GhostNetV3 (2404.11202)

CE is -log p(label), and q = (1 - e) [label] + e / classes are smoothed labels; where nobody teaches, the term of the
teacher is missing. Each also moves the running statistics (`train/statistics.py`), and measures how often the greatest
logit is the label's. The unit is an image.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from ...models import ghostnet, resnet
from ...models.decoder import Params
from ...models.ghostnet import GhostNetConfig
from ...models.resnet import ResNetConfig
from ..data.images import ImageBatch
from ..precision.distill import DistillConfig, compare, kappa_at
from ..statistics import follow
from ..step import LossFn, Term, Terms


def float_loss(cfg: ResNetConfig) -> LossFn:
    """Of a float network, for `{"model", "stats"}`."""

    def loss(params: Params, batch: ImageBatch, key: Array) -> tuple[Terms, Terms]:
        del key
        out = resnet.forward(cfg, params["model"], params["stats"], batch.images, train=True)
        return _terms(_nll(out.logits, batch.labels), out.logits, batch, follow(params["stats"], out.stats))

    return loss


def joint_loss(cfg: ResNetConfig, distill: DistillConfig | None = None) -> LossFn:
    """At the width of a turn, for `{"model", "scales", "stats"}` and, of a float teacher, `"teacher"`: its stored form.

    Args:
      cfg: of several widths.
      distill: who teaches. The network itself does so with the batch's statistics, like its student.
    """

    def loss(params: Params, batch: ImageBatch, key: Array, bits: Int32[Array, ""]) -> tuple[Terms, Terms]:
        del key

        def at(params: Params, bits: Array) -> resnet.Output:
            low = resnet.at_width(cfg, params["model"], params["scales"], bits)
            return resnet.forward(cfg, low, params["stats"], batch.images, bits, params["scales"], train=True)

        out, master = at(params, bits), cfg.quant.master
        value = _nll(out.logits, batch.labels)
        if distill is not None:
            if distill.teacher == "fp":
                teacher = resnet.logits(dataclasses.replace(cfg, bits=()), params["teacher"], batch.images)
            else:
                still: Any = jax.lax.stop_gradient(params)  # as `compare` would, but without a backward pass
                widest = lambda: at(still, jnp.int32(master)).logits
                itself = lambda: jax.lax.stop_gradient(out.logits)  # the widest has nobody to learn from: kappa is 0
                teacher = jax.lax.cond(bits < master, widest, itself)
            kappa = kappa_at(bits, master, distill)
            kl = compare(out.logits, teacher, batch.labels, distill.temperature).kl
            value = (1.0 - kappa[None]) * value + (kappa * distill.temperature**2)[None] * kl
        return _terms(value, out.logits, batch, follow(params["stats"], out.stats))

    return loss


def ghost_loss(cfg: GhostNetConfig, smoothing: float = 0.1, teacher: ResNetConfig | None = None) -> LossFn:
    """Of a network with branches, for `{"model", "stats"}` and, if somebody teaches, `"teacher"`: its stored form.

    Args:
      cfg: what learns.
      smoothing: e, what labels leave to all classes.
      teacher: of the network that teaches, at its highest width.
    """

    def loss(params: Params, batch: ImageBatch, key: Array) -> tuple[Terms, Terms]:
        del key
        out = ghostnet.forward(cfg, params["model"], params["stats"], batch.images, train=True)
        logp = jax.nn.log_softmax(out.logits, axis=-1)
        value = (1 - smoothing) * _nll(out.logits, batch.labels) - smoothing * jnp.mean(logp, axis=-1)
        if teacher is not None:
            says = jax.lax.stop_gradient(resnet.logits(teacher, params["teacher"], batch.images))
            value = value - jnp.sum(jax.nn.softmax(says, axis=-1) * logp, axis=-1)
        return _terms(value, out.logits, batch, follow(params["stats"], out.stats))

    return loss


def count_images(window: ImageBatch) -> dict[str, Int32[Array, ""]]:
    """How many images a window holds."""
    return {"image": jnp.sum(window.mask, dtype=jnp.int32)}


# ----------------------------------------------------------------------------------------------------------- private
def _nll(logits: Float[Array, "B classes"], labels: Int32[Array, " B"]) -> Float[Array, " B"]:
    logp = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(logp, labels[:, None], axis=-1)[:, 0]


def _terms(
    value: Float[Array, " B"], logits: Float[Array, "B classes"], batch: ImageBatch, moved: Float[Array, ""]
) -> tuple[Terms, Terms]:
    weight = batch.mask.astype(jnp.float32)
    right = (jnp.argmax(logits, -1) == batch.labels).astype(jnp.float32)
    return {"nll": Term(value + moved[None], weight, "image")}, {"accuracy": Term(right, weight, "image")}
