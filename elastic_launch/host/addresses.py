"""Resolve the names of hosts, and tell which addresses are this host's own."""

from __future__ import annotations

import socket
from typing import Any

from elastic_launch.errors import RendezvousConnectionError

Address = tuple[int, tuple[Any, ...]]
"""An address family, and an address in the form that ``socket.connect`` accepts."""


def join_endpoint(host: str, port: int) -> str:
    """Return ``HOST:PORT``, with brackets around an IPv6 address.

    >>> join_endpoint("host-a", 29400), join_endpoint("::1", 29400)
    ('host-a:29400', '[::1]:29400')
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def resolve(host: str, port: int) -> list[Address]:
    """Return the addresses of a host name or IP address, each with the port. There is at least one.

    Raises:
        RendezvousConnectionError: the name is unknown, or cannot be resolved now.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RendezvousConnectionError(
            f"cannot resolve {host!r}: {reason}; check --rdzv-endpoint or --master-addr, and DNS"
        ) from error
    return [(family, address) for family, _, _, _, address in found]


def own_address(destination: Address) -> str:
    """Return the IP address of this host from which it reaches a destination. Sends nothing.

    Raises:
        OSError: there is no route to the destination.
    """
    family, address = destination
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        return str(sock.getsockname()[0])


def is_own(address: Address) -> bool:
    """Return whether an address is this host's own. Only those can be bound."""
    family, where = address
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.bind((where[0], 0, *where[2:]))
    except OSError:
        return False
    return True
