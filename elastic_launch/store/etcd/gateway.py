"""Asks an etcd member over HTTP: about its health, its version, and the members of its cluster."""

from __future__ import annotations

import http.client
import json
from typing import Any, NamedTuple

TIMEOUT = 1.0
"""Seconds to wait for a member's reply."""


class HttpReply(NamedTuple):
    """A member's reply, or the reason why there is none."""

    body: Any
    """The JSON value; None if there is no reply."""
    why: str = ""
    """The reason for no reply, in a few words."""
    cluster_id: int = 0
    """The id of the member's cluster, which it sends on the port for other members only; otherwise 0."""


def ask(host: str, port: int, path: str, body: dict[str, Any] | None = None) -> HttpReply:
    """Send a member a request: POST if there is a body, otherwise GET. Raises nothing."""
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    try:
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        data = response.read()
        if response.status != 200:
            return HttpReply(None, f"status {response.status}")
        return HttpReply(json.loads(data), cluster_id=int(response.headers.get("X-Etcd-Cluster-ID", "0"), 16))
    except TimeoutError:
        return HttpReply(None, "no answer")
    except OSError as error:
        return HttpReply(None, (error.strerror or str(error)).lower())
    except (http.client.HTTPException, ValueError):
        return HttpReply(None, "it is not etcd")
    finally:
        connection.close()


def is_healthy(host: str, port: int) -> bool:
    """Whether a member serves clients."""
    answer = ask(host, port, "/health").body
    return isinstance(answer, dict) and answer.get("health") == "true"
