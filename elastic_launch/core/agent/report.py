"""Layer 1: the failure report: one block, the cause first. Pure."""

from __future__ import annotations

import time
from collections.abc import Sequence

from elastic_launch.errors import ProcessFailure

_MAX_TRACEBACK_LINES = 200
_MAX_LINE = 2000
_WIDTH = 80


def format_report(
    name: str,
    failures: Sequence[ProcessFailure],
    *,
    restarts: int,
    max_restarts: int,
    log_dir: str | None,
    why: str = "",
) -> str:
    """The block that ends a failed job.

    Args:
        name: what was run.
        failures: the cause first.
        restarts: how many restarts were used up.
        max_restarts: how many there were.
        log_dir: where the job's files lie; None where there are none.
        why: why those that were left were not used.
    """
    cause, *consequences = failures
    lines = [
        "=" * _WIDTH,
        f"{name} FAILED",
        "-" * _WIDTH,
        "Cause",
        f"  rank    : {cause.rank} (local rank {cause.local_rank}, {_pid(cause)}) on {cause.host}",
        f"  exit    : {cause.how()}",
        f"  time    : {_when(cause)}",
    ]
    if cause.note:
        lines += [f"  note    : {cause.note}"]
    if cause.error:
        lines += [f"  error   : {cause.error_line()}"]
        lines += _indent(cause.message) if cause.message != cause.error else []
    elif cause.stderr:
        lines += ["  stderr  : its last lines", *_indent(cause.stderr)]
    if consequences:
        lines += ["Then"]
        lines += [f"  {_consequence(failure)}" for failure in consequences]
    lines += ["-" * _WIDTH, f"restarts  : {restarts} of {max_restarts} used{why and f'; {why}'}"]
    if log_dir:
        lines += [f"logs      : {log_dir}"]
    return "\n".join([*lines, "=" * _WIDTH])


def _consequence(failure: ProcessFailure) -> str:
    error = f", {failure.error_line()}" if failure.error else ""
    error += f"; {failure.note}" if failure.note else ""
    return f"{_when(failure)} rank {failure.rank} on {failure.host} ({_pid(failure)}): {failure.how()}{error}"


def _pid(failure: ProcessFailure) -> str:
    return f"pid {failure.pid}" if failure.pid > 0 else "not started"


def _when(failure: ProcessFailure) -> str:
    millis = int(failure.timestamp % 1 * 1000)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(failure.timestamp))}.{millis:03d}"


def _indent(text: str) -> list[str]:
    lines = text.rstrip().split("\n")
    if len(lines) > _MAX_TRACEBACK_LINES:
        half = _MAX_TRACEBACK_LINES // 2
        lines = [*lines[:half], f"... {len(lines) - 2 * half} lines left out ...", *lines[-half:]]
    return [f"    {_shortened(line)}" for line in lines]


def _shortened(line: str) -> str:
    half = _MAX_LINE // 2
    return line if len(line) <= _MAX_LINE else f"{line[:half]} ... {line[-half:]}"
