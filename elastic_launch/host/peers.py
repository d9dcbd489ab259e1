"""Who is at the other end of a TCP connection within this host. Imported where somebody listens on loopback."""

from __future__ import annotations

import ipaddress
import socket
import sys


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
