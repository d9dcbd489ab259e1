"""The health server: real requests to the real process, and agents that hang, freeze, die."""

from __future__ import annotations

import http.client
import os
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

from elastic_launch.agent.loop import Source
from elastic_launch.errors import UnavailableError
from elastic_launch.health import server as health
from elastic_launch.health import server_main as health_main
from elastic_launch.health.server import HealthServer
from tests.support.leaks import children
from tests.support.waiting import DEADLINE, is_alive, wait_until

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def server() -> Iterator[HealthServer]:
    server = HealthServer(0, os.environ)
    yield server
    server.close()


def connect(server: HealthServer, host: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((host, server.port), timeout=DEADLINE)


def ask(server: HealthServer, request: bytes = GET) -> socket.socket:
    sock = connect(server)
    sock.sendall(request)
    return sock


def response(sock: socket.socket) -> bytes:
    """All that the server has to say, to the end of the connection."""
    with sock, sock.makefile("rb") as file:
        return file.read()


def turn(server: HealthServer) -> None:
    """What the agent's loop does, once."""
    assert is_readable(server), "the server asks nothing"
    server.answer()


def is_readable(source: socket.socket | HealthServer, seconds: float = DEADLINE) -> bool:
    poller = select.poll()
    poller.register(source, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def answered(server: HealthServer, sock: socket.socket) -> bytes:
    """The response to a request, from an agent whose loop turns as often as it is asked to."""
    poller = select.poll()
    for source in (server, sock):
        poller.register(source, select.POLLIN)
    while sock.fileno() not in [fd for fd, _ in poller.poll(DEADLINE * 1000)]:
        server.answer()
    return response(sock)


def only_child() -> psutil.Process:
    (child,) = children()
    return child


def test_agent_whose_loop_turns_is_healthy(server: HealthServer) -> None:
    sock = ask(server)
    turn(server)
    head, _, body = response(sock).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Connection: close" in head
    assert body == b'{"status": "healthy"}\n'
    assert only_child().name() == "elastic-health"


def test_is_a_source_of_the_agents_loop(server: HealthServer) -> None:
    source: Source = server
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
def test_all_that_probes_send_is_understood(server: HealthServer, request_: bytes) -> None:
    sock = ask(server, request_)
    turn(server)
    assert response(sock).startswith(b"HTTP/1.1 200 ")


def test_answers_the_clients_of_http_and_of_both_families(server: HealthServer) -> None:
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


def test_request_in_pieces_and_a_client_that_closes_its_end(server: HealthServer) -> None:
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
def test_what_is_no_request_is_refused_without_the_agent(server: HealthServer, request_: bytes, status: int) -> None:
    assert response(ask(server, request_)).startswith(b"HTTP/1.1 %d " % status)
    assert not is_readable(server, 0)


def hurried(monkeypatch: pytest.MonkeyPatch, constant: str, seconds: float) -> Iterator[HealthServer]:
    """A server with less patience."""
    start = "health_main.main("
    program = health._PROGRAM.replace(start, f"health_main.{constant} = {seconds}; {start}")
    monkeypatch.setattr(health, "_PROGRAM", program)
    server = HealthServer(0, os.environ)
    yield server
    server.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[HealthServer]:
    yield from hurried(monkeypatch, "ANSWER_PATIENCE", 0.2)


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[HealthServer]:
    yield from hurried(monkeypatch, "REQUEST_PATIENCE", 0.3)


def test_agent_whose_loop_hangs_is_not_healthy_until_it_goes_on(impatient: HealthServer) -> None:
    first = ask(impatient)
    assert is_readable(impatient)
    second = ask(impatient)
    for sock in (first, second):
        head, _, body = response(sock).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert body == b'{"status": "the launcher does not answer"}\n'
    assert answered(impatient, ask(impatient)).startswith(b"HTTP/1.1 200 ")
    assert response(ask(impatient)).startswith(b"HTTP/1.1 503 ")  # what it has answered before counts no more
    assert answered(impatient, ask(impatient)).startswith(b"HTTP/1.1 200 ")


def test_one_answer_serves_all_who_wait_for_it(server: HealthServer) -> None:
    first = ask(server)
    assert is_readable(server)
    # The server takes connections in their order: with the answer to the last, it has the others, too.
    others = [ask(server) for _ in range(50)]
    assert response(ask(server, b"no\n\n")).startswith(b"HTTP/1.1 400 ")
    assert server._sock.recv(64, socket.MSG_PEEK) == b"?"
    turn(server)
    for sock in (first, *others):
        assert response(sock).startswith(b"HTTP/1.1 200 ")
    assert not is_readable(server, 0)


def test_silent_clients_hold_up_nobody(server: HealthServer) -> None:
    silent = [connect(server) for _ in range(health_main.MOST_CLIENTS + 20)]
    sock = ask(server)
    turn(server)
    assert response(sock).startswith(b"HTTP/1.1 200 ")
    for gone in silent[:20]:
        assert response(gone) == b""
    for still_there in silent[21:]:
        assert not is_readable(still_there, 0)
        still_there.close()
    silent[20].close()


def test_clients_that_never_come_to_the_point_are_let_go(strict: HealthServer) -> None:
    mute, slow = connect(strict), connect(strict)
    slow.sendall(b"GET / HTT")
    assert response(ask(strict, b"no\n\n")).startswith(b"HTTP/1.1 400 ")
    for sock in (mute, slow):
        assert response(sock) == b""  # comes when their time is over


def test_those_who_have_asked_keep_their_place(server: HealthServer) -> None:
    asked = [ask(server) for _ in range(10)]
    silent = [connect(server) for _ in range(health_main.MOST_CLIENTS + 10)]
    assert response(ask(server, b"no\n\n")).startswith(b"HTTP/1.1 400 ")
    turn(server)
    for sock in asked:
        assert response(sock).startswith(b"HTTP/1.1 200 ")
    for sock in silent:
        sock.close()


def test_client_that_gives_up_waiting_costs_nothing(server: HealthServer) -> None:
    sock = ask(server)
    assert is_readable(server)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close with a reset
    sock.close()
    child = only_child()
    wait_until(lambda: not [c for c in child.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED])
    server.answer()
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


def test_process_that_dies_time_and_again_is_given_up(server: HealthServer) -> None:
    for _ in range(health.MOST_SHORT_LIVES):
        only_child().kill()
        turn(server)
    assert children() == []
    assert not is_readable(server, 0)
    with pytest.raises(ConnectionRefusedError):
        connect(server)


def test_lives_that_were_long_are_not_counted(server: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "SHORT_LIFE", 0.0)
    for _ in range(health.MOST_SHORT_LIVES + 1):
        only_child().kill()
        turn(server)
    assert is_alive(only_child().pid)


def test_close_ends_a_process_that_is_stopped() -> None:
    server = HealthServer(0, os.environ)
    child = only_child()
    child.suspend()
    server.close()
    assert not is_alive(child.pid)


def test_is_out_of_reach_of_signals_that_are_meant_for_all(server: HealthServer) -> None:
    child = only_child()
    assert os.getsid(child.pid) == os.getpgid(child.pid) == child.pid
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        child.send_signal(signum)
    sock = ask(server)
    turn(server)
    assert response(sock).startswith(b"HTTP/1.1 200 ")
    assert only_child() == child


def test_holds_nothing_of_the_program_around_it(server: HealthServer) -> None:
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    second = HealthServer(0, os.environ)
    os.close(writing)
    wait_until(lambda: select.select([reading], [], [], 0)[0], "somebody holds the other end of the pipe")
    assert os.read(reading, 1) == b""
    os.close(reading)
    second.close()
    sock = ask(server)
    turn(server)
    assert response(sock).startswith(b"HTTP/1.1 200 ")


AGENT = """
import os, select, signal
from elastic_launch.health.server import HealthServer
server = HealthServer(0, os.environ)
if (copy := os.fork()) == 0:  # a program around the agent may do so: the copy holds all that the agent holds
    server._listening.close()
    signal.pause()
print(server.port, copy, flush=True)
while True:
    poller = select.poll()
    poller.register(server, select.POLLIN)
    poller.poll()
    server.answer()
"""


class Agent(NamedTuple):
    process: subprocess.Popen[str]
    port: int
    copy: int
    """A process that was forked from it."""


@pytest.fixture
def agent() -> Iterator[Agent]:
    """An agent of which nothing is left but its loop."""
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", AGENT], stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout
    agent = Agent(process, *map(int, process.stdout.readline().split()))
    yield agent
    process.kill()
    process.wait()
    os.kill(agent.copy, signal.SIGKILL)
    process.stdout.close()
    wait_until(lambda: not [child for child in children() if is_alive(child.pid)])


def status(port: int) -> int:
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    client.request("GET", "/")
    answer = client.getresponse()
    answer.read()
    client.close()
    return answer.status


def test_agent_that_is_stopped_is_not_healthy(agent: Agent) -> None:
    assert status(agent.port) == 200
    agent.process.send_signal(signal.SIGSTOP)
    assert status(agent.port) == 503
    agent.process.send_signal(signal.SIGCONT)
    assert status(agent.port) == 200


def test_server_ends_with_its_agent(agent: Agent) -> None:
    assert status(agent.port) == 200
    (server,) = (child for child in psutil.Process(agent.process.pid).children() if child.pid != agent.copy)
    agent.process.kill()
    wait_until(lambda: not is_alive(server.pid))
    with pytest.raises(ConnectionRefusedError):
        status(agent.port)
