"""Connects to the job's store, reconnects when the connection is lost, and finally gives up.

A link has two connections that never block: one for requests, and one that waits for a key to appear. Requests without
a reply on a lost connection are sent again on the next one. The link decides when to give up the store. Everything else
is decided in ``core.rendezvous``; the link delivers its inputs.
"""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from elastic_launch.core.rendezvous import messages
from elastic_launch.core.store_requests import Append, Cancel, Set, Wait
from elastic_launch.core.text import is_loopback
from elastic_launch.errors import ExitCode, RendezvousConnectionError
from elastic_launch.host.ports import outward_address
from elastic_launch.rendezvous.backends import Backend
from elastic_launch.store.client import NotAStoreError, StoreClient

if TYPE_CHECKING:
    from elastic_launch.rendezvous.signing import Signer

FIRST_RETRY, LAST_RETRY = 0.02, 1.0
"""Delays between two attempts to connect, in seconds. They double from the first to the last."""
CONNECT_TIMEOUT = 2.5
"""Seconds until a connection that the store's host has not accepted is begun anew. The kernel would wait twice as long
each time, so a host that comes back would be found up to 16 s later."""
DOUBTS = 3
"""Number of connections in a row that must look unlike a store. One is not enough: a store that ends looks so, too."""
LOG_INTERVAL = 10.0
"""Seconds between two log lines about a store that cannot be reached."""
UNANSWERED = (Set, Append)
"""Requests that the store does not answer. Their reply comes from the client, and says only that they were sent."""


class Timeouts(NamedTuple):
    """When to lose patience with the store. Times are in seconds."""

    join: float = 600.0
    """How long to try to reach a store that has never answered."""
    store: float = 60.0
    """How long to try to reach a store that was lost."""
    read: float = 60.0
    """How long a new connection, or a reply, may take at most."""
    silence: float = 15.0
    """How long a reply may take before the link reconnects, which shows sooner whether the store is there."""


class LinkState(Enum):
    """The state of a link."""

    CONNECTING = "connecting"
    """There is no connection. The next attempt is due soon."""
    GREETING = "greeting"
    """A connection was begun, and the store has not answered on it yet."""
    READY = "ready"
    GIVEN_UP = "given up"


class LinkUser(Protocol):
    """What a link needs from its user."""

    def deliver(self, given: messages.Input) -> None:
        """Accept an input for the node."""

    def needs_store(self) -> bool:
        """Return whether the job is not over for this node."""

    def log(self, text: str) -> None:
        """Log a line."""


class StoreLink:
    """The link to one store, across all its connections."""

    def __init__(
        self,
        backend: Backend,
        timeouts: Timeouts,
        user: LinkUser,
        clock: Callable[[], float],
        signer: Signer | None = None,
    ) -> None:
        """Prepare without connecting.

        Args:
            backend: makes connections to the store, and hosts it if this node is to do so.
            timeouts: when to lose patience.
            user: receives the inputs for the node.
            clock: returns the time in seconds, on any monotonic clock.
            signer: signs what the node writes; None: the job has no token.
        """
        self.state = LinkState.CONNECTING
        self.has_answered = False
        """Whether the store has ever answered a request."""
        self.store_address = ""
        """The address by which this node reaches the store; empty if it is unknown or of no use to workers."""
        self._backend = backend
        self._timeouts = timeouts
        self._user = user
        self._clock = clock
        self._signer = signer
        self._requests: StoreClient | None = None
        self._waits: StoreClient | None = None
        self._unanswered: deque[tuple[messages.Request, float]] = deque()
        """The requests without a reply, and when each was sent on the present connection."""
        self._wanted: str | None = None
        """The key that the node waits for."""
        self._wait: Wait | None = None
        """What the present connection waits for. A wait for the same key that was cancelled before is another one."""
        self._has_met = False
        self._connected_at = self._retry_at = 0.0
        """When the last connection was begun, and when the next one is due."""
        self._lost_at = self._logged_at = 0.0
        """When the store was last there or was first looked for, and when a line about its absence was last logged."""
        self._attempts = self._doubts = 0
        self._error: RendezvousConnectionError | None = None
        """Why no connection answers; None: one does, or none has failed yet."""

    def open(self) -> None:
        """Start what the store needs on this node.

        Raises:
            LaunchError: it cannot be started.
        """
        self._lost_at = self._logged_at = self._clock()
        self._backend.open()
        self._user.deliver(messages.HostFacts(serves=self._backend.serves, stays=self._backend.stays))

    def submit(self, request: messages.Request) -> None:
        """Send a request, now or on the next connection."""
        self._unanswered.append((request, self._clock()))
        if self._requests:
            sent = self._signer.seal(request.request) if self._signer else request.request
            self._requests.submit(sent, request)

    def await_key(self, key: str | None) -> None:
        """Wait for this key to appear, and for no other; None: for no key."""
        self._wanted = key

    def descriptors(self) -> list[tuple[int, int]]:
        """Return the descriptors of the connections and of the backend, with their poll masks."""
        found = [] if self.state is LinkState.GIVEN_UP else self._backend.descriptors()
        for client in (self._requests, self._waits):
            if client and client.fileno() >= 0:
                found.append((client.fileno(), select.POLLIN | (select.POLLOUT if client.wants_write() else 0)))
        return found

    def deadline(self) -> float | None:
        """Return when ``turn`` is due even if no descriptor is ready; None: never."""
        match self.state:
            case LinkState.GIVEN_UP:
                return None
            case LinkState.READY:
                if (since := self._asked_at()) is None:
                    return None
                return min(since + self._timeouts.silence, max(since, self._logged_at) + LOG_INTERVAL)
            case LinkState.GREETING:
                next_attempt = self._connected_at + self._greeting_patience
            case LinkState.CONNECTING:
                next_attempt = self._retry_at
        return min(next_attempt, self._lost_at + self._patience, self._logged_at + LOG_INTERVAL)

    def turn(self) -> None:
        """Connect if it is time, deliver what has arrived, and send the requests that this leads to."""
        if self.state is LinkState.GIVEN_UP:
            return
        try:
            self._backend.take()
        except RendezvousConnectionError as error:
            self._give_up(str(error))  # it will not come back by itself
            return
        try:
            if self.state is LinkState.CONNECTING and self._clock() >= self._retry_at:
                self._connect()
            self._read()
            self._send()
            self._check_patience()
        except RendezvousConnectionError as error:
            self._lose(error)

    def why_silent(self, seconds: float) -> RendezvousConnectionError:
        """Return why the store has not answered for so many seconds."""
        if self._error:
            return self._error
        if self._requests:
            return self._requests.timeout_error(round(seconds))
        return RendezvousConnectionError(f"{self._backend.where}: no connection after {seconds:.0f} s")

    def close(self) -> None:
        """Send what can be sent at once, and close the connections."""
        if self._requests:
            self._requests.flush()
        self._disconnect()

    # --- connections

    def _connect(self) -> None:
        self._connected_at = self._clock()
        self.state = LinkState.GREETING
        self._requests = self._backend.connect()
        self._user.deliver(messages.HostFacts(serves=self._backend.serves))
        self._waits = self._backend.connect(again=True)
        again, self._unanswered = self._unanswered, deque()
        for request, _ in again:
            self.submit(request)

    def _greet(self, client: StoreClient) -> None:
        """Note that the store has answered on a new connection."""
        self.state = LinkState.READY
        address, self.store_address = self._backend.addresses(client)
        self._user.deliver(
            messages.HostFacts(address=address, outward=outward_address() if is_loopback(address) else "")
        )
        if self._has_met:
            self._user.deliver(messages.StoreReconnected())
        self._has_met = True

    def _read(self) -> None:
        if not self._requests or not self._waits:
            return
        answers = self._requests.take()
        if self._requests.ready and self.state is LinkState.GREETING:
            self._greet(self._requests)
        if answers:
            self.has_answered = True
            self._attempts = self._doubts = 0  # a greeting proves nothing: the store may drop us at each request
            self._error = None
        for request, value in answers:
            if isinstance(request.request, UNANSWERED):
                continue  # it is on its way; the next answer says that it has arrived
            while self._unanswered.popleft()[0] is not request:
                pass
            opened = self._signer.open(request.request, value) if self._signer else value
            self._user.deliver(messages.Answer(request.question, request.round, opened))
        for wait, has_appeared in self._waits.take():
            if wait is self._wait:
                self._wait = None
            if has_appeared and wait.keys[0] == self._wanted:
                self._user.deliver(messages.KeyAppeared(wait.keys[0]))

    def _send(self) -> None:
        if self._waits and self._wanted != (self._wait.keys[0] if self._wait else None):
            if self._wait:
                self._waits.submit(Cancel())
            self._wait = None if self._wanted is None else Wait((self._wanted,))
            if self._wait:
                self._waits.submit(self._wait, self._wait)
        for client in (self._requests, self._waits):
            if client:
                client.flush()

    def _disconnect(self) -> None:
        for client in (self._requests, self._waits):
            if client:
                client.close()
        self._requests = self._waits = self._wait = None

    # --- patience

    def _asked_at(self) -> float | None:
        """Return when the oldest request was sent that the store has to answer; None: there is none."""
        return next((at for request, at in self._unanswered if not isinstance(request.request, UNANSWERED)), None)

    @property
    def _patience(self) -> float:
        """Seconds to try to reach the store."""
        return self._timeouts.store if self.has_answered else self._timeouts.join

    @property
    def _greeting_patience(self) -> float:
        """Seconds that the present connection may take until the store answers on it."""
        is_connected = self._requests is not None and self._requests.is_connected
        return self._timeouts.read if is_connected else min(CONNECT_TIMEOUT, self._timeouts.read)

    def _check_patience(self) -> None:
        now = self._clock()
        if self._requests and self.state is LinkState.GREETING and now >= self._connected_at + self._greeting_patience:
            raise self._requests.timeout_error(self._greeting_patience)
        since = self._asked_at() if self.state is LinkState.READY else None
        if self._requests and since is not None and now >= since + self._timeouts.silence:
            raise self._requests.timeout_error(self._timeouts.silence)
        if self.state is LinkState.READY and self._error is None:
            if since is not None and now >= max(since, self._logged_at) + LOG_INTERVAL:
                self._logged_at = now
                self._user.log(f"{self._backend.where} has not answered for {now - since:.0f} s")
            return
        away = now - self._lost_at
        if now >= self._lost_at + self._patience:
            self._give_up(f"{self._backend.explain(self.why_silent(away))} (tried for {away:.0f} s)")
        elif now >= self._logged_at + LOG_INTERVAL:
            self._logged_at = now
            why = self._backend.explain(self.why_silent(away))
            self._user.log(f"{why}; trying for up to {self._patience - away:.0f} s more")

    def _lose(self, error: RendezvousConnectionError) -> None:
        """Plan to reconnect, or give up the store."""
        now = self._clock()
        if self._error is None and self.has_answered:
            self._lost_at = min(self._asked_at() or now, now)
        self._disconnect()
        self.state = LinkState.CONNECTING
        self._error = error
        if self.has_answered:
            why = str(error).removeprefix(f"{self._backend.where}: ")
            self._error = RendezvousConnectionError(f"{self._backend.where} is lost: {why}")
        if isinstance(error, NotAStoreError):
            self._doubts = DOUBTS if error.certain else self._doubts + 1
        self._attempts += 1
        self._retry_at = now + min(FIRST_RETRY * 2 ** min(self._attempts, 10), LAST_RETRY)
        if not self._user.needs_store():
            self._give_up("")
        elif self._doubts >= DOUBTS:
            self._give_up(str(self._backend.explain(error)))
        else:
            self._check_patience()

    def _give_up(self, text: str) -> None:
        """Tell the node that the store is gone for good."""
        self._disconnect()
        self.state = LinkState.GIVEN_UP
        self._user.deliver(messages.StoreLost(text, ExitCode.UNAVAILABLE))
