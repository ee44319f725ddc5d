"""Every objective of `jaxaroo train preference` by its name: its paper, the rows it learns from, and its terms.

Each paper's file has the loss of sums or of tokens; here stands what it needs around it. One table, `OBJECTIVES`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..data.formats import Layout
from ..data.pipeline import Batch
from ..step import Advance, Term, Terms
from . import asft, bco, cpo, d2o, dft, dpo, fsft, gdpo_belief, kto, mm_dpo, orpo, simpo, sparsepo, unlearn
from .preference import Sums, chosen_nll, pair_metrics, row_metrics
from .sequences import (
    View,
    all_sums,
    counted,
    example_weights,
    measured,
    part_of,
    per_example,
    per_token,
    sequence_sum,
    sequence_value,
    side,
)
from .sft import token_metrics

Reads = Literal["nothing", "sums", "tokens", "kl"]  # of the reference: sums may be written down beforehand


class Network(NamedTuple):
    """Parameters of the objective's own."""

    init: Callable[[int, int, jax.Array], Any]  # layers and width of the decoder, key
    axes: Any
    weight_decay: float = 0.0


class Objective(NamedTuple):
    """What one name stands for."""

    paper: str
    layout: Layout
    config: Any  # a frozen dataclass with the published settings
    terms: Callable[..., tuple[Terms, Terms]]  # (view, config), and by name what it has: kl, carry, network, beliefs
    reads: Callable[[Any], Reads] = lambda cfg: "sums"
    parts: Callable[[Any], int] = lambda cfg: 2  # sequences of an example
    more: Callable[[Any], tuple[str, ...]] = lambda cfg: ()  # numbers that examples bring, beside the reference's sums
    carry: Callable[[Any], tuple[Any, Advance] | None] = lambda cfg: None  # what it begins as, and how it goes on
    network: Callable[[Any], Network | None] = lambda cfg: None  # what it trains beside the policy
    wanted: Callable[[Batch, Any], Bool[Array, "B T"]] = lambda batch, cfg: batch.mask  # of the policy
    still: Callable[[Batch, Any], Bool[Array, "B T"] | None] = lambda batch, cfg: None  # those that get no gradient
    collect: bool = False  # of the reference the state behind every layer
    reference: Literal["frozen", "mixed"] = "frozen"  # that the paper has, where one is read
    learning_rate: float | None = None  # published
    batch: int | None = None  # examples an update, published


# ------------------------------------------------------------------------------------------------------------- pairs
def dpo_terms(view: View, cfg: dpo.DpoConfig) -> tuple[Terms, Terms]:
    """Every loss of the list; `sft` among them is a mean over tokens of chosen answers."""
    sums, whole = all_sums(view), None
    if cfg.ld_alpha is not None:
        whole, weight = (side(sums, 0), side(sums, 1)), _ld_weights(view, cfg.ld_alpha)
        lighter = lambda scores: None if scores is None else scores._replace(logp=scores.logp * weight)
        sums = all_sums(view._replace(policy=lighter(view.policy), reference=lighter(view.reference)))
    chosen, rejected = side(sums, 0), side(sums, 1)
    certainty = None
    if cfg.wpo:
        assert view.policy.log_sum_sq is not None
        excess = sequence_sum(view.policy.logp - view.policy.log_sum_sq, view.batch, 2) / sums.tokens
        certainty = excess[:, 0], excess[:, 1]
    win = None
    if any(name == "sppo_soft" for name, _ in cfg.losses):
        win = sequence_value("win", view.batch, 2)[:, 0]
    there = counted(view.batch, 2)
    values, metrics = dpo.dpo(chosen, rejected, cfg, counted=there, win=win, certainty=certainty, whole=whole)
    units = {name: "first_token" if name == "sft" else "example" for name in values}
    weights = example_weights(view.batch, 2)
    terms = {name: Term(value, weights, units[name]) for name, value in values.items()}
    return terms, measured(metrics, view) | _of_pairs(view)


def mm_dpo_terms(view: View, cfg: mm_dpo.MmDpoConfig) -> tuple[Terms, Terms]:
    """DPO under each pair's beta, and the likelihood of chosen answers."""
    sums, gap = all_sums(view), sequence_value("gap", view.batch, 2)[:, 0]
    chosen, rejected = side(sums, 0), side(sums, 1)
    beta = mm_dpo.beta_of(gap, cfg)
    terms = {"mm_dpo": per_example(mm_dpo.mm_dpo(chosen, rejected, gap, cfg), view)}
    terms |= _chosen_nll(view, chosen, cfg.sft)
    r_w, r_l = (s.policy - _known(s) for s in (chosen, rejected))
    found = pair_metrics(chosen, rejected, beta * r_w, beta * r_l)
    return terms, measured(found | {"beta/mean": beta, "score_gap": gap}, view) | _of_pairs(view)


def orpo_terms(view: View, cfg: orpo.OrpoConfig) -> tuple[Terms, Terms]:
    """The odds of pairs, and the likelihood of chosen answers, of their prompts too if it is to be so."""
    sums = all_sums(view)
    chosen, rejected = side(sums, 0), side(sums, 1)
    odds = orpo.log_odds_ratio(chosen, rejected)
    terms = {"orpo": per_example(orpo.orpo(chosen, rejected, cfg), view)}
    if cfg.nll_prompt:
        first = part_of(view.batch, 2) == 0
        weights = per_token(jnp.tile(example_weights(view.batch, 2)[:, None], (1, 2)), view.batch, 2)
        terms["nll"] = Term(-view.policy.logp, jnp.where(first, weights, 0.0), "first_input")
    else:
        terms |= _chosen_nll(view, chosen, 1.0)
    a_w, a_l = chosen.policy / chosen.tokens, rejected.policy / rejected.tokens
    found = pair_metrics(chosen, rejected, cfg.lam * a_w, cfg.lam * a_l)
    found |= {"log_odds_chosen": odds, "log_odds_ratio": jax.nn.log_sigmoid(odds)}
    return terms, measured(found, view) | _of_pairs(view)


def orpo_wanted(batch: Batch, cfg: orpo.OrpoConfig) -> Bool[Array, "B T"]:
    """Answers, and of the chosen one the prompt if its likelihood counts."""
    return batch.mask | (part_of(batch, 2) == 0) if cfg.nll_prompt else batch.mask


def simpo_terms(view: View, cfg: simpo.SimpoConfig) -> tuple[Terms, Terms]:
    """Averages against a margin."""
    sums = all_sums(view)
    chosen, rejected = side(sums, 0), side(sums, 1)
    terms = {"simpo": per_example(simpo.simpo(chosen, rejected, cfg), view)}
    terms |= _chosen_nll(view, chosen, cfg.nll)
    rewards = (cfg.beta * simpo.reward(s, cfg) for s in (chosen, rejected))
    return terms, measured(pair_metrics(chosen, rejected, *rewards), view) | _of_pairs(view)


def cpo_terms(view: View, cfg: cpo.CpoConfig) -> tuple[Terms, Terms]:
    """The contrast, and the likelihood of chosen answers."""
    sums = all_sums(view)
    chosen, rejected = side(sums, 0), side(sums, 1)
    terms = {"cpo": per_example(cpo.cpo(chosen, rejected, cfg), view)}
    terms |= _chosen_nll(view, chosen, cfg.alpha)
    rewards = (cfg.beta * s.policy for s in (chosen, rejected))
    return terms, measured(pair_metrics(chosen, rejected, *rewards), view) | _of_pairs(view)


def d2o_terms(view: View, cfg: d2o.D2oConfig) -> tuple[Terms, Terms]:
    """The bad answer is the last sequence of an example, before it stand the model's own."""
    sums = all_sums(view)
    own, bad = side(sums, slice(0, cfg.samples)), side(sums, cfg.samples)
    r_own, r_bad = own.policy - _known(own), bad.policy - _known(bad)
    found = {"kl/k1_own": jnp.mean(r_own, axis=-1), "rewards/rejected": cfg.alpha * r_bad, "logps/rejected": bad.policy}
    return {"d2o": per_example(d2o.d2o(own, bad, cfg), view)}, measured(found, view) | _of_tokens(view)


def sparsepo_terms(
    view: View, cfg: sparsepo.SparsepoConfig, *, kl: Float[Array, "B T"], network: Any
) -> tuple[Terms, Terms]:
    """Masked log-ratios and divergences of both answers."""
    batch = view.batch
    assert view.reference is not None
    m_u, m_d = sparsepo.masks_of(view.reference.states, batch, network, cfg)
    of = lambda x: sequence_sum(x, batch, 2)
    u, k = of(m_u * (view.policy.logp - view.reference.logp)), of(m_d * kl)
    value = sparsepo.sparsepo(u, k, of(jnp.abs(m_u)), of(jnp.abs(m_d)), cfg)
    sums = all_sums(view)
    rewards = (cfg.beta * jax.lax.stop_gradient(u[:, i] + k[:, i]) for i in (0, 1))
    found = pair_metrics(side(sums, 0), side(sums, 1), *rewards)
    found |= {"seq_kl": jnp.sum(of(kl), axis=1), "seq_kl_masked": jnp.sum(k, axis=1)}
    tokens = batch.mask.astype(jnp.float32)
    masks = {"mask/mean": m_u, "mask/sparsity_u": m_u == 0, "mask/sparsity_d": m_d == 0}
    shares = {name: Term(x.astype(jnp.float32), tokens, "token") for name, x in masks.items()}
    return {"sparsepo": per_example(value, view)}, measured(found, view) | shares | _of_pairs(view)


def gdpo_belief_terms(
    view: View, cfg: gdpo_belief.GdpoBeliefConfig, *, beliefs: Float[Array, "B T K"]
) -> tuple[Terms, Terms]:
    """Calibration where the id is predicted, DPO of answers, likelihood of the accepted belief.

    Args:
      view: pairs, whose tokens say what they are: `id` and `belief` are 1 at those; `held_k` is p* of `beliefs`.
      cfg: weights.
      beliefs: at every target the log-probability of each id token.
    """
    batch, more = view.batch, view.batch.more or {}
    answer = jnp.where((more["id"] > 0) | (more["belief"] > 0), 0.0, 1.0)
    masked = lambda scores: scores._replace(logp=scores.logp * answer)
    reference = None if view.reference is None else masked(view.reference)
    sums = all_sums(view._replace(policy=masked(view.policy), reference=reference))
    tokens = jnp.maximum(sequence_sum(answer, batch, 2), 1.0)
    chosen, rejected = (side(sums._replace(tokens=tokens), i) for i in (0, 1))
    first = lambda x: sequence_sum(x, batch, 2)[:, 0]
    K = beliefs.shape[-1]
    logp = jnp.stack([first(beliefs[..., k] * more["id"]) for k in range(K)], axis=-1)
    held = jnp.stack([sequence_value(f"held_{k}", batch, 2)[:, 0] for k in range(K)], axis=-1)
    kl = gdpo_belief.calibration(held, logp)
    said = first(view.policy.logp * more["belief"]) / jnp.maximum(first(more["belief"]), 1.0)
    terms = {
        "calibration": per_example(cfg.calibration * kl, view),
        "dpo": per_example(gdpo_belief.conditional(chosen, rejected, cfg), view),
        "belief": per_example(-cfg.belief * said, view),
    }
    rewards = (cfg.beta * (s.policy - _known(s)) for s in (chosen, rejected))
    accepted = sequence_value("accepted", batch, 2)[:, 0]
    number = sequence_value("beliefs", batch, 2)[:, 0]
    found = pair_metrics(chosen, rejected, *rewards) | gdpo_belief.belief_metrics(held, number, logp, accepted)
    return terms, measured(found | {"belief/kl": kl}, view) | _of_tokens(view)


# -------------------------------------------------------------------------------------------------------------- rows
def kto_terms(view: View, cfg: kto.KtoConfig, *, carry: Float[Array, ""] | None = None) -> tuple[Terms, Terms]:
    """Rows, each with the answer to another prompt behind it, from which the KL is estimated."""
    sums, good = all_sums(view), _desirable(view)
    rows, kl, now = side(sums, 0), jnp.float32(0), None
    if cfg.loss == "kto":
        now = kto.mismatched_kl(side(sums, 1), counted(view.batch, view.parts))
        kl = now if carry is None else cfg.kl_decay * carry + (1 - cfg.kl_decay) * now
    terms = {"kto": per_example(kto.kto(rows, good, kl, cfg), view)}
    found = measured(row_metrics(rows, cfg.beta * (rows.policy - _known(rows))), view) | _by_label(view, rows, cfg.beta)
    if now is not None:
        there = counted(view.batch, view.parts).astype(jnp.float32)
        spread = lambda x: jnp.full(there.shape, x)
        z0 = jnp.maximum(kl, 0.0)  # as TRL logs it; what goes on is not clamped
        found |= {"kl": Term(spread(z0), there, "example"), "kl_now": Term(spread(now), there, "example")}
    return terms, found | _of_rows(view)


def kto_still(batch: Batch, cfg: kto.KtoConfig) -> Bool[Array, "B T"] | None:
    """Mismatched answers: all they are for is a number without gradient."""
    return part_of(batch, 2) == 1 if cfg.loss == "kto" else None


def kto_carry(cfg: kto.KtoConfig) -> tuple[Any, Advance] | None:
    """The running mean of the KL, if one is kept; it follows the mean of each window."""
    if cfg.loss != "kto" or not cfg.kl_decay:
        return None
    d = cfg.kl_decay
    return jnp.float32(0), lambda carry, params, metrics, step: d * carry + (1 - d) * metrics["kl_now"]


def bco_terms(view: View, cfg: bco.BcoConfig, *, carry: bco.Delta) -> tuple[Terms, Terms]:
    """Rows, against the mean reward of all windows before this one."""
    sums, good = all_sums(view), _desirable(view)
    rows = side(sums, 0)
    found = measured(row_metrics(rows, cfg.beta * (rows.policy - _known(rows))), view) | _by_label(view, rows, cfg.beta)
    there = counted(view.batch, 1).astype(jnp.float32)
    found["delta"] = Term(jnp.full(there.shape, carry.mean), there, "example")
    return {"bco": per_example(bco.bco(rows, good, carry, cfg), view)}, found | _of_tokens(view)


def bco_carry(cfg: bco.BcoConfig) -> tuple[Any, Advance]:
    """The mean over whole windows, so that it does not depend on how they are cut into micro-batches."""

    def advance(carry: Any, params: Any, metrics: Mapping[str, Array], step: Array) -> bco.Delta:
        number = metrics["examples"].astype(jnp.float32)
        total = carry.rows + number
        return bco.Delta(carry.mean + (metrics["rewards"] - carry.mean) * number / jnp.maximum(total, 1.0), total)

    return bco.init_delta(), advance


def unlearn_terms(
    view: View, cfg: unlearn.UnlearnConfig, *, kl: Float[Array, "B T"] | None = None
) -> tuple[Terms, Terms]:
    """A row to forget, and one to retain behind it."""
    last = view.parts - 1
    sums = all_sums(view)
    forgotten, kept = tuple(side(sums, i) for i in range(last)), side(sums, last)
    terms = {f"forget_{cfg.forget}": per_example(unlearn.forget_loss(forgotten, cfg), view)}
    retained = jnp.where(part_of(view.batch, view.parts) == last, cfg.retain_weight * view.batch.weights, 0.0)
    if cfg.retain == "gd":
        terms["retain_gd"] = Term(-view.policy.logp, retained, "last_token")
    elif cfg.retain == "kld" and kl is not None:
        terms["retain_kld"] = Term(kl, retained, "last_token")
    return terms, measured(unlearn.unlearn_metrics(forgotten, kept, cfg), view) | _of_tokens(view)


# ------------------------------------------------------------------------------------------------------------ tokens
def dft_terms(view: View, cfg: dft.DftConfig) -> tuple[Terms, Terms]:
    """Every token of the completion."""
    return {"dft": Term(dft.dft(view.policy.logp), view.batch.weights, "token")}, _of_answers(view)


def asft_terms(view: View, cfg: asft.AsftConfig, *, kl: Float[Array, "B T"]) -> tuple[Terms, Terms]:
    """The same, anchored."""
    metrics = _of_answers(view) | {"kl": Term(kl, view.batch.mask.astype(jnp.float32), "token")}
    return {"asft": Term(asft.asft(view.policy.logp, kl, cfg), view.batch.weights, "token")}, metrics


def fsft_terms(view: View, cfg: fsft.FsftConfig) -> tuple[Terms, Terms]:
    """Of tokens, or of whole answers."""
    if cfg.level == "answer":
        rows = side(all_sums(view), 0)
        return {"fsft": per_example(fsft.fsft(rows.policy, _known(rows), cfg), view)}, _of_answers(view)
    assert view.reference is not None
    value = fsft.fsft(view.policy.logp, view.reference.logp, cfg)
    return {"fsft": Term(value, view.batch.weights, "token")}, _of_answers(view)


# ------------------------------------------------------------------------------------------------------------- names
def _dpo_reads(cfg: dpo.DpoConfig) -> Reads:
    return "tokens" if cfg.ld_alpha is not None else "sums"


def _dpo(name: str, paper: str, **changes: Any) -> Objective:
    known = dpo.PUBLISHED[name]
    soft = lambda cfg: ("win",) if any(loss == "sppo_soft" for loss, _ in cfg.losses) else ()
    config = dataclasses.replace(known.config, **changes)
    rest: Any = dict(learning_rate=known.learning_rate, batch=known.batch)
    return Objective(paper, "pairs", config, dpo_terms, reads=_dpo_reads, more=soft, **rest)


def _unlearning_reads(cfg: unlearn.UnlearnConfig) -> Reads:
    return "kl" if cfg.retain == "kld" else "sums" if cfg.forget in ("npo", "rdpo") else "nothing"


def _masks(cfg: sparsepo.SparsepoConfig) -> Network:
    return Network(
        lambda layers, width, key: sparsepo.init_masks(layers, width, key, cfg),
        sparsepo.mask_axes(cfg),
        cfg.mask_weight_decay,
    )


def _one(cfg: Any) -> int:
    return 1


OBJECTIVES: dict[str, Objective] = {
    "dpo": _dpo("DPO", "2305.18290"),
    "cdpo": _dpo("DPO", "2305.18290", losses=(("cdpo", 1.0),), eps=0.1),
    "rdpo": _dpo("rDPO", "2403.00409"),
    "hinge": _dpo("DPO", "2305.10425", losses=(("hinge", 1.0),)),
    "ipo": _dpo("IPO", "2310.12036"),
    "exo": _dpo("EXO", "2402.00856"),
    "nca": _dpo("NCA", "2402.05369"),
    "bco-pair": _dpo("BCO", "2404.04656"),
    "sppo": _dpo("SPPO", "2405.00675"),
    "apo": _dpo("APO", "2408.06266"),
    "discopop": _dpo("DiscoPOP", "2406.08414"),
    "dpo-norm": _dpo("DPO", "2305.18290", losses=(("sigmoid_norm", 1.0),)),
    "ld-dpo": _dpo("DPO", "2409.06411", ld_alpha=0.5),
    "rpo": _dpo("RPO", "2404.19733"),
    "mpo": _dpo("MPO", "2411.10442"),
    "wpo": _dpo("WPO", "2406.11827"),
    "aot": _dpo("AOT", "2406.05882"),
    "tr-dpo": _dpo("TR-DPO", "2404.09656")._replace(reference="mixed"),
    "mm-dpo": Objective(
        "2502.10391", "pairs", mm_dpo.MmDpoConfig(), mm_dpo_terms, more=lambda cfg: ("gap",), learning_rate=1e-6
    ),
    "sparsepo": Objective(
        "2410.05102",
        "pairs",
        sparsepo.SparsepoConfig(),
        sparsepo_terms,
        reads=lambda cfg: "kl",
        network=lambda cfg: _masks(cfg),
        collect=True,
        learning_rate=5e-7,
        batch=128,
    ),
    "gdpo-belief": Objective(
        "2412.20299",
        "beliefs",
        gdpo_belief.GdpoBeliefConfig(),
        gdpo_belief_terms,
        reads=lambda cfg: "tokens",
        more=lambda cfg: ("id", "belief", "accepted", "beliefs", *(f"held_{k}" for k in range(gdpo_belief.MOST))),
        learning_rate=5e-7,
        batch=32,
    ),
    "orpo": Objective(
        "2403.07691", "pairs", orpo.OrpoConfig(), orpo_terms, reads=lambda cfg: "nothing", wanted=orpo_wanted
    ),
    "simpo": Objective(
        "2405.14734",
        "pairs",
        simpo.SimpoConfig(),
        simpo_terms,
        reads=lambda cfg: "nothing",
        learning_rate=6e-7,
        batch=128,
    ),
    "cpo": Objective("2401.08417", "pairs", cpo.CpoConfig(), cpo_terms, reads=lambda cfg: "nothing"),
    "d2o": Objective(
        "2403.03419", "dispreferred", d2o.D2oConfig(), d2o_terms, parts=lambda cfg: cfg.samples + 1, batch=None
    ),
    "kto": Objective(
        "2402.01306",
        "unpaired",
        kto.KtoConfig(),
        kto_terms,
        still=kto_still,
        parts=lambda cfg: 2 if cfg.loss == "kto" else 1,
        more=lambda cfg: ("desirable",),
        carry=kto_carry,
        learning_rate=1e-6,
    ),
    "bco": Objective(
        "2404.04656",
        "unpaired",
        bco.BcoConfig(),
        bco_terms,
        parts=_one,
        more=lambda cfg: ("desirable",),
        carry=bco_carry,
        learning_rate=5e-7,
        batch=128,
    ),
    "unlearn": Objective(
        "2404.05868",
        "unlearn",
        unlearn.UnlearnConfig(),
        unlearn_terms,
        reads=_unlearning_reads,
        parts=lambda cfg: len(unlearn.answers_of(cfg)) + 1,
        learning_rate=1e-5,
        batch=32,
    ),
    "dft": Objective("2508.05629", "sft", dft.DftConfig(), dft_terms, reads=lambda cfg: "nothing", parts=_one),
    "asft": Objective(
        "2509.23753",
        "sft",
        asft.AsftConfig(),
        asft_terms,
        reads=lambda cfg: "kl",
        parts=_one,
        learning_rate=2e-5,
        batch=64,
    ),
    "fsft": Objective(
        "2507.00018",
        "sft",
        fsft.FsftConfig(),
        fsft_terms,
        reads=lambda cfg: "tokens" if cfg.level == "token" else "sums",
        parts=_one,
    ),
}


# ----------------------------------------------------------------------------------------------------------- private
def _known(sums: Sums) -> Array:
    if sums.reference is None:
        raise ValueError("train preference: found sums without a reference; expected those of the frozen model.")
    return sums.reference


def _of_tokens(view: View) -> dict[str, Term]:
    return token_metrics(view.policy, view.batch)


def _of_rows(view: View) -> dict[str, Term]:
    """The same of answers to their own prompts, which stand first."""
    first = part_of(view.batch, view.parts) == 0
    return {
        name: Term(value, jnp.where(first, weight, 0.0), "first_token")
        for name, (value, weight, _) in _of_tokens(view).items()
    }


def _of_pairs(view: View) -> dict[str, Term]:
    """Logits as TRL has them too: means over vocabulary and tokens, of either side."""
    if (z := view.policy.mean_logit) is None:
        return _of_tokens(view)
    at, found = part_of(view.batch, 2), _of_tokens(view)
    for part, (name, unit) in enumerate((("chosen", "first_token"), ("rejected", "last_token"))):
        found[f"logits/{name}"] = Term(z, (view.batch.mask & (at == part)).astype(jnp.float32), unit)
    return found


def _of_answers(view: View) -> dict[str, Term]:
    """The likelihood too, which need not be what is minimised."""
    return _of_tokens(view) | {"nll": Term(-view.policy.logp, view.batch.mask.astype(jnp.float32), "token")}


def _chosen_nll(view: View, chosen: Sums, weight: float) -> dict[str, Term]:
    """The likelihood of chosen answers, a mean over their tokens; absent where it counts nothing."""
    if not weight:
        return {}
    return {"nll": Term(weight * chosen_nll(chosen), example_weights(view.batch, view.parts), "first_token")}


def _desirable(view: View) -> Array:
    return sequence_value("desirable", view.batch, view.parts)[:, 0] > 0.5


def _by_label(view: View, rows: Sums, beta: float) -> dict[str, Term]:
    """Rewards and log-probabilities of good rows and of bad ones, under TRL's names."""
    there, good = counted(view.batch, view.parts), _desirable(view)
    reward, found = beta * (rows.policy - _known(rows)), {}
    for name, of_kind, unit in (("chosen", good, "good_example"), ("rejected", ~good, "bad_example")):
        weight = (there & of_kind).astype(jnp.float32)
        found |= {f"rewards/{name}": Term(reward, weight, unit), f"logps/{name}": Term(rows.policy, weight, unit)}
        if view.policy.mean_logit is not None:
            z = sequence_sum(view.policy.mean_logit, view.batch, view.parts)[:, 0] / rows.tokens
            found[f"logits/{name}"] = Term(z, weight, unit)
    return found


def _ld_weights(view: View, alpha: float) -> Float[Array, "B T"]:
    """LD-DPO: what a token counts, alpha behind as many tokens as the shorter answer of its pair has."""
    batch = view.batch
    shorter = jnp.min(sequence_sum(jnp.ones_like(batch.weights), batch, 2), axis=-1, keepdims=True)
    here = jnp.cumsum(batch.mask.astype(jnp.float32), axis=1)
    before = per_token(sequence_sum(here * _is_first(batch.mask, batch.segments), batch, 2), batch, 2) - 1.0
    return jnp.where(here - before <= per_token(jnp.tile(shorter, (1, 2)), batch, 2), 1.0, alpha)


def _is_first(mask: Array, segments: Array) -> Array:
    """1 at the first token that counts in each segment."""
    previous = lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0)))
    return (mask & ~(previous(mask) & (previous(segments) == segments))).astype(jnp.float32)
