"""How wrong are Monte-Carlo labels of steps, and does keeping what two completers agree on help?

On the embedded task the truth of a step is known, and so is what its label estimates: the chance v that a completer,
from there, ends right. v is found by following every continuation whose probability is above a cut, and what is cut off
bounds its error. Parts:

    values  the soft label of n completions against v: bias, and root mean square error beside sqrt(mean v (1 - v) / n);
            the hard label ("any is right") against the truth of the step, by n
    filter  share of right labels: a weak and a strong completer with n each where they agree (Athena), and each alone
            with 2 n, so that all have the same budget; several seeds, each with problems of its own

    python -m benchmarks.step_labels --work FOLDER        (what FOLDER holds already is not made again)
"""

import argparse
import functools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from benchmarks.policy import SETTINGS, command
from jaxaroo.infer.engine import Engine
from jaxaroo.infer.evaluate import final_answer, same_answer
from jaxaroo.infer.sampling import Sampling
from jaxaroo.models import hf
from jaxaroo.models.decoder import Model, forward, lm_head
from jaxaroo.models.tokenizer import Tokenizer, load_tokenizer
from jaxaroo.train.labels.consistency import ConsistencyConfig, agree

MODELS = {"weak": 2000, "policy": 3000, "strong": 4500}  # steps of fine-tuning, from nothing
TEMPERATURE, LONGEST, ROOM = 0.8, 64, 128  # of completers: tokens of a completion, and with the prompt
TASK = ("--data", "builtin:arithmetic")
T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's, for the interval of a mean of so many


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--work", type=Path, required=True, help="folder for what is made")
    args.add_argument("--seeds", type=int, default=3)
    args.add_argument("--prefixes", type=int, default=200)
    args.add_argument("--cut", type=float, default=2e-5, help="probability below which a continuation is not followed")
    args.add_argument("--solutions", type=int, default=300, help="of the filter, for each seed")
    opts = args.parse_args()
    result: dict[str, Any] = {"benchmark": "step_labels", "temperature": TEMPERATURE}
    result |= {"environment": record.environment(), "models": models(opts.work)}
    result["values"] = values(opts)
    print(json.dumps(result["values"], indent=1))
    result["filter"] = filtered(opts)
    print(json.dumps(result["filter"]["mean"], indent=1))
    record.save("step-labels-arithmetic-cpu", result)


def models(work: Path) -> dict[str, Any]:
    """Fine-tune what is not there yet; what each gets right greedily and at temperature 1."""
    found = {}
    for seed, (name, steps) in enumerate(MODELS.items()):
        out = work / name
        if not (out / "model").exists():
            command("train", "sft", *SETTINGS, "--steps", steps, "--seed", seed, "--out", out)
        if not (report := out / "answers.json").exists():
            ask = ("eval", "answers", "--model", out / "model", *TASK, "--max-new-tokens", LONGEST, "--json")
            greedy = json.loads(command(*ask, "--limit", 500))
            sampled = json.loads(command(*ask, "--limit", 200, "--samples", 4, "--temperature", 1))
            report.write_text(json.dumps({"greedy": greedy["accuracy"], "sampled": sampled["accuracy"]}))
        found[name] = {"steps": steps} | json.loads(report.read_text())
    return found


def solutions(work: Path, number: int, first: int, samples: int = 4) -> Path:
    """Solutions of the policy, with the truth of every step."""
    path = work / f"solutions-{first}-{number}-{samples}.jsonl"
    many = ("--limit", number // samples, "--samples", samples, "--first", first, "--max-new-tokens", LONGEST)
    command("label", "sample", "--model", work / "policy" / "model", *TASK, *many, "--max-seqs", 64, "--out", path)
    return path


# -------------------------------------------------------------------------------------------------------------- values
def values(opts: argparse.Namespace) -> dict[str, Any]:
    """Labels of the policy as its own completer, against what they estimate."""
    folder, most = opts.work / "policy" / "model", 64
    model, tokenizer = hf.load(folder, dtype="float32"), load_tokenizer(folder)
    rows = rows_of(solutions(opts.work, opts.prefixes, 700_000, samples=1))
    rng, prefixes = np.random.default_rng(0), []
    for row in rows:
        steps = int(rng.integers(1, len(row["steps"])))
        prompt = row["prompt"] + "".join(step + "\n" for step in row["steps"][:steps])
        prefixes.append((prompt, row["answer"], bool(row["truth"][steps - 1])))
    exact = [exhaust(model, tokenizer, prompt, answer, opts.cut) for prompt, answer, _ in prefixes]
    with Engine(model, tokenizer, max_seqs=64) as engine:
        ask = lambda i: Sampling(temperature=TEMPERATURE, max_tokens=LONGEST, n=most, seed=i)
        results = engine.generate([p for p, _, _ in prefixes], [ask(i) for i in range(len(prefixes))])
    right = np.array(
        [
            [same_answer(final_answer(o.text or ""), final_answer(answer)) for o in result.outputs]
            for result, (_, answer, _) in zip(results, prefixes, strict=True)
        ],
        float,
    )
    v, lost = np.array([low for low, _ in exact]), np.array([missing for _, missing in exact])
    v = v + lost / 2  # what was not followed may end right or wrong
    truth, table = np.array([t for _, _, t in prefixes]), []
    for n in (1, 2, 4, 8, 16, 32, 64):
        labels = right.reshape(len(v), -1, n).mean(2)
        hard = labels > 0
        table.append(
            {
                "n": n,
                "bias": float((labels - v[:, None]).mean()),
                "rms_error": float(np.sqrt(((labels - v[:, None]) ** 2).mean())),
                "expected_rms_error": float(np.sqrt((v * (1 - v)).mean() / n)),
                "hard_label_accuracy": float((hard == truth[:, None]).mean()),
            }
        )
    return {
        "prefixes": len(v),
        "mean_value": float(v.mean()),
        "right_steps": float(truth.mean()),
        "not_followed": {"mean": float(lost.mean()), "most": float(lost.max())},
        "by_n": table,
    }


def exhaust(model: Model, tokenizer: Tokenizer, prompt: str, answer: str, cut: float) -> tuple[float, float]:
    """Probability that a completion is right, of those followed, and that of those that were not."""
    begin, ends = tokenizer.encode(prompt), set(tokenizer.eos_ids)
    going, right, lost = [(1.0, begin)], 0.0, 0.0
    while going:
        after = []
        for part in (going[i : i + 256] for i in range(0, len(going), 256)):
            size = 1 << (len(part) - 1).bit_length()
            tokens = np.zeros((size, ROOM), np.int32)
            for row, (_, ids) in enumerate(part):
                tokens[row, : len(ids)] = ids
            at = np.full(size, len(part[0][1]) - 1, np.int32)  # all are as long as each other
            after.append(np.asarray(next_tokens(model, tokens, at), np.float64)[: len(part)])
        grown: list[tuple[float, list[int]]] = []
        for (p, ids), q in zip(going, np.concatenate(after), strict=True):
            for token in np.flatnonzero(p * q >= cut).tolist():
                if token in ends:
                    ok = same_answer(final_answer(tokenizer.decode(ids[len(begin) :])), final_answer(answer))
                    right += p * q[token] * ok
                elif len(ids) - len(begin) + 1 < LONGEST and len(ids) + 1 < ROOM:
                    grown.append((p * q[token], [*ids, token]))
                else:
                    lost += p * q[token]
            lost += p * q[p * q < cut].sum()
        going = grown
    return right, lost


def next_tokens(model: Model, tokens: Any, at: Any) -> jax.Array:
    return _next_tokens(model.config, model.params, tokens, at)


@functools.partial(jax.jit, static_argnames="cfg")
def _next_tokens(cfg, params, tokens, at):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    hidden = forward(cfg, params, tokens, positions).hidden
    last = jnp.take_along_axis(hidden, at[:, None, None], axis=1)
    return jax.nn.softmax(lm_head(cfg, params, last)[:, 0] / TEMPERATURE, axis=-1)


# -------------------------------------------------------------------------------------------------------------- filter
def filtered(opts: argparse.Namespace, n: int = 8) -> dict[str, Any]:
    """Labels that weak and strong agree on, and those of one completer at the same budget."""
    runs = []
    for seed in range(opts.seeds):
        path = solutions(opts.work, opts.solutions, 710_000 + 10_000 * seed)
        labelled = lambda name, n, path=path: rows_of(labels(opts.work, path, name, n))
        weak, strong = labelled("weak", n), labelled("strong", n)
        found = {f"{name} alone, n = {2 * n}": labelled(name, 2 * n) for name in MODELS}
        for keep in ("solution", "step"):
            found[f"agreed by {keep}, n = {n} + {n}"] = agree(weak, strong, ConsistencyConfig(keep=keep))[0]
        runs.append({name: accuracy(rows) for name, rows in found.items()})
    mean = {name: {key: spread_of([run[name][key] for run in runs]) for key in runs[0][name]} for name in runs[0]}
    agreed = f"agreed by solution, n = {n} + {n}"  # the same solutions, so differences are paired
    gain = {
        name: spread_of([run[agreed]["accuracy"] - run[name]["accuracy"] for run in runs])
        for name in runs[0]
        if "alone" in name
    }
    report = {"n": n, "solutions": opts.solutions, "seeds": opts.seeds, "mean": mean}
    return report | {"gain_of_agreeing_by_solution": gain, "runs": runs}


def labels(work: Path, path: Path, completer: str, n: int) -> Path:
    """Monte-Carlo labels of these solutions by this completer."""
    out = path.with_name(f"{path.stem}-{completer}-{n}.jsonl")
    if not out.exists():
        how = ("--model", work / completer / "model", "--n", n, "--temperature", TEMPERATURE)
        more = ("--max-new-tokens", LONGEST, "--max-seqs", 64, "--seed", n)
        command("label", "steps", "--data", path, *how, *more, "--out", out)
    return out


def accuracy(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of all labels: how many are right, also of those that say good or bad; how many there are, and say good."""
    pairs = [(x, t) for row in rows for x, t in zip(row["labels"], row["truth"], strict=True) if x is not None]
    right = lambda *said: statistics.mean(int(x) == int(t) for x, t in pairs if x in said)
    found = {"accuracy": right(0, 1), "right_of_good": right(1), "right_of_bad": right(0)}
    return found | {"labels": len(pairs), "good": statistics.mean(x for x, _ in pairs)}


def spread_of(found: list[float]) -> dict[str, Any]:
    """Mean, and its 95 % interval over seeds."""
    mean, n = statistics.mean(found), len(found)
    half = T_95[n] * statistics.stdev(found) / math.sqrt(n) if n in T_95 else None
    return {"mean": mean, "half_interval": half, "all": found}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
