"""`jaxaroo eval bits`: one master at every width, beside models trained for one alone, and plans that mix widths."""

import json as jsonlib
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .output import Bits, FloatType, UsageError, dumps, expect_folder, problems, read_bits


def eval_bits(
    *,
    model: Path,
    data: str,
    out: Path,
    bits: Bits | None = None,
    single: tuple[str, ...] = (),
    plain: Path | None = None,
    plans: int = 0,
    sensitivity_rows: int = 64,
    samples: int = 30,
    limit: int | None = None,
    questions: int = 200,
    max_new_tokens: int = 64,
    repeats: int = 5,
    batch: int = 1,
    dtype: FloatType | None = None,
    seed: int = 0,
    arithmetic_level: int = 2,
    arithmetic_hi: int = 20,
    json: bool = False,
) -> int:
    """What each width of a master is worth, what it weighs, and how fast it decodes.

    Writes bits.json and bits.png; prints the table.

    Args:
      model: folder of `train qat`.
      data: rows as for `eval lm`, which are questions too where they have an `answer`; or builtin:arithmetic (its test
        problems).
      out: folder for the report; an earlier one is replaced.
      bits: widths to measure, with commas between them; all that the master was trained at when not given.
      single: models trained at one width, as WIDTH=FOLDER: the difference is what one master for all widths costs.
      plain: folder of the float model that training began with.
      plans: how many mixtures of widths to search and measure, from the narrowest to the widest.
      sensitivity_rows: rows whose loss says how sensitive each layer is, for plans; of the embedded task's training
        problems, or the first of the data.
      samples: products with the Hessian, at most.
      limit: rows to score at most; 1000 of the embedded task when not given, all of a file.
      questions: answers to ask for at most; 0 asks none.
      max_new_tokens: tokens of an answer at most.
      repeats: turns in which speed is measured; 0 measures none.
      batch: sequences decoded at the same time, for the speed.
      dtype: of weights and activations; float32 on CPU and bfloat16 elsewhere when not given.
      seed: of the Hessian's signs.
      arithmetic_level: kind of the embedded problems, 1 to 4.
      arithmetic_hi: size of their numbers.
      json: print one JSON object.
    """
    least = {"--samples": (samples, 1), "--sensitivity-rows": (sensitivity_rows, 1), "--batch": (batch, 1)}
    least |= {"--plans": (plans, 0), "--questions": (questions, 0), "--repeats": (repeats, 0)}
    for name, (value, low) in least.items():  # now: most would be found wrong when all is measured
        if value < low:
            raise UsageError(f"eval bits: {name} {value}; expected at least {low}.")
    expect_folder("eval bits", out)

    from ..infer.widths import decode_speed, plot_widths, quality, weigh
    from ..models.hf import load, load_master
    from ..models.multi_precision import switch_bits
    from ..models.tokenizer import load_tokenizer

    master, quant = load_master(model, dtype=dtype)
    if not quant:
        raise ValueError(f"eval bits: {model} holds plain weights; expected a master (jaxaroo train qat).")
    trained = sorted({b for _, cfg in quant if cfg for b in cfg.bits}, reverse=True)
    asked = trained if bits is None else read_bits(bits)
    widths = [asked] if isinstance(asked, int) else list(asked)
    tokenizer = load_tokenizer(model)
    rows = _rows(tokenizer, data, limit, questions, arithmetic_level, arithmetic_hi)
    at = lambda b: master._replace(params=switch_bits(master.params, b, quant))
    entries: list[dict[str, Any]] = [{"name": f"{b} bits", "kind": "width", "bits": b, "model": at(b)} for b in widths]
    for entry in entries:
        _expect_width(model, entry["model"], entry["bits"])
    for pair in single:
        width, equals, folder = pair.partition("=")
        if not equals or not width.isdecimal():
            raise UsageError(f"eval bits: --single {pair}; expected WIDTH=FOLDER.")
        other = load(folder, dtype=dtype, bits=int(width))
        _expect_width(folder, other, int(width))
        entries.append({"name": f"{width} bits alone", "kind": "single", "bits": int(width), "model": other})
    if plain is not None:
        entries.append({"name": "float", "kind": "plain", "bits": None, "model": load(plain, dtype=dtype)})
    found: dict[str, Any] = {"widths": trained}
    if plans:
        found |= _search(model, data, trained, plans, sensitivity_rows, samples, seed, arithmetic_level, arithmetic_hi)
        for plan in found["plans"]:
            name = ",".join(map(str, plan["bits"]))
            entries.append({"name": name, "kind": "plan", "bits": plan["bits"], "model": at(tuple(plan["bits"]))})
    for entry in entries:
        print(f"{entry['name']} ...", file=sys.stderr)
        measured = quality(entry["model"], tokenizer, rows, max_new_tokens=max_new_tokens)
        entry |= measured._asdict() | weigh(entry["model"])._asdict()
    if repeats:
        timed = {e["name"]: e["model"] for e in entries if e["kind"] in ("width", "plain")}
        speeds = decode_speed(timed, batch=batch, repeats=repeats, progress=not json)
        for entry in entries:
            entry["tokens_per_second"] = statistics.median(speeds[entry["name"]]) if entry["name"] in speeds else None
    alone = {e["bits"]: e for e in entries if e["kind"] == "single"}
    for entry in entries:
        del entry["model"]
        if entry["kind"] == "width" and entry["bits"] in alone:
            other = alone[entry["bits"]]
            entry["tax_perplexity"] = entry["perplexity"] / other["perplexity"] - 1
            entry["tax_accuracy"] = None if entry["accuracy"] is None else other["accuracy"] - entry["accuracy"]
    found["measured"] = entries
    out.mkdir(parents=True, exist_ok=True)
    (out / "bits.json").write_text(jsonlib.dumps(jsonlib.loads(dumps(found)), indent=2) + "\n", encoding="utf-8")
    plot_widths(out / "bits.png", entries)
    print(dumps(found) if json else "\n".join(_table(entries)))
    print(f"wrote {out / 'bits.json'} and {out / 'bits.png'}", file=sys.stderr)
    return 0


# ----------------------------------------------------------------------------------------------------------- private
def _expect_width(folder: Any, model: Any, width: int) -> None:
    """Some matrix has it: a master that does not reach a width serves at its nearest."""
    import jax

    from ..jaxlib_ext.qmm import QuantisedMatrix

    is_matrix = lambda leaf: isinstance(leaf, QuantisedMatrix)
    served = {leaf.bits for leaf in jax.tree.leaves(model.params, is_leaf=is_matrix) if is_matrix(leaf)}
    if width not in served:
        own = ", ".join(map(str, sorted(served)))
        raise ValueError(f"eval bits: {folder} serves at {own} bits; expected a model that can at {width}.")


def _table(entries: list[dict[str, Any]]) -> Iterator[str]:
    name = max(5, *(len(e["name"]) for e in entries))
    yield f"{'':{name}}  bits  perplexity  accuracy      MB  tokens/s  tax"
    for e in entries:
        accuracy = "" if e["accuracy"] is None else f"{e['accuracy']:.3f}"
        speed = "" if e.get("tokens_per_second") is None else f"{e['tokens_per_second']:.0f}"
        tax = f"{100 * e['tax_perplexity']:+.2f} %" if "tax_perplexity" in e else ""
        wide = "" if e["kind"] == "plain" else f"{e['average_bits']:.2f}"
        figures = f"{wide:>4}  {e['perplexity']:10.4f}  {accuracy:>8}  {e['total'] / 1e6:6.2f}  {speed:>8}  {tax}"
        yield f"{e['name']:{name}}  {figures}".rstrip()


def _rows(tokenizer: Any, data: str, limit: int | None, questions: int, level: int, hi: int) -> Any:
    """What is scored, and what is asked."""
    from ..infer.evaluate import Question
    from ..infer.widths import Rows
    from ..train.data.tokenise import encode_sft

    encoded = [encode_sft(tokenizer, row) for row in problems(data, "sft", limit, level, hi)]
    asked = []
    for row in problems(data, "auto", questions, level, hi) if questions else ():
        if isinstance(row.get("answer"), str) and isinstance(row.get("prompt"), str):
            asked.append(Question(row["prompt"], row["answer"]))
    return Rows([e.ids for e in encoded], [int(e.scored.argmax()) for e in encoded], asked)


def _search(
    model: Path, data: str, widths: list[int], points: int, rows: int, samples: int, seed: int, level: int, hi: int
) -> dict[str, Any]:
    """How sensitive each layer is, and the best plans from the narrowest to the widest."""
    import jax
    import jax.numpy as jnp

    from ..models.hf import load_master
    from ..models.multi_precision import floats_of, from_master, scales_of
    from ..models.tokenizer import load_tokenizer
    from ..train.data.arithmetic import ArithmeticConfig, ArithmeticExamples
    from ..train.data.formats import open_examples
    from ..train.data.pipeline import BatchConfig, Batches
    from ..train.data.tokenise import encode_sft
    from ..train.precision.bit_plan import code_bits, pareto, perturbation
    from ..train.precision.hessian import matrix_traces

    master, quant = load_master(model, dtype="float32", stacked=True)
    params, tokenizer = from_master(master.params, 8, quant), load_tokenizer(model)
    builtin = data == "builtin:arithmetic"
    examples: Any = (
        ArithmeticExamples(ArithmeticConfig(level=level, hi=hi)) if builtin else open_examples(Path(data), "sft")
    )
    size = min(8, rows)
    settings = BatchConfig(size=size, max_length=min(256, master.config.max_positions), packing=False)
    stream = Batches(examples, lambda row: encode_sft(tokenizer, row), settings, seed=seed, fixed_length=True)
    windows = [next(stream) for _ in range(max(1, rows // size))]
    batches = jax.tree.map(lambda *parts: jnp.concatenate(parts), *windows)
    found = matrix_traces(master.config, params, quant, batches, jax.random.key(seed), samples=samples)
    whole = floats_of(master.params, quant), scales_of(master.params, quant)
    cost = perturbation(*whole, found.trace, widths, quant)
    best = pareto(cost, code_bits(params, widths, quant), widths, points=points)
    total: Any = sum(found.trace.values())
    return {
        "trace": [float(t) for t in total],
        "samples": int(found.samples),
        "plans": [{"bits": [int(b) for b in p.bits], "cost": p.cost, "size_bits": p.size} for p in best],
    }
