"""Floor 2: reads what workers wrote of their exceptions."""

from __future__ import annotations

import errno
import os
import stat

from elastic_launch.core.root_cause import ErrorRecord, shortened

_MAX_ERROR_FILE = 64 << 20
"""Bytes of an error file that are worth reading; a larger one is not the report of an exception."""

_MAX_ERROR, _MAX_TRACEBACK = 10_000, 1_000_000
"""Characters of what is read that are kept: the ends tell more than the middle."""

_PLAUSIBLE = 3600.0
"""Seconds between the time that an error file tells and the time when it was written; beyond, the latter counts."""


def read_error_file(path: str, pid: int) -> ErrorRecord | None:
    """Read what a worker wrote of its exception, in the format of torch's ``record``.

    None if that is not usable, or of another worker: that of a second job with the same id and directory.

    Args:
        path: the file.
        pid: the worker, which leads a session that its Python is in, also below a wrapper (PYTHON_EXEC).
    """
    try:
        with open(path, encoding="utf-8", errors="replace", opener=_open_regular) as file:
            import json  # late: 5 ms, and most workers that die have written nothing

            record = json.loads(file.read(_MAX_ERROR_FILE))
            written = os.fstat(file.fileno()).st_mtime
        message = record["message"]
        if not 0 <= written < 1e11:
            written = float("inf")  # somebody has set it; then the worker's end counts
        if isinstance(message, str):
            return ErrorRecord(shortened(message, _MAX_ERROR), shortened(message, _MAX_TRACEBACK), written, path)
        extra = message["extraInfo"]
        if extra.get("session", pid) not in (pid, 0):  # 0: of another PID namespace
            return None
        error = str(message["message"]).removesuffix(": ")  # of an exception without a text
        time = float(extra.get("time", written))
        plausible = abs(time - written) < _PLAUSIBLE  # false for NaN
        stack = shortened(str(extra["py_callstack"]), _MAX_TRACEBACK)
        return ErrorRecord(shortened(error, _MAX_ERROR), stack, time if plausible else written, path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None


def _open_regular(path: str, flags: int) -> int:
    """Open a file, but nothing that could make the reader wait or lead it elsewhere: no pipe, no link."""
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a file", path)
    return fd
