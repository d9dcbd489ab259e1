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

from elastic_launch.control.directory import SUFFIX, address, check, everybodys, own_directories
from elastic_launch.errors import UnavailableError

PATIENCE = 5.0
"""Seconds that an agent may take to answer. It answers within milliseconds, unless it is stopped or starved."""
_CHUNK = 1 << 16
_MAX_REPLY = 16 << 20
"""Bytes of a reply. No agent sends that many, but root asks what other users have put there, too."""


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
        owner = _owner(os.path.dirname(path))
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with address(path) as where:
                self._sock.connect(where)
            size = struct.calcsize("3i")
            self.pid, uid, _ = struct.unpack("3i", self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
            if uid != owner:  # the way there has been bent, which root would follow
                raise PermissionError(errno.EPERM, "the agent is another user's")
            if self.pid and not _exists(self.pid):  # a process that was forked from it still has the socket
                raise ConnectionRefusedError
        except OSError as error:
            self.close()
            if isinstance(error, ConnectionRefusedError | FileNotFoundError):
                if owner == os.geteuid():  # else what is removed could be chosen by them
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
            UnavailableError: what comes is no reply.
        """
        is_open = True
        try:
            while is_open and len(self._in) <= _MAX_REPLY:
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
        try:
            replies = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            replies = [None]
        if len(rest) > _MAX_REPLY or not all(isinstance(reply, dict) for reply in replies):
            raise UnavailableError(f"{self.path}: what answers there is no agent")
        return replies

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
    for folder in own_directories(environ):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            found += _listed(folder, os.geteuid())
    return found


def everybodys_sockets(environ: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the paths of the sockets of all agents on this host that this user may ask: as root, of all users.

    Args:
        environ: as for ``sockets``.

    Returns:
        The paths; and for each directory that exists and cannot be used, a line that says why.
    """
    found: list[str] = []
    troubles: list[str] = []
    for folder, owner in everybodys(environ):
        try:
            found += _listed(folder, owner)
        except FileNotFoundError:
            pass
        except UnavailableError as error:
            troubles.append(str(error))
        except OSError as error:
            troubles.append(f"{folder}: {error.strerror}")
    return found, troubles


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
            left = end - time.monotonic()
            if not (ready := {fd for fd, _ in poller.poll(max(0.0, left) * 1000)}):
                break
            for client in [client for client in clients if client.fileno() in ready]:
                try:
                    replies = client.take()
                except GoneError:
                    del found[client.path]
                    clients.remove(client)
                    continue
                except UnavailableError:
                    clients.remove(client)
                    continue
                if replies:
                    clients.remove(client)
                    found[client.path] = (client.pid, replies[0].get("status"))
            if left <= 0:  # not earlier: what has come while this process stood still is in time
                break
    return [(path, *found[path]) for path in paths if path in found]


def _listed(folder: str, owner: int) -> list[str]:
    check(folder, owner)
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(SUFFIX)]


def _owner(folder: str) -> int:
    """Return the uid of a directory's owner; -1 if it is gone."""
    try:
        return os.stat(folder).st_uid
    except OSError:
        return -1


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
        os.unlink(path)
