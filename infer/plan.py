"""A decoding step in the abstract: what `jaxaroo plan decode` compiles for chips that are not here."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..models.cache import KVCache
from ..models.decoder import (
    DecoderConfig,
    forward,
    init_params,
    lm_head,
    new_cache,
    param_axes,
    unstack_layers,
)
from ..models.multi_precision import QuantRules, init_scales, switch_bits, to_master
from ..models.quantise import QuantConfig
from ..sharding.mesh import batch_ways
from ..sharding.plan import Plan, plan
from ..sharding.rules import FSDP_TP, divisible

RULES = dataclasses.replace(FSDP_TP, embed=None)  # weights lie whole along fsdp: a step would gather all of them
WIDTHS = (8, 6, 4, 3, 2)


def plan_decoding(
    config: DecoderConfig, mesh: Mesh, chip: str, *, rows: int, capacity: int, nodes: int = 1, bits: int = 16
) -> Plan:
    """Compile one step of decoding: the next tokens of every row, or the judgement of a tree of guesses.

    Args:
      config: of the model; activations, cache and weights of 16 bits are bfloat16.
      mesh: of devices of `topology.devices_of`; rows lie along data and fsdp, heads and widths along tensor.
      chip: a key of `topology.CHIPS`.
      rows: sequences that are decoded at once.
      capacity: rows of the cache of each.
      nodes: tokens of a row that are read in one step; 1 is plain decoding.
      bits: of the matrices of the layers, 16 or one of `WIDTHS`; fewer than 16 on one device alone.

    Raises:
      ValueError: for rows that the mesh does not divide, or widths that it does not serve.
    """
    if bits != 16 and (bits not in WIDTHS or mesh.size > 1):
        found = f"bits={bits} on {mesh.size} devices"
        raise ValueError(f"plan decode: {found}; expected 16, or one of {WIDTHS} on one device.")
    ways, words = batch_ways(mesh, RULES)
    if rows % ways:
        raise ValueError(f"plan decode: {rows} rows on the parts {words}; expected a multiple of {ways}.")
    cfg = dataclasses.replace(config, dtype="bfloat16")
    weights, cache = _weights(cfg, mesh, bits), _cache(cfg, mesh, rows, capacity)
    spec = divisible(RULES.spec("batch", None), (rows, nodes), mesh.shape, "tokens")
    tokens = jax.ShapeDtypeStruct((rows, nodes), jnp.int32, sharding=NamedSharding(mesh, spec))

    def step(params: Any, tokens: Any, positions: Any, cache: KVCache):
        out = forward(cfg, params, tokens, positions, cache=cache, rules=RULES)
        return jnp.argmax(lm_head(cfg, params, out.hidden, rules=RULES), axis=-1), out.cache

    places = jax.tree.map(lambda x: x.sharding, cache)
    run = jax.jit(step, donate_argnums=3, out_shardings=(None, places))
    parts = {"parameters": weights, "cache": cache, "tokens": (tokens, tokens)}
    return plan(run, (weights, tokens, tokens, cache), parts, mesh, chip)


# ----------------------------------------------------------------------------------------------------------- private
def _weights(cfg: DecoderConfig, mesh: Mesh, bits: int) -> Any:
    rules: QuantRules = ((r"layers/(attn/[qkvo]|mlp/(gate|up|down))", QuantConfig(bits=WIDTHS)),)

    def served():
        params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), init_params(cfg, jax.random.key(0)))
        if bits == 16:
            return params
        return switch_bits(unstack_layers(to_master(params, init_scales(params, rules), rules)), bits, rules)

    shapes = jax.eval_shape(served)
    if bits != 16:
        whole = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)
    places = RULES.shardings(mesh, param_axes(cfg), shapes)
    one = lambda x, at: jax.ShapeDtypeStruct(
        x.shape[1:], x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*at.spec[1:]))
    )
    layer = jax.tree.map(one, shapes["layers"], places["layers"])
    ends = {k: v for k, v in shapes.items() if k != "layers"}
    held = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), ends, {k: places[k] for k in ends}
    )
    return held | {"layers": (layer,) * cfg.num_layers}


def _cache(cfg: DecoderConfig, mesh: Mesh, rows: int, capacity: int) -> Any:
    def one(x: Any) -> jax.ShapeDtypeStruct:
        names = ("batch", None, "kv_heads", None)[: x.ndim]
        spec = divisible(RULES.spec(*names), x.shape, mesh.shape, "cache")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, jax.eval_shape(lambda: new_cache(cfg, rows, capacity)))
