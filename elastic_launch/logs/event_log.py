"""Append lines to the events file. That neither blocks nor fails the job: what cannot be written is lost.

Each line is written by one call to a descriptor with O_APPEND, which the kernel carries out in one piece. So agents of
one host may share a file. Those of several hosts may not: over NFS, each host appends where it believes the end to be.
In a directory that hosts share, each therefore has a file of its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable

from elastic_launch.logs.job_files import as_file_name

NAME = "events.jsonl"
"""The events file in the directory of a job that runs on one node."""
_FULL = (errno.EAGAIN, errno.ENOSPC, errno.EDQUOT)
"""Errors after which the rest of a line can still be written, once somebody reads the pipe or makes room."""
_NO_READER = (errno.EAGAIN, errno.ENXIO, errno.EPIPE)
"""Errors of a named pipe."""
_MOMENT = 0.01
"""Seconds in which a line that is being written grows."""


def path_in(directory: str, host: str) -> str:
    """Return the path of a host's events file in a directory; without ``host``, that of a job on one node."""
    return os.path.join(directory, f"events_{as_file_name(host)}.jsonl" if host else NAME)


class EventLog:
    """One events file: a regular file, a named pipe, or a device such as ``/dev/stderr``."""

    def __init__(self, path: str, option: str, log: Callable[[str], None]) -> None:
        """Prepare without opening anything.

        Args:
            path: path of the file, which is created if it is missing.
            option: what the warning begins with, as in ``--events=PATH``.
            log: logs a warning.
        """
        self._path, self._option, self._log = path, option, log
        self._fd = -1
        self._rest = b""
        """What is left of a line of which only the beginning could be written."""
        self._may_be_cut_off = True
        """Whether the file may end within a line: of this object, or of a process whose host or disk failed."""
        self._has_warned = False

    def append(self, line: bytes) -> None:
        """Write a line with its line end, or lose it."""
        try:
            self._write(line)
        except OSError as error:
            if error.errno not in _FULL:
                self.close()
            if not self._has_warned:
                self._has_warned = True
                what = "nobody reads it" if error.errno in _NO_READER else error.strerror
                self._log(f"{self._option}: {what}; the job continues, and events are lost")

    def close(self) -> None:
        """Close the file.

        Raises:
            OSError: some file systems report only now that a line could not be written. The file is closed.
        """
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _write(self, line: bytes) -> None:
        if self._fd < 0:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            self._fd = os.open(self._path, flags, 0o666)
        is_file = stat.S_ISREG(os.fstat(self._fd).st_mode)
        try:
            if is_file and self._may_be_cut_off:
                self._rest = (self._rest or b"\n") if self._is_cut_off() else b""
            data = self._rest + line
            written = os.write(self._fd, data)
            # A line that has not begun is lost whole, so that the next one can begin in its place.
            self._rest = data[written:] if written > len(self._rest) else self._rest[written:]
            self._may_be_cut_off = bool(self._rest)
        finally:
            # A pipe stays open, because its reader would take closing for the end. An open file would keep an
            # administrator from unmounting its disk, and a file that was rotated away would get what nobody reads.
            if is_file:
                self.close()

    def _is_cut_off(self) -> bool:
        """Whether the file ends within a line, and still does a moment later: another agent may just be writing it."""
        ends = self._end_of_file()
        if ends[1] == b"\n":
            return False
        time.sleep(_MOMENT)
        return ends == self._end_of_file()

    def _end_of_file(self) -> tuple[int, bytes]:
        """The size of the file, and its last byte; of an empty file or one that cannot be read, a line end."""
        with contextlib.suppress(OSError), open(self._path, "rb", 0) as file:
            if size := file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                return size, file.read(1)
        return 0, b"\n"
