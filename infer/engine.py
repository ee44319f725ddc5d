"""The public engine: prompts in, results or a stream of deltas out.

A call fills up to `max_seqs` slots with prompts, lets one compiled loop advance all of them by a chunk of tokens,
looks at the new tokens on the host (stop strings, timeouts, aborts), and hands slots that became free to waiting
prompts, one at a time unless all are free. Slots, capacity and the prefill's chunk come in few sizes, so after a shape
has been seen once nothing compiles again, whatever the settings. The host reads one small set of arrays per chunk.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple, overload

import jax
import numpy as np

from ..models.decoder import Model, Params, unstack_layers
from ..models.tokenizer import Tokenizer
from . import decode as device
from .devices import beside, check_memory, mesh_of, on_mesh
from .guided import value_guided
from .guided.value_guided import Guidance
from .requests import (
    Answer,
    AnswerStream,
    Delta,
    FinishReason,
    Prompt,
    Request,
    RequestError,
    Result,
    Timings,
    TokenLogprob,
    make_request,
    split_prompts,
)
from .sampling import MAX_LOGPROBS, Sampling, pack_sampling
from .speculative import controller, loop
from .speculative.loop import Drafter, Speculation
from .speculative.verify import coupled

log = logging.getLogger(__name__)

# Tokens per device call: how late a stop string, an abort or, while prompts wait, a free slot may be noticed.
CHUNK, BUSY_CHUNK, STREAM_CHUNK = 32, 8, 4
TOKENS_A_STEP = 4  # of speculative decoding, about: a call takes this many times fewer steps
PREFILL_CHUNKS = 16, 64, 256  # positions per forward pass, by the longest prompt
MIN_CAPACITY = 64
_INVALID = "numerical_error: the model's logits held NaN or infinity; "
_PACE = controller.ControllerConfig()
_COUNTERS = (
    *("requests", "failed_requests", "prompt_tokens", "generated_tokens", "invalid_rows", "device_calls"),
    *("steps", "drafted_tokens", "accepted_tokens"),  # of speculative decoding
)


class _Slot(NamedTuple):
    """Which sample occupies a row of the device's batch."""

    request: int  # index into the call
    stream: AnswerStream
    queued: float  # seconds it waited
    prefilled: float  # seconds its prefill took
    started: float


class Engine:
    """Generates text with one model.

    Use as a context manager, or call `close`. Calls from several threads take turns, a chunk of tokens each.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None = None,
        *,
        max_len: int | None = None,
        max_seqs: int = 8,
        kv_dtype: Literal["float32", "bfloat16", "float16", "int8", "int4"] | None = None,
        logprobs_mode: device.LogprobsMode = "raw",
        seed: int = 0,
        speculation: Speculation | None = None,
        speculate: Literal["auto", "on", "off"] = "auto",
        guidance: Guidance | None = None,
    ):
        """Take a model into service.

        Args:
          model: config and parameters, as `jaxaroo.load` gives them; stacked layers are unstacked. It is served on the
            mesh that they lie on (`devices.py`).
          tokenizer: needed for text, chat and stop strings; token ids work without.
          max_len: tokens per sequence, prompt and answer together; None is what the model and a guide can take.
          max_seqs: sequences decoded at the same time.
          kv_dtype: of keys and values, int8 and int4 with a scale a row; None is that of the activations.
          logprobs_mode: report the model's own distribution, or the one sampled from (policy-gradient training).
          seed: of the stream that seeds requests without a seed of their own.
          speculation: a drafter and the rule that judges it. Under the rule `coupled` answers are those of plain
            decoding, token for token.
          speculate: `auto` drafts while that is faster than plain decoding, and as far as pays best, by what calls have
            cost so far; under rules other than `coupled`, whose answers would then depend on the clock, it is `on`.
          guidance: a reward model that steers every token; not together with speculation.

        Raises:
          ValueError: for settings out of range, for a drafter and a rule that would bias the output together, and for a
            guide that does not fit.
        """
        if max_len is not None and max_len < 2:
            raise ValueError(f"Engine: max_len={max_len}; expected at least 2, a prompt token and an answer token.")
        if max_seqs < 1:
            raise ValueError(f"Engine: max_seqs={max_seqs}; expected at least 1.")
        if logprobs_mode not in ("raw", "processed"):
            raise ValueError(f"Engine: logprobs_mode={logprobs_mode!r}; expected 'raw' or 'processed'.")
        arms, positions = speculation.arms if speculation else (), model.config.max_positions
        for drafter in arms:
            loop.check(drafter, speculation.verifier)  # type: ignore[union-attr]
        if guidance is not None:
            if speculation is not None:
                raise ValueError("Engine: both speculation and guidance; expected one: a guide chooses every token.")
            value_guided.check(guidance.guide, model.config)
            positions = min(positions, guidance.guide.reward.target.max_positions)
        if speculate not in ("auto", "on", "off"):
            raise ValueError(f"Engine: speculate={speculate!r}; expected 'auto', 'on' or 'off'.")
        self.config, self.tokenizer = model.config, tokenizer
        self._params: Params | None = unstack_layers(model.params)
        self._mesh = mesh_of(self._params)
        self.speculation = None if speculate == "off" else beside(speculation, self._mesh)
        self.guidance = beside(guidance, self._mesh)
        self._weighs = speculate == "auto" and speculation is not None and speculation.verifier == coupled()
        self._pace = controller.init(_PACE, (0, *(drafter.depth for drafter in arms)))
        self._compiled: set[tuple[int, ...]] = set()  # arms and shapes that have run: the first call says nothing
        self._catch_up = 0.0  # seconds it took last
        self.max_len, self.max_seqs = max_len or positions, max_seqs
        self._kv_dtype, self._mode = kv_dtype, logprobs_mode
        self._eos = frozenset(model.config.eos_ids) | frozenset(tokenizer.eos_ids if tokenizer else ())
        self._seeds = np.random.default_rng(seed)
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._active, self._aborted = set[str](), set[str]()
        self._emitted = np.zeros(speculation.drafter.depth + 2 if speculation else 2, np.int64)
        self._counting = threading.Lock()
        self._stats = dict.fromkeys(_COUNTERS, 0) | {"prefill_seconds": 0.0, "decode_seconds": 0.0}

    # ---------------------------------------------------------------------------------------------------- generation
    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        stream: Literal[False] = False,
        timeout: float | None = None,
        raise_on_error: bool = False,
    ) -> list[Result]: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        stream: Literal[True],
        timeout: float | None = None,
        raise_on_error: bool = False,
    ) -> Iterator[Delta]: ...

    def generate(self, prompts, sampling=None, *, stream=False, timeout=None, raise_on_error=False):
        """Answer prompts.

        Args:
          prompts: a string, token ids or chat messages, or a list of these.
          sampling: one for all, or one for each prompt.
          stream: return an iterator of deltas instead of a list; each request's last delta carries its result.
          timeout: seconds after which unfinished answers end with `abort`, their text so far kept.
          raise_on_error: raise a request's error instead of reporting it in its result.

        Returns:
          One result for each prompt, in their order; or the iterator of deltas.
        """
        items = split_prompts(prompts)
        settings = [sampling or Sampling()] * len(items) if isinstance(sampling, Sampling | None) else list(sampling)
        if len(settings) != len(items):
            raise ValueError(
                f"generate: {len(settings)} sampling settings for {len(items)} prompts; expected one each."
            )
        if timeout is not None and timeout <= 0:
            raise ValueError(f"generate: timeout={timeout}; expected seconds > 0, or None.")
        requests = [self._admit(p, s, raise_on_error) for p, s in zip(items, settings, strict=True)]
        deltas = self._run(requests, STREAM_CHUNK if stream else CHUNK, timeout, raise_on_error)
        if stream:
            return deltas
        results = {d.result.id: d.result for d in deltas if d.result is not None}
        return [results[r.id] for r in requests]

    async def agenerate(
        self, prompts: Prompt | Sequence[Prompt], sampling: Sampling | Sequence[Sampling] | None = None, **options: Any
    ) -> AsyncIterator[Delta]:
        """The stream of `generate`, without blocking the event loop; leaving the iterator early aborts the rest."""
        deltas: Any = self.generate(prompts, sampling, stream=True, **options)
        turn = threading.Lock()  # a task that is cancelled leaves its thread in the middle of a chunk

        def alone(call: Callable[[], Any]) -> Any:
            with turn:
                return call()

        try:
            while (delta := await asyncio.to_thread(alone, lambda: next(deltas, None))) is not None:
                yield delta
        finally:
            await asyncio.shield(asyncio.to_thread(alone, deltas.close))

    def score(self, prompts: Prompt | Sequence[Prompt], *, top: int = 0) -> list[Result]:
        """Log-probability of every prompt token given those before it; nothing is generated."""
        results = []
        for prompt in split_prompts(prompts):
            request = self._admit(prompt, Sampling(max_tokens=None, prompt_logprobs=top), False, answer=False)
            if isinstance(request, Result):
                results.append(request)
                continue
            start = time.perf_counter()
            scores = self._score(request, self._live_params())
            if not all(math.isfinite(score.logprob) for score in scores if score):
                wrong = RequestError(_INVALID + "the prompt has no scores.", kind="numerical_error")
                results.append(self._failed(request.id, request.token_ids, wrong))
                continue
            spent = Timings(0.0, time.perf_counter() - start, 0.0)
            results.append(Result(request.id, request.token_ids, [], scores, spent, None))
        return results

    # ------------------------------------------------------------------------------------------------------- control
    def abort(self, request_id: str | None = None) -> None:
        """End one request, or all that run now, at the next chunk; their text so far is kept."""
        self._aborted |= self._active if request_id is None else {request_id} & self._active

    def update_weights(self, params: Params) -> None:
        """Serve other weights of the same shapes and dtypes from the next call on; nothing compiles again."""
        new = unstack_layers(params)
        describe = lambda t: jax.tree.map(lambda w: (w.shape, str(w.dtype)), t)
        if describe(self._live_params()) != describe(new):
            raise ValueError("update_weights: the tree, a shape or a dtype differs from the served model's.")
        with self._lock:
            at = jax.tree.map(lambda w: w.sharding, self._live_params())
            self._params = new if self._mesh is None else jax.device_put(new, at)

    def stats(self) -> dict[str, float]:
        """Counters since the engine was made; seconds are of device calls, compilation included."""
        return dict(self._stats)

    def emitted_per_step(self) -> list[int]:
        """Steps of speculative decoding, in finished answers, that emitted 0, 1, 2, ... tokens."""
        return self._emitted.tolist()

    def close(self) -> None:
        """Let go of the weights; later calls are errors."""
        self.abort()
        with self._lock:
            self._params = None

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        self.close()

    # --------------------------------------------------------------------------------------------------- admission
    def _admit(self, prompt: Any, sampling: Sampling, raise_on_error: bool, answer: bool = True) -> Request | Result:
        request_id = str(next(self._ids))
        seed = int(self._seeds.integers(2**32)) if sampling.seed is None else sampling.seed
        self._count(requests=1)
        try:
            return make_request(
                request_id,
                prompt,
                sampling,
                seed,
                tokenizer=self.tokenizer,
                vocab_size=self.config.vocab_size,
                max_len=self.max_len if answer else self.max_len + 1,
            )
        except RequestError as e:
            if raise_on_error:
                raise
            return self._failed(request_id, [], e)

    def _failed(self, request_id: str, ids: list[int], error: RequestError) -> Result:
        self._count(failed_requests=1)
        return Result(request_id, ids, [], None, Timings(0.0, 0.0, 0.0), error)

    def _count(self, **more: float) -> None:
        with self._counting:
            for name, value in more.items():
                self._stats[name] += value

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Alone with the devices."""
        with self._lock, on_mesh(self._mesh):
            yield

    def _live_params(self) -> Params:
        if self._params is None:
            raise RuntimeError("Engine: found it closed; expected an open one. Make a new Engine.")
        return self._params

    # ------------------------------------------------------------------------------------------------------ the loop
    def _run(
        self, requests: list[Request | Result], chunk: int, timeout: float | None, raise_on_error: bool
    ) -> Iterator[Delta]:
        for r in requests:
            if isinstance(r, Result):
                yield Delta(r.id, 0, "", [], "error", r)
        good = [r for r in requests if isinstance(r, Request)]
        if not good:
            return
        ids = {r.id for r in good}
        self._active |= ids
        try:
            for delta in _Call(self, good, chunk, time.perf_counter() + timeout if timeout else None).deltas():
                if raise_on_error and delta.result is not None and delta.result.error is not None:
                    raise delta.result.error
                yield delta
        finally:
            self._active -= ids
            self._aborted -= ids

    def _score(self, request: Request, params: Params) -> list[TokenLogprob | None]:
        ids, top = request.token_ids, request.sampling.prompt_logprobs
        assert top is not None
        T = _bucket(len(ids), 16)
        tokens = np.zeros((1, T), np.int32)
        tokens[0, : len(ids)] = ids
        sizes: Any = dict(chunk=min(T, PREFILL_CHUNKS[-1]), top_n=MAX_LOGPROBS if top else 0)
        with self._turn():
            host = jax.device_get(device.score_prompt(self.config, params, tokens, **sizes))
        return [None] + [_logprob(ids[t + 1], host, (0, t), top) for t in range(len(ids) - 1)]


class _Call:
    """One call of `generate`: the queue, the slots, and the arrays on the device."""

    def __init__(self, engine: Engine, requests: list[Request], chunk: int, deadline: float | None):
        self.engine, self.requests, self.chunk, self.deadline = engine, requests, chunk, deadline
        self.params = engine._live_params()
        self.began = time.perf_counter()
        self.waiting = deque((r, i) for r in range(len(requests)) for i in range(requests[r].sampling.n))
        total = max(len(r.token_ids) + r.max_tokens for r in requests)
        arms = engine.speculation.arms if engine.speculation else ()
        guide = engine.guidance.guide if engine.guidance else None
        self.drafts = max((d.nodes for d in arms), default=guide.nodes if guide else 0)  # slots behind the text
        self.capacity = _capacity(total + self.drafts)
        self.batch = min(_bucket(len(self.waiting)), engine.max_seqs)
        self.biased = _bucket(max(len(r.sampling.logit_bias) for r in requests), 0)
        self.stops = _bucket(max(len(engine._eos | set(r.sampling.stop_token_ids)) for r in requests), 8)
        self.top_n = MAX_LOGPROBS if any(r.sampling.logprobs for r in requests) else 0
        self.behind = False  # rows were decoded plainly since the drafter read them
        self.slots: list[_Slot | None] = [None] * self.batch
        self.answers: list[dict[int, tuple[Answer, Timings]]] = [{} for _ in requests]
        self.errors: dict[int, RequestError] = {}

    def deltas(self) -> Iterator[Delta]:
        """Run until every sample has ended."""
        engine = self.engine
        state, rows = self._admit(None, None, list(range(self.batch)))
        yield from self._harvest(state)
        while any(self.slots) or self.waiting:
            free = [i for i, s in enumerate(self.slots) if s is None]
            if self.waiting and free:
                if len(free) == self.batch:
                    state = rows = None  # let go of the old cache before there is a new one
                state, rows = self._admit(state, rows, free)
            else:
                halt = np.array([s is None for s in self.slots])
                steps = np.int32(min(self.chunk, BUSY_CHUNK) if self.waiting else self.chunk)
                with engine._turn():
                    start = time.perf_counter()
                    state = jax.block_until_ready(self._advance(state, rows, halt, steps))
                    engine._count(device_calls=1, decode_seconds=time.perf_counter() - start)
            yield from self._harvest(state)

    def _admit(self, state, rows, free: list[int]):
        """Prefill waiting samples: into all slots at once, which makes a new state, or into one that is free."""
        engine, start = self.engine, time.perf_counter()
        width = self.batch if state is None else 1
        taken = [self.waiting.popleft() for _ in range(min(width, len(self.waiting)))]
        requests = [self.requests[r] for r, _ in taken]
        pad = width - len(taken)
        longest = max(len(r.token_ids) for r in requests)
        tokens = np.zeros((width, self.capacity), np.int32)
        stop_ids = np.full((width, self.stops), -1, np.int32)
        for row, request in enumerate(requests):
            tokens[row, : len(request.token_ids)] = request.token_ids
            ids = sorted(self._stop_ids(request))
            stop_ids[row, : len(ids)] = ids
        samples = [(q.sampling, q.seed, i) for q, (_, i) in zip(requests, taken, strict=True)]
        greedy = Sampling(temperature=0.0)
        new_rows = device.Rows(
            sampling=pack_sampling(samples + [(greedy, 0, 0)] * pad, self.biased, engine.config.vocab_size),
            prompt_length=_int32([len(q.token_ids) for q in requests] + [1] * pad),
            limit=_int32([len(q.token_ids) + q.max_tokens for q in requests] + [0] * pad),
            stop_ids=_int32(stop_ids),
        )
        chunk = self._prefill_chunk(longest)
        if state is None:
            planned = lambda: self._prefill(tokens, new_rows, chunk)
            check_memory(self.params, self.batch, self.capacity, planned)
        with engine._turn():
            new_state = self._prefill(tokens, new_rows, chunk)
            if state is None:
                state, rows, self.behind = new_state, new_rows, False
            else:
                state, rows = device.insert(state, rows, new_state, new_rows, _int32(free[:1]))
            jax.block_until_ready(state)
        spent = time.perf_counter() - start
        engine._count(prefill_seconds=spent, prompt_tokens=sum(len(q.token_ids) for q in requests))
        for slot, (r, i) in zip(free, taken, strict=False):
            stream = AnswerStream(self.requests[r], i, engine.tokenizer, self._stop_ids(self.requests[r]))
            self.slots[slot] = _Slot(r, stream, start - self.began, spent, time.perf_counter())
        return state, rows

    def _prefill(self, tokens: np.ndarray, rows: device.Rows, chunk: int):
        engine, spec = self.engine, self.engine.speculation
        options: Any = dict(chunk=chunk, top_n=self.top_n, mode=engine._mode, cache_dtype=engine._kv_dtype)
        if engine.guidance is not None:
            return value_guided.prefill(engine.config, self.params, *engine.guidance, tokens, rows, **options)
        if spec is None:
            return device.prefill(engine.config, self.params, tokens, rows, **options)
        return loop.prefill(engine.config, self._weights(spec), spec.drafter, tokens, rows, **options)

    def _advance(self, state, rows: device.Rows, halt: np.ndarray, tokens: np.int32):
        """Let every running row gain about this many tokens, by drafting or plainly."""
        engine, spec = self.engine, self.engine.speculation
        if engine.guidance is not None:
            args = *engine.guidance, state, rows, halt, tokens
            return value_guided.decode(engine.config, self.params, *args, mode=engine._mode)
        if spec is None:
            return device.decode(engine.config, self.params, state, rows, halt, tokens, mode=engine._mode)
        if not engine._weighs:
            return self._draft(spec, spec.drafter, state, rows, halt, tokens)
        running = self.batch - int(halt.sum())
        price = engine._catch_up if self.behind else 0.0
        arm = controller.choose(_PACE, engine._pace, running, (0.0, *[price] * len(spec.arms)))
        before, spent = _progress(state), 0.0
        if arm and self.behind:
            start, chunk = time.perf_counter(), self._prefill_chunk(self.capacity)
            state = loop.catch_up(engine.config, self._weights(spec), spec.drafter, state, rows, chunk=chunk)
            jax.block_until_ready(state.drafter)
            if (key := self._shapes(-1)) in engine._compiled:
                spent = engine._catch_up = time.perf_counter() - start
            engine._compiled.add(key)
        start = time.perf_counter()
        if arm:
            state = self._draft(spec, spec.arms[arm - 1], state, rows, halt, tokens)
        else:
            base = device.decode(engine.config, self.params, state.rows, rows, halt, tokens, mode=engine._mode)
            state = state._replace(rows=base)
        self.behind = not arm
        filled, steps = (new - old for new, old in zip(_progress(jax.block_until_ready(state)), before, strict=True))
        engine._pace = controller.observe(
            _PACE,
            engine._pace,
            arm,
            max(running, 1),
            max(1, int((steps if arm else filled).max())),
            time.perf_counter() - start,
            int(filled.sum()),
            warm=(key := self._shapes(arm)) in engine._compiled,
            catch_up=spent,
        )
        engine._compiled.add(key)
        return state

    def _shapes(self, arm: int) -> tuple[int, ...]:
        """What a call is compiled for; arm -1 is the catch-up."""
        return arm, self.batch, self.capacity, self.biased, self.stops, self.top_n

    def _draft(self, spec: Speculation, drafter: Drafter, state, rows: device.Rows, halt: np.ndarray, tokens: np.int32):
        steps = np.int32(max(1, tokens // TOKENS_A_STEP))
        args = self._weights(spec), drafter, spec.verifier, state, rows, halt, steps
        return loop.decode(self.engine.config, *args, mode=self.engine._mode)

    def _weights(self, spec: Speculation) -> loop.Weights:
        return loop.Weights(self.params, spec.drafter_params, spec.verifier_params)

    def _prefill_chunk(self, longest: int) -> int:
        """The smallest chunk that takes the longest prompt at once, else the largest that divides the capacity."""
        fitting = [c for c in PREFILL_CHUNKS if self.capacity % c == 0]
        return next((c for c in fitting if c >= longest), fitting[-1])

    def _harvest(self, state: Any) -> Iterator[Delta]:
        """Read what the device wrote, end rows that are done, free their slots."""
        at = state if isinstance(state, device.DecodeState) else state.rows
        tally = state.tally if isinstance(state, loop.SpeculativeState) else None
        tokens, filled, status, scores, tally = jax.device_get((at.tokens, at.filled, at.status, at.scores, tally))
        ended: dict[int, FinishReason | None] = {device.RUNNING: None, device.STOPPED: "stop"}
        ended |= {device.FULL: "length", device.INVALID: "error"}
        cut = self._cut_requests()
        for row, slot in enumerate(self.slots):
            if slot is None:
                continue
            request, stream = self.requests[slot.request], slot.stream
            begin = len(request.token_ids) + len(stream.token_ids)
            reason = ended[int(status[row])] or ("abort" if slot.request in cut else None)
            if reason == "error":
                self.errors[slot.request] = RequestError(_INVALID + "the answer ends here.", kind="numerical_error")
                self.engine._count(invalid_rows=1)
            delta = stream.push(tokens[row, begin : filled[row]].tolist(), reason)
            if delta.finish_reason is not None:
                self._finish(row, slot, scores)
                if tally is not None:
                    self._count_steps(tally.emitted[row], int(tally.drafted[row]))
                delta = dataclasses.replace(delta, result=self._result(slot.request))
            if delta.token_ids or delta.text or delta.finish_reason:
                yield delta
        for r, i in [w for w in self.waiting if w[0] in cut]:
            self.waiting.remove((r, i))
            stream = AnswerStream(self.requests[r], i, self.engine.tokenizer, frozenset())
            delta = stream.push([], "abort")  # never started: an empty answer
            waited = Timings(time.perf_counter() - self.began, 0.0, 0.0)
            self.answers[r][i] = (stream.answer([], 0.0), waited)
            yield dataclasses.replace(delta, result=self._result(r))

    def _cut_requests(self) -> set[int]:
        """Which requests were aborted, or ran out of time."""
        if self.deadline is not None and time.perf_counter() > self.deadline:
            return set(range(len(self.requests)))
        return {r for r, request in enumerate(self.requests) if request.id in self.engine._aborted}

    def _finish(self, row: int, slot: _Slot, scores) -> None:
        request, stream = self.requests[slot.request], slot.stream
        first, now = len(request.token_ids), time.perf_counter()
        places = range(first, first + len(stream.token_ids))
        top = request.sampling.logprobs or 0
        logprobs = [_logprob(t, scores, (row, p), top) for t, p in zip(stream.token_ids, places, strict=True)]
        answer = stream.answer(logprobs, float(sum(p.logprob for p in logprobs)))
        timings = Timings(slot.queued, slot.prefilled, now - slot.started)
        self.answers[slot.request][stream.index] = (answer, timings)
        self.engine._count(generated_tokens=len(stream.token_ids))
        self.slots[row] = None

    def _count_steps(self, emitted: np.ndarray, drafted: int) -> None:
        steps, tokens = int(emitted.sum()), int(emitted @ np.arange(len(emitted)))
        self.engine._emitted += emitted
        self.engine._count(steps=steps, drafted_tokens=drafted, accepted_tokens=tokens - steps)

    def _result(self, r: int) -> Result | None:
        """The request's result, once all its samples have ended."""
        request, done = self.requests[r], self.answers[r]
        if len(done) < request.sampling.n:
            return None
        if r in self.errors:
            self.engine._count(failed_requests=1)
        spent = [t for _, t in done.values()]
        prompt = self.engine._score(request, self.params) if request.sampling.prompt_logprobs is not None else None
        return Result(
            request.id,
            request.token_ids,
            [done[i][0] for i in sorted(done)],
            prompt,
            Timings(*(max(column) for column in zip(*spent, strict=True))),
            self.errors.get(r),
        )

    def _stop_ids(self, request: Request) -> frozenset[int]:
        eos = frozenset() if request.sampling.ignore_eos else self.engine._eos
        return eos | frozenset(request.sampling.stop_token_ids)


def _progress(state: loop.SpeculativeState) -> tuple[np.ndarray, np.ndarray]:
    """Of each row, tokens so far, and steps of speculation so far."""
    filled, emitted = jax.device_get((state.rows.filled, state.tally.emitted))
    return filled, emitted.sum(1)


def _bucket(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n; `least` when n is no more than that."""
    return least if n <= least else 1 << (n - 1).bit_length()


def _capacity(n: int) -> int:
    """Slots for n tokens: 64, 128, then two sizes an octave (192, 256, 384, 512, ...), for a step reads them all."""
    whole = _bucket(n, MIN_CAPACITY)
    return whole * 3 // 4 if n <= whole * 3 // 4 and whole > 2 * MIN_CAPACITY else whole


def _int32(values: Any) -> Any:
    """A NumPy array where types say array: it reaches the device with the call that takes it."""
    return np.asarray(values, np.int32)


def _logprob(token: int, scores: Any, at: tuple[int, int], top: int) -> TokenLogprob:
    pairs = zip(scores.top_ids[at][:top].tolist(), scores.top[at][:top].tolist(), strict=True)
    return TokenLogprob(token, float(scores.chosen[at]), tuple(pairs))
