"""`jaxaroo eval ...`: how well a model predicts, and how often it is right."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .output import FloatType, UsageError, dumps


def eval_lm(
    *,
    model: Path,
    data: str,
    window: int = 1024,
    stride: int | None = None,
    batch: int = 8,
    limit: int | None = None,
    dtype: FloatType | None = None,
    arithmetic_level: int = 2,
    arithmetic_hi: int = 20,
    json: bool = False,
) -> int:
    """Perplexity: how well a model predicts text, or completions given their prompts.

    Args:
      model: folder of a Hugging Face checkpoint.
      data: a .txt file, rows as for training (scored from the first completion token on, so with all that follows in
        a chat of several turns), or builtin:arithmetic (its test problems).
      window: tokens that the model sees at a time.
      stride: tokens from window to window in longer texts; half a window when not given.
      batch: windows scored together.
      limit: rows to read at most; 1000 test problems of the embedded task when not given, all of a file.
      dtype: of weights and activations; float32 on CPU and bfloat16 elsewhere when not given.
      arithmetic_level: kind of the embedded problems, 1 to 4.
      arithmetic_hi: size of their numbers.
      json: print one JSON object.
    """
    from ..infer.evaluate import evaluate_lm
    from ..models.hf import load
    from ..models.tokenizer import load_tokenizer
    from ..train.data.tokenise import encode_sft

    tokenizer, size = load_tokenizer(model), None
    if data.endswith(".txt"):
        text = Path(data).read_text(encoding="utf-8")
        rows, starts, size = [tokenizer.encode(text)], [0], len(text.encode())
    else:
        encoded = [encode_sft(tokenizer, row) for row in _problems(data, "sft", limit, arithmetic_level, arithmetic_hi)]
        rows, starts = [e.ids for e in encoded], [int(e.scored.argmax()) for e in encoded]
    report = evaluate_lm(
        load(model, dtype=dtype),
        rows,
        window=window,
        stride=stride,
        batch=batch,
        loss_from=starts,
        num_bytes=size,
        progress=not json,
    )
    per_byte = "" if report.bits_per_byte is None else f", {report.bits_per_byte:.4f} bits a byte"
    line = f"perplexity {report.perplexity:.4f} ({report.mean:.4f} nats a token{per_byte}) over {report.tokens} tokens"
    print(dumps(report._asdict()) if json else line)
    return 0


def eval_answers(
    *,
    model: Path,
    data: str,
    limit: int | None = None,
    samples: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 512,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    chat: bool = False,
    dtype: FloatType | None = None,
    max_seqs: int = 32,
    out: Path | None = None,
    arithmetic_level: int = 2,
    arithmetic_hi: int = 20,
    json: bool = False,
) -> int:
    """Let a model answer questions, and count the final answers that are right.

    Args:
      model: folder of a Hugging Face checkpoint.
      data: rows with `question` and `answer` (GSM8K), or with `prompt` and `answer`; or builtin:arithmetic.
      limit: questions to ask at most; 200 of the embedded task's test problems when not given, all of a file.
      samples: answers to each; more than one adds pass@k and the majority's vote.
      temperature: 0 is greedy.
      max_new_tokens: tokens to write at most.
      seed: makes the answers repeatable.
      stop: strings that end an answer.
      chat: wrap questions in the model's chat template.
      dtype: of weights and activations; float32 on CPU and bfloat16 elsewhere when not given.
      max_seqs: answers written at the same time.
      out: JSONL file for questions, answers and verdicts.
      arithmetic_level: kind of the embedded problems, 1 to 4.
      arithmetic_hi: size of their numbers.
      json: print one JSON object.
    """
    from ..infer.engine import Engine
    from ..infer.evaluate import Question, evaluate_answers
    from ..infer.sampling import Sampling
    from ..models.hf import load
    from ..models.tokenizer import load_tokenizer

    if samples > 1 and temperature == 0:
        raise UsageError("eval answers: --samples above 1 needs a --temperature above 0, or all are the same.")
    questions = []
    for row in _problems(data, "auto", limit, arithmetic_level, arithmetic_hi):
        if not isinstance(answer := row.get("answer"), str):
            raise ValueError(f"eval answers: a row of {data} has columns {sorted(row)}; expected an `answer` in text.")
        prompt = [{"role": "user", "content": row["prompt"]}] if chat else row["prompt"]
        questions.append(Question(prompt, answer))
    settings = Sampling(temperature=temperature, max_tokens=max_new_tokens, seed=seed, stop=stop)
    with Engine(load(model, dtype=dtype), load_tokenizer(model), max_seqs=max_seqs) as engine:
        report = evaluate_answers(engine, questions, settings, samples=samples, progress=not json)
    result = {name: value for name, value in report._asdict().items() if name != "rows"}
    if out is not None:
        out.write_text("".join(dumps(row) + "\n" for row in report.rows), encoding="utf-8")
    low, high = report.interval
    line = f"accuracy {report.accuracy:.4f} (95 %: {low:.4f} to {high:.4f}) over {report.n} questions"
    most = max(report.pass_at)
    more = (
        "" if report.majority is None else f"; majority {report.majority:.4f}, pass@{most} {report.pass_at[most]:.4f}"
    )
    print(dumps(result) if json else line + more)
    return 0


# ----------------------------------------------------------------------------------------------------------- private
def _problems(data: str, layout: Any, limit: int | None, level: int, hi: int) -> Iterator[Any]:
    from ..train.data.arithmetic import ArithmeticConfig, ArithmeticExamples
    from ..train.data.formats import open_examples

    if data == "builtin:arithmetic":
        number = 200 if layout == "auto" else 1000
        examples: Any = ArithmeticExamples(ArithmeticConfig(level=level, hi=hi), "test", limit or number)
    else:
        examples = open_examples(Path(data), layout, progress=True)
    yield from (examples[i] for i in range(min(len(examples), limit or len(examples))))
