"""Prefill and the plain decode loop: one token per row and step. The oracle of every faster method.

Everything per row lies in buffers of S slots, indexed by absolute position: `tokens[b, p]` is the token at position p,
prompt or answer, and `cache.length[b]` counts those whose keys and values are committed. The last token of a running
row is always one ahead of the cache: a step feeds it, and samples its successor.

All settings are traced; what compiles is the shape (B rows, S slots) and three static choices (chunk of the prefill,
alternatives reported, which distribution is reported). State is donated from call to call.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..models.cache import KVCache
from ..models.decoder import DecoderConfig, Params, forward, lm_head, new_cache
from ..sharding.rules import SERVING
from .devices import pinned
from .sampling import Counts, SamplingArrays, TokenScores, choose, score_tokens, warp

RUNNING, STOPPED, FULL, INVALID = 0, 1, 2, 3  # why a row ended; INVALID: its logits were not finite
LogprobsMode = Literal["raw", "processed"]


class Rows(NamedTuple):
    """What each row was asked for; constant while it runs."""

    sampling: SamplingArrays
    prompt_length: Int[Array, " B"]
    limit: Int[Array, " B"]  # tokens at most, prompt included; 0 marks a row that pads the batch
    stop_ids: Int[Array, "B E"]  # tokens that end the row, -1 in unused places


class DecodeState(NamedTuple):
    """Where each row stands; donated to every call that advances it."""

    tokens: Int[Array, "B S"]
    filled: Int[Array, " B"]  # tokens of the row so far, prompt included
    status: Int[Array, " B"]
    scores: TokenScores  # [B, S] chosen, [B, S, n] alternatives; valid at answer positions
    counts: Counts
    cache: KVCache


@functools.partial(jax.jit, static_argnames=("cfg", "chunk", "top_n", "mode", "cache_dtype"))
def prefill(
    cfg: DecoderConfig,
    params: Params,
    tokens: Int[Array, "B S"],
    rows: Rows,
    *,
    chunk: int,
    top_n: int = 0,
    mode: LogprobsMode = "raw",
    cache_dtype: str | None = None,
) -> DecodeState:
    """Read the prompts, `chunk` positions at a time, and sample the first token of every row.

    Args:
      cfg: the decoder.
      params: its parameters, layers as a tuple.
      tokens: prompts, right-padded with anything.
      rows: what each row asks for.
      chunk: positions per forward pass; must divide S. Bounds the memory of the score matrix.
      top_n: alternatives to report per token.
      mode: which distribution is reported, the model's own or the one sampled from.
      cache_dtype: of keys and values, `int8` and `int4` included; None is that of the activations.
    """
    cache, hidden, _ = read_prompt(cfg, params, tokens, rows.prompt_length, chunk=chunk, cache_dtype=cache_dtype)
    state = begin(cfg, tokens, rows, cache, top_n)
    return pinned(emit(cfg, params, state, rows, hidden, mode))


def read_prompt(
    cfg: DecoderConfig,
    params: Params,
    tokens: Int[Array, "B S"],
    length: Int[Array, " B"],
    *,
    chunk: int,
    cache_dtype: str | None = None,
    collect: tuple[int, ...] = (),
) -> tuple[KVCache, Float[Array, "B 1 D"], tuple[Float[Array, "B S D"], ...]]:
    """Fill a cache with prompts, `chunk` positions at a time.

    Returns:
      The cache, the last hidden state of each prompt, and the hidden states that `collect` names at all positions.
    """
    B, S = tokens.shape
    if S % chunk:
        raise ValueError(f"prefill: chunk={chunk} and S={S}; expected a divisor of S.")
    last = jnp.maximum(length - 1, 0)

    def read(carry: tuple[jax.Array, KVCache, jax.Array, tuple[jax.Array, ...]]):
        i, cache, hidden, kept = carry
        start = i * chunk
        part = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        positions = jnp.broadcast_to(start + jnp.arange(chunk)[None], (B, chunk))
        committed = cache._replace(length=jnp.full(B, start, jnp.int32))
        out = forward(cfg, params, part, positions, cache=committed, collect=collect, rules=SERVING)
        here = jnp.clip(last - start, 0, chunk - 1)
        row_hidden = jnp.take_along_axis(out.hidden, here[:, None, None], axis=1)
        hidden = jnp.where((last // chunk == i)[:, None, None], row_hidden, hidden)
        put = lambda all_, new: jax.lax.dynamic_update_slice_in_dim(all_, new, start, axis=1)
        assert out.cache is not None
        return i + 1, out.cache, hidden, tuple(map(put, kept, out.collected))

    empty = new_cache(cfg, B, S, cache_dtype)
    hidden = jnp.zeros((B, 1, cfg.embed_dim), cfg.dtype)
    kept = tuple(jnp.zeros((B, S, cfg.embed_dim), cfg.dtype) for _ in collect)
    chunks = (jnp.max(length) + chunk - 1) // chunk
    _, cache, hidden, kept = jax.lax.while_loop(lambda c: c[0] < chunks, read, (jnp.int32(0), empty, hidden, kept))
    return cache._replace(length=length), hidden, kept


def begin(cfg: DecoderConfig, tokens: Int[Array, "B S"], rows: Rows, cache: KVCache, top_n: int) -> DecodeState:
    """The state of prompts that have been read, before their first token is sampled."""
    B, S = tokens.shape
    in_prompt = jnp.arange(S)[None] < rows.prompt_length[:, None]
    row = jnp.arange(B)[:, None]
    seen = (
        jnp.zeros((B, cfg.vocab_size), bool)
        .at[row, jnp.where(in_prompt, tokens, cfg.vocab_size)]
        .set(True, mode="drop")
    )
    n = min(top_n, cfg.vocab_size)
    return DecodeState(
        tokens=tokens,
        filled=rows.prompt_length,
        status=jnp.where(rows.limit > rows.prompt_length, RUNNING, FULL).astype(jnp.int32),  # never weakly typed
        scores=TokenScores(jnp.zeros((B, S)), jnp.zeros((B, S, n), jnp.int32), jnp.zeros((B, S, n))),
        counts=Counts(seen, jnp.zeros((B, cfg.vocab_size), jnp.int32)),
        cache=cache,
    )


@functools.partial(jax.jit, static_argnames=("cfg", "mode"), donate_argnames=("state",))
def decode(
    cfg: DecoderConfig,
    params: Params,
    state: DecodeState,
    rows: Rows,
    halt: Bool[Array, " B"],
    steps: Int[Array, ""],
    *,
    mode: LogprobsMode = "raw",
) -> DecodeState:
    """Advance every running row by up to `steps` tokens; ends early when no row runs.

    `halt` ends rows from outside (a stop string was seen, a client went away). A large `steps` is the whole generation
    in one call, a small one is a chunk of a stream: the same compiled function.
    """
    status = jnp.where(halt & (state.status == RUNNING), STOPPED, state.status)

    def running(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        return (carry[0] < steps) & jnp.any(carry[1].status == RUNNING)

    def step(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        i, state = carry
        state, hidden = read_last(cfg, params, state)
        return i + 1, emit(cfg, params, state, rows, hidden, mode)

    return pinned(jax.lax.while_loop(running, step, (jnp.int32(0), state._replace(status=status)))[1])


@functools.partial(jax.jit, donate_argnames=("state",))
def insert(
    state: DecodeState, rows: Rows, new_state: DecodeState, new_rows: Rows, slots: Int[Array, " b"]
) -> tuple[DecodeState, Rows]:
    """Put freshly prefilled rows into slots whose rows have ended; slots past B are dropped."""
    put = lambda old, new: old.at[slots].set(new, mode="drop")
    return pinned(jax.tree.map(put, state, new_state)), jax.tree.map(put, rows, new_rows)


@functools.partial(jax.jit, static_argnames=("cfg", "chunk", "top_n"))
def score_prompt(
    cfg: DecoderConfig, params: Params, tokens: Int[Array, "B T"], *, chunk: int, top_n: int = 0
) -> TokenScores:
    """Score every token given those before it, without holding `[B, T, V]` logits.

    Entry t belongs to token t + 1; the last entry of a row scores a padding token and means nothing.
    """
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    hidden = forward(cfg, params, tokens, positions, rules=SERVING).hidden
    target = jnp.concatenate([tokens[:, 1:], tokens[:, :1]], axis=1)

    def tile(args: tuple[jax.Array, jax.Array]) -> TokenScores:
        return score_tokens(lm_head(cfg, params, args[0], rules=SERVING), args[1], top_n)

    split = lambda a: jnp.moveaxis(a.reshape(B, T // chunk, chunk, *a.shape[2:]), 1, 0)
    tiles = jax.lax.map(tile, (split(hidden), split(target)))  # [T / chunk, B, chunk, ...]
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(B, T, *a.shape[3:]), tiles)


def finite_or_zero(z: Float[Array, "B V"]) -> tuple[Float[Array, "B V"], Bool[Array, " B"]]:
    """Logits, zeroed in the rows that hold NaN or infinity, and which rows hold none."""
    finite = jnp.isfinite(jnp.max(z, axis=-1))  # a NaN anywhere makes the maximum NaN
    return jnp.where(finite[:, None], z, 0.0), finite


def record(
    state: DecodeState,
    rows: Rows,
    token: Int[Array, " B"],
    z: Float[Array, "B V"],
    warped: Float[Array, "B V"],
    finite: Bool[Array, " B"],
    going: Bool[Array, " B"],
    mode: LogprobsMode,
) -> DecodeState:
    """Write the token at position `filled` of every row that is `going`, and see whether the row ends with it.

    Args:
      state: where the rows stand.
      rows: what they were asked for.
      token: what was chosen.
      z: the model's logits behind it.
      warped: the logits it was chosen by.
      finite: rows of finite logits; the others end as INVALID, without a token.
      going: rows that write now; the rest stay as they are.
      mode: which distribution is reported.
    """
    scores = score_tokens(warped if mode == "processed" else z, token, state.scores.top.shape[-1])
    going = going & (state.status == RUNNING)
    live = going & finite
    B, S = state.tokens.shape
    V = z.shape[-1]
    row, at = jnp.arange(B), jnp.where(live, state.filled, S)  # rows that do not run write nothing
    filled = state.filled + live.astype(jnp.int32)
    ended = jnp.any(token[:, None] == rows.stop_ids, axis=-1)
    status = jnp.where(ended, STOPPED, jnp.where(filled >= rows.limit, FULL, RUNNING))
    put = lambda old, new: old.at[row, at].set(new, mode="drop")
    return state._replace(
        tokens=put(state.tokens, token),
        filled=filled,
        status=jnp.where(going, jnp.where(finite, status, INVALID), state.status),
        scores=jax.tree.map(put, state.scores, scores),
        counts=state.counts._replace(
            in_answer=state.counts.in_answer.at[row, jnp.where(live, token, V)].add(1, mode="drop")
        ),
    )


def read_last(cfg: DecoderConfig, params: Params, state: DecodeState) -> tuple[DecodeState, Float[Array, "B 1 D"]]:
    """Read the token that was written last, and commit its row to the cache where the row runs."""
    position = state.cache.length[:, None]
    token = jnp.take_along_axis(state.tokens, position, axis=1, mode="clip")
    out = forward(cfg, params, token, position, cache=state.cache, rules=SERVING)
    assert out.cache is not None
    length = state.cache.length + (state.status == RUNNING).astype(jnp.int32)
    return state._replace(cache=out.cache._replace(length=length)), out.hidden


def emit(
    cfg: DecoderConfig,
    params: Params,
    state: DecodeState,
    rows: Rows,
    hidden: Float[Array, "B 1 D"],
    mode: LogprobsMode,
) -> DecodeState:
    """Sample the token at position `filled` of every running row from its last hidden state."""
    z, finite = finite_or_zero(lm_head(cfg, params, hidden, rules=SERVING)[:, 0])
    warped = warp(z, rows.sampling, state.counts)
    token = choose(warped, rows.sampling, state.filled)
    return record(state, rows, token, z, warped, finite, state.status == RUNNING, mode)
