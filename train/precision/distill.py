"""A narrow model learns from the same model at its full width, or from the float model it came from.

    L_b = (1 - kappa) CE + kappa T^2 KL(p_T(teacher) || p_T(student_b))         p_T = softmax(logits / T)

CE is the likelihood of the batch's own targets, as in `objectives/sft.py`. The teacher gets no gradient. With the
teacher "inplace", the model at its master's width on the same batch, kappa is 0 where the student has that width; with
"fp", a frozen float model, it holds at every width. The Double Rounding paper (2502.01199) reports results with
distillation but gives no recipe: this is the usual one (Hinton et al., 1503.02531).

Letters: B rows, T tokens (and the temperature), D width, V vocabulary.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from ...sharding.rules import REPLICATED, Rules
from ..data.pipeline import Batch
from ..step import Term, Terms
from ..tiles import fetched, over_tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Who teaches, and how much."""

    teacher: Literal["inplace", "fp"] = "inplace"
    kappa: float = 0.5  # what the teacher counts; the rest is the data
    temperature: float = 1.0
    tile: int = 1024  # tokens of a device whose logits are held at a time

    def __post_init__(self):
        if self.teacher not in ("inplace", "fp"):
            raise ValueError(f"DistillConfig.teacher: found {self.teacher!r}; expected 'inplace' or 'fp'.")
        if not 0 <= self.kappa <= 1:
            raise ValueError(f"DistillConfig.kappa: found {self.kappa}; expected a number from 0 to 1.")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"DistillConfig.temperature: found {self.temperature}; expected a positive number.")
        if self.tile < 1:
            raise ValueError(f"DistillConfig.tile: found {self.tile}; expected at least 1 token.")


class Compared(NamedTuple):
    """Of every target, float32, in nats; prompts and padding included: terms mask."""

    nll: Float[Array, "*n"]  # -log p(target) of the student, at temperature 1
    kl: Float[Array, "*n"]  # KL(teacher || student), both at the temperature T, not yet times T^2


def distill(
    found: Compared, batch: Batch, kappa: float | Float[Array, ""], cfg: DistillConfig = DistillConfig()
) -> tuple[Terms, Terms]:
    """Terms and metrics: one value a token, counted as in `objectives/sft.py`.

    Args:
      found: of the student's pass over the batch.
      batch: its weights and mask.
      kappa: of this step's width, `kappa_at`.
      cfg: the temperature.
    """
    kappa = jnp.asarray(kappa, jnp.float32)
    value = (1.0 - kappa) * found.nll + (kappa * cfg.temperature**2) * found.kl
    ones = batch.mask.astype(jnp.float32)
    measured = {"nll": Term(found.nll, ones, "token"), "kl": Term(found.kl, ones, "token")}
    return {"distill": Term(value, batch.weights, "token")}, measured


def kappa_at(bits: int | Int32[Array, "*L"], master: int, cfg: DistillConfig = DistillConfig()) -> Float[Array, ""]:
    """What the teacher counts at a width: nothing where it would teach itself.

    Args:
      bits: of the student; with one a layer, the teacher counts if any is below the master's.
      master: width of the teacher "inplace".
      cfg: who teaches.
    """
    lower = jnp.any(jnp.asarray(bits) < master)
    return jnp.where(lower | (cfg.teacher == "fp"), cfg.kappa, 0.0).astype(jnp.float32)


def compare(
    student: Float[Array, "*n V"], teacher: Float[Array, "*n V"], targets: Int[Array, "*n"], temperature: float = 1.0
) -> Compared:
    """From logits. The teacher's vocabulary is the student's."""
    if student.shape != teacher.shape or targets.shape != student.shape[:-1]:
        found = f"student {student.shape}, teacher {teacher.shape}, targets {targets.shape}"
        raise ValueError(f"compare: {found}; expected [..., V], [..., V], [...].")
    z, w = student.astype(jnp.float32), jax.lax.stop_gradient(teacher).astype(jnp.float32)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(z, axis=-1), targets[..., None], axis=-1)[..., 0]
    log_q, log_p = (jax.nn.log_softmax(x / temperature, axis=-1) for x in (z, w))
    return Compared(-chosen, jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def compare_hidden(
    student: Float[Array, "B T D"],
    teacher: Float[Array, "B T E"],
    head: Float[Array, "V D"],
    teacher_head: Float[Array, "V E"],
    targets: Int[Array, "B T"],
    cfg: DistillConfig = DistillConfig(),
    *,
    rules: Rules = REPLICATED,
) -> Compared:
    """The same from states behind the final norm; no `[B, T, V]` is ever held, forward or backward.

    Args:
      student: states of the narrow model.
      teacher: of the wide one, whose own width E may be another.
      head: of the student.
      teacher_head: the same array where both are one model.
      targets: the token that each state predicts.
      cfg: temperature and tile.
      rules: how logits lie on devices.
    """
    frozen = jax.lax.stop_gradient(teacher_head).astype(teacher.dtype)
    tables = fetched(head, rules), fetched(frozen, rules)

    def logits(
        h: Array, table: Array, rules: Rules
    ) -> Array:  # cast here, so that a head's gradient is its own dtype's
        z = jnp.einsum("btd,vd->btv", h, table.astype(h.dtype), preferred_element_type=jnp.float32)
        return rules.constrain(z, "batch", "seq", "vocab")

    def one(part: tuple[Array, Array, Array], rules: Rules) -> Compared:
        z, w = (logits(h, table, rules) for h, table in zip(part[:2], tables, strict=True))
        return compare(z, w, part[2], cfg.temperature)

    return over_tiles(one, (student, teacher, targets), cfg.tile, rules)
