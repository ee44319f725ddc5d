"""Decoding steps in the abstract: what `jaxaroo plan decode` compiles for chips that are not here."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from ..models import eagle, jakiro, kangaroo
from ..models.cache import KVCache
from ..models.decoder import (
    DecoderConfig,
    forward,
    init_params,
    lm_head,
    new_cache,
    unstack_layers,
)
from ..models.multi_precision import QuantRules, init_scales, placements, switch_bits, to_master
from ..models.quantise import QuantConfig
from ..sharding.mesh import batch_ways
from ..sharding.plan import Compiling, Plan, plan
from ..sharding.rules import SERVING, divisible
from .decode import Rows
from .devices import row_specs
from .sampling import Sampling, pack_sampling
from .speculative import loop, verify
from .speculative.drafters import lookup
from .speculative.load import drafter_params, with_drafter
from .speculative.settings import SpeculationConfig

WIDTHS = (8, 6, 4, 3, 2)
DRAFTERS = ("lookup", "eagle", "jakiro", "kangaroo")


def plan_decoding(
    config: DecoderConfig,
    mesh: Mesh,
    chip: str,
    *,
    rows: int,
    capacity: int,
    nodes: int = 1,
    bits: int = 16,
    how: Compiling = Compiling(),
) -> Plan:
    """Compile one step of decoding: the next tokens of every row, or the judgement of a tree of guesses.

    Args:
      config: of the model; activations, cache and weights of 16 bits are bfloat16.
      mesh: of devices of `topology.devices_of`; rows lie along data and fsdp, heads and widths along tensor.
      chip: a key of `topology.CHIPS`.
      rows: sequences that are decoded at once.
      capacity: rows of the cache of each.
      nodes: tokens of a row that are read in one step; 1 is plain decoding.
      bits: of the matrices of the layers, 16 or one of `WIDTHS`.
      how: as `sharding.plan.plan` takes it.

    Raises:
      ValueError: for rows that the mesh does not divide, or another width.
    """
    if bits != 16 and bits not in WIDTHS:
        raise ValueError(f"plan decode: bits={bits}; expected 16, or one of {WIDTHS}.")
    _check_rows(mesh, rows)
    cfg = dataclasses.replace(config, dtype="bfloat16")
    weights, cache = _weights(cfg, mesh, bits), _cache(cfg, mesh, rows, capacity)
    spec = divisible(SERVING.spec("batch", None), (rows, nodes), mesh.shape, "tokens")
    tokens = jax.ShapeDtypeStruct((rows, nodes), jnp.int32, sharding=NamedSharding(mesh, spec))

    def step(params: Any, tokens: Any, positions: Any, cache: KVCache):
        out = forward(cfg, params, tokens, positions, cache=cache, rules=SERVING)
        return jnp.argmax(lm_head(cfg, params, out.hidden, rules=SERVING), axis=-1), out.cache

    places = jax.tree.map(lambda x: x.sharding, cache)
    run = jax.jit(step, donate_argnums=3, out_shardings=(None, places))
    parts = {"parameters": weights, "cache": cache, "tokens": (tokens, tokens)}
    return plan(run, (weights, tokens, tokens, cache), parts, mesh, chip, how=how)


def plan_speculation(
    config: DecoderConfig,
    mesh: Mesh,
    chip: str,
    *,
    rows: int,
    capacity: int,
    drafter: str,
    how: Compiling = Compiling(),
    **settings: Any,
) -> Plan:
    """Compile one step of speculative decoding: the drafter proposes, the target judges, a path is kept.

    Its drafter is trained on no text: shapes say all that a plan needs. The walk down a tree ends when the rule does,
    so what it does once is counted once.

    Args:
      config: of the target; activations, cache and weights are bfloat16.
      mesh: as for `plan_decoding`; a drafter lies as its target does.
      chip: a key of `topology.CHIPS`.
      rows: sequences that are decoded at once.
      capacity: rows of the cache of each.
      drafter: one of `DRAFTERS`.
      how: as `sharding.plan.plan` takes it.
      settings: others of `SpeculationConfig`.

    Raises:
      ValueError: for rows that the mesh does not divide, another drafter, or settings that do not go together.
    """
    if drafter not in DRAFTERS:
        raise ValueError(f"plan decode: drafter={drafter!r}; expected one of {', '.join(DRAFTERS)}.")
    _check_rows(mesh, rows)
    cfg = dataclasses.replace(config, dtype="bfloat16")
    asked, rule = SpeculationConfig(drafter=drafter, **settings), verify.coupled()
    if drafter == "lookup":
        drafting, own = lookup.make_drafter(asked.drafts), ()
    else:
        network, init, axes = _network(drafter, cfg)
        drafting = with_drafter(asked, network)
        own = jax.eval_shape(lambda: jax.tree.map(_half, init(network, jax.random.key(0))))
        places = SERVING.shardings(mesh, axes(network), own)
        own = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), own, places)
        own = drafter_params(asked, network, own)
    weights = loop.Weights(_weights(cfg, mesh, 16), own, ())
    ints: Any = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    sampling = jax.eval_shape(lambda: pack_sampling([(Sampling(), 0, 0)] * rows, 0, cfg.vocab_size))
    asked_of = Rows(sampling, ints(rows), ints(rows), ints(rows, 1))
    begun = lambda *given: loop.prefill(cfg, given[0], drafting, *given[1:], chunk=capacity)
    state = _by_rows(jax.eval_shape(begun, weights, ints(rows, capacity), asked_of), mesh)
    asked_of = _by_rows(asked_of, mesh)
    step = lambda weights, state, rows: loop.one_step(cfg, weights, drafting, rule, state, rows, "raw")
    run = jax.jit(step, donate_argnums=1, out_shardings=jax.tree.map(lambda x: x.sharding, state))
    parts = {"parameters": weights.target, "drafter": own, "cache": state.rows.cache}
    parts |= {"state": (state._replace(rows=state.rows._replace(cache=None)), asked_of)}
    return plan(run, (weights, state, asked_of), parts, mesh, chip, how=how)


# ----------------------------------------------------------------------------------------------------------- private
def _weights(cfg: DecoderConfig, mesh: Mesh, bits: int) -> Any:
    rules: QuantRules = ((r"layers/(attn/[qkvo]|mlp/(gate|up|down))", QuantConfig(bits=WIDTHS)),)

    def served():
        params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), init_params(cfg, jax.random.key(0)))
        if bits == 16:
            return unstack_layers(params)
        return switch_bits(unstack_layers(to_master(params, init_scales(params, rules), rules)), bits, rules)

    shapes = jax.eval_shape(served)
    places = placements(cfg, shapes, mesh)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, places)


def _network(drafter: str, cfg: DecoderConfig) -> tuple[Any, Callable[..., Any], Callable[..., Any]]:
    """A drafter's network with the settings of its paper, its parameters and their axes."""
    if drafter == "eagle":
        return eagle.EagleConfig(target=cfg), eagle.init_params, eagle.param_axes
    if drafter == "jakiro":
        return jakiro.JakiroConfig(target=cfg), jakiro.init_params, jakiro.param_axes
    exits = max(1, (cfg.num_layers + 8) // 16)  # as published, 2 of a 7B model's 32 layers and 3 of a 13B one's 40
    return kangaroo.KangarooConfig(target=cfg, exit_layer=exits), kangaroo.init_params, kangaroo.param_axes


def _check_rows(mesh: Mesh, rows: int) -> None:
    ways, words = batch_ways(mesh, SERVING)
    if rows % ways:
        raise ValueError(f"plan decode: {rows} rows on the parts {words}; expected a multiple of {ways}.")


def _half(x: Any) -> Any:
    return x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _cache(cfg: DecoderConfig, mesh: Mesh, rows: int, capacity: int) -> Any:
    return _by_rows(jax.eval_shape(lambda: new_cache(cfg, rows, capacity)), mesh)


def _by_rows(tree: Any, mesh: Mesh) -> Any:
    place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    return jax.tree.map(place, tree, row_specs(tree, mesh.shape))
