"""Layer 3: the driver of ``core.rendezvous``: its requests go to the job's store, the store's answers come back.

Two connections that never block: one for requests, one that waits for a key to appear. One that is lost is made again,
and what it had not answered is asked again. Decides when to give up the store; all else is decided in ``core``.
"""

from __future__ import annotations

import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import NamedTuple

from elastic_launch.core.agent.lifecycle import (
    AgentEvent,
    Assigned,
    Decided,
    Ended,
    Leave,
    RendezvousAction,
    RequestJoin,
)
from elastic_launch.core.rendezvous.node import Node
from elastic_launch.core.rendezvous.protocol import (
    Answered,
    Appeared,
    Ask,
    Closing,
    Found,
    Lease,
    Log,
    Lost,
    Notify,
    Opening,
    Passing,
    Phase,
    Renew,
    Settings,
)
from elastic_launch.core.rendezvous.protocol import Event as NodeEvent
from elastic_launch.core.rendezvous.records import NodeRecord
from elastic_launch.core.store_requests import Append, Cancel, Set, Wait
from elastic_launch.errors import ExitCode, RendezvousConnectionError, RendezvousError
from elastic_launch.host.ports import outward_address, reserve_port
from elastic_launch.job import Level
from elastic_launch.rendezvous.backends import Backend
from elastic_launch.store.client import NotAStoreError, StoreClient

RETRY_FIRST, RETRY_LATER = 0.02, 1.0
"""Seconds between attempts to connect: at first, and when they have doubled up."""
DOUBTS = 3
"""How often in a row something has to look like no store, until that is believed: a server that ends looks so, too."""
SAY_UNREACHABLE = 10.0
"""Seconds between two lines that tell that the store cannot be reached."""
FAREWELL = 5.0
"""Seconds, at most, that a node takes to say goodbye to a store that does not answer."""


UNACKNOWLEDGED = (Set, Append)
"""Requests that the store does not answer."""


class Timeouts(NamedTuple):
    """In seconds."""

    read: float = 60.0
    """For an answer of the store."""
    store: float = 60.0
    """For a store that was lost to come back."""


class DynamicRendezvous:
    """The rendezvous of a job of many nodes, as the agent sees it."""

    def __init__(
        self,
        settings: Settings,
        record: NodeRecord,
        backend: Backend,
        log: Callable[[str], None],
        timeouts: Timeouts = Timeouts(),  # noqa: B008 - a value
        verbosity: int = Level.INFO,
    ) -> None:
        """Take what the job's nodes agree on, this node's record, and the store; nothing is started yet."""
        self.lease: Callable[[float], None] = lambda until: None
        """Takes the time until which the workers may live, whenever it is later."""
        self._verbosity = verbosity
        self._settings = settings
        self._node = Node(record, settings)
        self._backend = backend
        self._log = log
        self._timeouts = timeouts
        self._events: list[AgentEvent] = []
        self._is_open = False
        self._reserved: socket.socket | None = None
        self._calls: StoreClient | None = None
        self._waits: StoreClient | None = None
        self._unanswered: deque[tuple[Ask, float]] = deque()
        """What the store has to answer, and when that was asked of the connection that there is."""
        self._awaited: str | None = None
        self._store_addr = ""
        self._was_ready = self._has_met = self._has_answer = self._has_given_up = self._has_left = False
        self._connected_at = 0.0
        self._lost_at = 0.0
        """When the store was there for the last time, or was first looked for."""
        self._retry_at = 0.0
        self._attempts = self._doubts = 0
        self._said_at = 0.0
        self._why: RendezvousConnectionError | None = None

    def get_run_id(self) -> str:
        """The job's id."""
        return self._settings.run_id

    def ask(self, action: RendezvousAction) -> list[AgentEvent]:
        """Take an action of the agent; most answers come later, from ``take``."""
        self._has_left |= isinstance(action, Leave)
        if isinstance(action, RequestJoin):
            self._step(Opening(self._port()))
        else:
            self._step(action)
        self._turn()
        return self._take_events()

    def descriptors(self) -> list[tuple[int, int]]:
        """The connections, and what the backend looks after."""
        found = [] if self._has_given_up else self._backend.descriptors()
        for client in (self._calls, self._waits):
            if client and client.fileno() >= 0:
                found.append((client.fileno(), select.POLLIN | (select.POLLOUT if client.wants_write() else 0)))
        return found

    def deadline(self) -> float | None:
        """When the node, or a connection, needs attention."""
        times = [self._node.deadline] if self._node.deadline is not None else []
        if self._has_given_up:
            pass
        elif self._calls is None or not self._calls.ready:
            times.append(self._connected_at + self._timeouts.read if self._calls else self._retry_at)
            times += [self._lost_at + self._patience, self._said_at + SAY_UNREACHABLE]
        elif (since := self._asked_at()) is not None:
            times += [since + self._silence_limit, max(since, self._said_at) + SAY_UNREACHABLE]
        return min(times, default=None)

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        """Read answers, keep time, connect anew."""
        self._turn()
        if self._node.deadline is not None and time.monotonic() >= self._node.deadline:
            self._step(Passing())
            self._turn()
        return self._take_events()

    def close(self) -> None:
        """Say goodbye, which takes some seconds at most; the store's host waits until the others know the outcome."""
        try:
            if self._is_open:
                if not (self._has_left or self._node.phase is Phase.LEAVING):
                    self._step(Leave(signal.SIGTERM))
                self._step(Closing())
                self._say_goodbye()
        except RendezvousError:
            pass  # without a store there is nobody to say it to
        finally:
            self._disconnect()
            self._release()
            self._backend.close()

    def _port(self) -> int:
        """The port that this node offers for the workers' store in the next round.

        torch's process groups would meet keys of the round before in a store that served it. So the job's store serves
        the workers of the first round only, and a fresh one those of each further round.
        """
        is_first = not self._is_open
        self._open()
        if self._settings.store_port:
            return 0 if is_first else self._backend.fresh_store()
        self._release()
        self._reserved = reserve_port()
        return int(self._reserved.getsockname()[1])

    # --- the node

    def _step(self, event: NodeEvent) -> None:
        now = time.monotonic()
        for output in self._node.step(event, now):
            match output:
                case Ask():
                    self._unanswered.append((output, now))
                    if self._calls:
                        self._calls.submit(output.request, output)
                case Log(text, level):
                    if level <= self._verbosity:
                        self._log(text)
                case Lease(until):
                    self.lease(until)
                case Renew():
                    self._node.me = self._node.me._replace(port=self._backend.fresh_store())
                case Notify(told):
                    self._events.append(self._completed(told))

    def _completed(self, event: Assigned | Ended | Decided) -> AgentEvent:
        """What only this side knows: the store's address, the time of day."""
        match event:
            case Assigned(assignment) if not assignment.master_addr:
                return Assigned(assignment._replace(master_addr=self._store_addr))
            case Ended(end, _):
                return Ended(end, time.time())
            case Decided(decision) if decision.status == ExitCode.TIMEOUT and not self._has_answer:
                why = self._backend.explain(self._why or self._silence(self._settings.join_timeout))
                return Decided(decision._replace(error=str(why), status=ExitCode.UNAVAILABLE))
        return event

    def _take_events(self) -> list[AgentEvent]:
        events, self._events = self._events, []
        return events

    # --- the connections

    def _open(self) -> None:
        if not self._is_open:
            self._is_open = True
            self._lost_at = self._said_at = time.monotonic()
            self._backend.open()
            self._node.me = self._node.me._replace(serves=self._backend.serves)
            self._node.stays = self._backend.stays

    def _turn(self) -> None:
        """Read what has come, and send what that leads to; what is answered to it wakes the loop again."""
        if self._has_given_up:
            return
        try:
            self._backend.take()
        except RendezvousConnectionError as error:
            self._give_up(str(error))  # it will not come back by itself
            return
        try:
            if self._calls is None and time.monotonic() >= self._retry_at:
                self._connect()
            self._read()
            self._await()
            for client in (self._calls, self._waits):
                if client:
                    client.flush()
            self._check_patience()
        except RendezvousConnectionError as error:
            self._lose(error)

    def _read(self) -> None:
        """Hand the answers that have come to the node."""
        if not self._calls or not self._waits:
            return
        answers = self._calls.take()
        if self._calls.ready and not self._was_ready:
            self._greet(self._calls)
        if answers:
            self._has_answer = True
            self._attempts = self._doubts = 0  # a greeting alone is no proof: the store may drop us at each request
            self._why = None
        for ask, value in answers:
            if isinstance(ask.request, UNACKNOWLEDGED):
                continue  # it is on its way; that it has arrived the next answer tells
            while self._unanswered.popleft()[0] is not ask:
                pass
            self._step(Answered(ask.what, ask.round, value, ask.about))
        came = self._waits.take()
        for key, appeared in came:
            if key == self._awaited:
                self._awaited = None
            if appeared and key == self._node.awaiting:
                self._step(Appeared(key))

    def _asked_at(self) -> float | None:
        """Since when the store owes an answer."""
        return next((at for ask, at in self._unanswered if not isinstance(ask.request, UNACKNOWLEDGED)), None)

    def _await(self) -> None:
        """Have the second connection wait for what the node wants to learn of."""
        if self._waits and self._node.awaiting != self._awaited:
            if self._awaited is not None:
                self._waits.submit(Cancel())
            self._awaited = self._node.awaiting
            if self._awaited is not None:
                self._waits.submit(Wait((self._awaited,)), self._awaited)

    def _connect(self) -> None:
        self._connected_at = time.monotonic()
        self._was_ready = False
        self._calls = self._backend.connect()
        self._node.me = self._node.me._replace(serves=self._backend.serves)
        self._waits = self._backend.connect()
        self._awaited = None
        again, self._unanswered = self._unanswered, deque()
        for ask, _ in again:
            self._unanswered.append((ask, self._connected_at))
            self._calls.submit(ask.request, ask)

    def _greet(self, client: StoreClient) -> None:
        """The store answers."""
        self._was_ready = True
        own, self._store_addr = self._backend.addresses(client)
        if not self._node.me.named:
            self._node.me = self._node.me._replace(address=own, outward=outward_address())
        if self._has_met:
            self._step(Found())
        self._has_met = True

    def _lose(self, error: RendezvousConnectionError) -> None:
        """The store cannot be reached: try again, or give it up."""
        now = time.monotonic()
        if self._why is None and self._has_answer:
            self._lost_at = min(self._asked_at() or now, now)
        self._disconnect()
        self._why = error
        if self._has_answer:
            why = str(error).removeprefix(f"{self._backend.where}: ")
            self._why = RendezvousConnectionError(f"{self._backend.where} is lost: {why}")
        if isinstance(error, NotAStoreError):
            self._doubts = DOUBTS if error.certain else self._doubts + 1
        self._attempts += 1
        self._retry_at = now + min(RETRY_FIRST * 2 ** min(self._attempts, 10), RETRY_LATER)
        if self._node.is_settled:
            self._give_up("")  # nothing is needed of the store any more
        elif self._doubts >= DOUBTS:
            self._give_up(str(self._backend.explain(error)))
        else:
            self._check_patience()

    def _disconnect(self) -> None:
        for client in (self._calls, self._waits):
            if client:
                client.close()
        self._calls = self._waits = None
        self._was_ready = False

    def _check_patience(self) -> None:
        now = time.monotonic()
        if self._calls and not self._calls.ready and now - self._connected_at >= self._timeouts.read:
            raise self._calls.timeout_error(self._timeouts.read)
        since = self._asked_at() if self._calls and self._calls.ready else None
        if self._calls and since is not None and now - since >= self._silence_limit:
            raise self._calls.timeout_error(self._silence_limit)
        if self._calls and self._calls.ready and self._why is None:
            if since is not None and now - max(since, self._said_at) >= SAY_UNREACHABLE:
                self._said_at = now
                self._log(f"{self._backend.where} has not answered for {now - since:.0f} s")
            return
        away = now - self._lost_at
        if away >= self._patience:
            why = self._backend.explain(self._why or self._silence(away))
            self._give_up(f"{why} (tried for {away:.0f} s)")
        elif now - self._said_at >= SAY_UNREACHABLE:
            self._said_at = now
            self._log(f"{self._why or self._silence(away)}; trying for up to {self._patience - away:.0f} s more")

    @property
    def _silence_limit(self) -> float:
        """Seconds that an answer may take: then a new connection tells sooner whether the store is there."""
        return min(self._timeouts.read, self._settings.keep_alive_deadline)

    @property
    def _patience(self) -> float:
        """Seconds that the store is looked for."""
        return self._timeouts.store if self._has_answer else self._settings.join_timeout

    def _silence(self, seconds: float) -> RendezvousConnectionError:
        """What to say of a store that has not said anything."""
        if self._calls:
            return self._calls.timeout_error(round(seconds))
        return RendezvousConnectionError(f"{self._backend.where}: no connection after {seconds:.0f} s")

    def _give_up(self, text: str) -> None:
        """Without the store the node cannot go on; its workers are stopped in good order."""
        self._has_given_up = True
        self._disconnect()
        self._step(Lost(text, ExitCode.UNAVAILABLE))

    def _release(self) -> None:
        if self._reserved:
            self._reserved.close()
            self._reserved = None

    def _say_goodbye(self) -> None:
        end = self._node.deadline or time.monotonic() + FAREWELL
        while not self._node.is_gone and time.monotonic() < end:
            self._turn()
            if self._calls is None or self._node.is_gone:
                break
            poller = select.poll()
            for fd, mask in self.descriptors():
                poller.register(fd, mask)
            poller.poll(max(0.0, end - time.monotonic()) * 1000)
        if self._calls:
            self._calls.flush()
