"""Asks an etcd member over HTTP: about its health, its version, and the members of its cluster."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ssl import SSLContext

TIMEOUT = 1.0
"""Seconds to wait for a member's reply."""
LONGEST = 3.0
"""Seconds that a whole reply may take."""
MAX_ANSWER = 1 << 20
"""Most bytes of a reply."""


class HttpReply(NamedTuple):
    """A member's reply, or the reason why there is none."""

    body: Any
    """The JSON value; None if there is no reply."""
    why: str = ""
    """The reason for no reply, in a few words."""
    cluster_id: int = 0
    """The id of the member's cluster, which it sends on the port for other members only; otherwise 0."""
    is_late: bool = False
    """Whether the member has accepted the connection, but has not answered in time."""


NOT_HTTP = "it is not etcd"
"""The reason if the reply is not HTTP, or not JSON. A member may serve gRPC alone on its port for clients."""


def ask(
    host: str, port: int, path: str, body: dict[str, Any] | None = None, tls: SSLContext | None = None
) -> HttpReply:
    """Send a member a request: POST if there is a body, otherwise GET. Raises nothing.

    Args:
        host: The member's name or address.
        port: Its port for clients or for other members.
        path: The path of the URL.
        body: The JSON value to send.
        tls: How to set up TLS; None: without TLS.
    """
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    if tls:
        connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT, context=tls)
    cut: threading.Timer | None = None
    try:
        connection.connect()
        cut = threading.Timer(LONGEST, partial(_cut, connection.sock))  # TIMEOUT is for each part of an answer
        cut.start()
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        data = response.read(MAX_ANSWER + 1)
        if len(data) > MAX_ANSWER:
            return HttpReply(None, NOT_HTTP)
        if response.status != 200:
            return HttpReply(None, f"status {response.status}")
        return HttpReply(json.loads(data), cluster_id=int(response.headers.get("X-Etcd-Cluster-ID", "0"), 16))
    except TimeoutError:
        return HttpReply(None, "no answer", is_late=connection.sock is not None)
    except OSError as error:
        return HttpReply(None, (error.strerror or str(error)).lower())
    except (http.client.HTTPException, ValueError, RecursionError):
        return HttpReply(None, NOT_HTTP)
    finally:
        if cut:
            cut.cancel()
            cut.join()
        connection.close()


def tls_context(cacert: str | None, cert: str | None = None, key: str | None = None) -> SSLContext:
    """How to set up TLS with these files; without ``cacert`` the system's authorities are trusted.

    Raises:
        OSError: A file cannot be read, or used.
    """
    import ssl  # late: few need it

    context = ssl.create_default_context(cafile=cacert)
    if cert:
        context.load_cert_chain(cert, key)
    return context


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may have been closed by now
        sock.shutdown(socket.SHUT_RDWR)


def is_healthy(host: str, port: int, tls: SSLContext | None = None) -> bool:
    """Whether a member serves clients."""
    answer = ask(host, port, "/health", tls=tls).body
    return isinstance(answer, dict) and answer.get("health") == "true"
