"""What preference losses share: sums of the two sides, log-ratios, checks of settings, what is logged of a pair.

    P = sum_t log p(y_t | x, y_<t)      F  the same sum under the frozen reference      n  tokens of the completion
    r = P - F                           beta r  the reward that the policy implies      a = P / n

A loss returns one float32 value a pair (or a row), differentiable in `Sums.policy` alone, and never divides by how many
there are: `Term(value, weight, "pair")` does, over the window. -log(sigmoid(u)) is written softplus(-u) throughout,
which stays finite, and so does its gradient, wherever u does.
"""

import difflib
from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Sums(NamedTuple):
    """Of n completions: one side of n pairs, or n rows that stand alone."""

    policy: Float[Array, "*n"]  # P; what is learned
    reference: Float[Array, "*n"] | None  # F; no gradient is taken through it; None where a loss needs none
    tokens: Float[Array, "*n"]  # n, at least 1, also where a batch is padded


def reference_of(sums: Sums) -> Float[Array, "*n"]:
    """F, in float32 and without gradient.

    Raises:
      ValueError: if there is none.
    """
    if sums.reference is None:
        raise ValueError("reference_of: found sums without a reference; expected those of the frozen model as well.")
    return jax.lax.stop_gradient(sums.reference).astype(jnp.float32)


def log_ratio(sums: Sums) -> Float[Array, "*n"]:
    """r = P - F, in float32."""
    return sums.policy.astype(jnp.float32) - reference_of(sums)


def average(sums: Sums) -> Float[Array, "*n"]:
    """a = P / n, the log-probability of a token; reads no reference."""
    return sums.policy.astype(jnp.float32) / sums.tokens.astype(jnp.float32)


def chosen_nll(chosen: Sums) -> Float[Array, "*n"]:
    """-P; with the tokens of chosen answers as its unit, not pairs, a term of it is their NLL a token."""
    return -chosen.policy.astype(jnp.float32)


def smoothed(x: Float[Array, "*n"], eps: float) -> Float[Array, "*n"]:
    """(1 - eps) softplus(-x) + eps softplus(x): the logistic loss if a share eps of labels is wrong."""
    return (1.0 - eps) * jax.nn.softplus(-x) + eps * jax.nn.softplus(x)


def pair_metrics(
    chosen: Sums, rejected: Sums, reward_chosen: Float[Array, "*n"], reward_rejected: Float[Array, "*n"]
) -> dict[str, Float[Array, "*n"]]:
    """One number a pair under TRL's names, without gradient, to be averaged over pairs.

    Args:
      chosen: sums of the preferred side.
      rejected: of the other.
      reward_chosen: beta r, or what stands for it where there is no reference.
      reward_rejected: likewise.

    Returns:
      `rewards/*` (a tie is no win), `logps/*`, `logps_avg/*`, `length/*`; with a reference also `kl/k1_chosen`, which
      is r of the chosen side, and `frac_chosen_down`, 1 where the chosen answer became less likely than it was.
    """
    as_number = lambda x: x.astype(jnp.float32)
    won, lost = as_number(reward_chosen), as_number(reward_rejected)
    found = {
        "rewards/chosen": won,
        "rewards/rejected": lost,
        "rewards/margins": won - lost,
        "rewards/accuracies": as_number(won > lost),
    }
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        found |= {
            f"logps/{name}": as_number(side.policy),
            f"logps_avg/{name}": average(side),
            f"length/{name}": as_number(side.tokens),
        }
    if chosen.reference is not None:
        r = log_ratio(chosen)
        found |= {"kl/k1_chosen": r, "frac_chosen_down": as_number(r < 0)}
    return jax.lax.stop_gradient(found)


def row_metrics(rows: Sums, reward: Float[Array, "*n"]) -> dict[str, Float[Array, "*n"]]:
    """The same of rows that stand alone: `rewards`, `logps`, `length`, and with a reference `kl/k1`.

    Means over good rows and over bad ones are TRL's `rewards/chosen`, `logps/rejected` and so on: terms whose weight
    is the label, and whose unit counts rows of that label; 0 in a window that has none of them.
    """
    found = {
        "rewards": reward.astype(jnp.float32),
        "logps": rows.policy.astype(jnp.float32),
        "length": rows.tokens.astype(jnp.float32),
    }
    if rows.reference is not None:
        found["kl/k1"] = log_ratio(rows)
    return jax.lax.stop_gradient(found)


def check_beta(where: str, beta: float, *, sums: bool = True, large: bool = False) -> None:
    """Refuse a beta that means nothing, and one for averages where log-probabilities are summed.

    Raises:
      ValueError: unless 0 < beta, and beta <= 1 with sums if `large` does not allow more.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"{where}.beta: found {beta}; expected a positive number.")
    if sums and beta > 1 and not large:
        raise ValueError(
            f"{where}.beta: found {beta}; expected at most 1, as log-probabilities are summed here: values like 2 or "
            "10 are for averages (sigmoid_norm, SimPO). Set allow_large_beta to keep it."
        )


def check_name(where: str, name: str, known: Collection[str]) -> None:
    """Refuse a name that is not known, and say which one is near.

    Raises:
      ValueError: with the nearest name, or with all.
    """
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        meant = f" Is {near[0]!r} meant?" if near else ""
        raise ValueError(f"{where}: found {name!r}; expected one of {', '.join(known)}.{meant}")


def check_number(where: str, value: float, holds: bool, expected: str) -> None:
    """Refuse a number of which something does not hold.

    Raises:
      ValueError: that says what was expected.
    """
    if not holds:
        raise ValueError(f"{where}: found {value}; expected {expected}.")
