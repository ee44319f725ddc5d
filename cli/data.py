"""`jaxaroo data ...`: rows to train on, made of other rows. What is written appears whole or not at all."""

import json as jsonlib
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from .output import FloatType, UsageError, dumps

Row = dict[str, Any]


def data_code_pairs(
    *,
    data: Path,
    out: Path,
    workers: int = 1,
    cpu_seconds: int = 5,
    wall_seconds: float = 10.0,
    memory_mib: int = 512,
    allow_unsafe: bool = False,
    json: bool = False,
) -> int:
    """Make pairs for `train preference` of codes and tests that a model wrote itself (DSTC).

    Rows that do not say which code passes which test have them run, every pair in a process of its own with limits.
    That guards against accidents, not against attacks: run foreign code in a container.

    Args:
      data: JSONL file with prompt, codes, tests and, where it is known, `passed`: 0 or 1, a list for each code.
      out: JSONL file to write.
      workers: codes that run at the same time.
      cpu_seconds: of one code with one test.
      wall_seconds: of the same.
      memory_mib: of the same.
      allow_unsafe: run codes even where a limit cannot be set.
      json: print one JSON object.
    """
    from tqdm import tqdm

    from ..train.data.dstc import dstc_pair
    from ..train.rewards.code_tests import CodeLimits, run_tests

    limits = CodeLimits(
        cpu_seconds=cpu_seconds,
        wall_seconds=wall_seconds,
        memory_bytes=memory_mib * 2**20,
        allow_unsafe=allow_unsafe,
    )
    _expect_new(out)
    rows, report = list(_code_rows(data)), {"prompts": 0, "pairs": 0, "runs": 0}

    def pairs() -> Iterator[Row]:
        for row in tqdm(rows, "code pairs", unit=" prompts", disable=True if json else None):
            if row.get("passed") is None:
                row["passed"] = run_tests(row["codes"], row["tests"], limits, workers=workers)
                report["runs"] += len(row["codes"]) * len(row["tests"])
            report["prompts"] += 1
            if (pair := dstc_pair(row)) is not None:
                report["pairs"] += 1
                yield pair

    _write(out, pairs())
    line = f"{report['pairs']} pairs of {report['prompts']} prompts, {report['runs']} runs"
    print(dumps(report) if json else line)
    print(f"wrote {out}", file=sys.stderr)
    return 0


def data_pairs(
    *,
    data: Path,
    out: Path,
    by: Literal["scores", "outcome"] = "scores",
    aggregate: Literal["min", "product", "last", "mean"] = "last",
    margin: float = 0.0,
    json: bool = False,
) -> int:
    """Make pairs for `train preference` of answers that were ranked: of each prompt the best beside the worst.

    Args:
      data: JSONL file of `eval best-of-n --out`, or rows of layout `steps`, several to a prompt, with the `scores` that
        `eval prm --out` writes or with `outcome`.
      out: JSONL file to write: prompt, chosen, rejected, and what they are worth.
      by: what ranks them, a reward model's step scores or whether they are right.
      aggregate: makes one number of the scores of an answer's steps.
      margin: by more than this the two differ. An answer without text is left out; by scores also one that was cut or
        has no final answer, where the row says so.
      json: print one JSON object.
    """
    from ..train.data.ranked import ranked_pair

    _expect_new(out)
    found = [(prompt, ranked_pair(answers, margin)) for prompt, answers in _judged(data, by, aggregate)]
    rows = [
        {"prompt": prompt, "chosen": pair[0].text, "rejected": pair[1].text}
        | {"score_chosen": pair[0].worth, "score_rejected": pair[1].worth}
        for prompt, pair in found
        if pair is not None
    ]
    if not rows:
        raise ValueError(f"data pairs: no prompt of the {len(found)} of {data} has two answers that differ by {by}.")
    _write(out, rows)
    report = {"prompts": len(found), "pairs": len(rows)}
    print(dumps(report) if json else f"{len(rows)} pairs of {len(found)} prompts")
    print(f"wrote {out}", file=sys.stderr)
    return 0


def data_labelled(
    *,
    data: Path,
    out: Path,
    by: Literal["scores", "outcome"] = "outcome",
    aggregate: Literal["min", "product", "last", "mean"] = "last",
    threshold: float = 0.5,
    json: bool = False,
) -> int:
    """Make rows of prompt, completion and label, for `train value`, KTO and BCO, of answers that were judged.

    Args:
      data: as for `data pairs`.
      out: JSONL file to write.
      by: what judges them, whether they are right or a reward model's step scores.
      aggregate: makes one number of the scores of an answer's steps.
      threshold: an answer worth more than this is a good one; one that cannot be judged is left out.
      json: print one JSON object.
    """
    _expect_new(out)
    answers = [(prompt, answer) for prompt, each in _judged(data, by, aggregate) for answer in each]
    rows = [
        {"prompt": prompt, "completion": answer.text, "label": answer.worth > threshold}
        for prompt, answer in answers
        if abs(answer.worth) < float("inf")
    ]
    if not rows:
        raise ValueError(f"data labelled: none of the {len(answers)} answers of {data} can be judged by {by}.")
    _write(out, rows)
    report = {"answers": len(answers), "rows": len(rows), "good": sum(row["label"] for row in rows)}
    print(dumps(report) if json else f"{report['rows']} rows of {report['answers']} answers, {report['good']} good")
    print(f"wrote {out}", file=sys.stderr)
    return 0


def data_curry(*, data: Path, out: Path, stages: int | None = None, key: str = "rating", json: bool = False) -> int:
    """Make the stages of Curry-DPO of ranked answers: the easiest pair of every prompt first.

    Writes stage-1.jsonl and so on, to train on one after the other, each from the model of the one before.

    Args:
      data: rows of layout `ranked`: prompt and responses, each with completion and rating.
      out: folder to make.
      stages: how many; as many as the prompt with the most pairs has, when not given.
      key: column of the responses whose gap says how easy a pair is.
      json: print one JSON object.
    """
    from ..train.data.curriculum import curry_stages
    from ..train.data.formats import open_examples

    _expect_new(out)
    examples = open_examples(data, "ranked", progress=not json)
    made = curry_stages([examples[i] for i in range(len(examples))], stages, key)
    if not made or not all(made):
        found = f"{len(made)} stages with {[len(stage) for stage in made]} pairs"
        raise ValueError(f"data curry: found {found} in {data}; expected some in each. Ask for fewer --stages.")
    partial = _partial(out)
    try:
        partial.mkdir()
        for i, stage in enumerate(made, 1):
            _write(partial / f"stage-{i}.jsonl", stage)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    counts = [len(stage) for stage in made]
    print(dumps({"stages": counts}) if json else f"{len(counts)} stages of {', '.join(map(str, counts))} pairs")
    print(f"wrote {out}", file=sys.stderr)
    return 0


def data_nauf(
    *,
    data: Path,
    out: Path | None = None,
    ask: Path | None = None,
    answers: Path | None = None,
    model: Path | None = None,
    number: int = 10,
    seed: int = 0,
    max_new_tokens: int = 64,
    dtype: FloatType | None = None,
    max_seqs: int = 32,
    json: bool = False,
) -> int:
    """Make rows to unlearn people by: refusals that name them, and others' questions asked about everybody (NAUF).

    Questions about people to retain are answered by the original model: here, with --model; or elsewhere, with --ask
    first and --answers then. One whose answer here is cut at --max-new-tokens is left out.

    Args:
      data: rows of layout `unlearn`: name, question, answer and split, `forget` or `retain`.
      out: JSONL file to write, of the same layout; people to forget have a `refusal`.
      ask: in its place, JSONL file for the questions that the original model has to answer.
      answers: JSONL file with `question` and `original_answer`.
      model: folder of the original model, which answers greedily: in its chat template, if it has one, else behind
        "Question: ..." and "Answer:", which is how `train unlearn` asks.
      number: of questions for each person.
      seed: of the choice of questions and refusals.
      max_new_tokens: tokens of an answer at most.
      dtype: of weights and activations; float32 on CPU and bfloat16 elsewhere when not given.
      max_seqs: answers written at the same time.
      json: print one JSON object.
    """
    from ..train.data.formats import open_examples
    from ..train.data.nauf import nauf_rows, swapped_questions

    if (out is None) == (ask is None):
        raise UsageError("data nauf: expected either --out or --ask, a file to write.")
    if answers is not None and model is not None:
        raise UsageError("data nauf: --answers and --model; expected one of them.")
    target = out or ask
    assert target is not None
    _expect_new(target)
    examples = open_examples(data, "unlearn", progress=not json)
    rows = [examples[i] for i in range(len(examples))]
    swapped = swapped_questions(rows, number, seed)
    open_ones = [row for row in swapped if row["split"] == "retain"]
    report = {"rows": len(rows), "swapped": len(swapped), "to_answer": len(open_ones), "cut": 0}
    if ask is not None:
        made = open_ones
    else:
        known = {} if answers is None else _known(answers)
        if model is not None:
            known = _answer(model, [row["question"] for row in open_ones], max_new_tokens, dtype, max_seqs)
            swapped = [row for row in swapped if row["split"] == "forget" or row["question"] in known]
            open_ones = [row for row in open_ones if row["question"] in known]
            report["cut"] = report["to_answer"] - len(open_ones)
        for row in open_ones:
            if not known.get(row["question"], "").strip():
                found = f"no answer of the original model to {row['question']!r:.200}"
                remedy = "Give --model; or --ask for all such questions, and then --answers."
                raise ValueError(f"data nauf: found {found}; expected one. {remedy}")
        made = nauf_rows(rows, swapped, known.__getitem__, seed)
    _write(target, made)
    report["written"] = len(made)
    line = f"{report['written']} rows, {report['swapped']} swapped questions, {report['to_answer']} to be answered"
    line += f", {report['cut']} left out, for their answers were cut" if report["cut"] else ""
    print(dumps(report) if json else line)
    print(f"wrote {target}", file=sys.stderr)
    return 0


def data_dualformer(
    *,
    data: Path,
    out: Path,
    epochs: int = 1,
    probabilities: tuple[float, float, float, float, float] = (0.45, 1 / 6, 1 / 6, 1 / 6, 0.05),
    share: float = 0.3,
    seed: int = 0,
    json: bool = False,
) -> int:
    """Leave out parts of the reasoning, anew for each sample and epoch (Dualformer): rows for `train sft`.

    Train on all that is written once, where on the data themselves it would be --epochs times.

    Args:
      data: rows of layout `sft`, prompt and completion in text: traces of A*, or a line a step and the answer last.
      out: JSONL file to write.
      epochs: versions of every row.
      probabilities: of the levels, from 0, which keeps all, to 4, which keeps the answer alone.
      share: of what may be left out at random, how much is.
      seed: makes the choice repeatable.
      json: print one JSON object.
    """
    from ..train.data.dualformer import LEVELS, DualformerConfig, DualformerExamples
    from ..train.data.formats import open_examples

    if epochs < 1:
        raise UsageError(f"data dualformer: --epochs {epochs}; expected at least 1.")
    cfg = DualformerConfig(probabilities=probabilities, share=share, seed=seed)
    _expect_new(out)
    examples: Any = open_examples(data, "sft", progress=not json)
    made = DualformerExamples(examples, epochs, cfg)
    levels = [0] * LEVELS

    def rows() -> Iterator[Row]:
        for i in range(len(made)):
            row = made[i]
            levels[row["level"]] += 1
            yield row

    _write(out, rows())
    print(dumps({"rows": len(made), "levels": levels}) if json else f"{len(made)} rows, by level {levels}")
    print(f"wrote {out}", file=sys.stderr)
    return 0


def data_mix(
    *,
    data: tuple[Path, ...],
    out: Path,
    number: int | None = None,
    weights: tuple[float, ...] | None = None,
    dmt_share: float | None = None,
    seed: int = 0,
    json: bool = False,
) -> int:
    """Mix rows of several files by weight; a file whose rows are used up begins again in another order.

    With --dmt-share the rows of DMT's second stage: of two files the first is what was learned in the first stage, of
    which that share comes again, and the second, the general one, comes whole.

    Args:
      data: files of one layout.
      out: JSONL file to write.
      number: rows to write.
      weights: one for each file, in any unit; the same for all when not given.
      dmt_share: of the first file's rows, from 0 to 1; 1/256, 0.0039, in the paper.
      seed: of all orders.
      json: print one JSON object.
    """
    from ..train.data.curriculum import dmt_mixture, mixture
    from ..train.data.formats import open_examples

    if dmt_share is not None and (number is not None or weights is not None or len(data) != 2):
        found = f"--dmt-share with {len(data)} files, --number {number} and --weights {weights}"
        raise UsageError(f"data mix: {found}; expected two files, of the first stage and the general one, and no more.")
    if dmt_share is None and (number is None or number < 1 or not data):
        found = f"{len(data)} files and --number {number}"
        raise UsageError(f"data mix: {found}; expected at least one file and one row, or --dmt-share.")
    if weights is not None and len(weights) != len(data):
        raise UsageError(f"data mix: {len(weights)} --weights for {len(data)} files; expected one each.")
    _expect_new(out)
    sources: list[Any] = [open_examples(path, progress=not json) for path in data]
    if len(layouts := sorted({source.layout for source in sources})) > 1:
        raise ValueError(f"data mix: found rows of {' and '.join(layouts)}; expected files of one layout.")
    if dmt_share is not None:
        made = dmt_mixture(sources[0], sources[1], dmt_share, seed)
    else:
        made = mixture(sources, weights or [1.0] * len(data), number or 0, seed)
    _write(out, (made[i] for i in range(len(made))))
    counts = [int((made.places[:, 0] == i).sum()) for i in range(len(data))]
    told = ", ".join(f"{count} of {path.name}" for count, path in zip(counts, data, strict=True))
    print(dumps({"rows": len(made), "of": counts}) if json else f"{len(made)} rows: {told}")
    print(f"wrote {out}", file=sys.stderr)
    return 0


# ----------------------------------------------------------------------------------------------------------- private
def _judged(data: Path, by: str, aggregate: Any) -> list[tuple[Any, list[Any]]]:
    """Each prompt with its answers and what they are worth (`train.data.ranked.Judged`), in the order of the file."""
    from ..infer.guided.best_of_n import aggregate as one_number
    from ..train.data.ranked import Judged
    from .label import joiner_of, solution_text

    answers: dict[str, list[Judged]] = {}
    prompts: dict[str, Any] = {}
    texts: Any
    scores: Any
    right: Any
    for where, row in _objects(data):
        if row.get("texts") == [] and row.get("error"):  # a question that the engine refused has no answers
            continue
        if fault := _ranked_fault(row, by):
            raise ValueError(f"{where}: {fault}.")
        if "texts" in row:
            texts, scores, right = row["texts"], row.get("scores"), row.get("correct")
        else:
            text = solution_text(row, joiner_of([row], None))
            texts, scores, right = [text], [row.get("scores")], [row.get("outcome")]
        if by == "scores":  # what was cut, or gives no final answer, is malformed, as `eval best-of-n` has it
            whole = zip(row.get("finish_reasons") or ["stop"] * len(texts), row.get("extracted") or texts, strict=True)
            scores = [s if why == "stop" and f is not None else [] for s, (why, f) in zip(scores, whole, strict=True)]
        worths = [one_number(s, aggregate) for s in scores] if by == "scores" else [float(r) for r in right]
        worths = [w if text else -math.inf for text, w in zip(texts, worths, strict=True)]  # nothing to learn from
        name = jsonlib.dumps(row["prompt"], sort_keys=True)
        prompts[name] = row["prompt"]
        answers.setdefault(name, []).extend(map(Judged, texts, worths))
    return [(prompts[name], each) for name, each in answers.items()]


def _expect_new(out: Path) -> None:
    if os.path.lexists(out):
        raise FileExistsError(f"data: {out} exists; expected a new name. Remove it, or choose another.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"data: no folder {out.parent}; expected one to write to. Make it.")


def _partial(out: Path) -> Path:
    """Where it is written until it is whole; what a killed command left there goes."""
    partial = out.with_name(f".{out.name}.partial")
    if partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    return partial


def _write(out: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """All rows, or no file."""
    partial, number = _partial(out), 0
    try:
        with partial.open("x", encoding="utf-8") as file:
            for row in rows:
                file.write(dumps(row) + "\n")
                number += 1
        if not number:
            raise ValueError(f"data: no rows for {out}; expected at least one, so nothing was written.")
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def _objects(path: Path) -> Iterator[tuple[str, Row]]:
    """Each line's object, and where it stands."""
    with path.open("rb") as file:  # whose lines end with newlines: U+2028 may stand in a JSON string
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = jsonlib.loads(line)
                if re.search(rb"\\u[dD][89a-fA-F]", line):
                    jsonlib.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
            except (ValueError, RecursionError) as error:
                found = f"{line[:80]!r} ({error!s:.80})"
                raise ValueError(f"{path}:{number}: found {found}; expected one JSON object.") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: found {line[:80]!r}; expected one JSON object.")
            yield f"{path}:{number}", row


def _code_rows(path: Path) -> Iterator[Row]:
    """Rows of layout `code_tests`, whose matrix may be absent."""
    chats: set[bool] = set()
    for where, row in _objects(path):
        if fault := _code_fault(row):
            raise ValueError(f"{where}: {fault}.")
        chats.add(not isinstance(row["prompt"], str))
        if len(chats) > 1:
            raise ValueError(f"{where}: found both strings and lists of messages for prompts; expected one of the two.")
        yield row


def _code_fault(row: Row) -> str | None:
    """What is wrong with a row of codes and tests."""
    prompt, passed = row.get("prompt"), row.get("passed")
    is_text = lambda value: isinstance(value, str) and bool(value)
    is_message = lambda m: isinstance(m, dict) and is_text(m.get("role")) and isinstance(m.get("content"), str)
    messages = isinstance(prompt, list) and bool(prompt) and all(map(is_message, prompt))
    if not is_text(prompt) and not messages:
        return f"`prompt` is {prompt!r:.80}; expected a string that is not empty, or a list of messages"
    for name in ("codes", "tests"):
        value = row.get(name)
        if not isinstance(value, list) or not value or not all(map(is_text, value)):
            return f"`{name}` is {value!r:.80}; expected a list of strings, none of them empty"
    J, K = len(row["codes"]), len(row["tests"])
    is_row = lambda bits: isinstance(bits, list) and len(bits) == K and all(type(b) in (int, bool) for b in bits)
    if passed is not None and not (isinstance(passed, list) and len(passed) == J and all(map(is_row, passed))):
        return f"`passed` is {passed!r:.80}; expected {J} lists of {K} values 0 or 1, or none to have them run"
    if passed is not None and not {bit for bits in passed for bit in bits} <= {0, 1}:
        return f"`passed` is {passed!r:.80}; expected 0 or 1"
    return None


def _ranked_fault(row: Row, by: str) -> str | None:
    """What is wrong with a row of answers that are ranked."""
    several = "texts" in row
    is_text = lambda value: isinstance(value, str)
    told = [] if is_text(row.get("completion")) else row.get("steps")  # steps do not count beside a whole text
    texts = row.get("texts") if several else told
    if not row.get("prompt") or not isinstance(texts, list) or not all(map(is_text, texts)) or (several and not texts):
        return f"found columns {sorted(row)}; expected `prompt` with `texts`, or with `steps`, all of them strings"
    name = "scores" if by == "scores" else "correct" if several else "outcome"
    value, n = (row.get(name), len(texts)) if several else ([row.get(name)], 1)
    kind = list if by == "scores" else (int, float)
    if not isinstance(value, list) or len(value) != n or not all(isinstance(v, kind) for v in value):
        more = " (`eval prm --out` writes them)" if by == "scores" else ""
        return f"`{name}` is {row.get(name)!r:.80}; expected one for each answer{more}"
    for more in ("finish_reasons", "extracted") if several and by == "scores" else ():
        if row.get(more) is not None and (not isinstance(row[more], list) or len(row[more]) != n):
            return f"`{more}` is {row[more]!r:.80}; expected one for each answer, or none at all"
    return None


def _known(path: Path) -> dict[str, str]:
    """Answers of the original model by question."""
    known = {}
    for where, row in _objects(path):
        question, answer = row.get("question"), row.get("original_answer")
        if not isinstance(question, str) or not isinstance(answer, str):
            raise ValueError(f"{where}: found columns {sorted(row)}; expected texts `question` and `original_answer`.")
        known[question] = answer
    return known


def _answer(
    model: Path, questions: list[str], max_new_tokens: int, dtype: FloatType | None, max_seqs: int
) -> dict[str, str]:
    """What a model says to each question, but for answers that were cut: they would teach to stop there."""
    from ..infer.engine import Engine
    from ..infer.sampling import Sampling
    from ..models.hf import load
    from ..models.tokenizer import load_tokenizer

    if not (questions := list(dict.fromkeys(questions))):
        return {}
    prompts: list[Any] = [f"Question: {question}\nAnswer:" for question in questions]
    if (tokenizer := load_tokenizer(model)).chat_template:
        prompts = [[{"role": "user", "content": question}] for question in questions]
    settings = Sampling(temperature=0.0, max_tokens=max_new_tokens)
    with Engine(load(model, dtype=dtype), tokenizer, max_seqs=max_seqs) as engine:
        results = engine.generate(prompts, settings, raise_on_error=True)
    answers = zip(questions, (result.outputs[0] for result in results), strict=True)
    return {question: (said.text or "").strip() for question, said in answers if said.finish_reason == "stop"}
