"""Jakiro's drafter: EAGLE's, with two experts in place of the MLP (2502.06282).

`contrastive`, the network of the authors' code. One linear router gives g in R^4, and with a, u of `eagle.py`

    w = softmax(g_0, g_1)    f_main = a + w_0 E_0(u) + w_1 E_1(u)
    v = softmax(g_2, g_3)    f_con  = a + s (v_0 E_0(u) - v_1 E_1(u))    s = 1 if g_2 > g_3 else -1

f_main guesses the next feature, as EAGLE's does; f_con, the heavier expert less the other, the one behind it, without
having seen the token between. A tree uses f_con once, for its last level. s has no gradient.

`mixture`, ours: the candidates of a level come from different experts, as the paper says and its code does not.

    f_b = a + E_b(u)    w = softmax(g_0, g_1)    q(x) = sum_b w_b softmax(head f_b)(x)

A guessed token hands on the feature of the branch that gave it most, argmax_b w_b q_b(x).

Experts are SwiGLU without biases, of inner width D by default, and both always run. Letters as in `decoder.py`; b or
E = 2 counts the branches.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..jaxlib_ext.expert_pair import Expert, expert_pair
from ..sharding.rules import REPLICATED, Rules
from .cache import KVCache, init_cache
from .checkpoint import rebuild_config
from .decoder import MLP, DecoderConfig, Params, lm_head
from .eagle import Front, axes_of, plain_params, run_front

KIND = "jakiro"  # in checkpoints


# ------------------------------------------------------------------------------------------------------------ config
@dataclasses.dataclass(frozen=True, kw_only=True)
class JakiroConfig:
    """What the drafter computes; sizes, biases and rotation of its attention are those of the target."""

    target: DecoderConfig
    fc_bias: bool = True
    experts_dim: int | None = None  # inner width of an expert; None is the target's embed_dim
    kind: Literal["contrastive", "mixture"] = "contrastive"

    def __post_init__(self):
        if self.experts_dim is not None and self.experts_dim < 1:
            raise ValueError(
                f"JakiroConfig.experts_dim: found {self.experts_dim}; expected a positive integer or None."
            )
        if self.kind not in ("contrastive", "mixture"):
            raise ValueError(f"JakiroConfig.kind: found {self.kind!r}; expected 'contrastive' or 'mixture'.")


def config_of(mapping: Mapping[str, Any], target: DecoderConfig) -> JakiroConfig:
    """The configuration that `checkpoint.load` found, for this target.

    Raises:
      CheckpointError: if the drafter was trained on another target, or is no Jakiro drafter.
    """
    return rebuild_config(JakiroConfig, KIND, mapping, target)


class Jakiro(nnx.Module):
    """The drafter's trained parameters."""

    def __init__(self, cfg: JakiroConfig, *, rngs: nnx.Rngs):
        D = cfg.target.embed_dim
        expert = dataclasses.replace(cfg.target, ffn_dim=cfg.experts_dim or D, mlp_bias=False)
        self.front = Front(cfg.target, cfg.fc_bias, rngs=rngs)
        self.expert_0 = MLP(expert, rngs=rngs)
        self.expert_1 = MLP(expert, rngs=rngs)
        width = 4 if cfg.kind == "contrastive" else 2
        self.router = nnx.Param(jax.random.normal(rngs.params(), (width, D)) * D**-0.5, axes=(None, "embed"))


# -------------------------------------------------------------------------------------------------------- parameters
def init_params(cfg: JakiroConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters; the same key gives the same weights."""
    return plain_params(Jakiro(cfg, rngs=nnx.Rngs(params=key)))


def param_shapes(cfg: JakiroConfig) -> Params:
    """The tree of `ShapeDtypeStruct`s that `init_params` would fill."""
    return jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))


def param_axes(cfg: JakiroConfig) -> Params:
    """Logical axis names of every parameter, as a tree with a tuple at each leaf."""
    return axes_of(nnx.eval_shape(lambda: Jakiro(cfg, rngs=nnx.Rngs(0))))


def new_cache(cfg: JakiroConfig, batch: int, capacity: int, dtype: jax.typing.DTypeLike | None = None) -> KVCache:
    """An empty cache of the one layer; `dtype` defaults to that of the activations."""
    target = cfg.target
    return init_cache(1, batch, capacity, target.num_kv_heads, target.head_dim, dtype or target.dtype)


# ----------------------------------------------------------------------------------------------------------- forward
class JakiroOutput(NamedTuple):
    """What a forward pass of the contrastive network leaves behind."""

    main: Float[Array, "B T D"]  # guesses f_{t+1}
    contrast: Float[Array, "B T D"]  # guesses f_{t+2}; costs nothing under jit where nobody reads it
    cache: KVCache | None  # new rows written behind the committed ones; `length` as it was


class MixtureOutput(NamedTuple):
    """What a forward pass of the mixture leaves behind."""

    branches: Float[Array, "B T E D"]  # each guesses f_{t+1}
    log_weights: Float[Array, "B T E"]  # float32
    cache: KVCache | None

    @property
    def weights(self) -> Float[Array, "B T E"]:
        """The share w_b of each branch."""
        return jnp.exp(self.log_weights)


def forward(
    cfg: JakiroConfig,
    params: Params,
    target_params: Params,
    features: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    mask: Bool[Array, "B T S"] | None = None,
    cache: KVCache | None = None,
    *,
    rules: Rules = REPLICATED,
) -> JakiroOutput:
    """Guess the next feature and the one behind it; arguments as in `eagle.forward`."""
    _expect(cfg, "contrastive", "forward")
    net, a, u, cache = _run(cfg, params, target_params, features, tokens, positions, mask, cache, rules)
    rows = lambda x: x.reshape(-1, x.shape[-1])
    experts = (Expert(*(w[...] for w in (e.gate, e.up, e.down))) for e in (net.expert_0, net.expert_1))
    mixed = expert_pair(rows(a), rows(u), net.router[...], tuple(experts))  # type: ignore[arg-type]
    keep = lambda f: rules.constrain(f.reshape(a.shape).astype(cfg.target.dtype), "batch", "seq", None)
    return JakiroOutput(keep(mixed.main), keep(mixed.contrast), cache)


def forward_mixture(
    cfg: JakiroConfig,
    params: Params,
    target_params: Params,
    features: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    mask: Bool[Array, "B T S"] | None = None,
    cache: KVCache | None = None,
    *,
    rules: Rules = REPLICATED,
) -> MixtureOutput:
    """Guess the next feature once for each expert; arguments as in `eagle.forward`."""
    _expect(cfg, "mixture", "forward_mixture")
    net, a, u, cache = _run(cfg, params, target_params, features, tokens, positions, mask, cache, rules)
    g = jnp.einsum("btd,rd->btr", u, net.router[...].astype(u.dtype), preferred_element_type=jnp.float32)
    wide = lambda x: x.astype(jnp.float32)
    branches = jnp.stack([wide(a) + wide(e(u, rules)) for e in (net.expert_0, net.expert_1)], axis=2)
    branches = rules.constrain(branches.astype(cfg.target.dtype), "batch", "seq", None, None)
    return MixtureOutput(branches, jax.nn.log_softmax(g), cache)


def branch_log_probs(
    cfg: JakiroConfig, target_params: Params, out: MixtureOutput, *, rules: Rules = REPLICATED
) -> Float[Array, "B T E V"]:
    """log w_b q_b(x): what each branch gives each token, float32."""
    B, T, E, D = out.branches.shape
    z = lm_head(cfg.target, target_params, out.branches.reshape(B, T * E, D), rules=rules)
    return out.log_weights[..., None] + jax.nn.log_softmax(z).reshape(B, T, E, -1)


def mixture_log_probs(given: Float[Array, "B T E V"]) -> Float[Array, "B T V"]:
    """log q(x) of the mixture, from `branch_log_probs`."""
    return jax.nn.logsumexp(given, axis=2)


def winning_features(
    out: MixtureOutput, given: Float[Array, "B T E V"], tokens: Int[Array, "B T n"]
) -> Float[Array, "B T n D"]:
    """For n chosen tokens a position, the feature of the branch that gave each most; the first one wins a tie."""
    of_tokens = jnp.take_along_axis(given, tokens[:, :, None, :], axis=3)  # [B, T, E, n]
    return jnp.take_along_axis(out.branches, jnp.argmax(of_tokens, axis=2)[..., None], axis=2)


# ----------------------------------------------------------------------------------------------------------- private
def _run(cfg, params, target_params, features, tokens, positions, mask, cache, rules):
    """The network, a, u, and the cache."""
    net: Any = nnx.merge(_graph(cfg), params)
    return net, *run_front(cfg.target, net.front, target_params, features, tokens, positions, mask, cache, rules)


def _expect(cfg: JakiroConfig, kind: str, where: str) -> None:
    if cfg.kind != kind:
        other = "forward_mixture" if where == "forward" else "forward"
        raise ValueError(f"jakiro.{where}: found a {cfg.kind} drafter; expected {kind}. Use jakiro.{other}.")


@functools.lru_cache(maxsize=64)
def _graph(cfg: JakiroConfig) -> Any:
    """The static half of `nnx.split(Jakiro(cfg))`, from shapes alone."""
    return nnx.graphdef(nnx.eval_shape(lambda: Jakiro(cfg, rngs=nnx.Rngs(0))))
