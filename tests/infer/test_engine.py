"""The engine against itself in other arrangements: any batch, any slot count, streamed or whole, is the same answer."""

import asyncio
import dataclasses
import functools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaroo.infer import devices
from jaxaroo.infer import engine as engine_module
from jaxaroo.infer.engine import Engine
from jaxaroo.infer.requests import RequestError
from jaxaroo.infer.sampling import Sampling
from jaxaroo.models.decoder import DecoderConfig, Model, init_params, logits, unstack_layers
from jaxaroo.models.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
CFG = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size,
    embed_dim=16,
    ffn_dim=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=128,
    eos_ids=TOKENIZER.eos_ids,
)
ASCII = Sampling(max_tokens=24, seed=7)
PROMPTS = ["one", "the second prompt", "3", "a fourth", "V", "number six"]


@functools.cache
def model(seed=0):
    params = init_params(CFG, jax.random.key(seed))
    printable = jnp.zeros(CFG.vocab_size, bool).at[32:127].set(True)  # mostly text, at times a stray byte
    return Model(CFG, params | {"head": params["head"] * jnp.where(printable, 3.0, 1.5)[:, None]})


def make(**options):
    return Engine(model(), TOKENIZER, **{"max_seqs": 4} | options)


def answers(results):
    assert [r.error for r in results] == [None] * len(results)
    return [r.outputs[0].token_ids for r in results]


def test_a_batch_equals_single_runs_whatever_the_number_of_slots():
    settings = [Sampling(max_tokens=5 + 6 * i, seed=i, temperature=0.5 * (i % 3)) for i in range(len(PROMPTS))]
    alone = [make().generate(p, s)[0].outputs[0].token_ids for p, s in zip(PROMPTS, settings, strict=True)]
    for slots in (1, 2, 4, 8):  # fewer slots than prompts: freed slots are filled again
        results = make(max_seqs=slots).generate(PROMPTS, settings)
        assert answers(results) == alone
        assert [r.prompt_token_ids for r in results] == [TOKENIZER.encode(p) for p in PROMPTS]
    assert [len(a) for a in alone] == [s.max_tokens for s in settings]


@pytest.mark.proof
def test_a_batch_equals_single_runs_with_a_cache_of_codes():
    settings = [Sampling(max_tokens=5 + 6 * i, seed=i, temperature=0.5 * (i % 3)) for i in range(len(PROMPTS))]
    engine = make(max_seqs=1, kv_dtype="int4")
    alone = [engine.generate(p, s)[0].outputs[0].token_ids for p, s in zip(PROMPTS, settings, strict=True)]
    assert answers(make(kv_dtype="int4").generate(PROMPTS, settings)) == alone  # two are refills
    assert answers(make().generate(PROMPTS, settings)) != alone  # and it is what was asked for


@pytest.mark.errors
def test_a_kind_of_cache_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="dtype='int5'; expected a type of floats, 'int8' or 'int4'"):
        make(kv_dtype="int5").generate("one")


@pytest.mark.proof
def test_prompts_of_any_length_fit_a_capacity_and_a_chunk(monkeypatch):
    """Around every border of the sizes: the answer equals that of one uncached forward."""
    monkeypatch.setattr(engine_module, "PREFILL_CHUNKS", (4, 16, 64))
    engine = Engine(Model(dataclasses.replace(CFG, max_positions=512), model().params), max_seqs=1)
    for n in (3, 4, 5, 16, 17, 63, 64, 65, 127, 128, 129, 189, 190, 191, 253, 300):
        ids = np.random.default_rng(n).integers(32, 127, n)
        [result] = engine.generate(ids, Sampling(max_tokens=3, temperature=0.0, ignore_eos=True))
        line = [*ids, *result.outputs[0].token_ids]
        z = logits(model(), np.pad([line], ((0, 0), (0, 303 - len(line)))))[0]
        assert line[n:] == np.argmax(z[n - 1 : n + 2], axis=-1).tolist()


@pytest.mark.slow
def test_a_full_refill_lets_go_of_the_old_cache_first(monkeypatch):
    """Two caches at a time would halve what fits on a device."""
    alive, prefill = [], engine_module.device.prefill

    def counting(*args, **options):
        alive.append(sum(a.shape == (3, 64, 1, 8) for a in jax.live_arrays()))
        return prefill(*args, **options)

    monkeypatch.setattr(engine_module.device, "prefill", counting)
    make(max_seqs=3).generate(["go"] * 6, Sampling(max_tokens=4, ignore_eos=True))
    assert alive == [0, 0]


def naive(text: str, stop):
    """Where the earliest stop string begins in the whole text."""
    found = [(text.find(s), s) for s in stop if s in text]
    return min(found, default=(len(text), None))


def test_streamed_deltas_make_the_whole_and_stop_strings_cut_at_the_earliest():
    engine = make()
    for seed in range(6):
        free = engine.generate("go", Sampling(max_tokens=40, seed=seed))[0].outputs[0]
        assert free.finish_reason == "length"
        stop = ["never found", free.text[17:19], free.text[9:12], free.text[9:11] + "\0"]
        s = Sampling(max_tokens=40, seed=seed, stop=stop)
        cut, reason = naive(free.text, stop)
        deltas = list(engine.generate("go", s, stream=True))
        result = deltas[-1].result
        [answer] = result.outputs
        assert (answer.text, answer.finish_reason, answer.stop_reason) == (free.text[:cut], "stop", reason)
        assert "".join(d.text for d in deltas) == answer.text
        assert [t for d in deltas for t in d.token_ids] == answer.token_ids
        assert answer.token_ids == free.token_ids[: len(answer.token_ids)]
        assert TOKENIZER.decode(answer.token_ids).startswith(answer.text)
        assert not TOKENIZER.decode(answer.token_ids[:-1]).startswith(answer.text)  # and no longer than that
        whole = engine.generate("go", s)[0].outputs[0]
        assert whole == answer
        kept = engine.generate("go", Sampling(max_tokens=40, seed=seed, stop=stop, include_stop=True))[0].outputs[0]
        assert kept.text == free.text[:cut] + reason


@pytest.mark.slow
def test_an_end_token_ends_and_is_kept_in_the_ids_alone():
    engine = make()
    free = engine.generate("go", Sampling(max_tokens=20, temperature=0.0))[0].outputs[0]
    end = free.token_ids[4]
    first = free.token_ids.index(end)
    s = Sampling(max_tokens=20, temperature=0.0, stop_token_ids=[end])
    answer = engine.generate("go", s)[0].outputs[0]
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == (free.token_ids[: first + 1], "stop", end)
    assert answer.text == TOKENIZER.decode(free.token_ids[:first])
    shown = engine.generate("go", Sampling(max_tokens=20, temperature=0.0, stop_token_ids=[end], include_stop=True))
    assert shown[0].outputs[0].text == TOKENIZER.decode(free.token_ids[: first + 1])
    eos = TOKENIZER.eos_ids[0]
    forced = Sampling(max_tokens=6, logit_bias={eos: 100.0})
    assert answers(engine.generate("go", forced)) == [[eos]]
    assert answers(engine.generate("go", Sampling(max_tokens=6, logit_bias={eos: 100.0}, ignore_eos=True))) == [
        [eos] * 6
    ]


def test_samples_of_one_prompt_differ_and_seeds_repeat_them():
    engine = make()
    three = engine.generate("go", Sampling(max_tokens=12, n=3, seed=5))[0]
    ids = [o.token_ids for o in three.outputs]
    assert [o.index for o in three.outputs] == [0, 1, 2]
    assert len({tuple(i) for i in ids}) == 3
    assert engine.generate("go", Sampling(max_tokens=12, seed=5))[0].outputs[0].token_ids == ids[0]
    assert three.usage == {"prompt_tokens": 3, "completion_tokens": 36, "total_tokens": 39}
    unseeded = [make(seed=s).generate(["go", "go"], Sampling(max_tokens=12)) for s in (1, 1, 2)]
    first, again, other = (answers(r) for r in unseeded)
    assert first == again
    assert len({tuple(a) for a in (*first, *other)}) == 4


@pytest.mark.slow
def test_logprobs_are_those_of_the_model():
    engine = make()
    result = engine.generate("go", Sampling(max_tokens=8, seed=1, logprobs=2, prompt_logprobs=1))[0]
    [answer] = result.outputs
    line = result.prompt_token_ids + answer.token_ids
    z = np.asarray(logits(model(), np.array([line])), np.float64)[0]
    want = z - np.log(np.exp(z).sum(-1, keepdims=True))
    got = [*result.prompt_logprobs, *answer.logprobs]
    assert got[0] is None
    for t in range(1, len(line)):
        assert got[t].token_id == line[t]
        assert got[t].logprob == pytest.approx(want[t - 1, line[t]], abs=1e-4)
        assert [i for i, _ in got[t].top] == np.argsort(-want[t - 1])[: len(got[t].top)].tolist()
    assert [len(g.top) for g in got[1:]] == [1] * (len(result.prompt_token_ids) - 1) + [2] * 8
    assert answer.cumulative_logprob == pytest.approx(sum(p.logprob for p in answer.logprobs))
    assert engine.score(["go"], top=1)[0].prompt_logprobs == result.prompt_logprobs
    plain = engine.generate("go", Sampling(max_tokens=8, seed=1))[0]
    assert (plain.outputs[0].logprobs, plain.prompt_logprobs) == (None, None)
    assert plain.outputs[0].cumulative_logprob == pytest.approx(answer.cumulative_logprob)


@pytest.mark.slow
def test_nothing_compiles_after_the_first_call_of_a_shape():
    """Counted by JAX itself: every trace and every compilation in the process reports its duration."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: compiled.append(name) if "compile" in name or "trace" in name else None
    )
    cfg = dataclasses.replace(CFG, ffn_dim=40)  # a model that no other test has compiled
    params, other = (init_params(cfg, jax.random.key(i)) for i in (0, 1))
    engine = Engine(Model(cfg, params), TOKENIZER, max_seqs=4)
    other = unstack_layers(other)
    compiled.clear()
    engine.generate(["w" * 12] * 5, [Sampling(max_tokens=m) for m in (2, 30, 30, 30, 2)])  # five in four: a refill
    engine.generate("w" * 12, Sampling(max_tokens=4))
    assert compiled
    compiled.clear()
    short = [p[:12] for p in PROMPTS]
    engine.generate(short, Sampling(temperature=0.3, top_k=5, top_p=0.5, max_tokens=9, seed=3))
    engine.generate(short[:4], Sampling(temperature=0.0, max_tokens=30, frequency_penalty=0.5, stop=["e"]))
    list(engine.generate("yes", Sampling(min_p=0.1, repetition_penalty=1.3, stop_token_ids=[5]), stream=True))
    engine.update_weights(other)
    engine.generate(short, [Sampling(max_tokens=m) for m in (1, 19, 2, 38, 3, 7)], timeout=60)
    assert compiled == []


def test_one_bad_prompt_never_spoils_its_neighbours():
    engine = make()
    good = answers(engine.generate(["one", "two"], ASCII))
    bad = ["", "x" * 500, [1, 10**6], [], 5, [{"role": "user"}], [-1]]
    results = engine.generate(["one", *bad, "two"], ASCII)
    assert answers([results[0], results[-1]]) == good
    messages = [
        "prompt: found nothing; expected at least one token",
        "prompt: found 501 tokens; expected at most 127, so that one more fits in 128",
        "prompt: found token id 1000000; expected 0 to 259",
        "prompt: found nothing",
        "prompt: found int; expected a string, token ids, or a list of chat messages",
        "prompt: ",
        "prompt: found token id -1",
    ]
    for result, message in zip(results[1:-1], messages, strict=True):
        assert str(result.error).startswith(message)
        assert (result.error.param, result.outputs) == ("prompt", [])
    with pytest.raises(RequestError, match="found nothing"):
        engine.generate(["one", ""], ASCII, raise_on_error=True)
    assert answers(engine.generate(["one", "two"], ASCII)) == good
    assert engine.stats()["failed_requests"] == len(bad)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        (
            "x" * 100,
            Sampling(max_tokens=28),
            "max_tokens: found 28 on top of a prompt of 101; expected at most 27, to stay",
        ),
        ("go", Sampling(stop_token_ids=[260]), "stop_token_ids: found token id 260; expected 0 to 259"),
        ("go", Sampling(logit_bias={999: 1.0}), "logit_bias: found token id 999"),
    ],
)
def test_a_request_that_cannot_fit_names_its_field(prompt, sampling, message):
    [result] = make().generate(prompt, sampling)
    assert str(result.error).startswith(message)


def test_a_default_length_is_cut_to_what_fits_and_an_exact_fit_runs():
    engine = make()
    assert len(answers(engine.generate("x" * 120, Sampling()))[0]) <= 7
    s = Sampling(max_tokens=7, ignore_eos=True)
    assert len(answers(engine.generate("x" * 120, s))[0]) == 7
    assert len(answers(engine.generate("x", Sampling(ignore_eos=True)))[0]) == 16


def test_token_ids_work_without_a_tokenizer_and_text_says_why_not():
    engine = Engine(model(), max_seqs=2)
    ids = TOKENIZER.encode("one")
    [one] = engine.generate(ids, ASCII)
    assert one.outputs[0].token_ids == make().generate("one", ASCII)[0].outputs[0].token_ids
    assert one.outputs[0].text is None
    assert engine.generate(np.array(ids), ASCII)[0].outputs == one.outputs
    text, stop = engine.generate(["one", ids], [ASCII, Sampling(stop=["x"])])
    assert "this engine has no tokenizer" in str(text.error)
    assert "strings need a tokenizer" in str(stop.error)
    assert engine.generate([]) == []


def test_a_chat_is_rendered_and_its_text_stays_text():
    engine, chat = make(), [{"role": "user", "content": "say <|eos|>"}]
    by_chat, by_ids = engine.generate([chat, TOKENIZER.encode_chat(chat)], ASCII)
    assert by_chat.outputs == by_ids.outputs
    assert TOKENIZER.eos_ids[0] not in by_chat.prompt_token_ids


@pytest.mark.slow
def test_an_abort_keeps_the_text_so_far_and_frees_the_slots():
    engine = make(max_seqs=2)
    s = Sampling(max_tokens=100, ignore_eos=True, seed=3)
    whole = engine.generate("one", s)[0].outputs[0]
    stream = engine.generate(["one", "two", "three"], s, stream=True)
    seen = [next(stream), next(stream)]
    engine.abort(seen[0].id)
    results = {d.result.id: d.result for d in stream if d.result is not None}
    cut, full, waited = (results[i] for i in sorted(results, key=int))
    assert cut.outputs[0].finish_reason == "abort"
    assert 0 < len(cut.outputs[0].token_ids) < 20
    assert whole.token_ids[: len(cut.outputs[0].token_ids)] == cut.outputs[0].token_ids
    assert [len(r.outputs[0].token_ids) for r in (full, waited)] == [100, 100]
    stream = engine.generate(["one", "two", "three"], s, stream=True)
    next(stream)
    engine.abort()
    results = [d.result for d in stream if d.result is not None]
    assert [r.outputs[0].finish_reason for r in results] == ["abort"] * 3
    assert results[-1].outputs[0].token_ids == []  # it never got a slot
    assert engine.generate("one", s)[0].outputs[0] == whole


def test_a_timeout_ends_with_abort():
    s = Sampling(max_tokens=100, ignore_eos=True, seed=3)
    results = make(max_seqs=1).generate(["one", "two"], s, timeout=1e-6)
    assert [r.outputs[0].finish_reason for r in results] == ["abort", "abort"]
    assert results[0].outputs[0].token_ids != []


@pytest.mark.slow
def test_a_row_of_nan_is_an_error_of_its_own():
    params = model().params
    engine = Engine(Model(CFG, params | {"embed": params["embed"].at[ord("#")].set(jnp.nan)}), TOKENIZER, max_seqs=4)
    good, bad, late = engine.generate(
        ["one", "#", "two"], [ASCII, ASCII, Sampling(max_tokens=9, logit_bias={35: 100.0})]
    )
    assert good.outputs[0].token_ids == make().generate("one", ASCII)[0].outputs[0].token_ids
    assert (bad.error.kind, bad.outputs[0].finish_reason, bad.outputs[0].token_ids) == ("numerical_error", "error", [])
    assert (late.error.kind, late.outputs[0].token_ids) == ("numerical_error", [35])
    assert engine.stats()["invalid_rows"] == 2
    good, bad = engine.score(["one", "a#b"])
    assert (good.error, bad.error.kind, bad.prompt_logprobs) == (None, "numerical_error", None)


def test_new_weights_serve_the_next_call_and_wrong_ones_are_refused():
    engine = make()
    before = answers(engine.generate("one", ASCII))
    engine.update_weights(model(1).params)
    after = answers(engine.generate("one", ASCII))
    assert before != after == answers(Engine(model(1), TOKENIZER).generate("one", ASCII))
    with pytest.raises(ValueError, match="update_weights: the tree, a shape or a dtype differs"):
        engine.update_weights(jax.tree.map(lambda w: w.astype(jnp.bfloat16), model().params))
    assert answers(engine.generate("one", ASCII)) == after


def test_a_closed_engine_says_so():
    with make() as engine:
        pass
    with pytest.raises(RuntimeError, match="found it closed"):
        engine.generate("one")


@pytest.mark.slow
def test_threads_and_nested_calls_share_an_engine():
    engine, got = make(), {}
    want = [answers(engine.generate(p, ASCII)) for p in PROMPTS]
    threads = [
        threading.Thread(target=lambda i=i: got.update({i: answers(engine.generate(PROMPTS[i], ASCII))}))
        for i in range(6)
    ]
    for t in threads:
        t.start()
    for delta in engine.generate(PROMPTS[0], ASCII, stream=True):
        if delta.result is None:
            assert answers(engine.generate(PROMPTS[1], ASCII)) == want[1]
    for t in threads:
        t.join()
    assert [got[i] for i in range(6)] == want


def test_async_streaming_and_leaving_early():
    engine = make()

    async def run(stop_after):
        text = []
        async for delta in engine.agenerate("one", ASCII):
            text.append(delta.text)
            if len(text) == stop_after:
                break
        return "".join(text)

    whole = engine.generate("one", ASCII)[0].outputs[0].text
    assert asyncio.run(run(None)) == whole
    assert whole.startswith(asyncio.run(run(2)))
    assert engine.generate("one", ASCII)[0].outputs[0].text == whole


def test_a_cancelled_task_ends_its_request_and_says_that_it_was_cancelled(monkeypatch):
    """While a chunk is in its thread, where most of a stream's time goes."""
    engine, busy, real = make(), threading.Event(), engine_module.device.decode
    want = answers(engine.generate("one", ASCII))
    monkeypatch.setattr(engine_module.device, "decode", lambda *a, **k: busy.set() or time.sleep(0.2) or real(*a, **k))

    async def read():
        async for _ in engine.agenerate("one", ASCII):
            pass

    async def cancel():
        task = asyncio.create_task(read())
        await asyncio.to_thread(busy.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return set(engine._active)

    assert asyncio.run(cancel()) == set()
    assert answers(engine.generate("one", ASCII)) == want


def test_prompts_are_scored_with_the_weights_that_answered():
    settings = dataclasses.replace(ASCII, prompt_logprobs=0)
    engine, want = make(), make().generate("one", settings)[0]
    stream = engine.generate("one", settings, stream=True)
    next(stream)
    engine.update_weights(model(1).params)  # for the next call; this one has begun
    *_, last = stream
    assert last.result.outputs == want.outputs
    assert last.result.prompt_logprobs == want.prompt_logprobs


@pytest.mark.errors
def test_a_cache_that_cannot_fit_is_refused_with_its_size(monkeypatch):
    monkeypatch.setattr(devices, "_free_bytes", lambda params: 8000)
    with pytest.raises(MemoryError, match=r"cache of 1 sequences of 64 tokens needs .* are free\. Lower max_seqs"):
        make().generate("one", ASCII)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_len": 1}, "max_len=1"), ({"max_seqs": 0}, "max_seqs=0"), ({"logprobs_mode": "x"}, "expected 'raw' or")],
)
def test_an_engine_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.errors
@pytest.mark.slow
def test_misuse_of_generate_is_refused():
    with pytest.raises(ValueError, match="2 sampling settings for 1 prompts"):
        make().generate("one", [ASCII, ASCII])
    with pytest.raises(ValueError, match="timeout=0; expected seconds > 0"):
        make().generate("one", ASCII, timeout=0)
