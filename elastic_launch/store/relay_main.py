"""Runs in the process that stands at the gate of a job's store: lets in those who know the token, and carries bytes.

On the node that hosts the store, torch's server listens on loopback only. This process listens in its place: at a
*gate*, a client has to pass the challenge (``challenge``) before it is connected to the server. torch's own
client, in the workers, cannot do that. So on the other nodes this process listens on loopback, for workers of its user
only; at such an *entry* it connects to the gate, and passes the challenge for them.

It is a process of its own, because an agent that is stopped or busy must not hold up the workers of all nodes. The
agent first sends the key, and then listening sockets. Each message replaces the socket of the same name.

One thread, and one selector. A stranger costs a connection that waits, for ``PATIENCE`` at most. If too many wait,
those from the address with the most of them give way, so one that connects many times harms only itself. For an end
that does not read, about ``MOST_KEPT`` bytes are kept; then the other end is no longer read.
"""

from __future__ import annotations

import contextlib
import errno
import marshal
import os
import resource
import selectors
import socket
import struct
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from elastic_launch.host.child_main import receive_message
from elastic_launch.host.peers import peer_uid
from elastic_launch.store.challenge import ChallengeError, ClientChallenge, GateChallenge
from elastic_launch.store.client import stream_socket, watch_for_loss

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 10.0
"""Seconds until a connection must have passed the challenge."""
MOST_WAITING = 4096
"""Connections that have not passed the challenge; a quarter of what this process may open, if that is less."""
MOST_KEPT = 1 << 18
"""Bytes that are kept for an end that does not read."""
PAUSE = 0.1
"""Seconds in which nothing is accepted after the system had no descriptor for another connection."""
NAP = 0.01
"""Seconds until a descriptor may be free for a socket that the agent has sent."""
_FD = struct.Struct("i")
_AT_ONCE = 64
"""Connections that are accepted before others get their turn."""
_CHUNK = 1 << 16


class End:
    """One end of a connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.out = bytearray()
        """Bytes to be sent."""
        self.is_connected = True
        self.has_ended = False
        """Whether nothing more will come."""
        self.mask = 0
        """What the selector waits for."""

    def send(self) -> None:
        """Send what the socket accepts. Raises OSError."""
        with contextlib.suppress(BlockingIOError):
            while self.out:
                del self.out[: self.sock.send(self.out, socket.MSG_NOSIGNAL)]


class Connection:
    """A connection that comes in, and the one that it is carried to."""

    def __init__(self, listener: Listener, inner: socket.socket, address: str) -> None:
        self.listener = listener
        self.address = address
        """Where it comes from."""
        self.near = End(inner)
        self.far: End | None = None
        self.challenge: ClientChallenge | GateChallenge | None = None
        """What is to be passed first, by the near end of a gate, or at the far end of an entry; None: it was."""
        self.is_closed = False


class Listener:
    """A socket that listens."""

    def __init__(self, sock: socket.socket, is_gate: bool, target: tuple[str, int]) -> None:
        self.sock = sock
        self.is_gate = is_gate
        self.target = target


class Relay:
    """All connections of this process."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._selector = selectors.DefaultSelector()
        self._listeners: dict[str, Listener] = {}
        self._paused: list[Listener] = []
        """Those that accept nothing until ``_resume_at``."""
        self._resume_at = 0.0
        self._waiting: dict[str, dict[Connection, None]] = {}
        """Connections that have not passed the challenge, the oldest first, by the address that they come from."""
        self._deadlines: deque[tuple[float, Connection]] = deque()
        """When these are closed, the earliest first; those that have passed meanwhile are still in it."""
        self._count = 0
        """The number of those that wait."""
        self._limit = min(MOST_WAITING, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

    def watch(self, source: socket.socket | int, on_ready: Callable[[int], None]) -> None:
        """Have ``on_ready`` called when a source can be read."""
        self._selector.register(source, selectors.EVENT_READ, on_ready)

    def listen(self, name: str, listener: Listener) -> None:
        """Accept connections, in place of the listener that had this name before."""
        if before := self._listeners.pop(name, None):
            self._end(before)
        self._listeners[name] = listener
        listener.sock.setblocking(False)
        self.watch(listener.sock, partial(self._accept, listener))

    def _end(self, listener: Listener) -> None:
        """Refuse further connections. The present ones go on."""
        if listener in self._paused:
            self._paused.remove(listener)
        elif listener.sock.fileno() >= 0:
            self._selector.unregister(listener.sock)
        listener.sock.close()

    def turn(self) -> None:
        """Wait, and do what is due."""
        for key, mask in self._selector.select(self._patience()):
            key.data(mask)
        now = time.monotonic()
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][1].challenge is None):
            at, connection = self._deadlines.popleft()
            if at <= now and connection.challenge:
                self._close(connection)
        if self._paused and now >= self._resume_at:
            for listener in self._paused:
                self.watch(listener.sock, partial(self._accept, listener))
            self._paused.clear()

    def _patience(self) -> float | None:
        ends = [self._resume_at] if self._paused else []
        if self._deadlines:
            ends.append(self._deadlines[0][0])
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    # --- new connections

    def _accept(self, listener: Listener, _: int) -> None:
        if listener.sock.fileno() < 0:
            return  # it was closed by what came before in the same turn
        for _ in range(_AT_ONCE):
            try:
                sock, address = listener.sock.accept()
            except BlockingIOError:
                return
            except ConnectionError:
                continue  # it has gone
            except OSError:
                self._pause(listener)
                return
            self._begin(listener, sock, str(address[0]))

    def _pause(self, listener: Listener) -> None:
        """Accept nothing for a while: there are no descriptors left. One that waits gives way."""
        self.drop_one()
        self._selector.unregister(listener.sock)
        self._paused.append(listener)
        self._resume_at = time.monotonic() + PAUSE

    def _begin(self, listener: Listener, sock: socket.socket, address: str) -> None:
        connection = Connection(listener, sock, address)
        sock.setblocking(False)
        connection.challenge = GateChallenge(self._key) if listener.is_gate else ClientChallenge(self._key)
        if self._count >= self._limit:
            self.drop_one()
        self._count += 1
        self._waiting.setdefault(address, {})[connection] = None
        self._deadlines.append((time.monotonic() + PATIENCE, connection))
        try:
            if listener.is_gate:
                watch_for_loss(sock)
            elif peer_uid(sock) in (0, os.geteuid()):
                self._connect(connection)
            else:
                self._close(connection)
                return
            self._go_on(connection)
        except OSError:
            self._close(connection)

    def drop_one(self) -> None:
        """Close the oldest waiting connection from the address with the most of them."""
        if self._waiting:
            most = max(self._waiting, key=lambda address: len(self._waiting[address]))
            self._close(next(iter(self._waiting[most])))

    def _pass(self, connection: Connection) -> None:
        """Note that a connection does not wait any more."""
        connection.challenge = None
        waiting = self._waiting.get(connection.address, {})
        if connection in waiting:
            self._count -= 1
            del waiting[connection]
            if not waiting:
                del self._waiting[connection.address]

    def _connect(self, connection: Connection) -> None:
        """Begin to connect to where a connection is carried. Raises OSError."""
        target = connection.listener.target
        sock = stream_socket(socket.AF_INET6 if ":" in target[0] else socket.AF_INET)
        connection.far = End(sock)
        connection.far.is_connected = False
        sock.connect_ex(target)  # how it ends shows when it can be written to

    # --- connections

    def _ready(self, connection: Connection, end: End, mask: int) -> None:
        if connection.is_closed:
            return  # by what came before in the same turn
        try:
            if not end.is_connected and mask & selectors.EVENT_WRITE:
                self._note_connected(connection, end)
            if mask & selectors.EVENT_READ:
                self._read(connection, end)
            if not connection.is_closed:
                self._go_on(connection)
        except OSError:
            self._close(connection)

    def _note_connected(self, connection: Connection, end: End) -> None:
        """Look whether an end has connected. Raises OSError if it has not."""
        if code := end.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            if connection.listener.is_gate and code == errno.ECONNREFUSED:
                self._end(connection.listener)  # the server is gone, not just slow: refuse clients, as it would
            raise OSError(code, os.strerror(code))
        end.is_connected = True

    def _read(self, connection: Connection, end: End) -> None:
        """Read what has come to one end. Raises OSError."""
        challenge = connection.challenge
        try:
            data = end.sock.recv(challenge.needed if challenge else _CHUNK)
        except BlockingIOError:
            return
        if not data:
            end.has_ended = True
        elif challenge:
            try:
                challenge.receive(data)
            except ChallengeError:
                end.out += challenge.out
                end.send()
                self._close(connection)
        elif other := self._other(connection, end):
            other.out += data

    def _go_on(self, connection: Connection) -> None:
        """Send what is to be sent, and wait for what comes next. Raises OSError."""
        challenge, near = connection.challenge, connection.near
        if challenge:
            end = near if connection.listener.is_gate else connection.far
            assert end
            end.out += challenge.out
            challenge.out.clear()
            if challenge.is_passed:
                self._pass(connection)
                if not connection.far:
                    self._connect(connection)
        far = connection.far
        for end in (near, far):
            if end and end.is_connected:
                end.send()
        has_ended = far.has_ended and not near.out if far else False
        if has_ended or (near.has_ended and not (far and far.out)):
            self._close(connection)
            return
        self._wait(connection, near)
        if far:
            self._wait(connection, far)

    def _wait(self, connection: Connection, end: End) -> None:
        """Have the selector wait for what an end can do next."""
        other = self._other(connection, end)
        is_proving = connection.challenge is not None and (end is connection.near) == connection.listener.is_gate
        may_read = is_proving or (
            connection.challenge is None and other is not None and other.is_connected and len(other.out) < MOST_KEPT
        )
        mask = selectors.EVENT_READ if may_read and end.is_connected and not end.has_ended else 0
        if end.out or not end.is_connected:
            mask |= selectors.EVENT_WRITE
        if mask == end.mask:
            return
        # A selector that waits for nothing would still report a lost connection, again and again.
        if not mask:
            self._selector.unregister(end.sock)
        elif not end.mask:
            self._selector.register(end.sock, mask, partial(self._ready, connection, end))
        else:
            self._selector.modify(end.sock, mask, partial(self._ready, connection, end))
        end.mask = mask

    @staticmethod
    def _other(connection: Connection, end: End) -> End | None:
        return connection.near if end is connection.far else connection.far

    def _close(self, connection: Connection) -> None:
        connection.is_closed = True
        self._pass(connection)
        for end in (connection.near, connection.far):
            if end:
                if end.mask:
                    self._selector.unregister(end.sock)
                    end.mask = 0
                end.sock.close()


def main(control: socket.socket, agent: int) -> None:
    """Carry connections until the agent is gone.

    Args:
        control: The socket to the agent.
        agent: A pidfd of the agent.
    """
    key = receive_message(control)
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    relay = Relay(key)

    def end(_: int) -> None:
        os._exit(0)

    def add(_: int) -> None:
        # Only a look: a message whose descriptor finds no place would be gone with it.
        data, sent, _, _ = control.recvmsg(4096, socket.CMSG_LEN(_FD.size), socket.MSG_PEEK)
        if not data:
            os._exit(0)
        if not sent:
            relay.drop_one()
            time.sleep(NAP)
            return
        control.recv(4096)
        name, is_gate, target = marshal.loads(data)
        relay.listen(name, Listener(socket.socket(fileno=_FD.unpack(sent[0][2])[0]), is_gate, target))

    relay.watch(agent, end)
    relay.watch(control, add)
    while True:
        relay.turn()
