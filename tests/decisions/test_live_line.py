"""The line about nodes that join: what it says, and when the agent wakes up for it."""

from __future__ import annotations

from collections.abc import Callable

from elastic_launch.agent.live_line import LiveLine
from elastic_launch.core.rendezvous import node
from elastic_launch.core.rendezvous.messages import Settings
from elastic_launch.core.rendezvous.progress import Waiting, live
from elastic_launch.core.rendezvous.records import NodeRecord, Status
from elastic_launch.core.rendezvous.state import NodeState, Phase, enter


def waiting_node(low: int = 2, high: int = 3, began_at: float = 100.0) -> NodeState:
    state = node.begin(NodeRecord("n", "host-a", 1, 1, "default"), Settings("j", low, high))
    enter(state, Phase.WAITING)
    state.began_at = began_at
    return state


def text(state: NodeState, now: float) -> str:
    waiting = live(state, now)
    assert waiting
    assert waiting.since == state.began_at
    return waiting.text


def test_it_tells_who_has_joined_and_for_how_long() -> None:
    state = waiting_node()
    assert text(state, 100.0) == "waiting for 2 to 3 nodes … 0 s"
    state.round.status = Status(2, "host-a, host-b", "")
    assert text(state, 112.9) == ("2 of 2 to 3 nodes have joined … 12 s: host-a, host-b; waiting up to 30 s more")
    state.round.status = Status(1, "host-a", "host-c")
    assert text(state, 101.0) == (
        "1 of 2 to 3 nodes has joined … 1 s: host-a; missing: host-c; waiting up to 599 s more"
    )
    assert text(waiting_node(3, 3), 99.0) == "waiting for 3 nodes … 0 s"  # it pauses before the round


def test_a_node_that_does_not_wait_has_nothing_to_tell() -> None:
    for phase in Phase:
        state = waiting_node()
        enter(state, phase)
        assert (live(state, 100.0) is not None) == (phase is Phase.WAITING)


class Screen:
    """The last row of a terminal, and what the line is about."""

    def __init__(self) -> None:
        self.now = 100.0
        self.joined: int | None = None
        self.row = b""
        self.draws = 0
        self.line = LiveLine(self.waiting, self.redraw, self.undraw, lambda: self.now)

    def waiting(self) -> Waiting | None:
        return None if self.joined is None else Waiting(f"{self.joined} after {int(self.now - 100)}", 100.0)

    def redraw(self, row: Callable[[], bytes]) -> None:
        self.row, self.draws = row(), self.draws + 1

    def undraw(self, row: Callable[[], bytes]) -> None:
        self.row = b""

    def run(self, until: float) -> int:
        """Be the agent's loop. Returns how often it woke up."""
        wakes = 0
        while (deadline := self.line.deadline()) is not None and deadline <= until:
            self.now, wakes = max(self.now, deadline), wakes + 1
            self.line.take()
        self.now = until
        return wakes


def test_it_is_redrawn_once_a_second_and_with_each_change() -> None:
    screen = Screen()
    assert screen.line.deadline() is None
    screen.joined = 1
    assert screen.run(100.9) == 0, "nodes that meet within a second need no line"
    assert screen.run(103.5) == 3
    assert (screen.row, screen.draws) == (b"elastic-run: 1 after 3", 3)
    screen.joined = 2
    assert screen.run(103.6) == 1
    assert screen.row == b"elastic-run: 2 after 3"
    assert screen.run(113.6) == 10


def test_it_vanishes_when_the_wait_is_over_and_wakes_nobody_then() -> None:
    screen = Screen()
    screen.joined = 1
    screen.run(105.0)
    assert screen.line.is_shown
    screen.joined = None
    assert screen.line._row() == b"", "a line that is printed now is not followed by an old row"
    assert screen.run(106.0) == 1
    assert (screen.row, screen.line.is_shown, screen.line.deadline()) == (b"", False, None)


def test_it_is_removed_at_the_end() -> None:
    screen = Screen()
    screen.joined = 1
    screen.run(105.0)
    screen.line.close()
    assert screen.row == b""
