"""Heartbeats as seen by the node that polls them: which nodes have been silent for too long.

Each node adds to a counter of its own now and then. The node that monitors reads the counters, measures with its own
clock for how long each has stood still, and resets them to 0. The others see the reset: it is the monitor's heartbeat.
"""

from __future__ import annotations

from collections.abc import Iterable

from elastic_launch.core.rendezvous.records import MAX_SILENT, SIGNED, refused, signed
from elastic_launch.job import Silence

TAKE_OVER = 1 << 20
"""Set as a node's counter to have it take over as leader at once."""
LOOK = 1 << 30
"""Added to a node's counter to have it learn that somebody asks for the stacks of all nodes."""
LEFT = 1 << 40
"""Added to a node's counter when it leaves."""


def number(value: bytes, key: str, high: int = 2**31) -> int:
    """Read a counter; 0 if there is none.

    Raises:
        RendezvousStateError: what ``key`` holds is not a number from 0 to ``high``.
    """
    if not value:
        return 0
    if not (_is_number(value) and int(value) <= high):
        raise (
            signed(key)
            if value.startswith(SIGNED)
            else refused(key, f"must be a number from 0 to {high}, not {value[:40]!r}")
        )
    return int(value)


def _is_number(value: bytes) -> bool:
    return value.isdigit() and len(value) <= 18


def has_left(counter: bytes) -> bool:
    """Whether a node's counter says that it has left."""
    return _is_number(counter) and int(counter) >= LEFT


def without_flag(counter: bytes) -> bytes:
    """Return a counter without ``LOOK``. What is not a number stays as it is."""
    count = int(counter) if _is_number(counter) else 0
    return b"%d" % (count % LOOK) if LOOK <= count < LEFT else counter


class Monitor:
    """What is known of the counters of some nodes, by ticket. Times are seconds on any monotonic clock."""

    def __init__(self, deadline: float, outage: float, now: float) -> None:
        """Begin to monitor.

        Args:
            deadline: seconds without a heartbeat after which a node counts as dead.
            outage: seconds between two replies of the store; what exceeds them is not counted as silence.
            now: the time.
        """
        self._deadline = deadline
        self._outage = outage
        self._polled_at = self._asked_at = now
        self._counters: dict[int, tuple[bytes, float]] = {}
        """Each counter as it was last seen, and when it last changed."""
        self.left: set[int] = set()
        """Nodes that have left."""
        self.awaits_reply = False
        """Whether a poll is unanswered. Another one would only wait behind it."""
        self._unproven: set[int] = set()
        """Nodes whose counter has never been seen to change: they may have been dead for long."""

    def register(self, tickets: Iterable[int], now: float) -> None:
        """Take the arrival of nodes as their first heartbeat."""
        for ticket in tickets:
            self._counters[ticket] = (b"", now)

    def has_lived_since(self, ticket: int, time: float) -> bool:
        """Whether a node has sent a heartbeat after ``time``."""
        counter, at = self._counters.get(ticket, (b"", time))
        return counter != b"" and at > time and ticket not in self._unproven

    def silence(self, ticket: int, now: float) -> float:
        """Return the seconds since a node's counter was last seen to change; 0 if it has never been polled."""
        return max(0.0, now - self._counters.get(ticket, (b"", now))[1])

    def silences(self, at_least: float) -> tuple[Silence, ...]:
        """Return the nodes that were silent at the last poll, the longest silence first.

        Args:
            at_least: seconds; nodes with a shorter silence are left out.
        """
        found = [
            Silence(ticket, self._asked_at - at, int(counter or b"-1"))
            for ticket, (counter, at) in self._counters.items()
            if self._asked_at - at >= at_least and (counter == b"" or _is_number(counter))
        ]
        return tuple(sorted(found, key=lambda silence: -silence.seconds)[:MAX_SILENT])

    def resume(self, silences: Iterable[Silence], now: float) -> None:
        """Go on counting silences that another node has measured up to some time before ``now``."""
        for ticket, seconds, counter in silences:
            self._counters[ticket] = (b"%d" % counter if counter >= 0 else b"", now - seconds)

    def poll(self, counters: Iterable[tuple[int, bytes]], now: float, asked_at: float) -> set[int]:
        """Take the counters as they were at ``asked_at`` or later. What is not a number counts once, and is then reset.

        Returns:
            The nodes that had been silent up to the deadline by then, or have left.
        """
        slept = max(0.0, now - self._polled_at - self._outage)  # this node or the store did, not the others
        self._polled_at, self._asked_at = now, asked_at
        self.awaits_reply = False
        suspected: set[int] = set()
        for ticket, counter in counters:
            if has_left(counter):
                suspected.add(ticket)
                self.left.add(ticket)
                continue
            if ticket not in self._counters:
                self._counters[ticket] = (counter, now)
                self._unproven.add(ticket)
            before, at = self._counters[ticket]
            has_grown = counter not in (before, b"0")  # another monitor may reset it to 0
            if has_grown:
                self._counters[ticket] = (counter, now)
                self._unproven.discard(ticket)
            else:
                at = min(now, at + slept)
                self._counters[ticket] = (counter, at)
                if asked_at - at >= self._deadline:
                    suspected.add(ticket)
        return suspected

    def take_resets(self) -> list[int]:
        """Return the nodes whose counters the caller must reset to 0; they count as reset from now on."""
        grown = [ticket for ticket, (counter, _) in self._counters.items() if counter not in (b"", b"0")]
        for ticket in grown:
            self._counters[ticket] = (b"0", self._counters[ticket][1])
        return grown

    def confirm_resets(self, tickets: Iterable[int], now: float) -> None:
        """Note that counters have been reset by now, which may have wiped out heartbeats."""
        for ticket in tickets:
            if ticket in self._counters:
                self._counters[ticket] = (self._counters[ticket][0], now)
