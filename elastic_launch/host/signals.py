"""Layer 2: signals as events of the agent's loop.

Handlers only enqueue, and the interpreter writes to a pipe that the loop waits on. Touches the process's signal
handlers and nothing else, and puts back what was there.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_launch.core.agent.messages import AgentEvent

PASSED_ON = frozenset({signal.SIGUSR1, signal.SIGUSR2})
"""Signals that are the workers' own business, unless the user has the agent stop at them."""

owns_process = False
"""Set by the command line, whose process has nothing else to do: when the run is over its outcome is decided, and
signals that come while the report is written are no one's. They stay without effect instead of being given back."""


class SignalQueue:
    """A context in which signals are queued instead of acted on.

    Python allows handlers in the main thread only: elsewhere the queue stays empty, and the program's own handlers
    go on. A SIGHUP that is ignored stays ignored, so that ``nohup`` works.
    """

    def __init__(self, stop: Iterable[int]) -> None:
        """Take the signals that stop the job; ``PASSED_ON`` are queued as well."""
        self._stop = frozenset(stop)
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1
        self._queue: deque[tuple[int, float]] = deque()

    def __enter__(self) -> SignalQueue:
        self._reading, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        if threading.current_thread() is threading.main_thread():
            self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            for signum in self._stop | PASSED_ON:
                before = signal.getsignal(signum)
                if not (signum == signal.SIGHUP and before is signal.SIG_IGN):
                    self._before[signum] = before
                    signal.signal(signum, self._enqueue)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not owns_process:
            for signum, before in self._before.items():
                # None: a handler that C code had installed, which Python cannot put back.
                signal.signal(signum, signal.SIG_DFL if before is None else before)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._reading)
        os.close(self._writing)

    def fileno(self) -> int:
        """The descriptor that is readable when a signal has come."""
        return self._reading

    def descriptors(self) -> list[tuple[int, int]]:
        """What to wait for."""
        return [(self._reading, select.POLLIN)]

    def deadline(self) -> None:
        """No time to keep."""

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        """The signals that have come, in their order."""
        # late: the command line imports this file first
        from elastic_launch.core.agent.messages import Signalled, UserSignalled

        with contextlib.suppress(BlockingIOError):
            os.read(self._reading, 4096)  # before the queue is read: what comes now is announced again
        come = [self._queue.popleft() for _ in range(len(self._queue))]
        return [Signalled(signum, at) if signum in self._stop else UserSignalled(signum) for signum, at in come]

    def _enqueue(self, signum: int, frame: object) -> None:
        self._queue.append((signum, time.time()))
