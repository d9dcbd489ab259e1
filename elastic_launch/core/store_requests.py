"""Define the requests that every kind of store answers.

The client of torch's TCPStore sends them over a socket, the etcd bridge answers them from etcd v3, and the memory store
of tests and simulations from a dict. The limits are those of torch's TCPStore: keys are text of at most 8 KiB in UTF-8,
values are 1 byte to 8 MiB. An empty value in an answer means that the key does not exist.
"""

from __future__ import annotations

from typing import NamedTuple


class Get(NamedTuple):
    """Read keys; the answer is the list of their values, with ``b""`` for a key that does not exist."""

    keys: tuple[str, ...]


class Set(NamedTuple):
    """Write keys; the answer is None and comes before the store has written them."""

    items: tuple[tuple[str, bytes], ...]


class Swap(NamedTuple):
    """Compare and set: write ``desired`` if the key holds ``expected``.

    The answer is the value that the key holds afterwards, ``desired`` on success, or ``b""`` if it does not exist.
    """

    key: str
    expected: bytes
    """Empty: the key must not exist."""
    desired: bytes


class Add(NamedTuple):
    """Add to a number, which is 0 at first; the answer is the sum. The store keeps it as decimal text."""

    key: str
    amount: int


class Append(NamedTuple):
    """Append bytes to a value; the answer is None, as for ``Set``."""

    key: str
    value: bytes


class Delete(NamedTuple):
    """Delete a key; the answer is whether it existed."""

    key: str


class Wait(NamedTuple):
    """Wait until all keys exist; the answer is True, or False after ``Cancel``.

    Until then the connection accepts no other request than ``Cancel``.
    """

    keys: tuple[str, ...]


class Cancel(NamedTuple):
    """Cancel the connection's ``Wait``. This request has no answer."""


Request = Get | Set | Swap | Add | Append | Delete | Wait | Cancel
Answer = list[bytes] | bytes | int | bool | None
