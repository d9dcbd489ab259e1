"""Who may see the page: which requests are answered."""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

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


def peer_uid(sock: socket.socket) -> int | None:
    """Return the user at the other end of a connection within this host; None: it has gone, or is on another host."""
    here, there = sock.getsockname(), sock.getpeername()
    for path, is_v6 in (("/proc/net/tcp", False), ("/proc/net/tcp6", True)):
        wanted = [_as_in_proc(there, is_v6), _as_in_proc(here, is_v6)]
        if None in wanted:
            continue
        with open(path, encoding="ascii") as file:
            for line in file:
                fields = line.split()
                # A socket that no process has any more has the inode 0, and seems to be root's.
                if fields[1:3] == wanted and fields[9] != "0":
                    return int(fields[7])
    return None


def _as_in_proc(address: tuple[str, int], is_v6: bool) -> str | None:
    """Return an address as ``/proc/net/tcp`` has it: words of 32 bits in the host's byte order, and the port."""
    numeric = ipaddress.ip_address(address[0].partition("%")[0])
    packed = numeric.packed
    if not is_v6 and numeric.version == 6:
        mapped = ipaddress.IPv6Address(packed).ipv4_mapped
        if mapped is None:
            return None
        packed = mapped.packed
    elif is_v6 and numeric.version == 4:
        packed = bytes(10) + b"\xff\xff" + packed
    words = [int.from_bytes(packed[at : at + 4], sys.byteorder) for at in range(0, len(packed), 4)]
    return f"{''.join(f'{word:08X}' for word in words)}:{address[1]:04X}"


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
