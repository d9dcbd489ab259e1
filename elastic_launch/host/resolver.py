"""Resolves the name of a host without blocking for long: a name server that loses replies can take 10 s or more.

The agent's loop has to handle signals meanwhile. Numeric addresses and the names in the hosts file are known at once.
For any other name a helper process asks (``resolver_main``), which can be left to itself.
"""

from __future__ import annotations

import marshal
import select
import socket
import time
from collections.abc import Mapping

from elastic_launch.errors import RendezvousConnectionError, UnavailableError
from elastic_launch.host.addresses import Address, resolve
from elastic_launch.host.child import Child

PATIENCE = 0.5
"""Longest time, in seconds, that a question waits for its answer. If none has come by then, ask again later."""
_HOSTS = "/etc/hosts"


class PendingError(RendezvousConnectionError):
    """The answer has not come yet: ask again."""


class Resolver:
    """Resolves one name at a time, as often as it is asked to."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Prepare; ``environ`` is for the helper process."""
        self._environ = environ
        self._asked: tuple[str, int] | None = None
        self._asked_at = 0.0
        self._process: Child | None = None

    def resolve(self, host: str, port: int) -> list[Address]:
        """Return the addresses of a host, each with the port. There is at least one.

        Raises:
            PendingError: the answer has not come yet.
            RendezvousConnectionError: the name is unknown, or cannot be resolved now.
        """
        if _is_known(host):
            return resolve(host, port)
        patience = 0.0
        if self._asked != (host, port) or self._process is None:
            self.close()
            patience = PATIENCE
            message = {"host": host, "port": port}
            module = "elastic_launch.host.resolver_main"
            try:
                self._process = Child(
                    "the process that asks DNS", "elastic-dns", module, self._environ, message=message
                )
            except UnavailableError as error:
                raise RendezvousConnectionError(str(error)) from error
            self._asked, self._asked_at = (host, port), time.monotonic()
        poller = select.poll()
        poller.register(self._process.fileno(), select.POLLIN)
        if not poller.poll(patience * 1000):
            raise PendingError(
                f"cannot resolve {host!r} yet: no answer for {time.monotonic() - self._asked_at:.1f} s; "
                "check --rdzv-endpoint or --master-addr, and DNS"
            )
        try:
            answer = self._process.control.recv(1 << 16)
        except OSError:
            answer = b""
        self.close()
        found, why = marshal.loads(answer) if answer else ([], f"cannot resolve {host!r}: the process that asks ended")
        if why:
            raise RendezvousConnectionError(why)
        return [(family, tuple(address)) for family, address in found]

    def close(self) -> None:
        """End the process, if it still waits."""
        if self._process:
            self._process.end()
        self._process = None


def _is_known(host: str) -> bool:
    """Whether a host needs no name server: it is an address, or in the hosts file."""
    try:
        socket.getaddrinfo(host, 0, flags=socket.AI_NUMERICHOST)
    except UnicodeError:
        return True  # it cannot be a name, either
    except OSError:
        pass
    else:
        return True
    try:
        with open(_HOSTS, encoding="utf-8", errors="replace") as file:
            return any(host in line.partition("#")[0].split()[1:] for line in file)
    except OSError:
        return False
