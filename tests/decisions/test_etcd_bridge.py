"""The bridge to etcd: in which order it carries out requests, and which members it asks."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, cast
from unittest.mock import MagicMock

import pytest

from elastic_launch.core.store_requests import Add, Get, Request, Set
from elastic_launch.store.codec import encode, encode_handshake
from elastic_launch.store.etcd import cluster
from elastic_launch.store.etcd.bridge_main import Bridge
from elastic_launch.store.etcd.cluster import Cluster, EtcdError, EtcdSettings
from elastic_launch.store.etcd.heartbeats import Heartbeats
from elastic_launch.store.etcd.keys import Keyspace
from elastic_launch.store.etcd.watch import KeyWatch

CODES = (
    *("UNAUTHENTICATED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED", "UNAVAILABLE"),
    *("DEADLINE_EXCEEDED", "INTERNAL", "CANCELLED", "UNKNOWN", "ABORTED"),
)
"""gRPC's status codes that are told apart."""
BEAT, OTHER = "job/0/heartbeat/1", "job/0/heartbeat/2"


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

    def is_reset(self, items: dict[bytes, bytes]) -> bool:
        return self.are_counters(list(items))

    def are_counters(self, names: list[bytes]) -> bool:
        return b"heartbeat" in names[0]

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


def test_only_what_a_reset_concerns_waits_for_it() -> None:
    """The monitor's own heartbeat, and what shows that the reset is done, would take as long again."""

    async def run() -> None:
        keys = SlowKeys()
        before, after = (Get(("a",)), Set(((OTHER, b"0"),))), (Get((OTHER,)), Set((("c", b"1"),)))
        ours, theirs, serving = await served(keys, *before, Get(("b",)), Add(BEAT, 1), *after)
        with ours:
            await settle()
            ours.recv(100)  # the reply to the handshake
            assert keys.begun == ["get /a", "get /b", "beat"], "a reset waits for the reads before it"
            keys.end("get /a")
            keys.end("get /b")
            keys.end("beat")
            await settle()
            assert b"/b" not in ours.recv(100), "the reply shows that the reset is done"
            assert keys.begun[3:] == ["set"]
            keys.end("set")
            await settle()
            assert b"/b" in ours.recv(100)
            assert keys.begun[4:] == [f"get /{OTHER}"], "this would see what has been reset; and a change waits"
            keys.end(f"get /{OTHER}")
            await settle()
            assert keys.begun[5:] == ["set"]
            keys.end("set")
            ours.recv(100)
        await serving
        theirs.close()

    asyncio.run(run())


class _RpcError(Exception):
    def __init__(self, code: str = "", details: str = "") -> None:
        super().__init__(code)
        self.code = lambda: code
        self.details = lambda: details or code


class Asked(NamedTuple):
    """A request that a member has got."""

    endpoint: str
    name: str
    answer: asyncio.Future[None]

    def __repr__(self) -> str:
        return f"{self.name} at {self.endpoint[0]}"


Trio = tuple[Cluster, list[Asked]]


@pytest.fixture
def trio(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Trio]:
    """Makes a cluster of members that answer when the test says so; a has the number 1, and is the own one."""
    asked: list[Asked] = []
    codes = {name: name for name in CODES} | {"NOT_FOUND": "gone"}
    grpc = SimpleNamespace(aio=SimpleNamespace(AioRpcError=_RpcError, EOF=None), StatusCode=SimpleNamespace(**codes))

    def member(grpc: Any, etcdrpc: Any, endpoint: str, settings: EtcdSettings) -> Any:
        def answering(name: str) -> Callable[..., Awaitable[Any]]:
            async def call(request: Any, timeout: float, metadata: Any) -> Any:
                asked.append(Asked(endpoint, name, asyncio.get_running_loop().create_future()))
                await asked[-1].answer
                header = SimpleNamespace(cluster_id=1, member_id="abc".index(endpoint[0]) + 1)
                return SimpleNamespace(header=header, leases=())

            return call

        names = ("Txn", "Range", "LeaseLeases", "LeaseRevoke")
        calls = {name: answering(name) for name in names}
        return SimpleNamespace(endpoint=endpoint, calls=calls, last_error="", is_unusable=False)

    def make() -> Trio:
        settings = EtcdSettings(("a:1", "b:1", "c:1"), False, None, None, None, None, None, 60, 60, preferred="a:1")
        made = Cluster(grpc, SimpleNamespace(LeaseRevokeRequest=dict, LeaseLeasesRequest=dict), settings)
        made._has_answered = True
        return made, asked

    monkeypatch.setattr(cluster, "MemberChannel", member)
    monkeypatch.setattr(cluster, "HEDGE", 0.001)
    return make


@pytest.mark.parametrize(
    ("code", "why"), [("DEADLINE_EXCEEDED", "Deadline Exceeded"), ("UNKNOWN", "context deadline exceeded")]
)
def test_a_timeout_does_not_hide_what_a_member_said_before(trio: Callable[[], Trio], code: str, why: str) -> None:
    """The last attempt lasts only as long as the call, and tells nothing about the member.

    Usually the client notices the timeout, now and then etcd, which calls that an unknown error.
    """

    async def run() -> None:
        made, asked = trio()
        member, timeout = made.member, _RpcError(code, why)
        for error in (_RpcError("UNAVAILABLE"), timeout):
            await made.recover(member, (), error)
            assert member.last_error == "UNAVAILABLE"
        call = asyncio.create_task(made.call("Txn", None))
        await until(lambda: len(asked) == 3)
        next(it for it in asked if it.endpoint == member.endpoint).answer.set_result(None)
        await call
        await made.recover(member, (), timeout)
        assert member.last_error == why, "it has answered since"

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_members_that_have_not_answered_are_asked_again(trio: Callable[[], Trio]) -> None:
    """A request that was on its way to a leader that is lost is never answered, not even when there is another one."""

    async def run() -> None:
        made, asked = trio()
        call = asyncio.create_task(made.call("Txn", None))
        await until(lambda: len(asked) == 6)
        asked[5].answer.set_result(None)
        await call
        first = [it.endpoint for it in asked[:3]]
        assert [it.endpoint for it in asked[3:6]] == first
        assert first[0] == "a:1"
        assert sorted(first) == ["a:1", "b:1", "c:1"]
        assert made.member.endpoint == first[1], "the next one is used from now on"
        await settle()
        assert not any(it.answer.cancelled() for it in asked), "a member of etcd before 3.5.5 might crash"

    asyncio.run(run())


def test_the_own_member_is_used_again_as_soon_as_it_answers(trio: Callable[[], Trio]) -> None:
    """With a slow link, what it knows by itself would have to be asked for at another host."""

    async def run() -> None:
        made, asked = trio()
        call = asyncio.create_task(made.call("Txn", None))
        await until(lambda: len(asked) > 1)
        asked[1].answer.set_result(None)
        await call
        assert made.member.endpoint != "a:1"
        asked[0].answer.set_result(None)
        await settle()
        assert made.member.endpoint == "a:1"

    asyncio.run(run())


def test_a_reset_is_sure_when_all_that_were_asked_have_answered(
    trio: Callable[[], Trio], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise each reset over a slow link would begin another generation, and each heartbeat take twice as long."""

    async def run(*answers: str | None) -> bool:
        made, asked = trio()
        asked.clear()
        monkeypatch.setattr(cluster, "HEDGE", 0.001)
        revoking = asyncio.create_task(Heartbeats(made, b"/x/")._revoke(1))
        await until(lambda: len(asked) >= 2)
        asked[0].answer.set_result(None)
        monkeypatch.setattr(cluster, "HEDGE", 60.0 if answers[0] is not None else 0.001)
        await settle()
        for it, answer in zip(asked[1:], [*answers, *[""] * 9], strict=False):
            if answer:
                it.answer.set_exception(_RpcError(answer))
            elif answer is not None:
                it.answer.set_result(None)
        return await revoking

    assert asyncio.run(run(""))
    assert asyncio.run(run("gone")), "it was revoked by the other one"
    assert not asyncio.run(run("deadline exceeded")), "it may be carried out later"
    assert not asyncio.run(run(None)), "so it may if there is no answer"


def test_memory_is_read_at_the_member_that_has_just_answered(trio: Callable[[], Trio]) -> None:
    """Another one may be behind. And over a slow link, what is there at once must not make the link seem fast."""

    async def run() -> None:
        made, asked = trio()
        assert await made.ask(1, "Range", None) is None, "nobody has answered yet"
        call = asyncio.create_task(made.call("Txn", None))
        await until(lambda: len(asked) > 1)
        asked[0].answer.set_result(None)
        assert (await call).header.member_id == 1
        await settle()
        asked.clear()
        made.switch_from(made.member, "")
        usual = made._usual
        reading = asyncio.create_task(made.ask(1, "Range", None))
        listing = asyncio.create_task(Heartbeats(made, b"/x/").marks(1))
        await until(lambda: len(asked) == 2)
        for it in asked:
            it.answer.set_result(None)
        assert (await reading).header.member_id == 1
        assert await listing == ({}, 1)
        assert made._usual == usual > 0
        refused = asyncio.create_task(made.ask(1, "Range", None))
        await until(lambda: len(asked) == 3)
        asked[2].answer.set_exception(_RpcError("unavailable"))
        assert await refused is None

    asyncio.run(run())


@pytest.mark.parametrize("waits_again", [False, True])
def test_a_wait_may_end_while_its_key_is_read_again(waits_again: bool) -> None:
    """etcd cancels a watch whose revision is compacted. Before the key is read, the agent's connection is lost."""

    async def run() -> None:
        read: asyncio.Future[tuple[list[Any], int]] = asyncio.get_running_loop().create_future()

        async def answered(keys: Sequence[bytes]) -> tuple[list[Any], int]:
            return await read

        def response(watch_id: int, **what: Any) -> Any:
            return SimpleNamespace(**{"created": False, "canceled": False, "events": (), **what}, watch_id=watch_id)

        watch = KeyWatch(cast(Cluster, SimpleNamespace(etcdrpc=MagicMock())), answered)
        waits = [asyncio.create_task(watch.wait(b"k", 5))]
        await settle()
        await watch._handle(response(1, created=True))
        handling = asyncio.create_task(watch._handle(response(1, canceled=True)))
        await settle()
        waits[0].cancel()
        await settle()
        if waits_again:
            waits.append(asyncio.create_task(watch.wait(b"k", 7)))
            await settle()
        read.set_result(([SimpleNamespace(mod_revision=6)], 7))
        await handling
        if waits_again:
            written = SimpleNamespace(kv=SimpleNamespace(key=b"k", mod_revision=8))
            await watch._handle(response(2, created=True))
            await watch._handle(response(2, events=(written,)))
            await settle()
            assert waits[1].done()

    asyncio.run(run())


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
