"""Which online policy-gradient algorithms there are, and what each makes of a step's answers and rewards.

`ALGORITHMS` names them. An algorithm is a loss of tokens (`objectives/policy_gradient.py`) and a way to say what a
token was worth (`advantages/`). Those with value heads have a linear head beside the policy for each return that they
foresee, which begins at zero, reads the states behind the final norm, and is trained with the policy in one update:

    ppo           "score": the reward at the last token, and at every token -kl_weight (log pi_old - log pi_ref)
    constrained   "kl": that penalty alone; "0", "1", ...: the rewards, each at the last token, weighed by multipliers

The penalty is the estimator k1, in the reward where it is right; no other algorithm has it there: with them `kl_weight`
adds the estimator `kl` to the loss.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..models.decoder import DecoderConfig, Params, Remat, param_axes
from ..models.lora import LoraConfig, apply_lora, init_lora, lora_axes
from ..models.reward import RewardConfig, head_axes, init_head, step_logits
from ..sharding.rules import REPLICATED, Rules
from .advantages.constrained import ConstrainedConfig, Multipliers, constrained, init_multipliers
from .advantages.gae import GAEConfig, gae, token_rewards, whiten
from .advantages.grpo import GRPOConfig, group_metrics, group_statistics, grpo
from .advantages.rloo import rloo
from .advantages.tempo import TEMPOConfig, tempo
from .data.pipeline import Batch
from .objectives.kl_estimators import Estimator
from .objectives.logprobs import Scores, hidden_states, output_table, target_stats
from .objectives.policy_gradient import Aggregation, PolicyGradientConfig, Rollout, count_units, policy_gradient
from .objectives.ppo import ValueLossConfig, explained_variance, ppo_value
from .objectives.preference import check_name
from .preference import Carry
from .recipe import Origin, Trainable, whole_model
from .rewards.critique import CritiqueConfig
from .rollouts import Placed, Sampled, spread, token_grid
from .step import LossFn, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlOptions:
    """The algorithm, its settings, and the rewards of the command line.

    Attributes:
      algorithm: grpo, dr-grpo, dapo, gspo, cispo, rloo, tempo, ppo or constrained.
      reward: `outcome`, 1 for an answer that is right and 0 for any other; `truthrl`, 1 for a right one, 0 for one that
        says it does not know, -1 for any other; `critique`, where data are attempts and answers are critiques of them
        (Critique-RL); or the folder of a reward model. One, but for `constrained` one for each threshold.
      aggregate: how a reward model's scores of an answer's steps become one.
      abstention: what an answer's last line holds, in whatever case, if it says that it does not know.
      score_batch: answers that a reward model scores at a time.
      kl_weight: what the divergence from the policy as it began counts; with value heads as part of the reward.
      kl: its estimator in a loss.
      clip_low: how far below 1 a ratio may fall; the algorithm's own when not given, as with the next four.
      clip_high: how far above 1 it may rise.
      dual_clip: above what a bad token pulls no harder.
      cap: of the ratio, for cispo.
      aggregation: how tokens are added up.
      eps: added to the standard deviation of a group's rewards.
      gae: discounts, for value heads.
      value: their loss.
      constrained: thresholds of rewards, and how their multipliers are learnt.
      critique: the stage of Critique-RL, and its words.
    """

    algorithm: str = "grpo"
    reward: tuple[str, ...] = ("outcome",)
    aggregate: Literal["min", "product", "last", "mean"] = "min"
    abstention: str = "i do not know"
    score_batch: int = 32
    kl_weight: float = 0.0
    kl: Estimator = "k3_corrected"
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    cap: float | None = None
    aggregation: Aggregation | None = None
    eps: float = 1e-6
    gae: GAEConfig = GAEConfig()
    value: ValueLossConfig = ValueLossConfig()
    constrained: ConstrainedConfig = ConstrainedConfig()
    critique: CritiqueConfig = CritiqueConfig()

    def __post_init__(self):
        check_name("train rl: algorithm", self.algorithm, ALGORITHMS)
        if not self.reward or not self.abstention.strip() or self.score_batch < 1:
            found = f"reward={self.reward}, abstention={self.abstention!r}, score_batch={self.score_batch}"
            raise ValueError(f"train rl: {found}; expected a reward, a text, and at least 1.")
        if self.algorithm == "constrained" and not self.kl_weight > 0:
            raise ValueError("train rl: constrained with kl_weight=0; expected above 0: to stay near is its objective.")
        if "critique" in self.reward and (self.reward != ("critique",) or self.algorithm == "constrained"):
            raise ValueError("train rl: critique beside other rewards; expected it alone.")
        if self.reward == ("critique",) and self.critique.stage == 2 and self.critique.actor is None:
            raise ValueError("train rl: stage 2 of critique without an actor; give --critique.actor, which refines.")
        policy_config(self, 1)  # refuses what is out of range
        GRPOConfig(eps=self.eps)


class Estimated(NamedTuple):
    """What a step's tokens were worth."""

    advantages: Float[np.ndarray, "R T"]  # at the targets; without gradient
    metrics: Mapping[str, float]
    more: Mapping[str, Float[np.ndarray, "R T"]]  # what else the loss reads


class Step(NamedTuple):
    """What there is to estimate from; n = G K."""

    options: RlOptions
    answers: Sequence[Sampled]  # n of them
    rewards: Float[np.ndarray, "N G K"]  # NaN where there is none
    placed: Placed
    scored: Mapping[str, Float[np.ndarray, "R T"]]  # what `make_scores` says
    carry: Any
    longest: int  # tokens that an answer may have


class Algorithm(NamedTuple):
    """What one has that others have not."""

    paper: str  # on arXiv
    policy: PolicyGradientConfig  # the published one
    estimate: Callable[[Step], Estimated]
    groups: bool = True  # compares the answers to a problem
    heads: Callable[[RlOptions], tuple[str, ...]] = lambda options: ()


def policy_config(options: RlOptions, max_new_tokens: int) -> PolicyGradientConfig:
    """The loss of tokens, with what was given in the place of the published settings."""
    known = ALGORITHMS[options.algorithm]
    names = ("clip_low", "clip_high", "dual_clip", "cap", "aggregation")
    given: Any = {name: value for name in names if (value := getattr(options, name)) is not None}
    weight = 0.0 if known.heads(options) else options.kl_weight
    return dataclasses.replace(known.policy, **given, kl=options.kl, kl_weight=weight, max_length=max_new_tokens)


def advantages(
    options: RlOptions,
    answers: Sequence[Sampled],
    rewards: Float[np.ndarray, "N G K"],
    placed: Placed,
    scored: Mapping[str, Float[np.ndarray, "R T"]],
    carry: Any,
    longest: int,
) -> Estimated:
    """What each token of a step was worth, by the algorithm of the options.

    Args:
      options: the algorithm and its settings.
      answers: of the step, those to one problem beside each other.
      rewards: of each; NaN where there is none.
      placed: where the answers stand.
      scored: what policy, value heads and reference say of them, where the algorithm needs it.
      carry: what goes along from step to step.
      longest: tokens that an answer may have.
    """
    return ALGORITHMS[options.algorithm].estimate(Step(options, answers, rewards, placed, scored, carry, longest))


# --------------------------------------------------------------------------------------------------- what is trained
def trainable(origin: Origin, options: RlOptions, lora: LoraConfig | None) -> Trainable:
    """{"policy": all weights or adapters}, and "value": the heads; beside the policy as it began, where it is read."""
    config, names = origin.config, ALGORITHMS[options.algorithm].heads(options)
    axes, beside = param_axes(config), lora is not None or options.kl_weight > 0
    head = _head_config(config)

    def init(base: Params, key: jax.Array) -> Params:
        if lora is not None:
            policy = init_lora(lora, base, axes, key)
        else:
            policy = jax.tree.map(lambda w: w + 0.0, base) if beside else base  # a buffer of its own
        zeros = lambda: jax.tree.map(jnp.zeros_like, init_head(head, key))
        return {"policy": policy} | ({"value": {name: zeros() for name in names}} if names else {})

    def result(trained: Params, frozen: Params) -> Params:
        return trained["policy"] if lora is None else apply_lora(lora, frozen, trained["policy"])

    def combine(trained: Params, frozen: Params) -> Params:
        return trained | {"policy": result(trained, frozen)}

    named: Any = {"policy": axes if lora is None else lora_axes(lora, axes)}
    if names:
        named["value"] = {name: head_axes(head) for name in names}
    carry = None
    if options.algorithm == "constrained":
        carry = Carry(
            lambda base: init_multipliers(options.constrained),
            lambda model: Multipliers((None,), (None,)),  # type: ignore[arg-type]
            lambda carry, params, metrics, step: carry,
        )
    return Trainable(init, named, beside, combine, result, whole_model(origin, None).write, carry=carry)


def make_scores(
    config: DecoderConfig, what: Trainable, *, temperature: float, rules: Rules = REPLICATED, remat: Remat = "none"
) -> Callable[..., dict[str, Float[Array, "M B T"]]]:
    """Build `scores(trained, frozen, batch, reference=False)`: what is said of every target of a window.

    Returns:
      A jitted function; what it gives are `logp` of the policy, with `reference` also `reference`, the log-probability
      under the frozen weights, and of every value head `value/` and its name.
    """

    @functools.partial(jax.jit, static_argnames="reference")
    def scores(trained: Params, frozen: Params, batch: Batch, reference: bool = False) -> dict[str, Array]:
        params = what.combine(trained, frozen)

        def one(part: Batch) -> dict[str, Array]:
            said = policy_scores(config, params["policy"], part, temperature, rules=rules, remat=remat)
            found = {"logp": said.logp}
            found |= {f"value/{name}": v for name, v in _values(config, params, said.hidden).items()}
            if reference:
                found["reference"] = policy_scores(config, frozen, part, temperature, rules=rules, remat=remat).logp
            return found

        return jax.lax.map(one, batch)

    return scores


def make_loss(
    config: DecoderConfig,
    policy: PolicyGradientConfig,
    options: RlOptions,
    *,
    temperature: float,
    rules: Rules = REPLICATED,
    remat: Remat = "none",
) -> LossFn:
    """Build the objective with its forward pass, on micro-batches of type `Rollout`.

    Its metrics are those of `policy_gradient` and `ppo_value`; and `sampler_gap`, the mean distance of log pi from what
    the sampler said of its tokens, where it did: before the first update nothing but rounding.
    """
    names = ALGORITHMS[options.algorithm].heads(options)

    def loss(params: Params, rollout: Rollout, key: Any) -> Any:
        del key  # nothing is random here
        batch, more = rollout.batch, rollout.batch.more or {}
        said = policy_scores(config, params["policy"], batch, temperature, rules=rules, remat=remat)
        terms, metrics = policy_gradient(said, rollout, policy)
        terms, metrics = dict(terms), dict(metrics)
        if "sampled" in more:
            gap = jnp.abs(jnp.where(batch.mask, said.logp - more["sampled"], 0.0))
            metrics["sampler_gap"] = Term(gap, batch.mask.astype(jnp.float32), "token")
        values = _values(config, params, said.hidden)
        for name in names:
            old, returns = more[f"old/{name}"], more[f"return/{name}"]
            found, measured = ppo_value(values[name], old, returns, batch, options.value)
            end = "" if name == "score" else f"_{name}"
            terms |= {term + end: value for term, value in found.items()}
            metrics |= {term + end: value for term, value in measured.items()}
        return terms, metrics

    return loss


def policy_scores(
    config: DecoderConfig,
    params: Params,
    batch: Batch,
    temperature: float,
    *,
    rules: Rules = REPLICATED,
    remat: Remat = "none",
) -> Scores:
    """What the decoder says of every target under the distribution that answers are sampled from."""
    hidden = hidden_states(config, params, batch, rules=rules, remat=remat)
    stats = target_stats(hidden, output_table(config, params), batch, rules=rules, temperature=temperature)
    return Scores(stats.logp, stats.entropy, hidden)


counts = count_units


# ----------------------------------------------------------------------------------------------------------- private
def _head_config(config: DecoderConfig) -> RewardConfig:
    return RewardConfig(target=config, separator=0)  # a linear head; no separator is ever read


def _values(config: DecoderConfig, params: Params, hidden: Float[Array, "B T D"]) -> dict[str, Float[Array, "B T"]]:
    """What each head foresees where a token is about to be written."""
    cfg = _head_config(config)
    return {name: step_logits(cfg, {"head": head}, hidden) for name, head in params.get("value", {}).items()}


def _told(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}


_grpo = jax.jit(lambda rewards, cfg: grpo(rewards, None, cfg), static_argnums=1)
_rloo = jax.jit(rloo)
_tempo = jax.jit(lambda tokens, mask, rewards, cfg: tempo(tokens, mask, rewards, None, cfg), static_argnums=3)
_group_metrics = jax.jit(lambda rewards: group_metrics(group_statistics(rewards)))


def _by_group(scale: Literal["group", "none"], step: Step) -> Estimated:
    each, metrics = _grpo(step.rewards[0], GRPOConfig(scale=scale, eps=step.options.eps))
    return Estimated(spread(np.asarray(each).reshape(-1), step.answers, step.placed), _told(metrics), {})


def _leave_one_out(step: Step) -> Estimated:
    each, metrics = _rloo(step.rewards[0])
    return Estimated(spread(np.asarray(each).reshape(-1), step.answers, step.placed), _told(metrics), {})


def _by_tree(step: Step) -> Estimated:
    tokens, mask = token_grid(step.answers, step.rewards.shape[2], step.longest)
    each, metrics = _tempo(tokens, mask, step.rewards[0], TEMPOConfig(eps=step.options.eps))
    flat = np.asarray(each).reshape(len(step.answers), -1)
    return Estimated(spread(flat, step.answers, step.placed), _told(metrics), {})


def _row_scores(step: Step, i: int) -> np.ndarray:
    """Reward i of the answer in each row, which holds one at most."""
    scores, placed = np.zeros(len(step.placed.batch.mask), np.float32), step.placed
    there = placed.row >= 0
    scores[placed.row[there]] = step.rewards[i].reshape(-1)[there]
    return scores


@functools.partial(jax.jit, static_argnames="cfg")
def _returns(score, logp, reference, values, mask, beta, cfg):
    """Whitened advantages, returns, and how much of these the values explain."""
    found, returns = gae(token_rewards(score, logp, reference, mask, beta), values, mask, cfg)
    return whiten(found, mask), returns, explained_variance(values, returns, mask)


def _by_value(step: Step) -> Estimated:
    """PPO."""
    scored, mask, weight = step.scored, step.placed.batch.mask, np.float32(step.options.kl_weight)
    values, reference = scored["value/score"], scored.get("reference", scored["logp"])
    found, returns, explained = _returns(
        _row_scores(step, 0), scored["logp"], reference, values, mask, weight, step.options.gae
    )
    metrics = _told(_group_metrics(step.rewards[0]) | {"explained_variance": explained})
    return Estimated(np.asarray(found), metrics, {"old/score": values, "return/score": np.asarray(returns)})


def _by_constraints(step: Step) -> Estimated:
    scored, mask, cfg = step.scored, step.placed.batch.mask, step.options.gae
    number = len(step.rewards)
    nothing = np.zeros(len(mask), np.float32)
    logp, metrics, more, worth = scored["logp"], dict(_told(_group_metrics(step.rewards.mean(axis=0)))), {}, []
    for name in ("kl", *map(str, range(number))):
        penalised = name == "kl"
        score = nothing if penalised else _row_scores(step, int(name))
        weight, values = np.float32(step.options.kl_weight if penalised else 0.0), scored[f"value/{name}"]
        found, returns, explained = _returns(score, logp, scored["reference"], values, mask, weight, cfg)
        worth.append(found)
        more |= {f"old/{name}": values, f"return/{name}": np.asarray(returns)}
        metrics[f"explained_variance_{name}"] = float(explained)
    mixed = constrained(worth[0], jnp.stack(worth[1:]), step.carry, step.options.constrained)
    return Estimated(np.asarray(mixed), metrics, more)


def _constrained_heads(options: RlOptions) -> tuple[str, ...]:
    return ("kl", *map(str, range(len(options.constrained.thresholds))))


ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm("2402.03300", PolicyGradientConfig(aggregation="grpo"), functools.partial(_by_group, "group")),
    "dr-grpo": Algorithm(
        "2503.20783",
        PolicyGradientConfig(aggregation="dr_grpo", max_length=1),
        functools.partial(_by_group, "none"),
    ),
    "dapo": Algorithm(
        "2503.14476",
        PolicyGradientConfig(clip_low=0.2, clip_high=0.28, aggregation="dapo"),
        functools.partial(_by_group, "group"),
    ),
    "gspo": Algorithm(
        "2507.18071",
        PolicyGradientConfig(ratio="sequence", clip_low=3e-4, clip_high=4e-4, aggregation="grpo"),
        functools.partial(_by_group, "group"),
    ),
    "cispo": Algorithm(
        "2506.13585",
        PolicyGradientConfig(surrogate="cispo", aggregation="dapo"),
        functools.partial(_by_group, "group"),
    ),
    "rloo": Algorithm("2402.14740", PolicyGradientConfig(aggregation="dr_grpo", max_length=1), _leave_one_out),
    "tempo": Algorithm("2509.18314", PolicyGradientConfig(clip_low=0.2, clip_high=0.28, aggregation="dapo"), _by_tree),
    "ppo": Algorithm(
        "1707.06347", PolicyGradientConfig(aggregation="dapo"), _by_value, False, lambda options: ("score",)
    ),
    "constrained": Algorithm(
        "2310.04373", PolicyGradientConfig(aggregation="dapo"), _by_constraints, False, _constrained_heads
    ),
}
