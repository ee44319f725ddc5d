"""`jaxaroo train ranked` and `train value-rounds`: generation and training by turns."""

import contextlib
import dataclasses
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import tyro

from .output import UsageError

SUMMARIES = {
    "ranked": "Fine-tune a policy on the best of its own answers, in rounds.",
    "value-rounds": "Train a value model on answers that it guides itself, in rounds.",
}
REWARDS = {"rl": ("outcome", "truthrl", "critique"), "ranked": ("outcome",)}  # that have names
Row = dict[str, Any]


def rounds_command(kind: str) -> Callable[..., int]:
    """The command with all its settings; made when needed, since it imports JAX.

    Args:
      kind: a key of `SUMMARIES`.
    """
    from ..train.config import build
    from ..train.rounds import RankedOptions, RoundsConfig, ValueRoundsOptions

    of_kind: Any = {"ranked": RankedOptions, "value-rounds": ValueRoundsOptions}[kind]
    usual = {} if kind == "ranked" else {"samples": 4}
    default = build(RoundsConfig, dict.fromkeys(("model", "data", "out"), tyro.MISSING) | usual)

    def command(
        *,
        settings: Annotated[RoundsConfig, tyro.conf.arg(name="")] = default,
        options: Annotated[of_kind, tyro.conf.arg(name="")] = of_kind(),  # type: ignore[valid-type]
    ) -> int:
        """Train.

        Args:
          settings: of the rounds.
          options: of this kind of rounds.
        """
        return _go(kind, settings, options)

    command.__doc__ = (command.__doc__ or "").replace("Train.", SUMMARIES[kind], 1)
    return command


def train_ranked() -> int:
    """Fine-tune a policy on the best of its own answers, in rounds."""
    raise AssertionError("`main` puts what `rounds_command` makes in this place")


def train_value_rounds() -> int:
    """Train a value model on answers that it guides itself, in rounds."""
    raise AssertionError("`main` puts what `rounds_command` makes in this place")


def read_problems(data: str, arithmetic: Any, split: Any = "train") -> tuple[int | None, Callable[[int], Row]]:
    """How many problems there are, None for no end, and how to read one: a row of id, prompt and, if known, answer.

    Args:
      data: a file, or builtin:arithmetic.
      arithmetic: how hard the embedded task's problems are.
      split: of these.
    """
    if data == "builtin:arithmetic":
        from ..train.data.arithmetic import make_problem

        def made(i: int) -> Row:
            problem = make_problem(arithmetic, split, i)
            return {"id": str(i), "prompt": f"{problem.question}\n", "answer": str(problem.answer)}

        return None, made
    from ..train.data.formats import open_examples

    examples = open_examples(Path(data), "auto", progress=True)

    def read(i: int) -> Row:
        row = examples[i]
        if "prompt" not in row or not isinstance(row.get("answer", ""), str):
            raise ValueError(f"{examples.where(i)}: columns {sorted(row)}; expected a `prompt`, and `answer` in text.")
        return {"id": str(i), "prompt": row["prompt"]} | ({"answer": row["answer"]} if "answer" in row else {})

    return len(examples), read


def need_answers(data: str | None, rows: Sequence[Row]) -> None:
    """Refuse problems whose right answer is not known, or says nothing: no answer would ever be right."""
    from ..infer.evaluate import known_answer

    for i, row in enumerate(rows):
        if "answer" not in row:
            raise ValueError(f"train: row {i} of {data} has no `answer`; expected one in every row.")
        if known_answer(row["answer"]) is None:
            raise ValueError(
                f"train: row {i} of {data} has the `answer` {row['answer']!r:.60}; expected a number or words in every "
                "row. Correct it, or leave the row out."
            )


def need_reward(kind: str, name: str) -> None:
    """Refuse a reward that is neither known by its name nor the folder of a reward model.

    Args:
      kind: a key of `REWARDS`.
      name: of the reward.
    """
    from ..models.reward import is_reward_model

    if name not in REWARDS[kind] and not is_reward_model(name):
        wanted = ", ".join(REWARDS[kind])
        raise ValueError(f"train {kind}: {name} is no reward model; expected the folder of one, or {wanted}.")


def answered(problem: Row, texts: Sequence[str], reasons: Sequence[str]) -> Row:
    """A problem with its answers: which are whole, and which are right, None if nobody knows.

    An answer that was cut or has no final answer is malformed; it is not right, whatever its last line says.
    """
    from ..infer.evaluate import final_answer, known_answer, same_answer

    finals = [final_answer(text) for text in texts]
    whole = [final is not None and why == "stop" for final, why in zip(finals, reasons, strict=True)]
    outcomes: list[int | None] = [None] * len(texts)
    if "answer" in problem:
        gold = known_answer(problem["answer"])
        outcomes = [int(ok and same_answer(final, gold)) for ok, final in zip(whole, finals, strict=True)]
    return {**problem, "texts": list(texts), "whole": whole, "outcomes": outcomes}


def score_answers(
    model: Any, tokenizer: Any, rows: Sequence[Row], how: Any, *, batch: int, progress: bool = False
) -> list[list[float | None]]:
    """What a reward model makes of each answer: -inf of a malformed one, None of one that is too long for it.

    Args:
      model: the reward model.
      tokenizer: its own.
      rows: problems with `texts` and `whole`.
      how: one reward is made of the scores of an answer's steps.
      batch: answers scored at a time.
      progress: show a bar.
    """
    from ..infer.guided.best_of_n import aggregate
    from ..infer.step_scores import Solution, score_solutions
    from ..models.reward import render_steps
    from ..train.data.steps import split_steps

    most = model.config.target.max_positions
    steps = lambda text, whole: [text[a:b] for a, b in split_steps(text)] if whole else []
    solutions = [
        Solution(row["prompt"], steps(*pair)) for row in rows for pair in zip(row["texts"], row["whole"], strict=True)
    ]
    fits = [len(render_steps(tokenizer, s.prompt, s.steps, model.config.text)[0]) <= most for s in solutions]
    asked = [*itertools.compress(solutions, fits)]
    scores = iter(score_solutions(model, tokenizer, asked, batch=batch, progress=progress))
    worth = iter([aggregate(next(scores), how) if ok else None for ok in fits])
    return [[next(worth) for _ in row["texts"]] for row in rows]


def brier(model: Any, tokenizer: Any, rows: Sequence[Row], batch: int = 32) -> float | None:
    """Mean of (V - return)^2 over all tokens of answers, their ends included; None if no answer says anything.

    Args:
      model: the value model.
      tokenizer: its own.
      rows: problems with `texts` and `outcomes`.
      batch: answers in one forward pass.
    """
    import numpy as np

    from ..infer.step_scores import SHORTEST, score
    from ..train.data.tokenise import encode_labelled
    from ..train.rounds import trajectories

    answers = trajectories([{**row, "rewards": row["outcomes"]} for row in rows])
    if not (encoded := [encode_labelled(tokenizer, answer) for answer in answers]):
        return None
    size = max(SHORTEST, 1 << (max(len(e.ids) for e in encoded) - 1).bit_length())
    errors = []
    for part in (encoded[i : i + batch] for i in range(0, len(encoded), batch)):
        tokens = np.zeros((batch, size), np.int32)
        for row, e in enumerate(part):
            tokens[row, : len(e.ids)] = e.ids
        every = np.broadcast_to(np.arange(size, dtype=np.int32)[None], tokens.shape)
        values = np.asarray(score(model.config, model.params, tokens, every), np.float64)
        for row, e in enumerate(part):
            assert e.labels is not None
            at = np.flatnonzero(e.scored)
            errors.append((values[row, at] - e.labels[at]) ** 2)
    return float(np.concatenate(errors).mean())


# ----------------------------------------------------------------------------------------------------------- private
def _go(kind: str, settings: Any, options: Any) -> int:
    """Check what can be checked before anything is asked; then all rounds."""
    import jax

    from ..train.rounds import open_rounds, run_rounds

    absolute = lambda name: name if name is None or name.startswith("builtin:") else str(Path(name).absolute())
    settings = dataclasses.replace(
        settings,
        model=settings.model.absolute(),
        data=absolute(settings.data),
        test=absolute(settings.test),
        dtype=settings.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"),
    )
    if kind == "ranked" and options.reward != "outcome":
        options = dataclasses.replace(options, reward=absolute(options.reward))
    loop = (_ranked if kind == "ranked" else _value_rounds)(settings, options)
    open_rounds(kind, settings, options)  # type: ignore[arg-type]
    with _stoppable() as status:
        try:
            stand = run_rounds(settings.out, settings.rounds, loop, told=_print_report, progress=True)
        except KeyboardInterrupt:
            print(f"\nstopped; {_go_on(kind, settings)}", file=sys.stderr)
            return status()
    if stand.finished:
        print(f"wrote {settings.out / 'model'} and {settings.out / 'report.json'}", file=sys.stderr)
        return 0
    run: Any = stand.outcome
    where = f"round {len(stand.reports) + 1}, step {run.step}"
    print(f"stopped in {where}; {_go_on(kind, settings)}", file=sys.stderr)
    return 128 + (run.signal or signal.SIGTERM)


def _ranked(settings: Any, options: Any) -> Any:
    """What each round of reward-ranked fine-tuning does."""
    from ..infer.engine import Engine
    from ..models import hf
    from ..models.tokenizer import load_tokenizer
    from ..train.rounds import Loop, select

    _check_model(settings)
    need_reward("ranked", options.reward)
    problems, tests = _problems(settings, options.reward == "outcome"), _tests(settings)

    def serve(before: Path | None) -> Engine:
        model = before or settings.model
        return Engine(hf.load(model, dtype=settings.dtype), load_tokenizer(model), max_seqs=settings.max_seqs)

    def sample(number: int, before: Path | None, rows: Sequence[Row], done: int) -> Iterator[list[Row]]:
        return _ask(settings, partial(serve, before), rows, number, done)

    def measure(number: int, model: Path) -> dict[str, Any]:
        if not tests:
            return {}
        waves = _ask(settings, partial(serve, model), tests, number, samples=1, temperature=0.0)
        rows = [row for wave in waves for row in wave]
        return {"greedy_accuracy_on_test": _share_right(rows)}

    return Loop(
        problems,
        sample,
        partial(_reward, settings, options),
        partial(select, how=options.keep, threshold=options.threshold),
        partial(_learn, "sft", settings, None),
        measure,
    )


def _value_rounds(settings: Any, options: Any) -> Any:
    """What each round of a value model does."""
    from ..infer.engine import Engine
    from ..infer.guided.value_guided import ivo
    from ..models import hf, reward
    from ..models.tokenizer import load_tokenizer
    from ..train.recipe import Origin, RewardOptions, reward_config
    from ..train.rounds import Loop, trajectories

    config, tokenizer = _check_model(settings), load_tokenizer(settings.model)
    head = RewardOptions(separator=options.separator, inner=options.inner)
    reward_config(Origin(config, tokenizer, settings.model), head)  # refuses, before anything is asked
    if options.width > config.vocab_size:
        raise UsageError(f"train value-rounds: --width {options.width}; expected at most {config.vocab_size} tokens.")
    problems, tests = _problems(settings, True), _tests(settings)

    def serve(value: Path | None) -> Engine:
        policy = hf.load(settings.model, dtype=settings.dtype)
        guide = None
        if value is not None:
            guide = ivo(reward.load(value, dtype=settings.dtype), beta=options.beta, width=options.width)
        return Engine(policy, tokenizer, max_seqs=settings.max_seqs, guidance=guide)

    def sample(number: int, before: Path | None, rows: Sequence[Row], done: int) -> Iterator[list[Row]]:
        return _ask(settings, partial(serve, before), rows, number, done)

    def returns(rows: Sequence[Row]) -> list[list[float]]:
        return [[float(outcome) for outcome in row["outcomes"]] for row in rows]

    def measure(number: int, model: Path) -> dict[str, Any]:
        if not tests:
            return {}
        rows = [row for wave in _ask(settings, partial(serve, model), tests, number, samples=1) for row in wave]
        error = brier(reward.load(model, dtype=settings.dtype), tokenizer, rows)
        return {"guided_accuracy_on_test": _share_right(rows), "brier_on_test": error}

    return Loop(problems, sample, returns, trajectories, partial(_learn, "value", settings, head), measure)


def _check_model(settings: Any) -> Any:
    """The policy's configuration; a round that cannot be learned had better not be asked."""
    from ..models import hf

    config = hf.read_config(settings.model)
    if settings.batch.max_length > config.max_positions:
        raise ValueError(
            f"train: max_length={settings.batch.max_length}; expected at most the model's {config.max_positions} "
            "positions. Lower --batch.max-length."
        )
    return config


def _problems(settings: Any, with_answers: bool) -> Callable[[int], list[Row]]:
    """Those of a round: each goes on where the one before it ended, behind the last row of a file with the first."""
    size, read = read_problems(settings.data, settings.arithmetic)
    if size is not None and with_answers:
        need_answers(settings.data, [read(i) for i in range(size)])
    number = settings.problems if size is None else min(settings.problems, size)  # never the same twice in a round

    def of_round(at: int) -> list[Row]:
        first = settings.first + (at - 1) * number
        return [read(i if size is None else i % size) for i in range(first, first + number)]

    return of_round


def _tests(settings: Any) -> list[Row]:
    if settings.test is None and settings.data != "builtin:arithmetic":
        return []
    size, read = read_problems(settings.test or settings.data, settings.arithmetic, "test")
    number = settings.tested if size is None else min(settings.tested, size)
    rows = [read(i) for i in range(number)]
    need_answers(settings.test or settings.data, rows)
    return rows


def _ask(
    settings: Any,
    serve: Callable[[], Any],
    problems: Sequence[Row],
    number: int,
    done: int = 0,
    *,
    samples: int | None = None,
    temperature: float | None = None,
) -> Iterator[list[Row]]:
    """Problems behind the first `done` with their answers, a wave at a time; the engine lives as long as this does."""
    from ..infer.sampling import Sampling
    from ..train.labels.monte_carlo import step_seed

    n = settings.samples if samples is None else samples
    ask: Any = dict(n=n, max_tokens=settings.max_new_tokens)
    ask["temperature"] = settings.temperature if temperature is None else temperature
    wave = max(1, 16 * settings.max_seqs // n)
    with serve() as engine:
        for start in range(done - done % wave, len(problems), wave):  # waves are the same after a stop, but for one
            part = problems[max(start, done) : start + wave]
            each = [Sampling(**ask, seed=step_seed(settings.seed, row["id"], number)) for row in part]
            results = engine.generate([row["prompt"] for row in part], each, raise_on_error=True)
            yield [
                answered(row, [o.text or "" for o in result.outputs], [o.finish_reason for o in result.outputs])
                for row, result in zip(part, results, strict=True)
            ]


def _share_right(rows: Sequence[Row]) -> float:
    outcomes = [outcome for row in rows for outcome in row["outcomes"]]
    return sum(outcomes) / len(outcomes)


def _reward(settings: Any, options: Any, rows: Sequence[Row]) -> list[list[float | None]]:
    """What each answer is worth, right or not or by a reward model; None if it is malformed or too long for that."""
    if options.reward == "outcome":
        each = [zip(row["whole"], row["outcomes"], strict=True) for row in rows]
        return [[float(right) if whole else None for whole, right in pairs] for pairs in each]
    from ..models.reward import load
    from ..models.tokenizer import load_tokenizer

    model, tokenizer = load(options.reward, dtype=settings.dtype), load_tokenizer(Path(options.reward))
    return score_answers(model, tokenizer, rows, options.aggregate, batch=options.score_batch, progress=True)


def _learn(kind: str, settings: Any, options: Any, number: int, before: Path | None, data: Path, out: Path) -> Any:
    from ..train.rounds import learn
    from ..train.run import RunConfig

    begin = settings.model if before is None or settings.start_from == "base" else before
    shared = ("steps", "dtype", "log_every", "batch", "optimizer", "checkpoint")
    same = {name: getattr(settings, name) for name in shared}
    cfg = RunConfig(model=str(begin), data=str(data), out=out, seed=settings.seed + number, **same)
    return learn(kind, cfg, options, progress=True)


def _print_report(report: Row) -> None:
    """A line of the table; above the first its head."""
    show = lambda x: "-" if x is None else f"{x:.4f}" if isinstance(x, float) else str(x)
    columns = {name.replace("_", " "): show(value) for name, value in report.items()}
    if report["round"] == 1:
        print("  ".join(columns))
    print("  ".join(value.rjust(len(name)) for name, value in columns.items()), flush=True)


def _go_on(kind: str, settings: Any) -> str:
    return f"go on with the same command, jaxaroo train {kind} ... --out {settings.out}"


@contextlib.contextmanager
def _stoppable() -> Iterator[Callable[[], int]]:
    """SIGTERM ends what Ctrl-C ends; gives the exit status. While a run trains, it looks after both itself."""
    got = [signal.SIGINT]

    def ask(number: int, frame: FrameType | None) -> None:
        got.append(signal.Signals(number))
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
        yield lambda: 128 + got[-1]
        return
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield lambda: 128 + got[-1]
    finally:
        signal.signal(signal.SIGTERM, before)
