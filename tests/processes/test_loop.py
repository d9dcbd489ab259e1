"""The agent's loop: what it carries out and what it reads for the decisions, with workers that only play their part."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from signal import SIGTERM
from typing import Any, cast

import pytest

from elastic_launch.agent.loop import AgentLoop
from elastic_launch.agent.worker_group import LocalWorkers
from elastic_launch.core.agent.lifecycle import AgentState
from elastic_launch.core.agent.messages import AgentEvent, Exited, Finish, GroupReaped, Limits, Signalled, Started
from elastic_launch.core.agent.root_cause import Exit
from elastic_launch.job import Assignment, Policy
from elastic_launch.rendezvous.single_node import answer_alone

ASSIGNMENT = Assignment(0, 1, 0, 2, 2, 0, 2, "127.0.0.1", 29500, "host-a", port_picked=True)


class Workers:
    """Two workers that call ``should_stop()``, and end when it returns true or when they are signalled."""

    def __init__(self, calls: dict[int, int]) -> None:
        self.begun = calls
        self.done: list[Any] = []
        """What the loop had them do."""
        self._events: list[AgentEvent] = [Started({0: 100, 1: 101})]

    def calls(self) -> dict[int, int]:
        return self.begun

    def set_stop(self, hold: bool, stop_at: int) -> None:
        self.done.append((hold, stop_at))
        self._events += [Exited(Exit(rank, 0, time.time())) for rank in (0, 1) if stop_at]

    def send_signal(self, signum: int, local_ranks: Collection[int], stop: bool) -> None:
        self.done.append(signum)
        self._events += [Exited(Exit(rank, -signum, time.time(), (signum,))) for rank in local_ranks]

    def reap_leftovers(self, kill: bool) -> None:
        self._events.append(GroupReaped({}))

    def with_evidence(self, event: GroupReaped, exits: Collection[Exit], pids: Mapping[int, int]) -> GroupReaped:
        return event

    def descriptors(self) -> list[tuple[int, int]]:
        return []

    def deadline(self) -> float | None:
        return time.monotonic() if self._events else None

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        events, self._events = self._events, []
        return events


@pytest.mark.parametrize(
    ("calls", "done"), [({0: 5, 1: 7}, [(True, 0), (False, 8)]), ({0: 0, 1: 0}, [SIGTERM]), ({}, [SIGTERM])]
)
def test_workers_that_ask_are_held_and_stopped_at_the_next_call_of_the_fastest(
    calls: dict[int, int], done: list[Any]
) -> None:
    workers = Workers(calls)
    loop = AgentLoop(
        Limits(Policy(), 30),
        cast(LocalWorkers, workers),
        lambda assignment: None,
        lambda action: answer_alone(action, lambda: ASSIGNMENT),
    )
    loop.run(enough=lambda state: bool(state.pids))
    loop.add_event(Signalled(SIGTERM, time.time()))
    assert loop.run() == Finish(signum=SIGTERM)
    assert workers.done == done


def test_what_follows_from_looking_on_is_handled() -> None:
    workers = Workers({})
    noticed = [Signalled(SIGTERM, time.time())]

    def observe(event: AgentEvent, state: AgentState) -> list[AgentEvent]:
        return [noticed.pop()] if noticed and isinstance(event, Started) else []

    loop = AgentLoop(
        Limits(Policy(), 30),
        cast(LocalWorkers, workers),
        lambda assignment: None,
        lambda action: answer_alone(action, lambda: ASSIGNMENT),
        observe=observe,
    )
    assert loop.run() == Finish(signum=SIGTERM)
    assert workers.done == [SIGTERM]
