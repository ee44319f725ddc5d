"""Identity with plain decoding, whatever drafts and stops; the target as drafter loses no draft; no cache lags."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.infer.speculative import verify
from jaxaroo.infer.speculative.drafters.small_model import make_drafter
from jaxaroo.infer.speculative.stop import acceptance_head, confidence
from jaxaroo.models import heads
from jaxaroo.models.decoder import forward, new_cache


def alone(model):
    """The drafter's parameters without a stop rule."""
    return {"model": model, "stop": ()}


@functools.cache
def head(cfg, threshold=0.3):
    """A head that nobody trained, but which is not sure of anything."""
    given = heads.init_params(heads.AcceptanceConfig(target=cfg, blocks=2), jax.random.key(5))
    given["head"] = {"weight": 0.4 * given["head"]["weight"], "bias": jnp.array([-0.6, 0.6])}
    return given | {"threshold": jnp.float32(threshold)}


@functools.cache
def stopping(cfg, draw):
    return make_drafter(cfg, 4, draw, 1, acceptance_head())


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("llama", "shared"),
        ("llama", "mode"),
        pytest.param("qwen3", "shared", marks=pytest.mark.proof),
        pytest.param("window", "shared", marks=pytest.mark.proof),
    ],
)
@pytest.mark.slow
def test_output_is_that_of_plain_decoding(bench, shaken, name, draw):
    drafter = make_drafter(bench.targets[name], 4, draw)
    ran = bench.check_identity(drafter, verify.coupled(), alone(shaken(name)), name=name)
    assert (ran.tally.emitted[:3, 2:].sum(1) > 0).any()  # some draft was right


@pytest.mark.parametrize(
    ("name", "draw"), [("llama", "shared"), pytest.param("window", "mode", marks=pytest.mark.proof)]
)
@pytest.mark.slow
def test_a_chain_that_ends_early_changes_nothing_but_the_number_of_drafts(bench, shaken, name, draw):
    """Greedy and sampled rows; no threshold at all is no rule at all."""
    cfg = bench.targets[name]
    drafter = stopping(cfg, draw)
    few, all_ = (
        bench.check_identity(drafter, verify.coupled(), {"model": shaken(name), "stop": head(cfg, t)}, name=name).tally
        for t in (0.3, 1.0)
    )
    np.testing.assert_array_equal(all_.drafted, 4 * all_.emitted.sum(1))
    steps = few.emitted.sum(1)[:3]  # the last row takes none
    assert (2 * steps < few.drafted[:3]).all()  # the head knows of no draft before the second
    assert (few.drafted[:3] < 4 * steps).all()
    assert (steps >= all_.emitted.sum(1)[:3]).all()


@pytest.mark.slow
def test_a_row_ends_its_drafts_as_if_alone(bench, shaken):
    cfg = bench.targets["llama"]
    given = {"model": shaken(), "stop": head(cfg)}
    together = bench.drafted(stopping(cfg, "shared"), verify.coupled(), given).tally
    alone_ = bench.check_identity(stopping(cfg, "shared"), verify.coupled(), given, only=1).tally
    assert alone_.drafted[0] == together.drafted[1]
    np.testing.assert_array_equal(alone_.emitted[0], together.emitted[1])


@pytest.mark.proof
def test_an_unsure_small_model_ends_its_drafts_too(bench, shaken):
    drafter = make_drafter(bench.targets["llama"], 4, "shared", 1, confidence())
    ran = bench.check_identity(drafter, verify.coupled(), {"model": shaken(), "stop": {"eta": jnp.float32(0.2)}})
    steps = ran.tally.emitted.sum(1)[:3]
    assert (steps <= ran.tally.drafted[:3]).all()
    assert (ran.tally.drafted[:3] < 4 * steps).any()


@pytest.mark.proof
def test_several_chains_under_the_coupled_rule(bench, shaken):
    bench.check_identity(make_drafter(bench.targets["llama"], 3, "independent", 3), verify.coupled(), alone(shaken()))


@pytest.mark.proof
def test_one_row_alone(bench, shaken):
    bench.check_identity(make_drafter(bench.targets["llama"], 4), verify.coupled(), alone(shaken()), only=1)


@pytest.mark.parametrize(
    ("draw", "chains", "rule"),
    [
        ("shared", 1, verify.coupled()),
        ("independent", 1, verify.rejection(1, "independent")),
        ("independent", 3, verify.k_seq(3)),
    ],
)
@pytest.mark.slow
def test_the_target_as_its_own_drafter_has_every_draft_taken(bench, draw, chains, rule):
    """q = p: each step emits all drafts and one more, but for the last, which the row's end may cut."""
    drafts = 4 if chains == 1 else 3
    drafter = make_drafter(bench.targets["llama"], drafts, draw, chains)
    plain = [s for s in bench.samplings if not s.presence_penalty] + [bench.samplings[0]]  # q sees no draft's penalty
    full = steps = 0
    for seed in (5, 50):
        packed = bench.pack(bench.prompts, plain, range(seed, seed + 4))
        tally = bench.drafted(drafter, rule, alone(bench.weights("llama")), packed=packed).tally
        full += tally.emitted[:, drafts + 1].sum()
        cut = (tally.emitted.sum(1) > 0).sum()
        steps += tally.emitted.sum() - cut
    assert steps > 20
    assert full >= (1.0 if chains == 1 else 0.97) * steps  # rho of q = p is 1 up to rounding


@pytest.mark.slow
def test_shared_noise_finds_more_than_the_mode_does_when_sampled(bench, shaken):
    """At temperature 1, one shaken model, the same number of drafts."""
    share = {}
    for draw in ("mode", "shared"):
        drafter, total = make_drafter(bench.targets["llama"], 4, draw), np.zeros(6)
        for seed in range(100, 132, 4):
            packed = bench.pack(bench.prompts, [bench.samplings[1]] * 4, range(seed, seed + 4))
            total += bench.drafted(drafter, verify.coupled(), alone(shaken()), packed=packed).tally.emitted.sum(0)
        share[draw] = (total @ np.arange(6)) / total.sum()
    assert share["shared"] > 1.5 * share["mode"], share


@pytest.mark.parametrize(
    ("draw", "chains", "stops"),
    [("shared", 1, True), ("shared", 1, False), pytest.param("independent", 3, False, marks=pytest.mark.proof)],
)
@pytest.mark.slow
def test_the_cache_holds_what_a_fresh_reading_gives(bench, shaken, draw, chains, stops):
    """After every number of steps, rows that count as read are those of an uncached forward pass."""
    cfg = bench.targets["llama"]
    params = shaken()
    given = {"model": params, "stop": head(cfg)} if stops else alone(params)
    drafter = stopping(cfg, draw) if stops else make_drafter(cfg, 4 if chains == 1 else 3, draw, chains)
    fresh = jax.jit(
        lambda tokens: forward(cfg, params, tokens, jnp.arange(96)[None], cache=new_cache(cfg, 1, 96)).cache
    )
    for steps in (0, 1, 3, 7):
        state = bench.drafted(drafter, verify.coupled(), given, steps=steps).state
        for row in (0, 1):
            filled = int(state.rows.filled[row])
            read = filled - 2 if chains == 1 else max(filled - 4, 0)  # the rest is read again with the next step
            want = fresh(state.rows.tokens[row][None])
            for mine, theirs in zip(state.drafter.cache.layers, want.layers, strict=True):
                np.testing.assert_allclose(mine.k[row, :read], theirs.k[0, :read], atol=2e-5)
                np.testing.assert_allclose(mine.v[row, :read], theirs.v[0, :read], atol=2e-5)


@pytest.mark.errors
def test_refusals(bench):
    cfg = bench.targets["llama"]
    with pytest.raises(ValueError, match="one child a node"):
        make_drafter(cfg, 3, "without_replacement")
    with pytest.raises(ValueError, match="would be one chain"):
        make_drafter(cfg, 3, "shared", 2)
    with pytest.raises(ValueError, match="at least 1"):
        make_drafter(cfg, 0)
    with pytest.raises(ValueError, match="stop rule 'acceptance head' with 3 chains; expected a single one"):
        make_drafter(cfg, 3, "independent", 3, acceptance_head())
