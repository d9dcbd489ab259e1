"""The log pump: moves the workers' output to files and to the launcher's own streams.

It is part of the agent's loop, has no thread, and waits in ``flush`` only. It touches the pipes (or terminals) that it
makes for the workers, the files that it is told to write, and descriptors 1 and 2. It works on large blocks with a few
calls each, and handles single lines only where that is rare.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack

from elastic_launch.errors import UnavailableError
from elastic_launch.host.console import launcher_line, replacement, unblocked
from elastic_launch.logs.channel import DEFAULT_SIZE, copy_size, make_channel, raise_limit
from elastic_launch.logs.sinks import NAMES, Console, File
from elastic_launch.logs.source import STDERR, STDOUT, Duplicates, Route, Source

BLOCK = 1 << 20
"""Bytes that one read takes at most, and the size of a pipe if the system grants it."""
ALL_PIPES = 16 << 20
"""Bytes of all pipes together. With many workers each pipe is smaller, but not below the system's default of 64 KiB."""
ALL_BACKLOGS = 64 << 20
"""Bytes of all workers together that may wait for slow consoles. One worker may have ``BLOCK`` waiting."""
BATCH_DELAY = 0.01
"""Seconds to let pipes fill while workers write many small pieces: waking up for each piece costs more than the work
itself. A single line is read at once."""
JOIN_DELAY = 0.1
"""Seconds that the beginning of a line waits for its end where several workers share a console. What `print` writes
arrives in pieces, because Python runs with ``-u``."""
_MAX_OWN_LINES = 64 << 10
"""Bytes of the launcher's own lines that may wait for a console. Further lines are lost."""


class LogPump:
    """The output of a node's workers, round after round.

    The agent waits for ``descriptors()`` until ``deadline()``, and calls ``take`` with those that are ready.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        """Prepare the launcher's streams.

        Args:
            log: receives a warning if output is lost. It may lead back to this object's own ``log``.
        """
        self._warn = log
        self._losses: list[str] = []
        self._has_warned = False
        self._stack = ExitStack()
        self._consoles: dict[int, Console] = {}
        for stream in (STDOUT, STDERR):
            with contextlib.suppress(OSError):  # the stream is closed
                self._consoles[stream] = self._console(stream)
        self._sources: dict[int, Source] = {}
        """Open streams, by descriptor."""
        self._by_stream: dict[tuple[int, int], Source] = {}
        """All streams of the round, by local rank and stream."""
        self._terminals: dict[int, tuple[int, int]] = {}
        """Of the streams that are terminals: the console, and the columns of it that the prefix takes."""
        self._workers_ends: list[int] = []
        self._files: list[File] = []
        self._buffer = bytearray()
        self._pipe_size = self._max_backlog = BLOCK
        self._taken_at = self._rest_until = float("-inf")
        self._held: dict[Source, float] = {}
        """Streams whose unfinished line is held, and until when."""
        self._own_lines = _OwnLines()

    def _console(self, stream: int) -> Console:
        """Return the console of a stream. Streams that lead to the same place share one, which keeps lines whole."""
        file = replacement(stream)
        for console in self._consoles.values():
            if console.file is file and (file is not None or os.path.sameopenfile(stream, console.stream)):
                return console
        return Console(stream, self._stack.enter_context(unblocked(stream)), self._stack, self._losses.append, file)

    # ---- a round

    def open(
        self, routes: Sequence[Route], duplicates: Mapping[int, Duplicates] | None = None
    ) -> dict[tuple[int, int], int]:
        """Begin a round. What is left of an earlier one is drained.

        Args:
            routes: where the workers' output goes.
            duplicates: files for certain lines, by stream.

        Returns:
            The descriptors for the workers, by local rank and stream. ``close_workers_ends`` closes them here.

        Raises:
            UnavailableError: the system grants no pipes.
        """
        self.drain()
        self._by_stream.clear()
        many = max(1, len(routes))
        self._pipe_size = max(DEFAULT_SIZE, min(BLOCK, ALL_PIPES // many))
        self._max_backlog = max(DEFAULT_SIZE, min(BLOCK, ALL_BACKLOGS // many))
        self._buffer = bytearray(self._pipe_size)
        raise_limit(many)
        ends: dict[tuple[int, int], int] = {}
        try:
            shared = {
                stream: (duplicate.texts, self._file(duplicate.path))
                for stream, duplicate in (duplicates or {}).items()
            }
            for route in routes:
                console = self._consoles.get(route.stream) if route.show else None
                file = self._file(route.path)
                margin = len(route.prefix or b"")
                terminal = console.fd if console and console.is_terminal else None
                ours, theirs, capacity = make_channel(self._pipe_size, terminal, margin)
                self._workers_ends.append(theirs)
                if terminal is not None and os.isatty(ours):
                    self._terminals[ours] = terminal, margin
                duplicate = shared.get(route.stream, ())
                source = Source(route, ours, capacity, console, file, *duplicate, is_terminal=ours in self._terminals)
                ends[route.local_rank, route.stream] = theirs
                self._sources[ours] = self._by_stream[route.local_rank, route.stream] = source
        except OSError as error:
            self.drain()
            raise no_pipes(many, error) from error
        self._report_losses()
        return ends

    def _file(self, path: str) -> File | None:
        if not path:
            return None
        file = File(path, self._losses.append)
        self._files.append(file)
        return file

    def close_workers_ends(self) -> None:
        """Close the descriptors that the workers have by now. Otherwise their streams would not end with them."""
        while self._workers_ends:
            os.close(self._workers_ends.pop())

    def drain(self) -> None:
        """End the round, whose processes have ended: move all that they wrote to the files and towards the console.

        Never waits. If another process still holds a stream open and writes to it, this reads what is there now.
        """
        self.close_workers_ends()
        for source in list(self._sources.values()):
            left = BLOCK  # no channel holds more, so this covers what was there at the beginning
            while left > 0 and source.fd in self._sources:
                size = self._read(source)
                left -= size or left
            if source.fd in self._sources:
                self._finish(source)
        while self._files:
            self._files.pop().close()
        self._rest_until = float("-inf")
        self._update_consoles()

    def close(self) -> None:
        """Close everything. What still waits for a console is lost."""
        self.drain()
        self._consoles.clear()
        self._stack.close()

    # ---- the agent's loop

    def descriptors(self) -> list[tuple[int, int]]:
        """See ``LoopSource``."""
        waits = [(console.fd, select.POLLOUT) for console in self._each_console() if console.queue]
        if time.monotonic() >= self._rest_until:
            self._rest_until = float("-inf")  # so that ``deadline`` need not look at the clock again
            waits += [(fd, select.POLLIN) for fd, source in self._sources.items() if self._may_read(source)]
        return waits

    def deadline(self) -> float | None:
        """Return when ``descriptors`` will return more, on ``time.monotonic``; None if that depends on events only."""
        if self._rest_until > float("-inf") and self._sources:
            return self._rest_until
        return min((until for source, until in self._held.items() if self._may_read(source)), default=None)

    def take(self, ready: Collection[int]) -> None:
        """Move what can be moved without waiting. ``ready`` may include descriptors of others."""
        fills = []
        for source in [source for fd, source in self._sources.items() if fd in ready]:
            if size := self._read(source):
                fills.append(size / source.capacity)
        if fills:
            now = time.monotonic()
            if max(fills) < 0.25 and now - self._taken_at < 2 * BATCH_DELAY:
                self._rest_until = now + BATCH_DELAY
            self._taken_at = now
        if self._held:
            self._release()
        self._update_consoles()

    def _release(self) -> None:
        """Show the beginnings of lines whose ends did not come in time."""
        now = time.monotonic()
        for source in [source for source, until in self._held.items() if until <= now and self._may_read(source)]:
            self._read(source)  # the end may have arrived while this process waited for a CPU
            if self._held.get(source, now + 1) <= now:
                source.release()
                del self._held[source]

    def _update_consoles(self) -> None:
        for console in self._each_console():
            console.update()
        self._report_losses()

    def _each_console(self) -> Collection[Console]:
        return set(self._consoles.values())

    def _may_read(self, source: Source) -> bool:
        """Return whether the console has taken enough of what this stream had for it."""
        return source.backlog <= self._max_backlog

    def _read(self, source: Source) -> int | None:
        """Read one block. Returns its size; None if there is none now, or the stream has ended."""
        try:
            size = os.readv(source.fd, (self._buffer,))
        except BlockingIOError:
            return None
        except OSError:  # EIO: the end of a terminal
            size = 0
        if size == 0:
            self._finish(source)
            return None
        block = bytes(memoryview(self._buffer)[:size])
        source.feed(block)
        if place := self._terminals.get(source.fd):  # the console may have another size now
            copy_size(place[0], source.fd, place[1])
        if not source.held:
            self._held.pop(source, None)
        elif source not in self._held or b"\n" in block:  # another line has begun
            self._held[source] = time.monotonic() + JOIN_DELAY
        return size

    def _finish(self, source: Source) -> None:
        del self._sources[source.fd]
        self._terminals.pop(source.fd, None)
        self._held.pop(source, None)
        os.close(source.fd)
        source.end()

    # ---- the end of a worker's stderr

    def tail(self, local_rank: int) -> str:
        """Return the last lines of a worker's stderr in this round, or in the one that has just ended.

        At most 20 lines and 8 KiB, without colours. Of a line that was redrawn, its last state.
        """
        source = self._by_stream.get((local_rank, STDERR))
        return source.tail() if source else ""

    def mark(self, local_rank: int) -> None:
        """Keep what the worker writes to stderr from now on, for ``since_mark``."""
        if source := self._by_stream.get((local_rank, STDERR)):
            if source.fd in self._sources:
                self._read(source)  # what it wrote before
            source.marked = bytearray()

    def since_mark(self, local_rank: int) -> bytes:
        """Return the first 1 MiB that the worker has written to stderr since the mark."""
        source = self._by_stream.get((local_rank, STDERR))
        return bytes(source.marked or b"") if source else b""

    # ---- the launcher's own lines

    def log(self, text: str) -> None:
        """Write a line of the launcher's to standard error, after what the workers have written so far.

        Never waits. If nobody reads the console, the line may be lost. Control characters are made visible: the text
        may quote file names, hosts and errors.
        """
        self.show(launcher_line(text))

    def show(self, text: str) -> None:
        """Write whole lines as ``log`` does, but without a prefix."""
        for source in list(self._sources.values()):
            if self._may_read(source):
                self._read(source)
        if (console := self._consoles.get(STDERR)) and self._own_lines.backlog < _MAX_OWN_LINES:
            console.add(text.encode(errors="backslashreplace"), self._own_lines)
        self._update_consoles()

    @property
    def is_on_terminal(self) -> bool:
        """Whether standard error is a terminal."""
        return STDERR in self._consoles and self._consoles[STDERR].is_terminal

    def redraw(self, row: Callable[[], bytes]) -> None:
        """Show what ``row`` returns in the terminal's last row, below all lines, until ``undraw``."""
        self._consoles[STDERR].redraw(row)
        self._update_consoles()

    def undraw(self, row: Callable[[], bytes]) -> None:
        """Stop showing that row."""
        self._consoles[STDERR].undraw(row)
        self._update_consoles()

    def flush(self, patience: float, interrupt: int | None = None) -> int:
        """Write what still waits for the consoles, as long as they accept it.

        Args:
            patience: seconds without progress after which the rest is discarded.
            interrupt: a descriptor that also ends the wait once it is readable.

        Returns:
            The number of bytes that were not shown.
        """
        poller = select.poll()
        if interrupt is not None:
            poller.register(interrupt, select.POLLIN)
        end = time.monotonic() + patience
        while waiting := [console for console in self._each_console() if console.queue]:
            before = sum(console.waiting() for console in waiting)
            for console in waiting:
                poller.register(console.fd, select.POLLOUT)
            ready = poller.poll(max(0.0, end - time.monotonic()) * 1000)
            for console in waiting:
                poller.unregister(console.fd)
                console.update()
            if sum(console.waiting() for console in waiting) < before:
                end = time.monotonic() + patience
            elif time.monotonic() >= end:
                break
            if any(fd == interrupt for fd, _ in ready):
                break
        lost = {console: size for console in waiting if (size := console.discard())}
        for console, size in lost.items():
            self._warn(f"{NAMES[console.stream]} accepts no more output: {size} bytes were not shown")
        self._report_losses()
        return sum(lost.values())

    @property
    def is_at_line_start(self) -> bool:
        """Whether the output to standard error so far ends with the end of a line."""
        return STDERR not in self._consoles or self._consoles[STDERR].is_at_line_start

    def _report_losses(self) -> None:
        losses, self._losses[:] = self._losses[:], []
        if losses and not self._has_warned:
            self._has_warned = True
            self._warn(losses[0])


def no_pipes(streams: int, error: OSError) -> UnavailableError:
    """Return the error to raise if the system does not grant pipes for so many streams."""
    return UnavailableError(
        f"cannot create pipes for the {streams} output streams of the workers: {error.strerror}; "
        "allow more open files (`ulimit -n`) or start fewer workers"
    )


class _OwnLines:
    """The launcher's own lines, as a writer to a console."""

    backlog = 0
