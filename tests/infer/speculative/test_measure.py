"""Reports add up, whatever the figures; questions that are none are named."""

import itertools
import json

import jax
import numpy as np
import pytest

from jaxaroo.infer import engine
from jaxaroo.infer.sampling import Sampling
from jaxaroo.infer.speculative import verify
from jaxaroo.infer.speculative.drafters import lookup
from jaxaroo.infer.speculative.loop import Speculation
from jaxaroo.infer.speculative.measure import Question, markdown, measure, plot_acceptance, read_questions
from jaxaroo.models.decoder import DecoderConfig, Model, init_params
from jaxaroo.models.tokenizer import byte_tokenizer


def run(**options):
    tokenizer = byte_tokenizer()
    cfg = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        embed_dim=16,
        ffn_dim=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_positions=512,
    )
    model = Model(cfg, init_params(cfg, jax.random.key(0)))
    questions = [
        Question("1", "songs", ["la la la la la", "again"]),
        Question("2", "sums", ["1 2 3 1 2 3 1 2"]),
        Question("3", "songs", ["so so so"]),
    ]
    spec = Speculation(lookup.make_drafter(4), verify.coupled())
    return measure(model, tokenizer, spec, questions, **options)


@pytest.fixture(scope="module")
def report():
    return run(sampling=Sampling(temperature=0.0, max_tokens=24, seed=0), repeats=2)


@pytest.mark.slow
def test_tokens_steps_and_shares_add_up(report):
    assert report["identical"] == 1.0
    assert report["lossless"]
    assert report["plain"]["tokens"] == report["speculative"]["tokens"] == 4 * 24
    emitted = np.array(report["emitted"])
    wrote = emitted @ np.arange(len(emitted))
    assert wrote == 2 * (4 * 24 - 4)  # two passes; the first token of an answer belongs to no step
    assert report["tau"] == wrote / emitted.sum()
    assert report["accepted"] == [emitted[d + 1 :].sum() / emitted.sum() for d in range(1, 5)]
    assert report["ctar"][:4] == report["accepted"]
    assert report["wasted_per_step"] == pytest.approx(report["drafted_per_step"] - (report["tau"] - 1))
    assert 0 < report["drafted_per_step"] <= 4
    assert set(report["tau_by_category"]) == {"songs", "sums"}
    low, high = sorted(report["tau_by_category"].values())
    assert low <= report["tau"] <= high


def test_rates_are_of_what_was_measured(report):
    side = report["speculative"]["tokens_per_second"] / report["plain"]["tokens_per_second"]
    assert report["speedup"] == side
    parts = report["seconds"]
    assert set(parts) == {"plain", "draft", "verify", "commit"}
    assert min(parts.values()) > 0
    cost = parts["draft"] + parts["verify"] + parts["commit"]
    assert report["predicted_speedup"] == report["tau"] * parts["plain"] / cost
    assert report["verify_over_plain"] == parts["verify"] / parts["plain"]
    assert (report["extra_parameters"], report["extra_bytes"]) == (0, 0)


def test_first_tokens_are_in_no_rate_for_a_prefill_made_them(monkeypatch):
    """By a clock on which every call of the loop takes a second: tokens a call, of the tokens that calls wrote."""
    clock = itertools.count()
    monkeypatch.setattr(engine.time, "perf_counter", lambda: float(next(clock)))
    found = run(sampling=Sampling(temperature=0.0, max_tokens=5, seed=0), repeats=1, parts=False)
    assert found["plain"]["tokens"] == 4 * 5
    assert found["plain"]["tokens_per_second"] == 4.0  # one call an answer


@pytest.mark.errors
def test_answers_that_end_with_their_first_token_say_nothing_of_a_loop():
    with pytest.raises(ValueError, match="every answer ended with its first token"):
        run(sampling=Sampling(temperature=0.0, max_tokens=1, seed=0), repeats=1, parts=False)


def test_it_can_be_written_down(report, tmp_path):
    assert json.loads(json.dumps(report)) == report
    head, _, row = markdown(report).splitlines()
    assert head.count("|") == row.count("|")
    assert f"{report['tau']:.2f}" in row
    plot_acceptance(tmp_path / "a.png", report)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_questions_are_read_in_both_formats(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question_id": 81, "category": "writing", "turns": ["a", "b"]}\n\n{"prompt": "c"}\n')
    assert read_questions(path) == [Question("81", "writing", ["a", "b"]), Question("3", "", ["c"])]


def test_the_published_questions_are_read(shared):
    questions = read_questions(shared / "data" / "spec_bench" / "question.jsonl")
    assert len(questions) == 480
    assert sum(len(q.turns) == 2 for q in questions) == 80


@pytest.mark.errors
@pytest.mark.parametrize("line", ["{", "[1]", '{"turns": []}', '{"turns": [1]}', '{"text": "a"}'])
def test_a_line_that_is_no_question_is_named(tmp_path, line):
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"q.jsonl:2: found"):
        read_questions(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no questions"):
        read_questions(path)
