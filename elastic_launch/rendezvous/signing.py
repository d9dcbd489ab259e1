"""Signs what a node writes to the job's store, and ignores what nobody has signed who knows the job's token.

It stands between the decisions and the store: requests are sealed on their way out, replies opened on their way in. So
the decisions know nothing of it, and no record can be forgotten. A signature covers the whole key, which names the job
and the round, and the data, which names the sender where that matters. So nothing is valid under another key, in
another round or in another job.

Counters are numbers that the store adds to, and cannot be signed. What follows from them is bounded by records: a
ticket counts for nothing without the record of its node, a heartbeat only for a member.

Imported only for jobs with a token.
"""

from __future__ import annotations

import hmac
from binascii import b2a_base64
from collections.abc import Callable

from elastic_launch.core.rendezvous.records import MAX_LINES, SIGNED, as_lines, unsigned
from elastic_launch.core.store_requests import Add, Append, Get, Reply, Request, Set, Swap
from elastic_launch.core.text import MAX_LISTED

_SIZE = len(SIGNED) + 43
"""Bytes of a signature: its mark, and 32 bytes in base64."""
_COUNTERS = frozenset({"ticket", "succeeded", "reported", "left"})
"""Keys of a round that are counters; so are the heartbeats."""
_APPENDED = frozenset({"consequences", "unfit"})
"""Keys of a round that hold one record on each line."""
_DECISIVE = frozenset({"", "closed", "end", "decision", "stop_at"})
"""Keys that are written once, and without which no node can go on; the empty name is that of the round's number."""


class Signer:
    """Seals requests to one job's store, and opens the replies.

    Args:
        token: the job's, as from ``host.token.read``.
        run_id: the job's id.
        log: prints a line on the console.
    """

    def __init__(self, token: bytes, run_id: str, log: Callable[[str], None]) -> None:
        id_ = run_id.encode(errors="surrogatepass")
        self._key = hmac.digest(token, b"elastic-launch: records of the job " + id_, "sha256")
        self._prefix = len(f"elastic/{run_id}/")
        self._log = log
        self._told: set[str] = set()
        """Keys that a line has named."""

    def seal(self, request: Request) -> Request:
        """Return a request whose values are signed."""
        match request:
            case Set(items):
                return Set(tuple((key, self._sealed(key, value)) for key, value in items))
            case Swap(key, expected, desired):
                return Swap(key, expected and self._sealed(key, expected), self._sealed(key, desired))
            case Append(key, lines):
                assert self._name(key) in _APPENDED, key
                return Append(key, as_lines(self._sealed(key, line) for line in lines.split(b"\n") if line))
            case Add(key):
                assert self._is_counter(key), key
        return request

    def open(self, request: Request, reply: Reply) -> Reply:
        """Return a reply without signatures. What is not signed is missing there, with a line for the user.

        Args:
            request: the request that it answers, sealed or not.
            reply: the store's.

        Raises:
            RendezvousStateError: no node can go on without the key, and what it holds is not signed.
        """
        match request, reply:
            case Get(keys), list(values):
                return [self._opened(key, value) for key, value in zip(keys, values, strict=True)]
            case Swap(key), bytes(value):
                opened = self._checked(key, value)
                if opened is None:
                    raise unsigned(key)  # it is created once, so nobody can put it right
                return opened
        return reply

    def _name(self, key: str) -> str:
        """Return the part of a key that follows the round's number; empty: there is none."""
        return key[self._prefix :].partition("/")[2]

    def _is_counter(self, key: str) -> bool:
        name = self._name(key)
        return name in _COUNTERS or name.startswith("heartbeat/")

    def _sealed(self, key: str, data: bytes) -> bytes:
        return data if self._is_counter(key) else self._signature(key, data) + data

    def _signature(self, key: str, data: bytes) -> bytes:
        digest = hmac.digest(self._key, b"%b\0%b" % (key.encode(errors="surrogatepass"), data), "sha256")
        return SIGNED + b2a_base64(digest, newline=False)[:-1]  # without the padding

    def _opened(self, key: str, value: bytes) -> bytes:
        name = self._name(key)
        opened = self._lines(key, value) if name in _APPENDED else self._checked(key, value)
        if opened is None and name in _DECISIVE:
            raise unsigned(key)
        if opened is None and key not in self._told and len(self._told) < MAX_LISTED:
            self._told.add(key)
            self._log(f"ignored: {unsigned(key)}")
        return opened or b""

    def _checked(self, key: str, value: bytes) -> bytes | None:
        """Return a value without its signature; None: it has no good one."""
        if not value or self._is_counter(key):
            return value
        data = value[_SIZE:]
        is_good = value.startswith(SIGNED) and hmac.compare_digest(value[:_SIZE], self._signature(key, data))
        return data if is_good else None

    def _lines(self, key: str, value: bytes) -> bytes | None:
        """Return the lines that are signed, without signatures; None: there are only others."""
        lines = value.split(b"\n", MAX_LINES)[:MAX_LINES]
        found = [data for line in lines if (data := self._checked(key, line))]
        return b"".join(data + b"\n" for data in found) if found or not value else None
