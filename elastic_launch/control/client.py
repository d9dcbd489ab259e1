"""The other side of the control socket: finds the agents of this user on this host, and asks them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

from elastic_launch.control.directory import SUFFIX, address, check, directory
from elastic_launch.errors import UnavailableError

PATIENCE = 2.0
"""Seconds that an agent may take to answer. It answers within milliseconds, unless it is stopped or starved."""
_YOUNG = 2.0
"""Seconds in which a socket that refuses connections may belong to an agent that has not begun to listen."""
_CHUNK = 1 << 16


class GoneError(UnavailableError):
    """The agent has ended."""


class ControlClient:
    """A connection to one agent.

    Args:
        path: of the agent's socket.

    Raises:
        GoneError: the agent has ended. What it left is removed.
        UnavailableError: the agent does not accept connections now.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.pid = 0
        """The agent's pid; 0 if it is in a PID namespace that cannot be seen from here."""
        self._in = bytearray()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with address(path) as where:
                self._sock.connect(where)
            size = struct.calcsize("3i")
            self.pid, _, _ = struct.unpack("3i", self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
            if self.pid and not _exists(self.pid):  # a process that was forked from it still has the socket
                raise ConnectionRefusedError
        except OSError as error:
            self.close()
            if isinstance(error, ConnectionRefusedError | FileNotFoundError):
                _remove_leftover(path)
                raise GoneError(f"{path}: the agent has ended") from error
            raise UnavailableError(f"{path}: {error.strerror}") from error

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._sock.fileno()

    def send(self, request: Mapping[str, Any]) -> None:
        """Send a request.

        Raises:
            GoneError: the agent has ended.
        """
        try:
            self._sock.setblocking(True)
            self._sock.sendall(json.dumps(request).encode() + b"\n", socket.MSG_NOSIGNAL)
            self._sock.setblocking(False)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                raise
            # A reply that says why may have come before.

    def take(self) -> list[dict[str, Any]]:
        """Return the replies that have come, without waiting.

        Raises:
            GoneError: the agent has ended, or has closed the connection, and there are no more replies.
        """
        is_open = True
        try:
            while is_open:
                data = self._sock.recv(_CHUNK)
                self._in += data
                is_open = bool(data)
        except BlockingIOError:
            pass
        except ConnectionError:
            is_open = False
        *lines, rest = self._in.split(b"\n")
        self._in = rest
        if not lines and not is_open:
            raise GoneError(f"{self.path}: the agent has ended")
        return [json.loads(line) for line in lines]

    def ask(self, request: Mapping[str, Any], patience: float = PATIENCE) -> dict[str, Any]:
        """Send a request, and return the reply.

        Raises:
            GoneError: the agent has ended.
            UnavailableError: the agent does not answer in time.
        """
        self.send(request)
        end = time.monotonic() + patience
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        while not (replies := self.take()):
            if not poller.poll(max(0.0, end - time.monotonic()) * 1000):
                raise UnavailableError(f"the agent (pid {self.pid}) has not answered for {patience:g} s")
        return replies[0]

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()


def sockets(environ: Mapping[str, str]) -> list[str]:
    """Return the paths of the sockets of this user's agents on this host.

    Args:
        environ: ``XDG_RUNTIME_DIR`` and ``TMPDIR`` say where they are. Agents may have been started without the former.

    Raises:
        UnavailableError: the directory is not private.
    """
    found: list[str] = []
    without = {name: value for name, value in environ.items() if name != "XDG_RUNTIME_DIR"}
    for folder in dict.fromkeys((directory(environ), directory(without))):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            check(folder)
            found += (os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(SUFFIX))
    return found


def ask_all(paths: Sequence[str], patience: float = PATIENCE) -> list[tuple[str, int, dict[str, Any] | None]]:
    """Ask all agents at once for their status.

    Returns:
        For each agent that lives: the path of its socket, its pid, and its status; None if it does not answer in time.
    """
    clients: list[ControlClient] = []
    found: dict[str, tuple[int, dict[str, Any] | None]] = {}
    with contextlib.ExitStack() as stack:
        for path in paths:
            try:
                client = stack.enter_context(contextlib.closing(ControlClient(path)))
                client.send({"request": "status"})
            except GoneError:
                continue
            except UnavailableError:
                found[path] = (0, None)
                continue
            clients.append(client)
            found[path] = (client.pid, None)
        end = time.monotonic() + patience
        while clients:
            poller = select.poll()
            for client in clients:
                poller.register(client, select.POLLIN)
            ready = {fd for fd, _ in poller.poll(max(0.0, end - time.monotonic()) * 1000)}
            if not ready:
                break
            for client in [client for client in clients if client.fileno() in ready]:
                try:
                    replies = client.take()
                except GoneError:
                    del found[client.path]
                    clients.remove(client)
                    continue
                if replies:
                    clients.remove(client)
                    found[client.path] = (client.pid, replies[0].get("status"))
    return [(path, *found[path]) for path in paths if path in found]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # root's
    return True


def _remove_leftover(path: str) -> None:
    """Remove the socket of an agent that was killed."""
    with contextlib.suppress(OSError):
        if time.time() - os.lstat(path).st_ctime > _YOUNG:
            os.unlink(path)
