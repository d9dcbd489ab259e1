"""The process that serves the c10d store: how it starts, fails and ends, and what it does if DNS does not answer."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil
import pytest

from elastic_launch.core.store_requests import Add, Get
from elastic_launch.errors import RendezvousConnectionError, UnavailableError
from elastic_launch.host.ports import listen
from elastic_launch.store import wire
from elastic_launch.store.client import connect
from elastic_launch.store.tcpstore_server import TCPStoreServer
from elastic_launch.store.tcpstore_server_main import _receive_sockets
from tests.support.waiting import DEADLINE, SOON, is_alive, wait_until


def wait_for(host: TCPStoreServer) -> bool:
    """Wait for the first report of the process."""
    assert select.select([host], [], [], DEADLINE)[0]
    return host.take()


@contextlib.contextmanager
def hosting(**env: str) -> Iterator[TCPStoreServer]:
    with contextlib.closing(TCPStoreServer(listen(0), {**os.environ, **env})) as host:
        yield host


def test_endpoint_is_bound_once() -> None:
    with listen(0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(OSError, match="in use") as caught:
            listen(port)
        assert caught.value.errno == errno.EADDRINUSE


def test_endpoint_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "AF_INET6", 9999)
    with listen(0) as listening:
        assert listening.family == socket.AF_INET


def test_life_of_the_process(capfd: pytest.CaptureFixture[str]) -> None:
    """One test, because each process takes half a second to start."""
    listening = listen(0)
    port = listening.getsockname()[1]
    with contextlib.ExitStack() as stack:
        early = [
            stack.enter_context(contextlib.closing(connect((address, port), family, "store")))
            for address, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6))
        ]
        host = stack.enter_context(contextlib.closing(TCPStoreServer(listening, os.environ)))
        assert listening.fileno() == -1
        assert not host.ready
        assert host.take() == host.ready, "it does not wait"
        # Clients that connected before the store are served.
        assert [client.call(Add("n", 1), DEADLINE) for client in early] == [1, 2]
        assert wait_for(host)
        assert (host.ready, host.take()) == (True, True)
        libraries = {Path(file.path).name for file in psutil.Process(host.pid).memory_maps()}
        assert "libtorch_python.so" in libraries
        assert not any("multiarray" in name for name in libraries), "torch's Python code would have imported numpy"

        # Signals to the job's other processes do not end it.
        assert os.getsid(host.pid) == host.pid
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(host.pid, signum)
        soft, hard = psutil.Process(host.pid).rlimit(psutil.RLIMIT_NOFILE)
        assert soft == hard

        # Additional stores are empty, and replace each other.
        ports: list[int] = []
        for _ in range(2):
            further = listen(0)
            ports.append(further.getsockname()[1])
            host.serve(further)
            with contextlib.closing(connect(("127.0.0.1", ports[-1]), socket.AF_INET, "store")) as client:
                assert client.call(Add("n", 1), DEADLINE) == 1
        with socket.socket() as sock:
            assert sock.connect_ex(("127.0.0.1", ports[0])) == errno.ECONNREFUSED

        # A bad client is refused, without a page of errors on the terminal.
        with socket.create_connection(("127.0.0.1", port)) as bad:
            bad.sendall(wire.pack_handshake(b"1234") + wire.pack(wire.Op.SET, b"k" * 9000, b"x"))
            with contextlib.suppress(ConnectionError):
                while bad.recv(100):
                    pass
        assert early[0].call(Add("n", 1), DEADLINE) == 3
        assert capfd.readouterr() == ("", "")

        os.kill(host.pid, signal.SIGKILL)
        with pytest.raises(RendezvousConnectionError, match=rf"port {port} is gone \(killed by SIGKILL\)"):
            wait_for(host)
        with pytest.raises(RendezvousConnectionError, match="connection lost"):
            early[0].call(Get(("n",)), DEADLINE)
        late = stack.enter_context(contextlib.closing(connect(("127.0.0.1", port), socket.AF_INET, "store")))
        with pytest.raises(RendezvousConnectionError, match="refused"):
            late.call(Get(("n",)), DEADLINE)


def test_a_socket_for_which_there_is_no_descriptor_leaves_the_process_watching_its_agent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process may have as many clients as descriptors. Then a message comes without the socket that it brings."""

    class EndedError(Exception):
        pass

    def end(status: int) -> None:
        raise EndedError

    monkeypatch.setattr(os, "_exit", end)
    sockets: SimpleQueue[socket.socket] = SimpleQueue()
    agents, own = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with own, listen(0) as further, open(os.pidfd_open(os.getpid()), "rb") as agent:
        with agents:
            agents.send(b"+")
            socket.send_fds(agents, [b"+"], [further.fileno()])
        with pytest.raises(EndedError):
            _receive_sockets(own, agent.fileno(), sockets)
        with sockets.get_nowait() as received:
            assert received.getsockname() == further.getsockname()
    assert sockets.empty()


def test_close_ends_the_process_at_once() -> None:
    with hosting() as host:
        before = time.monotonic()
        host.close()
        assert time.monotonic() - before < SOON
        assert not psutil.pid_exists(host.pid)


AGENT = """
import os, select, sys
from elastic_launch.host.ports import listen
from elastic_launch.store.tcpstore_server import TCPStoreServer
from elastic_launch.store.tcpstore_server_main import _receive_sockets
host = TCPStoreServer(listen(0), os.environ)
if sys.argv[1] == "ready":
    select.select([host], [], [])
    assert host.take()
child = os.fork()  # a program that forks keeps the socket open
if child == 0:
    sys.stdin.read()
    os._exit(0)
print(host.pid, child, flush=True)
select.select([], [], [])
"""


@pytest.mark.parametrize("when", ["early", "ready"])
def test_process_ends_with_its_agent(when: str) -> None:
    command = [sys.executable, "-c", AGENT, when]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout
        host, child = map(int, agent.stdout.readline().split())
        assert is_alive(host)
        agent.kill()
        wait_until(lambda: not is_alive(host), "the end of the store's process")
        assert is_alive(child)
    wait_until(lambda: not is_alive(child), "the end of the child, whose input has ended")


@pytest.mark.parametrize(
    ("torch", "message"),
    [
        (
            "raise ModuleNotFoundError(\"No module named 'torch'\")",
            r"needs torch 2\.5 or later, .*'torch'\); install torch",
        ),
        ("__version__ = '2.4.1+cpu'", r"torch 2\.4\.1\+cpu is too old\); install torch, or use --rdzv-backend etcd"),
        ("__version__ = '2.5.0a0+git1'", r"could not start it \(exit code 1\): RuntimeError: no socket$"),
        (
            "import os; os.write(2, b'one\\nterminate called\\n'); os.abort()",
            r"\(killed by SIGABRT\): terminate called$",
        ),
        ("import os; os._exit(3)", r"could not start it \(exit code 3\)$"),
    ],
    ids=["missing", "too old", "error", "abort", "silent"],
)
def test_torch_that_cannot_serve(tmp_path: Path, torch: str, message: str) -> None:
    (tmp_path / "torch" / "distributed").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text(torch)
    (tmp_path / "torch" / "distributed" / "__init__.py").write_text(
        "def TCPStore(*_, **__): raise RuntimeError('no socket\\nframe #0: page of C++')"
    )
    with hosting(PYTHONPATH=str(tmp_path)) as host:
        for _ in range(2):
            with pytest.raises(RendezvousConnectionError, match=message):
                wait_for(host)


def test_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(UnavailableError, match=r"cannot start the process that serves the store: .*No such file"):
        TCPStoreServer(listen(0), os.environ)


FAILING_DNS = """
import contextlib, json, os, resource, select, socket, sys, threading, time
from elastic_launch.core.store_requests import Add
from elastic_launch.host.ports import listen
from elastic_launch.store import tcpstore_server
from elastic_launch.store.client import connect

_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
questions = []

def name_server(sock, loses_every_other):
    while True:
        data, client = sock.recvfrom(1000)
        questions.append(data[12:23].decode("latin-1"))
        if loses_every_other and len(questions) % 2 == 0:
            sock.sendto(data[:2] + bytes([0x81, 0x83]) + data[4:], client)  # no such name

sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("127.0.0.1", 53))
as_torch_does_it = sys.argv[1] == "as torch does it"
threading.Thread(target=name_server, args=(sock, as_torch_does_it), daemon=True).start()
if as_torch_does_it:
    tcpstore_server._environment = dict
with contextlib.ExitStack() as stack:
    server = stack.enter_context(contextlib.closing(tcpstore_server.TCPStoreServer(listen(0), os.environ)))
    select.select([server], [], [], 60)
    start = time.monotonic()
    clients = [
        stack.enter_context(contextlib.closing(connect(("10.99.0.1", server.port), socket.AF_INET, "store")))
        for _ in range(int(sys.argv[2]))
    ]
    for client in clients:
        client.submit(Add("n", 1))
        client.flush()
    sums = [client.call(Add("n", 0), 60) for client in clients]
    seconds = time.monotonic() - start
print(json.dumps({"answered": len(sums), "seconds": seconds, "questions": questions}))
"""
WORLD = """
set -e
ip link set lo up
ip address add 10.99.0.1/32 dev lo
mount --bind "$1/resolv.conf" /etc/resolv.conf
mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf
exec "$2" -c "$3" "$4" "$5"
"""
"""Makes a network namespace with one address that no hosts file lists."""


def where_dns_fails(tmp_path: Path, how: str, clients: int) -> dict[str, Any]:
    """Connect clients to a host whose name server fails. Needs the permission to create namespaces."""
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    (tmp_path / "nsswitch.conf").write_text("hosts: files dns\n")
    command = ["unshare", "--net", "--mount", "sh", "-c", WORLD, "sh", str(tmp_path), sys.executable, FAILING_DNS, how]
    run = subprocess.run(
        [*command, str(clients)],
        env={**os.environ, "RES_OPTIONS": "timeout:1 attempts:5"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (run.returncode, run.stderr) == (0, "")
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def test_thousand_clients_without_answers_from_dns(tmp_path: Path) -> None:
    result = where_dns_fails(tmp_path, "as we do it", 1000)
    assert result["answered"] == 1000
    assert result["seconds"] < SOON
    assert result["questions"] == []  # no name server was asked


def test_lost_dns_answers_would_block_the_server_of_torch(tmp_path: Path) -> None:
    """The problem that the test above covers: for each client the whole server waits until it asks DNS again.

    If a name server never answers, torch 2.13 stops asking after the first client.
    """
    result = where_dns_fails(tmp_path, "as torch does it", 3)
    assert result["answered"] == 3
    assert result["seconds"] > 2
    assert result["questions"].count("\x011\x010\x0299\x0210\x07") >= 4  # 1.0.99.10.in-addr.arpa
