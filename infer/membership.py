"""Was a text in the training data? A probe of hidden states that was trained on a model known to have seen some texts.

Probing for pre-training data detection (2406.01333). The model is fine-tuned on half of a few texts; in the states of
this proxy a linear probe learns to tell that half from the other; then it judges the states of the original model.

    h_l(x)   state behind layer l at the last token of "Here is a statement: x Is the above statement correct? Answer: "
    z_l(x)   (h_l(x) - mean) / deviation, of each feature over the texts of its split
    probe    S(w_l . z_l(x)), AdamW on the mean cross-entropy of members (1) and others (0) in the proxy
    layer    the l whose probe has the highest AUC on the dev split
    loss     mean_t log p(x_t | x_<t)                                what is likely was seen
    min-k    the mean of the k % least of these                     (2310.16789), what has no surprise in it was seen
    words    logistic regression on log(1 + count) of each word: how far the texts differ whatever the model has seen

A probe that ranks no better than the words do has shown nothing: two sets of texts of different years differ in what
they are about, and this is what a probe may have learned. So the words are always part of the report. They have to
learn from the dev split: the labels of probe_train may say only what the proxy was given to learn, not what the model
has seen, and then no word goes with them.

As in the authors' code members score high and every split is standardised by itself, so that a text's score hangs on
the other texts of its split. Different here: a probe begins at 0 and not at random, and the state of the last layer is
the one behind the final norm. Letters: n texts, L layers, D width.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import scipy.sparse
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from ..jaxlib_ext.token_stats import token_stats
from ..models.decoder import DecoderConfig, Model, Params, forward
from ..models.tokenizer import Tokenizer
from .step_metrics import Numbers, auroc

BEFORE = "Here is a statement:\n\n"
AFTER = "\n\nIs the above statement correct? Answer: "  # as published, with the blank at the end
SHORTEST = 32  # least padded length of a row, doubled up to the longest text
Members = Int[np.ndarray, " n"] | Sequence[int]  # 1 for a member, 0 for another
Split = Literal["probe_train", "dev", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

_WORD = re.compile(r"\w+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How a probe is trained; the defaults are the paper's."""

    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    epochs: int = 1000  # each of all texts at once

    def __post_init__(self):
        for name, low in (("learning_rate", "above 0"), ("weight_decay", "0 or more")):
            value = getattr(self, name)
            if not 0 <= value < math.inf or (value == 0 and low == "above 0"):
                raise ValueError(f"ProbeConfig.{name}: found {value}; expected a number {low}.")
        if self.epochs < 1:
            raise ValueError(f"ProbeConfig.epochs: found {self.epochs}; expected at least 1.")


# ------------------------------------------------------------------------------------------------------------- texts
def split_texts(labels: Members, *, shares: tuple[float, float] = (0.1, 0.2), seed: int = 0) -> list[Split]:
    """Deal texts at random; members and others each in the same shares.

    Args:
      labels: 1 for members, 0 for others.
      shares: of probe_train and of dev; what is left is test.
      seed: of the dealing.
    """
    if min(shares) < 0 or sum(shares) > 1:
        raise ValueError(f"split_texts: shares={shares}; expected two shares of 1.")
    dealt: list[Split] = ["test"] * len(labels)
    rng = np.random.default_rng(seed)
    for label in (0, 1):
        order = rng.permutation(np.flatnonzero(np.asarray(labels) == label)).tolist()
        first, second = round(shares[0] * len(order)), round(sum(shares) * len(order))
        for i in order[:second]:
            dealt[i] = "dev"
        for i in order[:first]:
            dealt[i] = "probe_train"
    return dealt


def wrap(text: str) -> str:
    """A text as the paper asks about it."""
    return BEFORE + text + AFTER


def wrap_within(tokenizer: Tokenizer, text: str, max_length: int) -> tuple[str, bool]:
    """A text, or as much of its beginning as fits, with the question whole behind it.

    Args:
      tokenizer: by which length counts.
      text: of any length.
      max_length: tokens of all.

    Returns:
      The wrapped text, and whether it was cut.

    Raises:
      ValueError: if the question alone is too long.
    """
    size = lambda n: len(tokenizer.encode(wrap(text[:n])))
    if size(len(text)) <= max_length:
        return wrap(text), False
    if (frame := size(0)) >= max_length:
        raise ValueError(
            f"wrap_within: max_length={max_length}; expected more than {frame}, the tokens of the question itself."
        )
    fits, long = 0, len(text)
    while long - fits > 1:  # what is taken has been measured: merges make the length of a prefix go up and down a bit
        middle = (fits + long) // 2
        fits, long = (middle, long) if size(middle) <= max_length else (fits, middle)
    return wrap(text[:fits]), True


# -------------------------------------------------------------------------------------------------- what a model says
def last_activations(
    model: Model,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    batch: int = 16,
    progress: bool = False,
) -> Float[np.ndarray, "n L D"]:
    """The residual stream at the last token of each text, one forward pass for all layers.

    Args:
      model: with layers as a tuple, or stacked.
      tokenizer: its own.
      texts: wrapped, if a question is to be asked.
      layers: behind how many layers to look, 1 for the first; every one when not given. Behind the last the final norm
        is applied.
      batch: texts in one forward pass; it changes nothing else.
      progress: show a bar.

    Raises:
      ValueError: for a text longer than the model's positions.
      ArithmeticError: if the model does not give finite numbers.
    """
    kept = tuple(range(1, model.config.num_layers + 1) if layers is None else layers)
    rows = _encode("last_activations", model, tokenizer, texts, 1)
    found = np.zeros((len(texts), len(kept), model.config.embed_dim), np.float32)
    for part, tokens in _batches(rows, batch, model.config.max_positions, "activations", progress):
        last = np.zeros(batch, np.int32)
        last[: len(part)] = [len(rows[i]) - 1 for i in part]
        found[part] = np.asarray(_at_last(model.config, model.params, tokens, last, kept))[: len(part)]
    if (broken := np.flatnonzero(~np.isfinite(found).all(axis=(1, 2)))).size:
        raise ArithmeticError(
            f"last_activations: text {broken[0]} leads to numbers that are not finite; expected finite ones. The "
            "weights are broken: was the model trained at too high a learning rate?"
        )
    return found


def token_logps(
    model: Model,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    batch: int = 16,
    progress: bool = False,
) -> list[Float[np.ndarray, " T"]]:
    """Log-probability of every token of each text but the first, float32.

    Args:
      model: with layers as a tuple, or stacked.
      tokenizer: its own.
      texts: as they are, without a question.
      max_length: tokens of a text that are looked at; all when not given.
      batch: texts in one forward pass.
      progress: show a bar.

    Raises:
      ValueError: for a text of a single token, or longer than the model's positions.
    """
    rows = _encode("token_logps", model, tokenizer, texts, 2, max_length)
    found: list[np.ndarray] = [np.zeros(0)] * len(rows)
    for part, tokens in _batches(rows, batch, model.config.max_positions, "likelihood", progress):
        logps = np.asarray(_next_logps(model.config, model.params, tokens))
        for row, i in enumerate(part):
            found[i] = logps[row, : len(rows[i]) - 1]
    return found


def mean_logp(logps: Float[np.ndarray, " T"]) -> float:
    """The loss attack: the higher, the more likely a member."""
    return math.fsum(logps.tolist()) / len(logps)


def min_k(logps: Float[np.ndarray, " T"], percent: float = 20.0) -> float:
    """The mean of the least likely tokens, one at least: the higher, the more likely a member."""
    if not 0 < percent <= 100:
        raise ValueError(f"min_k: percent={percent}; expected above 0 and at most 100.")
    return mean_logp(np.sort(logps)[: max(1, int(len(logps) * percent / 100))])


# --------------------------------------------------------------------------------------------------------- the probe
def standardise(activations: Float[np.ndarray, "n L D"]) -> Float[np.ndarray, "n L D"]:
    """Mean 0 and deviation 1 (of n - 1) of each feature over the texts given; a feature that never changes becomes 0.

    Sums are float64, so that a feature that never changes has a deviation of exactly 0 (for any n below 2^29).
    """
    if len(activations) < 2:
        raise ValueError(f"standardise: found {len(activations)} texts; expected 2 at least.")
    found = np.empty_like(activations, np.float32)
    for layer in range(activations.shape[1]):  # one at a time: float64 is twice the memory
        x = activations[:, layer].astype(np.float64)
        x -= x.mean(axis=0)
        deviation = x.std(axis=0, ddof=1)
        found[:, layer] = x / np.where(deviation > 0, deviation, 1.0)
    return found


def fit_probe(
    activations: Float[np.ndarray, "n L D"], labels: Members, cfg: ProbeConfig = ProbeConfig()
) -> Float[np.ndarray, "L D"]:
    """Train a probe for every layer; none has a bias, and all begin at 0.

    Args:
      activations: standardised, of the proxy.
      labels: 1 for what the proxy has learned.
      cfg: of the probes.
    """
    if len(labels) != len(activations):
        raise ValueError(f"fit_probe: found {len(labels)} labels; expected {len(activations)}, one a text.")
    return np.asarray(_fit(jnp.asarray(activations, jnp.float32), jnp.asarray(labels, jnp.float32), cfg))


def probe_scores(activations: Float[np.ndarray, "n L D"], probe: Float[np.ndarray, "L D"]) -> Float[np.ndarray, "n L"]:
    """Log-odds that each text is a member, by the probe of each layer."""
    return np.einsum("nld,ld->nl", activations, probe, dtype=np.float64)


def choose_layer(scores: Float[np.ndarray, "n L"], labels: Members) -> tuple[int, list[float]]:
    """Which column ranks best, of equal ones the first; and the AUC of each.

    Args:
      scores: of the dev split.
      labels: its own.
    """
    found = [auroc(column, labels) for column in scores.T]
    known = [value for value in found if value is not None]
    if not known:
        raise ValueError("choose_layer: found labels of one kind; expected members and others.")
    return int(np.argmax(known)), known


# ------------------------------------------------------------------------------------------------- how good scores are
def tpr_at_fpr(scores: Numbers, labels: Members, fpr: float = 0.05) -> float | None:
    """The share of members that is found when at most `fpr` of the others is accused; None with labels of one kind.

    It is the largest that a threshold gives, everything at or above it being called a member. Nothing is interpolated:
    with ties, or few others, the share accused may be well below `fpr`.
    """
    values, right = np.asarray(scores, np.float64), np.asarray(labels) == 1
    if len(values) != len(right) or np.isnan(values).any():
        raise ValueError(f"tpr_at_fpr: found {len(values)} scores, {len(right)} labels; expected as many, and numbers.")
    ranks = np.unique(-values, return_inverse=True)[1]
    found, accused = (np.cumsum(np.bincount(ranks, weights=kind)) for kind in (right, ~right))
    if not len(values) or not found[-1] or not accused[-1]:
        return None
    return float(np.max(found[accused / accused[-1] <= fpr], initial=0.0) / found[-1])


def chance_error(labels: Members) -> float:
    """Standard deviation of the AUC of scores that know nothing (Mann and Whitney, no ties).

    Args:
      labels: of the texts that are ranked, some of either kind.
    """
    members = int(np.sum(np.asarray(labels) == 1))
    others = len(labels) - members
    if not members or not others:
        raise ValueError(f"chance_error: found {members} members and {others} others; expected some of either.")
    return math.sqrt((members + others + 1) / (12 * members * others))


def bag_of_words(
    train: Sequence[str], labels: Members, texts: Sequence[str], *, ridge: float = 1.0
) -> Float[np.ndarray, " n"]:
    """Log-odds that texts are members, by their words alone; no model is asked.

    Args:
      train: texts to learn from; other words do not count.
      labels: their own.
      texts: to be scored.
      ridge: half of it times the squared weights is added to the loss, the sum over texts; the bias is free.
    """
    counts = [Counter(_WORD.findall(text.lower())) for text in train]
    words = {word: i for i, word in enumerate(sorted(set().union(*counts)))}
    x, sign = _count(counts, words), np.where(np.asarray(labels) == 1, 1.0, -1.0)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margin, w = sign * (x @ weights[1:] + weights[0]), weights[1:]
        pull = -sign * scipy.special.expit(-margin)
        gradient = np.concatenate([[pull.sum()], x.T @ pull + ridge * w])
        return float(np.logaddexp(0, -margin).sum() + ridge / 2 * w @ w), gradient

    options = {"maxiter": 1000, "gtol": 1e-6}
    found = scipy.optimize.minimize(loss, np.zeros(len(words) + 1), jac=True, method="L-BFGS-B", options=options).x
    return _count([Counter(_WORD.findall(text.lower())) for text in texts], words) @ found[1:] + found[0]


# ----------------------------------------------------------------------------------------------------------- private
def _encode(
    where: str, model: Model, tokenizer: Tokenizer, texts: Sequence[str], least: int, max_length: int | None = None
) -> list[list[int]]:
    rows = [tokenizer.encode(text)[:max_length] for text in texts]
    most = model.config.max_positions
    for i, row in enumerate(rows):
        if not least <= len(row) <= most:
            raise ValueError(
                f"{where}: text {i} has {len(row)} tokens; expected {least} at least, and at most the model's {most} "
                "positions. Leave it out, or shorten it."
            )
    return rows


def _batches(
    rows: Sequence[Sequence[int]], batch: int, most: int, name: str, progress: bool
) -> Iterator[tuple[list[int], Int[np.ndarray, "B T"]]]:
    """Which rows, and their tokens, padded on the right to one of few lengths; the longest first."""
    if batch < 1:
        raise ValueError(f"{name}: batch={batch}; expected at least 1.")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    with tqdm(total=len(rows), desc=name, unit="text", disable=None if progress else True) as bar:
        for part in (order[i : i + batch] for i in range(0, len(order), batch)):
            length = min(max(SHORTEST, 1 << (len(rows[part[0]]) - 1).bit_length()), most)
            tokens = np.zeros((batch, length), np.int32)
            for row, i in enumerate(part):
                tokens[row, : len(rows[i])] = rows[i]
            yield part, tokens
            bar.update(len(part))


@functools.partial(jax.jit, static_argnames=("cfg", "layers"))
def _at_last(
    cfg: DecoderConfig, params: Params, tokens: Int[Array, "B T"], last: Int[Array, " B"], layers: tuple[int, ...]
) -> Float[Array, "B L D"]:
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    states = forward(cfg, params, tokens, at, collect=layers).collected  # causal: padding is never seen
    ends = last[:, None, None]
    return jnp.concatenate([jnp.take_along_axis(s, ends, axis=1) for s in states], axis=1).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="cfg")
def _next_logps(cfg: DecoderConfig, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """At each position the log-probability of the token behind it, without [B, T, V] logits."""
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    hidden = forward(cfg, params, tokens, at).hidden
    head = params["embed"] if cfg.tie_embeddings else params["head"]
    targets = jnp.roll(tokens, -1, axis=1).reshape(-1)
    logp = token_stats(hidden.reshape(-1, hidden.shape[-1]), head.astype(hidden.dtype), targets).logp
    return logp.reshape(tokens.shape)


@functools.partial(jax.jit, static_argnames="cfg")
def _fit(x: Float[Array, "n L D"], labels: Float[Array, " n"], cfg: ProbeConfig) -> Float[Array, "L D"]:
    """All layers at once: the sum of their losses has each one's own gradient, and AdamW keeps numbers apart."""
    tx = optax.adamw(cfg.learning_rate, weight_decay=cfg.weight_decay)

    def loss(w: Float[Array, "L D"]) -> Float[Array, ""]:
        z = jnp.einsum("nld,ld->nl", x, w, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(jnp.mean(jax.nn.softplus(z) - labels[:, None] * z, axis=0))

    def epoch(carry: Any, _):
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    begin = jnp.zeros(x.shape[1:], jnp.float32)
    carry: Any = jax.lax.scan(epoch, (begin, tx.init(begin)), None, length=cfg.epochs)[0]
    return carry[0]


def _count(counts: Sequence[Counter[str]], words: dict[str, int]) -> scipy.sparse.csr_array:
    """log(1 + count) of each known word, a row a text."""
    known = [[(words[word], n) for word, n in each.items() if word in words] for each in counts]
    ends = np.cumsum([0, *map(len, known)])
    flat = np.array([pair for each in known for pair in each], np.int64).reshape(-1, 2)
    return scipy.sparse.csr_array((np.log1p(flat[:, 1]), flat[:, 0], ends), shape=(len(counts), len(words)))
