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
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .token_stats import (
    Layout,
    LogitTiles,
    check_tiles,
    choose,
    cut_tokens,
    dense_logits,
    fit_tiles,
    gradients,
    logits_tile,
    on_shards,
    rise,
    vocab_rows,
)


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
    hidden: Float[Array, "*N D"],
    head: Float[Array, "V D"],
    ref_hidden: Float[Array, "*N E"],
    ref_head: Float[Array, "V E"],
    mask: Bool[Array, "*N"] | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    token_tile: int = 512,
    vocab_tile: int = 4096,
    layout: Layout | None = None,
) -> Float[Array, "*N"]:
    """KL(reference || policy) of every token in nats, tile by tile; float32, and below 0 by rounding only.

    Args:
      hidden: the policy's states behind the final norm.
      head: its output embedding, tied or not.
      ref_hidden: the reference's states at the same tokens; no gradient.
      ref_head: its output embedding, rows in the same order; no gradient.
      mask: which tokens to compare; all when not given. The others get 0, and no gradient.
      scale: multiplies the logits of both first.
      softcap: then they become `softcap * tanh(z / softcap)`.
      temperature: and are divided by this.
      token_tile: c_t; the last tile may be short.
      vocab_tile: c_v; likewise.
      layout: where tokens and rows of the heads lie on the mesh; sizes have to divide.
    """
    shapes = [x.shape for x in (hidden, head, ref_hidden, ref_head)]
    fits = len(shapes[1]) == len(shapes[3]) == 2 and all(a[-1] == b[1] for a, b in (shapes[:2], shapes[2:]))
    if not fits or shapes[0][:-1] != shapes[2][:-1] or shapes[1][0] != shapes[3][0]:
        names = ("hidden", "head", "ref_hidden", "ref_head")
        found = ", ".join(f"{name} {shape}" for name, shape in zip(names, shapes, strict=True))
        raise ValueError(f"token_kl: {found}; expected [..., D], [V, D], [..., E], [V, E].")
    if mask is not None and mask.shape != hidden.shape[:-1]:
        raise ValueError(f"token_kl: mask {mask.shape}, hidden {hidden.shape}; expected one for each token.")
    tiles = check_tiles(LogitTiles(token_tile, vocab_tile, scale, softcap, temperature), "token_kl")
    return _op(hidden, head, ref_hidden, ref_head, mask, tiles, layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _op(hidden, head, ref_hidden, ref_head, mask, tiles: LogitTiles, layout: Layout | None):
    return _forward(hidden, head, ref_hidden, ref_head, mask, tiles, layout)[0]


def _forward(hidden, head, ref_hidden, ref_head, mask, o: LogitTiles, layout: Layout | None):
    local = functools.partial(_local_forward, o=o, vocab=layout and layout.vocab)
    kl, lse, ref_lse = on_shards(local, layout, "dwdwt", "ttt")(hidden, head, ref_hidden, ref_head, mask)
    return kl, (hidden, head, ref_hidden, ref_head, mask, lse, ref_lse)


def _backward(o: LogitTiles, layout: Layout | None, saved: Any, cotangent):
    local = functools.partial(_local_backward, o=o, layout=layout)
    return *on_shards(local, layout, "dwdwtttt", "dw")(*saved, cotangent), None, None, None


_op.defvjp(_forward, _backward)


def _local_forward(hidden, head, ref_hidden, ref_head, mask, o: LogitTiles, vocab: Any):
    """Of the tokens of one device: the divergence and both log-sum-exps."""
    chosen = choose(mask, hidden.shape[:-1])
    o = fit_tiles(o, math.prod(chosen.shape), head.shape[0])
    tiles = jax.tree.map(lambda x: cut_tokens(x, o), chosen.take((hidden, ref_hidden)))

    def over_vocab(stats, j):
        _, fresh, w = vocab_rows(head, j, o)
        ref_w = vocab_rows(ref_head, j, o)[2]

        def over_tokens(i, stats):
            (h, ref_h), (m, s, ref_m, ref_s, q) = jax.tree.map(lambda x: x[i], (tiles, stats))
            z, ref_z = logits_tile(h, w, o)[0], logits_tile(ref_h, ref_w, o)[0]
            m, shrink, e = rise(m, z, fresh)
            ref_m, ref_shrink, ref_e = rise(ref_m, ref_z, fresh)
            s, ref_s = s * shrink + jnp.sum(e, axis=-1), ref_s * ref_shrink + jnp.sum(ref_e, axis=-1)
            new = (m, s, ref_m, ref_s, q * ref_shrink + jnp.sum(ref_e * (ref_z - z), axis=-1))
            return jax.tree.map(lambda all, one: all.at[i].set(one), stats, new)

        return jax.lax.fori_loop(0, chosen.tiles(o), over_tokens, stats), None

    empty = jnp.zeros(tiles[0].shape[:2], jnp.float32)
    begin = (empty - jnp.inf, empty, empty - jnp.inf, empty, empty)
    (m, s, ref_m, ref_s, q), _ = jax.lax.scan(over_vocab, begin, jnp.arange(-(-head.shape[0] // o.vocab_tile)))
    if vocab is not None:
        top, ref_top = jax.lax.pmax((m, ref_m), vocab)
        shrink, ref_shrink = jnp.exp(m - top), jnp.exp(ref_m - ref_top)
        m, ref_m = top, ref_top
        s, ref_s, q = jax.lax.psum((s * shrink, ref_s * ref_shrink, q * ref_shrink), vocab)
    kl = q / ref_s + (m - ref_m) + jnp.log(s / ref_s)  # rounds less than the difference of two log-sum-exps
    return chosen.put((kl, m + jnp.log(s), ref_m + jnp.log(ref_s)))


def _local_backward(hidden, head, ref_hidden, ref_head, mask, lse, ref_lse, g, o: LogitTiles, layout: Layout | None):
    chosen = choose(mask, hidden.shape[:-1])
    h, *own = chosen.take((hidden, ref_hidden, lse, ref_lse, g))
    o = fit_tiles(o, math.prod(chosen.shape), head.shape[0])

    def dz_from(start):
        ref_w = jax.lax.dynamic_slice_in_dim(ref_head, start, o.vocab_tile)

        def dz(z, own):
            ref_h, lse, ref_lse, g = own
            ref_z = logits_tile(ref_h, ref_w, o)[0]
            return g[:, None] * (jnp.exp(z - lse[:, None]) - jnp.exp(ref_z - ref_lse[:, None]))

        return dz

    dhidden, dhead = gradients(h, head, tuple(own), dz_from, o, chosen.tiles(o), layout)
    return chosen.put(dhidden), dhead
