"""Timer servers for programs without an agent: threads that receive requests and kill processes.

The agent does not use them; its side is ``workers.watchdog``.
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
"""Bytes to read at a time: the capacity of a pipe."""

_log = logging.getLogger(__name__)


class RequestQueue(abc.ABC):
    """Delivers the requests of clients to a ``TimerServer``."""

    @abc.abstractmethod
    def size(self) -> int:
        """Return the approximate number of requests in the queue."""

    @abc.abstractmethod
    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        """Remove and return up to ``size`` requests, waiting up to ``timeout`` seconds for them."""


class MultiprocessingRequestQueue(RequestQueue):
    """Delivers requests from a queue of ``multiprocessing``."""

    def __init__(self, mp_queue: Queue[TimerRequest]) -> None:
        self._mp_queue = mp_queue

    def size(self) -> int:
        """Return the approximate number of requests in the queue."""
        return self._mp_queue.qsize()

    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        """Remove and return up to ``size`` requests, waiting up to ``timeout`` seconds for them."""
        requests: list[TimerRequest] = []
        end = time.monotonic() + timeout
        with contextlib.suppress(Empty):
            while len(requests) < size:
                requests.append(self._mp_queue.get(timeout=max(0.0, end - time.monotonic())))
        return requests


_Request = TypeVar("_Request", bound=TimerRequest)


class _Timers(Generic[_Request]):
    """The pending timers of a server, one for each worker and scope."""

    def __init__(self) -> None:
        self._timers: dict[tuple[Any, str], _Request] = {}

    def register_timers(self, timer_requests: list[_Request]) -> None:
        """Set the timers of scopes that were entered, and cancel those of scopes that were left."""
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
        """Return the timers that expire by ``deadline``, in seconds since 1970, by worker."""
        expired: dict[Any, list[_Request]] = {}
        for request in self._timers.values():
            if request.expiration_time <= deadline:
                expired.setdefault(request.worker_id, []).append(request)
        return expired


class TimerServer(abc.ABC):
    """Kills workers when their timers expire, in a thread. Subclasses define how to keep timers and kill workers."""

    def __init__(self, request_queue: RequestQueue, max_interval: float, daemon: bool = True) -> None:
        """Create a server.

        Args:
            request_queue: delivers the requests.
            max_interval: longest time in seconds between two checks of the timers.
            daemon: whether the program may end while the thread runs.
        """
        self._request_queue = request_queue
        self._max_interval = max_interval
        self._daemon = daemon
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()

    @abc.abstractmethod
    def register_timers(self, timer_requests: list[TimerRequest]) -> None:
        """Set the timers of scopes that were entered, and cancel those of scopes that were left."""

    @abc.abstractmethod
    def clear_timers(self, worker_ids: set[Any]) -> None:
        """Cancel all timers of these workers."""

    @abc.abstractmethod
    def get_expired_timers(self, deadline: float) -> dict[Any, list[TimerRequest]]:
        """Return the timers that expire by ``deadline``, in seconds since 1970, by worker."""

    @abc.abstractmethod
    def _reap_worker(self, worker_id: Any) -> bool:
        """Kill a worker. Return whether it is dead; if not, the server tries again."""

    def start(self) -> None:
        """Start the thread."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self._watch, name=type(self).__name__, daemon=self._daemon)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, and wait up to ``max_interval`` seconds for its end."""
        self._stopping.set()
        if self._thread:
            self._thread.join(self._max_interval)
            self._thread = None

    def _watch(self) -> None:
        while not self._stopping.is_set():
            try:
                self._check()
            except Exception:
                _log.exception("the timer server continues after an error")

    def _check(self) -> None:
        self.register_timers(self._request_queue.get(max(1, self._request_queue.size()), self._max_interval))
        reaped = set()
        for worker_id, requests in self.get_expired_timers(time.time()).items():
            _log.info("killing worker %s: expired: %s", worker_id, [request.scope_id for request in requests])
            try:
                dead = self._reap_worker(worker_id)
            except Exception:
                _log.exception("cannot kill worker %s", worker_id)
                dead = True  # so that the error is not repeated in each check
            if dead:
                reaped.add(worker_id)
            else:
                _log.error("cannot kill worker %s; will try again", worker_id)
        self.clear_timers(reaped)


class LocalTimerServer(_Timers[TimerRequest], TimerServer):
    """Receives requests through a queue of ``multiprocessing``, and kills processes of this host with SIGKILL."""

    def __init__(self, mp_queue: Queue[TimerRequest], max_interval: float = 60, daemon: bool = True) -> None:
        """Create a server.

        Args:
            mp_queue: the queue that the clients were created with.
            max_interval: longest time in seconds between two checks of the timers.
            daemon: whether the program may end while the thread runs.
        """
        _Timers.__init__(self)
        TimerServer.__init__(self, MultiprocessingRequestQueue(mp_queue), max_interval, daemon)

    def _reap_worker(self, worker_id: Any) -> bool:
        return _kill(worker_id, signals.SIGKILL)


class FileTimerServer(_Timers[FileTimerRequest]):
    """Receives requests through a named pipe, and kills processes of this host with the signal that they ask for.

    It can be started once. An agent with ``TORCHELASTIC_ENABLE_FILE_TIMER=1`` does not need it.
    """

    def __init__(
        self,
        file_path: str,
        run_id: str,
        max_interval: float = 10,
        daemon: bool = True,
        log_event: Callable[[str, FileTimerRequest | None], None] | None = None,
    ) -> None:
        """Create a server and its pipe.

        Args:
            file_path: path of the named pipe. A pipe of that path is replaced.
            run_id: the job's id, for the log.
            max_interval: longest time in seconds between two checks of the timers.
            daemon: whether the program may end while the thread runs.
            log_event: called with ``watchdog started``, ``timer expired``, ``kill worker process`` and ``watchdog
                stopped``, and with the request that the event is about, or None.

        Raises:
            OSError: the pipe cannot be created, or the path names a file that is not a pipe.
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
        # Open it for writing, too. Otherwise reads would report its end whenever no client has it open.
        self._fd = os.open(file_path, os.O_RDWR | os.O_NONBLOCK)
        self._wake = os.eventfd(0)

    def clear_timers(self, worker_pids: set[int]) -> None:  # torch's name of the argument
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
        """Read all requests, and kill the processes whose timers have expired, in this thread and without waiting."""
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
                if _kill(pid, first.signal):
                    self._log_event("kill worker process", first)
                done.add(pid)  # if it cannot be killed now, it cannot be killed later
        self.clear_timers(done)

    def get_last_progress_time(self) -> int:
        """Return when the timers were last checked, in seconds since 1970; the current time if no timer is set."""
        return self._progress if self._timers else int(time.time())

    @staticmethod
    def is_process_running(pid: int) -> bool:
        """Return whether a process has this id."""
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
                self.run_once()
            except Exception:
                _log.exception("the timer server continues after an error")

    def _until_next(self) -> float:
        """Return the seconds until the next timer expires, at most ``max_interval``."""
        first = min((request.expiration_time for request in self._timers.values()), default=float("inf"))
        return max(0.0, min(self._max_interval, first - time.time()))


def _kill(pid: int, signum: int) -> bool:
    """Send a signal. Return whether the process received it or has ended."""
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        pass
    except Exception:
        _log.exception("cannot kill process %s", pid)
        return False
    return True
