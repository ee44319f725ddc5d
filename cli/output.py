"""What commands share: the error of a misused one, the types of their options, JSON, files."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

Bits = Annotated[str, tyro.conf.arg(metavar="WIDTH[,WIDTH...]")]
PICTURES = ".png", ".pdf", ".svg"
FloatType = Literal["float32", "bfloat16", "float16"]


class UsageError(Exception):
    """Arguments that do not go together."""


def dumps(value: Any, indent: int | None = None) -> str:
    """JSON of settings and results; one line where nothing is indented."""

    def plain(x: Any) -> Any:
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return dataclasses.asdict(x)
        if isinstance(x, Path):
            return str(x)
        raise TypeError(f"{type(x).__name__} is not JSON")

    return json.dumps(value, ensure_ascii=False, default=plain, indent=indent)


class Loaded(NamedTuple):
    """A model as a command serves it."""

    model: Any  # models.decoder.Model
    at_width: Any  # int -> its parameters at that width; None for plain weights


def load_model(
    folder: Path, *, dtype: Any = None, bits: str | None = None, act: Any = None, tensor: int = 1, progress=False
) -> Loaded:
    """Read a model, and switch a master to the width that is asked for: its highest when none is.

    Args:
      folder: of a Hugging Face checkpoint, or of `train qat`.
      dtype: of weights and activations.
      bits: one width, or one a layer with commas between them; of a master alone.
      act: `int8` quantises what enters the matrices of a master as well.
      tensor: devices that serve it together.
      progress: show a bar.
    """
    from ..models.hf import load_master
    from ..models.multi_precision import place, switch_bits
    from ..sharding.rules import SERVING

    mesh = _mesh(tensor)
    model, quant = load_master(folder, dtype=dtype, mesh=mesh, rules=SERVING, progress=progress)
    if not quant:
        if bits is not None or act is not None:
            what = "--bits" if bits is not None else "--act"
            raise ValueError(f"{what}: {folder} holds plain weights; expected a master (jaxaroo train qat).")
        return Loaded(model, None)

    def at_width(width: Any) -> Any:
        params = switch_bits(model.params, width, quant, act=act)
        return params if mesh is None else place(model._replace(params=params), mesh).params

    return Loaded(model._replace(params=at_width(8 if bits is None else read_bits(bits))), at_width)


def read_bits(text: str) -> int | tuple[int, ...]:
    """`4`, or `8,4,4,6` for one width a layer."""
    try:
        widths = tuple(int(part) for part in text.split(","))
    except ValueError as e:
        raise UsageError(f"--bits {text}: expected a width such as 4, or one a layer such as 8,4,4,6.") from e
    return widths[0] if len(widths) == 1 else widths


def problems(data: str, layout: Any, limit: int | None, level: int, hi: int) -> Iterator[Any]:
    """Rows to measure on: of a file, or test problems of the embedded task.

    Args:
      data: what the user named.
      layout: of the rows, see train/data/formats.py.
      limit: how many at most.
      level: kind of the embedded problems.
      hi: size of their numbers.
    """
    from ..train.data.arithmetic import ArithmeticConfig, ArithmeticExamples
    from ..train.data.formats import open_examples

    check_limit(limit)
    if data == "builtin:arithmetic":
        number = 200 if layout == "auto" else 1000
        examples: Any = ArithmeticExamples(ArithmeticConfig(level=level, hi=hi), "test", limit or number)
    else:
        examples = open_examples(Path(data), layout, progress=True)
    yield from (examples[i] for i in range(min(len(examples), limit or len(examples))))


def check_limit(limit: int | None) -> None:
    """Refuse a number of rows that is none."""
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit}: expected at least 1, or no --limit for all.")


def expect_files(command: str, **files: Path | None) -> None:
    """Refuse what could not be written when hours of work are done.

    Args:
      command: as one types it.
      files: by flag; None was not asked for, and `plot` is a picture.
    """
    for flag, path in files.items():
        if path is None:
            continue
        if path.is_dir() or not path.parent.is_dir():
            found = f"{path} is a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise UsageError(f"{command}: --{flag}: {found}; expected a file in a folder that is there.")
        if flag == "plot" and path.suffix.lower() not in PICTURES:
            raise UsageError(f"{command}: --plot {path}: expected a name that ends in {', '.join(PICTURES)}.")


def expect_folder(command: str, out: Path) -> None:
    """Refuse a file where a folder will be written when all is measured."""
    if out.is_file():
        raise UsageError(f"{command}: --out {out} is a file; expected a folder, or nothing yet.")


def write_whole(path: Path, text: str) -> None:
    """The file with this text or, if something goes wrong, as it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """A line of JSON for each row: all of them or, if something goes wrong, the file as it was."""
    write_whole(path, "".join(dumps(row) + "\n" for row in rows))


def cut_half_line(path: Path) -> int:
    """Whole lines of a file, behind which nothing stands any more; a killed process may have left half a line."""
    with path.open("a+b") as file:
        file.seek(0)
        data = file.read()
        end = data.rfind(b"\n") + 1
        file.truncate(end)  # what is whole is not written anew, so that a stop here loses nothing
    return data[:end].count(b"\n")


# ----------------------------------------------------------------------------------------------------------- private
def _mesh(tensor: int) -> Any:
    """The first devices, along tensor; None for one."""
    import jax

    from ..sharding.mesh import MeshConfig, make_mesh

    if not 1 <= tensor <= jax.device_count():
        raise UsageError(f"--tensor {tensor}: found {jax.device_count()} devices; expected 1 to as many as there are.")
    return make_mesh(MeshConfig(fsdp=1, tensor=tensor), jax.devices()[:tensor]) if tensor > 1 else None
