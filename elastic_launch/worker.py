"""What a worker can tell its launcher, and ask it. For scripts and functions that elastic-run starts.

    from elastic_launch import worker

    for step in range(steps):
        train(step)
        worker.progress(step)
        if step % 1000 == 0:
            with worker.phase("eval"):
                evaluate()
        if worker.should_stop():
            worker.check()
            save_checkpoint()
            break

Nothing here is needed by loops that step an optimizer of torch's, except for ``should_stop``. Outside of a job, and in
the children that a worker forks, nothing happens. A call takes about a microsecond, and imports nothing.
"""

from __future__ import annotations

import sys
import time

from elastic_launch.workers.step_hook import (
    CALLS,
    FIRST_NUMBER,
    HOLD,
    LAST,
    MARKS,
    NUMBER,
    PHASE,
    PHASE_SINCE,
    PHASE_SIZE,
    STOP_AT,
    advance,
    check_lease,
    connect,
)

TYPE_CHECKING = False  # mypy knows the name; importing typing would cost every worker milliseconds
if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["check", "phase", "progress", "should_stop"]

_MAX_STEP = 2**63 - 2
_WAIT = 0.005
"""Seconds between two looks at whether a decision to stop has been made."""


def progress(step: int | None = None, phase: str | None = None) -> None:
    """Tell the launcher that an iteration is done. From the first call on, these calls count, not optimizer steps.

    Args:
        step: the number of the iteration, from 0. After a restart it shows which iterations are repeated.
        phase: the phase that begins now, as for ``phase``; "" ends it. None changes nothing.

    Raises:
        TypeError: ``step`` is not an integer, or ``phase`` is not a text.
        ValueError: ``step`` is negative or does not fit into 63 bits, or ``phase`` is too long.
    """
    if step is not None:
        if not hasattr(step, "__index__"):
            raise TypeError(f"step must be an integer, not {type(step).__name__}")
        step = step.__index__()
        if not 0 <= step <= _MAX_STEP:
            raise ValueError(f"step={step}: must be 0 or higher, and fit into 63 bits")
    name = None if phase is None else _encoded(phase)
    words = connect()
    advance(MARKS)
    if step is not None:
        words[NUMBER] = step + 1
        if not words[FIRST_NUMBER]:
            words[FIRST_NUMBER] = step + 1
    if name is not None:
        _enter(name, time.monotonic_ns() if name else 0)


class phase:  # noqa: N801 - used as a function
    """A context manager for a long part of the program in which no steps are expected: it has a longer limit.

    Phases nest: at the end of the inner one, the outer one goes on. An object can be used again, but not within itself.

    Args:
        name: what the launcher calls it, of 1 to 32 bytes in UTF-8.

    Raises:
        TypeError: the name is not a text.
        ValueError: the name is empty or too long, or contains a NUL character.

    Example:
        >>> with phase("eval"):
        ...     pass
    """

    def __init__(self, name: str) -> None:
        self._name = _encoded(name)
        if not name:
            raise ValueError("a phase must have a name")
        self._outer = b"", 0

    def __enter__(self) -> None:
        words = connect()
        name = b"".join(word.to_bytes(8, sys.byteorder) for word in words[_NAME])
        self._outer = name, words[PHASE_SINCE]
        _enter(self._name, time.monotonic_ns())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        connect()[LAST] = time.monotonic_ns()  # the next gap begins here
        _enter(*self._outer)


def should_stop() -> bool:
    """Return whether to save a checkpoint and exit with status 0, because the job is being stopped.

    Call it once per iteration, on all ranks. It turns true in the same iteration on all of them. While the nodes agree
    on that iteration, a call may wait for a moment.
    """
    words = connect()
    words[CALLS] = number = words[CALLS] + 1
    while words[HOLD] and not words[STOP_AT]:
        time.sleep(_WAIT)
    return 0 < words[STOP_AT] <= number


def check() -> None:
    """Return only if this worker may go on. Call it before anything that must not happen twice, such as a checkpoint.

    If a host is frozen, the others go on without it after a while. A worker that wakes up there must not write a
    checkpoint beside those that have taken its place. This does not return in such a worker, which is about to be
    killed. The steps of torch's optimizers and calls of ``progress()`` check the same.
    """
    connect()
    check_lease()


_NAME = slice(PHASE // 8, (PHASE + PHASE_SIZE) // 8)
"""The words that hold the name of the phase."""


def _encoded(name: str) -> bytes:
    if not isinstance(name, str):
        raise TypeError(f"the name of a phase must be a text, not {type(name).__name__}")
    encoded = name.encode(errors="replace")
    if len(encoded) > PHASE_SIZE or "\0" in name:
        raise ValueError(f"phase {name!r}: must be a name of at most {PHASE_SIZE} bytes in UTF-8, without NUL")
    return encoded


def _enter(name: bytes, since: int) -> None:
    """Set the phase. Readers see no phase while the name changes."""
    words = connect()
    words[PHASE_SINCE] = 0
    words[_NAME] = memoryview(name.ljust(PHASE_SIZE, b"\0")).cast("Q")
    words[PHASE_SINCE] = since
