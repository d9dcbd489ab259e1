"""Layer 2: servers for programs that watch over timers themselves, without an agent. Each is a thread, and kills.

Reads a named pipe or a queue; runs in such programs only. The agent's own side is ``watchdog``.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import os
import select
import signal as signals
import stat
import threading
import time
from collections.abc import Callable
from queue import Empty
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from elastic_launch.core.timer_requests import take_requests
from elastic_launch.timer.client import FileTimerRequest, TimerRequest

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

_READ = 1 << 16
"""Bytes: what a pipe holds."""

_log = logging.getLogger(__name__)


class RequestQueue(abc.ABC):
    """Where a ``TimerServer`` finds the requests of its clients."""

    @abc.abstractmethod
    def size(self) -> int:
        """About how many requests there are."""

    @abc.abstractmethod
    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        """Take up to ``size`` requests, and wait up to ``timeout`` seconds for them."""


class MultiprocessingRequestQueue(RequestQueue):
    """A queue of ``multiprocessing``."""

    def __init__(self, mp_queue: Queue[TimerRequest]) -> None:
        super().__init__()
        self._mp_queue = mp_queue

    def size(self) -> int:
        """About how many requests there are."""
        return self._mp_queue.qsize()

    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        """Take up to ``size`` requests, and wait up to ``timeout`` seconds for them."""
        requests: list[TimerRequest] = []
        end = time.monotonic() + timeout
        with contextlib.suppress(Empty):
            while len(requests) < size:
                requests.append(self._mp_queue.get(timeout=max(0.0, end - time.monotonic())))
        return requests


_Request = TypeVar("_Request", bound=TimerRequest)


class _Timers(Generic[_Request]):
    """The timers that a server knows: one for each worker and scope."""

    def __init__(self) -> None:
        self._timers: dict[tuple[Any, str], _Request] = {}

    def register_timers(self, timer_requests: list[_Request]) -> None:
        """Set the timers of scopes that were entered, cancel those of scopes that were left."""
        for request in timer_requests:
            key = request.worker_id, request.scope_id
            if request.expiration_time < 0:
                self._timers.pop(key, None)
            else:
                self._timers[key] = request

    def clear_timers(self, worker_ids: set[Any]) -> None:
        """Cancel all timers of these workers."""
        self._timers = {key: request for key, request in self._timers.items() if key[0] not in worker_ids}

    def get_expired_timers(self, deadline: float) -> dict[Any, list[_Request]]:
        """The timers that expire up to ``deadline`` (seconds since 1970), by worker."""
        expired: dict[Any, list[_Request]] = {}
        for request in self._timers.values():
            if request.expiration_time <= deadline:
                expired.setdefault(request.worker_id, []).append(request)
        return expired


class TimerServer(abc.ABC):
    """Watches, in a thread, over the workers whose requests come in a queue; how it kills one is a subclass's part."""

    def __init__(self, request_queue: RequestQueue, max_interval: float, daemon: bool = True) -> None:
        """Make a server.

        Args:
            request_queue: where the requests come.
            max_interval: seconds; how late the death of a worker may be.
            daemon: whether the program may end while the thread runs.
        """
        super().__init__()
        self._request_queue = request_queue
        self._max_interval = max_interval
        self._daemon = daemon
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    @abc.abstractmethod
    def register_timers(self, timer_requests: list[TimerRequest]) -> None:
        """Set the timers of scopes that were entered, cancel those of scopes that were left."""

    @abc.abstractmethod
    def clear_timers(self, worker_ids: set[Any]) -> None:
        """Cancel all timers of these workers."""

    @abc.abstractmethod
    def get_expired_timers(self, deadline: float) -> dict[Any, list[TimerRequest]]:
        """The timers that expire up to ``deadline`` (seconds since 1970), by worker."""

    @abc.abstractmethod
    def _reap_worker(self, worker_id: Any) -> bool:
        """Kill a worker. Returns whether it is dead; if not, the server tries again."""

    def start(self) -> None:
        """Start the thread."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self._watch, name=type(self).__name__, daemon=self._daemon)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, and wait for it for up to ``max_interval``."""
        self._stopping.set()
        if self._thread:
            self._thread.join(self._max_interval)
            self._thread = None

    def _watch(self) -> None:
        while not self._stopping.is_set():
            try:
                self._look()
            except Exception:
                _log.exception("the timer server goes on after an error")

    def _look(self) -> None:
        self.register_timers(self._request_queue.get(max(1, self._request_queue.size()), self._max_interval))
        reaped = set()
        for worker_id, requests in self.get_expired_timers(time.time()).items():
            _log.info("killing worker %s: expired: %s", worker_id, [request.scope_id for request in requests])
            try:
                dead = self._reap_worker(worker_id)
            except Exception:
                _log.exception("killing worker %s", worker_id)
                dead = True  # a reaper that raises is not asked again and again
            if dead:
                reaped.add(worker_id)
            else:
                _log.error("could not kill worker %s; will try again", worker_id)
        self.clear_timers(reaped)


class LocalTimerServer(_Timers[TimerRequest], TimerServer):
    """Kills processes of this host with SIGKILL; their requests come in a queue of ``multiprocessing``."""

    def __init__(self, mp_queue: Queue[TimerRequest], max_interval: float = 60, daemon: bool = True) -> None:
        _Timers.__init__(self)
        TimerServer.__init__(self, MultiprocessingRequestQueue(mp_queue), max_interval, daemon)

    def _reap_worker(self, worker_id: Any) -> bool:
        return _kill(worker_id, signals.SIGKILL)


class FileTimerServer(_Timers[FileTimerRequest]):
    """Reads a named pipe, in a thread, and kills the processes that have not left a scope in time.

    For programs of your own: an agent with ``TORCHELASTIC_ENABLE_FILE_TIMER=1`` needs none.
    """

    def __init__(
        self,
        file_path: str,
        run_id: str,
        max_interval: float = 10,
        daemon: bool = True,
        log_event: Callable[[str, FileTimerRequest | None], None] | None = None,
    ) -> None:
        """Make the pipe; a pipe of that path is replaced. A server runs once; ``stop`` removes its pipe.

        Args:
            file_path: the named pipe.
            run_id: the job's id, for the log.
            max_interval: seconds; the longest time between two looks at the timers.
            daemon: whether the program may end while the thread runs.
            log_event: is told what happens: ``watchdog started``, ``timer expired``, ``kill worker process``,
                ``watchdog stopped``, and the request where it is about one.

        Raises:
            OSError: the pipe cannot be made, or there is a file that is no pipe.
        """
        super().__init__()
        self._file_path = file_path
        self._run_id = run_id
        self._max_interval = max_interval
        self._daemon = daemon
        self._log_event = log_event or (lambda name, request: None)
        self._buffer = bytearray()
        self._progress = int(time.time())
        self._thread: threading.Thread | None = None
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISFIFO(os.lstat(file_path).st_mode):
                os.unlink(file_path)
        os.mkfifo(file_path, 0o600)
        # Open for writing, too: else the pipe were at its end whenever no client has it open.
        self._fd = os.open(file_path, os.O_RDWR | os.O_NONBLOCK)
        self._wake = os.eventfd(0)

    def clear_timers(self, worker_pids: set[int]) -> None:  # the argument's name is torch's
        """Cancel all timers of these processes."""
        super().clear_timers(worker_pids)

    def start(self) -> None:
        """Start the thread."""
        _log.info("timer server of job %s: %s", self._run_id, self._file_path)
        self._thread = threading.Thread(target=self._watch, name=type(self).__name__, daemon=self._daemon)
        self._thread.start()
        self._log_event("watchdog started", None)

    def stop(self) -> None:
        """Stop the thread, and remove the pipe."""
        if self._fd < 0:
            return
        os.eventfd_write(self._wake, 1)
        if self._thread:
            self._thread.join()
            self._thread = None
        os.close(self._fd)
        os.close(self._wake)
        self._fd = -1
        with contextlib.suppress(OSError):
            os.unlink(self._file_path)
        self._log_event("watchdog stopped", None)

    def run_once(self) -> None:
        """Read what there is, and kill whose time is over, without a thread and without waiting."""
        self._look()

    def get_last_progress_time(self) -> int:
        """When the server last looked at its timers, in seconds since 1970; with no timer set, now."""
        return self._progress if self._timers else int(time.time())

    @staticmethod
    def is_process_running(pid: int) -> bool:
        """Whether there is a process of that id."""
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass
        return True

    def _watch(self) -> None:
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while self._wake not in (fd for fd, _ in poller.poll(self._until_next() * 1000)):
            try:
                self._look()
            except Exception:
                _log.exception("the timer server goes on after an error")

    def _until_next(self) -> float:
        """Seconds until the next timer expires, ``max_interval`` at most."""
        first = min((request.expiration_time for request in self._timers.values()), default=float("inf"))
        return max(0.0, min(self._max_interval, first - time.time()))

    def _look(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self._buffer += os.read(self._fd, _READ)
                self.register_timers([FileTimerRequest(*request) for request in take_requests(self._buffer)])
        self._progress = int(time.time())
        done = {pid for pid, _ in self._timers if not self.is_process_running(pid)}
        for pid, requests in self.get_expired_timers(time.time()).items():
            if pid not in done:
                first = requests[0]
                self._log_event("timer expired", first)
                _log.info("killing process %s: expired: %s", pid, [request.scope_id for request in requests])
                if self._reap_worker(pid, first.signal):
                    self._log_event("kill worker process", first)
                done.add(pid)  # what may not be killed now may not be killed later
        self.clear_timers(done)

    def _reap_worker(self, worker_pid: int, signal: int) -> bool:
        return _kill(worker_pid, signal)


def _kill(pid: int, signum: int) -> bool:
    """Send a signal. Returns whether the process had it or is gone."""
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        pass
    except Exception:
        _log.exception("cannot kill process %s", pid)
        return False
    return True
