"""The contract of all stores. A test file subclasses it for a store; it is not collected by itself."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import pytest

from elastic_launch.core.store_requests import Add, Append, Cancel, Delete, Get, Reply, Request, Set, Swap, Wait
from elastic_launch.errors import RendezvousConnectionError, UsageError
from tests.support.waiting import DEADLINE, wait_until

MIB = 1 << 20


class Connection(Protocol):
    """What is tested: ``StoreClient``, or another class with its interface."""

    def submit(self, request: Request, tag: Any = None) -> None: ...
    def flush(self) -> None: ...
    def take(self) -> list[tuple[Any, Reply]]: ...
    def call(self, request: Request, timeout: float) -> Reply: ...
    def close(self) -> None: ...


Connect = Callable[[], Connection]


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """A context in which a process is stopped. It begins when all threads are, which takes a moment."""

    def states() -> set[str]:
        found = set()
        for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):  # a thread has ended
                found.add(stat.read_text().rpartition(")")[2].split()[0])
        return found

    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: states() == {"T"}, "the process to stop")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def answers(connection: Connection, count: int) -> list[tuple[Any, Reply]]:
    """Wait for the replies to requests that were submitted."""
    found: list[tuple[Any, Reply]] = []

    def look() -> bool:
        connection.flush()
        found.extend(connection.take())
        return len(found) >= count

    wait_until(look, f"{count} replies")
    assert len(found) == count
    return found


class StoreContract:
    """A subclass has a fixture ``connect``, which makes connections to one store, and closes them."""

    @pytest.fixture
    def prefix(self) -> str:
        """The beginning of all keys of a test, because tests may share the store."""
        return f"{uuid.uuid4().hex}/"

    @pytest.fixture
    def call(self, connect: Connect) -> Callable[[Request], Any]:
        """Make a request, and wait for the reply."""
        connection = connect()
        return lambda request: connection.call(request, DEADLINE)

    def test_get_and_set(self, call: Callable[[Request], Any], prefix: str) -> None:
        a, b, c = prefix + "a", prefix + "b", prefix + "c"
        assert call(Get((a, b))) == [b"", b""]
        assert call(Set(((a, b"1"),))) is None
        assert call(Set(((b, b"2"), (c, b"3")))) is None
        assert call(Get((c, a, prefix, b, a))) == [b"3", b"1", b"", b"2", b"1"]
        call(Set(((a, b"9"),)))
        assert call(Get((a,))) == [b"9"]

    def test_requests_without_keys(self, call: Callable[[Request], Any]) -> None:
        assert call(Get(())) == []
        assert call(Set(())) is None
        assert call(Wait(())) is True

    def test_connections_see_each_other(self, connect: Connect, prefix: str) -> None:
        one, other = connect(), connect()
        assert one.call(Swap(prefix, b"", b"x"), DEADLINE) == b"x"
        assert other.call(Get((prefix,)), DEADLINE) == [b"x"]

    def test_swap(self, call: Callable[[Request], Any], prefix: str) -> None:
        assert call(Swap(prefix, b"a", b"b")) == b""  # still missing
        assert call(Swap(prefix, b"a", b"a")) == b""
        assert call(Get((prefix,))) == [b""]
        assert call(Swap(prefix, b"", b"a")) == b"a"  # create if absent
        assert call(Swap(prefix, b"", b"b")) == b"a"
        assert call(Swap(prefix, b"x", b"b")) == b"a"
        assert call(Swap(prefix, b"a", b"a")) == b"a"
        assert call(Swap(prefix, b"b", b"b")) == b"a"
        assert call(Swap(prefix, b"a", b"b")) == b"b"
        assert call(Get((prefix,))) == [b"b"]

    def test_one_of_many_creates(self, connect: Connect, prefix: str) -> None:
        connections = [connect() for _ in range(8)]
        for number, connection in enumerate(connections):
            connection.submit(Swap(prefix, b"", b"%d" % number), number)
            connection.flush()
        results = [answers(connection, 1)[0] for connection in connections]
        (winner,) = {answer for _, answer in results}
        assert [b"%d" % number for number, answer in results if answer == b"%d" % number] == [winner]
        assert connections[0].call(Get((prefix,)), DEADLINE) == [winner]

    def test_add(self, call: Callable[[Request], Any], prefix: str) -> None:
        assert call(Add(prefix, 5)) == 5
        assert call(Add(prefix, -7)) == -2
        assert call(Add(prefix, 0)) == -2
        assert call(Get((prefix,))) == [b"-2"]
        call(Set(((prefix, b"41"),)))
        assert call(Add(prefix, 1)) == 42
        assert call(Add(prefix + "big", 2**62)) == 2**62

    def test_sums_are_all_different(self, connect: Connect, prefix: str) -> None:
        connections = [connect() for _ in range(4)]
        for _ in range(25):
            for connection in connections:
                connection.submit(Add(prefix, 1))
                connection.flush()
        sums = [answer for connection in connections for _, answer in answers(connection, 25)]
        assert sorted(sums) == list(range(1, 101))  # type: ignore[type-var]

    def test_append(self, call: Callable[[Request], Any], prefix: str) -> None:
        assert call(Append(prefix, b"a")) is None
        call(Append(prefix, b"\0bc"))
        assert call(Get((prefix,))) == [b"a\0bc"]

    def test_delete(self, call: Callable[[Request], Any], prefix: str) -> None:
        assert call(Delete(prefix)) is False
        call(Set(((prefix, b"x"),)))
        assert call(Delete(prefix)) is True
        assert call(Delete(prefix)) is False
        assert call(Get((prefix,))) == [b""]
        assert call(Swap(prefix, b"", b"y")) == b"y"

    def test_wait_for_existing_keys(self, call: Callable[[Request], Any], prefix: str) -> None:
        call(Set(((prefix + "a", b"x"), (prefix + "b", b"y"))))
        assert call(Wait((prefix + "a",))) is True
        assert call(Wait((prefix + "a", prefix + "b", prefix + "a"))) is True

    @pytest.mark.parametrize(
        "write",
        [
            lambda key: Set(((key, b"x"),)),
            lambda key: Set(((key, b"x"), (key + "+", b"y"))),
            lambda key: Swap(key, b"", b"x"),
            lambda key: Add(key, 1),
            lambda key: Append(key, b"x"),
        ],
        ids=["set", "set many", "swap", "add", "append"],
    )
    def test_wait_for_a_key_that_is_written(
        self, connect: Connect, prefix: str, write: Callable[[str], Request]
    ) -> None:
        waiter, writer = connect(), connect()
        waiter.submit(Wait((prefix,)), "wait")
        waiter.flush()
        assert writer.call(Get((prefix,)), DEADLINE) == [b""]
        assert waiter.take() == []
        writer.call(write(prefix), DEADLINE)
        assert answers(waiter, 1) == [("wait", True)]
        assert isinstance(waiter.call(Get((prefix,)), DEADLINE), list)  # the connection accepts requests again

    def test_wait_for_several_keys(self, connect: Connect, prefix: str) -> None:
        waiters, writer = [connect() for _ in range(3)], connect()
        keys = tuple(f"{prefix}{number}" for number in range(5))
        writer.call(Set(((keys[1], b"x"),)), DEADLINE)
        for waiter in waiters:
            waiter.submit(Wait(keys), "wait")
            waiter.flush()
        for key in (keys[4], keys[0], keys[2]):
            writer.call(Swap(key, b"", b"x"), DEADLINE)
            assert [waiter.take() for waiter in waiters] == [[], [], []]
        writer.call(Swap(keys[3], b"", b"x"), DEADLINE)
        assert [answers(waiter, 1) for waiter in waiters] == [[("wait", True)]] * 3

    def test_cancelled_wait(self, connect: Connect, prefix: str) -> None:
        waiter, writer = connect(), connect()
        for _ in range(2):
            waiter.submit(Wait((prefix,)), "wait")
            waiter.flush()
            assert waiter.take() == []
            waiter.submit(Cancel())
            assert answers(waiter, 1) == [("wait", False)]
        assert writer.call(Swap(prefix, b"", b"x"), DEADLINE) == b"x"
        assert waiter.call(Get((prefix,)), DEADLINE) == [b"x"]
        assert waiter.take() == []

    def test_cancel_without_a_wait(self, connect: Connect, prefix: str) -> None:
        waiter = connect()
        waiter.submit(Cancel())
        waiter.submit(Add(prefix, 1), "add")
        waiter.submit(Cancel())
        assert answers(waiter, 1) == [("add", 1)]

    def test_wait_that_is_cancelled_as_its_key_appears(self, connect: Connect, prefix: str) -> None:
        waiter, writer = connect(), connect()
        seen = set()
        for number in range(60):
            key = f"{prefix}{number}"
            waiter.submit(Wait((key,)), number)
            waiter.flush()
            writer.submit(Swap(key, b"", b"x"))
            waiter.submit(Cancel())
            waiter.submit(Cancel())
            first, second = (writer, waiter) if number % 2 else (waiter, writer)
            first.flush()
            second.flush()
            ((tag, answer),) = answers(waiter, 1)
            assert tag == number
            seen.add(answer)
            answers(writer, 1)
            assert waiter.call(Get((key,)), DEADLINE) == [b"x"]  # replies still match requests
        assert seen <= {True, False}

    def test_requests_after_a_cancelled_wait(self, connect: Connect, prefix: str) -> None:
        waiter = connect()
        waiter.submit(Wait((prefix,)), "wait")
        waiter.submit(Cancel())
        waiter.submit(Add(prefix, 3), "add")
        assert answers(waiter, 2) == [("wait", False), ("add", 3)]

    def test_waiting_connection_accepts_no_other_request(self, connect: Connect, prefix: str) -> None:
        waiter = connect()
        waiter.submit(Wait((prefix,)))
        with pytest.raises(RuntimeError, match="waits"):
            waiter.submit(Get((prefix,)))

    def test_lost_waiter_does_no_harm(self, connect: Connect, prefix: str) -> None:
        lost, waiter, writer = connect(), connect(), connect()
        for connection in (lost, waiter):
            connection.submit(Wait((prefix,)), "wait")
            connection.flush()
        assert writer.call(Get((prefix,)), DEADLINE) == [b""]
        lost.close()
        writer.call(Set(((prefix, b"x"),)), DEADLINE)
        assert answers(waiter, 1) == [("wait", True)]

    def test_replies_come_in_order(self, connect: Connect, prefix: str) -> None:
        connection = connect()
        expected: list[tuple[int, Reply]] = []
        for number in range(100):
            key = f"{prefix}{number % 7}"
            sofar = number // 7
            connection.submit(Add(key, 1), 5 * number)
            connection.submit(Set(((prefix + "s", b"%d" % number),)), 5 * number + 1)
            connection.submit(Get((prefix + "s", key)), 5 * number + 2)
            connection.submit(Append(prefix + "a", b"."), 5 * number + 3)
            connection.submit(Delete(prefix + "d"), 5 * number + 4)
            count, text = sofar + 1, b"%d" % number
            results: list[Reply] = [count, None, [text, b"%d" % count], None, False]
            expected += enumerate(results, 5 * number)
        assert answers(connection, 500) == expected
        assert connection.call(Get((prefix + "a",)), DEADLINE) == [b"." * 100]

    def test_any_bytes(self, call: Callable[[Request], Any], prefix: str) -> None:
        every = bytes(range(256)) * 3
        for value in (every, b"\0", b"/", b"\xff" * 9):
            call(Set(((prefix, value),)))
            assert call(Get((prefix,))) == [value]
            assert call(Swap(prefix, value, every)) == every

    def test_any_text_as_key(self, call: Callable[[Request], Any], prefix: str) -> None:
        keys = [prefix + end for end in ("", " ", "/", "//", "ключ", "\0", "\n", "%", "a/b", "🙂", "é")]
        for key in keys:
            call(Set(((key, key.encode()),)))
        assert call(Get(tuple(keys))) == [key.encode() for key in keys]

    def test_five_thousand_keys(self, call: Callable[[Request], Any], prefix: str) -> None:
        items = tuple((f"{prefix}{number}", b"%d" % number * 10) for number in range(5000))
        call(Set(items))
        assert call(Get(tuple(key for key, _ in items))) == [value for _, value in items]
        assert call(Wait(tuple(key for key, _ in items))) is True

    def test_largest_value_and_key(self, call: Callable[[Request], Any], prefix: str) -> None:
        value = bytes(range(256)) * (8 * MIB // 256)
        call(Set(((prefix, value),)))
        (stored,) = call(Get((prefix,)))
        assert stored == value
        call(Delete(prefix))
        key = prefix.ljust(8191, "k")
        assert call(Add(key, 1)) == 1
        assert call(Get((key,))) == [b"1"]

    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            (Set((("fine", b"x"), ("large", b"x" * (8 * MIB + 1)))), "'large': a value of 8388609 bytes"),
            (Append("large", b"x" * (8 * MIB + 1)), "'large'"),
            (Swap("large", b"x" * (8 * MIB + 1), b"x"), "'large'"),
            (Swap("empty", b"x", b""), "'empty': a value of 0 bytes"),
            (Set((("empty", b""),)), "'empty'"),
            (Append("empty", b""), "'empty'"),
            (Get(("fine", "k" * 8192)), "'kkk.* has 8192 bytes; 8191 are allowed"),
            (Delete("ü" * 4096), "'üüü.* has 8192 bytes"),
            (Wait(("\ud800",)), "UTF-8"),
            (Get(("k",) * 131073), "'k' and 131072 more: a request can have at most 131072 keys"),
            (Add("number", 2**63), "'number'.* 64 bits"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, tuple) else value.replace("'", "")[:20],
    )
    def test_limits(self, connect: Connect, request_: Request, message: str) -> None:
        connection = connect()
        with pytest.raises(UsageError, match=message):
            connection.submit(request_)
        assert connection.call(Get(("number", "fine")), DEADLINE) == [b"", b""]  # nothing was sent


class ServedStoreContract(StoreContract):
    """For stores that a process serves. A subclass has a fixture ``freeze``, which makes a context that stops it."""

    def test_swap_races(self, connect: Connect, prefix: str) -> None:
        """Four threads count by compare-and-set, and no increment is lost."""
        connections = [connect() for _ in range(4)]

        def count(connection: Connection, name: bytes) -> None:
            for turn in range(25):
                before: Any = b""
                while True:
                    # No two swaps write the same value, or the reply would not tell which one succeeded.
                    mine = b"%d %s %d" % (int(before.split()[0] if before else b"0") + 1, name, turn)
                    after = connection.call(Swap(prefix, before, mine), DEADLINE)
                    if after == mine:
                        break
                    before = after

        threads = [
            threading.Thread(target=count, args=(connection, b"%d" % number))
            for number, connection in enumerate(connections)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        values: Any = connections[0].call(Get((prefix,)), DEADLINE)
        assert values[0].split()[0] == b"100"

    @pytest.mark.parametrize(
        "request_",
        [Get(("none",)), Swap("none", b"x", b"y"), Add("zero", 0), Delete("none"), Wait(("none",))],
        ids=lambda request: type(request).__name__,
    )
    def test_deadline(
        self, connect: Connect, freeze: Callable[[], AbstractContextManager[None]], request_: Request
    ) -> None:
        connection = connect()
        connection.call(Get(()), DEADLINE)
        with freeze(), pytest.raises(RendezvousConnectionError, match=r"has not answered .* for 0\.05 s"):
            connection.call(request_, 0.05)
        connection.close()

    def test_replies_after_a_freeze(self, connect: Connect, freeze: Callable[[], AbstractContextManager[None]]) -> None:
        connection = connect()
        connection.call(Get(()), DEADLINE)
        with freeze():
            with pytest.raises(RendezvousConnectionError):
                connection.call(Get(("late", "late")), 0.05)
            connection.submit(Get(("k1", "k2", "k3")), "tag")
            connection.flush()
        assert connection.call(Get(("none",)), DEADLINE) == [b""]
        assert connection.take() == [("tag", [b"", b"", b""])]
