"""The worker's side of the timers: requests, and clients that send them through a named pipe or a queue."""

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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from elastic_launch.core.timer_requests import LONGEST

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

PATIENCE = 1.0
"""Seconds that a client waits for a server that has not opened its pipe yet, or does not read from it."""

_log = logging.getLogger(__name__)


@dataclass
class TimerRequest:
    """Notifies a server that a worker has entered or left a scope."""

    worker_id: Any
    """The worker; its process id for the servers of this package."""
    scope_id: str
    """Name of the scope, chosen freely."""
    expiration_time: float
    """When the worker must have left the scope, in seconds since 1970; negative if it has left."""


@dataclass(init=False)
class FileTimerRequest(TimerRequest):
    """A request for the reader of a named pipe."""

    version: int
    """Version of the format: 1."""
    signal: int
    """Number of the signal that kills the worker; 0: none does."""

    def __init__(self, worker_pid: int, scope_id: str, expiration_time: float, signal: int = 0) -> None:
        """Create a request.

        Args:
            worker_pid: process id of the worker.
            scope_id: name of the scope, chosen freely.
            expiration_time: when the worker must have left the scope, in seconds since 1970; negative if it has left.
            signal: number of the signal that kills the worker; 0: none does.
        """
        super().__init__(worker_pid, scope_id, expiration_time)
        self.version = 1
        self.signal = signal

    @property
    def worker_pid(self) -> int:
        """Process id of the worker."""
        return int(self.worker_id)

    def to_json(self) -> str:
        """Return the request as one line of JSON, without a line end."""
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
    """Notifies a server of the scopes that the worker enters and leaves. Derive from it to use another transport."""

    @abc.abstractmethod
    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Report that the worker enters a scope.

        Args:
            scope_id: name of the scope.
            expiration_time: when the worker must have left it, in seconds since 1970.
        """

    @abc.abstractmethod
    def release(self, scope_id: str) -> None:
        """Report that the worker has left a scope."""


_client: TimerClient | None = None


def configure(timer_client: TimerClient) -> None:
    """Set the client that ``expires`` uses in this process."""
    global _client
    _client = timer_client
    _log.info("timer client: %s", type(timer_client).__name__)


def expires(
    after: float, scope: str | None = None, client: TimerClient | None = None
) -> contextlib._GeneratorContextManager[None]:
    """Limit the time of a ``with`` block or, as a decorator, of a function. If it takes longer, the process is killed.

    Args:
        after: the limit in seconds.
        scope: name of the block; None for the file and line of the call. A process has one timer for each name.
        client: sends the requests; None for the client that was passed to ``configure``.

    Raises:
        RuntimeError: there is no client. It is raised when the block is entered.
    """
    if scope is None:
        caller = sys._getframe(1)
        scope = f"{caller.f_code.co_filename}#{caller.f_lineno}"
    return _in_scope(after, scope, client)


@contextlib.contextmanager
def _in_scope(after: float, scope: str, client: TimerClient | None) -> Iterator[None]:
    client = client or _client
    if client is None:
        raise RuntimeError("timer.expires: no client; call timer.configure(timer.FileTimerClient(path)) first")
    client.acquire(scope, time.time() + after)
    try:
        yield
    finally:
        client.release(scope)


class FileTimerClient(TimerClient):
    """Sends requests to the reader of a named pipe: an agent, or a ``FileTimerServer``.

    It opens the pipe for each request, so that all threads and forked children can use it.
    """

    def __init__(self, file_path: str, signal: signals.Signals = signals.SIGKILL) -> None:
        """Create a client.

        Args:
            file_path: path of the named pipe; under an agent the value of ``TORCHELASTIC_TIMER_FILE``.
            signal: the signal that kills this process if it stays too long.
        """
        self._file_path = file_path
        self.signal = signal

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Report that this process enters a scope.

        Args:
            scope_id: name of the scope.
            expiration_time: when this process must have left it, in seconds since 1970.

        Raises:
            BrokenPipeError: no process has the pipe open for reading, for ``PATIENCE`` seconds.
            BlockingIOError: the pipe has been full for ``PATIENCE`` seconds.
            RuntimeError: the name of the scope is too long.
        """
        self._send(FileTimerRequest(os.getpid(), scope_id, expiration_time, int(self.signal)))

    def release(self, scope_id: str) -> None:
        """Report that this process has left a scope. Raises the same errors as ``acquire``."""
        self._send(FileTimerRequest(os.getpid(), scope_id, -1))

    def _send(self, request: FileTimerRequest) -> None:
        line = f"{request.to_json()}\n".encode()
        if len(line) > LONGEST:
            raise RuntimeError(
                f"a timer request of {len(line)} bytes is longer than {LONGEST}: shorten the scope's name"
            )
        end = time.monotonic() + PATIENCE
        fd = self._open(end)
        try:
            poller = select.poll()
            poller.register(fd, select.POLLOUT)
            while True:
                # A pipe accepts a line of this length either whole or not at all, so lines do not mix.
                with contextlib.suppress(BlockingIOError):
                    os.write(fd, line)
                    return
                if not poller.poll(max(0.0, end - time.monotonic()) * 1000):
                    raise BlockingIOError(errno.EAGAIN, "the pipe is full: its reader does not read", self._file_path)
        finally:
            os.close(fd)

    def _open(self, end: float) -> int:
        """Open the pipe. Retry until ``end``, because nothing signals that a reader has opened it."""
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
            raise BrokenPipeError(f"{self._file_path} is not a named pipe; pass the path in TORCHELASTIC_TIMER_FILE")


class LocalTimerClient(TimerClient):
    """Sends requests to a ``LocalTimerServer`` through a queue of ``multiprocessing``."""

    def __init__(self, mp_queue: Queue[TimerRequest]) -> None:
        self._mp_queue = mp_queue

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        """Report that this process enters a scope; ``expiration_time`` is in seconds since 1970."""
        self._mp_queue.put(TimerRequest(os.getpid(), scope_id, expiration_time))

    def release(self, scope_id: str) -> None:
        """Report that this process has left a scope."""
        self._mp_queue.put(TimerRequest(os.getpid(), scope_id, -1))
