"""Identity with plain decoding, whatever drafts; a drafter that is the target loses no draft; its cache never lags."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.infer.speculative import verify
from jaxaroo.infer.speculative.drafters.small_model import make_drafter
from jaxaroo.models.decoder import forward


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("llama", "shared"),
        ("llama", "mode"),
        pytest.param("qwen3", "shared", marks=pytest.mark.proof),
        pytest.param("window", "shared", marks=pytest.mark.proof),
    ],
)
def test_output_is_that_of_plain_decoding(bench, shaken, name, draw):
    drafter = make_drafter(bench.targets[name], 4, draw)
    ran = bench.check_identity(drafter, verify.coupled(), shaken(name), name=name)
    assert (ran.tally.emitted[:3, 2:].sum(1) > 0).any()  # some draft was right


@pytest.mark.proof
def test_several_chains_under_the_coupled_rule(bench, shaken):
    bench.check_identity(make_drafter(bench.targets["llama"], 3, "independent", 3), verify.coupled(), shaken())


@pytest.mark.proof
def test_one_row_alone(bench, shaken):
    bench.check_identity(make_drafter(bench.targets["llama"], 4), verify.coupled(), shaken(), only=1)


@pytest.mark.parametrize(
    ("draw", "chains", "rule"),
    [
        ("shared", 1, verify.coupled()),
        ("independent", 1, verify.rejection(1, "independent")),
        ("independent", 3, verify.k_seq(3)),
    ],
)
def test_the_target_as_its_own_drafter_has_every_draft_taken(bench, draw, chains, rule):
    """q = p: each step emits all drafts and one more, but for the last, which the row's end may cut."""
    drafts = 4 if chains == 1 else 3
    drafter = make_drafter(bench.targets["llama"], drafts, draw, chains)
    plain = [s for s in bench.samplings if not s.presence_penalty] + [bench.samplings[0]]  # q sees no draft's penalty
    full = steps = 0
    for seed in (5, 50):
        packed = bench.pack(bench.prompts, plain, range(seed, seed + 4))
        tally = bench.drafted(drafter, rule, bench.weights("llama"), packed=packed).tally
        full += tally.emitted[:, drafts + 1].sum()
        cut = (tally.emitted.sum(1) > 0).sum()
        steps += tally.emitted.sum() - cut
    assert steps > 20
    assert full >= (1.0 if chains == 1 else 0.97) * steps  # rho of q = p is 1 up to rounding


def test_shared_noise_finds_more_than_the_mode_does_when_sampled(bench, shaken):
    """At temperature 1, one shaken model, the same number of drafts."""
    share = {}
    for draw in ("mode", "shared"):
        drafter, total = make_drafter(bench.targets["llama"], 4, draw), np.zeros(6)
        for seed in range(100, 132, 4):
            packed = bench.pack(bench.prompts, [bench.samplings[1]] * 4, range(seed, seed + 4))
            total += bench.drafted(drafter, verify.coupled(), shaken(), packed=packed).tally.emitted.sum(0)
        share[draw] = (total @ np.arange(6)) / total.sum()
    assert share["shared"] > 1.5 * share["mode"], share


@pytest.mark.parametrize(("draw", "chains"), [("shared", 1), pytest.param("independent", 3, marks=pytest.mark.proof)])
def test_the_cache_holds_what_a_fresh_reading_gives(bench, shaken, draw, chains):
    """After every number of steps, rows that count as read are those of an uncached forward pass."""
    cfg = bench.targets["llama"]
    params = shaken()
    drafter = make_drafter(cfg, 4 if chains == 1 else 3, draw, chains)
    fresh = jax.jit(lambda tokens: forward(cfg, params, tokens, jnp.arange(96)[None], cache=_empty(cfg)).cache)
    for steps in (0, 1, 3, 7):
        state = bench.drafted(drafter, verify.coupled(), params, steps=steps).state
        for row in (0, 1):
            filled = int(state.rows.filled[row])
            read = filled - 2 if chains == 1 else max(filled - 4, 0)  # the rest is read again with the next step
            want = fresh(state.rows.tokens[row][None])
            for mine, theirs in zip(state.drafter.cache.layers, want.layers, strict=True):
                np.testing.assert_allclose(mine.k[row, :read], theirs.k[0, :read], atol=2e-5)
                np.testing.assert_allclose(mine.v[row, :read], theirs.v[0, :read], atol=2e-5)


def _empty(cfg):
    from jaxaroo.models.decoder import new_cache

    return new_cache(cfg, 1, 96)


@pytest.mark.errors
def test_refusals(bench):
    cfg = bench.targets["llama"]
    with pytest.raises(ValueError, match="one child a node"):
        make_drafter(cfg, 3, "without_replacement")
    with pytest.raises(ValueError, match="would be one chain"):
        make_drafter(cfg, 3, "shared", 2)
    with pytest.raises(ValueError, match="at least 1"):
        make_drafter(cfg, 0)
