"""A client of the job's store: a connection that never blocks, for use in an event loop.

It speaks the protocol of torch's TCPStore, which the etcd bridge serves as well. It resolves no names, and it neither
gives up nor tries again: that is left to its caller.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from elastic_launch.core.store_requests import Cancel, Reply, Request, Wait
from elastic_launch.errors import RendezvousConnectionError
from elastic_launch.host.ports import resend_soon
from elastic_launch.store.codec import Reader, describe, encode, encode_handshake
from elastic_launch.store.wire import GATE, ProtocolError

if TYPE_CHECKING:
    from elastic_launch.store.challenge import ClientChallenge

DEAD_HOST_PATIENCE = 20
"""Seconds without an acknowledgement after which a host is presumed dead, and the connection lost."""

_CHUNK: Final = 1 << 16
_TURN: Final = 8 << 20
"""Bytes that are read before replies are returned, so that a server which never stops cannot fill the memory."""


class NotAStoreError(RendezvousConnectionError):
    """The server is not a TCPStore that we can talk to, so trying again does not help.

    ``certain`` is False if the server closed the connection before its first reply. Other servers do that, and so does
    the TCPStore of torch before 2.5. But a TCPStore that ends while this connection is queued does it, too. Believe the
    error when it is repeated.
    """

    def __init__(self, message: str, certain: bool) -> None:
        super().__init__(message)
        self.certain = certain


class _CallTag:
    """The tag of a request that ``StoreClient.call`` makes."""


class _Pending:
    """A request that has no reply yet."""

    def __init__(self, request: Request | None, tag: Any, reader: Reader | None, end: int) -> None:
        self.request = request
        """None for the handshake."""
        self.tag = tag
        self.reader = reader
        """Reads the reply; None if the server sends no reply."""
        self.needed = next(reader) if reader else 0
        """The number of bytes that the reader needs next."""
        self.end = end
        """The number of bytes to be sent on the connection, up to and including this request."""


def stream_socket(family: int) -> socket.socket:
    """Return a socket that never blocks, and that notices a dead host in ``DEAD_HOST_PATIENCE`` seconds.

    Raises:
        OSError: The system cannot create such a socket, or no further one.
    """
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    if family in (socket.AF_INET, socket.AF_INET6):
        watch_for_loss(sock)
    return sock


def watch_for_loss(sock: socket.socket) -> None:
    """Have a TCP socket notice a dead host, send what is written at once, and what is lost soon again."""
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, DEAD_HOST_PATIENCE // 4),
        (socket.TCP_KEEPINTVL, DEAD_HOST_PATIENCE // 4),
        (socket.TCP_KEEPCNT, 3),
        (socket.TCP_USER_TIMEOUT, DEAD_HOST_PATIENCE * 1000),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    resend_soon(sock)


def connect(
    address: tuple[Any, ...] | str, family: int, where: str, challenge: ClientChallenge | None = None
) -> StoreClient:
    """Begin to connect. The client's ``take`` raises an error if that fails.

    Args:
        address: The address in the form of its family; for IP a numeric address and a port.
        family: The address family, as returned by ``getaddrinfo``.
        where: The name of the server in messages: ``store at host-a:29400``.
        challenge: What to do first, if the store has a gate.

    Raises:
        RendezvousConnectionError: The system cannot create such a socket, or no further one.
    """
    try:
        sock = stream_socket(family)
    except OSError as error:
        raise RendezvousConnectionError(f"{where}: cannot connect: {error.strerror}") from error
    client = StoreClient(sock, where, challenge)
    code = sock.connect_ex(address)
    if code not in (0, errno.EINPROGRESS):
        client.fail(OSError(code, os.strerror(code)))
    return client


class StoreClient:
    """A connection to a store.

    In a loop, wait until ``fileno()`` is readable, or writable while ``wants_write()``. Then call ``flush()`` and
    ``take()``. When the connection is lost, ``submit`` and ``flush`` raise nothing. ``take`` raises the error after it
    has returned all replies that came before.
    """

    def __init__(self, sock: socket.socket, where: str, challenge: ClientChallenge | None = None) -> None:
        """Use a non-blocking stream socket that is connected or connecting, and queue the handshake.

        Args:
            sock: The socket.
            where: The name of the server in messages.
            challenge: What comes before the handshake; None: the store has no gate.
        """
        self.where = where
        self.ready = False
        """Whether the server has completed the handshake."""
        self._sock = sock
        self._challenge = challenge
        """What is still to be done before the handshake can be sent."""
        self._out = bytearray()
        self._in = bytearray()
        self._queued = self._sent = 0
        """Bytes on this connection so far."""
        self._pending: deque[_Pending] = deque()
        """Requests without a reply, in order."""
        self._kept: list[tuple[Any, Reply]] = []
        """Replies that ``call`` has read, and that ``take`` will return."""
        self._failure: RendezvousConnectionError | None = None
        self._is_refused = False
        """Whether the server has sent something that is not a reply."""
        self._queue(None, None, *encode_handshake())

    @property
    def is_connected(self) -> bool:
        """Whether the server's host has accepted the connection. The server itself may still have to."""
        try:
            self._sock.getpeername()
        except OSError:
            return False
        return True

    def fileno(self) -> int:
        """The descriptor to wait for; -1 when the connection is closed."""
        return self._sock.fileno()

    def wants_write(self) -> bool:
        """Whether ``flush`` should be called when the socket is writable."""
        return bool(self._challenge.out if self._challenge else self._out)

    def submit(self, request: Request, tag: Any = None) -> None:
        """Queue a request. ``take`` returns its reply with the tag. Replies come in the order of the requests.

        ``Set`` and ``Append`` are answered when they have been sent. ``Cancel`` has no reply, and does nothing if no
        ``Wait`` is pending.

        Raises:
            UsageError: A key or value exceeds the limits of the protocol. Nothing was queued.
            RuntimeError: The connection is waiting.
        """
        waits = not self._failure and bool(self._pending) and isinstance(self._pending[-1].request, Wait)
        if waits and not isinstance(request, Cancel):
            raise RuntimeError(f"a connection that waits was asked for {describe(request)}")
        if waits or not isinstance(request, Cancel):
            self._queue(request, tag, *encode(request))

    def flush(self) -> None:
        """Send as much as the socket accepts without blocking."""
        try:
            while self._challenge and self._challenge.out:
                del self._challenge.out[: self._sock.send(self._challenge.out, socket.MSG_NOSIGNAL)]
            while self._out and not self._challenge:
                sent = self._sock.send(self._out, socket.MSG_NOSIGNAL)
                self._sent += sent
                del self._out[:sent]
        except BlockingIOError:
            pass
        except OSError as error:
            self.fail(error)

    def take(self) -> list[tuple[Any, Reply]]:
        """Read replies without blocking.

        Returns:
            The tag and the reply of each request that was answered, in order.

        Raises:
            NotAStoreError: The server is not a TCPStore, or too old.
            RendezvousConnectionError: The server cannot be reached, or the connection is lost.
        """
        replies = self._kept + self._collect()
        self._kept.clear()
        if not replies and self._failure:
            raise self._failure
        return replies

    def call(self, request: Request, timeout: float) -> Reply:
        """Submit a request and wait for its reply, for tests and tools. Other replies are kept for ``take``.

        A ``Wait`` that times out goes on until it is cancelled.

        Args:
            request: Any request but ``Cancel``, which has no reply.
            timeout: The time to wait, in seconds.

        Raises:
            UsageError: A key or value exceeds the limits of the protocol.
            RendezvousConnectionError: As for ``take``; or there is no reply in time.
        """
        mine = _CallTag()
        self.submit(request, mine)
        end = time.monotonic() + timeout
        poller = select.poll()
        while True:
            self.flush()
            found: list[Reply] = []
            for tag, reply in self._collect():
                if tag is mine:
                    found.append(reply)
                elif not isinstance(tag, _CallTag):
                    self._kept.append((tag, reply))
            if found:
                return found[0]
            if self._failure:
                raise self._failure
            left = end - time.monotonic()
            if left <= 0:
                raise self.timeout_error(timeout, describe(request))
            poller.register(self._sock, select.POLLIN | select.POLLOUT if self.wants_write() else select.POLLIN)
            poller.poll(left * 1000 + 1)

    def timeout_error(self, seconds: float, request: str = "a request") -> RendezvousConnectionError:
        """The error to raise if nothing has come over this connection for too long; it says what was missing.

        Args:
            seconds: How long the caller has waited.
            request: What the caller has asked for, as put by ``describe``.
        """
        if self.ready:
            return RendezvousConnectionError(
                f"{self.where} has not answered {request} for {seconds:g} s; "
                "check whether the process that serves it is stopped, or its node overloaded"
            )
        if not self.is_connected:
            return RendezvousConnectionError(
                f"{self.where}: no connection after {seconds:g} s; "
                "check whether that node is up, and whether a firewall drops packets to that port"
            )
        return NotAStoreError(
            f"{self.where} accepts connections, but has not answered as a TCPStore for {seconds:g} s; "
            "if the node that hosts it has just started, it may need longer on a busy machine; otherwise check which "
            "program listens there, or pass another port in --rdzv-endpoint",
            certain=False,
        )

    def close(self) -> None:
        """Close the connection. What has not been sent is discarded."""
        self._sock.close()

    def fail(self, error: OSError | None) -> None:
        """Record that the connection is lost. Only the first cause counts.

        Args:
            error: The cause; None if the server has closed the connection.
        """
        self._out.clear()
        if self._failure:
            return
        code = error.errno if error else None
        how = error.strerror if error else "closed by the server"
        if self.ready:
            self._failure = RendezvousConnectionError(
                f"{self.where}: connection lost: {how}; "
                "check whether the node and the process that serve it are still running"
            )
        elif self._challenge and self._challenge.is_begun:
            self._failure = RendezvousConnectionError(f"{self.where}: the gate closes the connection: {how}")
        elif code in (None, errno.ECONNRESET, errno.EPIPE):
            self._failure = NotAStoreError(
                f"{self.where} closes the connection instead of answering: it is not a TCPStore, belongs to torch "
                "before 2.5, or has just ended; check which program listens there, or pass another port in "
                "--rdzv-endpoint",
                certain=False,
            )
        elif code in (errno.ECONNREFUSED, errno.ENOENT):
            self._failure = RendezvousConnectionError(
                f"{self.where}: connection refused: nothing listens there; "
                "check whether the node that hosts it has started, and check --rdzv-endpoint"
            )
        else:
            self._failure = RendezvousConnectionError(
                f"{self.where}: cannot connect: {how}; check --rdzv-endpoint and the network between the nodes"
            )

    def _queue(self, request: Request | None, tag: Any, data: bytes, reader: Reader | None) -> None:
        if self._failure:
            return  # nobody will reply
        self._out += data
        self._queued += len(data)
        self._pending.append(_Pending(request, tag, reader, self._queued))

    def _collect(self) -> list[tuple[Any, Reply]]:
        """Read what has come, parse it piece by piece, and record a failure.

        Of what is read, no more is kept than the replies, and the part of a value that has come. If more than
        ``_TURN`` has come, the rest stays in the socket, which is then still readable.
        """
        replies: list[tuple[Any, Reply]] = []
        left = _TURN
        try:
            self._take_challenge()
            while left > 0 and not self._challenge:
                data = self._sock.recv(_CHUNK)
                left -= len(data)
                self._in += data
                if not data:
                    self.fail(None)
                if len(data) < _CHUNK or self._is_refused:
                    break
                replies += self._take_replies()
        except BlockingIOError:
            pass
        except OSError as error:
            self.fail(error)
        return replies + self._take_replies()

    def _take_challenge(self) -> None:
        """Do what comes before the handshake. Raises OSError."""
        while self._challenge and not self._failure:
            data = self._sock.recv(self._challenge.needed)
            if not data:
                self.fail(None)
                return
            # Late: few jobs have a gate.
            from elastic_launch.store.challenge import ChallengeError

            try:
                self._challenge.receive(data)
            except ChallengeError as error:
                self._failure = NotAStoreError(f"{self.where} {error}", certain=True)
            else:
                self._challenge = None if self._challenge.is_passed else self._challenge

    def _take_replies(self) -> list[tuple[Any, Reply]]:
        """Parse what has come so far."""
        if self._is_refused:
            self._in.clear()
            return []
        with memoryview(self._in) as view:
            replies, end = self._parse(view)
        del self._in[:end]
        if self._in and not self._pending:
            self._refuse(bytes(self._in[:40]))
        return replies

    def _parse(self, view: memoryview) -> tuple[list[tuple[Any, Reply]], int]:
        """Read replies from the input. Returns them, and the number of bytes that they took."""
        replies: list[tuple[Any, Reply]] = []
        at = 0
        while self._pending:
            pending = self._pending[0]
            reader, reply = pending.reader, None
            if reader is None and self._sent < pending.end:
                break
            while reader:
                if len(view) - at < pending.needed:
                    return replies, at
                data = bytes(view[at : at + pending.needed])
                try:
                    pending.needed = reader.send(data)
                except StopIteration as stop:
                    reply, reader = stop.value, None
                except ProtocolError as error:
                    self._refuse(bytes(view[at : at + 40]), pending.request, str(error))
                    return replies, at
                at += len(data)
            if isinstance(pending.request, Wait) and not reply:
                if len(self._pending) < 2:
                    self._refuse(bytes(view[at - 1 : at + 39]))
                    break
                del self._pending[1]  # the request to cancel has no reply of its own then
            self._pending.popleft()
            if pending.request is None:
                self.ready = True
            elif not isinstance(pending.request, Cancel):
                replies.append((pending.tag, reply))
        return replies, at

    def _refuse(self, data: bytes, request: Request | None = None, excess: str = "") -> None:
        """Record that the server has sent something that is not a reply, or more than was asked for."""
        self._is_refused = True
        text = (
            f"{self.where} answers, but not as a TCPStore does (it sent {data!r}); "
            "check which program listens there, or pass another port in --rdzv-endpoint"
        )
        if request is None and data.startswith(GATE):
            text = f"{self.where} has a gate: give this node --store-gate and the job's --token-file, as the others"
        if request and excess:
            text = f"{self.where} answers {describe(request)} with {excess}; does something else write to that store?"
        self._failure = self._failure or NotAStoreError(text, certain=True)
        self._out.clear()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes a loop that waits for the socket
