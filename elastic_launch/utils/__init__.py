"""Helpers under the names of ``torch.distributed.elastic.utils``: free ports, ``macros``, and ``utils.data``.

The launcher itself does not use them.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any

from elastic_launch.errors import UnavailableError

__all__ = ["get_free_port", "get_socket_with_port", "macros"]


def get_socket_with_port() -> socket.socket:
    """Return a socket that listens on a free port of ``localhost``. Close it just before the port is used.

    >>> with get_socket_with_port() as sock:
    ...     port = sock.getsockname()[1]

    Raises:
        UnavailableError: no port is free, or the name ``localhost`` has no address.
    """
    errors: list[str] = []
    with contextlib.suppress(socket.gaierror):
        for family, *_ in socket.getaddrinfo("localhost", None, type=socket.SOCK_STREAM):
            try:
                return socket.create_server(("localhost", 0), family=family, backlog=0)
            except OSError as error:
                errors.append(str(error))
    raise UnavailableError(f"no free port on localhost: {'; '.join(errors) or 'localhost does not resolve'}")


def get_free_port() -> int:
    """Return the number of a port of ``localhost`` that was free just now. Another program may take it at any time."""
    with get_socket_with_port() as sock:
        return int(sock.getsockname()[1])


class macros:  # noqa: N801 - torch's name
    """What each worker fills in in its own arguments."""

    local_rank = "${local_rank}"
    """Stands for the worker's local rank."""

    @staticmethod
    def substitute(args: list[Any], local_rank: str) -> list[Any]:
        """Return the arguments of a worker. Those that are not texts stay as they are.

        >>> macros.substitute(["--rank=${local_rank}", 5], "3")
        ['--rank=3', 5]
        """
        from string import Template

        return [Template(arg).safe_substitute(local_rank=local_rank) if isinstance(arg, str) else arg for arg in args]
