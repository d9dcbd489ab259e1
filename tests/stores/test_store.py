"""The job's store: the contract of all stores, in memory and on torch's TCPStore; and other servers than a store."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from elastic_launch.core.store_requests import Add, Append, Cancel, Delete, Get, Reply, Request, Set, Swap, Wait
from elastic_launch.errors import RendezvousConnectionError
from elastic_launch.host import ports
from elastic_launch.rendezvous.backends.c10d import C10dBackend
from elastic_launch.rendezvous.store_link import LinkState, LinkUser, StoreLink, Timeouts
from elastic_launch.store import wire
from elastic_launch.store.client import NotAStoreError, StoreClient, connect
from elastic_launch.store.tcpstore_server import TCPStoreServer
from elastic_launch.store.wire import U32, Op
from tests.support.memory_store import MemoryStore
from tests.support.ports import free_port
from tests.support.servers import shared_store
from tests.support.store_contract import (
    Connect,
    Connection,
    ServedStoreContract,
    StoreContract,
    answers,
    frozen,
)
from tests.support.waiting import DEADLINE, wait_until


@pytest.fixture
def host() -> TCPStoreServer:
    """A store that the tests share."""
    return shared_store()


@pytest.fixture
def to_host(host: TCPStoreServer) -> Iterator[Callable[[], StoreClient]]:
    """Make connections to the store."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(
            contextlib.closing(connect(("127.0.0.1", host.port), socket.AF_INET, "store at here"))
        )


@pytest.mark.quick
class TestC10d(ServedStoreContract):
    @pytest.fixture
    def connect(self, to_host: Callable[[], StoreClient]) -> Connect:
        return to_host

    @pytest.fixture
    def freeze(self, host: TCPStoreServer) -> Callable[[], AbstractContextManager[None]]:
        return lambda: frozen(host.pid)


class MemoryConnection:
    """A connection to a store in memory, with the interface of a client."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.answers: list[tuple[Any, Reply]] = []

    def submit(self, request: Request, tag: Any = None) -> None:
        self.store.apply(request, lambda reply: self.answers.append((tag, reply)), self)

    def flush(self) -> None:
        pass

    def take(self) -> list[tuple[Any, Reply]]:
        answers, self.answers = self.answers, []
        return answers

    def call(self, request: Request, timeout: float) -> Reply:
        self.submit(request)
        return self.answers.pop()[1]

    def close(self) -> None:
        self.store.drop(self)


@pytest.mark.quick
class TestMemory(StoreContract):
    @pytest.fixture
    def connect(self) -> Connect:
        store = MemoryStore()
        return lambda: MemoryConnection(store)


def test_callback_of_the_memory_store_may_make_requests() -> None:
    store = MemoryStore()
    log: list[Reply] = []
    store.apply(Wait(("a",)), lambda _: store.apply(Set((("b", b"x"),)), log.append, "one"), "one")
    store.apply(Wait(("b",)), log.append, "other")
    store.apply(Set((("a", b"x"),)), log.append)
    assert log == [None, None, True]
    assert store.values == {"a": b"x", "b": b"x"}


TORCHS_SIDE = """
import sys
from datetime import timedelta
from torch.distributed import PrefixStore, TCPStore
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False, timeout=timedelta(seconds=30))
inner = PrefixStore("p", store)
assert store.get("ours") == b"one" and store.get("ours/counter") == b"7" and store.get("clé") == b"\\0"
assert store.add("ours/counter", 3) == 10
assert store.compare_set("ours/created", "", "torch") == b"us"
assert store.check(["ours", "ours/appended"]) and not store.check(["ours", "none"])
assert store.multi_get(["ours", "ours/appended"]) == [b"one", b"ab"]
assert inner.get("ours") == b"inner"
store.append("ours/appended", "c")
store.set("torchs", "two")
inner.set("torchs", "inner two")
store.wait(["awaited"])
store.set("done", "x")
store.delete_key("ours")
"""


def test_client_of_torch_and_ours_see_the_same_keys(to_host: Callable[[], StoreClient], host: TCPStoreServer) -> None:
    client, waiter = to_host(), to_host()
    items = (("ours", b"one"), ("clé", b"\0"), ("ours/appended", b"a"), ("p/ours", b"inner"))
    client.call(Set(items), DEADLINE)
    client.call(Append("ours/appended", b"b"), DEADLINE)
    assert client.call(Add("ours/counter", 7), DEADLINE) == 7
    assert client.call(Swap("ours/created", b"", b"us"), DEADLINE) == b"us"
    command = [sys.executable, "-c", TORCHS_SIDE, str(host.port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as torchs:
        waiter.submit(Wait(("torchs", "p/torchs")), "wait")
        wait_until(lambda: step(waiter), "torch's write")
        keys = ("torchs", "p/torchs", "ours/counter", "ours/appended", "ours/created")
        assert client.call(Get(keys), DEADLINE) == [b"two", b"inner two", b"10", b"abc", b"us"]
        client.call(Set((("awaited", b"x"),)), DEADLINE)
        assert client.call(Wait(("done",)), DEADLINE) is True
        _, errors = torchs.communicate(timeout=DEADLINE)
        assert (torchs.returncode, errors) == (0, "")
    assert client.call(Delete("ours"), DEADLINE) is False


def step(client: StoreClient) -> list[tuple[Any, Reply]]:
    """What a loop does when the socket is ready."""
    client.flush()
    return client.take()


class Server:
    """Accepts a connection, and handles it as a test says, in a thread."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self._run, args=(serve,))

    def _run(self, serve: Callable[[socket.socket], None]) -> None:
        connection, _ = self.listening.accept()
        with connection, contextlib.suppress(ConnectionError):
            serve(connection)

    def __enter__(self) -> StoreClient:
        self.thread.start()
        self.client = connect(self.listening.getsockname(), socket.AF_INET, "store at here:1")
        return self.client

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.thread.join()
        self.listening.close()


def read_to_end(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def validated(answer: bytes) -> Callable[[socket.socket], None]:
    """A server that completes the handshake, and then sends these bytes and nothing else."""

    def serve(connection: socket.socket) -> None:
        data = connection.recv(1 << 16, socket.MSG_PEEK)
        connection.sendall(connection.recv(10, socket.MSG_WAITALL)[6:] + answer)
        assert data
        read_to_end(connection)

    return serve


def http(connection: socket.socket) -> None:
    connection.recv(1 << 16)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


@pytest.mark.parametrize(
    ("serve", "message", "certain"),
    [
        (lambda connection: None, "closes the connection instead of answering.* torch before 2.5", False),
        (lambda connection: connection.recv(1), "closes the connection instead of answering", False),  # a reset
        (read_to_end, r"accepts connections, but has not answered as a TCPStore for 0\.1 s", False),
        (http, "not as a TCPStore does .*HTTP/1.1 400", True),
        (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"), "SSH-2.0", True),
        (lambda connection: connection.sendall(connection.recv(10)), "not as a TCPStore does", True),  # an echo
        (lambda connection: connection.sendall(b"\0\0"), "closes the connection", False),
        (validated(b"\xff" * 8), r"not as a TCPStore does .*\\xff", True),
    ],
    ids=["closes", "resets", "silent", "http", "ssh", "echo", "two bytes", "nonsense"],
)
def test_servers_that_are_not_a_store(serve: Callable[[socket.socket], None], message: str, certain: bool) -> None:
    with Server(serve) as client, pytest.raises(NotAStoreError, match=f"^store at here:1 .*{message}") as caught:
        client.call(Get(("k",)), 0.1 if serve is read_to_end else DEADLINE)
    assert caught.value.certain is certain
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("request_", "answer"),
    [(Wait(("k",)), b"\1"), (Wait(("k",)), b"\7"), (Add("k", 1), b"\0" * 9)],
    ids=["stopped wait", "wait", "too much"],
)
def test_nonsense_after_the_handshake(request_: Request, answer: bytes) -> None:
    with Server(validated(answer)) as client:
        client.submit(request_)
        with pytest.raises(NotAStoreError, match="not as a TCPStore does"):
            wait_until(lambda: step(client) and False)


def pour(connection: socket.socket, data: bytes, enough: threading.Event) -> None:
    """Send data to a client that may have stopped reading."""
    rest = memoryview(data)
    with contextlib.suppress(OSError):
        while rest and not enough.is_set():
            if select.select([], [connection], [], 0.05)[1]:
                rest = rest[connection.send(rest, socket.MSG_DONTWAIT) :]


GET = Get(("a", "b", "c", "d"))


@pytest.mark.parametrize(
    ("request_", "lengths", "found"),
    [
        (GET, [(8 << 20) + 1], "get 'a' and 3 more with a value of 8388609 bytes, after 0 bytes of others"),
        (GET, [8 << 20] * 3 + [1], "a value of 1 bytes, after 25165824 bytes of others"),
        (Get(("a",), 10), [11], "get 'a' with a value of 11 bytes"),
        (Swap("k", b"", b"v"), [(8 << 20) + 1], "swap 'k' with a value of 8388609 bytes"),
    ],
)
def test_no_server_gives_more_than_was_asked_for(request_: Request, lengths: list[int], found: str) -> None:
    """The memory of the agent is what is spent: a value, or all values that have come, and a part of the next one."""

    def serve(connection: socket.socket) -> None:
        connection.sendall(connection.recv(10, socket.MSG_WAITALL)[6:])
        for length in lengths:
            pour(connection, wire.U64.pack(length) + bytes(min(length, 8 << 20)), enough)
        enough.wait(DEADLINE)

    enough = threading.Event()
    with Server(serve) as client:
        with pytest.raises(NotAStoreError, match=found) as caught:
            client.call(request_, DEADLINE)
        enough.set()
    assert "does something else write to that store?" in str(caught.value)


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_server_that_never_stops_does_not_fill_the_memory(is_asked: bool) -> None:
    def serve(connection: socket.socket) -> None:
        connection.sendall(connection.recv(10, socket.MSG_WAITALL)[6:])
        for _ in range(200):
            pour(connection, piece, enough)

    enough, piece = threading.Event(), wire.pack_blob(bytes(1 << 20))
    taken: list[object] = []

    def take_all(client: StoreClient) -> None:
        while True:
            client.flush()
            select.select([client], [], [], 1.0)
            taken.extend(tag for tag, _ in client.take())

    with Server(serve) as client:
        for _ in range(100 if is_asked else 0):
            client.submit(Get(("k",)))
        tracemalloc.start()
        try:
            with pytest.raises(NotAStoreError, match="not as a TCPStore does"):
                take_all(client)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            enough.set()
    assert len(taken) == (100 if is_asked else 0)
    assert peak < 32 << 20


def test_both_ends_of_a_connection_send_lost_packets_again_soon() -> None:
    with ports.listen(0, "127.0.0.1") as listening:
        client = connect(listening.getsockname(), socket.AF_INET, "store at here:1")
        with contextlib.closing(client), listening.accept()[0] as accepted:
            for sock in (client._sock, accepted):
                assert sock.getsockopt(socket.IPPROTO_TCP, ports.TCP_THIN_LINEAR_TIMEOUTS) == 1
                with contextlib.suppress(OSError):  # an older kernel
                    assert sock.getsockopt(socket.IPPROTO_TCP, ports.TCP_RTO_MAX_MS) == 1000


def test_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = listening.getsockname()
    client = connect(address, socket.AF_INET, "store at here:1")
    with (
        contextlib.closing(client),
        pytest.raises(RendezvousConnectionError, match="here:1: connection refused") as caught,
    ):
        client.call(Get(()), DEADLINE)
    assert not isinstance(caught.value, NotAStoreError)


def test_address_without_a_route() -> None:
    client = connect(("255.255.255.255", 1), socket.AF_INET, "store at here:1")
    with contextlib.closing(client), pytest.raises(RendezvousConnectionError, match="here:1: cannot connect: "):
        wait_until(lambda: step(client) and False)


def test_connection_that_is_not_accepted() -> None:
    """The queue is full: the system drops packets, as a firewall does."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening, contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(contextlib.closing(connect(listening.getsockname(), socket.AF_INET, "store at here:1")))
            for _ in range(3)
        ]
        with pytest.raises(RendezvousConnectionError, match=r"here:1: no connection after 0\.1 s"):
            clients[-1].call(Get(()), 0.1)


def test_replies_before_a_loss_are_returned() -> None:
    def serve(connection: socket.socket) -> None:
        connection.sendall(connection.recv(10, socket.MSG_WAITALL)[6:] + wire.I64.pack(5) + b"\0\0")

    with Server(serve) as client:
        client.submit(Add("k", 5), "first")
        client.submit(Add("k", 5), "second")
        assert answers(client, 1) == [("first", 5)]
        with pytest.raises(RendezvousConnectionError, match="connection lost") as caught:
            wait_until(lambda: client.take() and False)
        assert not isinstance(caught.value, NotAStoreError)
        client.submit(Add("k", 5))  # a lost connection accepts requests, and reports the loss again
        assert not client.wants_write()
        with pytest.raises(RendezvousConnectionError, match="connection lost"):
            client.take()


def test_a_lost_connection_that_waits_accepts_other_waits() -> None:
    """The loss may come together with the answer to a wait that was cancelled, so that nobody knows of it yet."""

    def serve(connection: socket.socket) -> None:
        connection.sendall(connection.recv(10, socket.MSG_WAITALL)[6:] + bytes([wire.STOPPED]))

    with Server(serve) as client:
        for request in (Wait(("first",)), Cancel(), Wait(("second",))):
            client.submit(request, request)
        assert answers(client, 1) == [(Wait(("first",)), False)]
        with pytest.raises(RendezvousConnectionError, match="connection lost"):
            wait_until(lambda: client.take() and False)
        for request in (Cancel(), Wait(("third",))):
            client.submit(request)
        with pytest.raises(RendezvousConnectionError, match="connection lost"):
            client.take()


@pytest.mark.parametrize("order", [1, -1], ids=["the last", "the first"])
def test_a_store_is_reached_though_it_serves_at_one_of_several_addresses_only(
    order: int, host: TCPStoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many hosts have two for localhost, and a store that is for such a host alone listens on one of them."""
    addresses = [(socket.AF_INET, ("127.0.0.1", port)) for port in (free_port(), host.port)][::order]
    backend = C10dBackend("localhost", host.port, False, {})
    monkeypatch.setattr(backend, "_resolver", SimpleNamespace(resolve=lambda host, port: [*addresses]))
    user = SimpleNamespace(deliver=lambda given: None, needs_store=lambda: True, log=print)
    link = StoreLink(backend, Timeouts(), cast(LinkUser, user), time.monotonic)
    link.open()

    def is_ready() -> bool:
        link.turn()
        return link.state is LinkState.READY

    wait_until(is_ready)
    link.close()


@pytest.mark.parametrize("seed", range(5))
def test_messages_may_be_cut_anywhere(seed: int) -> None:
    """The client gets the same replies however the bytes are cut, and so does the server with requests."""
    chance = random.Random(seed)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    store, received, reply = MemoryStore(), bytearray(), bytearray()
    waiting = [False]

    def tell_waiter(done: Reply) -> None:
        waiting[0] = False
        reply.append(wire.DONE if done else wire.STOPPED)

    def serve(op: Op, fields: list[Any]) -> None:
        first = fields[0] if fields else None
        keys = [key.decode()[1:] for key in first[:: 2 if op is Op.MULTI_SET else 1]] if isinstance(first, list) else []
        key = first.decode()[1:] if isinstance(first, bytes) else ""
        answer: list[Any] = []
        if op is Op.PING:
            reply.extend(U32.pack(fields[0]))
        elif op is Op.MULTI_GET:
            store.apply(Get(tuple(keys)), answer.append)
            reply.extend(wire.pack_blobs(answer[0]))
        elif op is Op.MULTI_SET:
            store.apply(Set(tuple(zip(keys, fields[0][1::2], strict=True))), answer.append)
        elif op is Op.SET:
            store.apply(Set(((key, fields[1]),)), answer.append)
        elif op is Op.APPEND:
            store.apply(Append(key, fields[1]), answer.append)
        elif op is Op.ADD:
            store.apply(Add(key, fields[1]), answer.append)
            reply.extend(wire.I64.pack(answer[0]))
        elif op is Op.DELETE_KEY:
            store.apply(Delete(key), answer.append)
            reply.extend(wire.I64.pack(answer[0]))
        elif op is Op.COMPARE_SET:
            store.apply(Swap(key, fields[1], fields[2]), answer.append)
            reply.extend(wire.pack_blob(answer[0] or fields[1]))
        elif op is Op.WAIT:
            waiting[0] = True
            store.apply(Wait(tuple(keys)), tell_waiter)
        elif op is Op.CANCEL_WAIT:
            if waiting[0]:
                store.apply(Cancel(), answer.append)
            else:
                reply.append(wire.STOPPED)

    def some_request() -> Request:
        keys = tuple(chance.choice("abcdefgh") for _ in range(chance.randrange(5)))
        value = chance.randbytes(chance.choice((1, 3, 50, 3000)))
        return chance.choice(
            (
                Get(keys),
                Set(tuple((key, value) for key in keys)),
                Set(((chance.choice("abc"), value),)),
                Swap(chance.choice("abc"), chance.choice((b"", b"x")), chance.choice((b"x", value))),
                Add("number", chance.randrange(-9, 9)),
                Append(chance.choice("abc"), value),
                Delete(chance.choice("abc")),
                Wait((chance.choice("abc"),)),
                Wait((chance.choice("abcxyz"),)),
            )
        )

    model = MemoryStore()
    expected: list[tuple[Any, Reply]] = []
    found: list[tuple[Any, Reply]] = []
    with contextlib.closing(StoreClient(ours, "store at here")) as client, theirs:
        for number in range(400):
            request = some_request()
            client.submit(request, number)
            model.apply(request, lambda answer, number=number: expected.append((number, answer)))  # type: ignore[misc]
            if isinstance(request, Wait):
                client.submit(Cancel())
                model.apply(Cancel(), lambda _: None)
        theirs.setblocking(False)
        while len(found) < len(expected):
            client.flush()
            with contextlib.suppress(BlockingIOError):
                received += theirs.recv(chance.choice((1, 7, 500, 60000)))
            while taken := wire.take_request(received):
                serve(*taken)
            sent = theirs.send(reply[: chance.choice((1, 2, 5, 100, 20000))])
            del reply[:sent]
            found += client.take()
    assert found == expected
    assert store.values == model.values


def test_server_side_refuses_bad_requests() -> None:
    for data in (b"\xff", bytes([Op.SET]) + wire.U64.pack(8193), bytes([Op.WAIT]) + wire.U64.pack(1 << 40)):
        with pytest.raises(wire.ProtocolError):
            wire.take_request(bytearray(data))


def _a_client_is_a_connection(client: StoreClient) -> Connection:
    return client  # mypy checks this
