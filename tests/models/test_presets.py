"""Oracle: the published parameter counts, and the published config.json read by the importer."""

import dataclasses
import math

import jax
import pytest

from jaxaroo.models.decoder import param_shapes
from jaxaroo.models.hf_config import config_from_hf, config_to_hf
from jaxaroo.models.presets import PRESETS, preset

# What huggingface.co shows for the safetensors of each repository.
PUBLISHED = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "vocab_size"),
)
LLAMA = dict(model_type="llama", rope_theta=500000.0, rms_norm_eps=1e-05, attention_bias=False, eos_token_id=128001)
QWEN2 = dict(
    model_type="qwen2", rope_theta=1000000.0, rms_norm_eps=1e-06, use_sliding_window=False, eos_token_id=151643
)
QWEN3 = dict(
    model_type="qwen3",
    rope_theta=1000000,
    rms_norm_eps=1e-06,
    use_sliding_window=False,
    sliding_window=None,
    attention_bias=False,
    head_dim=128,
    eos_token_id=[151645, 151643],  # generation_config.json
    max_position_embeddings=40960,
)
STRETCHED = dict(
    factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192, rope_type="llama3"
)
CONFIGS = {
    "llama3-8b": ((4096, 14336, 32, 32, 8, 128256), LLAMA | dict(max_position_embeddings=8192)),
    "llama3-70b": ((8192, 28672, 80, 64, 8, 128256), LLAMA | dict(max_position_embeddings=8192)),
    "llama3.2-1b": (
        (2048, 8192, 16, 32, 8, 128256),
        LLAMA | dict(max_position_embeddings=131072, tie_word_embeddings=True, rope_scaling=STRETCHED, head_dim=64),
    ),
    "qwen2.5-0.5b": (
        (896, 4864, 24, 14, 2, 151936),
        QWEN2 | dict(max_position_embeddings=32768, sliding_window=32768, tie_word_embeddings=True),
    ),
    "qwen2.5-1.5b": (
        (1536, 8960, 28, 12, 2, 151936),
        QWEN2 | dict(max_position_embeddings=131072, sliding_window=131072, tie_word_embeddings=True),
    ),
    "qwen2.5-7b": (
        (3584, 18944, 28, 28, 4, 152064),
        QWEN2 | dict(max_position_embeddings=131072, sliding_window=131072, tie_word_embeddings=False),
    ),
    "qwen3-0.6b": ((1024, 3072, 28, 16, 8, 151936), QWEN3 | dict(tie_word_embeddings=True)),
    "qwen3-8b": ((4096, 12288, 36, 32, 8, 151936), QWEN3 | dict(tie_word_embeddings=False)),
}
OURS = {  # D V twice or once, L layers of 2 N H D + 2 K H D + 3 F D + 2 D, the last norm's D
    "tiny": 260 * 64 + 3 * (4 * 64 * 64 + 3 * 256 * 64 + 2 * 64) + 64,
    "1m": 260 * 128 + 4 * (4 * 128 * 128 + 3 * 512 * 128 + 2 * 128) + 128,
    "3m": 2 * 260 * 256 + 4 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 688 * 256 + 2 * 256) + 256,
    "100m": 2 * 32_000 * 768 + 12 * (2 * 768 * 768 + 2 * 256 * 768 + 3 * 2048 * 768 + 2 * 768) + 768,
}


@pytest.mark.parametrize(("name", "count"), [*PUBLISHED.items(), *OURS.items()])
def test_a_preset_has_the_published_number_of_parameters(name, count):
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(preset(name)))) == count


@pytest.mark.parametrize("name", CONFIGS)
def test_a_preset_is_what_its_config_json_says(name):
    sizes, rest = CONFIGS[name]
    assert preset(name) == config_from_hf(dict(zip(SIZES, sizes, strict=True)) | rest)


def test_every_preset_is_held_to_a_source_and_can_be_written():
    assert PRESETS.keys() == PUBLISHED.keys() | OURS.keys() == CONFIGS.keys() | OURS.keys()
    for cfg in PRESETS.values():
        assert config_from_hf(config_to_hf(cfg)) == cfg
        assert max(cfg.eos_ids, default=0) < cfg.vocab_size


def test_another_vocabulary_takes_the_end_tokens_with_it():
    cfg = preset("qwen3-8b", vocab_size=75)
    assert cfg == dataclasses.replace(PRESETS["qwen3-8b"], vocab_size=75, eos_ids=())
    assert preset("qwen3-8b") is PRESETS["qwen3-8b"]


@pytest.mark.errors
def test_a_name_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(
        ValueError, match=r"preset: found 'llama3-8B'; expected one of tiny, .*Did you mean 'llama3-8b'"
    ):
        preset("llama3-8B")
    with pytest.raises(ValueError, match=r"expected one of tiny, 1m, 3m, 100m, .*qwen3-8b\.$"):
        preset("???")
    with pytest.raises(ValueError, match="vocab_size: found 0"):
        preset("tiny", vocab_size=0)
