"""Log-probability, log-sum-exp and entropy of chosen tokens, without ever holding their `[N, V]` logits.

    z = transform(hidden . head^T)     lse = log sum_v exp z_v     logp = z_target - lse     entropy = lse - E_p[z]

Tokens are cut into tiles of c_t and the vocabulary into tiles of c_v; only one `[c_t, c_v]` tile of logits lives at a
time. The vocabulary is the outer loop, so that the backward pass finishes one tile of the head's gradient before it
begins the next. Backward, tiles are computed again from the saved log-sum-exp, unless all of them are few enough bytes
to keep: with cotangents a, b, c of the three results and p = exp(z - lse),

    dz = a (onehot - p) + b p - c p (log p + entropy)

Tokens that a mask leaves out are not computed: the others are moved to the front, and tiles behind them are skipped.
Where tokens and vocabulary lie on axes of a mesh (`Layout`), each device does its own part; sums over the vocabulary
and the head's gradient are put together afterwards.

Who asks also gets log sum_v p_v^2, how much the distribution is in few tokens, without gradient. Statistics and sums
are float32 whatever the inputs are. The method is that of cut cross-entropy (2411.09009) without its filter on small
probabilities: preference losses live in the tail. Letters: N tokens, D width, V vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int


class TokenStats(NamedTuple):
    """Natural logarithms, float32; the first three carry gradients to hidden states and head."""

    logp: Float[Array, "*N"]
    lse: Float[Array, "*N"]
    entropy: Float[Array, "*N"]
    log_sum_sq: Float[Array, "*N"] | None = None  # log sum_v p_v^2, without gradient; None if nobody asked


class Layout(NamedTuple):
    """On which axes of the mesh that is set the tokens lie, dimension by dimension, and on which the vocabulary."""

    tokens: PartitionSpec
    vocab: str | tuple[str, ...] | None = None


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
    keep_bytes: int = 0,
    layout: Layout | None = None,
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
      token_tile: c_t; the last tile may be short.
      vocab_tile: c_v; likewise.
      want_sum_sq: also sum the squared probabilities, which costs one more sum over every tile.
      keep_bytes: how much memory of a device logits may take from here to the backward pass, which then has three
        products to do instead of four. If all N V of them, in float32, take more, none is kept.
      layout: where tokens and rows of the head lie on the mesh; sizes have to divide. Without it all is in one place.

    Returns:
      Three numbers for each token; four with `want_sum_sq`.
    """
    if hidden.shape[:-1] != targets.shape or head.ndim != 2 or hidden.shape[-1] != head.shape[1]:
        found = f"hidden {hidden.shape}, head {head.shape}, targets {targets.shape}"
        raise ValueError(f"token_stats: {found}; expected [..., D], [V, D], [...].")
    if mask is not None and mask.shape != targets.shape:
        raise ValueError(f"token_stats: mask {mask.shape}, targets {targets.shape}; expected the same.")
    tiles = check_tiles(LogitTiles(token_tile, vocab_tile, scale, softcap, temperature), "token_stats")
    return _op(hidden, head, targets, mask, _Static(tiles, want_sum_sq, keep_bytes, layout))


class _Static(NamedTuple):
    tiles: LogitTiles
    want_sum_sq: bool
    keep_bytes: int
    layout: Layout | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _op(hidden, head, targets, mask, static: _Static) -> TokenStats:
    local = functools.partial(_local_forward, o=static.tiles, static=static, keep=False)
    return on_shards(local, static.layout, "dwtt", "t-")(hidden, head, targets, mask)[0]


def _forward(hidden, head, targets, mask, static: _Static):
    local = functools.partial(_local_forward, o=static.tiles, static=static, keep=True)
    stats, kept = on_shards(local, static.layout, "dwtt", "tk")(hidden, head, targets, mask)
    return stats, (hidden, head, targets, mask, stats.lse, stats.entropy, kept)


def _backward(static: _Static, saved: Any, cotangents: TokenStats):
    local = functools.partial(_local_backward, o=static.tiles, layout=static.layout)
    own = (cotangents.logp, cotangents.lse, cotangents.entropy)  # that of log_sum_sq is not looked at
    return *on_shards(local, static.layout, "dwttttkttt", "dw")(*saved, *own), None, None


_op.defvjp(_forward, _backward)


def _local_forward(hidden, head, targets, mask, o: LogitTiles, static: _Static, keep: bool):
    """Of the tokens of one device; its part of the vocabulary is put together with those of the others.

    Returns:
      Their statistics, and the tiles of logits by vocabulary and tokens, `[tiles, tiles, c_t, c_v]`, or None.
    """
    vocab, want_sum_sq = static.layout and static.layout.vocab, static.want_sum_sq
    chosen = choose(mask, targets.shape)
    (h, y), o = chosen.take((hidden, targets)), fit_tiles(o, targets.size, head.shape[0])
    y = y - first_row(head, vocab)
    tiles = cut_tokens(h, o), cut_tokens(y, o)
    keep = keep and 4 * targets.size * head.shape[0] <= static.keep_bytes

    def over_vocab(carry, j):
        start, fresh, w = vocab_rows(head, j, o)

        def over_tokens(i, carry):
            stats, kept = carry
            (h, y), (m, s, g, e, ss) = jax.tree.map(lambda x: x[i], (tiles, stats))
            z, _ = logits_tile(h, w, o)
            kept = None if kept is None else kept.at[j, i].set(z)
            m, shrink, p = rise(m, z, fresh)
            hit = (y[:, None] == start + jnp.arange(o.vocab_tile)[None]) & fresh[None]
            s = s * shrink + jnp.sum(p, axis=-1)
            g = g + jnp.sum(jnp.where(hit, z, 0.0), axis=-1)
            e = e * shrink + jnp.sum(p * z, axis=-1)
            ss = None if ss is None else ss * shrink * shrink + jnp.sum(p * p, axis=-1)
            return jax.tree.map(lambda all, one: all.at[i].set(one), stats, (m, s, g, e, ss)), kept

        return jax.lax.fori_loop(0, chosen.tiles(o), over_tokens, carry), None

    empty, number = jnp.zeros(tiles[1].shape, jnp.float32), -(-head.shape[0] // o.vocab_tile)
    begin = (empty - jnp.inf, empty, empty, empty, empty if want_sum_sq else None)
    kept = jnp.zeros((number, *empty.shape, o.vocab_tile), jnp.float32) if keep else None
    ((m, s, g, e, ss), kept), _ = jax.lax.scan(over_vocab, (begin, kept), jnp.arange(number))
    if vocab is not None:
        top = jax.lax.pmax(m, vocab)
        shrink = jnp.exp(m - top)
        m, ss = top, None if ss is None else ss * shrink * shrink
        s, g, e, ss = jax.lax.psum((s * shrink, g, e * shrink, ss), vocab)
    lse = m + jnp.log(s)
    log_sum_sq = None if ss is None else jnp.log(ss) - 2 * jnp.log(s)
    return chosen.put(TokenStats(g - lse, lse, lse - e / s, log_sum_sq)), kept


def _local_backward(hidden, head, targets, mask, lse, entropy, kept, a, b, c, o: LogitTiles, layout: Layout | None):
    chosen = choose(mask, targets.shape)
    h, y, *own = chosen.take((hidden, targets, lse, entropy, a, b, c))
    o = fit_tiles(o, targets.size, head.shape[0])
    y = y - first_row(head, layout and layout.vocab)

    def dz_from(start):
        def dz(z, own):
            y, lse, entropy, a, b, c = own
            logp = z - lse[:, None]
            p = jnp.exp(logp)
            hit = y[:, None] == start + jnp.arange(o.vocab_tile)[None]
            dz = a[:, None] * (hit.astype(jnp.float32) - p) + b[:, None] * p
            return dz - c[:, None] * p * (logp + entropy[:, None])

        return dz

    dhidden, dhead = gradients(h, head, (y, *own), dz_from, o, chosen.tiles(o), layout, kept)
    return chosen.put(dhidden), dhead


# ------------------------------------------------------------------------------- pieces that other operations use too
class Chosen(NamedTuple):
    """Which tokens are computed: those of a mask at the front, in their own order, or all of them."""

    shape: tuple[int, ...]  # of the tokens
    order: Int[Array, " N"] | None = None  # where each stands, N behind the last of them; None for all
    number: Int[Array, ""] | None = None

    def take(self, tree: Any) -> Any:
        """[*shape, ...] -> [N, ...], zeros where no token is left."""
        flat, order = lambda x: x.reshape(-1, *x.shape[len(self.shape) :]), self.order
        if order is None:
            return jax.tree.map(flat, tree)
        return jax.tree.map(lambda x: jnp.take(flat(x), order, axis=0, mode="fill", fill_value=0), tree)

    def put(self, tree: Any) -> Any:
        """Back to where they stood: [tiles, c_t, ...] -> [*shape, ...], zeros for all others."""
        size = math.prod(self.shape)

        def one(x):
            flat = x.reshape(-1, *x.shape[2:])[:size]
            if self.order is not None:
                flat = jnp.zeros_like(flat).at[self.order].set(flat, mode="drop")
            return flat.reshape(*self.shape, *x.shape[2:])

        return jax.tree.map(one, tree)

    def tiles(self, o: LogitTiles) -> Any:
        """How many tiles there is something in."""
        number = math.prod(self.shape) if self.number is None else self.number
        return -(-number // o.token_tile)


def choose(mask: Bool[Array, "*N"] | None, shape: tuple[int, ...]) -> Chosen:
    """The tokens of a mask."""
    if mask is None:
        return Chosen(shape)
    order = jnp.nonzero(mask.reshape(-1), size=mask.size, fill_value=mask.size)[0]
    return Chosen(shape, order, jnp.sum(mask, dtype=jnp.int32))


def on_shards(local: Callable[..., Any], layout: Layout | None, ins: str, outs: str) -> Callable[..., Any]:
    """Run on each device's part, without any communication but what `local` does itself.

    Args:
      local: the function of one device.
      layout: where tokens and vocabulary lie; without it `local` itself is given back.
      ins: of each argument: `d` is [tokens, D], `t` is [tokens], `w` is [V, D], `k` is [vocabulary, tokens, ...] in
        tiles, `-` is nothing.
      outs: likewise of what comes out; one letter if that is no tuple, or is one of such arrays alone.
    """
    if layout is None:
        return local
    specs = {
        "d": PartitionSpec(*layout.tokens, None),
        "t": layout.tokens,
        "w": PartitionSpec(layout.vocab, None),
        "k": PartitionSpec(layout.vocab, _names(layout.tokens) or None),
        "-": PartitionSpec(),
    }
    out = specs[outs] if len(outs) == 1 else tuple(specs[letter] for letter in outs)
    return jax.shard_map(local, in_specs=tuple(specs[letter] for letter in ins), out_specs=out, check_vma=False)


def first_row(head: Float[Array, "V D"], vocab: Any) -> Any:
    """Which token of the whole vocabulary is the first of this device's part."""
    return 0 if vocab is None else jax.lax.axis_index(vocab) * head.shape[0]


def check_tiles(tiles: LogitTiles, where: str) -> LogitTiles:
    """ValueError for tiles or a transform that cannot be."""
    if tiles.token_tile < 1 or tiles.vocab_tile < 1:
        found = f"token_tile={tiles.token_tile}, vocab_tile={tiles.vocab_tile}"
        raise ValueError(f"{where}: {found}; expected at least 1.")
    if tiles.temperature <= 0 or (tiles.softcap is not None and tiles.softcap <= 0):
        found = f"temperature={tiles.temperature}, softcap={tiles.softcap}"
        raise ValueError(f"{where}: {found}; expected numbers above 0.")
    return tiles


def fit_tiles(tiles: LogitTiles, tokens: int, vocab: int) -> LogitTiles:
    """Tiles no larger than what they cut."""
    return tiles._replace(token_tile=max(1, min(tiles.token_tile, tokens)), vocab_tile=min(tiles.vocab_tile, vocab))


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
    z = (z if o.softcap is None else o.softcap * jnp.tanh(z / o.softcap)) / o.temperature
    return z, slope_at(z, o)


def slope_at(z: Float[Array, "c_t c_v"], o: LogitTiles) -> Float[Array, "c_t c_v"] | float:
    """The derivative of transformed logits by raw ones, where they are z."""
    if o.softcap is None:
        return o.scale / o.temperature
    bent = z * (o.temperature / o.softcap)
    return (1 - bent * bent) * (o.scale / o.temperature)


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
    number: Any,
    layout: Layout | None,
    kept: Float[Array, "vocab_tiles tiles c_t c_v"] | None = None,
) -> tuple[Float[Array, "tiles c_t D"], Float[Array, "V D"]]:
    """Chain the derivative by transformed logits to hidden states and head, tile by tile.

    Args:
      hidden: as forward, chosen tokens first.
      head: as forward.
      per_token: tree of arrays `[N, ...]`, cotangents among them: they are 0 for the tokens that fill up a tile.
      dz_from: gets the first row of a vocabulary tile; what it returns makes of a tile of logits and the tile's part
        of `per_token` the derivative of the loss by those logits. It must be linear in the cotangents.
      o: tiles and transform.
      number: of tiles that hold a token.
      layout: over which axes of the mesh to sum.
      kept: the tiles of transformed logits; computed again if not given.
    """
    D, V = hidden.shape[1], head.shape[0]
    tiles = jax.tree.map(lambda x: cut_tokens(x, o), (hidden, per_token))

    def over_vocab(carry, j):
        dhidden, dhead = carry
        start, fresh, w = vocab_rows(head, j, o)
        dz_of = dz_from(start)

        def over_tokens(i, carry):
            dw, dhidden = carry
            h, own = jax.tree.map(lambda x: x[i], tiles)
            z, slope = logits_tile(h, w, o) if kept is None else (kept[j, i], slope_at(kept[j, i], o))
            dz = jnp.where(fresh[None], dz_of(z, own) * slope, 0.0).astype(h.dtype)
            dw = dw + jnp.einsum("nv,nd->vd", dz, h, preferred_element_type=jnp.float32)
            return dw, dhidden.at[i].add(jnp.einsum("nv,vd->nd", dz, w, preferred_element_type=jnp.float32))

        dw, dhidden = jax.lax.fori_loop(0, number, over_tokens, (jnp.zeros((o.vocab_tile, D), jnp.float32), dhidden))
        old = jax.lax.dynamic_slice_in_dim(dhead, start, o.vocab_tile)
        dw = jnp.where(fresh[:, None], dw.astype(head.dtype), old)
        return (dhidden, jax.lax.dynamic_update_slice_in_dim(dhead, dw, start, 0)), None

    begin = (jnp.zeros(tiles[0].shape, jnp.float32), jnp.zeros_like(head))
    (dhidden, dhead), _ = jax.lax.scan(over_vocab, begin, jnp.arange(-(-V // o.vocab_tile)))
    if layout is not None and layout.vocab is not None:
        dhidden = jax.lax.psum(dhidden, layout.vocab)
    if layout is not None and (axes := _names(layout.tokens)):
        dhead = jax.lax.psum(dhead, axes)
    return dhidden.astype(hidden.dtype), dhead


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


# ----------------------------------------------------------------------------------------------------------- private
def _names(spec: PartitionSpec) -> tuple[str, ...]:
    parts = [(part,) if isinstance(part, str) else tuple(part or ()) for part in spec]
    return tuple(name for part in parts for name in part)
