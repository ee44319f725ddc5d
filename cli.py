"""The `jaxaroo` command: each subcommand is a function here; tyro reads its arguments from the signature.

The only file that knows both training and inference. Results go to standard output, progress and errors to standard
error; the exit status is 0, 1 for a failure that the message explains, 2 for a misused command, 130 after Ctrl-C.
"""

import dataclasses
import itertools
import json as jsonlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

FloatType = Literal["float32", "bfloat16", "float16"]
CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


class UsageError(Exception):
    """Arguments that do not go together."""


# ---------------------------------------------------------------------------------------------------------- generate
def generate(
    *,
    model: Path,
    prompt: str | None = None,
    prompts: Path | None = None,
    tokens: str | None = None,
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    n: int = 1,
    stop: tuple[str, ...] = (),
    ignore_eos: bool = False,
    dtype: FloatType | None = None,
    max_len: int | None = None,
    max_seqs: int = 8,
    json: bool = False,
) -> int:
    """Continue prompts with a Hugging Face checkpoint.

    Args:
      model: folder with config.json, model.safetensors and tokenizer.json.
      prompt: one text.
      prompts: JSON lines, each {"prompt": text}, {"messages": [...]} or {"tokens": [...]}.
      tokens: one prompt as token ids, "1,2,3".
      chat: wrap text prompts in the model's chat template.
      max_new_tokens: tokens to write at most.
      temperature: 0 is greedy.
      top_p: keep the likeliest tokens up to this probability.
      top_k: keep this many of the likeliest tokens; 0 keeps all.
      min_p: keep tokens at least this fraction as likely as the likeliest.
      repetition_penalty: above 1 discourages what was said before.
      seed: makes the answer repeatable.
      n: answers per prompt.
      stop: strings that end an answer.
      ignore_eos: go on past the model's end token.
      dtype: of weights and activations; float32 on CPU and bfloat16 elsewhere when not given.
      max_len: tokens of prompt and answer together.
      max_seqs: sequences decoded at the same time.
      json: print one JSON object per answer.
    """
    from .infer.engine import Engine
    from .infer.sampling import Sampling
    from .models.hf import load
    from .models.tokenizer import load_tokenizer

    if sum(x is not None for x in (prompt, prompts, tokens)) != 1:
        raise UsageError("generate: expected exactly one of --prompt, --prompts and --tokens.")
    inputs: list[Any]
    if chat and tokens is not None:
        raise UsageError("generate: --chat and --tokens; expected text to wrap in the chat template.")
    if prompts is not None:
        inputs = list(_read_prompts(prompts))
        if not inputs:
            raise UsageError(f"generate: no prompts in {prompts}; expected one JSON object a line.")
    else:
        inputs = [_parse_tokens(tokens) if tokens is not None else prompt]
    if chat:
        inputs = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in inputs]
    sampling = Sampling(
        max_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        n=n,
        stop=stop,
        ignore_eos=ignore_eos,
    )
    needs_text = any(not (isinstance(p, list) and all(isinstance(t, int) for t in p)) for p in inputs)
    tokenizer = load_tokenizer(model) if needs_text or (model / "tokenizer.json").exists() else None
    loaded = load(model, dtype=dtype, progress=sys.stderr.isatty())
    failed, live = False, len(inputs) == n == 1 and not json
    with Engine(loaded, tokenizer, max_len=max_len, max_seqs=max_seqs) as engine:
        first: str | None = None
        for delta in engine.generate(inputs, sampling, stream=True):
            first = delta.id if first is None else first
            if live:
                print(delta.text if tokenizer else "".join(f"{t} " for t in delta.token_ids), end="", flush=True)
            if delta.result is None:
                continue
            failed |= delta.result.error is not None
            for row in _rows(delta.result, inputs):
                if json:
                    print(_dumps(row), flush=True)
                elif delta.result.error is not None:
                    print(f"prompt {row['id']}: {delta.result.error}", file=sys.stderr)
                elif not live:
                    print(f"--- prompt {row['id']}, {row['finish_reason']}\n{_shown(row)}", flush=True)
    if live:
        print()
    return int(failed)


def _rows(result: Any, inputs: list[Any]) -> Iterator[dict[str, Any]]:
    """One JSON row per answer, or one that tells the error."""
    error = result.error and {"message": result.error.message, "type": result.error.kind, "param": result.error.param}
    head = {"id": int(result.id), "prompt": inputs[int(result.id)], "prompt_token_ids": result.prompt_token_ids}
    tail = {"timings": result.timings._asdict(), "error": error}
    for answer in result.outputs:
        body = {k: v for k, v in dataclasses.asdict(answer).items() if k != "logprobs"}
        yield head | body | tail
    if not result.outputs:
        yield head | {"index": 0, "text": None, "token_ids": [], "finish_reason": "error"} | tail


def _shown(row: dict[str, Any]) -> str:
    return row["text"] if row["text"] is not None else " ".join(map(str, row["token_ids"]))


def _parse_tokens(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"generate: --tokens {text!r}; expected integers with commas, as in 1,2,3.") from None


def _read_prompts(path: Path) -> Iterator[Any]:
    expected = 'expected {"prompt": text or messages}, {"messages": [...]} or {"tokens": [...]}'
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = jsonlib.loads(line)
        except ValueError as e:
            raise UsageError(f"{path}:{number}: not JSON ({e}); {expected}.") from None
        found = [row[k] for k in ("prompt", "messages", "tokens") if k in row] if isinstance(row, dict) else []
        if len(found) != 1 or not isinstance(found[0], str | list):
            raise UsageError(f"{path}:{number}: found {line[:80]!r}; {expected}.")
        yield found[0]


# ---------------------------------------------------------------------------------------------------- convert and info
def convert(
    source: tyro.conf.Positional[Path],
    target: tyro.conf.Positional[Path],
    *,
    dtype: Literal["float32", "bfloat16", "float16", "stored"] = "stored",
    max_shard_gb: float = 5.0,
    overwrite: bool = False,
) -> int:
    """Check a checkpoint, and write it again: other dtype, other shards.

    Args:
      source: checkpoint folder.
      target: new folder; its tokenizer files are copied.
      dtype: of the tensors written.
      max_shard_gb: GiB per file.
      overwrite: replace the target.
    """
    from .models.hf import load, save

    if source.resolve() == target.resolve():
        raise UsageError(f"convert: source and target are both {source}; expected two folders.")
    model = load(source, dtype="stored", progress=sys.stderr.isatty())
    size = max(1, int(max_shard_gb * 2**30))
    save(target, model, dtype=dtype, like=source, max_shard_bytes=size, overwrite=overwrite)
    print(f"wrote {target}")
    return 0


def info(folder: tyro.conf.Positional[Path], *, json: bool = False) -> int:
    """Describe a checkpoint from its headers: what it is, how large, what fits where. Nothing is loaded.

    Args:
      folder: checkpoint folder.
      json: print a JSON object.
    """
    from .models.hf import describe

    facts = describe(folder)
    if json:
        print(_dumps(facts))
        return 0
    cfg = facts["config"]
    print(f"{facts['architecture']}, {facts['parameters']:,} parameters, {facts['bytes'] / 2**30:.3f} GiB on disk")
    print(
        f"  layers {cfg['num_layers']}, width {cfg['embed_dim']}, MLP {cfg['ffn_dim']}, vocabulary {cfg['vocab_size']}"
    )
    heads = f"{cfg['num_heads']} heads of {cfg['head_dim']}, {cfg['num_kv_heads']} key-value heads"
    print(f"  {heads}, window {cfg['window']}, positions {cfg['max_positions']:,}")
    print("  stored as " + ", ".join(f"{n:,} bytes of {name}" for name, n in facts["bytes_by_dtype"].items()))
    print(f"  KV cache per token: {facts['kv_bytes_per_token']['bfloat16']:,} bytes in bfloat16")
    print("  device memory -> tokens of cache beside bfloat16 weights")
    for gib, fit in facts["fits"].items():
        print(f"    {gib:>4} GiB  " + (f"{fit:,} tokens" if fit else "weights do not fit"))
    return 0


# -------------------------------------------------------------------------------------------------------- quick start
def quickstart(
    *, out: Path = Path("quickstart-out"), seconds: float = 60.0, steps: int = 1500, prompt: str = "There was movement"
) -> int:
    """Train two tiny models from nothing: one recites poems, one reasons in steps that can be checked.

    Args:
      out: folder for both; an earlier quick start's is replaced.
      seconds: how long the first learns three poems, byte by byte.
      steps: how long the second learns word problems, in updates.
      prompt: what the first continues.
    """
    if out.exists() and any(p.name not in ("checkpoint", "arithmetic") for p in out.iterdir()):
        raise FileExistsError(f"quickstart: {out} holds other files; expected a new folder. Choose another --out.")
    _recite(out / "checkpoint", seconds, prompt)
    _reason(out / "arithmetic", steps)
    print(
        f"""
more:
  jaxaroo generate --model {out / "checkpoint"} --prompt "And Clancy"
  jaxaroo eval answers --model {out / "arithmetic" / "model"} --data builtin:arithmetic --max-new-tokens 64
  README.md: a model that solves most of these problems, in five minutes""",
        file=sys.stderr,
    )
    return 0


def _recite(folder: Path, seconds: float, prompt: str) -> None:
    """The loop in the small: a step, batches, an engine; no run folder."""
    import jax

    from .infer.engine import Engine
    from .infer.sampling import Sampling
    from .models.decoder import Model, init_params
    from .models.hf import load, save
    from .models.presets import preset
    from .models.tokenizer import byte_tokenizer, load_tokenizer
    from .train.data.pipeline import count_units
    from .train.data.text import read_verse, windows
    from .train.loop import fit
    from .train.objectives import sft
    from .train.optimizer import OptimizerConfig, make_optimizer
    from .train.state import init_state
    from .train.step import make_train_step

    tokenizer, steps, length = byte_tokenizer(), 400, 160
    sizes = dict(embed_dim=128, ffn_dim=384, num_layers=4, num_heads=4, max_positions=length)
    cfg = dataclasses.replace(preset("tiny", vocab_size=tokenizer.vocab_size), **sizes, eos_ids=tokenizer.eos_ids)
    tx = make_optimizer(OptimizerConfig(learning_rate=3e-3, warmup_steps=20, decay_to=0.0, weight_decay=1e-4), steps)
    params = jax.jit(lambda: init_params(cfg, jax.random.key(0)))()
    print(
        f"training {sum(p.size for p in jax.tree.leaves(params)):,} parameters on {jax.devices()[0]}", file=sys.stderr
    )
    assert tokenizer.bos_id is not None
    text = tokenizer.encode(read_verse(), bos=False)
    batches = windows(text, batch=12, length=length, seed=0, bos_id=tokenizer.bos_id)
    step, end, records = make_train_step(sft.make_loss(cfg), tx, count_units), time.monotonic() + seconds, []
    enough = lambda _: time.monotonic() > end
    state = fit(init_state(params, tx), step, batches, steps=steps, log=records.extend, stop=enough, progress=True)
    last = records[-1]
    print(f"loss {records[0]['loss']:.3f} -> {last['loss']:.3f} nats a byte in {last['step']} steps", file=sys.stderr)
    save(folder, Model(cfg, state.params), overwrite=True)
    tokenizer.save(folder)
    print(f"wrote {folder}; loading it again\n", file=sys.stderr)
    with Engine(load(folder), load_tokenizer(folder)) as engine:
        print(prompt, end="", flush=True)
        for delta in engine.generate(prompt, Sampling(max_tokens=128, temperature=0.5, seed=0), stream=True):
            print(delta.text, end="", flush=True)
    print(end="\n\n", flush=True)


def _reason(out: Path, steps: int) -> None:
    """A whole run, and what its model makes of a problem that it has not seen."""
    import shutil

    from .infer.engine import Engine
    from .infer.sampling import Sampling
    from .models.hf import load
    from .models.tokenizer import load_tokenizer
    from .train.data.arithmetic import ArithmeticConfig, check_lines, make_problem
    from .train.data.pipeline import BatchConfig
    from .train.optimizer import OptimizerConfig
    from .train.run import RunConfig, start

    shutil.rmtree(out, ignore_errors=True)
    batch = BatchConfig(size=16, max_length=128, packing=False)
    rate = OptimizerConfig(learning_rate=2e-3, warmup_steps=min(50, steps))
    print("training on word problems", file=sys.stderr)
    cfg = RunConfig(model="preset:tiny", data="builtin:arithmetic", out=out, steps=steps, batch=batch, optimizer=rate)
    if not start("sft", cfg, progress=True).finished:
        raise KeyboardInterrupt
    problem = make_problem(ArithmeticConfig(), "test", 0)
    with Engine(load(out / "model"), load_tokenizer(out / "model")) as engine:
        [result] = engine.generate(f"{problem.question}\n", Sampling(max_tokens=64, temperature=0.0))
    lines = (result.outputs[0].text or "").splitlines()
    print(problem.question)
    for line, right in zip(lines, check_lines(problem, lines), strict=True):
        print(f"  {line:20} {'right' if right else 'wrong'}")


# ------------------------------------------------------------------------------------------------------------- train
def train_sft() -> int:
    """Fine-tune a model on prompts and completions."""
    raise AssertionError("`main` puts what `_train_sft` makes in this place")


def _train_sft(args: list[str]) -> Callable[..., int]:
    """The command with all its settings, those of `--config` as defaults; made when needed, since it imports JAX."""
    from .train.config import build, read_settings
    from .train.run import RunConfig, start

    config = _config_of(args)
    needed = dict.fromkeys(("model", "data", "out"), tyro.MISSING)
    default = build(RunConfig, needed | (read_settings(RunConfig, config) if config else {}))

    def command(
        *,
        settings: Annotated[RunConfig, tyro.conf.arg(name="")] = default,
        config: Path | None = None,
        coordinator: str | None = None,
        num_processes: int | None = None,
        process_id: int | None = None,
    ) -> int:
        """Fine-tune a model on prompts and completions.

        Args:
          settings: of the run.
          config: YAML file of settings; what is given here as well wins.
          coordinator: HOST:PORT of process 0, when a run of several processes is not started by SLURM or on a TPU pod.
          num_processes: how many take part.
          process_id: which of them this is.
        """
        _join(coordinator, num_processes, process_id)
        return _leave(start("sft", settings, progress=True), settings.out)

    return command


def _config_of(args: list[str]) -> Path | None:
    """What stands behind `--config`; the parser comes too late for it, as it wants the defaults first."""
    found = [b for a, b in itertools.pairwise(args) if a == "--config"]
    found += [arg.removeprefix("--config=") for arg in args if arg.startswith("--config=")]
    return Path(found[-1]) if found else None


def train_resume(
    folder: tyro.conf.Positional[Path],
    /,
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> int:
    """Go on with a run that was left, by whatever it was stopped.

    Args:
      folder: the run's --out.
      coordinator: HOST:PORT of process 0, when a run of several processes is not started by SLURM or on a TPU pod.
      num_processes: how many take part.
      process_id: which of them this is.
    """
    from .train.run import resume

    _join(coordinator, num_processes, process_id)
    return _leave(resume(folder, progress=True), folder)


def _join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    from .sharding.mesh import start_processes

    start_processes(coordinator=coordinator, num_processes=num_processes, process_id=process_id)


def _leave(outcome: Any, out: Path) -> int:
    """Say where the run stands; the exit status of one that was stopped is that of its signal."""
    if outcome.finished:
        print(f"step {outcome.step}: wrote {out / 'model'}, curve in {out / 'loss.png'}", file=sys.stderr)
        return 0
    print(f"stopped at step {outcome.step}; go on with: jaxaroo train resume {out}", file=sys.stderr)
    return 128 + (outcome.signal or 15)


# -------------------------------------------------------------------------------------------------------------- eval
def eval_lm(
    *,
    model: Path,
    data: str,
    window: int = 1024,
    stride: int | None = None,
    batch: int = 8,
    limit: int | None = None,
    dtype: FloatType | None = None,
    arithmetic_level: int = 2,
    arithmetic_hi: int = 20,
    json: bool = False,
) -> int:
    """Perplexity: how well a model predicts text, or completions given their prompts.

    Args:
      model: folder of a Hugging Face checkpoint.
      data: a .txt file, rows as for training (scored from the first completion token on, so with all that follows in
        a chat of several turns), or builtin:arithmetic (its test problems).
      window: tokens that the model sees at a time.
      stride: tokens from window to window in longer texts; half a window when not given.
      batch: windows scored together.
      limit: rows to read at most; 1000 test problems of the embedded task when not given, all of a file.
      dtype: of weights and activations; float32 on CPU and bfloat16 elsewhere when not given.
      arithmetic_level: kind of the embedded problems, 1 to 4.
      arithmetic_hi: size of their numbers.
      json: print one JSON object.
    """
    from .infer.evaluate import evaluate_lm
    from .models.hf import load
    from .models.tokenizer import load_tokenizer
    from .train.data.tokenise import encode_sft

    tokenizer, size = load_tokenizer(model), None
    if data.endswith(".txt"):
        text = Path(data).read_text(encoding="utf-8")
        rows, starts, size = [tokenizer.encode(text)], [0], len(text.encode())
    else:
        encoded = [encode_sft(tokenizer, row) for row in _problems(data, "sft", limit, arithmetic_level, arithmetic_hi)]
        rows, starts = [e.ids for e in encoded], [int(e.scored.argmax()) for e in encoded]
    report = evaluate_lm(
        load(model, dtype=dtype),
        rows,
        window=window,
        stride=stride,
        batch=batch,
        loss_from=starts,
        num_bytes=size,
        progress=not json,
    )
    per_byte = "" if report.bits_per_byte is None else f", {report.bits_per_byte:.4f} bits a byte"
    line = f"perplexity {report.perplexity:.4f} ({report.mean:.4f} nats a token{per_byte}) over {report.tokens} tokens"
    print(_dumps(report._asdict()) if json else line)
    return 0


def eval_answers(
    *,
    model: Path,
    data: str,
    limit: int | None = None,
    samples: int = 1,
    temperature: float = 0.0,
    max_new_tokens: int = 512,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    chat: bool = False,
    dtype: FloatType | None = None,
    max_seqs: int = 32,
    out: Path | None = None,
    arithmetic_level: int = 2,
    arithmetic_hi: int = 20,
    json: bool = False,
) -> int:
    """Let a model answer questions, and count the final answers that are right.

    Args:
      model: folder of a Hugging Face checkpoint.
      data: rows with `question` and `answer` (GSM8K), or with `prompt` and `answer`; or builtin:arithmetic.
      limit: questions to ask at most; 200 of the embedded task's test problems when not given, all of a file.
      samples: answers to each; more than one adds pass@k and the majority's vote.
      temperature: 0 is greedy.
      max_new_tokens: tokens to write at most.
      seed: makes the answers repeatable.
      stop: strings that end an answer.
      chat: wrap questions in the model's chat template.
      dtype: of weights and activations; float32 on CPU and bfloat16 elsewhere when not given.
      max_seqs: answers written at the same time.
      out: JSONL file for questions, answers and verdicts.
      arithmetic_level: kind of the embedded problems, 1 to 4.
      arithmetic_hi: size of their numbers.
      json: print one JSON object.
    """
    from .infer.engine import Engine
    from .infer.evaluate import Question, evaluate_answers
    from .infer.sampling import Sampling
    from .models.hf import load
    from .models.tokenizer import load_tokenizer

    if samples > 1 and temperature == 0:
        raise UsageError("eval answers: --samples above 1 needs a --temperature above 0, or all are the same.")
    questions = []
    for row in _problems(data, "auto", limit, arithmetic_level, arithmetic_hi):
        if not isinstance(answer := row.get("answer"), str):
            raise ValueError(f"eval answers: a row of {data} has columns {sorted(row)}; expected an `answer` in text.")
        prompt = [{"role": "user", "content": row["prompt"]}] if chat else row["prompt"]
        questions.append(Question(prompt, answer))
    settings = Sampling(temperature=temperature, max_tokens=max_new_tokens, seed=seed, stop=stop)
    with Engine(load(model, dtype=dtype), load_tokenizer(model), max_seqs=max_seqs) as engine:
        report = evaluate_answers(engine, questions, settings, samples=samples, progress=not json)
    result = {name: value for name, value in report._asdict().items() if name != "rows"}
    if out is not None:
        out.write_text("".join(_dumps(row) + "\n" for row in report.rows), encoding="utf-8")
    low, high = report.interval
    line = f"accuracy {report.accuracy:.4f} (95 %: {low:.4f} to {high:.4f}) over {report.n} questions"
    most = max(report.pass_at)
    more = (
        "" if report.majority is None else f"; majority {report.majority:.4f}, pass@{most} {report.pass_at[most]:.4f}"
    )
    print(_dumps(result) if json else line + more)
    return 0


def _problems(data: str, layout: Any, limit: int | None, level: int, hi: int) -> Iterator[Any]:
    from .train.data.arithmetic import ArithmeticConfig, ArithmeticExamples
    from .train.data.formats import open_examples

    if data == "builtin:arithmetic":
        number = 200 if layout == "auto" else 1000
        examples: Any = ArithmeticExamples(ArithmeticConfig(level=level, hi=hi), "test", limit or number)
    else:
        examples = open_examples(Path(data), layout, progress=True)
    yield from (examples[i] for i in range(min(len(examples), limit or len(examples))))


# --------------------------------------------------------------------------------------------------------------- main
COMMANDS: dict[str, Callable[..., int]] = {
    "generate": generate,
    "convert": convert,
    "info": info,
    "train sft": train_sft,
    "train resume": train_resume,
    "eval lm": eval_lm,
    "eval answers": eval_answers,
    "quickstart": quickstart,
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    _use_compilation_cache()
    try:
        args = list(sys.argv[1:] if argv is None else argv)
        commands = COMMANDS | ({"train sft": _train_sft(args)} if args[:2] == ["train", "sft"] else {})
        if " ".join(args[:2]) in commands:
            args = [" ".join(args[:2]), *args[2:]]
        elif any(name.startswith(f"{args[0]} ") for name in commands if args):  # `jaxaroo train`, and typos behind it
            commands, args = {name: f for name, f in commands.items() if name.startswith(args[0])}, args[1:]
        return tyro.extras.subcommand_cli_from_dict(commands, prog="jaxaroo", args=args, description=__doc__)
    except UsageError as e:
        print(f"jaxaroo: {e}", file=sys.stderr)
        return 2
    except (ValueError, OSError, MemoryError, ArithmeticError) as e:
        print(f"jaxaroo: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\njaxaroo: interrupted", file=sys.stderr)
        return 130


def _use_compilation_cache() -> None:
    """Compiled programs outlive the process, unless the environment says where else, or nowhere (empty)."""
    if CACHE_VARIABLE not in os.environ:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ[CACHE_VARIABLE] = str(base / "jaxaroo" / "xla")


def _dumps(value: Any) -> str:
    def plain(x: Any) -> Any:
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return dataclasses.asdict(x)
        raise TypeError(f"{type(x).__name__} is not JSON")

    return jsonlib.dumps(value, ensure_ascii=False, default=plain)


if __name__ == "__main__":
    sys.exit(main())
