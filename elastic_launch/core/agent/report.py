"""Format the failure report: one block of text, the cause first."""

from __future__ import annotations

import time

from elastic_launch.core.agent.messages import Finish
from elastic_launch.core.progress import goodput
from elastic_launch.core.text import shortened
from elastic_launch.errors import ProcessFailure

_MAX_LINES = 200
"""Maximum lines of a traceback or of stderr."""
_MAX_LINE = 2000
"""Maximum characters of a line of a traceback or of stderr."""
_WIDTH = 80
"""Width of the report's rules, in characters."""


def format_report(name: str, finish: Finish, max_restarts: int, log_dir: str | None) -> str:
    """Return the report of a failed job.

    Args:
        name: what the workers ran.
        finish: how the job ended, with at least one failure.
        max_restarts: how many restarts were allowed.
        log_dir: the directory of the job's files; None if there are no files.
    """
    cause, *consequences = finish.failures
    lines = [
        "=" * _WIDTH,
        f"{name} FAILED",
        "-" * _WIDTH,
        "Cause",
        f"  rank    : {cause.rank} (local rank {cause.local_rank}, {_pid(cause)}) on {cause.host}",
        f"  exit    : {cause.how()}",
        f"  time    : {_time(cause)}",
    ]
    if cause.note:
        lines += [f"  note    : {cause.note}"]
    if cause.error:
        lines += [f"  error   : {cause.error_line()}"]
        lines += _indented(cause.message) if cause.message != cause.error else []
    elif cause.stderr:
        lines += ["  stderr  : its last lines", *_indented(cause.stderr)]
    if consequences:
        lines += ["Then", *(f"  {_consequence(failure)}" for failure in consequences)]
    why = f"; {finish.why}" if finish.why else ""
    lines += ["-" * _WIDTH, f"restarts  : {finish.restarts} of {max_restarts} used{why}"]
    if progress := goodput.summary(finish.goodput):
        lines += [f"progress  : {progress}"]
    if log_dir:
        lines += [f"logs      : {log_dir}"]
    return "\n".join([*lines, "=" * _WIDTH])


def _consequence(failure: ProcessFailure) -> str:
    error = f", {failure.error_line()}" if failure.error else ""
    error += f"; {failure.note}" if failure.note else ""
    return f"{_time(failure)} rank {failure.rank} on {failure.host} ({_pid(failure)}): {failure.how()}{error}"


def _pid(failure: ProcessFailure) -> str:
    return f"pid {failure.pid}" if failure.pid > 0 else "not started"


def _time(failure: ProcessFailure) -> str:
    millis = int(failure.timestamp % 1 * 1000)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(failure.timestamp))}.{millis:03d}"


def _indented(text: str) -> list[str]:
    lines = text.rstrip().split("\n")
    if len(lines) > _MAX_LINES:
        half = _MAX_LINES // 2
        lines = [*lines[:half], f"... {len(lines) - 2 * half} lines left out ...", *lines[-half:]]
    return [f"    {part}" for line in lines for part in shortened(line, _MAX_LINE).split("\n")]
