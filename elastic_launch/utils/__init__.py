"""Helpers for scripts, under the names of ``torch.distributed.elastic.utils``: free ports, and ``utils.data``.

The launcher itself does not use them.
"""

from __future__ import annotations

import contextlib
import socket

from elastic_launch.errors import UnavailableError

__all__ = ["get_free_port", "get_socket_with_port"]


def get_socket_with_port() -> socket.socket:
    """Return a socket that listens on a free port of ``localhost``. Close it just before the port is used.

    >>> with get_socket_with_port() as sock:
    ...     port = sock.getsockname()[1]

    Raises:
        UnavailableError: no port is free, or the name ``localhost`` has no address.
    """
    errors: list[str] = []
    with contextlib.suppress(socket.gaierror):
        for family, kind, protocol, _, _ in socket.getaddrinfo("localhost", None, type=socket.SOCK_STREAM):
            sock = None
            try:
                sock = socket.socket(family, kind, protocol)
                sock.bind(("localhost", 0))
                sock.listen(0)
            except OSError as error:
                errors.append(str(error))
                if sock:
                    sock.close()
            else:
                return sock
    raise UnavailableError(f"no free port on localhost: {'; '.join(errors) or 'the name has no address'}")


def get_free_port() -> int:
    """Return the number of a port of ``localhost`` that was free just now. Another program may take it at any time."""
    with get_socket_with_port() as sock:
        return int(sock.getsockname()[1])
