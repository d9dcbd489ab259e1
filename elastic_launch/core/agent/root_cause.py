"""Layer 1: which workers failed, and which of them was the cause. Pure.

A worker that the agent stopped did not fail. Of those that failed, the earliest is the cause, but an error that is
plainly the consequence of a peer's death (its connection was closed) comes after every error that is not: the survivor
of a SIGKILL can raise before the agent has seen the death.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from elastic_launch.errors import ProcessFailure
from elastic_launch.job import Assignment

_CONSEQUENCE = re.compile(
    r"connection (was )?(closed|reset|aborted)|broken pipe|socket closed|remote (process|peer) (exited|closed)"
    r"|pair closure|got 0 bytes|ncclRemoteError|NCCL.{0,200}?(remote error|abort)",
    re.IGNORECASE,
)
"""What gloo, NCCL, torch's TCPStore and sockets say when a peer is gone."""
_PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)


class ErrorRecord(NamedTuple):
    """What a worker wrote of its exception."""

    error: str
    """In one line: ``ValueError: boom``."""
    traceback: str
    time: float
    """Seconds since 1970."""
    path: str


class Evidence(NamedTuple):
    """What is known of a worker's end beside its status."""

    error: ErrorRecord | None = None
    stderr: str = ""
    """The last lines that it wrote there."""
    note: str = ""
    """As in ``ProcessFailure``."""


NOTHING = Evidence()


class Exit(NamedTuple):
    """The end of one worker process."""

    local_rank: int
    exitcode: int
    """The exit status, or minus the signal's number."""
    time: float
    """Seconds since 1970."""
    stop_signals: tuple[int, ...] = ()
    """The signals that it had been sent to stop it, by then."""


def judge(
    exits: Sequence[Exit],
    evidence: Mapping[int, Evidence],
    pids: Mapping[int, int],
    assignment: Assignment,
    stopped_at: float,
) -> tuple[ProcessFailure, ...]:
    """Tell failures from stopped workers, and put the cause first.

    Args:
        exits: how the round's workers ended.
        evidence: what else is known of it, by local rank.
        pids: by local rank; a worker that could not be started has none.
        place: the node's place in the round.
        stopped_at: when the agent began to stop the workers, in seconds since 1970.
    """
    failures = [
        failure_of(
            _as_it_raised(exit_), evidence.get(exit_.local_rank, NOTHING), pids.get(exit_.local_rank, -1), assignment
        )
        for exit_ in exits
        if _is_failure(exit_, evidence.get(exit_.local_rank, NOTHING).error, stopped_at)
    ]
    return tuple(sorted(failures, key=lambda f: (is_consequence(f), f.timestamp, f.rank)))


def shortened(text: str, limit: int) -> str:
    """A text of so many characters at most, and a line that tells how many are missing: its ends say more."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n... {len(text) - limit} characters left out ...\n{text[-(limit // 2) :]}"


def is_port_clash(failure: ProcessFailure, port: int) -> bool:
    """Whether the worker failed because another process holds the port on which it was to serve the group's store."""
    text = f"{failure.error}\n{failure.message}"
    return bool(_PORT_TAKEN.search(text)) and re.search(rf"(?<!\d){port}(?!\d)", text) is not None


def _is_failure(exit_: Exit, error: ErrorRecord | None, stopped_at: float) -> bool:
    if exit_.exitcode == 0:
        return False
    if not exit_.stop_signals or (error is not None and error.time < stopped_at):
        return True
    # Told to stop: whatever status it chose is an answer to that. A signal that nobody sent (a segfault, say) is not.
    return exit_.exitcode < 0 and -exit_.exitcode not in exit_.stop_signals


def _as_it_raised(exit_: Exit) -> Exit:
    """The end of a failure; of one that the agent stopped on its way out, after its exception, as Python's would be."""
    return exit_._replace(exitcode=1) if -exit_.exitcode in exit_.stop_signals else exit_


def is_consequence(failure: ProcessFailure) -> bool:
    """Whether the error, or what it said when it aborted, is plainly that of a worker that lost its peer."""
    last_words = failure.stderr if failure.exitcode == -signal.SIGABRT else ""
    return _CONSEQUENCE.search(failure.error or last_words) is not None


def failure_of(exit_: Exit, evidence: Evidence, pid: int, assignment: Assignment) -> ProcessFailure:
    """A worker's end, as a failure."""
    error = evidence.error
    return ProcessFailure(
        local_rank=exit_.local_rank,
        pid=pid,
        exitcode=exit_.exitcode,
        error_file=error.path if error else "<N/A>",
        error=error.error if error else "",
        message=error.traceback if error else "",
        timestamp=min(error.time, exit_.time) if error else exit_.time,
        rank=assignment.rank(exit_.local_rank),
        host=assignment.host,
        stderr="" if error else evidence.stderr,
        note=evidence.note,
    )
