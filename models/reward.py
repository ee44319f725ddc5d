"""A reward model: a decoder that says behind every step of a solution how good the step is.

    prompt  step 1 [sep]  step 2 [sep]  ...        score_i = sigmoid(z_i), read at the separator behind step i

token_pair  z = head[good] . h - head[bad] . h: the logits that the LM head gives two tokens, so nothing is added to the
            network (Math-Shepherd, 2312.08935; AdaptiveStep, 2502.13943).
value       z = u . r(h) + c, or the difference of two such outputs, the second for "good"; r is nothing, or
            ReLU(W h + b) (Qwen2.5-Math-PRM, 2501.07301, has ReLU and two outputs).

h is the last hidden state, behind the final norm. With `surprisal` the value head reads [h, log(1 + S), log(1 + M)]
instead, S and M the sum and the maximum of -log p over the tokens since the last separator, p the decoder's own
probability of each. What a decoder would have written comes out of its last layer, so no layer is left that could hold
it against what stands there; a small head can, and training it leaves the decoder as it is (ours).

Attention is causal, so one forward pass over a whole solution gives the scores of all its steps, each what scoring the
prefix alone would give.

A folder is that of the decoder, in Hugging Face's form, with `reward/` inside: `config.json` and `model.safetensors` of
`checkpoint.py`. Published models of the Qwen2.5-Math-PRM kind are read as they are. Weights are [out, in].
"""

import dataclasses
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ..jaxlib_ext.token_stats import token_stats
from . import checkpoint, hf
from .checkpoint import rebuild_config
from .decoder import DecoderConfig, Model, Params, constant, weight
from .heads import linear
from .safetensors import CheckpointError, read_index, read_tensor, swap_in
from .tokenizer import Tokenizer, load_tokenizer

KIND = "reward"
FOLDER = "reward"
_PUBLISHED = {"first": "score.0", "last": "score.2"}  # of Qwen2.5-Math-PRM; its separator is "<extra_0>"
_PUBLISHED_SEPARATOR = "<extra_0>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What reads the scores, and where."""

    target: DecoderConfig  # the decoder
    separator: int  # token id behind each step
    kind: Literal["token_pair", "value"] = "value"
    good: int | None = None  # token ids, of kind token_pair
    bad: int | None = None
    inner: int | None = None  # width of the ReLU layer, of kind value; None for a linear head
    outputs: int = 1  # 1, or 2 for the classes bad and good
    start: str = ""  # text before the first step
    between: str = ""  # text before every other one
    surprisal: bool = False  # the value head also reads how unlikely the decoder finds the step's tokens

    def __post_init__(self):
        pair, V = (self.good, self.bad), self.target.vocab_size
        if (self.kind == "token_pair") != (None not in pair) or (self.kind == "value") != (pair == (None, None)):
            raise ValueError(
                f"RewardConfig: kind={self.kind!r} with good={self.good}, bad={self.bad}; expected both tokens for "
                "token_pair and none for value."
            )
        wrong = [i for i in (self.separator, *pair) if i is not None and not 0 <= i < V]
        if wrong or (self.kind == "token_pair" and self.good == self.bad):
            raise ValueError(f"RewardConfig: token ids {wrong or pair}; expected different ones below {V}.")
        if self.surprisal and self.kind != "value":
            raise ValueError(f"RewardConfig: surprisal with kind={self.kind!r}; expected value, whose head reads it.")
        if self.outputs not in (1, 2) or (self.inner is not None and self.inner < 1):
            raise ValueError(f"RewardConfig: inner={self.inner}, outputs={self.outputs}; expected a width, and 1 or 2.")

    @property
    def text(self) -> "StepText":
        """What stands around steps."""
        return StepText(self.separator, self.start, self.between, self.surprisal)


class RewardModel(NamedTuple):
    """A decoder with what reads its scores."""

    config: RewardConfig
    params: Params  # {"model": those of the decoder, "head": those of the value head, or nothing}


class StepText(NamedTuple):
    """What is written around the steps of a solution, in training and in scoring alike."""

    separator: int  # token id behind each step
    start: str = ""  # before the first step
    between: str = ""  # before every other one
    opens: bool = False  # a separator stands before the first step too, put in unless the prompt ends with one


# --------------------------------------------------------------------------------------------------------------- text
def render_steps(
    tokenizer: Tokenizer, prompt: str | Sequence[Mapping[str, Any]], steps: Sequence[str], text: StepText
) -> tuple[list[int], list[int]]:
    """Token ids of prompt and steps, and the index of each step's separator; messages end with what opens an answer.

    Each part is tokenised alone, so the tokens up to a separator are those of the prefix that ends there, and text is
    encoded without control tokens: whatever a step spells, scores are read where separators were put in.
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)
    if text.opens and ids[-1:] != [text.separator]:
        ids = [*ids, text.separator]
    ends = []
    for i, step in enumerate(steps):
        ids += [*tokenizer.encode((text.between if i else text.start) + step, bos=False), text.separator]
        ends.append(len(ids) - 1)
    return ids, ends


def one_token(tokenizer: Tokenizer, token: str | int) -> int:
    """The id of what has to be one token, such as the one that ends a step.

    Raises:
      ValueError: if it is none of this tokenizer, or several.
    """
    ids = [token] if isinstance(token, int) else tokenizer.encode(token, bos=False, allow_special=True)
    known = len(ids) == 1 and 0 <= ids[0] < tokenizer.vocab_size
    if known and (isinstance(token, int) or tokenizer.decode(ids, skip_special=False).strip() == token.strip()):
        return ids[0]
    taken = {*tokenizer.eos_ids, tokenizer.bos_id, tokenizer.pad_id}
    names = [tokenizer.decode([i], skip_special=False) for i in sorted(tokenizer.special_ids - taken)]
    choice = f"a control token that solutions do not use ({', '.join(names[:8])})" if names else "a rare token"
    found = f"{token!r}, tokens {ids!r:.60} of a vocabulary of {tokenizer.vocab_size}"
    raise ValueError(f"one_token: found {found}; expected one token, known to it. Choose {choice}, or give an id.")


# --------------------------------------------------------------------------------------------------------------- head
class Linear(nnx.Module):
    """y = W x + b."""

    def __init__(self, out: int, into: int, *, rngs: nnx.Rngs):
        self.weight = weight(rngs, (out, into), (None, "embed"), into)  # type: ignore[arg-type]
        self.bias = constant(0.0, (out,), (None,))  # type: ignore[arg-type]


class ValueHead(nnx.Module):
    """One linear layer, or two with ReLU in between."""

    def __init__(self, cfg: RewardConfig, *, rngs: nnx.Rngs):
        width = cfg.target.embed_dim + 2 * cfg.surprisal
        if cfg.inner is not None:
            self.first, width = Linear(cfg.inner, width, rngs=rngs), cfg.inner
        self.last = Linear(cfg.outputs, width, rngs=rngs)


def init_head(cfg: RewardConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters of the head; none for token pairs."""
    if cfg.kind == "token_pair":
        return {}
    return nnx.to_pure_dict(nnx.state(ValueHead(cfg, rngs=nnx.Rngs(params=key))))


def head_shapes(cfg: RewardConfig) -> Params:
    """The tree of `ShapeDtypeStruct`s that `init_head` would fill; nothing is allocated."""
    return jax.eval_shape(lambda: init_head(cfg, jax.random.key(0)))


def head_axes(cfg: RewardConfig) -> Params:
    """Logical axis names of every parameter of the head, as a tree with a tuple at each leaf."""
    if cfg.kind == "token_pair":
        return {}
    state = nnx.state(nnx.eval_shape(lambda: ValueHead(cfg, rngs=nnx.Rngs(0))))
    return nnx.traversals.unflatten_mapping({p: v.get_metadata()["axes"] for p, v in nnx.to_flat_state(state)})


def surprisals(
    cfg: RewardConfig,
    params: Params,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B T 2"]:
    """log(1 + S) and log(1 + M) at every token, in float32, of the tokens since the last separator, itself included.

    A token at position 0 begins a text, and it and separators surprise nobody. Nothing of size [T, V] is held.
    """
    (B, T), model = tokens.shape, params["model"]
    table = model["embed"] if cfg.target.tie_embeddings else model["head"]
    before = hidden[:, :-1].reshape(B * (T - 1), -1)
    logp = token_stats(before, table.astype(hidden.dtype), tokens[:, 1:].reshape(-1)).logp.reshape(B, T - 1)
    known = (positions > 0) & (tokens != cfg.separator)
    nll = jnp.where(known, jnp.pad(-logp, ((0, 0), (1, 0))), 0.0)
    opens = jnp.pad(tokens[:, :-1] == cfg.separator, ((0, 0), (1, 0))) | (positions == 0)

    def join(a, b):  # sums and maxima of two stretches; one that begins anew forgets what was before
        keep = lambda new, old: jnp.where(b[0], b[new], old)
        return a[0] | b[0], keep(1, a[1] + b[1]), keep(2, jnp.maximum(a[2], b[2]))

    _, total, most = jax.lax.associative_scan(join, (opens, nll, nll), axis=1)
    return jnp.log1p(jnp.stack([total, most], axis=-1))


def step_logits(
    cfg: RewardConfig, params: Params, hidden: Float[Array, "*B D"], surprise: Float[Array, "*B 2"] | None = None
) -> Float[Array, "*B"]:
    """z of last hidden states, in float32; `sigmoid(z)` is the score.

    Args:
      cfg: of the reward model.
      params: its parameters.
      hidden: states behind the final norm.
      surprise: what `surprisals` says at the same tokens, of models that read it.
    """
    h = hidden.astype(jnp.float32)
    if (surprise is not None) != cfg.surprisal:
        raise ValueError(
            f"step_logits: surprisal={cfg.surprisal}, and surprise is {'not ' * (surprise is not None)}None; expected "
            "what `surprisals` says for models that read it, and for no others."
        )
    if surprise is not None:
        h = jnp.concatenate([h, surprise], axis=-1)
    if cfg.kind == "token_pair":
        model = params["model"]
        table = model["embed"] if cfg.target.tie_embeddings else model["head"]
        good, bad = (table[i].astype(hidden.dtype).astype(jnp.float32) for i in (cfg.good, cfg.bad))
        return h @ (good - bad)
    head = params["head"]
    if cfg.inner is not None:
        h = jax.nn.relu(linear(head["first"], h))
    z = linear(head["last"], h)
    return z[..., 0] if cfg.outputs == 1 else z[..., 1] - z[..., 0]


# -------------------------------------------------------------------------------------------------------------- files
def config_of(mapping: Mapping[str, Any], target: DecoderConfig) -> RewardConfig:
    """The configuration that `checkpoint.load` found, for this decoder."""
    return rebuild_config(RewardConfig, KIND, mapping, target)


def is_reward_model(folder: Path | str) -> bool:
    """Whether a folder says that it holds one, ours or of the published kind."""
    folder = Path(folder)
    return (folder / FOLDER).is_dir() or (
        (folder / "config.json").is_file() and "score.0.weight" in read_index(folder)  # type: ignore[operator]
    )


def read_config(folder: Path | str, target: DecoderConfig) -> RewardConfig:
    """The configuration of one of ours, for this decoder; no weights are read.

    Raises:
      CheckpointError: also for published ones, which are not trained on.
    """
    return config_of(checkpoint.read_small_config(Path(folder) / FOLDER), target)


def read_head(folder: Path | str, cfg: RewardConfig) -> Params:
    """The value head of one of ours, in float32."""
    head = checkpoint.load_for(Path(folder) / FOLDER, cfg.target, config_of, head_shapes)[1]
    return jax.tree.map(lambda w: w.astype(jnp.float32), head)


def save(
    folder: Path | str,
    model: RewardModel,
    *,
    like: Path | str | None = None,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> None:
    """Write a folder that `load` reads, and `hf.load` as its decoder. It appears whole or not at all.

    Args:
      folder: must not exist, or be empty, unless `overwrite`.
      model: layers of the decoder stacked or as a tuple.
      like: the folder that the decoder came from; its tokenizer files are copied.
      tokenizer: written where there is no such folder.
      overwrite: replace what is there.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"save: {folder} exists; expected a new or empty folder. Pass overwrite to replace it.")
    partial = folder.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        hf.save(partial, Model(model.config.target, model.params["model"]), like=like)
        if tokenizer is not None and like is None:
            tokenizer.save(partial)
        checkpoint.save(partial / FOLDER, KIND, model.config, model.params["head"])
        swap_in(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load(
    folder: Path | str, *, dtype: hf.DType | None = None, stacked: bool = False, separator: str | None = None
) -> RewardModel:
    """Read a folder that `save` wrote, or a published model of the Qwen2.5-Math-PRM kind.

    Args:
      folder: what to read.
      dtype: of the decoder, as for `hf.load`; heads stay float32.
      stacked: as for `hf.load`.
      separator: the token behind each step of a published model; "<extra_0>" when not given. Ours know their own.

    Raises:
      CheckpointError: for a folder that cannot be trusted or understood, or holds no reward model.
    """
    folder = Path(folder)
    if (folder / FOLDER).is_dir():
        decoder = hf.load(folder, dtype=dtype, stacked=stacked)
        cfg = read_config(folder, decoder.config)
        return RewardModel(cfg, {"model": decoder.params, "head": read_head(folder, cfg)})
    return _load_published(folder, dtype, stacked, separator or _PUBLISHED_SEPARATOR)


# ------------------------------------------------------------------------------------------------------------ private
def _load_published(folder: Path, dtype: hf.DType | None, stacked: bool, separator: str) -> RewardModel:
    index = read_index(folder)
    names = [f"{tensor}.{part}" for tensor in _PUBLISHED.values() for part in ("weight", "bias")]
    if missing := [name for name in names if name not in index]:
        raise CheckpointError(
            f"{folder}: no folder {FOLDER}/ and no {missing[0]}; expected a reward model, of `jaxaroo train prm` or of "
            "the Qwen2.5-Math-PRM kind. Of a plain causal model name the separator and the two tokens."
        )
    for name in (name for name in names if len(shape := index[name].shape) != 1 + name.endswith("weight")):
        raise CheckpointError(f"{folder}: {name} of shape {list(shape)}; expected a matrix for weights, else a vector.")
    decoder = hf.load(folder, dtype=dtype, stacked=stacked, headless=True)
    read = lambda name: jnp.asarray(np.asarray(read_tensor(index[name]), np.float32))
    head = {ours: {part: read(f"{name}.{part}") for part in ("weight", "bias")} for ours, name in _PUBLISHED.items()}
    try:
        cfg = RewardConfig(
            target=decoder.config,
            separator=one_token(load_tokenizer(folder), separator),
            inner=index["score.0.weight"].shape[0],
            outputs=index["score.2.weight"].shape[0],
        )
    except ValueError as e:
        raise CheckpointError(f"{folder}: {e}") from e
    shapes = lambda tree: jax.tree.map(lambda w: w.shape, tree)
    if shapes(head) != (wanted := shapes(head_shapes(cfg))):
        raise CheckpointError(f"{folder}: a head of shapes {shapes(head)}; expected {wanted}.")
    return RewardModel(cfg, {"model": decoder.params, "head": head})
