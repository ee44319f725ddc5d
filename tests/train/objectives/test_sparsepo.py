"""Oracles: the worked rows of the specification, float64 loops over answers, and TDPO1 where all masks are 1."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.train.data.pipeline import Batch
from jaxaroo.train.objectives.by_name import sparsepo_terms
from jaxaroo.train.objectives.logprobs import Scores
from jaxaroo.train.objectives.sequences import View
from jaxaroo.train.objectives.sparsepo import (
    SparsepoConfig,
    activation_mask,
    init_masks,
    mask_axes,
    masks_of,
    sparsepo,
)

sp = lambda x: np.logaddexp(0, x)
FREE = SparsepoConfig(beta=0.8, l1_u=0.0, l1_d=0.0)


def two(*rows):
    return jnp.asarray(rows, jnp.float32)


def test_worked_rows():
    """Chosen ratios .6 .4, masks 1 .5, KL .10 .20; rejected -.3 -.2, masks .5 0, KL .30 .40."""
    u, k = two([0.6 + 0.2, -0.15]), two([0.10 + 0.10, 0.15])
    np.testing.assert_allclose(sparsepo(u, k, 0 * u, 0 * k, FREE), [0.371101], atol=1e-6)
    u, k = two([1.0, -0.5]), two([0.3, 0.7])
    np.testing.assert_allclose(sparsepo(u, k, 0 * u, 0 * k, FREE), [0.346976], atol=1e-6)


def test_masks_of_zero_leave_ln_2_and_sizes_cost_what_they_should():
    zero = two([0.0, 0.0])
    np.testing.assert_allclose(sparsepo(zero, zero, zero, zero, FREE), [np.log(2)], rtol=1e-6)
    cfg = SparsepoConfig(l1_u=0.1, l1_d=0.01)
    got = sparsepo(zero, zero, two([3.0, 1.0]), two([2.0, 5.0]), cfg)
    np.testing.assert_allclose(got, [np.log(2) + 0.1 * 4 + 0.01 * 7], rtol=1e-6)
    got = sparsepo(zero, zero, two([3.0, 1.0]), two([2.0, 5.0]), dataclasses.replace(cfg, mask="activations"))
    np.testing.assert_allclose(got, [np.log(2)], rtol=1e-6)


# Two rows: one with a pair, one with two pairs of one token each; the first tokens of segments are prompts.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0, 0], [1, 1, 2, 2, 3, 3, 3, 4, 4, 0]])
MASK = np.array([[0, 1, 1, 1, 0, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 1, 1, 0, 1, 0]]) > 0
B, T, D, L = 2, 10, 6, 3
BATCH = Batch(*[jnp.asarray(SEGMENTS)] * 4, jnp.asarray(MASK), jnp.asarray(MASK, jnp.float32) * 2.0)
BATCH = BATCH._replace(segments=jnp.asarray(SEGMENTS))
RNG = np.random.default_rng(0)
STATES = tuple(jnp.asarray(RNG.normal(2, 3, (B, T, D)), jnp.float32) for _ in range(L))


def answers():
    """(row, tokens of the answer) of every sequence, in order."""
    for row in range(B):
        for s in range(1, SEGMENTS[row].max() + 1):
            yield row, np.flatnonzero((SEGMENTS[row] == s) & MASK[row])


def test_learned_masks_are_those_of_a_loop():
    for networks in ("common", "independent"):
        cfg = SparsepoConfig(networks=networks)
        nets = init_masks(L, D, jax.random.key(1), cfg)
        nets = jax.tree.map(lambda x: x + 0.1, nets)
        got = masks_of(STATES, BATCH, nets, cfg)
        for mask, net in zip(got, (nets["u"], nets[{"common": "u", "independent": "d"}[networks]]), strict=True):
            wanted = np.zeros((B, T))
            for b, t in zip(*np.nonzero(MASK), strict=True):
                total = 0.0
                for i, x in enumerate(STATES):
                    v = np.asarray(x[b, t], np.float64)
                    v = (v - v.mean()) / np.sqrt(v.var() + 1e-5) * np.asarray(net["gain"]) + np.asarray(
                        net["shift_bias"]
                    )
                    total += float(net["mixer"][i]) * max(
                        0.0, v @ np.asarray(net["unit"][i]) + float(net["unit_bias"][i])
                    )
                wanted[b, t] = max(0.0, total)
            np.testing.assert_allclose(mask, wanted, rtol=1e-4, atol=1e-5)
            assert (wanted > 0).any()
        assert jax.tree.structure(mask_axes(cfg), is_leaf=lambda x: isinstance(x, tuple)) == jax.tree.structure(nets)


def test_linear_units_begin_as_pytorchs_and_every_network_as_its_own():
    nets = init_masks(60, 500, jax.random.key(3), SparsepoConfig(networks="independent"))
    for net in nets.values():
        for name, inputs in (("unit", 500), ("unit_bias", 500), ("mixer", 60)):
            most = 1 / np.sqrt(inputs)
            np.testing.assert_allclose([net[name].min(), net[name].max()], [-most, most], rtol=0.2)
            assert np.abs(net[name]).max() <= most
    assert (nets["u"]["unit"] != nets["d"]["unit"]).mean() > 0.9


def test_activation_masks_go_from_0_to_1_in_every_answer():
    states = (STATES[0] - 30, *STATES[1:])  # of either sign
    got = np.asarray(activation_mask(states, BATCH), np.float64)
    wanted = np.zeros((B, T))
    for x in states:
        for row, at in answers():
            mean = np.asarray(x[row], np.float64).mean(-1)[at]
            z = (mean - mean.mean()) / (mean.std() + 1e-12)  # standard units change nothing
            wanted[row, at] += (z - z.min()) / max(z.max() - z.min(), 1e-9) / L
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    for row, at in answers():
        one = np.asarray(activation_mask(STATES[:1], BATCH))[row, at]
        assert one.min() == 0.0
        assert one.max() == (1.0 if len(at) > 1 else 0.0)
    assert not got[~MASK].any()


def scores(logp, states=()):
    return Scores(logp, -logp, jnp.zeros((B, T, D)), states=states)


@pytest.mark.slow
def test_terms_are_those_of_a_loop_and_nothing_reaches_the_reference():
    logp, reference, kl = (jnp.asarray(RNG.normal(-1, 0.5, (B, T)), jnp.float32) for _ in range(3))
    cfg = SparsepoConfig(beta=0.5, l1_u=0.03, l1_d=0.02, networks="independent")
    nets = jax.tree.map(lambda x: x + 0.1, init_masks(L, D, jax.random.key(2), cfg))
    m_u, m_d = (np.asarray(m, np.float64) for m in masks_of(STATES, BATCH, nets, cfg))

    def loss(logp, reference, states, kl, nets):
        view = View(BATCH, 2, scores(logp), scores(reference, states))
        terms, metrics = sparsepo_terms(view, cfg, kl=kl, network=nets)
        total = lambda term: jnp.sum(term.value * term.weight)
        return total(terms["sparsepo"]), {name: total(term) for name, term in metrics.items()}

    wanted, sides = 0.0, list(answers())
    for w, l in zip(sides[::2], sides[1::2], strict=True):
        u, k, size = [], [], 0.0
        for row, at in (w, l):
            ratio = np.asarray(logp - reference, np.float64)[row, at]
            u.append((m_u[row, at] * ratio).sum())
            k.append((m_d[row, at] * np.asarray(kl, np.float64)[row, at]).sum())
            size += 0.03 * m_u[row, at].sum() + 0.02 * m_d[row, at].sum()
        wanted += 2.0 * (sp(-0.5 * (u[0] - u[1] + k[0] - k[1])) + size)
    args = (logp, reference, STATES, kl, nets)
    grads, _ = jax.grad(loss, argnums=(0, 2, 3, 4), has_aux=True)(*args)
    value, metrics = loss(*args)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    sparse = [(m[MASK] == 0).sum() for m in (m_u, m_d)]
    assert sparse[0] != sparse[1]
    assert [float(metrics[f"mask/sparsity_{of}"]) for of in "ud"] == sparse
    assert all(np.abs(g).max() > 1e-6 for g in jax.tree.leaves((grads[0], grads[2], grads[3]["u"]["unit"])))
    assert not any(np.asarray(g).any() for g in grads[1])  # states of the reference


def test_with_masks_of_one_it_is_tdpo1():
    """softplus(-beta ((r_w - r_l) - (D_l - D_w))), D the sums of KL(ref || policy)."""
    logp, reference, kl = (jnp.asarray(RNG.normal(-1, 0.5, (B, T)), jnp.float32) for _ in range(3))
    ones = MASK.astype(np.float64)
    sides = list(answers())
    total = lambda x, side: (np.asarray(x, np.float64) * ones)[side[0], side[1]].sum()
    for w, l in zip(sides[::2], sides[1::2], strict=True):
        r = [total(logp - reference, s) for s in (w, l)]
        d = [total(kl, s) for s in (w, l)]
        got = sparsepo(two(r), two(d), two([0, 0]), two([0, 0]), FREE)
        np.testing.assert_allclose(got, [sp(-0.8 * ((r[0] - r[1]) - (d[1] - d[0])))], rtol=1e-5)


def test_metrics_say_how_sparse_the_masks_are():
    cfg = SparsepoConfig(mask="activations")
    logp = jnp.full((B, T), -1.0)
    view = View(BATCH, 2, scores(logp), scores(logp - 1, STATES[:1]))
    _, metrics = sparsepo_terms(view, cfg, kl=logp * 0 + 1, network={})
    m = np.asarray(activation_mask(STATES[:1], BATCH))
    got = {n: float(jnp.sum(t.value * t.weight)) for n, t in metrics.items()}
    assert got["mask/sparsity_u"] == got["mask/sparsity_d"] == (m[MASK] == 0).sum()
    np.testing.assert_allclose(got["mask/mean"], m[MASK].sum(), rtol=1e-5)
    np.testing.assert_allclose([got["seq_kl"], got["seq_kl_masked"]], [MASK.sum(), m.sum()], rtol=1e-5)
    assert init_masks(L, D, jax.random.key(0), cfg) == mask_axes(cfg) == {}


@pytest.mark.errors
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(beta=2.0), "expected at most 1"),
        (dict(mask="learnt"), "Is 'learned' meant"),
        (dict(networks="one"), "expected one of common, independent"),
        (dict(l1_u=-1.0), "l1_u: found -1.0; expected at least 0"),
    ],
)
def test_settings_are_checked(given, message):
    with pytest.raises(ValueError, match=message):
        SparsepoConfig(**given)
