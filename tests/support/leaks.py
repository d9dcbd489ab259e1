"""The proof that a test has left nothing behind, and what is excused from it: servers that tests share."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.support.waiting import is_alive, wait_until

_shared: set[int] = set()
"""Pids of the servers that outlive a test."""
_shared_descriptors = 0
"""Descriptors of this process that belong to them."""


@contextmanager
def shared_by_tests() -> Iterator[None]:
    """A block that starts servers for more than one test: neither they nor their descriptors count as left behind."""
    global _shared_descriptors
    descriptors, processes = _descriptors(), set(_living())
    yield
    _shared.update(child.pid for child in set(_living()) - processes)
    _shared_descriptors += _descriptors() - descriptors


def children() -> list[psutil.Process]:
    """The processes that this test has started, also those that have ended and not been waited for."""
    return [child for child in psutil.Process().children() if child.pid not in _shared]


def wait_for_children() -> None:
    """Wait until all that this test has started has ended: what an agent that was killed leaves ends a moment later."""
    wait_until(lambda: not any(is_alive(child.pid) for child in children()), "the end of what the test has started")


@contextmanager
def nothing_left(temp: Path) -> Iterator[None]:
    """A block after which no process, thread, descriptor or temporary file may be left.

    All are looked up in and below this process, so tests may run beside others that have processes of their own.

    Args:
        temp: The directory for temporary files.
    """
    before = _descriptors() - _shared_descriptors, threading.active_count()
    yield
    if any(map(_is_dying, _left())):
        wait_until(lambda: not any(map(_is_dying, _left())), "the end of what has been killed")
    left = _left()
    names = [str(child) for child in left]
    for child in left:
        child.kill()
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    assert not names, f"processes left behind: {names}"
    after = _descriptors() - _shared_descriptors, threading.active_count()
    assert after == before, "descriptors or threads left behind"
    files = [path for path in temp.rglob("*") if path.is_file() and path.name not in ("error.json", "stacks.log")]
    assert not files, "temporary files left behind"


def _living() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if is_alive(child.pid)]


def _left() -> list[psutil.Process]:
    return [child for child in _living() if child.pid not in _shared]


def _is_dying(process: psutil.Process) -> bool:
    """Whether a process has been killed, or is ending, and only has to get the CPU once more."""
    try:
        with open(f"/proc/{process.pid}/status") as file:
            status = dict(line.split(":", 1) for line in file)
    except (FileNotFoundError, ProcessLookupError):
        return True
    pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
    return "VmSize" not in status or bool(pending >> (signal.SIGKILL - 1) & 1)


def _descriptors() -> int:
    return psutil.Process().num_fds()
