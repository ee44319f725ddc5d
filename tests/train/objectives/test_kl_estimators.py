"""Oracles: enumeration of a categorical over three symbols, so that means and gradients are exact; float64 formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.objectives.kl_estimators import kl_estimate

LOGITS, OLD, REF = np.array([0.4, -0.3, 0.9]), np.array([0.1, 0.2, 0.3]), np.array([-0.5, 0.6, 0.2])
ALL = ["k1", "k2", "k3", "k3_corrected"]
f32 = lambda x: jnp.asarray(x, jnp.float32)


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def kl(a, b):
    """KL(a || b) of two lists of logits."""
    p, q = softmax(a), softmax(b)
    return float(np.sum(p * np.log(p / q)))


def numeric(f, z):
    return np.array([(f(z + d) - f(z - d)) / 2e-6 for d in np.eye(3) * 1e-6])


def mean_loss(z, sampler, estimator, on_policy=True):
    """The mean of an estimator over the symbols that `sampler` draws; its gradient is that of the loss on average."""
    logp, weight = jax.nn.log_softmax(z), f32(softmax(sampler))
    log_ratio = None if on_policy else logp - f32(np.log(softmax(sampler)))
    return jnp.sum(weight * kl_estimate(logp, f32(np.log(softmax(REF))), estimator, log_ratio=log_ratio))


@pytest.mark.parametrize("estimator", ["k1", "k3", "k3_corrected"])
def test_on_policy_these_have_the_divergence_as_their_mean(estimator):
    assert float(mean_loss(f32(LOGITS), LOGITS, estimator)) == pytest.approx(kl(LOGITS, REF), rel=1e-5)


@pytest.mark.parametrize(
    ("estimator", "of"),
    [
        ("k1", lambda z: 0.0),
        ("k2", lambda z: kl(z, REF)),
        ("k3", lambda z: kl(REF, z)),
        ("k3_corrected", lambda z: kl(z, REF)),
    ],
)
def test_as_losses_they_have_these_gradients_on_average(estimator, of):
    got = jax.grad(mean_loss)(f32(LOGITS), LOGITS, estimator)
    np.testing.assert_allclose(got, numeric(of, LOGITS), rtol=0, atol=2e-6)


def test_off_policy_the_corrected_one_still_has_mean_and_gradient_of_the_divergence():
    loss = lambda z: mean_loss(z, OLD, "k3_corrected", on_policy=False)
    assert float(loss(f32(LOGITS))) == pytest.approx(kl(LOGITS, REF), rel=1e-5)
    np.testing.assert_allclose(jax.grad(loss)(f32(LOGITS)), numeric(lambda z: kl(z, REF), LOGITS), rtol=0, atol=2e-6)


def test_printed_values():
    d = f32([0.3, -0.2, 0.05])
    got = [float(jnp.mean(kl_estimate(d, jnp.zeros(3), name))) for name in ("k1", "k2", "k3")]
    assert got == pytest.approx([0.05, 0.022083, 0.021150], abs=6e-7)


@pytest.mark.slow
def test_k3_is_exact_and_never_negative_from_tiny_to_large():
    size = np.concatenate([10.0 ** np.arange(-12, 1), np.linspace(0, 9.99, 1000)])
    d = np.concatenate([size, -size]).astype(np.float32)
    got = kl_estimate(f32(d), jnp.zeros(d.shape), "k3")
    x = d.astype(np.float64)
    small = np.abs(x) < 1e-2  # even float64 cancels there
    want = np.where(small, x**2 / 2 - x**3 / 6 + x**4 / 24 - x**5 / 120, np.expm1(-x) + x)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert (np.asarray(got) >= 0).all()
    slope = jax.vmap(jax.grad(lambda x: kl_estimate(x, jnp.float32(0), "k3")))(f32(d))
    np.testing.assert_allclose(slope, -np.expm1(-x), rtol=1e-6)


@pytest.mark.slow
def test_differences_and_ratios_beyond_all_measure_are_cut():
    far = f32([-80.0, -10.5, 10.5, 80.0])
    zero = jnp.zeros(4)
    np.testing.assert_array_equal(kl_estimate(far, zero, "k1"), far)
    np.testing.assert_allclose(kl_estimate(far, zero, "k2"), [50.0] * 4, rtol=1e-6)
    ends = [np.exp(10) - 11, np.exp(10) - 11, np.exp(-10) + 9, np.exp(-10) + 9]
    np.testing.assert_allclose(kl_estimate(far, zero, "k3"), ends, rtol=1e-6)
    for name in ("k2", "k3"):
        assert not np.asarray(jax.grad(lambda x, n=name: jnp.sum(kl_estimate(x, zero, n)))(far)).any()
    got = kl_estimate(jnp.ones(4), zero, "k3_corrected", log_ratio=f32([-200.0, -20.5, 20.5, 200.0]))
    np.testing.assert_allclose(got, np.exp(np.array([-20, -20, 20, 20]) - 1.0), rtol=1e-5)


@pytest.mark.parametrize("estimator", ALL)
def test_no_gradient_passes_through_the_reference_and_the_result_is_float32(estimator):
    loss = lambda ref: jnp.sum(kl_estimate(f32(LOGITS), ref, estimator))
    assert not np.asarray(jax.grad(loss)(f32(REF))).any()
    assert kl_estimate(f32(LOGITS).astype(jnp.bfloat16), f32(REF).astype(jnp.bfloat16), estimator).dtype == jnp.float32


@pytest.mark.errors
def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="found estimator 'k4'; expected k1, k2, k3 or k3_corrected"):
        kl_estimate(jnp.zeros(1), jnp.zeros(1), "k4")
