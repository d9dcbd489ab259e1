"""A store behind a gate: members pass, strangers do not, and do not hold up members either."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from elastic_launch.core.store_requests import Cancel, Get, Set, Wait
from elastic_launch.errors import RendezvousConnectionError
from elastic_launch.host.ports import listen
from elastic_launch.rendezvous.backends.c10d import C10dBackend
from elastic_launch.store import relay_main
from elastic_launch.store.challenge import GREETING, MAGIC, REFUSED, ClientChallenge, GateChallenge, gate_key
from elastic_launch.store.client import NotAStoreError, StoreClient, connect
from elastic_launch.store.relay import Relay
from elastic_launch.store.relay_main import MOST_KEPT, Listener
from tests.support.leaks import children
from tests.support.servers import shared_store
from tests.support.store_contract import answers
from tests.support.waiting import DEADLINE, wait_until

LOOPBACK = "127.0.0.1"
KEY = gate_key(b"t" * 32, "job")
OTHER_KEY = gate_key(b"u" * 32, "job")


_Connection = relay_main.Connection


class Gates:
    """The relay of a node, in a thread of this process."""

    def __init__(self) -> None:
        self.relay = relay_main.Relay(KEY)
        self._ours, theirs = socket.socketpair()
        self._theirs = theirs
        self.is_over = False
        self.listeners: list[Listener] = []
        self.connections: list[relay_main.Connection] = []
        self.relay.watch(theirs, lambda _: None)
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self.is_over:
            self.relay.turn()

    def add(self, name: str, target: int, *, is_gate: bool = True) -> int:
        """A gate, or an entry to one; before ``start``. Return its port."""
        sock = listen(0, LOOPBACK)
        self.relay.listen(name, listener := Listener(sock, is_gate, (LOOPBACK, target)))
        self.listeners.append(listener)
        port: int = sock.getsockname()[1]
        return port

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self.is_over = True
        self._ours.send(b"!")
        self._thread.join()
        for end in (end for connection in self.connections for end in (connection.near, connection.far) if end):
            end.sock.close()
        for listener in self.listeners:
            listener.sock.close()
        self.relay._selector.close()
        self._ours.close()
        self._theirs.close()

    def begun(self, *args: Any) -> relay_main.Connection:
        """A connection, which is remembered."""
        self.connections.append(connection := _Connection(*args))
        return connection


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gates]:
    with contextlib.closing(Gates()) as made:
        monkeypatch.setattr(relay_main, "Connection", made.begun)
        yield made


@pytest.fixture
def to() -> Iterator[Callable[..., StoreClient]]:
    """Connect to a port, as a client of a store: one that knows the token, or with another key, or with none."""
    with contextlib.ExitStack() as stack:

        def made(port: int, key: bytes | None = KEY) -> StoreClient:
            challenge = ClientChallenge(key) if key else None
            client = connect((LOOPBACK, port), socket.AF_INET, "store at here", challenge)
            return stack.enter_context(contextlib.closing(client))

        yield made


@pytest.fixture
def raw() -> Iterator[Callable[..., socket.socket]]:
    """Connect to a port, as somebody who may say anything; from an address of this host."""
    with contextlib.ExitStack() as stack:

        def made(port: int, source: str = LOOPBACK) -> socket.socket:
            return stack.enter_context(socket.create_connection((LOOPBACK, port), DEADLINE, (source, 0)))

        yield made


def everything(sock: socket.socket) -> bytes:
    """Read until the other side closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(1 << 16):
            found += data
    return found


To = Callable[..., StoreClient]
Raw = Callable[..., socket.socket]


def test_members_reach_the_store_through_gate_and_entry(gates: Gates, to: To) -> None:
    gate = gates.add("job", shared_store().port)
    entry = gates.add("workers", gate, is_gate=False)
    gates.start()
    value = bytes(range(256)) * (30 << 10)  # 7.5 MiB
    agent, worker = to(gate), to(entry, None)
    agent.call(Set((("gate/large", value),)), DEADLINE)
    assert agent.call(Get(("gate/large",)), DEADLINE) == [value]
    assert worker.call(Get(("gate/large",)), DEADLINE) == [value]
    worker.submit(Wait(("gate/there",)), "there")
    worker.flush()
    agent.call(Set((("gate/there", b"1"),)), DEADLINE)
    assert answers(worker, 1) == [("there", True)]
    worker.submit(Wait(("gate/never",)), "never")
    worker.submit(Cancel())
    assert worker.call(Get(("gate/there",)), DEADLINE) == [b"1"]


def refusal(client: StoreClient) -> NotAStoreError:
    with pytest.raises(NotAStoreError) as caught:
        client.call(Get(("a",)), DEADLINE)
    assert caught.value.certain, "a reason to end at once"
    return caught.value


def test_who_has_no_token_or_another_one_is_told_so(gates: Gates, to: To) -> None:
    gate = gates.add("job", shared_store().port)
    gates.start()
    assert str(refusal(to(gate, None))) == (
        "store at here has a gate: give this node --store-gate and the job's --token-file, as the others"
    )
    assert str(refusal(to(gate, OTHER_KEY))) == (
        "store at here refuses this node's token: give all nodes of a job the same --token-file, and another job "
        "another --rdzv-id"
    )
    assert to(gate).call(Get(("gate/nothing",)), DEADLINE) == [b""]


def test_a_node_with_the_option_is_told_that_a_store_has_no_gate(to: To) -> None:
    assert str(refusal(to(shared_store().port))) == (
        "store at here has no gate: start the node that serves it with --store-gate and the same --token-file, or this "
        "one without --store-gate"
    )


def test_a_server_that_does_not_know_the_token_gets_no_request(to: To) -> None:
    got = b""

    def serve(sock: socket.socket) -> None:
        nonlocal got
        with sock.accept()[0] as theirs:
            theirs.sendall(GateChallenge(OTHER_KEY).out)
            while len(got) < len(GREETING) + 64:
                got += theirs.recv(1 << 16)
            theirs.sendall(b"+" + bytes(32))
            got += everything(theirs)

    with listen(0, LOOPBACK) as sock:
        thread = threading.Thread(target=serve, args=(sock,))
        thread.start()
        client = to(sock.getsockname()[1])
        assert str(refusal(client)).startswith("store at here does not know the job's token; ")
        client.close()
        thread.join(DEADLINE)
    assert len(got) == len(GREETING) + 64, "a request went to a stranger"


def test_strangers_reach_nothing(gates: Gates, raw: Raw) -> None:
    with listen(0, LOOPBACK) as inner:
        gate = gates.add("job", inner.getsockname()[1])
        gates.start()
        for words in (b"GET / HTTP/1.1\r\n\r\n" + bytes(200), GREETING + bytes(64), bytes(1000)):
            sock = raw(gate)
            sock.sendall(words)
            said = everything(sock)
            assert said.startswith(MAGIC)
            assert said[len(MAGIC) + 32 :] in (REFUSED, b"")  # a reset may overtake it
        raw(gate).close()
        inner.setblocking(False)
        with pytest.raises(BlockingIOError):
            inner.accept()


def test_mute_strangers_hold_nobody_up(gates: Gates, raw: Raw, to: To) -> None:
    gate = gates.add("job", shared_store().port)
    gates.start()
    for _ in range(200):
        raw(gate)
    assert to(gate).call(Get(("gate/nothing",)), DEADLINE) == [b""]


def test_if_too_many_wait_those_of_the_address_with_most_give_way(gates: Gates, raw: Raw) -> None:
    gate = gates.add("job", shared_store().port)
    gates.relay._limit = 8
    gates.start()
    slow, challenge = raw(gate), ClientChallenge(KEY)
    first = raw(gate, "127.0.0.2")
    for _ in range(30):
        raw(gate, "127.0.0.2").recv(1)
    everything(first)  # it has been closed
    assert sum(map(len, gates.relay._waiting.values())) <= 8
    challenge.receive(slow.recv(challenge.needed))
    slow.sendall(challenge.out)
    challenge.receive(slow.recv(challenge.needed))
    assert challenge.is_passed


def test_who_says_nothing_is_dropped(gates: Gates, raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_main, "PATIENCE", 0.1)
    gate = gates.add("job", shared_store().port)
    gates.start()
    assert len(everything(raw(gate))) == len(MAGIC) + 32
    assert not gates.relay._waiting


def test_other_users_of_the_host_have_no_entry(gates: Gates, raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_main, "peer_uid", lambda sock: 4711)
    with listen(0, LOOPBACK) as inner:
        entry = gates.add("workers", inner.getsockname()[1], is_gate=False)
        gates.start()
        assert everything(raw(entry)) == b""
        inner.setblocking(False)
        with pytest.raises(BlockingIOError):
            inner.accept()


def test_of_what_is_not_read_little_is_kept(gates: Gates, raw: Raw) -> None:
    with listen(0, LOOPBACK) as inner:
        gate = gates.add("job", inner.getsockname()[1])
        gates.start()
        sock, challenge = raw(gate), ClientChallenge(KEY)
        while not challenge.is_passed:
            challenge.receive(sock.recv(challenge.needed))
            sock.sendall(challenge.out)
            challenge.out.clear()
        with inner.accept()[0] as server:
            sock.setblocking(False)
            block, sent = bytes(1 << 20), 0
            stuck = 0
            while stuck < 20 and sent < 100 << 20:
                try:
                    sent += sock.send(block)
                    stuck = 0
                except BlockingIOError:
                    stuck += 1
                    threading.Event().wait(0.01)
            # Two connections' buffers in the kernel, and the relay's.
            assert sent < 40 << 20, "it keeps all of it"
            (connection,) = gates.connections
            assert connection.far
            assert len(connection.far.out) <= MOST_KEPT + (1 << 16)
            sock.close()
            server.settimeout(DEADLINE)
            assert len(everything(server)) == sent, "what was written before the end arrives"


def test_a_gate_whose_server_is_gone_is_gone(gates: Gates, to: To) -> None:
    with listen(0, LOOPBACK) as inner:
        gate = gates.add("job", inner.getsockname()[1])
    gates.start()
    with pytest.raises(RendezvousConnectionError):
        to(gate).call(Get(("a",)), DEADLINE)
    wait_until(lambda: gates.listeners[0].sock.fileno() < 0)
    with pytest.raises(RendezvousConnectionError, match="connection refused"):
        to(gate).call(Get(("a",)), DEADLINE)


def test_a_gate_whose_server_is_slow_stays(gates: Gates) -> None:
    gates.add("job", shared_store().port)
    listener = gates.listeners[0]
    connection = gates.begun(listener, socket.socket(), LOOPBACK)
    connection.far = slow = relay_main.End(Slow())  # type: ignore[arg-type]
    with pytest.raises(TimeoutError):
        gates.relay._note_connected(connection, slow)
    assert listener.sock.fileno() >= 0
    gates.start()


class Slow:
    """A socket whose connection was not accepted in time."""

    def getsockopt(self, *_: int) -> int:
        return errno.ETIMEDOUT

    def close(self) -> None:
        """Nothing is open."""


def test_a_connection_may_come_at_the_moment_in_which_its_gate_is_replaced(gates: Gates, raw: Raw, to: To) -> None:
    port = shared_store().port
    before = gates.add("job", port)
    control, theirs = socket.socketpair()
    after = 0

    def replace(_: int) -> None:
        nonlocal after
        gates.relay._selector.unregister(theirs)
        after = gates.add("job", port)

    with control, theirs:
        gates.relay.watch(theirs, replace)
        control.send(b"!")
        raw(before)
        gates.relay.turn()
    gates.start()
    assert to(after).call(Get(("gate/nothing",)), DEADLINE) == [b""]


class Full:
    """A socket that listens in a process which may open no further file, for a while."""

    def __init__(self, sock: socket.socket, times: int) -> None:
        self.sock, self.times = sock, times
        self.fileno, self.close, self.setblocking = sock.fileno, sock.close, sock.setblocking

    def accept(self) -> tuple[socket.socket, Any]:
        if self.times:
            self.times -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return self.sock.accept()


def test_without_descriptors_those_that_wait_give_way_and_others_come_in_later(
    gates: Gates, raw: Raw, to: To, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_main, "PAUSE", 0.01)
    gate = gates.add("job", shared_store().port)
    gates.start()
    mute = raw(gate)
    mute.recv(1)
    gates.listeners[0].sock = full = Full(gates.listeners[0].sock, 3)  # type: ignore[assignment]
    member = to(gate)
    assert member.call(Get(("gate/nothing",)), DEADLINE) == [b""]
    assert full.times == 0
    assert len(everything(mute)) < len(MAGIC) + 32, "it is closed"


def test_a_node_whose_way_to_the_gate_is_gone_knows(gates: Gates, to: To) -> None:
    gate = gates.add("job", shared_store().port)
    gates.start()
    backend = C10dBackend(LOOPBACK, gate, False, dict(os.environ), gate_key=KEY)
    with contextlib.closing(backend):
        assert not backend.descriptors()
        for _ in range(2):  # a round and the next one
            where = backend.workers_store(LOOPBACK, gate)
            assert where[0] == LOOPBACK
            assert to(where[1], None).call(Get(("gate/nothing",)), DEADLINE) == [b""]
        backend.take()
        [child] = [it for it in children() if it.name() == "elastic-gate"]
        child.kill()
        poller = select.poll()
        for descriptor, mask in backend.descriptors():
            poller.register(descriptor, mask)
        assert poller.poll(DEADLINE * 1000)
        with pytest.raises(
            RendezvousConnectionError, match=r"store is gone \(.*SIGKILL.*\); unless somebody killed it"
        ):
            backend.take()


def test_the_process_ends_with_its_agent_and_is_missed(to: To) -> None:
    relay = Relay(KEY, {})
    with contextlib.closing(relay):
        for _ in range(2):  # the second replaces the first
            gate = listen(0, LOOPBACK)
            port = gate.getsockname()[1]
            relay.add_gate("job", gate, shared_store().port)
            assert to(port).call(Get(("gate/nothing",)), DEADLINE) == [b""]
        relay.take()
        with open(f"/proc/{relay.pid}/comm") as file:
            assert file.read() == "elastic-gate\n"
        relay.control.shutdown(socket.SHUT_RDWR)
        assert relay.has_ended(DEADLINE)
        with pytest.raises(RendezvousConnectionError, match=r"the job's store is gone \(.*\)"):
            relay.take()


def test_without_descriptors_a_new_gate_waits_until_there_is_one(raw: Raw, to: To) -> None:
    server = shared_store().port
    with contextlib.closing(Relay(KEY, {})) as relay, listen(0, LOOPBACK) as first, listen(0, LOOPBACK) as second:
        ports = [gate.getsockname()[1] for gate in (first, second)]
        relay.add_gate("first", first, server)
        assert to(ports[0]).call(Get(("gate/nothing",)), DEADLINE) == [b""]
        waiting = raw(ports[0])
        assert waiting.recv(1)
        used = set(map(int, os.listdir(f"/proc/{relay.pid}/fd")))
        _, most = resource.prlimit(relay.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(relay.pid, resource.RLIMIT_NOFILE, (min(set(range(most)) - used), most))
        relay.add_gate("second", second, server)
        assert everything(waiting), "it gives way"
        resource.prlimit(relay.pid, resource.RLIMIT_NOFILE, (most, most))
        assert to(ports[1]).call(Get(("gate/nothing",)), DEADLINE) == [b""]
        relay.take()
