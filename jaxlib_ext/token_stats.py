"""Log-probability, log-sum-exp and entropy of chosen tokens, without ever holding their `[N, V]` logits.

    z = transform(hidden . head^T)     lse = log sum_v exp z_v     logp = z_target - lse     entropy = lse - E_p[z]

One sweep over tiles of logits keeps of every token the maximum m, the sum s of exp(z - m), the logit of its target and
the sum e of exp(z - m) (z - m), for entropy = log s - e / s. Whether the target's logit is m comes free. Who asks also
gets the sum of exp(z - m)^2, without gradient: log sum_v p_v^2 says how much the distribution is in few tokens.
Backward, tiles are computed again from the saved log-sum-exp: with cotangents a, b, c of the three results and p =
exp(z - lse),

    dz = a (onehot - p) + b p - c p (log p + entropy)

Loops, kernels, masks and meshes are those of `logit_tiles`. Statistics and sums are float32 whatever the inputs are.
The method is that of cut cross-entropy (2411.09009) without its filter on small probabilities: preference losses live
in the tail. Letters: N tokens, D width, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .dispatch import Impl
from .logit_tiles import (
    Layout,
    LogitTiles,
    Rows,
    Rule,
    check_tiles,
    choose,
    dense_logits,
    first_row,
    gradients,
    on_shards,
    rise,
    sweep,
    total,
)


class TokenStats(NamedTuple):
    """Natural logarithms, float32; the first three carry gradients to hidden states and head."""

    logp: Float[Array, "*N"]
    lse: Float[Array, "*N"]
    entropy: Float[Array, "*N"]
    greedy: Float[Array, "*N"]  # 1 where no token is more likely, else 0; no gradient
    log_sum_sq: Float[Array, "*N"] | None = None  # log sum_v p_v^2, without gradient; None if nobody asked


def reference(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " N"],
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    want_sum_sq: bool = False,
) -> TokenStats:
    """What the operation means, with dense logits; every other form is compared with it."""
    z = dense_logits(hidden, head, scale, softcap, temperature)
    lse = jax.nn.logsumexp(z, axis=-1)
    logp = z - lse[:, None]
    chosen = jnp.take_along_axis(logp, targets[:, None], axis=-1)[:, 0]
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    log_sum_sq = jax.lax.stop_gradient(jax.nn.logsumexp(2 * logp, axis=-1)) if want_sum_sq else None
    greedy = (chosen >= jnp.max(logp, axis=-1)).astype(jnp.float32)
    return TokenStats(chosen, lse, entropy, greedy, log_sum_sq)


def token_stats(
    hidden: Float[Array, "*N D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "*N"],
    mask: Bool[Array, "*N"] | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    token_tile: int = 512,
    vocab_tile: int = 4096,
    want_sum_sq: bool = False,
    layout: Layout | None = None,
    impl: Impl = "auto",
) -> TokenStats:
    """Score `targets` under the head, tile by tile.

    Args:
      hidden: states behind the final norm.
      head: output embedding, tied or not.
      targets: the chosen token of each position, 0 to V - 1.
      mask: which of them to score; all when not given. The others get 0, and no gradient.
      scale: multiplies the logits first.
      softcap: then they become `softcap * tanh(z / softcap)`.
      temperature: and are divided by this.
      token_tile: c_t of XLA's loops; the last tile may be short. Kernels choose theirs, and a Hopper has 2,048 or more.
      vocab_tile: c_v; likewise.
      want_sum_sq: also sum the squared probabilities, which costs one more sum over every tile.
      layout: where tokens and rows of the head lie on the mesh; sizes have to divide. Without it all is in one place.
      impl: as `dispatch.run` takes it, of both passes.

    Returns:
      Four numbers for each token; five with `want_sum_sq`.
    """
    if hidden.shape[:-1] != targets.shape or head.ndim != 2 or hidden.shape[-1] != head.shape[1]:
        found = f"hidden {hidden.shape}, head {head.shape}, targets {targets.shape}"
        raise ValueError(f"token_stats: {found}; expected [..., D], [V, D], [...].")
    if 0 in (*hidden.shape, *head.shape):
        raise ValueError(f"token_stats: hidden {hidden.shape}, head {head.shape}; expected something of each.")
    if mask is not None and mask.shape != targets.shape:
        raise ValueError(f"token_stats: mask {mask.shape}, targets {targets.shape}; expected the same.")
    tiles = check_tiles(LogitTiles(token_tile, vocab_tile, scale, softcap, temperature), head.shape[0], "token_stats")
    return _op(hidden, head, targets, mask, _Static(tiles, want_sum_sq, layout, impl))


class _Static(NamedTuple):
    tiles: LogitTiles
    want_sum_sq: bool
    layout: Layout | None
    impl: Impl


def _add(sums, zs, own, rows: Rows):
    """m, s, the target's logit, e, and where it is asked for the sum of exp(z - m)^2."""
    (old, s, g, e, *ss), z = sums, zs[0]
    m, shrink, p = rise(old, z, rows.inside)
    g = g + rows.logit_of(z, own[0])
    e = _moved(e, s, old - m, shrink) + total(jnp.where(rows.inside, p * (z - m), 0.0))
    return m, s * shrink + total(p), g, e, *(x * shrink * shrink + total(p * p) for x in ss)


def _moved(e, s, by, shrink):
    """The sum of exp(z - m) (z - m) under a maximum that rose; `by` is infinite where there was nothing yet."""
    return (e + jnp.where(s > 0, s * by, 0.0)) * shrink


def _derivative(zs, own, rows: Rows):
    y, lse, entropy, a, b, c = own
    logp = zs[0] - lse
    p = jnp.exp(logp)
    return a * ((rows.number == y).astype(jnp.float32) - p) + b * p - c * p * (logp + entropy)


_BEGIN = (-jnp.inf, 0.0, 0.0, 0.0, 0.0)
_RULES = {square: Rule(_BEGIN[: 4 + square], _add, _derivative) for square in (False, True)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _op(hidden, head, targets, mask, static: _Static) -> TokenStats:
    return _forward(hidden, head, targets, mask, static)[0]


def _forward(hidden, head, targets, mask, static: _Static):
    local = functools.partial(_local_forward, static=static)
    stats = on_shards(local, static.layout, "dwtt", "t")(hidden, head, targets, mask)
    return stats, (hidden, head, targets, mask, stats.lse, stats.entropy)


def _backward(static: _Static, saved: Any, cotangents: TokenStats):
    local = functools.partial(_local_backward, static=static)
    own = (cotangents.logp, cotangents.lse, cotangents.entropy)  # those of the others are not looked at
    return *on_shards(local, static.layout, "dwttttttt", "dw")(*saved, *own), None, None


_op.defvjp(_forward, _backward)


def _local_forward(hidden, head, targets, mask, static: _Static) -> TokenStats:
    """Of the tokens of one device; its part of the vocabulary is put together with those of the others."""
    vocab, chosen = static.layout and static.layout.vocab, choose(mask, targets.shape)
    h, y = chosen.take((hidden, targets))
    own = ((y - first_row(head, vocab)).astype(jnp.float32),)
    rule, given = _RULES[static.want_sum_sq], (((h, head),), own, chosen.number)
    m, s, g, e, *ss = sweep(rule, *given, static.tiles, static.impl)
    if vocab is not None:
        top = jax.lax.pmax(m, vocab)
        shrink = jnp.exp(m - top)
        e, ss = _moved(e, s, m - top, shrink), [x * shrink * shrink for x in ss]
        m = top
        s, g, e, ss = jax.lax.psum((s * shrink, g, e, ss), vocab)
    lse = m + jnp.log(s)
    log_sum_sq = jnp.log(ss[0]) - 2 * jnp.log(s) if ss else None
    greedy = (g >= m).astype(jnp.float32)
    return chosen.put(TokenStats(g - lse, lse, jnp.log(s) - e / s, greedy, log_sum_sq))


def _local_backward(hidden, head, targets, mask, lse, entropy, a, b, c, static: _Static):
    layout, chosen = static.layout, choose(mask, targets.shape)
    h, y, *own = chosen.take((hidden, targets, lse, entropy, a, b, c))
    own = ((y - first_row(head, layout and layout.vocab)).astype(jnp.float32), *own)
    given = (((h, head),), own, chosen.number, static.tiles, layout, static.impl)
    dhidden, dhead = gradients(_RULES[False], *given)
    return chosen.put(dhidden), dhead
