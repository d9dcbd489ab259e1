"""Layer 2: the agent's ear for its workers' timers: a named pipe that workers write to, and what has expired.

Reads one pipe, in the agent's loop, without a thread; decides nothing and kills nobody.
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
from typing import NamedTuple

from elastic_launch.core.agent.messages import AgentEvent, TimerExpired
from elastic_launch.core.timer_requests import take_requests
from elastic_launch.errors import UnavailableError

_READ = 1 << 16
"""Bytes: what a pipe holds."""
_READS = 4
"""Pipes full that are read at a time. Whoever writes without end does not hold up the agent."""


class Overdue(NamedTuple):
    """A scope that a process has not left in time."""

    pid: int
    scope: str
    seconds: float
    """Seconds since it should have left."""
    signum: int
    """What the process asked to be killed with: SIGKILL unless its client says otherwise; 0: with nothing."""


class Watchdog:
    """The named pipe of one agent, and the timers that its workers have set.

    One of the sources of the agent's events. Workers write to ``path``.
    """

    def __init__(self, path: str, wall_clock: Callable[[], float] = time.time) -> None:
        """Make the pipe. One that nobody reads any more is replaced; what is no pipe is left alone.

        Args:
            path: where the pipe lies.
            wall_clock: seconds since 1970; the times in requests are by that clock.

        Raises:
            UnavailableError: it cannot be made.
        """
        self.path = path = os.path.abspath(path)  # workers may go elsewhere
        self._wall_clock = wall_clock
        self._buffer = bytearray()
        self._timers: dict[tuple[int, str], tuple[float, int]] = {}
        try:
            with contextlib.suppress(FileNotFoundError):
                _remove_stale(path)
            os.mkfifo(path, 0o600)
            # Open for writing, too: a pipe whose last writer leaves would be at its end, and readable, for ever.
            self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        except OSError as error:
            raise UnavailableError(
                f"cannot make the named pipe {path} for the workers' timers: {error.strerror}; have "
                "TORCHELASTIC_TIMER_FILE name a free path where files can be made"
            ) from error

    def descriptors(self) -> list[tuple[int, int]]:
        """What to wait for: a descriptor and its poll mask."""
        return [(self._fd, select.POLLIN)]

    def deadline(self) -> float | None:
        """When the next scope expires, on ``time.monotonic``."""
        return min((deadline for deadline, _ in self._timers.values()), default=None)

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        """Read what workers have written; never blocks.

        Returns:
            The workers that have not left a scope in time, themselves or in a process of theirs, but for scopes that
            want no signal for that.
        """
        return [
            TimerExpired(_worker_of(pid), f"was still in the timer's scope {scope!r} when its time was over")
            for pid, scope, _, signum in self.overdue(time.monotonic())
            if signum
        ]

    def overdue(self, now: float) -> list[Overdue]:
        """What ``take`` has to tell.

        All that was written counts before anything expires: an agent that was itself held up blames no worker that
        has left its scope meanwhile.

        Args:
            now: ``time.monotonic()``.

        Returns:
            What has expired since the last call, the earliest first.
        """
        self._read(now)
        expired = sorted((at, *key, signum) for key, (at, signum) in self._timers.items() if at <= now)
        for _, pid, scope, _ in expired:
            del self._timers[pid, scope]
        return [Overdue(pid, scope, now - at, signum) for at, pid, scope, signum in expired]

    def forget(self, pid: int) -> None:
        """A process has ended: cancel its timers, those included that stand unread in the pipe."""
        self._read(time.monotonic())
        self._timers = {key: timer for key, timer in self._timers.items() if key[0] != pid}

    def clear(self) -> None:
        """A round is over: cancel all timers, those included that stand unread in the pipe."""
        self._read(time.monotonic())
        self._timers.clear()

    def _read(self, now: float) -> None:
        """Set and cancel timers. From here on they go by the monotonic clock, whatever becomes of the other."""
        for _ in range(_READS):
            try:
                self._buffer += os.read(self._fd, _READ)
            except BlockingIOError:
                return
            wall = self._wall_clock()
            for pid, scope, expires_at, signum in take_requests(self._buffer):
                if expires_at < 0 or math.isinf(expires_at):
                    self._timers.pop((pid, scope), None)
                else:
                    self._timers[pid, scope] = now + expires_at - wall, signum

    def close(self) -> None:
        """Close the pipe and remove it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            with contextlib.suppress(OSError):
                os.unlink(self.path)


def _worker_of(pid: int) -> int:
    """Whose timer it is: a worker leads the session that its children are in, Python below a wrapper (PYTHON_EXEC) too.

    A process that has ended, or left that session, stands for itself, which is nobody's worker.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, _, _, session = file.read().rpartition(b")")[2].split()[:4]
    except OSError:
        return pid
    return pid if state in b"ZX" or session == b"0" else int(session)


def _remove_stale(path: str) -> None:
    """Remove a named pipe that an agent left which was killed.

    Raises:
        OSError: there is something else, or somebody reads the pipe.
    """
    if not stat.S_ISFIFO(os.lstat(path).st_mode):
        raise FileExistsError(errno.EEXIST, "there is a file that is no named pipe")
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        os.unlink(path)
    else:
        raise FileExistsError(errno.EEXIST, "another agent reads the one that is there")
