"""A verifier that chooses worse the more answers it has, one that chooses well, and what makes the difference.

A policy of the embedded task answers 200 problems that no model has seen, 16 times each at temperature 1; reward models
choose. All are trained on the same solutions of the policy, labelled by the task's checker. Parts:

    curves    best of k, by how the verifier began (as the policy, or as a stronger model of its size) and by what it
              reads (its hidden state, or its own surprisal too); beside majority, greedy decoding, oracle, the
              stronger model's surprisal without any training, and a random score for each text
    training  ORM initialisation and negative up-sampling, each against its absence, of the first and the last of
              these verifiers; several seeds
    pipeline  policy given: sample, label by two completers, keep what they agree on, ORM, PRM, choose; seconds of each

    python -m benchmarks.reward_models --work FOLDER        (what FOLDER holds already is not made again)
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import record
from benchmarks.policy import command
from benchmarks.step_labels import LONGEST, TASK, models, rows_of, spread_of
from jaxaroo.infer.engine import Engine
from jaxaroo.infer.evaluate import Question, evaluate_answers, final_answer
from jaxaroo.infer.guided.best_of_n import Candidates, aggregate, curves
from jaxaroo.infer.sampling import Sampling
from jaxaroo.infer.step_metrics import ScoredSteps, plot_best_of_k, step_auroc, within_question_auroc
from jaxaroo.infer.step_scores import Solution, score_solutions
from jaxaroo.models import hf, reward
from jaxaroo.models.reward import RewardModel
from jaxaroo.models.tokenizer import load_tokenizer
from jaxaroo.train.data.arithmetic import ArithmeticConfig, check_lines, make_problem
from jaxaroo.train.data.steps import split_steps

SOLUTIONS, FIRST = 8000, 720_000  # to train on: number, and the first of their problems
ROWS = "--batch.size 16 --batch.max-length 160 --batch.no-packing --checkpoint.every 100000".split()  # noqa: SIM905
ROWS += ["--optimizer.warmup-steps", "50"]
NEWLINE = ["--separator", "\n", "--between", ""]  # text as the decoder would write it
ALL = [*ROWS, *NEWLINE, "--steps", "800", "--optimizer.learning-rate", "5e-4"]
HEAD = [*ROWS, *NEWLINE, "--steps", "600", "--optimizer.learning-rate", "1e-2", "--surprisal", "--train", "head"]
SURPRISAL = [*ALL, "--surprisal"]
ARMS = {  # name -> (the model it begins as, settings)
    "policy, hidden state": ("policy", ALL),
    "stronger, hidden state": ("strong", ALL),
    "policy, surprisal": ("policy", HEAD),
    "stronger, surprisal": ("strong", HEAD),
    "stronger, surprisal, all trained": ("strong", SURPRISAL),
}
LUCK = "a random score for each text"
CHOSEN = "min"  # a solution is as good as its worst step


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--work", type=Path, required=True, help="folder for what is made")
    args.add_argument("--seeds", type=int, default=3)
    args.add_argument("--questions", type=int, default=200)
    args.add_argument("--samples", type=int, default=16)
    args.add_argument("--plot", type=Path, help="PNG file for the curves")
    opts = args.parse_args()
    result: dict[str, Any] = {"benchmark": "reward_models", "solutions": SOLUTIONS, "aggregator": CHOSEN}
    result |= {"environment": record.environment(), "models": models(opts.work)}
    answers = ask(opts)
    result["curves"] = compare(opts, answers)
    print(json.dumps(result["curves"], indent=1))
    result["training"] = training(opts, answers)
    print(json.dumps(result["training"], indent=1))
    result["pipeline"] = pipeline(opts)
    print(json.dumps(result["pipeline"], indent=1))
    record.save("reward-models-arithmetic-cpu", result)


# ------------------------------------------------------------------------------------------------------------- answers
def ask(opts: argparse.Namespace) -> list[dict[str, Any]]:
    """Answers of the policy to problems of the test split: steps, their truth, and whether they end right."""
    folder, found = opts.work / "policy" / "model", []
    problems = [make_problem(ArithmeticConfig(), "test", i) for i in range(opts.questions)]
    questions = [Question(f"{p.question}\n", str(p.answer)) for p in problems]
    sampling = Sampling(temperature=1.0, max_tokens=LONGEST, seed=0)
    with Engine(hf.load(folder, dtype="float32"), load_tokenizer(folder), max_seqs=64) as engine:
        rows = evaluate_answers(engine, questions, sampling, samples=opts.samples, progress=True).rows
    for number, (row, problem) in enumerate(zip(rows, problems, strict=True)):
        for text, correct, why in zip(row["texts"], row["correct"], row["finish_reasons"], strict=True):
            steps = [text[a:b] for a, b in split_steps(text)]
            whole = final_answer(text) is not None and why == "stop"
            found.append({"question": number, "prompt": row["prompt"], "steps": steps, "correct": bool(correct)})
            found[-1] |= {"truth": check_lines(problem, steps), "answer": final_answer(text), "whole": whole}
    return found


def judge(opts: argparse.Namespace, answers: list[dict[str, Any]], model: RewardModel) -> list[list[float]]:
    """Scores of all steps of all answers."""
    tokenizer = load_tokenizer(opts.work / "policy" / "model")  # all models have the same
    return score_solutions(model, tokenizer, [Solution(a["prompt"], a["steps"]) for a in answers], batch=64)


def figures(answers: list[dict[str, Any]], scores: list[list[float]]) -> tuple[dict[str, Any], list[Candidates]]:
    """How well steps and answers are ranked, and what choosing by the worst step is worth."""
    rows = [
        ScoredSteps(s, [int(t) for t in a["truth"]], a["question"]) for a, s in zip(answers, scores, strict=True) if s
    ]
    every, to_error = step_auroc(rows)
    worth = [aggregate(s, CHOSEN) if a["whole"] else -np.inf for a, s in zip(answers, scores, strict=True)]
    asked: dict[int, list[int]] = {}
    for i, answer in enumerate(answers):
        asked.setdefault(answer["question"], []).append(i)
    pick = lambda values, chosen: [values[i] for i in chosen]
    right, given = [a["correct"] for a in answers], [a["answer"] for a in answers]
    candidates = [Candidates(pick(right, c), pick(given, c), {CHOSEN: pick(worth, c)}) for c in asked.values()]
    found = curves(candidates)
    within = within_question_auroc(
        [max(w, -1.0) for w in worth], [int(r) for r in right], [a["question"] for a in answers]
    )
    return {
        "step_auroc": every,
        "step_auroc_to_first_error": to_error,
        "answer_auroc_within_questions": within,
        "best_of": dict(zip(found.k, found.best_of[CHOSEN], strict=True)),
        "weighted_majority": dict(zip(found.k, found.weighted[CHOSEN], strict=True)),
    }, candidates


# --------------------------------------------------------------------------------------------------------------- parts
def train(opts: argparse.Namespace, name: str, begin: Path, settings: list[str], *, seed: int = 0, kind: str = "prm"):
    """A reward model; trained unless it is there."""
    out = opts.work / name
    if not (out / "model").exists():
        shutil.rmtree(out, ignore_errors=True)
        command("train", kind, "--model", begin, "--data", data(opts), *settings, "--seed", seed, "--out", out)
    return out / "model"


def data(opts: argparse.Namespace) -> Path:
    """Solutions of the policy, with the checker's labels."""
    path = opts.work / "labelled.jsonl"
    if not path.exists():
        drawn, many = opts.work / "drawn.jsonl", ("--limit", SOLUTIONS // 4, "--samples", 4, "--first", FIRST)
        policy = opts.work / "policy" / "model"
        sizes = ("--max-new-tokens", LONGEST, "--max-seqs", 64)
        command("label", "sample", "--model", policy, *TASK, *many, *sizes, "--out", drawn)
        command("label", "steps", "--data", drawn, "--by", "truth", "--out", path)
    return path


def compare(opts: argparse.Namespace, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Curves of every verifier, and what they are up against."""
    verifiers = {}
    for name, (begin, settings) in ARMS.items():
        folder = train(opts, name.replace(", ", "-").replace(" ", "-"), opts.work / begin / "model", settings)
        verifiers[name] = reward.load(folder, dtype="float32")
    likelihood = verifiers["stronger, surprisal"]
    weight = np.zeros((1, likelihood.config.target.embed_dim + 2), np.float32)
    weight[0, -2] = -1.0  # of log(1 + S): a step is the worse, the less likely it is
    head = {"last": {"weight": jax.numpy.asarray(weight), "bias": jax.numpy.zeros(1)}}
    verifiers["stronger, surprisal, untrained"] = likelihood._replace(params={**likelihood.params, "head": head})
    found, drawn = {}, {}
    for name, model in [*verifiers.items(), (LUCK, None)]:
        scores = luck(answers) if model is None else judge(opts, answers, model)
        found[name], candidates = figures(answers, scores)
        drawn[name] = [c.scores[CHOSEN] for c in candidates]
    together = [c._replace(scores={name: drawn[name][i] for name in drawn}) for i, c in enumerate(candidates)]
    bounds = curves(together)
    if opts.plot:
        plot_best_of_k(opts.plot, bounds)
    ask = ("eval", "answers", "--model", opts.work / "policy" / "model", *TASK, "--max-new-tokens", LONGEST, "--json")
    return {
        "k": bounds.k,
        "greedy": json.loads(command(*ask, "--limit", opts.questions))["accuracy"],
        "majority": bounds.majority,
        "oracle": bounds.pass_at,
        "by_verifier": found,
        "texts": texts(answers),
    }


def luck(answers: list[dict[str, Any]]) -> list[list[float]]:
    """What knows nothing: a random number for each text, the same wherever a question has it twice."""
    rng, known = np.random.default_rng(0), {}
    for a in answers:
        known.setdefault((a["question"], *a["steps"]), float(rng.uniform()))
    return [[known[a["question"], *a["steps"]]] * len(a["steps"]) for a in answers]


def texts(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Why a poor score chooses worse than chance: different texts among right and among wrong answers, as shares."""
    seen: dict[bool, list[float]] = {True: [], False: []}
    for number in {a["question"] for a in answers}:
        for right in (True, False):
            found = ["\n".join(a["steps"]) for a in answers if a["question"] == number and a["correct"] == right]
            if found:
                seen[right].append(len({*found}) / len(found))
    return {"different_among_right": statistics.mean(seen[True]), "among_wrong": statistics.mean(seen[False])}


def training(opts: argparse.Namespace, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Two things that are said to help, each against its absence."""
    found: dict[str, Any] = {}
    for base in ("policy, hidden state", "stronger, surprisal"):
        begin, settings = ARMS[base]
        plain = opts.work / begin / "model"
        runs: dict[str, list[dict[str, Any]]] = {}
        for seed in range(opts.seeds):
            name = f"{begin}-{seed}"
            orm = train(opts, f"{name}-orm", plain, settings, seed=seed, kind="orm")
            up = ["--negative-share", "0.5"]
            folders = {
                "as it is": train(opts, f"{name}-plain", plain, settings, seed=seed),
                "from an ORM": train(opts, f"{name}-from-orm", orm, settings, seed=seed),
                "negatives up": train(opts, f"{name}-up", plain, [*settings, *up], seed=seed),
                "both": train(opts, f"{name}-both", orm, [*settings, *up], seed=seed),
            }
            for how, folder in folders.items():
                model = reward.load(folder, dtype="float32")
                runs.setdefault(how, []).append(figures(answers, judge(opts, answers, model))[0])
        keys = ("step_auroc", "step_auroc_to_first_error", "answer_auroc_within_questions")
        found[base] = {
            how: {key: spread_of([run[key] for run in them]) for key in keys}
            | {"best_of_8": spread_of([run["best_of"][8] for run in them])}
            for how, them in runs.items()
        }
    return found


def pipeline(opts: argparse.Namespace) -> dict[str, Any]:
    """Every command from a policy and two completers to chosen answers, with the seconds it took."""
    work, seconds = opts.work / "pipeline", {}
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    policy, weak, strong = (opts.work / name / "model" for name in ("policy", "weak", "strong"))

    def timed(name: str, *args: Any) -> str:
        start = time.perf_counter()
        text = command(*args)
        seconds[name] = time.perf_counter() - start
        return text

    sizes = ("--max-new-tokens", LONGEST, "--max-seqs", 64)
    drawn, kept, outcomes = work / "drawn.jsonl", work / "kept.jsonl", work / "outcomes.jsonl"
    many = ("--limit", 200, "--samples", 4, "--first", 800_000)
    timed("sample", "label", "sample", "--model", policy, *TASK, *many, *sizes, "--out", drawn)
    for name, folder in (("weak", weak), ("strong", strong)):
        out = work / f"{name}.jsonl"
        timed(f"label, {name}", "label", "steps", "--data", drawn, "--model", folder, "--n", 8, *sizes, "--out", out)
    files = ("--weak", work / "weak.jsonl", "--strong", work / "strong.jsonl")
    agreed = json.loads(timed("agree", "label", "agree", *files, "--out", kept, "--json"))
    timed("outcomes", "label", "steps", "--data", drawn, "--by", "outcome", "--out", outcomes)
    timed("train orm", "train", "orm", "--model", strong, "--data", outcomes, *HEAD, "--out", work / "orm")
    begin, up = work / "orm" / "model", ("--negative-share", 0.5)
    timed("train prm", "train", "prm", "--model", begin, "--data", kept, *HEAD, *up, "--out", work / "prm")
    choose = ("eval", "best-of-n", "--policy", policy, "--model", work / "prm" / "model", *TASK, "--samples", 8)
    report = json.loads(timed("best of 8", *choose, *sizes, "--limit", opts.questions, "--json"))
    greedy = ("eval", "answers", "--model", policy, *TASK, "--max-new-tokens", LONGEST, "--json")
    return {
        "seconds": seconds | {"all": sum(seconds.values())},
        "agreed": agreed,
        "labels": {"all": len(rows_of(work / "strong.jsonl")), "kept": len(rows_of(kept))},
        "greedy": json.loads(command(*greedy, "--limit", opts.questions))["accuracy"],
        "best_of_n": report,
    }


if __name__ == "__main__":
    main()
