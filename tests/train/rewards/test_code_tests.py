"""Codes that behave, and codes that do not: what passes, what is refused, and what is left behind (nothing).

Guards stand behind one another, so what is refused says nothing about each of them. `without` takes some away, to see
that each of the others holds alone.
"""

import glob
import os
import socket
import sys
import tempfile
import textwrap

import pytest

from jaxaroo.train.rewards import code_tests
from jaxaroo.train.rewards.code_tests import CodeLimits, SandboxError, run_test, run_tests

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="all guards are those of Linux")
LIMITS = CodeLimits(cpu_seconds=1, wall_seconds=60.0)
KERNEL = ("_leave_network", "_keep_writes", "_forbid_calls")


@pytest.fixture
def without(tmp_path, monkeypatch):
    """Run children that lack some of their guards."""

    def take(*names):
        driver = tmp_path / "child.py"
        driver.write_text(
            "import importlib.util, sys\n"
            f"spec = importlib.util.spec_from_file_location('child', {str(code_tests._CHILD)!r})\n"
            "child = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(child)\n"
            + "".join(f"child.{name} = lambda *args: False\n" for name in names if name != "hook")
            + ("child._make_hook = lambda folder: lambda event, args: None\n" if "hook" in names else "")
            + "child._main()\n"
        )
        monkeypatch.setattr(code_tests, "_CHILD", driver)

    return take


def needs(guard):
    """Leave out what a kernel or a container does not grant; what then holds is tested all the same."""
    if guard not in (None, *run_test("", "", CodeLimits(allow_unsafe=True)).guards):
        pytest.skip(f"{guard}: not granted here")


def passes(code, test="", limits=LIMITS):
    return run_test(textwrap.dedent(code), test, limits).passed


def refused(line, limits=LIMITS):
    """That a line raises PermissionError, and not something else, nor nothing."""
    code = f"""
        import os, sys
        try:
            {line}
        except PermissionError:
            refused = True
    """
    return passes(code, "assert refused", limits)


def test_what_a_code_is_worth():
    codes = ["def f(x): return x + 1", "def f(x): return 2 * x", "def f(x) return", "", "f = abs\nraise ValueError"]
    tests = ["assert f(1) == 2", "assert f(2) == 3", "pass", "assert f"]
    wanted = [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert run_tests(codes, tests, LIMITS, workers=4) == wanted
    assert run_tests([], tests) == []
    assert run_tests(codes[:2], []) == [[], []]
    assert {type(x) for row in run_tests(codes[:1], tests[:1], LIMITS) for x in row} == {int}


def test_code_and_test_are_one_script_with_python_alone():
    code = """
        from __future__ import annotations
        import asyncio, collections, ctypes, dataclasses, decimal, heapq, itertools, math, os, random, re, sqlite3, sys
        import tempfile, typing, unittest

        @dataclasses.dataclass
        class Point:
            x: int

        class Case(unittest.TestCase):
            def test_it(self):
                self.assertEqual(typing.get_type_hints(Point), {"x": int})

        async def later():
            await asyncio.sleep(0)
            return 3
    """
    test = textwrap.dedent("""
        def annotated(x: int): pass
        assert annotated.__annotations__ == {"x": int}  # `from __future__` is the code's own
        assert __name__ == "__main__" and sys.modules["__main__"].Point is Point
        assert Point(1) == Point(1) and asyncio.run(later()) == 3
        assert unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(Case)).wasSuccessful()
        assert os.environ.keys() <= {"PYTHONHASHSEED", "LC_CTYPE"} and os.listdir() == []
        open("mine", "w").write("x"); os.mkdir("d"); os.rename("mine", "d/mine"); os.remove("d/mine")
        with tempfile.NamedTemporaryFile("w") as file: file.write("x")
        open(os.devnull, "w").write("x")
        sqlite3.connect(":memory:").execute("select 1"); sqlite3.connect("base").execute("create table t (x)")
        assert ctypes.c_int32(2**31).value == -(2**31)
        assert not any("site-packages" in path for path in sys.path) and os.getcwd() not in sys.path
    """)
    outcome = run_test(textwrap.dedent(code), test, LIMITS)
    assert outcome.passed, outcome.output
    assert outcome.ended == "passed"


def test_sets_are_walked_in_the_same_order_each_time():
    code = "print(list({'ape', 'bee', 'cat', 'dog', 'emu', 'fox'}))"
    assert len({run_test(code, "", LIMITS).output for _ in range(4)}) == 1


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "import os; os.abort()",
        "import os; os.closerange(3, 256); import time; time.sleep(60)",  # even the pipe of the verdict
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'0' * 32)\n    except OSError: pass\nos._exit(0)",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'\\n' * 99)\n    except OSError: pass",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        "import atexit, os; atexit.register(os._exit, 0); raise ValueError",
    ],
)
def test_to_leave_is_not_to_pass(code):
    assert not passes(code)


CASE = """
import unittest
class Case(unittest.TestCase):
    def test_one(self): self.assertEqual(f(1), 2)
    def test_two(self): self.assertEqual(f(2), 3)
"""
MAIN = CASE + "if __name__ == '__main__':\n    unittest.main({})\n"


@pytest.mark.parametrize("more", ["", "exit=False", "verbosity=2, argv=['x'], module='__main__'"])
def test_a_test_may_end_in_unittest_main(more):
    codes = ["def f(x): return x + 1", "def f(x): return 2 * x", "def f(x): return None", "def g(x): return x"]
    assert run_tests(codes, [MAIN.format(more)], LIMITS) == [[1], [0], [0], [0]]
    assert "Ran 2 tests" in run_test(codes[0], MAIN.format(more), LIMITS).output
    assert run_tests(codes[:2], [CASE + "from unittest import main\nmain()"], LIMITS) == [[1], [0]]
    assert not passes(codes[0], MAIN.format(more) + "assert f(3) == 5")  # what stands behind it is run too


@pytest.mark.parametrize(
    "leave", ["sys.exit(0)", "os._exit(0)", "raise SystemExit", "raise unittest.SkipTest", "main()"]
)
def test_unittest_main_passes_no_code_that_leaves_by_itself(leave):
    of_test = f"import os, sys, unittest\nfrom unittest import main\ndef f(x):\n    if x == 1: return 2\n    {leave}"
    at_once = f"import os, sys, unittest\nfrom unittest import main\ndef f(x): return 0\n{leave}"
    assert run_tests([of_test, at_once], [MAIN.format("")], LIMITS) == [[0], [0]]
    assert not passes(of_test, "f(1)\nf(2)\nimport unittest\nunittest.main()")  # no test in it at all


def test_what_a_code_puts_in_the_place_of_functions_does_not_change_the_verdict():
    assert passes("import os, sys\nos.write = os._exit = print\nsys.stdout.close()")
    assert not passes("import os\nos._exit = lambda status: None\nraise ValueError")
    for line in ("builtins.exec = print", "builtins.compile = lambda *args, **more: 'pass'"):
        assert run_tests([f"import builtins\n{line}"], ["assert False", "assert True"], LIMITS) == [[0, 1]]


def test_how_it_ended_and_what_it_said():
    failed = run_test("def f():\n    return 1 / 0", "print('before')\nf()", LIMITS)
    assert failed.ended == "failed"
    assert failed.output.startswith("before\n")
    assert failed.output.rstrip().endswith("ZeroDivisionError: division by zero")
    assert 'File "<code>", line 2, in f' in failed.output
    assert "code_child" not in failed.output
    assert "SyntaxError" in run_test("def", "", LIMITS).output
    both = run_test("print('out')\nimport sys\nprint('err', file=sys.stderr)", "", LIMITS).output
    assert sorted(both.split()) == ["err", "out"]


@pytest.mark.slow
def test_an_endless_loop_ends_and_so_does_a_long_sleep():
    busy = run_test("while True: pass", "", LIMITS)
    assert (busy.passed, busy.ended) == (False, "SIGXCPU")
    stubborn = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run_test(stubborn, "", LIMITS).ended == "SIGKILL"
    idle = run_test("import time\nprint('slept', flush=True)\ntime.sleep(600)", "", CodeLimits(wall_seconds=2.0))
    assert idle[:3] == (False, "out of time", "slept\n")


def test_memory_and_files_have_an_end():
    assert run_test("x = bytearray(2**20)", "", LIMITS).passed
    hog = run_test("x = [bytearray(2**24) for _ in range(1000)]", "", CodeLimits(cpu_seconds=20, wall_seconds=60.0))
    assert not hog.passed
    assert "MemoryError" in hog.output
    assert passes("x = bytearray(2**27)", limits=CodeLimits(memory_bytes=2**29))
    assert not passes("x = bytearray(2**27)", limits=CodeLimits(memory_bytes=2**27))
    small = CodeLimits(file_bytes=1000)
    assert passes("with open('a', 'wb') as file: file.write(bytes(1000))", limits=small)
    assert "File too large" in run_test("with open('a', 'wb') as file: file.write(bytes(1001))", "", small).output
    assert "Too many open files" in run_test("x = [open('/dev/null') for _ in range(99)]", "", LIMITS).output


@pytest.mark.parametrize(
    "write",
    [
        "open(str(i), 'wb').write(bytes(10**5))",
        "os.mkdir('in'); os.chdir('in'); open('a', 'wb').write(bytes(10**5))",
        "open(str(i), 'wb').close()",
        "os.mkdir(str(i))",
        "os.symlink('none', str(i))",
    ],
)
def test_many_files_have_an_end_too(monkeypatch, tmp_path, write):
    """A bound of each says little of all."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = f"import itertools, os, time\nfor i in range(300): {write}"
    small = CodeLimits(folder_bytes=10**6, wall_seconds=60.0)
    assert run_test(f"{code}\ntime.sleep(60)", "", small)[:2] == (False, "out of room")
    assert run_test(code.replace("300", "3"), "time.sleep(0.5)", small).passed
    assert os.listdir(tmp_path) == []


def test_output_is_kept_up_to_a_bound_and_no_output_stops_a_code():
    outcome = run_test("for i in range(40): print('x' * 10**5)", "print('the end')", CodeLimits(output_bytes=1000))
    assert (outcome.passed, outcome.output) == (True, "x" * 1000)
    assert run_test("print('abc')", "", CodeLimits(output_bytes=0)).output == ""
    endless = run_test("while True: print('x' * 10**5)", "", CodeLimits(cpu_seconds=1, output_bytes=7))
    assert (endless.passed, endless.output) == (False, "x" * 7)


def test_bytes_that_are_no_text_and_an_input_that_is_empty():
    raw = run_test(r"import sys; sys.stdout.buffer.write(b'\xff\xfeok\xc3')", "", LIMITS)
    assert (raw.passed, raw.output) == (True, "\ufffd\ufffdok\ufffd")
    assert passes("import sys", "assert sys.stdin.read() == '' and sys.stdin.buffer.read() == b''")
    assert "EOFError" in run_test("input()", "", LIMITS).output
    assert passes("x = 'é\u2028🐨'", "assert len(x) == 3; print(x)")
    assert not passes("x = '\ud800'")
    assert not passes("x = 1\0")


def test_large_code_arrives_whole():
    assert passes(f"x = {'a' * 300_000!r}\n", "assert len(x) == 300_000")


def reaches(listener):
    """Whether a code gets through to a socket that listens here."""
    port = listener.getsockname()[1]
    code = f"import socket\nconnection = socket.create_connection(('127.0.0.1', {port}), 5)\nconnection.send(b'x')"
    passed = run_test(code, "", CodeLimits(allow_unsafe=True)).passed
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return passed
    return True


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


@pytest.mark.parametrize(
    ("gone", "guard"),
    [((), None), (KERNEL, None), (("hook", *KERNEL[1:]), "no network"), (("hook", *KERNEL[:2]), "system calls")],
)
def test_no_connection_is_made_by_whichever_guard(listener, without, gone, guard):
    needs(guard)
    if gone:
        without(*gone)
    assert not reaches(listener)


def test_without_any_guard_a_connection_is_made(listener, without):
    without("hook", *KERNEL)
    assert reaches(listener)  # so that the tests above say something


WRITES = [
    "open({out!r}, 'w')",
    "open({out!r}, 'ab', 0)",
    "open({old!r}, 'r+')",
    "open({old!r}.encode(), 'r+b')",
    "os.open({out!r}, os.O_CREAT)",
    "os.open({old!r}, os.O_RDONLY | os.O_TRUNC)",
    "os.chdir({folder!r}); open('new', 'w')",
    "os.symlink({folder!r}, 'link'); open('link/new', 'w')",
    "os.remove({old!r})",
    "os.rename({old!r}, {out!r})",
    "open('mine', 'w').close(); os.rename('mine', {out!r})",
    "os.mkdir({out!r})",
    "os.symlink('mine', {out!r})",
    "os.link({old!r}, 'mine')",
    "os.truncate({old!r}, 0)",
]
MORE_WRITES = ["os.chmod({old!r}, 0)", "os.utime({old!r})"]  # which Landlock leaves alone


def trees(folder):
    return [
        (path, os.stat(path).st_mode, os.stat(path).st_mtime, os.stat(path).st_size)
        for path in glob.glob(f"{folder}/*")
    ]


@pytest.mark.parametrize(
    ("gone", "guard"), [((), None), (KERNEL, None), (("hook", "_forbid_calls", "_leave_network"), "writes")]
)
def test_nothing_is_written_outside(tmp_path_factory, without, gone, guard):
    needs(guard)
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "old").write_text("old")
    before = trees(folder)
    if gone:
        without(*gone)
    lines = WRITES + (MORE_WRITES if "hook" not in gone else [])
    names = {"out": str(folder / "new"), "old": str(folder / "old"), "folder": str(folder)}
    tried = "import os\ntry: {}\nexcept OSError as e: seen = e.errno\nassert seen in (1, 13, 18)"  # 18: of os.link
    tests = [tried.format(line.format(**names)) for line in lines]
    found = run_tests([""], tests, CodeLimits(allow_unsafe=True), workers=2)[0]
    assert [line for line, fine in zip(lines, found, strict=True) if not fine] == []
    assert trees(folder) == before
    assert (folder / "old").read_text() == "old"
    reading = f"assert open({str(folder / 'old')!r}).read() == 'old'"  # which is no harm
    assert passes(reading, limits=CodeLimits(allow_unsafe=True))


STARTS = [
    "os.fork()",
    "os.system('true')",
    "os.execv('/bin/true', ['true'])",
    "os.posix_spawn('/bin/true', ['true'], {})",
    "os.spawnv(os.P_WAIT, '/bin/true', ['true'])",
    "import subprocess; subprocess.run(['true'])",
    "os.forkpty()",
    "os.kill(os.getppid(), 0)",
    "os.killpg(os.getpgid(os.getppid()), 0)",
    "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
    "import ctypes; ctypes.CDLL('libc.so.6')",
]


@pytest.mark.parametrize("line", STARTS)
def test_no_process_is_started_or_signalled(line):
    assert refused(line)


@pytest.mark.parametrize(
    "line",
    [
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "import subprocess; subprocess.run(['true'])",
        "os.kill(os.getppid(), 0)",
        "import socket; socket.socket()",
    ],
)
def test_the_kernel_alone_refuses_too(line, without):
    needs("system calls")
    without("hook", "_leave_network", "_keep_writes")
    assert refused(line)


def test_no_thread_is_started_either():
    assert "can't start new thread" in run_test("import threading\nthreading.Thread().start()", "", LIMITS).output


def test_a_bomb_of_forks_does_not_go_off(without):
    needs("system calls")
    bomb = """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """
    killed = ("SIGXCPU", "out of time")  # the second where a busy machine gives it no processor
    assert run_test(textwrap.dedent(bomb), "", LIMITS).ended in killed
    without("hook")
    assert run_test(textwrap.dedent(bomb), "", LIMITS).ended in killed


def test_where_processes_cannot_be_limited_nothing_is_run(without, tmp_path):
    if os.getuid() != 0:
        pytest.skip("others than root are bound by a limit of processes")
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w')"
    without("_forbid_calls", "_keep_writes", "hook")
    with pytest.raises(SandboxError, match=r"no way to limit processes on linux; expected all limits to hold"):
        run_test(code, "", LIMITS)
    assert not mark.exists()
    assert run_test(code, "", CodeLimits(allow_unsafe=True)).passed
    assert mark.exists()


def test_children_of_a_code_that_is_allowed_to_make_them_are_killed_with_it(without, tmp_path):
    without("hook", *KERNEL)
    path = tmp_path / "alive"
    code = f"""
        import os, time
        if os.fork() == 0:
            while True:
                open({str(path)!r}, 'a').write('x')
                time.sleep(0.01)
        while not os.path.exists({str(path)!r}):
            time.sleep(0.01)
    """
    if os.getuid() != 0:
        pytest.skip("others than root cannot fork here")
    assert run_test(textwrap.dedent(code), "", CodeLimits(allow_unsafe=True, file_bytes=2**20)).passed
    size = path.stat().st_size
    import time

    time.sleep(0.2)
    assert path.stat().st_size == size


@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_FSIZE"])
def test_where_a_limit_cannot_be_set_nothing_is_run(name, monkeypatch, tmp_path):
    asked = code_tests._resources(LIMITS)
    assert set(asked) == {"RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_FSIZE"}
    unknown = {key + "_ELSEWHERE" if key == name else key: value for key, value in asked.items()}
    monkeypatch.setattr(code_tests, "_resources", lambda limits: unknown)
    with pytest.raises(
        SandboxError, match=f"no way to limit {name.removeprefix('RLIMIT_').lower()}_elsewhere on linux"
    ):
        run_test("", "", LIMITS)
    assert run_test("", "", CodeLimits(allow_unsafe=True)).passed


def test_a_stricter_limit_of_this_process_is_kept():
    code = f"""
        import resource, sys
        sys.path.insert(0, {os.path.dirname(str(code_tests._CHILD))!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 3000))
        import code_child
        assert code_child._set_limits({{"RLIMIT_FSIZE": 10**6}}) == []
        assert resource.getrlimit(resource.RLIMIT_FSIZE) == (3000, 3000)
        assert code_child._set_limits({{"RLIMIT_FSIZE": 10, "RLIMIT_NONE": 1}}) == ["none"]
        assert resource.getrlimit(resource.RLIMIT_FSIZE) == (10, 10)
    """
    import subprocess

    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_a_child_that_does_not_begin_is_told_of(monkeypatch, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import sys; print('no luck'); sys.exit(3)")
    monkeypatch.setattr(code_tests, "_CHILD", broken)
    with pytest.raises(SandboxError, match=r"ended with 3 before it began: 'no luck'"):
        run_test("", "", LIMITS)
    broken.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(code_tests, "_START_SECONDS", 0.2)
    with pytest.raises(SandboxError, match=r"ended with -9 before it began"):
        run_test("", "", LIMITS)


def test_nothing_is_left_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(os.listdir("/proc/self/fd"))
    for code in ("open('a', 'w').write('x')", "while True: pass", "raise ValueError", "import os; os.mkdir('d', 0)"):
        run_test(code, "", CodeLimits(cpu_seconds=1))
    assert os.listdir(tmp_path) == []
    assert sorted(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_folders_in_folders_are_left_behind_no_more_than_others(monkeypatch, tmp_path, without):
    """Deeper than Python calls functions, with a path longer than the system takes, some closed, with ways out."""
    without("hook")  # which looks at the whole path each time
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "old").write_text("old")
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    code = f"""
        import os
        os.symlink({str(theirs)!r}, "out")
        for i in range(1500):
            os.mkdir("inner")
            os.symlink({str(theirs)!r}, f"out{{i}}")
            open("a file", "w").close()
            if i % 100 == 99:
                os.mkdir("closed", 0)
            os.chdir("inner")
        os.chmod(".", 0)
    """
    assert passes(code, limits=CodeLimits(cpu_seconds=30, wall_seconds=60.0))
    assert os.listdir(home) == []
    assert (theirs / "old").read_text() == "old"


@pytest.mark.parametrize("call", ["scandir", "rmdir", "unlink", "rename", "chmod"])
def test_what_cannot_be_removed_stops_nothing(monkeypatch, tmp_path, call):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def broken(*args, **more):
        raise OSError(5, "broken")

    with code_tests._folder() as folder:
        os.makedirs(os.path.join(folder, "a", "b"))
        open(os.path.join(folder, "file"), "w").close()
        with monkeypatch.context() as patch:
            patch.setattr(os, call, broken)
            code_tests._remove(folder)
    assert os.listdir(tmp_path) == []


@pytest.mark.errors
def test_limits_that_make_no_sense_are_refused(monkeypatch):
    for bad in (
        dict(cpu_seconds=0),
        dict(cpu_seconds=1.5),
        dict(memory_bytes=1000),
        dict(file_bytes=-1),
        dict(folder_bytes=-1),
        dict(output_bytes=-1),
        dict(wall_seconds=0.0),
        dict(wall_seconds=float("nan")),
        dict(wall_seconds=float("inf")),
    ):
        with pytest.raises(ValueError, match=f"CodeLimits.{next(iter(bad))}: found"):
            CodeLimits(**bad)
    with pytest.raises(ValueError, match="found workers=0"):
        run_tests(["x"], ["y"], workers=0)
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(SandboxError, match="expected Linux or another POSIX system"):
        run_test("", "")
