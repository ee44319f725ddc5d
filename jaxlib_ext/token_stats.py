"""Log-probability, log-sum-exp and entropy of chosen tokens, without ever holding their `[N, V]` logits.

    z = transform(hidden . head^T)     lse = log sum_v exp z_v     logp = z_target - lse     entropy = lse - E_p[z]

Tokens are cut into tiles of c_t and the vocabulary into tiles of c_v; only one `[c_t, c_v]` tile of logits lives at a
time. The vocabulary is the outer loop, so that the backward pass finishes one tile of the head's gradient before it
begins the next. Backward, tiles are computed again from the saved log-sum-exp: with cotangents a, b, c of the three
results and p = exp(z - lse),

    dz = a (onehot - p) + b p - c p (log p + entropy)

Statistics and sums are float32 whatever the inputs are. The method is that of cut cross-entropy (2411.09009) without
its filter on small probabilities: preference losses live in the tail. Letters: N tokens, D width, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class TokenStats(NamedTuple):
    """Natural logarithms, float32; all three carry gradients to hidden states and head."""

    logp: Float[Array, " N"]
    lse: Float[Array, " N"]
    entropy: Float[Array, " N"]


class _Options(NamedTuple):
    """What is static: tiles, and the transform of the logits."""

    token_tile: int
    vocab_tile: int
    scale: float
    softcap: float | None
    temperature: float


def reference(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " N"],
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> TokenStats:
    """What the operation means, with dense logits; every other form is compared with it."""
    raw = jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=jnp.float32)
    z, _ = _transform(raw, _Options(0, 0, scale, softcap, temperature))
    lse = jax.nn.logsumexp(z, axis=-1)
    chosen = jnp.take_along_axis(z, targets[:, None], axis=-1)[:, 0]
    mean = jnp.sum(jnp.exp(z - lse[:, None]) * z, axis=-1)
    return TokenStats(chosen - lse, lse, lse - mean)


def token_stats(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " N"],
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    token_tile: int = 1024,
    vocab_tile: int = 8192,
) -> TokenStats:
    """Score `targets` under the head, tile by tile.

    Args:
      hidden: states behind the final norm, at the scored positions only.
      head: output embedding, tied or not.
      targets: the chosen token of each position, 0 to V - 1.
      scale: multiplies the logits first.
      softcap: then they become `softcap * tanh(z / softcap)`.
      temperature: and are divided by this.
      token_tile: c_t; the last tile may be short.
      vocab_tile: c_v; likewise.

    Returns:
      Three numbers for each token.
    """
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1] or targets.shape != hidden.shape[:1]:
        found = f"hidden {hidden.shape}, head {head.shape}, targets {targets.shape}"
        raise ValueError(f"token_stats: {found}; expected [N, D], [V, D], [N].")
    if temperature <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"token_stats: temperature={temperature}, softcap={softcap}; expected numbers above 0.")
    N, V = hidden.shape[0], head.shape[0]
    options = _Options(max(1, min(token_tile, N)), min(vocab_tile, V), scale, softcap, temperature)
    return _op(hidden, head, targets, options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _op(hidden, head, targets, options: _Options) -> TokenStats:
    return _forward(hidden, head, targets, options)[0]


def _forward(hidden, head, targets, o: _Options):
    N, V = hidden.shape[0], head.shape[0]
    tiles = (_tile(hidden, o.token_tile), _tile(targets, o.token_tile))

    def over_vocab(stats, j):
        start, fresh, w = _vocab_tile(head, j, o)

        def over_tokens(_, xs):
            (h, y), (m, s, g, e) = xs
            z, _ = _logits(h, w, o)
            z = jnp.where(fresh[None], z, -jnp.inf)
            top = jnp.maximum(m, jnp.max(z, axis=-1))
            shrink, p = jnp.exp(m - top), jnp.exp(z - top[:, None])
            hit = (y[:, None] == start + jnp.arange(o.vocab_tile)[None]) & fresh[None]
            e = e * shrink + jnp.sum(jnp.where(fresh[None], p * z, 0.0), axis=-1)
            g = g + jnp.sum(jnp.where(hit, z, 0.0), axis=-1)
            return None, (top, s * shrink + jnp.sum(p, axis=-1), g, e)

        return jax.lax.scan(over_tokens, None, (tiles, stats))[1], None

    empty = jnp.zeros(tiles[1].shape, jnp.float32)
    begin = (empty - jnp.inf, empty, empty, empty)
    (m, s, g, e), _ = jax.lax.scan(over_vocab, begin, jnp.arange(-(-V // o.vocab_tile)))
    lse = m + jnp.log(s)
    stats = TokenStats(*(a.reshape(-1)[:N] for a in (g - lse, lse, lse - e / s)))
    return stats, (hidden, head, targets, stats.lse, stats.entropy)


def _backward(o: _Options, saved: Any, cotangents: TokenStats):
    hidden, head, targets, lse, entropy = saved
    (N, D), V = hidden.shape, head.shape[0]
    cut = functools.partial(_tile, size=o.token_tile)
    per_token = jax.tree.map(cut, (hidden, targets, lse, entropy, *cotangents))  # padded rows have zero cotangents

    def over_vocab(carry, j):
        dhidden, dhead = carry
        start, fresh, w = _vocab_tile(head, j, o)

        def over_tokens(dw, xs):
            (h, y, lse, entropy, a, b, c), dh = xs
            z, slope = _logits(h, w, o)
            logp = z - lse[:, None]
            p = jnp.exp(logp)
            hit = y[:, None] == start + jnp.arange(o.vocab_tile)[None]
            dz = a[:, None] * (hit.astype(jnp.float32) - p) + b[:, None] * p
            dz = (dz - c[:, None] * p * (logp + entropy[:, None])) * slope
            dz = jnp.where(fresh[None], dz, 0.0).astype(h.dtype)
            dw = dw + jnp.einsum("nv,nd->vd", dz, h, preferred_element_type=jnp.float32)
            return dw, dh + jnp.einsum("nv,vd->nd", dz, w, preferred_element_type=jnp.float32)

        dw, dhidden = jax.lax.scan(over_tokens, jnp.zeros((o.vocab_tile, D), jnp.float32), (per_token, dhidden))
        old = jax.lax.dynamic_slice_in_dim(dhead, start, o.vocab_tile)
        dw = jnp.where(fresh[:, None], dw.astype(head.dtype), old)
        return (dhidden, jax.lax.dynamic_update_slice_in_dim(dhead, dw, start, 0)), None

    begin = (jnp.zeros((*per_token[0].shape,), jnp.float32), jnp.zeros_like(head))
    (dhidden, dhead), _ = jax.lax.scan(over_vocab, begin, jnp.arange(-(-V // o.vocab_tile)))
    return dhidden.reshape(-1, D)[:N].astype(hidden.dtype), dhead, None


_op.defvjp(_forward, _backward)


# ----------------------------------------------------------------------------------------------------------- private
def _logits(h, w, o: _Options):
    """One tile of transformed logits, float32, and its derivative by the raw ones."""
    return _transform(jnp.einsum("nd,vd->nv", h, w, preferred_element_type=jnp.float32), o)


def _transform(raw, o: _Options):
    z = raw * o.scale
    if o.softcap is None:
        return z / o.temperature, o.scale / o.temperature
    bent = jnp.tanh(z / o.softcap)
    return o.softcap * bent / o.temperature, (1 - bent * bent) * (o.scale / o.temperature)


def _vocab_tile(head, j, o: _Options):
    """Where tile j starts (the last is moved back to fit), which of its rows no earlier tile has had, and the rows."""
    first = j * o.vocab_tile
    start = jnp.minimum(first, head.shape[0] - o.vocab_tile)
    fresh = start + jnp.arange(o.vocab_tile) >= first
    return start, fresh, jax.lax.dynamic_slice_in_dim(head, start, o.vocab_tile)


def _tile(x, size: int):
    """[N, ...] -> [tiles, size, ...], padded with zeros."""
    x = jnp.pad(x, [(0, -x.shape[0] % size)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, size, *x.shape[1:])
