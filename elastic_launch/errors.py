"""The launcher's exceptions and exit statuses, and the failures of workers.

Values only: nothing here reads a file, a clock or the environment.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """Exit statuses of the launcher itself. Those from 69 to 75 are the ones of sysexits.h.

    If a worker fails, the status is the worker's: N, or 128 + N for signal N.
    """

    USAGE = 2
    """An option, variable or argument is wrong. Nothing was started."""
    UNAVAILABLE = 69
    """The job needs something that is unavailable, such as a port in use or a log directory that cannot be created."""
    SOFTWARE = 70
    """The launcher failed because of a defect in it."""
    TIMEOUT = 75
    """Not enough nodes met in time. Trying again later may help."""
    HANG = 124
    """The workers made no progress any more, and ``--hang-action`` ended the job; timeout(1) has the same status."""
    CANNOT_EXECUTE = 126
    """A worker's command was found but could not be executed, by the shell's convention."""
    NOT_FOUND = 127
    """A worker's command was not found, by the shell's convention."""


class LaunchError(Exception):
    """The launcher could not do its work. The message says in one line what failed, where, and what to do about it."""

    exit_code: int = ExitCode.SOFTWARE
    """The exit status of a launcher that ends with this error."""


class UsageError(LaunchError, ValueError):
    """An option, variable or argument is wrong. The message names it, its value, and what is allowed."""

    exit_code = ExitCode.USAGE


class UnavailableError(LaunchError):
    """Something outside the launcher that the job needs is missing or in use."""

    exit_code: int = ExitCode.UNAVAILABLE


class RendezvousError(UnavailableError):
    """The nodes could not meet, or could not go on together."""

    def __init__(self, message: str = "", exit_code: int | None = None) -> None:
        """Create the error.

        Args:
            message: what failed, in one line.
            exit_code: the exit status of the launcher; None for that of the class.
        """
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code


class RendezvousTimeoutError(RendezvousError):
    """Not enough nodes joined in time. The message names those that did."""

    exit_code: int = ExitCode.TIMEOUT


class RendezvousConnectionError(RendezvousError):
    """The store where the nodes meet cannot be reached, has been lost, or is not a store."""


class RendezvousStateError(RendezvousError):
    """The store holds data that no node of this job can have written."""


class RendezvousClosedError(RendezvousError):
    """The job has already ended."""


class RendezvousGracefulExitError(RendezvousError):
    """The job continues without this node."""


class SignalException(Exception):  # noqa: N818 - torch's name, by which programs catch it
    """A signal ended the job. Its workers have been stopped.

    >>> SignalException("stopped by SIGTERM", signal.SIGTERM).exit_code
    143
    """

    def __init__(self, msg: str, sigval: signal.Signals) -> None:
        """Create the error.

        Args:
            msg: what happened, in one line.
            sigval: the signal, which becomes the attribute ``sigval``.
        """
        super().__init__(msg)
        self.sigval = sigval

    @property
    def exit_code(self) -> int:
        """The exit status of the launcher: 128 + the signal's number."""
        return 128 + self.sigval


def signal_name(signum: int) -> str:
    """Return a signal's name; ``signal N`` if it has none, as for most real-time signals.

    >>> signal_name(15), signal_name(40)
    ('SIGTERM', 'signal 40')
    """
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def how_it_ended(exitcode: int) -> str:
    """Describe an exit code in words; a negative one is minus a signal's number.

    >>> how_it_ended(42), how_it_ended(-9)
    ('exit code 42', 'killed by SIGKILL')
    """
    return f"killed by {signal_name(-exitcode)}" if exitcode < 0 else f"exit code {exitcode}"


@dataclass(frozen=True)
class ProcessFailure:
    """The failure of one worker. The first four fields are those of torch, in its order.

    Unlike torch's class, it never reads ``error_file``: the other fields hold what the file contains.

    >>> failure = ProcessFailure(local_rank=1, pid=4711, exitcode=-9, rank=9, host="node-2")
    >>> failure.headline(), failure.status()
    ('rank 9 on node-2 failed (killed by SIGKILL)', 137)
    """

    local_rank: int
    """Rank of the worker on its node."""
    pid: int
    """Process id; -1 if the process could not be started."""
    exitcode: int
    """The exit status, or minus the number of the signal that killed the worker."""
    error_file: str = "<N/A>"
    """Path of the JSON file that the worker wrote its exception to."""
    error: str = ""
    """The exception in one line, as in ``ValueError: boom``; empty if there was none."""
    message: str = ""
    """The traceback if there is an exception, or else a sentence that says how the worker ended."""
    stderr: str = ""
    """The last lines of the worker's stderr if it left no exception."""
    note: str = ""
    """A remark on the cause: that memory ran out, or that the worker hung and where its stacks are."""
    timestamp: float = 0.0
    """When the worker failed, in seconds since 1970 by the clock of its host; 0 if unknown."""
    rank: int = -1
    """Global rank; -1 if unknown."""
    host: str = ""
    """Name of the worker's host."""
    is_hang: bool = False
    """Whether the worker was running, but made no progress; ``exitcode`` is then ``ExitCode.HANG``."""

    def __post_init__(self) -> None:
        if not self.error and not self.message:
            object.__setattr__(self, "message", f"The process (pid {self.pid}) ended: {self.how()}.")

    @property
    def error_file_data(self) -> dict[str, Any]:
        """The content of an error file in torch's format. Without an exception, ``message`` stands in for it."""
        extra = {"py_callstack": self.message, "timestamp": str(int(self.timestamp))}
        return {"message": {"message": self.error or self.message, "extraInfo": extra}}

    def timestamp_isoformat(self) -> str:
        """Return when the worker failed, as in ``2026-01-31_23:59:59``, in local time."""
        return time.strftime("%Y-%m-%d_%H:%M:%S", time.localtime(self.timestamp))

    def signal_name(self) -> str:
        """Return the name of the signal that killed the worker; ``<N/A>`` if none did."""
        return signal_name(-self.exitcode) if self.exitcode < 0 else "<N/A>"

    def how(self) -> str:
        """Return how the process ended: ``exit code 42``, ``killed by SIGKILL``, or ``hang`` if it did not."""
        return "hang" if self.is_hang else how_it_ended(self.exitcode)

    def error_line(self) -> str:
        """Return the first line of the exception, at most 500 characters of it: some of torch's are pages long."""
        line = self.error.split("\n", 1)[0]
        return line if len(line) <= 500 else f"{line[:500]} ..."

    def headline(self, with_host: bool = True) -> str:
        """Return the failure in one line, as in ``rank 3 on host-b failed (exit code 1, ValueError: boom)``."""
        where = f" on {self.host}" if with_host else ""
        return f"rank {self.rank}{where} failed ({', '.join(filter(None, (self.how(), self.error_line())))})"

    def status(self) -> int:
        """Return the exit status that a shell would show: the exit code, or 128 + the signal's number."""
        return 128 - self.exitcode if self.exitcode < 0 else self.exitcode


class ChildFailedError(Exception):
    """The job failed because workers failed. Its text is the whole report.

    >>> error = ChildFailedError("train.py", {9: ProcessFailure(local_rank=1, pid=4711, exitcode=-9)})
    >>> str(error), error.exit_code
    ('train.py FAILED: rank 9: killed by SIGKILL', 137)
    """

    def __init__(self, name: str, failures: dict[int, ProcessFailure], report: str = "") -> None:
        """Create the error.

        Args:
            name: what the workers ran, which becomes the attribute ``name``.
            failures: at least one failure, by global rank, which become the attribute ``failures``.
            report: the launcher's report. With a report, the first of ``failures`` is the cause; without one, the
                earliest is.

        Raises:
            ValueError: ``failures`` is empty.
        """
        if not failures:
            raise ValueError("ChildFailedError needs at least one failure")
        self.name = name
        self.failures = failures
        self._report = report
        rank, cause = self.get_first_failure()
        super().__init__(report or f"{name} FAILED: rank {rank}: {cause.error or cause.how()}")

    def __reduce__(self) -> tuple[type[ChildFailedError], tuple[str, dict[int, ProcessFailure], str]]:
        return type(self), (self.name, self.failures, self._report)  # for pickle: a worker may raise it

    def get_first_failure(self) -> tuple[int, ProcessFailure]:
        """Return the global rank and the failure of the worker that is the cause."""
        if self._report:
            return next(iter(self.failures.items()))
        return min(self.failures.items(), key=lambda item: item[1].timestamp or float("inf"))  # 0: unknown

    def format_msg(self, boarder_delim: str = "=", section_delim: str = "-") -> str:
        """Return the report.

        Args:
            boarder_delim: the character of its outermost lines (torch's spelling).
            section_delim: the character of its inner lines.
        """
        drawn = str.maketrans({"=": boarder_delim, "-": section_delim})
        lines = str(self).split("\n")
        return "\n".join(line if line.strip("=-") else line.translate(drawn) for line in lines)

    @property
    def exit_code(self) -> int:
        """The exit status of the cause, as a shell shows it."""
        return self.get_first_failure()[1].status()
