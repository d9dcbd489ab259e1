"""The job's store on a real etcd: the bridge, clusters, TLS and users, and the messages about failures."""

from __future__ import annotations

import base64
import contextlib
import http.client
import http.server
import itertools
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from elastic_launch.cli import store_checks
from elastic_launch.core.store_requests import Add, Append, Cancel, Delete, Get, Request, Set, Swap, Wait
from elastic_launch.errors import RendezvousConnectionError, UsageError
from elastic_launch.rendezvous.backends.etcd import EtcdBackend
from elastic_launch.store.client import StoreClient
from elastic_launch.store.etcd import bridge
from elastic_launch.store.etcd.bridge import EtcdBridge
from elastic_launch.store.etcd.cluster import FIRST_ATTEMPT, EtcdSettings, in_order
from elastic_launch.store.etcd.server import EtcdServer
from tests.support.certificates import make_certificates
from tests.support.etcd import Trio, post
from tests.support.leaks import shared_by_tests
from tests.support.ports import free_port
from tests.support.servers import shared_etcd
from tests.support.store_contract import Connect, Connection, ServedStoreContract, frozen
from tests.support.waiting import DEADLINE, SOON, is_alive, wait_until

LONG_ENOUGH = "3"
"""Seconds in which a bridge learns why it cannot use an endpoint, although it may stand still for a moment."""
_jobs = itertools.count()


def new_prefix() -> str:
    return f"/elastic/test{next(_jobs)}/"


class Agent:
    """The agent's side of a bridge, and connections."""

    def __init__(self, endpoints: str, prefix: str, **conf: str) -> None:
        self.prefix = prefix
        self.bridge = EtcdBridge(endpoints, prefix, conf, dict(os.environ))
        self.clients: list[StoreClient] = []
        self.calls = self.connect()

    def connect(self) -> StoreClient:
        self.clients.append(StoreClient(self.bridge.connect(), self.bridge.where))
        return self.clients[-1]

    def __call__(self, request: Request) -> Any:
        return self.calls.call(request, DEADLINE)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.bridge.close()


@pytest.fixture
def agents() -> Iterator[Callable[..., Agent]]:
    """Make agents, and end them."""
    with contextlib.ExitStack() as stack:

        def make(endpoints: str, prefix: str = "", **conf: str) -> Agent:
            agent = Agent(endpoints, prefix or new_prefix(), **conf)
            stack.callback(agent.close)
            return agent

        yield make


@pytest.fixture
def etcd() -> str:
    return shared_etcd()


@pytest.fixture
def trio() -> Iterator[Trio]:
    trio = Trio()
    yield trio
    for server in trio.servers:
        server.kill()  # quicker than to stop
        server.stop()


def wait_answer(client: Connection, seconds: float) -> list[Any]:
    """The replies that come within some seconds."""
    client.flush()
    assert isinstance(client, StoreClient)
    poller = select.poll()
    poller.register(client, select.POLLIN)
    end = time.monotonic() + seconds
    while True:
        if found := client.take():
            return found
        left = end - time.monotonic()
        if left <= 0:
            return []
        poller.poll(left * 1000 + 1)


def why(agent: Agent) -> str:
    """The message of a bridge that gives up."""
    poller = select.poll()
    poller.register(agent.bridge, select.POLLIN)
    assert poller.poll(DEADLINE * 1000)
    with pytest.raises(RendezvousConnectionError) as caught:
        agent.bridge.take()
    return str(caught.value)


# --- one server ---


@pytest.fixture(scope="module")
def two() -> Iterator[list[Agent]]:
    """Two agents that the tests of the contract share."""
    endpoint, prefix = shared_etcd(), new_prefix()
    with contextlib.ExitStack() as stack:
        with shared_by_tests():
            agents = [stack.enter_context(contextlib.closing(Agent(endpoint, prefix))) for _ in range(2)]
        yield agents


@pytest.mark.xdist_group("etcd-contract")
class TestContract(ServedStoreContract):
    @pytest.fixture
    def connect(self, two: list[Agent]) -> Iterator[Connect]:
        """Make connections of two agents in turn."""
        turns = itertools.cycle(two)
        with contextlib.ExitStack() as stack:
            yield lambda: stack.enter_context(contextlib.closing(next(turns).connect()))

    @pytest.fixture
    def freeze(self, two: list[Agent]) -> Callable[[], contextlib.AbstractContextManager[None]]:
        @contextlib.contextmanager
        def freeze() -> Iterator[None]:
            with frozen(two[0].bridge.pid), frozen(two[1].bridge.pid):
                yield

        return freeze


def test_every_request(etcd: str, agents: Callable[..., Agent]) -> None:
    ask = agents(etcd)
    assert ask(Get(("a", "b"))) == [b"", b""]
    ask(Set((("a", b"1"), ("b", b"\0\xff"))))
    assert ask(Get(("b", "a", "c"))) == [b"\0\xff", b"1", b""]
    assert ask(Add("a", 41)) == 42
    assert ask(Add("n", 1)) == 1
    assert [ask(Add("n", amount)) for amount in (1, 5, 1, -3, 0, 1)] == [2, 7, 8, 5, 5, 6]
    assert ask(Get(("n",))) == [b"6"]
    assert ask(Swap("n", b"6", b"six")) == b"six"
    assert ask(Swap("new", b"", b"mine")) == b"mine"
    assert ask(Swap("new", b"", b"yours")) == b"mine"
    assert ask(Swap("new", b"mine", b"ours")) == b"ours"
    assert ask(Swap("nothing", b"x", b"y")) == b""
    for more in (b"x", b"yz", b"\0"):
        ask(Append("log", more))
        ask(Append("a", more))
    assert ask(Get(("log", "a"))) == [b"xyz\0", b"42xyz\0"]
    assert ask(Swap("log", b"xyz\0", b"cut")) == b"cut"
    ask(Append("log", b"+"))
    assert ask(Get(("log",))) == [b"cut+"]
    assert [ask(Delete("log")), ask(Delete("log"))] == [True, False]
    ask(Append("log", b"again"))
    assert ask(Get(("log",))) == [b"again"]
    assert ask(Delete("n")) is True
    assert ask(Add("n", 1)) == 1
    assert ask(Wait(("n", "a"))) is True


def test_a_wait_ends_when_the_last_key_appears_or_when_it_is_cancelled(etcd: str, agents: Callable[..., Agent]) -> None:
    prefix = new_prefix()
    one, two = agents(etcd, prefix), agents(etcd, prefix)
    waiting = one.connect()
    for name in ("x", "y"):
        waiting.submit(Wait((name, name + "2")), name)
        two(Set(((name, b"1"),)))
        two(Get((name,)))
        assert one(Get((name, name + "2"))) == [b"1", b""]
        assert wait_answer(waiting, 0.05) == []
        two(Add(name + "2", 1))
        assert wait_answer(waiting, DEADLINE) == [(name, True)]
    waiting.submit(Wait(("never",)), "z")
    waiting.flush()
    waiting.submit(Cancel())
    assert wait_answer(waiting, DEADLINE) == [("z", False)]
    assert waiting.call(Get(("x",)), DEADLINE) == [b"1"]


def test_a_wait_that_ends_as_it_is_cancelled_loses_nothing(etcd: str, agents: Callable[..., Agent]) -> None:
    agent = agents(etcd)
    rows = [(agent.connect(), agent.connect()) for _ in range(8)]
    for turn in range(60):
        for row, (waiting, setting) in enumerate(rows):
            waiting.submit(Wait((f"{turn}/{row}",)), turn)
            setting.submit(Set(((f"{turn}/{row}", b"x"),)))
            waiting.flush()
        for waiting, setting in rows:
            setting.flush()
            waiting.submit(Cancel())
            waiting.flush()
        for row, (waiting, _) in enumerate(rows):
            assert waiting.call(Wait((f"{turn}/{row}",)), DEADLINE) is True
            [(tag, came)] = waiting.take()
            assert (tag, came in (True, False)) == (turn, True)


def test_a_wait_survives_the_compaction_of_its_revision(agents: Callable[..., Agent]) -> None:
    port = free_port(2)  # it stays free while etcd is started again
    server = EtcdServer()
    server.launch(port, port + 1, stderr=subprocess.DEVNULL)
    try:
        server.wait_ready(DEADLINE)
        endpoint = server.get_endpoint()
        agent = agents(endpoint)
        waiting = agent.connect()
        for name in ("late", "later"):
            waiting.submit(Wait((name,)), name)
            waiting.flush()
            for _ in range(5):
                agent(Add("n", 1))
            if name == "later":  # it appears while the bridge is stopped
                other = agents(endpoint, agent.prefix)
                other(Get(("x",)))
                os.kill(agent.bridge.pid, signal.SIGSTOP)
                other(Swap(name, b"", b"1"))
            revision = post(endpoint, "kv/range", key=b"x")["header"]["revision"]
            assert "header" in post(endpoint, "kv/compaction", revision=revision, physical=True)
            server.kill()
            server.launch(port, port + 1, stderr=subprocess.DEVNULL)
            server.wait_ready(DEADLINE)
            if name == "late":
                agent(Add("n", 1))
                agent(Set(((name, b"1"),)))
            os.kill(agent.bridge.pid, signal.SIGCONT)
            assert wait_answer(waiting, DEADLINE) == [(name, True)]
    finally:
        server.stop()


def test_many_keys_and_long_values(etcd: str, agents: Callable[..., Agent]) -> None:
    ask = agents(etcd)
    items = tuple((f"k{index}", b"%d" % index * 100) for index in range(1000))
    ask(Set(items))
    assert ask(Get(tuple(key for key, _ in items))) == [value for _, value in items]
    big = tuple((f"big{index}", bytes([index + 1]) * 900_000) for index in range(5))
    ask(Set(big))
    assert ask(Get(tuple(key for key, _ in big))) == [value for _, value in big]


def test_values_beyond_etcds_limit(etcd: str, agents: Callable[..., Agent]) -> None:
    ask = agents(etcd)
    one, two = b"1" * 2_000_000, b"2" * 3_000_000
    assert ask(Swap("k", b"", one)) == one
    assert ask(Swap("k", two, b"x")) == one
    assert ask(Swap("k", one, two)) == two
    ask(Append("k", one))
    assert ask(Get(("k",))) == [two + one]


def test_keys_that_are_deleted_together_leave_nothing(etcd: str, agents: Callable[..., Agent]) -> None:
    agent = agents(etcd)
    agent(Get(("x",)))
    before = raw_keys(etcd, agent.prefix)
    names = [f"k{number}" for number in range(300)]
    agent(Set(tuple((name, b"1") for name in names[:200])))
    agent(Append("log", b"x"))
    agent(Append("log", b"y"))
    beats = [f"elastic/j/1/heartbeat/{ticket}" for ticket in range(3)]
    for beat in beats:
        agent(Add(beat, 1))
    agent(Set(((beats[1], b"7"),)))
    everything = [*names, "log", *beats]
    for name in everything:
        agent.calls.submit(Delete(name), name)
    answers: dict[str, Any] = {}
    while len(answers) < len(everything):
        answers.update(wait_answer(agent.calls, DEADLINE))
    assert [name for name, existed in answers.items() if existed] == [*names[:200], "log", beats[1]]
    assert agent(Get(("log", *beats))) == [b"", b"0", b"0", b"0"]
    assert {key for key in raw_keys(etcd, agent.prefix) - before if b"\0fence/" not in key} == set()
    assert [agent(Add(beat, 1)) for beat in beats] == [1, 1, 1]


def raw_keys(endpoint: str, prefix: str) -> set[bytes]:
    """All keys of a job, as etcd has them."""
    answer = post(endpoint, "kv/range", key=prefix.encode(), range_end=prefix[:-1].encode() + b"0", keys_only=True)
    return {base64.b64decode(kv["key"]) for kv in answer.get("kvs", ())}


def test_keys_have_the_prefix_and_a_lease_of_a_day(etcd: str, agents: Callable[..., Agent]) -> None:
    prefix = new_prefix()
    one, two = agents(etcd, prefix), agents(etcd, prefix)
    one(Set((("a", b"1"),)))
    one(Get(("a",)))
    two(Add("n", 1))
    two(Append("l", b"x"))
    two(Get(("a",)))
    end = prefix[:-1].encode() + b"0"
    kvs = post(etcd, "kv/range", key=prefix.encode(), range_end=end)["kvs"]
    leases = {kv["lease"] for kv in kvs}
    assert len(kvs) >= 4
    assert len(leases) == 1
    answer = post(etcd, "lease/timetolive", ID=leases.pop())
    assert int(answer["grantedTTL"]) == 24 * 3600
    assert not post(etcd, "kv/range", key=b"\0", range_end=prefix.encode()).get("kvs") or prefix > "/elastic/test0/"


def test_an_expired_lease_is_an_error(etcd: str, agents: Callable[..., Agent]) -> None:
    prefix = new_prefix()
    agent = agents(etcd, prefix)
    agent(Add("n", 1))
    kvs = post(etcd, "kv/range", key=prefix.encode(), range_end=prefix[:-1].encode() + b"0")["kvs"]
    post(etcd, "lease/revoke", ID=kvs[0]["lease"])
    with pytest.raises(RendezvousConnectionError):
        agent(Add("n", 1))
    assert f"the job's keys in etcd at {etcd} are gone" in why(agent)


def test_256_connections_add_at_once(etcd: str, agents: Callable[..., Agent]) -> None:
    prefix = new_prefix()
    connections = [agent.connect() for agent in [agents(etcd, prefix) for _ in range(4)] for _ in range(64)]
    for client in connections:
        client.call(Get(("x",)), DEADLINE)
    for client in connections:
        client.submit(Add("ticket", 1), 0)
        client.submit(Append("all", b"."), 1)
        client.submit(Get(("all",)), 2)
        client.flush()
    sums = []
    for client in connections:
        answers: dict[Any, Any] = {}
        while len(answers) < 3:
            answers.update(wait_answer(client, DEADLINE))
        sums.append(answers[0])
    assert sorted(sums) == list(range(1, 257))
    assert connections[0].call(Get(("all",)), DEADLINE) == [b"." * 256]


def test_requests_that_were_sent_before_the_end_are_executed(
    etcd: str, agents: Callable[..., Agent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "CLOSE_PATIENCE", DEADLINE)  # a bridge may take more than 2 s to start
    prefix = new_prefix()
    leaving, staying = agents(etcd, prefix), agents(etcd, prefix)
    staying(Get(("x",)))
    leaving.calls.submit(Set((("last", b"words"),)))
    leaving.calls.flush()
    leaving.close()  # the bridge has hardly started
    assert staying(Get(("last",))) == [b"words"]


def test_a_bad_request_closes_only_its_connection(etcd: str, agents: Callable[..., Agent]) -> None:
    agent = agents(etcd)
    agent(Set((("text", b"abc"),)))
    other = agent.connect()
    with pytest.raises(RendezvousConnectionError):
        other.call(Add("text", 1), DEADLINE)
    with agent.bridge.connect() as stranger:
        stranger.setblocking(True)
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert stranger.recv(100) == b""
    assert agent(Get(("text",))) == [b"abc"]
    agent.bridge.take()


# --- the process ---


def test_the_bridge_ends_with_an_agent_that_is_killed(etcd: str) -> None:
    code = (
        "import os, sys; from elastic_launch.store.etcd.bridge import EtcdBridge\n"
        f"b = EtcdBridge({etcd!r}, '/x/', {{}}, dict(os.environ))\n"
        "c = b.connect(); print(b.pid, flush=True); sys.stdin.read()"
    )
    agent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with agent:
        assert agent.stdout
        pid = int(agent.stdout.readline())
        wait_until(lambda: len(psutil.Process(pid).threads()) > 1, "gRPC's threads")
        assert os.getsid(pid) == pid
        agent.send_signal(signal.SIGKILL)
    wait_until(lambda: not is_alive(pid))


def test_a_bridge_that_is_killed_is_reported(etcd: str, agents: Callable[..., Agent]) -> None:
    agent = agents(etcd)
    agent(Add("n", 1))
    agent.bridge.take()
    os.kill(agent.bridge.pid, signal.SIGKILL)
    assert f"(pid {agent.bridge.pid}) ended: killed by SIGKILL" in why(agent)
    with pytest.raises(RendezvousConnectionError):
        agent.connect().call(Get(("n",)), DEADLINE)


def test_signals_from_a_terminal_do_not_end_the_bridge(etcd: str, agents: Callable[..., Agent]) -> None:
    agent = agents(etcd)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(agent.bridge.pid, signum)
    assert agent(Add("n", 1)) == 1


def test_without_etcd3_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p];"
        f"sys.path.append({str(Path(__file__).parents[2])!r});"
        "from elastic_launch.store.etcd import protobuf\n"
        "try: protobuf.load()\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "UnavailableError" in run.stdout
    assert "pip install 'elastic-launch[etcd]'" in run.stdout


# --- three members ---


def test_the_own_member_is_used_first_and_the_others_at_random() -> None:
    settings = EtcdSettings(("a:1", "b:1", "c:1"), False, None, None, None, None, None, 60, 60)
    own = settings._replace(preferred="b:1")
    assert {in_order(own)[0] for _ in range(50)} == {"b:1"}
    assert sorted(in_order(own)) == ["a:1", "b:1", "c:1"]
    assert {in_order(settings)[0] for _ in range(200)} == {"a:1", "b:1", "c:1"}


@pytest.mark.parametrize("how", ["kill", "freeze"])
def test_the_loss_of_the_connected_member_is_not_noticed(trio: Trio, agents: Callable[..., Agent], how: str) -> None:
    prefix = new_prefix()
    victim = agents(trio.endpoints, prefix)
    victim(Get(("x",)))
    index = trio.connected(victim.bridge)
    server = trio.servers[index]
    others = [agents(trio.endpoints, prefix) for _ in range(2)]
    everyone = [victim, *others]
    stop = threading.Event()
    gaps: list[float] = []

    def add(client: StoreClient) -> list[int]:
        sums = []
        last = time.monotonic()
        while not stop.is_set():
            sums.append(client.call(Add("n", 1), DEADLINE))
            client.call(Append("log", b"."), DEADLINE)
            now = time.monotonic()
            gaps.append(now - last)
            last = now
        client.call(Get(("n",)), DEADLINE)  # an append is only on its way until the next reply
        return [int(s) for s in sums if isinstance(s, int)]

    def wait(client: StoreClient) -> int:
        count = 0
        while not stop.is_set():
            assert client.call(Wait((f"event{count}",)), DEADLINE) is True
            count += 1
        return count

    def write(client: StoreClient) -> int:
        count = 0
        while not stop.is_set() or count < 50:
            assert client.call(Swap(f"event{count}", b"", b"1"), DEADLINE) == b"1"
            count += 1
            client.call(Get((f"event{count}",)), DEADLINE)
        client.call(Swap(f"event{count}", b"", b"1"), DEADLINE)
        return count + 1

    connections = [[agent.connect() for _ in range(4)] for agent in everyone]
    with ThreadPoolExecutor(16) as pool:
        adding = [pool.submit(add, c) for mine in connections for c in mine[:2]]
        waiting = [pool.submit(wait, mine[2]) for mine in connections]
        writing = pool.submit(write, connections[1][3])
        try:
            wait_until(lambda: len(gaps) > 60)
            if how == "kill":
                server.kill()
            else:
                os.kill(server.pid, signal.SIGSTOP)
            before = len(gaps)
            # All connections of the victim are served again.
            wait_until(lambda: len(gaps) > before + 60)
            with_victim = victim(Add("n", 1))
            if how == "kill":
                trio.launch(index)
            else:
                os.kill(server.pid, signal.SIGCONT)  # it may execute unanswered requests now
            server.wait_ready(DEADLINE)
            before = len(gaps)
            wait_until(lambda: len(gaps) > before + 60)
        finally:
            if server.pid > 0:
                os.kill(server.pid, signal.SIGCONT)
            stop.set()
    sums = [s for future in adding for s in future.result()] + [with_victim]
    assert sorted(sums) == list(range(1, len(sums) + 1))
    assert others[0](Add("n", 0)) == len(sums)
    assert len(others[0](Get(("log",)))[0]) == len(sums) - 1
    assert all(0 < future.result() <= writing.result() for future in waiting)
    assert max(gaps) < SOON  # an attempt at a frozen member, and an election: 2 to 4 s


def test_a_member_that_falls_silent_is_found_in_less_than_an_attempt(trio: Trio, agents: Callable[..., Agent]) -> None:
    """Otherwise a node with a short deadline would stop its workers, although two members serve."""
    gaps = []
    for number, server in enumerate(trio.servers):
        agent = agents(trio.endpoints, preferred=server.get_endpoint())
        agent(Add("n", 1))
        os.kill(server.pid, signal.SIGSTOP)
        begun = time.monotonic()
        try:
            assert agent(Add(f"of {number}", 1)) == 1
        finally:
            os.kill(server.pid, signal.SIGCONT)
        gaps.append(time.monotonic() - begun)
    assert min(gaps) < FIRST_ATTEMPT, "one of the members may lead the others, which takes longer"


def test_waits_outlive_each_member_in_turn(trio: Trio, agents: Callable[..., Agent]) -> None:
    agent = agents(trio.endpoints)
    waiting = agent.connect()
    for index in range(3):
        waiting.submit(Wait((f"k{index}",)), index)
        waiting.flush()
        assert agent(Get(("x",))) == [b""]
        trio.servers[index].kill()
        agent(Set(((f"k{index}", b"1"),)))
        assert wait_answer(waiting, DEADLINE) == [(index, True)]
        trio.launch(index)
        trio.servers[index].wait_ready(DEADLINE)


def test_a_bridge_returns_to_its_own_member(trio: Trio, agents: Callable[..., Agent]) -> None:
    agent = agents(trio.endpoints, preferred=trio.servers[1].get_endpoint())
    assert agent(Add("n", 1)) == 1
    wait_until(lambda: 1 in trio.used(agent.bridge))  # and another one if an answer has taken long
    waiting = agent.connect()
    waiting.submit(Wait(("k",)), 0)
    waiting.flush()
    trio.servers[1].kill()
    assert agent(Add("n", 1)) == 2
    wait_until(lambda: 1 not in trio.used(agent.bridge))
    trio.launch(1)
    trio.servers[1].wait_ready(DEADLINE)
    wait_until(lambda: 1 in trio.used(agent.bridge))
    assert agent(Add("n", 1)) == 3
    agent(Set((("k", b"1"),)))
    assert wait_answer(waiting, DEADLINE) == [(0, True)]


def why_lost(agent: Agent) -> str:
    """The message of a bridge that loses its cluster while it serves a request."""
    with pytest.raises(RendezvousConnectionError):
        agent(Add("n", 1))
    return why(agent)


@contextlib.contextmanager
def cutting_off(port: int) -> Iterator[None]:
    """A block in which whoever connects to a port of this host is cut off at once."""
    with socket.create_server(("127.0.0.1", port)) as server:
        server.settimeout(DEADLINE)

        def cut() -> None:
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].close()

        thread = threading.Thread(target=cut)
        thread.start()
        try:
            yield
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_a_cluster_that_is_lost_is_an_error(agents: Callable[..., Agent]) -> None:
    server = EtcdServer()
    port = free_port(2)  # it is used again
    server.launch(port, port + 1, stderr=subprocess.DEVNULL)
    try:
        server.wait_ready(DEADLINE)
        endpoint = server.get_endpoint()
        agent = agents(endpoint, read_timeout="5")
        other = agents(endpoint, read_timeout="5", timeout_setting="store_timeout")
        agent(Add("n", 1))
        other(Add("n", 1))
        server.kill()
        with cutting_off(port):
            text = why_lost(other)
        assert text.startswith(f"etcd at {endpoint} has not answered for 5 s (store_timeout of --rdzv-conf): ")
        assert "TLS" not in text
        assert "https" not in text
        text = why_lost(agent)
        assert text.startswith(f"etcd at {endpoint} has not answered for 5 s (read_timeout of --rdzv-conf): ")
    finally:
        server.stop()


# --- TLS, users ---


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, another-ca.pem; server.pem, client.pem with their .key files."""
    return make_certificates(tmp_path_factory.mktemp("tls"), "127.0.0.1")


@pytest.fixture(scope="module")
def secured(certificates: Path) -> Iterator[str]:
    """The endpoint of an etcd that requires certificates."""
    server = EtcdServer()
    port = free_port(3)
    peer_port, health_port = port + 1, port + 2
    url = f"https://127.0.0.1:{port}"
    options = [
        *("--listen-client-urls", url, "--advertise-client-urls", url, "--client-cert-auth"),
        *("--cert-file", str(certificates / "server.pem"), "--key-file", str(certificates / "server.key")),
        *("--trusted-ca-file", str(certificates / "ca.pem")),
        *("--listen-metrics-urls", f"http://127.0.0.1:{health_port}"),
    ]
    with shared_by_tests():
        server.launch(port, peer_port, options, subprocess.DEVNULL)
        server.wait_ready(DEADLINE, health_port)
    yield server.get_endpoint()
    server.stop()


@pytest.mark.xdist_group("etcd-tls")
def test_tls_with_a_client_certificate(secured: str, certificates: Path, agents: Callable[..., Agent]) -> None:
    path = {name: str(certificates / name) for name in ("ca.pem", "client.pem", "client.key")}
    ca, cert, key = path["ca.pem"], path["client.pem"], path["client.key"]
    assert agents(secured, protocol="https", cacert=ca, cert=cert, key=key)(Add("n", 1)) == 1
    assert agents(secured, ca_cert=ca, ssl_cert=cert, ssl_cert_key=key)(Add("n", 1)) == 1


@pytest.mark.xdist_group("etcd-tls")
def test_dry_run_asks_over_tls(secured: str, certificates: Path) -> None:
    def told(conf: dict[str, str]) -> str:
        try:
            return str(store_checks.store(EtcdBackend(secured, "j", conf, {}), 600))
        except RendezvousConnectionError as error:
            return f"error: {error}"

    files = {name: str(certificates / file) for name, file in (("cert", "client.pem"), ("key", "client.key"))}
    conf = {"cacert": str(certificates / "ca.pem"), **files}
    wait_until(lambda: f"{secured} is healthy (etcd " in told(conf))  # it is asked once, and has a second to answer
    wrong = {**conf, "cacert": str(certificates / "another-ca.pem")}
    wait_until(lambda: re.search("error: .*certificate", told(wrong)))
    with pytest.raises(RendezvousConnectionError, match="cannot use cacert, cert and key of --rdzv-conf"):
        store_checks.store(EtcdBackend(secured, "j", {**conf, "key": str(certificates / "ca.key")}, {}), 600)


@pytest.mark.xdist_group("etcd-tls")
def test_wrong_tls_settings_are_explained(secured: str, certificates: Path, agents: Callable[..., Agent]) -> None:
    path = {name: str(certificates / name) for name in ("ca.pem", "another-ca.pem", "client.pem", "client.key")}
    client = {"cert": path["client.pem"], "key": path["client.key"]}
    text = why(agents(secured, cacert=path["another-ca.pem"], **client))
    assert f"etcd at {secured} cannot be used: its certificate is not signed by the authority in cacert" in text
    text = why(agents(secured, cacert=path["ca.pem"], read_timeout=LONG_ENOUGH))
    assert secured in text
    assert "cert and key of --rdzv-conf" in text
    text = why(agents(secured, read_timeout=LONG_ENOUGH))
    assert f"etcd at {secured} cannot be reached" in text
    assert "it may need protocol=https in --rdzv-conf" in text


@pytest.fixture(scope="module")
def guarded(certificates: Path) -> Iterator[str]:
    """The endpoint of an etcd with users: root (password "secret"), ann ("pa,ss", reads and writes /elastic/).

    It serves TLS on the next port but one.
    """
    server = EtcdServer()
    port = free_port(3)
    urls = f"http://127.0.0.1:{port},https://127.0.0.1:{port + 2}"
    options = ["--auth-token-ttl", "1", "--listen-client-urls", urls, "--advertise-client-urls", urls]
    options += ["--cert-file", str(certificates / "server.pem"), "--key-file", str(certificates / "server.key")]
    with shared_by_tests():
        server.launch(port, port + 1, options, subprocess.DEVNULL)
        server.wait_ready(DEADLINE)
    endpoint = server.get_endpoint()
    for user, password, role in (("root", "secret", "root"), ("ann", "pa,ss", "jobs")):
        post(endpoint, "auth/user/add", name=user, password=password)
        post(endpoint, "auth/role/add", name=role)
        post(endpoint, "auth/user/grant", user=user, role=role)
    permission = {"permType": "READWRITE", "key": "L2VsYXN0aWMv", "range_end": "L2VsYXN0aWMw"}
    post(endpoint, "auth/role/grant", name="jobs", perm=permission)
    post(endpoint, "auth/enable")
    yield endpoint
    server.stop()


@pytest.mark.xdist_group("etcd-users")
def test_user_and_password(guarded: str, agents: Callable[..., Agent]) -> None:
    prefix = new_prefix()
    agent = agents(guarded, prefix, user="ann", password="pa,ss", protocol="http")
    assert agent(Add("n", 1)) == 1
    assert agents(guarded, prefix, username="ann", password="pa,ss", protocol="http")(Add("n", 1)) == 2
    waiting = agent.connect()
    waiting.submit(Wait(("k",)), 0)
    waiting.flush()
    # A token expires when it is not used for a second.
    token = post(guarded, "auth/authenticate", name="ann", password="pa,ss")["token"]
    time_of_use = time.monotonic()

    def expired() -> bool:
        nonlocal time_of_use
        if time.monotonic() < time_of_use + 2.2:
            return False
        time_of_use = time.monotonic()
        return "error" in post(guarded, "kv/range", token, key=b"/elastic/x")

    wait_until(expired)
    late = agent.connect()
    late.submit(Wait(("k2",)), 0)
    late.flush()
    assert agent(Add("n", 1)) == 3
    agent(Set((("k", b"1"), ("k2", b"1"))))
    assert wait_answer(waiting, DEADLINE) == wait_answer(late, DEADLINE) == [(0, True)]


@pytest.mark.xdist_group("etcd-users")
def test_denied_access_is_explained(guarded: str, agents: Callable[..., Agent]) -> None:
    text = why(agents(guarded, user="ann", password="wrong", protocol="http"))
    assert f"etcd at {guarded} does not accept user=ann with this password" in text
    text = why(agents(guarded))
    assert f"etcd at {guarded} requires a user: pass user=NAME,password_file=FILE in --rdzv-conf" in text
    text = why(agents(guarded, "/elsewhere/", user="ann", password="pa,ss", protocol="http"))
    assert "denies user=ann access to the job's keys" in text


@pytest.mark.xdist_group("etcd-users")
def test_a_user_whose_password_is_in_a_file_over_tls_with_a_large_bundle(
    guarded: str, certificates: Path, tmp_path: Path, agents: Callable[..., Agent]
) -> None:
    """Such as the bundle of all public authorities, which has 220 KB and comments."""
    host, _, port = guarded.rpartition(":")
    bundle, secret = tmp_path / "bundle.pem", tmp_path / "password"
    bundle.write_text("# comment\n" * 30_000 + (certificates / "ca.pem").read_text())
    secret.write_text("pa,ss\n")
    secret.chmod(0o600)
    agent = agents(f"{host}:{int(port) + 2}", cacert=str(bundle), user="ann", password_file=str(secret))
    assert agent(Add("n", 1)) == 1
    seen = (
        Path(f"/proc/{agent.bridge.pid}/cmdline").read_bytes() + Path(f"/proc/{agent.bridge.pid}/environ").read_bytes()
    )
    assert b"pa,ss" not in seen


def test_user_and_password_that_etcd_does_not_require(etcd: str, agents: Callable[..., Agent]) -> None:
    assert agents(etcd, user="ann", password="pass", protocol="http")(Add("n", 1)) == 1


def test_an_answer_has_a_bound(agents: Callable[..., Agent]) -> None:
    """Whoever can write to the cluster cannot exhaust the agents' memory."""
    server = EtcdServer()
    server.start(stderr=subprocess.DEVNULL)
    try:
        agent = agents(server.get_endpoint())
        agent(Append("list", b"x"))
        assert agent(Get(("list",))) == [b"x"]
        prefix = agent.prefix.encode()
        kvs = post(server.get_endpoint(), "kv/range", key=prefix, range_end=prefix[:-1] + b"0")["kvs"]
        (marker,) = [value for kv in kvs if (value := base64.b64decode(kv["value"])).startswith(b"\0*")]
        for number in range(19):
            key = prefix + b"\0piece/%s/%d" % (marker[2:], number)
            post(server.get_endpoint(), "kv/put", key=key, value=b"x" * 1_400_000)
        with pytest.raises(RendezvousConnectionError):
            agent(Get(("list",)))
        assert "answers with more than was asked for" in why(agent)
    finally:
        server.stop()


NOT_ETCD = """
import sys, grpc
from concurrent.futures import ThreadPoolExecutor
class Handler(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(lambda request, context: bytes(100_000))
server = grpc.server(ThreadPoolExecutor(1))
server.add_generic_rpc_handlers((Handler(),))
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
sys.stdin.read()
"""


def test_an_answer_of_a_few_numbers_has_a_bound_of_its_own(agents: Callable[..., Agent]) -> None:
    command = (sys.executable, "-c", NOT_ETCD)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            text = why(agents(f"127.0.0.1:{int(server.stdout.readline())}"))
            assert "answers with more than was asked for" in text
            assert "100000 vs. 65536" in text
        finally:
            server.kill()


# --- wrong endpoints ---


def test_a_closed_port(agents: Callable[..., Agent]) -> None:
    port = free_port()
    text = why(agents(f"127.0.0.1:{port}", read_timeout="0.5"))
    assert text.startswith(f"etcd at 127.0.0.1:{port} cannot be reached within 0.5 s (read_timeout of --rdzv-conf): ")
    assert "refused" in text


def test_an_http_server(agents: Callable[..., Agent]) -> None:
    class Quiet(http.server.BaseHTTPRequestHandler):
        timeout = 1

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as server:
        endpoint = f"127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            text = why(agents(endpoint, read_timeout=LONG_ENOUGH))
        finally:
            server.shutdown()
            thread.join()
    assert endpoint in text
    assert "cannot be used: it is not etcd; perhaps another HTTP server" in text


def test_an_etcd_without_tls(etcd: str, agents: Callable[..., Agent]) -> None:
    text = why(agents(etcd, protocol="https", read_timeout=LONG_ENOUGH))
    assert f"etcd at {etcd} cannot be reached within {LONG_ENOUGH} s" in text
    assert "no TLS connection: check protocol" in text


def test_a_silent_server_beside_one_that_works(etcd: str, agents: Callable[..., Agent]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        assert agents(f"{endpoint},{etcd}")(Add("n", 1)) == 1
        assert f"etcd at {endpoint} cannot be reached within 0.3 s" in why(agents(endpoint, read_timeout="0.3"))


@pytest.mark.parametrize(
    ("endpoints", "conf", "message"),
    [
        ("a:1", {"cacert": "/no/such/file"}, "cacert=/no/such/file: No such file"),
        ("a:1", {"cacert": ""}, "cacert=: must name a file"),
        ("a:1", {"cacert": "/dev/null"}, "cacert=/dev/null: the file is empty"),
        ("a:1", {"ca_cert": "/dev/null"}, "cacert=/dev/null: the file is empty"),
        ("a:1", {"cert": "/dev/null", "key": "/dev/null"}, "cert=/dev/null: the file is empty"),
        ("a:1", {"cacert": "/dev/zero"}, "cacert=/dev/zero: longer than 8 MiB"),
        ("a:1", {"cacert": "/"}, "cacert=/: Is a directory"),
        ("a:1", {"cacert": os.__file__}, f"cacert={os.__file__}: holds no certificate in PEM"),
        ("a:1", {"cert": "PEM", "key": "PEM"}, "key=.*/PEM: holds no private key in PEM"),
        ("a:1", {"cert": "PEM"}, "one of cert and key"),
        ("a:1", {"protocol": "http", "cacert": "PEM"}, "protocol=http and cacert, which needs https"),
        ("a:1", {"protocol": "ftp"}, "protocol=ftp: must be http or https"),
        ("a:1", {"user": "ann"}, "one of user and password"),
        ("a:1", {"user": "ann", "password": "x"}, "without TLS the password could be read .* pass protocol=https"),
        ("a:1", {"user": "ann", "password_file": "PEM", "protocol": "http"}, "password_file=.*/PEM: other users may"),
        ("a:1", {"user": "ann", "password_file": "/no/such", "protocol": "http"}, "password_file=/no/such: No such"),
        ("a:1", {"user": "ann", "password_file": "/dev/null", "protocol": "http"}, "null: not a regular file"),
        ("a:1", {"user": "ann", "password_file": "/", "protocol": "http"}, "password_file=/: Is a directory"),
        ("a:1", {"user": "a", "password_file": "/x", "password": "x", "protocol": "http"}, "both password and"),
        ("a:1", {"read_timeout": "soon"}, "read_timeout='soon': must be a number"),
        (" , ", {}, "no endpoint"),
    ],
)
def test_wrong_settings(endpoints: str, conf: dict[str, str], message: str, tmp_path: Path) -> None:
    """PEM stands for a file of certificates, which others may read."""
    file = tmp_path / "PEM"
    file.write_text("-----BEGIN CERTIFICATE-----\n")
    file.chmod(0o644)
    with pytest.raises(UsageError, match=message):
        EtcdBridge(endpoints, "/x/", {name: text.replace("PEM", str(file)) for name, text in conf.items()}, {})
