"""What every preference loss stands on: log-ratios, averages, what is logged of a pair, what settings are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.objectives.preference import (
    Sums,
    average,
    check_beta,
    check_name,
    check_number,
    chosen_nll,
    log_ratio,
    pair_metrics,
    reference_of,
    row_metrics,
    smoothed,
)

CHOSEN = Sums(jnp.asarray([-12.0, -9.0, -30.0]), jnp.asarray([-13.0, -9.0, -28.0]), jnp.asarray([8.0, 3.0, 15.0]))
REJECTED = Sums(jnp.asarray([-15.0, -4.0, -20.0]), jnp.asarray([-14.5, -4.0, -30.0]), jnp.asarray([10.0, 2.0, 8.0]))


def test_log_ratios_and_averages_are_float32_and_only_the_policy_learns():
    half = Sums(*(x.astype(jnp.bfloat16) for x in CHOSEN))
    assert {f(half).dtype for f in (log_ratio, average, reference_of)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(log_ratio(CHOSEN), [1.0, 0.0, -2.0])
    np.testing.assert_allclose(average(CHOSEN), [-1.5, -3.0, -2.0])
    np.testing.assert_array_equal(chosen_nll(CHOSEN), [12.0, 9.0, 30.0])
    thirds = Sums(jnp.asarray([-10.0], jnp.bfloat16), None, jnp.asarray([3.0], jnp.bfloat16))
    np.testing.assert_allclose(average(thirds), [-10 / 3], rtol=1e-6)
    grad = jax.grad(lambda s: jnp.sum(log_ratio(s)))(CHOSEN)
    np.testing.assert_array_equal(grad.policy, np.ones(3))
    np.testing.assert_array_equal(grad.reference, np.zeros(3))


def test_smoothed_is_the_mean_logistic_loss_under_wrong_labels():
    x = np.linspace(-30, 30, 61)
    expected = 0.7 * np.logaddexp(0, -x) + 0.3 * np.logaddexp(0, x)
    np.testing.assert_allclose(smoothed(jnp.asarray(x, jnp.float32), 0.3), expected, rtol=1e-6)
    far = jnp.asarray([-1e4, 1e4])
    value, grad = jax.value_and_grad(lambda x: jnp.sum(smoothed(x, 0.25)))(far)
    assert float(value) == 1e4
    np.testing.assert_array_equal(grad, [-0.75, 0.25])


def test_metrics_are_values_a_pair_and_a_tie_is_no_win():
    found = pair_metrics(CHOSEN, REJECTED, 0.1 * log_ratio(CHOSEN), 0.1 * log_ratio(REJECTED))
    expected = {
        "rewards/chosen": [0.1, 0.0, -0.2],
        "rewards/rejected": [-0.05, 0.0, 1.0],
        "rewards/margins": [0.15, 0.0, -1.2],
        "rewards/accuracies": [1.0, 0.0, 0.0],
        "logps/chosen": [-12.0, -9.0, -30.0],
        "logps/rejected": [-15.0, -4.0, -20.0],
        "logps_avg/chosen": [-1.5, -3.0, -2.0],
        "logps_avg/rejected": [-1.5, -2.0, -2.5],
        "length/chosen": [8.0, 3.0, 15.0],
        "length/rejected": [10.0, 2.0, 8.0],
        "kl/k1_chosen": [1.0, 0.0, -2.0],
        "frac_chosen_down": [0.0, 0.0, 1.0],
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-7, err_msg=name)
        assert found[name].dtype == jnp.float32


def test_metrics_have_no_gradient_and_need_no_reference():
    bare = CHOSEN._replace(reference=None)
    total = lambda c, r: sum(jnp.sum(v) for v in pair_metrics(c, r, average(c), average(r)).values())
    np.testing.assert_array_equal(jax.grad(total)(bare, REJECTED._replace(reference=None)).policy, np.zeros(3))
    assert "kl/k1_chosen" not in pair_metrics(bare, REJECTED, average(bare), average(REJECTED))


def test_rows_alone_have_the_same_numbers_without_gradient():
    found = row_metrics(CHOSEN, 0.1 * log_ratio(CHOSEN))
    expected = {
        "rewards": [0.1, 0.0, -0.2],
        "logps": [-12.0, -9.0, -30.0],
        "length": [8.0, 3.0, 15.0],
        "kl/k1": [1.0, 0.0, -2.0],
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-7, err_msg=name)
    total = lambda s: sum(jnp.sum(v) for v in row_metrics(s, average(s)).values())
    assert not np.asarray(jax.grad(total)(CHOSEN).policy).any()
    assert "kl/k1" not in row_metrics(CHOSEN._replace(reference=None), average(CHOSEN))


@pytest.mark.errors
def test_missing_references_and_settings_without_meaning_are_refused():
    with pytest.raises(ValueError, match="found sums without a reference"):
        log_ratio(CHOSEN._replace(reference=None))
    for beta in (0.0, -0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"X\.beta: found .*; expected a positive number"):
            check_beta("X", beta, large=True)
    with pytest.raises(ValueError, match=r"X\.beta: found 2\.0; expected at most 1, .*allow_large_beta"):
        check_beta("X", 2.0)
    check_beta("X", 1.0), check_beta("X", 2.0, sums=False), check_beta("X", 2.0, large=True)
    with pytest.raises(ValueError, match=r"X: found 'sigmod'; expected one of hinge, sigmoid\. Is 'sigmoid' meant\?"):
        check_name("X", "sigmod", ("hinge", "sigmoid"))
    with pytest.raises(ValueError, match=r"X: found 3; expected less\."):
        check_number("X", 3, False, "less")
