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

from elastic_launch.core.agent import messages
from elastic_launch.core.rendezvous.ending import brief
from elastic_launch.core.rendezvous.records import MAX_ERROR
from elastic_launch.core.text import shortened
from elastic_launch.errors import LaunchError, signal_name
from elastic_launch.job import End, EndKind
from elastic_launch.rendezvous.third_party_tasks import HandlerTasks, Task

CLOSE_TIMEOUT = 2.0
"""Seconds that the handler has for its ``shutdown``."""


class ThirdPartyRendezvous:
    """Turns the blocking calls of a handler into events. Serves one run of one agent.

    Args:
        tasks: the calls.
    """

    def __init__(self, tasks: HandlerTasks) -> None:
        self.lease: Callable[[float], None] = lambda until: None  # unused: the handler decides who is there
        self._tasks = tasks
        self._tasks.report = self._report
        self._thread: threading.Thread | None = None
        self._end: End | None = None
        """How the round ended, as the agent was told."""
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

    def ask(self, action: messages.RendezvousAction) -> list[messages.AgentEvent]:
        """Hand an action to the thread. Only ``ReportFailure`` is answered at once."""
        if self._thread is None:
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._thread = threading.Thread(target=self._work, name="elastic-launch-rendezvous", daemon=True)
            self._thread.start()
        match action:
            case messages.RequestJoin():
                self._end = None
                self._queue.put(self._tasks.join)
            case messages.ReportFailure(failure) if self._end is None:
                told = (brief(failure),)
                self._end = End(EndKind.FAILED, failure.headline(), self._tasks.node.node, failures=told, mine=True)
                self._queue.put(lambda: None)  # instead of the task that polls
                return [messages.Ended(self._end, time.time())]
            case messages.ReportSuccess():
                self._queue.put(self._tasks.report_success)
            case messages.ReportRound(decision):
                self._queue.put(partial(self._tasks.report_round, self._end, decision))
            case messages.Leave(signum, error, status):
                host = self._tasks.node.host
                reason = (
                    f"{host}: {shortened(error, MAX_ERROR)}" if error else f"{host} is leaving ({signal_name(signum)})"
                )
                self._queue.put(partial(self._tasks.leave, reason, status))
        return []

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
