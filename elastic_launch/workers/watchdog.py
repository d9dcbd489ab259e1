"""The agent's side of the workers' timers: a named pipe that workers write to, and the timers that have expired.

Reads one pipe in the agent's loop, without a thread. It decides nothing and kills nothing.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import stat
import time
from collections.abc import Callable, Collection
from operator import attrgetter

from elastic_launch.core.agent.messages import AgentEvent, TimerExpired
from elastic_launch.core.timer_requests import ScopeRequest, take_requests
from elastic_launch.errors import UnavailableError
from elastic_launch.workers.keeper_main import read_stat

_READ = 1 << 16
"""Bytes that one read takes: as many as a pipe holds."""
_MAX_READS = 4
"""Reads in a row. A worker that writes without end must not hold up the agent."""
MAX_TIMERS = 10_000
"""Timers at a time; further ones are ignored. A worker that sets them without end must not fill the agent's memory."""


class Watchdog:
    """The named pipe of one agent, and the timers that its workers have set.

    It is an event source of the agent's loop. Workers write to ``path``.
    """

    def __init__(self, path: str, wall_clock: Callable[[], float] = time.time) -> None:
        """Create the pipe. A pipe that nobody reads any more is replaced; any other file stays.

        Args:
            path: the path of the pipe.
            wall_clock: the clock of the times in requests, in seconds since 1970.

        Raises:
            UnavailableError: the pipe cannot be created.
        """
        self.path = path = os.path.abspath(path)  # workers may change their directory
        self._wall_clock = wall_clock
        self._buffer = bytearray()
        self._timers: dict[tuple[int, str], ScopeRequest] = {}
        """The timers that are set, by pid and scope. Their times are on ``time.monotonic``."""
        try:
            with contextlib.suppress(FileNotFoundError):
                _remove_stale(path)
            os.mkfifo(path, 0o600)
            # Open for writing, too: a pipe whose last writer has closed it is at its end, and readable for ever.
            self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        except OSError as error:
            raise UnavailableError(
                f"cannot create the named pipe {path} for the workers' timers: {error.strerror}; "
                "set TORCHELASTIC_TIMER_FILE to a free path in a writable directory"
            ) from error

    def descriptors(self) -> list[tuple[int, int]]:
        """See ``LoopSource``."""
        return [(self._fd, select.POLLIN)]

    def deadline(self) -> float | None:
        """Return when the next timer expires, on ``time.monotonic``; None without timers."""
        return min((timer.expires_at for timer in self._timers.values()), default=None)

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        """Read what workers have written, without blocking.

        Returns:
            The timers that have expired, in a worker or in a process that it started. Timers without a signal are left
            out.
        """
        return [
            TimerExpired(_worker_of(timer.pid), f"was still in timer scope {timer.scope!r} when its time ran out")
            for timer in self.expired(time.monotonic())
            if timer.signum
        ]

    def expired(self, now: float) -> list[ScopeRequest]:
        """Read requests, and return the timers that have expired since the last call, earliest first.

        The pipe is read before anything expires. So an agent that was itself held up blames no worker that has left its
        scope meanwhile.

        Args:
            now: the current time on ``time.monotonic``.

        Returns:
            The timers, with their times on the same clock.
        """
        self._read(now)
        found = sorted(
            (timer for timer in self._timers.values() if timer.expires_at <= now), key=attrgetter("expires_at")
        )
        for timer in found:
            del self._timers[timer.pid, timer.scope]
        return found

    def forget(self, pid: int) -> None:
        """Cancel the timers of a process that has ended, including unread ones in the pipe."""
        self._read(time.monotonic())
        self._timers = {key: timer for key, timer in self._timers.items() if key[0] != pid}

    def clear(self) -> None:
        """Cancel all timers at the end of a round, including unread ones in the pipe."""
        self._read(time.monotonic())
        self._timers.clear()

    def _read(self, now: float) -> None:
        """Set and cancel timers. Times are translated here to the monotonic clock, which nobody can set."""
        for _ in range(_MAX_READS):
            try:
                self._buffer += os.read(self._fd, _READ)
            except BlockingIOError:
                return
            wall = self._wall_clock()
            for request in take_requests(self._buffer):
                if request.expires_at < 0 or math.isinf(request.expires_at):
                    self._timers.pop((request.pid, request.scope), None)
                elif len(self._timers) < MAX_TIMERS or (request.pid, request.scope) in self._timers:
                    timer = request._replace(expires_at=now + request.expires_at - wall)
                    self._timers[timer.pid, timer.scope] = timer

    def close(self) -> None:
        """Close the pipe and remove it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            with contextlib.suppress(OSError):
                os.unlink(self.path)


def _worker_of(pid: int) -> int:
    """Return the worker that a process belongs to: the leader of its session.

    A process that has ended or has left that session stands for itself. So does one in another PID namespace.
    """
    try:
        state, _, _, session, *_ = read_stat(pid)
    except OSError:
        return pid
    return pid if state in b"ZX" or session == b"0" else int(session)


def _remove_stale(path: str) -> None:
    """Remove a named pipe that a killed agent left.

    Raises:
        OSError: the file is not a named pipe, or another process reads it.
    """
    if not stat.S_ISFIFO(os.lstat(path).st_mode):
        raise FileExistsError(errno.EEXIST, "a file that is not a named pipe exists there")
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        os.unlink(path)
    else:
        raise FileExistsError(errno.EEXIST, "another agent reads the pipe that exists there")
