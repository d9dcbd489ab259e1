"""Turn signals into events of the agent's loop.

Handlers only enqueue, and the interpreter writes to a pipe that the loop waits on. The process's signal handlers are
replaced for a while and then restored; nothing else is touched.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from elastic_launch.errors import SignalException, signal_name

if TYPE_CHECKING:
    from elastic_launch.core.agent.messages import AgentEvent

FORWARDED = frozenset({signal.SIGUSR1, signal.SIGUSR2})
"""Signals that are passed on to the workers, unless the user has chosen them to stop the job."""

owns_process = False
"""Whether the process has nothing else to do, as under the command line, which sets this. When the run is over, its
outcome is decided: handlers then stay in place, so that signals have no effect while the report is written."""


class SignalQueue:
    """A context in which signals are queued instead of acted on.

    Python allows handlers in the main thread only. In another thread the queue stays empty, and the program's own
    handlers stay in place. A SIGHUP that is ignored stays ignored, so that ``nohup`` works.
    """

    def __init__(self, stop: Iterable[int]) -> None:
        """Prepare.

        Args:
            stop: the signals that stop the job. The others in ``FORWARDED`` are queued, too.
        """
        self._stop = frozenset(stop)
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1
        self._queue: deque[tuple[int, float]] = deque()

    def __enter__(self) -> SignalQueue:
        self._reading, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        if threading.current_thread() is threading.main_thread():
            self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            for signum in self._stop | FORWARDED:
                if not _stays_ignored(signum):
                    self._before[signum] = signal.getsignal(signum)
                    signal.signal(signum, self._enqueue)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not owns_process:
            for signum, before in self._before.items():
                # None: a handler that C code had installed. Python cannot restore it.
                signal.signal(signum, signal.SIG_DFL if before is None else before)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._reading)
        os.close(self._writing)

    def fileno(self) -> int:
        """Return the descriptor that is readable when a signal has arrived."""
        return self._reading

    def descriptors(self) -> list[tuple[int, int]]:
        """See ``LoopSource``."""
        return [(self._reading, select.POLLIN)]

    def deadline(self) -> None:
        """See ``LoopSource``: nothing is ever due."""

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        """Return the signals that have arrived, in order."""
        # late: the command line imports this file first
        from elastic_launch.core.agent.messages import Signalled, UserSignalled

        with contextlib.suppress(BlockingIOError):
            os.read(self._reading, 4096)  # before the queue is read: what arrives from now on writes again
        arrived = [self._queue.popleft() for _ in range(len(self._queue))]
        return [Signalled(signum, at) if signum in self._stop else UserSignalled(signum) for signum, at in arrived]

    def _enqueue(self, signum: int, frame: object) -> None:
        self._queue.append((signum, time.time()))


class SignalTrap:
    """A context in which signals raise SignalException: in the program's code at once, in a loop once it is left.

    An exception in the middle of the loop would lose events. So a signal that arrives there only wakes it: the trap is
    one of its sources. Handlers are set in the main thread only. A SIGHUP that is ignored stays ignored.

    >>> with SignalTrap([signal.SIGTERM]):
    ...     signal.raise_signal(signal.SIGTERM)
    Traceback (most recent call last):
        ...
    elastic_launch.errors.SignalException: stopped by SIGTERM
    """

    _in_loop: ClassVar[SignalTrap | None] = None
    """The trap whose loop runs; of the main thread."""

    def __init__(self, signals: Iterable[int]) -> None:
        """Prepare for these signals."""
        self._signals = tuple(signals)
        self._before: dict[int, Any] = {}
        self._caught: deque[tuple[int, float]] = deque()
        self._is_over = False
        self._read = b""
        """The numbers of the signals that have woken the loop, for the descriptor that the program has for them."""
        self.passes_on = False
        """Whether the loop gets the signals as events, and nothing is raised."""

    def __enter__(self) -> SignalTrap:
        self._reading, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        if threading.current_thread() is threading.main_thread():
            chosen = [signum for signum in self._signals if not _stays_ignored(signum)]
            # None: no handler of Python's, which cannot be restored.
            self._before = {signum: signal.signal(signum, self._handle) or signal.SIG_DFL for signum in chosen}
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        for signum, before in self._before.items():
            if signal.getsignal(signum) == self._handle:  # otherwise another handler is above it, and calls it
                signal.signal(signum, before)
        if SignalTrap._in_loop is not self:
            self._close()

    @contextlib.contextmanager
    def around_loop(self) -> Iterator[None]:
        """Let signals wake the loop that runs in this context.

        Raises:
            SignalException: one did, and this trap does not pass them on.
        """
        if not self._before:  # in another thread, where no signal arrives
            yield
            return
        SignalTrap._in_loop = self
        # A handler would run too late to wake a loop that is just about to wait. The interpreter writes at once.
        wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup_before)
            SignalTrap._in_loop = None
            self._empty()
            with contextlib.suppress(OSError):  # without such a descriptor, or with one that is full
                os.write(wakeup_before, self._read)
            self._read = b""
            if self._is_over:
                self._close()
        if self.has_caught() and not self.passes_on:
            _raise(self._caught.popleft()[0])

    def has_caught(self) -> bool:
        """Return whether a signal waits to be raised."""
        return bool(self._caught) and not self.passes_on

    def descriptors(self) -> list[tuple[int, int]]:
        """See ``LoopSource``."""
        return [(self._reading, select.POLLIN)]

    def deadline(self) -> None:
        """See ``LoopSource``: nothing is ever due."""

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        """Return the signals that have arrived, if they are passed on."""
        from elastic_launch.core.agent.messages import Signalled  # late, as in SignalQueue

        self._empty()
        return [Signalled(*self._caught.popleft()) for _ in range(len(self._caught))] if self.passes_on else []

    def _empty(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._read += os.read(self._reading, 4096)

    def _close(self) -> None:
        os.close(self._reading)
        os.close(self._writing)

    def _handle(self, signum: int, frame: object) -> None:
        if self._is_over:
            signal.signal(signum, self._before[signum])
            signal.raise_signal(signum)
        elif trap := SignalTrap._in_loop:
            trap._caught.append((signum, time.time()))
        else:
            _raise(signum)


def _stays_ignored(signum: int) -> bool:
    return signum == signal.SIGHUP and signal.getsignal(signum) is signal.SIG_IGN


def _raise(signum: int) -> None:
    raise SignalException(f"stopped by {signal_name(signum)}", signal.Signals(signum))
