"""Layer 1: what workers write of their timers into the agent's named pipe, and what stands there.

Pure: bytes in, requests out. The format is torch's, one JSON object a line; both agents read what both clients write.
"""

from __future__ import annotations

from typing import NamedTuple

LONGEST = 4096
"""Bytes of the longest request with its line end: what a pipe takes in one piece, so that lines never mingle."""

_START = b'{"version"'
"""How both clients begin a line. Within a JSON string it cannot stand: its quotes would be escaped."""


class Request(NamedTuple):
    """A worker enters or leaves a scope."""

    pid: int
    scope: str
    expires_at: float
    """Seconds since 1970, by the worker's wall clock; negative or infinite: the scope has no timer any more."""
    signum: int
    """What the process is to be killed with; 0: with nothing."""


def take_requests(buffer: bytearray) -> list[Request]:
    """Take the whole lines out of a buffer; what is none of the format is dropped.

    A request that stands behind an unfinished line of garbage counts. The rest that stays in the buffer is the last
    ``LONGEST`` bytes of the unfinished line.
    """
    end = buffer.rfind(b"\n") + 1
    lines = bytes(buffer[:end]).split(b"\n")
    del buffer[: max(end, len(buffer) - LONGEST)]
    # The first look is for speed: a flood of garbage costs little.
    found = [parse(line) or _parse_end(line) for line in lines if b'"pid"' in line]
    return [request for request in found if request]


def _parse_end(line: bytes) -> Request | None:
    start = line.rfind(_START)
    return parse(line[start:]) if start > 0 else None


def parse(line: bytes) -> Request | None:
    """The request that a line holds, if it holds one."""
    import json  # late: an agent imports this before its workers run

    if len(line) >= LONGEST:
        return None
    try:
        fields = json.loads(line)
        pid, scope, signum = fields["pid"], fields["scope_id"], fields.get("signal", 9)
        expires_at = float(fields["expiration_time"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    # A pid of 0 or below would have kill(2) hit whole groups; True is an int, too.
    if not (type(pid) is int and 0 < pid < 1 << 31 and type(signum) is int and 0 <= signum <= 64):
        return None
    # Of all numbers NaN alone is not itself.
    if not isinstance(scope, str) or isinstance(fields["expiration_time"], str | bool) or expires_at != expires_at:
        return None
    return Request(pid, scope, expires_at, signum)
