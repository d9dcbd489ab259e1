"""The format of the memory in which a worker tells its progress, and how to read it.

The agent makes one memory file for each worker and round. Its first page holds ``WORDS`` of 64 bits in the host's byte
order, each written by one side only. The rest of the file is where the worker writes its stacks when it is asked.
docs/progress.md describes the page for programs in other languages.

``workers/step_hook.py`` writes the same words. It must run without this package, so it has the numbers, too.
"""

from __future__ import annotations

from typing import NamedTuple

PAGE = 4096
"""Bytes of the first page. Stacks begin here."""
MAGIC = b"ELPROG1\0"
"""The first 8 bytes: format and version."""

# The numbers of the words. Those that are left out are reserved, and 0.
HOLD, STOP_AT, STACKS, LEASE = 1, 2, 3, 4
"""Written by the agent: whether ``should_stop()`` is to wait until STOP_AT is set or HOLD is 0 again; the number of the
call of ``should_stop()`` from which on it is true, or 0; whether stacks are to be written to this file; the time on
CLOCK_BOOTTIME, in nanoseconds, from which on no step may begin, or 0."""
STEPS, MARKS, FIRST, LAST, LONGEST, SECOND, NUMBER, FIRST_NUMBER, PHASE_SINCE, CALLS = range(8, 18)
"""Written by the worker; the fields of ``WorkerProgress``. NUMBER and FIRST_NUMBER are 1 higher, so that 0 is none.
Times are in nanoseconds."""
PHASE, PHASE_SIZE = 160, 32
"""Where the name of the phase is, in bytes: UTF-8, padded with NUL."""

_MAX = 2**63 - 1
"""Higher numbers are not plausible, and count as this one."""


class WorkerProgress(NamedTuple):
    """What one worker has told in this round."""

    steps: int = 0
    """Iterations that were counted by its optimizers."""
    marks: int = 0
    """Calls of ``progress()``."""
    first: float = 0.0
    """Time of the first step or mark, in seconds on ``time.monotonic``; 0 before it."""
    last: float = 0.0
    """Time of the latest step or mark, or of the end of a phase if that is later; 0 before the first."""
    longest: float = 0.0
    """The longest time between two steps or marks outside of phases, in seconds."""
    second: float = 0.0
    """The second longest."""
    number: int | None = None
    """The latest number that the worker gave to a step; None if it gives none."""
    first_number: int | None = None
    """The first one."""
    phase: str = ""
    """The phase that the worker is in; empty for none."""
    phase_since: float = 0.0
    """Time of its beginning; 0 for none."""
    calls: int = 0
    """Calls of ``should_stop()`` that have begun."""

    @property
    def iterations(self) -> int:
        """The marks if there are any, because the program knows best what an iteration is; otherwise the steps."""
        return self.marks or self.steps


def header(stacks: bool, lease: int = 0) -> bytes:
    """Return the beginning of a new file.

    Args:
        stacks: whether the worker is to write its stacks to the file, and not to stderr.
        lease: the word LEASE.
    """
    words = memoryview(bytearray(8 * (LEASE + 1))).cast("Q")
    words[STACKS], words[LEASE] = stacks, lease
    return MAGIC + bytes(words)[len(MAGIC) :]


def decode(page: bytes) -> WorkerProgress:
    """Read the first page of a worker's memory. A worker may write anything there, so this never raises.

    Example:
        >>> decode(b"nonsense").iterations
        0
    """
    if not page.startswith(MAGIC) or len(page) < PHASE + PHASE_SIZE:
        return WorkerProgress()
    words = [min(word, _MAX) for word in memoryview(page[:PHASE]).cast("Q")]
    first, last, longest, second, phase_since = (
        words[index] / 1e9 for index in (FIRST, LAST, LONGEST, SECOND, PHASE_SINCE)
    )
    name = page[PHASE : PHASE + PHASE_SIZE].partition(b"\0")[0].decode(errors="replace")
    return WorkerProgress(
        steps=words[STEPS],
        marks=words[MARKS],
        first=first,
        last=last,
        longest=longest,
        second=second,
        number=words[NUMBER] - 1 if words[NUMBER] else None,
        first_number=words[FIRST_NUMBER] - 1 if words[FIRST_NUMBER] else None,
        phase=name if phase_since else "",
        phase_since=phase_since,
        calls=words[CALLS],
    )
