"""The `jaxaroo` command: each subcommand is a function here; tyro reads its arguments from the signature.

The only file that knows both training and inference. Results go to standard output, progress and errors to standard
error; the exit status is 0, 1 for a failure that the message explains, 2 for a misused command, 130 after Ctrl-C.
"""

import dataclasses
import json as jsonlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

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
def quickstart(*, out: Path = Path("quickstart-out"), seconds: float = 60.0, prompt: str = "There was movement") -> int:
    """Train a tiny byte-level model on three poems, write it in Hugging Face format, load it again, let it speak.

    Args:
      out: folder for the checkpoint; an earlier quick start's is replaced.
      seconds: how long to train.
      prompt: what the model continues.
    """
    import jax
    import optax

    from .infer.engine import Engine
    from .infer.sampling import Sampling
    from .models.decoder import DecoderConfig, Model, init_params
    from .models.hf import load, save
    from .models.tokenizer import byte_tokenizer, load_tokenizer
    from .train.data.text import read_verse, windows
    from .train.loop import fit
    from .train.step import init_state, make_train_step

    folder = out / "checkpoint"
    if out.exists() and any(p.name != "checkpoint" for p in out.iterdir()):
        raise FileExistsError(f"quickstart: {out} holds other files; expected a new folder. Choose another --out.")
    tokenizer, steps, length = byte_tokenizer(), 400, 160
    cfg = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        embed_dim=128,
        ffn_dim=384,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_positions=length,
        tie_embeddings=True,
        eos_ids=tokenizer.eos_ids,
    )
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_cosine_decay_schedule(0, 3e-3, 20, steps))
    )
    params = jax.jit(lambda: init_params(cfg, jax.random.key(0)))()
    print(
        f"training {sum(p.size for p in jax.tree.leaves(params)):,} parameters on {jax.devices()[0]}", file=sys.stderr
    )
    assert tokenizer.bos_id is not None
    text = tokenizer.encode(read_verse(), bos=False)
    batches = windows(text, batch=12, length=length, seed=0, bos_id=tokenizer.bos_id)
    state, records = fit(
        init_state(params, tx), make_train_step(cfg, tx), batches, steps=steps, seconds=seconds, progress=True
    )
    last = records[-1]
    print(f"loss {records[0]['loss']:.3f} -> {last['loss']:.3f} nats a byte in {last['step']} steps", file=sys.stderr)
    save(folder, Model(cfg, state.params), overwrite=True)
    tokenizer.save(folder)
    print(f"wrote {folder}; loading it again\n", file=sys.stderr)
    with Engine(load(folder), load_tokenizer(folder)) as engine:
        print(prompt, end="", flush=True)
        for delta in engine.generate(prompt, Sampling(max_tokens=128, temperature=0.5, seed=0), stream=True):
            print(delta.text, end="", flush=True)
    print(f'\n\nmore: jaxaroo generate --model {folder} --prompt "And Clancy"', file=sys.stderr)
    return 0


# --------------------------------------------------------------------------------------------------------------- main
COMMANDS = {"generate": generate, "convert": convert, "info": info, "quickstart": quickstart}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    _use_compilation_cache()
    try:
        return tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="jaxaroo", args=argv, description=__doc__)
    except UsageError as e:
        print(f"jaxaroo: {e}", file=sys.stderr)
        return 2
    except (ValueError, OSError, MemoryError) as e:
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
