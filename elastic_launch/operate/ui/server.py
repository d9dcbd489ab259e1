"""The web server of the page: three files, and the data of the jobs as server-sent events."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from elastic_launch.control.client import ControlClient
from elastic_launch.errors import LaunchError, UsageError
from elastic_launch.operate import stacks
from elastic_launch.operate.jobs import NoJobError
from elastic_launch.operate.logs import files_of, why_none
from elastic_launch.operate.ui.access import Access
from elastic_launch.operate.ui.feeds import Feeds, Snapshot
from elastic_launch.operate.ui.tail import Choice, Tail

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""The page: path, file and type."""
MAX_CLIENTS = 64
"""Connections that are served at once."""
PATIENCE = 10.0
"""Seconds that a client may take to send its request, or to read what is sent to it."""
_LOG_INTERVAL = 0.3
"""Seconds between two looks at a log."""
_KEEP_ALIVE = 15.0
"""Seconds after which something is sent, so that it is noticed if the client has gone."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Server(ThreadingHTTPServer):
    """Listens, and serves each connection in a thread of its own.

    Raises:
        OSError: the address cannot be used.
    """

    daemon_threads = True
    request_queue_size = MAX_CLIENTS

    def __init__(self, address: tuple[str, int], family: int, access: Access, feeds: Feeds) -> None:
        self.address_family = family
        self.access, self.feeds = access, feeds
        self._places = threading.BoundedSemaphore(MAX_CLIENTS)
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Bind, without asking the name service for this host's name."""
        TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin to serve a connection, if there are not too many."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            with contextlib.suppress(OSError):
                request.settimeout(0)
                request.send(b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore an error of one connection: the client has gone, or does not read."""


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server
    connection: socket.socket
    server_version, sys_version = "elastic-job", ""
    timeout = PATIENCE

    def do_GET(self) -> None:
        """Answer a request that only reads."""
        self._answer({"/api/events": self._events, "/api/files": self._files})

    def do_POST(self) -> None:
        """Answer a request that makes an agent do something."""
        self._answer({"/api/stacks": self._stacks})

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing: standard error is for people."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send an error that a program can read."""
        self._send(code, "application/json", json.dumps({"error": message or HTTPStatus(code).phrase}).encode())

    def _answer(self, routes: Mapping[str, Any]) -> None:
        headers = self.headers
        try:
            url = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            if why := self.server.access.refuses_host(headers):
                self.send_error(HTTPStatus.FORBIDDEN, why)
            elif self.command == "GET" and url.path in FILES:
                name, kind = FILES[url.path]
                with open(os.path.join(os.path.dirname(__file__), name), "rb") as file:
                    self._send(HTTPStatus.OK, kind, file.read())
            elif url.path not in routes:
                self.send_error(HTTPStatus.NOT_FOUND, "there is no such page")
            elif why := self.server.access.refuses_data(headers, self.connection):
                self.send_error(HTTPStatus.UNAUTHORIZED if self.server.access.token else HTTPStatus.FORBIDDEN, why)
            else:
                routes[url.path](query)
        except (UsageError, ValueError) as error:
            self.send_error(HTTPStatus.BAD_REQUEST, str(error))
        except NoJobError as error:
            self.send_error(HTTPStatus.NOT_FOUND, str(error))
        except LaunchError as error:
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, str(error))

    def _send(self, code: int, kind: str, body: bytes | None) -> None:
        """Send a reply; None: its body follows."""
        self.send_response(code)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        if body is not None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if body:
            self.wfile.write(body)

    def _events(self, query: Mapping[str, str]) -> None:
        """Send how the list of jobs is, or a job and the end of a log, and what changes, until the client goes."""
        feed = self.server.feeds.job(query["job"]) if "job" in query else self.server.feeds.list
        choice = _choice(query) if "rank" in query else None
        self._send(HTTPStatus.OK, "text/event-stream", None)
        nodes: dict[int, str] = {}
        tail: Tail | None = None
        sent_at = time.monotonic()
        with feed.watched() as seen:
            while True:
                seen, snapshot = feed.wait(seen, _LOG_INTERVAL if choice else _KEEP_ALIVE)
                out = b"".join(_events_of(snapshot, nodes)) if snapshot else b""
                if choice:
                    if snapshot and (file := choice.among(snapshot.agents)) and (not tail or tail.file != file):
                        tail = Tail(file)
                        out += _event("log", {"title": file.title.strip("=<> "), "text": tail.read(), "is_new": True})
                    elif tail and (text := tail.read()):
                        out += _event("log", {"text": text})
                if not out and time.monotonic() - sent_at >= _KEEP_ALIVE:
                    out = b":\n\n"
                if out:
                    self.wfile.write(out)
                    sent_at = time.monotonic()
                if snapshot and snapshot.is_last:
                    return

    def _files(self, query: Mapping[str, str]) -> None:
        """Send which ranks, streams and rounds have output in files."""
        agents = self.server.feeds.agents(_named(query))
        found = [(file.round, file.rank, file.stream) for file in files_of(agents, None)]
        body = {"files": found, "why_none": "" if found else why_none(agents, None)}
        self._send(HTTPStatus.OK, "application/json", json.dumps(body).encode())

    def _stacks(self, query: Mapping[str, str]) -> None:
        """Send the merged stacks of all ranks."""
        path = self.server.feeds.socket(_named(query))
        with contextlib.closing(ControlClient(path)) as client:
            reply = client.ask({"request": "stacks"}, stacks.PATIENCE)
        self._send(HTTPStatus.OK, "application/json", json.dumps(reply).encode())


def _events_of(snapshot: Snapshot, known: dict[int, str]) -> Iterator[bytes]:
    """Encode a snapshot; of a job's nodes only those that have changed. ``known`` is what the client has of them."""
    data = {**snapshot.data, "now": time.time()}
    if snapshot.kind == "job":
        changed = {place: node for place, node in enumerate(snapshot.nodes) if known.get(place) != node}
        known.update(changed)
        data["node_total"] = len(snapshot.nodes)
        data["nodes"] = {place: json.loads(node) for place, node in changed.items()}
    yield _event(snapshot.kind, data)


def _event(kind: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


def _named(query: Mapping[str, str]) -> str:
    if "job" not in query:
        raise UsageError("job: must say which job")
    return query["job"]


def _choice(query: Mapping[str, str]) -> Choice:
    rank, stream, round_ = query["rank"], query.get("stream", "stdout"), query.get("round", "")
    if not (rank.isdecimal() and (round_.isdecimal() or not round_) and stream in ("stdout", "stderr")):
        raise UsageError("rank and round: must be numbers; stream: must be stdout or stderr")
    return Choice(int(rank), stream, int(round_) if round_ else None)
