"""The child process of code_tests.py: take limits upon itself, then run one code and one test. Never imported.

A script for the bare interpreter. Standard input brings one JSON object: code, test, nonce, folder, limits and whether
they may be missing. The pipe whose number is the argument takes two answers: first a line of JSON, which guards hold
and which limits could not be set, and at the very end the nonce, if the test came to its end.

What the parent could do between fork and exec is done here, before any foreign line runs: a Python function there
would run in a copy of a process whose other threads hold locks.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import struct
import sys
import traceback
import types

# System calls that are refused: those that make processes, threads or sockets, signal or read other processes, and
# change namespaces, mounts, limits or the kernel. Each is `name:number on x86_64:number on aarch64`.
_CALLS = (
    "fork:57: vfork:58: clone:56:220 clone3:435:435 execve:59:221 execveat:322:281 "
    "socket:41:198 connect:42:203 bind:49:200 listen:50:201 io_uring_setup:425:425 "
    "kill:62:129 tkill:200:130 tgkill:234:131 rt_sigqueueinfo:129:138 rt_tgsigqueueinfo:297:240 pidfd_open:434:434 "
    "pidfd_send_signal:424:424 pidfd_getfd:438:438 ptrace:101:117 process_vm_readv:310:270 process_vm_writev:311:271 "
    "process_madvise:440:440 setrlimit:160:164 unshare:272:97 setns:308:268 chroot:161:51 pivot_root:155:41 "
    "mount:165:40 umount2:166:39 open_tree:428:428 move_mount:429:429 fsopen:430:430 open_by_handle_at:304:265 "
    "bpf:321:280 perf_event_open:298:241 userfaultfd:323:282 keyctl:250:219"
)
_MACHINES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}  # how the kernel knows it, and its column there
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2

# Events of the interpreter that are refused, and which arguments of others are paths to write to.
_REFUSED = ("subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "pty.spawn")
_REFUSED += ("socket.", "ctypes.dlopen", "ctypes.dlsym", "resource.setrlimit", "resource.prlimit")
_ONE_PATH = ("remove", "rmdir", "mkdir", "truncate", "chmod", "chown", "utime", "setxattr", "removexattr", "chflags")
_PATHS = {f"os.{name}": (0,) for name in _ONE_PATH} | {"os.rename": (0, 1), "os.link": (0, 1), "os.symlink": (1,)}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_AF_UNIX = 1


# ----------------------------------------------------------------------------------------------------------- private
def _main() -> None:
    verdict, given = int(sys.argv[1]), json.loads(sys.stdin.buffer.read())
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    write, leave = os.write, os._exit  # before anybody puts something else in their place
    guards = _call_kernel(given["folder"]) if sys.platform == "linux" else []
    missing = _set_limits(given["limits"])
    if _can_fork():
        missing.append("processes")
    sys.addaudithook(_make_hook(given["folder"]))
    write(verdict, json.dumps({"guards": [*guards, "audit hook"], "missing": missing}).encode() + b"\n")
    if missing and not given["allow_unsafe"]:
        leave(1)
    sys.argv[:] = ["code.py"]
    try:
        _run(given["code"], given["test"])
    except BaseException as error:
        with contextlib.suppress(BaseException):
            place = getattr(error.__traceback__, "tb_next", None)  # without this frame and the next, which are ours
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
            traceback.print_exception(type(error), error, getattr(place, "tb_next", None))
        leave(1)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    write(verdict, given["nonce"].encode())
    leave(0)


def _run(code: str, test: str) -> None:
    """Both as one script, so that what is run is what a response says: code with the test behind it."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    if "unittest" in code + test:
        _replace_unittest_main()
    run, read = exec, compile  # before the code puts something else in their place
    for name, text in (("code", code), ("test", test)):
        run(read(text, f"<{name}>", "exec", dont_inherit=True), module.__dict__)


def _replace_unittest_main() -> None:
    """By one that returns if every test was run and passed: Python's raises what `sys.exit(0)` in a code does too."""
    import unittest  # here, for it takes longer than all the rest

    class Program(unittest.TestProgram):
        def runTests(self):  # noqa: N802
            self.exit = False
            super().runTests()
            if not self.result.wasSuccessful() or not self.result.testsRun or self.result.skipped:
                raise SystemExit(1)

    unittest.main = Program  # type: ignore[misc]


def _set_limits(limits: dict[str, int]) -> list[str]:
    """Names of those that cannot be set; that of processes is tried out instead."""
    missing, extra = [], {"RLIMIT_CORE": 0, "RLIMIT_NOFILE": 64, "RLIMIT_NPROC": 0}
    for name, value in (limits | extra).items():
        which = getattr(resource, name, None)
        try:
            if which is None:
                raise OSError
            _, most = resource.getrlimit(which)
            value = value if most == resource.RLIM_INFINITY else min(value, most)
            hard = value + 1 if name == "RLIMIT_CPU" and value != most else value  # first a signal that tells why
            resource.setrlimit(which, (value, hard))
            held = resource.getrlimit(which) == (value, hard)
        except (OSError, ValueError):
            held = False
        if not held and name in limits:
            missing.append(name.removeprefix("RLIMIT_").lower())
    return missing


def _can_fork() -> bool:
    try:
        child = os.fork()
    except OSError:
        return False
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return True


def _call_kernel(folder: str) -> list[str]:
    """Ask Linux for what it has to offer beside limits; names of what it granted."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    offers = {"no network": _leave_network, "writes": _keep_writes, "system calls": _forbid_calls}
    granted = []
    for name, ask in offers.items():
        with contextlib.suppress(AttributeError, OSError):  # an older C library; a container's own rules
            if ask(libc, folder):
                granted.append(name)
    return granted


def _leave_network(libc, _folder: str) -> bool:
    """A network of its own, without any device that is up. The new user space also gives up what root may do."""
    return libc.unshare(_NEW_USER | _NEW_NETWORK) == 0


def _keep_writes(libc, folder: str) -> bool:
    """Landlock: files are written, made and removed inside the folder alone, by whatever way they are reached."""
    call = lambda number, *args: libc.syscall(*(ctypes.c_long(x) if type(x) is int else x for x in (number, *args)))
    version = call(444, None, 0, 1)
    if version < 1:
        return False
    to_file = 1 << 1 | (1 << 14 if version >= 3 else 0)  # write; truncate
    rights = to_file | 0x1FF0 | (1 << 13 if version >= 2 else 0)  # remove and make of all kinds; move to elsewhere
    ruleset = call(444, ctypes.byref(ctypes.c_uint64(rights)), 8, 0)
    if ruleset < 0:
        return False
    for path, allowed in ((folder, rights), (os.devnull, to_file)):
        at = os.open(path, os.O_PATH)
        failed = call(445, ruleset, 1, struct.pack("=Qi", allowed, at), 0) != 0
        os.close(at)
        if failed:
            return False
    held = _no_new_privileges(libc) and call(446, ruleset, 0) == 0
    os.close(ruleset)
    return held


def _forbid_calls(libc, _folder: str) -> bool:
    """A filter of system calls, for root too, whom the limit of processes does not bind."""
    machine, column = _MACHINES.get(os.uname().machine, (0, 0))
    if not machine or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    numbers = [int(number) for call in _CALLS.split() if (number := call.split(":")[column])]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    refuse = lambda i: len(numbers) + 1 - i  # lines from here to the last one
    lines = [(load, 0, 0, 4), (equal, 1, 0, machine), (give, 0, 0, 0x80000000)]  # of another machine: kill
    lines += [(load, 0, 0, 0), (at_least, refuse(0), 0, 0x40000000)]  # numbers of x32
    lines += [(equal, refuse(i), 0, number) for i, number in enumerate(numbers, 1)]
    lines += [(give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x00050000 | errno.EPERM)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
    pointer = struct.pack("@HP", len(lines), ctypes.addressof(program))
    at = ctypes.c_char_p(pointer)
    return _no_new_privileges(libc) and libc.prctl(_SET_SECCOMP, ctypes.c_ulong(_FILTER), at, 0, 0) == 0


def _no_new_privileges(libc) -> bool:
    none = ctypes.c_ulong(0)
    return libc.prctl(_NO_NEW_PRIVILEGES, ctypes.c_ulong(1), none, none, none) == 0


def _make_hook(folder: str):
    """What the interpreter itself refuses, on every platform."""
    realpath, fsdecode, inner, devnull = os.path.realpath, os.fsdecode, folder + os.sep, os.devnull

    def inside(path) -> bool:
        return type(path) is int or (realpath(fsdecode(path)) + os.sep).startswith(inner)

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            fine = not flags & _WRITES or inside(path) or fsdecode(path) == devnull
        elif event in _PATHS:
            fine = all(inside(args[i]) for i in _PATHS[event])
        elif event == "sqlite3.connect":
            fine = args[0] in (":memory:", "") or inside(args[0])
        elif event == "socket.__new__":
            fine = args[1] == _AF_UNIX  # a pair of connected ones is what asyncio wakes itself by
        else:
            fine = not event.startswith(_REFUSED)
        if not fine:
            raise PermissionError(errno.EACCES, f"refused here: {event}")

    return hook


if __name__ == "__main__":
    _main()
