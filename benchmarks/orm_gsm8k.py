"""Can an outcome reward model, trained on a CPU from nothing, tell right solutions of GSM8K from wrong ones?

Reads grade-school-math's `train.jsonl` and `example_model_solutions.jsonl` (four models' solutions of the test
questions, marked correct or not). A tokenizer and a small language model are trained on the former; then, on the
solutions of four fifths of the questions, outcome models that begin as that model or fresh, and one whose head alone
reads the model's surprisal. On the solutions of the other questions: AUROC over all, between the solutions of one
question, and of one source; beside it that of knowing only which model wrote a solution, which tells much of it.

    python -m benchmarks.orm_gsm8k --data FOLDER --work FOLDER     (what the second holds already is not made again)
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from benchmarks import record
from benchmarks.policy import command
from jaxaroo.infer.step_metrics import auroc, within_question_auroc
from jaxaroo.infer.step_scores import Solution, score_solutions
from jaxaroo.models import hf, reward
from jaxaroo.models.decoder import DecoderConfig, Model, init_params
from jaxaroo.models.tokenizer import Tokenizer, load_tokenizer
from jaxaroo.train.labels.truth import read_model_solutions

VOCABULARY, HELD_OUT = 2048, 5  # tokens; every fifth question
ROWS = "--batch.max-length 384 --checkpoint.every 100000 --optimizer.warmup-steps 50".split()  # noqa: SIM905
LANGUAGE = [*ROWS, "--batch.size", "8", "--steps", "600", "--optimizer.learning-rate", "2e-3"]
OUTCOME = [*ROWS, "--batch.size", "16", "--batch.no-packing", "--steps", "300", "--separator", "\n", "--between", ""]
ARMS = {  # name -> (begins as the language model, settings)
    "fresh": (False, [*OUTCOME, "--optimizer.learning-rate", "1e-3"]),
    "from the language model": (True, [*OUTCOME, "--optimizer.learning-rate", "5e-4"]),
    "head on surprisal": (
        True,
        [*OUTCOME, "--optimizer.learning-rate", "1e-2", "--surprisal", "--inner", "32", "--train", "head"],
    ),
}


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--data", type=Path, required=True, help="folder of the two files")
    args.add_argument("--work", type=Path, required=True, help="folder for what is made")
    opts = args.parse_args()
    opts.work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"benchmark": "orm_gsm8k", "environment": record.environment(), "seconds": {}}
    solutions = read_model_solutions(opts.data / "example_model_solutions.jsonl")
    question = lambda row: int(row["id"].split(":")[1])
    held_out = [row for row in solutions if question(row) % HELD_OUT == 0]
    trained_on = [row for row in solutions if question(row) % HELD_OUT]
    (opts.work / "outcomes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trained_on), encoding="utf-8")
    tokenizer = bpe(opts.data / "train.jsonl")
    fresh = write_fresh(opts.work / "fresh", tokenizer)
    result |= {"solutions": len(trained_on), "held_out": len(held_out), "parameters": parameters(fresh)}
    language = opts.work / "language"
    if not (language / "model").exists():
        train(result, "sft", language, "--model", fresh, "--data", opts.data / "train.jsonl", *LANGUAGE)

    right, asked = [row["outcome"] for row in held_out], [question(row) for row in held_out]
    sources = [row["source"] for row in held_out]
    rate = {s: statistics.mean(row["outcome"] for row in trained_on if row["source"] == s) for s in sorted({*sources})}
    result["right_by_source"] = rate
    result["arms"] = {"only the source": figures([rate[s] for s in sources], right, asked, sources)}
    for name, (known, settings) in ARMS.items():
        out, begin = opts.work / ("orm " + name).replace(" ", "-"), language / "model" if known else fresh
        if not (out / "model").exists():
            train(result, "orm", out, "--model", begin, "--data", opts.work / "outcomes.jsonl", *settings)
        model = reward.load(out / "model", dtype="float32")
        asks = [Solution(row["prompt"], row["steps"]) for row in held_out]
        scores = [s[-1] for s in score_solutions(model, load_tokenizer(out / "model"), asks, batch=32, progress=True)]
        result["arms"][name] = figures(scores, right, asked, sources)
    print(json.dumps(result["arms"], indent=1))
    record.save("orm-gsm8k-cpu", result)


def train(result: dict[str, Any], kind: str, out: Path, *args: Any) -> None:
    """Train, and note the seconds."""
    start = time.perf_counter()
    command("train", kind, *args, "--out", out)
    result["seconds"][out.name] = time.perf_counter() - start


def figures(scores: list[float], right: list[int], asked: list[int], sources: list[str]) -> dict[str, Any]:
    """AUROC over all, within questions, and within each source."""
    each = {}
    for source in sorted({*sources}):
        at = [i for i, s in enumerate(sources) if s == source]
        each[source] = auroc([scores[i] for i in at], [right[i] for i in at])
    return {"auroc": auroc(scores, right), "within_question": within_question_auroc(scores, right, asked)} | {
        "within_source": each
    }


def bpe(path: Path) -> Tokenizer:
    """Byte-level BPE of the training questions and answers; a newline is a token of its own."""
    backend = tokenizers.Tokenizer(models.BPE())
    lines = pre_tokenizers.Split("\n", "isolated")
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([lines, digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    special: Any = [AddedToken("<|end|>", special=True, normalized=False)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    backend.train_from_iterator((text for row in rows for text in (row["question"], row["answer"])), trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    return Tokenizer(backend.to_str().encode(), config | {"clean_up_tokenization_spaces": False}, None)


def write_fresh(folder: Path, tokenizer: Tokenizer) -> Path:
    """A model that knows nothing, as a folder; the same every time."""
    cfg = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        embed_dim=128,
        ffn_dim=384,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        tie_embeddings=True,
        max_positions=1024,
        eos_ids=tokenizer.eos_ids,
    )
    hf.save(folder, Model(cfg, init_params(cfg, jax.random.key(0))), overwrite=True)
    tokenizer.save(folder)
    return folder


def parameters(folder: Path) -> int:
    """How many numbers a model is made of."""
    return sum(w.size for w in jax.tree.leaves(hf.load(folder, dtype="float32").params))


if __name__ == "__main__":
    main()
