"""Kangaroo's adapter: what turns the state of an early layer into a draft (Liu et al., 2404.18911, section 3).

The draft model is the target's own first layers, this adapter, and the target's own head. With x the residual stream
that enters layer `exit_layer` of the target,

    y = RMSNorm_out(x + MHA(RMSNorm_in(x)))        logits = head(y)

Attention has as many key-value heads as query heads (the target's query heads), four projections without biases, and
a rotary base of its own; there is no feed-forward block, and the target's final norm is not applied. Nothing else is
trained: target layers and head are shared and frozen. y stands where the target's own last state stands, so
`decoder.lm_head(cfg.target, target_params, y)` are the draft's logits for the next token.

Letters as in `decoder.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..sharding.rules import REPLICATED, Rules
from .cache import KVCache
from .checkpoint import rebuild_config
from .decoder import Attention, DecoderConfig, Params, constant, make_rope, rms_norm
from .decoder import new_cache as new_decoder_cache

KIND = "kangaroo"  # in checkpoints


@dataclasses.dataclass(frozen=True, kw_only=True)
class KangarooConfig:
    """Which target it belongs to, and where it leaves it."""

    target: DecoderConfig
    exit_layer: int  # the target layers before this one draft; the rest only verify
    rope_theta: float = 10_000.0  # of the adapter's own rotation, whatever the target's is

    def __post_init__(self):
        last = self.target.num_layers - 1
        if (
            not isinstance(self.exit_layer, int)
            or isinstance(self.exit_layer, bool)
            or not 1 <= self.exit_layer <= last
        ):
            raise ValueError(
                f"KangarooConfig.exit_layer: found {self.exit_layer!r}; expected 1 to {last}, so that some layers of "
                f"the target's {self.target.num_layers} draft and some are left to verify."
            )
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 0):
            raise ValueError(f"KangarooConfig.rope_theta: found {self.rope_theta!r}; expected a positive number.")


class KangarooOutput(NamedTuple):
    """What a forward pass leaves behind."""

    hidden: Float[Array, "B T D"]  # ready for the target's head
    cache: KVCache | None  # new rows written behind the committed ones; `length` as it was


class Adapter(nnx.Module):
    """Attention between two norms, added to the residual stream."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.norm_eps = cfg.norm_eps
        self.norm_in = constant(1.0, (cfg.embed_dim,), ("embed",))
        self.attn = Attention(cfg, rngs=rngs)
        self.norm_out = constant(1.0, (cfg.embed_dim,), ("embed",))

    def __call__(self, x, rope, mask, cache, length, rules):
        y, cache = self.attn(rms_norm(x, self.norm_in[...], self.norm_eps), rope, mask, cache, length, rules)
        return rms_norm(rules.constrain(x + y, "batch", "seq", None), self.norm_out[...], self.norm_eps), cache


def config_of(mapping: Mapping[str, Any], target: DecoderConfig) -> KangarooConfig:
    """The configuration that `checkpoint.load` found, for this target.

    Raises:
      CheckpointError: if the adapter was trained on another target, or is no Kangaroo adapter.
    """
    return rebuild_config(KangarooConfig, KIND, mapping, target)


def init_params(cfg: KangarooConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters; the same key gives the same weights."""
    return nnx.to_pure_dict(nnx.state(Adapter(_attention_config(cfg), rngs=nnx.Rngs(params=key))))


def param_shapes(cfg: KangarooConfig) -> Params:
    """The tree of `ShapeDtypeStruct`s that `init_params` would fill; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))


def param_axes(cfg: KangarooConfig) -> Params:
    """Logical axis names of every parameter, as a tree with a tuple at each leaf."""
    state = nnx.state(nnx.eval_shape(lambda: Adapter(_attention_config(cfg), rngs=nnx.Rngs(0))))
    return nnx.traversals.unflatten_mapping({p: v.get_metadata()["axes"] for p, v in nnx.to_flat_state(state)})


def new_cache(cfg: KangarooConfig, batch: int, capacity: int, dtype: jax.typing.DTypeLike | None = None) -> KVCache:
    """An empty cache for the adapter's one layer; `dtype` defaults to that of the activations."""
    return new_decoder_cache(_attention_config(cfg), batch, capacity, dtype)


def forward(
    cfg: KangarooConfig,
    params: Params,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    mask: Bool[Array, "B T S"] | None = None,
    cache: KVCache | None = None,
    *,
    rules: Rules = REPLICATED,
) -> KangarooOutput:
    """Run the adapter.

    Args:
      cfg: what to compute.
      params: tree of `init_params`.
      x: the state that enters the target's layer `exit_layer`, before any norm.
      positions: absolute positions, for the rotation.
      mask: which keys each query may see. None means causal: without a cache a query sees the T states up to itself,
        with one the committed rows and the new rows up to itself. The target's windows do not apply.
      cache: the adapter's own keys and values so far; the T new rows are written behind `length`.
      rules: where activations lie on a mesh.
    """
    inner = _attention_config(cfg)
    B, T, _ = x.shape
    if mask is None:
        first, S = (jnp.zeros(B, jnp.int32), T) if cache is None else (cache.length, cache.capacity)
        mask = jnp.arange(S)[None, None] <= (first[:, None] + jnp.arange(T)[None])[..., None]
    adapter: Any = nnx.merge(_graph(inner), params)
    rows, length = (None, None) if cache is None else (cache.layers[0], cache.length)
    x = rules.constrain(x.astype(inner.dtype), "batch", "seq", None)
    hidden, rows = adapter(x, make_rope(inner, positions), mask, rows, length, rules)
    return KangarooOutput(hidden, None if cache is None else cache._replace(layers=(rows,)))


# ----------------------------------------------------------------------------------------------------------- private
@functools.lru_cache(maxsize=64)
def _attention_config(cfg: KangarooConfig) -> DecoderConfig:
    """The one attention layer as a decoder's: the target's width and query heads, and nothing else of it."""
    return dataclasses.replace(
        cfg.target,
        num_layers=1,
        num_kv_heads=cfg.target.num_heads,
        rope_theta=cfg.rope_theta,
        rope_scaling=None,
        window=None,
        window_layers=(),
        qkv_bias=False,
        o_bias=False,
        qk_norm=False,
    )


@functools.lru_cache(maxsize=64)
def _graph(inner: DecoderConfig) -> Any:
    """The static half of `nnx.split(Adapter(inner))`, from shapes alone."""
    return nnx.graphdef(nnx.eval_shape(lambda: Adapter(inner, rngs=nnx.Rngs(0))))
