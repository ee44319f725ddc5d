"""`jaxaroo convert`, `quantise` and `info`: checkpoints as files."""

import sys
from pathlib import Path
from typing import Any, Literal

import tyro

from .output import UsageError, dumps


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
    from ..models.hf import load_master, save

    if source.resolve() == target.resolve():
        raise UsageError(f"convert: source and target are both {source}; expected two folders.")
    model, quant = load_master(source, dtype="stored", progress=sys.stderr.isatty())
    size = max(1, int(max_shard_gb * 2**30))
    save(target, model, dtype=dtype, quant=quant, like=source, max_shard_bytes=size, overwrite=overwrite)
    print(f"wrote {target}")
    return 0


def quantise(
    source: tyro.conf.Positional[Path],
    target: tyro.conf.Positional[Path],
    *,
    bits: str,
    method: Literal["rtn", "search", "gptq"] = "rtn",
    group: int | None = None,
    data: str | None = None,
    rows: int = 128,
    length: int = 512,
    overwrite: bool = False,
) -> int:
    """Make a master of a float model without training: the baseline of `train qat`.

    Args:
      source: folder of the float model.
      target: new folder; its tokenizer files are copied.
      bits: the width, or falling widths with commas between them, of which the first is the master's.
      method: nearest codes with scales up to the largest weight (`rtn`) or with the least error over all widths
        (`search`); or `gptq`, whose codes make up for each other's errors on your data, at the first width alone.
      group: inputs that share a scale; one scale an output channel when not given.
      data: for gptq: text or rows to calibrate with, as for `eval lm`.
      rows: pieces of the data to read at most.
      length: tokens of each; shorter rows are joined.
      overwrite: replace the target.
    """
    from ..models.decoder import Model
    from ..models.hf import load, save
    from ..models.multi_precision import MATRICES
    from ..models.ptq import quantise_model
    from ..models.quantise import QuantConfig
    from ..train.qat import read_widths

    if source.resolve() == target.resolve():
        raise UsageError(f"quantise: source and target are both {source}; expected two folders.")
    if (method == "gptq") != (data is not None):
        raise UsageError(f"quantise: --method {method}, --data {data}; expected data for gptq, and for no other.")
    rules = ((MATRICES, QuantConfig(bits=read_widths(bits), group=group, init="absmax")),)
    model = load(source, dtype="float32", progress=sys.stderr.isatty())
    calibration = None if data is None else _pieces(source, data, rows, min(length, model.config.max_positions))
    master = quantise_model(model.config, model.params, rules, method, calibration)
    save(target, Model(model.config, master), quant=rules, like=source, overwrite=overwrite)
    print(f"wrote {target}")
    return 0


def info(folder: tyro.conf.Positional[Path], *, json: bool = False) -> int:
    """Describe a checkpoint from its headers: what it is, how large, what fits where. Nothing is loaded.

    Args:
      folder: checkpoint folder.
      json: print a JSON object.
    """
    from ..models.hf import describe

    facts = describe(folder)
    if json:
        print(dumps(facts))
        return 0
    cfg = facts["config"]
    print(f"{facts['architecture']}, {facts['parameters']:,} parameters, {facts['bytes'] / 2**30:.3f} GiB on disk")
    print(
        f"  layers {cfg['num_layers']}, width {cfg['embed_dim']}, MLP {cfg['ffn_dim']}, vocabulary {cfg['vocab_size']}"
    )
    heads = f"{cfg['num_heads']} heads of {cfg['head_dim']}, {cfg['num_kv_heads']} key-value heads"
    print(f"  {heads}, window {cfg['window']}, positions {cfg['max_positions']:,}")
    if facts["bits"]:
        print(f"  a master that serves at {', '.join(map(str, facts['bits']))} bits")
    print("  stored as " + ", ".join(f"{n:,} bytes of {name}" for name, n in facts["bytes_by_dtype"].items()))
    print(f"  KV cache per token: {facts['kv_bytes_per_token']['bfloat16']:,} bytes in bfloat16")
    print(f"  device memory -> tokens of cache beside {'the master' if facts['bits'] else 'bfloat16 weights'}")
    for gib, fit in facts["fits"].items():
        print(f"    {gib:>4} GiB  " + (f"{fit:,} tokens" if fit else "weights do not fit"))
    return 0


# ----------------------------------------------------------------------------------------------------------- private
def _pieces(source: Path, data: str, rows: int, length: int) -> list[Any]:
    """Batches of 8 whole pieces of text, of one length."""
    import numpy as np

    from ..models.tokenizer import load_tokenizer
    from ..train.data.tokenise import encode_sft
    from .output import problems

    tokenizer = load_tokenizer(source)
    if data.endswith(".txt"):
        ids = np.asarray(tokenizer.encode(Path(data).read_text(encoding="utf-8")))
    else:
        ids = np.concatenate([encode_sft(tokenizer, row).ids for row in problems(data, "sft", None, 2, 20)])
    number = min(rows, len(ids) // length) // 8 * 8
    if not number:
        raise ValueError(
            f"quantise: {data} holds {len(ids)} tokens; expected 8 pieces of {length} at least. Lower --length."
        )
    return list(ids[: number * length].reshape(-1, 8, length).astype(np.int32))
