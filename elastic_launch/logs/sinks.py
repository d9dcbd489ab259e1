"""Layer 2: where output goes: the launcher's own streams, and files. Nothing here waits, raises, or looks at lines."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol

_CLEAR = b"\r\x1b[K"
_ON_ONE_ROW, _WRAPPED = b"\x1b[?7l", b"\x1b[?7h"
"""Switch a terminal's wrapping at its right margin off and on: a row can be cleared, a second one not."""
_MOST_BUFFERS = 64
_NO_READER = (errno.EPIPE, errno.EIO, errno.ECONNRESET)
"""Whoever closes what he reads (``| head``), or a terminal, knows that."""
_GOES_ON = "; the job goes on, and other logs may break off without a word"
NAMES = {1: "stdout", 2: "stderr"}


class Writer(Protocol):
    """Whose bytes wait for a console."""

    backlog: int


class Redrawn(Protocol):
    """Whose unfinished line a terminal shows."""

    def row(self) -> bytes:
        """The line as it is now."""


class Console:
    """One of the launcher's own streams, and what waits for it. ``queue`` is empty once nobody reads it any more."""

    def __init__(self, stream: int, fd: int, stack: ExitStack, report: Callable[[str], None]) -> None:
        status = os.fstat(stream)
        self._report = report
        self.identity = (status.st_dev, status.st_ino)
        self.is_terminal = os.isatty(stream)
        self.stream = stream
        self.fd = fd
        self.queue: deque[tuple[memoryview, Writer | None]] = deque()
        self._blocks = fd == stream and not stat.S_ISREG(status.st_mode) and os.get_blocking(fd)
        self._socket: socket.socket | None = None
        if stat.S_ISSOCK(status.st_mode):
            self._socket = stack.enter_context(socket.socket(fileno=os.dup(fd)))
        self._is_lost = False
        self.is_at_line_start = True
        """Whether what was shown so far ends with a line's end."""
        self._live: Redrawn | None = None  # the redrawn line that the terminal's last row is for
        self._is_drawn = self._is_stale = False

    def add(self, data: bytes | memoryview, owner: Writer, *, is_lines: bool = True) -> None:
        """Have something shown: whole lines, or bytes as they came."""
        if self._is_lost:
            return
        if self._is_drawn:
            self.queue.append((memoryview(_CLEAR), None))
            self._is_drawn, self._is_stale = False, self._live is not None
        if is_lines and not self.is_at_line_start:
            self.queue.append((memoryview(b"\n"), None))
        self.is_at_line_start = is_lines or data[-1] == ord("\n")
        self.queue.append((memoryview(data), owner))
        owner.backlog += len(data)

    def redraw(self, source: Redrawn) -> None:
        """Show an unfinished line that is redrawn in the last row of the terminal, until the next one is."""
        self._live, self._is_stale = source, True

    def undraw(self, source: Redrawn) -> None:
        """That line has come to its end."""
        if self._live is source:
            self._live, self._is_stale = None, True

    def settle(self) -> None:
        """Write what the console takes, and draw its last row when nothing else waits."""
        self._write()
        if self._is_stale and not self.queue and not self._is_lost:
            self._is_stale = False
            row = self._live.row() if self._live else b""
            if not self.is_at_line_start and row:
                self.queue.append((memoryview(b"\n"), None))
                self.is_at_line_start = True
            if row or self._is_drawn:
                self.queue.append((memoryview(b"".join((_CLEAR, _ON_ONE_ROW, row, _WRAPPED))), None))
                self._is_drawn = bool(row)
                self._write()

    def _write(self) -> None:
        while self.queue:
            try:
                written = self._send()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                # Closed, hung up or full: nobody will see more, and what a file gets after a gap misleads.
                self._is_lost = True
                self.give_up()
                if error.errno not in _NO_READER:
                    self._report(
                        f"{NAMES[self.stream]}: {_told(error)}: the rest of this output is not shown{_GOES_ON}"
                    )
                return
            while self.queue and written >= len(self.queue[0][0]):
                data, owner = self.queue.popleft()
                written -= len(data)
                if owner:
                    owner.backlog -= len(data)
            if written:
                data, owner = self.queue[0]
                self.queue[0] = (data[written:], owner)
                if owner:
                    owner.backlog -= written

    def _send(self) -> int:
        buffers = [self.queue[at][0] for at in range(min(len(self.queue), _MOST_BUFFERS))]
        if self._socket:
            return self._socket.sendmsg(buffers, (), socket.MSG_DONTWAIT)
        if not self._blocks:
            return os.writev(self.fd, buffers)
        poller = select.poll()
        poller.register(self.fd, select.POLLOUT)
        if not poller.poll(0):
            raise BlockingIOError
        return os.write(self.fd, buffers[0][: select.PIPE_BUF])

    def waiting(self) -> int:
        """How many bytes wait."""
        return sum(len(data) for data, _ in self.queue)

    def give_up(self) -> int:
        """Forget what waits. Returns how many bytes that was."""
        lost = self.waiting()
        for data, owner in self.queue:
            if owner:
                owner.backlog -= len(data)
        self.queue.clear()
        self.is_at_line_start = self.is_at_line_start and not lost  # who knows where it broke off
        return lost


def _told(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


class File:
    """A file that a worker's output is kept in, until it cannot be written: the job is worth more than its log."""

    def __init__(self, path: str, report: Callable[[str], None]) -> None:
        self._path = path
        self._report = report
        self._fd: int | None = None
        try:
            # O_APPEND: logrotate may cut it meanwhile. O_NONBLOCK: a path may also be a pipe's, which may cost output,
            # but does not hold up the job.
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY
            self._fd = os.open(path, flags, 0o666)
        except OSError as error:
            self._lose(error)

    def write(self, data: bytes) -> None:
        """Append; after an error nothing more, so that what is there has no gap."""
        if self._fd is None:
            return
        try:
            written = os.write(self._fd, data)
            while written < len(data):
                written += os.write(self._fd, memoryview(data)[written:])
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise error
        self._report(f"log {self._path}: {_told(error)}: the rest of this output is not kept{_GOES_ON}")
        self.close()

    def close(self) -> None:
        """Let go of it."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with contextlib.suppress(OSError):  # some file systems tell only now; the job ends all the same
                os.close(fd)
