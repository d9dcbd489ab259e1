"""The agent's side of the process that carries connections through a gate (``relay_main``)."""

from __future__ import annotations

import contextlib
import marshal
import socket
from collections.abc import Mapping

from elastic_launch.errors import RendezvousConnectionError
from elastic_launch.host.child import Child

LOOPBACK = "127.0.0.1"


class Relay(Child):
    """The process. ``fileno()`` is readable when ``take()`` is due."""

    def __init__(self, key: bytes, environ: Mapping[str, str]) -> None:
        """Start the process.

        Args:
            key: The key of the job's gates, as from ``challenge.gate_key``.
            environ: Environment variables of the process.

        Raises:
            UnavailableError: The system cannot start the process.
        """
        module = "elastic_launch.store.relay_main"
        super().__init__("the process for a store's gate", "elastic-gate", module, environ, message=key)

    def add_gate(self, name: str, listening: socket.socket, target: int) -> None:
        """Let clients of a socket in that know the token, to a port on loopback.

        Args:
            name: Replaces what has had this name before; its connections go on.
            listening: The socket, which is closed here.
            target: The port.
        """
        self._add(name, listening, True, (LOOPBACK, target))

    def add_entry(self, name: str, listening: socket.socket, target: tuple[str, int]) -> None:
        """Carry connections of this user's processes through the gate at another address.

        Args:
            name: Replaces what has had this name before; its connections go on.
            listening: A socket that listens on loopback. It is closed here.
            target: Numeric address and port of the gate.
        """
        self._add(name, listening, False, target)

    def _add(self, name: str, listening: socket.socket, is_gate: bool, target: tuple[str, int]) -> None:
        message = marshal.dumps((name, is_gate, target))
        with listening, contextlib.suppress(BrokenPipeError, ConnectionResetError):  # take() reports that
            socket.send_fds(self.control, [message], [listening.fileno()])

    def take(self) -> None:
        """Check that the process still runs.

        Raises:
            RendezvousConnectionError: It has ended.
        """
        try:
            self.control.recv(16)
        except BlockingIOError:
            return
        except ConnectionError:
            pass
        raise RendezvousConnectionError(
            f"the process (pid {self.pid}) that connects this node's workers, or other nodes, through the gate of the "
            f"job's store is gone ({self.how_it_ended()}); unless somebody killed it, check whether this node has run "
            "out of memory"
        )

    def close(self) -> None:
        """End the process, and its connections."""
        self.end()
