"""The c10d backend: torch's TCPStore, hosted by one of the job's agents."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Mapping

from elastic_launch.errors import RendezvousConnectionError, UnavailableError
from elastic_launch.host.addresses import Address, is_own, join_endpoint, resolve
from elastic_launch.host.ports import listen, port_owner, stranger_on
from elastic_launch.rendezvous.backends import Backend
from elastic_launch.store.client import NotAStoreError, StoreClient, connect
from elastic_launch.store.tcpstore_server import TCPStoreServer


class C10dBackend(Backend):
    """torch's TCPStore at ``HOST:PORT``, hosted by the first agent that binds the port there.

    Args:
        host: name or IP address of the endpoint.
        port: port of the endpoint.
        is_host: whether this node hosts the store; None: it does if ``host`` is an address of this host.
        environ: variables of the process that hosts the store.
        is_local: whether a store that is hosted here listens on the endpoint's address only, not on all of this host.
    """

    def __init__(
        self, host: str, port: int, is_host: bool | None, environ: Mapping[str, str], is_local: bool = False
    ) -> None:
        self.endpoint = join_endpoint(host, port)
        self.where = f"the store at {self.endpoint}"
        self.host = host
        self.port = port
        self._is_host = is_host
        self._environ = environ
        self._is_local = is_local
        self._process: TCPStoreServer | None = None
        self._addresses: list[Address] = []
        """Addresses of the endpoint that are still to be tried."""

    def open(self) -> None:
        """Host the store if this node is to do so, and no other agent of this host was first.

        Raises:
            UnavailableError: the port cannot be bound, or the process cannot be started.
        """
        if not self.is_host():
            return
        try:
            listening = listen(self.port, self._listens_on())
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                self._check_owner()
                return  # by another agent, which hosts the store, or by a stranger: the connection will show
            raise self.cannot_host(error) from error
        self._process = TCPStoreServer(listening, self._environ)
        self.serves = True

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
                self._is_host = any(map(is_own, resolve(self.host, self.port)))
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
            self._process.serve(listening)
        except OSError as error:
            raise UnavailableError(f"cannot serve a store for the workers of the next round: {error}") from error
        return port

    def connect(self) -> StoreClient:
        """Connect to the endpoint; each call tries the next one of its addresses."""
        if self._is_host is None:
            self.open()  # the name may resolve by now
        if not self._addresses:
            self._addresses = resolve(self.host, self.port)
        family, address = self._addresses.pop(0)
        return connect(address, family, self.where)

    def has_untried_address(self) -> bool:
        """Return whether the endpoint has another address to try."""
        return bool(self._addresses)

    def addresses(self, client: StoreClient) -> tuple[str, str]:
        """Return the addresses of both ends of the connection."""
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
