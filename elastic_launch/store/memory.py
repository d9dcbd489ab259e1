"""Layer 2: a store in memory, with the meaning of the others, for tests and for simulations with a virtual clock.

No socket, no clock, no thread: a request is executed when it is made, and the same requests give the same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from elastic_launch.core.store_requests import Add, Answer, Append, Cancel, Delete, Get, Request, Set, Swap, Wait
from elastic_launch.store.client import check

_Answerer = Callable[[Answer], None]


class MemoryStore:
    """A store for many connections; a connection is whatever the user names it by."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self._waits: dict[Hashable, tuple[set[str], _Answerer]] = {}
        """By connection: the keys that are missing, and whom to tell."""
        self._waiting: dict[str, dict[Hashable, None]] = {}
        """By key: the connections that wait for it, in order."""

    def apply(self, request: Request, answer: _Answerer, connection: Hashable = None) -> None:
        """Execute a request and answer it; waits that this ends are answered after it, before ``apply`` returns.

        Args:
            request: any; what a ``Cancel`` ends is the wait of the same connection.
            answer: called with the answer; it may make further requests. A ``Cancel`` has none.
            connection: whose request it is.

        Raises:
            UsageError: a key or value is beyond TCPStore's limits.
            RuntimeError: the connection waits.
            ValueError: ``Add`` to what is no number; TCPStore ends the connection then.
        """
        if isinstance(request, Cancel):
            if wait := self._forget(connection):
                wait(False)
            return
        if connection in self._waits:
            raise RuntimeError(f"a connection that waits was asked for {request}")
        check(request)
        values = self.values
        written: tuple[str, ...] = ()
        result: Answer = None
        match request:
            case Get(keys):
                result = [values.get(key, b"") for key in keys]
            case Set(items):
                values.update(items)
                written = tuple(key for key, _ in items)
            case Swap(key, expected, desired):
                result = values.get(key, b"")
                if result == expected:
                    values[key] = result = desired
                    written = (key,)
            case Add(key, amount):
                result = int(values.get(key, b"0")) + amount
                values[key] = str(result).encode()
                written = (key,)
            case Append(key, value):
                values[key] = values.get(key, b"") + value
                written = (key,)
            case Delete(key):
                result = values.pop(key, None) is not None
            case Wait(keys):
                missing = {key for key in keys if key not in values}
                if missing:
                    self._waits[connection] = missing, answer
                    for key in missing:
                        self._waiting.setdefault(key, {})[connection] = None
                    return
                result = True
        ended = self._arrived(written) if self._waiting else []
        answer(result)
        for wait in ended:
            wait(True)

    def drop(self, connection: Hashable) -> None:
        """Forget a connection that was lost: what it waits for is not answered."""
        self._forget(connection)

    def _arrived(self, keys: tuple[str, ...]) -> list[_Answerer]:
        """Note that keys exist. Returns whose waits that ends."""
        ended: list[_Answerer] = []
        for key in keys:
            for connection in self._waiting.pop(key, ()):
                missing, answer = self._waits[connection]
                missing.discard(key)
                if not missing:
                    del self._waits[connection]
                    ended.append(answer)
        return ended

    def _forget(self, connection: Hashable) -> _Answerer | None:
        """End a connection's wait, if it has one. Returns whom to tell."""
        missing, answer = self._waits.pop(connection, ((), None))
        for key in missing:
            self._waiting[key].pop(connection)
            if not self._waiting[key]:
                del self._waiting[key]
        return answer
