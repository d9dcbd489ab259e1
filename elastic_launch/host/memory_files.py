"""Memory files (memfd), and descriptors that do not get in the way of a program's own."""

from __future__ import annotations

import fcntl
import os

_FIRST_FREE = 200
"""From here on, descriptors are likely to be free in any process."""


def memory_file(name: str) -> int:
    """Return a memory file. Its number is likely to be free in a worker that is a fork of a running program.

    Raises:
        OSError: this process may not open more files.
    """
    return moved(os.memfd_create(name))


def moved(fd: int) -> int:
    """Move a descriptor to a number that is likely to be free in any process. Returns the new number.

    Raises:
        OSError: this process may not open more files.
    """
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE)
    except OSError:  # above the limit of this process
        return os.dup(fd)
    finally:
        os.close(fd)
