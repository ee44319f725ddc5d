"""`jaxaroo label ...`: solutions to learn from, and how good their steps are."""

import contextlib
import hashlib
import json as jsonlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .output import FloatType, UsageError, cut_half_line, dumps

Row = dict[str, Any]


def label_sample(
    *,
    model: Path,
    data: str,
    out: Path,
    samples: int = 4,
    temperature: float = 1.0,
    max_new_tokens: int = 512,
    limit: int | None = None,
    first: int = 0,
    seed: int = 0,
    dtype: FloatType | None = None,
    max_seqs: int = 32,
    arithmetic_level: int = 2,
    arithmetic_hi: int = 20,
) -> int:
    """Let a policy solve problems, and write its solutions as rows of steps, a line each.

    Rows hold id, prompt, steps, answer and outcome; of the embedded task also `truth`, its checker's label of every
    step. What the file holds already is kept.

    Args:
      model: folder of the policy.
      data: rows with `question` and `answer` (GSM8K), or with `prompt` and `answer`; or builtin:arithmetic, whose
        problems are those of training.
      out: JSONL file to write, or to go on writing.
      samples: solutions of each problem.
      temperature: of sampling.
      max_new_tokens: tokens of a solution at most.
      limit: problems at most; 1000 of the embedded task when not given, all of a file.
      first: the first problem.
      seed: makes the solutions repeatable.
      dtype: of weights and activations; float32 on CPU and bfloat16 elsewhere when not given.
      max_seqs: solutions written at the same time.
      arithmetic_level: kind of the embedded problems, 1 to 4.
      arithmetic_hi: size of their numbers.
    """
    from tqdm import tqdm

    from ..infer.engine import Engine
    from ..infer.evaluate import final_answer, same_answer
    from ..infer.sampling import Sampling
    from ..models.hf import load
    from ..models.tokenizer import load_tokenizer
    from ..train.data.arithmetic import ArithmeticConfig, check_lines
    from ..train.data.steps import split_steps
    from ..train.labels.monte_carlo import step_seed

    if samples < 1 or (samples > 1 and temperature == 0):
        raise UsageError(
            f"label sample: --samples {samples}, --temperature {temperature}; expected some, all different."
        )
    if data == "builtin:arithmetic":
        hard = ArithmeticConfig(level=arithmetic_level, hi=arithmetic_hi)
        problems = [_arithmetic(hard, i) for i in range(first, first + (limit or 1000))]
    else:
        problems = _questions(data)[first:][:limit]
    done = cut_half_line(out)
    if done % samples:
        raise ValueError(f"label sample: {out} holds {done} rows; expected a multiple of --samples {samples}.")
    rest, wave = problems[done // samples :], max(1, 16 * max_seqs // samples)
    with (
        Engine(load(model, dtype=dtype), load_tokenizer(model), max_seqs=max_seqs) as engine,
        out.open("a", encoding="utf-8") as file,
        tqdm(total=len(problems), initial=done // samples, desc="sample", unit="problem", disable=None) as bar,
    ):
        for part in (rest[i : i + wave] for i in range(0, len(rest), wave)):
            ask: Any = dict(temperature=temperature, max_tokens=max_new_tokens, n=samples)
            settings = [Sampling(**ask, seed=step_seed(seed, problem["id"], 0)) for problem in part]
            results = engine.generate([problem["prompt"] for problem in part], settings, raise_on_error=True)
            for problem, result in zip(part, results, strict=True):
                for i, output in enumerate(result.outputs):
                    text = output.text or ""
                    steps = [text[a:b] for a, b in split_steps(text)]
                    right = same_answer(final_answer(text), final_answer(problem["answer"]))
                    row = {"id": f"{problem['id']}:{i}", "prompt": problem["prompt"], "steps": steps}
                    row |= {"answer": problem["answer"], "outcome": int(right and output.finish_reason == "stop")}
                    if "plan" in problem:
                        row["truth"] = [int(ok) for ok in check_lines(problem["plan"], steps)]
                    file.write(dumps(row) + "\n")
            file.flush()
            bar.update(len(part))
    print(f"wrote {out}", file=sys.stderr)
    return 0


def label_steps(
    *,
    data: Path,
    out: Path,
    by: Literal["monte-carlo", "truth", "outcome"] = "monte-carlo",
    model: Path | None = None,
    n: int = 8,
    temperature: float = 0.8,
    threshold: float = 0.0,
    early_stop: bool = True,
    max_new_tokens: int = 512,
    joiner: str = "\n",
    job: Path | None = None,
    seed: int = 0,
    dtype: FloatType | None = None,
    max_seqs: int = 32,
) -> int:
    """Label every step of solutions: by how often a completer gets it right from there, or by what is known.

    A labelling that was killed goes on where it was, and asks nothing twice.

    Args:
      data: rows of `label sample`, or others with id, prompt, steps and answer.
      out: JSONL file for the rows with `labels`, and with `soft` ones where completions were drawn.
      by: completions (Math-Shepherd); the checker of the embedded task; or the outcome, for the last step alone.
      model: folder of the completer.
      n: completions of each step.
      temperature: of the completer.
      threshold: a step is right if more than this share of its completions is.
      early_stop: ask nothing behind the first wrong step.
      max_new_tokens: tokens of a completion at most.
      joiner: what stands behind every step.
      job: file of the completions' verdicts, which the labelling goes on from; beside --out when not given.
      seed: makes the completions repeatable.
      dtype: of weights and activations; float32 on CPU and bfloat16 elsewhere when not given.
      max_seqs: completions written at the same time.
    """
    needed = {"monte-carlo": "answer", "truth": "truth", "outcome": "outcome"}[by]
    rows = [row for row in _rows(data) if row["steps"]]
    if (missing := next((i for i, row in enumerate(rows) if needed not in row), None)) is not None:
        raise UsageError(f"label steps: row {missing} of {data} has no `{needed}`, which --by {by} goes by.")
    if by == "monte-carlo":
        if model is None:
            raise UsageError("label steps: expected --model, the folder of a completer, or another --by.")
        from ..train.labels.monte_carlo import MonteCarloConfig, label

        cfg = MonteCarloConfig(
            n=n,
            threshold=threshold,
            early_stop=early_stop,
            joiner=joiner,
            seed=seed,
            completer=f"{_mark(model)}, temperature {temperature:g}, {max_new_tokens} tokens",
        )
        with _completer(model, temperature, max_new_tokens, dtype, max_seqs) as (sample, check):
            labelled = label(rows, sample, check, job or out.with_suffix(".job.jsonl"), cfg, progress=True)
    elif by == "truth":
        labelled = [{**row, "labels": row["truth"]} for row in rows]
    else:
        from ..train.labels.truth import outcome_row

        labelled = [outcome_row(row, bool(row["outcome"])) for row in rows]
    _write(out, labelled)
    flat = [x for row in labelled for x in row["labels"] if x is not None]
    share = f", {sum(flat) / len(flat):.1%} of {len(flat)} labels right" if flat else ""
    print(f"wrote {out}: {len(labelled)} solutions{share}", file=sys.stderr)
    return 0


def label_agree(
    *, weak: Path, strong: Path, out: Path, keep: Literal["solution", "step"] = "solution", json: bool = False
) -> int:
    """Keep the labels that a weak and a strong completer agree on (Athena-PRM).

    Args:
      weak: file of `label steps`.
      strong: the same solutions, labelled by a stronger completer.
      out: JSONL file for what is kept.
      keep: whole solutions whose first errors agree, or single steps.
      json: print one JSON object.
    """
    from ..train.labels.consistency import ConsistencyConfig, agree

    kept, report = agree(_rows(weak), _rows(strong), ConsistencyConfig(keep=keep))
    _write(out, kept)
    print(
        dumps(report._asdict())
        if json
        else f"kept {report.kept} of {report.solutions} solutions, {report.kept_steps} of {report.steps} steps"
    )
    print(f"wrote {out}", file=sys.stderr)
    return 0


# ----------------------------------------------------------------------------------------------------------- private
@contextlib.contextmanager
def _completer(
    model: Path, temperature: float, max_new_tokens: int, dtype: FloatType | None, max_seqs: int
) -> Iterator[tuple[Callable[..., list[list[str]]], Callable[[Mapping[str, Any], str], bool]]]:
    """What draws completions, and what says whether a whole solution is right."""
    from ..infer.engine import Engine
    from ..infer.evaluate import final_answer, same_answer
    from ..infer.sampling import Sampling
    from ..models.hf import load
    from ..models.tokenizer import load_tokenizer

    with Engine(load(model, dtype=dtype), load_tokenizer(model), max_seqs=max_seqs) as engine:

        def sample(prompts: list[str], n: int, seeds: list[int]) -> list[list[str]]:
            ask = lambda seed: Sampling(temperature=temperature, max_tokens=max_new_tokens, n=n, seed=seed)
            results = engine.generate(prompts, [ask(seed) for seed in seeds], raise_on_error=True)
            return [[output.text or "" for output in result.outputs] for result in results]

        def check(problem: Mapping[str, Any], text: str) -> bool:
            return same_answer(final_answer(text), final_answer(problem["answer"]))

        yield sample, check


def _questions(data: str) -> Sequence[Row]:
    """Problems of a file, each with id, prompt and answer."""
    from ..train.data.formats import open_examples

    rows, examples = [], open_examples(Path(data), "auto", progress=True)
    for i in range(len(examples)):
        row = examples[i]
        if not isinstance(row.get("answer"), str) or not isinstance(row.get("prompt"), str):
            raise ValueError(f"label sample: row {i} of {data} has columns {sorted(row)}; expected prompt and answer.")
        rows.append({"id": str(i), **row})
    return rows


def _arithmetic(cfg: Any, index: int) -> Row:
    """A problem of the embedded task, with the plan that its checker replays."""
    from ..train.data.arithmetic import make_problem

    problem = make_problem(cfg, "train", index)
    return {"id": str(index), "prompt": f"{problem.question}\n", "answer": str(problem.answer), "plan": problem}


def _mark(model: Path) -> str:
    """By which to know a completer again: sizes of its weights, and bytes from both ends of each file."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(file.read(2**16))
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2**16))
            digest.update(file.read() + str(size).encode())
    return digest.hexdigest()


def _rows(path: Path) -> list[Row]:
    """Rows of a JSONL file as they are, columns of all kinds kept."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = jsonlib.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("steps"), list) or "prompt" not in row:
            raise ValueError(f"{path}:{number}: found {line[:80]!r}; expected an object with `prompt` and `steps`.")
        rows.append(row)
    return rows


def _write(path: Path, rows: Iterable[Row]) -> None:
    """All rows or, if something goes wrong, the file as it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text("".join(dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
