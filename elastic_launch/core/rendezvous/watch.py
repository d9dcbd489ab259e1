"""Layer 1: signs of life: who has been silent for too long. Pure.

Each node adds to a counter of its own now and then. Who watches reads the counters, times their silence with a clock of
its own, and sets them back to 0, which the node sees: a sign of life of the one who watches.
"""

from __future__ import annotations

from collections.abc import Iterable

from elastic_launch.errors import RendezvousStateError

LEFT = 1 << 40
"""Added to a node's counter: it has left."""


def number(value: bytes) -> int:
    """Read a counter; 0 where there is none.

    Raises:
        RendezvousStateError: it is no number.
    """
    if value and not (value.isdigit() and len(value) <= 18):
        raise RendezvousStateError(
            f"the store holds {value[:60]!r} where a number should be, which no node of this job has written: does "
            "something else use the same store and --rdzv-id?"
        )
    return int(value or b"0")


class Watch:
    """What is known of the counters of some nodes, by ticket."""

    def __init__(self, deadline: float, tick: float, now: float) -> None:
        """Begin to watch.

        Args:
            deadline: seconds of silence after which a node counts as dead.
            tick: seconds between two looks.
            now: seconds on a monotonic clock, as everywhere here.
        """
        self._deadline = deadline
        self._tick = tick
        self._looked_at = now
        self._signs: dict[int, tuple[bytes, float]] = {}
        """The counter as it was last seen, and when it had changed."""
        self.left: set[int] = set()
        """Those that have said goodbye."""
        self._unproven: set[int] = set()
        """Those whose counter has only been seen as it is: they may have been dead for long."""

    def greet(self, tickets: Iterable[int], now: float) -> None:
        """Nodes came: their first sign of life."""
        for ticket in tickets:
            self._signs[ticket] = (b"", now)

    def has_lived_since(self, ticket: int, time: float) -> bool:
        """Whether a node has added to its counter after a moment."""
        counter, at = self._signs.get(ticket, (b"", time))
        return counter != b"" and at > time and ticket not in self._unproven

    def look(self, counters: Iterable[tuple[int, bytes]], now: float, asked_at: float) -> set[int]:
        """Note what the counters held when that was asked, or later. Returns who was silent until the deadline then,
        or has left."""
        slept = now - self._looked_at > self._deadline / 2 + self._tick  # this node did, or the store: not the others
        self._looked_at = now
        silent: set[int] = set()
        for ticket, counter in counters:
            if number(counter) >= LEFT:
                silent.add(ticket)
                self.left.add(ticket)
                continue
            if ticket not in self._signs:
                self._signs[ticket] = (counter, now)
                self._unproven.add(ticket)
            before, at = self._signs[ticket]
            has_grown = counter not in (before, b"0")  # to 0 another one sets it back who watches
            if has_grown or slept:
                self._signs[ticket] = (counter, now)
                self._unproven -= {ticket} if has_grown else set()
            else:
                self._signs[ticket] = (counter, at)
                if asked_at - at >= self._deadline:
                    silent.add(ticket)
        return silent

    def set_back(self) -> list[int]:
        """Whose counter the caller must set back to 0; it is taken as done."""
        grown = [ticket for ticket, (counter, _) in self._signs.items() if counter not in (b"", b"0")]
        for ticket in grown:
            self._signs[ticket] = (b"0", self._signs[ticket][1])
        return grown

    def note_set_back(self, tickets: Iterable[int], now: float) -> None:
        """Counters have been set back, by now: what that has wiped out may have been signs of life."""
        for ticket in tickets:
            if ticket in self._signs:
                self._signs[ticket] = (self._signs[ticket][0], now)
