"""The launcher's exceptions and exit statuses, and the failures of workers.

Values only, apart from ``ProcessFailure``: it reads its error file if a program makes one by hand, or asks for more
than the launcher has kept.

Errors are also of the built-in types that torch raises in such cases, so that programs catch what they caught there.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, Self


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


_TORCHS = {
    "ChildFailedError": "torch.distributed.elastic.multiprocessing.errors",
    "SignalException": "torch.distributed.elastic.multiprocessing.api",
    **dict.fromkeys(
        [f"Rendezvous{kind}Error" for kind in ("", "Closed", "Connection", "GracefulExit", "State", "Timeout")],
        "torch.distributed.elastic.rendezvous.api",
    ),
}
"""Errors that torch has under the same name, and the module there."""


class AlsoTorchs(Exception):  # noqa: N818 - no error by itself
    """An error that is an instance of torch's class, too, if the program has loaded that: ``except`` with either works.

    The class of the same name must not rely on ``super().__init__``, which may be torch's.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Create the error, of a class that is torch's, too, if there is one."""
        for ours in cls.__mro__:
            if ours.__module__ == __name__ and ours.__name__ in _TORCHS:
                theirs = getattr(sys.modules.get(_TORCHS[ours.__name__]), ours.__name__, None)
                if theirs and not issubclass(cls, theirs):
                    kind: Any = cls
                    joined: type[Self] = _joined(kind, theirs)
                    return super().__new__(joined, *args)
                break
        return super().__new__(cls, *args)


@functools.cache
def _joined(ours: Any, theirs: Any) -> Any:
    def reduce(self: AlsoTorchs) -> tuple[Any, ...]:
        return ours, *ours.__reduce__(self)[1:]  # for pickle, which has to find the class by its name

    names = {"__module__": ours.__module__, "__qualname__": ours.__qualname__, "__doc__": ours.__doc__}
    return type(ours.__name__, (ours, theirs), {**names, "__reduce__": reduce})


class LaunchError(RuntimeError):
    """The launcher could not do its work. The message says in one line what failed, where, and what to do about it."""

    exit_code: int = ExitCode.SOFTWARE
    """The exit status of a launcher that ends with this error."""


class UsageError(LaunchError, ValueError):
    """An option, variable or argument is wrong. The message names it, its value, and what is allowed."""

    exit_code = ExitCode.USAGE


class UnavailableError(LaunchError):
    """Something outside the launcher that the job needs is missing or in use."""

    exit_code: int = ExitCode.UNAVAILABLE


class LogDirectoryError(UnavailableError, NotADirectoryError):
    """The directory for the job's files is something else."""


class ProgramNotFoundError(UsageError, FileNotFoundError):
    """The program to run does not exist."""


class RendezvousError(AlsoTorchs, UnavailableError):
    """The nodes could not meet, or could not go on together."""

    def __init__(self, message: str = "", exit_code: int | None = None) -> None:
        """Create the error.

        Args:
            message: what failed, in one line.
            exit_code: the exit status of the launcher; None for that of the class.
        """
        Exception.__init__(self, message)
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


class SignalException(AlsoTorchs):
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
        Exception.__init__(self, msg)
        self.sigval = sigval

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.sigval)  # for pickle: a process of a pool may raise it

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


NO_FILE = "<N/A>"
"""Stands for the path of an error file that does not exist; torch's text."""
_MAX_FILE = 4 << 20
"""Bytes of the largest error file that a failure reads."""


@dataclass(unsafe_hash=True)
class ProcessFailure:
    """The failure of one worker. The first four fields are torch's, in its order, and so are the properties.

    If only those four are given, the rest is read from the error file; without one, the worker failed just now.

    >>> failure = ProcessFailure(local_rank=1, pid=4711, exitcode=-9, rank=9, host="node-2")
    >>> failure.headline(), failure.status()
    ('rank 9 on node-2 failed (killed by SIGKILL)', 137)
    >>> failure.message
    'Signal 9 (SIGKILL) received by PID 4711'
    """

    local_rank: int
    """Rank of the worker on its node."""
    pid: int
    """Process id; -1 if the process could not be started."""
    exitcode: int
    """The exit status, or minus the number of the signal that killed the worker."""
    error_file: str = NO_FILE
    """Path of the JSON file that the worker wrote its exception to; ``<N/A>`` for none."""
    error: str = ""
    """The exception in one line, as in ``ValueError: boom``; empty if there was none."""
    traceback: str = ""
    """The traceback of the exception; empty if there was none."""
    stderr: str = ""
    """The last lines of the worker's stderr if it left no exception."""
    note: str = ""
    """A remark on the cause: that memory ran out, or that the worker hung and where its stacks are."""
    failed_at: float = -1.0
    """When the worker failed, in seconds since 1970 by the clock of its host; 0 if unknown."""
    rank: int = -1
    """Global rank; -1 if unknown."""
    host: str = ""
    """Name of the worker's host."""
    is_hang: bool = False
    """Whether the worker was running, but made no progress; ``exitcode`` is then ``ExitCode.HANG``."""

    def __post_init__(self) -> None:
        if self.failed_at < 0:  # made by hand
            self._read_error_file()

    def _read_error_file(self) -> None:
        """Fill in what torch's class would read."""
        data = _read_json(self.error_file)
        message = data.get("message")
        if not message:
            self.failed_at = time.time()
            self.error_file = self.error_file if os.path.isfile(self.error_file) else NO_FILE
            return
        is_dict = isinstance(message, dict)
        extra = message.get("extraInfo") if is_dict else data
        extra = extra if isinstance(extra, dict) else {}
        self.error = self.error or str(message.get("message", "") if is_dict else message)
        self.traceback = self.traceback or str(extra.get("py_callstack", self.error))
        at = str(extra.get("timestamp", 0))
        self.failed_at = float(at) if at.isascii() and at.isdigit() and len(at) < 12 else 0.0

    @cached_property
    def error_file_data(self) -> dict[str, Any]:
        """The content of the error file; if it is not on this host, what the launcher knows of it.

        >>> ProcessFailure(0, 5, 1, error="ValueError: boom", traceback="...", failed_at=9.5).error_file_data
        {'message': {'message': 'ValueError: boom', 'extraInfo': {'py_callstack': '...', 'timestamp': '9'}}}
        """
        if not self.error:
            traits = {"category": "system_terminated_error", "retryability": "False"}
            return {"message": "<NONE>", "errorTraits": traits}
        is_here = self.host in ("", os.uname().nodename)
        if is_here and (data := _read_json(self.error_file)).get("message"):
            return data
        extra = {"py_callstack": self.traceback, "timestamp": str(self.timestamp)}
        return {"message": {"message": self.error, "extraInfo": extra}}

    @cached_property
    def message(self) -> Any:
        """What the error file says under ``message``: a dict, or a text. Without an exception, how the worker ended.

        >>> failure = ProcessFailure(0, 5, 1, error="ValueError: boom", traceback="Traceback ...")
        >>> failure.message["extraInfo"]["py_callstack"]
        'Traceback ...'
        """
        if self.error:
            return self.error_file_data["message"]
        if self.exitcode < 0:
            return f"Signal {-self.exitcode} ({self.signal_name()}) received by PID {self.pid}"
        return f"The process (pid {self.pid}) ended: {self.how()}."

    @cached_property
    def timestamp(self) -> int:
        """When the worker failed, in whole seconds since 1970."""
        return int(self.failed_at)

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


def _read_json(path: str) -> dict[str, Any]:
    """Return the content of an error file; empty if it is not one."""
    if not os.path.isfile(path):  # nor a pipe, which could make this process wait
        return {}
    import json  # late: few programs ask for it

    try:
        with open(path, "rb") as file:
            data = json.loads(file.read(_MAX_FILE).decode("utf-8", "replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


class ChildFailedError(AlsoTorchs):
    """The job failed because workers failed. Its text is the whole report.

    >>> error = ChildFailedError("train.py", {9: ProcessFailure(local_rank=1, pid=4711, exitcode=-9)})
    >>> error.exit_code
    137
    >>> print(error)  # doctest: +ELLIPSIS
    ================================================================================
    train.py FAILED
    --------------------------------------------------------------------------------
    Cause
      rank    : 9 (local rank 1, pid 4711)
      exit    : killed by SIGKILL
      time    : ...
    ================================================================================
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
        first, _ = self.get_first_failure()
        ranks = sorted(failures, key=lambda rank: (rank != first, failures[rank].failed_at))
        lines = [RULE, *report_head(name, [(rank, failures[rank]) for rank in ranks]), RULE]
        Exception.__init__(self, report or "\n".join(lines))

    def __reduce__(self) -> tuple[type[ChildFailedError], tuple[str, dict[int, ProcessFailure], str]]:
        return type(self), (self.name, self.failures, self._report)  # for pickle: a worker may raise it

    def get_first_failure(self) -> tuple[int, ProcessFailure]:
        """Return the global rank and the failure of the worker that is the cause."""
        if self._report:
            return next(iter(self.failures.items()))
        return min(self.failures.items(), key=lambda item: item[1].failed_at or float("inf"))  # 0: unknown

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


RULE = "=" * 80
"""First and last line of a report."""
_MAX_LINES = 200
"""Maximum lines of a traceback or of stderr."""
_MAX_LINE = 2000
"""Maximum characters of a line of a traceback or of stderr."""


def report_head(name: str, failures: Sequence[tuple[int, ProcessFailure]]) -> list[str]:
    """Return the lines of a report that describe failures, between its first line and the one on restarts.

    Args:
        name: what the workers ran.
        failures: at least one global rank and its failure, the cause first.
    """
    (rank, cause), *consequences = failures
    lines = [
        f"{name} FAILED",
        "-" * len(RULE),
        "Cause",
        f"  rank    : {rank} (local rank {cause.local_rank}, {_pid(cause)}){_where(cause)}",
        f"  exit    : {cause.how()}",
        f"  time    : {_time(cause)}",
    ]
    if cause.note:
        lines += [f"  note    : {cause.note}"]
    if cause.error:
        lines += [f"  error   : {cause.error_line()}"]
        lines += _indented(cause.traceback) if cause.traceback not in ("", cause.error) else []
    elif cause.stderr:
        lines += ["  stderr  : its last lines", *_indented(cause.stderr)]
    if consequences:
        lines += ["Then", *(f"  {_consequence(*consequence)}" for consequence in consequences)]
    return lines


def _consequence(rank: int, failure: ProcessFailure) -> str:
    error = f", {failure.error_line()}" if failure.error else ""
    error += f"; {failure.note}" if failure.note else ""
    return f"{_time(failure)} rank {rank}{_where(failure)} ({_pid(failure)}): {failure.how()}{error}"


def _where(failure: ProcessFailure) -> str:
    return f" on {failure.host}" if failure.host else ""


def _pid(failure: ProcessFailure) -> str:
    return f"pid {failure.pid}" if failure.pid > 0 else "not started"


def _time(failure: ProcessFailure) -> str:
    millis = int(failure.failed_at % 1 * 1000)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(failure.failed_at))}.{millis:03d}"


def _indented(text: str) -> list[str]:
    """Return the lines of a text, indented. The ends of a text and of a line are worth more than their middles."""
    lines = text.rstrip().split("\n")
    if len(lines) > _MAX_LINES:
        half = _MAX_LINES // 2
        lines = [*lines[:half], f"... {len(lines) - 2 * half} lines left out ...", *lines[-half:]]
    return [f"    {_cut(line)}" for line in lines]


def _cut(line: str) -> str:
    half = _MAX_LINE // 2
    more = len(line) - 2 * half
    return line if more <= 0 else f"{line[:half]} ... {more} characters left out ... {line[-half:]}"
