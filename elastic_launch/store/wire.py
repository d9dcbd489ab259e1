"""Layer 2: the wire protocol of torch's TCPStore (2.5 and later): codes, limits, requests to bytes and back.

Knows bytes only: no socket, and nothing of elastic_launch, so a child process can import this file alone.

One connection, request after request: an operation's code, then its fields. Integers are little-endian; a key or
value is its length in 64 bits and its bytes; keys begin with ``/``. ``Set``, ``Append`` and their like have no reply.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum


class Op(IntEnum):
    """The code that begins a request. Left out are the queues, the listing of keys and the barrier."""

    VALIDATE = 0
    """u32 MAGIC; no reply. Anything else as a connection's first request makes the server close it."""
    SET = 1
    """Key, value; no reply."""
    COMPARE_SET = 2
    """Key, expected, desired; the value that is stored then. ``expected`` if the key is missing and it is not empty."""
    GET = 3
    """Key; its value, empty if missing."""
    ADD = 4
    """Key, i64; the sum in i64."""
    CHECK = 5
    """Count, keys; u8, DONE if all are there, else STOPPED."""
    WAIT = 6
    """Count, keys; u8 DONE when all are there."""
    GETNUMKEYS = 7
    """Nothing; i64."""
    DELETE_KEY = 8
    """Key; i64, 1 if it was there."""
    APPEND = 9
    """Key, value; no reply."""
    MULTI_GET = 10
    """Count, keys; the values, empty for each that is missing."""
    MULTI_SET = 11
    """Count, keys and values in turn; no reply."""
    CANCEL_WAIT = 12
    """Nothing; u8 STOPPED, with the wait's DONE before it if that was answered just then."""
    PING = 13
    """u32 nonce; the nonce."""


MAGIC = 0x3C85F7CE
DONE, STOPPED = 0, 1
"""What a wait is answered with: all keys are there; it was cancelled."""

KEY_LIMIT = 8 << 10
"""Bytes of a key, its ``/`` included. Beyond this and the next two, the server resets the connection."""
VALUE_LIMIT = 8 << 20
"""Bytes of a value that is sent; one that was appended to may be longer."""
COUNT_LIMIT = 128 << 10
"""Keys in one request."""

U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")
I64 = struct.Struct("<q")
_OPS = [bytes([code]) for code in range(max(Op) + 1)]
_KEYS, _PAIRS = "keys", "pairs"
_FIELDS: dict[Op, tuple[struct.Struct | str | int, ...]] = {
    Op.VALIDATE: (U32,),
    Op.SET: (KEY_LIMIT, VALUE_LIMIT),
    Op.COMPARE_SET: (KEY_LIMIT, VALUE_LIMIT, VALUE_LIMIT),
    Op.GET: (KEY_LIMIT,),
    Op.ADD: (KEY_LIMIT, I64),
    Op.CHECK: (_KEYS,),
    Op.WAIT: (_KEYS,),
    Op.GETNUMKEYS: (),
    Op.DELETE_KEY: (KEY_LIMIT,),
    Op.APPEND: (KEY_LIMIT, VALUE_LIMIT),
    Op.MULTI_GET: (_KEYS,),
    Op.MULTI_SET: (_PAIRS,),
    Op.CANCEL_WAIT: (),
    Op.PING: (U32,),
}
"""The fields of each request: a number, a key or value by its limit, keys, or keys and values in turn."""


def pack_blob(data: bytes) -> bytes:
    """A key or a value: its length and its bytes."""
    return U64.pack(len(data)) + data


def pack_blobs(blobs: Sequence[bytes]) -> bytes:
    """Keys or values one after the other, without their count: the reply to MULTI_GET."""
    pack = U64.pack
    return b"".join([part for blob in blobs for part in (pack(len(blob)), blob)])


def pack(op: Op, *blobs: bytes) -> bytes:
    """A request of single keys and values: SET, COMPARE_SET, GET, DELETE_KEY, APPEND; or of nothing: CANCEL_WAIT."""
    return _OPS[op] + pack_blobs(blobs)


def pack_many(op: Op, count: int, blobs: Sequence[bytes]) -> bytes:
    """CHECK, WAIT, MULTI_GET of keys; MULTI_SET of keys and values in turn (the count is of pairs)."""
    return _OPS[op] + U64.pack(count) + pack_blobs(blobs)


def pack_add(key: bytes, amount: int) -> bytes:
    """ADD."""
    return _OPS[Op.ADD] + pack_blob(key) + I64.pack(amount)


def pack_hello(nonce: int) -> bytes:
    """VALIDATE and PING, what a connection begins with; the answer is the nonce, packed with ``U32``."""
    return _OPS[Op.VALIDATE] + U32.pack(MAGIC) + _OPS[Op.PING] + U32.pack(nonce)


class ProtocolError(Exception):
    """What came is no request of this protocol; there is no way to go on with the connection."""


Field = int | bytes | list[bytes]


def take_request(buffer: bytearray) -> tuple[Op, list[Field]] | None:
    """Take one request off the front of what a client has sent. The server's side.

    Returns:
        The operation and its fields as ``Op`` lists them: numbers as int, a key or value as bytes, ``count, keys`` as
        one list of keys, ``count, keys and values in turn`` as one list of both. Keys have their ``/``.
        None while the request is not complete; the buffer stays as it is then.

    Raises:
        ProtocolError: an unknown operation, or a limit is exceeded.
    """
    if not buffer:
        return None
    try:
        op = Op(buffer[0])
    except ValueError:
        raise ProtocolError(f"operation {buffer[0]} is unknown") from None
    fields: list[Field] = []
    at = 1
    try:
        for kind in _FIELDS[op]:
            if isinstance(kind, struct.Struct):
                fields += kind.unpack_from(buffer, at)
                at += kind.size
            elif isinstance(kind, int):
                blob, at = _blob(buffer, at, kind)
                fields.append(blob)
            else:
                (count,) = U64.unpack_from(buffer, at)
                if count > COUNT_LIMIT:
                    raise ProtocolError(f"{count} keys in one request")
                at += U64.size
                blobs: list[bytes] = []
                limits = (KEY_LIMIT,) if kind is _KEYS else (KEY_LIMIT, VALUE_LIMIT)
                for _ in range(count):
                    for limit in limits:
                        blob, at = _blob(buffer, at, limit)
                        blobs.append(blob)
                fields.append(blobs)
    except struct.error:
        return None  # the rest is on its way
    del buffer[:at]
    return op, fields


def _blob(buffer: bytearray, at: int, limit: int) -> tuple[bytes, int]:
    """Read a key or value. Returns it and where it ends. Raises struct.error when it is not complete."""
    (length,) = U64.unpack_from(buffer, at)
    if length > limit:
        raise ProtocolError(f"a key or value of {length} bytes, more than {limit}")
    start, end = at + U64.size, at + U64.size + length
    if end > len(buffer):
        raise struct.error
    return bytes(buffer[start:end]), end
