"""How far the policy is from the reference, from sampled tokens (http://joschu.net/blog/kl-approx.html).

    d  = log pi - log pi_ref          rho = pi / pi_old
    k1 = d        k2 = d^2 / 2        k3 = e^-d - 1 + d        k3_corrected = rho k3

Tokens are samples of pi_old. With pi_old = pi, k1 and k3 have the mean KL(pi || ref); k3 is never negative, and its
variance is less. As losses, which are differentiated, they are something else:

    k1            has no gradient on average: wrong as a loss, right as a part of the reward
    k2            has the gradient of KL(pi || ref) on average
    k3            has that of KL(ref || pi)
    k3_corrected  has that of KL(pi || ref), because rho is differentiated too (DeepSeek-V3.2, TRL)

k2 and k3 see d between -10 and 10; outside, they and their gradients are flat. log rho is cut at -20 and 20.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Estimator = Literal["k1", "k2", "k3", "k3_corrected"]
RATIO_LIMIT = 20.0  # of |log rho|: e^20 is far from overflow, and no update comes near it
D_LIMIT = 10.0


def kl_estimate(
    logp: Float[Array, "*shape"],
    logp_ref: Float[Array, "*shape"],
    estimator: Estimator = "k3_corrected",
    *,
    log_ratio: Float[Array, "*shape"] | None = None,
) -> Float[Array, "*shape"]:
    """One estimate for each token.

    Args:
      logp: of sampled tokens under the policy.
      logp_ref: under the reference; no gradient is taken through it.
      estimator: which.
      log_ratio: log rho, for k3_corrected; when not given, the policy itself has sampled: rho is 1, and is
        differentiated.

    Raises:
      ValueError: if there is no such estimator.
    """
    logp = logp.astype(jnp.float32)
    d = logp - jax.lax.stop_gradient(logp_ref.astype(jnp.float32))
    near = jnp.clip(d, -D_LIMIT, D_LIMIT)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return near**2 / 2
    if estimator == "k3":
        return _k3(near)
    if estimator == "k3_corrected":
        log_ratio = logp - jax.lax.stop_gradient(logp) if log_ratio is None else log_ratio.astype(jnp.float32)
        return jnp.exp(jnp.clip(log_ratio, -RATIO_LIMIT, RATIO_LIMIT)) * _k3(near)
    raise ValueError(f"kl_estimate: found estimator {estimator!r}; expected k1, k2, k3 or k3_corrected.")


# ----------------------------------------------------------------------------------------------------------- private
def _k3(d: Array) -> Array:
    """Its terms cancel near 0, where nearly all tokens are: rounding would be larger than it, and negative."""
    series = jnp.full_like(d, 1 / 40320)
    for factorial in (5040, 720, 120, 24, 6, 2):
        series = 1 / factorial - d * series
    return jnp.where(jnp.abs(d) < 0.5, d**2 * series, jnp.expm1(-d) + d)
