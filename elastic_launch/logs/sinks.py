"""Where output goes: the launcher's own streams, and files. Nothing here waits, raises, or looks at lines."""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import select
import socket
import stat
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol, TextIO

from elastic_launch.host.files import open_regular

NAMES = {1: "stdout", 2: "stderr"}
_CLEAR_ROW = b"\r\x1b[K"
_WRAP_OFF, _WRAP_ON = b"\x1b[?7l", b"\x1b[?7h"
"""Control sequences for a terminal's wrapping at its right margin. Only one row can be cleared, not a second one."""
_MAX_BUFFERS = 64
"""Buffers that are written with one call."""
_NO_READER = (errno.EPIPE, errno.EIO, errno.ECONNRESET)
"""Errors of a stream that its reader has closed (``| head``) or hung up on. The user knows about that."""
_CONTINUES = "; the job continues, and further logs may be cut off without another warning"


class Writer(Protocol):
    """Something that has bytes waiting for a console."""

    backlog: int


class Console:
    """One of the launcher's own streams, and the output that waits for it: none once the stream is closed."""

    def __init__(
        self, stream: int, fd: int, stack: ExitStack, report: Callable[[str], None], file: TextIO | None = None
    ) -> None:
        """Prepare.

        Args:
            stream: 1 for stdout, 2 for stderr.
            fd: the descriptor to write to, which may be the stream itself.
            stack: closes what is opened here.
            report: receives a message if output is lost.
            file: what the program has put in the stream's place, to be written to instead; None: nothing.
        """
        status = os.fstat(stream)
        self._report = report
        self.file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.is_terminal = os.isatty(stream) and file is None
        self.stream = stream
        self.fd = fd
        self.queue: deque[tuple[memoryview, Writer | None]] = deque()
        self._blocks = fd == stream and not stat.S_ISREG(status.st_mode) and os.get_blocking(fd)
        self._socket: socket.socket | None = None
        if stat.S_ISSOCK(status.st_mode):
            self._socket = stack.enter_context(socket.socket(fileno=os.dup(fd)))
        self._is_lost = False
        self.is_at_line_start = True
        """Whether the output so far ends with the end of a line."""
        self._live: Callable[[], bytes] | None = None
        """Returns what the terminal's last row shows."""
        self._is_drawn = self._is_stale = False

    def add(self, data: bytes | memoryview, owner: Writer, *, is_lines: bool = True) -> None:
        """Queue output: whole lines, or bytes as they arrived."""
        if self._is_lost:
            return
        if self._is_drawn:
            self.queue.append((memoryview(_CLEAR_ROW), None))
            self._is_drawn, self._is_stale = False, self._live is not None
        if is_lines and not self.is_at_line_start:
            self.queue.append((memoryview(b"\n"), None))
        self.is_at_line_start = is_lines or data[-1] == ord("\n")
        self.queue.append((memoryview(data), owner))
        owner.backlog += len(data)

    def redraw(self, row: Callable[[], bytes]) -> None:
        """Show an unfinished line, which ``row`` returns, in the terminal's last row until another one is redrawn."""
        self._live, self._is_stale = row, True

    def undraw(self, row: Callable[[], bytes]) -> None:
        """Stop showing that line, because it is finished."""
        if self._live == row:
            self._live, self._is_stale = None, True

    def update(self) -> None:
        """Write what the console accepts. Draw its last row if nothing else waits."""
        self._write()
        if self._is_stale and not self.queue and not self._is_lost:
            self._is_stale = False
            row = self._live() if self._live else b""
            if not self.is_at_line_start and row:
                self.queue.append((memoryview(b"\n"), None))
                self.is_at_line_start = True
            if row or self._is_drawn:
                self.queue.append((memoryview(b"".join((_CLEAR_ROW, _WRAP_OFF, row, _WRAP_ON))), None))
                self._is_drawn = bool(row)
                self._write()

    def _write(self) -> None:
        while self.queue:
            try:
                written = self._send()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                # Closed, hung up or full. In a file, output after a gap would be misleading.
                self._is_lost = True
                self.discard()
                if error.errno not in _NO_READER:
                    self._report(
                        f"{NAMES[self.stream]}: {_reason(error)}: the rest of this output is not shown{_CONTINUES}"
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
        buffers = [self.queue[at][0] for at in range(min(len(self.queue), _MAX_BUFFERS))]
        if self.file is not None:
            return self._write_text(self.file, b"".join(buffers))
        if self._socket:
            return self._socket.sendmsg(buffers, (), socket.MSG_DONTWAIT)
        if not self._blocks:
            return os.writev(self.fd, buffers)
        poller = select.poll()
        poller.register(self.fd, select.POLLOUT)
        if not poller.poll(0):
            raise BlockingIOError
        return os.write(self.fd, buffers[0][: select.PIPE_BUF])

    def _write_text(self, file: TextIO, data: bytes) -> int:
        text = self._decoder.decode(data)
        try:
            file.write(text)
            file.flush()
        except Exception as error:  # the program's own stream may raise anything
            raise OSError(getattr(error, "errno", None), f"{type(error).__name__}: {error}") from error
        return len(data)

    def waiting(self) -> int:
        """Return the number of bytes that wait."""
        return sum(len(data) for data, _ in self.queue)

    def discard(self) -> int:
        """Discard what waits. Returns the number of bytes."""
        lost = self.waiting()
        for data, owner in self.queue:
            if owner:
                owner.backlog -= len(data)
        self.queue.clear()
        self.is_at_line_start = self.is_at_line_start and not lost  # it may have stopped within a line
        return lost


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


class File:
    """A file for a worker's output. If it cannot be written, the log is lost, but not the job."""

    def __init__(self, path: str, report: Callable[[str], None]) -> None:
        """Open it.

        Args:
            path: its path.
            report: receives a message if output is lost.

        Raises:
            OSError: this process or the system has too many open files.
        """
        self._path = path
        self._report = report
        self._fd: int | None = None
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND  # to append, because logrotate may truncate it
            self._fd = os.open(path, os.O_WRONLY) if path == os.devnull else open_regular(path, flags)
        except OSError as error:
            self._lose(error)

    def write(self, data: bytes) -> None:
        """Append to the file. After an error nothing more is written, so the file has no gap."""
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
        self._report(f"log {self._path}: {_reason(error)}: the rest of this output is not kept{_CONTINUES}")
        self.close()

    def close(self) -> None:
        """Close it."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with contextlib.suppress(OSError):  # some file systems report errors only now
                os.close(fd)
