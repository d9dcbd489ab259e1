"""Layer 3: where the nodes of a job meet: which store, who hosts it, and connections to it.

A ``Backend`` starts what the store needs on this node (the process that hosts it, or the bridge to etcd) and makes
connections that do not block. It gives no second chances: that is its user's part.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from elastic_launch.config import split_endpoint
from elastic_launch.core.rendezvous.ranks import is_loopback
from elastic_launch.errors import RendezvousConnectionError, UnavailableError
from elastic_launch.host.ports import listen, port_owner
from elastic_launch.logs.job_files import as_file_name
from elastic_launch.store.client import StoreClient, connect
from elastic_launch.store.etcd.bridge import EtcdBridge
from elastic_launch.store.etcd.member import EtcdMember, claim_endpoint
from elastic_launch.store.tcpstore_server import TCPStoreServer

Address = tuple[int, tuple[Any, ...]]
"""Family, and what ``connect`` takes."""


class Backend(Protocol):
    """A store, as seen from one node."""

    where: str
    """What messages call it."""
    serves: bool
    """This node hosts it."""
    stays: bool
    """It ends with the nodes that host it: all stay until all know how the job has ended."""

    def open(self) -> None:
        """Start what it needs here. Raises LaunchError."""

    def fresh_store(self) -> int:
        """Have the store's host serve another, empty store, for the workers. Returns its port; 0: not hosted here."""

    def connect(self) -> StoreClient:
        """Begin another connection. Raises RendezvousConnectionError."""

    def addresses(self, client: StoreClient) -> tuple[str, str]:
        """By which address this node reaches the store, and the store's own, over a connection that is ready."""

    def explain(self, error: RendezvousConnectionError) -> RendezvousConnectionError:
        """The error with what is known here of its cause."""

    def descriptors(self) -> list[tuple[int, int]]:
        """What to wait for, beside the connections."""

    def take(self) -> None:
        """Look whether the process that serves still does. Raises RendezvousConnectionError."""

    def close(self) -> None:
        """End what was started."""


class C10dBackend:
    """torch's TCPStore at ``HOST:PORT``, hosted by the first agent there."""

    def __init__(self, host: str, port: int, is_host: bool | None, environ: Mapping[str, str]) -> None:
        """Take the endpoint; ``is_host`` None: this node hosts the store if the endpoint is an address of its own."""
        self.where = f"the store at {join_endpoint(host, port)}"
        self.serves = self.stays = False
        self._host, self._port = host, port
        self._is_host = is_host
        self._environ = environ
        self._process: TCPStoreServer | None = None
        self._addresses: list[Address] = []
        self._attempts = 0

    def open(self) -> None:
        """Host the store, if that is this node's part and no other agent of this host was first."""
        if self._is_host is None:
            try:
                self._is_host = any(map(_is_own, resolve(self._host, self._port)))
            except RendezvousConnectionError:
                return  # a name that is not known yet is not this host's
        if not self._is_host:
            return
        try:
            listening = listen(self._port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return  # another agent hosts the store, or a stranger is there: the connection will show
            raise UnavailableError(f"cannot host {self.where}: {error.strerror}") from error
        self._process = TCPStoreServer(listening, self._environ)
        self.serves = True

    def fresh_store(self) -> int:
        """Serve an empty store on any port."""
        if self._process is None:
            return 0
        try:
            listening = listen(0)
            port: int = listening.getsockname()[1]
            self._process.serve(listening)
        except OSError as error:
            raise UnavailableError(f"cannot serve a store for the workers of the next round: {error}") from error
        return port

    def connect(self) -> StoreClient:
        """Connect to the endpoint's addresses in turn."""
        if self._is_host is None:
            self.open()  # the name may be known now
        if not self._addresses:
            self._addresses = resolve(self._host, self._port)
        family, address = self._addresses[self._attempts % len(self._addresses)]
        self._attempts += 1
        if self._attempts % len(self._addresses) == 0:
            self._addresses = []  # a name may stand for another address the next time
        return connect(address, family, self.where)

    def addresses(self, client: StoreClient) -> tuple[str, str]:
        """Both ends of the connection."""
        try:
            with socket.socket(fileno=os.dup(client.fileno())) as sock:
                return sock.getsockname()[0], sock.getpeername()[0]
        except OSError as error:
            raise RendezvousConnectionError(f"{self.where}: connection lost: {error.strerror}") from error

    def explain(self, error: RendezvousConnectionError) -> RendezvousConnectionError:
        """Name the process that listens on the port, if it is one of this host."""
        owner = port_owner(self._port) if self._is_host and not self.serves else None
        return RendezvousConnectionError(f"{error} (port {self._port} is in use by {owner})") if owner else error

    def descriptors(self) -> list[tuple[int, int]]:
        """Those of the process that hosts the store."""
        return [(self._process.fileno(), select.POLLIN)] if self._process else []

    def take(self) -> None:
        """Look after the process that hosts the store."""
        if self._process:
            self._process.take()

    def close(self) -> None:
        """End the store that this node hosts."""
        if self._process:
            self._process.close()
            self._process = None


class EtcdBackend:
    """etcd v3, through a bridge process of this node's own."""

    serves = False

    def __init__(self, endpoints: str, run_id: str, conf: Mapping[str, str], environ: Mapping[str, str]) -> None:
        """Take the endpoints, the job's id and etcd's settings; see ``EtcdBridge``."""
        self.where = f"etcd at {endpoints}"
        self.stays = False
        self._endpoints, self._conf, self._environ = endpoints, conf, environ
        self._prefix = f"elastic-launch/{run_id}/"
        self._bridge: EtcdBridge | None = None

    def open(self) -> None:
        """Start the bridge."""
        self._bridge = EtcdBridge(self._endpoints, self._prefix, self._conf, self._environ)

    def fresh_store(self) -> int:
        """The workers host their store themselves."""
        return 0

    def connect(self) -> StoreClient:
        """Another connection to the bridge."""
        if self._bridge is None:
            raise RendezvousConnectionError(f"{self.where}: not open")
        return StoreClient(self._bridge.connect(), self.where)

    def addresses(self, client: StoreClient) -> tuple[str, str]:
        """The address by which this node reaches an endpoint; and none, since etcd does not serve workers."""
        for endpoint in self._endpoints.split(","):
            with contextlib.suppress(OSError, RendezvousConnectionError):
                return own_address(split_endpoint(endpoint)[0]), ""
        return "127.0.0.1", ""

    def explain(self, error: RendezvousConnectionError) -> RendezvousConnectionError:
        """The bridge tells by itself."""
        return error

    def descriptors(self) -> list[tuple[int, int]]:
        """That of the bridge."""
        return [(self._bridge.fileno(), select.POLLIN)] if self._bridge else []

    def take(self) -> None:
        """Look after the bridge."""
        if self._bridge:
            self._bridge.take()

    def close(self) -> None:
        """End the bridge."""
        if self._bridge:
            self._bridge.close()
            self._bridge = None


class EmbeddedEtcdBackend(EtcdBackend):
    """etcd v3 whose members the job's agents run themselves, on the hosts that the endpoints name."""

    def __init__(
        self,
        endpoints: Sequence[tuple[str, int]],
        run_id: str,
        conf: Mapping[str, str],
        environ: Mapping[str, str],
        log_dir: str | None,
        log: Callable[[str], None],
    ) -> None:
        """Take what the members are to be.

        Args:
            endpoints: host and client port of each; the port above is for the other members.
            run_id: the job's id.
            conf: etcd's settings, as for ``EtcdBridge``.
            environ: the variables of the processes.
            log_dir: where the job's files lie, and the members' data; None: a temporary directory has them.
            say: takes each line for people.
        """
        # Everywhere in the same order, whatever the user's.
        self._members = tuple(sorted(endpoints))
        names = [join_endpoint(host, port) for host, port in self._members]
        super().__init__(",".join(names), run_id, conf, environ)
        self._names = names
        self.stays = True
        self._run_id = run_id
        self._log_dir = log_dir
        self._log = log
        self._claim: socket.socket | None = None
        self._member: EtcdMember | None = None

    def open(self) -> None:
        """Start the member, if an endpoint is this host's, and the bridge.

        Raises:
            UnavailableError: there is no etcd to start.
        """
        from elastic_launch.store.etcd.plan import MemberPlan
        from elastic_launch.store.etcd.server import etcd_binary  # late: few jobs need it

        token = f"elastic-launch/{as_file_name(self._run_id)}"
        plan = MemberPlan(endpoints=self._members, token=token)
        self._conf = {**self._conf, "cluster_id": str(plan.cluster_id)}
        if found := self._find_own():
            own, address = found
            name = self._names[own].replace(":", "_").strip("[]")
            if self._log_dir:
                folder = os.path.join(self._log_dir, as_file_name(self._run_id), "etcd", name)
            else:
                temp = self._environ.get("TMPDIR") or "/tmp"
                folder = os.path.join(temp, f"elastic_launch_etcd_{os.urandom(6).hex()}")
            self._member = EtcdMember(
                plan._replace(
                    binary=os.path.abspath(etcd_binary()),
                    own_index=own,
                    address=address,
                    folder=os.path.abspath(folder),
                    temporary=not self._log_dir,
                ),
                self._environ,
            )
        super().open()

    def descriptors(self) -> list[tuple[int, int]]:
        """Those of the member and the bridge."""
        return [*super().descriptors(), *([(self._member.fileno(), select.POLLIN)] if self._member else [])]

    def take(self) -> None:
        """Pass on what is said of the member, and look after the bridge."""
        if self._member:
            try:
                for line in self._member.take():
                    self._log(line)
            except RendezvousConnectionError as error:
                self._log(f"{error}; this agent continues without it, as long as a majority of the others serves")
                self._end_member()
        super().take()

    def close(self) -> None:
        """End the bridge and the member."""
        super().close()
        self._end_member()

    def _end_member(self) -> None:
        if self._member:
            self._member.close()
            self._member = None
        if self._claim:
            self._claim.close()
            self._claim = None

    def _find_own(self) -> tuple[int, str] | None:
        """Claim the first endpoint of this host that no other agent of the job has claimed.

        Returns:
            Its index, and the IP address to listen on; None: this node runs no member.
        """
        for index, (host, port) in enumerate(self._members):
            try:
                addresses = [str(address[1][0]) for address in resolve(host, port) if _is_own(address)]
            except RendezvousConnectionError:
                continue  # a name that is not known yet is not this host's
            address = min(addresses, key=is_loopback, default=None)
            if address and (claimed := claim_endpoint(self._names[index], self._run_id)):
                self._claim = claimed
                if is_loopback(address) and host not in (address, "localhost"):
                    self._log(f"{host} is {address} on this host, where no other can reach it: name it by its address")
                return index, address
        return None


def join_endpoint(host: str, port: int) -> str:
    """``HOST:PORT``; an IPv6 address gets its brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def resolve(host: str, port: int) -> list[Address]:
    """The addresses of a name.

    Raises:
        RendezvousConnectionError: it has none, or they cannot be found out now.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RendezvousConnectionError(
            f"cannot find the address of {host!r}: {reason}; check --rdzv-endpoint or --master-addr, and DNS"
        ) from error
    return [(family, address) for family, _, _, _, address in found]


def own_address(towards: str) -> str:
    """The address of this host by which it reaches another; nothing is sent."""
    family, address = resolve(towards, 9)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        return str(sock.getsockname()[0])


def _is_own(address: Address) -> bool:
    """Whether an address is one of this host's: only those can be bound."""
    family, where = address
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        try:
            sock.bind((where[0], 0, *where[2:]))
        except OSError:
            return False
        return True
