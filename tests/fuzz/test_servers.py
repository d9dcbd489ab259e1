"""Anything at all in a request to a server of the agent: its control socket, and its health server."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from elastic_launch.agent.operator import Operator
from elastic_launch.control.connection import MAX_LINE, MAX_OUTPUT
from elastic_launch.control.server import MAX_CLIENTS, ControlServer
from elastic_launch.core.agent.lifecycle import begin
from elastic_launch.core.agent.messages import AgentEvent, Limits
from elastic_launch.core.status import Facts
from elastic_launch.errors import UsageError
from elastic_launch.health import server_main
from elastic_launch.health.server_main import Service
from elastic_launch.host.ports import listen
from elastic_launch.job import Policy
from tests.support.nonsense import JSON, TEXT, run_machine
from tests.support.waiting import DEADLINE

# --- control socket


def operator() -> Operator:
    """What answers for an agent that has just begun."""
    state, _ = begin(Limits(Policy(0), 30.0), 0.0)
    facts = Facts("job", "host", 7, "1.0", "train.py", 0.0, 0, 30.0, "/logs")
    return Operator(state, lambda: facts, lambda: Mapping, lambda: {}, lambda: {})  # type: ignore[arg-type,return-value]


REQUESTS = st.sampled_from(["status", "subscribe", "hello", "stop", "restart", "stacks"]) | TEXT


@given(REQUESTS, st.dictionaries(st.sampled_from(["scope", "signum", "checkpoint", "rank"]) | TEXT, JSON, max_size=3))
@example("stop", {"signum": True})
@example("stop", {"signum": [15], "scope": {}})
@example("stop", {"signum": 10**400})
@example("\ud800" * 1000, {})
def test_any_json_as_a_request_has_a_reply(name: str, fields: dict[str, Any]) -> None:
    try:
        reply, events = operator().carry_out({**fields, "request": name})
    except UsageError:
        return
    assert isinstance(reply, dict)
    assert reply["ok"] or not events
    assert json.loads(json.dumps(reply)) == reply


class Agent:
    """Answers each request with its own text."""

    def status(self) -> dict[str, Any]:
        return {}

    def carry_out(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], list[AgentEvent]]:
        if request["request"] != "echo":
            raise UsageError("unknown")
        return {"ok": True, "text": request.get("text")}, []


class Client:
    """A client, and what it must be told."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self.sock.setblocking(False)
        self.unfinished = b""
        self.expected: list[object] = []
        self.received = b""
        self.has_failed = self.has_ended = False
        """Whether it has sent nonsense; whether its connection is closed."""

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.sock.sendall(data)
        *lines, self.unfinished = (self.unfinished + data).split(b"\n")
        for line in lines:
            try:
                request = json.loads(line)
                assert isinstance(request["request"], str)
            except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
                self.has_failed = True
            if not self.has_failed:
                self.expected.append(request.get("text") if request["request"] == "echo" else None)
        self.has_failed = self.has_failed or len(self.unfinished) > MAX_LINE

    def receive(self) -> None:
        try:
            while data := self.sock.recv(1 << 16):
                self.received += data
            self.has_ended = True
        except BlockingIOError:
            pass
        except ConnectionError:
            self.has_ended = True


class Control(RuleBasedStateMachine):
    """Clients that ask, babble, and go."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.server = ControlServer("job", {"TMPDIR": self.folder.name}, Agent())
        self.clients: list[Client] = []

    def teardown(self) -> None:
        for client in self.clients:
            client.sock.close()
        self.server.close()
        self.folder.cleanup()

    @rule()
    def connect(self) -> None:
        if len(self.clients) < MAX_CLIENTS:
            self.clients.append(Client(self.server.path))
            self.turns()

    @rule(number=st.integers(0, 3), text=st.text(max_size=5) | st.just("x" * 30_000), cut=st.integers(0, 40))
    def ask(self, number: int, text: str, cut: int) -> None:
        self.send(number, b'{"request": "echo", "text": %s}\n' % json.dumps(text).encode(), cut)

    @rule(
        number=st.integers(0, 3),
        data=st.binary(max_size=50)
        | st.sampled_from([b"x" * 70_000, b"[" * 5000 + b"\n", b"\n", b"{}\n", b'{"request": 1}\n']),
    )
    def babble(self, number: int, data: bytes) -> None:
        self.send(number, data, 0)

    @rule(number=st.integers(0, 3))
    def leave(self, number: int) -> None:
        if number < len(self.clients):
            self.clients.pop(number).sock.close()
            self.turns()

    def send(self, number: int, data: bytes, cut: int) -> None:
        if number < len(self.clients):
            client = self.clients[number]
            client.send(data[:cut])
            self.turns()
            client.send(data[cut:])
            self.turns()

    def turns(self) -> None:
        """Do what the agent's loop does, until nothing is ready any more."""
        while True:
            poller = select.poll()
            for fd, mask in self.server.descriptors():
                poller.register(fd, mask)
            ready = [fd for fd, _ in poller.poll(0)]
            if not ready and self.server.deadline() is None:
                return
            self.server.take(ready)
            for client in self.clients:
                client.receive()

    @invariant()
    def everyone_gets_what_he_asked_for(self) -> None:
        for client in self.clients:
            client.receive()
            assert len(client.received) <= MAX_OUTPUT
            replies = [json.loads(line) for line in client.received.splitlines()]
            told = [reply.get("text") for reply in replies]
            assert client.has_ended == client.has_failed
            # Its connection may be reset, which loses replies, once it has sent nonsense.
            assert told[: len(client.expected)] == client.expected or client.has_failed
            assert len(told) <= len(client.expected) + client.has_failed


def test_clients_that_babble_do_not_disturb_others() -> None:
    run_machine(Control)


# --- health server

PIECES = st.sampled_from(
    [
        b"GET",
        b"HEAD",
        b"POST",
        b" ",
        b"/",
        b"/health",
        b"HTTP/1.1",
        b"HTTP/2",
        b"\r\n",
        b"\r\n\r\n",
        b"\n\n",
        b"x" * 9000,
    ]
)
STATUSES = {b"200", b"400", b"405", b"431"}


class Health:
    """A health server in a thread; this process answers for the agent."""

    def __init__(self) -> None:
        listening = listen(0)
        self.port: int = listening.getsockname()[1]
        listening.setblocking(False)
        self.control, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.alive, agent = os.pipe()
        self.closing = [listening, theirs]
        self.agent = self.alive
        self.service = Service(listening, theirs, self.alive)
        self.end = agent
        self.thread = threading.Thread(target=self.service.run)
        self.thread.start()

    def close(self) -> None:
        os.close(self.end)
        self.thread.join()
        os.close(self.agent)
        for client in [*self.service.clients.values()]:
            self.service.drop(client)
        for sock in (*self.closing, self.control):
            sock.close()

    def ask(self, *pieces: bytes) -> bytes:
        """Return what comes back for a request."""
        answer = b""
        with socket.create_connection(("127.0.0.1", self.port), DEADLINE) as sock:
            with contextlib.suppress(OSError):
                for piece in pieces:
                    sock.sendall(piece)
                sock.shutdown(socket.SHUT_WR)
            poller = select.poll()
            poller.register(sock, select.POLLIN)
            poller.register(self.control, select.POLLIN)
            while True:
                ready = dict(poller.poll(DEADLINE * 1000))
                assert ready
                if self.control.fileno() in ready:
                    self.control.send(b"!" * len(self.control.recv(64)))
                if sock.fileno() in ready:
                    try:
                        data = sock.recv(1 << 16)
                    except ConnectionResetError:
                        data = b""
                    if not data:
                        return answer
                    answer += data


@pytest.fixture(scope="module")
def health() -> Iterator[Health]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AGENT_PATIENCE", "REQUEST_PATIENCE", "CLOSE_PATIENCE"):  # this process may stand still
            patch.setattr(server_main, name, DEADLINE)
        health = Health()
        yield health
        health.close()


@given(st.lists(PIECES | st.binary(max_size=20), max_size=6))
@example([b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100_000])
@example([b"\x16\x03\x01garbage\n\n"])
@example([b"GET / HTTP/1.1\r\nHost: \x1b[2J\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"])
@example([b"GET / HTTP/1.1\r\nX: " + b"x" * 9000])
def test_any_bytes_as_a_request_of_http(health: Health, pieces: list[bytes]) -> None:
    status = health.ask(*pieces).split(b" ", 2)[1:2]
    assert not status or status[0] in STATUSES
    assert health.ask(b"GET / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert len(health.service.clients) <= 3
