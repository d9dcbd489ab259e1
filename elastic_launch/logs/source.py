"""One stream of one worker: where each block of its output goes. Reads nothing itself."""

from __future__ import annotations

from typing import NamedTuple

from elastic_launch.core.lines import contained, end_as_text, last_state, last_states, matching, without_escapes
from elastic_launch.logs.sinks import Console, File

STDOUT, STDERR = 1, 2
MAX_LINE = 16 << 20
"""Bytes of a line. A longer one is shown in pieces. Files get it unchanged."""
TAIL_LINES, TAIL_SIZE = 20, 8 << 10
"""Limits of the tail of a worker's stderr, in lines and in bytes."""
TAIL_KEPT = 64 << 10
"""Bytes of stderr that are kept for the tail. Many of them may be progress bars and colours, which the tail omits."""
MAX_HELD = 64 << 10
"""Bytes of an unfinished line that wait for its end, so that other workers' output does not get into it."""
MAX_MARKED = 1 << 20
"""Bytes of stderr that are kept after a mark."""


class Route(NamedTuple):
    """Where the output of one stream of one worker goes."""

    local_rank: int
    stream: int
    """1 for stdout, 2 for stderr."""
    path: str = ""
    """A file for every byte of the output, in an existing directory; empty for none."""
    show: bool = False
    """Whether the launcher's own stream of the same number shows the output."""
    prefix: bytes | None = None
    """What is shown before each line. None: the bytes are shown unchanged, as they arrive."""
    joins: bool = False
    """Whether bytes that are shown unchanged share the console with those of other workers. Then the pieces of a line
    that arrive shortly after each other are shown at once."""


class Duplicates(NamedTuple):
    """A file for copies of certain lines of one stream of all workers, with their prefixes."""

    texts: tuple[bytes, ...]
    """Lines that contain one of these are copied."""
    path: str


class Source:
    """One stream of one worker: where its blocks go, and what is kept of them."""

    def __init__(
        self,
        route: Route,
        fd: int,
        capacity: int,
        console: Console | None,
        file: File | None,
        texts: tuple[bytes, ...] = (),
        duplicate: File | None = None,
        *,
        is_terminal: bool = False,
    ) -> None:
        """Prepare.

        Args:
            route: where the output goes.
            fd: the descriptor that it is read from.
            capacity: bytes that the channel holds.
            console: shows the output; None if it is not shown.
            file: stores the output; None if it is not stored.
            texts: lines with one of these texts are copied to ``duplicate``.
            duplicate: the file for such lines.
            is_terminal: whether the worker writes to a terminal. Its colours are not for the files.
        """
        self.fd = fd
        self.capacity = capacity
        self.backlog = 0
        """Bytes that wait for the console."""
        self.recent = bytearray()
        """The end of stderr."""
        self.is_whole = True
        """Whether ``recent`` is all of stderr."""
        self.marked: bytearray | None = None
        """What has been written to stderr since the mark; None without a mark."""
        self._is_stderr = route.stream == STDERR
        self._prefix = route.prefix or b""
        self._raw = console if route.prefix is None else None
        self._lines = console if route.prefix is not None else None
        self._file = file
        self._texts = texts
        self._duplicate = duplicate
        self._is_terminal = is_terminal
        self._begun = b""
        """The beginning of an escape sequence that is left out of the file."""
        self._joins = route.joins
        self.held = b""
        """The unfinished line that waits for its end, although its bytes are shown unchanged."""
        self._partial = bytearray()
        """The unfinished line, if the output is split into lines."""
        self._is_redrawn = False
        """Whether the unfinished line contains a carriage return."""

    def feed(self, block: bytes) -> None:
        """Pass on what the worker wrote."""
        if self._file:
            kept = block
            if self._is_terminal:
                kept, self._begun = without_escapes(self._begun, block)
            self._file.write(kept)
        if self._is_stderr:
            self._remember(block)
        if self._raw:
            self._show_raw(block)
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
                self._lines.redraw(self.row)
        if len(self._partial) > MAX_LINE:
            self.end()

    def end(self) -> None:
        """Show the unfinished line, because the stream has ended or the line is too long."""
        self.release()
        if self._partial:
            line = bytes(self._partial) + b"\n"
            self._partial.clear()
            self._show(line)

    def release(self) -> None:
        """Show the unfinished line that is held."""
        if self._raw and self.held:
            self._raw.add(self.held, self, is_lines=False)
        self.held = b""

    def tail(self) -> str:
        """Return the last lines of stderr as text."""
        return end_as_text(bytes(self.recent), self.is_whole, TAIL_LINES, TAIL_SIZE)

    def row(self) -> bytes:
        """Return the unfinished line, with its prefix, as a terminal's row."""
        state = self._partial.strip(b"\r")
        return self._prefix + contained(bytes(state)) if state else b""

    def _show_raw(self, block: bytes) -> None:
        if self._joins:
            block = self.held + block
            end = block.rfind(b"\n") + 1
            self.held = block[end:] if len(block) - end <= MAX_HELD else b""
            block = block[: len(block) - len(self.held)]
        if self._raw and block:
            self._raw.add(block, self, is_lines=False)

    def _show(self, lines: bytes) -> None:
        if self._is_redrawn and self._lines:
            self._lines.undraw(self.row)
        self._is_redrawn = False
        lines = last_states(lines)
        if self._lines:
            self._lines.add(self._prefixed(contained(lines) if self._lines.is_terminal else lines), self)
        if self._duplicate and (found := matching(lines, self._texts)):
            found = bytes(self._prefixed(found))
            self._duplicate.write(without_escapes(b"", found)[0] if self._is_terminal else found)

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
            self.marked += block[: max(0, MAX_MARKED - len(self.marked))]
