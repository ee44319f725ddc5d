"""How a run ends before its last step: it is asked to, another process has ended, or nothing moves any more."""

import contextlib
import faulthandler
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)
_TALK = re.compile(r"gloo|nccl|coordination|unavailable|heartbeat|connection|peer|socket|deadline", re.IGNORECASE)


class LostProcessError(ConnectionError):
    """Another process of the run has ended, or cannot be reached."""


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int | None]]:
    """The first Ctrl-C or SIGTERM asks the run to save and leave; a second Ctrl-C ends it at once."""
    got: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
        yield lambda: None
        return

    def ask(number: int, frame: Any) -> None:
        if got and number == signal.SIGINT:
            raise KeyboardInterrupt
        got.append(number)  # and no logging: this may be in the middle of some
        os.write(2, f"\n{signal.Signals(number).name}: saving after this step, then leaving\n".encode())

    ours = (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ()  # else see `preempted`
    before = {number: signal.signal(number, ask) for number in ours}
    try:
        yield lambda: got[0] if got else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def preempted(step: int) -> bool:
    """With several processes a SIGTERM to any of them stops all after the same step; JAX's service agrees on it."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def together(again: str) -> Iterator[None]:
    """Say what it means when processes cannot talk to each other.

    Where collectives fail by themselves (CPU, GPU) that is at once; on a TPU they wait, and JAX's service ends the
    process when the other one has not been heard of for a while (`sharding.mesh.start_processes`).

    Args:
      again: the command that goes on when all have ended.

    Raises:
      LostProcessError: in place of an error of the talk.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if jax.process_count() == 1 or not _TALK.search(str(e)):
            raise
        said = str(e).strip().splitlines()[0][:300]
        error = LostProcessError(
            f"process {jax.process_index()} of {jax.process_count()} cannot reach the others ({said}); expected all of "
            f"them to run. One has ended or lost its network: what it said itself, before this, is the reason. When "
            f"all have ended, start all again with: {again}"
        )
        log.error(
            "%s", error
        )  # at once: to close checkpoints in order may wait for the others, until JAX ends this one
        raise error from e


@contextlib.contextmanager
def watched(seconds: float, again: str) -> Iterator[Callable[[], None]]:
    """Notice a run that hangs: a collective that some process never joined, storage that never answers.

    The function that is given is to be called whenever something was done. When it is not called for too long, the
    stacks of all threads are written to standard error and the process ends with status 1, so that whoever started it
    can start all again. It counts from the first call, so that compiling may take its time.

    Args:
      seconds: that may pass; 0 watches nothing.
      again: the command that goes on.
    """
    if not seconds:
        yield lambda: None
        return
    moved, done = threading.Event(), threading.Event()

    def watch() -> None:
        moved.wait()
        while not done.is_set():
            moved.clear()
            if not moved.wait(seconds):
                sys.stderr.write(
                    f"\njaxaroo: process {jax.process_index()} of {jax.process_count()} has done nothing for "
                    f"{seconds:g} s; expected a step, a save or an evaluation by then (--hang-seconds). Its stacks "
                    f"follow, and it ends. When all have ended: {again}\n"
                )
                sys.stderr.flush()
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                sys.stderr.flush()
                os._exit(1)

    thread = threading.Thread(target=watch, daemon=True, name="jaxaroo-watch")
    thread.start()
    try:
        yield moved.set
    finally:
        done.set()
        moved.set()
        thread.join()
