"""The line about the nodes that have joined, which a terminal shows while the agent waits for others."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elastic_launch.core.agent.messages import AgentEvent
    from elastic_launch.core.rendezvous.progress import Waiting

DELAY = 1.0
"""Seconds until a wait is worth a line. Nodes often meet sooner."""

Row = Callable[[], bytes]


class LiveLine:
    """A source of the agent's loop that never has an event: it redraws the line when it changes, once per second.

    While no node is awaited, it has no deadline.
    """

    def __init__(
        self,
        waiting: Callable[[], Waiting | None],
        redraw: Callable[[Row], None],
        undraw: Callable[[Row], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show nothing yet.

        Args:
            waiting: describes the nodes that have joined; returns None while the agent does not wait for others.
            redraw: shows what a function returns in the last row, below all lines.
            undraw: stops showing it.
            clock: returns the time in seconds; the one of ``Waiting.since``.
        """
        self._waiting = waiting
        self._redraw = redraw
        self._undraw = undraw
        self._clock = clock
        self._shown = ""

    @property
    def is_shown(self) -> bool:
        """Whether the line is on the screen, or has been until now: the next line takes its place."""
        return bool(self._shown)

    def descriptors(self) -> list[tuple[int, int]]:
        """Return no descriptors."""
        return []

    def deadline(self) -> float | None:
        """Return when the line changes: at once, with the next full second, or never."""
        waiting, now = self._waiting(), self._clock()
        if waiting is None:
            return now if self._shown else None
        if now < waiting.since + DELAY:
            return waiting.since + DELAY
        return now if waiting.text != self._shown else waiting.since + int(now - waiting.since) + 1

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        """Draw the line, or remove it."""
        self._shown = self._text()
        if self._shown:
            self._redraw(self._row)
        else:
            self._undraw(self._row)
        return []

    def close(self) -> None:
        """Remove the line."""
        self._shown = ""
        self._undraw(self._row)

    def _text(self) -> str:
        waiting = self._waiting()
        return waiting.text if waiting and self._clock() >= waiting.since + DELAY else ""

    def _row(self) -> bytes:
        """Return what the row shows: nothing once the wait is over, even if ``take`` has not been called since."""
        text = self._text()
        return f"elastic-run: {text}".encode(errors="backslashreplace") if text else b""
