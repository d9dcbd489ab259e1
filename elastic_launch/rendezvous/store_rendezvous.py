"""The rendezvous of a job of several nodes, as the agent sees it: drives ``core.rendezvous`` over a ``StoreLink``."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from elastic_launch.core.agent.messages import (
    AgentEvent,
    Assigned,
    Decided,
    Ended,
    RendezvousAction,
    RendezvousEvent,
    RequestJoin,
    Withdraw,
)
from elastic_launch.core.rendezvous import node, progress
from elastic_launch.core.rendezvous.messages import AgentsGone, Close, HostFacts, Input, Join, Ready, Settings, Tick
from elastic_launch.core.rendezvous.progress import Waiting
from elastic_launch.core.rendezvous.records import NodeRecord
from elastic_launch.core.rendezvous.state import NodeState
from elastic_launch.errors import ExitCode, UnavailableError
from elastic_launch.host import former
from elastic_launch.host.console import YELLOW, in_colour, log_line
from elastic_launch.host.ports import reserve_port
from elastic_launch.job import Level, LineKind
from elastic_launch.rendezvous.backends import Backend
from elastic_launch.rendezvous.store_link import LinkState, StoreLink, Timeouts

if TYPE_CHECKING:
    from elastic_launch.core.status import Meeting
    from elastic_launch.rendezvous.signing import Signer

CLOSE_TIMEOUT = 5.0
"""Longest time, in seconds, that a node takes to leave a store that does not answer."""
_MAX_POLL = 86400.0
"""Seconds. poll(2) cannot wait for more than 24 days, but a timeout may be longer."""


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
        name: str = "c10d",
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        reserve: Callable[[], socket.socket] = reserve_port,
        is_gone: Callable[[int, int], bool] = former.is_gone,
        on_step: Callable[[NodeState, Ready], None] = lambda node, ready: None,
        signer: Signer | None = None,
    ) -> None:
        """Prepare without starting anything.

        Args:
            settings: the job's, the same on all nodes.
            record: the description of this node.
            backend: the store.
            log: prints a line on the console.
            timeouts: when to lose patience with the store; ``join`` and ``silence`` come from ``settings``.
            verbosity: a ``Level``; lines up to this level are logged.
            name: name of the backend, as the user chose it.
            clock: returns the time in seconds, on any monotonic clock.
            wall_clock: returns the time in seconds since 1970.
            reserve: reserves a port for the store that the worker of rank 0 serves.
            is_gone: returns whether the agent with a pid and start time on this host is gone, and its workers.
            on_step: called after each step, with the node's state and the result; for tests.
            signer: signs what this node writes to the store; None: the job has no token.
        """
        self.patience = float("inf")
        """How long this node may be unfit; it gives up when ``join_timeout`` is over and the job does not run."""
        self.lease: Callable[[float], None] = lambda until: None
        """Called with the time until which the workers may live, whenever that is extended."""
        self.log = in_colour(log, YELLOW)
        """Logs a warning."""
        self._write = log
        self._is_followed = False
        self.settings = settings
        """What the nodes of the job agree on beforehand."""
        self._verbosity = verbosity
        self._name = name
        self._clock = clock
        self._wall_clock = wall_clock
        self._reserve = reserve
        self._is_gone = is_gone
        self._on_step = on_step
        self.backend = backend
        """The store, as this node sees it."""
        self._node = node.begin(record, settings)
        self._wake_at: float | None = None
        self._events: list[AgentEvent] = []
        self._is_open = False
        self._reserved = contextlib.ExitStack()
        """Holds the port that is reserved for the workers' store."""
        silence = min(timeouts.read, settings.keep_alive_deadline)
        timeouts = timeouts._replace(join=settings.join_timeout, silence=silence)
        self._link = StoreLink(backend, timeouts, self, clock, signer)

    def get_backend(self) -> str:
        """Return the name of the backend."""
        return self._name

    def get_run_id(self) -> str:
        """Return the job's id."""
        return self.settings.run_id

    def meeting(self) -> Meeting:
        """Describe how the nodes meet, and this node's part in it."""
        # Late: only needed when somebody asks.
        from elastic_launch.core.rendezvous import view
        from elastic_launch.core.status import Meeting

        now, settings, backend = self._clock(), self.settings, self.backend
        is_ready = self._link.state is LinkState.READY
        return Meeting(
            self._name,
            backend.endpoint,
            backend.settings,
            settings.min_nodes,
            settings.max_nodes,
            view.role(self._node),
            view.waits_for(self._node, now) if is_ready else backend.where,
            view.silences(self._node, now),
        )

    # --- what the agent asks for

    def ask(self, action: RendezvousAction) -> list[AgentEvent]:
        """Accept an action of the agent; most answers come later, from ``take``."""
        is_first = not self._is_open
        if is_first and isinstance(action, RequestJoin | Withdraw):
            self._is_open = True
            self._link.open()
        self.deliver(Join(self._port(is_first), action.has_check) if isinstance(action, RequestJoin) else action)
        return self.take()

    def follow_joining(self) -> Callable[[], Waiting | None]:
        """Return what describes the nodes that have joined; see ``AgentRendezvous``."""
        self._is_followed = True
        return lambda: progress.live(self._node, self._clock())

    def descriptors(self) -> list[tuple[int, int]]:
        """Return the descriptors of the connections and of the backend, with their poll masks."""
        return self._link.descriptors()

    def deadline(self) -> float | None:
        """Return when ``take`` is due even if no descriptor is ready; None: never."""
        times = (self._wake_at, self._link.deadline() if self._is_open else None)
        return min((at for at in times if at is not None), default=None)

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        """Connect if it is time, handle replies and timers, and return the events that this leads to."""
        if self._is_open:
            self._link.turn()
        if self._wake_at is not None and self._clock() >= self._wake_at:
            self.deliver(Tick())
            self._link.turn()
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Leave the job and release everything, within seconds.

        The node that hosts the store waits until the others know how the job ended, at most ``close_timeout``.
        """
        try:
            if self._is_open:
                self.begin_close()
                end = self._wake_at or self._clock() + CLOSE_TIMEOUT
                while not self.is_closed and self._clock() < end:
                    poller = select.poll()
                    for fd, mask in self.descriptors():
                        poller.register(fd, mask)
                    poller.poll(min(max(0.0, end - self._clock()), _MAX_POLL) * 1000)
                    self._link.turn()
        except UnavailableError:
            pass  # without a store, the other nodes cannot be told
        finally:
            self._link.close()
            self._reserved.close()
            self.backend.close()

    def begin_close(self) -> None:
        """Begin to leave the job; ``is_closed`` tells when that is done."""
        self.deliver(Close())
        self._link.turn()

    @property
    def is_closed(self) -> bool:
        """Whether the other nodes have been told everything, or cannot be told."""
        return self._node.may_disconnect or self._link.state in (LinkState.CONNECTING, LinkState.GIVEN_UP)

    # --- what the link asks for

    def deliver(self, given: Input) -> None:
        """Hand an input to the node, and carry out what that leads to."""
        ready = node.step(self._node, given, self._clock())
        self._on_step(self._node, ready)
        for request in ready.requests:
            self._link.submit(request)
        self._link.await_key(ready.awaited_key)
        self._wake_at = ready.wake_at
        if ready.lease_until is not None:
            self.lease(ready.lease_until)
        for line in ready.log:
            if line.level <= self._verbosity and not (self._is_followed and line.kind is LineKind.PROGRESS):
                log_line(line, self._write)
        self._events += map(self._completed, ready.events)
        if ready.looks_for:
            self.deliver(AgentsGone(tuple(it for it in ready.looks_for if self._is_gone(it.pid, it.started))))
        if ready.wants_store:
            self.deliver(HostFacts(port=self.backend.fresh_store()))

    def needs_store(self) -> bool:
        """Return whether the job is not over for this node."""
        return not self._node.is_over

    # --- what only this side knows

    def _completed(self, event: RendezvousEvent) -> AgentEvent:
        """Add what the node does not know: the store's address, the time of day, and why there is no store."""
        match event:
            case Assigned(assignment) if assignment.agent_store:
                address = assignment.master_addr or self._link.store_address
                address, port = self.backend.workers_store(address, assignment.master_port)
                return Assigned(assignment._replace(master_addr=address, master_port=port))
            case Ended(end, _):
                return Ended(end, self._wall_clock())
            case Decided(decision) if decision.status == ExitCode.TIMEOUT and not self._link.has_answered:
                why = self.backend.explain(self._link.why_silent(self.settings.join_timeout))
                return Decided(decision._replace(error=str(why), status=ExitCode.UNAVAILABLE))
        return event

    def _port(self, is_first: bool) -> int:
        """Return the port that this node offers for the workers' store in the next round; 0: none.

        In a store that served an earlier round, torch's process groups would find the keys of that round. So the job's
        store serves only the workers of the first round, and a fresh store those of each further round.
        """
        if self.settings.store_port:
            return 0 if is_first else self.backend.fresh_store()
        self._reserved.close()
        return int(self._reserved.enter_context(self._reserve()).getsockname()[1])
