"""Layer 2: the health server, a small process beside the agent that answers HTTP requests about it.

The agent is healthy when its loop turns: for a request this process sends the agent a byte, and the agent's loop sends
one back. No answer within ``ANSWER_PATIENCE``, since the loop hangs or the agent is stopped, is status 503. One
byte is under way at most, however many ask. While nobody asks, nobody wakes up.

It runs as a program of its own, ``main(LISTENING, SOCKET, AGENT)`` under ``python -I -S``: LISTENING is the socket that
clients connect to, SOCKET a stream to the agent, AGENT a pidfd of the agent. It ends when the agent goes or lets go. It
imports nothing of elastic_launch, and decides nothing.
"""

from __future__ import annotations

import os
import select
import socket
import time
from enum import Enum

TYPE_CHECKING = False  # typing is an import that this process does without
if TYPE_CHECKING:
    from typing import NoReturn

ANSWER_PATIENCE = 2.0
"""Seconds for the agent to answer."""
REQUEST_PATIENCE = 5.0
"""Seconds from connecting until a request is complete."""
FAREWELL_PATIENCE = 1.0
"""Seconds for a client to close its end, once it was answered."""
MOST_CLIENTS = 128
"""Connections at a time; a further one takes the place of the oldest that has not asked yet."""
LONGEST_REQUEST = 8192
"""Bytes of a request's head."""

HEALTHY = 200, "OK", "healthy"
UNHEALTHY = 503, "Service Unavailable", "the launcher does not answer"
MALFORMED = 400, "Bad Request", "not an HTTP request"
NOT_ALLOWED = 405, "Method Not Allowed", "only GET and HEAD"
TOO_LARGE = 431, "Request Header Fields Too Large", "the request is too large"


class Stage(Enum):
    """How far a client has come."""

    ASKING = 0
    """Its request is not complete."""
    WAITING = 1
    """The agent's answer is under way."""
    LEAVING = 2
    """It has its response; what it may still send is read, since closing before would take the response from it."""


class Client:
    """One connection."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self.connection = connection
        self.stage = Stage.ASKING
        self.deadline = deadline
        self.request = b""


class Service:
    """The server's state, and its loop."""

    def __init__(self, listening: socket.socket, agent: socket.socket, agent_process: int) -> None:
        self.listening = listening
        self.agent = agent
        self.agent_process = agent_process
        self.clients: dict[int, Client] = {}
        """By descriptor, the oldest first."""
        self.asked = False
        """Whether the agent owes an answer."""
        self.poller = select.poll()
        for fd in (listening.fileno(), agent.fileno(), agent_process):
            self.poller.register(fd, select.POLLIN)

    def run(self) -> None:
        """Serve until the agent is gone."""
        while True:
            first = min((client.deadline for client in self.clients.values()), default=None)
            left = None if first is None else max(0.0, first - time.monotonic()) * 1000
            ready = dict(self.poller.poll(left))
            if self.agent_process in ready:
                return
            # First of all: what the agent has answered by now says nothing about requests that are read after it.
            if self.agent.fileno() in ready and not self.take_answer():
                return
            for fd in [fd for fd in ready if fd in self.clients]:
                self.read(self.clients[fd])
            if self.listening.fileno() in ready:
                self.accept()
            now = time.monotonic()
            for client in [client for client in self.clients.values() if client.deadline <= now]:
                if client.stage is Stage.WAITING:
                    self.respond(client, UNHEALTHY)
                else:
                    self.drop(client)

    def take_answer(self) -> bool:
        """Tell those who wait that the agent is well. Returns whether there still is an agent."""
        try:
            if not self.agent.recv(64):
                return False
        except OSError:
            return False
        self.asked = False
        for client in [client for client in self.clients.values() if client.stage is Stage.WAITING]:
            self.respond(client, HEALTHY)
        return True

    def accept(self) -> None:
        """Let in one client."""
        try:
            connection, _ = self.listening.accept()
        except BlockingIOError:
            return
        except OSError:  # it has gone again, or there are no more descriptors: make room
            if self.clients:
                self.drop(self.oldest())
            else:
                time.sleep(0.1)
            return
        connection.setblocking(False)
        if len(self.clients) >= MOST_CLIENTS:
            self.drop(self.oldest())
        self.clients[connection.fileno()] = Client(connection, time.monotonic() + REQUEST_PATIENCE)
        self.poller.register(connection, select.POLLIN)

    def oldest(self) -> Client:
        """Whose place a newcomer takes: one that has asked keeps it, if another has not."""
        idle = (client for client in self.clients.values() if client.stage is not Stage.WAITING)
        return next(idle, next(iter(self.clients.values())))

    def read(self, client: Client) -> None:
        """Read what a client sends, and see whether that is a request."""
        try:
            data = client.connection.recv(LONGEST_REQUEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.drop(client)
        elif client.stage is Stage.ASKING:
            client.request += data
            if has_head(client.request):
                self.ask(client)
            elif len(client.request) > LONGEST_REQUEST:
                self.respond(client, TOO_LARGE)

    def ask(self, client: Client) -> None:
        """Ask the agent on behalf of a client that has sent a whole request, if it is one."""
        words = client.request.split(b"\n", 1)[0].split()
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            self.respond(client, MALFORMED)
        elif words[0] not in (b"GET", b"HEAD"):
            self.respond(client, NOT_ALLOWED)
        else:
            client.stage = Stage.WAITING
            client.deadline = time.monotonic() + ANSWER_PATIENCE
            self.poller.modify(client.connection, 0)  # that it is gone shows all the same
            if not self.asked:
                self.asked = True
                try:  # noqa: SIM105 - contextlib is an import that this process does without
                    self.agent.send(b"?")
                except OSError:
                    pass  # that the agent is gone shows in the loop

    def respond(self, client: Client, status: tuple[int, str, str]) -> None:
        """Answer a client, and wait for it to leave."""
        code, reason, text = status
        body = f'{{"status": "{text}"}}\n'
        response = (
            f"HTTP/1.1 {code} {reason}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Cache-Control: no-store\r\nConnection: close\r\n"
            + ("Allow: GET, HEAD\r\n" if status is NOT_ALLOWED else "")
            + "\r\n"
            + ("" if client.request.startswith(b"HEAD ") else body)
        )
        try:
            client.connection.send(response.encode())  # far smaller than the buffer of a fresh connection
            client.connection.shutdown(socket.SHUT_WR)
        except OSError:
            self.drop(client)
            return
        client.stage = Stage.LEAVING
        client.deadline = time.monotonic() + FAREWELL_PATIENCE
        self.poller.modify(client.connection, select.POLLIN)

    def drop(self, client: Client) -> None:
        """Close a connection."""
        fd = client.connection.fileno()
        self.poller.unregister(fd)
        del self.clients[fd]
        client.connection.close()


def has_head(request: bytes) -> bool:
    """Whether the head of a request is complete: an empty line has come."""
    return b"\r\n\r\n" in request or b"\n\n" in request


def close_others(kept: tuple[int, ...]) -> None:
    """Close what the agent's program left open."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in kept:
            try:  # noqa: SIM105 - contextlib is an import that this process does without
                os.close(fd)
            except OSError:
                pass  # the descriptor of the listing itself


def main(listening: int, sock: int, agent_process: int) -> NoReturn:
    """Run the server as a program; the arguments are inherited descriptors."""
    close_others((listening, sock, agent_process))
    with open("/proc/self/comm", "w") as name:  # what ps shows
        name.write("elastic-health")
    Service(socket.socket(fileno=listening), socket.socket(fileno=sock), agent_process).run()
    os._exit(0)
