"""SparsePO (2410.05102): token-level DPO in which masks say which tokens count, and how much.

    U = sum_w m_u (log p - log p_ref) - sum_l m_u (log p - log p_ref)        k_t = KL(ref(. | t) || policy(. | t)) >= 0
    K = sum_w m_d k_t - sum_l m_d k_t                                        w chosen, l rejected

    softplus(-beta (U + K)) + l1_u |m_u|_1 + l1_d |m_d|_1                    |m|_1 over the tokens of both answers

Masks come from the reference's states alone, so no gradient reaches it; with masks of 1 this is TDPO1 (2404.11999).

    learned      of every layer LayerNorm, a linear unit, ReLU; their mixture over layers, ReLU. One network for both
                 masks (`common`) or one for each. The authors' code has dropout behind either ReLU; here is none.
    activations  MaPO: of every layer's residual state the mean over features, scaled to [0, 1] over the tokens of an
                 answer; the mean over layers. The authors hook further activations inside layers (attention, MLP)
                 and score them in standard units first, which the scaling undoes.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..data.pipeline import Batch
from .preference import check_beta, check_name, check_number

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsepoConfig:
    """The settings of HH are the defaults; for `activations` its learning rate was 1e-6."""

    beta: float = 0.1
    mask: Literal["learned", "activations"] = "learned"
    networks: Literal["common", "independent"] = "common"  # of learned masks
    l1_u: float = 1e-3  # what the mask of rewards costs; of learned masks alone
    l1_d: float = 1e-3  # and that of the divergence
    mask_weight_decay: float = 0.01  # of the networks of learned masks; the policy has that of the optimizer
    allow_large_beta: bool = False  # accept beta > 1

    def __post_init__(self):
        check_beta("SparsepoConfig", self.beta, large=self.allow_large_beta)
        check_name("SparsepoConfig.mask", self.mask, ("learned", "activations"))
        check_name("SparsepoConfig.networks", self.networks, ("common", "independent"))
        for name in ("l1_u", "l1_d", "mask_weight_decay"):
            weight = getattr(self, name)
            check_number(f"SparsepoConfig.{name}", weight, 0 <= weight < math.inf, "at least 0")


def sparsepo(
    u: Float[Array, "n 2"],
    k: Float[Array, "n 2"],
    size_u: Float[Array, "n 2"],
    size_d: Float[Array, "n 2"],
    cfg: SparsepoConfig = SparsepoConfig(),
) -> Float[Array, " n"]:
    """The loss of every pair; of each side, chosen first:

    Args:
      u: sum of m_u times the log-ratios of its tokens.
      k: sum of m_d times the divergences at its tokens.
      size_u: |m_u|_1 over its tokens.
      size_d: |m_d|_1.
      cfg: strengths.
    """
    margin = (u[:, 0] - u[:, 1]) + (k[:, 0] - k[:, 1])
    loss = jax.nn.softplus(-cfg.beta * margin)
    if cfg.mask == "activations":  # nothing could make them smaller
        return loss
    return loss + cfg.l1_u * jnp.sum(size_u, axis=1) + cfg.l1_d * jnp.sum(size_d, axis=1)


def init_masks(layers: int, width: int, key: jax.Array, cfg: SparsepoConfig) -> Params:
    """The networks of learned masks, `u` and, if they are independent, `d`; nothing for activations."""
    if cfg.mask == "activations":
        return {}
    names = ("u",) if cfg.networks == "common" else ("u", "d")
    return {name: _init(layers, width, k) for name, k in zip(names, jax.random.split(key, len(names)), strict=True)}


def mask_axes(cfg: SparsepoConfig) -> Params:
    """Logical axes of the networks: small, and everywhere whole."""
    axes = {"gain": (None,), "shift_bias": (None,), "unit": (None, None), "unit_bias": (None,), "mixer": (None,)}
    return {} if cfg.mask == "activations" else dict.fromkeys(("u",) if cfg.networks == "common" else ("u", "d"), axes)


def masks_of(
    states: tuple[Float[Array, "B T D"], ...], batch: Batch, networks: Params, cfg: SparsepoConfig
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """m_u and m_d at every target, 0 where none counts.

    Args:
      states: of the reference, one a layer; no gradient is taken through them.
      batch: where answers are.
      networks: of `init_masks`.
      cfg: which masks.
    """
    states = tuple(jax.lax.stop_gradient(x).astype(jnp.float32) for x in states)
    if cfg.mask == "activations":
        mask = activation_mask(states, batch)
        return mask, mask
    kept = lambda name: jnp.where(batch.mask, _learned(states, networks[name]), 0.0)
    return kept("u"), kept("u" if cfg.networks == "common" else "d")


def activation_mask(states: tuple[Float[Array, "B T D"], ...], batch: Batch) -> Float[Array, "B T"]:
    """MaPO's: least 0 and largest 1 over the tokens of each answer, in every layer; the mean over layers."""
    T = batch.tokens.shape[1]

    def extreme(x: Array, reduce: Any, start: float) -> Array:
        found = jax.vmap(lambda row, s: reduce(row, s, num_segments=T + 1))(
            jnp.where(batch.mask, x, start), batch.segments
        )
        return jnp.take_along_axis(found, batch.segments, axis=1)

    def scaled(state: Array) -> Array:
        mean = jnp.mean(state, axis=-1)
        low, high = extreme(mean, jax.ops.segment_min, jnp.inf), extreme(mean, jax.ops.segment_max, -jnp.inf)
        spread = jnp.where(high > low, high - low, 1.0)
        return jnp.where(batch.mask, (mean - low) / spread, 0.0)

    return sum(map(scaled, states), start=jnp.float32(0)) / len(states)


# ----------------------------------------------------------------------------------------------------------- private
def _init(layers: int, width: int, key: jax.Array) -> Params:
    """Linear units as PyTorch begins them, uniform in +- 1 / sqrt(inputs)."""
    unit, bias, mixer = jax.random.split(key, 3)
    at = lambda k, shape, inputs: jax.random.uniform(k, shape, jnp.float32, -1.0, 1.0) / math.sqrt(inputs)
    return {
        "gain": jnp.ones((width,)),
        "shift_bias": jnp.zeros((width,)),
        "unit": at(unit, (layers, width), width),
        "unit_bias": at(bias, (layers,), width),
        "mixer": at(mixer, (layers,), layers),
    }


def _learned(states: tuple[Array, ...], net: Params) -> Array:
    total = jnp.float32(0)
    for i, x in enumerate(states):
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-5)
        normed = normed * net["gain"][None, None] + net["shift_bias"][None, None]
        unit = jnp.einsum("btd,d->bt", normed, net["unit"][i]) + net["unit_bias"][i]
        total = total + net["mixer"][i] * jax.nn.relu(unit)
    return jax.nn.relu(total)
