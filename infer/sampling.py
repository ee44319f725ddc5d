"""From logits to a token: settings, the processors in their fixed order, and noise keyed by absolute position.

The order is bias, penalties, temperature, top-k, top-p, min-p, then `argmax(logits + Gumbel noise)`, which draws from
their softmax. The noise of a token depends on the request's seed, the sample's index and the token's absolute position
alone, never on batch slot, neighbours or chunking; so a faster method that judges the token at the same position under
the same logits draws the same token (speculative decoding's exact coupling).

Ties at a top-k or top-p cut are all kept, so the kept set does not depend on the order of the vocabulary.
Letters: B rows, V vocabulary, M biased tokens per row.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from ..jaxlib_ext.sampling import cut

MAX_LOGPROBS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one request is sampled and when it ends. Every field is checked here, before any device work."""

    max_tokens: int | None = None
    """New tokens at most. None means 16, or fewer when fewer fit; a number that does not fit is an error."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Keep the tokens at least this fraction as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of every token seen in prompt or answer (CTRL, 1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted once from tokens already in the answer."""
    frequency_penalty: float = 0.0
    """Subtracted from tokens in the answer, times their count."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Added to the logits of these token ids, -100 to 100."""
    n: int = 1
    """Independent samples of the same prompt."""
    seed: int | None = None
    """None draws one from the engine's own stream."""
    stop: Sequence[str] = ()
    """Strings that end the answer; looked for in the text, across token borders."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the answer, besides the model's own."""
    ignore_eos: bool = False
    """Go on past the model's end tokens (not past `stop_token_ids`)."""
    include_stop: bool = False
    """Leave the stop string or the stop token's text in the answer."""
    logprobs: int | None = None
    """Report log-probabilities: of the chosen token (0), and of this many likeliest ones."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, each given those before it."""

    def __post_init__(self):
        def check(name: str, ok: bool, expected: str):
            if not ok:
                raise ValueError(f"Sampling.{name}: found {getattr(self, name)!r}; expected {expected}.")

        number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and bool(np.isfinite(v))
        integer = lambda v: isinstance(v, int) and not isinstance(v, bool)
        check(
            "max_tokens", self.max_tokens is None or (integer(self.max_tokens) and self.max_tokens > 0), ">= 1 or None"
        )
        check("temperature", number(t := self.temperature) and (t == 0 or t >= 1e-6), "0, greedy, or at least 1e-6")
        check("top_k", integer(self.top_k) and self.top_k >= 0, "an integer >= 0 (0 keeps all)")
        check("top_p", number(self.top_p) and 0 < self.top_p <= 1, "0 < top_p <= 1")
        check("min_p", number(self.min_p) and 0 <= self.min_p <= 1, "0 <= min_p <= 1")
        check("repetition_penalty", number(r := self.repetition_penalty) and r >= 1e-6, "a number of at least 1e-6")
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, number(v := getattr(self, name)) and -2 <= v <= 2, "-2 to 2")
        bias = self.logit_bias
        fits = isinstance(bias, Mapping) and all(integer(k) and number(v) and -100 <= v <= 100 for k, v in bias.items())
        check("logit_bias", fits, "a map of token id to a number from -100 to 100")
        check("n", integer(self.n) and self.n >= 1, "an integer >= 1")
        check("seed", self.seed is None or (integer(self.seed) and 0 <= self.seed < 2**32), "0 <= seed < 2**32 or None")
        strings = not isinstance(self.stop, str) and all(isinstance(s, str) and s for s in self.stop)
        check("stop", strings, "a list of non-empty strings")
        ids = self.stop_token_ids
        check("stop_token_ids", not isinstance(ids, str) and all(integer(i) and i >= 0 for i in ids), "token ids >= 0")
        for name in ("logprobs", "prompt_logprobs"):
            v = getattr(self, name)
            check(name, v is None or (integer(v) and 0 <= v <= MAX_LOGPROBS), f"None or 0 to {MAX_LOGPROBS}")


class SamplingArrays(NamedTuple):
    """The settings of a batch, traced: changing them never compiles anything."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition: Float[Array, " B"]
    presence: Float[Array, " B"]
    frequency: Float[Array, " B"]
    bias_ids: Int[Array, "B M"]  # V or more in unused places, which drop
    bias: Float[Array, "B M"]
    seed: UInt32[Array, " B"]
    sample_index: Int[Array, " B"]


class Counts(NamedTuple):
    """What penalties look at."""

    in_prompt: Bool[Array, "B V"]
    in_answer: Int[Array, "B V"]


def pack_sampling(rows: Sequence[tuple[Sampling, int, int]], biased: int, vocab: int) -> SamplingArrays:
    """NumPy arrays for rows of (settings, seed, sample index); `biased` is M."""

    def get(name: str, dtype: Any) -> Any:
        return np.array([getattr(s, name) for s, _, _ in rows], dtype)

    ids: Any = np.full((len(rows), biased), vocab, np.int32)
    bias: Any = np.zeros((len(rows), biased), np.float32)
    seeds: Any = np.array([seed for _, seed, _ in rows], np.uint32)
    indices: Any = np.array([index for _, _, index in rows], np.int32)
    for row, (settings, _, _) in enumerate(rows):
        for place, (token, value) in enumerate(settings.logit_bias.items()):
            ids[row, place], bias[row, place] = token, value
    return SamplingArrays(
        temperature=get("temperature", np.float32),
        top_k=np.minimum(get("top_k", np.int64), vocab).astype(np.int32),
        top_p=get("top_p", np.float32),
        min_p=get("min_p", np.float32),
        repetition=get("repetition_penalty", np.float32),
        presence=get("presence_penalty", np.float32),
        frequency=get("frequency_penalty", np.float32),
        bias_ids=ids,
        bias=bias,
        seed=seeds,
        sample_index=indices,
    )


def warp(logits: Float[Array, "B V"], s: SamplingArrays, counts: Counts) -> Float[Array, "B V"]:
    """Apply every processor; removed tokens become -inf. Greedy rows keep bias and penalties only.

    The softmax of the result is the distribution that `choose` draws from. Branches that no row asks for are skipped
    at run time: a plain greedy batch costs nothing here.
    """
    if s.bias_ids.shape[1]:
        row = jnp.arange(logits.shape[0])[:, None]
        logits = logits.at[row, s.bias_ids].add(s.bias, mode="drop")
    any_penalty = jnp.any((s.repetition != 1) | (s.presence != 0) | (s.frequency != 0))
    logits = jax.lax.cond(any_penalty, _penalise, lambda z, s, c: z, logits, s, counts)
    return jax.lax.cond(jnp.any(s.temperature > 0), _truncate, lambda z, s: z, logits, s)


def choose(warped: Float[Array, "B V"], s: SamplingArrays, position: Int[Array, " B"]) -> Int[Array, " B"]:
    """The token at absolute `position` of every row: the mode of greedy rows, a draw for the others."""

    def draw(z: jax.Array) -> jax.Array:
        noise = jax.vmap(functools.partial(gumbel, vocab=z.shape[-1]))(s.seed, s.sample_index, position)
        return jnp.where(s.temperature[:, None] > 0, z + noise, z)

    return jnp.argmax(jax.lax.cond(jnp.any(s.temperature > 0), draw, lambda z: z, warped), axis=-1).astype(jnp.int32)


def gumbel(seed: UInt32[Array, ""], sample_index: Int[Array, ""], position: Int[Array, ""], vocab: int) -> jax.Array:
    """The noise of one absolute position of one sample of one request, [V] float32."""
    key = jax.random.fold_in(jax.random.key(seed), sample_index)
    return jax.random.gumbel(jax.random.fold_in(key, position), (vocab,), jnp.float32)


class TokenScores(NamedTuple):
    """Log-probabilities at one position: of the chosen token, and of the n likeliest."""

    chosen: Float[Array, "..."]
    top_ids: Int[Array, "... n"]
    top: Float[Array, "... n"]


def score_tokens(logits: Float[Array, "... V"], tokens: Int[Array, "..."], n: int) -> TokenScores:
    """Score `tokens` under the softmax of `logits`, with the n likeliest alternatives (n is static)."""
    lse = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - lse
    if n == 0:
        empty = (*tokens.shape, 0)
        return TokenScores(chosen, jnp.zeros(empty, jnp.int32), jnp.zeros(empty, jnp.float32))
    top, ids = jax.lax.top_k(logits, min(n, logits.shape[-1]))
    return TokenScores(chosen, ids.astype(jnp.int32), top - lse[..., None])


# ----------------------------------------------------------------------------------------------------------- private
def _penalise(logits, s: SamplingArrays, counts: Counts):
    seen = counts.in_prompt | (counts.in_answer > 0)
    r = s.repetition[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / r, logits * r), logits)
    count = counts.in_answer.astype(jnp.float32)
    return logits - s.presence[:, None] * jnp.minimum(count, 1) - s.frequency[:, None] * count


def _truncate(logits, s: SamplingArrays):
    """Temperature, then the cuts of top-k, top-p and min-p; rows with temperature 0 pass through."""
    sampled = s.temperature[:, None] > 0
    z = logits / jnp.where(sampled, s.temperature[:, None], 1.0)
    asked = jnp.any((s.temperature > 0) & ((s.top_k > 0) | (s.top_p < 1)))
    find = lambda z, s: cut(z, s.top_k, s.top_p)
    least = jax.lax.cond(asked, find, lambda z, s: jnp.full(z.shape[0], -jnp.inf), z, s)
    least = jnp.maximum(least, jnp.max(z, axis=-1) + jnp.log(s.min_p))  # log 0 = -inf removes nothing
    return jnp.where(sampled & (z < least[:, None]), -jnp.inf, z)
