"""Run the agent's event loop: pass events to ``core.agent.lifecycle``, and carry out the actions that it returns.

The loop waits in one place for everything: workers and their output, signals, other nodes, and deadlines.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Protocol, cast

from elastic_launch.agent.worker_group import LocalWorkers
from elastic_launch.core.agent import lifecycle
from elastic_launch.core.agent.lifecycle import AgentState, Transition
from elastic_launch.core.agent.messages import (
    Action,
    AgentEvent,
    DeadlineReached,
    DumpStacks,
    Ended,
    Exited,
    Finish,
    GroupReaped,
    Limits,
    Log,
    ReapLeftovers,
    RendezvousAction,
    RunCheck,
    SendSignal,
    SetStop,
    Signalled,
    Start,
    StopCheck,
)
from elastic_launch.core.progress.messages import ProgressEvent
from elastic_launch.job import Assignment

if TYPE_CHECKING:
    from elastic_launch.workers.health_check import HealthCheck

_MAX_POLL = 86400.0
"""Seconds. poll(2) cannot wait for more than 24 days, but a deadline may be further away."""


class LoopSource(Protocol):
    """A source of events that the loop waits for."""

    def descriptors(self) -> list[tuple[int, int]]:
        """Return the descriptors to wait for, with their poll masks."""

    def deadline(self) -> float | None:
        """Return when to call ``take`` even if no descriptor is ready, on ``time.monotonic``; None: never."""

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        """Return what has happened, without blocking.

        Args:
            ready: the descriptors that are ready, including those of other sources.

        Raises:
            LaunchError: the source cannot go on.
        """


class AgentLoop:
    """One run of an agent; ``state`` is its current state, ``finish`` its result once it is over."""

    def __init__(
        self,
        limits: Limits,
        workers: LocalWorkers,
        start: Callable[[Assignment], None],
        ask: Callable[[RendezvousAction], list[AgentEvent]],
        sources: Sequence[LoopSource] = (),
        log: Callable[[Log], None] = lambda line: None,
        observe: Callable[[AgentEvent, AgentState], list[AgentEvent]] = lambda event, state: [],
        watch: Callable[[ProgressEvent], list[AgentEvent]] = lambda event: [],
        record: Callable[[Transition], None] | None = None,
        check: HealthCheck | None = None,
    ) -> None:
        """Ask the rendezvous for the first round.

        Args:
            limits: the settings that decisions depend on.
            workers: the worker processes, the first source of events.
            start: starts the workers of a round.
            ask: carries out an action of the rendezvous, and returns the events that answer it at once.
            sources: the other sources of events.
            log: writes a line for the user.
            observe: called with each event and the state after it; returns events that follow.
            watch: handles what the rendezvous has to say of the workers' progress; returns events that follow.
            record: called with each step of the life cycle, once its actions are carried out.
            check: the node's health check, which is among the ``sources``; None: it has none.
        """
        self._workers = workers
        self._start = start
        self._ask = ask
        self._sources: list[LoopSource] = [workers, *sources]
        self._check = check
        self._log = log
        self._observe = observe
        self._record = record
        self._watch = watch
        self._events: deque[AgentEvent] = deque()
        now, wall = time.monotonic(), time.time()
        self.state, actions = lifecycle.begin(limits, now)
        self.finish = self._finish_step(Transition(None, None, self.state, actions, now, wall))

    def run(
        self, until: float | None = None, enough: Callable[[AgentState], bool] = lambda state: False
    ) -> Finish | None:
        """Handle events until the run is over.

        Args:
            until: when to return early, on ``time.monotonic``; None: never.
            enough: whether to return early in this state.

        Returns:
            The result of the run; None if it is not over.
        """
        while self.finish is None and not enough(self.state):
            if self._events:
                self.finish = self._step(self._events.popleft())
            else:
                self._events.extend(self._wait(until))
                if not self._events and _is_over(until):
                    break
        return self.finish

    def add_event(self, event: AgentEvent) -> None:
        """Queue an event for the next ``run``."""
        self._events.append(event)

    def _step(self, event: AgentEvent) -> Finish | None:
        if isinstance(event, ProgressEvent):
            self._events.extend(self._watch(event))
            return None
        if isinstance(event, Exited) and event.exit.exitcode != 0 and not event.exit.stop_signals:
            event = self._workers.with_error(event, self.state.pids)
        if isinstance(event, GroupReaped) or (isinstance(event, DeadlineReached) and self.state.killed):
            # Not earlier: only now have all workers stopped writing, or the agent has given up on those that have not.
            event = self._workers.with_evidence(event, self.state.exits, self.state.pids)
        if isinstance(event, Signalled | Ended | DeadlineReached):
            event = event._replace(calls=max(self._workers.calls().values(), default=0))
        before, now, wall = self.state, time.monotonic(), time.time()
        self.state, actions = lifecycle.step(before, event, now)
        self._events.extend(self._observe(event, self.state))
        return self._finish_step(Transition(before, event, self.state, actions, now, wall))

    def _finish_step(self, transition: Transition) -> Finish | None:
        try:
            return self._carry_out(transition.actions)
        finally:
            if self._record:
                self._record(transition)

    def _carry_out(self, actions: list[Action]) -> Finish | None:
        for action in actions:
            match action:
                case RunCheck() if self._check:
                    self._events.extend(self._check.start(*action))
                case StopCheck() if self._check:
                    self._check.stop()
                case Start(assignment):
                    self._start(assignment)
                case SendSignal():
                    self._workers.send_signal(*action)
                case SetStop(hold, stop_at):
                    self._workers.set_stop(hold, stop_at)
                case DumpStacks(local_ranks):
                    self._workers.dump_stacks(local_ranks)
                case ReapLeftovers(kill):
                    self._workers.reap_leftovers(kill)
                case Log():
                    self._log(action)
                case Finish():
                    return action
                case asking:
                    self._events.extend(self._ask(cast(RendezvousAction, asking)))
        return None

    def _wait(self, until: float | None) -> list[AgentEvent]:
        """Sleep until something happens. The agent waits nowhere else."""
        waits = [(source, source.descriptors(), source.deadline()) for source in self._sources]
        poller = select.poll()
        for _, descriptors, _ in waits:
            for fd, mask in descriptors:
                poller.register(fd, mask)
        deadlines = (self.state.deadline, until, *(deadline for _, _, deadline in waits))
        first = min((deadline for deadline in deadlines if deadline is not None), default=None)
        seconds = None if first is None else min(max(0.0, first - time.monotonic()), _MAX_POLL)
        ready = {fd for fd, _ in poller.poll(None if seconds is None else seconds * 1000)}
        events: list[AgentEvent] = []
        for source, descriptors, deadline in waits:
            if not ready.isdisjoint(fd for fd, _ in descriptors) or _is_over(deadline):
                events += source.take(ready)
        return events or ([DeadlineReached()] if _is_over(self.state.deadline) else [])


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline
