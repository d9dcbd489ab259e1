"""One client of the control socket, as the agent sees it. Imported when the first client comes.

Whatever a client sends or omits, the agent neither waits for it nor fails because of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from elastic_launch.errors import UsageError

if TYPE_CHECKING:
    from elastic_launch.core.agent.messages import AgentEvent

VERSION = 1
"""Of the protocol; in every reply."""
MAX_LINE = 64 << 10
"""Bytes of a request."""
MAX_OUTPUT = 4 << 20
"""Bytes that may wait for a client; one that does not read them is dropped."""
_REQUESTS_PER_TURN = 4
"""Requests of one client that are answered before the agent turns to something else."""


class Awaited(Protocol):
    """Something that will have a reply."""

    reply: dict[str, Any] | None
    """None: not yet."""


class Operator(Protocol):
    """Who answers for the agent."""

    def status(self) -> dict[str, Any]:
        """Return the agent's status, as described in ``docs/operating.md``."""

    def carry_out(self, request: Mapping[str, Any]) -> tuple[dict[str, Any] | Awaited, list[AgentEvent]]:
        """Return the reply to a request, or what will have one, and the events for the agent that it leads to.

        Raises:
            UsageError: the request is not valid.
        """


class Connection:
    """A client. ``turn`` reads and answers; ``update`` tells a subscriber that something has changed."""

    def __init__(self, sock: socket.socket, operator: Operator) -> None:
        self.is_closed = False
        self.is_subscribed = False
        self._sock = sock
        self._sock.setblocking(False)
        self._operator = operator
        self._in = bytearray()
        self._out = bytearray()
        self._is_stale = False
        """Whether a subscriber has not been told yet what has changed, because it has not read the last update."""
        self._awaited: Awaited | None = None
        """The request whose reply is not known yet; others of this client wait for it."""
        self._has_shut = False
        """Whether the client has said that nothing will follow."""

    def fileno(self) -> int:
        """Return the descriptor to wait for."""
        return self._sock.fileno()

    def mask(self) -> int:
        """Return the poll mask of the descriptor."""
        return (select.POLLOUT if self._out else 0) | (0 if self._has_shut or self.has_more else select.POLLIN)

    @property
    def has_more(self) -> bool:
        """Whether a request waits for its turn."""
        return not self.is_closed and self._awaited is None and b"\n" in self._in

    def turn(self, is_ready: bool) -> list[AgentEvent]:
        """Read and answer requests, and write. Return the events for the agent that they lead to."""
        events: list[AgentEvent] = []
        if self._awaited and self._awaited.reply is not None:
            reply, self._awaited = self._awaited.reply, None
            self._send(reply)
        if is_ready and self._has_shut and not self._out:
            self.close()  # it has gone
        elif is_ready and not self._has_shut and not self.has_more:
            self._read()
        for _ in range(_REQUESTS_PER_TURN):
            if not self.has_more:
                break
            line, _, rest = self._in.partition(b"\n")
            self._in = rest
            events += self._answer(bytes(line))
        if len(self._in) > MAX_LINE and not self.has_more:
            self._fail(f"a request has at most {MAX_LINE} bytes")
        self._flush()
        if self._has_shut and not (self.has_more or self._out or self.is_subscribed or self._awaited):
            self.close()
        return events

    def update(self) -> None:
        """Send the status to a subscriber: now, or when it has read the last one."""
        if self.is_subscribed and not self.is_closed:
            self._is_stale = True
            self._flush()

    def close(self) -> None:
        """Close the connection; what the client has not read is lost."""
        self.is_closed = True
        self._sock.close()

    def _read(self) -> None:
        try:
            data = self._sock.recv(MAX_LINE)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self._in += data
        self._has_shut = not data

    def _answer(self, line: bytes) -> list[AgentEvent]:
        if len(line) > MAX_LINE:
            self._fail(f"a request has at most {MAX_LINE} bytes")
            return []
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict) or not isinstance(request.get("request"), str):
            self._fail('a request is a JSON object in one line, as in {"request": "status"}')
            return []
        try:
            if request["request"] in ("status", "subscribe"):
                self._send({"ok": True, "status": self._operator.status()})
                self.is_subscribed |= request["request"] == "subscribe"
                return []
            reply, events = self._operator.carry_out(request)
        except UsageError as error:
            self._send({"ok": False, "code": "invalid", "error": str(error)})
            return []
        except Exception as error:  # the job does not fail because it is looked at
            self._send({"ok": False, "code": "internal", "error": f"{type(error).__name__}: {error}"})
            return []
        if isinstance(reply, dict):
            self._send(reply)
        else:
            self._awaited = reply
        return events

    def _fail(self, error: str) -> None:
        """Send an error, and close: what follows in the stream makes no sense."""
        if not self.is_closed:
            self._in.clear()
            self._send({"ok": False, "code": "invalid", "error": error})
            self._flush()
            self.close()

    def _send(self, reply: Mapping[str, Any]) -> None:
        self._out += encode(reply)
        if len(self._out) > MAX_OUTPUT:
            self.close()

    def _flush(self) -> None:
        try:
            while not self.is_closed and (self._out or self._is_stale):
                if not self._out:
                    self._is_stale = False
                    self._send({"ok": True, "status": self._operator.status()})
                sent = self._sock.send(self._out, socket.MSG_NOSIGNAL)
                del self._out[:sent]
        except BlockingIOError:
            pass
        except Exception:  # the client has gone; or there is no status, which is no reason for the job to fail
            self.close()


def encode(reply: Mapping[str, Any]) -> bytes:
    """Encode a reply as a line."""
    return json.dumps({"version": VERSION, **reply}, separators=(",", ":")).encode() + b"\n"


def may_connect(sock: socket.socket) -> bool:
    """Return whether the client is a process of this user, or of root."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return uid in (0, os.geteuid())


def refuse(sock: socket.socket, why: str) -> None:
    """Tell a client that it is not served, and close its connection."""
    sock.setblocking(False)
    with sock, contextlib.suppress(OSError):
        sock.send(encode({"ok": False, "code": "refused", "error": why}), socket.MSG_NOSIGNAL)
