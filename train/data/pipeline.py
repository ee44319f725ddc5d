"""Examples -> batches: shuffle, tokenise, pack or pad, and a position that can be written down and returned to.

Rows of a global batch are made by `shards` independent streams; stream s reads every shards-th example of the shuffled
order, beginning with the s-th, and fills its own rows. A process runs the streams whose rows its devices hold. So
which examples share a batch depends on seed and `shards` alone, never on how many devices or processes take part.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .tokenise import Encoded, Truncation, truncate

BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # lengths that unpacked batches are padded to


class Batch(NamedTuple):
    """What a step sees; NumPy arrays as long as it is on the host. Leading axes are micro-batches and rows.

    What stands at a token's position predicts its target.
    Segments number the sequences of a row from 1; 0 is padding. A token sees its own segment alone. An example of G
    sequences, such as the two of a pair, has G segments in a row one after the other, of which the first is numbered
    1 + a multiple of G. What a later one has in common with one before, their prompt say, stands there alone (prefix
    sharing, 2410.20305): a segment whose positions begin at n > 0 goes on behind the first n tokens of the last segment
    before it that begins at 0, and sees them too.

    Of an example with labels (`Encoded.labels`) all tokens stand in the row, the last one with target 0, and what mask,
    weights and labels say is of the token at that position itself, not of its target: it is what a head is to make of
    the state that has read it.
    """

    tokens: Int[Array, "*M B T"]
    targets: Int[Array, "*M B T"]
    positions: Int[Array, "*M B T"]  # in its sequence, from 0
    segments: Int[Array, "*M B T"]
    mask: Bool[Array, "*M B T"]  # the target is part of a completion, and counts; or the token has a label
    weights: Float[Array, "*M B T"]  # of the loss at that target, or token; 0 outside the mask
    labels: Float[Array, "*M B T"] | None = None  # 0 outside the mask, and where there are none; None in batches
    # that were not made from examples
    more: dict[str, Float[Array, "*M B T"]] | None = None  # further numbers of targets, by the names asked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How examples become batches."""

    size: int = 8  # rows of one step, over all devices and micro-batches
    micro_batches: int = 1  # parts that a step works through one after the other, to save memory
    max_length: int = 1024  # tokens of a row, and of an example at most; longer ones are cut
    packing: bool = True  # several examples a row, each seeing itself alone
    truncation: Truncation = "keep_start"
    shuffle: bool = True  # anew in every epoch
    shards: int = 1  # independent streams of rows; a multiple of the number of processes

    def __post_init__(self):
        for name in ("size", "micro_batches", "shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"BatchConfig.{name}: found {getattr(self, name)}; expected at least 1.")
        if self.max_length < 2:
            raise ValueError(f"BatchConfig.max_length: found {self.max_length}; expected at least 2 tokens.")
        if self.size % (self.micro_batches * self.shards):
            raise ValueError(
                f"BatchConfig.size: found {self.size}; expected a multiple of micro_batches x shards = "
                f"{self.micro_batches} x {self.shards}, so that every part has as many rows."
            )


Encode = Callable[[Mapping[str, Any]], Encoded | tuple[Encoded, ...]]


class Batches:
    """An endless iterator over this process's part of every batch, and where it stands.

    Attributes:
      dropped: indices of examples met so far that no completion token of was left after cutting.
      mismatched: indices of those whose prompt was no token prefix of prompt and completion.
    """

    def __init__(
        self,
        examples: Sequence[Mapping[str, Any]],
        encode: Encode,
        cfg: BatchConfig,
        *,
        seed: int,
        parts: int = 1,
        more: tuple[str, ...] = (),
        shards: range | None = None,
        fixed_length: bool = False,
    ):
        """Begin at the first example.

        Args:
          examples: random access to checked rows.
          encode: tokens of one of them: a sequence, or as many as `parts`, each of which gets that share of a row.
          cfg: how to batch.
          seed: of the order.
          parts: sequences of an example, G.
          more: names of the numbers that every sequence has of its tokens (`Encoded.more`).
          shards: the streams of this process; all when not given.
          fixed_length: pad unpacked rows to `max_length` always; needed when other processes hold other rows.
        """
        self.dropped: set[int] = set()
        self.mismatched: set[int] = set()
        self._cfg, self._fixed, self._parts = cfg, fixed_length, parts
        self._more = tuple(_MORE + name for name in more)
        if cfg.max_length // parts < 2:
            raise ValueError(
                f"Batches: max_length={cfg.max_length} for {parts} sequences; expected 2 tokens each at least."
            )
        self._misses: dict[int, int] = {}  # of each stream, since it last kept an example
        mine = range(cfg.shards) if shards is None else shards
        self._streams = {s: iter(self._stream(examples, encode, seed, s)) for s in mine}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        parts = [next(stream) for stream in self._streams.values()]
        length = max(part["tokens"].shape[1] for part in parts)  # streams of one batch agree on a bucket
        rows = lambda name: [self._rows(part[name], length) for part in parts]
        fields: Any = {name: np.concatenate(rows(name), axis=1) for name in Batch._fields if name != "more"}
        more: Any = {name.removeprefix(_MORE): np.concatenate(rows(name), axis=1) for name in self._more}
        return Batch(**fields, more=more or None)

    def get_state(self) -> dict[str, Any]:
        """Where every stream stands, as JSON; what `__next__` returned last is behind it."""
        return {str(s): stream.get_state() for s, stream in self._streams.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go where `get_state` was called; the states of all processes together."""
        if {*state} != {*map(str, range(self._cfg.shards))}:
            raise ValueError(
                f"Batches.set_state: found streams {sorted(state)}; expected {self._cfg.shards} of them. "
                "Resume with the `shards` of the run that wrote this."
            )
        for s, stream in self._streams.items():
            stream.set_state(state[str(s)])

    def _stream(self, examples, encode, seed: int, shard: int) -> grain.IterDataset:
        cfg, rows = self._cfg, self._cfg.size // self._cfg.shards
        order = grain.MapDataset.range(len(examples)).seed(seed)
        order = (order.shuffle() if cfg.shuffle else order).repeat()
        made = order[shard :: cfg.shards].map(lambda i: self._features(examples, encode, int(i), shard))
        made = made.filter(lambda features: features is not None)
        stream = made.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4 * rows))
        if cfg.packing:
            lengths = dict.fromkeys((*_FEATURES, *self._more), cfg.max_length)
            packed = grain.experimental.FirstFitPackIterDataset(
                stream, length_struct=lengths, num_packing_bins=rows, shuffle_bins=False
            )
            stream = packed.map(lambda row: _named(row, self._parts)).batch(rows)
        else:
            stream = _GroupByLength(stream, rows, seed).map(lambda group: _pad(group, self._length(group)))
        return grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=2)

    def _features(self, examples, encode, i: int, shard: int) -> dict[str, np.ndarray] | None:
        """Inputs and targets of one example, or None if there is nothing to learn from it."""
        example = examples[i]
        found = encode(example)
        sequences = (found,) if isinstance(found, Encoded) else found
        if len(sequences) != self._parts:
            raise ValueError(f"Batches: an example of {len(sequences)} sequences; expected {self._parts}.")
        most = self._cfg.max_length // self._parts
        sequences = [truncate(encoded, most, self._cfg.truncation) for encoded in sequences]
        if any(encoded.mismatch for encoded in sequences):
            self.mismatched.add(i)
        if not all(encoded.scored.any() for encoded in sequences):
            self.dropped.add(i)
            self._misses[shard] = self._misses.get(shard, 0) + 1
            if self._misses[shard] > len(examples):  # a whole epoch: the search for a good one would not end
                raise ValueError(
                    f"Batches: none of the {len(examples)} examples, or of those of stream {shard}, keeps a completion "
                    f"token within max_length={self._cfg.max_length}; expected prompts shorter than that. "
                    "Raise max_length."
                )
            return None
        self._misses[shard] = 0
        weight = example.get("weight", 1.0)
        rows, trunk = [], sequences[0]
        for part, encoded in enumerate(sequences):
            begin = _shared(trunk, encoded) if part else 0
            trunk = trunk if begin else encoded
            own = weight if encoded.weight is None else encoded.weight
            rows.append(_sequence(encoded, part, begin, np.float32(own)))
        return {name: np.concatenate([row[name] for row in rows]) for name in (*_FEATURES, *self._more)}

    def _length(self, group: Sequence[Mapping[str, np.ndarray]]) -> int:
        most = self._cfg.max_length
        longest = most if self._fixed else max(len(features["tokens"]) for features in group)
        return min(most, next((b for b in BUCKETS if b >= longest), most))

    def _rows(self, part: np.ndarray, length: int) -> np.ndarray:
        """[R, T] -> [M, R / M, length]."""
        part = np.pad(part, ((0, 0), (0, length - part.shape[1])))
        return part.reshape(self._cfg.micro_batches, -1, length)


def count_units(batch: Batch) -> dict[str, Int[Array, ""]]:
    """How many of each unit a window of micro-batches holds: what sums of losses are divided by.

    Returns:
      token: targets that count, or tokens with a label. sequence: examples. input: positions that are not padding.
    """
    before = jnp.pad(batch.segments[..., :-1], [(0, 0)] * (batch.segments.ndim - 1) + [(1, 0)])
    starts = (batch.segments > 0) & (batch.segments != before)
    count = lambda where: where.sum(dtype=jnp.int32)
    return {"token": count(batch.mask), "sequence": count(starts), "input": count(batch.segments > 0)}


# ----------------------------------------------------------------------------------------------------------- private
# Of every token the fields of `Batch`; but in the place of segments `part`: which sequence of its example, from 1.
_FEATURES = ("tokens", "targets", "positions", "part", "mask", "weights", "labels")
_MORE = "more/"  # before the names of further numbers


def _shared(first: Encoded, other: Encoded) -> int:
    """How many tokens both begin with, as far as nothing is to be predicted from them in the other one."""
    n = min(len(first.ids), len(other.ids)) - (first.labels is None)
    same = first.ids[:n] == other.ids[:n]
    most = int(np.argmax(other.scored)) - (other.labels is None)
    return min(n if same.all() else int(np.argmin(same)), most)


def _sequence(encoded: Encoded, part: int, begin: int, weight: np.float32) -> dict[str, np.ndarray]:
    """Every token's inputs and targets, from token `begin` on."""
    ids, mask, labels = encoded.ids, encoded.scored, encoded.labels
    more = {_MORE + name: numbers for name, numbers in (encoded.more or {}).items()}
    if labels is None:
        tokens, targets, mask = ids[:-1], ids[1:], mask[1:]
        labels = np.zeros(len(mask), np.float32)
        more = {name: numbers[1:] for name, numbers in more.items()}
    else:
        tokens, targets = ids, np.append(ids[1:], np.int32(0))
    positions = np.arange(len(tokens), dtype=np.int32)
    found = {
        "tokens": tokens,
        "targets": targets,
        "positions": positions,
        "part": np.full_like(positions, part + 1),
        "mask": mask,
        "weights": mask.astype(np.float32) * weight,
        "labels": labels,
        **more,
    }
    return {name: numbers[begin:] for name, numbers in found.items()}


def _named(packed: Mapping[str, np.ndarray], parts: int) -> dict[str, np.ndarray]:
    """The packer's features under the names of `Batch`."""
    example = packed["tokens_segment_ids"]  # from 1; 0 is padding
    segments = np.where(example > 0, (example - 1) * parts + packed["part"], 0).astype(np.int32)
    kept = [name for name in packed if name != "part" and not name.endswith(("_segment_ids", "_positions"))]
    return {name: packed[name] for name in kept} | {"segments": segments}


def _pad(group: Sequence[Mapping[str, np.ndarray]], length: int) -> dict[str, np.ndarray]:
    """One example a row."""
    rows = {name: np.stack([np.pad(f[name], (0, length - len(f[name]))) for f in group]) for name in group[0]}
    return {"segments": rows.pop("part")} | rows


class _GroupByLength(grain.IterDataset):
    """Lists of `rows` examples of similar length: every 8 lists' worth is sorted, cut, and given out in random order.

    Deterministic, and its state is small: where the 8 began, and how many of them are out.
    """

    def __init__(self, parent: grain.IterDataset, rows: int, seed: int):
        super().__init__(parent)
        self.rows, self.order = rows, seed

    def __iter__(self) -> grain.DatasetIterator:
        return _GroupIterator(self._parent.__iter__(), self.rows, self.order)


class _GroupIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, rows: int, seed: int):
        super().__init__(parent)
        self._rows, self._seed = rows, seed
        self._begun = self._parent.get_state()
        self._window, self._out, self._groups = 0, 0, []

    def __next__(self) -> list[Any]:
        if self._out == len(self._groups):
            if self._groups:
                self._window += 1
            self._fill()
        self._out += 1
        return self._groups[self._out - 1]

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._begun, "window": self._window, "out": self._out}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._begun, self._window, self._out, self._groups = state["parent"], state["window"], 0, []
        if state["out"]:
            self._fill()
            self._out = state["out"]

    def _fill(self) -> None:
        self._begun, self._out = self._parent.get_state(), 0
        window = [next(self._parent) for _ in range(8 * self._rows)]
        window.sort(key=lambda features: len(features["tokens"]))  # stable, so equal lengths keep their order
        groups = [window[i : i + self._rows] for i in range(0, len(window), self._rows)]
        order = np.random.default_rng([self._seed, self._window]).permutation(len(groups))
        self._groups = [groups[i] for i in order]
