"""Decoders by name: three small ones of our own, and the published shapes that plans and benchmarks speak of.

A preset says what a decoder computes and holds no weights. The published ones are their `config.json`, end tokens with
those of `generation_config.json`, as `hf.load` reads them; the tests compare. Letters as everywhere in jaxaroo.
"""

import dataclasses
import difflib
from typing import Any

from .decoder import DecoderConfig, RopeScaling


def preset(name: str, *, vocab_size: int | None = None) -> DecoderConfig:
    """A preset by its name.

    Args:
      name: a key of `PRESETS`.
      vocab_size: of your tokenizer, in place of the preset's. The preset's end tokens go with its vocabulary: set
        `eos_ids` to those of the tokenizer.

    Raises:
      ValueError: for a name that is not there.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"preset: found {name!r}; expected one of {', '.join(PRESETS)}.{hint}")
    cfg = PRESETS[name]
    return cfg if vocab_size is None else dataclasses.replace(cfg, vocab_size=vocab_size, eos_ids=())


def _shape(*, V: int, D: int, F: int, L: int, N: int, K: int, H: int, **rest: Any) -> DecoderConfig:
    sizes = dict(vocab_size=V, embed_dim=D, ffn_dim=F, num_layers=L, num_heads=N, num_kv_heads=K, head_dim=H)
    return DecoderConfig(**sizes, **rest)


_LLAMA3: dict[str, Any] = dict(V=128_256, rope_theta=500_000.0, norm_eps=1e-5, eos_ids=(128_001,))
_QWEN25: dict[str, Any] = dict(rope_theta=1_000_000.0, qkv_bias=True, eos_ids=(151_643,), model_type="qwen2")
_QWEN3: dict[str, Any] = dict(
    V=151_936,
    H=128,
    rope_theta=1_000_000.0,
    qk_norm=True,
    max_positions=40_960,
    eos_ids=(151_643, 151_645),
    model_type="qwen3",
)
_LONG = RopeScaling(kind="llama3", factor=32.0, low_freq=1.0, high_freq=4.0, original_positions=8192)

PRESETS: dict[str, DecoderConfig] = {
    # Ours. The small ones have room for 256 bytes and 4 special tokens.
    "tiny": _shape(V=260, D=64, F=256, L=3, N=2, K=2, H=32, tie_embeddings=True, max_positions=1024),
    "1m": _shape(V=260, D=128, F=512, L=4, N=4, K=4, H=32, tie_embeddings=True, max_positions=1024),
    "3m": _shape(V=260, D=256, F=688, L=4, N=8, K=4, H=32, max_positions=2048),
    "100m": _shape(V=32_000, D=768, F=2048, L=12, N=12, K=4, H=64, rope_theta=500_000.0, max_positions=2048),
    # meta-llama/Meta-Llama-3-8B, Meta-Llama-3-70B and Llama-3.2-1B
    "llama3-8b": _shape(D=4096, F=14_336, L=32, N=32, K=8, H=128, max_positions=8192, **_LLAMA3),
    "llama3-70b": _shape(D=8192, F=28_672, L=80, N=64, K=8, H=128, max_positions=8192, **_LLAMA3),
    "llama3.2-1b": _shape(
        D=2048, F=8192, L=16, N=32, K=8, H=64, tie_embeddings=True, max_positions=131_072, rope_scaling=_LONG, **_LLAMA3
    ),
    # Qwen/Qwen2.5-0.5B, -1.5B and -7B, the base models
    "qwen2.5-0.5b": _shape(
        V=151_936, D=896, F=4864, L=24, N=14, K=2, H=64, tie_embeddings=True, max_positions=32_768, **_QWEN25
    ),
    "qwen2.5-1.5b": _shape(
        V=151_936, D=1536, F=8960, L=28, N=12, K=2, H=128, tie_embeddings=True, max_positions=131_072, **_QWEN25
    ),
    "qwen2.5-7b": _shape(V=152_064, D=3584, F=18_944, L=28, N=28, K=4, H=128, max_positions=131_072, **_QWEN25),
    # Qwen/Qwen3-0.6B and -8B
    "qwen3-0.6b": _shape(D=1024, F=3072, L=28, N=16, K=8, tie_embeddings=True, **_QWEN3),
    "qwen3-8b": _shape(D=4096, F=12_288, L=36, N=32, K=8, **_QWEN3),
}
