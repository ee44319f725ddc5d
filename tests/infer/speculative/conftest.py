"""Tiny targets, a batch whose rows want different things, and a way to run it plainly and with a drafter."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.infer.decode import Rows, decode, prefill
from jaxaroo.infer.sampling import Sampling, pack_sampling
from jaxaroo.infer.speculative import loop
from jaxaroo.models.decoder import DecoderConfig, init_params, unstack_layers

CAPACITY = 96
LLAMA = DecoderConfig(
    vocab_size=32, embed_dim=32, ffn_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=128
)
TARGETS = {
    "llama": LLAMA,
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True, tie_embeddings=True, head_dim=16),
    "window": dataclasses.replace(LLAMA, qkv_bias=True, window=5, window_layers=(True, False)),
}
PROMPTS = [[5, 9, 1], [1], [2, 4, 6, 8, 10, 2, 4, 6, 2, 4], [7, 7, 30, 31]]
SAMPLINGS = [
    Sampling(temperature=0.0, max_tokens=40),
    Sampling(temperature=1.0, max_tokens=50, top_p=0.95),
    Sampling(temperature=0.7, max_tokens=20, repetition_penalty=1.2, presence_penalty=0.3, top_k=20),
    Sampling(temperature=0.0, max_tokens=1),
]
STOP = 3


class Ran(NamedTuple):
    """What a batch came to."""

    lines: list[list[int]]
    status: list[int]
    scores: Any
    tally: Any  # of a speculative run
    state: Any


@functools.cache
def weights(name: str):
    return unstack_layers(init_params(TARGETS[name], jax.random.key(0)))


def pack(prompts=PROMPTS, samplings=SAMPLINGS, seeds=None, capacity=CAPACITY):
    tokens = np.zeros((len(prompts), capacity), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    length = np.array([len(p) for p in prompts], np.int32)
    stops = np.full((len(prompts), 2), -1, np.int32)
    stops[:, 0] = STOP
    seeds = seeds or range(5, 5 + len(prompts))
    arrays = pack_sampling([(s, seed, 0) for s, seed in zip(samplings, seeds, strict=True)], 0, 32)
    return tokens, Rows(arrays, length, length + np.array([s.max_tokens for s in samplings], np.int32), stops)


def lines_of(state):
    return [np.asarray(row)[:n].tolist() for row, n in zip(state.tokens, np.asarray(state.filled), strict=True)]


def _batch(only: int | None):
    """All rows, or one of them alone, with the seed it always has."""
    some = slice(None) if only is None else slice(only, only + 1)
    return pack(PROMPTS[some], SAMPLINGS[some], range(5, 5 + len(PROMPTS))[some])


@functools.cache
def run_plain(name: str = "llama", only: int | None = None) -> Ran:
    tokens, asked = _batch(only)
    state = prefill(TARGETS[name], weights(name), tokens, asked, chunk=16)
    state = decode(TARGETS[name], weights(name), state, asked, np.zeros(len(tokens), bool), np.int32(1000))
    return Ran(lines_of(state), np.asarray(state.status).tolist(), jax.device_get(state.scores), None, state)


def run_drafted(drafter, verifier, params=(), judge=(), name="llama", only=None, steps=1000, packed=None) -> Ran:
    loop.check(drafter, verifier)
    tokens, asked = packed or _batch(only)
    given = loop.Weights(weights(name), params, judge)
    state = loop.prefill(TARGETS[name], given, drafter, tokens, asked, chunk=16)
    halt = np.zeros(len(tokens), bool)
    state = loop.decode(TARGETS[name], given, drafter, verifier, state, asked, halt, np.int32(steps))
    at = state.rows
    tally = jax.device_get(state.tally)
    return Ran(lines_of(at), np.asarray(at.status).tolist(), jax.device_get(at.scores), tally, state)


class Bench(NamedTuple):
    """What tests of drafters use."""

    targets: Any = TARGETS
    prompts: Any = PROMPTS
    samplings: Any = SAMPLINGS
    weights: Any = staticmethod(weights)
    pack: Any = staticmethod(pack)
    plain: Any = staticmethod(run_plain)
    drafted: Any = staticmethod(run_drafted)

    @staticmethod
    def check_identity(drafter, verifier, params=(), name="llama", only=None) -> Ran:
        """The output is that of plain decoding: tokens, how rows ended, log-probabilities; and the tally adds up."""
        want, got = run_plain(name, only), run_drafted(drafter, verifier, params, name=name, only=only)
        assert got.lines == want.lines
        assert got.status == want.status
        prompts = PROMPTS if only is None else PROMPTS[only : only + 1]
        for line, prompt, mine, theirs in zip(got.lines, prompts, got.scores.chosen, want.scores.chosen, strict=True):
            answer = slice(len(prompt), len(line))
            np.testing.assert_allclose(mine[answer], theirs[answer], atol=1e-5)
        sizes = np.arange(drafter.depth + 2)
        written = np.array([len(line) - len(p) for line, p in zip(got.lines, prompts, strict=True)])
        np.testing.assert_array_equal(got.tally.emitted @ sizes, written - 1)  # the first token belongs to no step
        assert not got.tally.emitted[:, 0].any()
        assert (got.tally.drafted <= got.tally.emitted.sum(1) * (drafter.nodes - 1)).all()
        return got


@pytest.fixture
def bench():
    return Bench()


@pytest.fixture
def shaken():
    """A target's weights, shaken: a drafter that often agrees with it."""

    def shake(name="llama", by=0.1):
        noise = lambda w: w + by * jnp.std(w) * jax.random.normal(jax.random.key(7), w.shape)
        return jax.tree.map(noise, weights(name))

    return shake
