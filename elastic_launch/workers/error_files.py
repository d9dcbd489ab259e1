"""Read the error files in which workers describe their exceptions.

A file may contain anything: it may be cut off by a full disk, huge, or not JSON; or it may not be a file at all. It
never makes the reader raise, wait or need much memory. Whatever can be read of the exception is reported. If nothing
can, the failure is what the exit status says.
"""

from __future__ import annotations

import os
import re
from typing import Any, BinaryIO

from elastic_launch.core.agent.root_cause import ErrorRecord
from elastic_launch.core.text import shortened
from elastic_launch.host.files import open_regular

_MAX_ERROR, _MAX_TRACEBACK = 10_000, 1_000_000
"""Characters of the exception's line and of its traceback that are kept. Their ends are worth more than the middle."""

_MAX_WHOLE = 4 << 20
"""Bytes up to which a file is parsed as a whole. Of a larger one, only pieces are read."""

_PIECE = 1 << 20
"""Bytes of a piece."""

_NUMBERS = 4096
"""Bytes at the end of a file in which the numbers of its record are."""

_MAX_SEARCH = 256 << 20
"""Bytes of a large file that are searched for a key."""

_STRING = re.compile(r'([^"\\]*+(?:\\(?:u[0-9a-fA-F]{4}|[^u])[^"\\]*+)*+)("?)', re.DOTALL)
"""The inside of a JSON string up to its end, or to an escape that was cut off."""

_PLAUSIBLE = 3600.0
"""Seconds that a record's time may differ from its file's. Beyond that the file's time is used."""


def read_error_file(path: str, pid: int) -> ErrorRecord | None:
    """Read a worker's error file, in the format of torch's ``record``.

    Args:
        path: the path of the file.
        pid: the worker's pid. Its Python is in the worker's session, even below a wrapper (PYTHON_EXEC).

    Returns:
        The record; None if the file is not usable, or if it is another worker's, which happens when two jobs have the
        same id and directory.
    """
    try:
        with open(path, "rb", opener=open_regular) as file:
            status = os.fstat(file.fileno())
            message = _message(file, status.st_size)
        if isinstance(message, str):
            message = {"message": message, "extraInfo": {"py_callstack": message}}
        extra = message.get("extraInfo", {})
        # With an errorCode it is a copy that a launcher below the worker has made. 0: from another PID namespace.
        if "errorCode" not in message and extra.get("session", pid) not in (pid, 0):
            return None
        # If someone has set the file's time, the time of the worker's end is used.
        written = status.st_mtime if 0 <= status.st_mtime < 1e11 else float("inf")
        time = extra.get("time")
        plausible = isinstance(time, float) and abs(time - written) < _PLAUSIBLE  # false for NaN
        error = str(message["message"]).removesuffix(": ")  # of an exception without a text
        stack = shortened(str(extra.get("py_callstack", error)), _MAX_TRACEBACK)
        return ErrorRecord(shortened(error, _MAX_ERROR), stack, time if plausible else written, path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError):
        return None


def _message(file: BinaryIO, size: int) -> Any:
    """Return the ``message`` of an error file, or what can be found of it if the file is large or cut off.

    Raises:
        ValueError: there is none.
    """
    import json  # late: 5 ms, and most workers that die have written nothing

    if size <= _MAX_WHOLE:
        try:
            return json.loads(file.read(_MAX_WHOLE).decode("utf-8", "replace"))["message"]
        except (ValueError, RecursionError):
            pass
    error = _string(file, "message")[:_MAX_ERROR]
    if not error:
        raise ValueError("no message")
    stack = _string(file, "py_callstack", size) or _string(file, "message", size)
    file.seek(max(0, size - _NUMBERS))
    numbers = dict(re.findall(rb'"(time|session|errorCode)": ?(-?\d{1,15}(?:\.\d{1,15})?)[\s,}]', file.read(_NUMBERS)))
    extra = {name.decode(): float(number) for name, number in numbers.items()}
    message = {"message": error, "extraInfo": {"py_callstack": stack, **extra}}
    return {**message, "errorCode": 1} if "errorCode" in extra else message


def _string(file: BinaryIO, key: str, size: int = 0) -> str:
    """Return the first string with a key, as far as it can be read; empty if there is none.

    A key cannot be mistaken for text: quotes within a string have a backslash before them.

    Args:
        file: the file.
        key: the key.
        size: the size of the file in bytes. If given, a string that is longer than a piece ends with the end of the
            string in the last piece; otherwise it is cut.
    """
    start = _find(file, re.compile(rb'"%s"\s{0,9}:\s{0,9}"' % key.encode()))
    if start is None:
        return ""
    file.seek(start)
    text, is_complete = _until_quote(file.read(_PIECE))
    begin = max(start + _PIECE, size - _PIECE)
    if is_complete or begin >= size:
        return text
    file.seek(begin - 64)
    before, piece = file.read(64), file.read(_PIECE)
    if (len(before) - len(before.rstrip(b"\\"))) % 2:
        piece = piece[1:]  # the second half of an escape such as \n
    half = _MAX_TRACEBACK // 2 - 50
    missing = (size - start) / 1e6 - 1
    return f"{text[:half]}\n... about {missing:.1f} MB left out ...\n{_until_quote(piece)[0][-half:]}"


def _find(file: BinaryIO, pattern: re.Pattern[bytes]) -> int | None:
    """Return the offset at which the first match ends; None without a match."""
    for offset in range(0, _MAX_SEARCH, _PIECE):
        file.seek(offset)
        data = file.read(_PIECE + 64)  # overlapping, so that no match is cut in two
        if match := pattern.search(data):
            return offset + match.end()
        if len(data) <= _PIECE:
            break
    return None


def _until_quote(data: bytes) -> tuple[str, bool]:
    """Return the text of a JSON string up to its end or to the end of the data, and whether its end was found."""
    import json

    match = _STRING.match(data.decode("utf-8", "replace"))
    assert match  # the pattern matches the empty text, too
    text, quote = match.groups()
    try:
        return json.loads(f'"{text}"', strict=False), bool(quote)
    except ValueError:
        return text, bool(quote)  # Python cannot decode it, but it still says something
