"""The rendezvous of a job of several nodes, as the agent sees it: drives ``core.rendezvous`` over a ``StoreLink``."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Collection

from elastic_launch.core.agent.messages import AgentEvent, Assigned, Decided, Ended, RendezvousAction, RequestJoin
from elastic_launch.core.rendezvous import node
from elastic_launch.core.rendezvous.messages import Close, HostFacts, Input, Join, Ready, Settings, Tick
from elastic_launch.core.rendezvous.records import NodeRecord
from elastic_launch.core.rendezvous.state import NodeState
from elastic_launch.errors import ExitCode, RendezvousError
from elastic_launch.host.ports import reserve_port
from elastic_launch.job import Level
from elastic_launch.rendezvous.backends import Backend
from elastic_launch.rendezvous.store_link import LinkState, StoreLink, Timeouts

CLOSE_TIMEOUT = 5.0
"""Longest time, in seconds, that a node takes leave from a store that does not answer."""


class StoreRendezvous:
    """The rendezvous of one agent, through all its rounds."""

    def __init__(
        self,
        settings: Settings,
        record: NodeRecord,
        backend: Backend,
        log: Callable[[str], None],
        timeouts: Timeouts = Timeouts(),  # noqa: B008 - a value
        verbosity: int = Level.INFO,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        reserve: Callable[[], socket.socket] = reserve_port,
        on_step: Callable[[NodeState, Ready], None] = lambda node, ready: None,
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            settings: what the job's nodes agree on.
            record: what this node says of itself.
            backend: the store.
            log: takes each line for the log, up to the level ``verbosity``.
            timeouts: when to lose patience with the store; those that ``settings`` has are taken from there.
            verbosity: a ``Level``.
            clock: gives the time in seconds, on any monotonic clock.
            wall_clock: gives the time in seconds since 1970.
            reserve: reserves a port for a store that the worker of rank 0 serves.
            on_step: sees the node's state and what is to be done after each step, for tests.
        """
        self.lease: Callable[[float], None] = lambda until: None
        """Takes the time until which the workers may live, whenever it is extended."""
        self.log = log
        self._settings = settings
        self._verbosity = verbosity
        self._clock = clock
        self._wall_clock = wall_clock
        self._reserve = reserve
        self._on_step = on_step
        self._backend = backend
        self._node = node.begin(record, settings)
        self._wake_at: float | None = None
        self._events: list[AgentEvent] = []
        self._is_open = False
        self._reserved = contextlib.ExitStack()
        """Holds the port that is reserved for the workers' store."""
        silence = min(timeouts.read, settings.keep_alive_deadline)
        timeouts = timeouts._replace(join=settings.join_timeout, silence=silence)
        self._link = StoreLink(backend, timeouts, self, clock)

    def get_run_id(self) -> str:
        """The job's id."""
        return self._settings.run_id

    # --- what the agent asks for

    def ask(self, action: RendezvousAction) -> list[AgentEvent]:
        """Take an action of the agent; most answers come later, from ``take``."""
        self.deliver(Join(self._port()) if isinstance(action, RequestJoin) else action)
        return self.take()

    def descriptors(self) -> list[tuple[int, int]]:
        """The connections, and what the backend looks after."""
        return self._link.descriptors()

    def deadline(self) -> float | None:
        """When the node, or a connection, needs attention."""
        times = (self._wake_at, self._link.deadline() if self._is_open else None)
        return min((at for at in times if at is not None), default=None)

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        """Read answers, keep time, connect anew."""
        self._link.turn()
        if self._wake_at is not None and self._clock() >= self._wake_at:
            self.deliver(Tick())
            self._link.turn()
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Take leave, which takes some seconds at most; the store's host waits until the others know the outcome."""
        try:
            if self._is_open:
                self.begin_close()
                end = self._wake_at or self._clock() + CLOSE_TIMEOUT
                while not self.is_closed and self._clock() < end:
                    poller = select.poll()
                    for fd, mask in self.descriptors():
                        poller.register(fd, mask)
                    poller.poll(max(0.0, end - self._clock()) * 1000)
                    self._link.turn()
        except RendezvousError:
            pass  # without a store there is nobody to take leave of
        finally:
            self._link.close()
            self._reserved.close()
            self._backend.close()

    def begin_close(self) -> None:
        """Begin to take leave; ``is_closed`` tells when it is done."""
        self.deliver(Close())
        self._link.turn()

    @property
    def is_closed(self) -> bool:
        """Nothing is left to tell the other nodes, or there is no way to."""
        return self._node.may_disconnect or self._link.state in (LinkState.CONNECTING, LinkState.GIVEN_UP)

    # --- what the link asks for

    def deliver(self, given: Input) -> None:
        """Let the node take an input, and carry out what that leads to."""
        ready = node.step(self._node, given, self._clock())
        self._on_step(self._node, ready)
        for request in ready.requests:
            self._link.submit(request)
        self._link.await_key(ready.awaited_key)
        self._wake_at = ready.wake_at
        if ready.lease_until is not None:
            self.lease(ready.lease_until)
        for text, level in ready.log:
            if level <= self._verbosity:
                self.log(text)
        self._events += map(self._completed, ready.events)
        if ready.wants_store:
            self.deliver(HostFacts(port=self._backend.fresh_store()))

    def needs_store(self) -> bool:
        """Whether the job is not over for this node."""
        return not self._node.is_over

    # --- what only this side knows

    def _completed(self, event: Assigned | Ended | Decided) -> AgentEvent:
        """Add the store's address and the time of day, and why there is no store."""
        match event:
            case Assigned(assignment) if not assignment.master_addr:
                return Assigned(assignment._replace(master_addr=self._link.store_address))
            case Ended(end, _):
                return Ended(end, self._wall_clock())
            case Decided(decision) if decision.status == ExitCode.TIMEOUT and not self._link.has_answered:
                why = self._backend.explain(self._link.why_silent(self._settings.join_timeout))
                return Decided(decision._replace(error=str(why), status=ExitCode.UNAVAILABLE))
        return event

    def _port(self) -> int:
        """The port that this node offers for the workers' store in the next round; 0: none.

        torch's process groups would meet keys of the round before in a store that served it. So the job's store serves
        the workers of the first round only, and a fresh one those of each further round.
        """
        is_first = not self._is_open
        if is_first:
            self._is_open = True
            self._link.open()
        if self._settings.store_port:
            return 0 if is_first else self._backend.fresh_store()
        self._reserved.close()
        return int(self._reserved.enter_context(self._reserve()).getsockname()[1])
