"""Oracles: greedy text by transformers, and a loop of uncached forwards. Equivalences: any batch, any chunk."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxaroo.infer.decode import FULL, INVALID, RUNNING, STOPPED, Rows, decode, insert, prefill, score_prompt
from jaxaroo.infer.sampling import Sampling, gumbel, pack_sampling
from jaxaroo.models import hf
from jaxaroo.models.decoder import DecoderConfig, Model, forward, init_params, lm_head, logits, unstack_layers

GOLDENS = Path(__file__).parents[1] / "goldens"
S = 64


@functools.cache
def golden(name, root=GOLDENS):
    return hf.load(root / name, dtype="float32"), np.load(root / name / "io.npz")


def pack(prompts, samplings, seeds=None, stop_ids=(), vocab=96, capacity=S):
    """Tokens and rows of a batch; `limit` is the prompt plus max_tokens."""
    tokens = np.zeros((len(prompts), capacity), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    length = np.array([len(p) for p in prompts], np.int32)
    stops = np.full((len(prompts), 4), -1, np.int32)
    stops[:, : len(stop_ids)] = stop_ids
    seeds = seeds or [0] * len(prompts)
    arrays = pack_sampling([(s, seed, 0) for s, seed in zip(samplings, seeds, strict=True)], 0, vocab)
    return tokens, Rows(arrays, length, length + np.array([s.max_tokens or 1 for s in samplings], np.int32), stops)


def run(model, tokens, rows, chunks=(1000,), chunk=16, mode="raw", top_n=0):
    cfg, params = model
    state = prefill(cfg, params, tokens, rows, chunk=chunk, mode=mode, top_n=top_n)
    for steps in chunks:
        state = decode(cfg, params, state, rows, np.zeros(len(tokens), bool), np.int32(steps), mode=mode)
    return jax.device_get(state)


def lines(state):
    return [row[:n].tolist() for row, n in zip(state.tokens, state.filled, strict=True)]


def check_greedy(model, io):
    real = io["attention_mask"].sum(1)
    prompts = [io["input_ids"][row, : real[row]].tolist() for row in (0, 1)]
    want = [io["greedy_0"].tolist(), io["greedy_1"].tolist()]
    news = [len(w) - len(p) for w, p in zip(want, prompts, strict=True)]
    vocab = model.config.vocab_size
    tokens, rows = pack(prompts, [Sampling(temperature=0.0, max_tokens=n) for n in news], vocab=vocab, capacity=128)
    state = run(model, tokens, rows)
    assert lines(state) == want
    assert state.status.tolist() == [FULL, FULL]


@pytest.mark.parametrize("name", [p.name for p in sorted(GOLDENS.iterdir()) if (p / "io.npz").exists()])
@pytest.mark.slow
def test_greedy_equals_transformers_in_a_ragged_batch(name):
    check_greedy(*golden(name))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral_window"])
def test_greedy_equals_transformers_on_the_larger_goldens(name, shared):
    check_greedy(*golden(name, shared / "goldens"))


PROMPTS = [[5, 9, 33], [1], list(range(20, 45)), [90, 2, 17, 17, 4, 60, 31]]
SAMPLED = [
    Sampling(temperature=1.0, max_tokens=20),
    Sampling(temperature=0.0, max_tokens=5),
    Sampling(temperature=0.8, top_k=20, max_tokens=30),
    Sampling(temperature=1.3, top_p=0.9, repetition_penalty=1.2, presence_penalty=0.4, max_tokens=12),
]
SEEDS = [3, 0, 2**32 - 1, 77]


def uncached(model, prompt, s: Sampling, seed):
    """One token at a time, a whole uncached forward each; temperature and noise by hand."""
    line = list(prompt)
    for _ in range(s.max_tokens):
        z = logits(model, np.pad([line], ((0, 0), (0, S - len(line)))), np.arange(S)[None] < len(line))[
            0, len(line) - 1
        ]
        if s.temperature:
            z = z / s.temperature + gumbel(jnp.uint32(seed), jnp.int32(0), jnp.int32(len(line)), z.shape[-1])
        line.append(int(np.argmax(z)))
    return line


@pytest.mark.slow
def test_sampling_equals_uncached_sampling_with_the_same_noise():
    model, _ = golden("qwen2_mixed")
    want = [uncached(model, PROMPTS[i], SAMPLED[i], SEEDS[i]) for i in (0, 1)]
    tokens, rows = pack([PROMPTS[0], PROMPTS[1]], SAMPLED[:2], SEEDS[:2])
    assert lines(run(model, tokens, rows)) == want


@pytest.mark.slow
def test_neighbours_order_and_chunks_never_change_a_row():
    model, _ = golden("qwen2_mixed")
    tokens, rows = pack(PROMPTS, SAMPLED, SEEDS)
    together = run(model, tokens, rows)
    assert together.filled.tolist() == [len(p) + s.max_tokens for p, s in zip(PROMPTS, SAMPLED, strict=True)]
    assert lines(run(model, tokens, rows, chunks=[1, 3, 0, 2, 1000])) == lines(together)
    backwards = jax.tree.map(lambda a: a[::-1], (tokens, rows))
    assert lines(run(model, *backwards)) == lines(together)[::-1]
    for i in range(4):
        alone = run(model, *pack(PROMPTS[i : i + 1], SAMPLED[i : i + 1], SEEDS[i : i + 1]))
        assert lines(alone) == lines(together)[i : i + 1]
    assert lines(run(model, tokens, rows, chunk=64)) == lines(together)  # the prompts in one piece instead of two


@pytest.mark.parametrize("mode", ["raw", "processed"])
@pytest.mark.slow
def test_reported_logprobs_are_those_of_a_whole_forward(mode):
    model, _ = golden("qwen3")
    prompt, s = [5, 9, 33, 100], Sampling(temperature=0.7, top_k=30, max_tokens=16)
    tokens, rows = pack([prompt], [s], [9], vocab=128)
    state = run(model, tokens, rows, top_n=3, mode=mode)
    line = state.tokens[:1, :20]
    z = np.asarray(logits(model, line), np.float64)[0, 3:19]  # row t predicts position t + 4
    if mode == "processed":
        z = z / 0.7
        z[z < -np.sort(-z, axis=-1)[:, 29:30]] = -np.inf
    want = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
    np.testing.assert_allclose(state.scores.chosen[0, 4:20], want[np.arange(16), line[0, 4:]], atol=1e-4)
    np.testing.assert_array_equal(state.scores.top_ids[0, 4:20], np.argsort(-want, axis=-1)[:, :3])
    np.testing.assert_allclose(state.scores.top[0, 4:20], -np.sort(-want, axis=-1)[:, :3], atol=1e-4)


@pytest.mark.slow
def test_a_stop_token_ends_its_row_alone_and_is_kept():
    model, _ = golden("qwen2_mixed")
    tokens, rows = pack(PROMPTS, SAMPLED, SEEDS)
    free = lines(run(model, tokens, rows))
    stop = free[0][len(PROMPTS[0]) + 6]
    tokens, rows = pack(PROMPTS, SAMPLED, SEEDS, stop_ids=[stop])
    state = run(model, tokens, rows)
    for row, prompt in enumerate(PROMPTS):
        answer = free[row][len(prompt) :]
        cut = answer.index(stop) + 1 if stop in answer else len(answer)
        assert lines(state)[row] == prompt + answer[:cut]
        assert state.status[row] == (STOPPED if stop in answer else FULL)
    assert STOPPED in state.status
    assert FULL in state.status


@pytest.mark.slow
def test_a_halted_row_stays_as_it_was_and_the_others_go_on():
    model, _ = golden("qwen2_mixed")
    cfg, params = model
    tokens, rows = pack(PROMPTS, SAMPLED, SEEDS)
    want = lines(run(model, tokens, rows))
    state = prefill(cfg, params, tokens, rows, chunk=16)
    state = decode(cfg, params, state, rows, np.zeros(4, bool), np.int32(3))
    state = decode(cfg, params, state, rows, np.array([0, 0, 1, 0], bool), np.int32(1000))
    got = lines(jax.device_get(state))
    assert got[2] == want[2][: len(PROMPTS[2]) + 4]
    assert [got[i] for i in (0, 1, 3)] == [want[i] for i in (0, 1, 3)]


def test_a_row_with_nan_ends_and_leaves_the_others_alone():
    model, _ = golden("qwen2_mixed")
    cfg, params = model
    tokens, rows = pack(PROMPTS, SAMPLED, SEEDS)
    want = run(model, tokens, rows)
    state = prefill(cfg, params, tokens, rows, chunk=16)
    state = decode(cfg, params, state, rows, np.zeros(4, bool), np.int32(2))
    poisoned = jax.tree.map(lambda a: a.at[0, 1].set(jnp.nan), state.cache.layers)
    state = state._replace(cache=state.cache._replace(layers=poisoned))
    state = jax.device_get(decode(cfg, params, state, rows, np.zeros(4, bool), np.int32(1000)))
    assert state.status.tolist() == [INVALID, FULL, FULL, FULL]
    assert lines(state)[0] == lines(want)[0][: len(PROMPTS[0]) + 3]
    assert lines(state)[1:] == lines(want)[1:]
    assert np.isfinite(state.scores.chosen).all()


@pytest.mark.proof
def test_a_row_put_into_a_freed_slot_runs_as_if_alone():
    model, _ = golden("qwen2_mixed")
    cfg, params = model
    tokens, rows = pack(PROMPTS[:3], SAMPLED[:3], SEEDS[:3])
    want = lines(run(model, tokens, rows))
    late, late_rows = pack([PROMPTS[3], [0]], [SAMPLED[3], Sampling(max_tokens=1)], [SEEDS[3], 0])
    want_late = lines(run(model, late, late_rows))[0]
    state = prefill(cfg, params, tokens, rows, chunk=16)
    state = decode(cfg, params, state, rows, np.zeros(3, bool), np.int32(10))
    assert state.status.tolist() == [RUNNING, FULL, RUNNING]  # the second row is done
    new = prefill(cfg, params, late, late_rows, chunk=16)
    state, rows = insert(state, rows, new, late_rows, np.array([1, 3], np.int32))  # 3 is no slot: dropped
    state = decode(cfg, params, state, rows, np.zeros(3, bool), np.int32(1000))
    assert lines(jax.device_get(state)) == [want[0], want_late, want[2]]


@pytest.mark.slow
def test_a_full_buffer_is_not_overrun():
    model, _ = golden("qwen2_mixed")
    prompt, s = list(range(30)), Sampling(temperature=0.0, max_tokens=34)
    small = run(model, *pack([prompt], [s]))  # ends exactly at S
    large = run(model, *pack([prompt], [s], capacity=128))
    assert small.filled[0] == S
    assert lines(small) == lines(large)


def test_the_state_is_donated():
    model, _ = golden("qwen2_mixed")
    tokens, rows = pack(PROMPTS, SAMPLED, SEEDS)
    state = prefill(*model, tokens, rows, chunk=16)
    decode(*model, state, rows, np.zeros(4, bool), np.int32(1))
    assert state.cache.layers[0].k.is_deleted()
    assert state.tokens.is_deleted()


# ---------------------------------------------------------------------------------------------- caches of 8 and 4 bits
COPYIST = DecoderConfig(
    vocab_size=16, embed_dim=32, ffn_dim=48, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, max_positions=64
)
PERIOD = 4


@functools.cache
def copyist():
    """A decoder that has learned to go on with a pattern: it has to read the right rows, and roughly will do."""
    order = lambda key: jax.random.permutation(key, COPYIST.vocab_size)[:PERIOD]

    def loss(params, key):
        x = jnp.tile(jax.vmap(order)(jax.random.split(key, 32)), (1, 8))
        hidden = forward(COPYIST, params, x, jnp.broadcast_to(jnp.arange(32)[None], x.shape)).hidden
        logp = jax.nn.log_softmax(lm_head(COPYIST, params, hidden)[:, PERIOD - 1 : -1])
        return -jnp.mean(jnp.take_along_axis(logp, x[:, PERIOD:, None], axis=-1))

    @jax.jit
    def train(params):
        adam = optax.adam(1e-2)

        def step(carry, key):
            update, state = adam.update(jax.grad(loss)(carry[0], key), carry[1], carry[0])
            return (optax.apply_updates(carry[0], update), state), None

        return jax.lax.scan(step, (params, adam.init(params)), jax.random.split(jax.random.key(1), 400))[0][0]

    with jax.numpy_dtype_promotion("standard"):  # optax mixes types on purpose
        return Model(COPYIST, unstack_layers(train(init_params(COPYIST, jax.random.key(0)))))


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
@pytest.mark.proof
def test_a_trained_model_writes_the_same_at_8_and_4_bits(dtype):
    """Patterns of tokens that do not repeat, begun at different places; the right answer is known."""
    rng = np.random.default_rng(0)
    patterns = [rng.permutation(16)[:PERIOD].tolist() for _ in range(8)]
    prompts = [(p * 3)[: PERIOD + i] for i, p in enumerate(patterns)]
    tokens, rows = pack(prompts, [Sampling(temperature=0.0, max_tokens=18)] * 8, vocab=16)
    state = prefill(*copyist(), tokens, rows, chunk=16, cache_dtype=dtype)
    state = decode(*copyist(), state, rows, np.zeros(8, bool), np.int32(1000))
    kinds = {str(a.dtype) for a in jax.tree.leaves(state.cache.layers)}
    assert kinds == ({"float32"} if dtype == "float32" else {"uint8", "bfloat16"})
    assert lines(state) == [(p * 9)[: PERIOD + i + 18] for i, p in enumerate(patterns)]


@pytest.mark.proof
def test_a_step_takes_as_much_less_memory_as_the_cache():
    cfg = DecoderConfig(
        vocab_size=16, embed_dim=8, ffn_dim=8, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=128, max_positions=64
    )
    params = jax.eval_shape(lambda: unstack_layers(init_params(cfg, jax.random.key(0))))
    tokens, rows = pack([[1], [2]], [Sampling(temperature=0.0, max_tokens=9)] * 2, vocab=16)
    taken = {}
    for dtype in ("bfloat16", "int8", "int4"):
        begin = functools.partial(prefill, cfg, chunk=16, cache_dtype=dtype)
        state = jax.eval_shape(begin, params, tokens, rows)
        step = decode.lower(cfg, params, state, rows, np.zeros(2, bool), np.int32(1)).compile()
        taken[dtype] = step.memory_analysis().argument_size_in_bytes
    rows_kept = 2 * 2 * 2 * S * 2  # keys and values, layers, sequences, slots, heads
    assert taken["bfloat16"] - taken["int8"] == rows_kept * (2 * 128 - (128 + 4))
    assert taken["bfloat16"] - taken["int4"] == rows_kept * (2 * 128 - (64 + 4))


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.slow
def test_prompt_scores_are_the_log_softmax(chunk):
    model, io = golden("qwen3")
    ids = np.pad(io["input_ids"], ((0, 0), (0, S - io["input_ids"].shape[1])))
    z = io["logits"].astype(np.float64)
    want = z - np.log(np.exp(z).sum(-1, keepdims=True))
    got = score_prompt(*model, ids, chunk=chunk, top_n=4)
    n = io["attention_mask"].sum(1)
    for row in (0, 1):
        t = np.arange(n[row] - 1)
        np.testing.assert_allclose(got.chosen[row, t], want[row, t, ids[row, t + 1]], atol=1e-4)
        np.testing.assert_array_equal(got.top_ids[row, t], np.argsort(-want[row, t], axis=-1)[:, :4])
