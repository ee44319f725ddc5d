"""Answers by table, fuzz and GSM8K's own files; counts by enumeration; perplexity against dense float64 softmaxes."""

import dataclasses
import functools
import itertools
import json
import math
import time
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxaroo.infer import evaluate
from jaxaroo.infer.engine import Engine
from jaxaroo.infer.evaluate import (
    Question,
    evaluate_answers,
    evaluate_lm,
    final_answer,
    known_answer,
    pass_at_k,
    wilson_interval,
)
from jaxaroo.infer.requests import Answer, RequestError, Result, Timings
from jaxaroo.infer.sampling import Sampling
from jaxaroo.models.decoder import DecoderConfig, Model, init_params, logits, unstack_layers
from jaxaroo.models.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
SIZES = dict(embed_dim=16, ffn_dim=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, max_positions=128)
rows = lambda *lengths: [np.random.default_rng(n).integers(0, 50, n).tolist() for n in lengths]
SAME = {  # every text of a line ends with the same answer
    Fraction(17): ["3 + 4 = 7\n#### 17", "ans 16\nThe answer is 1\n#### 1\n#### 17\n2", "ans 1 7", "ans: 17"],
    Fraction(5): ["The answer is 6\nans 4\n ans 5\n8", "the answers 6 ans 7, 5", "The answer is 5.\n\nQ: 3?", "5%"],
    Fraction(6): ["A: 12\nThe final answer is: $6.00", "THE answer is 5\n\tA: 6", "plan A: 5, plan B: 6", "**6**"],
    Fraction(1234): ["A: 1,234", "it was $1,234, or so", "#### $1,234.", "#### 1234.00", "####\n\n 1234 \nnot 9"],
    Fraction(3): ["16-3", "so 19-16=3", "(2)-3", "#### 3.", "#### +3.0", "#### 1.5/.5", "the pair (4,3)", "it is +3"],
    Fraction(-3): ["it was -3", "it was -$3.", "#### -$3", "#### $-3", "#### \N{MINUS SIGN}3", "#### - 3", "(-3)"],
    Fraction(1, 2): ["about .5", "#### 0.5", "#### 1/2", "#### 1 / 2", "so 1/2 of it", "#### .5", "#### .5/1."],
    Fraction(-3, 2): ["#### -1 1/2", "#### - 1  1/2", "The answer is -1.5", "#### -3/2"],
    Fraction(12): ["#### 12%.", "The answer is **12**.", "#### 1,2", "12%", "ans = 12", "#### 012"],
    Fraction(0): ["#### 0", "#### -0.0", "ans 0/7"],
    Fraction(10**100 - 1): ["9" * 100, "#### " + "9" * 100],
    "9" * 101: ["9" * 101, "#### " + "9" * 101],
    "1/0": ["1/0", "#### 1/0", "ans 1/0."],
    "1e9999999": ["#### 1E9999999"],
    "blue whale": ["#### Blue  Whale.", "The answer is blue\twhale", "3\nA: $blue whale"],
    "paris, 18 dollars": ["#### Paris, 18 dollars"],
    None: ["3 and so ####", "#### $.", "nothing", "", "3\nans", "\N{ARABIC-INDIC DIGIT THREE}"],
}


def test_what_a_solution_ends_with_and_that_same_answers_are_the_same():
    for answer, texts in SAME.items():
        assert {text: final_answer(text) for text in texts} == dict.fromkeys(texts, answer)
        assert [b for b in SAME if evaluate.same_answer(answer, b)] == [answer] * (answer is not None)


PIECES = [*"-/.,$ 7\n", "####", "ans", "A:", "the answer is", "1234", "1/0", "1,", "1 ", "a", "1/"]


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=30).map("".join))
def test_no_text_breaks_it(text):
    found = final_answer(text)
    assert found is None or isinstance(found, Fraction) or found == " ".join(found.split()) != ""
    assert final_answer(f"{text}\n#### 41.50 $") == Fraction(83, 2)


def test_what_is_known_to_be_right_may_be_words():
    for text, wanted in (
        ("yes", "yes"),
        ("14", 14),
        ("so it is 7\n#### 1/2", Fraction(1, 2)),
        (" Blue Gum.", "blue gum"),
    ):
        assert known_answer(text) == wanted
    assert final_answer("yes") is None  # of a model such a text is no answer


@pytest.mark.parametrize("piece", [*PIECES, ",123", "\na", "\t", "A:1\n", "#### 1\n"])
def test_long_texts_take_bounded_time(piece):
    start = time.process_time()
    for end in ("", "x", "\n#### " + piece * 100_000):
        final_answer(piece * 100_000 + end)
    assert time.process_time() - start < 3  # what is quadratic takes minutes


def test_gsm8k_parses_and_its_published_grades_are_ours(shared):
    read = lambda name: map(json.loads, (shared / "data" / "gsm8k" / name).read_text().splitlines())
    gold = [final_answer(row["answer"]) for row in read("test.jsonl")]
    assert [(type(g), g.denominator) for g in gold] == [(Fraction, 1)] * 1319
    models = [(row["ground_truth"], m) for row in read("example_model_solutions.jsonl") for m in row.values()]
    solved = [(truth, m["solution"], m["is_correct"]) for truth, m in models if isinstance(m, dict)]
    assert len(solved) == 4 * 1319
    assert [s for s in solved if evaluate.same_answer(*map(final_answer, s[:2])) != s[2]] == []


def test_pass_at_k_by_enumeration_and_wilson_intervals_by_hand():
    for n, k in itertools.combinations_with_replacement(range(6, 0, -1), 2):
        for c in range(n + 1):
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)
    close, z2, half = pytest.approx, 1.959963984540054**2, 0.26340691  # half = z / (2 sqrt(10 + z^2))
    assert wilson_interval(0.0, 10) == close((0, z2 / (10 + z2)))
    assert wilson_interval(1.0, 10) == close((10 / (10 + z2), 1))
    assert wilson_interval(0.5, 10) == close((0.5 - half, 0.5 + half))
    assert wilson_interval(81 / 263, 263) == close((0.2553, 0.3662), abs=5e-5)  # Newcombe, 1998


def scripted(table, calls):
    """An engine that answers from a table: prompt -> [(text, tokens, finish reason)], or why it refuses."""

    def result(prompt, sampling):
        found = table[prompt]
        error, samples = (RequestError(found), []) if isinstance(found, str) else (None, found[: sampling.n])
        outputs = [Answer(i, text, [0] * n, why, None, None, 0.0) for i, (text, n, why) in enumerate(samples)]
        return Result("0", [1], outputs, None, Timings(0.0, 0.0, 0.0), error)

    engine = object.__new__(Engine)
    engine.max_seqs, engine.generate = 2, lambda p, s: (calls.append(s), list(map(result, p, s)))[1]
    return engine


TABLE = {
    "a": [("ans 1", 3, "stop"), ("ans 2", 4, "stop"), ("ans 2.0", 5, "stop"), ("#### 1.0", 1, "length")],  # a tie
    "b": [("no", 2, "length"), ("ans 5", 2, "stop"), ("ans 5", 2, "error"), ("no", 2, "stop")],
    "c": [("ans 5", 1, "length"), *[("#### 0", 1, "length")] * 3],
    "d": "prompt: too long",
    "e": [("#### 0", 1, "stop"), ("#### Red", 1, "stop"), ("ans red.", 1, "stop"), ("0", 1, "stop")],
}
ASKED = [Question(*q) for q in [("a", "so #### 1"), ("b", "5"), ("c", "4-4 #### 0"), ("d", "7"), ("e", "RED")]]


def test_a_scripted_engine_is_counted_as_by_hand_however_its_calls_are_cut(monkeypatch):
    reports, sizes, seeds = [], [], []
    for waves in (1, 4, 16):
        monkeypatch.setattr(evaluate, "WAVES", waves)
        reports.append(evaluate_answers(scripted(TABLE, calls := []), ASKED, Sampling(seed=3), samples=4))
        sizes.append([len(call) for call in calls])
        seeds.append([(s.n, s.seed) for call in calls for s in call])
    report = reports[0]
    assert (reports, seeds) == ([report] * 3, [seeds[0]] * 3)
    assert (sizes, [n for n, _ in seeds[0]], len({*seeds[0]})) == ([[1] * 5, [2, 2, 1], [5]], [4] * 5, 5)
    right = [[1, 0, 0, 1], [0, 1, 0, 0], [0, 1, 1, 1], [0] * 4, [0, 1, 1, 0]]
    assert [r["correct"] for r in report.rows] == right
    assert report[:4] + report[8:11] == (5, 4, 8, 8 / 20, 29 / 20, 6, 1)
    error, close = np.std(np.mean(right, axis=1)) / math.sqrt(5), pytest.approx
    assert report[4:6] == (close(error), close(wilson_interval(0.4, 0.24 / error**2)))
    assert report.majority == 3 / 5  # a: 1 was first, b: 5, c: 0 has most, e: 0 was first
    assert report.pass_at == close({1: 0.4, 2: (2 * 5 / 6 + 1 / 2 + 1) / 5, 4: 4 / 5})
    assert [r["extracted"] for r in report.rows[:2]] == [["1", "2", "2", "1"], [None, "5", "5", None]]
    assert [r["error"] for r in report.rows] == [None, None, None, "prompt: too long", None]
    assert json.loads(json.dumps(report._asdict()))["rows"] == report.rows


def test_error_bars_with_one_sample_and_at_the_ends():
    t = {str(i): [("7" if i < 3 else "8", 1, "stop"), ("8", 1, "stop")] for i in range(10)}
    run = lambda gold, n: evaluate_answers(scripted(t, []), [Question(p, gold) for p in t], Sampling(), samples=n)
    some, none = run("7", 1), run("9", 2)
    error, close = math.sqrt(0.3 * 0.7 / 10), pytest.approx
    assert some[3:8] == (0.3, close(error), close(wilson_interval(0.3, 10)), None, {1: 0.3})
    assert none.interval == pytest.approx(wilson_interval(0.0, 10))  # ten questions, not twenty samples
    t |= dict.fromkeys(t, t["0"])
    assert run("7", 2).interval == pytest.approx(wilson_interval(0.5, 20))


def test_a_check_of_ones_own_sees_question_and_text():
    own = dict(samples=4, check=lambda question, text: text.startswith(question.meta["begins"]))
    report = evaluate_answers(scripted(TABLE, []), [Question("b", "5", {"begins": "n"})], Sampling(), **own)
    assert (report.rows[0]["correct"], report.majority) == ([True, False, False, True], 0)


@pytest.mark.slow
def test_the_engine_gives_what_generate_gives():
    m, s = model(TOKENIZER.vocab_size), Sampling(max_tokens=5, temperature=0.0)
    loud = jnp.ones((TOKENIZER.vocab_size, 1)).at[48:58].set(4.0)  # mostly digits
    digital = Model(m.config, m.params | {"head": m.params["head"] * loud})
    prompts, same = ["one", "two two", "3", [70, 71]], [Question("go", "7")] * 3
    with Engine(digital, TOKENIZER, max_seqs=2) as engine:
        texts = [r.outputs[0].text for r in engine.generate(prompts, s)]
        questions = [Question(p, str(final_answer(t))) for p, t in zip(prompts, texts, strict=True)]
        report = evaluate_answers(engine, questions, s, progress=True)
        assert [r["texts"] for r in report.rows] == [[t] for t in texts]
        assert report.accuracy == np.mean([final_answer(t) is not None for t in texts]) > 0
        assert (report.cut, report.mean_output_tokens) == (4, 5)
        hot, again = (evaluate_answers(engine, same, Sampling(max_tokens=5), samples=2) for _ in range(2))
        assert hot == again
        assert len({t for r in hot.rows for t in r["texts"]}) == 6
    with pytest.raises(ValueError, match="answer without text; expected an engine with a tokenizer"):
        evaluate_answers(Engine(digital), [Question([70, 71], "7")], s)


@functools.cache
def model(vocab_size=50, **changes):
    cfg = DecoderConfig(vocab_size=vocab_size, **SIZES | changes)
    params = init_params(cfg, jax.random.key(1))
    return Model(cfg, params | {"embed": params["embed"] * 3})


def brute(m, row, window, stride):
    """nll of every token but the first, in the first window that holds it."""
    begins, dense = [*range(0, len(row) - window, stride), max(0, len(row) - window)], {}
    for b in begins:
        part = row[b : b + window]
        mask = np.arange(32)[None] < len(part)
        z = np.asarray(logits(m, np.pad(part, (0, 32 - len(part)))[None].astype(int), mask), np.float64)[0]
        dense[b] = z - np.log(np.exp(z).sum(-1, keepdims=True))
    homes = [next(b for b in begins if b <= t < b + window) for t in range(1, len(row))]
    return [-dense[b][t - 1 - b, row[t]] for t, b in enumerate(homes, 1)]


@pytest.mark.parametrize(("stride", "tied"), [(1, False), (7, True), (None, False), (23, False)])
@pytest.mark.slow
def test_perplexity_is_that_of_dense_softmaxes_window_by_window(stride, tied):
    m, data = model(tie_embeddings=tied), rows(1, 2, 9, 16, 17, 23, 24, 25, 40, 70)
    want = [brute(m, row, 24, stride or 12) for row in data]
    got, flat = evaluate_lm(m, data, window=24, stride=stride, batch=4, num_bytes=333), np.concatenate(want)
    figures = flat.sum(), flat.mean(), np.exp(flat.mean()), flat.sum() / np.log(2) / 333
    assert (got.tokens, *got[1:]) == pytest.approx((sum(map(len, data)) - len(data), *figures), rel=1e-6)
    for starts in ([0, 1, 5, 15, 17, 22, 3, 24, 30, 69], 9):
        late = [x for nll, at in zip(want, np.broadcast_to(starts, 10), strict=True) for x in nll[max(at, 1) - 1 :]]
        got = evaluate_lm(m, data, window=24, stride=stride, batch=4, loss_from=starts)
        assert (*got[:2], got.bits_per_byte) == (len(late), pytest.approx(sum(late), rel=1e-6), None)


@pytest.mark.slow
def test_padding_batches_order_and_the_form_of_layers_change_nothing(monkeypatch):
    m, data = model(), rows(2, 3, 9, 20, 23, 24, 25, 60)
    run = lambda data, m=m, batch=4, **kw: evaluate_lm(m, data, window=24, batch=batch, num_bytes=9, **kw)
    want = pytest.approx(run(data), rel=1e-6)
    assert [run(data, batch=batch) for batch in (1, 50)] == [want, want]
    assert run([*data, [], [3]], progress=True) == want
    assert run([np.array(row, np.uint16) for row in data[::-1]], Model(m.config, unstack_layers(m.params))) == want
    assert pytest.approx(math.fsum(run([row]).nll for row in data), rel=1e-6) == run(data).nll
    monkeypatch.setattr(evaluate, "SHORTEST", 64)  # no more than the window all the same
    assert run(data) == want


@pytest.mark.slow
def test_few_lengths_compile_and_then_nothing_does(monkeypatch):
    traced, forward = [], evaluate.forward
    monkeypatch.setattr(evaluate, "forward", lambda *a, **more: (traced.append(a[2].shape), forward(*a, **more))[1])
    m = model(ffn_dim=32)  # no other test has compiled it
    evaluate_lm(m, rows(32, 32, 17, 16, 2, 9), window=48, stride=40, batch=3)
    evaluate_lm(m, rows(*range(4, 99)), window=48, stride=9, batch=3, loss_from=3)
    assert traced == [(3, 32), (3, 16), (3, 48)]


def test_an_absurd_model_has_infinite_perplexity_and_half_precision_keeps_to_its_logits():
    m, data = model(), rows(23, 24)
    wild = Model(m.config, m.params | {"head": m.params["head"] * 1e5})
    half = Model(dataclasses.replace(m.config, dtype="bfloat16"), m.params)
    infinite, close = (evaluate_lm(each, data, window=24, batch=4) for each in (wild, half))
    assert 709 < infinite.mean < math.inf == infinite.perplexity
    assert close.nll == pytest.approx(sum(sum(brute(half, row, 24, 12)) for row in data), rel=1e-5)


def refused(message, function, *args, **options):
    with pytest.raises(ValueError, match=message):
        function(*args, **options)


@pytest.mark.errors
def test_what_cannot_be_counted_or_scored_is_refused():
    m, s, greedy, good = model(), Sampling(), Sampling(temperature=0.0), dict(window=8, batch=2)
    for asked, sampling, n in [([], s, 1), (ASKED, s, 0), (ASKED, Sampling(n=3), 2), (ASKED, greedy, 2)]:
        found = f"{len(asked)} questions, samples={n}, n={sampling.n}, temperature={sampling.temperature}; expected"
        refused(found, evaluate_answers, scripted(TABLE, []), asked, sampling, samples=n)
    refused("n=3, c=1, k=4", pass_at_k, 3, 1, 4)
    for name, value in [("stride", 8), ("stride", 0), ("window", 1), ("batch", 0), ("num_bytes", -1)]:
        message = f"{name}={value}.* expected 1 <= stride < window, 1 or more, and 1"
        refused(message, evaluate_lm, m, rows(5), **good | {name: value})
    refused("1 in loss_from; expected .* and 2", evaluate_lm, m, rows(5, 6), **good, loss_from=[1])
    for row in ([3, 50], [1, -2], np.ones(2), np.ones((1, 2), int)):
        refused("row 1; expected a list of token ids, 0 to 49", evaluate_lm, m, [[1, 2], row], **good)
    for data, start in ((rows(5, 0, 1), 5), (rows(0, 1), None), ([], 0)):
        refused("found no token to score", evaluate_lm, m, data, **good, loss_from=start)
