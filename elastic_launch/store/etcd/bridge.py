"""Layer 2: the agent's hand on its bridge to etcd (``bridge_main``): settings, start, connections, end.

Starts one process, reads the files that the settings name; no gRPC and no thread in here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Mapping
from typing import Any

from elastic_launch.errors import RendezvousConnectionError, UsageError, how_it_ended
from elastic_launch.host.child import Child

CLOSE_PATIENCE = 2.0
"""Seconds to wait for the bridge to do what was asked last, and to end; it is killed then."""

DEFAULT_PORT = 2379
READ_TIMEOUT = 60.0
"""Seconds for a call to etcd, all attempts together; torch's default."""

_NAMES = {
    "protocol": ("protocol",),
    "cacert": ("cacert", "ca_cert"),
    "cert": ("cert", "ssl_cert"),
    "key": ("key", "ssl_cert_key"),
    "user": ("user", "username"),
    "password": ("password",),
    "read_timeout": ("read_timeout",),
    "start_timeout": ("start_timeout",),
    "cluster_id": ("cluster_id",),
}
"""What ``--rdzv-conf`` may call each setting; torch's backends etcd and etcd-v2 have names of their own."""


class EtcdBridge(Child):
    """A bridge process. ``fileno()`` is readable when ``take()`` has something to say: that the bridge has ended."""

    def __init__(self, endpoints: str, prefix: str, conf: Mapping[str, str], environ: Mapping[str, str]) -> None:
        """Start the process; it reaches out for etcd by itself, and ``take()`` tells when it cannot.

        Args:
            endpoints: ``HOST:PORT`` of members, with commas in between; the port is 2379 if left out.
            prefix: what all keys begin with in etcd. Those who use the same one share their keys, and a lease.
            conf: of ``--rdzv-conf``: protocol (http or https), cacert, cert, key (files), user, password, read_timeout
                (seconds for a call, 60); and start_timeout (the same before any was answered), cluster_id (of
                the members to be used; any). Others are ignored.
            environ: the variables of the process.

        Raises:
            UsageError: a setting is wrong, or its file cannot be read.
            RendezvousConnectionError: the system cannot start a process.
        """
        self.where = f"etcd at {endpoints}"
        """What messages call it."""
        told = {"prefix": prefix, "path": list(map(str, sys.path)), **_settings(endpoints, conf)}
        super().__init__("bridge_main", ("-I",), environ, told, "the bridge to etcd")

    def connect(self) -> socket.socket:
        """A new connection that speaks TCPStore's protocol, non-blocking. What is sent on it waits for the bridge.

        Where the bridge has ended the connection is closed at once, and ``take()`` says why.

        Raises:
            RendezvousConnectionError: no more descriptors, or the bridge takes no connection.
        """
        try:
            ours, theirs = socket.socketpair()
            with theirs, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.control.settimeout(CLOSE_PATIENCE)  # a few hundred fit, while the bridge starts
                socket.send_fds(self.control, [b"+"], [theirs.fileno()])
        except OSError as error:
            raise RendezvousConnectionError(f"cannot connect to the bridge to etcd: {error}") from error
        finally:
            self.control.setblocking(False)
        ours.setblocking(False)
        return ours

    def take(self) -> None:
        """Look whether the bridge still serves.

        Raises:
            RendezvousConnectionError: it has ended; the message says why. ``close()`` is still due.
        """
        try:
            text = self.control.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            text = b""
        if text:
            raise RendezvousConnectionError(text.decode())
        how = "has ended"
        if self.has_ended(CLOSE_PATIENCE):
            with contextlib.suppress(ChildProcessError):
                status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
                if status:
                    exited = status.si_code == os.CLD_EXITED
                    how = f"ended: {how_it_ended(status.si_status if exited else -status.si_status)}"
        raise RendezvousConnectionError(f"{self.where}: the bridge process (pid {self.pid}) {how}")

    def close(self) -> None:
        """Have the bridge do what was sent so far, and wait for its end; kill it after ``CLOSE_PATIENCE``.

        It is quickest when the connections are closed before.
        """
        self.end(CLOSE_PATIENCE)


def _settings(endpoints: str, conf: Mapping[str, str]) -> dict[str, Any]:
    """The fields of ``cluster.Settings``, from what the user wrote."""
    given = {name: conf[key] for name, keys in _NAMES.items() for key in keys if conf.get(key)}
    files = {name: _file(name, given[name]) if name in given else None for name in ("cacert", "cert", "key")}
    if (files["cert"] is None) != (files["key"] is None):
        raise UsageError("--rdzv-conf has one of cert and key; a client's certificate needs both")
    protocol = given.get("protocol", "https" if any(files.values()) else "http").strip().lower()
    if protocol not in ("http", "https"):
        raise UsageError(f"--rdzv-conf protocol={protocol}: must be http or https")
    if ("user" in given) != ("password" in given):
        raise UsageError("--rdzv-conf has one of user and password; etcd needs both")
    seconds = _seconds("read_timeout", given.get("read_timeout", str(READ_TIMEOUT)))
    members = [endpoint for entry in endpoints.split(",") if (endpoint := entry.strip())]
    if not members:
        raise UsageError("no endpoint of etcd: pass --rdzv-endpoint HOST:PORT, or several with commas in between")
    return {
        "endpoints": tuple(f"{m}:{DEFAULT_PORT}" if ":" not in m.rpartition("]")[2] else m for m in members),
        "secure": protocol == "https",
        **files,
        "user": given.get("user"),
        "password": given.get("password"),
        "read_timeout": seconds,
        "start_timeout": _seconds("start_timeout", given.get("start_timeout", str(seconds))),
        "cluster_id": int(given.get("cluster_id", "0")),
    }


def _seconds(name: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds < float("inf"):
        raise UsageError(f"--rdzv-conf {name}={text}: must be a number of seconds above 0")
    return seconds


def _file(name: str, path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"--rdzv-conf {name}={path}: {error.strerror}") from error
