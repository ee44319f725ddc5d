"""One config-driven decoder: Llama 2/3, Mistral, Qwen2/2.5 and Qwen3 are settings of it.

The order of this file is the order of the forward pass: config, rotary positions, attention, MLP, layer, parameters,
`forward`, `lm_head`, `logits`. The NNX modules say which parameters exist, how they start and what each block computes;
the hot paths hold none of them. A model travels as `(config, params)`: `config` is hashable and stands for the graph
definition (`_layer_graph` derives it), `params` is a plain nested dict of arrays. Layers are one stacked tree
`[L, ...]` for training (one `lax.scan`) or a tuple of L trees for decoding (unrolled); `Layer.__call__` serves both.

Weights are `[out, in]` as in Hugging Face files, in their natural rank: `q` is `[N, H, D]` and `o` is `[D, N, H]`.
Letters as everywhere in jaxaroo: B batch, T queries, S keys, D width, N query heads, K key-value heads, G = N // K,
H head size, F MLP width, V vocabulary, L layers.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from ..jaxlib_ext.causal_attention import causal_attention
from ..jaxlib_ext.qmm import Layout, QuantisedMatrix, multiply
from ..jaxlib_ext.tree_attention import tree_attention
from ..sharding.rules import REPLICATED, Rules
from .cache import KVCache, LayerCache, init_cache, write_rows

Params = dict[str, Any]
Remat = Literal["none", "dots", "full"]


# ------------------------------------------------------------------------------------------------------------ config
@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched to reach past the trained context.

    `linear` divides every frequency by `factor`. `llama3` divides those whose wavelength exceeds
    `original_positions / low_freq` and blends towards the unscaled ones up to `original_positions / high_freq`
    (Llama 3.1 release notes; the reference is transformers' `_compute_llama3_parameters`).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq: float = 1.0
    high_freq: float = 4.0
    original_positions: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Everything that decides what a decoder computes."""

    vocab_size: int
    embed_dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    window: int | None = None  # a query sees the keys less than this many positions back, itself included
    window_layers: tuple[bool, ...] = ()  # which layers are windowed; () means all of them when `window` is set
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head's queries and keys (Qwen3)
    tie_embeddings: bool = False
    max_positions: int = 4096
    eos_ids: tuple[int, ...] = ()
    model_type: str = "llama"  # the name under which the model is written back
    dtype: str = "float32"  # of activations; parameters have their own

    def __post_init__(self):
        sizes = ("vocab_size", "embed_dim", "ffn_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        for name in (*sizes, "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"DecoderConfig.{name}: found {getattr(self, name)}; expected a positive integer.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"DecoderConfig: num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}; "
                "expected the first to be a multiple of the second."
            )
        if self.head_dim % 2:
            raise ValueError(f"DecoderConfig.head_dim: found {self.head_dim}; expected an even number (rotary pairs).")
        if self.window is not None and self.window < 1:
            raise ValueError(f"DecoderConfig.window: found {self.window}; expected a positive integer or None.")
        if self.window_layers and len(self.window_layers) != self.num_layers:
            raise ValueError(
                f"DecoderConfig.window_layers: found {len(self.window_layers)} entries; expected {self.num_layers}, "
                "one a layer, or none."
            )

    @property
    def windowed(self) -> tuple[bool, ...]:
        """For each layer, whether its attention is limited to `window`."""
        return self.window_layers or (self.window is not None,) * self.num_layers


class Model(NamedTuple):
    """A network and its weights. `params["layers"]` is a tuple (decoding) or one stacked tree (training)."""

    config: DecoderConfig
    params: Params


# -------------------------------------------------------------------------------------------------- rotary positions
def rope_frequencies(cfg: DecoderConfig) -> np.ndarray:
    """Angle per position of each of the H // 2 rotary pairs, float64, with the config's scaling applied."""
    freq = cfg.rope_theta ** -(np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim)
    scaling = cfg.rope_scaling
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return freq / scaling.factor
    turns = scaling.original_positions * freq / (2 * np.pi)  # full turns within the original context
    blend = np.clip((turns - scaling.low_freq) / (scaling.high_freq - scaling.low_freq), 0.0, 1.0)
    return freq * (blend + (1 - blend) / scaling.factor)


class Rope(NamedTuple):
    """Cosines and sines of a forward pass's positions; the same for every layer."""

    cos: Float[Array, "B T 1 half"]
    sin: Float[Array, "B T 1 half"]


def make_rope(cfg: DecoderConfig, positions: Int[Array, "B T"]) -> Rope:
    """Angles in float32, whatever the activations are in."""
    freq = jnp.asarray(rope_frequencies(cfg), jnp.float32)[None, None, None]
    angle = positions[..., None, None].astype(jnp.float32) * freq
    return Rope(jnp.cos(angle), jnp.sin(angle))


def rotate(x: Float[Array, "B T heads H"], rope: Rope) -> Float[Array, "B T heads H"]:
    """Rotate pair (i, i + H/2) of every head by its angle, the pairing of Hugging Face checkpoints."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin], axis=-1).astype(x.dtype)


# ------------------------------------------------------------------------------------------------------------ blocks
def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int) -> nnx.Param:
    """A normal weight of variance 1 / fan_in, labelled with its logical axes."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5, axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A norm's gain (1) or a bias (0), labelled with its logical axes."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


def rms_norm(x: Float[Array, "... D"], gain: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """Divide by the root mean square over the last axis, in float32, and scale."""
    f = x.astype(jnp.float32)
    f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + eps)
    return (f * _over_last(gain, x.ndim)).astype(x.dtype)


def project(
    x: jax.Array, w: nnx.Param, bias: nnx.Param | None = None, *, over: int = 1, rules: Rules = REPLICATED
) -> jax.Array:
    """Multiply the last `over` axes of x by those of an `[out, in]` weight, in x's dtype, accumulating in float32.

    Both are flattened to matrices first: with split heads XLA transposes the weight on every call (CPU). In the place
    of a weight may stand a `QuantisedMatrix`; `rules` say where it lies.
    """
    batch, out = x.shape[: x.ndim - over], w.shape[: len(w.shape) - over]
    table = w.get_value()
    if isinstance(table, QuantisedMatrix):
        names = w.get_metadata("axes")
        rows = tuple(rules.places(batch, *("batch", "seq", *(None,) * len(batch))[: len(batch)]))
        (outputs,), (inputs,) = rules.spec(names[0]), rules.spec(names[-over])
        y = multiply(x.reshape(*batch, -1), table, Layout(rows, outputs, inputs))
    else:
        rows, table = x.reshape(math.prod(batch), -1), table.reshape(math.prod(out), -1).astype(x.dtype)
        y = jnp.einsum("mi,oi->mo", rows, table, preferred_element_type=jnp.float32)
    y = y.reshape(*batch, *out)
    return (y if bias is None else y + _over_last(bias[...], y.ndim)).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and an optional cache."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        D, N, K, H = cfg.embed_dim, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.norm_eps = cfg.norm_eps
        self.q = weight(rngs, (N, H, D), ("heads", "head_dim", "embed"), D)
        self.k = weight(rngs, (K, H, D), ("kv_heads", "head_dim", "embed"), D)
        self.v = weight(rngs, (K, H, D), ("kv_heads", "head_dim", "embed"), D)
        self.o = weight(rngs, (D, N, H), ("embed", "heads", "head_dim"), N * H)
        if cfg.qkv_bias:
            self.q_bias = constant(0.0, (N, H), ("heads", "head_dim"))
            self.k_bias = constant(0.0, (K, H), ("kv_heads", "head_dim"))
            self.v_bias = constant(0.0, (K, H), ("kv_heads", "head_dim"))
        if cfg.o_bias:
            self.o_bias = constant(0.0, (D,), ("embed",))
        if cfg.qk_norm:
            self.q_norm = constant(1.0, (H,), ("head_dim",))
            self.k_norm = constant(1.0, (H,), ("head_dim",))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Rope,
        mask: Bool[Array, "B T S"],
        cache: LayerCache | None,
        length: Int[Array, " B"] | None,
        rules: Rules,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        q = project(x, self.q, getattr(self, "q_bias", None), rules=rules)
        k = project(x, self.k, getattr(self, "k_bias", None), rules=rules)
        v = project(x, self.v, getattr(self, "v_bias", None), rules=rules)
        if hasattr(self, "q_norm"):
            q = rms_norm(q, self.q_norm[...], self.norm_eps)
            k = rms_norm(k, self.k_norm[...], self.norm_eps)
        q = rules.constrain(rotate(q, rope), "batch", "seq", "heads", "head_dim")
        k = rotate(k, rope)
        if cache is not None and length is not None:
            cache = write_rows(cache, length, k, v)
            batch, heads = rules.places((k.shape[0], k.shape[2]), "batch", "kv_heads")
            layout = (batch, heads) if heads == rules.kv_heads else None  # heads that do not divide are XLA's
            # The new rows too, as every later query will see them.
            out = tree_attention(q, cache.k, cache.v, mask, layout=layout)
        else:
            out = causal_attention(q, k, v, mask, rules.ways(rules.seq) > 1)
        return project(out, self.o, getattr(self, "o_bias", None), over=2, rules=rules), cache


class MLP(nnx.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        D, F = cfg.embed_dim, cfg.ffn_dim
        self.gate = weight(rngs, (F, D), ("ffn", "embed"), D)
        self.up = weight(rngs, (F, D), ("ffn", "embed"), D)
        self.down = weight(rngs, (D, F), ("embed", "ffn"), F)
        if cfg.mlp_bias:
            self.gate_bias = constant(0.0, (F,), ("ffn",))
            self.up_bias = constant(0.0, (F,), ("ffn",))
            self.down_bias = constant(0.0, (D,), ("embed",))

    def __call__(self, x: Float[Array, "B T D"], rules: Rules) -> Float[Array, "B T D"]:
        gate = project(x, self.gate, getattr(self, "gate_bias", None), rules=rules)
        up = project(x, self.up, getattr(self, "up_bias", None), rules=rules)
        bias = getattr(self, "down_bias", None)
        down = lambda gate, up: project(jax.nn.silu(gate) * up, self.down, bias, rules=rules)
        return jax.checkpoint(down)(gate, up)  # of this the backward pass keeps gate and up alone


class Layer(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.norm_eps = cfg.norm_eps
        self.attn_norm = constant(1.0, (cfg.embed_dim,), ("embed",))
        self.attn = Attention(cfg, rngs=rngs)
        self.mlp_norm = constant(1.0, (cfg.embed_dim,), ("embed",))
        self.mlp = MLP(cfg, rngs=rngs)

    def __call__(self, x, rope, mask, cache, length, rules):
        y, cache = self.attn(rms_norm(x, self.attn_norm[...], self.norm_eps), rope, mask, cache, length, rules)
        x = x + y
        x = x + self.mlp(rms_norm(x, self.mlp_norm[...], self.norm_eps), rules)
        return rules.constrain(x, "batch", "seq", None), cache


class Ends(nnx.Module):
    """What stands before and behind the layers: the token table, the final norm and, unless tied, the head."""

    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        V, D = cfg.vocab_size, cfg.embed_dim
        self.embed = weight(rngs, (V, D), ("vocab", "embed"), D)
        self.norm = constant(1.0, (D,), ("embed",))
        if not cfg.tie_embeddings:  # a tied head reuses the table: no two attributes share a variable
            self.head = weight(rngs, (V, D), ("vocab", "embed"), D)


# -------------------------------------------------------------------------------------------------------- parameters
def init_params(cfg: DecoderConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters with stacked layers; the same key gives the same weights."""
    ends_key, layers_key = jax.random.split(key)
    ends = _plain(nnx.state(Ends(cfg, rngs=nnx.Rngs(params=ends_key))))
    one = lambda k: _plain(nnx.state(Layer(cfg, rngs=nnx.Rngs(params=k))))
    return ends | {"layers": jax.vmap(one)(jax.random.split(layers_key, cfg.num_layers))}


def param_shapes(cfg: DecoderConfig, dtype: jax.typing.DTypeLike = jnp.float32) -> Params:
    """The tree of `ShapeDtypeStruct`s that `init_params` would fill; nothing is allocated."""
    shapes = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), shapes)


def param_axes(cfg: DecoderConfig) -> Params:
    """Logical axis names of every parameter, as a tree with a tuple at each leaf; stacked ones begin with `layers`."""

    def names(module: type[nnx.Module], lead: tuple[str, ...]) -> Params:
        state = nnx.state(nnx.eval_shape(lambda: module(cfg, rngs=nnx.Rngs(0))))  # type: ignore[call-arg]
        flat = {path: (*lead, *p.get_metadata()["axes"]) for path, p in nnx.to_flat_state(state)}
        return nnx.traversals.unflatten_mapping(flat)

    return names(Ends, ()) | {"layers": names(Layer, ("layers",))}


def unstack_layers(params: Params) -> Params:
    """The decoding form: a tuple of per-layer trees instead of one stacked tree. A no-op on that form."""
    layers = params["layers"]
    if isinstance(layers, tuple):
        return params
    num = jax.tree.leaves(layers)[0].shape[0]
    return params | {"layers": tuple(jax.tree.map(lambda w, i=i: w[i], layers) for i in range(num))}


def stack_layers(params: Params) -> Params:
    """The training form: one tree whose leaves have a leading layer axis. A no-op on that form."""
    layers = params["layers"]
    if not isinstance(layers, tuple):
        return params
    return params | {"layers": jax.tree.map(lambda *w: jnp.stack(w), *layers)}


def new_cache(cfg: DecoderConfig, batch: int, capacity: int, dtype: jax.typing.DTypeLike | None = None) -> KVCache:
    """An empty cache that fits this decoder; `dtype` is that of the activations, or a type of `cache.init_cache`."""
    return init_cache(cfg.num_layers, batch, capacity, cfg.num_kv_heads, cfg.head_dim, dtype or cfg.dtype)


# ----------------------------------------------------------------------------------------------------------- forward
class Output(NamedTuple):
    """What a forward pass leaves behind."""

    hidden: Float[Array, "B T D"]  # after the final norm when the last layer was run, else the raw residual stream
    cache: KVCache | None  # new rows written behind the committed ones; `length` as it was
    collected: tuple[Float[Array, "B T D"], ...]  # one for each entry of `collect`


def forward(
    cfg: DecoderConfig,
    params: Params,
    x: Int[Array, "B T"] | Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    mask: Bool[Array, "B T S"] | None = None,
    cache: KVCache | None = None,
    *,
    start_layer: int = 0,
    stop_layer: int | None = None,
    collect: tuple[int, ...] = (),
    key_positions: Int[Array, "B S"] | None = None,
    remat: Remat = "none",
    rules: Rules = REPLICATED,
) -> Output:
    """Run layers `start_layer .. stop_layer - 1`; the one forward of training, prefill, decoding, trees and probes.

    Args:
      cfg: what to compute.
      params: tree of `init_params`, layers stacked or as a tuple.
      x: tokens, or the hidden state that enters `start_layer`.
      positions: absolute positions, for the rotation and for windows.
      mask: which keys each query may see, windows apart. None means causal: without a cache a query sees the T tokens
        up to itself, with one the committed rows and the new rows up to itself. Without a cache no mask may let a
        query see a token behind itself, in whatever order positions are: such pairs need not be computed.
      cache: keys and values so far (S rows); only with layers as a tuple. The T new rows are written behind `length`.
      start_layer: the first layer to run; above 0, `x` must be a hidden state.
      stop_layer: one past the last layer to run; None runs them all and applies the final norm.
      collect: which hidden states to return: i is the state that enters layer i (0 the embeddings), L the one after
        the final norm. Each must be reached.
      key_positions: absolute position of each key, when that is not the row's index; windows alone read it.
      remat: what the backward pass recomputes, per layer (stacked layers only): nothing, all but matmul results, all.
      rules: where activations lie on a mesh.

    Returns:
      Hidden states, the cache with the new rows, and the collected states.
    """
    L = cfg.num_layers
    stop = L if stop_layer is None else stop_layer
    _check_range(cfg, x, start_layer, stop, collect)
    if jnp.issubdtype(x.dtype, jnp.integer):
        x = params["embed"][x]
    x = rules.constrain(x.astype(cfg.dtype), "batch", "seq", None)
    masks = _layer_masks(cfg, mask, positions, key_positions, cache)
    rope = make_rope(cfg, positions)
    run = _run_unrolled if isinstance(params["layers"], tuple) else _run_scanned
    x, layers, collected = run(cfg, params["layers"], x, rope, masks, cache, start_layer, stop, collect, remat, rules)
    if stop == L:
        x = rms_norm(x, params["norm"], cfg.norm_eps)
        collected = collected | {L: x}
    out_cache = None if cache is None else KVCache(layers, cache.length)
    return Output(x, out_cache, tuple(collected[i] for i in collect))


def lm_head(
    cfg: DecoderConfig, params: Params, hidden: Float[Array, "B T D"], *, rules: Rules = REPLICATED
) -> Float[Array, "B T V"]:
    """Logits from hidden states behind the final norm, accumulated and returned in float32."""
    table = params["embed"] if cfg.tie_embeddings else params["head"]
    out = jnp.einsum("btd,vd->btv", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return rules.constrain(out, "batch", "seq", "vocab")


def logits(
    model: Model,
    input_ids: Int[Array | np.ndarray, "B T"],
    attention_mask: Shaped[Array | np.ndarray, "B T"] | None = None,
) -> Float[Array, "B T V"]:
    """Next-token logits of whole sequences; padding on either side is masked by zeros in `attention_mask`.

    Positions count the unmasked tokens from 0. Rows at masked positions mean nothing.
    """
    ids = jnp.asarray(input_ids)
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"logits: input_ids of shape {ids.shape}, {ids.dtype}; expected integers of shape [B, T].")
    keep = jnp.ones(ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask).astype(bool)
    if keep.shape != ids.shape:
        raise ValueError(f"logits: attention_mask of shape {keep.shape}; expected {ids.shape}, that of input_ids.")
    return _masked_logits(model.config, model.params, ids, keep)


# ----------------------------------------------------------------------------------------------------------- private
@functools.partial(jax.jit, static_argnames="cfg")
def _masked_logits(cfg, params, ids, keep):
    T = ids.shape[1]
    positions = jnp.maximum(jnp.cumsum(keep, axis=1) - 1, 0).astype(jnp.int32)
    mask = jnp.tril(jnp.ones((T, T), bool))[None] & keep[:, None, :]
    return lm_head(cfg, params, forward(cfg, params, ids, positions, mask).hidden)


def _run_unrolled(cfg, layers, x, rope, masks, cache, start, stop, collect, remat, rules):
    """One trace per layer, for decoding: every layer's weights and cache stay where they are."""
    graph, collected = _layer_graph(cfg), {}
    rows = list(cache.layers) if cache is not None else [None] * cfg.num_layers
    length = None if cache is None else cache.length
    for i in range(start, stop):
        if i in collect:
            collected[i] = x
        layer: Any = nnx.merge(graph, layers[i])
        x, rows[i] = layer(x, rope, masks[cfg.windowed[i]], rows[i], length, rules)
    if stop in collect:
        collected[stop] = x
    return x, tuple(rows), collected


def _run_scanned(cfg, layers, x, rope, masks, cache, start, stop, collect, remat, rules):
    """One trace for all layers, for training: compile time does not grow with depth."""
    if cache is not None:
        raise ValueError("forward: found a cache and stacked layers; expected layers as a tuple. Use unstack_layers.")
    graph = _layer_graph(cfg)
    if (start, stop) != (0, cfg.num_layers):
        layers = jax.tree.map(lambda w: w[start:stop], layers)
    windowed = jnp.asarray(cfg.windowed[start:stop])

    def body(carry, per_layer):
        x, kept = carry
        p, is_windowed, i = per_layer
        kept = {c: jnp.where(i == c, x, old) for c, old in kept.items()}
        mask = jnp.where(is_windowed, masks[True], masks[False]) if len(masks) == 2 else next(iter(masks.values()))
        layer: Any = nnx.merge(graph, p)
        x, _ = layer(x, rope, mask, None, None, rules)
        return (x, kept), None

    policy = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}
    if remat != "none":
        body = jax.checkpoint(body, policy=policy[remat])
    kept = {c: jnp.zeros_like(x) for c in collect if c < stop}
    few = max(1, stop - start) if stop - start <= 4 else 1  # unrolled, what is kept for the backward pass is not copied
    (x, kept), _ = jax.lax.scan(body, (x, kept), (layers, windowed, jnp.arange(start, stop)), unroll=few)
    return x, None, kept | {stop: x}


def _layer_masks(cfg, mask, positions, key_positions, cache) -> dict[bool, Bool[Array, "B T S"]]:
    """The mask of full layers and of windowed ones, each only if some layer needs it."""
    B, T = positions.shape
    S = T if cache is None else cache.capacity
    if mask is None:
        first = jnp.zeros(B, jnp.int32) if cache is None else cache.length
        last = first[:, None] + jnp.arange(T)[None]  # [B, T], the row of each query
        mask = jnp.arange(S)[None, None] <= last[..., None]
    if key_positions is None:
        key_positions = positions if cache is None else jnp.broadcast_to(jnp.arange(S)[None], (B, S))
    masks = {False: mask} if not all(cfg.windowed) else {}
    if cfg.window is not None and any(cfg.windowed):
        masks[True] = mask & (positions[:, :, None] - key_positions[:, None, :] < cfg.window)
    return masks


def _check_range(cfg, x, start, stop, collect):
    if not 0 <= start <= stop <= cfg.num_layers:
        raise ValueError(
            f"forward: start_layer={start}, stop_layer={stop}; expected 0 <= start <= stop <= {cfg.num_layers}."
        )
    if jnp.issubdtype(x.dtype, jnp.integer) and start > 0:
        raise ValueError(f"forward: found tokens and start_layer={start}; expected the hidden state entering it.")
    if bad := [i for i in collect if not start <= i <= stop]:
        raise ValueError(f"forward: collect={bad} is not reached; expected indices from {start} to {stop}.")


def _over_last(v: jax.Array, ndim: int) -> jax.Array:
    """Give a parameter the leading axes it needs, in float32 (rank promotion is never implicit)."""
    return v.astype(jnp.float32).reshape((1,) * (ndim - v.ndim) + v.shape)


@functools.lru_cache(maxsize=64)
def _layer_graph(cfg: DecoderConfig) -> Any:
    """The static half of `nnx.split(Layer(cfg))`, from shapes alone."""
    return nnx.graphdef(nnx.eval_shape(lambda: Layer(cfg, rngs=nnx.Rngs(0))))


def _plain(state: nnx.State) -> Params:
    """A nested dict of arrays: no NNX type reaches the hot paths."""
    return nnx.to_pure_dict(state)
