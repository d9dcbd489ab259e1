"""Layer 2: this host's ports and addresses, above all the port on which rank 0 serves the process group's store.

A port that is looked up and let go can be taken before the worker binds it. So the agent keeps its socket bound, but
never listens on it: the kernel then gives the port to nobody who asks for any port, and a worker that asks for this
one, with SO_REUSEADDR as torch's store does, gets it.
"""

from __future__ import annotations

import contextlib
import errno
import socket

from elastic_launch.errors import UnavailableError


def reserve_port(port: int = 0) -> socket.socket:
    """Bind a port on all addresses, IPv6 and IPv4 where there is IPv6. Closing the socket ends the reservation.

    Args:
        port: the port; 0 picks a free one.

    Raises:
        UnavailableError: the port is in use; the message names the process where that can be known.
    """
    try:
        return _bind(socket.AF_INET6, "::", port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UnavailableError(_in_use(port)) from error
    try:
        return _bind(socket.AF_INET, "0.0.0.0", port)  # no IPv6 on this host
    except OSError as error:
        raise UnavailableError(_in_use(port) if error.errno == errno.EADDRINUSE else f"port {port}: {error}") from error


def _bind(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
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
        f"port {port} is in use{by}: choose another (--master-port, PET_MASTER_PORT, or the endpoint's), "
        "or none to have a free one picked"
    )


def outward_address() -> str:
    """The address of this host on its way out, for other hosts; empty where there is none. Nothing is sent."""
    for family, far in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):  # reserved for documentation
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((far, 9))
            return str(sock.getsockname()[0])
    return ""


def port_owner(port: int) -> str | None:
    """The process that listens on a TCP port, ``python (pid 812)``; None where that cannot be known."""
    import psutil  # late: 20 ms, and only needed to explain a failure

    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if listens and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except (psutil.Error, OSError):
        pass
    return None
