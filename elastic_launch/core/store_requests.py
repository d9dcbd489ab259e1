"""Layer 1: what can be asked of the job's store, as values. Pure.

One vocabulary for every store: the client of torch's TCPStore speaks it on a socket, the etcd bridge answers it from
etcd v3, the memory store of tests and simulations from a dict. Keys are text of at most 8 KiB in UTF-8, values are
bytes, not empty, of at most 8 MiB: the limits of torch's TCPStore. An empty value in an answer means: no such key.
"""

from __future__ import annotations

from typing import NamedTuple


class Get(NamedTuple):
    """Read keys; the answer is a list of their values, ``b""`` for each that does not exist."""

    keys: tuple[str, ...]


class Set(NamedTuple):
    """Write keys; the answer is None, and says only that the request is on its way."""

    items: tuple[tuple[str, bytes], ...]


class Swap(NamedTuple):
    """Compare and set: write ``desired`` where the key holds ``expected``, or does not exist and ``expected`` is empty.

    The answer is the value that the key holds then, ``b""`` if it does not exist. It is ``desired`` on success.
    """

    key: str
    expected: bytes
    desired: bytes


class Add(NamedTuple):
    """Add to a number, which begins at 0; the answer is the sum. It is stored as decimal text."""

    key: str
    amount: int


class Append(NamedTuple):
    """Add bytes at a value's end; the answer is None, as for ``Set``."""

    key: str
    value: bytes


class Delete(NamedTuple):
    """Remove a key; the answer is whether it was there."""

    key: str


class Wait(NamedTuple):
    """Wait until every one of the keys exists; the answer is True.

    A connection that waits can be asked for nothing else until then, but ``Cancel``.
    """

    keys: tuple[str, ...]


class Cancel(NamedTuple):
    """End the connection's ``Wait``, whose answer is False then (True if it was answered already). None of its own."""


Request = Get | Set | Swap | Add | Append | Delete | Wait | Cancel
Answer = list[bytes] | bytes | int | bool | None
