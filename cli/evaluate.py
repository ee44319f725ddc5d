"""`jaxaroo eval ...`: how well a model predicts, and how often it is right."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro

from ..infer.guided.settings import GuideConfig
from .output import Bits, FloatType, UsageError, check_limit, dumps, expect_files, load_model, problems, write_rows


def eval_lm(
    *,
    model: Path,
    data: str,
    window: int = 1024,
    stride: int | None = None,
    batch: int = 8,
    limit: int | None = None,
    dtype: FloatType | None = None,
    bits: Bits | None = None,
    tensor: int = 1,
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
      bits: of a master (`train qat`) the width to serve at, or one a layer; its highest when not given.
      tensor: devices that run the model together, each with its part of heads, MLPs and vocabulary.
      arithmetic_level: kind of the embedded problems, 1 to 4.
      arithmetic_hi: size of their numbers.
      json: print one JSON object.
    """
    from ..infer.evaluate import evaluate_lm
    from ..models.tokenizer import load_tokenizer
    from ..train.data.tokenise import encode_sft

    tokenizer, size = load_tokenizer(model), None
    if data.endswith(".txt"):
        text = Path(data).read_text(encoding="utf-8")
        rows, starts, size = [tokenizer.encode(text)], [0], len(text.encode())
    else:
        encoded = [encode_sft(tokenizer, row) for row in problems(data, "sft", limit, arithmetic_level, arithmetic_hi)]
        rows, starts = [e.ids for e in encoded], [int(e.scored.argmax()) for e in encoded]
    report = evaluate_lm(
        load_model(model, dtype=dtype, bits=bits, tensor=tensor).model,
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
    bits: Bits | None = None,
    tensor: int = 1,
    max_seqs: int = 32,
    guiding: Annotated[GuideConfig, tyro.conf.arg(name="")] = GuideConfig(),
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
      bits: of a master (`train qat`) the width to serve at, or one a layer; its highest when not given.
      tensor: devices that run the model together, each with its part of heads, MLPs and vocabulary.
      max_seqs: answers written at the same time.
      guiding: let a reward model steer every token.
      out: JSONL file for questions, answers and verdicts.
      arithmetic_level: kind of the embedded problems, 1 to 4.
      arithmetic_hi: size of their numbers.
      json: print one JSON object.
    """
    from ..infer.engine import Engine
    from ..infer.evaluate import Question, evaluate_answers
    from ..infer.guided.load import load_guidance
    from ..infer.sampling import Sampling
    from ..models.tokenizer import load_tokenizer

    expect_files("eval answers", out=out)
    if samples > 1 and temperature == 0:
        raise UsageError("eval answers: --samples above 1 needs a --temperature above 0, or all are the same.")
    questions = []
    for row in problems(data, "auto", limit, arithmetic_level, arithmetic_hi):
        if not isinstance(answer := row.get("answer"), str):
            raise ValueError(f"eval answers: a row of {data} has columns {sorted(row)}; expected an `answer` in text.")
        prompt = [{"role": "user", "content": row["prompt"]}] if chat else row["prompt"]
        questions.append(Question(prompt, answer))
    settings = Sampling(temperature=temperature, max_tokens=max_new_tokens, seed=seed, stop=stop)
    asked, guidance = load_model(model, dtype=dtype, bits=bits, tensor=tensor).model, load_guidance(guiding, dtype)
    with Engine(asked, load_tokenizer(model), max_seqs=max_seqs, guidance=guidance) as engine:
        report = evaluate_answers(engine, questions, settings, samples=samples, progress=not json)
    result = {name: value for name, value in report._asdict().items() if name != "rows"}
    if out is not None:
        write_rows(out, report.rows)
    low, high = report.interval
    line = f"accuracy {report.accuracy:.4f} (95 %: {low:.4f} to {high:.4f}) over {report.n} questions"
    most = max(report.pass_at)
    more = (
        "" if report.majority is None else f"; majority {report.majority:.4f}, pass@{most} {report.pass_at[most]:.4f}"
    )
    print(dumps(result) if json else line + more)
    _warn(report)
    return 0


def eval_prm(
    *,
    model: Path,
    data: str,
    tune: str | None = None,
    separator: str | None = None,
    limit: int | None = None,
    batch: int = 32,
    threshold: float = 0.5,
    dtype: FloatType | None = None,
    out: Path | None = None,
    plot: Path | None = None,
    arithmetic_level: int = 2,
    arithmetic_hi: int = 20,
    json: bool = False,
) -> int:
    """How well a reward model tells right steps from wrong ones: AUROC, ProcessBench's F1, calibration.

    Args:
      model: folder of `train prm` or `train orm`, or of a published model of the Qwen2.5-Math-PRM kind.
      data: rows of layout `steps` with labels 0, 1 and null, or builtin:arithmetic (its test problems, half of them
        with a slip).
      tune: rows of other questions, on which to choose the threshold of ProcessBench's figures.
      separator: the token behind each step of a published model.
      limit: solutions to score at most; 1000 of the embedded task when not given, all of a file.
      batch: solutions scored at a time.
      threshold: a step that scores less is taken to be wrong, without --tune.
      dtype: of weights and activations; float32 on CPU and bfloat16 elsewhere when not given.
      out: JSONL file for the rows with their `scores`.
      plot: PNG, PDF or SVG file for the reliability diagram.
      arithmetic_level: kind of the embedded problems, 1 to 4.
      arithmetic_hi: size of their numbers.
      json: print one JSON object.
    """
    from ..infer.step_metrics import ScoredSteps, evaluate_steps, plot_reliability
    from ..infer.step_scores import Solution, score_solutions
    from ..models.reward import load
    from ..models.tokenizer import load_tokenizer

    expect_files("eval prm", out=out, plot=plot)
    loaded, tokenizer = load(model, dtype=dtype, separator=separator), load_tokenizer(model)

    def scored(source: str) -> list[tuple[dict[str, Any], Any]]:
        rows = [dict(row) for row in _solutions(source, limit, arithmetic_level, arithmetic_hi)]
        solutions = [Solution(row["prompt"], row["steps"]) for row in rows]
        scores = score_solutions(loaded, tokenizer, solutions, batch=batch, progress=not json)
        ask = lambda row: dumps(row["prompt"])
        return [
            (row | {"scores": s}, ScoredSteps(s, row["labels"], ask(row))) for row, s in zip(rows, scores, strict=True)
        ]

    found = scored(data)
    tuning = [steps for _, steps in scored(tune)] if tune else ()
    report = evaluate_steps([steps for _, steps in found], threshold=threshold, tuning=tuning)
    if out is not None:
        write_rows(out, (row for row, _ in found))
    if plot is not None:
        plot_reliability(plot, report.reliability)
    show = lambda value: "not defined" if value is None else f"{value:.4f}"
    line = (
        f"AUROC {show(report.auroc)} ({show(report.auroc_to_error)} up to the first error, "
        f"{show(report.within_question)} within questions), ProcessBench F1 {show(report.f1)} at "
        f"{report.threshold:.3f}, ECE {show(report.ece)}, over {report.steps} steps of {report.solutions} solutions"
    )
    print(dumps(report._asdict()) if json else line)
    return 0


def eval_best_of_n(
    *,
    policy: Path,
    model: Path,
    data: str,
    samples: int = 8,
    temperature: float = 1.0,
    max_new_tokens: int = 512,
    limit: int | None = None,
    separator: str | None = None,
    batch: int = 32,
    seed: int = 0,
    dtype: FloatType | None = None,
    max_seqs: int = 32,
    out: Path | None = None,
    plot: Path | None = None,
    arithmetic_level: int = 2,
    arithmetic_hi: int = 20,
    json: bool = False,
) -> int:
    """Let a policy answer several times, and a reward model choose: accuracy by how many it chooses from.

    Beside it stand what any choice is up against: a single answer, the majority's vote, and one that knows the truth.

    Args:
      policy: folder of the model that answers.
      model: folder of the reward model.
      data: as for `eval answers`.
      samples: answers to each question.
      temperature: of the policy.
      max_new_tokens: tokens to write at most.
      limit: questions to ask at most; 200 of the embedded task's test problems when not given, all of a file.
      separator: the token behind each step of a published reward model.
      batch: solutions scored at a time.
      seed: makes the answers repeatable.
      dtype: of weights and activations; float32 on CPU and bfloat16 elsewhere when not given.
      max_seqs: answers written at the same time.
      out: JSONL file for questions, answers, verdicts and step scores.
      plot: PNG, PDF or SVG file for the curves.
      arithmetic_level: kind of the embedded problems, 1 to 4.
      arithmetic_hi: size of their numbers.
      json: print one JSON object.
    """
    from ..infer.engine import Engine
    from ..infer.evaluate import Question, evaluate_answers, final_answer
    from ..infer.guided.best_of_n import Aggregator, Candidates, aggregate, curves
    from ..infer.sampling import Sampling
    from ..infer.step_metrics import auroc, plot_best_of_k, within_question_auroc
    from ..infer.step_scores import Solution, score_solutions
    from ..models import hf, reward
    from ..models.tokenizer import load_tokenizer
    from ..train.data.steps import split_steps

    expect_files("eval best-of-n", out=out, plot=plot)
    if samples < 2 or temperature == 0:
        raise UsageError(
            f"eval best-of-n: --samples {samples}, --temperature {temperature}; expected answers to choose."
        )
    hf.read_config(model)  # a folder that is none is told before hours of answers
    questions = [
        Question(row["prompt"], row["answer"]) for row in problems(data, "auto", limit, arithmetic_level, arithmetic_hi)
    ]
    sampling = Sampling(temperature=temperature, max_tokens=max_new_tokens, seed=seed)
    with Engine(hf.load(policy, dtype=dtype), load_tokenizer(policy), max_seqs=max_seqs) as engine:
        report = evaluate_answers(engine, questions, sampling, samples=samples, progress=not json)
    answered = report.rows
    loaded, tokenizer = reward.load(model, dtype=dtype, separator=separator), load_tokenizer(model)
    solutions = [
        Solution(row["prompt"], [text[a:b] for a, b in split_steps(text)]) for row in answered for text in row["texts"]
    ]
    scores = iter(score_solutions(loaded, tokenizer, solutions, batch=batch, progress=not json))
    candidates = []
    for row in answered:
        missing = samples - len(row["texts"])  # all, if the policy could not be asked: nothing right to choose from
        finals = [final_answer(text) for text in row["texts"]] + [None] * missing
        row["scores"] = [next(scores) for _ in row["texts"]]
        # an answer that was cut, or gives none, is malformed
        whole = [f is not None and why == "stop" for f, why in zip(finals, row["finish_reasons"], strict=False)]
        steps = [s if ok else [] for s, ok in zip(row["scores"], whole, strict=True)] + [[]] * missing
        worths = {how: [aggregate(s, how) for s in steps] for how in get_args(Aggregator)}
        candidates.append(Candidates(row["correct"], finals, worths))
    if out is not None:
        write_rows(out, answered)
    found = curves(candidates, seed=seed)
    # A scorer may know which questions are hard, and nothing of which answer is right: then only the first is high.
    number = [i for i, c in enumerate(candidates) for _ in c.right]
    right = [int(ok) for c in candidates for ok in c.right]
    told, within = {}, {}
    for how in get_args(Aggregator):
        worth = [max(score, -1.0) for c in candidates for score in c.scores[how]]  # malformed ones are the worst
        told[how], within[how] = auroc(worth, right), within_question_auroc(worth, right, number)
    if plot is not None:
        plot_best_of_k(plot, found)
    _warn(report)
    if json:
        print(dumps(found._asdict() | {"auroc": told, "within_question_auroc": within}))
        return 0
    columns = {"oracle": found.pass_at, "majority": found.majority, **found.best_of}
    columns |= {f"vote by {name}": values for name, values in found.weighted.items()}
    print("k".rjust(4), *(name.rjust(max(8, len(name))) for name in columns))
    for i, k in enumerate(found.k):
        print(str(k).rjust(4), *(f"{values[i]:.4f}".rjust(max(8, len(name))) for name, values in columns.items()))
    show = lambda value: "not defined" if value is None else f"{value:.4f}"
    print("a right answer above a wrong one, of any question and of the same (0.5 is chance):")
    print("  " + ", ".join(f"{how} {show(told[how])} and {show(within[how])}" for how in told))
    return 0


# ----------------------------------------------------------------------------------------------------------- private
def _warn(report: Any) -> None:
    if report.failed:
        first = next(row["error"] for row in report.rows if row["error"])
        print(f"warning: {report.failed} questions were not answered, the first: {first}", file=sys.stderr)


def _solutions(data: str, limit: int | None, level: int, hi: int) -> Iterator[Any]:
    """Labelled solutions: rows of layout `steps`."""
    from ..train.data.arithmetic import ArithmeticConfig
    from ..train.data.formats import open_examples
    from ..train.labels.truth import ArithmeticSolutions, SolutionsConfig

    check_limit(limit)
    if data == "builtin:arithmetic":
        cfg = SolutionsConfig(problems=ArithmeticConfig(level=level, hi=hi))
        examples: Any = ArithmeticSolutions(cfg, "test", limit or 1000)
    else:
        examples = open_examples(Path(data), "steps", progress=True)
    yield from (examples[i] for i in range(min(len(examples), limit or len(examples))))
