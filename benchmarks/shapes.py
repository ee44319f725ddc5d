"""Model shapes that benchmarks and proofs share."""

from jaxaroo.models.decoder import DecoderConfig
from jaxaroo.models.presets import PRESETS

LLAMA_100M = PRESETS["100m"]

LLAMA_8B = DecoderConfig(
    vocab_size=128_256,
    embed_dim=4096,
    ffn_dim=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=500_000.0,
    max_positions=8192,
)

SHAPES = {"llama-100m": LLAMA_100M, "llama-8b": LLAMA_8B}
