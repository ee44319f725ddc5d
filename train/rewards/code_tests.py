"""Which codes pass which tests: every pair in a process of its own, with limits (for DSTC, and as a reward of code).

    passed[j][k] = 1 if code j, with test k behind it as one script, runs to the end of the test

The end is reached if a number that was drawn for this run arrives on a pipe of its own, written behind the last line
of the test. An exit status says nothing: `sys.exit(0)` before the test, or a process that was killed, has not passed.
Only `unittest.main()`, which Python ends by `sys.exit`, returns here if it ran one test or more and all of them passed;
one that was skipped has not passed.

What a run may not do: use more CPU time, time, memory or bytes of a file than allowed; start a process or a thread;
open a connection; signal other processes; write outside its own folder, which is removed behind it. It sees Python's
own library, nothing that was installed, no input, no environment but a fixed hash seed (so that sets are walked in the
same order each time). Output is kept up to a bound, and read on beyond it. How much the folder holds is looked at ten
times a second at most, and a run that filled it is killed; so for a moment it may hold what is written meanwhile.

On Linux the kernel refuses these things (limits, a network of its own, Landlock, a filter of system calls, as far as
each is granted), elsewhere limits and an audit hook of the interpreter do. A limit that cannot be set on a platform is
a refusal to run anything, unless `allow_unsafe` is set.

This guards against accidents and what models ordinarily write. It is no boundary against somebody who attacks it: code
and guard share a process, the number can be found by those who look for it, files can be read, and a kernel has
faults. Run hostile code in a container or a machine that holds nothing else.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

_CHILD = Path(__file__).with_name("code_child.py")
_FLAGS = ("-P", "-s", "-S", "-B", "-X", "utf8")  # -I without -E, for there is nothing in the environment but the seed
_START_SECONDS = 60.0  # for the interpreter to begin, on a busy machine too; the code's own time counts from then
_LOOK_SECONDS = 0.1  # between looks at what the folder holds
_BLOCK = 2**12  # bytes that a file or folder takes at least
_CHUNK = 2**16


class SandboxError(OSError):
    """The guards cannot be put up here, so nothing was run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeLimits:
    """What one run may use."""

    cpu_seconds: int = 5
    wall_seconds: float = 10.0
    memory_bytes: int = 512 * 2**20  # of address space, the interpreter's own included
    file_bytes: int = 2**20  # of each file that it writes
    folder_bytes: int = 2**26  # of all of them
    output_bytes: int = 2**14  # kept of what it prints
    allow_unsafe: bool = False  # run even if a limit cannot be set

    def __post_init__(self):
        least_of = dict.fromkeys(("file_bytes", "folder_bytes", "output_bytes"), 0)
        for name, least in ({"cpu_seconds": 1, "memory_bytes": 2**26} | least_of).items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 2**62:
                raise ValueError(f"CodeLimits.{name}: found {value!r}; expected an integer of at least {least}.")
        if not 0 < self.wall_seconds < float("inf"):
            raise ValueError(f"CodeLimits.wall_seconds: found {self.wall_seconds}; expected a positive number.")


class Outcome(NamedTuple):
    """How one run went."""

    passed: bool
    ended: str  # passed, failed, out of time, out of room, or the signal that killed it
    output: str  # of standard output and error together, the last traceback included
    guards: tuple[str, ...]  # beside limits


def run_test(code: str, test: str, limits: CodeLimits = CodeLimits()) -> Outcome:
    """Run one code with one test behind it.

    Args:
      code: Python.
      test: Python that raises if the code is wrong, or calls `unittest.main()`; it sees the code's names.
      limits: of the run.

    Raises:
      SandboxError: if a limit cannot be set here, or the interpreter does not begin within them.
    """
    if os.name != "posix":
        raise SandboxError(f"run_test: found {sys.platform}; expected Linux or another POSIX system. Run it there.")
    nonce = secrets.token_hex(16)
    with _folder() as folder, tempfile.TemporaryFile() as given:
        message = {"code": code, "test": test, "nonce": nonce, "folder": os.path.realpath(folder)}
        message |= {"limits": _resources(limits), "allow_unsafe": limits.allow_unsafe}
        given.write(json.dumps(message).encode())
        given.seek(0)
        verdict, told = os.pipe()
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, verdict)
            try:
                process = subprocess.Popen(
                    [sys.executable, *_FLAGS, str(_CHILD), str(told)],
                    stdin=given,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    env={"PYTHONHASHSEED": "0"},
                    pass_fds=(told,),
                    start_new_session=True,
                )
            finally:
                os.close(told)
            opened.enter_context(process)  # closes its output, and waits
            opened.callback(_kill, process)
            said, output, out_of = _listen(process, verdict, len(nonce), folder, limits)
        return _outcome(said, nonce.encode(), output.decode(errors="replace"), out_of, process.returncode, limits)


def run_tests(
    codes: Sequence[str],
    tests: Sequence[str],
    limits: CodeLimits = CodeLimits(),
    *,
    workers: int = 1,
    progress: bool = False,
) -> list[list[int]]:
    """Run every code with every test.

    Args:
      codes: J of them.
      tests: K of them.
      limits: of each run.
      workers: runs at the same time.
      progress: show a bar on a terminal.

    Returns:
      `passed` of layout `code_tests`, J rows of K values 0 or 1.

    Raises:
      SandboxError: as `run_test`.
    """
    if workers < 1:
        raise ValueError(f"run_tests: found workers={workers}; expected at least 1.")
    cells, flat = list(itertools.product(codes, tests)), []
    with ThreadPoolExecutor(workers) as pool:
        outcomes = pool.map(lambda cell: run_test(cell[0], cell[1], limits), cells)
        for outcome in tqdm(outcomes, "run", len(cells), unit=" runs", disable=None if progress else True):
            flat.append(int(outcome.passed))
    return [flat[j * len(tests) : (j + 1) * len(tests)] for j in range(len(codes))]


# ----------------------------------------------------------------------------------------------------------- private
@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """A folder of its own for a run, removed behind it as far as that can be done."""
    path = tempfile.mkdtemp(prefix="code-")
    try:
        yield path
    finally:
        _remove(path)


def _remove(folder: str) -> None:
    """Remove a folder and all in it, however deep; no link is followed.

    `shutil.rmtree` calls itself for each folder in a folder. Here one that stands in another moves up to the top, so
    that its path is never long.
    """
    waiting = [folder]
    while waiting:
        at = waiting.pop()
        with contextlib.suppress(OSError):
            os.chmod(at, 0o700)
            for entry in [*os.scandir(at)]:
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        os.chmod(entry.path, 0o700)  # its parent is written down in it, so it has to be open
                        waiting.append(os.path.join(folder, secrets.token_hex(16)))
                        os.rename(entry.path, waiting[-1])
                    else:
                        os.unlink(entry.path)
            os.rmdir(at)
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def _resources(limits: CodeLimits) -> dict[str, int]:
    """Limits as the system names them."""
    return {
        "RLIMIT_CPU": limits.cpu_seconds,
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": limits.file_bytes,
    }


def _listen(
    process: subprocess.Popen, verdict: int, number: int, folder: str, limits: CodeLimits
) -> tuple[bytes, bytes, str]:
    """What came on the pipe until a verdict can be told, what was printed, and what it had too little of, if so."""
    assert process.stdout is not None
    out, said, kept = process.stdout.fileno(), bytearray(), bytearray()
    deadline, look, ended, begun, full = time.monotonic() + _START_SECONDS, 0.0, False, False, False
    keep = lambda data: kept.extend(data[: limits.output_bytes - len(kept)])
    with selectors.DefaultSelector() as selector:
        for fd in (verdict, out):
            os.set_blocking(fd, False)
            selector.register(fd, selectors.EVENT_READ)
        while not ended and not full and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(min(left, _LOOK_SECONDS)):
                data = os.read(key.fd, _CHUNK)
                if key.fd == verdict:
                    said += data
                    ended = ended or not data
                elif data:
                    keep(data)
                else:
                    selector.unregister(out)
            line, newline, rest = said.partition(b"\n")
            if newline and not begun:
                begun, deadline = True, time.monotonic() + limits.wall_seconds
            ended = ended or len(rest) >= number or len(line) > _CHUNK
            if begun and not ended and (now := time.monotonic()) >= look:
                full = _held(folder) > limits.folder_bytes
                look = time.monotonic() + max(_LOOK_SECONDS, 10 * (time.monotonic() - now))
    with contextlib.suppress(BlockingIOError):  # what it printed last may have come after the verdict
        while len(kept) < limits.output_bytes and (data := os.read(out, _CHUNK)):
            keep(data)
    return bytes(said), bytes(kept), "room" if full else "" if ended else "time"


def _held(folder: str) -> int:
    """Bytes of all that a folder holds, as far as it can be seen."""
    total, waiting = 0, [folder]
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                total += max(_BLOCK, entry.stat(follow_symlinks=False).st_size)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
    return total


def _outcome(said: bytes, nonce: bytes, output: str, out_of: str, status: int, limits: CodeLimits) -> Outcome:
    line, begun, rest = said.partition(b"\n")
    if not begun:
        found = f"a child that ended with {status} before it began: {output[-500:].strip()!r}"
        raise SandboxError(f"run_test: {found}; expected Python to begin within {limits}. Widen them.")
    report: dict[str, Any] = json.loads(line)
    if report["missing"] and not limits.allow_unsafe:
        found = f"no way to limit {', '.join(report['missing'])} on {sys.platform}"
        remedy = "Run on Linux or in a container; or set allow_unsafe, where nothing can be lost."
        raise SandboxError(f"run_test: {found}; expected all limits to hold. {remedy}")
    passed = rest == nonce
    ended = "passed" if passed else f"out of {out_of}" if out_of else "failed"
    if ended == "failed" and status < 0:
        ended = next((s.name for s in signal.Signals if s == -status), f"signal {-status}")
    return Outcome(passed, ended, output, tuple(report["guards"]))


def _kill(process: subprocess.Popen) -> None:
    """The whole group, before anybody waits for it: until then its number is nobody else's."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
