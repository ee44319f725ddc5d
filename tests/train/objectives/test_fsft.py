"""Oracle: the convex conjugate of each divergence, found by searching a grid in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.objectives.fsft import PHI, FsftConfig, fsft

T = np.concatenate([[0.0], np.logspace(-5, 2.7, 200_001)])  # the divergence's argument, a ratio of probabilities
F = {
    "pearson": (T - 1) ** 2,
    "hellinger": (np.sqrt(T) - 1) ** 2,
    "kl": T * np.log(np.maximum(T, 1e-300)),
}
U = {"pearson": np.linspace(-6, 6, 25), "hellinger": np.linspace(-0.85, 6, 25), "kl": np.linspace(-6, 6, 25)}


@pytest.mark.parametrize("f", F)
def test_phi_is_minus_the_conjugate_at_minus_u(f):
    expected = np.array([-np.max(-u * T - F[f]) for u in U[f]])
    np.testing.assert_allclose(PHI[f](jnp.asarray(U[f], jnp.float32)), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("f", PHI)
def test_losses_are_minus_phi_of_the_scaled_ratio_and_the_reference_does_not_learn(f):
    rng = np.random.default_rng(0)
    logp, reference = -rng.uniform(0, 6, (3, 5)), -rng.uniform(0, 6, (3, 5))
    u = 0.3 * (logp - reference)
    u = np.where(u < -0.9, np.nan, u)  # the tangent has its own test
    value, slope = {
        "total_variation": (u, np.ones_like(u)),
        "pearson": (u - u**2 / 4, 1 - u / 2),
        "hellinger": (u / (1 + u), (1 + u) ** -2),
        "kl": (-np.exp(-u - 1), np.exp(-u - 1)),
    }[f]
    cfg = FsftConfig(f=f, beta=0.3)
    a, b = jnp.asarray(logp, jnp.float32), jnp.asarray(reference, jnp.float32)
    g, g_reference = jax.grad(lambda a, b: jnp.sum(fsft(a, b, cfg)), argnums=(0, 1))(a, b)
    known = np.isfinite(u)
    np.testing.assert_allclose(np.asarray(fsft(a, b, cfg))[known], -value[known], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.asarray(g)[known], -0.3 * slope[known], rtol=1e-5)
    assert not np.asarray(g_reference).any()


@pytest.mark.parametrize("f", PHI)
def test_phi_is_concave_never_falls_and_stays_finite(f):
    u = jnp.asarray(np.concatenate([[-1e4, -100.0], np.linspace(-12, 6, 181), [100.0, 1e4]]), jnp.float32)
    value = np.asarray(PHI[f](u), np.float64)
    slope = np.asarray(jax.grad(lambda u: jnp.sum(PHI[f](u)))(u), np.float64)
    assert np.isfinite(value).all()
    assert np.isfinite(slope).all()
    assert (slope >= 0).all()
    assert (np.diff(slope) <= 1e-6 * slope[1:] + 1e-6).all()
    assert (np.diff(value) >= 0).all()
    if f in ("hellinger", "kl"):
        start = {"hellinger": -0.9, "kl": -10.0}[f]
        assert value[0] == pytest.approx(float(PHI[f](start)) + slope[0] * (-1e4 - start), rel=1e-5)
        steepest = {"hellinger": 100.0, "kl": np.exp(9.0)}[f]
        np.testing.assert_allclose(slope[:2], steepest, rtol=1e-5)


@pytest.mark.errors
def test_settings_without_meaning_are_refused():
    with pytest.raises(ValueError, match="Is 'pearson' meant"):
        FsftConfig(f="person")
    with pytest.raises(ValueError, match=r"FsftConfig\.beta: found 2\.0"):
        FsftConfig(beta=2.0)
