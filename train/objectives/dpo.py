"""Direct preference optimisation (2305.18290) and the losses that stand on the same two log-ratios.

    s = score(r), r itself unless an f-divergence says otherwise        x = beta (s_w - s_l)
    d = s_w / n_w - s_l / n_l, per token        sp = softplus, S = sigmoid, w chosen, l rejected

    sigmoid       sp(-x)                                     2305.18290
    cdpo          (1-eps) sp(-x) + eps sp(x)                 labels wrong with probability eps
    robust        ((1-eps) sp(-x) - eps sp(x)) / (1-2eps)    2403.00409, unbiased under such labels
    hinge         max(0, 1 - x)                              2305.10425, 2309.06657
    ipo           (d - 1/(2 beta))^2                         2310.12036, per token; ipo_sum: s_w - s_l for d
    exo_pair      KL((S(x), S(-x)) || (1-eps, eps))          2402.00856
    nca_pair      sp(-b_w) + sp(b_w)/2 + sp(b_l)/2           2402.05369, b = beta r
    bco_pair      sp(-b_w) + sp(b_l)                         2404.04656, without its shift (bco.py)
    sppo_hard     (r_w - 1/(2beta))^2 + (r_l + 1/(2beta))^2  2405.00675; sppo_soft: a judge's probability instead
    apo_zero      S(-b_w) + S(b_l)                           2408.06266; apo_down: S(b_w) + S(b_l - b_w)
    discopop      (1-m) sp(-x) + m exp(-x), m = S(x / tau)   2406.08414
    sigmoid_norm  sp(-beta d)
    aot           cdpo of sorted P_w - P_l less sorted F_w - F_l      2406.05882; aot_unpaired: sorted r_w, r_l
    sft           -P_w, to be divided by tokens              with sigmoid: RPO 2404.19733, MPO 2411.10442

A list of (name, weight) mixes them. aot and aot_unpaired sort one micro-batch, and so depend on its size.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .preference import (
    Sums,
    check_beta,
    check_name,
    check_number,
    chosen_nll,
    log_ratio,
    pair_metrics,
    reference_of,
    smoothed,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """Which losses, and their numbers."""

    beta: float = 0.1  # how far from the reference: small is far; tau in the paper of IPO
    losses: tuple[tuple[str, float], ...] = (("sigmoid", 1.0),)  # of LOSSES, sppo_soft or sft; weights
    eps: float = 0.0  # share of wrong labels: cdpo, robust, exo_pair (needs some), aot, aot_unpaired
    tau: float = 0.05  # temperature of discopop
    f: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"  # the score of r
    alpha: float = 0.5  # of the alpha divergence; 1 is reverse_kl
    max_exponent: float = 80.0  # where scores with an exponential stop growing
    ld_alpha: float | None = None  # what tokens behind the shorter side's length count, `ld_sum`; None is LD-DPO off
    wpo: bool = False  # weight a pair by how likely the policy is to write it, `wpo_weight`
    wpo_cap: float | None = None  # the most such a weight may be; TRL had 1
    allow_large_beta: bool = False  # accept beta > 1 on sums

    def __post_init__(self):
        if not self.losses:
            raise ValueError("DpoConfig.losses: found none; expected (name, weight) pairs.")
        names = [name for name, _ in self.losses]
        for name, weight in self.losses:
            check_name("DpoConfig.losses", name, (*LOSSES, "sppo_soft", "sft"))
            check_number(f"DpoConfig.losses, weight of {name}", weight, 0 <= weight < math.inf, "at least 0")
        if len(set(names)) < len(names):
            raise ValueError(f"DpoConfig.losses: found {', '.join(names)}; expected every name once.")
        averages = {"ipo", "sigmoid_norm", "sft"}
        check_beta("DpoConfig", self.beta, sums=not averages.issuperset(names), large=self.allow_large_beta)
        check_number("DpoConfig.eps", self.eps, 0 <= self.eps < 0.5, "0 <= eps < 0.5")
        if "exo_pair" in names and self.eps == 0:
            raise ValueError("DpoConfig.eps: found 0 with exo_pair; expected more. The paper has 0.001.")
        # Above 1 a lost pair costs exp(|x| (1 - 1/tau)), which has no bound in float32.
        check_number("DpoConfig.tau", self.tau, 0 < self.tau <= 1, "0 < tau <= 1")
        check_name("DpoConfig.f", self.f, SCORES)
        check_number("DpoConfig.alpha", self.alpha, math.isfinite(self.alpha), "a finite number")
        most = self.max_exponent
        check_number("DpoConfig.max_exponent", most, 0 < most <= 80, "0 < max_exponent <= 80, or float32 overflows")
        exponential = self.f in ("forward_kl", "alpha_divergence")
        if exponential and {"ipo", "ipo_sum"} & set(names):
            check_number("DpoConfig.max_exponent", most, most <= 40, f"at most 40 where a loss squares {self.f}")
        if self.ld_alpha is not None:
            check_number("DpoConfig.ld_alpha", self.ld_alpha, 0 <= self.ld_alpha <= 1, "0 <= ld_alpha <= 1")
        if self.wpo and {"aot", "aot_unpaired"} & set(names):
            raise ValueError("DpoConfig.wpo: found it with aot, which sorts pairs apart; expected one of the two.")
        if self.wpo_cap is not None:
            check_number("DpoConfig.wpo_cap", self.wpo_cap, 0 < self.wpo_cap < math.inf, "a positive number")


def dpo(
    chosen: Sums,
    rejected: Sums,
    cfg: DpoConfig,
    *,
    counted: Bool[Array, " n"] | None = None,
    win: Float[Array, " n"] | None = None,
    certainty: tuple[Float[Array, " n"], Float[Array, " n"]] | None = None,
    whole: tuple[Sums, Sums] | None = None,
) -> tuple[dict[str, Float[Array, " n"]], dict[str, Float[Array, " n"]]]:
    """Every loss of the list, times its weight, and what is logged.

    Args:
      chosen: sums of the preferred answers.
      rejected: of the others.
      cfg: which losses.
      counted: False for pairs that pad the batch; only aot and aot_unpaired look at other pairs.
      win: for sppo_soft, how probable a judge finds it that the chosen answer is better.
      certainty: for WPO, of either side the mean over tokens of log p_t - log sum_v p_v^2.
      whole: for LD-DPO, sums in which every token counts 1: `sft` is of those, and so is what is logged, but rewards.

    Returns:
      Values a pair by name, and metrics a pair. The trainer divides by the number of pairs, but `sft` by that of the
      tokens of chosen answers.
    """
    if (win is not None) != any(name == "sppo_soft" for name, _ in cfg.losses):
        raise ValueError("dpo: found sppo_soft without `win`, or the reverse; expected both or neither.")
    if (certainty is not None) != cfg.wpo:
        raise ValueError("dpo: found wpo without `certainty`, or the reverse; expected both or neither.")
    found: dict[str, Float[Array, " n"]] = {}
    plain = (chosen, rejected) if whole is None else whole
    for name, weight in cfg.losses:
        if name == "sft":
            found[name] = weight * chosen_nll(plain[0])
            continue
        if name == "aot":
            value = aot(chosen, rejected, cfg, counted)
        elif name == "aot_unpaired":
            value = aot_unpaired(chosen, rejected, cfg, counted)
        elif win is not None and name == "sppo_soft":
            value = sppo_soft(chosen, rejected, win, cfg)
        else:
            value = LOSSES[name](chosen, rejected, cfg)
        found[name] = weight * value if certainty is None else weight * wpo_weight(*certainty, cfg) * value
    return found, pair_metrics(*plain, *_rewards(chosen, rejected, cfg))


# --------------------------------------------------------------------------------------------------------- the losses
def sigmoid(chosen: Sums, rejected: Sums, cfg: DpoConfig) -> Float[Array, " n"]:
    """DPO itself."""
    return jax.nn.softplus(-_margin(chosen, rejected, cfg))


def cdpo(chosen: Sums, rejected: Sums, cfg: DpoConfig) -> Float[Array, " n"]:
    """Conservative DPO: its gradient is zero where the policy is as sure as the labels are."""
    return smoothed(_margin(chosen, rejected, cfg), cfg.eps)


def robust(chosen: Sums, rejected: Sums, cfg: DpoConfig) -> Float[Array, " n"]:
    """rDPO: over flipped labels its mean is the DPO loss under true ones."""
    x = _margin(chosen, rejected, cfg)
    return ((1.0 - cfg.eps) * jax.nn.softplus(-x) - cfg.eps * jax.nn.softplus(x)) / (1.0 - 2.0 * cfg.eps)


def hinge(chosen: Sums, rejected: Sums, cfg: DpoConfig) -> Float[Array, " n"]:
    """SLiC on log-ratios, as in RSO."""
    return jax.nn.relu(1.0 - _margin(chosen, rejected, cfg))


def ipo(chosen: Sums, rejected: Sums, cfg: DpoConfig) -> Float[Array, " n"]:
    """IPO on averages, as its authors advise for answers of unequal length."""
    return (_per_token(chosen, rejected, cfg) - 0.5 / cfg.beta) ** 2


def ipo_sum(chosen: Sums, rejected: Sums, cfg: DpoConfig) -> Float[Array, " n"]:
    """IPO on sums, as written in the paper."""
    return (score(log_ratio(chosen), cfg) - score(log_ratio(rejected), cfg) - 0.5 / cfg.beta) ** 2


def exo_pair(chosen: Sums, rejected: Sums, cfg: DpoConfig) -> Float[Array, " n"]:
    """EXO of two answers: the reverse KL from the policy's odds to those of the labels."""
    x = _margin(chosen, rejected, cfg)
    lost, won = jax.nn.softplus(x), jax.nn.softplus(-x)  # -log of the policy's odds against, and for
    return jax.nn.sigmoid(x) * (-won - math.log1p(-cfg.eps)) + jax.nn.sigmoid(-x) * (-lost - math.log(cfg.eps))


def nca_pair(chosen: Sums, rejected: Sums, cfg: DpoConfig) -> Float[Array, " n"]:
    """NCA of two answers: each is told apart from the reference by itself."""
    won, lost = _rewards(chosen, rejected, cfg)
    return jax.nn.softplus(-won) + 0.5 * jax.nn.softplus(won) + 0.5 * jax.nn.softplus(lost)


def bco_pair(chosen: Sums, rejected: Sums, cfg: DpoConfig) -> Float[Array, " n"]:
    """BCO of two answers with a shift of 0."""
    won, lost = _rewards(chosen, rejected, cfg)
    return jax.nn.softplus(-won) + jax.nn.softplus(lost)


def sppo_hard(chosen: Sums, rejected: Sums, cfg: DpoConfig) -> Float[Array, " n"]:
    """SPPO where the chosen answer wins for certain."""
    return sppo_soft(chosen, rejected, jnp.ones(chosen.policy.shape, jnp.float32), cfg)


def sppo_soft(chosen: Sums, rejected: Sums, win: Float[Array, " n"], cfg: DpoConfig) -> Float[Array, " n"]:
    """SPPO: log-ratios of (P(win) - 1/2) / beta, and the negative of it."""
    target = (jax.lax.stop_gradient(win).astype(jnp.float32) - 0.5) / cfg.beta
    return (log_ratio(chosen) - target) ** 2 + (log_ratio(rejected) + target) ** 2


def apo_zero(chosen: Sums, rejected: Sums, cfg: DpoConfig) -> Float[Array, " n"]:
    """APO for answers better than the model's: chosen ones up, rejected ones down."""
    won, lost = _rewards(chosen, rejected, cfg)
    return jax.nn.sigmoid(-won) + jax.nn.sigmoid(lost)


def apo_down(chosen: Sums, rejected: Sums, cfg: DpoConfig) -> Float[Array, " n"]:
    """APO for answers worse than the model's: both down, rejected ones further."""
    won, lost = log_ratio(chosen), log_ratio(rejected)
    return jax.nn.sigmoid(cfg.beta * won) + jax.nn.sigmoid(cfg.beta * (lost - won))


def discopop(chosen: Sums, rejected: Sums, cfg: DpoConfig) -> Float[Array, " n"]:
    """The log-ratio modulated loss that a search found: logistic where a pair is lost, exponential where it is won."""
    x = _margin(chosen, rejected, cfg)
    exponential = jnp.exp(-x - jax.nn.softplus(-x / cfg.tau))  # m e^-x in one exponent, or a lost pair overflows
    return jax.nn.sigmoid(-x / cfg.tau) * jax.nn.softplus(-x) + exponential


def sigmoid_norm(chosen: Sums, rejected: Sums, cfg: DpoConfig) -> Float[Array, " n"]:
    """DPO on averages, so that length says nothing."""
    return jax.nn.softplus(-cfg.beta * _per_token(chosen, rejected, cfg))


def aot(chosen: Sums, rejected: Sums, cfg: DpoConfig, counted: Bool[Array, " n"] | None = None) -> Float[Array, " n"]:
    """AOT of pairs: the policy's differences, ranked, against the reference's, ranked.

    Args:
      chosen: sums of the preferred answers.
      rejected: of the others.
      cfg: beta and eps.
      counted: False for pairs that pad the batch; they rank last, against one another.

    Returns:
      At each pair the loss of its rank among the policy's differences.
    """
    policy = chosen.policy.astype(jnp.float32) - rejected.policy.astype(jnp.float32)
    reference = reference_of(chosen) - reference_of(rejected)
    return _of_ranks(policy, reference, cfg, counted)


def aot_unpaired(
    chosen: Sums, rejected: Sums, cfg: DpoConfig, counted: Bool[Array, " n"] | None = None
) -> Float[Array, " n"]:
    """AOT of two heaps: the log-ratios of chosen answers, ranked, against those of rejected ones, ranked."""
    return _of_ranks(log_ratio(chosen), log_ratio(rejected), cfg, counted)


LOSSES: dict[str, Callable[[Sums, Sums, DpoConfig], Float[Array, " n"]]] = {
    "sigmoid": sigmoid,
    "cdpo": cdpo,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "ipo_sum": ipo_sum,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sigmoid_norm": sigmoid_norm,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
}


# ------------------------------------------------------------------------------------------------ scores and options
def score(r: Float[Array, "*n"], cfg: DpoConfig) -> Float[Array, "*n"]:
    """What stands for the log-ratio if the distance to the reference is not the reverse KL (2309.16240)."""
    return SCORES[cfg.f](r, cfg)


SCORES: dict[str, Callable[[Float[Array, "*n"], DpoConfig], Float[Array, "*n"]]] = {
    "reverse_kl": lambda r, cfg: r,
    "forward_kl": lambda r, cfg: -jnp.expm1(jnp.minimum(-r, cfg.max_exponent)),
    "js_divergence": lambda r, cfg: math.log(2.0) - jax.nn.softplus(-r),
    "alpha_divergence": lambda r, cfg: _alpha_score(r, cfg),
}


def wpo_weight(
    chosen: Float[Array, " n"], rejected: Float[Array, " n"], cfg: DpoConfig = DpoConfig()
) -> Float[Array, " n"]:
    """WPO (2406.11827): how likely the policy is to write this pair, beside what it is likely to write.

    Args:
      chosen: mean over tokens of log p_t - log sum_v p_v^2 under the policy.
      rejected: likewise.
      cfg: the cap.

    Returns:
      A weight without gradient; 1 where every token is as likely as the policy's own draws are.
    """
    weight = jnp.exp(jax.lax.stop_gradient(chosen + rejected).astype(jnp.float32))
    return weight if cfg.wpo_cap is None else jnp.minimum(weight, cfg.wpo_cap)


def ld_sum(
    logp: Float[Array, "n T"], tokens: Int[Array, " n"], other: Int[Array, " n"], alpha: float
) -> Float[Array, " n"]:
    """LD-DPO (2409.06411): tokens behind the length of the shorter side of a pair count alpha.

    Args:
      logp: of the tokens of a completion, from its first on; what lies behind its length does not matter.
      tokens: of this completion.
      other: of the pair's other completion.
      alpha: 1 is the plain sum, 0 cuts both sides to one length.

    Returns:
      What stands for P, or from the reference's log-probabilities for F.
    """
    position = jnp.arange(logp.shape[1])[None, :]
    weight = jnp.where(position < jnp.minimum(tokens, other)[:, None], 1.0, alpha)
    inside = position < tokens[:, None]
    return jnp.sum(jnp.where(inside, logp.astype(jnp.float32), 0.0) * weight.astype(jnp.float32), axis=1)


# ------------------------------------------------------------------------------------------------ published settings
@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """What a paper or its authors' code trained with; None where neither says."""

    config: DpoConfig
    learning_rate: float | None = None
    batch: int | None = None  # pairs an update


_mix = lambda **weights: tuple(weights.items())
PUBLISHED: dict[str, Published] = {
    "DPO": Published(config=DpoConfig(), learning_rate=1e-6, batch=64),  # with RMSprop
    "rDPO": Published(config=DpoConfig(losses=_mix(robust=1.0), eps=0.1), learning_rate=1e-3, batch=16),
    "IPO": Published(config=DpoConfig(losses=_mix(ipo=1.0)), learning_rate=1e-2, batch=90),  # a toy; beta is ours
    "EXO": Published(config=DpoConfig(losses=_mix(exo_pair=1.0), eps=1e-3), learning_rate=1e-6, batch=64),
    "NCA": Published(config=DpoConfig(losses=_mix(nca_pair=1.0), beta=0.01), learning_rate=5e-6, batch=32),
    "BCO": Published(config=DpoConfig(losses=_mix(bco_pair=1.0), beta=0.01), learning_rate=5e-7, batch=128),
    "SPPO": Published(config=DpoConfig(losses=_mix(sppo_hard=1.0), beta=0.001), learning_rate=5e-7, batch=64),
    "APO": Published(config=DpoConfig(losses=_mix(apo_zero=1.0)), learning_rate=2e-7, batch=64),
    "DiscoPOP": Published(config=DpoConfig(losses=_mix(discopop=1.0), beta=0.05), learning_rate=5e-7, batch=64),
    "RPO": Published(config=DpoConfig(losses=_mix(sigmoid=1.0, sft=0.005), beta=0.01), learning_rate=5e-7),
    "AOT": Published(config=DpoConfig(losses=_mix(aot=1.0), beta=0.01)),
    "WPO": Published(config=DpoConfig(wpo=True, beta=0.01)),
    "TR-DPO": Published(config=DpoConfig(beta=0.05), learning_rate=1e-6),  # reference mixed in by 0.6
    "MPO": Published(config=DpoConfig(losses=_mix(sigmoid=0.8, bco_pair=0.2, sft=1.0)), learning_rate=5e-6),
}


# ----------------------------------------------------------------------------------------------------------- private
def _margin(chosen: Sums, rejected: Sums, cfg: DpoConfig) -> Float[Array, " n"]:
    """x."""
    return cfg.beta * (score(log_ratio(chosen), cfg) - score(log_ratio(rejected), cfg))


def _per_token(chosen: Sums, rejected: Sums, cfg: DpoConfig) -> Float[Array, " n"]:
    """d: each side by its own length."""
    won, lost = (score(log_ratio(side), cfg) / side.tokens.astype(jnp.float32) for side in (chosen, rejected))
    return won - lost


def _rewards(chosen: Sums, rejected: Sums, cfg: DpoConfig) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """beta r of both sides, whatever the score."""
    return cfg.beta * log_ratio(chosen), cfg.beta * log_ratio(rejected)


def _of_ranks(
    a: Float[Array, " n"], b: Float[Array, " n"], cfg: DpoConfig, counted: Bool[Array, " n"] | None
) -> Float[Array, " n"]:
    """The smoothed loss of sorted a less sorted b, each value where its a came from."""
    if counted is not None:
        last = float(jnp.finfo(jnp.float32).max)  # finite: infinity less infinity would spoil the gradient
        a, b = jnp.where(counted, a, last), jnp.where(counted, b, last)
    order = jnp.argsort(a)
    losses = smoothed(cfg.beta * (a[order] - b[jnp.argsort(b)]), cfg.eps)
    return jnp.zeros_like(losses).at[order].set(losses)


def _alpha_score(r: Float[Array, "*n"], cfg: DpoConfig) -> Float[Array, "*n"]:
    """(e^((alpha-1) r) - 1) / (alpha - 1), whose limit at 1 is r."""
    power = cfg.alpha - 1.0
    if abs(power) < 1e-6:
        return r
    return jnp.expm1(jnp.minimum(power * r, cfg.max_exponent)) / power
