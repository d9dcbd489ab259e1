"""Layer 2: the client of a store that speaks TCPStore's wire protocol: torch's own, or the etcd bridge.

One connection that never blocks and is made to sit in an event loop. It knows sockets, resolves no names, decides
nothing: when to give up and whether to try again is its user's business.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import Any, Final

from elastic_launch.core.store_requests import Add, Answer, Append, Cancel, Delete, Get, Request, Set, Swap, Wait
from elastic_launch.errors import RendezvousConnectionError, UsageError
from elastic_launch.store import wire
from elastic_launch.store.wire import I64, U32, U64, Op

DEAD_HOST_PATIENCE = 20
"""Seconds after which a host that acknowledges nothing counts as gone, and the connection as lost."""

_CHUNK: Final = 1 << 16
_ANSWER_LIMIT: Final = 1 << 30
"""Bytes of a value in an answer; beyond is nonsense. Values that were appended to may exceed ``wire.VALUE_LIMIT``."""


class NotAStoreError(RendezvousConnectionError):
    """What answers there is no TCPStore that we can talk to: to try again does not help.

    ``certain`` is False where the server only closed the connection before its first answer. That is what a server does
    that is none, or is of torch before 2.5; but so does one that ends with this connection still in its queue.
    Believe it when it happens again.
    """

    def __init__(self, message: str, certain: bool) -> None:
        super().__init__(message)
        self.certain = certain


class _Reply(Enum):
    """What the server answers a request with."""

    NONCE = 0
    NOTHING = 1
    NUMBER = 2
    FLAG = 3
    BLOB = 4
    BLOBS = 5
    WAITED = 6
    CANCELLED = 7


class _Call:
    """The tag of a request made by ``call``."""


def connect(address: tuple[Any, ...] | str, family: int, where: str) -> StoreClient:
    """Begin to connect. Whether that worked shows at the client's ``take``.

    Args:
        address: where to, as the family has it; a numeric IP address and a port.
        family: of the address, as ``getaddrinfo`` gives it.
        where: what messages call the server: ``store at host-a:29400``.

    Raises:
        RendezvousConnectionError: this system has no such sockets, or no more.
    """
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise RendezvousConnectionError(f"{where}: cannot connect: {error.strerror}") from error
    if family in (socket.AF_INET, socket.AF_INET6):
        for option, value in (
            (socket.TCP_NODELAY, 1),
            (socket.TCP_KEEPIDLE, DEAD_HOST_PATIENCE // 4),
            (socket.TCP_KEEPINTVL, DEAD_HOST_PATIENCE // 4),
            (socket.TCP_KEEPCNT, 3),
            (socket.TCP_USER_TIMEOUT, DEAD_HOST_PATIENCE * 1000),
        ):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    client = StoreClient(sock, where)
    code = sock.connect_ex(address)
    if code not in (0, errno.EINPROGRESS):
        client.fail(OSError(code, os.strerror(code)))
    return client


class StoreClient:
    """A connection to a store.

    In a loop: wait for ``fileno()`` to be readable, and writable while ``wants_write()``; then ``flush()`` and
    ``take()``. ``submit`` and ``flush`` raise nothing when the connection is lost: that, and only that, shows at
    ``take``, once it has handed out all the answers that came before.
    """

    def __init__(self, sock: socket.socket, where: str) -> None:
        """Take over a non-blocking stream socket, connected or still connecting, and queue the greeting."""
        self.where = where
        self.ready = False
        """Whether the server has shown that it is a TCPStore."""
        self._sock = sock
        self._out = bytearray()
        self._queued = self._sent = 0
        """Bytes so far."""
        self._in = bytearray()
        self._expected: deque[tuple[_Reply, Any, Any]] = deque()
        """What the server still has to answer, with the request's tag and what is needed to understand the answer."""
        self._blobs: list[bytes] = []
        """The values of an answer that has come in part."""
        self._kept: list[tuple[Any, Answer]] = []
        """Answers that ``call`` came across."""
        self._failure: RendezvousConnectionError | None = None
        nonce = U32.unpack(os.urandom(U32.size))[0]
        self._queue(wire.pack_hello(nonce), _Reply.NONCE, None, nonce)

    def fileno(self) -> int:
        """The descriptor to wait on; -1 when closed."""
        return self._sock.fileno()

    def wants_write(self) -> bool:
        """Whether ``flush`` has work to do as soon as the socket is writable."""
        return bool(self._out)

    def submit(self, request: Request, tag: Any = None) -> None:
        """Queue a request; ``take`` gives its answer with the tag. Answers come in the order of the requests.

        ``Set`` and ``Append`` are answered when they have left for the server. ``Cancel`` has no answer, and does
        nothing where no ``Wait`` is unanswered.

        Raises:
            UsageError: a key or value is beyond the protocol's limits; nothing was queued.
            RuntimeError: the connection waits.
        """
        waits = bool(self._expected) and self._expected[-1][0] is _Reply.WAITED
        if isinstance(request, Cancel):
            if waits:
                self._queue(wire.pack(Op.CANCEL_WAIT), _Reply.CANCELLED, None, None)
            return
        if waits:
            raise RuntimeError(f"a connection that waits was asked for {describe(request)}")
        check(request)
        match request:
            case Get(keys):
                self._queue(wire.pack_many(Op.MULTI_GET, len(keys), _names(keys)), _Reply.BLOBS, tag, len(keys))
            case Set(((key, value),)):
                self._queue(wire.pack(Op.SET, _name(key), value), _Reply.NOTHING, tag, None)
            case Set(items):
                pairs = [blob for key, value in items for blob in (_name(key), value)]
                self._queue(wire.pack_many(Op.MULTI_SET, len(items), pairs), _Reply.NOTHING, tag, None)
            case Swap(key, expected, desired) if expected == desired:
                # It changes nothing whatever the key holds, and TCPStore's answer would be the same without a key.
                self._queue(wire.pack_many(Op.MULTI_GET, 1, [_name(key)]), _Reply.BLOB, tag, b"")
            case Swap(key, expected, desired):
                self._queue(wire.pack(Op.COMPARE_SET, _name(key), expected, desired), _Reply.BLOB, tag, expected)
            case Add(key, amount):
                self._queue(wire.pack_add(_name(key), amount), _Reply.NUMBER, tag, None)
            case Append(key, value):
                self._queue(wire.pack(Op.APPEND, _name(key), value), _Reply.NOTHING, tag, None)
            case Delete(key):
                self._queue(wire.pack(Op.DELETE_KEY, _name(key)), _Reply.FLAG, tag, None)
            case Wait(keys):
                self._queue(wire.pack_many(Op.WAIT, len(keys), _names(keys)), _Reply.WAITED, tag, None)

    def flush(self) -> None:
        """Send what the system takes at once."""
        try:
            while self._out:
                sent = self._sock.send(self._out, socket.MSG_NOSIGNAL)
                self._sent += sent
                del self._out[:sent]
        except BlockingIOError:
            pass
        except OSError as error:
            self.fail(error)

    def take(self) -> list[tuple[Any, Answer]]:
        """Read what has come.

        Returns:
            The requests' tags and answers, in order.

        Raises:
            NotAStoreError: the server is no TCPStore, or too old.
            RendezvousConnectionError: the server cannot be reached, or the connection is lost.
        """
        answers = self._kept + self._collect()
        self._kept.clear()
        if not answers and self._failure:
            raise self._failure
        return answers

    def call(self, request: Request, timeout: float) -> Answer:
        """Submit a request and wait for its answer, for tests and tools; ``take`` still gives what others submitted.

        A ``Wait`` that is not answered in time goes on until it is cancelled.

        Args:
            request: anything but ``Cancel``, which has no answer.
            timeout: in seconds.

        Raises:
            UsageError: see ``submit``.
            RendezvousConnectionError: see ``take``; or there is no answer in time.
        """
        mine = _Call()
        self.submit(request, mine)
        end = time.monotonic() + timeout
        poller = select.poll()
        while True:
            self.flush()
            found: list[Answer] = []
            for tag, answer in self._collect():
                if tag is mine:
                    found.append(answer)
                elif not isinstance(tag, _Call):
                    self._kept.append((tag, answer))
            if found:
                return found[0]
            if self._failure:
                raise self._failure
            left = end - time.monotonic()
            if left <= 0:
                raise self.silence(timeout, describe(request))
            poller.register(self._sock, select.POLLIN | select.POLLOUT if self._out else select.POLLIN)
            poller.poll(left * 1000 + 1)

    def silence(self, seconds: float, request: str = "") -> RendezvousConnectionError:
        """The error to raise when this connection has said nothing for too long: it names what was missing.

        Args:
            seconds: how long it was waited for.
            request: what was asked, as ``describe`` puts it.
        """
        if self.ready:
            return RendezvousConnectionError(
                f"{self.where} has not answered {request or 'a request'} for {seconds:g} s; "
                "see whether the process that serves it is stopped, or its node overloaded"
            )
        try:
            self._sock.getpeername()
        except OSError:
            return RendezvousConnectionError(
                f"{self.where}: no connection after {seconds:g} s; "
                "see whether that node is up, and whether a firewall drops packets to that port"
            )
        return NotAStoreError(
            f"{self.where} accepts connections but does not answer as a TCPStore, for {seconds:g} s; "
            "see which program listens there, or pass another port in --rdzv-endpoint",
            certain=False,
        )

    def close(self) -> None:
        """Close the connection; what has not been sent is lost."""
        self._sock.close()

    def fail(self, error: OSError | None) -> None:
        """Note that the connection is lost: by an error, or closed by the server (None). The first one counts."""
        self._out.clear()
        if self._failure:
            return
        code = error.errno if error else None
        how = error.strerror if error else "closed by the server"
        if self.ready:
            self._failure = RendezvousConnectionError(
                f"{self.where}: connection lost: {how}; see whether the node and the process that serve it still run"
            )
        elif code in (None, errno.ECONNRESET, errno.EPIPE):
            self._failure = NotAStoreError(
                f"{self.where} closes the connection instead of answering: it is not a TCPStore, or one of torch "
                "before 2.5, or it has just ended; see which program listens there, or pass another port in "
                "--rdzv-endpoint",
                certain=False,
            )
        elif code in (errno.ECONNREFUSED, errno.ENOENT):
            self._failure = RendezvousConnectionError(
                f"{self.where}: connection refused: nothing listens there; "
                "see whether the node that hosts it has started, and check --rdzv-endpoint"
            )
        else:
            self._failure = RendezvousConnectionError(
                f"{self.where}: cannot connect: {how}; check --rdzv-endpoint and the network between the nodes"
            )

    def _queue(self, data: bytes, reply: _Reply, tag: Any, detail: Any) -> None:
        """Append to what is sent, and note what the server will answer."""
        if self._failure:
            return  # nobody will answer
        self._out += data
        self._queued += len(data)
        self._expected.append((reply, tag, self._queued if reply is _Reply.NOTHING else detail))

    def _collect(self) -> list[tuple[Any, Answer]]:
        """Read until nothing is there; note a failure."""
        try:
            while True:
                data = self._sock.recv(_CHUNK)
                self._in += data
                if not data:
                    self.fail(None)
                if len(data) < _CHUNK:
                    break
        except BlockingIOError:
            pass
        except OSError as error:
            self.fail(error)
        with memoryview(self._in) as view:
            answers, end = self._parse(view)
        del self._in[:end]
        if self._in and not self._expected and not self._failure:
            self._nonsense("bytes that nobody asked for")
        return answers

    def _parse(self, view: memoryview) -> tuple[list[tuple[Any, Answer]], int]:
        """Understand what has come. Returns the answers, and how many bytes are done with."""
        answers: list[tuple[Any, Answer]] = []
        at, size = 0, len(view)
        while self._expected:
            reply, tag, detail = self._expected[0]
            answer: Answer = None
            if reply is _Reply.NOTHING:
                if self._sent < detail:
                    break
            elif reply is _Reply.BLOBS or reply is _Reply.BLOB:
                count = detail if reply is _Reply.BLOBS else 1
                blobs = self._blobs
                while len(blobs) < count and at + U64.size <= size:
                    end = at + U64.size + U64.unpack_from(view, at)[0]
                    if end > size:
                        if end - at > _ANSWER_LIMIT:
                            self._nonsense(f"a value of {end - at} bytes")
                        break
                    blobs.append(bytes(view[at + U64.size : end]))
                    at = end
                if len(blobs) < count:
                    break
                self._blobs = []
                # Of a swap's key that is missing, TCPStore says that it holds what was expected.
                answer = blobs if reply is _Reply.BLOBS else b"" if blobs[0] == detail else blobs[0]
            elif reply is _Reply.NUMBER or reply is _Reply.FLAG:
                if at + I64.size > size:
                    break
                (number,) = I64.unpack_from(view, at)
                at += I64.size
                answer = number if reply is _Reply.NUMBER else number > 0
            elif reply is _Reply.NONCE:
                if at + U32.size > size:
                    break
                if U32.unpack_from(view, at)[0] != detail:
                    self._nonsense(repr(bytes(view[at : at + 40])))
                    break
                at += U32.size
                self.ready = True
            else:  # a wait, or the end of one
                if at == size:
                    break
                state = view[at]
                if state != wire.STOPPED and (reply is _Reply.CANCELLED or state != wire.DONE):
                    self._nonsense(f"{state} to a wait")
                    break
                at += 1
                answer = state == wire.DONE
                if state == wire.STOPPED and reply is _Reply.WAITED:
                    if len(self._expected) < 2:
                        self._nonsense("the end of a wait that nobody cancelled")
                        break
                    del self._expected[1]  # this was the answer to its cancellation
            self._expected.popleft()
            if reply is not _Reply.NONCE and reply is not _Reply.CANCELLED:
                answers.append((tag, answer))
        return answers, at

    def _nonsense(self, what: str) -> None:
        """Note that the server has sent what is no answer."""
        self._failure = self._failure or NotAStoreError(
            f"{self.where} answers, but not as a TCPStore does (it sent {what}); "
            "see which program listens there, or pass another port in --rdzv-endpoint",
            certain=True,
        )
        self._out.clear()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # a loop that waits for the socket hears of it


def check(request: Request) -> None:
    """Refuse what TCPStore would reset the connection for.

    Raises:
        UsageError: a key or value is beyond the protocol's limits; the message names the key.
    """
    keys = _keys_of(request)
    if len(keys) > wire.COUNT_LIMIT:
        raise UsageError(f"store: {describe(request)}: {wire.COUNT_LIMIT} keys at most in one request")
    for key in keys:
        if len(key) >= wire.KEY_LIMIT or not key.isascii():
            try:
                size = len(key.encode())
            except UnicodeEncodeError:
                raise UsageError(f"store key {_short(key)} is not text that UTF-8 can hold") from None
            if size >= wire.KEY_LIMIT:
                raise UsageError(f"store key {_short(key)} has {size} bytes; {wire.KEY_LIMIT - 1} at most")
    match request:
        case Set(items):
            for key, value in items:
                _check_value(key, value)
        case Append(key, value):
            _check_value(key, value)
        case Swap(key, expected, desired):
            _check_value(key, desired)
            if expected:
                _check_value(key, expected)
        case Add(key, amount) if not -(1 << 63) <= amount < 1 << 63:
            raise UsageError(f"store key {_short(key)}: cannot add {amount}: a number has 64 bits")


def describe(request: Request) -> str:
    """A request in a few words: ``get 'a' and 2 more``."""
    keys = _keys_of(request)
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return " ".join([type(request).__name__.lower(), *map(_short, keys[:1])]) + more


def _keys_of(request: Request) -> Sequence[str]:
    match request:
        case Get(keys) | Wait(keys):
            return keys
        case Set(items):
            return [key for key, _ in items]
        case Cancel():
            return ()
    return (request.key,)


def _short(key: str) -> str:
    return repr(key if len(key) <= 80 else f"{key[:80]}...")


def _name(key: str) -> bytes:
    """A key as it goes over the wire; torch's client puts the slash before each, too."""
    return b"/" + key.encode()


def _names(keys: Sequence[str]) -> list[bytes]:
    return [b"/" + key.encode() for key in keys]


def _check_value(key: str, value: bytes) -> None:
    if not 0 < len(value) <= wire.VALUE_LIMIT:
        raise UsageError(f"store key {_short(key)}: a value of {len(value)} bytes; 1 to {wire.VALUE_LIMIT} are allowed")
