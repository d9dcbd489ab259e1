"""Ports for servers that tests start: such as the system gives to nobody who asks for any port."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import socket

_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw19").removeprefix("gw")) % 20
_PORTS = range(10_000 + 1_000 * _WORKER, 11_000 + 1_000 * _WORKER)
"""Those of this process: other test processes have others, and what the system picks lies above (32768 to 60999)."""
_next = itertools.count(random.randrange(len(_PORTS)))


def free_port(count: int = 1) -> int:
    """A port that is free on all addresses of this host, as are the ``count`` - 1 above it."""
    while True:
        port = _PORTS[next(_next) % (len(_PORTS) - count)]
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for number in range(port, port + count):
                stack.enter_context(socket.create_server(("", number), family=socket.AF_INET6, dualstack_ipv6=True))
            for _ in range(count - 1):
                next(_next)
            return port
