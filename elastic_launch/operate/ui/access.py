"""Who may see the page: which requests are answered."""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from elastic_launch.host.peers import peer_uid

if TYPE_CHECKING:
    from email.message import Message


class Access(NamedTuple):
    """The rules. Each method returns why a request is refused; empty: it is not."""

    token: str
    """What every request for a job's data must bring. Empty: only processes of this user on this host are answered."""
    names: Sequence[str]
    """Names of this host, besides ``localhost`` and numeric addresses."""

    def refuses_host(self, headers: Message) -> str:
        """Check what the browser believes to talk to: a name of another site may have been made to mean this host."""
        try:
            host = urlsplit(f"//{headers.get('Host', '')}").hostname or ""
        except ValueError:
            host = ""
        if host == "localhost" or host in (name.lower() for name in self.names) or _is_numeric(host):
            return ""
        return "this address is not one of this host's names; use localhost or a numeric address"

    def refuses_data(self, headers: Message, sock: socket.socket) -> str:
        """Check a request for a job's data."""
        origin = headers.get("Origin")
        is_own = origin is None or urlsplit(origin).netloc == headers.get("Host")
        if headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none") or not is_own:
            return "another site's page may not ask"
        if self.token:
            given = headers.get("Authorization", "").removeprefix("Bearer ")
            is_right = hmac.compare_digest(given.encode(errors="replace"), self.token.encode())
            return "" if is_right else "the token is missing or wrong"
        return "" if peer_uid(sock) in (0, os.geteuid()) else "the jobs are another user's"


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
