"""`jaxaroo generate`: continue prompts with a checkpoint."""

import dataclasses
import json as jsonlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..infer.guided.settings import GuideConfig
from ..infer.speculative.settings import SpeculationConfig
from .output import Bits, FloatType, UsageError, dumps, load_model

KVType = Literal["float32", "bfloat16", "float16", "int8", "int4"]


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
    bits: Bits | None = None,
    act: Literal["int8"] | None = None,
    kv_dtype: KVType | None = None,
    max_len: int | None = None,
    max_seqs: int = 8,
    tensor: int = 1,
    speculation: Annotated[SpeculationConfig, tyro.conf.arg(name="")] = SpeculationConfig(),
    speculate: Literal["auto", "on", "off"] = "auto",
    guiding: Annotated[GuideConfig, tyro.conf.arg(name="")] = GuideConfig(),
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
      bits: of a master (`train qat`) the width to serve at, or one a layer; its highest when not given.
      act: of a master, quantise what enters its matrices as well, token by token.
      kv_dtype: of the keys and values that are kept; int8 and int4 take a half and a quarter of bfloat16's memory, and
        round; that of the activations when not given.
      max_len: tokens of prompt and answer together.
      max_seqs: sequences decoded at the same time.
      tensor: devices that serve the model together, each with its part of heads, MLPs and vocabulary.
      speculation: draft several tokens, judge them at once.
      speculate: whether to draft; auto does so while it is faster than plain decoding.
      guiding: let a reward model steer every token.
      json: print one JSON object per answer.
    """
    from ..infer.engine import Engine
    from ..infer.guided.load import load_guidance
    from ..infer.sampling import Sampling
    from ..infer.speculative.load import load_speculation
    from ..models.tokenizer import load_tokenizer

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
    needs_text = speculation.corpus is not None or any(
        not (isinstance(p, list) and all(isinstance(t, int) for t in p)) for p in inputs
    )
    tokenizer = load_tokenizer(model) if needs_text or (model / "tokenizer.json").exists() else None
    served: Any = dict(dtype=dtype, bits=bits, act=act, tensor=tensor)
    loaded, at_width = load_model(model, **served, progress=sys.stderr.isatty())
    drafting = load_speculation(speculation, loaded.config, tokenizer, at_width)
    if drafting is not None and speculate != "off" and not drafting.verifier.lossless:
        print(f"warning: {drafting.verifier.name}: what follows is not the model's own distribution", file=sys.stderr)
    failed, live = False, len(inputs) == n == 1 and not json
    with Engine(
        loaded,
        tokenizer,
        max_len=max_len,
        max_seqs=max_seqs,
        kv_dtype=kv_dtype,
        speculation=drafting,
        speculate=speculate,
        guidance=load_guidance(guiding, dtype),
    ) as engine:
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
                    print(dumps(row), flush=True)
                elif delta.result.error is not None:
                    print(f"prompt {row['id']}: {delta.result.error}", file=sys.stderr)
                elif not live:
                    print(f"--- prompt {row['id']}, {row['finish_reason']}\n{_shown(row)}", flush=True)
    if live:
        print()
    return int(failed)


# ----------------------------------------------------------------------------------------------------------- private
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
