"""Requests to the job's store, as values. Pure.

All stores share this vocabulary. The client of torch's TCPStore sends it over a socket, the etcd bridge translates it
to etcd v3, and the memory store of tests and simulations serves it from a dict. Keys are text of at most 8 KiB in
UTF-8. Values are bytes, not empty, of at most 8 MiB. These are the limits of torch's TCPStore. An empty value in a
reply means that the key does not exist.
"""

from __future__ import annotations

from typing import NamedTuple

VALUE_LIMIT = 8 << 20
"""Most bytes of a value in a request, and of one in a reply unless the request says otherwise."""
ANSWER_LIMIT = 24 << 20
"""Most bytes of all values in one reply together. An agent holds such a reply about twice while it arrives."""


class Get(NamedTuple):
    """Read keys. The reply is a list of their values, ``b""`` for each key that does not exist."""

    keys: tuple[str, ...]
    limit: int = VALUE_LIMIT
    """Most bytes of each value. A store that sends more is not answered any more."""


class Set(NamedTuple):
    """Write keys. The reply is None, and says only that the request has been sent."""

    items: tuple[tuple[str, bytes], ...]


class Swap(NamedTuple):
    """Compare and set: write ``desired`` if the key holds ``expected``, or if it is missing and ``expected`` is empty.

    The reply is the value that the key holds afterwards: ``desired`` on success, ``b""`` if it does not exist.
    """

    key: str
    expected: bytes
    desired: bytes


class Add(NamedTuple):
    """Add to a number, which begins at 0. The reply is the sum. It is stored as decimal text."""

    key: str
    amount: int


class Append(NamedTuple):
    """Append bytes to a value. The reply is None, as for ``Set``."""

    key: str
    value: bytes


class Delete(NamedTuple):
    """Remove a key. The reply is whether it existed."""

    key: str


class Wait(NamedTuple):
    """Wait until all the keys exist. The reply is True.

    Until then, the connection accepts no other request than ``Cancel``.
    """

    keys: tuple[str, ...]


class Cancel(NamedTuple):
    """End the connection's ``Wait``, which is answered with False (True if its keys had just appeared).

    ``Cancel`` itself has no reply.
    """


Request = Get | Set | Swap | Add | Append | Delete | Wait | Cancel
Reply = list[bytes] | bytes | int | bool | None
