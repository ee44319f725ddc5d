"""Jakiro's objective: EAGLE's for each of two guesses (2502.06282, section 3).

    L = (V_main + c V_con) + 0.1 (P_main + c P_con)        c = 0.5

V and P as in `eagle.py`. f_main of pair t is held against f_{t+1} with weight m_t, and f_con of the same pair one
further, against f_{t+2} with weight m_{t+1}: it guesses x_{t+3} without having seen x_{t+2}.

The mixture (`models/jakiro.py`, ours) has one guess: P is the cross-entropy to q = sum_b w_b softmax(head f_b), and
V = sum_b w_b mean_D SmoothL1(f_b, f_{t+1}): each branch by its share, since each may be handed on as a feature.

Unit, noise, masks and tiles as in `eagle.py`; the second guess misses the targets at the first two places of a segment.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...models.decoder import Params, Remat
from ...models.jakiro import JakiroConfig, forward, forward_mixture, mixture_log_probs
from ...sharding.rules import REPLICATED, Rules
from ..data.pipeline import Batch
from ..step import LossFn, Terms
from .agreement import log_probs
from .eagle import EagleLossConfig, guess_terms, rematerialised, see_target


@dataclasses.dataclass(frozen=True, kw_only=True)
class JakiroLossConfig:
    """How the guesses are weighed."""

    guess: EagleLossConfig = EagleLossConfig()  # of each
    contrast_weight: float = 0.5  # c; 0 leaves the second guess out, and the mixture has none

    def __post_init__(self):
        if not 0 <= self.contrast_weight < float("inf"):
            raise ValueError(f"JakiroLossConfig.contrast_weight: found {self.contrast_weight}; expected at least 0.")


def jakiro(
    main: Float[Array, "B T D"],
    contrast: Float[Array, "B T D"],
    features: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    batch: Batch,
    cfg: JakiroLossConfig = JakiroLossConfig(),
    *,
    rules: Rules = REPLICATED,
) -> tuple[Terms, Terms]:
    """Terms and metrics from two guesses a position; arguments as in `eagle.eagle`.

    Returns:
      EAGLE's terms and metrics for the main guess and, under names that end in `_contrast`, for the other.
    """

    def of(guessed: Float[Array, "B T D"], ahead: int) -> tuple[Terms, Terms]:
        return guess_terms(guessed, guessed, features, head, batch, cfg.guess, ahead=ahead, rules=rules)

    terms, metrics = of(main, 1)
    if not cfg.contrast_weight:
        return terms, metrics
    more, measured = of(contrast, 2)
    scaled = {f"{name}_contrast": t._replace(weight=cfg.contrast_weight * t.weight) for name, t in more.items()}
    return {**terms, **scaled}, {**metrics, **{f"{name}_contrast": t for name, t in measured.items()}}


def jakiro_mixture(
    branches: Float[Array, "B T E D"],
    log_weights: Float[Array, "B T E"],
    features: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    batch: Batch,
    cfg: EagleLossConfig = EagleLossConfig(),
    *,
    rules: Rules = REPLICATED,
) -> tuple[Terms, Terms]:
    """EAGLE's terms and metrics for a mixture of branches; arguments else as in `eagle.eagle`."""

    def log_q(part: tuple[jax.Array, jax.Array], head: Float[Array, "V D"], rules: Rules) -> Float[Array, "R each V"]:
        (R, each, E, D), log_w = part[0].shape, part[1]
        of_branch = log_probs(part[0].reshape(R, each * E, D), head, rules).reshape(R, each, E, -1)
        return mixture_log_probs(log_w[..., None] + of_branch)

    more = dict(ahead=1, log_q=log_q, share=jnp.exp(log_weights), rules=rules)
    return guess_terms(branches, (branches, log_weights), features, head, batch, cfg, **more)  # type: ignore[arg-type]


def make_loss(
    cfg: JakiroConfig,
    loss_cfg: JakiroLossConfig = JakiroLossConfig(),
    *,
    rules: Rules = REPLICATED,
    remat: Remat = "none",
) -> LossFn:
    """The objective with its two forward passes, for `make_train_step`; `params` holds `drafter` and `target`."""
    contrastive = cfg.kind == "contrastive"
    of_kind = forward if contrastive else forward_mixture
    run = rematerialised(lambda *args: of_kind(cfg, *args, rules=rules)[:2], remat)

    def loss(params: Params, batch: Batch, key: jax.Array) -> tuple[Terms, Terms]:
        seen = see_target(cfg.target, params["target"], batch, loss_cfg.guess.noise, key, rules=rules)
        pairs = (seen.noisy, batch.targets, batch.positions, seen.mask)
        first, second = run(params["drafter"], seen.params, *pairs)
        if contrastive:
            return jakiro(first, second, seen.features, seen.head, batch, loss_cfg, rules=rules)
        return jakiro_mixture(first, second, seen.features, seen.head, batch, loss_cfg.guess, rules=rules)

    return loss
