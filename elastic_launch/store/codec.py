"""Requests as bytes of TCPStore's protocol, and replies from bytes. No socket.

``encode`` gives the bytes of a request and a reader for its reply. A reader is a generator, so that a reply can arrive
in pieces of any size: it yields the number of bytes that it needs next, and returns the reply.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence

from elastic_launch.core.store_requests import (
    ANSWER_LIMIT,
    VALUE_LIMIT,
    Add,
    Append,
    Cancel,
    Delete,
    Get,
    Reply,
    Request,
    Set,
    Swap,
    Wait,
)
from elastic_launch.errors import UsageError
from elastic_launch.store import wire
from elastic_launch.store.wire import I64, U32, U64, Op, ProtocolError

Reader = Generator[int, bytes, Reply]

_NONSENSE = 1 << 30
"""A value of so many bytes was never stored: what looks like its length is something else."""


def encode(request: Request) -> tuple[bytes, Reader | None]:
    """Encode a request.

    Returns:
        The bytes to send, and a reader for the reply. The reader is None if the server sends no reply.

    Raises:
        UsageError: A key or value exceeds the limits of the protocol.
    """
    check(request)
    match request:
        case Get(keys, limit):
            return wire.pack_many(Op.MULTI_GET, len(keys), _names(keys)), _read_values(len(keys), limit)
        case Set(((key, value),)):
            return wire.pack(Op.SET, _name(key), value), None
        case Set(items):
            blobs = [blob for key, value in items for blob in (_name(key), value)]
            return wire.pack_many(Op.MULTI_SET, len(items), blobs), None
        case Swap(key, expected, desired) if expected == desired:
            # This changes nothing, and TCPStore's reply would not tell whether the key exists.
            return wire.pack_many(Op.MULTI_GET, 1, [_name(key)]), _read_value(missing=b"")
        case Swap(key, expected, desired):
            return wire.pack(Op.COMPARE_SET, _name(key), expected, desired), _read_value(missing=expected)
        case Add(key, amount):
            return wire.pack_add(_name(key), amount), _read_number()
        case Append(key, value):
            return wire.pack(Op.APPEND, _name(key), value), None
        case Delete(key):
            return wire.pack(Op.DELETE_KEY, _name(key)), _read_flag()
        case Wait(keys):
            return wire.pack_many(Op.WAIT, len(keys), _names(keys)), _read_state(wire.DONE, wire.STOPPED)
        case Cancel():
            return wire.pack(Op.CANCEL_WAIT), _read_state(wire.STOPPED)


def encode_handshake() -> tuple[bytes, Reader]:
    """The first bytes of a connection, and a reader that fails if the server is not a TCPStore."""
    nonce = os.urandom(U32.size)

    def read() -> Reader:
        if (yield U32.size) != nonce:
            raise ProtocolError
        return None

    return wire.pack_handshake(nonce), read()


def _read_values(count: int, limit: int) -> Generator[int, bytes, list[bytes]]:
    """Read values of at most ``limit`` bytes each, and ``ANSWER_LIMIT`` together."""
    yield 0  # even the reader of an empty reply must yield
    values: list[bytes] = []
    left = ANSWER_LIMIT
    for _ in range(count):
        (length,) = U64.unpack((yield U64.size))
        left -= length
        if length > _NONSENSE:
            raise ProtocolError
        if length > limit or left < 0:
            raise ProtocolError(f"a value of {length} bytes, after {ANSWER_LIMIT - left - length} bytes of others")
        values.append((yield length))
    return values


def _read_value(missing: bytes) -> Reader:
    """Read a value; ``missing`` is what TCPStore sends for a key that does not exist."""
    (value,) = yield from _read_values(1, VALUE_LIMIT)
    return b"" if value == missing else value


def _read_number() -> Reader:
    return int(I64.unpack((yield I64.size))[0])


def _read_flag() -> Reader:
    return bool(I64.unpack((yield I64.size))[0] > 0)


def _read_state(*allowed: int) -> Reader:
    (state,) = yield 1
    if state not in allowed:
        raise ProtocolError
    return state == wire.DONE


def check(request: Request) -> None:
    """Refuse a request for which TCPStore would reset the connection.

    Raises:
        UsageError: A key or value exceeds the limits of the protocol; the message names the key.
    """
    keys = _keys_of(request)
    if len(keys) > wire.COUNT_LIMIT:
        raise UsageError(f"store: {describe(request)}: a request can have at most {wire.COUNT_LIMIT} keys")
    for key in keys:
        if len(key) >= wire.KEY_LIMIT or not key.isascii():
            try:
                size = len(key.encode())
            except UnicodeEncodeError:
                raise UsageError(f"store key {_shortened(key)} cannot be encoded as UTF-8") from None
            if size >= wire.KEY_LIMIT:
                raise UsageError(f"store key {_shortened(key)} has {size} bytes; {wire.KEY_LIMIT - 1} are allowed")
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
            raise UsageError(f"store key {_shortened(key)}: cannot add {amount}, because numbers have 64 bits")


def _check_value(key: str, value: bytes) -> None:
    if not 0 < len(value) <= wire.VALUE_LIMIT:
        raise UsageError(
            f"store key {_shortened(key)}: a value of {len(value)} bytes; 1 to {wire.VALUE_LIMIT} are allowed"
        )


def describe(request: Request) -> str:
    """Describe a request in a few words: ``get 'a' and 2 more``."""
    keys = _keys_of(request)
    more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
    return " ".join([type(request).__name__.lower(), *map(_shortened, keys[:1])]) + more


def _keys_of(request: Request) -> Sequence[str]:
    match request:
        case Get(keys) | Wait(keys):
            return keys
        case Set(items):
            return [key for key, _ in items]
        case Cancel():
            return ()
    return (request.key,)


def _shortened(key: str) -> str:
    return repr(key if len(key) <= 80 else f"{key[:80]}...")


def _name(key: str) -> bytes:
    """A key as it is sent; torch's client also puts a slash before each key."""
    return b"/" + key.encode()


def _names(keys: Sequence[str]) -> list[bytes]:
    return [_name(key) for key in keys]
