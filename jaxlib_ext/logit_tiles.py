"""One pass over `[N, V]` logits that never stand in memory as a whole, and the gradients behind it.

An operation on logits is a `Rule`: what a tile of them adds to sums of every token, and the derivative of the loss by
a tile. Here are the loops around a rule, as XLA runs them and as kernels of a TPU: only one `[c_t, c_v]` tile of logits
of each stream lives at a time. A stream is hidden states and the head that makes logits of them,

    z = transform(hidden . head^T)        transform: scale, soft cap, temperature

and the first one gets gradients. Loops: the vocabulary is the outer one, so that the backward pass finishes one tile of
the head's gradient before it begins the next. Kernels: the sweep and the gradient of hidden states hold tokens and let
the head pass by, the gradient of the head holds rows of it and lets tokens pass by; so logits are computed three times,
not twice, and no sum ever leaves fast memory.

Tokens that a mask leaves out are not computed: the others are moved to the front, and tiles behind them are skipped.
Where tokens and vocabulary lie on axes of a mesh (`Layout`), each device does its own part.

Letters: N tokens, D width, V vocabulary, c_t and c_v sizes of tiles, nt and nv how many there are.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from ..sharding.rules import Rules, divisible
from .dispatch import Impl, Kernel, precision, run

MOST_ROWS = 1 << 24  # of a vocabulary: tokens are compared as float32
_BUDGET = 50 << 20  # bytes of fast memory that blocks of a kernel may take
_Sums = tuple[Float[Array, "c_t 1"], ...]
Stream = tuple[Float[Array, "N D"], Float[Array, "V D"]]


class Layout(NamedTuple):
    """On which axes of the mesh that is set the tokens lie, dimension by dimension, and on which the vocabulary."""

    tokens: PartitionSpec
    vocab: str | tuple[str, ...] | None = None


def layout_of(rules: Rules, hidden: Float[Array, "B T D"], table: Float[Array, "V D"]) -> Layout | None:
    """Where tokens and vocabulary lie by these rules; None where no mesh of several devices is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    tokens = divisible(rules.spec("batch", "seq"), hidden.shape[:2], mesh.shape, "targets")
    vocab = divisible(rules.spec("vocab"), table.shape[:1], mesh.shape, "output embedding")[0]
    return Layout(tokens, vocab)


class LogitTiles(NamedTuple):
    """What is static: tiles of XLA's loops, and the transform of the logits."""

    token_tile: int
    vocab_tile: int
    scale: float
    softcap: float | None
    temperature: float


class Rows(NamedTuple):
    """Which rows of the head a tile is about.

    `logit_of` takes a tile of logits and a row for every token, and gives its logit, 0 where the row is not inside.
    """

    number: Float[Array, "1 c_v"]
    inside: Bool[Array, "1 c_v"]  # those that there are, and that no earlier tile has had
    logit_of: Callable[[Float[Array, "c_t c_v"], Float[Array, "c_t 1"]], Float[Array, "c_t 1"]]


class Rule(NamedTuple):
    """An operation on logits. Its functions get a tile of each stream, `[c_t, c_v]`, columns of what belongs to every
    token, `[c_t, 1]`, and which rows of the head the tile is about."""

    begin: tuple[float, ...]  # what the sums of a token are before the first tile
    add: Callable[[_Sums, tuple[Array, ...], tuple[Array, ...], Rows], _Sums]
    derivative: Callable[[tuple[Array, ...], tuple[Array, ...], Rows], Array]  # linear in cotangents


# 1. What the operations call.
def sweep(
    rule: Rule,
    streams: tuple[Stream, ...],
    own: tuple[Float[Array, " N"], ...],
    number: Int[Array, ""] | None,
    o: LogitTiles,
    impl: Impl,
) -> tuple[Float[Array, " N"], ...]:
    """Sums of every token over the vocabulary.

    Args:
      rule: what is summed.
      streams: hidden states, chosen tokens first, and heads.
      own: what belongs to every token.
      number: of tokens that are chosen; None for all.
      o: tiles and transform.
      impl: as `dispatch.run` takes it.

    Returns:
      The sums; those of tokens behind the chosen ones mean nothing.
    """
    loops, kernel = functools.partial(_sweep_loops, rule), functools.partial(_sweep_once, rule, o)
    tpu, gpu = Kernel(_last(kernel), _why_not(streams)), _loops_of_gpu(loops, o)
    return run("sweep over logits", impl, functools.partial(loops, o), streams, own, number, tpu=tpu, gpu=gpu)


def gradients(
    rule: Rule,
    streams: tuple[Stream, ...],
    own: tuple[Float[Array, " N"], ...],
    number: Int[Array, ""] | None,
    o: LogitTiles,
    layout: Layout | None,
    impl: Impl,
) -> tuple[Float[Array, "N D"], Float[Array, "V D"]]:
    """Chain the derivative by logits to hidden states and head of the first stream, tile by tile.

    Args:
      rule: whose derivative.
      streams: as for the sweep.
      own: what belongs to every token, cotangents among them.
      number: as for the sweep.
      o: tiles and transform.
      layout: over which axes of the mesh to sum.
      impl: as `dispatch.run` takes it.
    """
    hidden, head = streams[0]
    loops, kernel = functools.partial(_gradient_loops, rule), functools.partial(_gradients_once, rule, o)
    tpu, gpu = Kernel(_last(kernel), _why_not(streams)), _loops_of_gpu(loops, o)
    where, plain = "gradients of logits", functools.partial(loops, o)
    dhidden, dhead = run(where, impl, plain, streams, own, number, tpu=tpu, gpu=gpu)
    if layout is not None and layout.vocab is not None:
        dhidden = jax.lax.psum(dhidden, layout.vocab)
    if layout is not None and (axes := _names(layout.tokens)):
        dhead = jax.lax.psum(dhead, axes)
    return dhidden.astype(hidden.dtype), dhead.astype(head.dtype)


def logits_tile(h: Float[Array, "c_t D"], w: Float[Array, "c_v D"], o: LogitTiles) -> Float[Array, "c_t c_v"]:
    """One tile of transformed logits, float32."""
    z = _dot(h, w, (1, 1)) * o.scale
    return (z if o.softcap is None else o.softcap * jnp.tanh(z / o.softcap)) / o.temperature


def slope_at(z: Float[Array, "c_t c_v"], o: LogitTiles) -> Float[Array, "c_t c_v"] | float:
    """The derivative of transformed logits by raw ones, where they are z."""
    if o.softcap is None:
        return o.scale / o.temperature
    bent = z * (o.temperature / o.softcap)
    return (1 - bent * bent) * (o.scale / o.temperature)


def rise(
    m: Float[Array, "c_t 1"], z: Float[Array, "c_t c_v"], inside: Bool[Array, "1 c_v"]
) -> tuple[Float[Array, "c_t 1"], Float[Array, "c_t 1"], Float[Array, "c_t c_v"]]:
    """The maximum with this tile in it, what sums so far are worth under it, and exp(z - maximum), 0 if not inside."""
    z = jnp.where(inside, z, -jnp.inf)
    top = jnp.maximum(m, jnp.max(z, axis=-1, keepdims=True))
    return top, jnp.exp(m - top), jnp.exp(z - top)


def total(x: Float[Array, "c_t c_v"]) -> Float[Array, "c_t 1"]:
    """Over the vocabulary of a tile."""
    return jnp.sum(x, axis=-1, keepdims=True)


def dense_logits(
    hidden: Float[Array, "N D"], head: Float[Array, "V D"], scale: float, softcap: float | None, temperature: float
) -> Float[Array, "N V"]:
    """All transformed logits at once, float32; for oracles."""
    return logits_tile(hidden, head, LogitTiles(0, 0, scale, softcap, temperature))


def check_tiles(tiles: LogitTiles, vocab: int, where: str) -> LogitTiles:
    """ValueError for tiles, a transform or a vocabulary that cannot be."""
    if tiles.token_tile < 1 or tiles.vocab_tile < 1:
        found = f"token_tile={tiles.token_tile}, vocab_tile={tiles.vocab_tile}"
        raise ValueError(f"{where}: {found}; expected at least 1.")
    if not tiles.temperature >= 1e-3 or (tiles.softcap is not None and tiles.softcap <= 0):
        # Logits over 1e-3 are some 1e4, of which float32 keeps a thousandth: what a probability is known to.
        found = f"temperature={tiles.temperature}, softcap={tiles.softcap}"
        raise ValueError(f"{where}: {found}; expected a temperature of 0.001 or more, and a softcap above 0.")
    if vocab > MOST_ROWS:
        raise ValueError(f"{where}: a vocabulary of {vocab}; expected at most {MOST_ROWS}.")
    return tiles


# 2. Which tokens, and on which device.
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
        """Back to where they stood: [N, ...] -> [*shape, ...], zeros for all others."""

        def one(x):
            if self.order is not None:
                x = jnp.zeros_like(x).at[self.order].set(x, mode="drop")
            return x.reshape(*self.shape, *x.shape[1:])

        return jax.tree.map(one, tree)


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
      ins: of each argument: `d` is [tokens, D], `t` is [tokens], `w` is [V, D].
      outs: likewise of what comes out; one letter if that is no tuple, or is one of such arrays alone.
    """
    if layout is None:
        return local
    specs = {
        "d": PartitionSpec(*layout.tokens, None),
        "t": layout.tokens,
        "w": PartitionSpec(layout.vocab, None),
    }
    out = specs[outs] if len(outs) == 1 else tuple(specs[letter] for letter in outs)
    return jax.shard_map(local, in_specs=tuple(specs[letter] for letter in ins), out_specs=out, check_vma=False)


def first_row(head: Float[Array, "V D"], vocab: Any) -> Any:
    """Which token of the whole vocabulary is the first of this device's part."""
    return 0 if vocab is None else jax.lax.axis_index(vocab) * head.shape[0]


# 3. Loops, for XLA.
def _sweep_loops(rule: Rule, o: LogitTiles, streams, own, number):
    N, V = streams[0][0].shape[0], streams[0][1].shape[0]
    o = _fit(o, N, V)
    cut = _cut(streams, own, o)
    nt, c_t = cut[0][0].shape[:2]

    def over_vocab(sums, j):
        rows, _, ws = _rows(streams, j, o)

        def over_tokens(i, sums):
            (hs, own), old = jax.tree.map(lambda x: x[i], (cut, sums))
            zs = tuple(logits_tile(h, w, o) for h, w in zip(hs, ws, strict=True))
            new = rule.add(old, zs, own, rows)
            return jax.tree.map(lambda all, one: all.at[i].set(one), sums, new)

        return jax.lax.fori_loop(0, _used(number, N, c_t), over_tokens, sums), None

    begin = tuple(jnp.full((nt, c_t, 1), x, jnp.float32) for x in rule.begin)
    sums, _ = jax.lax.scan(over_vocab, begin, jnp.arange(-(-V // o.vocab_tile)))
    return tuple(x.reshape(-1)[:N] for x in sums)


def _gradient_loops(rule: Rule, o: LogitTiles, streams, own, number):
    (N, D), V = streams[0][0].shape, streams[0][1].shape[0]
    o = _fit(o, N, V)
    cut, head = _cut(streams, own, o), streams[0][1]

    def over_vocab(carry, j):
        dhidden, dhead = carry
        rows, start, ws = _rows(streams, j, o)

        def over_tokens(i, carry):
            dw, dhidden = carry
            hs, own = jax.tree.map(lambda x: x[i], cut)
            zs = tuple(logits_tile(h, w, o) for h, w in zip(hs, ws, strict=True))
            dz = _dz(rule, o, zs, own, rows, hs[0].dtype)
            return dw + _dot(hs[0], dz, (0, 0)), dhidden.at[i].add(_dot(dz, ws[0], (1, 0)))

        begin = jnp.zeros((D, o.vocab_tile), jnp.float32), dhidden  # its transpose would be slower on a CPU
        dw, dhidden = jax.lax.fori_loop(0, _used(number, N, o.token_tile), over_tokens, begin)
        old = jax.lax.dynamic_slice_in_dim(dhead, start, o.vocab_tile)
        dw = jnp.where(rows.inside.T, dw.T.astype(head.dtype), old)
        return (dhidden, jax.lax.dynamic_update_slice_in_dim(dhead, dw, start, 0)), None

    begin = (jnp.zeros(cut[0][0].shape, jnp.float32), jnp.zeros_like(head))
    (dhidden, dhead), _ = jax.lax.scan(over_vocab, begin, jnp.arange(-(-V // o.vocab_tile)))
    return dhidden.reshape(-1, D)[:N], dhead


def _fit(o: LogitTiles, tokens: int, vocab: int) -> LogitTiles:
    """Tiles no larger than what they cut."""
    return o._replace(token_tile=max(1, min(o.token_tile, tokens)), vocab_tile=min(o.vocab_tile, vocab))


def _cut(streams, own, o: LogitTiles):
    """[N, ...] -> [nt, c_t, ...], padded with zeros, of hidden states and of what belongs to tokens."""

    def one(x):
        x = jnp.pad(x, [(0, -x.shape[0] % o.token_tile)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, o.token_tile, *x.shape[1:])

    return tuple(one(h) for h, _ in streams), tuple(one(x[:, None]) for x in own)


def _rows(streams, j, o: LogitTiles):
    """Which rows tile j of the heads is about, where it starts, and the rows: the last is moved back to fit."""
    first = j * o.vocab_tile
    start = jnp.minimum(first, streams[0][1].shape[0] - o.vocab_tile)
    number = (start + jnp.arange(o.vocab_tile))[None]
    ws = tuple(jax.lax.dynamic_slice_in_dim(head, start, o.vocab_tile) for _, head in streams)
    even = streams[0][1].shape[0] % o.vocab_tile == 0  # then the compiler need not ask, nor write down what it selects
    inside = jnp.ones_like(number, bool) if even else number >= first

    def logit_of(z, row):  # fetched: XLA would write down a tile to sum over
        at = row.astype(jnp.int32) - start
        here = (at >= first - start) & (at < o.vocab_tile)
        return jnp.where(here, jnp.take_along_axis(z, jnp.where(here, at, 0), axis=1), 0.0)

    return Rows(number.astype(jnp.float32), inside, logit_of), start, ws


# 4. Kernels.
#   used [1] | own [c_t, k] | of each stream h [c_t, D] and w [c_v, D] | what comes out
def _sweep_kernel(used_ref, own_ref, *refs, rule: Rule, o: LogitTiles, V: int, n: int):
    sums = refs[2 * n :]

    @pl.when(pl.program_id(1) == 0)
    def _():
        for sum_ref, x in zip(sums, rule.begin, strict=True):
            sum_ref[...] = jnp.full_like(sum_ref, x)

    @pl.when(pl.program_id(0) < used_ref[0])
    def _():
        zs, own, rows = _tile(own_ref, refs[: 2 * n], o, V, pl.program_id(1))
        new = rule.add(tuple(ref[...] for ref in sums), zs, own, rows)
        for sum_ref, x in zip(sums, new, strict=True):
            sum_ref[...] = x


def _dhidden_kernel(used_ref, own_ref, *refs, rule: Rule, o: LogitTiles, V: int, n: int):
    h_ref, w_ref, dh_ref = refs[0], refs[1], refs[2 * n]
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        dh_ref[...] = jnp.zeros_like(dh_ref)

    @pl.when(pl.program_id(0) < used_ref[0])
    def _():
        zs, own, rows = _tile(own_ref, refs[: 2 * n], o, V, j)
        dz = _dz(rule, o, zs, own, rows, h_ref.dtype)
        row = j * w_ref.shape[0] + jax.lax.broadcasted_iota(jnp.int32, (w_ref.shape[0], 1), 0)
        w = jnp.where(row < V, w_ref[...], jnp.zeros_like(w_ref))  # behind the end may be anything, and 0 NaN is NaN
        dh_ref[...] += _dot(dz, w, (1, 0))


def _dhead_kernel(used_ref, own_ref, *refs, rule: Rule, o: LogitTiles, V: int, n: int):
    h_ref, dw_ref, sum_ref = refs[0], refs[2 * n], refs[2 * n + 1]
    i = pl.program_id(1)

    @pl.when(i == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(i < used_ref[0])
    def _():
        zs, own, rows = _tile(own_ref, refs[: 2 * n], o, V, pl.program_id(0))
        dz = _dz(rule, o, zs, own, rows, h_ref.dtype)
        sum_ref[...] += _dot(dz, h_ref[...], (0, 0))

    @pl.when(i == pl.num_programs(1) - 1)
    def _():
        dw_ref[...] = sum_ref[...].astype(dw_ref.dtype)


def _tile(own_ref, refs, o: LogitTiles, V: int, j):
    """Logits of every stream, columns of what belongs to tokens, and which rows of the head they are about."""
    zs = tuple(logits_tile(h[...], w[...], o) for h, w in zip(refs[::2], refs[1::2], strict=True))
    own = tuple(own_ref[:, i : i + 1] for i in range(own_ref.shape[1]))
    number = j * refs[1].shape[0] + jax.lax.broadcasted_iota(jnp.int32, (1, refs[1].shape[0]), 1)
    number, inside = number.astype(jnp.float32), number < V
    return zs, own, Rows(number, inside, lambda z, row: total(jnp.where((number == row) & inside, z, 0.0)))


# 5. Launch
def _sweep_launch(rule: Rule, o: LogitTiles, interpret: Any, streams, own, number):
    N, width = streams[0][0].shape[0], sum(h.shape[1] * h.dtype.itemsize for h, _ in streams)
    c_t = min(_held(2 * width, width), -(-N // 16) * 16)
    padded = -(-N // c_t) * c_t
    outs = [pl.BlockSpec((c_t, 1), lambda i, j, used: (i, 0))] * len(rule.begin)
    shapes = [jax.ShapeDtypeStruct((padded, 1), jnp.float32)] * len(rule.begin)
    call = functools.partial(_call, _sweep_kernel, rule, o, interpret, streams, own, number)
    return tuple(x[:N, 0] for x in call(c_t, 256, False, outs, shapes, []))


def _gradient_launch(rule: Rule, o: LogitTiles, interpret: Any, streams, own, number):
    (N, D), (V, _) = streams[0][0].shape, streams[0][1].shape
    width, dtype = sum(h.shape[1] * h.dtype.itemsize for h, _ in streams), streams[0][1].dtype
    c_t = min(_held(2 * width + 8 * D, width), -(-N // 16) * 16)
    shape = jax.ShapeDtypeStruct((-(-N // c_t) * c_t, D), jnp.float32)
    out = pl.BlockSpec((c_t, D), lambda i, j, used: (i, 0))
    [dh] = _call(_dhidden_kernel, rule, o, interpret, streams, own, number, c_t, 256, False, [out], [shape], [])
    c_v = min(_held(2 * width + (4 + 2 * dtype.itemsize) * D, width), V)
    out, shape = pl.BlockSpec((c_v, D), lambda j, i, used: (j, 0)), jax.ShapeDtypeStruct((V, D), dtype)
    kept = [pltpu.VMEM((c_v, D), jnp.float32)]
    [dw] = _call(_dhead_kernel, rule, o, interpret, streams, own, number, 256, c_v, True, [out], [shape], kept)
    return dh[:N], dw


def _call(kernel, rule, o, interpret, streams, own, number, c_t, c_v, by_vocab: bool, outs, shapes, scratch):
    """Run a kernel over tiles, tokens outside and vocabulary inside or the other way round."""
    (N, _), (V, _) = (x.shape for x in streams[0])
    c_t, c_v = min(c_t, -(-N // 16) * 16), min(c_v, V)
    nt, nv = pl.cdiv(N, c_t), pl.cdiv(V, c_v)
    pad = lambda x: jnp.pad(x, [(0, nt * c_t - N)] + [(0, 0)] * (x.ndim - 1))
    own = pad(jnp.stack(own, axis=1))
    used = jnp.asarray(_used(number, N, c_t), jnp.int32).reshape(1)
    last = lambda used: jnp.maximum(used[0] - 1, 0)
    if by_vocab:  # behind the tokens in use, what is there stays
        grid, at = (nv, nt), lambda j, i, used: (jnp.minimum(i, last(used)), j)
    else:
        grid, at = (nt, nv), lambda i, j, used: (jnp.minimum(i, last(used)), jnp.where(i < used[0], j, nv - 1))
    tokens = lambda width: pl.BlockSpec((c_t, width), lambda a, b, used: (at(a, b, used)[0], 0))
    vocab = lambda width: pl.BlockSpec((c_v, width), lambda a, b, used: (at(a, b, used)[1], 0))
    specs = [spec for h, _ in streams for spec in (tokens(h.shape[1]), vocab(h.shape[1]))]
    return pl.pallas_call(
        functools.partial(kernel, rule=rule, o=o, V=V, n=len(streams)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=[tokens(own.shape[1]), *specs], out_specs=outs,
            scratch_shapes=scratch,
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=64 << 20
        ),
        interpret=interpret,
        name=kernel.__name__.strip("_").removesuffix("_kernel"),
    )(used, own, *(x for h, w in streams for x in (pad(h), w)))  # fmt: skip


def _held(row: int, width: int) -> int:
    """How many rows of `row` bytes a kernel holds, while others of `width` bytes pass by 256 at a time."""
    fits = lambda n: n * row + 512 * width + 24 * 256 * n <= _BUDGET
    return next((n for n in (1024, 512, 256) if fits(n)), 128)


def _why_not(streams) -> str:
    width = sum(h.shape[1] * h.dtype.itemsize for h, _ in streams)
    most = (_BUDGET - 24 * 256 * 128) // (512 + 128 * 6)
    return f"{width} bytes of hidden states a token; it is made for up to {most}." if width > most else ""


_sweep_once = jax.jit(_sweep_launch, static_argnums=(0, 1, 2))  # traced once, also where it is not lowered
_gradients_once = jax.jit(_gradient_launch, static_argnums=(0, 1, 2))


# ----------------------------------------------------------------------------------------------------------- private
def _last(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`dispatch.run` hands in how to interpret behind the arrays."""
    return lambda *given: kernel(given[-1], *given[:-1])


def _loops_of_gpu(loops: Callable[..., Any], o: LogitTiles) -> Kernel:
    """XLA's loops with larger tiles: a GPU keeps none in fast memory, and wants long products instead."""
    o = o._replace(token_tile=max(o.token_tile, 2048), vocab_tile=max(o.vocab_tile, 16384))
    return Kernel(lambda *given: loops(o, *given[:-1]))


def _used(number: Any, N: int, c_t: int) -> Any:
    """How many tiles of tokens there is something in."""
    return -(-(N if number is None else number) // c_t)


def _dz(rule: Rule, o: LogitTiles, zs, own, rows: Rows, dtype):
    """The derivative by raw logits of the first stream, 0 where there is no such row."""
    return jnp.where(rows.inside, rule.derivative(zs, own, rows) * slope_at(zs[0], o), 0.0).astype(dtype)


def _dot(x, y, over: tuple[int, int]):
    """Summed over one axis of each, in float32."""
    how = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(x, y, how, precision=precision(x), preferred_element_type=jnp.float32)


def _names(spec: PartitionSpec) -> tuple[str, ...]:
    parts = [(part,) if isinstance(part, str) else tuple(part or ()) for part in spec]
    return tuple(name for part in parts for name in part)
