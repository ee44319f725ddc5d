"""Heads on hidden states: which parameters each has, how they start, and what it says of a state.

judge       z = w . h + b, and sigmoid(z) is how likely the token is good (Judge Decoding, 2501.19309). h is the
            target's last state at the token's own position, behind the final norm: it has read the token.
acceptance  x_0 = h, x_{i+1} = x_i + SiLU(W_i x_i + b_i), z = W x_n + b of two classes, and softmax(z)[1] is how likely
            the draft is accepted (SpecDec++, 2405.19715). h is the drafter's last state, which has read the draft. In
            the head that the paper's authors released all blocks are the same one; here each has weights of its own.

Weights are [out, in]. What a head says is float32 whatever the state is. Letters as in `decoder.py`; n residual blocks.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .checkpoint import rebuild_config
from .decoder import DecoderConfig, Params, constant

JUDGE, ACCEPTANCE = "judge", "acceptance"  # in checkpoints


# ------------------------------------------------------------------------------------------------------------ configs
@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Whose states it reads."""

    target: DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AcceptanceConfig:
    """Whose states it reads: those of a small decoder, or of the Kangaroo adapter behind a target's first layers."""

    target: DecoderConfig  # the small decoder, or the target of the adapter
    blocks: int = 3
    exit_layer: int | None = None  # of the adapter; None for a decoder's own last state

    def __post_init__(self):
        if self.blocks < 0:
            raise ValueError(f"AcceptanceConfig.blocks: found {self.blocks}; expected 0 or more.")


HeadConfig = JudgeConfig | AcceptanceConfig


def judge_config_of(mapping: Mapping[str, Any], target: DecoderConfig) -> JudgeConfig:
    """The configuration that `checkpoint.load` found, for this target.

    Raises:
      CheckpointError: if the judge was trained on another target, or is no judge.
    """
    return rebuild_config(JudgeConfig, JUDGE, mapping, target)


def acceptance_config_of(mapping: Mapping[str, Any], target: DecoderConfig) -> AcceptanceConfig:
    """The configuration that `checkpoint.load` found, for this decoder.

    Raises:
      CheckpointError: if the head was trained on another, or is no acceptance head.
    """
    return rebuild_config(AcceptanceConfig, ACCEPTANCE, mapping, target)


# --------------------------------------------------------------------------------------------------------- parameters
class Judge(nnx.Module):
    """A hyperplane. It starts at nothing: what it learns by is convex."""

    def __init__(self, cfg: JudgeConfig, *, rngs: nnx.Rngs):
        self.weight = constant(0.0, (cfg.target.embed_dim,), ("embed",))
        self.bias = constant(0.0, (), ())


class Blocks(nnx.Module):
    """Residual blocks, stacked."""

    def __init__(self, n: int, D: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (n, D, D)) * D**-0.5, axes=("layers", None, "embed"))
        self.bias = nnx.Param(jnp.zeros((n, D)), axes=("layers", None))


class Classes(nnx.Module):
    """What the blocks make of a state, into refused and accepted."""

    def __init__(self, D: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (2, D)) * D**-0.5, axes=(None, "embed"))
        self.bias = nnx.Param(jnp.zeros(2), axes=(None,))


class Acceptance(nnx.Module):
    """Blocks, then two classes."""

    def __init__(self, cfg: AcceptanceConfig, *, rngs: nnx.Rngs):
        self.blocks = Blocks(cfg.blocks, cfg.target.embed_dim, rngs=rngs)
        self.head = Classes(cfg.target.embed_dim, rngs=rngs)


def init_params(cfg: HeadConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters; the same key gives the same weights."""
    return nnx.to_pure_dict(nnx.state(_module(cfg, nnx.Rngs(params=key))))


def param_shapes(cfg: HeadConfig) -> Params:
    """The tree of `ShapeDtypeStruct`s that `init_params` would fill; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))


def param_axes(cfg: HeadConfig) -> Params:
    """Logical axis names of every parameter, as a tree with a tuple at each leaf."""
    state = nnx.state(nnx.eval_shape(lambda: _module(cfg, nnx.Rngs(0))))
    return nnx.traversals.unflatten_mapping({p: v.get_metadata()["axes"] for p, v in nnx.to_flat_state(state)})


# -------------------------------------------------------------------------------------------------- what a head says
def judge_logit(params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "..."]:
    """z, of which `sigmoid(z)` is how likely the token is good."""
    score = jnp.einsum("...d,d->...", hidden.astype(jnp.float32), params["weight"].astype(jnp.float32))
    return score + params["bias"].astype(jnp.float32)


def acceptance_logits(params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... 2"]:
    """z, of which `softmax(z)` says how likely the draft is refused, and accepted."""
    x = hidden.astype(jnp.float32)
    blocks = params["blocks"]
    for i in range(blocks["weight"].shape[0]):
        x = x + jax.nn.silu(linear(jax.tree.map(lambda w, i=i: w[i], blocks), x))
    return linear(params["head"], x)


def linear(layer: Params, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
    """W x + b in float32, of `{"weight": [E, D], "bias": [E]}`."""
    y = jnp.einsum("...d,ed->...e", x, layer["weight"].astype(jnp.float32), preferred_element_type=jnp.float32)
    return y + layer["bias"].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))


# ----------------------------------------------------------------------------------------------------------- private
def _module(cfg: HeadConfig, rngs: nnx.Rngs) -> nnx.Module:
    return Judge(cfg, rngs=rngs) if isinstance(cfg, JudgeConfig) else Acceptance(cfg, rngs=rngs)
