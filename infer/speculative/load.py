"""From settings to a drafter and its rule: `lookup`, or a folder that says itself what kind of drafter it holds."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from ...models import checkpoint, eagle, hf, jakiro, kangaroo
from ...models.decoder import DecoderConfig, unstack_layers
from ...models.safetensors import CheckpointError, read_json
from . import stop, verify
from .drafters import eagle as eagle_drafter
from .drafters import jakiro as jakiro_drafter
from .drafters import kangaroo as kangaroo_drafter
from .drafters import lookup, small_model
from .draw import Draw
from .loop import Drafter, Speculation, check
from .settings import SpeculationConfig
from .verify import Verifier


def load_speculation(cfg: SpeculationConfig, target: DecoderConfig) -> Speculation | None:
    """Read the drafter and pair it with its rule; None where no drafter is named.

    Raises:
      CheckpointError: for a folder that holds no drafter for this target.
      ValueError: for settings that do not go together, or would bias the output.
    """
    if cfg.drafter is None:
        return None
    if cfg.drafter == "lookup":
        found = Speculation(lookup.make_drafter(cfg.drafts), verify.coupled())
        _only(cfg, "lookup", ("auto", "chain"), drawn=False)
    else:
        found = _from_folder(cfg, Path(cfg.drafter), target)
    found = found._replace(verifier=_rule(cfg, found.drafter))
    check(found.drafter, found.verifier)
    return found


def with_drafter(
    cfg: SpeculationConfig, network: eagle.EagleConfig | jakiro.JakiroConfig | kangaroo.KangarooConfig
) -> Drafter:
    """The drafter that serves a small network beside a target."""
    draw = _draw(cfg, not isinstance(network, kangaroo.KangarooConfig))
    tree: Any = dict(nodes=cfg.nodes, beam=cfg.beam, levels=cfg.levels)
    if isinstance(network, eagle.EagleConfig):
        _only(cfg, "eagle", ("auto", "dynamic", "static"))
        fixed = cfg.shape == "static" or (cfg.shape == "auto" and draw == "without_replacement")
        return eagle_drafter.make_drafter(network, tree="static" if fixed else "dynamic", draw=draw, **tree)
    if isinstance(network, jakiro.JakiroConfig):
        _only(cfg, "jakiro", ("auto", "dynamic"))
        return jakiro_drafter.make_drafter(network, draw=draw, **tree)
    _only(cfg, "kangaroo", ("auto", "chain", "dynamic"), stops=True)
    rule = stop.confidence() if cfg.stop_rule == "confidence" else stop.fixed()
    if cfg.shape == "dynamic":
        return kangaroo_drafter.make_tree_drafter(network, draw=draw, stop=rule, **tree)
    return kangaroo_drafter.make_drafter(network, cfg.drafts, draw, rule)


def drafter_params(cfg: SpeculationConfig, network: Any, params: Any) -> Any:
    """The parameters as that drafter takes them."""
    if not isinstance(network, kangaroo.KangarooConfig):
        return params
    return {"adapter": params, "stop": {"eta": jnp.float32(cfg.eta)} if cfg.stop_rule == "confidence" else ()}


# ----------------------------------------------------------------------------------------------------------- private
def _from_folder(cfg: SpeculationConfig, folder: Path, target: DecoderConfig) -> Speculation:
    kind = read_json(folder / "config.json").get("model_type", "")
    small = {"jaxaroo-eagle": eagle, "jaxaroo-jakiro": jakiro, "jaxaroo-kangaroo": kangaroo}
    if network := small.get(kind):
        config, params = checkpoint.load_for(folder, target, network.config_of, network.param_shapes)
        return Speculation(with_drafter(cfg, config), verify.coupled(), drafter_params(cfg, config, params))
    _only(cfg, "small model", ("auto", "chain"))
    config, params = hf.load(folder, dtype=target.dtype)  # type: ignore[arg-type]
    if config.vocab_size != target.vocab_size:
        raise CheckpointError(
            f"{folder}: a vocabulary of {config.vocab_size}; expected {target.vocab_size}, that of the model it drafts "
            "for. Use a drafter with the same tokenizer."
        )
    drafter = small_model.make_drafter(config, cfg.drafts, _draw(cfg, False), cfg.chains)
    return Speculation(drafter, verify.coupled(), unstack_layers(params))


def _draw(cfg: SpeculationConfig, tree: bool) -> Draw:
    if cfg.draw != "auto":
        return cfg.draw
    if cfg.verifier in ("auto", "coupled"):
        return "shared"
    return "without_replacement" if tree else "independent"


def _rule(cfg: SpeculationConfig, drafter: Drafter) -> Verifier:
    if cfg.verifier == "rejection":
        return verify.rejection(drafter.most, drafter.proposal)
    if cfg.verifier == "k-seq":
        return verify.k_seq(cfg.chains)
    return verify.coupled()


def _only(cfg: SpeculationConfig, name: str, shapes: tuple[str, ...], *, stops=False, drawn=True) -> None:
    if cfg.shape not in shapes:
        raise ValueError(f"speculation: shape={cfg.shape!r} with {name}; expected {' or '.join(map(repr, shapes))}.")
    if cfg.stop_rule != "none" and not stops:
        raise ValueError(
            f"speculation: stop_rule={cfg.stop_rule!r} with {name}; expected 'none'. Kangaroo has stop rules."
        )
    if cfg.draw != "auto" and not drawn:
        raise ValueError(
            f"speculation: draw={cfg.draw!r} with {name}; expected 'auto', for it copies and draws nothing."
        )
