"""The step of a run in the abstract: what `jaxaroo plan` compiles for chips that are not here."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from ..models.decoder import DecoderConfig
from ..models.tokenizer import byte_tokenizer
from ..sharding.mesh import batch_ways
from ..sharding.plan import Compiling, Plan, plan
from ..sharding.rules import divisible
from .algorithms import ALGORITHMS, RlOptions, trainable
from .data.pipeline import Batch
from .objectives.policy_gradient import Rollout
from .optimizer import make_optimizer
from .recipe import RECIPES, Origin
from .rl import RlConfig, update_of
from .run import RULES, RunConfig, state_shapes, step_of

KINDS = tuple(name for name in RECIPES if name != "acceptance")  # its drafter stands in a folder


def plan_training(
    kind: str, cfg: RunConfig, options: Any, config: DecoderConfig, mesh: Mesh, chip: str, how: Compiling = Compiling()
) -> Plan:
    """Compile the step that a run of these settings makes, from shapes alone.

    Args:
      kind: of training, one of `KINDS`.
      cfg: of the run; its model, data and mesh are not looked at.
      options: of this kind alone.
      config: of the model.
      mesh: of devices of `topology.devices_of`.
      chip: a key of `topology.CHIPS`.
      how: as `sharding.plan.plan` takes it.

    Raises:
      ValueError: for a batch that the mesh does not divide, or settings that do not go together.
    """
    recipe = RECIPES[kind]
    origin = Origin(dataclasses.replace(config, dtype=cfg.dtype or "bfloat16"), byte_tokenizer(), None)
    what = recipe.trainable(origin, options, cfg.lora if cfg.adapters == "lora" else None)
    tx = recipe.optimizer(origin, options, cfg.optimizer, cfg.steps)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state, window = state_shapes(cfg, origin, what, tx, mesh), window_shapes(cfg, mesh, recipe.more(options))
        build = lambda cfg: step_of(cfg, kind, options, origin, what, tx, state)
    parts = {"parameters": state.params, "optimiser": state.opt_state, "frozen": state.frozen, "mean": state.ema}
    parts |= {"reference": state.carry, "batch": window}
    step, straight = build(cfg), build(dataclasses.replace(cfg, remat="none"))
    return plan(step, (state, window), parts, mesh, chip, useful=straight, how=how)


def plan_updates(
    cfg: RunConfig, options: RlOptions, config: DecoderConfig, mesh: Mesh, chip: str, how: Compiling = Compiling()
) -> Plan:
    """Compile the first update of a step of `train rl`, which learns from answers that were sampled elsewhere.

    Args:
      cfg: sizes, adapters and optimiser; a row holds a prompt and its answer, or several.
      options: the algorithm.
      config: of the model.
      mesh: of devices of `topology.devices_of`.
      chip: a key of `topology.CHIPS`.
      how: as `sharding.plan.plan` takes it.

    Raises:
      ValueError: for a batch that the mesh does not divide.
    """
    origin = Origin(dataclasses.replace(config, dtype=cfg.dtype or "bfloat16"), byte_tokenizer(), None)
    what = trainable(origin, options, cfg.lora if cfg.adapters == "lora" else None)
    tx = make_optimizer(cfg.optimizer, cfg.steps)
    length, heads = cfg.batch.max_length, ALGORITHMS[options.algorithm].heads(options)
    asked = RlConfig(
        model=cfg.model, data=cfg.data, out=cfg.out, max_length=length, max_new_tokens=length // 2, remat=cfg.remat
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state = state_shapes(cfg, origin, what, tx, mesh)
        more = ("sampled", *(f"{of}/{name}" for name in heads for of in ("old", "return")))
        batch = window_shapes(cfg, mesh, more)
        rollout = Rollout(batch, batch.weights, None, batch.weights if options.kl_weight else None)
        build = lambda asked: update_of(asked, options, origin, what, tx, state)
    parts = {"parameters": state.params, "optimiser": state.opt_state, "frozen": state.frozen}
    parts |= {"reference": state.carry, "batch": rollout}
    straight = build(dataclasses.replace(asked, remat="none"))
    return plan(build(asked), (state, rollout), parts, mesh, chip, useful=straight, how=how)


def window_shapes(cfg: RunConfig, mesh: Mesh, more: tuple[str, ...] = ()) -> Batch:
    """One window of a run as it is put on the devices.

    Args:
      cfg: its batch settings.
      mesh: of the devices.
      more: names of further numbers of targets.
    """
    batch = cfg.batch
    shape = batch.micro_batches, batch.size // batch.micro_batches, batch.max_length
    ways, words = batch_ways(mesh, RULES)
    if shape[1] % ways:
        raise ValueError(
            f"plan: {shape[1]} rows of a micro-batch on the parts {words}; expected a multiple of {ways}. "
            f"Make the batch a multiple of {ways * batch.micro_batches}, or give tensor or sequence more devices."
        )
    spec = divisible(RULES.spec(None, "batch", "seq"), shape, mesh.shape, "window")
    one = partial(jax.ShapeDtypeStruct, shape, sharding=NamedSharding(mesh, spec))
    ints, floats = one(dtype=jnp.int32), one(dtype=jnp.float32)
    leaves: Any = (ints, ints, ints, ints, one(dtype=jnp.bool_), floats, floats, dict.fromkeys(more, floats) or None)
    return Batch(*leaves)


def run_config(rows: int, length: int, **settings: Any) -> RunConfig:
    """Settings of a run that is only planned: nothing is read and nothing is written.

    Args:
      rows: of a step, over all devices and micro-batches.
      length: tokens of a row.
      settings: others of `RunConfig`; `micro_batches` is the batch's.
    """
    base = RunConfig(model="preset:tiny", data="builtin:arithmetic", out=Path("unused"))
    batch = dataclasses.replace(
        base.batch, size=rows, max_length=length, micro_batches=settings.pop("micro_batches", 1)
    )
    return dataclasses.replace(base, batch=batch, **settings)
