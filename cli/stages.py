"""The stages of `jaxaroo quickstart`: each a few commands that anybody could type, and what they leave behind.

A command is done when `stages.jsonl` says so; what was stopped begins again with the command that was under way, which
itself goes on where it was. What it prints is kept there too, and read by `report.py`.
"""

import contextlib
import dataclasses
import io
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .output import cut_half_line

TASK = {"level": 1, "hi": 12}  # of the embedded problems: easy, so that two minutes show something


class Stage(NamedTuple):
    """A part of the story."""

    name: str
    title: str
    commands: tuple[tuple[str, ...], ...]  # arguments of `jaxaroo`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is made: enough to see each method work, or (`SMOKE`) as little as can be."""

    policy: int = 700  # updates of the policy
    strong: int = 1600  # of a stronger model, which judges and serves
    problems: int = 200  # that are solved, to learn which steps are right
    samples: int = 4
    completions: int = 4  # of each step
    head: int = 400  # updates of reward models
    value: int = 300  # of a value model
    asked: int = 200  # test questions
    chosen: int = 200  # test questions with eight answers each
    asked_bits: int = 100  # at each width
    drafted: int = 20  # with each drafter
    round_problems: int = 300
    ranked: int = 200  # updates of the round
    pairs: int = 60  # updates of DPO
    margin: float = 0.5  # by which the worth of the answers of a pair differs
    qat: int = 120
    widths: str = "8,6,4,2"  # in bits, learned together
    drafter: int = 300
    threshold: float = 0.0  # above which an answer's reward makes it worth learning


SMOKE = Sizes(  # eight answers at once wherever some are written, so that all commands share their programs
    policy=30,
    strong=30,
    problems=4,
    samples=2,
    completions=1,
    head=2,
    value=2,
    asked=8,
    chosen=1,
    asked_bits=8,
    drafted=4,
    round_problems=1,
    ranked=2,
    pairs=2,
    margin=0.0,
    qat=2,
    widths="8,2",
    drafter=2,
    threshold=-1.0,  # a policy of so few updates is right by luck alone
)


def stages(out: Path, n: Sizes) -> tuple[Stage, ...]:
    """All of them, in their order: each uses what those before it have left in `out`."""
    at = lambda *names: str(out.joinpath(*names))
    task = (
        "--data",
        "builtin:arithmetic",
        "--arithmetic.level",
        str(TASK["level"]),
        "--arithmetic.hi",
        str(TASK["hi"]),
    )
    tests = tuple(word.replace("arithmetic.", "arithmetic-") for word in task)
    rows = ("--batch.size", "16", "--batch.max-length", "128", "--batch.no-packing", "--checkpoint.every", "100000")
    updates = lambda steps, rate: (
        *("--steps", str(steps), "--optimizer.learning-rate", rate, "--optimizer.warmup-steps", str(min(20, steps))),
        "--or-resume",
    )
    sft = ("train", "sft", "--model", "preset:tiny", *task, *rows)
    short = ("--max-new-tokens", "64")
    policy, strong = at("policy", "model"), at("strong", "model")
    ask = ("eval", "answers", *tests, *short, "--limit", str(n.asked), "--json", "--model")
    solve = ("--samples", str(n.samples), "--limit", str(n.problems), *short)
    label = ("label", "steps", "--data", at("solutions.jsonl"), "--n", str(n.completions), *short)
    head = (*rows, "--surprisal", "--train", "head", "--separator", "\n", "--between", "", *updates(n.head, "1e-2"))
    prompts = ("--prompts", at("questions.jsonl"), "--repeats", "1", "--no-parts", *short)
    beside = ("--target", strong, *task, *rows, *updates(n.drafter, "2e-3"))
    return (
        Stage(
            "policies",
            "Two policies, from nothing",
            (
                (*sft, *updates(n.policy, "3e-3"), "--out", at("policy")),
                (*sft, *updates(n.strong, "3e-3"), "--out", at("strong")),
                (*ask, policy),
                (*ask, strong),
            ),
        ),
        Stage(
            "rewards",
            "Which step is wrong? A process reward model",
            (
                ("label", "sample", "--model", policy, *tests, *solve, "--out", at("solutions.jsonl")),
                (*label, "--model", policy, "--out", at("weak.jsonl")),
                (*label, "--model", strong, "--out", at("by-strong.jsonl")),
                (
                    *("label", "agree", "--strong", at("by-strong.jsonl"), "--weak", at("weak.jsonl")),
                    *("--out", at("labels.jsonl"), "--json"),
                ),
                ("train", "orm", "--model", strong, "--data", at("by-strong.jsonl"), *head, "--out", at("orm")),
                (
                    "train",
                    "prm",
                    "--model",
                    at("orm", "model"),
                    "--data",
                    at("labels.jsonl"),
                    *head,
                    "--out",
                    at("prm"),
                ),
                (
                    *("eval", "prm", "--model", at("prm", "model"), *tests, "--limit", str(n.asked)),
                    *("--out", at("scored-tests.jsonl"), "--json"),
                ),
                (
                    *("eval", "best-of-n", "--policy", policy, "--model", at("prm", "model"), *tests, *short),
                    *("--samples", "8", "--limit", str(n.chosen), "--out", at("chosen.jsonl"), "--json"),
                ),
                ("data", "labelled", "--data", at("by-strong.jsonl"), "--out", at("answers.jsonl")),
                (
                    *("train", "value", "--model", strong, "--data", at("answers.jsonl"), *rows),
                    *(*updates(n.value, "1e-3"), "--out", at("value")),
                ),
                (*ask, policy, "--guide", at("value", "model")),
            ),
        ),
        Stage(
            "improve",
            "A policy that learns from what it wrote itself",
            (
                (
                    *(
                        "train",
                        "ranked",
                        "--model",
                        policy,
                        *task,
                        "--rounds",
                        "1",
                        "--problems",
                        str(n.round_problems),
                    ),
                    *("--samples", "8", *short, "--steps", str(n.ranked), "--batch.size", "16", "--batch.max-length"),
                    *("128", "--batch.no-packing", "--optimizer.learning-rate", "5e-4", "--tested", "1"),
                    *("--threshold", str(n.threshold)),
                    *("--out", at("ranked")),
                ),
                (*ask, at("ranked", "model")),
                (
                    *("eval", "prm", "--model", at("prm", "model"), "--data", at("by-strong.jsonl")),
                    *("--out", at("scored.jsonl"), "--json"),
                ),
                (
                    *("data", "pairs", "--data", at("scored.jsonl"), "--aggregate", "min", "--margin", str(n.margin)),
                    *("--out", at("pairs.jsonl")),
                ),
                (
                    *("train", "preference", "--objective", "dpo", "--model", at("ranked", "model")),
                    *("--data", at("pairs.jsonl")),
                    *(*rows, *updates(n.pairs, "1e-5")),
                    *("--out", at("dpo")),
                ),
                (*ask, at("dpo", "model")),
            ),
        ),
        Stage(
            "bits",
            "One checkpoint, four widths",
            (
                (
                    *("train", "qat", "--model", strong, *task, *rows, "--bits", n.widths),
                    *(*updates(n.qat, "5e-4"), "--out", at("qat")),
                ),
                (
                    *("eval", "bits", "--model", at("qat", "model"), *tests, "--plain", strong, "--plans", "0", *short),
                    *("--limit", str(n.asked_bits), "--questions", str(n.asked_bits), "--repeats", "0"),
                    *("--out", at("bits")),
                ),
            ),
        ),
        Stage(
            "drafts",
            "Drafts that change nothing but the time",
            (
                ("train", "drafter", "--kind", "jakiro", *beside, "--out", at("jakiro")),
                ("train", "early-exit", "--exit-layer", "1", *beside, "--out", at("kangaroo")),
                *(
                    (
                        "bench",
                        "speculative",
                        "--model",
                        strong,
                        *prompts,
                        "--drafter",
                        drafter,
                        "--out",
                        at("bench", name),
                    )
                    for name, drafter in (
                        ("jakiro", at("jakiro", "model")),
                        ("kangaroo", at("kangaroo", "model")),
                        ("lookup", "lookup"),
                    )
                ),
            ),
        ),
    )


class Ran(NamedTuple):
    """A command that is done."""

    stage: str
    command: str  # as one would type it
    seconds: float
    said: str  # on standard output


def run(all_stages: Sequence[Stage], out: Path, call: Callable[[list[str]], int]) -> int:
    """Run what is not done yet; the status of the first command that fails, else 0.

    Args:
      all_stages: in their order.
      out: folder for all of them.
      call: the command line without its first word -> its status.
    """
    every = [(stage, args) for stage in all_stages for args in stage.commands]
    done = {(one.stage, one.command): one.seconds for one in read_done(out)}
    for number, (stage, args) in enumerate(every, 1):
        if (stage.name, typed(args)) in done:
            continue
        left = [_usual(a) for s, a in every if (s.name, typed(a)) not in done]
        behind = [_usual(a) for s, a in every if (s.name, typed(a)) in done]
        spent = sum(done[s.name, typed(a)] for s, a in every if (s.name, typed(a)) in done)
        ahead = sum(left) * (spent / sum(behind) if behind else 1.0)
        where = f"{spent:.0f} s so far, about {ahead / 60:.0f} min to go"
        print(f"\n[{number}/{len(every)}] {stage.title}, {where}\n$ {typed(args)}", file=sys.stderr, flush=True)
        began, said = time.monotonic(), io.StringIO()
        with contextlib.redirect_stdout(said):
            status = call([*args])
        if status:
            return status
        record = Ran(stage.name, typed(args), time.monotonic() - began, said.getvalue())
        with (out / "stages.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record._asdict()) + "\n")
        done[stage.name, record.command] = record.seconds
        print(f"{record.seconds:.0f} s{_figure(args, record.said)}", file=sys.stderr, flush=True)
    return 0


def read_done(out: Path) -> list[Ran]:
    """What has been run, in its order; a last line that a killed process left half is dropped."""
    path = out / "stages.jsonl"
    if not path.exists():
        return []
    cut_half_line(path)
    return [Ran(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def typed(args: Sequence[Any]) -> str:
    """A command as one would type it."""
    return shlex.join(["jaxaroo", *map(str, args)])


# ----------------------------------------------------------------------------------------------------------- private
USUAL = {  # seconds on two cores (benchmarks/results/quickstart-cpu.json): how commands compare, not how long they take
    "train sft": 70,
    "train qat": 48,
    "train ranked": 46,
    "train": 22,
    "label steps": 26,
    "eval bits": 80,
    "eval best-of-n": 16,
    "bench speculative": 16,
}


def _usual(args: Sequence[str]) -> float:
    return USUAL.get(" ".join(args[:2]), USUAL.get(args[0], 5))


def _figure(args: Sequence[str], said: str) -> str:
    """What a command came to in a word: a share that it printed, or the last loss of a run."""
    try:
        found = json.loads(said)
    except json.JSONDecodeError:
        found = {}
    shares = {n: found[n] for n in ("accuracy", "auroc", "kept") if isinstance(found, dict) and n in found}
    if name := next((n for n, value in shares.items() if isinstance(value, int | float)), None):
        return f", {name} {shares[name]:.4g}"
    run = Path(args[args.index("--out") + 1]) if "--out" in args else Path()
    if args[0] == "train" and (run / "metrics.jsonl").is_file():
        records = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return f", loss {json.loads(records[-1])['loss']:.4g}" if records else ""
    return ""
