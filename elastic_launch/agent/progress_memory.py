"""The memory in which workers tell their progress and write their stacks: the agent's side.

The agent looks whenever it wants to. Workers write without a system call, and without waking anybody.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Mapping

from elastic_launch.core.progress.memory import HOLD, LEASE, PAGE, STOP_AT, WorkerProgress, decode, header
from elastic_launch.errors import UnavailableError
from elastic_launch.host.memory_files import memory_file, moved

SWITCH = "ELASTIC_LAUNCH_PROGRESS"
"""The variable that turns all of this off, if it is 0."""
VARIABLE = "ELASTIC_LAUNCH_PROGRESS_FD"
"""The variable that gives a worker the numbers of its two descriptors: ``MEMORY,NOTIFY``."""
FOREVER = 1e9
"""A time on ``time.monotonic`` that no job lives to see. A lease of twenty times as long would not fit in its word."""
MAX_STACKS = 1 << 20
"""Bytes of a worker's stacks that are read."""


class ProgressMemory:
    """The memory files of one node's workers, round after round, and a descriptor by which workers report.

    ``fileno()`` becomes readable once a worker has set up its counting, so an agent whose job never steps sleeps on.
    """

    def __init__(self, reads_stacks: bool = True) -> None:
        """Make the descriptor for reports.

        Args:
            reads_stacks: whether workers write their stacks to these files. A launcher that is itself a worker leaves
                them on stderr, where the launcher above finds them.

        Raises:
            UnavailableError: the system grants no more descriptors.
        """
        self.reads_stacks = reads_stacks
        """Whether workers write their stacks to these files."""
        self._lease = 0
        """The word LEASE."""
        self._files: dict[int, int] = {}
        """The memory files, by local rank."""
        try:
            self._notify = moved(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except OSError as error:
            raise _unavailable(error) from error

    def prepare(self, local_ranks: Iterable[int]) -> None:
        """Make new files for the workers of a round, and close those of the last one.

        Raises:
            UnavailableError: the system grants no more descriptors or no memory. There are no files then.
        """
        self._close_files()
        try:
            for rank in local_ranks:
                self._files[rank] = fd = memory_file("progress")
                os.truncate(fd, PAGE)
                os.pwrite(fd, header(self.reads_stacks, self._lease), 0)
        except OSError as error:
            self._close_files()  # no worker gets one, so none may seem to stand still
            raise _unavailable(error) from error

    def ranks(self) -> list[int]:
        """Return the local ranks of the round's workers."""
        return list(self._files)

    def environ(self, local_rank: int) -> dict[str, str]:
        """Return the variable that tells a worker where its memory is."""
        return {VARIABLE: f"{self._files[local_rank]},{self._notify}"}

    def descriptors(self, local_rank: int) -> list[tuple[int, int]]:
        """Return a worker's descriptors with their numbers there, as for ``Command``.

        They keep their numbers where these are free. The keeper corrects the variable where they are not.
        """
        return [(fd, -fd) for fd in (self._files[local_rank], self._notify)]

    def read(self, local_rank: int) -> WorkerProgress:
        """Return what a worker of this round has told."""
        return decode(os.pread(self._files[local_rank], PAGE, 0))

    def set_stop(self, hold: int, stop_at: int) -> None:
        """Tell all workers when to stop.

        Args:
            hold: 1 to have ``should_stop()`` wait until ``stop_at`` is set or ``hold`` is 0 again.
            stop_at: the number of the call of ``should_stop()``, from 1, from which on it is true; 0 for none.
        """
        for fd in self._files.values():
            _write(fd, STOP_AT, stop_at)
            _write(fd, HOLD, hold)  # last: a worker that sees it acts

    def set_lease(self, until: float) -> None:
        """Let the workers, and those of later rounds, make steps until a time on ``time.monotonic``; inf for ever.

        They compare it with a clock that goes on while the machine is suspended.
        """
        ahead = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
        self._lease = 0 if until > FOREVER else max(1, round(until * 1e9) + ahead)
        for fd in self._files.values():
            _write(fd, LEASE, self._lease)

    def rewind(self, local_rank: int) -> None:
        """Discard a worker's stacks, so that those that it is about to be asked for stand alone."""
        fd = self._files[local_rank]
        os.truncate(fd, PAGE)
        os.lseek(fd, PAGE, os.SEEK_SET)  # the worker shares the position

    def stacks(self, local_rank: int) -> bytes:
        """Return what a worker has written since ``rewind``, up to ``MAX_STACKS``."""
        return os.pread(self._files[local_rank], MAX_STACKS, PAGE)

    def is_open_in(self, pid: int, local_rank: int) -> bool:
        """Return whether a process has a worker's file open under the number that the worker was given."""
        fd = self._files[local_rank]
        try:
            there = os.stat(f"/proc/{pid}/fd/{fd}")
        except OSError:  # it has ended, has closed it, or belongs to another user
            return False
        return os.path.samestat(there, os.fstat(fd))

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._notify

    def clear(self) -> None:
        """Take notice of the reports so far."""
        with contextlib.suppress(BlockingIOError):  # there are none
            os.eventfd_read(self._notify)

    def close(self) -> None:
        """Close everything."""
        self._close_files()
        os.close(self._notify)

    def _close_files(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


def progress_memory(environ: Mapping[str, str]) -> ProgressMemory | None:
    """Return the memory for the workers of an agent with this environment; None if the environment turns it off.

    Raises:
        UnavailableError: the system grants no more descriptors.
    """
    if environ.get(SWITCH) == "0":
        return None
    return ProgressMemory(reads_stacks="TORCHELASTIC_RUN_ID" not in environ)


def _write(fd: int, word: int, value: int) -> None:
    """Write one word of a memory file."""
    os.pwrite(fd, value.to_bytes(8, sys.byteorder), 8 * word)


def _unavailable(error: OSError) -> UnavailableError:
    return UnavailableError(
        f"cannot make memory for the workers' progress: {error.strerror}; allow larger files and more of them "
        f"(`ulimit -f`, `ulimit -n`), or set {SWITCH}=0 to do without"
    )
