"""Layer 3: carries out what ``core.lifecycle`` decides, and tells it what happened: the loop of an agent.

It waits in one place: for workers and their output, for signals, for the other nodes, for the deadline of the moment.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from elastic_launch.agent.worker_group import Workers
from elastic_launch.core.agent import lifecycle
from elastic_launch.core.agent.lifecycle import (
    Action,
    AgentEvent,
    AgentState,
    DeadlineReached,
    DumpStacks,
    Exited,
    Finish,
    GroupReaped,
    Limits,
    Log,
    ReapLeftovers,
    RendezvousAction,
    SendSignal,
    Start,
)
from elastic_launch.job import Assignment, Level

_LONGEST_POLL = 86400.0
"""Seconds; poll(2) takes no more than 24 days, and a deadline may be further away."""


class Source(Protocol):
    """Where events come from."""

    def descriptors(self) -> list[tuple[int, int]]:
        """What to wait for: descriptors and poll masks."""

    def deadline(self) -> float | None:
        """When ``take`` is due, on ``time.monotonic``, if no descriptor is ready before."""

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        """What has happened; never blocks. ``ready`` are descriptors, also of others. Raises LaunchError."""


class Driver:
    """One life of an agent. ``state`` is where it stands."""

    def __init__(
        self,
        limits: Limits,
        workers: Workers,
        start: Callable[[Assignment], None],
        ask: Callable[[RendezvousAction], list[AgentEvent]],
        sources: Sequence[Source],
        log: Callable[[str], None],
        verbosity: int = Level.INFO,
        observe: Callable[[AgentEvent, AgentState], None] = lambda event, state: None,
    ) -> None:
        """Begin.

        Args:
            limits: what decisions depend on.
            workers: the processes to be run.
            start: starts a round of them.
            ask: the rendezvous' answer to an action.
            sources: where events come from, besides the workers.
            say: takes each line for people,
            verbosity: of this level at most.
            observe: is told of each event, and of the life after it.
        """
        self._workers = workers
        self._start = start
        self._ask = ask
        self._sources: list[Source] = [workers, *sources]
        self._log = log
        self._verbosity = verbosity
        self._observe = observe
        self._events: deque[AgentEvent] = deque()
        self.state, actions = lifecycle.begin(limits)
        self.finish = self._carry_out(actions)

    def run(
        self, until: float | None = None, enough: Callable[[AgentState], bool] = lambda state: False
    ) -> Finish | None:
        """Events in, actions out, to the end.

        Args:
            until: a time on ``time.monotonic`` when to return all the same.
            enough: tells whether to return already.
        """
        while self.finish is None and not enough(self.state):
            if self._events:
                self.finish = self._step(self._events.popleft())
            else:
                self._events.extend(self._wait(until))
                if not self._events and _is_over(until):
                    break
        return self.finish

    def tell(self, event: AgentEvent) -> None:
        """Have an event dealt with by the next ``run``."""
        self._events.append(event)

    def _step(self, event: AgentEvent) -> Finish | None:
        if isinstance(event, Exited) and event.exit.exitcode != 0 and not event.exit.stop_signals:
            event = self._workers.with_error(event, self.state.pids)
        if isinstance(event, GroupReaped) or (isinstance(event, DeadlineReached) and self.state.killed):
            # Nobody writes any more, or nobody waits for those that do.
            event = self._workers.with_evidence(event, self.state.exits, self.state.pids)
        self.state, actions = lifecycle.step(self.state, event, time.monotonic())
        self._observe(event, self.state)
        return self._carry_out(actions)

    def _carry_out(self, actions: list[Action]) -> Finish | None:
        for action in actions:
            match action:
                case Start(assignment):
                    self._start(assignment)
                case SendSignal(signum, local_ranks, stop):
                    self._workers.tell(signum, local_ranks, stop)
                case DumpStacks(local_ranks):
                    self._workers.dump(local_ranks)
                case ReapLeftovers(kill):
                    self._workers.sweep(kill)
                case Log(text, level):
                    if level <= self._verbosity:
                        self._log(text)
                case Finish():
                    return action
                case asking:
                    self._events.extend(self._ask(asking))
        return None

    def _wait(self, until: float | None) -> list[AgentEvent]:
        """Sleep until something happens: the one place where the agent waits."""
        waits = [(source, source.descriptors(), source.deadline()) for source in self._sources]
        poller = select.poll()
        for _, descriptors, _ in waits:
            for fd, mask in descriptors:
                poller.register(fd, mask)
        dues = (self.state.deadline, until, *(due for _, _, due in waits))
        first = min((due for due in dues if due is not None), default=None)
        left = None if first is None else min(max(0.0, first - time.monotonic()), _LONGEST_POLL)
        ready = {fd for fd, _ in poller.poll(None if left is None else left * 1000)}
        events: list[AgentEvent] = []
        for source, descriptors, due in waits:
            if not ready.isdisjoint(fd for fd, _ in descriptors) or _is_over(due):
                events += source.take(ready)
        return events or ([DeadlineReached()] if _is_over(self.state.deadline) else [])


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline
