"""The channels between a worker and the pump: pipes, or terminals if the console is one."""

from __future__ import annotations

import contextlib
import fcntl
import os

DEFAULT_SIZE = 64 << 10
"""Bytes that a pipe holds unless more is asked for."""
_TERMINAL_SIZE = 4 << 10
"""Bytes that a terminal holds."""
RESERVE = 64
"""Open files that this process should be able to have besides those of the workers' streams."""
_MIN_COLUMNS = 20
"""A terminal is not made narrower than this."""


def make_channel(size: int, console: int | None, margin: int) -> tuple[int, int, int]:
    """Create a pipe or a terminal.

    Args:
        size: bytes that a pipe should hold.
        console: the descriptor of the terminal that the worker's is to resemble; None for a pipe.
        margin: columns of the console that the prefix takes.

    Returns:
        Our end, which does not block; the worker's end; and how many bytes fit in between.

    Raises:
        OSError: the system has no more pipes.
    """
    ends = _terminal(console, margin) if console is not None else None
    ours, theirs = ends or os.pipe()
    os.set_blocking(ours, False)
    if ends:
        return ours, theirs, _TERMINAL_SIZE
    with contextlib.suppress(OSError):  # the size of all pipes of a user is limited
        fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, size)
    return ours, theirs, fcntl.fcntl(ours, fcntl.F_GETPIPE_SZ)


def _terminal(console: int, margin: int) -> tuple[int, int] | None:
    """Create a terminal of the console's size that does not change what the worker writes.

    Returns:
        Our end and the worker's; None if the system has no terminals to give.
    """
    import termios  # late: most jobs do not write to a terminal

    try:
        ours, theirs = os.openpty()
    except OSError:
        return None
    mode = termios.tcgetattr(theirs)
    mode[1] &= ~termios.OPOST
    mode[3] &= ~(termios.ECHO | termios.ECHONL)
    termios.tcsetattr(theirs, termios.TCSANOW, mode)
    copy_size(console, theirs, margin)
    return ours, theirs


def copy_size(console: int, terminal: int, margin: int) -> None:
    """Give a terminal (either end) the size of the console, less ``margin`` columns for the prefix."""
    import struct
    import termios

    with contextlib.suppress(OSError):
        rows, columns, *pixels = struct.unpack("4H", fcntl.ioctl(console, termios.TIOCGWINSZ, bytes(8)))
        if columns > margin + _MIN_COLUMNS:
            columns -= margin
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, *pixels))


def needed_files(streams: int) -> int:
    """Return how many open files this process needs for so many streams beside those that it has, and ``RESERVE``."""
    return len(os.listdir("/proc/self/fd")) + 3 * streams + RESERVE


def raise_limit(streams: int) -> None:
    """Raise this process's limit of open files to what so many streams need, as far as the system allows it."""
    import resource  # late: jobs without a pump do not need it

    needed = needed_files(streams)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        with contextlib.suppress(OSError, ValueError):
            limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
