"""Layer 2: small things that scripts written for torch's launcher import: free ports, and ``utils.data``.

Opens sockets on the loopback address; nothing of the launcher's uses it.
"""

from __future__ import annotations

import contextlib
import socket

from elastic_launch.errors import UnavailableError

__all__ = ["get_free_port", "get_socket_with_port"]


def get_socket_with_port() -> socket.socket:
    """A socket that listens at a free port of ``localhost``. Hold on to it until the port is needed, then close it.

    Raises:
        UnavailableError: there is none.
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
    raise UnavailableError(f"no free port at localhost: {'; '.join(errors) or 'the name has no address'}")


def get_free_port() -> int:
    """The number of a port of ``localhost`` that was free a moment ago; another program may take it any time."""
    with get_socket_with_port() as sock:
        return int(sock.getsockname()[1])
