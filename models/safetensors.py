"""Read and write checkpoints in the safetensors format (https://huggingface.co/docs/safetensors), trusting nothing.

A file is `8 bytes: N, little-endian | N bytes: JSON header | data`; the header maps each tensor to its dtype, shape and
`[begin, end)` in the data, which the tensors cover exactly. A large checkpoint is several such files (shards) and
`model.safetensors.index.json`, which says where each tensor is. Every fault of a checkpoint is a `CheckpointError`.
"""

import json
import math
import os
import reprlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import ml_dtypes
import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The format's names, and numpy's. F4 and F6 pack several elements into a byte, as no numpy dtype does: refused.
_TYPES = """BOOL:bool U8:u1 I8:i1 U16:u2 I16:i2 U32:u4 I32:i4 U64:u8 I64:i8 F16:f2 F32:f4 F64:f8 C64:c8 BF16:bfloat16
    F8_E5M2:float8_e5m2 F8_E5M2FNUZ:float8_e5m2fnuz F8_E4M3:float8_e4m3fn F8_E4M3FNUZ:float8_e4m3fnuz
    F8_E8M0:float8_e8m0fnu"""
_PAIRS = [pair.split(":") for pair in _TYPES.split()]
DTYPES: Mapping[str, np.dtype] = {code: np.dtype(getattr(ml_dtypes, name, name)) for code, name in _PAIRS}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_JSON_BYTES = 100_000_000  # the format's own limit for a header; we hold the index to it too
_MAX_JSON_VALUES = 2_000_000  # about 200,000 tensors; bounds what the parser can allocate for a hostile 100 MB
_MAX_RANK = 32  # what every numpy can hold
_DAMAGED = "The file is cut short, damaged or of another checkpoint: fetch or write it again."
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
_brief = _REPR.repr  # whatever a file holds, a message stays short


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be trusted or understood."""


class TensorInfo(NamedTuple):
    """Where a tensor lies; nothing of it is read yet."""

    file: Path  # the real file that holds the bytes, links resolved
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # absolute, in bytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


_File = tuple[Path, bytes, dict[str, TensorInfo]]  # path, what precedes the tensors, and these as `specs` orders them


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of one safetensors file; the data stay on disk."""
    path = Path(os.path.realpath(path))
    with _open(path) as (file, size):
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > size or start - 8 > _MAX_JSON_BYTES:
            raise _error(path, f"header of {start - 8} bytes, file of {size}; expected it inside, <= {_MAX_JSON_BYTES}")
        header = _parse(file.read(start - 8), f"{path}: header")
    if not _is_text_map(metadata := header.pop("__metadata__", {})):
        raise _error(path, f"__metadata__ is {_brief(metadata)}; expected strings under string keys")
    tensors = {name: _tensor(path, name, entry, start, size) for name, entry in header.items()}
    spans = sorted((info.offset, info.offset + info.nbytes, f"tensor {_brief(name)}") for name, info in tensors.items())
    covered = start
    for begin, end, name in [*spans, (size, size, "the end of the file")]:
        if begin != covered:
            fault = f"{begin - covered} unused bytes before" if begin > covered else "another tensor overlaps"
            raise _error(path, f"{fault} {name}, at byte {begin}; expected tensors that cover the data exactly")
        covered = end
    return tensors


def read_index(folder: Path) -> dict[str, TensorInfo]:
    """Find every tensor of a folder: in `model.safetensors`, else in the shards that the index names."""
    folder = Path(folder)
    if os.path.lexists(folder / SINGLE):
        return read_header(_inside(folder, SINGLE))
    if not os.path.lexists(path := folder / INDEX):
        seen = sorted(p.name for end in ("bin", "pt", "pth", "safetensors") for p in folder.glob(f"*.{end}"))
        found = f"holds {_brief(seen)}" if folder.is_dir() else "no such folder"
        remedy = "Pickle files (.bin, .pt) are never read: in transformers, save with safe_serialization=True."
        raise _error(folder, f"{found}; expected {SINGLE}, or {INDEX} and its shards", remedy)
    weight_map = read_json(_inside(folder, INDEX)).get("weight_map")
    if not _is_text_map(weight_map) or not weight_map:
        raise _error(path, f"weight_map is {_brief(weight_map)}; expected tensor names mapped to file names")
    tensors: dict[str, TensorInfo] = {}
    for shard in dict.fromkeys(weight_map.values()):
        for name, info in read_header(_inside(folder, shard)).items():
            if (listed := weight_map.get(name)) != shard:
                found = f"{_brief(shard)} holds tensor {_brief(name)}, which the index lists in {_brief(listed)}"
                raise _error(path, f"{found}; expected each tensor in one shard, the listed one")
            tensors[name] = info
    for name in (name for name in weight_map if name not in tensors):
        raise _error(path, f"{_brief(weight_map[name])} does not hold tensor {_brief(name)}; expected what is listed")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, strictly: no key twice, no NaN, nothing huge."""
    with _open(path) as (file, size):
        if size > _MAX_JSON_BYTES:
            raise _error(path, f"{size} bytes of JSON; expected at most {_MAX_JSON_BYTES}")
        return _parse(file.read(size).lstrip(), str(path))


def read_tensor(info: TensorInfo) -> np.ndarray:
    """Read one tensor into a fresh, writable, C-contiguous array, with no second copy."""
    array = np.empty(info.shape, info.dtype)
    with _open(info.file) as (file, _):
        file.seek(info.offset)
        got = file.readinto(array.reshape(-1).view(np.uint8).data)  # large reads skip the file's own buffer
    if got != info.nbytes:
        raise _error(info.file, f"the file ends {info.nbytes - got} bytes short of a tensor's end; expected all of it")
    if info.dtype == np.bool_ and array.size and array.view(np.uint8).max() > 1:
        raise _error(info.file, f"the BOOL tensor at byte {info.offset} holds other bytes; expected 0 and 1")
    return array


def read_rows(info: TensorInfo, start: int, stop: int) -> np.ndarray:
    """Read rows `start` to `stop` of the leading axis, and only their bytes."""
    if not info.shape or not 0 <= start <= stop <= info.shape[0]:
        found = f"{start}:{stop} of shape {info.shape} in {info.file}; expected 0 <= start <= stop <= the leading axis"
        raise _error("read_rows", found, "Ask for rows that the tensor has.", ValueError)
    offset = info.offset + start * math.prod(info.shape[1:]) * info.dtype.itemsize
    return read_tensor(info._replace(shape=(stop - start, *info.shape[1:]), offset=offset))


def write(
    folder: Path,
    specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    get: Callable[[str], np.ndarray],
    *,
    max_shard_bytes: int = 5 * 2**30,
    metadata: Mapping[str, str] = {"format": "pt"},
) -> None:
    """Write a checkpoint, holding one tensor at a time; all of it appears under its final names, or none.

    Args:
        folder: made if missing; must not hold a checkpoint yet.
        specs: dtype and shape per name.
        get: returns the named array; called once per name, in the order of `specs`.
        max_shard_bytes: what goes beyond is put in further shards; a larger tensor has a shard of its own.
        metadata: text for the header of every file.
    """
    files = _plan(folder, specs, max_shard_bytes, dict(metadata))
    if taken := sorted(path.name for path in folder.glob("model*.safetensors*")):
        found = f"already holds {taken[0]}; expected a folder without a checkpoint, as old and new files must not mix"
        raise _error(f"write: {folder}", found, "Write to another folder, or remove the old files.", FileExistsError)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {path: path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") for path, _, _ in files}
    with ExitStack() as undo:
        for path, head, tensors in files:
            undo.callback(temporary[path].unlink, missing_ok=True)
            with open(temporary[path], "xb") as file:
                file.write(head)
                for name, info in tensors.items():
                    array = np.asarray(get(name))
                    if array.dtype != info.dtype or array.shape != info.shape:
                        found = f"{array.dtype.str} {array.dtype} {array.shape}; expected {info.dtype} {info.shape}"
                        raise _error(f"write: get({name!r})", found, "Convert it, or correct its spec.", ValueError)
                    file.seek(info.offset)
                    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                    del array  # before the next is made
                file.flush()
                os.fsync(file.fileno())
        for path, temp in temporary.items():  # the index comes last: without it the shards are no checkpoint
            undo.callback(path.unlink, missing_ok=True)
            os.replace(temp, path)
        undo.pop_all()


def swap_in(partial: Path, folder: Path) -> None:
    """Put the finished folder in place; an old one is removed only after the new one stands."""
    if not folder.exists():
        os.replace(partial, folder)
        return
    old = folder.with_name(f".{secrets.token_hex(8)}.old")
    os.replace(folder, old)
    try:
        os.replace(partial, folder)
    except BaseException:
        os.replace(old, folder)
        raise
    shutil.rmtree(old) if old.is_dir() else old.unlink()


def _plan(folder: Path, specs: Mapping[str, Any], limit: int, metadata: dict[str, str]) -> list[_File]:
    """Lay out the files of a checkpoint, the index last."""
    groups: list[dict[str, TensorInfo]] = [{}]
    used = total = 0
    for name, (dtype, shape) in specs.items():
        info = TensorInfo(folder, np.dtype(dtype), tuple(shape), 0)
        if type(name) is not str or name == "__metadata__" or info.dtype not in _CODES or not _is_shape(list(shape)):
            found = f"{info.dtype.str} {info.dtype} {info.shape}; expected ints >= 0, and one of {[*map(str, _CODES)]}"
            raise _error(f"write: {name!r}", found, "Cast it, or rename __metadata__.", ValueError)
        if groups[-1] and used + info.nbytes > limit:
            groups, used = [*groups, {}], 0
        groups[-1][name] = info
        used, total = used + info.nbytes, total + info.nbytes
    n = len(groups)
    names = [SINGLE] if n == 1 else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    files = [_lay_out(folder / name, group, metadata) for name, group in zip(names, groups, strict=True)]
    weight_map = {name: path.name for path, _, tensors in files for name in tensors}
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    return files if n == 1 else [*files, (folder / INDEX, index.encode(), {})]


def _lay_out(path: Path, group: dict[str, TensorInfo], metadata: dict[str, str]) -> _File:
    """Place the widest dtypes first, as the official library does: then each tensor is aligned to its dtype."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    begin, end = {}, 0
    for name, info in sorted(group.items(), key=lambda item: -item[1].dtype.itemsize):
        begin[name], end = end, end + info.nbytes
        header[name] = {"dtype": _CODES[info.dtype], "shape": info.shape, "data_offsets": (begin[name], end)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if not _is_text_map(metadata):
        raise _error("write", f"metadata {_brief(metadata)}; expected strings", "Turn it into text.", ValueError)
    tensors = {name: info._replace(file=path, offset=8 + len(text) + begin[name]) for name, info in group.items()}
    return (path, len(text).to_bytes(8, "little") + text, tensors)


def _error(where: object, found: str, remedy: str = _DAMAGED, kind: type[Exception] = CheckpointError) -> Exception:
    return kind(f"{where}: {found}. {remedy}")


def _is_text_map(value: object) -> TypeGuard[dict[str, str]]:
    return type(value) is dict and all(type(text) is str for item in value.items() for text in item)


def _is_shape(value: object) -> bool:
    return type(value) is list and len(value) <= _MAX_RANK and all(type(n) is int and n >= 0 for n in value)


@contextmanager
def _open(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """Open a regular file, and nothing that could block; with its size."""
    try:
        if path.exists() and not path.is_file():
            raise _error(path, "not a regular file; expected one", "Remove the folder, pipe or device of this name.")
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise _error(path, f"cannot be read ({error.strerror}); expected a readable file") from error


def _inside(folder: Path, name: str) -> Path:
    """Return the real path of a file that the folder itself holds."""
    parts = name.split("/")
    ends = name.endswith((".safetensors", INDEX))
    if not ends or len(name) > 255 or {*"\\\0"} & {*name} or any(part[:1] in ("", ".") for part in parts):
        found = f"{INDEX} names {_brief(name)}; expected a .safetensors file inside the folder, with no '..' or '\\'"
        raise _error(folder, found, "Do not use this folder, or correct the index.")
    real = root = Path(os.path.realpath(folder))
    for depth in range(1, len(parts) + 1):
        real = Path(os.path.realpath(root.joinpath(*parts[:depth])))
        if not real.is_relative_to(root):
            remedy = f"If you trust it (a Hugging Face cache is made of links), copy it with `cp -rL {folder} COPY`."
            found = f"{'/'.join(parts[:depth])} is a link to {real}; expected files inside the folder"
            raise _error(folder, found, remedy)
    return real


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object, strictly and within bounds."""
    values = sum(raw.count(mark) for mark in (b",", b"[", b"{"))  # each value but the first follows one of these
    if not raw.startswith(b"{") or values > _MAX_JSON_VALUES:
        raise _error(where, f"{raw[:8]!r}, {values} values; expected '{{' first, at most {_MAX_JSON_VALUES}")
    twice: list[tuple[str, dict[str, Any]]] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        "".join(text for pair in pairs for text in pair if type(text) is str).encode()  # half a surrogate pair raises
        table, seen = dict(pairs), set()
        if len(table) < len(pairs):
            twice.append((next(key for key, _ in pairs if key in seen or seen.add(key)), table))
        return table

    def integer(digits: str) -> int | float:
        return int(digits) if len(digits) < 100 else float(digits)  # int() is slow, and a float is refused as a size

    try:  # parse_constant: int("NaN") raises
        parsed = json.loads(raw.decode(), object_pairs_hook=unique, parse_int=integer, parse_constant=int)
    except (ValueError, RecursionError) as error:
        raise _error(where, f"{error}; expected plain JSON in UTF-8") from None
    for key, table in twice[:1]:
        inside = next((f"{_brief(name)}: " for name, entry in parsed.items() if entry is table), "")
        raise _error(where, f"{inside}the key {_brief(key)} stands twice in one object; expected it once")
    return parsed


def _tensor(path: Path, name: str, entry: Any, start: int, size: int) -> TensorInfo:
    """Check one entry of a header by itself."""
    where = f"{path}: tensor {_brief(name)}"
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _error(where, f"the entry {_brief(entry)}; expected dtype, shape and data_offsets, no more")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(code) is not str or code not in DTYPES:
        raise _error(where, f"dtype {_brief(code)}; expected one of {', '.join(DTYPES)}")
    if not _is_shape(shape):
        raise _error(where, f"shape {_brief(shape)}; expected a list of at most {_MAX_RANK} integers >= 0")
    if not _is_shape(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - start:
        raise _error(where, f"data_offsets {_brief(offsets)}; expected [begin, end] within {size - start} bytes")
    info = TensorInfo(path, DTYPES[code], tuple(shape), start + offsets[0])
    if math.prod(n or 1 for n in shape) * info.dtype.itemsize >= 2**63 or info.nbytes != offsets[1] - offsets[0]:
        found = f"shape {shape} of {code} makes {info.nbytes} bytes and data_offsets hold {offsets[1] - offsets[0]}"
        raise _error(where, f"{found}; expected the same, and no product of sizes beyond int64")
    return info
