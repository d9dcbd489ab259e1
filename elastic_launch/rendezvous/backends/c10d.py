"""The c10d backend: torch's TCPStore, hosted by one of the job's agents."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from elastic_launch.errors import RendezvousConnectionError, UnavailableError
from elastic_launch.host.addresses import Address, is_own, join_endpoint, resolve
from elastic_launch.host.ports import listen, port_owner, stranger_on
from elastic_launch.host.resolver import Resolver
from elastic_launch.rendezvous.backends import Backend
from elastic_launch.store.client import NotAStoreError, StoreClient, connect
from elastic_launch.store.tcpstore_server import TCPStoreServer

if TYPE_CHECKING:
    from elastic_launch.store.challenge import ClientChallenge
    from elastic_launch.store.relay import Relay


class C10dBackend(Backend):
    """torch's TCPStore at ``HOST:PORT``, hosted by the first agent that binds the port there.

    Args:
        host: name or IP address of the endpoint.
        port: port of the endpoint.
        is_host: whether this node hosts the store; None: it does if ``host`` is an address of this host.
        environ: variables of the process that hosts the store.
        is_local: whether a store that is hosted here listens on the endpoint's address only, not on all of this host.
        gate_key: the key of the store's gate, as from ``challenge.gate_key``; empty: the store has none.
    """

    def __init__(
        self,
        host: str,
        port: int,
        is_host: bool | None,
        environ: Mapping[str, str],
        is_local: bool = False,
        gate_key: bytes = b"",
    ) -> None:
        self.endpoint = join_endpoint(host, port)
        self.where = f"the store at {self.endpoint}"
        self.host = host
        self.port = port
        self._is_host = is_host
        self._may_host = False
        """Whether this node hosts the store as soon as the port is free: who has it may only be ending."""
        self._environ = environ
        self._is_local = is_local
        self._gate_key = gate_key
        self._process: TCPStoreServer | None = None
        self._resolver = Resolver(environ)
        self._resolve: Callable[[str, int], list[Address]] = resolve
        """Resolves the endpoint's name, without blocking once the backend is open."""
        self._relay: Relay | None = None
        """Stands at the gate, or takes this node's workers there."""
        self._behind: dict[int, int] = {}
        """The ports on loopback where torch's servers listen, by the ports of the gates before them."""
        self._addresses: list[Address] = []
        """Addresses of the endpoint that are still to be tried."""
        self._address: Address
        """The one that was tried last."""

    def open(self) -> None:
        """Host the store if this node is to do so, and no other agent of this host was first.

        Raises:
            UnavailableError: the port cannot be bound, or the process cannot be started.
        """
        self._resolve = self._resolver.resolve
        self._may_host = False
        if not self.is_host():
            return
        try:
            listening = listen(self.port, self._listens_on())
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                self._check_owner()
                self._may_host = True
                return  # by another agent, which hosts the store, or by a stranger: the connection will show
            raise self.cannot_host(error) from error
        self._process = TCPStoreServer(self._behind_gate("job", listening), self._environ)
        self.serves = True

    def _behind_gate(self, name: str, listening: socket.socket) -> socket.socket:
        """Return the socket that torch is to serve: another one, on loopback, if there is a gate before it.

        Raises:
            OSError: there is no free port on loopback.
            UnavailableError: the process for the gate cannot be started.
        """
        if not self._gate_key:
            return listening
        from elastic_launch.store.relay import LOOPBACK  # late: few jobs have a gate

        inner = listen(0, LOOPBACK)
        port = inner.getsockname()[1]
        self._behind[listening.getsockname()[1]] = port
        self._start_relay().add_gate(name, listening, port)
        return inner

    def _start_relay(self) -> Relay:
        """Return the process for the gate, which is started if necessary."""
        if self._relay is None:
            from elastic_launch.store.relay import Relay  # late: few jobs have a gate

            self._relay = Relay(self._gate_key, self._environ)
        return self._relay

    def _check_owner(self) -> None:
        """Check that no other user of this host listens in place of an agent: he could serve any store he likes."""
        if (uid := stranger_on(self.port)) is not None:
            raise UnavailableError(
                f"{self.where}: another user of this host (uid {uid}) listens on port {self.port}; choose another port"
            )

    def _listens_on(self) -> str:
        """Return the address to listen on, the first that clients try; empty: all of this host."""
        return str(resolve(self.host, self.port)[0][1][0]) if self._is_local else ""

    def is_host(self) -> bool:
        """Return whether this node is to host the store: as told, or because the endpoint is an address of this host.

        A name that cannot be resolved yet is not this host's. The next call tries again.
        """
        if self._is_host is None:
            with contextlib.suppress(RendezvousConnectionError):
                self._is_host = any(map(is_own, self._resolve(self.host, self.port)))
        return bool(self._is_host)

    def cannot_host(self, error: OSError) -> UnavailableError:
        """Return the error to raise if the port cannot be bound."""
        return UnavailableError(f"cannot host {self.where}: {error.strerror}; choose another port")

    def fresh_store(self) -> int:
        """Serve an empty store on a free port; see ``Backend``."""
        if self._process is None:
            return 0
        try:
            listening = listen(0, self._listens_on())
            port: int = listening.getsockname()[1]
            self._process.serve(self._behind_gate("further", listening))
        except OSError as error:
            raise UnavailableError(f"cannot serve a store for the workers of the next round: {error}") from error
        return port

    def workers_store(self, address: str, port: int) -> tuple[str, int]:
        """Return what is on loopback if the store has a gate: torch's server itself, or an entry; see ``Backend``."""
        if not self._gate_key:
            return address, port
        from elastic_launch.store.relay import LOOPBACK  # late: few jobs have a gate

        if port in self._behind:
            return LOOPBACK, self._behind[port]
        try:
            listening = listen(0, LOOPBACK)
        except OSError as error:
            raise UnavailableError(f"cannot connect this node's workers to their store: {error}") from error
        own: int = listening.getsockname()[1]
        self._start_relay().add_entry("workers", listening, (address, port))
        return LOOPBACK, own

    def connect(self, again: bool = False) -> StoreClient:
        """Connect to the endpoint; see ``Backend``."""
        if not again:
            if self._is_host is None or self._may_host:
                self.open()  # the name may resolve by now, or the port be free
            if not self._addresses:
                self._addresses = self._resolve(self.host, self.port)
            self._address = self._addresses.pop(0)
        family, address = self._address
        return connect(address, family, self.where, self._challenge())

    def _challenge(self) -> ClientChallenge | None:
        if not self._gate_key:
            return None
        from elastic_launch.store.challenge import ClientChallenge  # late: few jobs have a gate

        return ClientChallenge(self._gate_key)

    def descriptors(self) -> list[tuple[int, int]]:
        """Return the descriptors of the server and of the gate."""
        return super().descriptors() + ([(self._relay.fileno(), select.POLLIN)] if self._relay else [])

    def take(self) -> None:
        """Check that server and gate still run."""
        super().take()
        if self._relay:
            self._relay.take()

    def close(self) -> None:
        """End the server and the gate."""
        super().close()
        self._resolver.close()
        if self._relay:
            self._relay.close()
            self._relay = None

    def has_untried_address(self) -> bool:
        """Return whether the endpoint has another address to try."""
        return bool(self._addresses)

    def addresses(self, client: StoreClient) -> tuple[str, str]:
        """Return the addresses of both ends of the connection."""
        self._may_host = False  # another agent hosts the store
        try:
            with socket.socket(fileno=os.dup(client.fileno())) as sock:
                return sock.getsockname()[0], sock.getpeername()[0]
        except OSError as error:
            raise RendezvousConnectionError(f"{self.where}: connection lost: {error.strerror}") from error

    def explain(self, error: RendezvousConnectionError) -> RendezvousConnectionError:
        """Name the process that listens on the port, if it is a stranger on this host; or this node, whose is late."""
        if isinstance(error, NotAStoreError) and self.serves:
            return RendezvousConnectionError(
                f"{self.where}, which this node hosts, is still starting; allow more time (join_timeout in --rdzv-conf)"
            )
        owner = port_owner(self.port) if self._is_host and not self.serves else None
        return RendezvousConnectionError(f"{error} (port {self.port} is in use by {owner})") if owner else error
