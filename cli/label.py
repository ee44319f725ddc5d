"""`jaxaroo label ...`: solutions to learn from, and how good their steps are."""

import contextlib
import hashlib
import itertools
import json as jsonlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from .output import FloatType, UsageError, check_limit, dumps, write_rows
from .shards import shard_of

Row = dict[str, Any]
# Columns that are of no use once a solution has other steps.
_OF_STEPS = {"steps", "labels", "soft", "truth", "feedback", "judge", "completion"}


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
    shard: str | None = None,
    seed: int = 0,
    dtype: FloatType | None = None,
    max_seqs: int = 32,
    arithmetic_level: int = 2,
    arithmetic_hi: int = 20,
) -> int:
    """Let a policy solve problems, and write its solutions as rows of steps, a line each.

    Rows hold id, prompt, steps, answer and outcome; of the embedded task also `truth`, its checker's label of every
    step, and `feedback`, what there is to say of each. A problem too long for the policy has rows without steps, with
    its `error`. What the file holds already is kept.

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
      shard: which part of the problems, as INDEX/COUNT, or auto under SLURM; it is written beside --out, and `label
        merge` puts parts together.
      seed: makes the solutions repeatable.
      dtype: of weights and activations; float32 on CPU and bfloat16 elsewhere when not given.
      max_seqs: solutions written at the same time.
      arithmetic_level: kind of the embedded problems, 1 to 4.
      arithmetic_hi: size of their numbers.
    """
    from tqdm import tqdm

    from ..infer.engine import Engine
    from ..infer.evaluate import final_answer, known_answer, same_answer
    from ..infer.sampling import Sampling
    from ..models.hf import load
    from ..models.tokenizer import load_tokenizer
    from ..train.data.arithmetic import ArithmeticConfig, check_lines, explain_lines
    from ..train.data.steps import split_steps
    from ..train.labels.monte_carlo import step_seed

    if samples < 1 or (samples > 1 and temperature == 0):
        raise UsageError(
            f"label sample: --samples {samples}, --temperature {temperature}; expected some, all different."
        )
    if first < 0:
        raise UsageError(f"label sample: --first {first}; expected 0 or more.")
    check_limit(limit)
    if data == "builtin:arithmetic":
        hard = ArithmeticConfig(level=arithmetic_level, hi=arithmetic_hi)
        problems = [_arithmetic(hard, i) for i in range(first, first + (limit or 1000))]
    else:
        problems = _questions(data)[first:][:limit]
    part_of, whole = shard_of(shard), out
    if part_of is not None:
        problems, whole, out = part_of.of(problems), part_of.path(out), part_of.unfinished(out)
        if whole.exists():
            print(f"{whole} is whole", file=sys.stderr)
            return 0
    done = _solved(out, problems, samples)
    rest, wave, asked = problems[done:], max(1, 16 * max_seqs // samples), done > 0
    with (
        Engine(load(model, dtype=dtype), load_tokenizer(model), max_seqs=max_seqs) as engine,
        out.open("a", encoding="utf-8") as file,
        tqdm(total=len(problems), initial=done, desc="sample", unit="problem", disable=None) as bar,
    ):
        for part in (rest[i : i + wave] for i in range(0, len(rest), wave)):
            ask: Any = dict(temperature=temperature, max_tokens=max_new_tokens, n=samples)
            settings = [Sampling(**ask, seed=step_seed(seed, problem["id"], 0)) for problem in part]
            results = engine.generate([problem["prompt"] for problem in part], settings)
            errors = [result.error for result in results if result.error]
            asked = asked or len(errors) < len(part)
            if not asked or any(error.kind == "numerical_error" for error in errors):
                raise errors[0]  # not of a prompt, but of the settings or the model
            for problem, result in zip(part, results, strict=True):
                if result.error:  # so that those behind it are asked, and the file can be gone on with
                    tqdm.write(f"label sample: problem {problem['id']} was not asked: {result.error}", file=sys.stderr)
                    empty = {"steps": [], "answer": problem["answer"], "outcome": 0, "error": result.error.message}
                    for i in range(samples):
                        file.write(dumps({"id": f"{problem['id']}:{i}", "prompt": problem["prompt"]} | empty) + "\n")
                for i, output in enumerate(result.outputs):
                    text = output.text or ""
                    steps = [text[a:b] for a, b in split_steps(text)]
                    right = same_answer(final_answer(text), known_answer(problem["answer"]))
                    row = {"id": f"{problem['id']}:{i}", "prompt": problem["prompt"], "steps": steps}
                    row |= {"answer": problem["answer"], "outcome": int(right and output.finish_reason == "stop")}
                    if "plan" in problem:
                        row["truth"] = [int(ok) for ok in check_lines(problem["plan"], steps)]
                        row["feedback"] = explain_lines(problem["plan"], steps)
                    file.write(dumps(row) + "\n")
            file.flush()
            bar.update(len(part))
    if part_of is not None:
        os.replace(out, whole)
    print(f"wrote {whole}", file=sys.stderr)
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
    joiner: str | None = None,
    job: Path | None = None,
    shard: str | None = None,
    seed: int = 0,
    dtype: FloatType | None = None,
    max_seqs: int = 32,
) -> int:
    """Label every step of solutions: by how often a completer gets it right from there, or by what is known.

    A labelling that was killed goes on where it was, and asks nothing twice. A completion that was cut is not right;
    solutions that leave no room for one are left out.

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
      joiner: what stands behind every step; when not given, what rows of `label split` say, or else a newline.
      job: file of the completions' verdicts, which the labelling goes on from; beside --out when not given.
      shard: which part of the solutions, as INDEX/COUNT, or auto under SLURM; it is written beside --out, and `label
        merge` puts parts together.
      seed: makes the completions repeatable.
      dtype: of weights and activations; float32 on CPU and bfloat16 elsewhere when not given.
      max_seqs: completions written at the same time.
    """
    needed = {"monte-carlo": "answer", "truth": "truth", "outcome": "outcome"}[by]
    rows = [row for row in read_solutions(data) if row["steps"]]
    if (missing := next((i for i, row in enumerate(rows) if needed not in row), None)) is not None:
        raise UsageError(f"label steps: row {missing} of {data} has no `{needed}`, which --by {by} goes by.")
    for i, row in enumerate(rows):
        if (wanted := _wanted(row, needed)) is not None:
            raise ValueError(f"label steps: row {i} of {data} has `{needed}` {row[needed]!r:.60}; expected {wanted}.")
    if (part_of := shard_of(shard)) is not None:
        if job is not None:
            raise UsageError(
                "label steps: --job and --shard; expected one of them, for every part has a job of its own."
            )
        rows, out = list(part_of.of(rows)), part_of.path(out)
    if by == "monte-carlo":
        if model is None:
            raise UsageError("label steps: expected --model, the folder of a completer, or another --by.")
        from ..train.labels.monte_carlo import MonteCarloConfig, label

        cfg = MonteCarloConfig(
            n=n,
            threshold=threshold,
            early_stop=early_stop,
            joiner=joiner_of(rows, joiner),
            seed=seed,
            completer=f"{_mark(model)}, temperature {temperature:g}, {max_new_tokens} tokens",
        )
        with _completer(model, temperature, max_new_tokens, dtype, max_seqs) as (sample, check, fits):
            before = lambda row: row["prompt"] + cfg.joiner.join([*row["steps"][:-1], ""])  # the most that is asked
            several = [i for i, row in enumerate(rows) if len(row["steps"]) > 1 and _is_text(row["prompt"])]
            long = {i for i in several if not fits(before(rows[i]))}
            if long:
                if len(long) == len(rows):
                    raise ValueError(f"label steps: --max-new-tokens {max_new_tokens} fits behind no row of {data}.")
                found = f"{len(long)} solutions are too long for the completer, the first {rows[min(long)].get('id')}"
                print(f"label steps: {found}; they are left out.", file=sys.stderr)
                rows = [row for i, row in enumerate(rows) if i not in long]
            labelled = label(rows, sample, check, job or out.with_suffix(".job.jsonl"), cfg, progress=True)
    elif by == "truth":
        labelled = [{**row, "labels": row["truth"]} for row in rows]
    else:
        from ..train.labels.truth import outcome_row

        labelled = [outcome_row(row, bool(row["outcome"])) for row in rows]
    write_rows(out, labelled)
    flat = [x for row in labelled for x in row["labels"] if x is not None]
    share = f", {sum(flat) / len(flat):.1%} of {len(flat)} labels right" if flat else ""
    print(f"wrote {out}: {len(labelled)} solutions{share}", file=sys.stderr)
    return 0


def label_agree(
    *,
    strong: Path,
    out: Path,
    weak: Path | None = None,
    judge: str | None = None,
    keep: Literal["solution", "step"] = "solution",
    json: bool = False,
) -> int:
    """Keep the labels that a weak and a strong completer agree on (Athena-PRM), or a completer and a judge.

    Args:
      strong: file of `label steps`.
      out: JSONL file for what is kept.
      weak: the same solutions, labelled by a weaker completer.
      judge: in its place, a column of the file: a judge's labels, or the index of the first wrong step, -1 for none.
      keep: whole solutions whose first errors agree, or single steps.
      json: print one JSON object.
    """
    from ..train.labels.consistency import ConsistencyConfig, agree, consensus

    if (weak is None) == (judge is None):
        raise UsageError("label agree: expected either --weak, a second file, or --judge, a column of the first.")
    cfg = ConsistencyConfig(keep=keep)
    if weak is not None:
        kept, report = agree(read_solutions(weak), read_solutions(strong), cfg)
    else:
        assert judge is not None
        kept, report = consensus(read_solutions(strong), judge, cfg)
    write_rows(out, kept)
    print(
        dumps(report._asdict())
        if json
        else f"kept {report.kept} of {report.solutions} solutions, {report.kept_steps} of {report.steps} steps"
    )
    print(f"wrote {out}", file=sys.stderr)
    return 0


def label_feedback(
    *, data: Path, out: Path, start: str = "", between: str | None = None, closing: str = "\n", json: bool = False
) -> int:
    """Make examples for `train sft` of what is said about steps: the first stage of a reward model (Math-Minos).

    Question and steps are the prompt, feedback is the completion, a line for each step. `train prm --model SFT/model`
    is the second stage. With its defaults it reads the same tokens, and a separator behind each step; with a newline
    for --separator and an empty --between it reads them at the same positions.

    Args:
      data: rows with prompt, steps and `feedback`: a text for each step up to the first error, then null. `label
        sample` writes it for the embedded task.
      out: JSONL file to write.
      start: text before the first step; that of `train prm`.
      between: text before every other step; when not given, what rows of `label split` say, or else a newline.
      closing: text between steps and feedback.
      json: print one JSON object.
    """
    from ..train.labels.feedback import feedback_example

    rows, examples = read_solutions(data), []
    between = joiner_of(rows, between)
    for i, row in enumerate(rows):
        if not row["steps"]:
            continue
        try:
            example = feedback_example(row, start=start, between=between, closing=closing)
        except ValueError as error:
            raise ValueError(f"label feedback: row {i} of {data}: {error}") from error
        examples.append({**({"id": row["id"]} if "id" in row else {}), **example})
    write_rows(out, examples)
    steps = sum(len(row["steps"]) for row in rows)
    lines = sum(example["completion"].count("\n") + 1 for example in examples)
    report = {"solutions": len(examples), "steps": steps, "lines": lines, "without_steps": len(rows) - len(examples)}
    print(dumps(report) if json else f"{len(examples)} solutions, feedback on {lines} of {steps} steps")
    print(f"wrote {out}", file=sys.stderr)
    return 0


def label_split(
    *,
    data: Path,
    out: Path,
    by: Literal["adaptive", "line", "separator", "tokens"] = "adaptive",
    model: Path | None = None,
    share: float = 0.02,
    shortest: int = 4,
    tokens: int = 32,
    separator: str = "\n\n",
    joiner: str | None = None,
    dtype: FloatType | None = None,
    json: bool = False,
) -> int:
    """Cut solutions into steps anew: where the policy was unsure (AdaptiveStep), at lines, or each so many tokens.

    New steps hold all of the text, what separates them included: joined by nothing they are the solution again. The
    rows say so (`joiner`), and `label steps` goes by it; `train prm` wants --between "". Labels and feedback of the
    old steps are left out, answers and outcomes stay.

    Args:
      data: rows with prompt, and `steps`, or their text as `completion`.
      out: JSONL file to write.
      by: tokens that the policy gave little probability; lines; a separator; or a number of tokens.
      model: folder of the policy; to count tokens, of a tokenizer.
      share: of all tokens, how many begin a step, before short ones are merged.
      shortest: tokens of an adaptive step.
      tokens: of a step, to cut by tokens.
      separator: behind which steps end, to cut by it.
      joiner: what stood between the steps of the data; when not given, what they say, or else a newline.
      dtype: of weights and activations; float32 on CPU and bfloat16 elsewhere when not given.
      json: print one JSON object.
    """
    from ..models.tokenizer import load_tokenizer
    from ..train.data.steps import SplitConfig, split_steps
    from ..train.labels.adaptive_step import AdaptiveStepConfig

    if model is None and by in ("adaptive", "tokens"):
        raise UsageError(f"label split: --by {by}; expected --model, the folder of the policy and its tokenizer.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"label split: no folder {out.parent}; expected one for --out. Make it.")
    rows = read_solutions(data, instead="completion")
    joiner = joiner_of(rows, joiner)
    whole = [solution_text(row, joiner) for row in rows]
    kept = [(row, text) for row, text in zip(rows, whole, strict=True) if text.strip()]
    texts = [text for _, text in kept]
    report: Row = {"solutions": len(kept), "empty": len(rows) - len(kept)}
    if by == "adaptive":
        assert model is not None
        cfg = AdaptiveStepConfig(share=share, shortest=shortest)
        split, found = _adaptive(model, [row for row, _ in kept], texts, cfg, dtype)
        report |= {"threshold": min(1.0, math.exp(found.threshold)), "share": found.share, "merged": found.merged}
        cut = f"tokens of probability below {report['threshold']:.3g} begin a step, {found.share:.2%} of all; "
        cut += f"{found.merged} short steps merged; "
    else:
        cfg, cut = SplitConfig(how=by, separator=separator, tokens=tokens), ""
        tokenizer = load_tokenizer(model) if model is not None and by == "tokens" else None
        split = [_cover(text, split_steps(text, cfg, tokenizer)) for text in texts]
    steps = sum(map(len, split))
    report |= {"steps": steps, "mean_steps": steps / max(len(kept), 1)}
    rest = [{name: value for name, value in row.items() if name not in _OF_STEPS} for row, _ in kept]
    write_rows(out, ({**row, "steps": new, "joiner": ""} for row, new in zip(rest, split, strict=True)))
    print(dumps(report) if json else f"{cut}{len(kept)} solutions, {report['mean_steps']:.2f} steps each")
    print(f'wrote {out}: train on it with --between ""', file=sys.stderr)
    return 0


def read_solutions(path: Path, instead: str | None = None) -> list[Row]:
    """Rows of a JSONL file as they are, columns of all kinds kept; one of text may stand in for `steps`."""
    rows, wanted = [], "`prompt` and `steps`, texts" + (f", or `{instead}`" if instead else "")
    with path.open(encoding="utf-8") as file:  # whose lines end with newlines: U+2028 may stand in a JSON string
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = jsonlib.loads(line)
            except ValueError:
                row = None
            row = row if isinstance(row, dict) else {}
            steps = [] if _is_text(row.get(instead)) else row.get("steps")
            if "prompt" not in row or not isinstance(steps, list) or not all(map(_is_text, steps)):
                raise ValueError(f"{path}:{number}: found {line[:80]!r}; expected an object with {wanted}.")
            rows.append(row)
    return rows


def joiner_of(rows: Sequence[Row], asked: str | None) -> str:
    """What stands between steps: as asked for, or as the rows say, or a newline."""
    found = {said if isinstance(said, str) else "\n" for row in rows for said in [row.get("joiner")]} or {"\n"}
    if asked is None and len(found) > 1:
        raise ValueError(f"label: {found} stand between steps of some rows; expected one for all. Say which, or part.")
    return found.pop() if asked is None else asked


def solution_text(row: Row, joiner: str) -> str:
    """A row's `completion` where that is text, or else its steps."""
    return row["completion"] if _is_text(row.get("completion")) else joiner.join(row["steps"])


# ----------------------------------------------------------------------------------------------------------- private
def _solved(out: Path, problems: Sequence[Row], samples: int) -> int:
    """How many problems a file holds all solutions of; what a stop or a full disk left of one more is cut off.

    Raises:
      ValueError: if a row is not the solution that this command would have written there.
    """
    solved = end = place = 0
    with out.open("a+b") as file:
        file.seek(0)
        for number, line in enumerate(file):
            (i, sample), whole = divmod(number, samples), line.endswith(b"\n")
            if i < len(problems):  # a lower --limit keeps what is there
                wanted = {"id": f"{problems[i]['id']}:{sample}", "prompt": problems[i]["prompt"]}
                if not _begins(line, wanted) and (whole or not number):  # half a line behind others is the stop's
                    raise ValueError(
                        f"label sample: {out}:{number + 1} is {line[:80]!r}; expected solution {wanted['id']} of "
                        f"{wanted['prompt']!r:.60}. Go on with the same --data, --first, --samples and --shard, or "
                        "name another --out."
                    )
            place += len(line)
            if sample == samples - 1 and whole:
                end, solved = place, i + 1
        file.truncate(end)
    return solved


def _begins(line: bytes, row: Row) -> bool:
    """Whether a line, or what there is of it, holds this row or one with more columns."""
    if not line.endswith(b"\n"):
        begun = dumps(row)[:-1].encode()
        return line.startswith(begun) or begun.startswith(line)
    try:
        found = jsonlib.loads(line)
    except ValueError:
        return False
    return isinstance(found, dict) and found.items() >= row.items()


def _adaptive(model: Path, rows: list[Row], texts: list[str], cfg: Any, dtype: FloatType | None):
    """Steps of every text, and what the policy's doubts came to: it reads each behind its prompt."""
    import numpy as np
    from tqdm import tqdm

    from ..infer.engine import Engine
    from ..models.hf import load
    from ..models.tokenizer import load_tokenizer
    from ..train.data.steps import split_tokens
    from ..train.labels.adaptive_step import adaptive_steps

    tokenizer, asked = load_tokenizer(model), []
    name = lambda i: f"label split: solution {rows[i].get('id', i)!r:.60}"
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        prompt, ids = row["prompt"], tokenizer.encode(text, bos=False)
        if (back := tokenizer.decode(ids)) != text:
            raise ValueError(
                f"{name(i)}: {text!r:.60} comes back from the tokenizer as {back!r:.60}; expected the same."
            )
        asked.append((tokenizer.encode(prompt) if _is_text(prompt) else tokenizer.encode_chat(prompt), ids))
    logps = []
    with Engine(load(model, dtype=dtype), tokenizer) as engine:
        for i, (prompt, ids) in enumerate(tqdm(asked, "read", unit="solution", disable=None)):
            [result] = engine.score([[*prompt, *ids]])
            if result.prompt_logprobs is None:
                raise ValueError(f"{name(i)}: {result.error}") from result.error
            told = result.prompt_logprobs[len(prompt) :]
            logps.append(np.array([0.0 if token is None else token.logprob for token in told]))
    found = adaptive_steps(logps, cfg)
    spans = (split_tokens(tokenizer, ids, ends) for (_, ids), ends in zip(asked, found.ends, strict=True))
    return [[text[a:b] for a, b in each] for text, each in zip(texts, spans, strict=True)], found


def _cover(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """Steps that give the text back: each goes on to where the next begins."""
    cuts = [0, *(start for start, _ in spans[1:]), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(cuts)]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


@contextlib.contextmanager
def _completer(
    model: Path, temperature: float, max_new_tokens: int, dtype: FloatType | None, max_seqs: int
) -> Iterator[
    tuple[Callable[..., list[list[str | None]]], Callable[[Mapping[str, Any], str], bool], Callable[[str], bool]]
]:
    """What draws completions, what says whether a whole solution is right, and whether there is room behind a text."""
    from ..infer.engine import Engine
    from ..infer.evaluate import final_answer, known_answer, same_answer
    from ..infer.sampling import Sampling
    from ..models.hf import load
    from ..models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    with Engine(load(model, dtype=dtype), tokenizer, max_seqs=max_seqs) as engine:

        def sample(prompts: list[str], n: int, seeds: list[int]) -> list[list[str | None]]:
            ask = lambda seed: Sampling(temperature=temperature, max_tokens=max_new_tokens, n=n, seed=seed)
            results = engine.generate(prompts, [ask(seed) for seed in seeds], raise_on_error=True)
            whole = lambda output: (output.text or "") if output.finish_reason == "stop" else None
            return [[whole(output) for output in result.outputs] for result in results]

        def check(problem: Mapping[str, Any], text: str) -> bool:
            return same_answer(final_answer(text), known_answer(problem["answer"]))

        def fits(text: str) -> bool:
            return len(tokenizer.encode(text)) + max_new_tokens <= engine.max_len

        yield sample, check, fits


def _questions(data: str) -> Sequence[Row]:
    """Problems of a file, each with id, prompt and answer."""
    from ..train.data.formats import open_examples

    rows, examples = [], open_examples(Path(data), "auto", progress=True)
    for i in range(len(examples)):
        row = examples[i]
        if not isinstance(row.get("answer"), str) or not isinstance(row.get("prompt"), str):
            raise ValueError(f"label sample: row {i} of {data} has columns {sorted(row)}; expected prompt and answer.")
        if (wanted := _wanted(row, "answer")) is not None:
            found = f"row {i} of {data} has `answer` {row['answer']!r:.60}"
            raise ValueError(f"label sample: {found}; expected {wanted}. Correct it, or leave the row out.")
        rows.append({"id": str(i), **row})
    return rows


def _wanted(row: Row, column: str) -> str | None:
    """What should stand in a column that labels come from, if something else does."""
    from ..infer.evaluate import known_answer

    value = row[column]
    if column == "answer":  # where it says nothing, no solution would ever be right
        says = isinstance(value, str) and known_answer(value) is not None
        return None if says else "text, a number or words"
    if column == "outcome":
        return None if value in (0, 1) else "0 or 1"
    R = len(row["steps"])
    fits = isinstance(value, list) and len(value) == R and all(x in (0, 1, None) for x in value)
    return None if fits else f"0, 1 or null for each of {R} steps"


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
