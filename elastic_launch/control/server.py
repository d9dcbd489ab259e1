"""The agent's side of the control socket: accepts clients, and hands what they ask to the agent.

It is a part of the agent's loop and never blocks it. Nobody asks most agents, so everything that a client needs is
imported when the first one comes; until then there is one more descriptor to wait for.

The protocol is described in ``docs/operating.md``: a line of JSON in, lines of JSON out.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from elastic_launch.control.directory import address, directory, make, socket_name
from elastic_launch.errors import UnavailableError

if TYPE_CHECKING:
    from elastic_launch.control.connection import Connection, Operator
    from elastic_launch.core.agent.messages import AgentEvent

MAX_CLIENTS = 16
"""Connections at a time; further ones are refused."""
UPDATE_INTERVAL = 0.5
"""Shortest time, in seconds, between two updates for a client that subscribes."""
_RETRY = 1.0
"""Seconds without new clients after the system had no descriptor for one."""


class ControlServer:
    """The control socket of one agent; a source of its loop. ``path`` is where the socket is."""

    def __init__(self, run_id: str, environ: Mapping[str, str], operator: Operator) -> None:
        """Begin to listen.

        Args:
            run_id: the job's id.
            environ: the agent's variables, which say where sockets are.
            operator: who answers.

        Raises:
            UnavailableError: there is no private directory for the socket, or no socket.
        """
        self.path = os.path.join(directory(environ), socket_name(run_id))
        self._operator = operator
        self._clients: list[Connection] = []
        self._paused_until = 0.0
        self._updated_at = 0.0
        self._has_answers = False
        """Whether a reply that clients wait for is there."""
        self._update_at: float | None = None
        """When the subscribers' next update is due; None: nothing has changed."""
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._bind()
        except OSError as error:
            self.close()
            raise UnavailableError(f"{self.path}: {error.strerror}") from error
        except UnavailableError:
            self._listening.close()
            raise

    def changed(self) -> None:
        """Note that the agent's status has changed."""
        if self._update_at is None and any(client.is_subscribed for client in self._clients):
            self._update_at = self._updated_at + UPDATE_INTERVAL

    def answered(self) -> None:
        """Note that a reply is there that was not when it was asked for."""
        self._has_answers = True

    def descriptors(self) -> list[tuple[int, int]]:
        """See ``LoopSource``."""
        accepting = [] if self._paused_until else [(self._listening.fileno(), select.POLLIN)]
        return accepting + [(client.fileno(), client.mask()) for client in self._clients]

    def deadline(self) -> float | None:
        """See ``LoopSource``. Without clients nothing is ever due."""
        if self._has_answers or any(client.has_more for client in self._clients):
            return 0.0
        times = (self._update_at, self._paused_until or None)
        return min((at for at in times if at is not None), default=None)

    def take(self, ready: Collection[int] = ()) -> list[AgentEvent]:
        """Accept clients, read what they ask, and write what they are told. Never blocks, and never raises."""
        now = time.monotonic()
        if now >= self._paused_until:
            self._paused_until = 0.0
            self._accept(now)
        events: list[AgentEvent] = []
        self._has_answers = False
        for client in self._clients:
            events += client.turn(client.fileno() in ready)
        if self._update_at is not None and now >= self._update_at:
            self._update(now)
        self._clients = [client for client in self._clients if not client.is_closed]
        return events

    def close(self) -> None:
        """Tell the subscribers how the agent ended, and remove the socket."""
        if self._update_at is not None:
            self._update(0.0)
        for client in self._clients:
            client.close()
        self._clients.clear()
        self._listening.close()
        with contextlib.suppress(OSError):
            os.unlink(self.path)
            os.rmdir(os.path.dirname(self.path))  # unless there are others

    def _bind(self) -> None:
        """Listen, and only then appear under the name that clients look for."""
        folder = os.path.dirname(self.path)
        for _ in range(3):
            make(folder)
            # By now another agent may have removed it, as in ``make``.
            with contextlib.suppress(FileNotFoundError), address(f"{self.path}.new") as where:
                self._listening.bind(where)
                self._listening.listen(MAX_CLIENTS)
                os.rename(f"{self.path}.new", self.path)
                return
        raise UnavailableError(f"{folder}: is removed again and again")

    def _update(self, now: float) -> None:
        self._update_at, self._updated_at = None, now
        for client in self._clients:
            client.update()

    def _accept(self, now: float) -> None:
        from elastic_launch.control.connection import Connection, may_connect, refuse

        while True:
            try:
                sock, _ = self._listening.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:  # no descriptors are left: waiting for the socket would return at once, again and again
                self._paused_until = now + _RETRY
                return
            if not may_connect(sock):
                refuse(sock, "this socket is another user's")
            elif len(self._clients) >= MAX_CLIENTS:
                refuse(sock, f"{MAX_CLIENTS} clients are connected already")
            else:
                self._clients.append(Connection(sock, self._operator))
