"""`jaxaroo convert` and `jaxaroo info`: checkpoints as files."""

import sys
from pathlib import Path
from typing import Literal

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
    from ..models.hf import load, save

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
    print("  stored as " + ", ".join(f"{n:,} bytes of {name}" for name, n in facts["bytes_by_dtype"].items()))
    print(f"  KV cache per token: {facts['kv_bytes_per_token']['bfloat16']:,} bytes in bfloat16")
    print("  device memory -> tokens of cache beside bfloat16 weights")
    for gib, fit in facts["fits"].items():
        print(f"    {gib:>4} GiB  " + (f"{fit:,} tokens" if fit else "weights do not fit"))
    return 0
