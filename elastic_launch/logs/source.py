"""Layer 2: one stream of one worker: what becomes of each block that comes from it. Reads nothing itself."""

from __future__ import annotations

from typing import NamedTuple

from elastic_launch.core.lines import end_as_text, last_state, last_states, matching
from elastic_launch.logs.sinks import Console, File

STDOUT, STDERR = 1, 2
LONGEST_LINE = 64 << 20
"""Bytes; what is longer is shown in pieces. Files get it as it is."""
TAIL_LINES, TAIL = 20, 8 << 10
"""The last lines of a worker's stderr: so many, and so many bytes of them."""
TAIL_KEPT = 64 << 10
"""Bytes kept for it: progress bars and colours leave little of them."""
MARKED = 1 << 20
"""Bytes kept after a mark."""


class Route(NamedTuple):
    """What becomes of one stream of one worker."""

    local_rank: int
    stream: int
    """1 is stdout, 2 stderr."""
    path: str = ""
    """A file that gets every byte; its directory exists. Empty: none."""
    show: bool = False
    """Whether it goes to the launcher's own stream of that number."""
    prefix: bytes | None = None
    """What stands before each line there. None: the bytes pass untouched, as they come."""


class Duplicates(NamedTuple):
    """Lines of one stream of all workers that go to a file as well, with their prefixes."""

    texts: tuple[bytes, ...]
    """A line that contains one of them goes there."""
    path: str


class Source:
    """One stream of one worker: where its blocks go, and what of its output is kept."""

    def __init__(
        self,
        route: Route,
        fd: int,
        capacity: int,
        console: Console | None,
        file: File | None,
        texts: tuple[bytes, ...] = (),
        duplicate: File | None = None,
    ) -> None:
        self.fd = fd
        self.capacity = capacity
        self.backlog = 0
        """Bytes that wait for the console."""
        self.recent = bytearray()
        """The end of stderr."""
        self.is_whole = True
        """Whether that is all of it."""
        self.marked: bytearray | None = None
        self._is_stderr = route.stream == STDERR
        self._prefix = route.prefix or b""
        self._raw = console if route.prefix is None else None
        self._lines = console if route.prefix is not None else None
        self._file = file
        self._texts = texts
        self._duplicate = duplicate
        self._partial = bytearray()
        """The line that has no end yet; only where lines matter."""
        self._is_redrawn = False
        """Whether it has carriage returns in it."""

    def feed(self, block: bytes) -> None:
        """Take what the worker wrote."""
        if self._file:
            self._file.write(block)
        if self._is_stderr:
            self._remember(block)
        if self._raw:
            self._raw.add(block, self, is_lines=False)
        if not (self._lines or self._duplicate):
            return
        end = block.rfind(b"\n") + 1
        if end:
            lines = b"".join((self._partial, memoryview(block)[:end])) if self._partial else block[:end]
            self._partial.clear()
            self._show(lines)
        piece = block[end:] if end else block
        self._partial += piece
        if self._is_redrawn or b"\r" in piece:
            self._is_redrawn = True
            last_state(self._partial)
            if self._lines and self._lines.is_terminal:
                self._lines.redraw(self)
        if len(self._partial) > LONGEST_LINE:
            self._end_line()

    def end(self) -> None:
        """Show the last line, though it has no end, now that the stream has."""
        if self._partial:
            self._end_line()

    def _end_line(self) -> None:
        line = bytes(self._partial) + b"\n"
        self._partial.clear()
        self._show(line)

    def tail(self) -> str:
        """The last lines of stderr, for people."""
        return end_as_text(bytes(self.recent), self.is_whole, TAIL_LINES, TAIL)

    def row(self) -> bytes:
        """The unfinished line, to be drawn."""
        state = self._partial.strip(b"\r")
        return self._prefix + bytes(state) if state else b""

    def _show(self, lines: bytes) -> None:
        if self._is_redrawn and self._lines:
            self._lines.undraw(self)
        self._is_redrawn = False
        lines = last_states(lines)
        if self._lines:
            self._lines.add(self._prefixed(lines), self)
        if self._duplicate and (found := matching(lines, self._texts)):
            self._duplicate.write(bytes(self._prefixed(found)))

    def _prefixed(self, lines: bytes) -> bytes | memoryview:
        if not (prefix := self._prefix):
            return lines
        text = prefix + lines.replace(b"\n", b"\n" + prefix)
        return memoryview(text)[: len(text) - len(prefix)]

    def _remember(self, block: bytes) -> None:
        self.recent += block[-TAIL_KEPT:]
        if len(self.recent) > 2 * TAIL_KEPT or len(block) > TAIL_KEPT:
            self.is_whole = False
            del self.recent[:-TAIL_KEPT]
        if self.marked is not None:
            self.marked += block[: max(0, MARKED - len(self.marked))]
