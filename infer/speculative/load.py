"""From settings to a drafter and its rule: a name, or a folder that says itself what kind of drafter it holds."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ...models import checkpoint, eagle, heads, hf, jakiro, kangaroo
from ...models.decoder import DecoderConfig, Params, unstack_layers
from ...models.safetensors import CheckpointError, read_json
from ...models.tokenizer import Tokenizer
from . import stop, verify
from .drafters import aded, lookup, small_model
from .drafters import eagle as eagle_drafter
from .drafters import jakiro as jakiro_drafter
from .drafters import kangaroo as kangaroo_drafter
from .draw import Draw
from .loop import Drafter, Speculation, check
from .settings import SpeculationConfig
from .verify import Verifier

Network = DecoderConfig | eagle.EagleConfig | jakiro.JakiroConfig | kangaroo.KangarooConfig


def load_speculation(
    cfg: SpeculationConfig,
    target: DecoderConfig,
    tokenizer: Tokenizer | None = None,
    at_width: Callable[[int], Params] | None = None,
) -> Speculation | None:
    """Read the drafter and pair it with its rule; None where no drafter is named.

    Args:
      cfg: what the user asks for.
      target: the model that is drafted for.
      tokenizer: its own; needed to read a corpus.
      at_width: its own parameters at a width, if it has a master (`multi_precision.switch_bits`).

    Raises:
      CheckpointError: for a folder that holds no drafter for this target.
      ValueError: for settings that do not go together, or would bias the output.
    """
    if cfg.drafter is None:
        return None
    if cfg.drafter == "lookup":
        _only(cfg, "lookup", ("auto", "chain"), drawn=False)
        found = Speculation(_lookup(cfg), verify.coupled(), shorter=_half(cfg, _lookup))
    elif cfg.drafter == "aded":
        _only(cfg, "aded", ("auto", "dynamic"), drawn=False)
        table = _tri_grams(cfg, target, tokenizer)
        found = Speculation(_aded(cfg), verify.coupled(), table, shorter=_half(cfg, _aded))
    elif cfg.drafter == "self":
        found = _narrower(cfg, target, at_width)
    else:
        found = _from_folder(cfg, Path(cfg.drafter), target)
    if cfg.corpus is not None and cfg.drafter != "aded":
        raise ValueError(f"speculation: corpus={cfg.corpus!r} with drafter={cfg.drafter!r}; expected 'aded'.")
    verifier = _rule(cfg, found.drafter)
    check(found.drafter, verifier)
    shorter = found.shorter if verifier == verify.coupled() else ()  # other rules leave no choice to the clock
    return found._replace(verifier=verifier, verifier_params=_judge_params(cfg, target), shorter=shorter)


def with_drafter(cfg: SpeculationConfig, network: Network) -> Drafter:
    """The drafter that serves a small decoder, or a small network beside a target."""
    draw = _draw(cfg, isinstance(network, eagle.EagleConfig | jakiro.JakiroConfig))
    if isinstance(network, DecoderConfig):
        _only(cfg, "small model", ("auto", "chain"), stops=True)
        return small_model.make_drafter(network, cfg.drafts, draw, cfg.chains, _stop_rule(cfg))
    tree: Any = dict(nodes=cfg.nodes, beam=cfg.beam, levels=cfg.levels)
    if isinstance(network, eagle.EagleConfig):
        _only(cfg, "eagle", ("auto", "dynamic", "static"))
        fixed = cfg.shape == "static" or (cfg.shape == "auto" and draw == "without_replacement")
        return eagle_drafter.make_drafter(network, tree="static" if fixed else "dynamic", draw=draw, **tree)
    if isinstance(network, jakiro.JakiroConfig):
        _only(cfg, "jakiro", ("auto", "dynamic"))
        return jakiro_drafter.make_drafter(network, draw=draw, **tree)
    _only(cfg, "kangaroo", ("auto", "chain", "dynamic"), stops=True)
    if cfg.shape == "dynamic":
        if cfg.stop_rule == "head":
            raise ValueError(
                "speculation: stop_rule='head' with shape='dynamic'; expected 'chain' or 'auto'. The head was trained "
                "on chains, and a level of a tree has many."
            )
        return kangaroo_drafter.make_tree_drafter(network, draw=draw, stop=_stop_rule(cfg), **tree)
    return kangaroo_drafter.make_drafter(network, cfg.drafts, draw, _stop_rule(cfg))


def drafter_params(cfg: SpeculationConfig, network: Network, params: Any, stop_head: Any = None) -> Any:
    """The parameters as that drafter takes them; `stop_head`, where the rule is `head`, are those of the head."""
    if isinstance(network, eagle.EagleConfig | jakiro.JakiroConfig):
        return params
    rule: Any = ()
    if cfg.stop_rule == "confidence":
        rule = {"eta": jnp.float32(cfg.eta)}
    if cfg.stop_rule == "head":
        rule = stop_head | {"threshold": jnp.float32(cfg.stop_threshold)}
    if isinstance(network, DecoderConfig):
        return {"model": unstack_layers(params), "stop": rule}
    return {"adapter": params, "stop": rule}


# ----------------------------------------------------------------------------------------------------------- private
def _from_folder(cfg: SpeculationConfig, folder: Path, target: DecoderConfig) -> Speculation:
    kind = read_json(folder / "config.json").get("model_type", "")
    small = {"jaxaroo-eagle": eagle, "jaxaroo-jakiro": jakiro, "jaxaroo-kangaroo": kangaroo}
    if network := small.get(kind):
        config, params = checkpoint.load_for(folder, target, network.config_of, network.param_shapes)
    else:
        config = dataclasses.replace(hf.read_config(folder), dtype=target.dtype)
        if config.vocab_size != target.vocab_size:
            raise CheckpointError(
                f"{folder}: a vocabulary of {config.vocab_size}; expected {target.vocab_size}, that of the model it "
                "drafts for. Use a drafter with the same tokenizer."
            )
        params = None
    drafter, head = with_drafter(cfg, config), _stop_head(cfg, config)  # which may refuse, before a whole model is read
    if params is None:
        params = hf.load(folder, dtype=target.dtype).params  # type: ignore[arg-type]
    least = 2 if isinstance(config, jakiro.JakiroConfig) else 1  # its last level is never read
    shorter = _half(cfg, lambda cfg: with_drafter(cfg, config), least)
    return Speculation(drafter, verify.coupled(), drafter_params(cfg, config, params, head), shorter=shorter)


def _narrower(cfg: SpeculationConfig, target: DecoderConfig, at_width: Callable[[int], Params] | None) -> Speculation:
    """The target at fewer bits: one master, whose floats, scales and codes the two share as far as they can."""
    if at_width is None or cfg.draft_bits is None:
        raise ValueError("speculation: drafter='self' for plain weights; expected a master (train qat).")
    make = lambda cfg: with_drafter(cfg, target)
    params = drafter_params(cfg, target, at_width(cfg.draft_bits), _stop_head(cfg, target))
    return Speculation(make(cfg), verify.coupled(), params, shorter=_half(cfg, make))


def _aded(cfg: SpeculationConfig) -> Drafter:
    return aded.make_drafter(nodes=cfg.nodes, depth=cfg.levels, simulations=max(64, cfg.nodes - 1))


def _lookup(cfg: SpeculationConfig) -> Drafter:
    return lookup.make_drafter(cfg.drafts)


def _half(cfg: SpeculationConfig, make: Callable[[SpeculationConfig], Drafter], least: int = 1) -> tuple[Drafter, ...]:
    """The same drafter with half the depth, for texts where long drafts do not pay; none where it cannot be shorter."""
    if cfg.chains > 1:  # each step feeds what the chains of one as deep may have left wrong in the cache
        return ()
    levels = max(least, cfg.levels // 2)
    nodes = max(2, min(cfg.nodes // 4, 1 + cfg.beam ** min(levels, 2)))  # no more than so many levels hold
    half = dataclasses.replace(cfg, drafts=cfg.drafts // 2 or 1, levels=levels, nodes=nodes)
    short = make(half)
    return (short,) if short.depth < make(cfg).depth else ()


def _tri_grams(cfg: SpeculationConfig, target: DecoderConfig, tokenizer: Tokenizer | None) -> aded.Table:
    """Of the corpus, line by line so that it need not fit into memory; an empty table without one."""
    if cfg.corpus is None:
        return aded.build_table(())
    if tokenizer is None:
        raise ValueError("speculation: corpus without a tokenizer; expected the target's, to read it.")
    with open(cfg.corpus, encoding="utf-8") as file:
        table = aded.build_table(tokenizer.encode(line, bos=False) for line in file)
    if (most := int(table.tokens.max())) >= target.vocab_size:
        raise ValueError(
            f"speculation: the tokenizer makes token {most} of {cfg.corpus}; expected ids below {target.vocab_size}, "
            "the model's vocabulary. Use the model's own tokenizer."
        )
    return table


def _stop_rule(cfg: SpeculationConfig) -> stop.StopRule:
    return {"none": stop.fixed, "confidence": stop.confidence, "head": stop.acceptance_head}[cfg.stop_rule]()


def _stop_head(cfg: SpeculationConfig, network: Network) -> Any:
    """The acceptance head that was trained on this network's states, if the rule asks for one."""
    if cfg.stop_rule != "head":
        return None
    if cfg.stop_head is None:
        raise ValueError("speculation: stop_rule='head' without stop_head; expected the folder of a trained head.")
    exits = network.exit_layer if isinstance(network, kangaroo.KangarooConfig) else None
    reads = network if isinstance(network, DecoderConfig) else network.target
    folder = Path(cfg.stop_head)
    head, params = checkpoint.load_for(folder, reads, heads.acceptance_config_of, heads.param_shapes)
    if head.exit_layer != exits:
        kind = lambda layer: "a small model" if layer is None else f"a Kangaroo adapter behind layer {layer}"
        raise CheckpointError(
            f"{folder}: a head for {kind(head.exit_layer)}; expected one for {kind(exits)}. Train one for this drafter."
        )
    return params


def _judge_params(cfg: SpeculationConfig, target: DecoderConfig) -> Any:
    if cfg.verifier != "judge":
        return ()
    if cfg.judge is None:
        raise ValueError("speculation: verifier='judge' without judge; expected the folder of a trained judge.")
    params = checkpoint.load_for(Path(cfg.judge), target, heads.judge_config_of, heads.param_shapes)[1]
    return params | {"threshold": jnp.float32(cfg.judge_threshold)}


def _draw(cfg: SpeculationConfig, tree: bool) -> Draw:
    if cfg.draw != "auto":
        return cfg.draw
    if cfg.verifier in ("auto", "coupled", "judge"):
        return "shared"
    return "without_replacement" if tree else "independent"


def _rule(cfg: SpeculationConfig, drafter: Drafter) -> Verifier:
    if cfg.verifier == "rejection":
        return verify.rejection(drafter.most, drafter.proposal)
    if cfg.verifier == "k-seq":
        return verify.k_seq(cfg.chains)
    if cfg.verifier == "judge":
        return verify.judge(verify.coupled(), drafter.most)
    return verify.coupled()


def _only(cfg: SpeculationConfig, name: str, shapes: tuple[str, ...], *, stops=False, drawn=True) -> None:
    if cfg.shape not in shapes:
        raise ValueError(f"speculation: shape={cfg.shape!r} with {name}; expected {' or '.join(map(repr, shapes))}.")
    if cfg.stop_rule != "none" and not stops:
        raise ValueError(
            f"speculation: stop_rule={cfg.stop_rule!r} with {name}; expected 'none'. Kangaroo and small models "
            "have stop rules."
        )
    if cfg.chains > 1 and name != "small model":
        raise ValueError(f"speculation: chains={cfg.chains} with {name}; expected 1. A small model drafts several.")
    if cfg.draw != "auto" and not drawn:
        raise ValueError(
            f"speculation: draw={cfg.draw!r} with {name}; expected 'auto', for it copies and draws nothing."
        )
