"""EAGLE's drafter: one decoder layer that guesses the target's next feature (2401.15077; EAGLE-2, 2406.16858, has the
same network and grows another tree).

    z_t = W_fc concat(e(x_{t+1}), f_t) + b        a_t = z_t + Attention(z)_t        u_t = RMSNorm(a_t)
    f^_{t+1} = a_t + SwiGLU(u_t)                  log softmax(head f^_{t+1}) guesses x_{t+2}

f_t is the target's hidden state behind its final norm, what its head reads, and the token stands one ahead of it: what
was drawn from f_t is no guess any more. No norm stands before the attention, for z is no residual stream, and none
behind the layer, which regresses normed features. Embedding e and head are the target's, frozen:
`decoder.lm_head(cfg.target, target_params, hidden)`. Pair t has position t, that of its feature.

Letters as in `decoder.py`. Jakiro (`jakiro.py`) shares the `Front`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..sharding.rules import REPLICATED, Rules
from .cache import KVCache, LayerCache, init_cache
from .checkpoint import rebuild_config
from .decoder import MLP, Attention, DecoderConfig, Params, Rope, constant, make_rope, project, rms_norm

KIND = "eagle"  # in checkpoints


# ------------------------------------------------------------------------------------------------------------ config
@dataclasses.dataclass(frozen=True, kw_only=True)
class EagleConfig:
    """What the drafter computes; sizes, biases and rotation are those of the target. No window limits it."""

    target: DecoderConfig
    fc_bias: bool = True


def config_of(mapping: Mapping[str, Any], target: DecoderConfig) -> EagleConfig:
    """The configuration that `checkpoint.load` found, for this target.

    Raises:
      CheckpointError: if the drafter was trained on another target, or is no EAGLE drafter.
    """
    return rebuild_config(EagleConfig, KIND, mapping, target)


# ------------------------------------------------------------------------------------------------------------ blocks
class Front(nnx.Module):
    """What stands before the MLP: token and feature become one vector, which attends to those before it."""

    def __init__(self, target: DecoderConfig, fc_bias: bool, *, rngs: nnx.Rngs):
        D = target.embed_dim
        self.norm_eps = target.norm_eps
        # The width of an activation lies whole on every device, and "embed" can name one axis of an array only.
        self.fc = nnx.Param(jax.random.normal(rngs.params(), (D, 2 * D)) * (2 * D) ** -0.5, axes=(None, "embed"))
        if fc_bias:
            self.fc_bias = constant(0.0, (D,), ("embed",))
        self.attn = Attention(target, rngs=rngs)
        self.mlp_norm = constant(1.0, (D,), ("embed",))

    def __call__(
        self,
        embedded: Float[Array, "B T D"],
        features: Float[Array, "B T D"],
        rope: Rope,
        mask: Bool[Array, "B T S"],
        cache: LayerCache | None,
        length: Int[Array, " B"] | None,
        rules: Rules,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], LayerCache | None]:
        """The residual stream behind the attention, the same normed, and the cache written."""
        pair = jnp.concatenate([embedded, features], axis=-1)
        z = rules.constrain(project(pair, self.fc, getattr(self, "fc_bias", None)), "batch", "seq", None)
        y, cache = self.attn(z, rope, mask, cache, length, rules)
        a = rules.constrain(z + y, "batch", "seq", None)
        return a, rms_norm(a, self.mlp_norm[...], self.norm_eps), cache


class Eagle(nnx.Module):
    """The drafter's trained parameters."""

    def __init__(self, cfg: EagleConfig, *, rngs: nnx.Rngs):
        self.front = Front(cfg.target, cfg.fc_bias, rngs=rngs)
        self.mlp = MLP(cfg.target, rngs=rngs)


# -------------------------------------------------------------------------------------------------------- parameters
def init_params(cfg: EagleConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters; the same key gives the same weights."""
    return plain_params(Eagle(cfg, rngs=nnx.Rngs(params=key)))


def param_shapes(cfg: EagleConfig) -> Params:
    """The tree of `ShapeDtypeStruct`s that `init_params` would fill."""
    return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))


def param_axes(cfg: EagleConfig) -> Params:
    """Logical axis names of every parameter, as a tree with a tuple at each leaf."""
    return axes_of(nnx.eval_shape(lambda: Eagle(cfg, rngs=nnx.Rngs(0))))


def new_cache(cfg: EagleConfig, batch: int, capacity: int, dtype: jax.typing.DTypeLike | None = None) -> KVCache:
    """An empty cache of the one layer; `dtype` defaults to that of the activations."""
    target = cfg.target
    return init_cache(1, batch, capacity, target.num_kv_heads, target.head_dim, dtype or target.dtype)


# ----------------------------------------------------------------------------------------------------------- forward
class EagleOutput(NamedTuple):
    """What a forward pass leaves behind."""

    hidden: Float[Array, "B T D"]  # f^_{t+1}, for the target's head and, as a feature, for the next level of a tree
    cache: KVCache | None  # new rows written behind the committed ones; `length` as it was


def forward(
    cfg: EagleConfig,
    params: Params,
    target_params: Params,
    features: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    mask: Bool[Array, "B T S"] | None = None,
    cache: KVCache | None = None,
    *,
    rules: Rules = REPLICATED,
) -> EagleOutput:
    """Guess the feature behind each pair.

    Args:
      cfg: what to compute.
      params: tree of `init_params`.
      target_params: the target's; only its `embed` is read here.
      features: f_t, of the target or guessed.
      tokens: x_{t+1}, the token that followed f_t.
      positions: t, for the rotation.
      mask: which keys each pair may see. None means causal: without a cache a pair sees the T pairs up to itself, with
        one the committed rows and the new rows up to itself.
      cache: keys and values of the pairs so far; the T new rows are written behind `length`.
      rules: where activations lie on a mesh.
    """
    net: Any = nnx.merge(_graph(cfg), params)
    a, u, cache = run_front(cfg.target, net.front, target_params, features, tokens, positions, mask, cache, rules)
    return EagleOutput(rules.constrain(a + net.mlp(u, rules), "batch", "seq", None), cache)


# ------------------------------------------------------------------------------------------- what Jakiro shares with it
def run_front(
    target: DecoderConfig,
    front: Front,
    target_params: Params,
    features: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    mask: Bool[Array, "B T S"] | None,
    cache: KVCache | None,
    rules: Rules,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], KVCache | None]:
    """Embed the tokens, make masks and angles, run the front; arguments and mask as in `forward`."""
    if features.shape != (*tokens.shape, target.embed_dim) or positions.shape != tokens.shape:
        raise ValueError(
            f"drafter: features {features.shape}, tokens {tokens.shape}, positions {positions.shape}; expected "
            f"[B, T, {target.embed_dim}], [B, T] and [B, T]. Pass one feature of this target for each token."
        )
    embedded = target_params["embed"][tokens].astype(target.dtype)
    if mask is None:
        mask = _causal_mask(tokens.shape, cache)
    rows, length = (None, None) if cache is None else (cache.layers[0], cache.length)
    rope = make_rope(target, positions)
    a, u, rows = front(embedded, features.astype(target.dtype), rope, mask, rows, length, rules)
    return a, u, None if cache is None or rows is None else cache._replace(layers=(rows,))


def plain_params(module: nnx.Module) -> Params:
    """A nested dict of arrays: no NNX type reaches the hot paths."""
    return nnx.to_pure_dict(nnx.state(module))


def axes_of(module: nnx.Module) -> Params:
    """The logical axes that a module's parameters are labelled with."""
    flat = nnx.to_flat_state(nnx.state(module))
    return nnx.traversals.unflatten_mapping({path: tuple(p.get_metadata()["axes"]) for path, p in flat})


# ----------------------------------------------------------------------------------------------------------- private
def _causal_mask(shape: tuple[int, ...], cache: KVCache | None) -> Bool[Array, "B T S"]:
    """As `decoder.forward` makes it: a query sees the rows up to its own."""
    B, T = shape
    S = T if cache is None else cache.capacity
    first = jnp.zeros(B, jnp.int32) if cache is None else cache.length
    last = first[:, None] + jnp.arange(T)[None]  # [B, T], the row of each query
    return jnp.arange(S)[None, None] <= last[..., None]


@functools.lru_cache(maxsize=64)
def _graph(cfg: EagleConfig) -> Any:
    """The static half of `nnx.split(Eagle(cfg))`, from shapes alone."""
    return nnx.graphdef(nnx.eval_shape(lambda: Eagle(cfg, rngs=nnx.Rngs(0))))
