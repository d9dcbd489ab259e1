"""The health server: real requests to the real process, and agents that hang, are stopped, or die."""

from __future__ import annotations

import fcntl
import http.client
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from elastic_launch.agent.loop import LoopSource
from elastic_launch.errors import UnavailableError
from elastic_launch.health import server as health
from elastic_launch.health.server import HealthServer
from elastic_launch.health.server_main import MAX_CLIENTS
from elastic_launch.host import child
from tests.support.leaks import children, wait_for_children
from tests.support.waiting import DEADLINE, is_alive, wait_until

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def serving(monkeypatch: pytest.MonkeyPatch, **patience: float) -> Iterator[HealthServer]:
    """A server with another patience, in seconds."""
    settings = "; ".join(f"server_main.{name} = {seconds}" for name, seconds in patience.items())
    setting = f"from elastic_launch.health import server_main; {settings}; "
    program = child._PROGRAM.replace("child_main.run(", f"{setting}child_main.run(")
    monkeypatch.setattr(child, "_PROGRAM", program)
    server = HealthServer(0, os.environ)
    yield server
    server.close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HealthServer]:
    """A server for which a busy machine is not too slow."""
    yield from serving(monkeypatch, AGENT_PATIENCE=DEADLINE, REQUEST_PATIENCE=DEADLINE, CLOSE_PATIENCE=DEADLINE)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[HealthServer]:
    yield from serving(monkeypatch, AGENT_PATIENCE=0.2)


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[HealthServer]:
    yield from serving(monkeypatch, REQUEST_PATIENCE=1)


def connect(server: HealthServer, host: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((host, server.port), timeout=DEADLINE)


def ask(server: HealthServer, request: bytes = GET) -> socket.socket:
    sock = connect(server)
    sock.sendall(request)
    return sock


def response(sock: socket.socket) -> bytes:
    """Everything that the server sends before it closes the connection."""
    with sock, sock.makefile("rb") as file:
        return file.read()


def turn(server: HealthServer) -> None:
    """Do what the agent's loop does, once."""
    assert asks(server), "the server does not ask"
    server.take([fd for fd, _ in server.descriptors()])


def asks(server: HealthServer, seconds: float = DEADLINE) -> bool:
    """Whether the server's process asks the agent something within some seconds."""
    return any(is_readable(fd, seconds) for fd, _ in server.descriptors())


def is_readable(source: socket.socket | int, seconds: float) -> bool:
    poller = select.poll()
    poller.register(source, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def answered(server: HealthServer, sock: socket.socket) -> bytes:
    """The response to a request, while the agent answers each question."""
    ((fd, mask),) = server.descriptors()
    poller = select.poll()
    poller.register(fd, mask)
    poller.register(sock, select.POLLIN)
    while sock.fileno() not in [fd for fd, _ in poller.poll(DEADLINE * 1000)]:
        server.take([fd])
    return response(sock)


def only_child() -> psutil.Process:
    (child,) = children()
    return child


def test_agent_whose_loop_runs_is_healthy(server: HealthServer) -> None:
    sock = ask(server)
    turn(server)
    head, _, body = response(sock).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Connection: close" in head
    assert body == b'{"status": "healthy"}\n'
    assert only_child().name() == "elastic-health"


def test_is_a_source_of_the_agents_loop(server: HealthServer) -> None:
    source: LoopSource = server
    assert source.deadline() is None
    assert source.take([]) == []
    sock = ask(server)
    ((fd, mask),) = source.descriptors()
    poller = select.poll()
    poller.register(fd, mask)
    assert poller.poll(DEADLINE * 1000)
    assert source.take([fd]) == []
    assert response(sock).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET /any/path?x=1 HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.0\n\n",
        b"GET / HTTP/1.1\r\n\r\nand a body that nobody asked for" * 500,
    ],
)
def test_requests_of_all_kinds_of_probes_are_understood(server: HealthServer, request_: bytes) -> None:
    sock = ask(server, request_)
    turn(server)
    assert response(sock).startswith(b"HTTP/1.1 200 ")


def test_serves_http_clients_over_ipv4_and_ipv6(server: HealthServer) -> None:
    hosts = ["127.0.0.1"] + (["::1"] if socket.has_dualstack_ipv6() else [])
    for host in hosts:
        for method, body in (("GET", b'{"status": "healthy"}\n'), ("HEAD", b"")):
            client = http.client.HTTPConnection(host, server.port, timeout=DEADLINE)
            client.request(method, "/health")
            turn(server)
            answer = client.getresponse()
            assert (answer.status, answer.read()) == (200, body)
            assert answer.headers["Content-Length"] == str(len('{"status": "healthy"}\n'))
            client.close()


def test_request_in_pieces_from_a_client_that_closes_its_end(server: HealthServer) -> None:
    sock = connect(server)
    for i in range(len(GET)):
        sock.sendall(GET[i : i + 1])
    sock.shutdown(socket.SHUT_WR)
    turn(server)
    assert response(sock).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\x16\x03\x01garbage\n\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\n\r\n", 405),
        (b"x" * 100_000, 431),
    ],
)
def test_bad_requests_are_refused_without_asking_the_agent(server: HealthServer, request_: bytes, status: int) -> None:
    assert response(ask(server, request_)).startswith(b"HTTP/1.1 %d " % status)
    assert not asks(server, 0)


def test_agent_whose_loop_hangs_is_unhealthy_until_it_continues(impatient: HealthServer) -> None:
    first = ask(impatient)
    assert asks(impatient)
    second = ask(impatient)
    for sock in (first, second):
        head, _, body = response(sock).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert body == b'{"status": "the launcher does not answer"}\n'
    wait_until(lambda: answered(impatient, ask(impatient)).startswith(b"HTTP/1.1 200 "))
    assert response(ask(impatient)).startswith(b"HTTP/1.1 503 ")  # earlier replies do not count any more
    wait_until(lambda: answered(impatient, ask(impatient)).startswith(b"HTTP/1.1 200 "))


def test_one_reply_serves_all_waiting_clients(server: HealthServer) -> None:
    first = ask(server)
    assert asks(server)
    # The server accepts connections in their order, so when it answers the last, it has read the others.
    others = [ask(server) for _ in range(50)]
    assert response(ask(server, b"no\n\n")).startswith(b"HTTP/1.1 400 ")
    assert server._child
    assert server._child.control.recv(64, socket.MSG_PEEK) == b"?"
    turn(server)
    for sock in (first, *others):
        assert response(sock).startswith(b"HTTP/1.1 200 ")
    assert not asks(server, 0)


def test_silent_clients_do_not_block_others(server: HealthServer) -> None:
    silent = [connect(server) for _ in range(MAX_CLIENTS + 20)]
    sock = ask(server)
    turn(server)
    assert response(sock).startswith(b"HTTP/1.1 200 ")
    for gone in silent[:20]:
        assert response(gone) == b""
    for still_there in silent[21:]:
        assert not is_readable(still_there, 0)
        still_there.close()
    silent[20].close()


def test_clients_that_never_complete_a_request_are_dropped(strict: HealthServer) -> None:
    mute, slow = connect(strict), connect(strict)
    slow.sendall(b"GET / HTT")
    assert response(ask(strict, b"no\n\n")).startswith(b"HTTP/1.1 400 ")
    for sock in (mute, slow):
        assert response(sock) == b""  # when their time is over


def test_clients_that_have_asked_are_not_replaced(server: HealthServer) -> None:
    asked = [ask(server) for _ in range(10)]
    silent = [connect(server) for _ in range(MAX_CLIENTS + 10)]
    assert response(ask(server, b"no\n\n")).startswith(b"HTTP/1.1 400 ")
    turn(server)
    for sock in asked:
        assert response(sock).startswith(b"HTTP/1.1 200 ")
    for sock in silent:
        sock.close()


def test_client_that_disconnects_while_it_waits_does_no_harm(server: HealthServer) -> None:
    sock = ask(server)
    assert asks(server)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close with a reset
    sock.close()
    process = only_child()
    wait_until(lambda: not [c for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED])
    server.take([fd for fd, _ in server.descriptors()])
    again = ask(server)
    turn(server)
    assert response(again).startswith(b"HTTP/1.1 200 ")


def test_port_in_use_is_an_error_that_names_it(server: HealthServer) -> None:
    with pytest.raises(UnavailableError, match=rf"TORCHELASTIC_HEALTH_CHECK_PORT={server.port}: .* is in use"):
        HealthServer(server.port, os.environ)


def test_process_that_cannot_be_started_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with pytest.raises(UnavailableError, match="cannot start the process that serves TORCHELASTIC_HEALTH_CHECK_PORT"):
        HealthServer(0, os.environ)


def test_process_that_is_killed_is_started_again(server: HealthServer) -> None:
    only_child().kill()
    turn(server)
    sock = ask(server)
    turn(server)
    assert response(sock).startswith(b"HTTP/1.1 200 ")


def test_process_that_keeps_dying_is_given_up(server: HealthServer) -> None:
    for _ in range(health.MAX_SHORT_LIVES):
        only_child().kill()
        turn(server)
    assert children() == []
    assert server.descriptors() == []
    with pytest.raises(ConnectionRefusedError):
        connect(server)


def test_long_lives_are_not_counted(server: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "SHORT_LIFE", 0.0)
    for _ in range(health.MAX_SHORT_LIVES + 1):
        only_child().kill()
        turn(server)
    assert is_alive(only_child().pid)


def test_close_ends_a_process_that_is_stopped() -> None:
    server = HealthServer(0, os.environ)
    process = only_child()
    process.suspend()
    server.close()
    assert not is_alive(process.pid)


def test_ignores_signals_to_all_processes_of_a_job(server: HealthServer) -> None:
    process = only_child()
    assert os.getsid(process.pid) == os.getpgid(process.pid) == process.pid
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        process.send_signal(signum)
    sock = ask(server)
    turn(server)
    assert response(sock).startswith(b"HTTP/1.1 200 ")
    assert only_child() == process


def test_inherits_nothing_of_the_surrounding_program(server: HealthServer) -> None:
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    second = HealthServer(0, os.environ)
    os.close(writing)
    wait_until(lambda: select.select([reading], [], [], 0)[0], "the end of the pipe: a process holds its other end")
    assert os.read(reading, 1) == b""
    os.close(reading)
    second.close()
    sock = ask(server)
    turn(server)
    assert response(sock).startswith(b"HTTP/1.1 200 ")


@pytest.mark.usefixtures("server")  # for its patience
def test_starts_although_a_descriptor_is_above_the_limit() -> None:
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    high = fcntl.fcntl(0, fcntl.F_DUPFD, 200)  # inheritable, as the shell's own may be
    resource.setrlimit(resource.RLIMIT_NOFILE, (high, most))
    try:
        second = HealthServer(0, os.environ)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
        os.close(high)
    sock = ask(second)
    turn(second)
    assert response(sock).startswith(b"HTTP/1.1 200 ")
    second.close()


AGENT = """
import os, select, signal
from elastic_launch.health.server import HealthServer
server = HealthServer(0, os.environ)
reading, writing = os.pipe()
if (copy := os.fork()) == 0:  # as a surrounding program may do: the copy has all descriptors of the agent
    server._listening.close()
    os.write(writing, b"closed")
    signal.pause()
os.read(reading, 6)
print(server.port, copy, flush=True)
while True:
    ((fd, mask),) = server.descriptors()
    poller = select.poll()
    poller.register(fd, mask)
    poller.poll()
    server.take([fd])
"""


class Agent(NamedTuple):
    process: subprocess.Popen[str]
    port: int
    copy: int
    """The pid of a process that was forked from it."""


@pytest.fixture
def agent() -> Iterator[Agent]:
    """An agent reduced to its loop."""
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", AGENT], stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout
    agent = Agent(process, *map(int, process.stdout.readline().split()))
    yield agent
    process.kill()
    process.wait()
    os.kill(agent.copy, signal.SIGKILL)
    process.stdout.close()
    wait_for_children()


def status(port: int) -> int:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    client.request("GET", "/")
    answer = client.getresponse()
    answer.read()
    client.close()
    return answer.status


def test_stopped_agent_is_unhealthy(agent: Agent) -> None:
    wait_until(lambda: status(agent.port) == 200)
    agent.process.send_signal(signal.SIGSTOP)
    assert status(agent.port) == 503
    agent.process.send_signal(signal.SIGCONT)
    wait_until(lambda: status(agent.port) == 200)


def test_server_ends_with_its_agent(agent: Agent) -> None:
    wait_until(lambda: status(agent.port) == 200)
    (server,) = (child for child in psutil.Process(agent.process.pid).children() if child.pid != agent.copy)
    agent.process.kill()
    wait_until(lambda: not is_alive(server.pid))
    with pytest.raises(ConnectionRefusedError):
        status(agent.port)
