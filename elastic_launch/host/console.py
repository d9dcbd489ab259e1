"""Layer 2: the launcher's own words for people, on standard error.

They must not hold up the agent: a reader that has stopped reading (a pager, Ctrl-S) costs words, not supervision.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
import threading
import time
from collections.abc import Callable, Iterator

LINE_PATIENCE = 0.2
"""Seconds that a line may wait for its reader. The agent waits with it."""
REPORT_PATIENCE = 10.0
"""Seconds that the report at the end may wait."""


_thread = threading.local()
"""Who speaks for a thread: agents may run in several of a program."""


def log(text: str) -> None:
    """Write one line of the launcher's."""
    speaker: Callable[[str], None] = getattr(_thread, "speaker", _say_directly)
    speaker(text)


def _say_directly(text: str) -> None:
    write(f"elastic-run: {text}\n", LINE_PATIENCE)


@contextlib.contextmanager
def spoken_by(speaker: Callable[[str], None]) -> Iterator[None]:
    """Have the lines of this thread pass through somebody who keeps them apart from the workers'."""
    before: Callable[[str], None] = getattr(_thread, "speaker", _say_directly)
    _thread.speaker, _thread.needs_new_line = speaker, False
    try:
        yield
    finally:
        _thread.speaker = before


def begin_with_new_line(needed: bool) -> None:
    """Tell whether a worker's line without an end stands where this thread's next ``write`` would begin."""
    _thread.needs_new_line = needed


def write(text: str, patience: float) -> None:
    """Write to standard error, whatever becomes of it, for some seconds at most."""
    if getattr(_thread, "needs_new_line", False):
        text = f"\n{text}"
        _thread.needs_new_line = False
    data = memoryview(text.encode(errors="backslashreplace"))
    end = time.monotonic() + patience
    with contextlib.suppress(OSError), unblocked(2) as fd:
        poller = select.poll()
        poller.register(fd, select.POLLOUT)
        while data and poller.poll(max(0.0, end - time.monotonic()) * 1000):
            with contextlib.suppress(BlockingIOError):
                data = data[os.write(fd, data[: select.PIPE_BUF]) :]


@contextlib.contextmanager
def unblocked(stream: int) -> Iterator[int]:
    """A standard stream, opened anew without blocking if it is a pipe or a terminal: its own flags are its owner's."""
    kind = os.fstat(stream).st_mode
    try:
        if not (stat.S_ISFIFO(kind) or stat.S_ISCHR(kind)):
            raise FileNotFoundError("a file never blocks; a socket cannot be opened anew")
        fd = os.open(f"/proc/self/fd/{stream}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        yield stream
        return
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Take up descriptors 0 to 2 where the caller has closed them, before a socket gets such a number."""
    taken: list[int] = []
    try:
        while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(fd, True)
            taken.append(fd)
        os.close(fd)
        yield
    finally:
        for fd in taken:
            os.close(fd)
