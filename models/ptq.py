"""Quantise a trained model without training it: nearest codes, GPTQ (2210.17323) and LoRC (ZeroQuant-V2, 2303.08302).

These are the baselines of multi-precision training. Everything ends in its format, a master of the width b of a config,
`cfg.bits[0]`: codes C, int8 in [-2^(b-1), 2^(b-1) - 1], and a bfloat16 scale s for each output channel or group of
inputs, so `multi_precision.from_master` and `jaxlib_ext/qmm.py` serve what is made here.

    round to nearest    C = round(W / s),  s = max |W| / (2^(b-1) - 1)
    GPTQ                least ||X W^T - X W_q^T||^2, input by input: each code makes up for the errors before it
    LoRC                W - W_q ~ A B, the first r terms of the singular value decomposition

With H = X^T X = R R^T, R upper triangular, GPTQ's error is ||(W - W_q) R||^2. Inputs are taken in turn, and given those
before it the j-th column of (W - W_q) R would vanish at the weight

    w_j' = w_j + sum_{i < j} (w_i - C_i s_i) R_ij / R_jj        so that C_j = round(w_j' / s_j)

These are the paper's codes, found there with the inverse of H and by moving the weights that are left; here as in QuIP
(2307.13304, theorem 6): one Cholesky decomposition, no inverse, and no weight is written over.

A weight is `[out..., in...]`, its scale `[out..., M]`, as in `quantise.py`. Letters: N outputs and K inputs of a
flattened weight, M groups, r rank.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..jaxlib_ext.causal_attention import causal_attention
from .decoder import (
    DecoderConfig,
    Layer,
    Params,
    Rope,
    make_rope,
    project,
    rms_norm,
    rotate,
    stack_layers,
    unstack_layers,
)
from .multi_precision import DEFAULT_RULES, INPUT_AXES, QuantRules, init_scales, quantised_paths, to_master
from .quantise import QuantConfig, decode, encode, init_scale, snap, spread

BLOCK = 128  # inputs whose errors are summed at once; it changes the order of sums alone
Method = Literal["rtn", "search", "gptq"]
Tokens = Int[Array | np.ndarray, "B T"]


# ------------------------------------------------------------------------------------------------------- one matrix
def round_to_nearest(w: Float[Array, "..."], cfg: QuantConfig, over: int = 1) -> Params:
    """`{"codes", "scale"}` of the nearest codes, whatever `cfg.init` says; half goes to even.

    Args:
      w: the weight, outputs first.
      cfg: its first width, and its group.
      over: how many trailing axes are inputs.
    """
    scale = snap(init_scale(w, dataclasses.replace(cfg, init="absmax", emphasis=()), over))
    return {"codes": encode(w, scale, cfg.master), "scale": scale.astype(jnp.bfloat16)}


def gptq(
    w: Float[Array, "..."],
    moments: Float[Array, "K K"],
    cfg: QuantConfig,
    over: int = 1,
    *,
    damping: float = 0.01,
    act_order: bool = False,
) -> Params:
    """`{"codes", "scale"}` with the error of each input made up for by the inputs after it.

    Scales are those of `cfg.init`, snapped, before any code is chosen: "absmax" is the paper's. Groups take the scale
    of the weights as they came, not as compensation left them (the authors' code has both, and calls this one static).
    Compensation is for the width `cfg.bits[0]` alone: lower widths of such a master are rounded from it as always. An
    input that calibration never saw has nothing to make up for and nothing to pass on: its codes are the nearest. Not
    to be traced: it looks at the decomposition.

    Args:
      w: the weight, outputs first.
      moments: X^T X of its flattened inputs, up to a factor.
      cfg: its first width, group and init.
      over: how many trailing axes are inputs.
      damping: added to the diagonal of the moments, as a part of its mean.
      act_order: choose the codes of inputs with large second moments first.

    Raises:
      ValueError: if the moments are not positive definite, even damped.
    """
    K = math.prod(w.shape[w.ndim - over :])
    if moments.shape != (K, K):
        raise ValueError(f"gptq: moments {moments.shape} for a weight {w.shape}; expected {(K, K)}, its inputs.")
    order = jnp.argsort(-jnp.diag(moments), stable=True) if act_order else jnp.arange(K)
    feedback = _feedback(moments[order][:, order], damping=damping)
    if not bool(jnp.isfinite(feedback).all()):
        raise ValueError(
            f"gptq: moments with damping {damping} are not positive definite; expected X^T X of finite inputs. "
            "Use more calibration tokens, or more damping."
        )
    scale = snap(init_scale(w, cfg, over))
    rows = w.astype(jnp.float32).reshape(-1, K)[:, order]
    steps = jnp.broadcast_to(spread(scale, w.shape), w.shape).reshape(-1, K)[:, order]
    codes = _compensated(rows, steps, feedback, cfg.master)[:, jnp.argsort(order)]
    return {"codes": codes.reshape(w.shape), "scale": scale.astype(jnp.bfloat16)}


def lorc(
    w: Float[Array, "..."], low: Float[Array, "..."], rank: int, over: int = 1
) -> tuple[Float[Array, "... r"], Float[Array, "r K"]]:
    """Factors (a, b) of the matrix of this rank that is nearest to w - low: the weight is then used as low + a b.

    They cost r (N + K) numbers, in bfloat16 2 r (N + K) bytes: 0.4 % of the number of weights for r = 8, N = K = 4096.

    Args:
      w: the weight, outputs first.
      low: the same at a low width, say `decode(...)`, or any view of `from_master`.
      rank: r; the paper finds few enough.
      over: how many trailing axes are inputs.
    """
    K, out = math.prod(w.shape[w.ndim - over :]), w.shape[: w.ndim - over]
    if w.shape != low.shape or not 1 <= rank <= min(K, math.prod(out)):
        raise ValueError(
            f"lorc: weights {w.shape} and {low.shape}, rank {rank}; expected one shape, and a rank of at most "
            f"{min(K, math.prod(out))}."
        )
    error = (w.astype(jnp.float32) - low.astype(jnp.float32)).reshape(-1, K)
    u, s, v = jnp.linalg.svd(error, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return (u[:, :rank] * root[None]).reshape(*out, rank), root[:, None] * v[:rank]


# ------------------------------------------------------------------------------------------------------- calibration
class LayerInputs(NamedTuple):
    """What a layer's matrices are multiplied with, `[B, T, in...]`."""

    qkv: Float[Array, "B T D"]
    o: Float[Array, "B T N H"]
    gate_up: Float[Array, "B T D"]
    down: Float[Array, "B T F"]


class Moments(NamedTuple):
    """X^T X of the same, with flattened inputs, summed over all tokens in float32."""

    qkv: Float[Array, "D D"]
    o: Float[Array, "NH NH"]
    gate_up: Float[Array, "D D"]
    down: Float[Array, "F F"]


FIELDS = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "gate_up", "up": "gate_up", "down": "down"}


def run_layer(
    cfg: DecoderConfig, p: Params, x: Float[Array, "B T D"], rope: Rope, mask: Bool[Array, "B T T"]
) -> tuple[Float[Array, "B T D"], LayerInputs]:
    """One layer as `decoder.Layer` computes it, without a cache, and what its matrices saw on the way."""
    layer: Any = nnx.merge(_graph(cfg), p)
    attn, mlp = layer.attn, layer.mlp
    bias = lambda block, name: getattr(block, f"{name}_bias", None)
    heads = rms_norm(x, layer.attn_norm[...], cfg.norm_eps)
    q, k, v = (project(heads, getattr(attn, name), bias(attn, name)) for name in "qkv")
    if cfg.qk_norm:
        q, k = rms_norm(q, attn.q_norm[...], cfg.norm_eps), rms_norm(k, attn.k_norm[...], cfg.norm_eps)
    mixed = causal_attention(rotate(q, rope), rotate(k, rope), v, mask)
    x = x + project(mixed, attn.o, bias(attn, "o"), over=2)
    rows = rms_norm(x, layer.mlp_norm[...], cfg.norm_eps)
    gate, up = (project(rows, getattr(mlp, name), bias(mlp, name)) for name in ("gate", "up"))
    inner = jax.nn.silu(gate) * up
    return x + project(inner, mlp.down, bias(mlp, "down")), LayerInputs(heads, mixed, rows, inner)


def layer_inputs(
    cfg: DecoderConfig, params: Params, tokens: Tokens
) -> tuple[Float[Array, "B T D"], tuple[LayerInputs, ...]]:
    """What leaves the last layer, before the final norm, and what every matrix saw; for few tokens."""
    x, inputs = _embed(cfg, params, tokens), []
    for i, p in enumerate(unstack_layers(params)["layers"]):
        x, seen = run_layer(cfg, p, x, *_rope_and_mask(cfg, x, cfg.windowed[i]))
        inputs.append(seen)
    return x, tuple(inputs)


def second_moments(cfg: DecoderConfig, params: Params, calibration: Sequence[Tokens]) -> tuple[Moments, ...]:
    """X^T X for the matrices of each layer, over batches of whole sequences: every token counts, so no padding."""
    found: list[Moments] = []

    def each(i: int, p: Params, moments: Moments) -> Params:
        found.append(moments)
        return p

    _layer_by_layer(cfg, params, calibration, each)
    return tuple(found)


# ------------------------------------------------------------------------------------------------------- whole model
def quantise_model(
    cfg: DecoderConfig,
    params: Params,
    rules: QuantRules = DEFAULT_RULES,
    method: Method = "rtn",
    calibration: Sequence[Tokens] | None = None,
    *,
    damping: float = 0.01,
    act_order: bool = False,
) -> Params:
    """A master like that of `multi_precision.to_master`, for the same rules; its width is each config's first.

        "rtn"     scales reach the largest weight, codes are the nearest
        "search"  scales have the least error of W, summed over all widths of the config; codes are the nearest
        "gptq"    scales as the config's `init` says; codes have little error of X W^T, at the first width alone

    GPTQ is sequential: a layer is calibrated with what comes out of the quantised layers before it, all its matrices at
    once. Batches of one shape compile one program.

    Args:
      cfg: the decoder.
      params: its float weights, layers stacked or as a tuple; the master has the same form.
      rules: which matrices, and how; configs with gains are for "rtn" and "search".
      method: see above.
      calibration: batches of tokens, for "gptq": whole sequences without padding (the paper: 128 of 2048 tokens).
      damping: of `gptq`.
      act_order: of `gptq`.
    """
    if method not in ("rtn", "search", "gptq"):
        raise ValueError(f"quantise_model: method={method!r}; expected 'rtn', 'search' or 'gptq'.")
    if (method == "gptq") != (calibration is not None):
        raise ValueError(
            f"quantise_model: method={method!r} and {'a' if calibration is not None else 'no'} calibration; expected "
            "batches of tokens for 'gptq', and for no other."
        )
    if method != "gptq":
        # "linear": what is snapped is the scale itself, not a power of two of its logarithm
        chosen = tuple((rule, c and _starting(c, method)) for rule, c in rules)
        return to_master(params, init_scales(params, chosen), chosen)
    configs = quantised_paths(params, rules)
    if gains := [name for name, c in configs.items() if c.gain]:
        raise ValueError(
            f"quantise_model: {gains[0]} has gains, and method='gptq'; expected a config without. They would be fitted "
            "to other codes."
        )
    if outside := [name for name in configs if not name.startswith("layers/")]:
        raise ValueError(f"quantise_model: {outside[0]} and method='gptq'; expected matrices of layers.")
    layers = []

    def each(i: int, p: Params, moments: Moments) -> Params:
        stored, served = dict(p), dict(p)
        for path, c in configs.items():
            _, block, name = path.split("/")
            seen = getattr(moments, FIELDS[name])
            new = gptq(p[block][name], seen, c, INPUT_AXES[name], damping=damping, act_order=act_order)
            stored[block] = stored[block] | {name: new}
            served[block] = served[block] | {name: decode(new["codes"], new["scale"]).astype(p[block][name].dtype)}
        layers.append(stored)
        return served

    _layer_by_layer(cfg, params, calibration or (), each)
    master = params | {"layers": tuple(layers)}
    return master if isinstance(params["layers"], tuple) else stack_layers(master)


# ----------------------------------------------------------------------------------------------------------- private
def _starting(cfg: QuantConfig, method: Method) -> QuantConfig:
    init, emphasis = ("search", cfg.emphasis) if method == "search" else ("absmax", ())
    return dataclasses.replace(cfg, init=init, emphasis=emphasis, scale_param="linear")


@functools.partial(jax.jit, static_argnames="damping")
def _feedback(moments: Float[Array, "K K"], damping: float) -> Float[Array, "K K"]:
    """R_ij / R_jj above the diagonal, and 0 elsewhere."""
    diagonal = jnp.diag(moments)
    damped = moments + jnp.diag(jnp.where(diagonal > 0, damping * jnp.mean(diagonal), 1.0))  # 1: no input, any number
    upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]  # reversed, a lower triangle is an upper one
    return jnp.triu(upper / jnp.diag(upper)[None], 1)


@functools.partial(jax.jit, static_argnames="bits")
def _compensated(w: Float[Array, "N K"], steps: Float[Array, "N K"], feedback: Float[Array, "K K"], bits: int):
    """Codes [N, K]. Inputs are rows here, and come in blocks, so that most of the sums are one matrix product each."""
    N, K = w.shape
    pad = -K % BLOCK  # zeros with the scale 1 have the code 0, and no error
    rows = lambda x, fill: jnp.pad(x.T, ((0, pad), (0, 0)), constant_values=fill).reshape(-1, BLOCK, x.shape[0])
    back = jnp.pad(feedback.T, ((0, pad), (0, pad))).reshape(-1, BLOCK, K + pad)
    times = functools.partial(jnp.matmul, precision="highest")

    def one_input(errors, at):
        j, w, target, step, back = at
        codes = encode((target + times(back, errors))[:, None], step[:, None], bits)
        return errors.at[j].set(w - decode(codes, step[:, None])[:, 0]), codes[:, 0]

    def one_block(errors, at):
        first, w, steps, back = at
        target = w + times(back, errors)  # errors of this block and of those after it are still zero
        within = jax.lax.dynamic_slice(back, (0, first), (BLOCK, BLOCK))
        inputs = (jnp.arange(BLOCK), w, target, steps, within)
        new, codes = jax.lax.scan(one_input, jnp.zeros_like(w), inputs)
        return jax.lax.dynamic_update_slice(errors, new, (first, 0)), codes

    blocks = (jnp.arange(0, K + pad, BLOCK), rows(w, 0), rows(steps, 1), back)
    _, codes = jax.lax.scan(one_block, jnp.zeros((K + pad, N), jnp.float32), blocks)
    return codes.reshape(-1, N)[:K].T


def _layer_by_layer(
    cfg: DecoderConfig,
    params: Params,
    calibration: Sequence[Tokens],
    each: Callable[[int, Params, Moments], Params],
) -> None:
    """Call `each` with every layer and its moments; the weights that it returns make the next layer's inputs."""
    batches = [_embed(cfg, params, tokens) for tokens in calibration]
    if not batches:
        raise ValueError("calibration: found no batch; expected one or more of tokens [B, T].")
    for i, p in enumerate(unstack_layers(params)["layers"]):
        parts = [_moments(cfg, p, x, cfg.windowed[i]) for x in batches]
        after = each(i, p, jax.tree.map(lambda *m: sum(m[1:], start=m[0]), *parts))
        batches = [_outputs(cfg, after, x, cfg.windowed[i]) for x in batches]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _moments(cfg: DecoderConfig, p: Params, x: Float[Array, "B T D"], windowed: bool) -> Moments:
    _, inputs = run_layer(cfg, p, x, *_rope_and_mask(cfg, x, windowed))

    def squared(seen: Array) -> Array:
        rows = seen.astype(jnp.float32).reshape(x.shape[0] * x.shape[1], -1)
        return jnp.matmul(rows.T, rows, precision="highest")

    return Moments(*map(squared, inputs))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _outputs(cfg: DecoderConfig, p: Params, x: Float[Array, "B T D"], windowed: bool) -> Float[Array, "B T D"]:
    return run_layer(cfg, p, x, *_rope_and_mask(cfg, x, windowed))[0]


def _embed(cfg: DecoderConfig, params: Params, tokens: Tokens) -> Float[Array, "B T D"]:
    ids = jnp.asarray(tokens)
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"calibration: found {ids.dtype} of shape {ids.shape}; expected tokens [B, T].")
    return params["embed"][ids].astype(cfg.dtype)


def _rope_and_mask(cfg: DecoderConfig, x: Float[Array, "B T D"], windowed: bool) -> tuple[Any, Any]:
    B, T = x.shape[:2]
    back = jnp.arange(T)[:, None] - jnp.arange(T)[None]
    seen = (back >= 0) & (back < (cfg.window or T)) if windowed else back >= 0
    positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    return make_rope(cfg, positions), jnp.broadcast_to(seen[None], (B, T, T))


@functools.lru_cache(maxsize=64)
def _graph(cfg: DecoderConfig) -> Any:
    return nnx.graphdef(nnx.eval_shape(lambda: Layer(cfg, rngs=nnx.Rngs(0))))
