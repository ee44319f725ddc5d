"""Oracle: float64 NumPy for the loss and AdamW; gradients by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaroo.models.decoder import DecoderConfig, Model, init_params, logits
from jaxaroo.train.step import init_state, make_train_step, next_token_loss

CFG = DecoderConfig(
    vocab_size=11, embed_dim=8, ffn_dim=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, tie_embeddings=True
)
TOKENS = jax.random.randint(jax.random.key(1), (3, 9), 0, 11)


def params():
    return init_params(CFG, jax.random.key(0))


def test_the_loss_is_the_mean_negative_log_likelihood():
    z = np.asarray(logits(Model(CFG, params()), TOKENS[:, :-1]), np.float64)
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    want = -np.mean([logp[b, t, TOKENS[b, t + 1]] for b in range(3) for t in range(8)])
    assert float(next_token_loss(CFG, params(), TOKENS)) == pytest.approx(want, rel=1e-5)


@pytest.mark.optimizer
def test_a_step_moves_against_the_gradient_by_the_learning_rate():
    """SGD, so that the update is the gradient; the directional derivative is checked by a finite difference."""
    tx, p = optax.sgd(0.1), params()
    before = float(next_token_loss(CFG, p, TOKENS))
    state, metrics = make_train_step(CFG, tx)(init_state(p, tx), TOKENS)
    p = params()  # the first were donated
    gradient = jax.tree.map(lambda new, old: (old - new) / 0.1, state.params, p)
    assert float(metrics["loss"]) == pytest.approx(before, rel=1e-6)
    norm = float(optax.tree.norm(gradient))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-3)
    eps = 1e-3 / norm

    def loss_at(distance):
        return float(next_token_loss(CFG, jax.tree.map(lambda w, g: w + distance * g, p, gradient), TOKENS))

    slope = (loss_at(eps) - loss_at(-eps)) / (2 * eps)
    assert slope == pytest.approx(norm**2, rel=1e-2)
    assert int(state.step) == 1


@pytest.mark.optimizer
def test_it_learns_a_sequence_by_heart():
    tx = optax.adamw(2e-2)
    step, state = make_train_step(CFG, tx), init_state(params(), tx)
    line = jnp.array([[1, 4, 2, 8, 5, 7, 3, 9, 6]])
    for _ in range(150):
        state, metrics = step(state, line)
    assert float(metrics["loss"]) < 0.05
    assert step._cache_size() == 1  # one compilation
