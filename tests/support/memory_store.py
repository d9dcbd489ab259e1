"""A store in memory, for tests and for simulations with a virtual clock.

It behaves like the other stores. It uses no socket, clock or thread: a request is executed when it is made, and the
same requests always give the same replies.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from elastic_launch.core.store_requests import Add, Append, Cancel, Delete, Get, Reply, Request, Set, Swap, Wait
from elastic_launch.store.codec import check

_OnReply = Callable[[Reply], None]


class MemoryStore:
    """A store with many connections. The caller names a connection by any hashable value."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self._waits: dict[Hashable, tuple[set[str], _OnReply]] = {}
        """By connection: the keys that are missing, and the callback."""
        self._waiting: dict[str, dict[Hashable, None]] = {}
        """By key: the connections that wait for it, in order."""

    def apply(self, request: Request, on_reply: _OnReply, connection: Hashable = None) -> None:
        """Execute a request, and reply to it. Then reply to each ``Wait`` that it ends.

        Args:
            request: The request; ``Cancel`` ends the wait of the same connection.
            on_reply: Called with the reply, except for ``Cancel``. It may make further requests.
            connection: The connection that makes the request.

        Raises:
            UsageError: A key or value exceeds TCPStore's limits.
            RuntimeError: The connection is waiting.
            ValueError: ``Add`` to a value that is not a number; TCPStore closes the connection then.
        """
        if isinstance(request, Cancel):
            if end_wait := self._forget(connection):
                end_wait(False)
            return
        if connection in self._waits:
            raise RuntimeError(f"a connection that waits was asked for {request}")
        check(request)
        values = self.values
        written: tuple[str, ...] = ()
        reply: Reply = None
        match request:
            case Get(keys):
                reply = [values.get(key, b"") for key in keys]
            case Set(items):
                values.update(items)
                written = tuple(key for key, _ in items)
            case Swap(key, expected, desired):
                reply = values.get(key, b"")
                if reply == expected:
                    values[key] = reply = desired
                    written = (key,)
            case Add(key, amount):
                reply = int(values.get(key, b"0")) + amount
                values[key] = str(reply).encode()
                written = (key,)
            case Append(key, value):
                values[key] = values.get(key, b"") + value
                written = (key,)
            case Delete(key):
                reply = values.pop(key, None) is not None
            case Wait(keys):
                missing = {key for key in keys if key not in values}
                if missing:
                    self._waits[connection] = missing, on_reply
                    for key in missing:
                        self._waiting.setdefault(key, {})[connection] = None
                    return
                reply = True
        ended = self._end_waits(written) if self._waiting else []
        on_reply(reply)
        for end_wait in ended:
            end_wait(True)

    def drop(self, connection: Hashable) -> None:
        """Forget a connection that was lost, and its wait."""
        self._forget(connection)

    def _end_waits(self, keys: tuple[str, ...]) -> list[_OnReply]:
        """Remove the waits that end because these keys exist now. Returns their callbacks."""
        ended: list[_OnReply] = []
        for key in keys:
            for connection in self._waiting.pop(key, ()):
                missing, on_reply = self._waits[connection]
                missing.discard(key)
                if not missing:
                    del self._waits[connection]
                    ended.append(on_reply)
        return ended

    def _forget(self, connection: Hashable) -> _OnReply | None:
        """Remove a connection's wait. Returns its callback; None if there is no wait."""
        missing, on_reply = self._waits.pop(connection, ((), None))
        for key in missing:
            self._waiting[key].pop(connection)
            if not self._waiting[key]:
                del self._waiting[key]
        return on_reply
