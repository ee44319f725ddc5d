"""What speculation is worth: the same model, prompts and process, decoding plainly and drafting in turns.

Questions come in Spec-Bench's format, one JSON object a line: `question_id`, `category`, `turns` (a later turn sees the
answers before it). Tokens are counted as the engine emits them on both sides; rates are of the decode loop alone: the
first token of an answer comes with its prefill, which is reported apart. The first pass over the questions compiles and
is not counted.

tau is tokens emitted a verifying pass; what a step emits beyond its one token was drafted. `accepted[d]` is the share
of steps whose draft was right down to depth d, `ctar[w]` that of steps that emitted more than w tokens (Kangaroo).
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ...models.decoder import Model, unstack_layers
from ...models.tokenizer import Tokenizer
from .. import decode as plain
from ..engine import Engine
from ..sampling import Sampling, pack_sampling
from . import loop
from .loop import Speculation, Weights


class Question(NamedTuple):
    """A conversation whose answers are to be written."""

    id: str
    category: str
    turns: list[str]


def read_questions(path: Path) -> list[Question]:
    """Read Spec-Bench's `question.jsonl`, or lines with a `prompt`.

    Raises:
      ValueError: naming file and line.
    """
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            turns = row["turns"] if "turns" in row else [row["prompt"]]
            if not turns or not all(isinstance(turn, str) for turn in turns):
                raise TypeError
            questions.append(Question(str(row.get("question_id", number)), str(row.get("category", "")), turns))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'{path}:{number}: found {line[:80]!r}; expected {{"question_id": ..., "category": ..., '
                '"turns": [...]} or {"prompt": text}.'
            ) from None
    if not questions:
        raise ValueError(f"{path}: no questions; expected one JSON object a line.")
    return questions


class Pass(NamedTuple):
    """One way through all questions."""

    answers: list[list[int]]  # tokens of every turn, question after question
    tokens: list[int]  # of each group of questions, those that came with a prefill aside
    seconds: list[float]  # of its decode loop
    prefill: float
    emitted: np.ndarray  # [groups, D + 2] steps that emitted so many
    drafted: int
    prompt_tokens: int


def measure(
    model: Model,
    tokenizer: Tokenizer,
    speculation: Speculation,
    questions: Sequence[Question],
    *,
    sampling: Sampling,
    batch: int = 1,
    repeats: int = 3,
    parts: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Decode all questions plainly and with a drafter, in turns.

    Args:
      model: the target.
      tokenizer: its own.
      speculation: drafter and rule.
      questions: what to answer.
      sampling: of both sides, with a seed.
      batch: questions answered at the same time.
      repeats: counted passes of each side.
      parts: time drafts, judgement and commits one by one too, which predicts the ratio and compiles each; without
        them these fields are null.
      progress: called after each pass.

    Returns:
      A document for JSON; `docs/speculative.md` explains its fields.

    Raises:
      ValueError: if all answers end with their first token, for then no loop decodes.
    """
    model = Model(model.config, unstack_layers(model.params))
    passes: dict[str, list[Pass]] = {"plain": [], "speculative": []}
    make = lambda spec: Engine(model, tokenizer, max_seqs=batch, speculation=spec, speculate="on")
    with make(None) as before, make(speculation) as after:
        engines = {"plain": before, "speculative": after}
        for turn in range(repeats + 1):
            for name, engine in engines.items():
                passes[name].append(_run(engine, questions, sampling, batch))
            progress(turn + 1, repeats + 1)
    counted = {name: all_[1:] for name, all_ in passes.items()}
    first = [tokenizer.encode(q.turns[0]) for q in questions[:batch]]
    spent = time_parts(model, speculation, first, sampling) if parts else None
    return _report(model, speculation, questions, sampling, batch, counted, spent)


def time_parts(
    model: Model,
    speculation: Speculation,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    steps: int = 32,
    capacity: int | None = None,
) -> dict[str, float]:
    """Seconds of a plain step, and of drafting, judging and committing, each a call that is waited for.

    Medians over steps that all rows were running in.

    Args:
      model: the target.
      speculation: drafter and rule.
      prompts: token ids of each row.
      sampling: of all rows.
      steps: to take, fewer if rows end.
      capacity: slots of the caches, for a step reads them all; as few as will do when not given.
    """
    cfg, drafter, verifier = model.config, speculation.drafter, speculation.verifier
    weights = Weights(model.params, speculation.drafter_params, speculation.verifier_params)
    longest = max(map(len, prompts))
    room = steps * (drafter.depth + 2) if capacity is None else capacity - longest - drafter.nodes
    capacity = capacity or -(-(longest + room + drafter.nodes) // 64) * 64
    tokens = np.zeros((len(prompts), capacity), np.int32)
    for row, text in enumerate(prompts):
        tokens[row, : len(text)] = text
    length = np.array([len(text) for text in prompts], np.int32)
    rows = plain.Rows(
        pack_sampling([(sampling, sampling.seed or 0, 0)] * len(prompts), 0, cfg.vocab_size),
        length,  # type: ignore[arg-type]
        length + np.int32(room),  # type: ignore[arg-type]
        np.full((len(prompts), 1), -1, np.int32),  # type: ignore[arg-type]
    )
    no_halt, one = np.zeros(len(prompts), bool), np.int32(1)
    draft = jax.jit(  # caches are written in place, as they are in the loop
        lambda w, cache, d, s, r: loop.draft(w, drafter, s._replace(drafter=d, rows=s.rows._replace(cache=cache)), r),
        donate_argnums=(1, 2),
    )
    judge = jax.jit(lambda w, s, r, tree: loop.judge(cfg, w, drafter, verifier, s, r, tree, "raw"), donate_argnums=1)
    commit = jax.jit(  # what it reads of the judged, but for their rows, nothing can be written over
        lambda w, d, t, s, j, r: loop.commit(w, drafter, d, t, j._replace(rows=s), r), donate_argnums=(1, 2, 3)
    )
    spent: dict[str, list[float]] = {"plain": [], "draft": [], "verify": [], "commit": []}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        out = jax.block_until_ready(call())
        spent[name].append(time.perf_counter() - start)
        return out

    ordinary: Any = plain.prefill(cfg, model.params, tokens, rows, chunk=64)
    state: Any = loop.prefill(cfg, weights, drafter, tokens, rows, chunk=64)
    for _ in range(steps):
        ordinary = timed("plain", lambda s=ordinary: plain.decode(cfg, model.params, s, rows, no_halt, one))
        if not bool(np.all(np.asarray(state.rows.status) == plain.RUNNING)):
            break
        cache, drafting = state.rows.cache, state.drafter
        rest = state._replace(drafter=None, rows=state.rows._replace(cache=None))
        tree, drafting, cache = timed("draft", lambda c=cache, d=drafting, s=rest: draft(weights, c, d, s, rows))
        base = state.rows._replace(cache=cache)
        judged = timed("verify", lambda b=base, t=tree: judge(weights, b, rows, t))
        told = judged._replace(rows=None)
        state = timed(
            "commit", lambda d=drafting, t=state.tally, s=judged.rows, j=told: commit(weights, d, t, s, j, rows)
        )
    return {name: statistics.median(all_[2:] or all_) for name, all_ in spent.items()}  # the first ones compiled


def markdown(report: dict[str, Any]) -> str:
    """The figures that matter, as a table."""
    head = ("drafter", "rule", "lossless", "T", "batch", "tau", "tokens/s plain", "tokens/s", "ratio")
    head += ("predicted", "same text")
    r = report
    row = (
        r["drafter"],
        r["verifier"],
        "yes" if r["lossless"] else "no",
        f"{r['temperature']:g}",
        r["batch"],
        f"{r['tau']:.2f}",
        f"{r['plain']['tokens_per_second']:.1f}",
        f"{r['speculative']['tokens_per_second']:.1f}",
        f"{r['speedup']:.2f}",
        "-" if r["predicted_speedup"] is None else f"{r['predicted_speedup']:.2f}",
        f"{r['identical']:.0%}",
    )
    line = lambda cells: "| " + " | ".join(map(str, cells)) + " |"
    return "\n".join([line(head), line(["---"] * len(head)), line(row)]) + "\n"


def plot_acceptance(path: Path, report: dict[str, Any]) -> None:
    """How deep drafts were right, and how many tokens steps emitted."""
    from matplotlib.figure import Figure  # not pyplot: that keeps a global state, and wants a display

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    accepted = report["accepted"]
    left.bar(range(1, len(accepted) + 1), accepted, color="tab:blue")
    left.set(xlabel="depth", ylabel="share of steps accepted to there", ylim=(0, 1), title=report["drafter"])
    emitted = report["emitted"]
    right.bar(range(len(emitted)), emitted, color="tab:gray")
    right.set(xlabel="tokens emitted", ylabel="steps", title=f"tau {report['tau']:.2f}")
    figure.savefig(path, dpi=120)


# ----------------------------------------------------------------------------------------------------------- private
def _run(engine: Engine, questions: Sequence[Question], sampling: Sampling, batch: int) -> Pass:
    answers, tokens, seconds, emitted = [], [], [], []
    start = engine.stats()
    for first in range(0, len(questions), batch):
        group = questions[first : first + batch]
        history: list[list[dict[str, str]]] = [[] for _ in group]
        stats, counts, begun = engine.stats(), np.array(engine.emitted_per_step()), len(answers)
        for turn in range(max(len(q.turns) for q in group)):
            asked = [i for i, q in enumerate(group) if turn < len(q.turns)]
            for i in asked:
                history[i].append({"role": "user", "content": group[i].turns[turn]})
            prompts = [_prompt(engine.tokenizer, history[i]) for i in asked]
            for i, result in zip(asked, engine.generate(prompts, sampling, raise_on_error=True), strict=True):
                answers.append(result.outputs[0].token_ids)
                history[i].append({"role": "assistant", "content": result.outputs[0].text or ""})
        now = engine.stats()
        tokens.append(sum(len(answer) - 1 for answer in answers[begun:]))
        seconds.append(now["decode_seconds"] - stats["decode_seconds"])
        emitted.append(np.array(engine.emitted_per_step()) - counts)
    end = engine.stats()
    took = lambda name: end[name] - start[name]
    return Pass(
        answers,
        tokens,
        seconds,
        took("prefill_seconds"),
        np.array(emitted),
        int(took("drafted_tokens")),
        int(took("prompt_tokens")),
    )


def _prompt(tokenizer: Tokenizer | None, history: list[dict[str, str]]) -> Any:
    """The conversation by the model's chat template; without one, its texts, a line each."""
    if tokenizer is not None and tokenizer.chat_template is not None:
        return history
    return "".join(message["content"] + "\n" for message in history)


def _report(
    model: Model, spec: Speculation, questions, sampling: Sampling, batch: int, counted, parts
) -> dict[str, Any]:
    drafter, first = spec.drafter, counted["speculative"][0]
    emitted = np.sum([p.emitted.sum(0) for p in counted["speculative"]], axis=0)
    sizes = np.arange(drafter.depth + 2)
    steps, wrote = int(emitted.sum()), int(emitted @ sizes)
    drafted = sum(p.drafted for p in counted["speculative"])
    per_group = [float(e @ sizes / max(e.sum(), 1)) for e in first.emitted]
    if any(sum(p.tokens) == 0 for all_ in counted.values() for p in all_):
        raise ValueError(
            "measure: every answer ended with its first token, which comes with the prefill; expected answers that go "
            "on. Allow more tokens, or ask other questions."
        )
    rate = {name: [sum(p.tokens) / sum(p.seconds) for p in all_] for name, all_ in counted.items()}
    middle = {name: statistics.median(values) for name, values in rate.items()}
    # ratio of means over questions, as Spec-Bench computes it, beside the ratio of totals
    each = lambda p: [tokens / seconds for tokens, seconds in zip(p.tokens, p.seconds, strict=True) if tokens]
    means = {name: np.mean([rate for p in all_ for rate in each(p)]) for name, all_ in counted.items()}
    same = [a == b for a, b in zip(counted["plain"][0].answers, first.answers, strict=True)]
    tau = wrote / max(steps, 1)
    predicted = parts and tau * parts["plain"] / (parts["draft"] + parts["verify"] + parts["commit"])
    extra = jax.tree.leaves(spec.drafter_params)
    side = lambda name: {
        "tokens_per_second": middle[name],
        "all": rate[name],
        "prefill_seconds": statistics.median(p.prefill for p in counted[name]),
        "tokens": sum(map(len, counted[name][0].answers)),
    }
    return {
        "drafter": drafter.name,
        "verifier": spec.verifier.name,
        "lossless": spec.verifier.lossless,
        "temperature": sampling.temperature,
        "batch": batch,
        "dtype": model.config.dtype,
        "questions": len(questions),
        "categories": sorted({q.category for q in questions}),
        "nodes": drafter.nodes,
        "depth": drafter.depth,
        "prompt_tokens": first.prompt_tokens,
        "target_parameters": sum(w.size for w in jax.tree.leaves(model.params)),
        "extra_parameters": sum(w.size for w in extra),
        "extra_bytes": sum(w.nbytes for w in extra),
        "tau": tau,
        "tau_mean_of_groups": float(np.mean(per_group)),
        "tau_by_category": _by_category(questions, first, batch, sizes),
        "emitted": emitted.tolist(),
        "accepted": [float(emitted[d + 1 :].sum() / max(steps, 1)) for d in range(1, drafter.depth + 1)],
        "ctar": [float(emitted[w + 1 :].sum() / max(steps, 1)) for w in range(1, 7)],
        "drafted_per_step": drafted / max(steps, 1),
        "wasted_per_step": (drafted - (wrote - steps)) / max(steps, 1),
        "plain": side("plain"),
        "speculative": side("speculative"),
        "speedup": middle["speculative"] / middle["plain"],
        "speedup_of_means": float(means["speculative"] / means["plain"]),
        "identical": float(np.mean(same)),
        "seconds": parts,
        "verify_over_plain": parts and parts["verify"] / parts["plain"],
        "predicted_speedup": predicted,
    }


def _by_category(questions, run: Pass, batch: int, sizes: np.ndarray) -> dict[str, float]:
    """tau of each category; empty unless questions were answered one by one."""
    if batch > 1:
        return {}
    names = [q.category for q in questions]
    totals = {name: run.emitted[np.array(names) == name].sum(0) for name in names}
    return {name: float(total @ sizes / max(total.sum(), 1)) for name, total in totals.items()}
