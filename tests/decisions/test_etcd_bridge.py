"""The bridge to etcd: in which order it carries out requests, and which members it asks."""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from types import SimpleNamespace
from typing import Any, cast

import pytest

from elastic_launch.core.store_requests import Add, Get, Request, Set
from elastic_launch.store.codec import encode, encode_handshake
from elastic_launch.store.etcd import cluster
from elastic_launch.store.etcd.bridge_main import Bridge
from elastic_launch.store.etcd.cluster import Cluster, EtcdError, EtcdSettings
from elastic_launch.store.etcd.heartbeats import Heartbeats
from elastic_launch.store.etcd.keys import Keyspace

BEAT = "job/0/heartbeat/1"


class SlowKeys:
    """Plays a keyspace: requests begin, and end when the test says so."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._ends: dict[str, asyncio.Future[bytes]] = {}

    async def _carry_out(self, what: str) -> bytes:
        self.begun.append(what)
        self._ends[what] = asyncio.get_running_loop().create_future()
        return await self._ends[what]

    def end(self, what: str) -> None:
        self._ends.pop(what).set_result(what.encode())

    # --- as Keyspace and FencedWriter

    def writer(self) -> SlowKeys:
        return self

    def is_heartbeat(self, name: bytes, amount: int) -> bool:
        return name == f"/{BEAT}".encode()

    async def get(self, names: list[bytes]) -> list[bytes]:
        return [await self._carry_out(f"get {names[0].decode()}")]

    async def add(self, name: bytes, amount: int) -> int:
        return len(await self._carry_out("beat"))

    async def set(self, items: dict[bytes, bytes]) -> None:
        await self._carry_out("set")


async def served(keys: SlowKeys, *requests: Request) -> tuple[socket.socket, socket.socket, asyncio.Task[None]]:
    """Have a bridge serve a connection with these requests. Return both its ends."""
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    bridge = Bridge(cast(Keyspace, keys), ours, -1)
    bridge._started.set()
    ours.send(b"".join(data for data, _ in (encode_handshake(), *map(encode, requests))))
    return ours, theirs, asyncio.create_task(bridge._serve(theirs))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_reads_and_heartbeats_do_not_wait_for_each_other() -> None:
    """With a slow etcd, a poll, a heartbeat, and what confirms a reset would take three times as long."""

    async def run() -> None:
        keys = SlowKeys()
        ours, theirs, serving = await served(
            keys, Get(("a",)), Add(BEAT, 1), Get(("b",)), Set((("c", b"1"),)), Get(("d",))
        )
        received = bytearray()
        with ours:
            await settle()
            ours.recv(100)  # the reply to the handshake
            assert keys.begun == ["get /a", "beat", "get /b"], "a change waits for the reads before it"
            keys.end("get /b")
            await settle()
            with pytest.raises(BlockingIOError):
                ours.recv(1)
            keys.end("get /a")
            await settle()
            received += ours.recv(100)
            assert b"/a" in received
            assert b"/b" not in received, "replies keep the order of the requests"
            assert keys.begun[3:] == ["set"], "it does not wait for heartbeats"
            keys.end("set")
            await settle()
            assert keys.begun[4:] == ["get /d"], "a read waits for the changes before it"
            keys.end("get /d")
            keys.end("beat")
            await settle()
            received += ours.recv(100)
            assert received.index(b"/a") < received.index(b"/b") < received.index(b"/d")
        await serving
        theirs.close()

    asyncio.run(run())


class _RpcError(Exception):
    pass


def test_members_that_have_not_answered_are_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that was on its way to a leader that is lost is never answered, not even when there is another one."""
    asked: list[str] = []
    cancelled: list[str] = []
    answers = deque([False] * 5 + [True])
    never = asyncio.Event()

    def member(grpc: Any, etcdrpc: Any, endpoint: str, settings: EtcdSettings) -> Any:
        async def call(request: Any, timeout: float, metadata: Any) -> Any:
            asked.append(endpoint)
            if not answers.popleft():
                try:
                    await never.wait()
                except asyncio.CancelledError:
                    cancelled.append(endpoint)
            return SimpleNamespace(header=SimpleNamespace(cluster_id=1))

        return SimpleNamespace(endpoint=endpoint, calls={"Txn": call}, last_error="", is_unusable=False)

    async def run() -> None:
        aio = SimpleNamespace(AioRpcError=_RpcError, EOF=None)
        settings = EtcdSettings(("a:1", "b:1", "c:1"), False, None, None, None, None, None, 60, 60, preferred="a:1")
        made = Cluster(SimpleNamespace(aio=aio, StatusCode=None), None, settings)
        made._has_answered = True
        await asyncio.wait_for(made.call("Txn", None), 60)
        assert made.member.endpoint == asked[1], "the next one is used from now on"
        await settle()
        assert cancelled == [], "a member of etcd before 3.5.5 might crash"

    monkeypatch.setattr(cluster, "MemberChannel", member)
    monkeypatch.setattr(cluster, "HEDGE", 0.001)
    asyncio.run(run())
    assert asked[:3] == asked[3:]
    assert asked[0] == "a:1"
    assert sorted(asked[:3]) == ["a:1", "b:1", "c:1"]


class AskedTwice:
    """A cluster that answers the second attempt at each request only: the first one has taken effect."""

    class etcdrpc:  # noqa: N801 - the name of gRPC's module
        LeaseGrantRequest = dict

    call_timeout = 60.0

    def __init__(self) -> None:
        self.leases: set[int] = set()
        self.is_slow = False

    async def call(self, name: str, request: Any, attempts: Any = None) -> Any:
        if attempts:
            attempts.count += self.is_slow
        for _ in range(1 + self.is_slow):
            existed = request["ID"] in self.leases
            self.leases.add(request["ID"])
        if existed:
            raise EtcdError("refused", "etcdserver: lease already exists")
        return SimpleNamespace(header=SimpleNamespace(member_id=1))


def test_a_heartbeat_that_was_sent_twice_is_no_sign_of_the_monitor() -> None:
    """Otherwise, if etcd's leader and the monitor are lost together, the monitor is missed later by an election."""
    made = AskedTwice()
    beats = Heartbeats(made, b"/x/")  # type: ignore[arg-type]

    async def read(member: int) -> tuple[int, int]:
        return 0, 0

    async def run() -> list[int]:
        counts = [await beats.beat(cast(Any, None), b"n", read)]
        made.leases.clear()  # the monitor has reset the counter, for the last time
        counts.append(await beats.beat(cast(Any, None), b"n", read))
        made.is_slow = True
        counts.append(await beats.beat(cast(Any, None), b"n", read))
        made.leases.clear()
        made.is_slow = False
        return [*counts, await beats.beat(cast(Any, None), b"n", read)]

    counts = asyncio.run(run())
    assert counts == [1, 1, 2, 1]
