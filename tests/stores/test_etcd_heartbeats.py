"""Counters of heartbeats in a real etcd: they count as in any store, and leave no history."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from elastic_launch.core.store_requests import Add, Get, Request, Set
from elastic_launch.host import child
from elastic_launch.store.client import StoreClient
from elastic_launch.store.etcd.bridge import EtcdBridge
from elastic_launch.store.etcd.cluster import EtcdError
from elastic_launch.store.etcd.heartbeats import MOST_MARKS, Heartbeats
from tests.support.etcd import Trio, post
from tests.support.leaks import shared_by_tests
from tests.support.servers import shared_etcd
from tests.support.waiting import DEADLINE, wait_until

_ASKS_ONCE = f"from elastic_launch.store.etcd import cluster; cluster.HEDGE = cluster.FIRST_ATTEMPT = {DEADLINE}; "
"""What makes a bridge wait for an answer instead of sending the request again, which may count twice."""


def key(ticket: int) -> str:
    return f"elastic/job/0/heartbeat/{ticket}"


class Node:
    """A bridge with one connection."""

    def __init__(self, endpoints: str, prefix: str) -> None:
        self.bridge = EtcdBridge(endpoints, prefix, {}, dict(os.environ))
        self._client = StoreClient(self.bridge.connect(), self.bridge.where)

    def __call__(self, request: Request) -> Any:
        return self._client.call(request, DEADLINE)

    def beat(self, ticket: int) -> int:
        return int(self(Add(key(ticket), 1)))

    def poll(self, *tickets: int) -> list[bytes]:
        found: list[bytes] = self(Get(tuple(map(key, tickets))))
        return found

    def set(self, values: dict[int, bytes]) -> None:
        self(Set(tuple((key(ticket), value) for ticket, value in values.items())))
        self(Get(("closed",)))  # a Set is not answered; what follows on this connection is, after it

    def reset(self, *tickets: int) -> None:
        self.set(dict.fromkeys(tickets, b"0"))

    def close(self) -> None:
        self._client.close()
        self.bridge.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Node, Node]]:
    """A node and a monitor that tests share; each test has tickets of its own. A slow etcd is fine."""
    endpoint = shared_etcd()
    with contextlib.ExitStack() as stack:
        with shared_by_tests(), pytest.MonkeyPatch.context() as patched:
            patched.setattr(
                child, "_PROGRAM", child._PROGRAM.replace("child_main.run(", f"{_ASKS_ONCE}child_main.run(")
            )
            node, monitor = [stack.enter_context(contextlib.closing(Node(endpoint, "/beats/"))) for _ in range(2)]
        yield node, monitor


def revision(endpoint: str) -> int:
    return int(post(endpoint, "kv/range", key=b"x")["header"]["revision"])


@pytest.mark.xdist_group("etcd-heartbeats")
def test_heartbeats_count_and_leave_no_history(pair: tuple[Node, Node]) -> None:
    node, monitor = pair
    assert monitor.poll(1, 2) == [b"0", b"0"]
    before = revision(shared_etcd())
    for _ in range(10):
        assert node.beat(1) == 1, "it has been reset"
        assert [node.beat(1), node.beat(1)] == [2, 3], "it has not"
        assert monitor.poll(1, 2) == [b"3", b"0"]
        monitor.reset(1)
        assert monitor.poll(1) == [b"0"]
    assert revision(shared_etcd()) == before
    # What is not a heartbeat is kept in the key, and is added to the heartbeats.
    assert monitor(Add(key(1), 1 << 30)) == 1 << 30
    assert node.beat(1) == (1 << 30) + 1
    assert monitor.poll(1) == [b"%d" % ((1 << 30) + 1)]
    monitor.reset(1)
    assert (monitor.poll(1), node.beat(1)) == ([b"0"], 1)
    monitor.set({2: b"%d" % (1 << 20)})
    assert (node.beat(2), monitor.poll(2)) == ((1 << 20) + 1, [b"%d" % ((1 << 20) + 1)])


@pytest.mark.xdist_group("etcd-heartbeats")
def test_a_counter_that_nobody_resets_goes_on_counting(pair: tuple[Node, Node]) -> None:
    node, monitor = pair
    counts = [node.beat(3) for _ in range(MOST_MARKS - 1)]
    seen = [monitor.poll(3)[0]]
    for _ in range(4):
        counts.append(node.beat(3))
        seen.append(monitor.poll(3)[0])
    assert counts == sorted(set(counts))
    assert len(set(seen)) == len(seen), "each heartbeat is seen"
    monitor.reset(3)
    assert (monitor.poll(3), node.beat(3)) == ([b"0"], 1)


@pytest.mark.xdist_group("etcd-heartbeats")
def test_a_monitor_resets_what_it_has_not_read(pair: tuple[Node, Node]) -> None:
    node, monitor = pair
    assert [node.beat(4), node.beat(4)] == [1, 2]
    monitor.reset(4)
    assert monitor.poll(4) == [b"0"]
    assert [node.beat(4), node.beat(4)] == [1, 2]
    assert monitor.poll(4) == [b"2"]


@pytest.mark.xdist_group("etcd-heartbeats")
def test_what_a_stranger_writes_is_read_as_it_is(pair: tuple[Node, Node]) -> None:
    node, monitor = pair
    monitor.set({5: b"nonsense", 6: b"-5"})
    assert monitor.poll(5, 6, 7) == [b"nonsense", b"-5", b"0"]
    monitor.reset(5, 6)
    assert node.beat(5) == 1
    assert monitor.poll(5, 6) == [b"1", b"0"]


def test_no_heartbeat_is_overlooked_when_a_member_is_frozen() -> None:
    """A heartbeat that was answered is seen by each poll that begins later, unless the counter was reset in between."""
    trio, stop, lock = Trio(), threading.Event(), threading.Lock()
    tickets = range(3)
    answered_beats: dict[int, list[tuple[float, float]]] = {ticket: [] for ticket in tickets}
    """When each heartbeat was sent and answered."""
    reset_at = dict.fromkeys(tickets, 0.0)
    polls = 0

    def beat(node: Node, ticket: int) -> None:
        while not stop.is_set():
            sent = time.monotonic()
            node.beat(ticket)
            with lock:
                answered_beats[ticket].append((sent, time.monotonic()))
            stop.wait(0.02)

    def watch(node: Node) -> None:
        nonlocal polls, reset_at
        while not stop.is_set():
            asked = time.monotonic()
            values = node.poll(*tickets)
            with lock:
                for ticket, value in enumerate(values):
                    due = any(sent > reset_at[ticket] and answered < asked for sent, answered in answered_beats[ticket])
                    assert value != b"0" or not due, f"a heartbeat of {ticket} is not seen"
            if grown := [ticket for ticket, value in enumerate(values) if value != b"0"]:
                node.reset(*grown)
                reset_at |= dict.fromkeys(grown, time.monotonic())
            polls += 1

    with contextlib.ExitStack() as stack:
        for server in trio.servers:
            stack.callback(server.stop)
            stack.callback(server.kill)
        nodes = [stack.enter_context(contextlib.closing(Node(trio.endpoints, "/beats/"))) for _ in tickets]
        monitor = stack.enter_context(contextlib.closing(Node(trio.endpoints, "/beats/")))
        pool = stack.enter_context(ThreadPoolExecutor(4))
        stack.callback(stop.set)
        running = [pool.submit(beat, nodes[ticket], ticket) for ticket in tickets] + [pool.submit(watch, monitor)]

        def go_on() -> None:
            before = polls
            wait_until(lambda: polls > before + 10 or any(future.done() for future in running))

        go_on()
        frozen = trio.servers[trio.connected(monitor.bridge)].pid
        os.kill(frozen, signal.SIGSTOP)
        try:
            go_on()
        finally:
            os.kill(frozen, signal.SIGCONT)  # it executes late what nobody waits for any more
        go_on()
        stop.set()
        for future in running:
            future.result(DEADLINE)


class RefusingCluster:
    """A cluster that lists no leases."""

    class etcdrpc:  # noqa: N801 - the name of gRPC's module
        LeaseLeasesRequest = dict

    def __init__(self, why: str) -> None:
        self._why = why

    async def call(self, name: str, request: object) -> None:
        raise EtcdError(f"{name} failed", self._why)


def test_an_etcd_that_lists_no_leases_counts_in_keys() -> None:
    beats = Heartbeats(RefusingCluster("permission denied"), b"/x/")  # type: ignore[arg-type]
    assert beats.covers(b"/elastic/job/0/heartbeat/1")
    asyncio.run(beats.start())
    assert not beats.covers(b"/elastic/job/0/heartbeat/1")
    with pytest.raises(EtcdError):
        asyncio.run(Heartbeats(RefusingCluster(""), b"/x/").start())  # type: ignore[arg-type]
