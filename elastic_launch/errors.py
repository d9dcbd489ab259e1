"""Layer 0: what can go wrong, as types with fields, and the exit statuses that tell it to a shell.

Values only: nothing here reads a file, a clock or the environment.
"""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """Exit statuses of the launcher itself. A worker that fails gives its own: N, or 128 + the signal's number.

    The numbers above 64 are those of BSD's sysexits.h.
    """

    USAGE = 2
    """An option, variable or argument is wrong; nothing was started."""
    UNAVAILABLE = 69
    """Something that the job needs is not to be had: a port in use, a log directory that cannot be written."""
    SOFTWARE = 70
    """The launcher failed at its own work."""
    TIMEOUT = 75
    """Not enough nodes met in time; trying again later may help."""
    CANNOT_EXECUTE = 126
    """A worker's command was found and could not be executed (the shell's convention)."""
    NOT_FOUND = 127
    """A worker's command was not found (the shell's convention)."""


class LaunchError(Exception):
    """The launcher could not do its work. The message is one line: what, where, and what to do next."""

    exit_code: int = ExitCode.SOFTWARE


class UsageError(LaunchError, ValueError):
    """An option, variable or argument is wrong. The message names it, its value, and what is allowed."""

    exit_code = ExitCode.USAGE


class UnavailableError(LaunchError):
    """Something outside the launcher that the job needs is missing or taken."""

    exit_code: int = ExitCode.UNAVAILABLE


class RendezvousError(UnavailableError):
    """Nodes could not meet, or go on. This and the names below are torch's."""

    def __init__(self, message: str = "", exit_code: int | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code


class RendezvousTimeoutError(RendezvousError):
    """Not enough nodes came in time; the message names those that did."""

    exit_code: int = ExitCode.TIMEOUT


class RendezvousConnectionError(RendezvousError):
    """The store where nodes meet cannot be reached, is lost, or is none."""


class RendezvousStateError(RendezvousError):
    """The store holds what nobody of this job can have written."""


class RendezvousClosedError(RendezvousError):
    """The job has ended already."""


class RendezvousGracefulExitError(RendezvousError):
    """The job goes on without this node."""


class SignalException(Exception):  # noqa: N818 - the name is torch's, and callers catch it by that name
    """A signal ended the job; its workers are stopped. ``sigval`` is the signal."""

    def __init__(self, msg: str, sigval: signal.Signals) -> None:
        super().__init__(msg)
        self.sigval = sigval

    @property
    def exit_code(self) -> int:
        """128 + the signal's number."""
        return 128 + self.sigval


def signal_name(signum: int) -> str:
    """``SIGTERM`` for 15; ``signal 99`` for a number without a name (real-time signals among them)."""
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def how_it_ended(exitcode: int) -> str:
    """``exit code 42``, or ``killed by SIGKILL`` for -9."""
    return f"killed by {signal_name(-exitcode)}" if exitcode < 0 else f"exit code {exitcode}"


def shell_status(exitcode: int) -> int:
    """The exit status that a shell would show: the exit code, or 128 + the signal's number for a negative one."""
    return 128 - exitcode if exitcode < 0 else exitcode


@dataclass(frozen=True)
class ProcessFailure:
    """One worker that failed. The first four fields are torch's and stand in its order.

    torch's reads the rest from ``error_file`` when it is made; this one is told it, and reads nothing.
    """

    local_rank: int
    pid: int
    """-1 where the process could not be started."""
    exitcode: int
    """The exit status, or minus the signal's number."""
    error_file: str = "<N/A>"
    """The JSON file that the worker's exception was read from."""
    error: str = ""
    """The exception in one line, ``ValueError: boom``; empty where there was none."""
    message: str = ""
    """The traceback where there is one, else a sentence on how the worker ended, which is made where none is given."""
    stderr: str = ""
    """The last lines that it wrote to stderr, where it left no exception."""
    note: str = ""
    """What else is known of its end: that memory ran out, that it hung, and where its stacks are."""
    timestamp: float = 0.0
    """When it failed, in seconds since 1970, on the worker's host: for people, and for order within one host."""
    rank: int = -1
    """Global rank."""
    host: str = ""

    def __post_init__(self) -> None:
        if not self.error and not self.message:
            object.__setattr__(self, "message", f"The process (pid {self.pid}) ended: {self.how()}.")

    @property
    def error_file_data(self) -> dict[str, Any]:
        """What an error file says of such a failure, in torch's form; of one without an exception, its message."""
        extra = {"py_callstack": self.message, "timestamp": str(int(self.timestamp))}
        return {"message": {"message": self.error or self.message, "extraInfo": extra}}

    def timestamp_isoformat(self) -> str:
        """When it failed, ``2026-01-31_23:59:59`` in local time."""
        return time.strftime("%Y-%m-%d_%H:%M:%S", time.localtime(self.timestamp))

    def signal_name(self) -> str:
        """The signal that killed the worker, ``<N/A>`` where none did."""
        return signal_name(-self.exitcode) if self.exitcode < 0 else "<N/A>"

    def how(self) -> str:
        """How the process ended, in words: ``exit code 42`` or ``killed by SIGKILL``."""
        return how_it_ended(self.exitcode)

    def error_line(self) -> str:
        """The exception in one line of moderate length; some of torch's C++ errors are pages long."""
        line = self.error.split("\n", 1)[0]
        return line if len(line) <= 500 else f"{line[:500]} ..."

    def headline(self, with_host: bool = True) -> str:
        """``rank 3 on host-b failed (exit code 1, ValueError: boom)``."""
        where = f" on {self.host}" if with_host else ""
        return f"rank {self.rank}{where} failed ({', '.join(filter(None, (self.how(), self.error_line())))})"

    def status(self) -> int:
        """The exit status that a shell would show: the exit code, or 128 + the signal's number."""
        return shell_status(self.exitcode)


class ChildFailedError(Exception):
    """The job failed because workers did.

    ``failures`` maps global rank to failure. ``str()`` of the error is the whole report.
    """

    def __init__(self, name: str, failures: dict[int, ProcessFailure], report: str = "") -> None:
        """As torch's.

        Args:
            name: what was run.
            failures: at least one.
            report: the launcher's, which has put the cause first in ``failures``; without it, that is the earliest one.

        Raises:
            ValueError: there are no failures.
        """
        if not failures:
            raise ValueError("ChildFailedError needs at least one failure")
        self.name = name
        self.failures = failures
        self._report = report
        rank, cause = self.get_first_failure()
        super().__init__(report or f"{name} FAILED: rank {rank}: {cause.error or cause.how()}")

    def __reduce__(self) -> tuple[type[ChildFailedError], tuple[str, dict[int, ProcessFailure], str]]:
        return type(self), (self.name, self.failures, self._report)  # for other processes, as a function's exception

    def get_first_failure(self) -> tuple[int, ProcessFailure]:
        """The cause: its global rank and the failure."""
        if self._report:
            return next(iter(self.failures.items()))
        # As torch; the time of one that was made by hand may be unknown.
        return min(self.failures.items(), key=lambda item: item[1].timestamp or float("inf"))

    def format_msg(self, boarder_delim: str = "=", section_delim: str = "-") -> str:
        """The report, as text.

        Args:
            boarder_delim: what its outermost lines are drawn with (torch's name and spelling).
            section_delim: what its inner lines are drawn with.
        """
        drawn = str.maketrans({"=": boarder_delim, "-": section_delim})
        lines = str(self).split("\n")
        return "\n".join(line if line.strip("=-") else line.translate(drawn) for line in lines)

    @property
    def exit_code(self) -> int:
        """The exit status of the cause, as a shell shows it."""
        return self.get_first_failure()[1].status()
