"""Layer 2: the worker's side of the timers: what it asks for, and how it tells a server.

Opens the named pipe of an agent, or is handed a queue; runs in workers.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import json
import logging
import os
import select
import signal as signals
import stat
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from elastic_launch.core.timer_requests import LONGEST

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

PATIENCE = 1.0
"""Seconds that a client waits for a server that is not there yet, or whose pipe is full."""

_log = logging.getLogger(__name__)


class TimerRequest:
    """What a client tells a server: that a worker has entered a scope, or, with a negative time, left it."""

    __slots__ = ["expiration_time", "scope_id", "worker_id"]

    def __init__(self, worker_id: Any, scope_id: str, expiration_time: float) -> None:
        """Make a request.

        Args:
            worker_id: who; to the servers of this module a process id.
            scope_id: what the worker has entered; its own to name.
            expiration_time: when it must have left, in seconds since 1970; negative: it has left.
        """
        self.worker_id = worker_id
        self.scope_id = scope_id
        self.expiration_time = expiration_time

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._values() == other._values()

    __hash__ = None  # type: ignore[assignment]  # it can be changed

    def _values(self) -> tuple[Any, ...]:
        return self.worker_id, self.scope_id, self.expiration_time

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self._values()}"


class FileTimerRequest(TimerRequest):
    """A request that goes through a named pipe."""

    __slots__ = ["signal", "version"]

    def __init__(self, worker_pid: int, scope_id: str, expiration_time: float, signal: int = 0) -> None:
        """Make a request; the process ``worker_pid`` is to be killed with ``signal`` (0: with nothing)."""
        super().__init__(worker_pid, scope_id, expiration_time)
        self.version = 1
        self.signal = signal

    @property
    def worker_pid(self) -> int:
        """The process id of the worker."""
        return int(self.worker_id)

    def _values(self) -> tuple[Any, ...]:
        return *super()._values(), self.signal

    def to_json(self) -> str:
        """The request as a line of the pipe, without its end."""
        return json.dumps(
            {
                "version": self.version,
                "pid": self.worker_id,
                "scope_id": self.scope_id,
                "expiration_time": self.expiration_time,
                "signal": self.signal,
            }
        )


class TimerClient(abc.ABC):
    """The worker's side: tells a server of the scopes that the worker enters and leaves."""

    @abc.abstractmethod
    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """The worker enters a scope, which it must have left by then (seconds since 1970)."""

    @abc.abstractmethod
    def release(self, scope_id: str) -> None:
        """The worker has left a scope."""


_client: TimerClient | None = None


def configure(timer_client: TimerClient) -> None:
    """Set the client of this process, which ``expires`` uses."""
    global _client
    _client = timer_client
    _log.info("timer client: %s", type(timer_client).__name__)


def expires(
    after: float, scope: str | None = None, client: TimerClient | None = None
) -> contextlib._GeneratorContextManager[None]:
    """Have the process killed if it takes longer than this in a ``with`` block, or in a function that is so decorated.

    Args:
        after: seconds.
        scope: the name of the block. A process has one timer for each name. Default: the file and line of the call.
        client: default: the one that was given to ``configure``.

    Raises:
        RuntimeError: on entry, when there is no client.
    """
    if scope is None:
        caller = sys._getframe(1)
        scope = f"{caller.f_code.co_filename}#{caller.f_lineno}"
    return _in_scope(after, scope, client)


@contextlib.contextmanager
def _in_scope(after: float, scope: str, client: TimerClient | None) -> Iterator[None]:
    client = client or _client
    if client is None:
        raise RuntimeError("timer.expires: no client; call timer.configure(timer.FileTimerClient(path)) before")
    client.acquire(scope, time.time() + after)
    try:
        yield
    finally:
        client.release(scope)


class FileTimerClient(TimerClient):
    """Tells the reader of a named pipe: an agent with ``TORCHELASTIC_ENABLE_FILE_TIMER=1``, or a ``FileTimerServer``.

    It opens the pipe for each request, so it may be used in any thread and in forked children.
    """

    def __init__(self, file_path: str, signal: signals.Signals = signals.SIGKILL) -> None:
        """Make a client.

        Args:
            file_path: the named pipe; under an agent the value of ``TORCHELASTIC_TIMER_FILE``.
            signal: what the process is to be killed with.
        """
        super().__init__()
        self._file_path = file_path
        self.signal = signal

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Tell that this process enters a scope.

        Raises:
            BrokenPipeError: nobody reads the pipe, for ``PATIENCE`` seconds.
            BlockingIOError: the pipe is full, for ``PATIENCE`` seconds.
            RuntimeError: the name of the scope is too long.
        """
        self._send(FileTimerRequest(os.getpid(), scope_id, expiration_time, int(self.signal)))

    def release(self, scope_id: str) -> None:
        """Tell that this process has left a scope. Raises what ``acquire`` raises."""
        self._send(FileTimerRequest(os.getpid(), scope_id, -1))

    def _send(self, request: FileTimerRequest) -> None:
        line = f"{request.to_json()}\n".encode()
        if len(line) > LONGEST:
            raise RuntimeError(f"a timer request has at most {LONGEST} bytes, this one {len(line)}: shorten the scope")
        end = time.monotonic() + PATIENCE
        fd = self._open(end)
        try:
            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            while True:
                # A pipe takes so short a line whole or not at all, and so it comes out.
                with contextlib.suppress(BlockingIOError):
                    os.write(fd, line)
                    return
                if not poller.poll(max(0.0, end - time.monotonic()) * 1000):
                    raise BlockingIOError(errno.EAGAIN, "full, its reader has stopped reading", self._file_path)
        finally:
            os.close(fd)

    def _open(self, end: float) -> int:
        """Open the pipe. What opens it for reading cannot be waited for, so look again until ``end``."""
        while True:
            try:
                fd = os.open(self._file_path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                if time.monotonic() >= end:
                    raise BrokenPipeError(
                        f"cannot reach a timer server at {self._file_path}: {error.strerror}; "
                        "start the job with TORCHELASTIC_ENABLE_FILE_TIMER=1"
                    ) from error
                time.sleep(PATIENCE / 20)
                continue
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                return fd
            os.close(fd)
            raise BrokenPipeError(f"cannot reach a timer server at {self._file_path}: it is no named pipe")


class LocalTimerClient(TimerClient):
    """Tells a ``LocalTimerServer`` through a queue of ``multiprocessing``."""

    def __init__(self, mp_queue: Queue[TimerRequest]) -> None:
        super().__init__()
        self._mp_queue = mp_queue

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Tell that this process enters a scope."""
        self._mp_queue.put(TimerRequest(os.getpid(), scope_id, expiration_time))

    def release(self, scope_id: str) -> None:
        """Tell that this process has left a scope."""
        self._mp_queue.put(TimerRequest(os.getpid(), scope_id, -1))
