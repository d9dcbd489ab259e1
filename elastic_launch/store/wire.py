"""The wire protocol of torch's TCPStore, 2.5 and later: codes, limits, and how requests are packed and read.

A connection carries one request after the other. A request is the code of an operation and its fields. Integers are
little-endian. A key or value is its length in 64 bits and its bytes; keys begin with ``/``. Operations that only write
have no reply.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum


class Op(IntEnum):
    """The code that begins a request, with the fields that follow and the reply.

    Operations that our client does not use are left out.
    """

    VALIDATE = 0
    """u32 MAGIC; no reply. The server closes a connection that begins with anything else."""
    SET = 1
    """Key, value; no reply."""
    COMPARE_SET = 2
    """Key, expected, desired; the value that is stored afterwards. If the key is missing and stays so, ``expected``."""
    ADD = 4
    """Key, i64; the sum as i64."""
    WAIT = 6
    """Count, keys; u8 DONE when all exist."""
    DELETE_KEY = 8
    """Key; i64, 1 if it existed."""
    APPEND = 9
    """Key, value; no reply."""
    MULTI_GET = 10
    """Count, keys; the values, empty for each key that is missing."""
    MULTI_SET = 11
    """Count, alternating keys and values; no reply."""
    CANCEL_WAIT = 12
    """Nothing; u8 STOPPED, after the DONE of the wait if its keys had just appeared."""
    PING = 13
    """u32 nonce; the nonce."""


MAGIC = 0x3C85F7CE
GATE = b"GATE"
"""What a gate says first (``challenge``); no TCPStore sends these bytes in answer to a handshake of ours."""
DONE, STOPPED = 0, 1
"""Replies to a wait: all keys exist; it was cancelled."""

KEY_LIMIT = 8 << 10
"""Bytes of a key, including its ``/``. The server resets the connection when a limit is exceeded."""
VALUE_LIMIT = 8 << 20
"""Bytes of a value in a request. A value that was appended to may be longer."""
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
    Op.ADD: (KEY_LIMIT, I64),
    Op.WAIT: (_KEYS,),
    Op.DELETE_KEY: (KEY_LIMIT,),
    Op.APPEND: (KEY_LIMIT, VALUE_LIMIT),
    Op.MULTI_GET: (_KEYS,),
    Op.MULTI_SET: (_PAIRS,),
    Op.CANCEL_WAIT: (),
    Op.PING: (U32,),
}
"""The fields of each request: an integer's format, a limit of a key or value, keys, or alternating keys and values."""


def pack_blob(data: bytes) -> bytes:
    """Pack a key or a value: its length and its bytes."""
    return U64.pack(len(data)) + data


def pack_blobs(blobs: Sequence[bytes]) -> bytes:
    """Pack several keys or values without their count, like the reply to MULTI_GET."""
    pack = U64.pack
    return b"".join([part for blob in blobs for part in (pack(len(blob)), blob)])


def pack(op: Op, *blobs: bytes) -> bytes:
    """Pack a request of a fixed number of keys and values: SET, COMPARE_SET, DELETE_KEY, APPEND, CANCEL_WAIT."""
    return _OPS[op] + pack_blobs(blobs)


def pack_many(op: Op, count: int, blobs: Sequence[bytes]) -> bytes:
    """Pack WAIT, MULTI_GET of keys; or MULTI_SET of alternating keys and values, which counts pairs."""
    return _OPS[op] + U64.pack(count) + pack_blobs(blobs)


def pack_add(key: bytes, amount: int) -> bytes:
    """Pack ADD."""
    return _OPS[Op.ADD] + pack_blob(key) + I64.pack(amount)


def pack_handshake(nonce: bytes) -> bytes:
    """Pack the beginning of a connection, VALIDATE and PING. The reply is the nonce, four bytes."""
    return _OPS[Op.VALIDATE] + U32.pack(MAGIC) + _OPS[Op.PING] + nonce


class ProtocolError(Exception):
    """The bytes are not a message of this protocol; the connection cannot be used any more."""


Field = int | bytes | list[bytes]


def take_request(buffer: bytearray) -> tuple[Op, list[Field]] | None:
    """Remove one request from the front of a server's input.

    Args:
        buffer: The bytes that a client has sent. They stay as they are until they hold a whole request.

    Returns:
        The operation and its fields, as listed for ``Op``: int for an integer, bytes for a key or value, one list for a
        count with keys, or with alternating keys and values. Keys keep their ``/``. None if the request is incomplete.

    Raises:
        ProtocolError: The operation is unknown, or a limit is exceeded.
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
        return None  # incomplete
    del buffer[:at]
    return op, fields


def _blob(buffer: bytearray, at: int, limit: int) -> tuple[bytes, int]:
    """Read a key or value. Returns it, and the offset of its end. Raises struct.error if it is incomplete."""
    (length,) = U64.unpack_from(buffer, at)
    if length > limit:
        raise ProtocolError(f"a key or value of {length} bytes; {limit} are allowed")
    start, end = at + U64.size, at + U64.size + length
    if end > len(buffer):
        raise struct.error
    return bytes(buffer[start:end]), end
