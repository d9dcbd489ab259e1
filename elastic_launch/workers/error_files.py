"""Layer 2: reads what workers wrote of their exceptions.

A file may be anything: cut off by a full disk, huge, no JSON, no file. It never makes the reader raise, wait or need
much memory; what can be told of the exception is told, and without it the failure is what the exit status says.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from typing import Any, BinaryIO

from elastic_launch.core.agent.root_cause import ErrorRecord
from elastic_launch.core.text import shortened

_MAX_ERROR, _MAX_TRACEBACK = 10_000, 1_000_000
"""Characters of what is read that are kept: the ends tell more than the middle."""

_WHOLE = 4 << 20
"""Bytes of a file that is read as a whole. Of a larger one its two ends are, and what follows the key of the stack."""

_PIECE = 1 << 20
"""Bytes of each of these pieces."""

_LAST = 4096
"""Bytes at the end in which the numbers stand."""

_SCAN = 256 << 20
"""Bytes of a large file that are searched for a key."""

_INSIDE = re.compile(r'([^"\\]*+(?:\\(?:u[0-9a-fA-F]{4}|[^u])[^"\\]*+)*+)("?)', re.DOTALL)
"""The inside of a JSON string up to its end, or to an escape that was cut off."""

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
        with open(path, "rb", opener=_open_regular) as file:
            status = os.fstat(file.fileno())
            message = _message(file, status.st_size)
        if isinstance(message, str):
            message = {"message": message, "extraInfo": {"py_callstack": message}}
        extra = message.get("extraInfo", {})
        if "errorCode" not in message and extra.get("session", pid) not in (pid, 0):  # 0: of another PID namespace
            return None  # with an errorCode it is a copy: a launcher below that worker has passed it on
        # Where somebody has set the file's time, the worker's end counts.
        written = status.st_mtime if 0 <= status.st_mtime < 1e11 else float("inf")
        time = extra.get("time")
        plausible = isinstance(time, float) and abs(time - written) < _PLAUSIBLE  # false for NaN
        error = str(message["message"]).removesuffix(": ")  # of an exception without a text
        stack = shortened(str(extra.get("py_callstack", error)), _MAX_TRACEBACK)
        return ErrorRecord(shortened(error, _MAX_ERROR), stack, time if plausible else written, path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError):
        return None


def _open_regular(path: str, flags: int) -> int:
    """Open a file, but nothing that could make the reader wait or lead it elsewhere: no pipe, no link."""
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a file", path)
    return fd


def _message(file: BinaryIO, size: int) -> Any:
    """The ``message`` of an error file: as it is, or what can be found of it in a file that is large or cut off.

    Raises:
        ValueError: there is none.
    """
    import json  # late: 5 ms, and most workers that die have written nothing

    if size <= _WHOLE:
        try:
            return json.loads(file.read(_WHOLE).decode("utf-8", "replace"))["message"]
        except (ValueError, RecursionError):
            pass
    error = _string(file, "message")[:_MAX_ERROR]
    if not error:
        raise ValueError("no message")
    stack = _string(file, "py_callstack", size) or _string(file, "message", size)
    file.seek(max(0, size - _LAST))
    numbers = dict(re.findall(rb'"(time|session|errorCode)": ?(-?\d{1,15}(?:\.\d{1,15})?)[\s,}]', file.read(_LAST)))
    extra = {name.decode(): float(number) for name, number in numbers.items()}
    message = {"message": error, "extraInfo": {"py_callstack": stack, **extra}}
    return {**message, "errorCode": 1} if "errorCode" in extra else message


def _string(file: BinaryIO, key: str, size: int = 0) -> str:
    """The first string of this key, as far as it goes; empty where there is none.

    A key cannot be mistaken: quotes that stand in a string stand behind a backslash.

    Args:
        file: the file.
        key: the key.
        size: the file's; then a string that is longer than a piece ends with the end that is found in the last one.
    """
    start = _find(file, re.compile(rb'"%s"\s{0,9}:\s{0,9}"' % key.encode()))
    if start is None:
        return ""
    file.seek(start)
    text, ended = _until_quote(file.read(_PIECE))
    begin = max(start + _PIECE, size - _PIECE)
    if ended or begin >= size:
        return text
    file.seek(begin - 64)
    before, piece = file.read(64), file.read(_PIECE)
    if (len(before) - len(before.rstrip(b"\\"))) % 2:
        piece = piece[1:]  # the second half of an escape such as \n
    half = _MAX_TRACEBACK // 2 - 50
    missing = (size - start) / 1e6 - 1
    return f"{text[:half]}\n... about {missing:.1f} MB left out ...\n{_until_quote(piece)[0][-half:]}"


def _find(file: BinaryIO, pattern: re.Pattern[bytes]) -> int | None:
    """Where the first match ends."""
    for offset in range(0, _SCAN, _PIECE):
        file.seek(offset)
        data = file.read(_PIECE + 64)  # so that none is cut in two
        if match := pattern.search(data):
            return offset + match.end()
        if len(data) <= _PIECE:
            break
    return None


def _until_quote(data: bytes) -> tuple[str, bool]:
    """The characters of a JSON string up to its end, or to that of the data; and whether it was the string's."""
    import json

    match = _INSIDE.match(data.decode("utf-8", "replace"))
    assert match  # of nothing, at least
    text, quote = match.groups()
    try:
        return json.loads(f'"{text}"', strict=False), bool(quote)
    except ValueError:
        return text, bool(quote)  # no JSON that Python knows; as it stands, it still says something
