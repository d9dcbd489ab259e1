"""Parse the timer requests that workers write into the agent's named pipe.

The format is torch's, one JSON object per line: torch's agent reads our clients' requests, and ours reads torch's.
"""

from __future__ import annotations

from typing import NamedTuple

LONGEST = 4096
"""Maximum bytes of a request, its line end included. A pipe writes that many at once, so that lines are never mixed."""

_START = b'{"version"'
"""The beginning of each line. It cannot occur inside a JSON string, where its quotes would be escaped."""


class ScopeRequest(NamedTuple):
    """A worker enters or leaves a timer's scope."""

    pid: int
    scope: str
    expires_at: float
    """Seconds since 1970, on the worker's wall clock. Negative or infinite: the worker has left the scope."""
    signum: int
    """The signal that kills the process on expiry; 0: none."""


def take_requests(buffer: bytearray) -> list[ScopeRequest]:
    """Remove all complete lines from a buffer, and return the requests in them.

    Lines in other formats are ignored, but a request at the end of one counts. The last ``LONGEST`` bytes of an
    incomplete line stay in the buffer.
    """
    end = buffer.rfind(b"\n") + 1
    lines = bytes(buffer[:end]).split(b"\n")
    del buffer[: max(end, len(buffer) - LONGEST)]
    # The search for a key is cheap, so that a flood of garbage costs little.
    found = [parse(line) or _parse_end(line) for line in lines if b'"pid"' in line]
    return [request for request in found if request]


def _parse_end(line: bytes) -> ScopeRequest | None:
    start = line.rfind(_START)
    return parse(line[start:]) if start > 0 else None


def parse(line: bytes) -> ScopeRequest | None:
    """Parse one line; None if it is not a request."""
    import json  # late, because an agent imports this module before its workers run

    if len(line) >= LONGEST:
        return None
    try:
        fields = json.loads(line)
        pid, scope, signum = fields["pid"], fields["scope_id"], fields.get("signal", 9)
        expires_at = float(fields["expiration_time"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    # For a pid of 0 or less, kill(2) would signal whole groups. True is an int, too.
    if not (type(pid) is int and 0 < pid < 1 << 31 and type(signum) is int and 0 <= signum <= 64):
        return None
    # Only NaN differs from itself.
    if not isinstance(scope, str) or isinstance(fields["expiration_time"], str | bool) or expires_at != expires_at:
        return None
    return ScopeRequest(pid, scope, expires_at, signum)
