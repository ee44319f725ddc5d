"""Identity with plain decoding on random weights; the state after any step is what a fresh reading gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.infer.decode import RUNNING
from jaxaroo.infer.speculative import loop, verify
from jaxaroo.infer.speculative.drafters.jakiro import make_drafter
from jaxaroo.models import jakiro
from jaxaroo.models.decoder import forward
from jaxaroo.models.jakiro import JakiroConfig

TREE = dict(nodes=14, beam=4, levels=3)


@functools.cache
def drafter_of(target, kind):
    cfg = JakiroConfig(target=target, kind=kind)
    return cfg, jakiro.init_params(cfg, jax.random.key(3))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "contrastive"),
        pytest.param("llama", "mixture", marks=pytest.mark.proof),
        pytest.param("window", "contrastive", marks=pytest.mark.proof),
    ],
)
@pytest.mark.slow
def test_output_is_that_of_plain_decoding(bench, name, kind):
    cfg, params = drafter_of(bench.targets[name], kind)
    ran = bench.check_identity(make_drafter(cfg, draw="shared", **TREE), verify.coupled(), params, name=name)
    assert (ran.tally.emitted[:3, 2:].sum(1) > 0).any()  # some draft was right


@pytest.mark.parametrize("kind", ["contrastive", "mixture"])
@pytest.mark.slow
def test_the_state_is_what_a_fresh_reading_of_the_text_gives(bench, kind):
    target = bench.targets["llama"]
    cfg, params = drafter_of(target, kind)
    weights = bench.weights("llama")
    drafter = make_drafter(cfg, draw="shared", **TREE)
    run = jakiro.forward if kind == "contrastive" else jakiro.forward_mixture

    @jax.jit
    def fresh(tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        features = forward(target, weights, tokens, positions).hidden
        following = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)
        return run(cfg, params, weights, features, following, positions)

    for steps in (0, 1, 5):
        state = bench.drafted(drafter, verify.coupled(), params, steps=steps).state
        want = fresh(jnp.asarray(state.rows.tokens))[:2]
        for row in np.flatnonzero(np.asarray(state.rows.status) == RUNNING):
            filled = state.rows.filled[row]
            for mine, theirs in zip(state.drafter.last, want, strict=True):
                np.testing.assert_allclose(mine[row, 0], theirs[row, int(filled) - 2], atol=2e-5)


def test_the_last_level_is_not_read(bench, monkeypatch):
    """A tree of 3 levels reads one of them, its first; EAGLE would read two."""
    reads = []
    real = jakiro.forward
    monkeypatch.setattr(jakiro, "forward", lambda *a, **k: reads.append(a[4].shape) or real(*a, **k))
    cfg, params = drafter_of(bench.targets["llama"], "contrastive")
    drafter, weights = make_drafter(cfg, nodes=12, beam=4, levels=3), bench.weights("llama")
    tokens, rows = bench.pack()
    state = loop.prefill(cfg.target, loop.Weights(weights, params, ()), drafter, tokens, rows, chunk=16)
    at = state.rows
    context = loop.Context(at.tokens, at.filled, at.status == 0, at.cache, rows.sampling, at.counts)
    reads.clear()
    jax.eval_shape(drafter.propose, weights, params, state.drafter, context)
    assert reads == [(4, 4)]


@pytest.mark.errors
def test_one_level_is_refused(bench):
    cfg, _ = drafter_of(bench.targets["llama"], "contrastive")
    with pytest.raises(ValueError, match="at least 2"):
        make_drafter(cfg, nodes=4, beam=4, levels=1)
