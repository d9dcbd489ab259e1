"""The etcd backend: an etcd v3 cluster, the user's own or one whose members the job's agents run."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from elastic_launch.core.text import is_loopback
from elastic_launch.errors import RendezvousConnectionError
from elastic_launch.host.addresses import Address, is_own, join_endpoint, own_address, resolve
from elastic_launch.host.resolver import Resolver
from elastic_launch.logs.job_files import as_file_name
from elastic_launch.parsing import split_endpoint
from elastic_launch.rendezvous.backends import Backend
from elastic_launch.store.client import StoreClient
from elastic_launch.store.etcd.bridge import DEFAULT_PORT, TLS_FILES, EtcdBridge, given_settings
from elastic_launch.store.etcd.member import EtcdMember, claim_endpoint

if TYPE_CHECKING:
    from elastic_launch.store.etcd.certificates import JobCertificates
    from elastic_launch.store.etcd.plan import MemberPlan

SHOWN_SETTINGS = {
    *("protocol", "cacert", "ca_cert", "cert", "ssl_cert", "key", "ssl_cert_key", "user", "username", "password_file"),
}
"""Settings that may be shown: names of files and users, but no passwords."""

LOOK_INTERVAL, LONGEST_LOOK_INTERVAL = 1.0, 60.0
"""Seconds until names of members that could not be resolved are asked for again, at first and at most. They double each
time: a name may be wrong, and asking takes a process and some of the agent's time."""


class EtcdBackend(Backend):
    """An etcd v3 cluster, reached through a bridge process on this node.

    Args:
        endpoints: ``HOST:PORT`` of the cluster's members, separated by commas.
        run_id: the job's id; its keys are below it.
        conf: settings of the connection, as for ``EtcdBridge``.
        environ: variables of the bridge process.
    """

    def __init__(self, endpoints: str, run_id: str, conf: Mapping[str, str], environ: Mapping[str, str]) -> None:
        self.endpoint = endpoints
        self.settings = {name: text for name, text in conf.items() if name in SHOWN_SETTINGS}
        self.where = f"etcd at {endpoints}"
        self.endpoints, self.conf, self._environ = endpoints, conf, environ
        self._prefix = f"elastic-launch/{run_id}/"
        self._resolvers = [Resolver(environ) for _ in endpoints.split(",")]
        self._process: EtcdBridge | None = None

    def open(self) -> None:
        """Start the bridge.

        Raises:
            UsageError: a setting is wrong, or the file that it names cannot be read.
            RendezvousConnectionError: the process cannot be started.
        """
        self._process = EtcdBridge(self.endpoints, self._prefix, self.conf, self._environ)

    def connect(self, again: bool = False) -> StoreClient:
        """Connect to the bridge."""
        if self._process is None:
            raise RendezvousConnectionError(f"{self.where}: not open")
        return StoreClient(self._process.connect(), self.where)

    def addresses(self, client: StoreClient) -> tuple[str, str]:
        """Return the address by which this node reaches an endpoint, and an empty one: etcd does not serve workers.

        A name that takes long to resolve is passed over.
        """
        for endpoint, resolver in zip(self.endpoints.split(","), self._resolvers, strict=True):
            with contextlib.suppress(OSError, RendezvousConnectionError):
                host, port = split_endpoint(endpoint)
                return own_address(resolver.resolve(host, port or DEFAULT_PORT)[0]), ""
        return "127.0.0.1", ""

    def close(self) -> None:
        """End the bridge, and the processes that ask for names."""
        super().close()
        for resolver in self._resolvers:
            resolver.close()


class EmbeddedEtcdBackend(EtcdBackend):
    """An etcd v3 cluster whose members are run by the job's agents, on the hosts that the endpoints name.

    Args:
        endpoints: host and client port of each member. The port above it is for the other members.
        run_id: the job's id.
        conf: settings of the connection, as for ``EtcdBridge``.
        environ: variables of the bridge and of the member's process.
        log_dir: directory of the job's files and the members' data; None: a temporary directory.
        log: prints a line on the console.
        token: the job's token, from which certificates are made; empty: ``conf`` says whether there are any.
    """

    def __init__(
        self,
        endpoints: Sequence[tuple[str, int]],
        run_id: str,
        conf: Mapping[str, str],
        environ: Mapping[str, str],
        log_dir: str | None,
        log: Callable[[str], None],
        token: bytes = b"",
    ) -> None:
        self.members = tuple(sorted(endpoints))  # all nodes need the same order, whatever their users wrote
        self._names = [join_endpoint(host, port) for host, port in self.members]
        super().__init__(",".join(self._names), run_id, conf, environ)
        self.stays = True
        self._run_id = run_id
        self._log_dir = log_dir
        self._log = log
        self._token = token
        self._peer_cert = ""
        self._member: EtcdMember | None = None
        self._plan: MemberPlan | None = None
        """How to start this host's member, once it is known which one that is."""
        self._unresolved: list[int] = []
        """Members whose names are still to be resolved."""
        self._look_at, self._look_interval = 0.0, LOOK_INTERVAL
        """When they are asked for again, and after how many seconds the next time."""
        self._own = contextlib.ExitStack()
        """Ends the member of this host, and the claim on its endpoint."""
        self._made = contextlib.ExitStack()
        """Removes the certificates that were made."""

    def open(self) -> None:
        """Start the bridge, and the member if an endpoint is this host's.

        Raises:
            UnavailableError: there is no etcd binary to start, or none to make certificates.
        """
        self.make_certificates()
        # Late, because few jobs need them.
        from elastic_launch.store.etcd.plan import MemberPlan

        files = given_settings(self.conf)
        tls = (files["cacert"], files["cert"], files["key"]) if "cacert" in files else None
        if tls:
            tls = (os.path.abspath(tls[0]), os.path.abspath(tls[1]), os.path.abspath(tls[2]))
        cluster_token = f"elastic-launch/{as_file_name(self._run_id)}"
        plan = MemberPlan(endpoints=self.members, token=cluster_token, tls=tls, peer_cert=self._peer_cert)
        self.conf = {**self.conf, "cluster_id": str(plan.cluster_id)}
        self._plan, self._unresolved = plan, list(range(len(self.members)))
        self._start_own()
        super().open()

    def _start_own(self) -> None:
        """Start the member of this host, if an endpoint is found to be this host's.

        Raises:
            UnavailableError: there is no etcd binary to start.
        """
        from elastic_launch.store.etcd.server import etcd_binary  # late, because few jobs need it

        self._look_at = time.monotonic() + self._look_interval
        self._look_interval = min(2 * self._look_interval, LONGEST_LOOK_INTERVAL)
        if self._plan and (claimed := self._claim_own()):
            own, address = claimed
            self.conf = {**self.conf, "preferred": self._names[own]}  # comes too late if the bridge runs already
            plan = self._plan._replace(
                binary=os.path.abspath(etcd_binary()),
                own_index=own,
                address=address,
                folder=self._folder(own),
                temporary=not self._log_dir,
            )
            self._unresolved = []
            self._member = EtcdMember(plan, self._environ)
            self._own.callback(self._member.close)

    def make_certificates(self) -> None:
        """Make the certificates that follow from the token, if there is one and the user has named none.

        Raises:
            UnavailableError: they cannot be made.
        """
        if self._token:
            made = self._made.enter_context(job_certificates(self._token, self._run_id, self.members))
            self.conf, self._peer_cert, self._token = {**self.conf, **made.conf}, made.peer, b""

    def _folder(self, own: int) -> str:
        """Return the directory for the data of a member."""
        if self._log_dir:
            name = self._names[own].replace(":", "_").strip("[]")
            return os.path.abspath(os.path.join(self._log_dir, as_file_name(self._run_id), "etcd", name))
        from elastic_launch.store.etcd.plan import TEMPORARY

        temp = self._environ.get("TMPDIR") or "/tmp"
        return os.path.abspath(os.path.join(temp, f"{TEMPORARY}{os.urandom(6).hex()}"))

    def descriptors(self) -> list[tuple[int, int]]:
        """Return the descriptors of the bridge and the member."""
        return super().descriptors() + ([(self._member.fileno(), select.POLLIN)] if self._member else [])

    def take(self) -> None:
        """Log what the member reports, and check that the bridge still runs. The member may end: others may serve.

        If a name could not be resolved, ask again: it may be this host's.
        """
        if self._unresolved and time.monotonic() >= self._look_at:
            self._start_own()
        if self._member:
            try:
                for line in self._member.take():
                    self._log(line)
            except RendezvousConnectionError as error:
                self._log(f"{error}; the job continues while a majority of the other members is up")
                self._end_member()
        super().take()

    def close(self) -> None:
        """End the bridge and the member."""
        super().close()
        self._end_member()
        self._made.close()

    def _end_member(self) -> None:
        self._member = None
        self._own.close()

    def _claim_own(self) -> tuple[int, str] | None:
        """Claim the first endpoint of this host that no other agent of the job has claimed.

        Returns:
            Its index, and the IP address to listen on; None: this node runs no member.
        """
        asked, self._unresolved = self._unresolved, []
        for index in asked:
            host, port = self.members[index]
            try:
                address = _own_address(self._resolvers[index].resolve(host, port))
            except RendezvousConnectionError:
                self._unresolved.append(index)
                continue
            if address and (claimed := claim_endpoint(self._names[index], self._run_id)):
                self._own.enter_context(claimed)
                if is_loopback(address) and host not in (address, "localhost"):
                    self._log(f"{host} is {address} on this host, which others cannot reach: use its IP address")
                return index, address
        return None


def split_members(endpoint: str) -> list[tuple[str, int]]:
    """Return host and client port of each member that an endpoint names."""
    parts = [split_endpoint(entry) for entry in endpoint.split(",") if entry.strip()]
    return [(host, port or DEFAULT_PORT) for host, port in parts]


def wants_certificates(conf: Mapping[str, str]) -> bool:
    """Return whether a job with a token makes certificates for its embedded etcd: the user has not decided on TLS."""
    return not given_settings(conf).keys() & {"protocol", *TLS_FILES}


def job_certificates(
    token: bytes, run_id: str, members: Sequence[tuple[str, int]]
) -> contextlib.closing[JobCertificates]:
    """Return a context with the certificates of an embedded etcd.

    Raises:
        UnavailableError: they cannot be made.
    """
    from elastic_launch.store.etcd.certificates import JobCertificates  # late: it starts programs

    return contextlib.closing(JobCertificates(token, run_id, [host for host, _ in members]))


def own_address_of(host: str, port: int) -> str | None:
    """Return the address of this host that a member's name stands for, rather not a loopback one; None: another host's.

    A name that cannot be resolved yet is not this host's.
    """
    try:
        return _own_address(resolve(host, port))
    except RendezvousConnectionError:
        return None


def _own_address(addresses: Sequence[Address]) -> str | None:
    return min((str(address[1][0]) for address in addresses if is_own(address)), key=is_loopback, default=None)
