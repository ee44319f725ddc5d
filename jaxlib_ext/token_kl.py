"""Divergence of a policy from its reference at every token, over the whole vocabulary, without `[N, V]` logits.

    KL(reference || policy) = sum_v p_ref (log p_ref - log p)   p = softmax(transform(hidden . head^T)), p_ref likewise

This is the anchor of ASFT (2509.23753) and the token term of SparsePO (2410.05102) and TDPO (2404.11999). Tiles and
loops are those of `token_stats`, with two tiles of logits at a time. One pass keeps, for both models, the maximum m and
the sum s of exp(z - m), and for the reference also q = sum_v exp(z_ref - m_ref) (z_ref - z):

    KL = q / s_ref + lse - lse_ref     lse = m + log s     dz = g (p - p_ref)

g is the cotangent of a token. The reference gets no gradient. Letters: N tokens, D and E widths of policy and
reference, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .token_stats import LogitTiles, cut_tokens, dense_logits, fit_tiles, gradients, logits_tile, rise, vocab_rows


def reference(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    ref_hidden: Float[Array, "N E"],
    ref_head: Float[Array, "V E"],
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Float[Array, " N"]:
    """What the operation means, with dense logits; every other form is compared with it."""
    transform = (scale, softcap, temperature)
    logp = jax.nn.log_softmax(dense_logits(hidden, head, *transform), axis=-1)
    fixed = jax.lax.stop_gradient(jax.nn.log_softmax(dense_logits(ref_hidden, ref_head, *transform), axis=-1))
    return jnp.sum(jnp.exp(fixed) * (fixed - logp), axis=-1)


def token_kl(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    ref_hidden: Float[Array, "N E"],
    ref_head: Float[Array, "V E"],
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    token_tile: int = 1024,
    vocab_tile: int = 8192,
) -> Float[Array, " N"]:
    """KL(reference || policy) of every token in nats, tile by tile; float32, and below 0 by rounding only.

    Args:
      hidden: the policy's states behind the final norm.
      head: its output embedding, tied or not.
      ref_hidden: the reference's states at the same tokens; no gradient.
      ref_head: its output embedding, rows in the same order; no gradient.
      scale: multiplies the logits of both first.
      softcap: then they become `softcap * tanh(z / softcap)`.
      temperature: and are divided by this.
      token_tile: c_t; the last tile may be short.
      vocab_tile: c_v; likewise.
    """
    shapes = [x.shape for x in (hidden, head, ref_hidden, ref_head)]
    fits = all(len(s) == 2 for s in shapes) and all(a[1] == b[1] for a, b in (shapes[:2], shapes[2:]))
    if not fits or shapes[0][0] != shapes[2][0] or shapes[1][0] != shapes[3][0]:
        names = ("hidden", "head", "ref_hidden", "ref_head")
        found = ", ".join(f"{name} {shape}" for name, shape in zip(names, shapes, strict=True))
        raise ValueError(f"token_kl: {found}; expected [N, D], [V, D], [N, E], [V, E].")
    tiles = fit_tiles(hidden, head, LogitTiles(token_tile, vocab_tile, scale, softcap, temperature), "token_kl")
    return _op(hidden, head, ref_hidden, ref_head, tiles)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _op(hidden, head, ref_hidden, ref_head, tiles: LogitTiles):
    return _forward(hidden, head, ref_hidden, ref_head, tiles)[0]


def _forward(hidden, head, ref_hidden, ref_head, o: LogitTiles):
    N, V = hidden.shape[0], head.shape[0]
    tiles = (cut_tokens(hidden, o), cut_tokens(ref_hidden, o))

    def over_vocab(stats, j):
        _, fresh, w = vocab_rows(head, j, o)
        ref_w = vocab_rows(ref_head, j, o)[2]

        def over_tokens(_, xs):
            (h, ref_h), (m, s, ref_m, ref_s, q) = xs
            z, ref_z = logits_tile(h, w, o)[0], logits_tile(ref_h, ref_w, o)[0]
            m, shrink, e = rise(m, z, fresh)
            ref_m, ref_shrink, ref_e = rise(ref_m, ref_z, fresh)
            s, ref_s = s * shrink + jnp.sum(e, axis=-1), ref_s * ref_shrink + jnp.sum(ref_e, axis=-1)
            return None, (m, s, ref_m, ref_s, q * ref_shrink + jnp.sum(ref_e * (ref_z - z), axis=-1))

        return jax.lax.scan(over_tokens, None, (tiles, stats))[1], None

    empty = jnp.zeros(tiles[0].shape[:2], jnp.float32)
    begin = (empty - jnp.inf, empty, empty - jnp.inf, empty, empty)
    stats, _ = jax.lax.scan(over_vocab, begin, jnp.arange(-(-V // o.vocab_tile)))
    m, s, ref_m, ref_s, q = (a.reshape(-1)[:N] for a in stats)
    kl = q / ref_s + (m - ref_m) + jnp.log(s / ref_s)  # rounds less than the difference of two log-sum-exps
    return kl, (hidden, head, ref_hidden, ref_head, m + jnp.log(s), ref_m + jnp.log(ref_s))


def _backward(o: LogitTiles, saved: Any, cotangent):
    hidden, head, ref_hidden, ref_head, lse, ref_lse = saved

    def dz_from(start):
        ref_w = jax.lax.dynamic_slice_in_dim(ref_head, start, o.vocab_tile)

        def dz(z, own):
            ref_h, lse, ref_lse, g = own
            ref_z = logits_tile(ref_h, ref_w, o)[0]
            return g[:, None] * (jnp.exp(z - lse[:, None]) - jnp.exp(ref_z - ref_lse[:, None]))

        return dz

    return *gradients(hidden, head, (ref_hidden, lse, ref_lse, cotangent), dz_from, o), None, None


_op.defvjp(_forward, _backward)
