"""Divergence of a policy from its reference at every token, over the whole vocabulary, without `[N, V]` logits.

    KL(reference || policy) = sum_v p_ref (log p_ref - log p)   p = softmax(transform(hidden . head^T)), p_ref likewise

This is the anchor of ASFT (2509.23753) and the token term of SparsePO (2410.05102) and TDPO (2404.11999). Loops and
kernels are those of `logit_tiles`, with two streams. One sweep keeps, for both models, the maximum m and the sum s of
exp(z - m), and for the reference also q = sum_v exp(z_ref - m_ref) (z_ref - z):

    KL = q / s_ref + lse - lse_ref     lse = m + log s     dz = g (p - p_ref)

g is the cotangent of a token. The reference gets no gradient. Letters: N tokens, D and E widths of policy and
reference, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .dispatch import Impl
from .logit_tiles import (
    Layout,
    LogitTiles,
    Rows,
    Rule,
    check_tiles,
    choose,
    dense_logits,
    gradients,
    on_shards,
    rise,
    sweep,
    total,
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
    impl: Impl = "auto",
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
      token_tile: c_t of XLA's loops; the last tile may be short. Kernels choose theirs, and a Hopper has 2,048 or more.
      vocab_tile: c_v; likewise.
      layout: where tokens and rows of the heads lie on the mesh; sizes have to divide.
      impl: as `dispatch.run` takes it, of both passes.
    """
    shapes = [x.shape for x in (hidden, head, ref_hidden, ref_head)]
    fits = len(shapes[1]) == len(shapes[3]) == 2 and all(a[-1] == b[1] for a, b in (shapes[:2], shapes[2:]))
    names = ("hidden", "head", "ref_hidden", "ref_head")
    found = ", ".join(f"{name} {shape}" for name, shape in zip(names, shapes, strict=True))
    if not fits or shapes[0][:-1] != shapes[2][:-1] or shapes[1][0] != shapes[3][0]:
        raise ValueError(f"token_kl: {found}; expected [..., D], [V, D], [..., E], [V, E].")
    if any(0 in shape for shape in shapes):
        raise ValueError(f"token_kl: {found}; expected something of each.")
    if mask is not None and mask.shape != hidden.shape[:-1]:
        raise ValueError(f"token_kl: mask {mask.shape}, hidden {hidden.shape}; expected one for each token.")
    tiles = check_tiles(LogitTiles(token_tile, vocab_tile, scale, softcap, temperature), head.shape[0], "token_kl")
    return _op(hidden, head, ref_hidden, ref_head, mask, _Static(tiles, layout, impl))


class _Static(NamedTuple):
    tiles: LogitTiles
    layout: Layout | None
    impl: Impl


def _add(sums, zs, own, rows: Rows):
    """m and s of the policy, m, s and q of the reference."""
    (m, s, ref_m, ref_s, q), (z, ref_z) = sums, zs
    m, shrink, e = rise(m, z, rows.inside)
    ref_m, ref_shrink, ref_e = rise(ref_m, ref_z, rows.inside)
    apart = total(jnp.where(rows.inside, ref_e * (ref_z - z), 0.0))
    return m, s * shrink + total(e), ref_m, ref_s * ref_shrink + total(ref_e), q * ref_shrink + apart


def _derivative(zs, own, rows: Rows):
    lse, ref_lse, g = own
    return g * (jnp.exp(zs[0] - lse) - jnp.exp(zs[1] - ref_lse))


_RULE = Rule((-jnp.inf, 0.0, -jnp.inf, 0.0, 0.0), _add, _derivative)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _op(hidden, head, ref_hidden, ref_head, mask, static: _Static):
    return _forward(hidden, head, ref_hidden, ref_head, mask, static)[0]


def _forward(hidden, head, ref_hidden, ref_head, mask, static: _Static):
    local = functools.partial(_local_forward, static=static)
    kl, lse, ref_lse = on_shards(local, static.layout, "dwdwt", "ttt")(hidden, head, ref_hidden, ref_head, mask)
    return kl, (hidden, head, ref_hidden, ref_head, mask, lse, ref_lse)


def _backward(static: _Static, saved: Any, cotangent):
    local = functools.partial(_local_backward, static=static)
    return *on_shards(local, static.layout, "dwdwtttt", "dw")(*saved, cotangent), None, None, None


_op.defvjp(_forward, _backward)


def _local_forward(hidden, head, ref_hidden, ref_head, mask, static: _Static):
    """Of the tokens of one device: the divergence and both log-sum-exps."""
    vocab, chosen = static.layout and static.layout.vocab, choose(mask, hidden.shape[:-1])
    h, ref_h = chosen.take((hidden, ref_hidden))
    streams = ((h, head), (ref_h, ref_head))
    nothing = (jnp.zeros(h.shape[0], jnp.float32),)
    m, s, ref_m, ref_s, q = sweep(_RULE, streams, nothing, chosen.number, static.tiles, static.impl)
    if vocab is not None:
        top, ref_top = jax.lax.pmax((m, ref_m), vocab)
        shrink, ref_shrink = jnp.exp(m - top), jnp.exp(ref_m - ref_top)
        m, ref_m = top, ref_top
        s, ref_s, q = jax.lax.psum((s * shrink, ref_s * ref_shrink, q * ref_shrink), vocab)
    kl = q / ref_s + (m - ref_m) + jnp.log(s / ref_s)  # rounds less than the difference of two log-sum-exps
    return chosen.put((kl, m + jnp.log(s), ref_m + jnp.log(ref_s)))


def _local_backward(hidden, head, ref_hidden, ref_head, mask, lse, ref_lse, g, static: _Static):
    chosen = choose(mask, hidden.shape[:-1])
    h, ref_h, *own = chosen.take((hidden, ref_hidden, lse, ref_lse, g))
    streams = ((h, head), (ref_h, ref_head))
    given = (streams, tuple(own), chosen.number, static.tiles, static.layout, static.impl)
    dhidden, dhead = gradients(_RULE, *given)
    return chosen.put(dhidden), dhead
