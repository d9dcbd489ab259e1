"""Find out which workers failed, and which failure was the cause.

A worker that the agent stopped did not fail. Of the workers that failed, the earliest is the cause. But an error that
is plainly a consequence of a peer's death, such as a closed connection, ranks after all others: a survivor may raise it
before the agent has seen that death.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from elastic_launch.core.text import visible
from elastic_launch.errors import NO_FILE, ProcessFailure
from elastic_launch.job import Assignment

_CONSEQUENCE = re.compile(
    r"connection (was )?(closed|reset|aborted)|broken pipe|socket closed|remote (process|peer) (exited|closed)"
    r"|pair closure|got 0 bytes|ncclRemoteError|NCCL.{0,200}?(remote error|abort)",
    re.IGNORECASE,
)
"""What gloo, NCCL, torch's TCPStore and sockets report when a peer is gone."""
_PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)


class ErrorRecord(NamedTuple):
    """The exception that a worker wrote to its error file."""

    error: str
    """Type and message: ``ValueError: boom``."""
    traceback: str
    time: float
    """When the exception was raised, in seconds since 1970."""
    path: str
    """Path of the error file."""


class Evidence(NamedTuple):
    """What is known about a worker's exit besides its exit status."""

    error: ErrorRecord | None = None
    stderr: str = ""
    """The last lines that the worker wrote to stderr."""
    note: str = ""
    """A remark on the cause, as in ``ProcessFailure.note``."""


NOTHING = Evidence()


class Exit(NamedTuple):
    """The exit of a worker process."""

    local_rank: int
    exitcode: int
    """The exit status, or minus the number of the signal that killed the process."""
    time: float
    """Seconds since 1970."""
    stop_signals: tuple[int, ...] = ()
    """Signals that the agent had sent to stop the worker before it exited."""


def judge(
    exits: Sequence[Exit],
    evidence: Mapping[int, Evidence],
    pids: Mapping[int, int],
    assignment: Assignment,
    stopped_at: float,
) -> tuple[ProcessFailure, ...]:
    """Return the failures among a round's exits, the cause first.

    Args:
        exits: how the round's workers exited.
        evidence: what else is known, by local rank.
        pids: process ids by local rank; a worker that could not be started has none.
        assignment: the node's ranks in the round.
        stopped_at: when the agent began to stop the workers, in seconds since 1970.
    """
    failures = [
        failure_of(_without_stop_signal(exit_), evidence, pids, assignment)
        for exit_ in exits
        if _is_failure(exit_, evidence.get(exit_.local_rank, NOTHING).error, stopped_at)
    ]
    return tuple(sorted(failures, key=lambda f: (is_consequence(f), f.failed_at, f.rank)))


def is_port_clash(failure: ProcessFailure, port: int) -> bool:
    """Return whether a worker failed because the port for the workers' store was taken; False for port 0."""
    text = f"{failure.error}\n{failure.traceback}"
    return port > 0 and bool(_PORT_TAKEN.search(text) and re.search(rf"(?<!\d){port}(?!\d)", text))


def _is_failure(exit_: Exit, error: ErrorRecord | None, stopped_at: float) -> bool:
    if exit_.exitcode == 0:
        return False
    if not exit_.stop_signals or (error is not None and error.time < stopped_at):
        return True
    # A stopped worker may exit with any status. But SIGSEGV, say, is a failure: the agent did not send it.
    return exit_.exitcode < 0 and -exit_.exitcode not in exit_.stop_signals


def _without_stop_signal(exit_: Exit) -> Exit:
    """Replace the agent's stop signal by 1, Python's status after the exception that the worker had raised before."""
    return exit_._replace(exitcode=1) if -exit_.exitcode in exit_.stop_signals else exit_


def is_consequence(failure: ProcessFailure) -> bool:
    """Return whether the error, or what an aborted process wrote last, is plainly the loss of a peer."""
    last_lines = failure.stderr if failure.exitcode == -signal.SIGABRT else ""
    return _CONSEQUENCE.search(failure.error or last_lines) is not None


def failure_of(
    exit_: Exit, evidence: Mapping[int, Evidence], pids: Mapping[int, int], assignment: Assignment
) -> ProcessFailure:
    """Describe a worker's exit as a failure; the arguments are those of ``judge``.

    What the worker has written is made visible here, because lines and reports show it.
    """
    error, stderr, note = evidence.get(exit_.local_rank, NOTHING)
    return ProcessFailure(
        local_rank=exit_.local_rank,
        pid=pids.get(exit_.local_rank, -1),
        exitcode=exit_.exitcode,
        error_file=error.path if error else NO_FILE,
        error=visible(error.error, lines=True) if error else "",
        traceback=visible(error.traceback, lines=True) if error else "",
        failed_at=min(error.time, exit_.time) if error else exit_.time,
        rank=assignment.rank(exit_.local_rank),
        host=assignment.host,
        stderr="" if error else visible(stderr, lines=True),
        note=note,
    )
