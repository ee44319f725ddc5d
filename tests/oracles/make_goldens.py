"""Writes tests/goldens: tiny random checkpoints and what Hugging Face transformers computes from them.

    python3.11 -m venv .venv-oracle && .venv-oracle/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    .venv-oracle/bin/python tests/oracles/make_goldens.py [case ...]      # no case: all of them, under a minute

The tests read only the files; torch and transformers are needed here and nowhere else.

`<case>/` holds `config.json`, `model.safetensors` (`qwen3`: shards and their index) and `io.npz`, computed in float32
with eager attention from the files as they lie there, so 16-bit weights are cast up first:
    input_ids, attention_mask [2, T] (row 1 is padded on the right), logits [2, T, V],
    hidden [L+1, 2, T, D] (the embeddings, then after each layer; the last entry is after the final norm),
    greedy_0, greedy_1 (each prompt, run alone, and its 24 greedy tokens).
What transformers puts at padded positions of logits and hidden means nothing; compare where attention_mask is 1.

Weights are drawn wide, norms around one, biases away from zero and the norm's epsilon large, so that a wrong detail
moves the logits. A seed is kept if no greedy token was a near tie and the continuations are not one word repeated.

`sampling.npz` holds logits [6, V], input_ids [6, 12], and one array per entry of `settings`, a JSON object from the
array's name to the steps [[setting, value], ...] in order. An array is what transformers' logits processors leave of
the logits, -inf where they removed a token. No cut-off of these is near a tie. The arrays `ties_at_cutoff_*`, with
`ties_at_cutoff_logits` [1, V], are the exception: there the top-p result depends on the order a sort gives to equals.
"""

import copy
import json
import logging
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn

GOLDENS = Path(__file__).parents[1] / "goldens"
T, SHORT, NEW = 20, 13, 24  # prompt lengths of the two rows, and how many tokens follow
MARGIN = 1e-2  # between the best and the second logit, at every generated position
MAX_BYTES = 300_000
SEEDS = range(100)

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-3}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False}  # never stops
SMALL |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}  # with 16 no wavelength (2 pi at least) is short enough to be kept
BIAS = {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4, "vocab_size": 128, "rms_norm_eps": 3e-3}
MIXED = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "num_hidden_layers": 3}

# name -> (family, what differs from SMALL, how it is saved)
CASES = {
    "llama3_rope": ("Llama", {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": LLAMA3}, {}),
    "llama_bias": ("Llama", BIAS | {"rope_parameters": LINEAR}, {"transformers_4": True}),
    "mistral_window": ("Mistral", {"head_dim": 16, "sliding_window": 6, "vocab_size": 160, "rms_norm_eps": 4e-3}, {}),
    "qwen2_mixed": ("Qwen2", MIXED | {"tie_word_embeddings": True, "rms_norm_eps": 5e-3}, {}),
    "qwen3": ("Qwen3", {"head_dim": 16, "vocab_size": 128, "rms_norm_eps": 6e-3}, {"shard": "48KB"}),
    "llama_bf16": ("Llama", {"num_key_value_heads": 1}, {"dtype": torch.bfloat16}),
    "llama_f16": ("Llama", {"num_key_value_heads": 1}, {"dtype": torch.float16}),
}


# ---- checkpoints


def random_model(family: str, settings: dict, seed: int, dtype: torch.dtype) -> nn.Module:
    """A float32 model whose weights are exact in `dtype`."""
    config = getattr(transformers, f"{family}Config")(**SMALL | settings)
    model = getattr(transformers, f"{family}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    rng = np.random.default_rng(seed)
    for name, weight in sorted(model.named_parameters()):
        norm = name.endswith("norm.weight")
        drawn = rng.uniform(0.5, 1.5, weight.shape) if norm else rng.normal(0, 0.25, weight.shape)
        weight.data = torch.tensor(drawn).to(dtype).float()
    model.tie_weights()
    return model


def save(model: nn.Module, folder: Path, dtype=torch.float32, shard="1GB", transformers_4=False):
    shutil.rmtree(folder, ignore_errors=True)
    copy.deepcopy(model).to(dtype).save_pretrained(folder, max_shard_size=shard)  # .to() spoils the rope's buffers
    (folder / "generation_config.json").unlink(missing_ok=True)
    if transformers_4:
        config = json.loads((folder / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope["rope_theta"]
        config["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
        config["torch_dtype"] = config.pop("dtype")
        del config["head_dim"]  # older files leave it to hidden_size / num_attention_heads
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def io(model: nn.Module, seed: int) -> tuple[dict, float]:
    """The arrays of io.npz, and the smallest margin of a greedy choice (0 if a choice or the text is not usable)."""
    V, margins = model.config.vocab_size, []
    ids = torch.tensor(np.random.default_rng(seed).integers(3, V, (2, T)))
    mask = (torch.arange(T) < torch.tensor([[T], [SHORT]])).long()
    ids = ids * mask  # the padding token is 0
    out = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    arrays = {"input_ids": ids, "attention_mask": mask, "logits": out.logits, "hidden": torch.stack(out.hidden_states)}
    for row, length in enumerate((T, SHORT)):
        prompt = ids[row : row + 1, :length]
        text = model.generate(prompt, attention_mask=mask[row : row + 1, :length], do_sample=False, max_new_tokens=NEW)
        assert text.shape == (1, length + NEW), "it stopped early"
        best = model(text, use_cache=False).logits[0, length - 1 : -1].topk(2)  # no cache here, a cache in generate
        usable = torch.equal(best.indices[:, 0], text[0, length:]) and len(text[0, length:].unique()) >= NEW // 3
        margins.append((best.values[:, 0] - best.values[:, 1]).min().item() * usable)
        arrays[f"greedy_{row}"] = text[0].int()
    arrays |= {"input_ids": ids.int(), "attention_mask": mask.int()}
    return {name: array.numpy() for name, array in arrays.items()}, min(margins)


def make_case(name: str) -> str:
    family, settings, how = CASES[name]
    folder = GOLDENS / name
    for seed in SEEDS:
        model = random_model(family, settings, seed, how.get("dtype", torch.float32))
        save(model, folder, **how)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        arrays, margin = io(loaded.eval(), seed)
        assert np.array_equal(arrays["logits"], io(model, seed)[0]["logits"]), "the files say something else"
        if margin > MARGIN:
            break
    else:
        raise RuntimeError(f"{name}: every seed has a near tie or a dull text")
    np.savez_compressed(folder / "io.npz", **arrays)
    size, shards = sum(f.stat().st_size for f in folder.iterdir()), len(list(folder.glob("*.safetensors")))
    assert size <= MAX_BYTES, f"{name} takes {size} bytes"
    assert shards >= 3 if "shard" in how else shards == 1, f"{name} has {shards} files of weights"
    # Row 0 only: in float64 a padded query that sees no key gives NaN, which spreads over row 1.
    rounding = np.abs(io(loaded.double(), seed)[0]["logits"][0] - arrays["logits"][0]).max()
    return (
        f"{name}: seed {seed}, {size} bytes, {shards} file(s) of weights, margin {margin:.3f}, "
        f"std of logits {arrays['logits'].std():.2f}, float32 from float64 {rounding:.1e}"
    )


def check_llama3_bands(rope: dict, H: int = 16):
    """Some wavelengths are kept, some divided, some in between."""
    old = rope["original_max_position_embeddings"]
    lengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, H, 2) / H)
    kept, divided = lengths < old / rope["high_freq_factor"], lengths > old / rope["low_freq_factor"]
    bands = kept, divided, ~kept & ~divided
    assert all(band.any() for band in bands), "a band has no wavelength"


# ---- sampling

PROCESSORS = {
    "repetition_penalty": "RepetitionPenaltyLogitsProcessor",
    "temperature": "TemperatureLogitsWarper",
    "top_k": "TopKLogitsWarper",
    "top_p": "TopPLogitsWarper",
    "min_p": "MinPLogitsWarper",
}
ALONE = {"temperature": (0.7, 1.7), "repetition_penalty": (1.3, 0.8), "min_p": (0.02, 0.3)}
ALONE |= {"top_k": (1, 5, 50, 500), "top_p": (0.1, 0.5, 0.9)}
COMBINED = {
    "temperature_top_k_top_p": {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "top_p_min_p": {"top_p": 0.95, "min_p": 0.05},
    "all_five": {"repetition_penalty": 1.3, "temperature": 1.5, "top_k": 30, "top_p": 0.8, "min_p": 0.05},
}


def apply(steps: list, input_ids: Tensor, logits: Tensor) -> Tensor:
    for name, value in steps:
        logits = getattr(transformers, PROCESSORS[name])(value)(input_ids, logits)
    return logits


def in_transformers_order(settings: dict) -> list:
    """The steps, in the order in which `generate` of the installed version applies them."""
    config = transformers.GenerationConfig(do_sample=True, **{"top_k": 0} | settings)
    model = random_model("Llama", {}, 0, torch.float32)
    classes = [type(p).__name__ for p in model._get_logits_processor(config, input_ids_seq_length=1)]
    return sorted(settings.items(), key=lambda step: classes.index(PROCESSORS[step[0]]))


def sampling_rows(rng: np.random.Generator, V: int = 97) -> np.ndarray:
    ordinary, peaked, ties, minus_inf, large = rng.normal(size=(5, V)) * [[2], [1], [2], [2], [3]]
    flat = rng.permutation(np.linspace(-1, rng.uniform(0.5, 1), V))
    peaked[rng.integers(V)] += 9
    minus_inf[rng.permutation(V)[: V - 12]] = -np.inf
    ties = np.sort(ties)[::-1].copy()
    ties[1:3], ties[7:10], ties[60:80] = ties[1], ties[7], ties[60]
    large += np.where(rng.random(V) < 0.5, 1e4, -1e4)
    return np.stack([ordinary, flat, peaked, rng.permutation(ties), minus_inf, large]).astype(np.float32)


def is_stable(steps: list, input_ids: Tensor, logits: Tensor) -> bool:
    """No token crosses a cut-off when logits and thresholds move a little: no near tie, no doubt from rounding."""
    removed, noise = apply(steps, input_ids, logits).isneginf(), torch.Generator().manual_seed(0)
    little = 3e-4 + 2e-7 * logits.double().clamp(min=-1e5).abs()
    for trial in range(24):
        moved = logits + little * torch.randn(logits.shape, generator=noise, dtype=torch.float64)
        scale = (0.999, 1.0, 1.001)[trial % 3]
        thresholds = [(name, value * scale if name in ("top_p", "min_p") else value) for name, value in steps]
        if not torch.equal(apply(thresholds, input_ids, moved).isneginf(), removed):
            return False
    return True


def make_sampling() -> str:
    settings = {f"{name}_{value}": [(name, value)] for name, values in ALONE.items() for value in values}
    settings |= {name: in_transformers_order(values) for name, values in COMBINED.items()}
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        logits, input_ids = torch.tensor(sampling_rows(rng)), torch.tensor(rng.integers(0, 97, (6, 12)))
        input_ids[:, 7:9] = input_ids[:, :1]  # a token seen three times is punished once
        input_ids[:, 9] = logits.argmax(-1)
        if all(is_stable(steps, input_ids, logits) for steps in settings.values()):
            break
    else:
        raise RuntimeError("sampling: every seed has a cut-off near a tie")
    arrays = {name: apply(steps, input_ids, logits) for name, steps in settings.items()}
    arrays |= {"logits": logits, "input_ids": input_ids.int(), "ties_at_cutoff_logits": torch.full((1, 97), -4.0)}
    straddling = arrays["ties_at_cutoff_logits"]
    straddling[0, ::14], straddling[0, 40] = 2.0, 3.0  # seven equals after the best one
    for name, steps in {"ties_at_cutoff_top_k": [("top_k", 4)], "ties_at_cutoff_top_p": [("top_p", 0.6)]}.items():
        settings[name], arrays[name] = steps, apply(steps, input_ids[:1], straddling)
    file = GOLDENS / "sampling.npz"
    np.savez_compressed(file, settings=json.dumps(settings), **{name: array.numpy() for name, array in arrays.items()})
    return f"sampling: seed {seed}, {file.stat().st_size} bytes, {len(settings)} results"


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    check_llama3_bands(LLAMA3)
    GOLDENS.mkdir(exist_ok=True)
    for case in sys.argv[1:] or [*CASES, "sampling"]:
        logging.info(make_sampling() if case == "sampling" else make_case(case))
    logging.info("transformers %s, torch %s", transformers.__version__, torch.__version__)
