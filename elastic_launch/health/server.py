"""The agent's side of the health server: listens on the port, starts the process that serves it, and answers that."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from collections.abc import Collection, Mapping

from elastic_launch.core.agent.messages import AgentEvent
from elastic_launch.errors import UnavailableError
from elastic_launch.host.child import Child
from elastic_launch.host.ports import listen

VARIABLE = "TORCHELASTIC_HEALTH_CHECK_PORT"
SHORT_LIFE = 10.0
"""A process that ends after fewer seconds will probably do so again."""
MAX_SHORT_LIVES = 5
"""After this many short lives in a row no further process is started."""


class HealthServer:
    """A source of the agent's loop, without events. ``port`` is the port that it serves."""

    def __init__(self, port: int, environ: Mapping[str, str]) -> None:
        """Listen on the port and start the process. Clients that connect before it serves are queued.

        Args:
            port: The port; 0 picks a free one.
            environ: Environment variables of the process.

        Raises:
            UnavailableError: The port is in use, or the system cannot start the process.
        """
        try:
            self._listening = listen(port)
        except OSError as error:
            what = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
            raise UnavailableError(
                f"{VARIABLE}={port}: port {port} {what}; choose another one (each launcher on a host needs its own), "
                "or unset the variable"
            ) from error
        self.port: int = self._listening.getsockname()[1]
        self._environ = environ
        self._short_lives = 0
        try:
            self._child: Child | None = self._start()
        except UnavailableError:
            self._listening.close()
            raise

    def descriptors(self) -> list[tuple[int, int]]:
        """The descriptor to wait for, with its poll mask; it changes when another process is started."""
        return [(self._child.fileno(), select.POLLIN)] if self._child else []

    def deadline(self) -> None:
        """Nothing is ever due: without requests nobody wakes up."""

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        """Tell the process that the agent's loop runs, if it asks. Start another one if it has ended. Never blocks."""
        if self._child and self._child.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                if not _answer(self._child.control):
                    self._restart(self._child)
        return []

    def close(self) -> None:
        """End the process, and release the port."""
        if self._child:
            self._child.end()
        self._listening.close()

    def _start(self) -> Child:
        self._started_at = time.monotonic()
        return Child(
            f"the process that serves {VARIABLE}={self.port}",
            "elastic-health",
            "elastic_launch.health.server_main",
            self._environ,
            inherited=[self._listening.fileno()],
        )

    def _restart(self, lost: Child) -> None:
        """Start another process, unless the last ones ended too soon: then refuse clients from now on."""
        lost.end()
        self._child = None
        self._short_lives = self._short_lives + 1 if time.monotonic() - self._started_at < SHORT_LIFE else 0
        if self._short_lives < MAX_SHORT_LIVES:
            with contextlib.suppress(UnavailableError):
                self._child = self._start()
                return
        self._listening.close()


def _answer(control: socket.socket) -> bool:
    """Answer the process. Returns False if it has ended."""
    try:
        return bool(control.recv(64)) and bool(control.send(b"!"))
    except ConnectionError:
        return False
