"""Layer 2: the log pump: takes the workers' output, and brings it to files and to the launcher's own streams.

Part of the agent's one loop: it has no thread, and waits for nothing but in ``flush``. What it may touch are the pipes
(or terminals) that it makes for the workers, the files that it is told to write, and descriptors 1 and 2. It works on
large blocks, with a few calls for each: nothing here is done line by line but what is rare.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack

from elastic_launch.errors import UnavailableError
from elastic_launch.logs.channel import DEFAULT_SIZE, make_channel, raise_limit
from elastic_launch.logs.sinks import NAMES, Console, File
from elastic_launch.logs.source import STDERR, STDOUT, Duplicates, Route, Source

BLOCK = 1 << 20
"""Bytes: the most that one read takes, and the size of a pipe where the system grants it."""
ALL_PIPES = 16 << 20
"""Bytes of all pipes together; with many workers each gets less. (The system's own size is 64 KiB.)"""
ALL_BACKLOGS = 64 << 20
"""Bytes that may wait for slow consoles, of all workers together; and ``BLOCK`` of each one at most."""
REST = 0.01
"""Seconds that the pipes may fill in while much is written in small pieces: to be woken for each costs all CPUs more
than the work itself. A line that comes alone is taken at once."""
_MOST_WORDS = 64 << 10
"""Bytes of the launcher's own lines that wait for a console; further ones are lost."""


class LogPump:
    """The output of a node's workers, round after round.

    The agent waits for ``descriptors()`` until ``deadline()``, and calls ``take`` with those that are ready.
    """

    def __init__(
        self, log: Callable[[str], None], unblocked: Callable[[int], AbstractContextManager[int]] | None = None
    ) -> None:
        """Take hold of the launcher's streams.

        Args:
            say: takes a line for people about what was lost; may be a detour to this object's own ``log``.
            unblocked: opens a standard stream so that writing to it does not block (``console.unblocked``).
        """
        self._tell = log
        self._losses: list[str] = []
        self._has_lost = False
        self._stack = ExitStack()
        self._consoles: dict[int, Console] = {}
        for stream in (STDOUT, STDERR):
            with contextlib.suppress(OSError):  # without the stream: nobody looks
                self._consoles[stream] = self._console(stream, unblocked or contextlib.nullcontext)
        self._sources: dict[int, Source] = {}
        self._workers_ends: list[int] = []
        self._files: list[File] = []
        self._of: dict[tuple[int, int], Source] = {}
        self._buffer = bytearray()
        self._pipe_size = self._backlog = BLOCK
        self._taken_at = self._rest_until = float("-inf")
        self._words = _Words()

    def _console(self, stream: int, unblocked: Callable[[int], AbstractContextManager[int]]) -> Console:
        """The console of a stream; both are one if they lead to the same place: lines must stay whole there."""
        status = os.fstat(stream)
        for console in self._consoles.values():
            if (status.st_dev, status.st_ino) == console.identity:
                return console
        return Console(stream, self._stack.enter_context(unblocked(stream)), self._stack, self._losses.append)

    # ---- a round

    def open(
        self, routes: Sequence[Route], duplicates: Mapping[int, Duplicates] | None = None
    ) -> dict[tuple[int, int], int]:
        """Begin a round; what was left of an earlier one is drained.

        Returns:
            The descriptors to give to the workers, by local rank and stream. ``close_workers_ends`` closes them here.

        Raises:
            UnavailableError: the system grants no pipes.
        """
        self.drain()
        self._of.clear()
        many = max(1, len(routes))
        self._pipe_size = max(DEFAULT_SIZE, min(BLOCK, ALL_PIPES // many))
        self._backlog = max(DEFAULT_SIZE, min(BLOCK, ALL_BACKLOGS // many))
        self._buffer = bytearray(self._pipe_size)
        raise_limit(many)
        ends: dict[tuple[int, int], int] = {}
        try:
            shared = {
                stream: (duplicate.texts, self._file(duplicate.path))
                for stream, duplicate in (duplicates or {}).items()
                if duplicate.texts
            }
            for route in routes:
                console = self._consoles.get(route.stream) if route.show else None
                file = self._file(route.path)
                ours, theirs, capacity = make_channel(
                    self._pipe_size,
                    console.fd if console and console.is_terminal else None,
                    len(route.prefix or b""),
                )
                self._workers_ends.append(theirs)
                source = Source(route, ours, capacity, console, file, *shared.get(route.stream, ()))
                ends[route.local_rank, route.stream] = theirs
                self._sources[ours] = self._of[route.local_rank, route.stream] = source
        except OSError as error:
            self.drain()
            raise UnavailableError(
                f"cannot make the pipes for the output of {many} streams of workers: {error.strerror}; "
                "`ulimit -n` tells how many descriptors a process may have"
            ) from error
        self._report_losses()
        return ends

    def _file(self, path: str) -> File | None:
        if not path:
            return None
        file = File(path, self._losses.append)
        self._files.append(file)
        return file

    def close_workers_ends(self) -> None:
        """Let go of what the workers hold now; only then do their streams end with them."""
        while self._workers_ends:
            os.close(self._workers_ends.pop())

    def drain(self) -> None:
        """End the round: its processes are gone. What they have written is in the files and on its way to the console.

        Never waits: what a stranger holds open, and goes on writing to, is read as far as it goes now.
        """
        self.close_workers_ends()
        for source in list(self._sources.values()):
            left = BLOCK  # no channel holds more, so this is at least what was there at the beginning
            while left > 0 and source.fd in self._sources:
                size = self._read(source)
                left -= size or left
            if source.fd in self._sources:
                self._finish(source)
        while self._files:
            self._files.pop().close()
        self._rest_until = float("-inf")
        self._settle()

    def close(self) -> None:
        """Close everything; what still waits for a console is lost."""
        self.drain()
        self._consoles.clear()
        self._stack.close()

    # ---- the agent's loop

    def descriptors(self) -> list[tuple[int, int]]:
        """What to wait for: descriptors and poll masks."""
        waits = [(console.fd, select.POLLOUT) for console in self._each_console() if console.queue]
        if time.monotonic() >= self._rest_until:
            self._rest_until = float("-inf")  # so that ``deadline`` does not have to look at the clock again
            waits += [(fd, select.POLLIN) for fd, source in self._sources.items() if source.backlog <= self._backlog]
        return waits

    def deadline(self) -> float | None:
        """When to ask for ``descriptors`` again, on ``time.monotonic``; None: once something has happened."""
        return self._rest_until if self._rest_until > float("-inf") and self._sources else None

    def take(self, ready: Collection[int]) -> None:
        """Do what can be done without waiting. ``ready`` may hold descriptors of others."""
        is_little, has_read = True, False
        for fd in [fd for fd in self._sources if fd in ready]:
            source = self._sources[fd]
            size = self._read(source)
            has_read = has_read or bool(size)
            is_little = is_little and (size or 0) < source.capacity // 4
        if has_read:
            now = time.monotonic()
            if is_little and now - self._taken_at < 2 * REST:
                self._rest_until = now + REST
            self._taken_at = now
        self._settle()

    def _settle(self) -> None:
        for console in self._each_console():
            console.settle()
        self._report_losses()

    def _each_console(self) -> Collection[Console]:
        return set(self._consoles.values())

    def _read(self, source: Source) -> int | None:
        """Read one block. Returns its size, None if there is none, or none any more."""
        try:
            size = os.readv(source.fd, (self._buffer,))
        except BlockingIOError:
            return None
        except OSError:  # EIO: the end of a terminal
            size = 0
        if size == 0:
            self._finish(source)
            return None
        source.feed(bytes(memoryview(self._buffer)[:size]))
        return size

    def _finish(self, source: Source) -> None:
        del self._sources[source.fd]
        os.close(source.fd)
        source.end()

    # ---- what a worker said last

    def tail(self, local_rank: int) -> str:
        """The last lines of a worker's stderr in this round, or the one that has just ended; for people.

        20 lines and 8 KiB at most, without colours; of a line that was redrawn its last state.
        """
        source = self._of.get((local_rank, STDERR))
        return source.tail() if source else ""

    def mark(self, local_rank: int) -> None:
        """Keep what the worker writes to stderr from now on, for ``since_mark``."""
        if source := self._of.get((local_rank, STDERR)):
            if source.fd in self._sources:
                self._read(source)  # what it wrote before
            source.marked = bytearray()

    def since_mark(self, local_rank: int) -> bytes:
        """What the worker has written to stderr since the mark, the first 1 MiB of it."""
        source = self._of.get((local_rank, STDERR))
        return bytes(source.marked or b"") if source else b""

    # ---- the launcher's own words

    def log(self, text: str) -> None:
        """Write a line of the launcher's to standard error, after what the workers have written so far.

        Never waits: a console that nobody reads costs words.
        """
        self.show(f"elastic-run: {text}\n")

    def show(self, text: str) -> None:
        """Write whole lines as ``log`` does, but as they are."""
        for source in list(self._sources.values()):
            if source.backlog <= self._backlog:
                self._read(source)
        if (console := self._consoles.get(STDERR)) and self._words.backlog < _MOST_WORDS:
            console.add(text.encode(errors="backslashreplace"), self._words)
        self._settle()

    def flush(self, patience: float, interrupt: int | None = None) -> int:
        """Write what still waits for the consoles, as long as they take it.

        Args:
            patience: seconds without any progress after which the rest is given up.
            interrupt: a descriptor that ends the wait, too, once it is readable.

        Returns:
            How many bytes were not shown.
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
                console.settle()
            if sum(console.waiting() for console in waiting) < before:
                end = time.monotonic() + patience
            elif time.monotonic() >= end:
                break
            if any(fd == interrupt for fd, _ in ready):
                break
        lost = {console: size for console in waiting if (size := console.give_up())}
        for console, size in lost.items():
            self._tell(f"{NAMES[console.stream]} takes no more output: {size} bytes were not shown")
        self._report_losses()
        return sum(lost.values())

    @property
    def is_at_line_start(self) -> bool:
        """Whether what was written to standard error so far ends with a line's end."""
        return STDERR not in self._consoles or self._consoles[STDERR].is_at_line_start

    def _report_losses(self) -> None:
        losses, self._losses[:] = self._losses[:], []
        if losses and not self._has_lost:
            self._has_lost = True
            self._tell(losses[0])


class _Words:
    """The launcher's own lines, as far as they wait for a console."""

    backlog = 0
