"""Lets the agent use a third-party rendezvous handler: one with torch's interface, whoever wrote it.

A handler blocks, so all calls of its methods and of its store run in a thread beside the agent's loop. Nothing else
calls them, except threads of the handler's own. The thread hands events to the loop, and wakes it.

The thread is a daemon. If it hangs in the handler, it keeps neither the program from ending nor the agent from
returning.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import TYPE_CHECKING

from elastic_launch.config import DEFAULT_JOIN_TIMEOUT
from elastic_launch.core.agent import messages
from elastic_launch.core.progress.messages import ProgressRequest
from elastic_launch.core.rendezvous.ending import brief
from elastic_launch.core.rendezvous.records import MAX_ERROR
from elastic_launch.core.text import shortened
from elastic_launch.errors import LaunchError, signal_name
from elastic_launch.job import Change, End, EndKind
from elastic_launch.rendezvous.single_node import judge_alone
from elastic_launch.rendezvous.third_party_tasks import HandlerTasks, Task

if TYPE_CHECKING:
    from elastic_launch.core.status import Meeting

CLOSE_TIMEOUT = 2.0
"""Seconds that the handler has for its ``shutdown``."""


class ThirdPartyRendezvous:
    """Turns the blocking calls of a handler into events. Serves one run of one agent.

    Args:
        tasks: the calls.
    """

    def __init__(self, tasks: HandlerTasks) -> None:
        self.patience = DEFAULT_JOIN_TIMEOUT
        self.lease: Callable[[float], None] = lambda until: None  # unused: the handler decides who is there
        self._tasks = tasks
        self._tasks.report = self._report
        self._thread: threading.Thread | None = None
        self._end: End | None = None
        """How the round ended, as the agent was told."""
        self._is_in_round = False
        """Whether the agent was told of a round since it has asked for one."""
        # Shared with the thread:
        self._queue: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._results: deque[messages.AgentEvent | LaunchError] = deque()
        self._wake = -1

    def get_backend(self) -> str:
        """Return the name of the backend, as the handler has it."""
        return str(self._tasks.handler.get_backend())

    def get_run_id(self) -> str:
        """Return the job's id, as the handler has it."""
        return str(self._tasks.handler.get_run_id())

    def meeting(self) -> Meeting:
        """Describe how the nodes meet, as far as torch's interface tells it."""
        from elastic_launch.core.status import Meeting  # late: only needed when somebody asks

        backend = type(self._tasks.handler).__name__
        with contextlib.suppress(Exception):  # the handler comes from outside, and nobody else may have asked it that
            backend = self.get_backend()
        return Meeting(backend, waits_for="" if self._is_in_round else "the rendezvous handler")

    def ask(self, action: messages.RendezvousAction) -> list[messages.AgentEvent]:
        """Hand an action to the thread. What ends the round, ``RequestStop`` and stalls are answered at once.

        The interface has no place for questions to the other nodes, so each node judges its own workers.
        """
        if self._thread is None:
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._thread = threading.Thread(target=self._work, name="elastic-launch-rendezvous", daemon=True)
            self._thread.start()
        match action:
            case messages.RequestJoin():
                self._end, self._is_in_round = None, False
                self._queue.put(self._tasks.join)
            case messages.RequestRestart(reason) if self._is_in_round and self._end is None:
                node, change = self._tasks.node.node, Change.RESTART_REQUESTED
                return [self._end_round(End(EndKind.MEMBERSHIP_CHANGED, reason, node, change=change, mine=True))]
            case messages.ReportFailure(failure) if self._end is None:
                node, told = self._tasks.node.node, (brief(failure),)
                return [self._end_round(End(EndKind.FAILED, failure.headline(), node, failures=told, mine=True))]
            case messages.ReportSuccess():
                self._queue.put(self._tasks.report_success)
            case messages.ReportRound(decision):
                self._queue.put(partial(self._tasks.report_round, self._end, decision))
            case messages.RequestStop():
                return [messages.StopAgreed(0)]  # the interface has no way to hold the workers of other nodes
            case messages.Leave(signum, error, status, reason):
                host = self._tasks.node.host
                leaving = (
                    f"{host}: {shortened(error, MAX_ERROR)}" if error else f"{host} is leaving ({signal_name(signum)})"
                )
                why = leaving if error else reason or leaving
                self._queue.put(partial(self._tasks.leave, why, status, signum if reason else 0))
        return judge_alone(action) if isinstance(action, ProgressRequest) else []

    def follow_joining(self) -> None:
        """Return None: only the handler knows who has joined."""

    def _end_round(self, end: End) -> messages.Ended:
        """Note that the round has ended for this node, whose report tells the others."""
        self._end = end
        self._queue.put(lambda: None)  # instead of the task that polls
        return messages.Ended(end, time.time())

    def descriptors(self) -> list[tuple[int, int]]:
        """Return the descriptor by which the thread wakes the loop."""
        return [(self._wake, select.POLLIN)] if self._thread else []

    def deadline(self) -> float | None:
        """Return None: the thread has the timers."""
        return None

    def take(self, ready: Collection[int] = ()) -> list[messages.AgentEvent]:
        """Return the events that the thread has handed over.

        Raises:
            LaunchError: the handler or its store failed.
        """
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)  # before the results are read, so that later ones wake the loop again
        events: list[messages.AgentEvent] = []
        while self._results:
            result = self._results.popleft()
            if isinstance(result, LaunchError):
                raise result
            if isinstance(result, messages.Ended):
                if self._end is not None:
                    continue  # the agent was told of another end of this round
                self._end = result.end
            self._is_in_round |= isinstance(result, messages.Assigned)
            events.append(result)
        return events

    def close(self) -> None:
        """End the job for the handler, unless this node left it or never was in it; then end the thread.

        A thread that still hangs in the handler after ``CLOSE_TIMEOUT`` is left behind until the handler returns.
        """
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        self._tasks.is_closing = True
        self._queue.put(self._tasks.shut_down)
        self._queue.put(None)
        thread.join(CLOSE_TIMEOUT)

    def _work(self) -> None:
        """Run tasks until None is in the queue. This is the thread."""
        rest: Iterator[float] = iter(())
        pause: float | None = None
        while True:
            with contextlib.suppress(queue.Empty):  # then the last task continues
                if (task := self._queue.get(timeout=pause)) is None:
                    break
                rest = _run(task)
            try:
                pause = next(rest, None)
            except BaseException as error:
                pause = None
                self._report(self._tasks.explain(error))
        self._tasks.reserved.close()
        os.close(self._wake)

    def _report(self, result: messages.AgentEvent | LaunchError) -> None:
        self._results.append(result)
        os.eventfd_write(self._wake, 1)


def _run(task: Task) -> Iterator[float]:
    yield from task() or ()
