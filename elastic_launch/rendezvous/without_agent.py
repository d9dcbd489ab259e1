"""Lets a program take part in the rounds of a built-in backend without an agent, by torch's interface.

A thread does what the agent's loop does: it answers the other nodes and sends heartbeats, also while the program is
busy. It holds the lock except while it waits. Workers are the program's own affair.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from elastic_launch import errors
from elastic_launch.config import LaunchConfig
from elastic_launch.core.agent.messages import (
    AgentEvent,
    Assigned,
    Decided,
    Ended,
    Leave,
    RendezvousAction,
    ReportRound,
    RequestJoin,
    RequestRestart,
)
from elastic_launch.core.store_requests import Add, Delete, Get, Request, Set
from elastic_launch.env import environment
from elastic_launch.host.console import log
from elastic_launch.host.resolver import PendingError
from elastic_launch.job import Assignment, Decision
from elastic_launch.rendezvous.factory import create_store_rendezvous
from elastic_launch.rendezvous.handler import RendezvousInfo, RendezvousStoreInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    from elastic_launch.store.client import StoreClient

STORE_TIMEOUT = 300.0
"""Seconds that ``get`` and ``wait`` of the store wait for keys; torch's default."""
_CONNECT_TIMEOUT = 10.0
"""Seconds that a new connection may take."""
_FIRST_POLL, _LAST_POLL = 0.01, 0.5
"""Seconds between two looks for a key. They grow from the first to the last."""


class JobStore:
    """The keys of one round in the job's store, with the methods of torch's ``Store``."""

    def __init__(self, connect: Callable[[], StoreClient], prefix: str) -> None:
        self._connect = connect
        self._prefix = prefix
        self._lock = threading.Lock()
        self._client: StoreClient | None = None

    def set(self, key: str, value: str | bytes) -> None:
        """Set the value of a key."""
        data = value.encode() if isinstance(value, str) else value
        self._call(Set(((self._name(key), data),)))
        self.check([key])  # a reply, so that other nodes see the value from now on

    def get(self, key: str) -> bytes:
        """Return the value of a key. See ``wait``."""
        self.wait([key])
        return self._read([key])[0]

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, which begins at 0, and return the sum."""
        return int(self._call(Add(self._name(key), amount)))

    def check(self, keys: list[str]) -> bool:
        """Return whether all the keys exist."""
        return all(self._read(keys))

    def delete_key(self, key: str) -> bool:
        """Delete a key. Return whether it existed."""
        return bool(self._call(Delete(self._name(key))))

    def wait(self, keys: list[str], timeout: float = STORE_TIMEOUT) -> None:
        """Wait until all the keys exist.

        Raises:
            RendezvousConnectionError: they do not after ``timeout`` seconds, or the store is lost.
        """
        end, pause = time.monotonic() + timeout, _FIRST_POLL
        while not self.check(keys):
            if time.monotonic() >= end:
                raise errors.RendezvousConnectionError(f"{', '.join(keys)}: not set within {timeout:g} s")
            time.sleep(pause)
            pause = min(pause * 1.5, _LAST_POLL)

    def close(self) -> None:
        """Close the connection. The next call opens another one."""
        with self._lock:
            if self._client:
                self._client.close()
                self._client = None

    def _name(self, key: str) -> str:
        return f"{self._prefix}{key}"

    def _read(self, keys: list[str]) -> list[bytes]:
        found: list[bytes] = self._call(Get(tuple(map(self._name, keys))))
        return found

    def _call(self, request: Request) -> Any:
        with self._lock:
            self._client = self._client or self._connect()
            return self._client.call(request, STORE_TIMEOUT)


class Member:
    """One node's part in a job, from its first ``next_rendezvous`` to its end."""

    def __init__(self, config: LaunchConfig) -> None:
        self._run_id = config.run_id or "none"
        self._rendezvous = create_store_rendezvous(config, environment(), log)
        self._lock = threading.Condition()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._store: JobStore | None = None
        self._thread: threading.Thread | None = threading.Thread(
            target=self._work, name="elastic-launch-member", daemon=True
        )
        # Shared with the thread:
        self.assignment: Assignment | None = None
        """This node's part in the round; None: it has none yet."""
        self.is_closed = False
        """Whether the job has ended."""
        self.has_ended = False
        """Whether the round has ended, and another one follows."""
        self._is_between = True
        """Whether this node may join a round: none has begun, or all nodes know that the last one has ended."""
        self._error: Exception | None = None
        self._stops = False
        self._thread.start()

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the next round; see ``RendezvousHandler``."""
        with self._lock:
            if not self._is_between:  # the program wants another round
                if not (self.has_ended or self._over()):
                    self._do(RequestRestart("a program asks for the next round"))
                self._lock.wait_for(lambda: self._is_between or self._over())
            self._raise()
            self.assignment, self.has_ended, self._is_between = None, False, False
            self._do(RequestJoin())
            self._lock.wait_for(lambda: self.assignment or self._over())
            self._raise()
            place = self.assignment
            assert place
            past = self._store
            prefix = f"elastic/{self._run_id}/handler/{place.restart_count}/"
            self._store = store = JobStore(self._connect, prefix)
        if past:
            past.close()  # without the lock: it waits for a call of another thread
        where = RendezvousStoreInfo(place.master_addr, place.master_port)
        return RendezvousInfo(store, place.group_rank, place.group_world_size, where)

    def end(self) -> None:
        """End the job for all nodes, and release everything."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is None:
                return
            if not self._over():
                with contextlib.suppress(errors.LaunchError):
                    self._do(Leave(signal.SIGTERM, reason="a program has closed the rendezvous"))
            self.is_closed = self._stops = True
            os.eventfd_write(self._wake, 1)
            self._lock.notify_all()
        thread.join()
        os.close(self._wake)
        if self._store:
            self._store.close()

    def _connect(self) -> StoreClient:
        """Return a connection to the store, through the first of its addresses that answers.

        The lock is held only while the backend is used: the thread must send heartbeats meanwhile.
        """
        backend, end = self._rendezvous.backend, time.monotonic() + _CONNECT_TIMEOUT
        while True:
            try:
                with self._lock:
                    client = backend.connect()
            except PendingError:
                if time.monotonic() >= end:
                    raise
                time.sleep(_LAST_POLL)
                continue
            try:
                client.call(Get((f"elastic/{self._run_id}/round",)), _CONNECT_TIMEOUT)
            except errors.RendezvousConnectionError:
                client.close()
                if not backend.has_untried_address():
                    raise
            else:
                return client

    def _over(self) -> bool:
        return self.is_closed or self._error is not None

    def _raise(self) -> None:
        if self._error:
            raise self._error
        if self.is_closed:
            raise errors.RendezvousClosedError(f"job {self._run_id} has ended")

    def _do(self, action: RendezvousAction) -> None:
        self._handle(self._rendezvous.ask(action))
        os.eventfd_write(self._wake, 1)

    def _work(self) -> None:
        try:
            while not self._stops:
                with self._lock:
                    waits, deadline = self._rendezvous.descriptors(), self._rendezvous.deadline()
                poller = select.poll()
                for fd, mask in (*waits, (self._wake, select.POLLIN)):
                    poller.register(fd, mask)
                seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
                ready = {fd for fd, _ in poller.poll(None if seconds is None else seconds * 1000)}
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
                with self._lock:
                    self._handle(self._rendezvous.take(ready))
        except Exception as error:
            self._error = error
        finally:
            with self._lock:
                self._rendezvous.close()
                self._lock.notify_all()

    def _handle(self, events: list[AgentEvent]) -> None:
        for event in events:
            match event:
                case Assigned(assignment):
                    self.assignment = assignment
                case Ended():
                    self.has_ended = True
                    history = self.assignment.restart_history if self.assignment else Decision(True).restart_history
                    self._do(ReportRound(Decision(True, history)))
                case Decided(decision):
                    self._is_between = decision.restart
                    self.is_closed = not decision.restart
                    if decision.error:
                        kind = errors.RendezvousTimeoutError if decision.status == errors.ExitCode.TIMEOUT else None
                        self._error = (kind or errors.RendezvousConnectionError)(decision.error)
        if events:
            self._lock.notify_all()
