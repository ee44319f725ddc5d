"""`jaxaroo doctor`: what is here, whether it works, and the command that mends what does not."""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from .output import dumps

GIB = float(1 << 30)
EXTRAS = {  # what each brings, and for what
    "aot": ("libtpu", "jaxaroo plan"),
    "arrow": ("pyarrow", "data in Parquet and Arrow files"),
    "tensorboard": ("tensorboardX", "--tensorboard"),
    "qwix": ("qwix", "interchange of single-width weights"),
}


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    state: Literal["ok", "note", "wrong"]  # a note is something that is not there and need not be
    found: str
    fix: str = ""  # a command, or what to do


def doctor(*, json: bool = False) -> int:
    """Look at devices, versions, memory and folders; say what is missing, and the command that mends it.

    Exit status 0 if nothing is wrong, 1 if something is.

    Args:
      json: write JSON.
    """
    checks: list[Callable[[], Iterator[Finding]]] = [_python, _packages, _devices, _memory, _folders, _extras]
    found = [finding for check in checks for finding in check()]
    if json:
        print(dumps([one._asdict() for one in found]))
    else:
        for one in found:
            mark = {"ok": "ok   ", "note": "     ", "wrong": "WRONG"}[one.state]
            print(f"{mark} {one.name:24} {one.found}")
            if one.fix:
                print(f"{'':31}{one.fix}")
    wrong = [one for one in found if one.state == "wrong"]
    if not json:
        print(f"\n{len(wrong)} things are wrong: {', '.join(one.name for one in wrong)}" if wrong else "\nall is well")
    return 1 if wrong else 0


# ----------------------------------------------------------------------------------------------------------- private
def _python() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()}, {sys.executable}")
    yield Finding("system", "ok", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores")


def _packages() -> Iterator[Finding]:
    """Those that jaxaroo asks for, by its own metadata."""
    from packaging.requirements import Requirement

    yield Finding("jaxaroo", "ok", f"{_version('jaxaroo')}, {Path(__file__).resolve().parents[1]}")
    for text in importlib.metadata.requires("jaxaroo") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        here = _version(wanted.name)
        if here is None or not wanted.specifier.contains(here, prereleases=True):
            fix = f'{sys.executable} -m pip install "{wanted.name}{wanted.specifier}"'
            yield Finding(wanted.name, "wrong", f"{here or 'not installed'}; expected {wanted.specifier}", fix)
        else:
            yield Finding(wanted.name, "ok", here)


def _devices() -> Iterator[Finding]:
    """Those that JAX sees, each with a product computed on it; and those that it does not see."""
    import jax
    import jax.numpy as jnp

    try:
        devices = jax.local_devices()
    except RuntimeError as e:
        said = str(e).splitlines()[0][:200]
        fix = f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS')!r}: unset it, or install what it names"
        yield Finding("devices", "wrong", said, fix)
        return
    for device in devices:
        start = time.perf_counter()
        try:
            ones = jax.device_put(jnp.ones((256, 256)), device)
            right = float((ones @ ones)[0, 0]) == 256.0
            said = f"{time.perf_counter() - start:.2f} s for a first product" if right else "a product came out wrong"
        except Exception as e:  # a driver that is too old, memory that others hold: whatever it says is the finding
            right, said = False, f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"
        room = (device.memory_stats() or {}).get("bytes_limit") if right else None
        said = (f"{room / GIB:.1f} GiB, " if room else "") + said
        yield Finding(f"device {device.id}", "ok" if right else "wrong", f"{device.device_kind}: {said}")
    if jax.default_backend() == "cpu" and not os.environ.get("JAX_PLATFORMS"):
        yield from _unseen(Path("/"))


def _unseen(root: Path) -> Iterator[Finding]:
    """Accelerators that the system has and JAX does not use.

    Args:
      root: of the file system; another one in tests.
    """
    if (root / "proc/driver/nvidia/version").exists():
        fix = f'{sys.executable} -m pip install "jaxaroo[cuda]"'
        yield Finding("NVIDIA GPU", "wrong", "there is a driver, and JAX sees no GPU", fix)
    if any((root / "dev").glob("accel*")) or any((root / "dev/vfio").glob("[0-9]*")):
        fix = f'{sys.executable} -m pip install "jaxaroo[tpu]"'
        yield Finding("TPU", "wrong", "there is a device file, and JAX sees no TPU", fix)


def _memory() -> Iterator[Finding]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        total, free = (kilobytes[name] * 1024 / GIB for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError, IndexError):
        return  # not Linux
    short = free < 1
    fix = "end other programs: a run of the smallest preset takes about 1 GiB" if short else ""
    yield Finding("memory", "wrong" if short else "ok", f"{free:.1f} of {total:.1f} GiB are free", fix)


def _folders() -> Iterator[Finding]:
    """Where programs and plans are kept, and where temporary files go."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxaroo"
    for name, folder in (("compiled programs", caches), ("temporary files", Path(tempfile.gettempdir()))):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            free = shutil.disk_usage(folder).free / GIB
        except OSError as e:
            which = "XDG_CACHE_HOME" if name == "compiled programs" else "TMPDIR"
            yield Finding(name, "wrong", f"{folder} cannot be written: {e}", f"set {which} to a folder that can be")
            continue
        short = free < 1
        fix = "make room: a checkpoint of a run takes three times its weights" if short else ""
        yield Finding(name, "wrong" if short else "ok", f"{folder}, {free:.1f} GiB free", fix)


def _extras() -> Iterator[Finding]:
    for extra, (package, purpose) in EXTRAS.items():
        here = _version(package)
        if here is None:
            fix = f'{sys.executable} -m pip install "jaxaroo[{extra}]"'
            yield Finding(f"extra {extra}", "note", f"not installed; for {purpose}", fix)
        else:
            yield Finding(f"extra {extra}", "ok", f"{package} {here}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
