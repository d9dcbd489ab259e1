"""Runs in the health server's process: answers HTTP requests about the agent.

The agent is healthy if its loop runs. For a request this process sends the agent a byte, and the agent's loop sends one
back. Without a reply within ``AGENT_PATIENCE`` seconds, because the loop hangs or the agent is stopped, the response is
status 503. At most one byte is under way, however many clients ask. Without requests nobody wakes up.

HTTP is spoken by hand. The standard library's ``http.server`` would double the memory of this process, which stays for
the whole job on each node: 20.0 MB instead of 10.3 MB with 100 idle clients (RSS, CPython 3.11). It would also need a
thread for each client, because it reads requests from blocking sockets.
"""

from __future__ import annotations

import os
import select
import socket
import time
from enum import Enum

TYPE_CHECKING = False  # mypy knows the name; importing typing would cost memory
if TYPE_CHECKING:
    from typing import NoReturn

AGENT_PATIENCE = 2.0
"""Seconds that the agent has to reply."""
REQUEST_PATIENCE = 5.0
"""Seconds from a connection until its request is complete."""
CLOSE_PATIENCE = 1.0
"""Seconds that a client has to close its end after the response."""
MAX_CLIENTS = 128
"""Connections at a time; another one replaces the oldest that has not sent a request."""
MAX_REQUEST = 8192
"""Bytes of a request's head."""

HEALTHY = 200, "OK", "healthy"
UNHEALTHY = 503, "Service Unavailable", "the launcher does not answer"
MALFORMED = 400, "Bad Request", "not an HTTP request"
NOT_ALLOWED = 405, "Method Not Allowed", "only GET and HEAD"
TOO_LARGE = 431, "Request Header Fields Too Large", "the request is too large"


class Stage(Enum):
    """The progress of a client."""

    ASKING = 0
    """Its request is not complete."""
    WAITING = 1
    """The agent's reply is under way."""
    LEAVING = 2
    """It has its response. Whatever it still sends is read, because closing before that would discard the response."""


class Client:
    """A connection."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self.connection = connection
        self.stage = Stage.ASKING
        self.deadline = deadline
        self.request = b""


class Service:
    """The server's state, and its loop."""

    def __init__(self, listening: socket.socket, control: socket.socket, agent: int) -> None:
        self.listening = listening
        self.control = control
        self.agent = agent
        self.clients: dict[int, Client] = {}
        """Clients by descriptor, the oldest first."""
        self.asked = False
        """Whether the agent owes a reply."""
        self.poller = select.poll()
        for source in (listening, control, agent):
            self.poller.register(source, select.POLLIN)

    def run(self) -> None:
        """Serve until the agent is gone."""
        while True:
            first = min((client.deadline for client in self.clients.values()), default=None)
            left = None if first is None else max(0.0, first - time.monotonic()) * 1000
            ready = dict(self.poller.poll(left))
            if self.agent in ready:
                return
            # First of all, because the agent's reply says nothing about requests that are read after it.
            if self.control.fileno() in ready and not self.read_reply():
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

    def read_reply(self) -> bool:
        """Tell the waiting clients that the agent is healthy. Returns False if there is no agent any more."""
        try:
            if not self.control.recv(64):
                return False
        except OSError:
            return False
        self.asked = False
        for client in [client for client in self.clients.values() if client.stage is Stage.WAITING]:
            self.respond(client, HEALTHY)
        return True

    def accept(self) -> None:
        """Accept one client."""
        try:
            connection, _ = self.listening.accept()
        except BlockingIOError:
            return
        except OSError:  # the client has gone again, or there are no more descriptors: make room
            if self.clients:
                self.drop(self.oldest())
            else:
                time.sleep(0.1)
            return
        connection.setblocking(False)
        if len(self.clients) >= MAX_CLIENTS:
            self.drop(self.oldest())
        self.clients[connection.fileno()] = Client(connection, time.monotonic() + REQUEST_PATIENCE)
        self.poller.register(connection, select.POLLIN)

    def oldest(self) -> Client:
        """The client to replace: the oldest that does not wait for the agent's reply, or else the oldest of all."""
        idle = (client for client in self.clients.values() if client.stage is not Stage.WAITING)
        return next(idle, next(iter(self.clients.values())))

    def read(self, client: Client) -> None:
        """Read what a client has sent, and handle its request if that is complete."""
        try:
            data = client.connection.recv(MAX_REQUEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.drop(client)
        elif client.stage is Stage.ASKING:
            client.request += data
            if b"\r\n\r\n" in client.request or b"\n\n" in client.request:
                self.handle(client)
            elif len(client.request) > MAX_REQUEST:
                self.respond(client, TOO_LARGE)

    def handle(self, client: Client) -> None:
        """Refuse a request, or ask the agent on behalf of its client."""
        words = client.request.split(b"\n", 1)[0].split()
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            self.respond(client, MALFORMED)
        elif words[0] not in (b"GET", b"HEAD"):
            self.respond(client, NOT_ALLOWED)
        else:
            client.stage = Stage.WAITING
            client.deadline = time.monotonic() + AGENT_PATIENCE
            self.poller.modify(client.connection, 0)  # a lost connection is reported nevertheless
            if not self.asked:
                self.asked = True
                try:  # noqa: SIM105 - contextlib is an import that this process does without
                    self.control.send(b"?")
                except OSError:
                    pass  # the loop notices that the agent is gone

    def respond(self, client: Client, status: tuple[int, str, str]) -> None:
        """Send a client its response, and wait until it closes the connection."""
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
        client.deadline = time.monotonic() + CLOSE_PATIENCE
        self.poller.modify(client.connection, select.POLLIN)

    def drop(self, client: Client) -> None:
        """Close a connection."""
        fd = client.connection.fileno()
        self.poller.unregister(fd)
        del self.clients[fd]
        client.connection.close()


def main(control: socket.socket, agent: int, listening: int) -> NoReturn:
    """Run the server.

    Args:
        control: The socket to the agent.
        agent: A pidfd of the agent.
        listening: Descriptor of the socket that clients connect to.
    """
    sock = socket.socket(fileno=listening)
    sock.setblocking(False)  # a client may be gone before it is accepted
    Service(sock, control, agent).run()
    os._exit(0)
