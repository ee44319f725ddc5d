"""Child processes that run `jaxaroo`: alone, or several as one on the loopback."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def begin(*args, devices=1, **env):
    """A child process that trains, on so many devices."""
    flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    env = os.environ | {"XLA_FLAGS": flags, **env}
    command = [sys.executable, "-m", "jaxaroo.cli.main", "train", *map(str, args)]
    # Not a pipe: nobody reads while children run, XLA says a lot, and a full pipe stops a child for good.
    told = Path(tempfile.mkdtemp(prefix="jaxaroo-test-")) / "told"
    with told.open("w") as file:
        child = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
    child.told = told
    return child


def several(count, *args):
    """Processes of one run, which share eight devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    own = dict(JAX_COORDINATOR_BIND_ADDRESS=address, JAXAROO_COORDINATOR=address, JAXAROO_NUM_PROCESSES=str(count))
    return [begin(*args, devices=8 // count, **own, JAXAROO_PROCESS_ID=str(i)) for i in range(count)]


def wait_for(child, sight):
    last = time.monotonic() + 600  # a loaded machine is slow, a hung child is hung
    while not sight():
        assert time.monotonic() < last, "nothing to see"
        assert child.poll() is None, child.told.read_text(errors="replace")
        time.sleep(0.0005)


def finish(child, status=0):
    try:
        child.wait(timeout=600)
    finally:
        end(child)
    assert child.returncode == status, child.said
    return child.said


def finish_all(children, status=0):
    try:
        return [finish(child, status) for child in children]
    finally:
        for child in children:
            child.kill()


def end(child):
    """Kill it, if it still runs, and keep what it said."""
    child.kill()
    child.wait()
    child.said = child.told.read_text(encoding="utf-8", errors="replace")
    shutil.rmtree(child.told.parent)
