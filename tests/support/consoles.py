"""What stands in for the console: pipes and terminals, and what a terminal shows."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator

from tests.support.waiting import DEADLINE


class Console:
    """What stands in for this process's standard output and error while a test runs."""

    def __init__(self, writing: int, reading: int) -> None:
        self.writing, self.reading = writing, reading
        self.seen = b""

    def read(self) -> bytes:
        """Everything that has been shown so far."""
        os.set_blocking(self.reading, False)
        with contextlib.suppress(BlockingIOError):
            while block := os.read(self.reading, 1 << 20):
                self.seen += block
        return self.seen

    def close_reader(self) -> None:
        os.close(self.reading)
        self.reading = -1


@contextlib.contextmanager
def standing_in(out: int, err: int) -> Iterator[None]:
    """Give this process other standard streams, in place of pytest's as well, to which the launcher would write."""
    saved = os.dup(1), os.dup(2)
    os.dup2(out, 1)
    os.dup2(err, 2)
    try:
        with contextlib.redirect_stdout(sys.__stdout__), contextlib.redirect_stderr(sys.__stderr__):
            yield
    finally:
        for stream, fd in enumerate(saved, 1):
            os.dup2(fd, stream)
            os.close(fd)


@contextlib.contextmanager
def made_of(ends: tuple[int, int]) -> Iterator[Console]:
    """A console for both streams; ``ends``: the reading and the writing one."""
    console = Console(ends[1], ends[0])
    try:
        yield console
    finally:
        for fd in (console.writing, console.reading):
            if fd >= 0:
                os.close(fd)


def raw_terminal() -> tuple[int, int]:
    """Both ends of a terminal of 100 columns that changes nothing."""
    reading, writing = os.openpty()
    tty.setraw(writing)
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))
    return reading, writing


class Terminal:
    """A terminal of 100 columns that does not change its output, with a program in it."""

    def __init__(self, start: Callable[[int], subprocess.Popen[bytes]]) -> None:
        """``start`` is called with the descriptor that the program is to have as its standard streams."""
        self.fd, theirs = raw_terminal()
        try:
            self.process = start(theirs)
        finally:
            os.close(theirs)
        self.seen = b""
        self.end = time.monotonic() + DEADLINE

    def read(self) -> bool:
        """Wait for output. Returns whether there was any."""
        assert select.select([self.fd], [], [], self.end - time.monotonic())[0], self.seen
        try:
            block = os.read(self.fd, 1 << 16)
        except OSError:  # EIO: the other end is closed
            return False
        self.seen += block
        return True

    def wait_for(self, text: bytes) -> None:
        while text not in self.seen:
            assert self.read(), self.seen

    def finish(self, status: int = 0) -> list[bytes]:
        """Read until the program ends. Returns the rows of the screen."""
        try:
            while self.read():
                pass
            assert self.process.wait(DEADLINE) == status, self.seen
        finally:
            os.close(self.fd)
        return screen(self.seen)


def screen(written: bytes) -> list[bytes]:
    """The rows of a terminal of 100 columns after these bytes, without colours; it knows the launcher's sequences."""
    rows, column, wraps = [bytearray()], 0, True
    for token in re.findall(rb"\x1b\[\??\d*[A-Za-z]|.", re.sub(rb"\x1b\[\d+m", b"", written), re.DOTALL):
        if token == b"\x1b[K":
            del rows[-1][column:]
        elif token in (b"\x1b[?7l", b"\x1b[?7h"):
            wraps = token.endswith(b"h")
        elif token == b"\n":
            rows.append(bytearray())
            column = 0
        elif token == b"\r":
            column = 0
        else:
            if column == 100:
                if wraps:
                    rows.append(bytearray())
                    column = 0
                else:
                    column = 99
            rows[-1][column : column + 1] = token
            column += 1
    return [bytes(row) for row in rows]


class LiveScreen:
    """A terminal of some size that shows what a full-screen program writes; of control sequences what ours uses."""

    def __init__(self, rows: int, columns: int) -> None:
        self.resize(rows, columns)
        self.is_other = False
        """Whether the program uses the other screen."""
        self.has_cursor = True
        self.blank_frames = 0
        """How often the screen was empty between two updates, which a person sees as flicker."""
        self._is_new = False
        """Whether no update has fitted the present size."""
        self._is_cut_off = False
        """Whether the present update has not."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self._rest = ""
        """The beginning of a control sequence."""

    def resize(self, rows: int, columns: int) -> None:
        """Become larger or smaller. What the program writes before it notices is cut off."""
        self.rows, self.columns = rows, columns
        self.lines = [" " * columns for _ in range(rows)]
        self._row = self._column = 0
        self._is_new = True

    def shown(self) -> list[str]:
        """The rows, without blanks at their ends."""
        return [line.rstrip() for line in self.lines]

    def feed(self, data: bytes) -> None:
        """Show what was written. It may end within a character or a control sequence: the kernel keeps 4 KiB."""
        text = self._rest + self._decoder.decode(data)
        self._rest = re.findall(r"(?:\x1b\[?[?\d;]*)?$", text)[0]
        for token in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|.", text.removesuffix(self._rest), re.DOTALL):
            self._take(token)

    def _take(self, token: str) -> None:
        match token:
            case "\x1b[?1049h" | "\x1b[?1049l":
                self.is_other = token.endswith("h")
                self.lines = [" " * self.columns for _ in range(self.rows)]
                self._row = self._column = 0
            case "\x1b[?25h" | "\x1b[?25l":
                self.has_cursor = token.endswith("h")
            case "\x1b[?2026h" | "\x1b[?2026l":
                pass
            case "\x1b[H":
                self._row = self._column = 0
                self._is_cut_off = False
            case "\x1b[K":
                self.lines[self._row] = self.lines[self._row][: self._column].ljust(self.columns)
            case "\x1b[J":
                self.lines[self._row + 1 :] = [" " * self.columns for _ in self.lines[self._row + 1 :]]
                self._is_new &= self._is_cut_off
            case "\x1b[2J":
                self.blank_frames += 1
            case "\r":
                self._column = 0
            case "\n":
                self._row += 1
                if self._row == self.rows:
                    self.lines = [*self.lines[1:], " " * self.columns]
                    self._row -= 1
            case _:
                assert not token.startswith("\x1b"), f"unknown control sequence {token!r}"
                if self._is_new and self._column == self.columns:
                    self._is_cut_off = True
                    return
                assert self._column < self.columns, f"a row that is too long: {self.lines[self._row]}"
                line = self.lines[self._row]
                self.lines[self._row] = line[: self._column] + token + line[self._column + 1 :]
                self._column += 1
