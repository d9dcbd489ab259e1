"""Layer 2: the ways from a worker to the pump: pipes, and terminals where the console is one."""

from __future__ import annotations

import contextlib
import fcntl
import os

DEFAULT_SIZE = 64 << 10
"""Bytes of a pipe, if it is not asked for more."""
_TERMINAL_SIZE = 4 << 10
_FEWEST_COLUMNS = 20


def make_channel(size: int, console: int | None, margin: int) -> tuple[int, int, int]:
    """Make a pipe or a terminal.

    Args:
        size: bytes that a pipe should hold.
        console: the terminal that the worker's is to be like; None: a pipe.
        margin: columns that the console has more, for the prefix.

    Returns:
        Our end, which does not block, the worker's, and how many bytes fit in between.

    Raises:
        OSError: the system has none to give.
    """
    ends = _terminal(console, margin) if console is not None else None
    ours, theirs = ends or os.pipe()
    os.set_blocking(ours, False)
    if ends:
        return ours, theirs, _TERMINAL_SIZE
    with contextlib.suppress(OSError):  # all pipes of a user together have a bound
        fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, size)
    return ours, theirs, fcntl.fcntl(ours, fcntl.F_GETPIPE_SZ)


def _terminal(console: int, margin: int) -> tuple[int, int] | None:
    """A terminal like a console, for one worker: its output comes as it was written. Both ends, ours first.

    ``margin``: columns that the console has more, for the prefix. None where the system has no terminals to give.
    """
    import struct  # late, like termios: most jobs' output is no terminal's
    import termios

    try:
        ours, theirs = os.openpty()
    except OSError:
        return None
    mode = termios.tcgetattr(theirs)
    mode[1] &= ~termios.OPOST
    mode[3] &= ~(termios.ECHO | termios.ECHONL)
    termios.tcsetattr(theirs, termios.TCSANOW, mode)
    with contextlib.suppress(OSError):
        rows, columns, *pixels = struct.unpack("4H", fcntl.ioctl(console, termios.TIOCGWINSZ, bytes(8)))
        if columns > margin + _FEWEST_COLUMNS:
            columns -= margin
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, *pixels))
    return ours, theirs


def raise_limit(streams: int) -> None:
    """Allow this process as many descriptors as so many streams need, if the system lets it."""
    import resource  # late: jobs without a pump do without

    needed = len(os.listdir("/proc/self/fd")) + 3 * streams + 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        with contextlib.suppress(OSError, ValueError):
            limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
