"""Ports and addresses of this host: listening, reserving a port, finding its owner.

A port that is looked up and released can be taken before the worker of rank 0 binds it. So the agent keeps its socket
bound, but never listens on it. The kernel then gives that port to nobody who asks for any port, and a worker can still
bind it with SO_REUSEADDR, as torch's store does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator

from elastic_launch.errors import UnavailableError
from elastic_launch.host.files import NOBODY

BACKLOG = 4096
"""Connections to queue until they are accepted; also the default of the kernel's limit, net.core.somaxconn."""
TCP_THIN_LINEAR_TIMEOUTS = 16
"""Do not wait longer each time, for the first six times, if few packets are on their way. Without effect under BBR."""
TCP_RTO_MAX_MS = 44
"""The longest wait, at least 1000 ms; Linux 6.15 and later."""
_LISTENING = "0A"
"""The state in ``/proc/net/tcp``."""


def resend_soon(sock: socket.socket) -> None:
    """Have TCP send lost packets again soon after a link was cut, as far as the system can.

    Otherwise it waits twice as long each time, so a link that is cut for 2 s may cost 3.3 s. Connections that a
    listening socket accepts inherit this.
    """
    for option, value in ((TCP_THIN_LINEAR_TIMEOUTS, 1), (TCP_RTO_MAX_MS, 1000)):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def listen(port: int, address: str = "") -> socket.socket:
    """Listen on a TCP port. Clients are queued from then on.

    Args:
        port: The port; 0 picks a free one.
        address: The IP address to listen on; empty for every address of this host, IPv6 and IPv4.

    Raises:
        OSError: EADDRINUSE if another process listens there, even if it began at the same moment; or another error.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = _bind_family(family, address, port) if address else _bind(port)
    resend_soon(sock)
    try:
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def reserve_port(port: int = 0) -> socket.socket:
    """Bind a TCP port on every address of this host, IPv6 and IPv4. Closing the socket ends the reservation.

    Args:
        port: The port; 0 picks a free one.

    Raises:
        UnavailableError: The port is in use; the message names the process if it can be found.
    """
    try:
        return _bind(port)
    except OSError as error:
        raise UnavailableError(_in_use(port) if error.errno == errno.EADDRINUSE else f"port {port}: {error}") from error


@contextlib.contextmanager
def reserve_ipv4_port() -> Iterator[int]:
    """Reserve a free TCP port, and keep everybody from binding it for IPv6.

    torch's store asks for both families, and takes IPv4 alone if it cannot have both. It looks up the name of each
    client's address. On a socket for both, 127.0.0.1 is ::ffff:127.0.0.1, which no hosts file lists, so it asks DNS.
    """
    with contextlib.ExitStack() as stack:
        port: int = stack.enter_context(_bind_family(socket.AF_INET, "0.0.0.0", 0)).getsockname()[1]
        with contextlib.suppress(OSError):  # this host has no IPv6, or somebody has taken the port there
            other = stack.enter_context(socket.socket(socket.AF_INET6))
            other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            other.bind(("::", port))
        yield port


def _bind(port: int) -> socket.socket:
    try:
        return _bind_family(socket.AF_INET6, "::", port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise
    return _bind_family(socket.AF_INET, "0.0.0.0", port)  # this host has no IPv6


def _bind_family(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((address, port))
    except OSError:
        sock.close()
        raise
    return sock


def _in_use(port: int) -> str:
    owner = port_owner(port)
    by = f" by {owner}" if owner else ""
    return (
        f"port {port} is in use{by}: choose another one (--master-port, PET_MASTER_PORT, or the port of the endpoint), "
        "or leave it out to have a free port picked"
    )


def outward_address() -> str:
    """The address of this host as other hosts see it; empty if it has no route to them. Nothing is sent."""
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):  # reserved for documentation
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((far, 9))
            return str(sock.getsockname()[0])
    return ""


def port_owner(port: int) -> str | None:
    """The process that listens on a TCP port, ``python (pid 812)``, or its user; None if neither can be found."""
    import psutil  # late: takes 20 ms, and is only needed to explain a failure

    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if listens and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except (psutil.Error, OSError):
        pass
    uid = listener_uid(port)  # the processes of others cannot be looked at
    return None if uid is None else f"a process of the user with uid {uid}"


def stranger_on(port: int) -> int | None:
    """The uid of another user, not root, whose process listens on a TCP port of this host; None if there is none."""
    uid = listener_uid(port)
    return None if uid in (os.geteuid(), 0, NOBODY) else uid


def listener_uid(port: int) -> int | None:
    """The uid of a process that listens on a TCP port of this host; None if there is none."""
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(path, encoding="ascii") as file:
            for line in file:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    return int(fields[7])
    return None
