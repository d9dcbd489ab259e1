"""Floor 2: the launcher's own words for people, on standard error.

They must not hold up the agent: a reader that has stopped reading (a pager, Ctrl-S) costs words, not supervision.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator

LINE_PATIENCE = 0.2
"""Seconds that a line may wait for its reader. The agent waits with it."""
REPORT_PATIENCE = 10.0
"""Seconds that the report at the end may wait."""


def say(text: str) -> None:
    """Write one line of the launcher's."""
    write(f"elastic-run: {text}\n", LINE_PATIENCE)


def write(text: str, patience: float) -> None:
    """Write to standard error, whatever becomes of it, for some seconds at most."""
    data = memoryview(text.encode(errors="backslashreplace"))
    end = time.monotonic() + patience
    poller = select.poll()
    poller.register(2, select.POLLOUT)
    while data and poller.poll(max(0.0, end - time.monotonic()) * 1000):
        try:
            # A pipe that poll calls writable takes a page without blocking.
            data = data[os.write(2, data[: select.PIPE_BUF]) :]
        except BlockingIOError:
            continue
        except OSError:
            return


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
