"""Log-probability, log-sum-exp and entropy of chosen tokens, without ever holding their `[N, V]` logits.

    z = transform(hidden . head^T)     lse = log sum_v exp z_v     logp = z_target - lse     entropy = lse - E_p[z]

Tokens are cut into tiles of c_t and the vocabulary into tiles of c_v; only one `[c_t, c_v]` tile of logits lives at a
time. The vocabulary is the outer loop, so that the backward pass finishes one tile of the head's gradient before it
begins the next. Backward, tiles are computed again from the saved log-sum-exp: with cotangents a, b, c of the three
results and p = exp(z - lse),

    dz = a (onehot - p) + b p - c p (log p + entropy)

Who asks also gets log sum_v p_v^2, how much the distribution is in few tokens, without gradient. Statistics and sums
are float32 whatever the inputs are. The method is that of cut cross-entropy (2411.09009) without its filter on small
probabilities: preference losses live in the tail. Letters: N tokens, D width, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class TokenStats(NamedTuple):
    """Natural logarithms, float32; the first three carry gradients to hidden states and head."""

    logp: Float[Array, " N"]
    lse: Float[Array, " N"]
    entropy: Float[Array, " N"]
    log_sum_sq: Float[Array, " N"] | None = None  # log sum_v p_v^2, without gradient; None if nobody asked


class LogitTiles(NamedTuple):
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
    want_sum_sq: bool = False,
) -> TokenStats:
    """What the operation means, with dense logits; every other form is compared with it."""
    z = dense_logits(hidden, head, scale, softcap, temperature)
    lse = jax.nn.logsumexp(z, axis=-1)
    chosen = jnp.take_along_axis(z, targets[:, None], axis=-1)[:, 0]
    mean = jnp.sum(jnp.exp(z - lse[:, None]) * z, axis=-1)
    log_sum_sq = jax.lax.stop_gradient(jax.nn.logsumexp(2 * z, axis=-1) - 2 * lse) if want_sum_sq else None
    return TokenStats(chosen - lse, lse, lse - mean, log_sum_sq)


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
    want_sum_sq: bool = False,
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
      want_sum_sq: also sum the squared probabilities, which costs one more sum over every tile.

    Returns:
      Three numbers for each token; four with `want_sum_sq`.
    """
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1] or targets.shape != hidden.shape[:1]:
        found = f"hidden {hidden.shape}, head {head.shape}, targets {targets.shape}"
        raise ValueError(f"token_stats: {found}; expected [N, D], [V, D], [N].")
    tiles = fit_tiles(hidden, head, LogitTiles(token_tile, vocab_tile, scale, softcap, temperature), "token_stats")
    return _op(hidden, head, targets, tiles, want_sum_sq)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _op(hidden, head, targets, tiles: LogitTiles, want_sum_sq: bool) -> TokenStats:
    return _forward(hidden, head, targets, tiles, want_sum_sq)[0]


def _forward(hidden, head, targets, o: LogitTiles, want_sum_sq: bool):
    N, V = hidden.shape[0], head.shape[0]
    tiles = (cut_tokens(hidden, o), cut_tokens(targets, o))

    def over_vocab(stats, j):
        start, fresh, w = vocab_rows(head, j, o)

        def over_tokens(_, xs):
            (h, y), (m, s, g, e, ss) = xs
            z, _ = logits_tile(h, w, o)
            m, shrink, p = rise(m, z, fresh)
            hit = (y[:, None] == start + jnp.arange(o.vocab_tile)[None]) & fresh[None]
            s = s * shrink + jnp.sum(p, axis=-1)
            g = g + jnp.sum(jnp.where(hit, z, 0.0), axis=-1)
            e = e * shrink + jnp.sum(p * z, axis=-1)
            ss = None if ss is None else ss * shrink * shrink + jnp.sum(p * p, axis=-1)
            return None, (m, s, g, e, ss)

        return jax.lax.scan(over_tokens, None, (tiles, stats))[1], None

    empty = jnp.zeros(tiles[1].shape, jnp.float32)
    begin = (empty - jnp.inf, empty, empty, empty, empty if want_sum_sq else None)
    (m, s, g, e, ss), _ = jax.lax.scan(over_vocab, begin, jnp.arange(-(-V // o.vocab_tile)))
    lse = m + jnp.log(s)
    log_sum_sq = None if ss is None else jnp.log(ss) - 2 * jnp.log(s)
    stats = jax.tree.map(lambda a: a.reshape(-1)[:N], TokenStats(g - lse, lse, lse - e / s, log_sum_sq))
    return stats, (hidden, head, targets, stats.lse, stats.entropy)


def _backward(o: LogitTiles, want_sum_sq: bool, saved: Any, cotangents: TokenStats):
    del want_sum_sq  # its cotangent is not looked at
    hidden, head, targets, lse, entropy = saved

    def dz_from(start):
        def dz(z, own):
            y, lse, entropy, a, b, c = own
            logp = z - lse[:, None]
            p = jnp.exp(logp)
            hit = y[:, None] == start + jnp.arange(o.vocab_tile)[None]
            dz = a[:, None] * (hit.astype(jnp.float32) - p) + b[:, None] * p
            return dz - c[:, None] * p * (logp + entropy[:, None])

        return dz

    per_token = (targets, lse, entropy, cotangents.logp, cotangents.lse, cotangents.entropy)
    return *gradients(hidden, head, per_token, dz_from, o), None


_op.defvjp(_forward, _backward)


# ------------------------------------------------------------------------------- pieces that other operations use too
def fit_tiles(hidden: Float[Array, "N D"], head: Float[Array, "V D"], tiles: LogitTiles, where: str) -> LogitTiles:
    """Tiles no larger than what they cut; ValueError for tiles or a transform that cannot be."""
    if tiles.token_tile < 1 or tiles.vocab_tile < 1:
        found = f"token_tile={tiles.token_tile}, vocab_tile={tiles.vocab_tile}"
        raise ValueError(f"{where}: {found}; expected at least 1.")
    if tiles.temperature <= 0 or (tiles.softcap is not None and tiles.softcap <= 0):
        found = f"temperature={tiles.temperature}, softcap={tiles.softcap}"
        raise ValueError(f"{where}: {found}; expected numbers above 0.")
    N, V = hidden.shape[0], head.shape[0]
    return tiles._replace(token_tile=max(1, min(tiles.token_tile, N)), vocab_tile=min(tiles.vocab_tile, V))


def dense_logits(
    hidden: Float[Array, "N D"], head: Float[Array, "V D"], scale: float, softcap: float | None, temperature: float
) -> Float[Array, "N V"]:
    """All transformed logits at once, float32; for oracles."""
    return logits_tile(hidden, head, LogitTiles(0, 0, scale, softcap, temperature))[0]


def logits_tile(
    h: Float[Array, "c_t D"], w: Float[Array, "c_v D"], o: LogitTiles
) -> tuple[Float[Array, "c_t c_v"], Float[Array, "c_t c_v"] | float]:
    """One tile of transformed logits, float32, and its derivative by the raw ones."""
    z = jnp.einsum("nd,vd->nv", h, w, preferred_element_type=jnp.float32) * o.scale
    if o.softcap is None:
        return z / o.temperature, o.scale / o.temperature
    bent = jnp.tanh(z / o.softcap)
    return o.softcap * bent / o.temperature, (1 - bent * bent) * (o.scale / o.temperature)


def rise(
    m: Float[Array, " c_t"], z: Float[Array, "c_t c_v"], fresh: Bool[Array, " c_v"]
) -> tuple[Float[Array, " c_t"], Float[Array, " c_t"], Float[Array, "c_t c_v"]]:
    """The maximum with this tile in it, what sums so far are worth under it, and exp(z - maximum), 0 if not fresh."""
    z = jnp.where(fresh[None], z, -jnp.inf)
    top = jnp.maximum(m, jnp.max(z, axis=-1))
    return top, jnp.exp(m - top), jnp.exp(z - top[:, None])


def gradients(
    hidden: Float[Array, "N D"],
    head: Float[Array, "V D"],
    per_token: Any,
    dz_from: Callable[[Any], Callable[[Any, Any], Any]],
    o: LogitTiles,
) -> tuple[Float[Array, "N D"], Float[Array, "V D"]]:
    """Chain the derivative by transformed logits to hidden states and head, tile by tile.

    Args:
      hidden: as forward.
      head: as forward.
      per_token: tree of arrays `[N, ...]`, cotangents among them: they are 0 for the tokens that fill up a tile.
      dz_from: gets the first row of a vocabulary tile; what it returns makes of a tile of logits and the tile's part
        of `per_token` the derivative of the loss by those logits. It must be linear in the cotangents.
      o: tiles and transform.
    """
    (N, D), V = hidden.shape, head.shape[0]
    tiles = jax.tree.map(lambda x: cut_tokens(x, o), (hidden, per_token))

    def over_vocab(carry, j):
        dhidden, dhead = carry
        start, fresh, w = vocab_rows(head, j, o)
        dz_of = dz_from(start)

        def over_tokens(dw, xs):
            (h, own), dh = xs
            z, slope = logits_tile(h, w, o)
            dz = jnp.where(fresh[None], dz_of(z, own) * slope, 0.0).astype(h.dtype)
            dw = dw + jnp.einsum("nv,nd->vd", dz, h, preferred_element_type=jnp.float32)
            return dw, dh + jnp.einsum("nv,vd->nd", dz, w, preferred_element_type=jnp.float32)

        dw, dhidden = jax.lax.scan(over_tokens, jnp.zeros((o.vocab_tile, D), jnp.float32), (tiles, dhidden))
        old = jax.lax.dynamic_slice_in_dim(dhead, start, o.vocab_tile)
        dw = jnp.where(fresh[:, None], dw.astype(head.dtype), old)
        return (dhidden, jax.lax.dynamic_update_slice_in_dim(dhead, dw, start, 0)), None

    begin = (jnp.zeros(tiles[0].shape, jnp.float32), jnp.zeros_like(head))
    (dhidden, dhead), _ = jax.lax.scan(over_vocab, begin, jnp.arange(-(-V // o.vocab_tile)))
    return dhidden.reshape(-1, D)[:N].astype(hidden.dtype), dhead


def vocab_rows(
    head: Float[Array, "V D"], j: Int[Array, ""], o: LogitTiles
) -> tuple[Int[Array, ""], Bool[Array, " c_v"], Float[Array, "c_v D"]]:
    """Where tile j starts (the last is moved back to fit), which of its rows no earlier tile has had, and the rows."""
    first = j * o.vocab_tile
    start = jnp.minimum(first, head.shape[0] - o.vocab_tile)
    fresh = start + jnp.arange(o.vocab_tile) >= first
    return start, fresh, jax.lax.dynamic_slice_in_dim(head, start, o.vocab_tile)


def cut_tokens(x: Array, o: LogitTiles) -> Array:
    """[N, ...] -> [tiles, size, ...], padded with zeros."""
    x = jnp.pad(x, [(0, -x.shape[0] % o.token_tile)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, o.token_tile, *x.shape[1:])
