"""What the reference says of every row, written down once before training, so that only the policy stays in memory.

The file holds a sum of log-probabilities for each sequence of each row, and a digest of each row's tokens; its head
says of which model, lengths and precision. A run that is gone on with, and every row that it reads, has to match: a
changed model, tokenizer, length or row is refused, not trained on. Each checkpoint holds the fingerprint of head and
digests, so a file that is lost is written again by the same model on the same rows alone.
"""

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from ..models.decoder import DecoderConfig, Params
from ..sharding.mesh import local_rows, put_batch
from ..sharding.rules import REPLICATED, Rules
from .data.pipeline import BUCKETS, Batch, BatchConfig, Encode
from .data.tokenise import Encoded, truncate
from .objectives.logprobs import score_targets
from .objectives.sequences import sequence_sum

COLUMN = "reference_sums"  # what a row gets: one number a sequence


class OtherReferenceError(ValueError):
    """What is written down is of another model, or of other rows."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Of what model the sums are, and how rows become its input."""

    model: str  # digest of its files, or of how it was made
    config: DecoderConfig
    batch: BatchConfig
    parts: int
    rules: Rules = REPLICATED


class Referenced:
    """Rows, each with the reference's sums under `COLUMN`; to be filled before the first is read."""

    def __init__(self, examples: Sequence[Mapping[str, Any]], encode: Encode, source: Source):
        """Of rows that `encode` makes `source.parts` sequences of."""
        self._examples, self._encode, self._source = examples, encode, source
        self._sums: np.ndarray | None = None
        self._digests: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Row `i` with its sums.

        Raises:
          OtherReferenceError: if it is not the row that was scored.
        """
        row = dict(self._examples[i])
        if self._sums is None or self._digests is None:
            return row
        if self._digests[i] != _digest(self._sequences(row)):
            raise OtherReferenceError(
                f"reference: row {i} has other tokens than when the reference scored it; expected the same data and "
                "tokenizer. Put them back, or begin a new run."
            )
        return row | {COLUMN: self._sums[i].tolist()}

    @property
    def fingerprint(self) -> str:
        """Of the model, the settings and the tokens of all rows, not of the sums; there once it is filled."""
        assert self._digests is not None
        return hashlib.sha256(json.dumps(self._head()).encode() + self._digests.tobytes()).hexdigest()

    def fill(
        self, path: Path, load: Callable[[], Params], mesh: Mesh, *, kept: str | None = None, progress: bool = False
    ) -> None:
        """Read the file, or score all rows and write it.

        Args:
          path: of the file.
          load: the reference's weights, asked for only if rows have to be scored.
          mesh: where to score.
          kept: fingerprint of what the steps before were taken against; None if this is the first.
          progress: show a bar.

        Raises:
          OtherReferenceError: if the file is of another model, of other settings or of another number of rows; if it
            is not what `kept` says; and if what would be written is not.
        """
        if path.is_file():
            self._read(path)
            self._compare(kept, f"{path} is")
            return
        sequences = [self._sequences(self._examples[i]) for i in range(len(self))]
        self._digests = np.array([_digest(row) for row in sequences], np.uint64)
        self._compare(kept, f"there is no {path}, and its sums would be")
        flat = [s for row in sequences for s in row]
        sums = _score(flat, load(), self._source, mesh, progress)
        self._sums = sums.reshape(len(self), self._source.parts)
        if jax.process_index() == 0:
            partial_path = path.with_name(f".{path.name}.partial")
            with partial_path.open("wb") as file:
                np.savez(file, head=np.array(json.dumps(self._head())), sums=self._sums, digests=self._digests)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial_path, path)
        multihost_utils.sync_global_devices("references")

    def _read(self, path: Path) -> None:
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                head, sums, digests = json.loads(str(file["head"])), file["sums"], file["digests"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
            raise OtherReferenceError(
                f"reference: {path} cannot be read ({e}); expected what this run wrote. Remove it, to score again "
                "with the same model."
            ) from e
        wanted = self._head()
        if wrong := [name for name in wanted if head.get(name) != wanted[name]]:
            found = ", ".join(f"{name} {head.get(name)!r} (is {wanted[name]!r} now)" for name in wrong)
            raise OtherReferenceError(
                f"reference: {path} was made with another {found}; expected the same. Put it back, or begin a new run."
            )
        if sums.shape != (len(self), self._source.parts) or digests.shape != (len(self),):
            raise OtherReferenceError(
                f"reference: {path} holds {sums.shape} sums; expected {(len(self), self._source.parts)}."
            )
        self._sums, self._digests = sums, digests

    def _compare(self, kept: str | None, what: str) -> None:
        if kept not in (None, self.fingerprint):
            raise OtherReferenceError(
                f"reference: {what} of another model or of other rows; expected those that steps were taken against. "
                "Put model, tokenizer and rows back as they were, or begin a new run."
            )

    def _sequences(self, row: Mapping[str, Any]) -> list[Encoded]:
        """As the pipeline will cut them."""
        found, batch = self._encode(row), self._source.batch
        each = (found,) if isinstance(found, Encoded) else found
        return [truncate(e, batch.max_length // self._source.parts, batch.truncation) for e in each]

    def _head(self) -> dict[str, Any]:
        batch = self._source.batch
        return {
            "model": self._source.model,
            "dtype": self._source.config.dtype,
            "max_length": batch.max_length,
            "truncation": batch.truncation,
            "rows": len(self),
            "sequences": self._source.parts,
        }


def model_digest(folder: Path) -> str:
    """Of a checkpoint's settings and weights, as its files hold them."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------- private
def _digest(sequences: Sequence[Encoded]) -> np.uint64:
    digest = hashlib.blake2b(digest_size=8)
    for e in sequences:
        digest.update(
            np.int64(len(e.ids)).tobytes() + e.ids.astype(np.int32).tobytes() + np.packbits(e.scored).tobytes()
        )
    return np.frombuffer(digest.digest(), np.uint64)[0]


def _score(sequences: Sequence[Encoded], params: Params, source: Source, mesh: Mesh, progress: bool) -> np.ndarray:
    """Sums of log-probabilities of completions: batches of like length, every sequence a row of its own."""
    most, size = source.batch.max_length, source.batch.size
    mine = local_rows(mesh, source.rules, size)
    one: Any = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    run = jax.jit(partial(_sums, source.config, source.rules), out_shardings=one)
    found = np.zeros(len(sequences), np.float32)
    order = np.argsort([-len(s.ids) for s in sequences], kind="stable")  # the longest first: memory fails at once
    with tqdm(total=len(order), desc="reference", unit="sequence", disable=None if progress else True) as bar:
        for part in (order[i : i + size] for i in range(0, len(order), size)):
            longest = max(len(sequences[i].ids) for i in part) - 1
            length = min(most, next((b for b in BUCKETS if b >= longest), most))
            rows = [_row(sequences[i], length) for i in part]
            rows += [_row(None, length)] * (size - len(part))
            fields: Any = (np.stack(field)[mine][None] for field in zip(*rows, strict=True))
            batch = Batch(*fields)
            batch = jax.tree.map(lambda x: x[0], put_batch(mesh, source.rules, batch))
            found[part] = np.asarray(run(params, batch))[: len(part)]
            bar.update(len(part))
    return found


def _row(encoded: Encoded | None, length: int) -> tuple[np.ndarray, ...]:
    ids = np.zeros(0, np.int32) if encoded is None else encoded.ids
    number = max(len(ids) - 1, 0)
    out = lambda x, dtype: np.pad(np.asarray(x, dtype), (0, length - number))
    scored = np.zeros(0, bool) if encoded is None else encoded.scored[1:]
    at = np.arange(number)
    return (
        out(ids[:number], np.int32),
        out(ids[1:], np.int32),
        out(at, np.int32),
        out(np.ones(number), np.int32),
        out(scored, bool),
        out(scored, np.float32),
    )


def _sums(config: DecoderConfig, rules: Rules, params: Params, batch: Batch) -> jax.Array:
    return sequence_sum(score_targets(config, params, batch, rules=rules).logp, batch, 1).reshape(
        batch.tokens.shape[0], -1
    )[:, 0]
